/* mora_rank.c: a mixture of rank-1 experts that activate themselves ("Little By Little: Continual Learning via
 * Self-Activated Sparse Mixture-of-Rank Adaptive Learning"). No relation to the square matrix of `mora`. Each task of a
 * sequence adds r ranks to a pool; those of earlier tasks are frozen and stay in it:
 *   y = W x + b + alpha sum_i w_i(x) b_i (a_i x),  s_i = a_i x / |A x|,  w = softmax(s / gate_temperature),
 * over all ranks of the module so far, and of these only the gate_top_k largest, with s_i >= gate_threshold where that
 * is above 0. The weights of the ranks that take part are not scaled up again. With even gates, a high temperature, it
 * is a LoRA of as many ranks with s = alpha / ranks. The new ranks take a share of the softmax from the first step of
 * a task on, so a task does not begin exactly where the last one ended.
 *
 * The catalogue has these formulas at second hand; its open points are settled here: gates are per token, and old ranks
 * are frozen. The temperature is not given there; 0.2 is chosen. What takes part is a constant of backward.
 *
 * There is no matrix that does this, so it cannot be merged. A plain LoRA near it has the mean gates in their place:
 * for each rank the number c that makes the sum of (w (a x) - c a x)^2 least, the mean of w weighted with (a x)^2.
 * Training sums w (a x)^2, (a x)^2 and (w a x)^2 over its tokens, the last hundred steps or so, and the file has c and
 * the share of the change that is missed, |b_i| being the size of rank i and ranks being taken as independent. With
 * several processes the sums of a step are added over all of them.
 */
#include <math.h>
#include <string.h>

#include "adapters/task_ranks.h"
#include "io/json.h"

static const float KEEP = 0.99f; /* of the sums, from one step to the next */

typedef struct mora_rank {
  esp_task_ranks all; /* first: what the operator reads */
  float *sums;        /* backend memory; of group g from at[g] on: [3, width * tasks] */
  float *step;        /* the same of the step that is being made, of this process's rows, behind them */
  int64_t *at, size;
} mora_rank;

static esp_status open(esp_adapter *a) {
  esp_group **groups;
  int n = esp_model_groups(a->model, &groups);
  ESP_TRY(esp_task_ranks_open(a));
  mora_rank *m = esp_arena_alloc(a->arena, sizeof *m);
  if (!m || !(m->at = esp_arena_alloc(a->arena, (size_t)(n + 1) * sizeof *m->at))) return ESP_ERR_MEMORY;
  m->all = *(esp_task_ranks *)a->impl;
  a->impl = m;
  if (a->cfg.gate_temperature == 0) a->cfg.gate_temperature = 0.2;
  return ESP_OK;
}

static esp_status declare(esp_adapter *a, esp_group *g, const bool *hit) {
  mora_rank *m = a->impl;
  ESP_TRY(esp_task_ranks_declare(a, g, hit));
  const esp_task_group *tg = a->group_state[g->index];
  for (int i = 0; i < tg->n; i++) {
    const esp_task_site *ts = a->site_state[tg->sites[i]->index];
    if (ts->r * m->all.tasks > ESP_GATE_MOST)
      return esp_fail(ESP_ERR_RECIPE, "adapter.r: %lld ranks of each of %d tasks on %s, a pool holds %d at most",
                      (long long)ts->r, m->all.tasks, tg->sites[i]->path, ESP_GATE_MOST);
  }
  m->at[g->index] = m->size;
  m->size += 3 * tg->width * m->all.tasks;
  return ESP_OK;
}

static esp_status make_sums(esp_adapter *a) {
  mora_rank *m = a->impl;
  esp_backend *be = a->params->be;
  if (m->sums || !a->trainable) return ESP_OK;
  m->sums = be->ops->alloc(be, ESP_MEM_OPTIM, 2 * m->size * (int64_t)sizeof *m->sums);
  if (!m->sums) return esp_backend_why_null(be);
  m->step = m->sums + m->size;
  return ESP_OK;
}

static esp_status init(esp_adapter *a, esp_site *s) {
  ESP_TRY(make_sums(a));
  return esp_task_ranks_init(a, s);
}

static void destroy(esp_adapter *a) {
  mora_rank *m = a->impl;
  esp_task_ranks_destroy(a);
  if (m && m->sums) a->params->be->ops->free(a->params->be, m->sums);
}

/* Gates of other tasks have another mean. */
static esp_status task_begin(esp_adapter *a, int task) {
  mora_rank *m = a->impl;
  esp_backend *be = a->params->be;
  int was = m->all.current;
  ESP_TRY(esp_task_ranks_begin(a, task));
  if (m->all.current == was) return ESP_OK;
  if (m->sums) be->ops->zero(be, m->sums, 2 * m->size * (int64_t)sizeof *m->sums);
  a->cfg.n_mean_gates = 0;
  return ESP_OK;
}

static int tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails, int max,
                     void **slot) {
  const esp_backend_ops *ops = run->be->ops;
  const mora_rank *m = a->impl;
  const esp_task_group *tg = a->group_state[g->index];
  int n = esp_task_ranks_tails_bwd(a, run, g, x, dy, tails, max, slot);
  if (!tg || !m->sums) return n;
  float *sums = m->step + m->at[g->index];
  int64_t row = tg->width * m->all.tasks;
  ops->col_dot(run->be, sums, tg->ts, tg->t);
  ops->col_dot(run->be, sums + row, tg->t, tg->t);
  ops->col_dot(run->be, sums + 2 * row, tg->ts, tg->ts);
  return n;
}

static esp_tensor step_sums(const esp_adapter *a) {
  const mora_rank *m = a->impl;
  return esp_tensor_1d(m->step, ESP_F32, m->step ? m->size : 0);
}

static double before_step(esp_adapter *a, int64_t step, int64_t total) {
  const mora_rank *m = a->impl;
  esp_backend *be = a->params->be;
  if (!m->sums) return 0;
  be->ops->axpby(be, esp_tensor_1d(m->sums, ESP_F32, m->size), KEEP, step_sums(a), KEEP);
  be->ops->zero(be, m->step, m->size * (int64_t)sizeof *m->step);
  return 0;
}

/* ---- the mean gates ---- */

/* Of one module from the group's sums: c [rank] and the share that is missed; false: no data yet. */
static bool mean_of(const esp_adapter *a, const esp_task_group *tg, const esp_site *s, const float *sums, float *c,
                    float *b, double *error) {
  const esp_task_ranks *tr = a->impl;
  const esp_task_site *ts = a->site_state[s->index];
  int64_t row = tg->width * tr->tasks;
  double lost = 0, all = 0;
  bool any = false;
  for (int t = 0; t <= tr->current; t++) {
    esp_params_get(a->params, ts->b[t], b);
    for (int64_t k = 0; k < ts->r; k++) {
      const float *at = sums + ts->t0 * (tr->current + 1) + t * ts->r + k;
      double zt = at[0], tt = at[row], zz = at[2 * row], size = 0;
      for (int64_t o = 0; o < s->out; o++) size += (double)b[o * ts->r + k] * b[o * ts->r + k];
      any |= tt > 0;
      c[t * ts->r + k] = tt > 0 ? (float)(zt / tt) : 0.0f;
      all += size * zz;
      lost += tt > 0 && zz > 0 ? size * fmax(0, zz - zt * zt / tt) : 0;
    }
  }
  *error = all > 0 ? sqrt(lost / all) : 0;
  return any;
}

/* As the configuration's list, in memory of the caller (esp_mem_free both); NULL: no data yet. */
static esp_status means_of(const esp_adapter *a, esp_mean_gates **list, int *n) {
  const mora_rank *m = a->impl;
  esp_backend *be = a->params->be;
  esp_group **groups;
  int n_groups = esp_model_groups(a->model, &groups), sites = 0;
  int64_t ranks = 0, most = 1;
  esp_status st = ESP_OK;
  *list = NULL, *n = 0;
  if (!m->sums) return ESP_OK;
  for (int g = 0; g < n_groups; g++) {
    const esp_task_group *tg = a->group_state[g];
    for (int i = 0; tg && i < tg->n; i++) {
      const esp_task_site *ts = a->site_state[tg->sites[i]->index];
      sites++, ranks += ts->rank;
      if (tg->sites[i]->out * ts->r > most) most = tg->sites[i]->out * ts->r;
    }
  }
  float *sums = esp_mem_alloc(ESP_MEM_HOST, (size_t)m->size * sizeof *sums);
  float *b = esp_mem_alloc(ESP_MEM_HOST, (size_t)most * sizeof *b);
  esp_mean_gates *out = esp_mem_alloc(ESP_MEM_HOST, (size_t)(sites + 1) * sizeof *out + (size_t)ranks * sizeof(float));
  if (!sums || !b || !out) ESP_GOTO(ESP_ERR_MEMORY);
  be->ops->download(be, sums, m->sums, m->size * (int64_t)sizeof *sums);
  ESP_GOTO(esp_backend_sync(be));
  float *c = (float *)(out + sites + 1);
  bool any = false;
  for (int g = 0; g < n_groups; g++) {
    const esp_task_group *tg = a->group_state[g];
    for (int i = 0; tg && i < tg->n; i++) {
      const esp_site *s = tg->sites[i];
      int64_t rank = ((esp_task_site *)a->site_state[s->index])->rank;
      esp_mean_gates *one = &out[(*n)++];
      *one = (esp_mean_gates){.path = s->path, .n = (int)rank, .values = c};
      any |= mean_of(a, tg, s, sums + m->at[g], c, b, &one->error);
      c += rank;
    }
  }
  if (any) *list = out, out = NULL;
out:
  if (!*list) *n = 0;
  esp_mem_free(sums);
  esp_mem_free(b);
  esp_mem_free(out);
  return st;
}

static int64_t near_low_rank(esp_adapter *a, esp_site *s, float *A, float *B, double *error) {
  const esp_task_ranks *tr = a->impl;
  const esp_task_site *ts = a->site_state[s->index];
  const esp_mean_gates *mean = NULL;
  for (int i = 0; i < a->cfg.n_mean_gates; i++)
    if (strcmp(a->cfg.mean_gates[i].path, s->path) == 0) mean = &a->cfg.mean_gates[i];
  if (!mean || mean->n != ts->rank) {
    esp_fail(ESP_ERR_RECIPE, "type mora_rank: no mean gates of the %lld ranks of '%s': its task was not trained here",
             (long long)ts->rank, s->path);
    return -1;
  }
  if (error) *error = mean->error;
  float *b = B ? esp_mem_alloc(ESP_MEM_HOST, (size_t)(s->out * ts->r) * sizeof *b) : NULL;
  if (B && !b) return -1;
  for (int t = 0; t <= tr->current; t++) {
    if (A) esp_params_get(a->params, ts->a[t], A + t * ts->r * s->in);
    if (!B) continue;
    esp_params_get(a->params, ts->b[t], b);
    for (int64_t o = 0; o < s->out; o++)
      for (int64_t k = 0; k < ts->r; k++) {
        int64_t i = t * ts->r + k;
        B[o * ts->rank + i] = (float)a->weight * mean->values[i] * b[o * ts->r + k];
      }
  }
  esp_mem_free(b);
  return ts->rank;
}

/* ---- checkpoint ---- */

static void state_write(const esp_adapter *a, json_t *j) {
  const mora_rank *m = a->impl;
  esp_backend *be = a->params->be;
  json_t *list = json_array();
  float *sums = esp_mem_alloc(ESP_MEM_HOST, (size_t)(m->size + 1) * sizeof *sums);
  if (m->sums && sums) be->ops->download(be, sums, m->sums, m->size * (int64_t)sizeof *sums);
  for (int64_t i = 0; m->sums && sums && i < m->size; i++) json_array_append_new(list, json_real((double)sums[i]));
  json_object_set_new(j, "gate_sums", list);
  esp_mem_free(sums);
}

static esp_status state_read(esp_adapter *a, const json_t *j, const char *path) {
  const mora_rank *m = a->impl;
  esp_backend *be = a->params->be;
  const json_t *list = json_object_get(j, "gate_sums");
  if ((int64_t)json_array_size(list) != m->size)
    return esp_fail(ESP_ERR_DATA, "%s: key 'gate_sums' has %zu numbers, this run has %lld", path, json_array_size(list),
                    (long long)m->size);
  if (!m->sums) return ESP_OK;
  float *sums = esp_mem_alloc(ESP_MEM_HOST, (size_t)(m->size + 1) * sizeof *sums);
  if (!sums) return ESP_ERR_MEMORY;
  for (int64_t i = 0; i < m->size; i++) sums[i] = (float)json_number_value(json_array_get(list, (size_t)i));
  be->ops->upload(be, m->sums, sums, m->size * (int64_t)sizeof *sums);
  esp_mem_free(sums);
  return ESP_OK;
}

/* ---- configuration ---- */

static json_t *means_json(const esp_mean_gates *list, int n) {
  json_t *all = json_object();
  for (int i = 0; i < n; i++) {
    json_t *values = json_array();
    for (int k = 0; k < list[i].n; k++) json_array_append_new(values, json_real((double)list[i].values[k]));
    json_object_set_new(all, list[i].path, json_pack("{s:o,s:f}", "gates", values, "error", list[i].error));
  }
  return all;
}

static void config_write(const esp_adapter *a, json_t *j) {
  const esp_adapter_cfg *c = &a->cfg;
  esp_mean_gates *list = NULL;
  int n = 0;
  esp_task_ranks_config_write(a, j);
  json_object_set_new(j, "gate_temperature", esp_json_number(c->gate_temperature));
  json_object_set_new(j, "gate_top_k", json_integer((json_int_t)c->gate_top_k));
  json_object_set_new(j, "gate_threshold", esp_json_number(c->gate_threshold));
  bool now = means_of(a, &list, &n) == ESP_OK && list;
  json_t *means = now ? means_json(list, n) : means_json(c->mean_gates, c->n_mean_gates);
  json_object_set_new(j, "mean_gates", means);
  esp_mem_free(list);
}

static esp_status config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  json_t *all = json_object_get(j, "mean_gates"), *one;
  const char *site;
  ESP_TRY(esp_task_ranks_config_read(j, path, arena, c));
  ESP_TRY(esp_json_f64(j, "gate_temperature", path, 1, &c->gate_temperature));
  ESP_TRY(esp_json_i64(j, "gate_top_k", path, 0, &c->gate_top_k));
  ESP_TRY(esp_json_f64(j, "gate_threshold", path, 0, &c->gate_threshold));
  if (!(c->gate_temperature > 0) || c->gate_top_k < 0 || !(c->gate_threshold >= 0))
    return esp_fail(ESP_ERR_DATA,
                    "%s: keys 'gate_temperature', 'gate_top_k', 'gate_threshold' must be above 0, a number "
                    "of ranks, and not negative",
                    path);
  esp_mean_gates *list = esp_arena_alloc(arena, (json_object_size(all) + 1) * sizeof *list);
  if (!list) return ESP_ERR_MEMORY;
  json_object_foreach(all, site, one) {
    const json_t *gates = json_object_get(one, "gates"), *error = json_object_get(one, "error");
    int n = (int)json_array_size(gates);
    float *x = esp_arena_alloc(arena, (size_t)(n + 1) * sizeof *x);
    const char *name = esp_arena_strdup(arena, site);
    if (!x || !name) return ESP_ERR_MEMORY;
    bool numbers = json_is_number(error);
    for (int i = 0; i < n; i++) {
      numbers &= json_is_number(json_array_get(gates, (size_t)i));
      x[i] = (float)json_number_value(json_array_get(gates, (size_t)i));
    }
    if (!numbers) return esp_fail(ESP_ERR_DATA, "%s: mean_gates of '%s' must hold numbers", path, site);
    list[c->n_mean_gates++] = (esp_mean_gates){name, n, x, json_number_value(error)};
  }
  c->mean_gates = list;
  return ESP_OK;
}

static esp_status config_check(const esp_adapter_cfg *c) {
  if (c->rslora) return esp_fail(ESP_ERR_RECIPE, "adapter.rslora: the gates of mora_rank are the scale of its ranks");
  return esp_task_ranks_config_check(c);
}

const esp_adapter_kind esp_kind_mora_rank = {
    .name = "mora_rank",
    .peft_type = "MORA_RANK",
    .summary = "a pool of rank-1 experts gated by their own activation, grown by each task (Little By Little, 2025)",
    .site_kinds = 1u << ESP_SITE_LINEAR,
    .targets = true,
    .open = open,
    .declare = declare,
    .declare_last = esp_task_ranks_declare_last,
    .init = init,
    .loaded = make_sums,
    .pass = esp_task_ranks_pass,
    .tails = esp_task_ranks_tails,
    .output = esp_task_ranks_output,
    .tails_bwd = tails_bwd,
    .input_bwd = esp_task_ranks_input_bwd,
    .wants_output = esp_task_ranks_wants_output,
    .destroy = destroy,
    .step_sums = step_sums,
    .before_step = before_step,
    .task_begin = task_begin,
    .state_write = state_write,
    .state_read = state_read,
    .in_file = esp_task_ranks_in_file,
    .near_low_rank = near_low_rank,
    .config_write = config_write,
    .config_read = config_read,
    .config_check = config_check,
};
