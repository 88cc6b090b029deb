/* adamw.c: AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv 1711.05101). */
#include <math.h>

#include "optim/kinds.h"

static void prepare(const esp_optim *o, const esp_param *p, int64_t step, double lr, esp_update_args *out) {
  const esp_optim_cfg *c = &o->cfg;
  double bc1 = 1 - pow(c->beta1, (double)step), bc2 = 1 - pow(c->beta2, (double)step);
  out->rule = ESP_RULE_ADAMW;
  out->hyper[ESP_ADAMW_KEEP] = (float)(1 - lr * (p->decay ? c->weight_decay : 0));
  out->hyper[ESP_ADAMW_1MB1] = (float)(1 - c->beta1);
  out->hyper[ESP_ADAMW_B2] = (float)c->beta2;
  out->hyper[ESP_ADAMW_1MB2] = (float)(1 - c->beta2);
  out->hyper[ESP_ADAMW_RSQRT_BC2] = (float)(1 / sqrt(bc2));
  out->hyper[ESP_ADAMW_EPS] = (float)c->eps;
  out->hyper[ESP_ADAMW_STEP] = (float)(lr / bc1);
}

const esp_optim_kind esp_optim_adamw = {
    .name = "adamw",
    .summary = "Adam with decoupled weight decay (arXiv 1711.05101), torch.optim.AdamW semantics",
    .n_states = 2,
    .state_names = {"exp_avg", "exp_avg_sq"},
    .prepare = prepare,
};
