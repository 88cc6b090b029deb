/* optim.h: the optimizer kind. A kind declares its state tensors (fp32, one element per parameter element, or other
 * sizes through state_numel) and its update; checkpoints, counting, clipping and resets are generic over the
 * declaration. Per-element mathematics is in backend/optim_rules.h. */
#ifndef ESP_OPTIM_H
#define ESP_OPTIM_H

#include "backend/param.h"
#include "core/regex.h"

typedef struct esp_optim_cfg {
  const char *name; /* registry name: adamw, sgd */
  double lr, beta1, beta2, eps, weight_decay, momentum;
  bool nesterov;
  double max_grad_norm;   /* 0: no clipping */
  double lora_plus_ratio; /* lr(group 1) = ratio * lr; 0: off. Group 1 holds the B matrices. */
  /* lr of the parameters in whose names the key is found, times the value; the first key counts. A slow learner beside
   * a fast head (SLCA, arXiv 2303.05118), or one rate per kind of module. */
  const esp_pattern *lr_factors;
  int n_lr_factors;
} esp_optim_cfg;

typedef struct esp_optim esp_optim;

typedef struct esp_optim_kind {
  const char *name;
  const char *summary; /* one line: what it is, paper */
  int n_states;
  const char *state_names[4]; /* as in checkpoints, e.g. "exp_avg" */
  /* Fills rule and hyper[] for parameter p at 1-based step; lr already scheduled and scaled for the group. */
  void (*prepare)(const esp_optim *o, const esp_param *p, int64_t step, double lr, esp_update_args *out);
} esp_optim_kind;

struct esp_optim {
  const esp_optim_kind *kind;
  esp_optim_cfg cfg;
  esp_params *params;
  double *factor;  /* [params->count] on lr */
  float *state[4]; /* flat, params->total elements each, backend memory (ESP_MEM_OPTIM) */
  int64_t step;    /* updates done */
};

const esp_optim_kind *esp_optim_find(const char *name);
const char *const *esp_optim_names(int *n);
/* A key of lr_factors that no parameter has: ESP_ERR_RECIPE. */
esp_status esp_optim_create(const esp_optim_cfg *cfg, esp_params *ps, esp_optim **out);
/* Other settings for the same kind; its state stays. */
esp_status esp_optim_configure(esp_optim *o, const esp_optim_cfg *cfg);
void esp_optim_destroy(esp_optim *o);
/* One update with the given learning rate and gradient scale (clip factor); refreshes shadows. */
void esp_optim_step(esp_optim *o, double lr, float grad_scale);
void esp_optim_reset(esp_optim *o); /* zero state and step: a new task */
/* sqrt(sum of squares) of the flat gradient, fp64, fixed order. */
double esp_optim_grad_norm(esp_optim *o);

typedef enum esp_schedule_name {
  ESP_SCHED_CONSTANT,
  ESP_SCHED_LINEAR,
  ESP_SCHED_COSINE,
  ESP_SCHED_WSD,
  ESP_SCHED_INFINITE
} esp_schedule_name;
typedef struct esp_schedule {
  esp_schedule_name name;
  double warmup_steps; /* >= 1: steps; in (0,1): share of the total */
  double min_lr_ratio; /* floor, as a share of lr */
  double decay_share;  /* WSD: share of the steps in the final decay (default 0.2) */
  /* infinite; the steps like warmup_steps */
  double cooldown_steps, anneal_steps, constant_ratio;
} esp_schedule;
/* Factor on lr for 0-based `step` of `total`: a pure function. */
double esp_schedule_factor(const esp_schedule *s, int64_t step, int64_t total);
/* The same where one schedule runs on over several tasks; infinite then decays at the end of each of them. */
double esp_schedule_run_factor(const esp_schedule *s, int64_t step, int64_t total, int64_t task_step,
                               int64_t task_steps);
/* The last of `total` steps, in which wsd and infinite decay; 0 for the others. */
int64_t esp_schedule_decay_steps(const esp_schedule *s, int64_t total);
int esp_schedule_parse(const char *name); /* -1 */

#endif
