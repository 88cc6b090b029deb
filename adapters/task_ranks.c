/* task_ranks.c: see task_ranks.h. */
#include "adapters/task_ranks.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/rng.h"
#include "io/json.h"

esp_task_ranks *esp_task_ranks_of(const esp_adapter *a) {
  return a->impl;
}

bool esp_task_ranks_select(const esp_adapter *a) {
  return a->kind == &esp_kind_incremental_rank;
}

bool esp_task_ranks_gates(const esp_adapter *a) {
  return a->kind == &esp_kind_mora_rank;
}

static float site_scale(const esp_adapter *a, const esp_task_site *ts) {
  return (float)(ts->s * a->weight);
}

/* ---- parameters ---- */

esp_status esp_task_ranks_open(esp_adapter *a) {
  esp_task_ranks *tr = a->impl = esp_arena_alloc(a->arena, sizeof *tr);
  if (!tr) return ESP_ERR_MEMORY;
  tr->tasks = a->cfg.tasks > 1 ? a->cfg.tasks : 1;
  tr->current = a->cfg.task;
  tr->furthest = a->cfg.begun > a->cfg.task ? a->cfg.begun - 1 : a->cfg.task;
  return ESP_OK;
}

static int add(esp_adapter *a, const esp_site *s, const char *what, int task, int ndim, int64_t d0, int64_t d1,
               bool pad) {
  char name[512];
  snprintf(name, sizeof name, ESP_PEFT_PREFIX "%s.%s.%d.weight", s->path, what, task);
  int index = esp_params_add(a->params, name, ndim, (int64_t[]){d0, d1}, pad);
  if (index >= 0) a->params->list[index].frozen = task != esp_task_ranks_of(a)->current;
  return index;
}

static esp_task_site *new_site(esp_adapter *a, esp_site *s) {
  const esp_adapter_cfg *cfg = &a->cfg;
  const esp_task_ranks *tr = a->impl;
  esp_task_site *ts = esp_arena_alloc(a->arena, sizeof *ts);
  if (!ts) return NULL;
  ts->r = (int64_t)esp_pattern_value(cfg->rank_pattern, cfg->n_rank_pattern, s->path, (double)cfg->r);
  double alpha = esp_pattern_value(cfg->alpha_pattern, cfg->n_alpha_pattern, s->path, cfg->alpha);
  ts->s = (float)(alpha / (cfg->rslora ? sqrt((double)ts->r) : (double)ts->r));
  if (esp_task_ranks_gates(a)) ts->s = (float)alpha; /* the gates are a mean over the ranks */
  ts->rank = ts->r * (tr->current + 1);
  ts->a = esp_arena_alloc(a->arena, 3 * (size_t)tr->tasks * sizeof *ts->a);
  if (!ts->a) return NULL;
  ts->b = ts->a + tr->tasks;
  ts->sel = esp_task_ranks_select(a) ? ts->b + tr->tasks : NULL;
  a->site_state[s->index] = ts;
  return ts;
}

esp_status esp_task_ranks_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  const esp_task_ranks *tr = a->impl;
  esp_task_group *tg = a->group_state[g->index] = esp_arena_alloc(a->arena, sizeof *tg);
  if (!tg || !(tg->first_a = esp_arena_alloc(a->arena, (size_t)tr->tasks * sizeof *tg->first_a))) return ESP_ERR_MEMORY;
  tg->uniform = true;
  for (int i = 0; i < g->n_sites; i++) {
    if (!hit[i]) continue;
    esp_task_site *ts = new_site(a, g->sites[i]);
    if (!ts) return ESP_ERR_MEMORY;
    ts->t0 = tg->width;
    tg->width += ts->r;
    tg->sites[tg->n++] = g->sites[i];
    tg->uniform &= ts->s == ((esp_task_site *)a->site_state[tg->sites[0]->index])->s;
  }
  for (int t = 0; t < tr->tasks; t++)
    for (int i = 0; i < tg->n; i++) {
      esp_task_site *ts = a->site_state[tg->sites[i]->index];
      ts->a[t] = add(a, tg->sites[i], "lora_A", t, 2, ts->r, tg->sites[i]->in, t == 0 && i == 0);
      if (ts->a[t] < 0) return ESP_ERR_MEMORY;
      if (i == 0) tg->first_a[t] = ts->a[t];
    }
  for (int t = 0; t < tr->tasks; t++)
    for (int i = 0; i < tg->n; i++) {
      esp_task_site *ts = a->site_state[tg->sites[i]->index];
      ts->b[t] = add(a, tg->sites[i], "lora_B", t, 2, tg->sites[i]->out, ts->r, true);
      if (ts->b[t] < 0) return ESP_ERR_MEMORY;
      if (ts->sel && (ts->sel[t] = add(a, tg->sites[i], "selector", t, 1, (t + 1) * ts->r, 1, true)) < 0)
        return ESP_ERR_MEMORY;
    }
  return ESP_OK;
}

/* As lora's default init, each task with draws of its own: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0; selectors 1. */
esp_status esp_task_ranks_init(esp_adapter *a, esp_site *s) {
  const esp_task_ranks *tr = a->impl;
  const esp_task_site *ts = a->site_state[s->index];
  int64_t n = ts->r * (s->in > tr->tasks ? s->in : tr->tasks);
  float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *x), bound = 1.0f / sqrtf((float)s->in);
  if (!x) return ESP_ERR_MEMORY;
  for (int t = 0; t < tr->tasks; t++) {
    uint64_t stream = esp_rng_stream_name(ESP_RNG_INIT, a->params->list[ts->a[t]].name);
    uint32_t w[4];
    for (int64_t i = 0; i < ts->r * s->in; i++) {
      if (i % 4 == 0) esp_rng_block(a->cfg.seed, stream, (uint64_t)i / 4, w);
      x[i] = bound * (2.0f * ((float)(w[i % 4] >> 8) * 0x1p-24f) - 1.0f);
    }
    esp_params_set(a->params, ts->a[t], x);
    for (int64_t i = 0; i < (t + 1) * ts->r; i++) x[i] = 1.0f;
    if (ts->sel) esp_params_set(a->params, ts->sel[t], x);
  }
  esp_mem_free(x);
  return ESP_OK;
}

/* A new task starts where the last one ended: its own B is zero, the earlier factors keep their weights. */
static esp_status inherit(esp_adapter *a, const esp_task_site *ts, int task) {
  float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)((task + 1) * ts->r) * sizeof *x);
  if (!x) return ESP_ERR_MEMORY;
  esp_params_get(a->params, ts->sel[task - 1], x);
  for (int64_t i = task * ts->r; i < (task + 1) * ts->r; i++) x[i] = 1.0f;
  esp_params_set(a->params, ts->sel[task], x);
  esp_mem_free(x);
  return ESP_OK;
}

esp_status esp_task_ranks_begin(esp_adapter *a, int task) {
  esp_task_ranks *tr = a->impl;
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites);
  if (tr->tasks == 1) task = 0; /* an adapter of its own for each task */
  if (task < 0 || task >= tr->tasks)
    return esp_fail(ESP_ERR_DATA, "adapter '%s' has factors for %d tasks, task %d was asked for", a->name, tr->tasks,
                    task + 1);
  bool fresh = task > tr->furthest;
  for (int i = 0; i < n; i++) {
    esp_task_site *ts = a->targeted[i] ? a->site_state[i] : NULL;
    if (!ts) continue;
    for (int t = 0; t < tr->tasks; t++) {
      a->params->list[ts->a[t]].frozen = a->params->list[ts->b[t]].frozen = t != task;
      if (ts->sel) a->params->list[ts->sel[t]].frozen = t != task;
    }
    ts->rank = ts->r * (task + 1);
    if (fresh && ts->sel) ESP_TRY(inherit(a, ts, task));
  }
  if (fresh) tr->furthest = task;
  if (task != tr->current) a->revision++;
  tr->current = task;
  a->cfg.task = task;
  return ESP_OK;
}

bool esp_task_ranks_in_file(const esp_adapter *a, int index) {
  const esp_task_ranks *tr = a->impl;
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites);
  for (int i = 0; i < n; i++) {
    const esp_task_site *ts = a->targeted[i] ? a->site_state[i] : NULL;
    for (int t = tr->current + 1; ts && t < tr->tasks; t++)
      if (index == ts->a[t] || index == ts->b[t] || (ts->sel && index == ts->sel[t])) return false;
  }
  return true;
}

/* ---- the step; see lora.c for what it has in common with it ---- */

/* The columns of task `t` of site `ts` in T. */
static esp_tensor part(const esp_task_group *tg, const esp_task_site *ts, int t, const esp_tensor *x) {
  return esp_tensor_cols_view(x, t * tg->width + ts->t0, ts->r);
}

/* Selectors act as their fp32 masters: near 1, a step of training is below the resolution of bf16. */
static esp_tensor selector(const esp_adapter *a, const esp_task_site *ts, int t, bool grad) {
  int index = ts->sel[esp_task_ranks_of(a)->current];
  esp_tensor x = grad ? esp_param_grad(a->params, index) : esp_param_master(a->params, index);
  return esp_tensor_1d((float *)x.data + t * ts->r, ESP_F32, ts->r);
}

/* All ranks of a site in T, of all tasks so far. */
static esp_tensor span(const esp_task_group *tg, const esp_task_site *ts, int count, const esp_tensor *x) {
  return esp_tensor_cols_view(x, ts->t0, (count - 1) * tg->width + ts->r);
}

static esp_gate gate_of(const esp_adapter *a, const esp_task_group *tg, const esp_task_site *ts, int count) {
  return (esp_gate){.parts = count,
                    .width = ts->r,
                    .step = tg->width,
                    .top = a->cfg.gate_top_k,
                    .tau = (float)a->cfg.gate_temperature,
                    .threshold = (float)a->cfg.gate_threshold,
                    .scale = site_scale(a, ts)};
}

int esp_task_ranks_tails(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max,
                         void **slot) {
  esp_task_group *tg = a->group_state[g->index];
  if (!tg) return 0;
  const esp_backend_ops *ops = run->be->ops;
  int count = esp_task_ranks_of(a)->current + 1, n = 0;
  int64_t rows = esp_tensor_rows(&x), width = tg->width * count;
  bool gates =
      esp_task_ranks_gates(a); /* of T as it is: bf16 would move the gates by its rounding over the temperature */
  tg->t = tg->ts = esp_stack_tensor(run->stack, gates ? ESP_F32 : run->compute, rows, width);
  if (esp_task_ranks_select(a) || gates) tg->ts = esp_stack_tensor(run->stack, run->compute, rows, width);
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor stacked = esp_params_stacked(a->params, tg->first_a[0], tg->n * count, 0);
  const esp_task_site *first = a->site_state[tg->sites[0]->index];
  ops->matmul(run->be, tg->t, esp_dropped(a, run, g, x), false, stacked, true,
              tg->uniform && !gates ? site_scale(a, first) : 1.0f, 0.0f);
  esp_stack_release(run->stack, mark);
  for (int i = 0; gates && i < tg->n; i++) {
    const esp_task_site *ts = a->site_state[tg->sites[i]->index];
    esp_gate gate = gate_of(a, tg, ts, count);
    ops->rank_gate(run->be, span(tg, ts, count, &tg->ts), span(tg, ts, count, &tg->t), &gate);
  }
  tg->late_fwd = max < tg->n * count;
  for (int t = 0; t < count; t++)
    for (int i = 0; i < tg->n; i++) {
      const esp_task_site *ts = a->site_state[tg->sites[i]->index];
      esp_tensor raw = part(tg, ts, t, &tg->t), used = part(tg, ts, t, &tg->ts);
      if (!tg->uniform && !gates) ops->axpby(run->be, raw, site_scale(a, ts), raw, 0.0f);
      if (ts->sel) ops->mul_cols(run->be, used, raw, selector(a, ts, t, false));
      if (!tg->late_fwd) tails[n++] = (esp_tail){tg->sites[i]->col0, used, esp_param_shadow(a->params, ts->b[t])};
    }
  return n;
}

void esp_task_ranks_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  esp_task_group *tg = a->group_state[g->index];
  if (!tg || !tg->late_fwd) return;
  for (int i = 0; i < tg->n; i++)
    for (int t = 0; t <= esp_task_ranks_of(a)->current; t++) {
      const esp_task_site *ts = a->site_state[tg->sites[i]->index];
      run->be->ops->matmul(run->be, esp_tensor_cols_view(&y, tg->sites[i]->col0, tg->sites[i]->out),
                           part(tg, ts, t, &tg->ts), false, esp_param_shadow(a->params, ts->b[t]), true, 1.0f, 1.0f);
    }
}

/* Tails of several tasks, beside those of other adapters, may not find room in one product. */
bool esp_task_ranks_wants_output(const esp_adapter *a) {
  return esp_task_ranks_of(a)->tasks > 1;
}

int esp_task_ranks_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                             int max, void **slot) {
  esp_task_group *tg = a->group_state[g->index];
  if (!tg) return 0;
  const esp_backend_ops *ops = run->be->ops;
  int current = esp_task_ranks_of(a)->current, count = current + 1;
  bool gates = esp_task_ranks_gates(a);
  tg->dt = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), tg->width * count);
  for (int i = 0; i < tg->n; i++) {
    const esp_task_site *ts = a->site_state[tg->sites[i]->index];
    esp_tensor dyi = esp_tensor_cols_view(&dy, tg->sites[i]->col0, tg->sites[i]->out);
    for (int t = 0; t < count; t++) {
      esp_tensor dt = part(tg, ts, t, &tg->dt);
      ops->matmul(run->be, dt, dyi, false, esp_param_shadow(a->params, ts->b[t]), false,
                  ts->sel || gates ? 1.0f : site_scale(a, ts), 0.0f);
      if (!ts->sel) continue;
      /* T carries s already: dS = sum over tokens of T (dy B); dT = s S (dy B) */
      if (a->trainable) ops->col_dot(run->be, selector(a, ts, t, true).data, part(tg, ts, t, &tg->t), dt);
      ops->mul_cols(run->be, dt, dt, selector(a, ts, t, false));
      ops->axpby(run->be, dt, site_scale(a, ts), dt, 0.0f);
    }
    if (gates) { /* dT of every rank, through its own gate and those of the others */
      esp_gate gate = gate_of(a, tg, ts, count);
      esp_tensor dt = span(tg, ts, count, &tg->dt);
      ops->rank_gate_bwd(run->be, dt, dt, span(tg, ts, count, &tg->t), &gate);
    }
    if (a->trainable)
      ops->matmul(run->be, esp_param_grad(a->params, ts->b[current]), dyi, true, part(tg, ts, current, &tg->ts), false,
                  1.0f, 1.0f);
  }
  if (a->trainable) {
    int64_t mark = esp_stack_mark(run->stack);
    ops->matmul(run->be, esp_params_stacked(a->params, tg->first_a[current], tg->n, 2),
                esp_tensor_cols_view(&tg->dt, current * tg->width, tg->width), true, esp_dropped(a, run, g, x), false,
                1.0f, 1.0f);
    esp_stack_release(run->stack, mark);
  }
  tg->late_bwd = max < 1 || esp_drops(a, run);
  if (tg->late_bwd) return 0;
  tails[0] = (esp_tail){0, tg->dt, esp_params_stacked(a->params, tg->first_a[0], tg->n * count, 0)};
  return 1;
}

void esp_task_ranks_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  esp_task_group *tg = a->group_state[g->index];
  if (!tg || !tg->late_bwd || !dx.data) return;
  int count = esp_task_ranks_of(a)->current + 1;
  esp_tensor stacked = esp_params_stacked(a->params, tg->first_a[0], tg->n * count, 0), d = dx;
  int64_t mark = esp_stack_mark(run->stack);
  bool mask = esp_drops(a, run); /* stands between dT A and dx */
  if (mask) d = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&dx), esp_tensor_cols(&dx));
  run->be->ops->matmul(run->be, d, tg->dt, false, stacked, false, 1.0f, mask ? 0.0f : 1.0f);
  if (mask) esp_dropout(a, run, g, dx, d, 1.0f);
  esp_stack_release(run->stack, mark);
}

/* ---- merge, export ---- */

int64_t esp_task_ranks_low_rank(esp_adapter *a, esp_site *s, float *A, float *B) {
  const esp_task_ranks *tr = a->impl;
  const esp_task_site *ts = a->site_state[s->index];
  int64_t r = ts->r, total = ts->rank;
  if (!A && !B) return total;
  float *b = esp_mem_alloc(ESP_MEM_HOST, (size_t)(s->out * r + total) * sizeof *b);
  if (!b) return -1;
  float *sel = b + s->out * r;
  for (int64_t k = 0; k < total; k++) sel[k] = 1.0f;
  if (ts->sel) esp_params_get(a->params, ts->sel[tr->current], sel);
  for (int t = 0; t <= tr->current; t++) {
    if (A) esp_params_get(a->params, ts->a[t], A + t * r * s->in);
    if (!B) continue;
    esp_params_get(a->params, ts->b[t], b);
    for (int64_t o = 0; o < s->out; o++)
      for (int64_t k = 0; k < r; k++) B[o * total + t * r + k] = site_scale(a, ts) * sel[t * r + k] * b[o * r + k];
  }
  esp_mem_free(b);
  return total;
}

esp_status esp_task_ranks_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  const esp_task_site *ts = a->site_state[s->index];
  float *A = esp_mem_alloc(ESP_MEM_HOST, (size_t)(ts->rank * (s->in + s->out)) * sizeof *A);
  if (!A) return ESP_ERR_MEMORY;
  float *B = A + ts->rank * s->in;
  bool ok = esp_task_ranks_low_rank(a, s, A, B) >= 0;
  if (ok) esp_lowrank_add(w, n, s->in, A, B + r0 * ts->rank, ts->rank, 1.0f);
  esp_mem_free(A);
  return ok ? ESP_OK : ESP_ERR_MEMORY;
}

/* ---- configuration ---- */

void esp_task_ranks_config_write(const esp_adapter *a, json_t *j) {
  const esp_adapter_cfg *c = &a->cfg;
  json_object_set_new(j, "r", json_integer((json_int_t)c->r));
  json_object_set_new(j, "lora_alpha", esp_json_number(c->alpha));
  json_object_set_new(j, "lora_dropout", json_real(c->dropout));
  json_object_set_new(j, "use_rslora", json_boolean(c->rslora));
  json_object_set_new(j, "rank_pattern", esp_json_patterns(a, c->rank_pattern, c->n_rank_pattern, (double)c->r, 1));
  json_object_set_new(j, "alpha_pattern", esp_json_patterns(a, c->alpha_pattern, c->n_alpha_pattern, c->alpha, 1));
  int current = esp_task_ranks_of(a)->current;
  json_object_set_new(j, "tasks", json_integer(current + 1)); /* what the file holds */
  json_object_set_new(j, "task", json_integer(current));      /* the one in use; an earlier one may be named instead */
}

esp_status esp_task_ranks_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  int rslora = 0;
  int64_t tasks = 1, task = 0;
  c->r = c->alpha = 8;
  ESP_TRY(esp_json_i64(j, "r", path, 1, &c->r));
  ESP_TRY(esp_json_f64(j, "lora_alpha", path, 0, &c->alpha));
  ESP_TRY(esp_json_f64(j, "lora_dropout", path, 0, &c->dropout));
  ESP_TRY(esp_json_bool(j, "use_rslora", path, 0, &rslora));
  ESP_TRY(esp_json_i64(j, "tasks", path, 1, &tasks));
  ESP_TRY(esp_json_i64(j, "task", path, 1, &task));
  if (tasks < 1 || tasks > 100000 || task < 0 || task >= tasks)
    return esp_fail(ESP_ERR_DATA, "%s: key 'task' must be one of the %lld tasks, counted from 0; it is %lld", path,
                    (long long)tasks, (long long)task);
  c->rslora = rslora != 0;
  c->tasks = (int)tasks;
  c->task = (int)task;
  c->begun = (int)tasks;
  ESP_TRY(esp_json_read_patterns(j, "rank_pattern", path, arena, &c->rank_pattern, &c->n_rank_pattern));
  return esp_json_read_patterns(j, "alpha_pattern", path, arena, &c->alpha_pattern, &c->n_alpha_pattern);
}

esp_status esp_task_ranks_config_check(const esp_adapter_cfg *c) {
  if (strcmp(c->init, "default"))
    return esp_fail(ESP_ERR_RECIPE, "adapter.init: '%s' is for lora, not for %s", c->init, c->type);
  if (c->lora_bias) return esp_fail(ESP_ERR_RECIPE, "adapter.lora_bias: is for lora, not for %s", c->type);
  return ESP_OK;
}
