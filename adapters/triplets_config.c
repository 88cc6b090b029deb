/* triplets_config.c: ranks in adapter_config.json: as PEFT writes those of AdaLoRA (which of the first ranks are left),
 * and as plain numbers for the kinds that add some. */
#include <stdio.h>
#include <string.h>

#include "adapters/triplets.h"
#include "io/json.h"

json_t *esp_triplets_pattern_write(const esp_adapter *a) {
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

/* "model.layers.0.self_attn.q_proj.lora_E": [true, false, ...] */
esp_status esp_triplets_pattern_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
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

/* "rank_pattern": {"model.layers.0.self_attn.q_proj": 5, ...}, every module: numbers that a run has found. */
json_t *esp_triplets_ranks_write(const esp_adapter *a) {
  const esp_triplets *all = a->impl;
  json_t *out = json_object();
  for (int i = 0; i < all->n_sites; i++) {
    const esp_triplet_site *t = a->site_state[all->sites[i]->index];
    json_object_set_new(out, all->sites[i]->path, json_integer((json_int_t)t->l.r));
  }
  return out;
}

/* What the kinds of this engine's own have in common. */
void esp_triplets_config_write(const esp_adapter *a, json_t *j) {
  const esp_adapter_cfg *c = &a->cfg;
  json_object_set_new(j, "r", json_integer((json_int_t)c->r));
  json_object_set_new(j, "lora_alpha", esp_json_number(c->alpha));
  json_object_set_new(j, "lora_dropout", json_real(c->dropout));
}

esp_status esp_triplets_config_read(const json_t *j, const char *path, esp_adapter_cfg *c) {
  c->r = 8, c->target_r = 8, c->alpha = 8, c->interval = 1;
  c->beta1 = c->beta2 = 0.85, c->orth_weight = 0.1;
  ESP_TRY(esp_json_i64(j, "r", path, 1, &c->r));
  ESP_TRY(esp_json_i64(j, "target_r", path, 0, &c->target_r));
  ESP_TRY(esp_json_f64(j, "lora_alpha", path, 0, &c->alpha));
  return esp_json_f64(j, "lora_dropout", path, 0, &c->dropout);
}

/* Options of LoRA that none of these kinds has, and the statistics' own. */
esp_status esp_triplets_check(const esp_adapter_cfg *c) {
  if (c->interval < 1) return esp_fail(ESP_ERR_RECIPE, "adapter.interval: must be at least 1");
  if (!(c->beta1 > 0 && c->beta1 < 1) || !(c->beta2 > 0 && c->beta2 < 1))
    return esp_fail(ESP_ERR_RECIPE, "adapter.importance_beta1, adapter.importance_beta2: must be between 0 and 1");
  if (!(c->orth_weight >= 0)) return esp_fail(ESP_ERR_RECIPE, "adapter.orth_weight: must not be negative");
  if (c->tinit < 0 || c->tfinal < 0 || (c->tinit < 1 && c->tfinal < 1 && c->tinit + c->tfinal >= 1))
    return esp_fail(ESP_ERR_RECIPE, "adapter.tinit, adapter.tfinal: leave no step at which ranks are moved");
  if (c->init && strcmp(c->init, "default"))
    return esp_fail(ESP_ERR_RECIPE, "adapter.init: '%s' is not for adapter.type %s", c->init, c->type);
  if (c->rslora || c->lora_bias || c->n_alpha_pattern)
    return esp_fail(ESP_ERR_RECIPE, "adapter.rslora, lora_bias, alpha_pattern: are not for adapter.type %s", c->type);
  return ESP_OK;
}

/* The steps between which ranks move, (begin, end]; what a recipe alone cannot tell. */
esp_status esp_triplets_span(esp_adapter *a, int64_t total, int64_t *begin, int64_t *end) {
  esp_triplets *all = a->impl;
  if (!total)
    return esp_fail(ESP_ERR_RECIPE, "adapter.type %s: train.max_steps must say how many steps there are",
                    a->kind->name);
  *begin = esp_triplets_steps(a->cfg.tinit, total);
  *end = total - esp_triplets_steps(a->cfg.tfinal, total);
  if (*begin >= *end)
    return esp_fail(ESP_ERR_RECIPE, "adapter.tinit, adapter.tfinal: leave none of %lld steps to move ranks",
                    (long long)total);
  all->total = total;
  return ESP_OK;
}
