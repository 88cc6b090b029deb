/* l2.c: parameters are held near their values at the end of the task before: weight/2 * |theta - theta_previous|^2, the
 * baseline beside EWC in Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks" (2017). */
#include "tasks/internal.h"

static esp_status task_begin(esp_strategy *s, const esp_sequence *q) {
  if (q->task == 0) return ESP_OK;
  esp_tensor anchor = esp_strategy_flat(s, "anchor", q);
  if (!anchor.data) return ESP_ERR_MEMORY;
  q->be->ops->axpby(q->be, anchor, 1.0f, esp_sequence_masters(q), 0.0f);
  return ESP_OK;
}

static double penalty(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  if (q->task == 0) return 0;
  esp_tensor none = {0};
  return esp_sequence_pull(q, esp_strategy_flat(s, "anchor", q), none, s->cfg->l2.weight);
}

const esp_strategy_kind esp_strategy_l2 = {
    .name = "l2",
    .summary = "parameters are held near those of the task before: weight/2 |theta - theta_previous|^2",
    .flags = ESP_STRATEGY_BY_PARAMETER,
    .task_begin = task_begin,
    .penalty = penalty,
};
