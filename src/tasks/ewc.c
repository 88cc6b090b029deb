/* ewc.c: elastic weight consolidation. After each task k the diagonal of the Fisher information of its samples at the
 * optimum theta_k is estimated,
 *   F_k = 1/n sum_i (d log p(y_i | x_i, theta_k) / d theta)^2     one backward per sample, its whole answer
 * with the answers of the data (the empirical Fisher), and later losses get
 *   weight/2 sum_k F_k (theta - theta_k)^2      Kirkpatrick et al. 2017
 * This sum of parabolas is one parabola: F = sum_k F_k around the mean of the theta_k weighted with F_k, and a constant
 * that has no gradient and is not part of the value shown. With `decay` gamma the online form of Schwarz et al. 2018,
 * "Progress & Compress": F <- gamma F + F_k around the latest optimum. Two arrays for any number of tasks. */
#include <string.h>

#include "core/rng.h"
#include "tasks/internal.h"

/* F of the present task: mean of squared gradients. */
static esp_status fisher(const esp_sequence *q, const int64_t *samples, int64_t n, esp_tensor f) {
  const esp_backend_ops *op = q->be->ops;
  esp_params *ps = q->adapter->params;
  esp_tensor g = esp_sequence_gradient(q);
  esp_status st = ESP_OK;
  esp_rows rows = {0};
  int64_t first, mine;
  esp_sequence_share(q, n, &first, &mine);
  op->zero(q->be, f.data, esp_tensor_bytes(&f));
  for (int64_t i = first; i < first + mine; i++) {
    esp_sample s = {q->task, samples[i]};
    ESP_GOTO(esp_sequence_rows(q, &s, 1, &rows));
    esp_params_zero_grad(ps);
    ESP_GOTO(esp_sequence_pass(q, &rows, NULL, true, 1.0, 0, NULL));
    op->mul(q->be, f, g, g, 1.0f);
  }
  op->axpby(q->be, f, 0.0f, f, (float)(1.0 / (double)n));
out:
  esp_rows_deinit(&rows);
  st = esp_comm_agree(q->comm, st);
  return st == ESP_OK ? esp_sequence_reduce(q, f.data, ps->total) : st;
}

/* The parabola of all tasks so far. Host work in fp64, once per task. */
static esp_status join(esp_strategy *s, const esp_sequence *q, esp_tensor fresh) {
  int64_t n = q->adapter->params->total, bytes = n * (int64_t)sizeof(float);
  double decay = s->cfg->ewc.decay;
  bool first = !esp_strategy_get(s, "fisher", NULL);
  esp_tensor f = esp_strategy_flat(s, "fisher", q), anchor = esp_strategy_flat(s, "anchor", q);
  float *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)(4 * bytes));
  if (!f.data || !anchor.data || !host) return ESP_ERR_MEMORY;
  float *old = host, *old_anchor = host + n, *own = host + 2 * n, *theta = host + 3 * n;
  const esp_backend_ops *op = q->be->ops;
  op->download(q->be, old, f.data, bytes);
  op->download(q->be, old_anchor, anchor.data, bytes);
  op->download(q->be, own, fresh.data, bytes);
  op->download(q->be, theta, q->adapter->params->master, bytes);
  for (int64_t i = 0; i < n; i++) {
    double a = first ? 0 : (decay > 0 ? decay : 1) * (double)old[i], b = (double)own[i], sum = a + b;
    if (decay <= 0 && sum > 0)
      old_anchor[i] = (float)((a * (double)old_anchor[i] + b * (double)theta[i]) / sum);
    else
      old_anchor[i] = theta[i];
    old[i] = (float)sum;
  }
  op->upload(q->be, f.data, old, bytes);
  op->upload(q->be, anchor.data, old_anchor, bytes);
  esp_status st = esp_backend_sync(q->be);
  esp_mem_free(host);
  return st;
}

static esp_status hand_over(esp_strategy *s, const esp_sequence *q) {
  int64_t count = esp_dataset_count(q->data[q->task]), n = s->cfg->ewc.samples < count ? s->cfg->ewc.samples : count;
  int64_t *samples = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *samples);
  esp_tensor fresh = esp_strategy_flat(s, "fresh", q);
  esp_status st = samples && fresh.data ? ESP_OK : ESP_ERR_MEMORY;
  if (st == ESP_OK)
    st = esp_sequence_choose(q->seed, esp_rng_stream_name(ESP_RNG_DATA, s->kind->name) + (uint64_t)q->task, count, n,
                             samples);
  if (st == ESP_OK) st = fisher(q, samples, esp_backend_counts(q->be) ? 1 : n, fresh);
  if (st == ESP_OK) st = join(s, q, fresh);
  esp_strategy_drop(s, "fresh");
  esp_mem_free(samples);
  return st;
}

static double penalty(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  if (!esp_strategy_get(s, "fisher", NULL)) return 0;
  return esp_sequence_pull(q, esp_strategy_flat(s, "anchor", q), esp_strategy_flat(s, "fisher", q), s->cfg->ewc.weight);
}

const esp_strategy_kind esp_strategy_ewc = {
    .name = "ewc",
    .summary = "parameters that finished tasks depend on are held: weight/2 sum F (theta - theta_k)^2",
    .flags = ESP_STRATEGY_BY_PARAMETER,
    .hand_over = hand_over,
    .penalty = penalty,
};
