/* steps.c: how many steps a task takes and the largest shapes in it: exact, by packing every epoch. None where nothing
 * is trained; one epoch is packed there for its shapes. */
#include <math.h>

#include "train/train.h"

static int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}
static int64_t smaller(int64_t a, int64_t b) { /* 0: not known yet */
  return !a || (b && b < a) ? b : a;
}

static void measure(const esp_rows *rows, esp_task_steps *out) {
  int64_t tokens = esp_sequence_round(rows->tokens), trained = 0, labelled = 0;
  for (int s = 0; s < rows->n_seqs; s++) {
    int64_t before = trained;
    for (int32_t t = rows->cu_seqlens[s]; t < rows->cu_seqlens[s + 1]; t++) trained += rows->weights[t] != 0.0f;
    labelled += trained > before;
    out->max_length = larger(out->max_length, rows->cu_seqlens[s + 1] - rows->cu_seqlens[s]);
  }
  out->max_tokens = larger(out->max_tokens, tokens);
  out->max_trained = larger(out->max_trained, trained);
  out->max_labelled = larger(out->max_labelled, labelled);
  /* padding is a sequence a token */
  out->max_blocks = larger(out->max_blocks, tokens / 32 + rows->n_seqs + tokens - rows->tokens);
  out->min_tokens = smaller(out->min_tokens, tokens);
  out->min_trained = smaller(out->min_trained, trained);
  out->tokens += tokens;
}

/* rows: room for a micro-batch, left as large as the largest. */
static esp_status measure_epoch(const esp_packs *p, const esp_recipe_train *t, esp_rows *rows, int64_t row_limit,
                                esp_task_steps *out) {
  int64_t n = esp_packs_count(p) < row_limit ? esp_packs_count(p) : row_limit;
  for (int64_t first = 0; first < n; first += t->micro_batch_size) {
    int64_t take = esp_packs_count(p) - first < t->micro_batch_size ? esp_packs_count(p) - first : t->micro_batch_size;
    ESP_TRY(esp_packs_fetch(p, first, take, 0, rows));
    measure(rows, out);
  }
  return ESP_OK;
}

esp_status esp_task_count(const esp_recipe *r, int task, const esp_dataset *d, int ranks, esp_rows *rows,
                          esp_task_steps *out) {
  esp_status st = ESP_OK;
  esp_packs *p = NULL;
  const esp_recipe_train *t = &r->tasks[task].train;
  *out = (esp_task_steps){.samples = esp_dataset_count(d)};
  bool nothing = esp_adapter_trains_nothing(&r->tasks[task].adapter);
  double epochs_left = t->epochs;
  for (int64_t epoch = 0; t->max_steps > 0 ? out->steps < t->max_steps : epochs_left > 1e-9; epoch++) {
    ESP_GOTO(esp_packs_create(d, &r->tasks[task].data_cfg, r->seed, task, epoch, &p));
    int64_t n = esp_packs_count(p), span = t->micro_batch_size * t->gradient_accumulation_steps * ranks;
    int64_t steps = (n + span - 1) / span;
    if (steps == 0) ESP_GOTO(esp_fail(ESP_ERR_DATA, "task '%s' has no row to train on", r->tasks[task].name));
    if (t->max_steps > 0 && steps > t->max_steps - out->steps) steps = t->max_steps - out->steps;
    if (t->max_steps <= 0 && epochs_left < 1) steps = (int64_t)ceil((double)steps * epochs_left - 1e-9);
    if (epoch == 0) {
      out->rows = n;
      for (int64_t i = 0; i < n; i++) out->weight += esp_packs_row_weight(p, i);
    }
    ESP_GOTO(measure_epoch(p, t, rows, steps * span, out));
    out->steps += steps;
    epochs_left -= 1;
    esp_packs_destroy(p);
    p = NULL;
    if (nothing) break;
  }
  if (nothing) out->steps = out->tokens = 0;
out:
  esp_packs_destroy(p);
  return st;
}
