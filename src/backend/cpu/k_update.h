/* k_update.h: one optimizer update over elements [e0, e1), shadow refreshed in the same pass (kernel bodies). The
 * rules are plain C (backend/optim_rules.h) and vectorised by the compiler over blocks that stay in L1. */
#include "backend/optim_rules.h"

static void k_update(const esp_update_args *a, int64_t e0, int64_t e1) {
  enum { BLOCK = 1024 };
  const float *h = a->hyper;
  for (int64_t b = e0; b < e1; b += BLOCK) {
    int64_t n = e1 - b < BLOCK ? e1 - b : BLOCK;
    float *restrict p = a->master + b;
    const float *restrict g = a->grad + b;
    const float gs = a->grad_scale;
    if (a->rule == ESP_RULE_ADAMW) {
      float *restrict m = a->state[0] + b, *restrict v = a->state[1] + b;
      for (int64_t i = 0; i < n; i++) p[i] = esp_rule_adamw(p[i], gs * g[i], &m[i], &v[i], h);
    } else if (a->rule == ESP_RULE_SGD) {
      float *restrict m = a->state[0] + b;
      for (int64_t i = 0; i < n; i++) p[i] = esp_rule_sgd(p[i], gs * g[i], &m[i], h);
    } else if (a->rule == ESP_RULE_SENSITIVITY) {
      float *restrict m = a->state[0] + b, *restrict v = a->state[1] + b;
      for (int64_t i = 0; i < n; i++) p[i] = esp_rule_sensitivity(p[i], gs * g[i], &m[i], &v[i], h);
    } else if (a->rule == ESP_RULE_SHRINK) {
      for (int64_t i = 0; i < n; i++) p[i] = esp_rule_shrink(p[i], h);
    }
    if (a->shadow) {
      if (a->shadow_dtype == ESP_BF16)
        axpby_row((uint16_t *)a->shadow + b, true, 1.0f, p, false, 0.0f, n);
      else
        memcpy((float *)a->shadow + b, p, (size_t)n * 4);
    }
  }
}
