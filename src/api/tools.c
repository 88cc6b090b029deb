/* tools.c: thin doors to the rooms that work on files. */
#include <stdio.h>
#include <string.h>

#include "api/api.h"
#include "core/strbuf.h"
#include "io/file.h"
#include "merge/merge.h"
#include "merge/method.h"
#include "merge/residual.h"

static esp_status combine(const esp_merge_options *o, const char *out, esp_merge_result *r) {
  esp_combine_spec spec = {.base = o->base,
                           .adapters = o->inputs,
                           .weights = o->weights,
                           .n_adapters = o->n_inputs,
                           .out = out,
                           .method = o->method,
                           .rank = o->rank};
  esp_svd_stats s;
  ESP_TRY(esp_combine_write(&spec, &s));
  r->sites = s.sites;
  r->rank = s.rank;
  r->max_error = s.max_error;
  r->mean_error = s.mean_error;
  return ESP_OK;
}

static void model_result(const esp_merge_stats *m, esp_merge_result *r) {
  r->tensors = m->tensors;
  r->changed = m->changed;
  r->max_delta = m->max_delta;
  r->lost_share = m->lost_share;
}

static esp_status merge_model(const esp_merge_options *o, const char *const *adapters, const double *weights, int n,
                              esp_merge_result *r) {
  esp_merge_spec spec = {
      .base = o->base, .adapters = adapters, .weights = weights, .n_adapters = n, .out = o->out, .dtype = o->dtype};
  esp_merge_stats m;
  esp_verify_stats v = {0};
  ESP_TRY(esp_merge_write(&spec, &m));
  if (o->verify > 0) ESP_TRY(esp_merge_verify(&spec, o->verify, &v));
  model_result(&m, r);
  r->max_abs = v.max_abs;
  r->max_rel = v.max_rel;
  r->top1_agreement = v.top1_agreement;
  r->rows = v.rows;
  return ESP_OK;
}

static esp_status blend(const esp_merge_options *o, esp_merge_result *r) {
  esp_blend_spec spec = {.base = o->base,
                         .inputs = o->inputs,
                         .weights = o->weights,
                         .n = o->n_inputs,
                         .out = o->out,
                         .dtype = o->dtype,
                         .method = o->method};
  esp_merge_stats m;
  if (o->verify) return esp_fail(ESP_ERR_RECIPE, "merge: verify compares an adapter with its merge; a method has none");
  if (o->rank) return esp_fail(ESP_ERR_RECIPE, "merge: rank is for adapters that become one");
  ESP_TRY(esp_blend_write(&spec, &m));
  model_result(&m, r);
  return ESP_OK;
}

/* The combined adapter stands beside the model for as long as it takes. */
static esp_status combine_into_model(const esp_merge_options *o, esp_merge_result *r) {
  char staged[ESP_PATH], beside[ESP_PATH];
  const char *const one = staged;
  if (snprintf(beside, sizeof beside, "%s.combined", o->out) >= (int)sizeof beside)
    return esp_fail(ESP_ERR_RECIPE, "merge: the path of the output is too long");
  ESP_TRY(esp_dir_stage(beside, staged, sizeof staged));
  esp_status st = esp_remove_tree(staged); /* a name that is free: the adapter makes the directory itself */
  if (st == ESP_OK) st = combine(o, staged, r);
  if (st == ESP_OK) st = merge_model(o, &one, NULL, 1, r);
  if (esp_dir_exists(staged)) esp_remove_tree(staged);
  return st;
}

esp_status esp_merge(const esp_merge_options *o, esp_merge_result *out) {
  esp_merge_result r = {0};
  if (o->n_inputs < 1) return esp_fail(ESP_ERR_RECIPE, "merge: names no %s", o->method ? "model" : "adapter");
  if (!o->method) {
    ESP_TRY(merge_model(o, o->inputs, o->weights, o->n_inputs, &r));
  } else if (!o->as_adapter) {
    ESP_TRY(blend(o, &r));
  } else if (o->into_model) {
    ESP_TRY(combine_into_model(o, &r));
  } else {
    if (o->dtype || o->verify)
      return esp_fail(ESP_ERR_RECIPE, "merge: dtype and verify are for a model, see into_model");
    ESP_TRY(combine(o, o->out, &r));
  }
  if (out) *out = r;
  return ESP_OK;
}

const char *const *esp_merge_methods(int combine, int *n) {
  return combine ? esp_combine_names(n) : esp_method_names(n);
}

static void svd_result(const esp_svd_stats *s, esp_extract_result *out) {
  if (out) *out = (esp_extract_result){s->sites, s->rank, s->max_error, s->mean_error, 0, 0};
}

static esp_status store(const esp_extract_options *o, esp_extract_result *out) {
  esp_residual_spec spec = {.base = o->base,
                            .tuned = o->tuned,
                            .out = o->out,
                            .form = o->as,
                            .per_matrix = o->per_matrix != 0,
                            .energy = o->energy != 0 ? o->energy : 0.9,
                            .bits = o->bits != 0 ? o->bits : 16};
  esp_residual_stats s;
  ESP_TRY(esp_residual_write(&spec, &s));
  if (out) *out = (esp_extract_result){s.matrices + s.exact, s.rank, s.max_error, s.mean_error, s.bytes, s.full_bytes};
  return ESP_OK;
}

esp_status esp_extract(const esp_extract_options *o, esp_extract_result *out) {
  esp_svd_stats s = {0};
  if (o->as && strcmp(o->as, "lora") != 0) return store(o, out);
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

char *esp_schema(const char *format) {
  return esp_schema_render(format);
}
char *esp_init_recipe(const char *base_model) {
  return esp_recipe_template(base_model);
}
