/* open.h: a base with adapters on it, as merge, extract, export and verification need it. */
#ifndef ESP_MERGE_OPEN_H
#define ESP_MERGE_OPEN_H

#include "merge/merge.h"

typedef struct esp_merge_inputs {
  esp_backend *be;
  esp_model *model;
  esp_adapter **adapters;
  int n_adapters;
  bool has_weights; /* the base directory holds safetensors */
} esp_merge_inputs;

/* Opens base and adapters on the cpu backend; with `weights` loads and packs them and activates the adapters. */
esp_status esp_merge_open(const esp_merge_spec *spec, esp_dtype compute, bool weights, esp_merge_inputs *out);
void esp_merge_close(esp_merge_inputs *in);

#endif
