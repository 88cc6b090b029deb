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
  if (c->n_rank_pattern) return esp_fail(ESP_ERR_RECIPE, "adapter.rank_pattern: is not for adapter.type adalora");
  return esp_triplets_check(c);
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
  int64_t begin, end;
  ESP_TRY(esp_triplets_span(a, total, &begin, &end));
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
  json_object_set_new(j, "rank_pattern", esp_triplets_pattern_write(a));
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
  return esp_triplets_pattern_read(j, path, arena, c);
}

const esp_adapter_kind esp_kind_adalora = {
    .name = "adalora",
    .peft_type = "ADALORA",
    .summary = "y = W x + c P diag(e) Q x, ranks compete for a falling budget (Zhang et al. 2023, arXiv:2303.10512)",
    ESP_TRIPLETS,
    ESP_TRIPLETS_STATE,
    .open = esp_triplets_open,
    .init = esp_triplets_init_normal,
    .before_step = adalora_before_step,
    .after_step = adalora_after_step,
    ESP_TRIPLETS_STATISTICS,
    .config_write = adalora_config_write,
    .config_read = adalora_config_read,
    .config_check = adalora_check,
};
