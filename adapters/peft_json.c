/* peft_json.c: values of adapter_config.json that several kinds write. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/internal.h"
#include "io/json.h"

json_t *esp_json_number(double x) {
  return x == floor(x) && fabs(x) < 1e15 ? json_integer((json_int_t)x) : json_real(x);
}

static int by_key(const void *x, const void *y) {
  return strcmp(((const esp_pattern *)x)->key, ((const esp_pattern *)y)->key);
}

/* The file's keys are sorted, and the first that matches counts: where sorting would change a value, the exact paths
 * are written in the place of the patterns. */
json_t *esp_json_patterns(const esp_adapter *a, const esp_pattern *list, int n, double fallback, double factor) {
  json_t *j = json_object();
  esp_site **sites;
  int n_sites = esp_model_sites(a->model, &sites);
  esp_pattern *sorted = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n + 1) * sizeof *sorted);
  bool same = true;
  if (sorted) {
    if (n) memcpy(sorted, list, (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, by_key);
    for (int i = 0; i < n_sites && same; i++)
      same = !a->targeted[i] || esp_pattern_value(list, n, sites[i]->path, fallback) ==
                                    esp_pattern_value(sorted, n, sites[i]->path, fallback);
  }
  esp_mem_free(sorted);
  for (int i = 0; i < n && same; i++) json_object_set_new(j, list[i].key, esp_json_number(list[i].value * factor));
  for (int i = 0; i < n_sites && !same; i++) {
    double value = esp_pattern_value(list, n, sites[i]->path, fallback);
    if (a->targeted[i] && value != fallback) json_object_set_new(j, sites[i]->path, esp_json_number(value * factor));
  }
  return j;
}

esp_status esp_config_refuse(const esp_adapter_cfg *c, const char *kind, unsigned keys) {
  if (keys & ESP_CFG_BIAS && strcmp(c->bias, "none") != 0)
    return esp_fail(ESP_ERR_RECIPE, "adapter.bias: %s trains no bias beside its own parameters", kind);
  if (keys & ESP_CFG_TOKENS && c->n_trainable_tokens)
    return esp_fail(ESP_ERR_RECIPE, "adapter.trainable_tokens: %s does not have it", kind);
  if (keys & ESP_CFG_DROPOUT && c->dropout > 0) return esp_fail(ESP_ERR_RECIPE, "adapter.dropout: %s has none", kind);
  return ESP_OK;
}

void esp_config_exact_targets(const esp_adapter *a, json_t *j, unsigned keys) {
  const esp_adapter_cfg *c = &a->cfg;
  bool exact = keys & ESP_CFG_ALWAYS;
  if (keys & ESP_CFG_LAYERS) {
    exact |= c->n_layers > 0;
    json_object_del(j, "layers_to_transform");
    json_object_del(j, "layers_pattern");
  }
  if (keys & ESP_CFG_EXCLUDE) {
    exact |= c->n_exclude > 0 || c->exclude_regex;
    json_object_del(j, "exclude_modules");
  }
  if (!exact) return;
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites);
  json_t *list = json_array();
  for (int i = 0; i < n; i++)
    if (a->targeted[i]) json_array_append_new(list, json_string(sites[i]->path));
  json_object_set_new(j, "target_modules", list);
}
