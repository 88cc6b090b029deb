#include "merge/open.h"

#include <limits.h>
#include <stdio.h>

#include "io/file.h"

esp_status esp_merge_open(const esp_merge_spec *spec, esp_dtype compute, bool weights, esp_merge_inputs *in) {
  esp_status st;
  char path[PATH_MAX];
  *in = (esp_merge_inputs){0};
  in->has_weights = esp_file_exists(esp_path_join(path, sizeof path, spec->base, "model.safetensors")) ||
                    esp_file_exists(esp_path_join(path, sizeof path, spec->base, "model.safetensors.index.json"));
  ESP_GOTO(esp_backend_create("cpu", &in->be));
  esp_model_options opt = {.compute = compute, .random_init = !in->has_weights};
  ESP_GOTO(esp_model_open(spec->base, in->be, &opt, &in->model));
  in->adapters = esp_mem_alloc(ESP_MEM_HOST, (size_t)(spec->n_adapters + 1) * sizeof *in->adapters);
  if (!in->adapters) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  for (int i = 0; i < spec->n_adapters; i++) {
    char name[32];
    snprintf(name, sizeof name, "merge%d", i);
    ESP_GOTO(esp_adapter_load(in->model, spec->adapters[i], name, false, &in->adapters[i]));
    in->n_adapters = i + 1;
    if (spec->weights) in->adapters[i]->weight = spec->weights[i];
  }
  if (weights) {
    ESP_GOTO(esp_model_load_weights(in->model));
    if (in->n_adapters > 0) ESP_GOTO(esp_adapters_activate(in->model, in->adapters, in->n_adapters));
  }
  return ESP_OK;
out:
  esp_merge_close(in);
  return st;
}

void esp_merge_close(esp_merge_inputs *in) {
  if (in->model && in->n_adapters > 0) esp_adapters_activate(in->model, NULL, 0);
  for (int i = 0; i < in->n_adapters; i++) esp_adapter_destroy(in->adapters[i]);
  esp_mem_free(in->adapters);
  if (in->model) esp_model_close(in->model);
  if (in->be) esp_backend_destroy(in->be);
  *in = (esp_merge_inputs){0};
}
