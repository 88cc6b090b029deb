/* plasticity.c: what keeps a network able to learn over many tasks.
 *
 * perturb: L2 and noise (Dohare et al. 2024, "Loss of plasticity in deep continual learning"), or shrink and perturb
 * (Ash and Adams 2020, "On Warm-Starting Neural Network Training"). With xi of mean 0 and variance 1 when: step theta
 * <- theta - lr (weight theta + noise xi)    after each step when: task    theta <- (1 - weight) theta + noise xi when
 * a later task begins
 *
 * upgd: utility-based perturbed gradient descent (Elsayed and Mahmood 2024, "Addressing Loss of Plasticity and
 * Catastrophic Forgetting in Continual Learning"). U <- beta U + (1 - beta)(-g theta) is what the loss would rise by,
 * to first order, without a parameter; u = sigmoid(U / max U), the maximum over all parameters (the correction of U's
 * start cancels). Useful parameters move less, the others are perturbed more: theta <- theta + (d - lr noise xi)(1 - u)
 * where d is the optimizer's update: with plain sgd the authors' rule, (g + noise xi)(1 - u).
 *
 * xi is the sum of 8 signs over sqrt 8, draws of the dropout operation: made where the parameters are, the same bits on
 * every backend, a function of (seed, step). Its excess kurtosis is -1/4, where that of a normal number is 0. */
#include <math.h>
#include <string.h>

#include "core/rng.h"
#include "core/threads.h"
#include "tasks/internal.h"

enum { SIGNS = 8, CHUNK = 1 << 18, ROW = 1024, NOISE = 31 }; /* NOISE: stream of ESP_RNG_DATA */

esp_status esp_noise(esp_strategy *s, const esp_sequence *q, int64_t step, esp_tensor out) {
  const esp_backend_ops *op = q->be->ops;
  int64_t n = esp_tensor_cols(&out), size;
  float *ones = esp_strategy_get(s, "ones", &size);
  if (!ones) {
    float *host = esp_mem_alloc(ESP_MEM_HOST, CHUNK * sizeof *host);
    ones = esp_strategy_array(s, "ones", ESP_F32, CHUNK, false);
    for (int64_t i = 0; host && i < CHUNK; i++) host[i] = 1.0f;
    if (host && ones) op->upload(q->be, ones, host, CHUNK * (int64_t)sizeof *host);
    esp_mem_free(host);
    if (!host || !ones) return ESP_ERR_MEMORY;
  }
  int64_t mark = esp_stack_mark(q->stack);
  uint64_t *draw = esp_stack_push(q->stack, sizeof *draw), number = (uint64_t)step;
  op->upload(q->be, draw, &number, sizeof number);
  for (int64_t at = 0, some; at < n; at += some) { /* in rows: an operation is shared by rows */
    some = n - at < CHUNK ? n - at : CHUNK;
    int64_t cols = some < ROW ? some : ROW;
    some -= some % cols;
    esp_tensor y = esp_tensor_2d((float *)out.data + at, ESP_F32, some / cols, cols);
    esp_tensor one = esp_tensor_2d(ones, ESP_F32, some / cols, cols);
    op->axpby(q->be, y, -(float)SIGNS, one, 0.0f);
    for (uint64_t k = 0; k < SIGNS; k++) /* what is kept is doubled: each adds 0 or 2 */
      op->dropout(q->be, y, one, 0.5f, q->seed, draw, esp_rng_stream(ESP_RNG_DATA, NOISE, (uint64_t)at, k), 1.0f);
    op->axpby(q->be, y, (float)(1 / sqrt(SIGNS)), y, 0.0f);
  }
  esp_stack_release(q->stack, mark);
  return ESP_OK;
}

/* ---- perturb ---- */

/* theta <- keep theta + noise xi for everything that is trained. */
static esp_status perturb(esp_strategy *s, const esp_sequence *q, int64_t step, double keep, double noise) {
  esp_params *ps = q->adapter->params;
  int64_t mark = esp_stack_mark(q->stack);
  esp_tensor xi = esp_stack_tensor(q->stack, ESP_F32, 1, ps->total);
  esp_status st = esp_noise(s, q, step, xi);
  for (int i = 0; st == ESP_OK && i < ps->count; i++) {
    const esp_param *p = &ps->list[i];
    if (p->frozen) continue;
    q->be->ops->axpby(q->be, esp_flat(ps->master + p->offset, p->numel), (float)noise,
                      esp_flat((float *)xi.data + p->offset, p->numel), (float)keep);
  }
  esp_params_refresh_shadow(ps);
  esp_stack_release(q->stack, mark);
  return st;
}

static bool at_tasks(const esp_strategy *s) {
  return !strcmp(s->cfg->perturb.when, "task");
}

static esp_status perturb_task_begin(esp_strategy *s, const esp_sequence *q) {
  if (!at_tasks(s) || q->task == 0) return ESP_OK;
  /* steps are counted from 0 up: tasks from the other end */
  return perturb(s, q, -1 - q->task, 1 - s->cfg->perturb.weight, s->cfg->perturb.noise);
}

static esp_status perturb_after_step(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  if (at_tasks(s)) return ESP_OK;
  return perturb(s, q, t->step, 1 - t->lr * s->cfg->perturb.weight, -t->lr * s->cfg->perturb.noise);
}

static esp_status perturb_check(const esp_strategy_cfg *c, int n_tasks) {
  if (!strcmp(c->perturb.when, "task") && c->perturb.weight > 1)
    return esp_fail(ESP_ERR_RECIPE, "continual.perturb.weight: %g takes away more than there is (when: task)",
                    c->perturb.weight);
  return ESP_OK;
}

const esp_strategy_kind esp_strategy_perturb = {
    .name = "perturb",
    .summary = "parameters shrink and are perturbed, each step or when a task begins (Dohare 2024; Ash and Adams 2020)",
    .check = perturb_check,
    .task_begin = perturb_task_begin,
    .after_step = perturb_after_step,
};

/* ---- upgd ---- */

/* The utility, and what the parameters were before the step. */
static esp_status upgd_project(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  const esp_backend_ops *op = q->be->ops;
  int64_t mark = esp_stack_mark(q->stack);
  esp_tensor utility = esp_strategy_flat(s, "utility", q), before = esp_strategy_flat(s, "before", q);
  if (!utility.data || !before.data) return ESP_ERR_MEMORY;
  esp_tensor masters = esp_sequence_masters(q), gw = esp_stack_tensor(q->stack, ESP_F32, 1, esp_tensor_cols(&utility));
  double beta = s->cfg->upgd.beta;
  op->mul(q->be, gw, esp_sequence_gradient(q), masters, 0.0f);
  op->axpby(q->be, utility, (float)(beta - 1), gw, (float)beta);
  op->axpby(q->be, before, 1.0f, masters, 0.0f);
  esp_stack_release(q->stack, mark);
  return ESP_OK;
}

typedef struct gates { /* utilities become 1 - u */
  float *x;
  int64_t n;
  float scale;
} gates;

static void gate(void *ctx, int64_t i, int thread) {
  const gates *g = ctx;
  int64_t end = (i + 1) * CHUNK < g->n ? (i + 1) * CHUNK : g->n;
  for (int64_t k = i * CHUNK; k < end; k++) g->x[k] = 1.0f / (1.0f + expf(g->scale * g->x[k]));
}

/* 1 - u of everything that is trained, 0 elsewhere. There is no operation for a maximum: by way of the host. */
static esp_status gate_of(const esp_sequence *q, esp_tensor utility, esp_tensor out) {
  const esp_params *ps = q->adapter->params;
  int64_t n = ps->total, at = 0;
  float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *x), most = 0, size = 0;
  if (!x) return ESP_ERR_MEMORY;
  q->be->ops->download(q->be, x, utility.data, n * (int64_t)sizeof *x);
  for (int64_t i = 0; i < n; i++) {
    most = x[i] > most ? x[i] : most;
    size = fabsf(x[i]) > size ? fabsf(x[i]) : size;
  }
  if (!(most > 0)) most = size; /* nothing is useful: the scale of what harms */
  gates g = {x, n, most > 0 ? 1 / most : 0};
  if (!esp_backend_counts(q->be)) esp_parallel((n + CHUNK - 1) / CHUNK, gate, &g);
  for (int i = 0; i <= ps->count; i++) { /* gaps between parameters, and those that are frozen */
    int64_t to = i < ps->count ? ps->list[i].offset : n;
    if (to > at) memset(x + at, 0, (size_t)(to - at) * sizeof *x);
    if (i == ps->count) break;
    at = to + (ps->list[i].frozen ? 0 : ps->list[i].numel);
  }
  q->be->ops->upload(q->be, out.data, x, n * (int64_t)sizeof *x);
  esp_mem_free(x);
  return ESP_OK;
}

static esp_status upgd_after_step(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  const esp_backend_ops *op = q->be->ops;
  int64_t mark = esp_stack_mark(q->stack), n = q->adapter->params->total;
  esp_tensor now = esp_sequence_masters(q), before = esp_strategy_flat(s, "before", q);
  esp_tensor d = esp_stack_tensor(q->stack, ESP_F32, 1, n), keep = esp_stack_tensor(q->stack, ESP_F32, 1, n);
  esp_status st = ESP_OK;
  ESP_GOTO(esp_noise(s, q, t->step, d));
  op->axpby(q->be, d, 1.0f, now, (float)(-t->lr * s->cfg->upgd.noise));
  op->axpby(q->be, d, -1.0f, before, 1.0f);
  ESP_GOTO(gate_of(q, esp_strategy_flat(s, "utility", q), keep));
  op->mul(q->be, d, d, keep, 0.0f);
  op->axpby(q->be, now, 1.0f, before, 0.0f);
  op->axpby(q->be, now, 1.0f, d, 1.0f);
  esp_params_refresh_shadow(q->adapter->params);
out:
  esp_stack_release(q->stack, mark);
  return st;
}

const esp_strategy_kind esp_strategy_upgd = {
    .name = "upgd",
    .summary = "useful parameters move less, the others are perturbed more (Elsayed and Mahmood 2024)",
    .flags = ESP_STRATEGY_BY_PARAMETER,
    .project = upgd_project,
    .after_step = upgd_after_step,
};
