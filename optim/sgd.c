/* sgd.c: stochastic gradient descent with momentum, optionally Nesterov's (Sutskever et al., ICML 2013). */
#include "optim/kinds.h"

static void prepare(const esp_optim *o, const esp_param *p, int64_t step, double lr, esp_update_args *out) {
  const esp_optim_cfg *c = &o->cfg;
  out->rule = ESP_RULE_SGD;
  out->hyper[ESP_SGD_LR] = (float)lr;
  out->hyper[ESP_SGD_WD] = (float)(p->decay ? c->weight_decay : 0);
  out->hyper[ESP_SGD_MU] = (float)c->momentum;
  out->hyper[ESP_SGD_NESTEROV] = c->nesterov ? 1.0f : 0.0f;
}

const esp_optim_kind esp_optim_sgd = {
    .name = "sgd",
    .summary = "SGD with momentum and coupled weight decay, torch.optim.SGD semantics (dampening 0)",
    .n_states = 1,
    .state_names = {"momentum_buffer"},
    .prepare = prepare,
};
