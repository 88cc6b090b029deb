/* virtual.c: virtual tokens. An adapter may put n rows of its own in front of the sequences of a batch (prompt and
 * prefix tuning): the batch is made again with those rows in it, positions move up by n, and what the caller asked for
 * is read at the rows where its own tokens lie now. No part of the model knows of them: they attend, are attended to,
 * and carry no loss. */
#include <string.h>

#include "model/internal.h"

int64_t esp_model_virtual_tokens(const esp_model *m) {
  return m->hooks && m->hooks->virtual_tokens ? m->hooks->virtual_tokens(m->hooks->ctx, ESP_EVERY_ADAPTER) : 0;
}

/* Rows in front of sequence s. Without a label it has no part in a step, and what fills up a batch has none. */
static int64_t in_front(const esp_model *m, const esp_batch *b, int s, bool labelled) {
  if (!m->hooks || !m->hooks->virtual_tokens) return 0;
  bool wanted = !labelled;
  for (int32_t t = b->cu_seqlens[s]; t < b->cu_seqlens[s + 1] && !wanted; t++) wanted = b->weights[t] != 0.0f;
  if (!wanted) return 0;
  return m->hooks->virtual_tokens(m->hooks->ctx, b->adapters ? b->adapters[s] : ESP_EVERY_ADAPTER);
}

static esp_status reserve(esp_virtual *v, const esp_batch *b, int64_t n) {
  size_t tokens = (size_t)(b->tokens + n), seqs = (size_t)b->n_seqs;
  int32_t *at = esp_mem_alloc(ESP_MEM_HOST, (4 * tokens + seqs + 1 + 2 * (size_t)n + (size_t)b->tokens) * sizeof *at);
  if (!at) return ESP_ERR_MEMORY;
  v->block = at;
  v->n = n;
  v->ids = at;
  v->positions = at + tokens;
  v->targets = at + 2 * tokens;
  v->weights = (float *)(at + 3 * tokens);
  v->cu = at + 4 * tokens;
  v->rows = v->cu + seqs + 1;
  v->which = v->rows + n;
  v->row_of = v->which + n;
  v->batch = *b;
  v->batch.tokens = (int64_t)tokens;
  v->batch.ids = v->ids;
  v->batch.positions = v->positions;
  v->batch.targets = v->targets;
  v->batch.weights = v->weights;
  v->batch.cu_seqlens = v->cu;
  return ESP_OK;
}

esp_status esp_virtual_begin(esp_virtual *v, const esp_model *m, const esp_batch *b, bool labelled) {
  int64_t n = 0, at = 0, k = 0;
  *v = (esp_virtual){.batch = *b};
  for (int s = 0; s < b->n_seqs; s++) n += in_front(m, b, s, labelled);
  if (n == 0) return ESP_OK;
  ESP_TRY(reserve(v, b, n));
  for (int s = 0; s < b->n_seqs; s++) {
    int64_t front = in_front(m, b, s, labelled);
    v->cu[s] = (int32_t)at;
    for (int64_t i = 0; i < front; i++, at++, k++) { /* the id stands for a row that is overwritten */
      v->ids[at] = v->targets[at] = 0;
      v->positions[at] = v->which[k] = (int32_t)i;
      v->rows[k] = (int32_t)at;
      v->weights[at] = 0.0f;
    }
    for (int32_t t = b->cu_seqlens[s]; t < b->cu_seqlens[s + 1]; t++, at++) {
      v->row_of[t] = (int32_t)at;
      v->ids[at] = b->ids[t];
      v->positions[at] = b->positions[t] + (int32_t)front;
      v->targets[at] = labelled ? b->targets[t] : 0;
      v->weights[at] = labelled ? b->weights[t] : 0.0f;
    }
  }
  v->cu[b->n_seqs] = (int32_t)at;
  esp_status st = esp_batch_check(m, &v->batch, false); /* positions may have left the model's */
  if (st != ESP_OK) esp_virtual_end(v);
  return st;
}

void esp_virtual_end(esp_virtual *v) {
  esp_mem_free(v->block);
  *v = (esp_virtual){0};
}
