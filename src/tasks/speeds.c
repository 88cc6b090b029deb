/* speeds.c: two speeds. The trained values (fast) are followed by an average of them (slow), which is what is measured
 * and saved. With theta fast and phi slow, after each optimizer step:
 *
 * lae: Gao et al., "A Unified Continual Learning Framework with General Parameter-Efficient Tuning" (2023): phi = theta
 *   at the end of the first task, then phi <- a phi + (1-a) theta. The slow expert is deployed, or both answer together
 *   by the element-wise maximum of their probabilities (eval/experts.h).
 * ilora: Ren et al., "Analyzing and Reducing Catastrophic Forgetting in Parameter Efficient Tuning" (2024):
 *   phi <- a_t phi + (1 - a_t) theta with a_t = min(a, 1 - 1/(t+1)); rows of earlier tasks are replayed, and on them
 * the final hidden states are held where they fell below those of phi (elements h < h_slow: gamma (h - h_slow)^2).
 * coin_ema: Qiao et al., "Large Continual Instruction Assistant" (2025): phi <- (1-alpha) phi + alpha theta, for each
 *   tensor alpha = 2 (1 + b) / (a c) with a = |theta - phi|_1, b = |g|_1, c = |g - g_before|_1 where that lies in (0,
 * 1), else 0.01; phi takes the place of theta at the end of a task. mos: Sun et al., "MOS: Model Surgery for
 * Pre-Trained Model-Based Class-Incremental Learning" (2025): no slow values; theta <- (1-m) theta + m mean(theta at
 * the end of each earlier task). */
#include <math.h>
#include <string.h>

#include "tasks/internal.h"
#include "tasks/memory.h"
#include "tasks/teacher.h"

static void copy(const esp_sequence *q, esp_tensor to, esp_tensor from) {
  q->be->ops->axpby(q->be, to, 1.0f, from, 0.0f);
}

static bool exists(const esp_strategy *s, const char *name) {
  return esp_strategy_get(s, name, NULL) != NULL;
}

/* What is measured and saved: the slow values, where there are any. */
static esp_status deploy(esp_strategy *s, const esp_sequence *q, bool on) {
  (void)on;
  if (exists(s, "slow")) esp_sequence_exchange(q, esp_strategy_flat(s, "slow", q));
  return ESP_OK;
}

static esp_status start_slow(esp_strategy *s, const esp_sequence *q) {
  esp_tensor slow = esp_strategy_flat(s, "slow", q);
  if (!slow.data) return ESP_ERR_MEMORY;
  copy(q, slow, esp_sequence_masters(q));
  return ESP_OK;
}

static void follow(esp_strategy *s, const esp_sequence *q, double keep) {
  q->be->ops->axpby(q->be, esp_strategy_flat(s, "slow", q), (float)(1 - keep), esp_sequence_masters(q), (float)keep);
}

static esp_status several(int n_tasks, const char *name) {
  if (n_tasks > 1) return ESP_OK;
  return esp_fail(ESP_ERR_RECIPE, "continual.strategy: %s has nothing to do with one task", name);
}

/* ---- lae ---- */

static esp_status lae_check(const esp_strategy_cfg *c, int n_tasks) {
  (void)c;
  return several(n_tasks, "lae");
}

static esp_status lae_step(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  (void)t;
  if (exists(s, "slow")) follow(s, q, s->cfg->lae.decay);
  return ESP_OK;
}

static esp_status lae_end(esp_strategy *s, const esp_sequence *q) {
  return exists(s, "slow") ? ESP_OK : start_slow(s, q);
}

static int lae_experts(const esp_strategy *s) {
  return s->cfg->lae.ensemble && exists(s, "slow") ? 2 : 1;
}

/* The values that are not in force lie where the slow ones were. */
static esp_status lae_expert(esp_strategy *s, const esp_sequence *q, int i) {
  (void)i; /* there are two, asked for in turn */
  return deploy(s, q, true);
}

const esp_strategy_kind esp_strategy_lae = {
    .name = "lae",
    .summary = "a slow copy of the adapter follows from the first task's end on and is deployed: "
               "phi <- a phi + (1-a) theta",
    .flags = ESP_STRATEGY_BY_PARAMETER | ESP_STRATEGY_DEPLOYS,
    .check = lae_check,
    .after_step = lae_step,
    .task_end = lae_end,
    .deploy = deploy,
    .experts = lae_experts,
    .expert = lae_expert,
};

/* ---- ilora ---- */

typedef struct ilora { /* between `draw` and `pass` of one step */
  esp_sample *list;
  int64_t n;
  esp_rows rows;
  esp_teacher teacher;
} ilora;

static esp_status ilora_check(const esp_strategy_cfg *c, int n_tasks) {
  double b = c->ilora.buffer;
  if (b > 1 && b != floor(b))
    return esp_fail(ESP_ERR_RECIPE, "continual.ilora.buffer: must be a whole number of samples or a share, is %g", b);
  return several(n_tasks, "ilora");
}

static esp_status ilora_open(esp_strategy *s, const esp_sequence *q) {
  (void)q;
  ilora *d = s->impl = esp_mem_alloc(ESP_MEM_HOST, sizeof *d);
  if (!d) return ESP_ERR_MEMORY;
  d->list = esp_mem_alloc(ESP_MEM_HOST, (size_t)s->cfg->ilora.batch * sizeof *d->list);
  d->teacher.teach = (esp_teach){.temperature = 1,
                                 .hidden = s->cfg->ilora.gamma > 0 ? ESP_HIDDEN_BELOW : ESP_HIDDEN_NONE,
                                 .hidden_weight = (float)s->cfg->ilora.gamma};
  return d->list ? ESP_OK : ESP_ERR_MEMORY;
}

static void ilora_close(esp_strategy *s) {
  ilora *d = s->impl;
  if (!d) return;
  esp_mem_free(d->list);
  esp_rows_deinit(&d->rows);
  esp_teacher_deinit(&d->teacher);
  esp_mem_free(d);
}

static esp_status ilora_begin(esp_strategy *s, const esp_sequence *q) {
  return exists(s, "slow") ? ESP_OK : start_slow(s, q);
}

static esp_status ilora_draw(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t, double *weight) {
  ilora *d = s->impl;
  int64_t n = s->cfg->ilora.batch;
  d->n = 0;
  if (esp_memory_count(s) == 0) return ESP_OK;
  ESP_TRY(esp_memory_draw(s, q, t->task_step * n, n, d->list));
  d->n = n;
  for (int64_t i = 0; i < n; i++) *weight += esp_sequence_weight(q, d->list[i]);
  return ESP_OK;
}

static esp_status ilora_pass(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  ilora *d = s->impl;
  int64_t first, mine, size = q->micro_batch;
  esp_sequence_share(q, d->n, &first, &mine);
  for (int64_t i = 0; i < mine; i += size) {
    ESP_TRY(esp_sequence_rows(q, d->list + first + i, mine - i < size ? mine - i : size, &d->rows));
    esp_batch b = esp_sequence_batch(&d->rows);
    if (d->teacher.teach.hidden) {
      ESP_TRY(esp_teacher_reserve(&d->teacher, q, d->rows.tokens));
      ESP_TRY(esp_teacher_ask(&d->teacher, q, esp_strategy_flat(s, "slow", q), &b));
    }
    /* a draw of dropout that no micro-batch of the step has: they count from below */
    ESP_TRY(esp_sequence_pass(q, &d->rows, b.teach, true, t->scale, (t->step << 20) + (1 << 19) + first + i, NULL));
  }
  return ESP_OK;
}

static esp_status ilora_step(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  follow(s, q, fmin(s->cfg->ilora.decay, 1 - 1 / (double)(t->step + 1)));
  return ESP_OK;
}

static esp_status ilora_hand_over(esp_strategy *s, const esp_sequence *q) {
  esp_memory_cfg c = {s->cfg->ilora.buffer, 0, "reservoir"};
  return esp_memory_add(s, q, &c);
}

static int64_t ilora_held(const esp_strategy *s, const esp_sequence *q) {
  const ilora *d = s->impl;
  return esp_memory_bytes(s, q) + (d ? esp_teacher_bytes(&d->teacher) : 0);
}

const esp_strategy_kind esp_strategy_ilora = {
    .name = "ilora",
    .summary = "replay whose hidden states are held to those of a slow copy of the adapter, which is deployed",
    .flags = ESP_STRATEGY_BY_PARAMETER | ESP_STRATEGY_DEPLOYS,
    .check = ilora_check,
    .open = ilora_open,
    .close = ilora_close,
    .task_begin = ilora_begin,
    .hand_over = ilora_hand_over,
    .draw = ilora_draw,
    .pass = ilora_pass,
    .after_step = ilora_step,
    .deploy = deploy,
    .held = ilora_held,
};

/* ---- coin_ema ---- */

/* One tensor as rows of up to LONG: short rows cost more in what is done once a row than in themselves. */
enum { LONG = 8192 };
static esp_tensor part(esp_tensor flat, const esp_param *p) {
  int64_t rows = p->ndim == 2 ? p->shape[0] : 1, cols = p->numel / rows;
  for (; rows % 2 == 0 && 2 * cols <= LONG; rows /= 2) cols *= 2;
  return esp_tensor_2d((float *)flat.data + p->offset, ESP_F32, rows, cols);
}

static esp_status coin_begin(esp_strategy *s, const esp_sequence *q) {
  const esp_params *ps = q->adapter->params;
  int64_t rows = 1;
  for (int i = 0; i < ps->count; i++)
    if (ps->list[i].ndim == 2 && ps->list[i].shape[0] > rows) rows = ps->list[i].shape[0];
  float *ones = esp_strategy_array(s, "ones", ESP_F32, rows, false);
  float *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)rows * sizeof *host);
  esp_status st = ones && host ? ESP_OK : ESP_ERR_MEMORY;
  for (int64_t i = 0; st == ESP_OK && i < rows; i++) host[i] = 1;
  if (st == ESP_OK) q->be->ops->upload(q->be, ones, host, rows * (int64_t)sizeof *host);
  if (st == ESP_OK) st = esp_backend_sync(q->be);
  esp_mem_free(host);
  if (st == ESP_OK && !esp_strategy_flat(s, "before", q).data) st = ESP_ERR_MEMORY;
  return st != ESP_OK || exists(s, "slow") ? st : start_slow(s, q);
}

/* sums[0] = |x - y|_1 */
static void distance(const esp_sequence *q, esp_tensor x, esp_tensor y, const float *ones, double *sums) {
  esp_hidden_args a = {
      .kind = ESP_HIDDEN_L1, .x = x, .teacher = y, .weights = ones, .factor = (float)esp_tensor_cols(&x), .sums = sums};
  q->be->ops->hidden_loss(q->be, &a);
}

static double coin_alpha(double a, double b, double c) {
  double alpha = 2 * (1 + b) / (a * c);
  return alpha > 0 && alpha < 1 ? alpha : 0.01;
}

static esp_status coin_step(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  (void)t;
  const esp_backend_ops *op = q->be->ops;
  const esp_params *ps = q->adapter->params;
  const float *ones = esp_strategy_get(s, "ones", NULL);
  esp_tensor slow = esp_strategy_flat(s, "slow", q), before = esp_strategy_flat(s, "before", q);
  esp_tensor fast = esp_sequence_masters(q), g = esp_sequence_gradient(q);
  int64_t mark = esp_stack_mark(q->stack), bytes = (int64_t)ps->count * 6 * (int64_t)sizeof(double);
  int64_t widest = 1;
  for (int i = 0; i < ps->count; i++) {
    esp_tensor t = part(fast, &ps->list[i]);
    if (esp_tensor_cols(&t) > widest) widest = esp_tensor_cols(&t);
  }
  void *zero = esp_stack_tensor(q->stack, ESP_F32, 1, widest).data;
  double *sums = esp_stack_tensor(q->stack, ESP_F32, 1, bytes / 4).data; /* of each tensor a, b and c, and a gap each */
  double *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)bytes);
  esp_status st = host ? ESP_OK : ESP_ERR_MEMORY;
  if (st != ESP_OK) goto out;
  op->zero(q->be, zero, widest * (int64_t)sizeof(float));
  op->zero(q->be, sums, bytes);
  for (int i = 0; i < ps->count; i++) {
    const esp_param *p = &ps->list[i];
    if (p->frozen) continue;
    esp_tensor nothing = part(g, p); /* every row is the same zeros */
    nothing.data = zero, nothing.ld = 0;
    distance(q, part(fast, p), part(slow, p), ones, sums + 6 * i);
    distance(q, part(g, p), nothing, ones, sums + 6 * i + 2);
    distance(q, part(g, p), part(before, p), ones, sums + 6 * i + 4);
  }
  op->download(q->be, host, sums, bytes);
  ESP_GOTO(esp_backend_sync(q->be));
  for (int i = 0; i < ps->count; i++) {
    double alpha = coin_alpha(host[6 * i], host[6 * i + 2], host[6 * i + 4]);
    op->axpby(q->be, part(slow, &ps->list[i]), (float)alpha, part(fast, &ps->list[i]), (float)(1 - alpha));
  }
  copy(q, before, g);
out:
  esp_mem_free(host);
  esp_stack_release(q->stack, mark);
  return st;
}

static esp_status coin_end(esp_strategy *s, const esp_sequence *q) {
  copy(q, esp_sequence_masters(q), esp_strategy_flat(s, "slow", q));
  esp_params_refresh_shadow(q->adapter->params);
  return ESP_OK;
}

const esp_strategy_kind esp_strategy_coin_ema = {
    .name = "coin_ema",
    .summary = "a slow copy follows each tensor at a rate taken from gradients and takes its place at a task's end",
    .flags = ESP_STRATEGY_BY_PARAMETER | ESP_STRATEGY_DEPLOYS,
    .task_begin = coin_begin,
    .after_step = coin_step,
    .task_end = coin_end,
    .deploy = deploy,
};

/* ---- mos ---- */

static esp_status mos_check(const esp_strategy_cfg *c, int n_tasks) {
  (void)c;
  return several(n_tasks, "mos");
}

static esp_status mos_step(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  (void)t;
  if (!exists(s, "mean")) return ESP_OK;
  double m = s->cfg->mos.momentum;
  q->be->ops->axpby(q->be, esp_sequence_masters(q), (float)m, esp_strategy_flat(s, "mean", q), (float)(1 - m));
  esp_params_refresh_shadow(q->adapter->params);
  return ESP_OK;
}

static esp_status mos_hand_over(esp_strategy *s, const esp_sequence *q) {
  esp_tensor mean = esp_strategy_flat(s, "mean", q);
  if (!mean.data) return ESP_ERR_MEMORY;
  double part_of = 1 / (double)(q->task + 1);
  q->be->ops->axpby(q->be, mean, (float)part_of, esp_sequence_masters(q), (float)(1 - part_of));
  return ESP_OK;
}

const esp_strategy_kind esp_strategy_mos = {
    .name = "mos",
    .summary = "after each step the adapter goes a little toward the mean of those at the end of earlier tasks",
    .flags = ESP_STRATEGY_BY_PARAMETER,
    .check = mos_check,
    .after_step = mos_step,
    .hand_over = mos_hand_over,
};
