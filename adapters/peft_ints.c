/* peft_ints.c: whole numbers that an adapter's file holds beside the parameters (esp_adapter_kind.ints). */
#include <string.h>

#include "adapters/internal.h"
#include "io/safetensors.h"

static bool get(const esp_adapter *a, int i, esp_adapter_ints *out) {
  return a->kind->ints && a->kind->ints(a, i, out);
}

esp_status esp_ints_declare(const esp_adapter *a, esp_st_writer *w) {
  esp_adapter_ints t;
  for (int i = 0; get(a, i, &t); i++) ESP_TRY(esp_st_writer_declare(w, t.name, ESP_I32, 1, &t.n));
  return ESP_OK;
}

esp_status esp_ints_put(const esp_adapter *a, esp_st_writer *w) {
  esp_adapter_ints t;
  for (int i = 0; get(a, i, &t); i++) ESP_TRY(esp_st_writer_put(w, t.name, t.values, t.n * (int64_t)sizeof *t.values));
  return ESP_OK;
}

bool esp_ints_own(const esp_adapter *a, const char *name) {
  esp_adapter_ints t;
  for (int i = 0; get(a, i, &t); i++)
    if (strcmp(t.name, name) == 0) return true;
  return false;
}

esp_status esp_ints_fill(esp_adapter *a, const esp_st *f, const char *path) {
  esp_adapter_ints t;
  for (int i = 0; get(a, i, &t); i++) {
    const esp_st_entry *e = esp_st_find(f, t.name);
    if (!e) return esp_fail(ESP_ERR_DATA, "%s: tensor '%s' is missing", path, t.name);
    if (!e->raw_dtype_known || e->dtype != ESP_I32 || e->ndim != 1 || e->shape[0] != t.n)
      return esp_fail(ESP_ERR_DATA, "%s: tensor '%s' is not a list of %lld whole numbers (I32)", path, t.name,
                      (long long)t.n);
    memcpy(t.values, e->data, (size_t)e->bytes);
  }
  return ESP_OK;
}
