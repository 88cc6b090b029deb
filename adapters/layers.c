/* layers.c: whole blocks of the base trained in full, the rest frozen (Telly-K: the bottom K blocks of a code model
 * stay frozen, "Towards Efficient Fine-tuning of Pre-trained Code Models", Shi et al. 2023, arXiv:2304.05216). Backward
 * stops at the lowest trained block, and blocks below it keep nothing. The parameters are full copies of the blocks'
 * modules (train_modules.c), computed by the model itself; the final norm and the head are trained when modules_to_save
 * names them. */
#include "adapters/internal.h"
#include "io/json.h"

static bool layers_trains(const esp_adapter *a, const esp_site *s) {
  if (s->layer < 0) return false;
  if (a->cfg.top_layers) return s->layer >= esp_model_describe(a->model)->layers - a->cfg.top_layers;
  for (int i = 0; i < a->cfg.n_layers; i++)
    if (a->cfg.layers[i] == s->layer) return true;
  return false;
}

static esp_status layers_check(const esp_adapter_cfg *c) {
  if (c->top_layers && c->n_layers)
    return esp_fail(ESP_ERR_RECIPE, "adapter.top_layers: layers was given too: one of them says what is trained");
  if (!c->top_layers && !c->n_layers)
    return esp_fail(ESP_ERR_RECIPE, "adapter.top_layers: the kind layers needs top_layers or layers");
  return ESP_OK;
}

static esp_status layers_open(esp_adapter *a) {
  int n = esp_model_describe(a->model)->layers;
  if (a->cfg.top_layers > n)
    return esp_fail(ESP_ERR_RECIPE, "adapter.top_layers: %lld, the base has %d layers", (long long)a->cfg.top_layers,
                    n);
  for (int i = 0; i < a->cfg.n_layers; i++)
    if (a->cfg.layers[i] < 0 || a->cfg.layers[i] >= n)
      return esp_fail(ESP_ERR_RECIPE, "adapter.layers: there is no layer %d, the base has %d", a->cfg.layers[i], n);
  return ESP_OK;
}

static void layers_config_write(const esp_adapter *a, json_t *j) {
  json_object_set_new(j, "top_layers", a->cfg.top_layers ? json_integer(a->cfg.top_layers) : json_null());
}

static esp_status layers_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  (void)arena;
  int64_t top = 0;
  const json_t *v = json_object_get(j, "top_layers");
  if (v && !json_is_null(v)) ESP_TRY(esp_json_i64(j, "top_layers", path, 0, &top));
  if (top < 0 || top > 100000) return esp_fail(ESP_ERR_DATA, "%s: key 'top_layers' is out of range", path);
  c->top_layers = top;
  return ESP_OK;
}

const esp_adapter_kind esp_kind_layers = {
    .name = "layers",
    .peft_type = "LAYERS",
    .summary = "the top layers, or named ones, in full; backward stops early (Telly-K, Shi et al. 2023)",
    .mergeable = true,
    .open = layers_open,
    .trains = layers_trains,
    .config_check = layers_check,
    .config_write = layers_config_write,
    .config_read = layers_config_read,
};
