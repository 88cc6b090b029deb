/* optim_rules.h: the per-element mathematics of every optimizer rule, compiled for each backend (C and CUDA).
 *
 * A rule is a pure function of (parameter, gradient, states, hyper). What depends on the step alone (bias corrections,
 * scheduled rates) is computed once per launch in double by the kind's `prepare` and arrives in `hyper` as float.
 */
#ifndef ESP_BACKEND_OPTIM_RULES_H
#define ESP_BACKEND_OPTIM_RULES_H

#ifdef __CUDACC__
#define ESP_RULE_FN static __host__ __device__ __forceinline__
#else
#include <math.h>
#define ESP_RULE_FN static inline __attribute__((always_inline))
#endif

typedef enum esp_optim_rule {
  ESP_RULE_ADAMW,
  ESP_RULE_SGD,
  ESP_RULE_SENSITIVITY, /* running statistics and proximal steps of adapter kinds: elementwise in the same way */
  ESP_RULE_SHRINK,
  ESP_RULES
} esp_optim_rule;

/* AdamW (Loshchilov and Hutter, arXiv 1711.05101), as torch.optim.AdamW orders it:
 *   p <- p (1 - lr wd);  m <- m + (g - m)(1 - b1);  v <- b2 v + (1 - b2) g^2
 *   p <- p - lr/(1 - b1^t) * m / (sqrt(v)/sqrt(1 - b2^t) + eps) */
enum {
  ESP_ADAMW_KEEP,
  ESP_ADAMW_1MB1,
  ESP_ADAMW_B2,
  ESP_ADAMW_1MB2,
  ESP_ADAMW_RSQRT_BC2,
  ESP_ADAMW_EPS,
  ESP_ADAMW_STEP
};
ESP_RULE_FN float esp_rule_adamw(float p, float g, float *m, float *v, const float *h) {
  float mm = *m + (g - *m) * h[ESP_ADAMW_1MB1];
  float vv = *v * h[ESP_ADAMW_B2] + h[ESP_ADAMW_1MB2] * g * g;
  *m = mm;
  *v = vv;
  return p * h[ESP_ADAMW_KEEP] - h[ESP_ADAMW_STEP] * (mm / (sqrtf(vv) * h[ESP_ADAMW_RSQRT_BC2] + h[ESP_ADAMW_EPS]));
}

/* SGD with momentum and coupled weight decay, as torch.optim.SGD (dampening 0):
 *   g <- g + wd p;  b <- mu b + g;  p <- p - lr (nesterov ? g + mu b : b) */
enum { ESP_SGD_LR, ESP_SGD_WD, ESP_SGD_MU, ESP_SGD_NESTEROV };
ESP_RULE_FN float esp_rule_sgd(float p, float g, float *b, const float *h) {
  float gg = g + h[ESP_SGD_WD] * p;
  float bb = h[ESP_SGD_MU] * *b + gg;
  *b = bb;
  float d = h[ESP_SGD_NESTEROV] != 0.0f ? gg + h[ESP_SGD_MU] * bb : bb;
  return p - h[ESP_SGD_LR] * d;
}

/* Sensitivity of a parameter and its uncertainty (AdaLoRA, Zhang et al. 2023, arXiv:2303.10512, eq. 9 and 10); the
 * parameter stays:  i = |p g|;  I <- b1 I + (1 - b1) i;  U <- b2 U + (1 - b2) |i - I|, with the new I */
enum { ESP_SENS_B1, ESP_SENS_1MB1, ESP_SENS_B2, ESP_SENS_1MB2 };
ESP_RULE_FN float esp_rule_sensitivity(float p, float g, float *mean, float *unc, const float *h) {
  float i = fabsf(p * g), m = h[ESP_SENS_B1] * *mean + h[ESP_SENS_1MB1] * i;
  *mean = m;
  *unc = h[ESP_SENS_B2] * *unc + h[ESP_SENS_1MB2] * fabsf(i - m);
  return p;
}

/* Soft threshold, the proximal step of k |p|:  p <- sign(p) max(|p| - k, 0) */
enum { ESP_SHRINK_K };
ESP_RULE_FN float esp_rule_shrink(float p, const float *h) {
  float rest = fabsf(p) - h[ESP_SHRINK_K];
  return rest > 0.0f ? copysignf(rest, p) : 0.0f;
}

#endif
