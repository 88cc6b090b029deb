/* sweep.c: what a sweep asks of its runs: whether they are there, and their numbers side by side. */
#include <stdlib.h>
#include <string.h>

#include "api/api.h"
#include "core/strbuf.h"
#include "eval/compare.h"
#include "io/file.h"

esp_status esp_job_found(const esp_job *job, esp_found *found) {
  const char *dir = job->recipe->checkpoint.output_dir;
  char path[ESP_PATH], mine[33], theirs[33];
  esp_recipe *there = NULL;
  *found = ESP_FOUND_NONE;
  if (!esp_file_exists(esp_path_join(path, sizeof path, dir, "recipe.yaml"))) return ESP_OK;
  ESP_TRY(esp_recipe_load(path, NULL, 0, &there));
  esp_recipe_hash(job->recipe, mine);
  esp_recipe_hash(there, theirs);
  esp_recipe_destroy(there);
  if (strcmp(mine, theirs) != 0)
    return esp_fail(ESP_ERR_RECIPE, "%s: holds the run of another recipe: name another directory or remove it", dir);
  bool finished = esp_file_exists(esp_path_join(path, sizeof path, dir, "result.json"));
  *found = finished ? ESP_FOUND_FINISHED : ESP_FOUND_UNFINISHED;
  return ESP_OK;
}

uint64_t esp_job_seed(const esp_job *job) {
  return job->recipe->seed;
}

static esp_status write_table(const esp_compared *runs, int n, const char *dir) {
  char path[ESP_PATH];
  esp_strbuf b;
  esp_strbuf_init(&b);
  esp_compare_table(runs, n, true, &b);
  esp_status st = b.failed ? ESP_ERR_MEMORY
                           : esp_file_write_atomic(esp_path_join(path, sizeof path, dir, "sweep.md"), b.data, b.len);
  esp_strbuf_deinit(&b);
  return st;
}

esp_status esp_runs_compare(const esp_run_place *places, int n, const char *dir, int json, char **text) {
  esp_status st = ESP_OK;
  char path[ESP_PATH];
  json_t *j = NULL;
  *text = NULL;
  esp_compared *runs = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *runs);
  if (!runs) return ESP_ERR_MEMORY;
  for (int i = 0; i < n; i++) {
    runs[i] = (esp_compared){.dir = places[i].dir,
                             .variant = places[i].variant ? places[i].variant : places[i].dir,
                             .order = places[i].order ? places[i].order : "",
                             .seed = places[i].seed};
    ESP_GOTO(esp_compared_read(&runs[i]));
  }
  if (!(j = esp_compare_json(runs, n))) {
    st = esp_fail(ESP_ERR_DATA, "the comparison cannot be written: a name that is not UTF-8, or no memory");
    goto out;
  }
  if (dir) {
    ESP_GOTO(esp_mkdirs(dir));
    ESP_GOTO(esp_json_save(esp_path_join(path, sizeof path, dir, "sweep.json"), j, 0));
    ESP_GOTO(write_table(runs, n, dir));
  }
  if (json) {
    char *dump = json_dumps(j, JSON_COMPACT);
    *text = dump ? esp_mem_strdup(ESP_MEM_HOST, dump) : NULL;
    free(dump);
  } else {
    esp_strbuf b;
    esp_strbuf_init(&b);
    esp_compare_table(runs, n, false, &b);
    *text = esp_strbuf_take(&b);
    esp_strbuf_deinit(&b);
  }
  if (!*text) st = ESP_ERR_MEMORY;
out:
  json_decref(j);
  esp_mem_free(runs);
  return st;
}
