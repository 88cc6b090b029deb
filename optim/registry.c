/* registry.c: the optimizer kinds and everything generic over them: state, runs of parameters, clipping norm, reset.
 * A new kind is one file and one line in `kinds`. */
#include <math.h>
#include <string.h>

#include "optim/kinds.h"

static const esp_optim_kind *const kinds[] = {&esp_optim_adamw, &esp_optim_sgd};
#define N_KINDS ((int)(sizeof kinds / sizeof *kinds))

const esp_optim_kind *esp_optim_find(const char *name) {
  for (int i = 0; i < N_KINDS; i++)
    if (!strcmp(kinds[i]->name, name)) return kinds[i];
  return NULL;
}

const char *const *esp_optim_names(int *n) {
  static const char *names[N_KINDS + 1];
  for (int i = 0; i < N_KINDS; i++) names[i] = kinds[i]->name;
  *n = N_KINDS;
  return names;
}

esp_status esp_optim_configure(esp_optim *o, const esp_optim_cfg *c) {
  const esp_params *ps = o->params;
  o->cfg = *c;
  o->cfg.name = o->kind->name;
  for (int i = 0; i < ps->count; i++)
    o->factor[i] = ps->list[i].group == 1 && c->lora_plus_ratio > 0 ? c->lora_plus_ratio : 1;
  for (int k = 0; k < c->n_lr_factors; k++) {
    bool found = false;
    for (int i = 0; i < ps->count; i++) found = found || esp_regex_search(c->lr_factors[k].key, ps->list[i].name);
    if (!found)
      return esp_fail(ESP_ERR_RECIPE, "optim.lr_factors: '%s' is in the name of no trained parameter (one is %s)",
                      c->lr_factors[k].key, ps->count ? ps->list[0].name : "none");
  }
  for (int i = 0; i < ps->count; i++)
    for (int k = 0; k < c->n_lr_factors; k++) {
      if (!esp_regex_search(c->lr_factors[k].key, ps->list[i].name)) continue;
      o->factor[i] *= c->lr_factors[k].value;
      break;
    }
  return ESP_OK;
}

esp_status esp_optim_create(const esp_optim_cfg *cfg, esp_params *ps, esp_optim **out) {
  *out = NULL;
  const esp_optim_kind *kind = esp_optim_find(cfg->name);
  if (!kind) return esp_fail(ESP_ERR_RECIPE, "unknown optimizer '%s'", cfg->name);
  esp_optim *o = esp_mem_alloc(ESP_MEM_HOST, sizeof *o);
  if (!o) return ESP_ERR_MEMORY;
  o->kind = kind;
  o->params = ps;
  o->factor = esp_mem_alloc(ESP_MEM_HOST, sizeof *o->factor * (size_t)(ps->count + 1));
  esp_status st = o->factor ? esp_optim_configure(o, cfg) : ESP_ERR_MEMORY;
  for (int i = 0; i < kind->n_states && st == ESP_OK; i++) st = esp_params_follow(ps, &o->state[i], ESP_MEM_OPTIM);
  if (st != ESP_OK) {
    esp_optim_destroy(o);
    return st;
  }
  *out = o;
  return ESP_OK;
}

void esp_optim_destroy(esp_optim *o) {
  if (!o) return;
  for (int i = 0; i < o->kind->n_states; i++)
    if (o->state[i]) esp_params_leave(o->params, &o->state[i]);
  esp_mem_free(o->factor);
  esp_mem_free(o);
}

/* Neighbours with the same rate, decay and freezing are one launch; the padding between them is all zeros and stays so
 * under every rule (zero gradient, zero state). */
void esp_optim_step(esp_optim *o, double lr, float grad_scale) {
  esp_params *ps = o->params;
  esp_backend *be = ps->be;
  o->step++;
  ps->steps++;
  for (int i = 0; i < ps->count;) {
    const esp_param *p = &ps->list[i];
    int j = i + 1;
    while (j < ps->count && ps->list[j].decay == p->decay && ps->list[j].frozen == p->frozen &&
           o->factor[j] == o->factor[i])
      j++;
    if (!p->frozen) {
      int64_t end = ps->list[j - 1].offset + ps->list[j - 1].numel;
      esp_update_args a = {.n = end - p->offset,
                           .master = ps->master + p->offset,
                           .grad = ps->grad + p->offset,
                           .grad_scale = grad_scale,
                           .shadow_dtype = ps->shadow_dtype};
      if (ps->shadow != (void *)ps->master)
        a.shadow = (char *)ps->shadow + (size_t)p->offset * esp_dtype_size(ps->shadow_dtype);
      for (int k = 0; k < o->kind->n_states; k++) a.state[k] = o->state[k] + p->offset;
      o->kind->prepare(o, p, o->step, lr * o->factor[i], &a);
      be->ops->update(be, &a);
    }
    i = j;
  }
}

void esp_optim_reset(esp_optim *o) {
  esp_backend *be = o->params->be;
  for (int i = 0; i < o->kind->n_states; i++) be->ops->zero(be, o->state[i], o->params->total * 4);
  o->step = 0;
}

double esp_optim_grad_norm(esp_optim *o) {
  esp_params *ps = o->params;
  double sum = 0;
  int64_t from, to;
  esp_params_span(ps, &from, &to);
  ps->be->ops->dot(ps->be, &sum, ps->grad + from, ps->grad + from, to - from);
  return sqrt(sum);
}
