/* rundir.c: the run directory: recipe.yaml (resolved), metrics.jsonl, adapters/<task>, bases/<task>, starts/<task>,
 * checkpoints/, matrix.json, samples/<row>.json, best/adapter, run.log, result.json. */
#include <stdio.h>
#include <string.h>

#include "core/strbuf.h"
#include "io/file.h"
#include "train/loop.h"

static bool holds_run(const char *dir) {
  char path[ESP_PATH];
  return esp_file_exists(esp_path_join(path, sizeof path, dir, "recipe.yaml")) ||
         esp_dir_exists(esp_path_join(path, sizeof path, dir, "checkpoints"));
}

/* Only what a run writes: the directory may hold the user's own files. */
static esp_status remove_run(const char *dir) {
  static const char *const files[] = {"recipe.yaml", "metrics.jsonl", "events.out.tfevents.0.espalier",
                                      "matrix.json", "result.json",   "run.log"};
  static const char *const folders[] = {"checkpoints", "adapters", "bases", "starts", "best", "samples"};
  char path[ESP_PATH];
  for (size_t i = 0; i < sizeof folders / sizeof *folders; i++)
    if (esp_dir_exists(esp_path_join(path, sizeof path, dir, folders[i]))) ESP_TRY(esp_remove_tree(path));
  for (size_t i = 0; i < sizeof files / sizeof *files; i++)
    if (esp_file_exists(esp_path_join(path, sizeof path, dir, files[i])) && remove(path) != 0)
      return esp_fail(ESP_ERR_DATA, "%s: cannot be removed", path);
  return ESP_OK;
}

static esp_status check(const esp_recipe *r, bool overwrite) {
  if (overwrite || !holds_run(r->checkpoint.output_dir)) return ESP_OK;
  return esp_fail(ESP_ERR_RECIPE,
                  "checkpoint.output_dir %s already holds a run: resume it, name another directory, or overwrite it",
                  r->checkpoint.output_dir);
}

static esp_status write_recipe(const esp_recipe *r) {
  char path[ESP_PATH], *text = esp_recipe_resolved(r);
  if (!text) return ESP_ERR_MEMORY;
  esp_path_join(path, sizeof path, r->checkpoint.output_dir, "recipe.yaml");
  esp_status st = esp_file_write_atomic(path, text, strlen(text));
  esp_mem_free(text);
  return st;
}

esp_status esp_rundir_recipe(const esp_recipe *r, esp_comm *comm) {
  return esp_comm_agree(comm, comm->rank == 0 ? write_recipe(r) : ESP_OK);
}

static esp_status prepare(const esp_recipe *r, bool resume, bool overwrite) {
  const char *dir = r->checkpoint.output_dir;
  if (resume) {
    if (!holds_run(dir)) return esp_fail(ESP_ERR_DATA, "%s: holds no run to resume", dir);
    return esp_checkpoint_prune(r, 0); /* what a kill left half-written */
  }
  ESP_TRY(check(r, overwrite));
  if (holds_run(dir)) ESP_TRY(remove_run(dir));
  ESP_TRY(esp_mkdirs(dir));
  return write_recipe(r);
}

esp_status esp_rundir_prepare(const esp_recipe *r, esp_comm *comm, bool resume, bool overwrite) {
  return esp_comm_agree(comm, comm->rank == 0 ? prepare(r, resume, overwrite) : ESP_OK);
}

esp_status esp_rundir_check(const esp_recipe *r, esp_comm *comm, bool overwrite) {
  return esp_comm_agree(comm, comm->rank == 0 ? check(r, overwrite) : ESP_OK);
}

esp_status esp_rundir_base(const esp_loop *l, char out[ESP_PATH]) {
  if (l->state.base[0])
    esp_path_join(out, ESP_PATH, l->r->checkpoint.output_dir, l->state.base);
  else
    snprintf(out, ESP_PATH, "%s", l->r->model.base_model);
  return ESP_OK;
}

static char *of_task(const esp_recipe *r, const char *what, int i, char path[ESP_PATH]) {
  char folder[ESP_PATH];
  esp_path_join(folder, sizeof folder, r->checkpoint.output_dir, what);
  return esp_path_join(path, ESP_PATH, folder, r->tasks[i].name);
}

char *esp_train_adapter(const esp_recipe *r, int i, char path[ESP_PATH]) {
  return of_task(r, "adapters", i, path);
}

char *esp_train_start(const esp_recipe *r, int i, char path[ESP_PATH]) {
  return of_task(r, "starts", i, path);
}

esp_status esp_train_last(const esp_recipe *r, char base[ESP_PATH], char adapter[ESP_PATH]) {
  int last = r->n_tasks - 1;
  snprintf(base, ESP_PATH, "%s", r->model.base_model);
  if (r->continual.policy == ESP_POLICY_MERGE_THEN_NEW && last > 0) {
    if (r->tasks[last].start)
      esp_train_start(r, last, base);
    else
      of_task(r, "bases", last - 1, base);
  }
  if (!esp_dir_exists(esp_train_adapter(r, r->n_tasks - 1, adapter)))
    return esp_fail(ESP_ERR_DATA, "%s: the run has not finished its last task", r->checkpoint.output_dir);
  return ESP_OK;
}
