/* tools.c: thin doors to the rooms that work on files. */
#include <string.h>

#include "api/api.h"
#include "core/strbuf.h"
#include "eval/report.h"
#include "io/file.h"
#include "merge/merge.h"

esp_status esp_merge(const esp_merge_options *o, esp_merge_result *out) {
  esp_merge_spec spec = {.base = o->base,
                         .adapters = o->adapters,
                         .weights = o->adapter_weights,
                         .n_adapters = o->n_adapters,
                         .out = o->out,
                         .dtype = o->dtype};
  esp_merge_stats m;
  esp_verify_stats v = {0};
  if (o->n_adapters < 1) return esp_fail(ESP_ERR_RECIPE, "merge: names no adapter");
  ESP_TRY(esp_merge_write(&spec, &m));
  if (o->verify > 0) ESP_TRY(esp_merge_verify(&spec, o->verify, &v));
  if (out)
    *out = (esp_merge_result){m.tensors, m.changed, m.max_delta,      m.lost_share,
                              v.max_abs, v.max_rel, v.top1_agreement, v.rows};
  return ESP_OK;
}

static void svd_result(const esp_svd_stats *s, esp_extract_result *out) {
  if (out) *out = (esp_extract_result){s->sites, s->max_error, s->mean_error};
}

esp_status esp_extract(const esp_extract_options *o, esp_extract_result *out) {
  esp_svd_stats s = {0};
  ESP_TRY(esp_extract_write(o->base, o->tuned, o->out, o->rank, o->target, &s));
  svd_result(&s, out);
  return ESP_OK;
}

esp_status esp_export(const esp_export_options *o, esp_extract_result *out) {
  esp_svd_stats s = {0};
  if (o->as && strcmp(o->as, "lora")) return esp_fail(ESP_ERR_RECIPE, "export: '%s' is not a form (lora)", o->as);
  if (o->target && strcmp(o->target, "vllm"))
    return esp_fail(ESP_ERR_RECIPE, "export: '%s' is not a target (vllm)", o->target);
  ESP_TRY(esp_export_write(o->base, o->adapter, o->out, o->as != NULL, o->target != NULL, o->rank, &s));
  svd_result(&s, out);
  return ESP_OK;
}

esp_status esp_run_matrix(const char *run_dir, int json, char **text) {
  char path[ESP_PATH];
  esp_matrix *m = NULL;
  esp_strbuf b;
  *text = NULL;
  esp_path_join(path, sizeof path, run_dir, "matrix.json");
  if (!esp_file_exists(path))
    return esp_fail(ESP_ERR_DATA, "%s: holds no score matrix (no evaluation sets, or none measured yet)", run_dir);
  ESP_TRY(esp_matrix_load(path, &m));
  esp_strbuf_init(&b);
  if (json)
    esp_matrix_render_json(m, &b);
  else
    esp_matrix_render_text(m, true, &b);
  esp_matrix_destroy(m);
  *text = esp_strbuf_take(&b);
  esp_strbuf_deinit(&b);
  return *text ? ESP_OK : ESP_ERR_MEMORY;
}

esp_status esp_run_report(const char *run_dir, const char *out) {
  return esp_report_write(run_dir, out);
}

char *esp_schema(const char *format) {
  return esp_schema_render(format);
}
char *esp_init_recipe(const char *base_model) {
  return esp_recipe_template(base_model);
}
