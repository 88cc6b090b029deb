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
  return ESP_OK;
}

static esp_status add_group(esp_adapter *a, esp_task_group *tg, int t) {
  for (int i = 0; i < tg->n; i++) {
    esp_task_site *ts = a->site_state[tg->sites[i]->index];
    ts->a[t] = add(a, tg->sites[i], "lora_A", t, 2, ts->r, tg->sites[i]->in, i == 0);
    if (ts->a[t] < 0) return ESP_ERR_MEMORY;
    if (i == 0) tg->first_a[t] = ts->a[t];
  }
  for (int i = 0; i < tg->n; i++) {
    esp_task_site *ts = a->site_state[tg->sites[i]->index];
    ts->b[t] = add(a, tg->sites[i], "lora_B", t, 2, tg->sites[i]->out, ts->r, true);
    if (ts->b[t] < 0) return ESP_ERR_MEMORY;
    if (ts->sel && (ts->sel[t] = add(a, tg->sites[i], "selector", t, 1, (t + 1) * ts->r, 1, true)) < 0)
      return ESP_ERR_MEMORY;
  }
  return ESP_OK;
}

esp_status esp_task_ranks_declare_last(esp_adapter *a) {
  esp_group **groups;
  int n = esp_model_groups(a->model, &groups);
  for (int t = 0; t < esp_task_ranks_of(a)->tasks; t++)
    for (int g = 0; g < n; g++)
      if (a->group_state[g]) ESP_TRY(add_group(a, a->group_state[g], t));
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
  tr->copied = false;
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

/* ---- the copy in which the factors of a site lie side by side ---- */

static int64_t whole_lines(int64_t elements) {
  return (elements + 31) / 32 * 32;
}

/* Places the copy of every group from `at` on (NULL: only its size). Returns the elements it takes. */
static int64_t place(const esp_adapter *a, char *at) {
  const esp_task_ranks *tr = a->impl;
  int64_t es = (int64_t)esp_dtype_size(a->params->shadow_dtype), n = 0;
  esp_group **groups;
  int n_groups = esp_model_groups(a->model, &groups);
  for (int g = 0; g < n_groups; g++) {
    esp_task_group *tg = a->group_state[g];
    if (!tg) continue;
    if (at) tg->a_all = at + n * es;
    n += whole_lines(tg->width * tr->tasks * tg->sites[0]->in);
    for (int i = 0; i < tg->n; i++) {
      esp_task_site *ts = a->site_state[tg->sites[i]->index];
      if (at) ts->b_all = at + n * es;
      n += whole_lines(tg->sites[i]->out * ts->r * tr->tasks);
    }
  }
  return n;
}

void esp_task_ranks_destroy(esp_adapter *a) {
  esp_task_ranks *tr = a->impl;
  if (tr && tr->copy) a->params->be->ops->free(a->params->be, tr->copy);
}

esp_tensor esp_task_ranks_all_a(const esp_adapter *a, const esp_task_group *tg, int count) {
  esp_tensor own = esp_params_stacked(a->params, tg->first_a[0], tg->n, 0);
  return count == 1 ? own : esp_tensor_2d(tg->a_all, own.dtype, count * tg->width, tg->sites[0]->in);
}

static esp_tensor all_b(const esp_adapter *a, const esp_site *s, int count) {
  const esp_task_site *ts = a->site_state[s->index];
  esp_tensor own = esp_param_shadow(a->params, ts->b[0]);
  return count == 1 ? own : esp_tensor_2d(ts->b_all, own.dtype, s->out, ts->rank);
}

esp_status esp_task_ranks_pass(esp_adapter *a) {
  esp_task_ranks *tr = a->impl;
  const esp_params *ps = a->params;
  esp_backend *be = ps->be;
  esp_group **groups;
  int n = esp_model_groups(a->model, &groups), count = tr->current + 1;
  if (tr->tasks > 1 && !tr->copy) {
    tr->copy = be->ops->alloc(be, ESP_MEM_PARAMS, place(a, NULL) * (int64_t)esp_dtype_size(ps->shadow_dtype));
    if (!tr->copy) return esp_backend_why_null(be);
    place(a, tr->copy);
  }
  bool old = tr->copied && tr->writes == ps->writes; /* the factors of earlier tasks are there */
  if (count == 1 || (old && tr->steps == ps->steps)) return ESP_OK;
  for (int g = 0; g < n; g++) {
    const esp_task_group *tg = a->group_state[g];
    for (int i = 0; tg && i < tg->n; i++) {
      const esp_task_site *ts = a->site_state[tg->sites[i]->index];
      esp_tensor A = esp_task_ranks_all_a(a, tg, count), B = all_b(a, tg->sites[i], count);
      for (int t = old ? tr->current : 0; t < count; t++) {
        esp_tensor b = esp_param_shadow(ps, ts->b[t]);
        be->ops->axpby(be, esp_tensor_cols_view(&B, t * ts->r, ts->r), 1.0f, b, 0.0f);
        b = esp_param_shadow(ps, ts->a[t]);
        be->ops->axpby(be, esp_tensor_rows_view(&A, ts->t0 * count + t * ts->r, ts->r), 1.0f, b, 0.0f);
      }
    }
  }
  tr->copied = true;
  tr->writes = ps->writes;
  tr->steps = ps->steps;
  return ESP_OK;
}

/* ---- the step; see lora.c for what it has in common with it ---- */

/* The columns of a site in T: of all tasks so far, and of the present one. */
static esp_tensor all_of(const esp_task_site *ts, int count, const esp_tensor *x) {
  return esp_tensor_cols_view(x, ts->t0 * count, ts->rank);
}
static esp_tensor now_of(const esp_task_site *ts, int count, const esp_tensor *x) {
  return esp_tensor_cols_view(x, ts->t0 * count + ts->rank - ts->r, ts->r);
}

/* Selectors act as their fp32 masters: near 1, a step of training is below the resolution of bf16. */
static esp_tensor selector(const esp_adapter *a, const esp_task_site *ts, bool grad) {
  int index = ts->sel[esp_task_ranks_of(a)->current];
  esp_tensor x = grad ? esp_param_grad(a->params, index) : esp_param_master(a->params, index);
  return esp_tensor_1d(x.data, ESP_F32, ts->rank);
}

static esp_gate gate_of(const esp_adapter *a, const esp_task_site *ts) {
  return (esp_gate){.top = a->cfg.gate_top_k,
                    .tau = (float)a->cfg.gate_temperature,
                    .threshold = (float)a->cfg.gate_threshold,
                    .scale = site_scale(a, ts)};
}

int esp_task_ranks_tails(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max,
                         void **slot) {
  esp_task_group *tg = a->group_state[g->index];
  if (!tg) return 0;
  const esp_backend_ops *ops = run->be->ops;
  int count = esp_task_ranks_of(a)->current + 1;
  int64_t rows = esp_tensor_rows(&x), width = tg->width * count;
  bool gates =
      esp_task_ranks_gates(a); /* of T as it is: bf16 would move the gates by its rounding over the temperature */
  tg->t = tg->ts = esp_stack_tensor(run->stack, gates ? ESP_F32 : run->compute, rows, width);
  if (esp_task_ranks_select(a) || gates) tg->ts = esp_stack_tensor(run->stack, run->compute, rows, width);
  int64_t mark = esp_stack_mark(run->stack);
  const esp_task_site *first = a->site_state[tg->sites[0]->index];
  ops->matmul(run->be, tg->t, esp_dropped(a, run, g, x), false, esp_task_ranks_all_a(a, tg, count), true,
              tg->uniform && !gates ? site_scale(a, first) : 1.0f, 0.0f);
  esp_stack_release(run->stack, mark);
  tg->late_fwd = max < tg->n;
  for (int i = 0; i < tg->n; i++) {
    const esp_site *s = tg->sites[i];
    const esp_task_site *ts = a->site_state[s->index];
    esp_tensor raw = all_of(ts, count, &tg->t), used = all_of(ts, count, &tg->ts);
    esp_gate gate = gate_of(a, ts);
    if (gates) ops->rank_gate(run->be, used, raw, &gate);
    if (!tg->uniform && !gates) ops->axpby(run->be, raw, site_scale(a, ts), raw, 0.0f);
    if (ts->sel) ops->mul_cols(run->be, used, raw, selector(a, ts, false));
    if (!tg->late_fwd) tails[i] = (esp_tail){s->col0, used, all_b(a, s, count)};
  }
  return tg->late_fwd ? 0 : tg->n;
}

void esp_task_ranks_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  esp_task_group *tg = a->group_state[g->index];
  int count = esp_task_ranks_of(a)->current + 1;
  for (int i = 0; tg && tg->late_fwd && i < tg->n; i++) {
    const esp_site *s = tg->sites[i];
    run->be->ops->matmul(run->be, esp_tensor_cols_view(&y, s->col0, s->out),
                         all_of(a->site_state[s->index], count, &tg->ts), false, all_b(a, s, count), true, 1.0f, 1.0f);
  }
}

bool esp_task_ranks_wants_output(const esp_adapter *a) {
  return false; /* only where tails do not fit */
}

int esp_task_ranks_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                             int max, void **slot) {
  esp_task_group *tg = a->group_state[g->index];
  if (!tg) return 0;
  const esp_backend_ops *ops = run->be->ops;
  int current = esp_task_ranks_of(a)->current, count = current + 1;
  int64_t rows = esp_tensor_rows(&x);
  bool gates = esp_task_ranks_gates(a);
  tg->dt = esp_stack_tensor(run->stack, run->compute, rows, tg->width * count);
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor now = tg->n == 1 ? now_of(a->site_state[tg->sites[0]->index], count, &tg->dt)
                              : esp_stack_tensor(run->stack, run->compute, rows, tg->width);
  for (int i = 0; i < tg->n; i++) {
    const esp_task_site *ts = a->site_state[tg->sites[i]->index];
    esp_tensor dyi = esp_tensor_cols_view(&dy, tg->sites[i]->col0, tg->sites[i]->out);
    esp_tensor dt = all_of(ts, count, &tg->dt);
    ops->matmul(run->be, dt, dyi, false, all_b(a, tg->sites[i], count), false,
                ts->sel || gates ? 1.0f : site_scale(a, ts), 0.0f);
    if (ts->sel) { /* T carries s already: dS = sum over tokens of T (dy B); dT = s S (dy B) */
      if (a->trainable) ops->col_dot(run->be, selector(a, ts, true).data, all_of(ts, count, &tg->t), dt);
      ops->mul_cols(run->be, dt, dt, selector(a, ts, false));
      ops->axpby(run->be, dt, site_scale(a, ts), dt, 0.0f);
    }
    if (gates) { /* dT of every rank, through its own gate and those of the others */
      esp_gate gate = gate_of(a, ts);
      ops->rank_gate_bwd(run->be, dt, dt, all_of(ts, count, &tg->t), &gate);
    }
    if (!a->trainable) continue;
    ops->matmul(run->be, esp_param_grad(a->params, ts->b[current]), dyi, true, now_of(ts, count, &tg->ts), false, 1.0f,
                1.0f);
    if (tg->n > 1)
      ops->axpby(run->be, esp_tensor_cols_view(&now, ts->t0, ts->r), 1.0f, now_of(ts, count, &tg->dt), 0.0f);
  }
  if (a->trainable)
    ops->matmul(run->be, esp_params_stacked(a->params, tg->first_a[current], tg->n, 2), now, true,
                esp_dropped(a, run, g, x), false, 1.0f, 1.0f);
  esp_stack_release(run->stack, mark);
  tg->late_bwd = max < 1 || esp_drops(a, run);
  if (tg->late_bwd) return 0;
  tails[0] = (esp_tail){0, tg->dt, esp_task_ranks_all_a(a, tg, count)};
  return 1;
}

void esp_task_ranks_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  esp_task_group *tg = a->group_state[g->index];
  if (!tg || !tg->late_bwd || !dx.data) return;
  esp_tensor d = dx;
  int64_t mark = esp_stack_mark(run->stack);
  bool mask = esp_drops(a, run); /* stands between dT A and dx */
  if (mask) d = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&dx), esp_tensor_cols(&dx));
  run->be->ops->matmul(run->be, d, tg->dt, false, esp_task_ranks_all_a(a, tg, esp_task_ranks_of(a)->current + 1), false,
                       1.0f, mask ? 0.0f : 1.0f);
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
