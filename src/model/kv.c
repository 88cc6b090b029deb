/* kv.c: generation with a cache of rotated keys and values, [batch * max_len, kv_heads * head_dim] per layer. */
#include <string.h>

#include "model/internal.h"

esp_status esp_kv_create(esp_model *m, int batch, int64_t max_len, esp_kv **out) {
  *out = NULL;
  if (max_len > 0) max_len += esp_model_virtual_tokens(m);
  if (batch <= 0 || max_len <= 0) return esp_fail(ESP_ERR_INTERNAL, "a cache of %d x %lld", batch, (long long)max_len);
  if (m->d.pos == ESP_POS_LEARNED && max_len > m->d.max_positions)
    return esp_fail(ESP_ERR_DATA, "%s: %lld tokens do not fit the model's %lld learned positions", m->dir,
                    (long long)max_len, (long long)m->d.max_positions);
  esp_kv *kv = esp_mem_alloc(ESP_MEM_HOST, sizeof *kv);
  if (!kv) return ESP_ERR_MEMORY;
  kv->model = m;
  kv->batch = batch;
  kv->max_len = max_len;
  int64_t bytes =
      (int64_t)m->d.layers * batch * max_len * m->d.kv_heads * m->d.head_dim * (int64_t)esp_dtype_size(m->opt.compute);
  kv->k = m->be->ops->alloc(m->be, ESP_MEM_ACTIVATIONS, bytes);
  kv->v = m->be->ops->alloc(m->be, ESP_MEM_ACTIVATIONS, bytes);
  kv->lens = esp_mem_alloc(ESP_MEM_HOST, (size_t)batch * 2 * sizeof *kv->lens);
  if (!kv->k || !kv->v || !kv->lens) {
    esp_kv_destroy(kv);
    return esp_backend_why_null(m->be);
  }
  *out = kv;
  return ESP_OK;
}

void esp_kv_destroy(esp_kv *kv) {
  if (!kv) return;
  if (kv->k) kv->model->be->ops->free(kv->model->be, kv->k);
  if (kv->v) kv->model->be->ops->free(kv->model->be, kv->v);
  esp_mem_free(kv->lens);
  esp_mem_free(kv->shares);
  esp_mem_free(kv);
}

/* The pass over a checked batch; cache rows of its tokens and the rows whose logits are wanted are host arrays. */
static esp_status cached_pass(esp_kv *kv, esp_stack *stack, const esp_virtual *v, bool decode,
                              const int32_t *cache_rows, const int32_t *rows, int n_rows, float *logits) {
  esp_model *m = kv->model;
  esp_pass p;
  ESP_TRY(esp_pass_begin(&p, m, stack, v, n_rows, false));
  p.kv = kv;
  p.decode = decode;
  p.d_rows = esp_work_ints(m, ESP_INTS_TARGETS); /* there are no targets here */
  m->be->ops->upload(m->be, p.d_rows, cache_rows, v->batch.tokens * 4);
  int64_t mark = esp_stack_mark(stack);
  esp_decoder_forward(&p, ESP_CKPT_OFF, decode ? esp_pass_piece(&p, ESP_PIECE_FORWARD, 0) : 0, 0);
  esp_status st = esp_head_logits(&p, rows, n_rows, logits);
  esp_stack_release(stack, mark);
  return st == ESP_OK ? esp_backend_sync(m->be) : st;
}

esp_status esp_model_prefill(esp_model *m, esp_stack *stack, esp_kv *kv, const esp_batch *prompts, float *logits) {
  if (prompts->n_seqs > kv->batch)
    return esp_fail(ESP_ERR_INTERNAL, "%d prompts for a cache of %d", prompts->n_seqs, kv->batch);
  esp_status st = ESP_OK;
  esp_virtual v;
  ESP_TRY(esp_batch_check(m, prompts, false));
  ESP_TRY(esp_virtual_begin(&v, m, prompts, false));
  const esp_batch *all = &v.batch;
  int32_t *rows = esp_mem_alloc(ESP_MEM_HOST, (size_t)(all->tokens + all->n_seqs) * sizeof *rows);
  if (!rows) ESP_GOTO(ESP_ERR_MEMORY);
  int32_t *last = rows + all->tokens;
  for (int b = 0; b < all->n_seqs; b++) {
    int32_t first = all->cu_seqlens[b], n = all->cu_seqlens[b + 1] - first;
    if (n <= 0 || n > kv->max_len)
      ESP_GOTO(esp_fail(ESP_ERR_DATA, "prompt %d has %d tokens, the cache holds %lld", b, n, (long long)kv->max_len));
    for (int32_t i = 0; i < n; i++) rows[first + i] = (int32_t)(b * kv->max_len) + i;
    last[b] = first + n - 1;
    kv->lens[b] = n;
    if (prompts->adapters) kv->lens[kv->batch + b] = prompts->adapters[b];
  }
  kv->adapters = prompts->adapters ? kv->lens + kv->batch : NULL;
  esp_mem_free(kv->shares);
  kv->shares = NULL;
  kv->n_shares = prompts->n_shares;
  if (prompts->shares) {
    size_t bytes = (size_t)prompts->n_seqs * (size_t)prompts->n_shares * sizeof *kv->shares;
    kv->shares = esp_mem_alloc(ESP_MEM_HOST, bytes);
    if (!kv->shares) ESP_GOTO(ESP_ERR_MEMORY);
    memcpy(kv->shares, prompts->shares, bytes);
  }
  kv->filled = prompts->n_seqs;
  st = cached_pass(kv, stack, &v, false, rows, last, prompts->n_seqs, logits);
out:
  esp_mem_free(rows);
  esp_virtual_end(&v);
  return st;
}

esp_status esp_model_decode(esp_model *m, esp_stack *stack, esp_kv *kv, const int32_t *ids, float *logits) {
  int n = kv->filled;
  if (n <= 0) return esp_fail(ESP_ERR_INTERNAL, "decode before prefill");
  esp_status st = ESP_OK;
  int32_t *block = esp_mem_alloc(ESP_MEM_HOST, (size_t)(4 * n + 1) * sizeof *block);
  if (!block) return ESP_ERR_MEMORY;
  int32_t *pos = block, *rows = block + n, *each = block + 2 * n, *cu = block + 3 * n;
  for (int b = 0; b < n; b++) {
    if (kv->lens[b] >= kv->max_len) {
      st = esp_fail(ESP_ERR_DATA, "sequence %d is longer than the cache of %lld tokens", b, (long long)kv->max_len);
      goto out;
    }
    pos[b] = kv->lens[b];
    rows[b] = (int32_t)(b * kv->max_len) + kv->lens[b];
    each[b] = cu[b] = b;
  }
  cu[n] = n;
  for (int b = 0; b < n; b++) kv->lens[b]++;
  esp_virtual next = {.batch = {.tokens = n,
                                .ids = ids,
                                .positions = pos,
                                .cu_seqlens = cu,
                                .n_seqs = n,
                                .adapters = kv->adapters,
                                .shares = kv->shares,
                                .n_shares = kv->n_shares}}; /* virtual tokens are in the cache already */
  st = esp_batch_check(m, &next.batch, false);
  if (st == ESP_OK) st = cached_pass(kv, stack, &next, true, rows, each, n, logits);
out:
  esp_mem_free(block);
  return st;
}
