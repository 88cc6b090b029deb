/* factors.c: see factors.h. */
#include "adapters/factors.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/rng.h"
#include "io/json.h"

static int add(esp_adapter *a, const esp_site *s, const char *suffix, int ndim, int64_t rows, int64_t cols, bool pad) {
  char name[512];
  snprintf(name, sizeof name, ESP_PEFT_PREFIX "%s.%s", s->path, suffix);
  return esp_params_add(a->params, name, ndim, (int64_t[]){rows, cols}, pad);
}

int esp_factor_add(esp_adapter *a, const esp_site *s, const char *suffix, int64_t rows, int64_t cols) {
  return add(a, s, suffix, 2, rows, cols, true);
}

int esp_factor_stack(esp_adapter *a, const esp_site *s, const char *suffix, int64_t rows, int64_t cols, bool first) {
  return add(a, s, suffix, 2, rows, cols, first);
}

int esp_factor_vector(esp_adapter *a, const esp_site *s, const char *suffix, int64_t n) {
  return add(a, s, suffix, 1, n, 1, true);
}

static esp_status fill(esp_adapter *a, int index, float bound, float value) {
  const esp_param *p = &a->params->list[index];
  uint64_t stream = esp_rng_stream_name(ESP_RNG_INIT, p->name);
  float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)p->numel * sizeof *x);
  if (!x) return ESP_ERR_MEMORY;
  for (int64_t i = 0; i < p->numel; i++)
    x[i] = bound > 0 ? bound * (2.0f * esp_rng_uniform(a->cfg.seed, stream, (uint64_t)i) - 1.0f) : value;
  esp_params_set(a->params, index, x);
  esp_mem_free(x);
  return ESP_OK;
}

esp_status esp_factor_uniform(esp_adapter *a, int index, int64_t fan_in) {
  return fill(a, index, 1.0f / sqrtf((float)fan_in), 0.0f);
}

esp_status esp_factor_constant(esp_adapter *a, int index, float value) {
  return fill(a, index, 0.0f, value);
}

esp_status esp_factor_reserve(esp_adapter *a, esp_factor_scratch *s, int64_t bytes) {
  esp_backend *be = esp_model_backend(a->model);
  if (bytes <= s->bytes) return ESP_OK;
  esp_factor_release(a, s);
  s->data = be->ops->alloc(be, ESP_MEM_WORKSPACE, bytes);
  if (!s->data) return esp_backend_why_null(be);
  s->bytes = bytes;
  return ESP_OK;
}

void esp_factor_release(esp_adapter *a, esp_factor_scratch *s) {
  esp_backend *be = esp_model_backend(a->model);
  if (s->data) be->ops->free(be, s->data);
  *s = (esp_factor_scratch){0};
}

esp_status esp_factor_check(const esp_adapter_cfg *c) {
  const char *key = c->dropout > 0                    ? "dropout"
                    : c->rslora                       ? "rslora"
                    : c->lora_bias                    ? "lora_bias"
                    : strcmp(c->init, "default") != 0 ? "init"
                                                      : NULL;
  return key ? esp_fail(ESP_ERR_RECIPE, "adapter.%s: not for type %s", key, c->type) : ESP_OK;
}

int64_t esp_factor_rank(const esp_adapter *a, const esp_site *s) {
  return (int64_t)esp_pattern_value(a->cfg.rank_pattern, a->cfg.n_rank_pattern, s->path, (double)a->cfg.r);
}

double esp_factor_scale(const esp_adapter *a, const esp_site *s, int64_t r) {
  return esp_pattern_value(a->cfg.alpha_pattern, a->cfg.n_alpha_pattern, s->path, a->cfg.alpha) / (double)r;
}

void esp_factor_config_write(const esp_adapter *a, json_t *j) {
  const esp_adapter_cfg *c = &a->cfg;
  json_object_set_new(j, "r", esp_json_number((double)c->r));
  json_object_set_new(j, "alpha", esp_json_number(c->alpha));
  json_object_set_new(j, "rank_pattern", esp_json_patterns(a, c->rank_pattern, c->n_rank_pattern, (double)c->r, 1));
  json_object_set_new(j, "alpha_pattern", esp_json_patterns(a, c->alpha_pattern, c->n_alpha_pattern, c->alpha, 1));
}

void esp_lycoris_config_write(const esp_adapter *a, json_t *j) {
  const esp_adapter_cfg *c = &a->cfg;
  esp_factor_config_write(a, j);
  json_object_set_new(j, "rank_dropout", json_real(0.0));
  json_object_set_new(j, "module_dropout", json_real(0.0));
  json_object_set_new(j, "use_effective_conv2d", json_false()); /* convolutions only */
  json_object_set_new(j, "init_weights", json_true());
  /* keys that PEFT's classes of these kinds do not have; ours to keep only where they say something */
  if (strcmp(c->bias, "none") == 0) json_object_del(j, "bias");
  if (!c->n_trainable_tokens) json_object_del(j, "trainable_token_indices");
}

esp_status esp_factor_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  c->r = 8;
  c->alpha = 8;
  ESP_TRY(esp_json_i64(j, "r", path, 0, &c->r));
  ESP_TRY(esp_json_f64(j, "alpha", path, 0, &c->alpha));
  ESP_TRY(esp_json_read_patterns(j, "rank_pattern", path, arena, &c->rank_pattern, &c->n_rank_pattern));
  return esp_json_read_patterns(j, "alpha_pattern", path, arena, &c->alpha_pattern, &c->n_alpha_pattern);
}

esp_status esp_lycoris_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  double rank_dropout = 0, module_dropout = 0;
  ESP_TRY(esp_json_f64(j, "rank_dropout", path, 0, &rank_dropout));
  ESP_TRY(esp_json_f64(j, "module_dropout", path, 0, &module_dropout));
  if (rank_dropout != 0 || module_dropout != 0)
    return esp_fail(ESP_ERR_DATA, "%s: %s is not supported: set it to 0, which changes nothing outside training", path,
                    rank_dropout != 0 ? "rank_dropout" : "module_dropout");
  return esp_factor_config_read(j, path, arena, c);
}
