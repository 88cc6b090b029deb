/* engine.c: what a step runs on. The same code builds it on `cpu` for a run and on `count` for a plan. */
#include <string.h>

#include "train/train.h"

esp_status esp_engine_init(esp_engine *e, const esp_recipe *r, esp_comm *comm, const char *backend) {
  memset(e, 0, sizeof *e);
  e->r = r;
  e->comm = comm;
  return esp_backend_create(backend, &e->be);
}

void esp_engine_unload(esp_engine *e) {
  esp_optim_destroy(e->optim);
  esp_adapter_destroy(e->adapter);
  esp_model_close(e->model);
  e->optim = NULL;
  e->adapter = NULL;
  e->model = NULL;
}

void esp_engine_deinit(esp_engine *e) {
  if (!e->be) return;
  esp_engine_unload(e);
  if (e->stack_ready) esp_stack_deinit(&e->stack);
  esp_backend_destroy(e->be);
  memset(e, 0, sizeof *e);
}

esp_status esp_engine_load(esp_engine *e, const char *base, const esp_adapter_cfg *cfg, const char *adapter_dir,
                           bool trainable) {
  esp_engine_unload(e);
  esp_model_options o = {e->r->model.dtype, e->r->model.random_init, e->r->seed};
  ESP_TRY(esp_model_open(base, e->be, &o, &e->model));
  if (adapter_dir)
    ESP_TRY(esp_adapter_load(e->model, adapter_dir, "default", trainable, &e->adapter));
  else if (cfg)
    ESP_TRY(esp_adapter_create(e->model, cfg, "default", trainable, &e->adapter));
  if (e->adapter) ESP_TRY(esp_adapters_activate(e->model, &e->adapter, 1));
  ESP_TRY(esp_model_load_weights(e->model));
  return esp_backend_sync(e->be);
}

esp_status esp_engine_optim(esp_engine *e, const esp_optim_cfg *cfg, bool keep) {
  if (keep && e->optim && !strcmp(e->optim->cfg.name, cfg->name)) {
    e->optim->cfg = *cfg;
    return ESP_OK;
  }
  esp_optim_destroy(e->optim);
  e->optim = NULL;
  return esp_optim_create(cfg, e->adapter->params, &e->optim);
}

esp_status esp_engine_stack(esp_engine *e, int64_t capacity) {
  if (e->stack_ready) esp_stack_deinit(&e->stack);
  e->stack_ready = false;
  ESP_TRY(esp_stack_init(&e->stack, e->be, capacity));
  e->stack_ready = true;
  return ESP_OK;
}

void esp_engine_parameters(const esp_engine *e, int64_t *trainable, int64_t *total) {
  esp_site **sites;
  int n = esp_model_sites(e->model, &sites);
  bool tied = esp_model_describe(e->model)->tied;
  *trainable = *total = 0;
  for (int i = 0; i < n; i++) {
    if (sites[i]->is_head && tied) continue; /* the embedding's storage */
    *total += sites[i]->out * sites[i]->in + (sites[i]->bias_tensor ? sites[i]->out : 0);
  }
  for (int i = 0; e->adapter && i < e->adapter->params->count; i++)
    if (!e->adapter->params->list[i].frozen) *trainable += e->adapter->params->list[i].numel;
}
