/* adalora.c: AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) as PEFT does it: an update P diag(e) Q whose ranks compete
 * over all modules for a budget that falls from r to target_r ranks per module.
 *   budget(t) = I                                        t <= tinit,  I = sum of the starting ranks
 *             = floor((I - B) (1 - (t - tinit)/(T - tfinal - tinit))^3 + B)    else,  B = target_r * modules
 * Every `interval` steps the I - budget least important ranks have their e set to zero; the optimizer may bring one
 * back until step T - tfinal, when those that are below the line are taken out: rows of Q and e, columns of P, their
 * optimizer state. P and Q are kept near orthogonality by orth_weight * mean ||Q Q^T - I||_F, ||P^T P - I||_F (the norm
 * is not squared, as in PEFT and unlike the paper). The scale stays alpha / (r + 1e-5) with the starting r. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/triplets.h"
#include "io/json.h"

static esp_status adalora_check(const esp_adapter_cfg *c) {
  if (c->target_r < 1) return esp_fail(ESP_ERR_RECIPE, "adapter.target_r: must be at least 1");
  if (c->target_r > c->r)
    return esp_fail(ESP_ERR_RECIPE, "adapter.target_r: %lld is above the starting rank, adapter.r %lld",
                    (long long)c->target_r, (long long)c->r);
  if (c->interval < 1) return esp_fail(ESP_ERR_RECIPE, "adapter.interval: must be at least 1");
  if (!(c->beta1 > 0 && c->beta1 < 1) || !(c->beta2 > 0 && c->beta2 < 1))
    return esp_fail(ESP_ERR_RECIPE, "adapter.importance_beta1, adapter.importance_beta2: must be between 0 and 1");
  if (!(c->orth_weight >= 0)) return esp_fail(ESP_ERR_RECIPE, "adapter.orth_weight: must not be negative");
  if (c->tinit < 0 || c->tfinal < 0 || (c->tinit < 1 && c->tfinal < 1 && c->tinit + c->tfinal >= 1))
    return esp_fail(ESP_ERR_RECIPE, "adapter.tinit, adapter.tfinal: leave no step at which ranks are moved");
  if (c->init && strcmp(c->init, "default"))
    return esp_fail(ESP_ERR_RECIPE, "adapter.init: '%s' is not for adapter.type adalora", c->init);
  if (c->rslora || c->lora_bias || c->n_rank_pattern || c->n_alpha_pattern)
    return esp_fail(ESP_ERR_RECIPE,
                    "adapter.rslora, lora_bias, rank_pattern, alpha_pattern: are not for adapter.type adalora");
  return ESP_OK;
}

static int by_value(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

/* e of all ranks at or below the (n - budget)-th smallest importance becomes zero; keep: which are above. */
static esp_status mask_to(esp_adapter *a, int64_t budget, uint8_t *keep) {
  esp_triplets *all = a->impl;
  int64_t n = all->ranks;
  float *score = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * n + 1) * sizeof *score), *sorted = score + n;
  if (!score) return ESP_ERR_MEMORY;
  esp_status st = esp_triplets_scores(a, score);
  if (st == ESP_OK) {
    memcpy(sorted, score, (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, by_value);
    float line = budget < n ? sorted[n - budget - 1] : -1.0f;
    a->ranks = 0;
    for (int64_t k = 0; k < n; k++) {
      keep[k] = score[k] > line;
      score[k] = keep[k];
      a->ranks += keep[k];
    }
    st = esp_triplets_mask(a, score);
  }
  esp_mem_free(score);
  return st;
}

static double adalora_before_step(esp_adapter *a, int64_t step, int64_t total) {
  return esp_triplets_orthogonal(a, a->cfg.orth_weight);
}

static esp_status adalora_after_step(esp_adapter *a, int64_t step, int64_t total) {
  esp_triplets *all = a->impl;
  int64_t target = a->cfg.target_r * all->n_sites, first = all->ranks;
  if (!total)
    return esp_fail(ESP_ERR_RECIPE, "adapter.type adalora: train.max_steps must say how many steps there are");
  int64_t begin = esp_triplets_steps(a->cfg.tinit, total), end = total - esp_triplets_steps(a->cfg.tfinal, total);
  if (begin >= end)
    return esp_fail(ESP_ERR_RECIPE, "adapter.tinit, adapter.tfinal: leave none of %lld steps to move ranks",
                    (long long)total);
  all->total = total;
  if (all->done || first <= target) {
    all->done = true;
    a->ranks = first;
    a->budget = target;
    return ESP_OK;
  }
  if (step < end) esp_triplets_sense(a);
  a->budget = first;
  if (step > begin) {
    double rest = 1 - (double)(step - begin) / (double)(end - begin);
    a->budget = (int64_t)((double)(first - target) * (rest * rest * rest) + (double)target);
  }
  if (a->ranks == 0) a->ranks = first;
  bool last = step >= end;
  if (!last && (step <= begin || step % a->cfg.interval != 0)) return ESP_OK;
  uint8_t *keep = esp_mem_alloc(ESP_MEM_HOST, (size_t)first + 1);
  if (!keep) return ESP_ERR_MEMORY;
  esp_status st = mask_to(a, a->budget, keep);
  if (st == ESP_OK && last) {
    st = esp_triplets_move(a, keep, NULL, 0);
    all->done = true;
  }
  esp_mem_free(keep);
  return st;
}

/* ---- AdaLoraConfig ---- */

static json_t *pattern_json(const esp_adapter *a) {
  const esp_triplets *all = a->impl;
  json_t *out = NULL;
  for (int i = 0; i < all->n_sites; i++) {
    const esp_triplet_site *t = a->site_state[all->sites[i]->index];
    char key[600];
    if (!t->keep) continue;
    if (!out) out = json_object();
    snprintf(key, sizeof key, "%s.lora_E", all->sites[i]->path);
    json_t *list = json_array();
    for (int64_t k = 0; k < t->start; k++) json_array_append_new(list, json_boolean(t->keep[k]));
    json_object_set_new(out, key, list);
  }
  for (int i = 0; out && i < all->n_sites; i++) { /* PEFT wants every module once there is one */
    const esp_triplet_site *t = a->site_state[all->sites[i]->index];
    char key[600];
    if (t->keep) continue;
    snprintf(key, sizeof key, "%s.lora_E", all->sites[i]->path);
    json_t *list = json_array();
    for (int64_t k = 0; k < t->start; k++) json_array_append_new(list, json_true());
    json_object_set_new(out, key, list);
  }
  return out ? out : json_null();
}

static void adalora_config_write(const esp_adapter *a, json_t *j) {
  const esp_adapter_cfg *c = &a->cfg;
  const esp_triplets *all = a->impl;
  int64_t total = all->total ? all->total : c->total_step;
  esp_lora_config_write(a, j);
  json_object_set_new(j, "r", json_integer(8)); /* LoraConfig's default; AdaLoRA reads init_r */
  json_object_set_new(j, "init_r", json_integer((json_int_t)c->r));
  json_object_set_new(j, "target_r", json_integer((json_int_t)c->target_r));
  json_object_set_new(j, "tinit", json_integer((json_int_t)esp_triplets_steps(c->tinit, total)));
  json_object_set_new(j, "tfinal", json_integer((json_int_t)esp_triplets_steps(c->tfinal, total)));
  json_object_set_new(j, "total_step", json_integer((json_int_t)(total ? total : 1))); /* PEFT refuses 0 */
  json_object_set_new(j, "deltaT", json_integer((json_int_t)c->interval));
  json_object_set_new(j, "beta1", json_real(c->beta1));
  json_object_set_new(j, "beta2", json_real(c->beta2));
  json_object_set_new(j, "orth_reg_weight", json_real(c->orth_weight));
  json_object_set_new(j, "rank_pattern", pattern_json(a));
}

/* "model.layers.0.self_attn.q_proj.lora_E": [true, false, ...] */
static esp_status read_pattern(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  json_t *v = json_object_get(j, "rank_pattern"), *list;
  const char *key;
  if (!v || json_is_null(v)) return ESP_OK;
  esp_kept *out = esp_arena_alloc(arena, (json_object_size(v) + 1) * sizeof *out);
  if (!out) return ESP_ERR_MEMORY;
  json_object_foreach(v, key, list) {
    const char *end = strstr(key, ".lora_E");
    if (!end || !json_is_array(list))
      return esp_fail(ESP_ERR_DATA, "%s: key 'rank_pattern': '%s' must be a list of true and false for a lora_E", path,
                      key);
    esp_kept *one = &out[c->n_kept++];
    one->n = (int)json_array_size(list);
    one->path = esp_arena_strndup(arena, key, (size_t)(end - key));
    uint8_t *keep = esp_arena_alloc(arena, (size_t)one->n + 1);
    if (!one->path || !keep) return ESP_ERR_MEMORY;
    for (int k = 0; k < one->n; k++) keep[k] = json_is_true(json_array_get(list, (size_t)k));
    one->keep = keep;
  }
  c->kept = out;
  return ESP_OK;
}

static esp_status adalora_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  int64_t tinit = 0, tfinal = 0;
  c->r = 12, c->target_r = 8, c->alpha = 8, c->interval = 1;
  c->beta1 = c->beta2 = 0.85, c->orth_weight = 0.5;
  ESP_TRY(esp_json_i64(j, "init_r", path, 0, &c->r));
  ESP_TRY(esp_json_i64(j, "target_r", path, 0, &c->target_r));
  ESP_TRY(esp_json_i64(j, "tinit", path, 0, &tinit));
  ESP_TRY(esp_json_i64(j, "tfinal", path, 0, &tfinal));
  ESP_TRY(esp_json_i64(j, "total_step", path, 0, &c->total_step));
  ESP_TRY(esp_json_i64(j, "deltaT", path, 0, &c->interval));
  ESP_TRY(esp_json_f64(j, "beta1", path, 0, &c->beta1));
  ESP_TRY(esp_json_f64(j, "beta2", path, 0, &c->beta2));
  ESP_TRY(esp_json_f64(j, "orth_reg_weight", path, 0, &c->orth_weight));
  ESP_TRY(esp_json_f64(j, "lora_alpha", path, 0, &c->alpha));
  ESP_TRY(esp_json_f64(j, "lora_dropout", path, 0, &c->dropout));
  if (c->alpha <= 0) c->alpha = (double)c->r; /* PEFT's scaling then */
  c->tinit = (double)tinit;
  c->tfinal = (double)tfinal;
  return read_pattern(j, path, arena, c);
}

const esp_adapter_kind esp_kind_adalora = {
    .name = "adalora",
    .peft_type = "ADALORA",
    .summary = "y = W x + c P diag(e) Q x, ranks compete for a falling budget (Zhang et al. 2023, arXiv:2303.10512)",
    .site_kinds = 1u << ESP_SITE_LINEAR,
    .mergeable = true,
    .targets = true,
    .open = esp_triplets_open,
    .declare = esp_triplets_declare,
    .init = esp_triplets_init_normal,
    .tails = esp_triplets_tails,
    .output = esp_triplets_output,
    .tails_bwd = esp_triplets_tails_bwd,
    .input_bwd = esp_triplets_input_bwd,
    .wants_output = esp_triplets_wants_output,
    .destroy = esp_triplets_destroy,
    .before_step = adalora_before_step,
    .after_step = adalora_after_step,
    .n_states = 2,
    .state_names = {"sensitivity", "uncertainty"},
    .resized = esp_triplets_resized,
    .state_write = esp_triplets_state_write,
    .state_read = esp_triplets_state_read,
    .config_write = adalora_config_write,
    .config_read = adalora_config_read,
    .config_check = adalora_check,
    .materialise = esp_triplets_materialise,
    .low_rank = esp_triplets_low_rank,
};
