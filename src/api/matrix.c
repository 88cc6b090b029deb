/* matrix.c: the score matrix of a run, with what happened inside its tasks and against other runs. */
#include <string.h>

#include "api/api.h"
#include "core/strbuf.h"
#include "eval/run_data.h"
#include "io/file.h"

static esp_status load(const char *run_dir, esp_matrix **out) {
  char path[ESP_PATH];
  *out = NULL;
  if (!esp_file_exists(esp_path_join(path, sizeof path, run_dir, "matrix.json")))
    return esp_fail(ESP_ERR_DATA, "%s: holds no score matrix (no evaluation sets, or none measured yet)", run_dir);
  return esp_matrix_load(path, out);
}

static esp_status read_run(const char *run_dir, esp_run_data *out) {
  char path[ESP_PATH];
  *out = (esp_run_data){0};
  if (esp_file_exists(esp_path_join(path, sizeof path, run_dir, "metrics.jsonl"))) /* log.to may leave it out */
    ESP_TRY(esp_run_data_read(run_dir, out));
  return out->matrix ? ESP_OK : load(run_dir, &out->matrix);
}

esp_status esp_run_matrix(const char *run_dir, const esp_matrix_options *options, char **text) {
  static const esp_matrix_options none = {0};
  const esp_matrix_options *o = options ? options : &none;
  esp_status st;
  esp_run_data d = {0};
  esp_matrix **others = NULL;
  esp_curve_summary curve;
  esp_reference_summary reference;
  esp_matrix_view view = {
      .formulas = true, .curve = &curve, .window = o->window > 0 ? (double)o->window : ESP_RUN_WINDOW};
  esp_strbuf b;
  esp_strbuf_init(&b);
  *text = NULL;
  if (o->bwt && strcmp(o->bwt, "gem") != 0 && strcmp(o->bwt, "trace") != 0) {
    st = esp_fail(ESP_ERR_RECIPE, "matrix: '%s' is not a form of BWT (gem, trace)", o->bwt);
    goto out;
  }
  view.bwt_trace = o->bwt && !strcmp(o->bwt, "trace");
  ESP_GOTO(read_run(run_dir, &d));
  ESP_GOTO(esp_run_data_inside(&d, view.window, &curve));
  if (o->n_references > 0) {
    others = esp_mem_alloc(ESP_MEM_HOST, (size_t)o->n_references * sizeof *others);
    if (!others) {
      st = ESP_ERR_MEMORY;
      goto out;
    }
    for (int i = 0; i < o->n_references; i++) ESP_GOTO(load(o->references[i], &others[i]));
    esp_reference_summarise(d.matrix, (const esp_matrix *const *)others, o->n_references, &reference);
    view.reference = &reference;
  }
  if (o->json)
    esp_matrix_render_json(d.matrix, &view, &b);
  else
    esp_matrix_render_text(d.matrix, &view, &b);
  if (!o->json && d.result && json_object_get(d.result, "memory")) {
    esp_strbuf_puts(&b, "bytes held at most (strategies: at the end):\n");
    esp_run_data_memory(&d, &b);
  }
  *text = esp_strbuf_take(&b);
  if (!*text) st = ESP_ERR_MEMORY;
out:
  esp_strbuf_deinit(&b);
  for (int i = 0; others && i < o->n_references; i++) esp_matrix_destroy(others[i]);
  esp_mem_free(others);
  esp_run_data_deinit(&d);
  return st;
}
