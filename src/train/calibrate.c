/* calibrate.c: the pass over data that some adapter kinds need before they are trained. In a run it sees the first
 * micro-batches of the task's first epoch, the same on every rank, and is done again on resume: what it finds is a
 * function of the recipe, the base and the data. */
#include <stdio.h>

#include "train/train.h"

/* The adapter anew with what the pass gave, on the base read again: one that gives way to it is packed with that. */
static esp_status restart(esp_engine *e, const esp_optim_cfg *optim) {
  esp_adapter_cfg cfg;
  char base[ESP_PATH];
  esp_arena *arena = esp_arena_create(ESP_MEM_HOST);
  if (!arena) return ESP_ERR_MEMORY;
  snprintf(base, sizeof base, "%s", esp_model_dir(e->model));
  esp_status st = e->adapter->kind->restart(e->adapter, arena, &cfg);
  if (st == ESP_OK) st = esp_engine_load(e, base, &cfg, NULL, true);
  esp_arena_destroy(arena);
  return st == ESP_OK ? esp_engine_optim(e, optim, false) : st;
}

static int64_t wanted(const esp_adapter *a) {
  bool gradients;
  return a->kind->wants_data ? a->kind->wants_data(a, &gradients) : 0;
}

bool esp_engine_wants_data(const esp_engine *e) {
  return e->adapter && wanted(e->adapter) > 0;
}

esp_status esp_calibrate_with(esp_engine *e, const esp_optim_cfg *optim, esp_ckpt_mode ckpt, int64_t n,
                              esp_status (*batch)(void *ctx, int64_t i, esp_batch *out), void *ctx) {
  esp_adapter *a = e->adapter;
  if (wanted(a) <= 0) return ESP_OK;
  for (int64_t i = 0; i < n && i < wanted(a); i++) {
    esp_batch b;
    ESP_TRY(batch(ctx, i, &b));
    ESP_TRY(esp_adapter_calibrate(a, &e->stack, &b, ckpt));
  }
  if (a->kind->seen) ESP_TRY(a->kind->seen(a));
  ESP_TRY(esp_backend_sync(e->be));
  return a->kind->restart ? restart(e, optim) : ESP_OK;
}

typedef struct rows_of { /* of a task's first epoch */
  esp_packs *packs;
  esp_rows rows;
  int64_t size;
} rows_of;

static esp_status fetch(void *ctx, int64_t i, esp_batch *out) {
  rows_of *r = ctx;
  int64_t left = esp_packs_count(r->packs) - i * r->size, n = left < r->size ? left : r->size;
  ESP_TRY(esp_packs_fetch(r->packs, i * r->size, n, 0, &r->rows));
  int64_t padded = esp_sequence_round(r->rows.tokens);
  if (padded != r->rows.tokens) ESP_TRY(esp_packs_fetch(r->packs, i * r->size, n, padded, &r->rows));
  *out = esp_sequence_batch(&r->rows);
  return ESP_OK;
}

esp_status esp_calibrate(esp_engine *e, const esp_recipe *r, const esp_train_data *d, int task) {
  const esp_recipe_task *t = &r->tasks[task];
  rows_of from = {.size = t->train.micro_batch_size};
  if (!esp_engine_wants_data(e)) return ESP_OK;
  esp_status st = esp_packs_create(d->task[task], &t->data_cfg, r->seed, task, 0, &from.packs);
  if (st == ESP_OK)
    st = esp_calibrate_with(e, &t->optim, r->memory.activation_checkpointing,
                            (esp_packs_count(from.packs) + from.size - 1) / from.size, fetch, &from);
  esp_packs_destroy(from.packs);
  esp_rows_deinit(&from.rows);
  return st;
}
