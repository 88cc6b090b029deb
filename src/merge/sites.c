#include "merge/sites.h"

#include <string.h>

#define HEAD "lm_head.weight" /* in every family */

esp_status esp_site_map_init(esp_site_map *m, const esp_model *model) {
  esp_site **list;
  int n = esp_model_sites(model, &list);
  m->weight = esp_map_create((size_t)n);
  m->bias = esp_map_create((size_t)n);
  if (!m->weight || !m->bias) return ESP_ERR_MEMORY;
  for (int i = 0; i < n; i++) {
    esp_site *s = list[i];
    bool tied = esp_model_describe(model)->tied, tied_head = s->is_head && tied;
    if (tied && s->kind == ESP_SITE_EMBED && !m->tied) { /* the token table is the first embedding */
      m->tied = s->tensor;
      if (!esp_map_put(m->weight, HEAD, strlen(HEAD), s)) return ESP_ERR_MEMORY;
    }
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

const esp_st_entry *esp_site_map_find(const esp_site_map *m, const esp_st *file, const char *tensor) {
  const esp_st_entry *e = esp_st_find(file, tensor);
  if (e || !m->tied) return e;
  if (strcmp(tensor, HEAD) == 0) return esp_st_find(file, m->tied);
  return strcmp(tensor, m->tied) == 0 ? esp_st_find(file, HEAD) : NULL;
}

esp_site *esp_site_map_weight(const esp_site_map *m, const char *tensor) {
  return esp_map_get(m->weight, tensor, strlen(tensor));
}

esp_site *esp_site_map_bias(const esp_site_map *m, const char *tensor) {
  return esp_map_get(m->bias, tensor, strlen(tensor));
}

bool esp_adapters_untie(esp_adapter *const *list, int n_list, const esp_site *head, const esp_model *model) {
  esp_site **sites;
  const esp_site *embed = NULL;
  int n = esp_model_sites(model, &sites);
  for (int i = n - 1; i >= 0; i--)
    if (sites[i]->kind == ESP_SITE_EMBED) embed = sites[i];
  for (int i = 0; embed && i < n_list; i++) {
    const esp_adapter *a = list[i];
    if (a->targeted[head->index] || a->targeted[embed->index])
      return true; /* what trains the tensor itself is shared */
    if (esp_adapter_changes(a, head) != esp_adapter_changes(a, embed)) return true;
  }
  return false;
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
