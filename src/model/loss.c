/* loss.c: final norm, output head and cross-entropy over chunks of the rows that carry a label. Logits never exist
 * whole, rows without a label cost nothing, and the gradient of a chunk's input is made before the next chunk's logits
 * overwrite this one's. */
#include <math.h>
#include <string.h>

#include "model/internal.h"

/* [n, vocab] in the logits' buffer. Rows are apart by whole cache lines, one more than the vocabulary takes: rows that
 * are a multiple of 4096 bytes apart, as most vocabularies would have them, share their cache sets, and a tile of 16 of
 * them no longer fits the first level. Each row of gradients lies at the start of its row of logits. */
static esp_tensor padded(const esp_model *m, int64_t n, esp_dtype t) {
  esp_tensor x = esp_work_tensor(m, ESP_W_LOGITS, n, m->d.vocab);
  x.dtype = t;
  x.ld = esp_logits_stride(m) * 4 / (int64_t)esp_dtype_size(t);
  return x;
}

typedef struct labelled { /* host copies of the rows that count */
  int32_t *rows, *targets;
  float *weights;
  int64_t n;
} labelled;

static esp_status collect(const esp_batch *b, labelled *l) {
  size_t n = (size_t)b->tokens;
  char *block = esp_mem_alloc(ESP_MEM_HOST, n * 12);
  if (!block) return ESP_ERR_MEMORY;
  l->rows = (int32_t *)block;
  l->targets = l->rows + n;
  l->weights = (float *)(l->targets + n);
  l->n = 0;
  for (int64_t t = 0; t < b->tokens; t++) {
    if (b->weights[t] == 0.0f) continue;
    l->rows[l->n] = (int32_t)t;
    l->targets[l->n] = b->targets[t];
    l->weights[l->n++] = b->weights[t];
  }
  return ESP_OK;
}

/* log p of every labelled row, to its place in the batch. */
static esp_status bring_logprob(esp_pass *p, const labelled *l, float *logprob) {
  esp_backend *be = p->run.be;
  float *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)l->n * sizeof *host);
  if (!host) return ESP_ERR_MEMORY;
  be->ops->download(be, host, esp_work_ints(p->run.model, ESP_INTS_LOGP), l->n * 4);
  for (int64_t i = 0; i < l->n; i++) logprob[l->rows[i]] = host[i];
  esp_mem_free(host);
  return ESP_OK;
}

esp_status esp_head_loss(esp_pass *p, float scale, bool train, bool need_dx, double *weight_sum, float *logprob) {
  esp_run *run = &p->run;
  esp_model *m = run->model;
  esp_backend *be = run->be;
  int64_t hidden = m->d.hidden;
  esp_tensor none = {0};
  labelled l = {0};
  esp_status st = ESP_OK;
  *weight_sum = 0;
  ESP_TRY(collect(run->batch, &l));
  esp_tensor dr = esp_work_tensor(m, ESP_W_DR, p->tokens, hidden);
  if (train && need_dx) be->ops->zero(be, dr.data, esp_tensor_bytes(&dr));
  if (l.n == 0) goto out;
  for (int64_t i = 0; i < l.n; i++) *weight_sum += (double)l.weights[i];

  int32_t *d_rows = esp_work_ints(m, ESP_INTS_ROWS), *d_targets = esp_work_ints(m, ESP_INTS_TARGETS);
  float *d_weights = (float *)esp_work_ints(m, ESP_INTS_WEIGHTS), *rstd = m->work.buf[ESP_W_STAT];
  float *mean = rstd + m->work.bytes[ESP_W_STAT] / 8;
  be->ops->upload(be, d_rows, l.rows, l.n * 4);
  be->ops->upload(be, d_targets, l.targets, l.n * 4);
  be->ops->upload(be, d_weights, l.weights, l.n * 4);

  esp_tensor stream = esp_work_tensor(m, ESP_W_Y, p->tokens, hidden);
  esp_tensor r = esp_work_tensor(m, ESP_W_WIDE, l.n, hidden), x = esp_work_tensor(m, ESP_W_NORMED, l.n, hidden);
  esp_tensor dx = esp_work_tensor(m, ESP_W_DWIDE, l.n, hidden);
  be->ops->gather_rows(be, r, stream, d_rows);
  esp_norm_forward(run, m->final_norm, r, none, none, x, rstd, mean);

  int64_t chunk = esp_head_chunk(m, l.n), c = 0;
  for (int64_t at = 0; at < l.n; at += chunk, c++) {
    int64_t n = l.n - at < chunk ? l.n - at : chunk;
    int64_t mark = esp_stack_mark(run->stack);
    esp_tensor xc = esp_tensor_rows_view(&x, at, n), logits = padded(m, n, ESP_F32);
    esp_tensor dlogits = padded(m, n, run->compute); /* over the logits, row by row */
    run->part = c;
    esp_group_forward(run, m->head, xc, logits, false);
    esp_ce_args ce = {.logits = logits,
                      .d = train ? dlogits : none,
                      .targets = d_targets + at,
                      .weights = d_weights + at,
                      .scale = scale,
                      .softcap = m->d.final_softcap,
                      .sums = (double *)((char *)m->work.buf[ESP_W_TOTAL] + ESP_TOTAL_SUMS),
                      .logprob = logprob ? (float *)esp_work_ints(m, ESP_INTS_LOGP) + at : NULL};
    be->ops->cross_entropy(be, &ce);
    if (train) esp_group_backward(run, m->head, xc, dlogits, need_dx ? esp_tensor_rows_view(&dx, at, n) : none);
    esp_stack_release(run->stack, mark);
  }
  run->part = 0;
  if (logprob) ESP_GOTO(bring_logprob(p, &l, logprob));
  if (train && need_dx) {
    esp_tensor d_rows_r = esp_work_tensor(m, ESP_W_Y, l.n, hidden); /* the stream itself is no longer needed */
    esp_norm_backward(run, m->final_norm, r, dx, d_rows_r, rstd, mean, false);
    be->ops->scatter_rows(be, dr, d_rows_r, d_rows);
  }
out:
  esp_mem_free(l.rows);
  return st;
}

esp_status esp_head_logits(esp_pass *p, const int32_t *rows, int64_t n, float *logits) {
  esp_run *run = &p->run;
  esp_model *m = run->model;
  esp_backend *be = run->be;
  int64_t hidden = m->d.hidden, vocab = m->d.vocab, c = 0;
  int64_t chunk = esp_head_chunk(m, n < p->tokens ? n : p->tokens);
  esp_tensor none = {0}, stream = esp_work_tensor(m, ESP_W_Y, p->tokens, hidden);
  for (int64_t at = 0; at < n; at += chunk, c++) {
    int64_t k = n - at < chunk ? n - at : chunk, mark = esp_stack_mark(run->stack);
    esp_tensor r = esp_work_tensor(m, ESP_W_WIDE, k, hidden), x = esp_work_tensor(m, ESP_W_NORMED, k, hidden);
    esp_tensor y = esp_work_tensor(m, ESP_W_LOGITS, k, vocab);
    int32_t *d_rows = esp_work_ints(m, ESP_INTS_ROWS);
    be->ops->upload(be, d_rows, rows + at, k * 4);
    be->ops->gather_rows(be, r, stream, d_rows);
    esp_norm_forward(run, m->final_norm, r, none, none, x, NULL, NULL);
    run->part = c;
    esp_group_forward(run, m->head, x, y, false);
    be->ops->download(be, logits + at * vocab, y.data, k * vocab * 4);
    esp_stack_release(run->stack, mark);
  }
  run->part = 0;
  if (m->d.final_softcap > 0.0f && !esp_backend_counts(be))
    for (int64_t i = 0; i < n * vocab; i++) logits[i] = m->d.final_softcap * tanhf(logits[i] / m->d.final_softcap);
  return ESP_OK;
}
