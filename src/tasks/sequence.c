/* sequence.c: what several strategies need of the run: rows made of samples, passes, gradients of samples, flat
 * arithmetic over all parameters. */
#include <string.h>

#include "core/rng.h"
#include "tasks/internal.h"

/* On a device a step costs the host as much as its launches unless they can be replayed, which wants few shapes: sizes
 * are rounded up to eighths of the largest micro-batch. */
int64_t esp_sequence_pad(const esp_backend *be, int64_t tokens, int64_t most) {
  int64_t padded = esp_sequence_round(tokens);
  if (be->on_host) return padded;
  int64_t eighth = (most / 8 + 63) / 64 * 64, up = eighth > 0 ? (padded + eighth - 1) / eighth * eighth : padded;
  return up < most ? up : padded > most ? padded : most;
}

/* ---- flat arithmetic ---- */

esp_tensor esp_sequence_masters(const esp_sequence *q) {
  return esp_flat(q->adapter->params->master, q->adapter->params->total);
}

esp_tensor esp_sequence_gradient(const esp_sequence *q) {
  return esp_flat(q->adapter->params->grad, q->adapter->params->total);
}

static esp_tensor scratch(const esp_sequence *q) {
  return esp_stack_tensor(q->stack, ESP_F32, 1, q->adapter->params->total);
}

void esp_sequence_exchange(const esp_sequence *q, esp_tensor other) {
  const esp_backend_ops *op = q->be->ops;
  int64_t mark = esp_stack_mark(q->stack);
  esp_tensor t = scratch(q), masters = esp_sequence_masters(q);
  op->axpby(q->be, t, 1.0f, masters, 0.0f);
  op->axpby(q->be, masters, 1.0f, other, 0.0f);
  op->axpby(q->be, other, 1.0f, t, 0.0f);
  esp_params_refresh_shadow(q->adapter->params);
  esp_stack_release(q->stack, mark);
}

double esp_sequence_dot(const esp_sequence *q, esp_tensor a, esp_tensor b) {
  double value = 0;
  q->be->ops->dot(q->be, &value, a.data, b.data, esp_tensor_numel(&a));
  return value;
}

double esp_sequence_pull(const esp_sequence *q, esp_tensor anchor, esp_tensor importance, double weight) {
  const esp_backend_ops *op = q->be->ops;
  int64_t mark = esp_stack_mark(q->stack);
  esp_tensor d = scratch(q), pull = d, grad = esp_sequence_gradient(q);
  op->axpby(q->be, d, 1.0f, anchor, 0.0f);
  op->axpby(q->be, d, 1.0f, esp_sequence_masters(q), -1.0f);
  if (importance.data) {
    pull = scratch(q);
    op->mul(q->be, pull, d, importance, 0.0f);
  }
  op->axpby(q->be, grad, (float)weight, pull, 1.0f);
  double value = 0.5 * weight * esp_sequence_dot(q, pull, d);
  esp_stack_release(q->stack, mark);
  return value;
}

esp_status esp_sequence_reduce(const esp_sequence *q, float *data, int64_t n) {
  if (q->comm->size == 1) return ESP_OK;
  return esp_comm_reduce(q->device_comm ? q->device_comm : q->comm, q->be, data, n);
}

/* ---- rows ---- */

/* For a plan: the longest sample of the tasks so far. */
static esp_sample longest(const esp_sequence *q) {
  esp_sample best = {q->task, 0};
  int64_t most = -1;
  for (int t = 0; t <= q->task; t++)
    for (int64_t i = 0; i < esp_dataset_count(q->data[t]); i++) {
      const int32_t *ids;
      const float *w;
      int64_t n;
      esp_dataset_sample(q->data[t], i, &ids, &w, &n);
      if (n > most) most = n, best = (esp_sample){t, i};
    }
  return best;
}

esp_status esp_sequence_rows(const esp_sequence *q, const esp_sample *s, int64_t n, esp_rows *out) {
  bool counting = esp_backend_counts(q->be);
  esp_sample most = counting ? longest(q) : (esp_sample){0};
  esp_rows_clear(out);
  for (int64_t i = 0; i < n; i++) {
    const esp_sample *at = counting ? &most : &s[i];
    const int32_t *ids;
    const float *w;
    int64_t len;
    esp_dataset_sample(q->data[at->task], at->index, &ids, &w, &len);
    ESP_TRY(esp_rows_add(out, ids, w, len));
  }
  return esp_rows_pad(out, esp_sequence_pad(q->be, out->tokens, q->max_tokens));
}

double esp_sequence_weight(const esp_sequence *q, esp_sample s) {
  const int32_t *ids;
  const float *w;
  int64_t n;
  double sum = 0;
  esp_dataset_sample(q->data[s.task], s.index, &ids, &w, &n);
  for (int64_t t = 1; t < n; t++) sum += w[t];
  return sum;
}

esp_status esp_sequence_choose(uint64_t seed, uint64_t stream, int64_t count, int64_t n, int64_t *out) {
  int64_t *perm = esp_mem_alloc(ESP_MEM_HOST, (size_t)count * sizeof *perm);
  if (!perm) return ESP_ERR_MEMORY;
  esp_rng_permutation(seed, stream, count, perm);
  memcpy(out, perm, (size_t)(n < count ? n : count) * sizeof *out);
  esp_mem_free(perm);
  return ESP_OK;
}

void esp_sequence_share(const esp_sequence *q, int64_t count, int64_t *first, int64_t *n) {
  int64_t size = q->comm->size, rank = q->comm->rank;
  *first = count * rank / size;
  *n = count * (rank + 1) / size - *first;
}

/* ---- passes ---- */

esp_status esp_sequence_pass(const esp_sequence *q, const esp_rows *rows, const struct esp_teach *teach, bool train,
                             double scale, int64_t draw, esp_loss_out *out) {
  esp_batch b = esp_sequence_batch(rows);
  b.teach = teach;
  return esp_model_step(q->model, q->stack, &b, q->ckpt, train, (float)scale, q->seed, draw, out, NULL);
}

esp_status esp_sequence_features(const esp_sequence *q, esp_tensor masters, const esp_batch *b, esp_tensor out) {
  esp_sequence_exchange(q, masters);
  esp_status st = esp_model_features(q->model, q->stack, b, out);
  esp_sequence_exchange(q, masters);
  return st;
}

esp_status esp_sequence_frozen_head(const esp_strategy *s, const esp_sequence *q) {
  esp_site **sites;
  int n = esp_model_sites(q->model, &sites);
  for (int i = 0; i < n; i++)
    if (sites[i]->is_head && esp_adapter_changes(q->adapter, sites[i]))
      return esp_fail(ESP_ERR_RECIPE,
                      "continual.strategy: %s makes the teacher's logits with the frozen head, the adapter changes %s",
                      s->kind->name, sites[i]->path);
  return ESP_OK;
}

static esp_status gradient_passes(const esp_sequence *q, const esp_sample *s, int64_t n, double total, double *loss) {
  esp_status st = ESP_OK;
  esp_rows rows = {0};
  int64_t first, mine, size = q->micro_batch;
  esp_sequence_share(q, n, &first, &mine);
  for (int64_t i = 0; i < mine; i += size) {
    esp_loss_out out = {0};
    ESP_GOTO(esp_sequence_rows(q, s + first + i, mine - i < size ? mine - i : size, &rows));
    ESP_GOTO(esp_sequence_pass(q, &rows, NULL, true, 1.0 / total, 0, loss ? &out : NULL));
    if (loss) *loss += out.loss_sum / total;
  }
out:
  esp_rows_deinit(&rows);
  return st;
}

esp_status esp_sequence_gradient_of(const esp_sequence *q, const esp_sample *s, int64_t n, esp_tensor out,
                                    double *loss) {
  const esp_backend_ops *op = q->be->ops;
  esp_params *ps = q->adapter->params;
  int64_t mark = esp_stack_mark(q->stack);
  esp_tensor kept = scratch(q), grad = esp_sequence_gradient(q);
  double total = 0;
  for (int64_t i = 0; i < n; i++) total += esp_sequence_weight(q, s[i]);
  if (loss) *loss = 0;
  op->axpby(q->be, kept, 1.0f, grad, 0.0f);
  esp_params_zero_grad(ps);
  esp_status st = total > 0 ? gradient_passes(q, s, n, total, loss) : ESP_OK;
  st = esp_comm_agree(q->comm, st);
  if (st == ESP_OK) st = esp_sequence_reduce(q, ps->grad, ps->total);
  if (st == ESP_OK && loss) st = q->comm->ops->all_reduce_f64(q->comm, loss, 1);
  op->axpby(q->be, out, 1.0f, grad, 0.0f);
  op->axpby(q->be, grad, 1.0f, kept, 0.0f);
  esp_stack_release(q->stack, mark);
  return st;
}
