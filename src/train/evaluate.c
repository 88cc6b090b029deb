/* evaluate.c: scores at task ends and in the middle of tasks. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "io/file.h"
#include "train/loop.h"

esp_status esp_loop_score(esp_loop *l, int i, esp_score_result *out) {
  const esp_eval_set *set = &l->r->eval.sets[i];
  esp_score_request q = esp_engine_request(&l->engine, &l->data, i);
  ESP_TRY(l->hooks->score(l->hooks->ctx, &q, out));
  esp_event e = esp_loop_event(l, ESP_EVENT_EVAL);
  e.set = set->name;
  e.metric = l->hooks->metric_name(set->metric);
  e.score = out->value;
  e.malformed = out->malformed;
  e.has_malformed = !isnan(out->malformed);
  if (l->comm->rank == 0 && l->pending == ESP_OK) l->pending = esp_metrics_eval(&l->metrics, &e);
  esp_loop_emit(l, &e);
  return ESP_OK;
}

/* samples/<row>.json: what the model answers in this state. A file of its own for each row, written whole: a run that
 * is resumed writes the same again. */
static esp_status keep_samples(esp_loop *l, int row) {
  const esp_recipe *r = l->r;
  char dir[ESP_PATH], path[ESP_PATH], name[32];
  esp_status st = ESP_OK;
  esp_strbuf b;
  esp_strbuf_init(&b);
  esp_strbuf_puts(&b, "[");
  for (int i = 0; i < r->eval.n_sets; i++) {
    esp_score_request q = esp_engine_request(&l->engine, &l->data, i);
    esp_strbuf one;
    esp_strbuf_init(&one);
    st = l->hooks->samples(l->hooks->ctx, &q, r->eval.samples, &one);
    if (st == ESP_OK && one.failed) st = ESP_ERR_MEMORY;
    if (st == ESP_OK && one.len > 0) esp_strbuf_printf(&b, "%s\n%s", b.len > 1 ? "," : "", one.data);
    esp_strbuf_deinit(&one);
    if (st != ESP_OK) goto out;
  }
  esp_strbuf_puts(&b, "\n]\n");
  if (b.failed) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  snprintf(name, sizeof name, "%d.json", row);
  ESP_GOTO(esp_mkdirs(esp_path_join(dir, sizeof dir, r->checkpoint.output_dir, "samples")));
  st = esp_file_write_atomic(esp_path_join(path, sizeof path, dir, name), b.data, b.len);
out:
  esp_strbuf_deinit(&b);
  return st;
}

esp_status esp_loop_matrix_row(esp_loop *l, int row) {
  if (!l->matrix) return ESP_OK;
  esp_loop_phase(l, "eval");
  for (int i = 0; i < l->r->eval.n_sets; i++) {
    esp_score_result result;
    ESP_TRY(esp_loop_score(l, i, &result));
    *esp_matrix_cell(l->matrix, row, i) = result.value;
    *esp_matrix_malformed(l->matrix, row, i) = result.malformed;
  }
  if (l->r->eval.samples > 0) ESP_TRY(esp_comm_agree(l->comm, l->comm->rank == 0 ? keep_samples(l, row) : ESP_OK));
  char path[ESP_PATH];
  esp_path_join(path, sizeof path, l->r->checkpoint.output_dir, "matrix.json");
  esp_status st = l->pending;
  if (st == ESP_OK && l->comm->rank == 0) st = esp_matrix_save(l->matrix, path);
  return esp_comm_agree(l->comm, st);
}

esp_status esp_loop_save_adapter(esp_loop *l, const char *folder, const char *name, char path[ESP_PATH]) {
  char dir[ESP_PATH];
  esp_path_join(dir, sizeof dir, l->r->checkpoint.output_dir, folder);
  esp_path_join(path, ESP_PATH, dir, name);
  esp_status st = ESP_OK;
  if (l->comm->rank == 0) {
    st = esp_mkdirs(dir);
    if (st == ESP_OK) st = esp_adapter_save(l->engine.adapter, path);
  }
  return esp_comm_agree(l->comm, st);
}

static esp_status keep_best(esp_loop *l, double value, bool larger_better) {
  esp_run_state *s = &l->state;
  if (isnan(value) || (s->has_best && (larger_better ? value <= s->best : value >= s->best))) return ESP_OK;
  char path[ESP_PATH];
  s->has_best = 1;
  s->best = value;
  ESP_TRY(esp_loop_save_adapter(l, "best", "adapter", path));
  esp_loop_note(l, "step %lld is the best so far: %s %.6g", (long long)s->at.step, l->r->checkpoint.keep_best_metric,
                value);
  return ESP_OK;
}

esp_status esp_loop_best_of_row(esp_loop *l, int row) {
  const char *best = l->r->checkpoint.keep_best_metric;
  if (!best) return ESP_OK;
  if (!strcmp(best, "loss")) return keep_best(l, l->state.last_loss, false);
  for (int i = 0; l->matrix && i < l->r->eval.n_sets; i++)
    if (!strcmp(best, l->r->eval.sets[i].name))
      return keep_best(l, *esp_matrix_cell(l->matrix, row, i), l->r->checkpoint.keep_best_max);
  return ESP_OK;
}

bool esp_loop_midway_due(const esp_loop *l) {
  int64_t step = l->state.at.task_step, every = l->r->eval.every;
  return (every > 0 && step % every == 0) || (step <= l->r->eval.dense_steps && step % l->r->eval.dense_every == 0);
}

static bool wanted_midway(const esp_loop *l, const esp_recipe_task *t, int set) {
  const esp_recipe_task *from = l->r->eval.midway == ESP_MIDWAY_SEEN ? l->r->tasks : t;
  if (l->r->eval.midway == ESP_MIDWAY_ALL) return true;
  for (; from <= t; from++)
    for (int k = 0; k < from->n_eval; k++)
      if (from->eval[k] == set) return true;
  return false;
}

esp_status esp_loop_midway(esp_loop *l, const esp_recipe_task *t) {
  const char *best = l->r->checkpoint.keep_best_metric;
  if (best && !strcmp(best, "loss")) ESP_TRY(keep_best(l, l->state.last_loss, false));
  if (!l->matrix) return ESP_OK;
  esp_loop_phase(l, "eval");
  for (int i = 0; i < l->r->eval.n_sets; i++) {
    esp_score_result result;
    if (!wanted_midway(l, t, i)) continue;
    ESP_TRY(esp_loop_score(l, i, &result));
    if (best && !strcmp(best, l->r->eval.sets[i].name))
      ESP_TRY(keep_best(l, result.value, l->r->checkpoint.keep_best_max));
  }
  esp_loop_phase(l, "train");
  return ESP_OK;
}
