#include "merge/sites.h"

#include <string.h>

esp_status esp_site_map_init(esp_site_map *m, const esp_model *model) {
  esp_site **list;
  int n = esp_model_sites(model, &list);
  m->weight = esp_map_create((size_t)n);
  m->bias = esp_map_create((size_t)n);
  if (!m->weight || !m->bias) return ESP_ERR_MEMORY;
  for (int i = 0; i < n; i++) {
    esp_site *s = list[i];
    bool tied_head = s->is_head && esp_model_describe(model)->tied;
    if (!tied_head && !esp_map_put(m->weight, s->tensor, strlen(s->tensor), s)) return ESP_ERR_MEMORY;
    if (s->bias_tensor && !esp_map_put(m->bias, s->bias_tensor, strlen(s->bias_tensor), s)) return ESP_ERR_MEMORY;
  }
  return ESP_OK;
}

void esp_site_map_deinit(esp_site_map *m) {
  esp_map_destroy(m->weight);
  esp_map_destroy(m->bias);
  *m = (esp_site_map){0};
}

esp_site *esp_site_map_weight(const esp_site_map *m, const char *tensor) {
  return esp_map_get(m->weight, tensor, strlen(tensor));
}

esp_site *esp_site_map_bias(const esp_site_map *m, const char *tensor) {
  return esp_map_get(m->bias, tensor, strlen(tensor));
}

static void transpose(const float *from, float *to, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < cols; j++) to[j * rows + i] = from[i * cols + j];
}

esp_status esp_site_read_stored(const esp_model *m, const esp_site *s, bool bias, int64_t r0, int64_t n, float *w) {
  if (bias) return esp_site_read_bias(m, s, w);
  if (!s->transposed) return esp_site_read_weight_rows(m, s, r0, n, w);
  float *rows = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(s->out * s->in) * 4);
  if (!rows) return ESP_ERR_MEMORY;
  esp_status st = esp_site_read_weight(m, s, rows);
  if (st == ESP_OK) transpose(rows, w, s->out, s->in);
  esp_mem_free(rows);
  return st;
}

esp_status esp_adapters_stored_rows(esp_adapter *const *list, int n_list, esp_site *s, bool bias, int64_t r0, int64_t n,
                                    float *w) {
  if (bias) return esp_adapters_effective_bias(list, n_list, s, w);
  if (!s->transposed) return esp_adapters_effective_rows(list, n_list, s, r0, n, w);
  float *rows = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(s->out * s->in) * 4);
  if (!rows) return ESP_ERR_MEMORY;
  transpose(w, rows, s->in, s->out);
  esp_status st = esp_adapters_effective_rows(list, n_list, s, 0, s->out, rows);
  if (st == ESP_OK) transpose(rows, w, s->out, s->in);
  esp_mem_free(rows);
  return st;
}
