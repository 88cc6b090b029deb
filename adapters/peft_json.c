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
