/* sparse.c: fixed sparse masks: a small set of entries of the targeted matrices is trained, the same set throughout.
 *
 *   fish  the entries of largest Fisher information over all matrices together, F = mean over examples of the squared
 *         gradient of log p (FISH mask, Sung et al. 2021, arXiv:2111.09839), 0.5% of them
 *   spu   in each matrix the entries of largest |accumulated gradient| (selective parameter update, Zhang et al. 2023,
 *         arXiv:2308.12462), 10% of the first matrices of the MLP; the loss is that of the task, where the published
 *         code scores by the norm of the outputs
 *
 * What is trained is the change of the chosen entries, a sparse matrix D beside the frozen W: y = W x + D x, with D as
 * compressed rows and its transpose sharing one list of values. Nothing is masked, so nothing leaks: weight decay acts
 * on the change alone, and gradients and optimizer state have the size of the mask. Backward: dvalue = sum over tokens
 * of dy[row] x[column], dx += D^T dy. A backend may take D into the product with W instead of making one of its own
 * (linear_adds): W + D is then rounded to the compute type, as the merged weight is. The mask is chosen by one pass
 * over a few micro-batches before training; `random` is the control of the paper. The file holds the values, the
 * entries of each row, and their columns. */
#include <stdio.h>
#include <string.h>

#include "adapters/sparse.h"
#include "core/rng.h"
#include "io/json.h"

typedef struct sparse_group {
  esp_tensor dy; /* of the backward pass in progress: dx is made behind the base product */
  bool added;    /* the base product in progress has the changes in it */
} sparse_group;

static bool random_mask(const esp_adapter *a) {
  return strcmp(a->cfg.sparse_mask, "random") == 0;
}

static esp_status sparse_check(const esp_adapter_cfg *c) {
  if (c->dropout > 0) return esp_fail(ESP_ERR_RECIPE, "adapter.dropout: %s has none", c->type);
  if (strcmp(c->init, "default"))
    return esp_fail(ESP_ERR_RECIPE, "adapter.init: '%s' is not for %s, which starts at zero", c->init, c->type);
  if (!(c->sparse_density >= 0 && c->sparse_density <= 0.5))
    return esp_fail(ESP_ERR_RECIPE, "adapter.sparse_density: must be above 0 and at most 0.5, is %g",
                    c->sparse_density);
  if (c->sparse_mask && strcmp(c->sparse_mask, "data") && strcmp(c->sparse_mask, "random"))
    return esp_fail(ESP_ERR_RECIPE, "adapter.sparse_mask: '%s' is not one of data, random", c->sparse_mask);
  return ESP_OK;
}

static esp_status allocate(esp_adapter *a, sparse_mask *m) {
  esp_backend *be = a->params->be;
  int64_t word = (int64_t)sizeof(int32_t);
  m->row_count = esp_mem_alloc(ESP_MEM_PARAMS, (size_t)(m->rows * word));
  m->column = esp_mem_alloc(ESP_MEM_PARAMS, (size_t)(m->total * word));
  m->start = be->ops->alloc(be, ESP_MEM_PARAMS, (m->rows + m->n_sites) * word);
  m->t_start = be->ops->alloc(be, ESP_MEM_PARAMS, (m->cols + m->n_sites) * word);
  m->index = be->ops->alloc(be, ESP_MEM_PARAMS, m->total * word);
  m->t_index = be->ops->alloc(be, ESP_MEM_PARAMS, m->total * word);
  m->t_order = be->ops->alloc(be, ESP_MEM_PARAMS, m->total * word);
  bool all = m->row_count && m->column && m->start && m->t_start && m->index && m->t_index && m->t_order;
  return all ? ESP_OK : esp_backend_why_null(be);
}

/* One parameter for all matrices: how many entries each gets is known when the mask is. */
static esp_status declare_all(esp_adapter *a) {
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites);
  esp_adapter_cfg *c = &a->cfg;
  if (c->sparse_density == 0) c->sparse_density = a->kind == &esp_kind_fish ? 0.005 : 0.1;
  if (!c->sparse_mask) c->sparse_mask = "data";
  if (c->sparse_batches < 1) c->sparse_batches = 8;
  sparse_mask *m = esp_arena_alloc(a->arena, sizeof *m);
  if (!m || !(m->sites = esp_arena_alloc(a->arena, (size_t)n * sizeof *m->sites))) return ESP_ERR_MEMORY;
  a->impl = m;
  for (int i = 0; i < n; i++) {
    if (!a->targeted[i]) continue;
    sparse_site *ss = a->site_state[i] = esp_arena_alloc(a->arena, sizeof *ss);
    if (!ss) return ESP_ERR_MEMORY;
    m->sites[m->n_sites++] = sites[i];
    ss->row0 = m->rows;
    ss->col0 = m->cols;
    m->rows += sites[i]->out;
    m->cols += sites[i]->in;
  }
  m->total = esp_sparse_counts(a, m);
  if (m->total > INT32_MAX)
    return esp_fail(ESP_ERR_RECIPE, "adapter.sparse_density: %g gives %lld entries, at most 2147483647",
                    c->sparse_density, (long long)m->total);
  m->param = esp_params_add(a->params, ESP_PEFT_PREFIX "sparse_values", 2, (int64_t[]){1, m->total}, true);
  return m->param < 0 ? ESP_ERR_MEMORY : allocate(a, m);
}

static esp_status sparse_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  if (!a->impl) ESP_TRY(declare_all(a));
  a->group_state[g->index] = esp_arena_alloc(a->arena, sizeof(sparse_group));
  return a->group_state[g->index] ? ESP_OK : ESP_ERR_MEMORY;
}

/* Scores that make every set of entries equally likely. */
static esp_status random_score(esp_adapter *a, esp_site *s, float *out) {
  uint64_t stream = esp_rng_stream_name(ESP_RNG_INIT, s->path);
  for (int64_t i = 0; i < s->out * s->in; i++) out[i] = esp_rng_uniform(a->cfg.seed, stream, (uint64_t)i);
  return ESP_OK;
}

static esp_status sparse_init(esp_adapter *a, esp_site *s) {
  sparse_mask *m = a->impl;
  return random_mask(a) && s == m->sites[0] ? esp_sparse_choose(a, m, random_score) : ESP_OK;
}

/* ---- the pass before training ---- */

static int64_t sparse_wants_data(const esp_adapter *a, bool *gradients) {
  *gradients = true;
  return random_mask(a) ? 0 : a->cfg.sparse_batches;
}

static void *scratch(esp_adapter *a, int64_t elements) {
  esp_backend *be = a->params->be;
  void *p = be->ops->alloc(be, ESP_MEM_WORKSPACE, elements * (int64_t)sizeof(float));
  if (!p) be->sticky = esp_backend_why_null(be);
  return p;
}

static void see_site(esp_adapter *a, esp_run *run, esp_site *s, esp_tensor x, esp_tensor dy) {
  const esp_backend_ops *ops = run->be->ops;
  sparse_mask *m = a->impl;
  sparse_site *ss = a->site_state[s->index];
  if (!ss->score && !(ss->score = scratch(a, s->out * s->in))) return;
  esp_tensor score = esp_tensor_2d(ss->score, ESP_F32, s->out, s->in);
  if (a->kind == &esp_kind_spu) {
    ops->matmul(run->be, score, dy, true, x, false, 1.0f, 1.0f);
    return;
  }
  if (!m->square) {
    int64_t largest = 0;
    for (int i = 0; i < m->n_sites; i++) {
      int64_t size = m->sites[i]->out * m->sites[i]->in;
      largest = size > largest ? size : largest;
    }
    if (!(m->square = scratch(a, largest))) return;
  }
  esp_tensor g = esp_tensor_2d(m->square, ESP_F32, s->out, s->in);
  for (int i = 0; i < run->batch->n_seqs; i++) { /* each sequence is one example */
    int64_t t0 = run->batch->cu_seqlens[i], n = run->batch->cu_seqlens[i + 1] - t0;
    bool any = false;
    for (int64_t t = t0; t < t0 + n && !any; t++) any = run->batch->weights[t] != 0.0f;
    if (!any) continue;
    ops->matmul(run->be, g, esp_tensor_rows_view(&dy, t0, n), true, esp_tensor_rows_view(&x, t0, n), false, 1.0f, 0.0f);
    ops->mul(run->be, score, g, g, 1.0f);
  }
}

static void sparse_see(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy) {
  for (int i = 0; i < g->n_sites; i++)
    if (a->targeted[g->sites[i]->index])
      see_site(a, run, g->sites[i], x, esp_tensor_cols_view(&dy, g->sites[i]->col0, g->sites[i]->out));
}

static esp_status seen_score(esp_adapter *a, esp_site *s, float *out) {
  const sparse_site *ss = a->site_state[s->index];
  int64_t n = s->out * s->in;
  memset(out, 0, (size_t)n * sizeof *out);
  if (ss->score) a->params->be->ops->download(a->params->be, out, ss->score, n * (int64_t)sizeof *out);
  for (int64_t i = 0; i < n; i++) out[i] = out[i] < 0 ? -out[i] : out[i];
  return a->params->be->sticky;
}

static void drop_scores(esp_adapter *a, sparse_mask *m) {
  esp_backend *be = a->params->be;
  for (int i = 0; i < m->n_sites; i++) {
    sparse_site *ss = a->site_state[m->sites[i]->index];
    if (ss && ss->score) be->ops->free(be, ss->score);
    if (ss) ss->score = NULL;
  }
  if (m->square) be->ops->free(be, m->square);
  m->square = NULL;
}

static esp_status sparse_seen(esp_adapter *a) {
  sparse_mask *m = a->impl;
  esp_status st = esp_sparse_choose(a, m, seen_score);
  drop_scores(a, m);
  return st;
}

/* ---- the step ---- */

/* Before a mask is chosen there is no change. The counting backend knows the total only: even shares stand for it. */
static bool idle(const esp_adapter *a) {
  const sparse_mask *m = a->impl;
  return !m->chosen && !esp_backend_counts(a->params->be);
}

/* The values of a site times the adapter's weight, which the products do not take. */
static const float *values_of(const esp_adapter *a, esp_run *run, const sparse_site *ss) {
  const sparse_mask *m = a->impl;
  float *values = (float *)esp_param_master(a->params, m->param).data + ss->k0;
  if (a->weight == 1.0) return values;
  float *scaled = esp_stack_push(run->stack, ss->n * (int64_t)sizeof(float));
  run->be->ops->axpby(run->be, esp_tensor_1d(scaled, ESP_F32, ss->n), (float)a->weight,
                      esp_tensor_1d(values, ESP_F32, ss->n), 0.0f);
  return scaled;
}

static esp_csr rows_of(const sparse_mask *m, const esp_site *s, const sparse_site *ss, const float *values, int at) {
  return (esp_csr){s->out, ss->n, m->start + ss->row0 + at, m->index + ss->k0, NULL, values};
}

static int place(const sparse_mask *m, const esp_site *s) {
  int at = 0;
  while (m->sites[at] != s) at++;
  return at;
}

/* Where the backend takes it, D is added to W while the base product is made, for the price of that alone; all sites of
 * the group or none. */
static int sparse_added(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, const esp_wview *w, esp_added *list,
                        int max) {
  sparse_group *sg = a->group_state[g->index];
  int n = 0;
  if (!sg || idle(a) || a->weight != 1.0) return 0;
  for (int i = 0; i < g->n_sites; i++) {
    const esp_site *s = g->sites[i];
    const sparse_site *ss = a->targeted[s->index] ? a->site_state[s->index] : NULL;
    if (!ss || ss->n == 0) continue;
    esp_csr d = rows_of(a->impl, s, ss, values_of(a, run, ss), place(a->impl, s));
    if (n == max || !run->be->ops->linear_adds(run->be, x, w, &d)) return 0;
    list[n++] = (esp_added){s->col0, d};
  }
  sg->added = n > 0;
  return n;
}

static bool was_added(sparse_group *sg) {
  bool added = sg->added;
  sg->added = false;
  return added;
}

static void sparse_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  sparse_group *sg = a->group_state[g->index];
  if (!sg || idle(a) || was_added(sg)) return;
  int64_t mark = esp_stack_mark(run->stack);
  for (int i = 0; i < g->n_sites; i++) {
    const esp_site *s = g->sites[i];
    const sparse_site *ss = a->targeted[s->index] ? a->site_state[s->index] : NULL;
    if (!ss || ss->n == 0) continue;
    esp_csr d = rows_of(a->impl, s, ss, values_of(a, run, ss), place(a->impl, s));
    run->be->ops->sparse_matmul(run->be, esp_tensor_cols_view(&y, s->col0, s->out), x, &d);
  }
  esp_stack_release(run->stack, mark);
}

static int sparse_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                            int max, void **slot) {
  sparse_group *sg = a->group_state[g->index];
  sparse_mask *m = a->impl;
  const esp_backend_ops *ops = run->be->ops;
  if (sg && a->trainable && idle(a) && run->be->sticky == ESP_OK)
    run->be->sticky = esp_fail(ESP_ERR_RECIPE, "adapter.sparse_mask: data: the pass over data was not made; training "
                                               "through a session needs random");
  if (!sg || idle(a)) return 0;
  sg->dy = dy;
  for (int i = 0; i < g->n_sites && a->trainable; i++) {
    const esp_site *s = g->sites[i];
    const sparse_site *ss = a->targeted[s->index] ? a->site_state[s->index] : NULL;
    if (!ss || ss->n == 0) continue;
    int64_t mark = esp_stack_mark(run->stack);
    float *grad = (float *)esp_param_grad(a->params, m->param).data + ss->k0, *into = grad;
    if (a->weight != 1.0) {
      into = esp_stack_push(run->stack, ss->n * (int64_t)sizeof(float));
      ops->zero(run->be, into, ss->n * (int64_t)sizeof(float));
    }
    esp_csr d = rows_of(m, s, ss, NULL, place(m, s));
    ops->sparse_grad(run->be, into, esp_tensor_cols_view(&dy, s->col0, s->out), x, &d);
    if (into != grad)
      ops->axpby(run->be, esp_tensor_1d(grad, ESP_F32, ss->n), (float)a->weight, esp_tensor_1d(into, ESP_F32, ss->n),
                 1.0f);
    esp_stack_release(run->stack, mark);
  }
  return 0;
}

static void sparse_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  sparse_group *sg = a->group_state[g->index];
  const sparse_mask *m = a->impl;
  if (!sg || !dx.data || idle(a) || was_added(sg)) return;
  int64_t mark = esp_stack_mark(run->stack);
  for (int i = 0; i < g->n_sites; i++) {
    const esp_site *s = g->sites[i];
    const sparse_site *ss = a->targeted[s->index] ? a->site_state[s->index] : NULL;
    if (!ss || ss->n == 0) continue;
    esp_csr t = {s->in,
                 ss->n,
                 m->t_start + ss->col0 + place(m, s),
                 m->t_index + ss->k0,
                 m->t_order + ss->k0,
                 values_of(a, run, ss)};
    run->be->ops->sparse_matmul(run->be, dx, esp_tensor_cols_view(&sg->dy, s->col0, s->out), &t);
  }
  esp_stack_release(run->stack, mark);
}

/* ---- files and merge ---- */

static esp_status sparse_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  const sparse_mask *m = a->impl;
  const sparse_site *ss = a->site_state[s->index];
  if (!m->chosen) return ESP_OK;
  float *values = esp_param_host(a, m->param);
  if (!values) return ESP_ERR_MEMORY;
  int64_t k = ss->k0;
  for (int64_t o = 0; o < r0; o++) k += m->row_count[ss->row0 + o];
  for (int64_t o = 0; o < n; o++)
    for (int32_t e = 0; e < m->row_count[ss->row0 + r0 + o]; e++, k++)
      w[o * s->in + m->column[k]] += (float)a->weight * values[k];
  esp_mem_free(values);
  return ESP_OK;
}

static bool sparse_ints(const esp_adapter *a, int i, esp_adapter_ints *out) {
  const sparse_mask *m = a->impl;
  if (i == 0) *out = (esp_adapter_ints){ESP_PEFT_PREFIX "sparse_rows", m->rows, m->row_count};
  if (i == 1) *out = (esp_adapter_ints){ESP_PEFT_PREFIX "sparse_columns", m->total, m->column};
  return i < 2;
}

/* The lists come from a file: every number is checked before anything is read by it. */
static esp_status sparse_loaded(esp_adapter *a) {
  sparse_mask *m = a->impl;
  int64_t at = 0;
  for (int i = 0; i < m->n_sites; i++) {
    const esp_site *s = m->sites[i];
    const sparse_site *ss = a->site_state[s->index];
    for (int64_t o = 0; o < s->out; o++) {
      int64_t n = m->row_count[ss->row0 + o];
      if (n < 0 || n > m->total - at)
        return esp_fail(ESP_ERR_DATA, "'sparse_rows': %lld entries in row %lld of %s", (long long)n, (long long)o,
                        s->path);
      for (int64_t k = at; k < at + n; k++)
        if (m->column[k] < 0 || m->column[k] >= s->in || (k > at && m->column[k] <= m->column[k - 1]))
          return esp_fail(ESP_ERR_DATA, "'sparse_columns': column %d in row %lld of %s", m->column[k], (long long)o,
                          s->path);
      at += n;
    }
  }
  if (at != m->total)
    return esp_fail(ESP_ERR_DATA, "'sparse_rows' has %lld entries, 'sparse_columns' %lld", (long long)at,
                    (long long)m->total);
  return esp_sparse_build(a, m);
}

static esp_status sparse_savable(const esp_adapter *a) {
  const sparse_mask *m = a->impl;
  if (m->chosen) return ESP_OK;
  return esp_fail(ESP_ERR_DATA, "adapter '%s': its mask was never chosen (a pass over data comes first): not saved",
                  a->name);
}

static void sparse_config_write(const esp_adapter *a, json_t *j) {
  json_object_set_new(j, "sparse_density", json_real(a->cfg.sparse_density));
  json_object_set_new(j, "sparse_mask", json_string(a->cfg.sparse_mask));
  json_object_set_new(j, "sparse_batches", json_integer(a->cfg.sparse_batches));
}

static esp_status sparse_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  const char *mask = NULL;
  c->r = 1; /* has no meaning here */
  ESP_TRY(esp_json_f64(j, "sparse_density", path, 1, &c->sparse_density));
  ESP_TRY(esp_json_i64(j, "sparse_batches", path, 1, &c->sparse_batches));
  ESP_TRY(esp_json_str(j, "sparse_mask", path, 1, &mask));
  c->sparse_mask = esp_arena_strdup(arena, mask);
  return c->sparse_mask ? ESP_OK : ESP_ERR_MEMORY;
}

static void sparse_destroy(esp_adapter *a) {
  sparse_mask *m = a->impl;
  if (!m) return;
  esp_backend *be = a->params->be;
  drop_scores(a, m);
  int32_t *const held[] = {m->start, m->t_start, m->index, m->t_index, m->t_order};
  for (size_t i = 0; i < sizeof held / sizeof *held; i++)
    if (held[i]) be->ops->free(be, held[i]);
  esp_mem_free(m->row_count);
  esp_mem_free(m->column);
}

#define SPARSE                                                                                                         \
  .site_kinds = 1u << ESP_SITE_LINEAR, .mergeable = true, .targets = true, .declare = sparse_declare,                  \
  .init = sparse_init, .added = sparse_added, .output = sparse_output, .tails_bwd = sparse_tails_bwd,                  \
  .input_bwd = sparse_input_bwd, .destroy = sparse_destroy, .wants_data = sparse_wants_data, .see = sparse_see,        \
  .seen = sparse_seen, .ints = sparse_ints, .loaded = sparse_loaded, .savable = sparse_savable,                        \
  .materialise = sparse_materialise, .config_check = sparse_check, .config_write = sparse_config_write,                \
  .config_read = sparse_config_read

const esp_adapter_kind esp_kind_fish = {
    .name = "fish",
    .peft_type = "FISH",
    .summary = "the entries of largest Fisher information (FISH mask, Sung et al. 2021, arXiv:2111.09839)",
    SPARSE,
};

const esp_adapter_kind esp_kind_spu = {
    .name = "spu",
    .peft_type = "SPU",
    .summary = "in each matrix the entries of largest gradient (SPU, Zhang et al. 2023, arXiv:2308.12462)",
    SPARSE,
};
