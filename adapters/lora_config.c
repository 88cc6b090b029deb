/* lora_config.c: LoraConfig in adapter_config.json, both ways: every key that PEFT writes; a key that changes the
 * computation in a way this engine does not do is an error. */
#include <math.h>
#include <string.h>

#include "adapters/internal.h"
#include "io/json.h"

static esp_status init_name(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  const json_t *v = json_object_get(j, "init_lora_weights");
  c->init = "default";
  if (!json_is_string(v)) return ESP_OK; /* true, false, null: the values come from the file anyway */
  const char *s = json_string_value(v);
  static const char *const starts[] = {"eva", "mica"}; /* leave the base as it is */
  for (size_t i = 0; i < sizeof starts / sizeof starts[0]; i++)
    if (strcmp(s, starts[i]) == 0) return ESP_OK;
  if (!esp_lora_init_known(s))
    return esp_fail(ESP_ERR_DATA,
                    "%s: init_lora_weights '%s' rewrites the base in a way that cannot be repeated here (save it with "
                    "path_initial_model_for_weight_conversion)",
                    path, s);
  c->init = esp_arena_strdup(arena, s);
  return c->init ? ESP_OK : ESP_ERR_MEMORY;
}

static bool is_off(const json_t *v) {
  return !v || json_is_null(v) || json_is_false(v) || (json_is_object(v) && json_object_size(v) == 0) ||
         (json_is_array(v) && json_array_size(v) == 0);
}

esp_status esp_lora_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  static const char *const unsupported[] = {
      "use_dora",          "use_qalora",        "use_bdlora",      "alora_invocation_tokens",
      "arrow_config",      "kasa_config",       "velora_config",   "monteclora_config",
      "layer_replication", "target_parameters", "megatron_config", "loftq_config"};
  for (size_t i = 0; i < sizeof unsupported / sizeof unsupported[0]; i++)
    if (!is_off(json_object_get(j, unsupported[i])))
      return esp_fail(ESP_ERR_DATA, "%s: key '%s' asks for a variant of LoRA that is not supported", path,
                      unsupported[i]);
  int rslora = 0, lora_bias = 0;
  c->r = 8;
  c->alpha = 8;
  ESP_TRY(esp_json_i64(j, "r", path, 0, &c->r));
  ESP_TRY(esp_json_f64(j, "lora_alpha", path, 0, &c->alpha));
  ESP_TRY(esp_json_f64(j, "lora_dropout", path, 0, &c->dropout));
  ESP_TRY(esp_json_bool(j, "use_rslora", path, 0, &rslora));
  ESP_TRY(esp_json_bool(j, "lora_bias", path, 0, &lora_bias));
  c->rslora = rslora != 0;
  c->lora_bias = lora_bias != 0;
  ESP_TRY(esp_json_read_patterns(j, "rank_pattern", path, arena, &c->rank_pattern, &c->n_rank_pattern));
  ESP_TRY(esp_json_read_patterns(j, "alpha_pattern", path, arena, &c->alpha_pattern, &c->n_alpha_pattern));
  return init_name(j, path, arena, c);
}

void esp_lora_config_write(const esp_adapter *a, json_t *j) {
  const esp_adapter_cfg *c = &a->cfg;
  bool converted = esp_lora_rewrites_base(c->init);
  double rank_factor = converted ? 2 : 1, alpha_factor = converted ? (c->rslora ? sqrt(2.0) : 2) : 1;
  static const char *const nulls[] = {"alora_invocation_tokens",
                                      "arrow_config",
                                      "corda_config",
                                      "eva_config",
                                      "kasa_config",
                                      "layer_replication",
                                      "lora_ga_config",
                                      "megatron_config",
                                      "monteclora_config",
                                      "target_parameters",
                                      "use_bdlora",
                                      "velora_config"};
  for (size_t i = 0; i < sizeof nulls / sizeof nulls[0]; i++) json_object_set_new(j, nulls[i], json_null());
  json_object_set_new(j, "alpha_pattern",
                      esp_json_patterns(a, c->alpha_pattern, c->n_alpha_pattern, c->alpha, alpha_factor));
  json_object_set_new(j, "ensure_weight_tying", json_false());
  json_object_set_new(j, "fan_in_fan_out", json_boolean(esp_model_describe(a->model)->transposed));
  bool named = !converted && strcmp(c->init, "default") != 0;
  json_object_set_new(j, "init_lora_weights", named ? json_string(c->init) : json_true());
  json_object_set_new(j, "loftq_config", json_object());
  json_object_set_new(j, "lora_alpha", esp_json_number(c->alpha * alpha_factor));
  json_object_set_new(j, "lora_bias", json_boolean(c->lora_bias));
  json_object_set_new(j, "lora_dropout", json_real(c->dropout));
  json_object_set_new(j, "megatron_core", json_string("megatron.core"));
  json_object_set_new(j, "qalora_group_size", json_integer(16));
  json_object_set_new(j, "r", json_integer((json_int_t)(c->r * (int64_t)rank_factor)));
  json_object_set_new(j, "rank_pattern",
                      esp_json_patterns(a, c->rank_pattern, c->n_rank_pattern, (double)c->r, rank_factor));
  json_object_set_new(j, "use_dora", json_false());
  json_object_set_new(j, "use_qalora", json_false());
  json_object_set_new(j, "use_rslora", json_boolean(c->rslora));
}
