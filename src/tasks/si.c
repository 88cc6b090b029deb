/* si.c: synaptic intelligence (Zenke, Poole, Ganguli 2017, "Continual Learning Through Synaptic Intelligence"). While a
 * task is trained each parameter's share in the fall of its loss is summed along the path,
 *   omega += -g * (theta_after - theta_before)      g: the gradient without penalties
 * and when it ends
 *   Omega += max(omega, 0) / ((theta_end - theta_begin)^2 + xi)
 * Later losses get weight * sum Omega (theta - theta_end)^2. */
#include "tasks/internal.h"

static esp_status task_begin(esp_strategy *s, const esp_sequence *q) {
  const esp_backend_ops *op = q->be->ops;
  esp_tensor begin = esp_strategy_flat(s, "anchor", q), omega = esp_strategy_flat(s, "path", q);
  if (!begin.data || !omega.data) return ESP_ERR_MEMORY;
  op->axpby(q->be, begin, 1.0f, esp_sequence_masters(q), 0.0f); /* the end of the task before */
  op->zero(q->be, omega.data, esp_tensor_bytes(&omega));
  return ESP_OK;
}

static double penalty(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  const esp_backend_ops *op = q->be->ops;
  esp_tensor g = esp_strategy_flat(s, "gradient", q), before = esp_strategy_flat(s, "before", q);
  if (!g.data || !before.data) return 0; /* the error is the backend's, or the next hook's */
  op->axpby(q->be, g, 1.0f, esp_sequence_gradient(q), 0.0f);
  op->axpby(q->be, before, 1.0f, esp_sequence_masters(q), 0.0f);
  if (!esp_strategy_get(s, "importance", NULL)) return 0;
  return esp_sequence_pull(q, esp_strategy_flat(s, "anchor", q), esp_strategy_flat(s, "importance", q),
                           2 * s->cfg->si.weight);
}

static esp_status after_step(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  const esp_backend_ops *op = q->be->ops;
  esp_tensor g = esp_strategy_flat(s, "gradient", q), d = esp_strategy_flat(s, "before", q);
  if (!g.data || !d.data) return ESP_ERR_MEMORY;
  op->axpby(q->be, d, -1.0f, esp_sequence_masters(q), 1.0f);
  op->mul(q->be, esp_strategy_flat(s, "path", q), g, d, 1.0f);
  return ESP_OK;
}

static esp_status hand_over(esp_strategy *s, const esp_sequence *q) {
  int64_t n = q->adapter->params->total, bytes = n * (int64_t)sizeof(float);
  esp_tensor importance = esp_strategy_flat(s, "importance", q);
  float *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)(4 * bytes));
  if (!importance.data || !host) return ESP_ERR_MEMORY;
  const esp_backend_ops *op = q->be->ops;
  op->download(q->be, host, importance.data, bytes);
  op->download(q->be, host + n, esp_strategy_flat(s, "path", q).data, bytes);
  op->download(q->be, host + 2 * n, esp_strategy_flat(s, "anchor", q).data, bytes);
  op->download(q->be, host + 3 * n, q->adapter->params->master, bytes);
  for (int64_t i = 0; i < n; i++) {
    double d = (double)host[3 * n + i] - (double)host[2 * n + i], omega = (double)host[n + i];
    if (omega > 0) host[i] = (float)((double)host[i] + omega / (d * d + s->cfg->si.damping));
  }
  op->upload(q->be, importance.data, host, bytes);
  esp_status st = esp_backend_sync(q->be);
  esp_mem_free(host);
  return st;
}

const esp_strategy_kind esp_strategy_si = {
    .name = "si",
    .summary = "parameters that the losses of finished tasks fell by are held: weight sum Omega (theta - theta_end)^2",
    .flags = ESP_STRATEGY_BY_PARAMETER,
    .task_begin = task_begin,
    .penalty = penalty,
    .after_step = after_step,
    .hand_over = hand_over,
};
