/* lora_config.c: LoraConfig in adapter_config.json, both ways: every key that PEFT writes; a key that changes the
 * computation in a way this engine does not do is an error. */
#include <math.h>
#include <string.h>

#include "adapters/internal.h"
#include "io/json.h"

static esp_status loftq_config(const json_t *j, const char *path, esp_adapter_cfg *c) {
  const json_t *q = json_object_get(j, "loftq_config");
  c->loftq_bits = 4;
  c->loftq_iter = 1;
  if (!json_is_object(q)) return ESP_OK;
  ESP_TRY(esp_json_i64(q, "loftq_bits", path, 0, &c->loftq_bits));
  return esp_json_i64(q, "loftq_iter", path, 0, &c->loftq_iter);
}

static esp_status init_name(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  const json_t *v = json_object_get(j, "init_lora_weights");
  c->init = "default";
  if (!json_is_string(v)) return ESP_OK; /* true, false, null: the values come from the file anyway */
  const char *s = json_string_value(v);
  static const char *const starts[] = {"eva", "mica"}; /* leave the base as it is */
  for (size_t i = 0; i < sizeof starts / sizeof starts[0]; i++)
    if (strcmp(s, starts[i]) == 0) return ESP_OK;
  if (strcmp(s, "loftq") == 0) ESP_TRY(loftq_config(j, path, c));
  if (!esp_lora_init_known(s) || esp_lora_init_from_data(s))
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
      "use_dora",          "use_qalora",        "use_bdlora",     "alora_invocation_tokens",
      "arrow_config",      "kasa_config",       "velora_config",  "monteclora_config",
      "layer_replication", "target_parameters", "megatron_config"};
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
  bool converted = esp_lora_gives_way(a), loftq = strcmp(c->init, "loftq") == 0;
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
  bool named =
      !converted && strcmp(c->init, "default") != 0 && strcmp(c->init, "corda") != 0 && strcmp(c->init, "lora_ga") != 0;
  json_object_set_new(j, "init_lora_weights", named ? json_string(c->init) : json_true());
  json_t *q = json_object();
  if (loftq) { /* the adapter is for the quantised base, which is made again where the file is read */
    json_object_set_new(q, "loftq_bits", json_integer(c->loftq_bits ? c->loftq_bits : 4));
    json_object_set_new(q, "loftq_iter", json_integer(c->loftq_iter ? c->loftq_iter : 1));
  }
  json_object_set_new(j, "loftq_config", q);
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

static bool word(const char *value, const char *words) { /* NULL: the default */
  size_t n = value ? strlen(value) : 0;
  for (const char *p = words; n && (p = strstr(p, value)) != NULL; p += n)
    if ((p == words || p[-1] == ' ') && (p[n] == ' ' || !p[n])) return true;
  return !value;
}

esp_status esp_lora_config_check(const esp_adapter_cfg *c) {
  if (c->loftq_bits != 0 && c->loftq_bits != 4 && c->loftq_bits != 8)
    return esp_fail(ESP_ERR_RECIPE, "adapter.loftq_bits: must be 4 or 8, is %lld", (long long)c->loftq_bits);
  if (c->eva_rho != 0 && !(c->eva_rho >= 1))
    return esp_fail(ESP_ERR_RECIPE, "adapter.eva_rho: must be at least 1, is %g", c->eva_rho);
  if (!word(c->corda_method, "ipm kpm"))
    return esp_fail(ESP_ERR_RECIPE, "adapter.corda_method: '%s' is not ipm or kpm", c->corda_method);
  if (!word(c->ga_direction, "ArB2r A2rBr ArBr random") || !word(c->ga_scale, "stable weight_svd gd_scale unit"))
    return esp_fail(ESP_ERR_RECIPE, "adapter.ga_direction, adapter.ga_scale: '%s', '%s' are not known",
                    c->ga_direction ? c->ga_direction : "", c->ga_scale ? c->ga_scale : "");
  if (c->lora_fa && c->lora_bias)
    return esp_fail(ESP_ERR_RECIPE, "adapter.lora_fa: projects the gradient of B, which has a bias with lora_bias");
  return ESP_OK;
}
