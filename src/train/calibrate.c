/* calibrate.c: the pass over data that some adapter kinds need before they are trained. It sees the first micro-batches
 * of the task's first epoch, the same on every rank, and is done again on resume: what it finds is a function of the
 * recipe, the base and the data. */
#include <stdio.h>

#include "train/train.h"

/* The adapter anew with what the pass gave, on the base read again: one that gives way to it is packed with that. */
static esp_status restart(esp_engine *e, const esp_recipe_task *t) {
  esp_adapter_cfg cfg;
  char base[ESP_PATH];
  esp_arena *arena = esp_arena_create(ESP_MEM_HOST);
  if (!arena) return ESP_ERR_MEMORY;
  snprintf(base, sizeof base, "%s", esp_model_dir(e->model));
  esp_status st = e->adapter->kind->restart(e->adapter, arena, &cfg);
  if (st == ESP_OK) st = esp_engine_load(e, base, &cfg, NULL, true);
  esp_arena_destroy(arena);
  return st == ESP_OK ? esp_engine_optim(e, &t->optim, false) : st;
}

esp_status esp_calibrate(esp_engine *e, const esp_recipe *r, const esp_train_data *d, int task) {
  const esp_recipe_task *t = &r->tasks[task];
  esp_adapter *a = e->adapter;
  bool gradients;
  int64_t wanted = a->kind->wants_data ? a->kind->wants_data(a, &gradients) : 0;
  if (wanted <= 0) return ESP_OK;
  esp_status st = ESP_OK;
  esp_packs *packs = NULL;
  esp_rows rows = {0};
  ESP_GOTO(esp_packs_create(d->task[task], &t->data_cfg, r->seed, task, 0, &packs));
  int64_t count = esp_packs_count(packs), size = t->train.micro_batch_size;
  for (int64_t m = 0; m < a->kind->wants_data(a, &gradients) && m * size < count; m++) {
    int64_t left = count - m * size, n = left < size ? left : size;
    ESP_GOTO(esp_packs_fetch(packs, m * size, n, 0, &rows));
    int64_t padded = esp_sequence_round(rows.tokens);
    if (padded != rows.tokens) ESP_GOTO(esp_packs_fetch(packs, m * size, n, padded, &rows));
    esp_batch b = esp_sequence_batch(&rows);
    ESP_GOTO(esp_adapter_calibrate(a, &e->stack, &b, r->memory.activation_checkpointing));
  }
  if (a->kind->seen) ESP_GOTO(a->kind->seen(a));
  ESP_GOTO(esp_backend_sync(e->be));
  if (a->kind->restart) st = restart(e, t);
out:
  esp_packs_destroy(packs);
  esp_rows_deinit(&rows);
  return st;
}
