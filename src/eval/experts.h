/* experts.h: two sets of values of one model that answer together, by the element-wise maximum of their probabilities:
 * the ensemble of LAE (Gao et al., "A Unified Continual Learning Framework with General Parameter-Efficient Tuning",
 * 2023; its code: the softmax of each, `max` over the two, argmax). */
#ifndef ESP_EVAL_EXPERTS_H
#define ESP_EVAL_EXPERTS_H

#include <stdint.h>

#include "core/error.h"

typedef struct esp_experts {
  int n;                               /* 2; less: there is one, and nothing is asked of `use` */
  esp_status (*use)(void *ctx, int i); /* puts the values of expert i in force; 0 is before and after */
  void *ctx;
} esp_experts;

/* log sum_v exp(z_v) of z [n]. */
double esp_log_sum(const float *z, int64_t n);
/* x [n] becomes log softmax(x). */
void esp_log_softmax(double *x, int64_t n);
/* x [n] becomes log max(softmax(x), softmax(y)): of more than 1 in all, so that who samples normalises. */
void esp_join_logits(float *x, const float *y, int64_t n);
/* -log q(target) of q(v) = max(p_x(v), p_y(v)) / sum_u max(p_x(u), p_y(u)). */
double esp_joined_loss(const float *x, const float *y, int64_t n, int64_t target);

#endif
