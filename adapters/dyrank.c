/* dyrank.c: dynamic rank-selective LoRA for a sequence of tasks (Lu et al. 2024, "Adaptive Rank, Reduced Forgetting",
 * arXiv:2412.01004): y += c P diag(e) Q drop(x), e_i the importance of rank i, learned with the rest and driven to zero
 * by a soft threshold: the proximal step of lambda(t) |e| at the step's learning rate, after each update,
 *   e <- sign(e) max(|e| - lr lambda(t), 0),   lambda(t) = threshold * min(1, (t - tinit) / (T - tfinal - tinit))
 * above tinit. Adam moves a value by at most about lr in a step, so with a threshold below 1 an importance that the
 * data push steadily outlives it and one that only wanders does not. Ranks that a task does not need end at zero
 * exactly and are taken out at its end, before the adapter is saved or merged; with continual.policy merge_then_new the
 * next task starts afresh on the merged base, so that each task changes the model by no more ranks than it needs. (The
 * course of the threshold is the form chosen here; the catalogue says that it is scheduled.) Start: q as LoRA's A, p =
 * 0, e = 0.05: the identity, with a gradient for p, and near enough to zero to be won or lost in a task. */
#include <math.h>
#include <string.h>

#include "adapters/triplets.h"
#include "backend/optim_rules.h"
#include "core/rng.h"
#include "io/json.h"

static const float START = 0.05f;

static esp_status check(const esp_adapter_cfg *c) {
  if (!(c->threshold >= 0)) return esp_fail(ESP_ERR_RECIPE, "adapter.threshold: must not be negative");
  if (c->n_rank_pattern) return esp_fail(ESP_ERR_RECIPE, "adapter.rank_pattern: is not for adapter.type dyrank");
  return esp_triplets_check(c);
}

static esp_status init(esp_adapter *a, esp_site *s) {
  esp_triplet_site *t = a->site_state[s->index];
  const esp_param *p = &a->params->list[t->l.a];
  uint64_t stream = esp_rng_stream_name(ESP_RNG_INIT, p->name);
  float bound = 1.0f / sqrtf((float)s->in);
  float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)(p->numel + t->l.r + 1) * sizeof *x), *e = x + p->numel;
  if (!x) return ESP_ERR_MEMORY;
  for (int64_t k = 0; k < p->numel; k++)
    x[k] = bound * (2.0f * esp_rng_uniform(a->cfg.seed, stream, (uint64_t)k) - 1.0f);
  for (int64_t k = 0; k < t->l.r; k++) e[k] = START;
  esp_params_set(a->params, t->l.a, x);
  esp_params_set(a->params, t->e, e);
  esp_mem_free(x);
  t->serial = t->l.r;
  return ESP_OK;
}

static double before_step(esp_adapter *a, int64_t step, int64_t total) {
  esp_triplets_no_decay(a); /* the threshold alone pulls on them */
  return 0;
}

/* Which ranks are not zero, and how many. */
static esp_status alive(esp_adapter *a, uint8_t *keep, int64_t *n) {
  const esp_triplets *all = a->impl;
  float *e = esp_mem_alloc(ESP_MEM_HOST, (size_t)(all->ranks + 1) * sizeof *e);
  if (!e) return ESP_ERR_MEMORY;
  esp_status st = esp_triplets_get_e(a, e);
  *n = 0;
  for (int64_t k = 0; k < all->ranks; k++) *n += keep[k] = e[k] != 0.0f;
  esp_mem_free(e);
  return st;
}

static esp_status after_step(esp_adapter *a, int64_t step, int64_t total) {
  esp_triplets *all = a->impl;
  const esp_params *ps = a->params;
  esp_backend *be = ps->be;
  esp_status st = ESP_OK;
  int64_t begin, end;
  ESP_TRY(esp_triplets_span(a, total, &begin, &end));
  double share = step <= begin ? 0 : fmin(1, (double)(step - begin) / (double)(end - begin));
  for (int i = 0; share > 0 && i < all->n_sites; i++) {
    const esp_triplet_site *t = a->site_state[all->sites[i]->index];
    const esp_param *p = &ps->list[t->e];
    if (p->numel == 0) continue;
    esp_update_args u = {.rule = ESP_RULE_SHRINK,
                         .n = p->numel,
                         .master = ps->master + p->offset,
                         .grad = ps->grad + p->offset,
                         .state = {ps->grad + p->offset}, /* not used, and there must be one */
                         .grad_scale = 1.0f};
    u.hyper[ESP_SHRINK_K] = (float)(a->lr * a->cfg.threshold * share);
    be->ops->update(be, &u);
    if (ps->shadow != (void *)ps->master)
      be->ops->axpby(be, esp_param_shadow(ps, t->e), 1.0f, esp_param_master(ps, t->e), 0.0f);
  }
  a->budget = a->cfg.r * all->n_sites;
  if (step == 1) a->ranks = all->ranks;
  if (step % a->cfg.interval == 0 || step == total) {
    uint8_t *keep = esp_mem_alloc(ESP_MEM_HOST, (size_t)all->ranks + 1);
    st = keep ? alive(a, keep, &a->ranks) : ESP_ERR_MEMORY;
    esp_mem_free(keep);
  }
  return st;
}

static esp_status task_end(esp_adapter *a, int task) {
  esp_triplets *all = a->impl;
  int64_t n;
  uint8_t *keep = esp_mem_alloc(ESP_MEM_HOST, (size_t)all->ranks + 1);
  esp_status st = keep ? alive(a, keep, &n) : ESP_ERR_MEMORY;
  if (st == ESP_OK && n < all->ranks) st = esp_triplets_move(a, keep, NULL, 0);
  esp_mem_free(keep);
  return st;
}

static void config_write(const esp_adapter *a, json_t *j) {
  esp_triplets_config_write(a, j);
  json_object_set_new(j, "threshold", json_real(a->cfg.threshold));
  json_object_set_new(j, "rank_pattern", esp_triplets_pattern_write(a));
}

static esp_status config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  ESP_TRY(esp_triplets_config_read(j, path, c));
  ESP_TRY(esp_json_f64(j, "threshold", path, 0, &c->threshold));
  return esp_triplets_pattern_read(j, path, arena, c);
}

const esp_adapter_kind esp_kind_dyrank = {
    .name = "dyrank",
    .peft_type = "DYRANK",
    .summary =
        "y = W x + c P diag(e) Q x, ranks a task does not need shrink to zero (Lu et al. 2024, arXiv:2412.01004)",
    ESP_TRIPLETS,
    ESP_TRIPLETS_STATE,
    .open = esp_triplets_open,
    .init = init,
    .before_step = before_step,
    .after_step = after_step,
    .task_end = task_end,
    .config_write = config_write,
    .config_read = config_read,
    .config_check = check,
};
