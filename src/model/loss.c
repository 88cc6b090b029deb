/* loss.c: final norm, output head and cross-entropy over chunks of the rows that carry a label. Logits never exist
 * whole, rows without a label cost nothing, and the gradient of a chunk's input is made before the next chunk's logits
 * overwrite this one's. */
#include <math.h>
#include <string.h>

#include "model/internal.h"

/* [n, vocab] in the logits' buffer. Rows are apart by whole cache lines, one more than the vocabulary takes: rows that
 * are a multiple of 4096 bytes apart, as most vocabularies would have them, share their cache sets, and a tile of 16 of
 * them no longer fits the first level. Each row of gradients lies at the start of its row of logits. */
static esp_tensor padded(const esp_model *m, esp_work_id id, int64_t n, esp_dtype t) {
  esp_tensor x = esp_work_tensor(m, id, n, m->d.vocab);
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

static double *sums_of(const esp_model *m) {
  return (double *)((char *)m->work.buf[ESP_W_TOTAL] + ESP_TOTAL_SUMS);
}

/* The teacher's logits of rows [at, at+n), then the gradient of its term, as [n, vocab] fp32. Before the student's own
 * logits are overwritten. */
static esp_tensor taught_logits(esp_run *run, const esp_teach *t, int64_t at, esp_tensor logits, const float *weights,
                                float scale, bool train) {
  esp_model *m = run->model;
  int64_t n = esp_tensor_rows(&logits);
  esp_tensor teacher = padded(m, ESP_W_TEACH, n, ESP_F32);
  esp_group_apply(run, m->head, esp_tensor_rows_view(&t->features, at, n), teacher);
  esp_distill_args a = {.student = logits,
                        .teacher = teacher,
                        .d = train ? teacher : (esp_tensor){0},
                        .weights = weights,
                        .temperature = t->temperature,
                        .factor = t->kl * t->temperature * t->temperature,
                        .scale = scale,
                        .softcap = m->d.final_softcap,
                        .sums = sums_of(m)};
  run->be->ops->distill(run->be, &a);
  return teacher;
}

/* x: rows [at, at+n) of the normed states, dx: their gradient so far, data NULL: not wanted. */
static void taught_states(esp_run *run, const esp_teach *t, int64_t at, esp_tensor x, esp_tensor dx,
                          const float *weights, float scale) {
  esp_hidden_args a = {.kind = t->hidden,
                       .x = x,
                       .teacher = esp_tensor_rows_view(&t->features, at, esp_tensor_rows(&x)),
                       .d = dx,
                       .low = t->low,
                       .high = t->high,
                       .weights = weights,
                       .factor = t->hidden_weight,
                       .scale = scale,
                       .sums = sums_of(run->model)};
  run->be->ops->hidden_loss(run->be, &a);
}

esp_status esp_head_loss(esp_pass *p, float scale, bool train, bool need_dx, double *weight_sum, float *logprob) {
  esp_run *run = &p->run;
  esp_model *m = run->model;
  esp_backend *be = run->be;
  const esp_teach *teach = run->batch->teach;
  int64_t hidden = m->d.hidden;
  esp_tensor none = {0};
  labelled l = {0};
  esp_status st = ESP_OK;
  *weight_sum = 0;
  ESP_TRY(collect(run->batch, &l));
  esp_tensor dr = esp_work_tensor(m, ESP_W_DR, p->tokens, hidden);
  if (train && need_dx) be->ops->zero(be, dr.data, esp_tensor_bytes(&dr));
  if (l.n == 0) goto out;
  if (teach && (teach->features.dtype != run->compute || esp_tensor_rows(&teach->features) < l.n ||
                esp_tensor_cols(&teach->features) != hidden))
    ESP_GOTO(esp_fail(ESP_ERR_INTERNAL, "a teacher's states do not fit the batch"));
  if (teach && teach->kl != 0) ESP_GOTO(esp_work_teach(m, l.n));
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
    esp_tensor xc = esp_tensor_rows_view(&x, at, n), logits = padded(m, ESP_W_LOGITS, n, ESP_F32);
    esp_tensor dlogits = padded(m, ESP_W_LOGITS, n, run->compute); /* over the logits, row by row */
    esp_tensor dxc = train && need_dx ? esp_tensor_rows_view(&dx, at, n) : none, dtaught = none;
    run->part = c;
    esp_group_forward(run, m->head, xc, logits, false);
    if (teach && teach->kl != 0) dtaught = taught_logits(run, teach, at, logits, d_weights + at, scale, train);
    esp_ce_args ce = {.logits = logits,
                      .d = train ? dlogits : none,
                      .targets = d_targets + at,
                      .weights = d_weights + at,
                      .scale = scale,
                      .softcap = m->d.final_softcap,
                      .sums = sums_of(m),
                      .logprob = logprob ? (float *)esp_work_ints(m, ESP_INTS_LOGP) + at : NULL};
    be->ops->cross_entropy(be, &ce);
    if (train && dtaught.data) be->ops->axpby(be, dlogits, 1.0f, dtaught, 1.0f);
    if (train) esp_group_backward(run, m->head, xc, dlogits, dxc);
    if (teach && teach->hidden) taught_states(run, teach, at, xc, dxc, d_weights + at, scale);
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

esp_status esp_head_features(esp_pass *p, esp_tensor out) {
  esp_run *run = &p->run;
  esp_model *m = run->model;
  labelled l = {0};
  esp_status st = ESP_OK;
  ESP_TRY(collect(run->batch, &l));
  if (l.n == 0) goto out;
  if (esp_tensor_rows(&out) < l.n || esp_tensor_cols(&out) != m->d.hidden || out.dtype != run->compute)
    ESP_GOTO(esp_fail(ESP_ERR_INTERNAL, "no room for the states of %lld rows", (long long)l.n));
  int32_t *d_rows = esp_work_ints(m, ESP_INTS_ROWS);
  esp_tensor none = {0}, stream = esp_work_tensor(m, ESP_W_Y, p->tokens, m->d.hidden);
  esp_tensor r = esp_work_tensor(m, ESP_W_WIDE, l.n, m->d.hidden);
  run->be->ops->upload(run->be, d_rows, l.rows, l.n * 4);
  run->be->ops->gather_rows(run->be, r, stream, d_rows);
  esp_norm_forward(run, m->final_norm, r, none, none, esp_tensor_rows_view(&out, 0, l.n), NULL, NULL);
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
