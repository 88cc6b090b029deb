/* vera.c: VeRA (Kopiczko et al. 2024, arXiv:2310.11454) as PEFT's VeraConfig has it: one pair of frozen random matrices
 * for all modules, of which each takes the corner of its own size, and two trained vectors per module,
 * y += lambda_b * (B[:out] (lambda_d * (A[:, :in] drop(x)))).
 *
 * Modules that read one input share u = x A^T [T, r]. What a module adds to it is a small matrix
 * E = diag(lambda_b) B diag(lambda_d) [out, r], made anew in each pass in one buffer for all groups, and a tail of the
 * base product. Backward: with N = B * (dy^T u), d lambda_b = N lambda_d and d lambda_d = N^T lambda_b; du = dy E.
 *
 * A and B are the numbers that torch draws from its generator (MT19937) with the seed projection_key, A first, each
 * uniform in +-sqrt(6 / columns): bit for bit, so that files without them can be exchanged with PEFT.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "adapters/internal.h"
#include "io/json.h"

typedef struct vera_site {
  int64_t r; /* first: esp_adapter_rank */
  int b, d;
} vera_site;

typedef struct vera_group {
  int n;
  esp_site *sites[3];
  esp_tensor u, du;
  bool late_fwd, late_bwd; /* the base product had no room for the tails */
} vera_group;

typedef struct vera_shared {
  int a, b; /* parameters [r, in_max], [out_max, r] */
  int64_t in_max, out_max, rows;
  void *e; /* [rows, r], compute type, backend memory; rows: outputs of the widest group */
  bool made;
} vera_shared;

/* ---- torch's generator ---- */

typedef struct mt19937 {
  uint32_t state[624];
  int at;
} mt19937;

static void mt_seed(mt19937 *g, uint32_t seed) {
  g->state[0] = seed;
  for (uint32_t i = 1; i < 624; i++) g->state[i] = 1812433253u * (g->state[i - 1] ^ (g->state[i - 1] >> 30)) + i;
  g->at = 624;
}

static uint32_t mt_next(mt19937 *g) {
  if (g->at == 624) {
    for (int i = 0; i < 624; i++) {
      uint32_t y = (g->state[i] & 0x80000000u) | (g->state[(i + 1) % 624] & 0x7fffffffu);
      g->state[i] = g->state[(i + 397) % 624] ^ (y >> 1) ^ (y & 1 ? 0x9908b0dfu : 0);
    }
    g->at = 0;
  }
  uint32_t y = g->state[g->at++];
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return y ^ (y >> 18);
}

/* torch.nn.init's kaiming bound in double, tensor.uniform_ in float from 24 bits per draw, with the one rounding of a
 * fused multiply-add that torch's x86 builds (2.x) have. */
static void kaiming_uniform(mt19937 *g, float *x, int64_t rows, int64_t cols) {
  double bound = sqrt(3.0) * (sqrt(2.0) / sqrt((double)cols));
  float from = (float)-bound, to = (float)bound;
  for (int64_t i = 0; i < rows * cols; i++) x[i] = fmaf((float)(mt_next(g) & 0xffffffu) * 0x1p-24f, to - from, from);
}

/* ---- parameters ---- */

static esp_status declare_shared(esp_adapter *a) {
  esp_site **sites;
  esp_group **groups;
  int n = esp_model_sites(a->model, &sites), n_groups = esp_model_groups(a->model, &groups);
  vera_shared *v = esp_arena_alloc(a->arena, sizeof *v);
  if (!v) return ESP_ERR_MEMORY;
  a->impl = v;
  for (int i = 0; i < n; i++) {
    if (!a->targeted[i]) continue;
    if (sites[i]->in > v->in_max) v->in_max = sites[i]->in;
    if (sites[i]->out > v->out_max) v->out_max = sites[i]->out;
  }
  for (int i = 0; i < n_groups; i++) {
    bool hit = false;
    for (int k = 0; k < groups[i]->n_sites; k++) hit |= a->targeted[groups[i]->sites[k]->index];
    if (hit && groups[i]->out > v->rows) v->rows = groups[i]->out;
  }
  v->a = esp_params_add(a->params, "base_model.vera_A", 2, (int64_t[]){a->cfg.r, v->in_max}, true);
  v->b = esp_params_add(a->params, "base_model.vera_B", 2, (int64_t[]){v->out_max, a->cfg.r}, true);
  if (v->a < 0 || v->b < 0) return ESP_ERR_MEMORY;
  a->params->list[v->a].frozen = a->params->list[v->b].frozen = true;
  a->params->list[v->a].local = a->params->list[v->b].local = !a->cfg.save_projection;
  esp_backend *be = a->params->be;
  int64_t unit = (int64_t)esp_dtype_size(esp_model_compute(a->model));
  v->e = be->ops->alloc(be, ESP_MEM_WORKSPACE, v->rows * a->cfg.r * unit);
  return v->e ? ESP_OK : esp_backend_why_null(be);
}

static esp_status vera_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  if (!a->impl) ESP_TRY(declare_shared(a));
  vera_group *vg = esp_arena_alloc(a->arena, sizeof *vg);
  if (!vg) return ESP_ERR_MEMORY;
  for (int i = 0; i < g->n_sites; i++) {
    if (!hit[i]) continue;
    esp_site *s = g->sites[i];
    vera_site *vs = esp_arena_alloc(a->arena, sizeof *vs);
    if (!vs) return ESP_ERR_MEMORY;
    char name[512];
    vs->r = a->cfg.r;
    snprintf(name, sizeof name, ESP_PEFT_PREFIX "%s.vera_lambda_b", s->path);
    vs->b = esp_params_add(a->params, name, 1, &s->out, true);
    snprintf(name, sizeof name, ESP_PEFT_PREFIX "%s.vera_lambda_d", s->path);
    vs->d = esp_params_add(a->params, name, 1, &vs->r, true);
    if (vs->b < 0 || vs->d < 0) return ESP_ERR_MEMORY;
    a->site_state[s->index] = vs;
    vg->sites[vg->n++] = s;
  }
  a->group_state[g->index] = vg;
  return ESP_OK;
}

static esp_status make_projections(esp_adapter *a, vera_shared *v) {
  int64_t na = a->cfg.r * v->in_max, nb = v->out_max * a->cfg.r;
  float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)(na + nb) * sizeof *x);
  if (!x) return ESP_ERR_MEMORY;
  mt19937 g;
  mt_seed(&g, (uint32_t)a->cfg.projection_key);
  kaiming_uniform(&g, x, a->cfg.r, v->in_max);
  kaiming_uniform(&g, x + na, v->out_max, a->cfg.r);
  esp_params_set(a->params, v->a, x);
  esp_params_set(a->params, v->b, x + na);
  esp_mem_free(x);
  v->made = true;
  return ESP_OK;
}

/* Also before a file's values: it may not hold the projections. lambda_b is zero, which the store is already. */
static esp_status vera_init(esp_adapter *a, esp_site *s) {
  const vera_site *vs = a->site_state[s->index];
  vera_shared *v = a->impl;
  if (!v->made) ESP_TRY(make_projections(a, v));
  float *d = esp_mem_alloc(ESP_MEM_HOST, (size_t)vs->r * sizeof *d);
  if (!d) return ESP_ERR_MEMORY;
  for (int64_t i = 0; i < vs->r; i++) d[i] = a->cfg.d_initial > 0 ? (float)a->cfg.d_initial : 0.1f;
  esp_params_set(a->params, vs->d, d);
  esp_mem_free(d);
  return ESP_OK;
}

/* ---- the step ---- */

static esp_tensor corner_a(const esp_adapter *a, const esp_group *g) { /* [r, in] */
  esp_tensor all = esp_param_shadow(a->params, ((const vera_shared *)a->impl)->a);
  return esp_tensor_cols_view(&all, 0, g->in);
}

static esp_tensor corner_b(const esp_adapter *a, const esp_site *s) { /* [out, r] */
  esp_tensor all = esp_param_shadow(a->params, ((const vera_shared *)a->impl)->b);
  return esp_tensor_rows_view(&all, 0, s->out);
}

static esp_tensor lambda(const esp_adapter *a, int index, bool column) { /* the fp32 master */
  float *x = esp_param_master(a->params, index).data;
  int64_t n = a->params->list[index].numel;
  return column ? esp_tensor_2d(x, ESP_F32, n, 1) : esp_tensor_1d(x, ESP_F32, n);
}

/* E of the group, at the rows of its outputs; rows of sites that are not targeted are not written. */
static esp_tensor make_e(esp_adapter *a, esp_run *run, const esp_group *g, const vera_group *vg) {
  const esp_backend_ops *ops = run->be->ops;
  esp_tensor e = esp_tensor_2d(((vera_shared *)a->impl)->e, run->compute, g->out, a->cfg.r);
  for (int i = 0; i < vg->n; i++) {
    const esp_site *s = vg->sites[i];
    const vera_site *vs = a->site_state[s->index];
    esp_tensor ei = esp_tensor_rows_view(&e, s->col0, s->out);
    ops->mul_rows(run->be, ei, corner_b(a, s), lambda(a, vs->b, false), 0.0f);
    ops->mul_cols(run->be, ei, ei, lambda(a, vs->d, false));
    if (a->weight != 1.0) ops->axpby(run->be, ei, (float)a->weight, ei, 0.0f);
  }
  return e;
}

/* All sites of the group: their columns are one range. */
static bool together(const esp_group *g, const vera_group *vg) {
  return vg->n == g->n_sites;
}

static int parts(const esp_group *g, const vera_group *vg, int i, int64_t *at, int64_t *n) {
  *at = together(g, vg) ? 0 : vg->sites[i]->col0;
  *n = together(g, vg) ? g->out : vg->sites[i]->out;
  return together(g, vg) ? 1 : vg->n;
}

static int vera_tails(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max, void **slot) {
  vera_group *vg = a->group_state[g->index];
  if (!vg) return 0;
  int64_t at, n;
  vg->u = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), a->cfg.r);
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor xd = esp_dropped(a, run, g, x);
  run->be->ops->matmul(run->be, vg->u, xd, false, corner_a(a, g), true, 1.0f, 0.0f);
  esp_stack_release(run->stack, mark);
  esp_tensor e = make_e(a, run, g, vg);
  int count = parts(g, vg, 0, &at, &n);
  vg->late_fwd = max < count;
  for (int i = 0; i < count && !vg->late_fwd; i++) {
    parts(g, vg, i, &at, &n);
    tails[i] = (esp_tail){at, vg->u, esp_tensor_rows_view(&e, at, n)};
  }
  return vg->late_fwd ? 0 : count;
}

static void vera_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  const vera_group *vg = a->group_state[g->index];
  if (!vg || !vg->late_fwd) return;
  int64_t at, n;
  esp_tensor e = make_e(a, run, g, vg);
  for (int i = 0; i < parts(g, vg, 0, &at, &n); i++) {
    parts(g, vg, i, &at, &n);
    run->be->ops->matmul(run->be, esp_tensor_cols_view(&y, at, n), vg->u, false, esp_tensor_rows_view(&e, at, n), true,
                         1.0f, 1.0f);
  }
}

static void gradients(esp_adapter *a, esp_run *run, esp_group *g, vera_group *vg, esp_tensor dy) {
  const esp_backend_ops *ops = run->be->ops;
  for (int i = 0; i < vg->n; i++) {
    const esp_site *s = vg->sites[i];
    const vera_site *vs = a->site_state[s->index];
    int64_t mark = esp_stack_mark(run->stack);
    esp_tensor m = esp_stack_tensor(run->stack, ESP_F32, s->out, vs->r);
    esp_tensor gb = esp_tensor_2d(esp_param_grad(a->params, vs->b).data, ESP_F32, s->out, 1);
    esp_tensor gd = esp_tensor_2d(esp_param_grad(a->params, vs->d).data, ESP_F32, vs->r, 1);
    ops->matmul(run->be, m, esp_tensor_cols_view(&dy, s->col0, s->out), true, vg->u, false, (float)a->weight, 0.0f);
    ops->mul(run->be, m, m, corner_b(a, s), 0.0f);
    ops->matmul(run->be, gb, m, false, lambda(a, vs->d, true), false, 1.0f, 1.0f);
    ops->matmul(run->be, gd, m, true, lambda(a, vs->b, true), false, 1.0f, 1.0f);
    esp_stack_release(run->stack, mark);
  }
}

static int vera_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                          int max, void **slot) {
  vera_group *vg = a->group_state[g->index];
  if (!vg) return 0;
  int64_t at, n;
  vg->du = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), a->cfg.r);
  esp_tensor e = make_e(a, run, g, vg);
  for (int i = 0; i < parts(g, vg, 0, &at, &n); i++) {
    parts(g, vg, i, &at, &n);
    run->be->ops->matmul(run->be, vg->du, esp_tensor_cols_view(&dy, at, n), false, esp_tensor_rows_view(&e, at, n),
                         false, 1.0f, i ? 1.0f : 0.0f);
  }
  if (a->trainable) gradients(a, run, g, vg, dy);
  vg->late_bwd = max < 1 || esp_drops(a, run); /* the mask stands between du A and dx */
  if (vg->late_bwd) return 0;
  tails[0] = (esp_tail){0, vg->du, corner_a(a, g)};
  return 1;
}

static void vera_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  const vera_group *vg = a->group_state[g->index];
  if (!vg || !vg->late_bwd || !dx.data) return;
  const esp_backend_ops *ops = run->be->ops;
  int64_t mark = esp_stack_mark(run->stack);
  if (!esp_drops(a, run))
    ops->matmul(run->be, dx, vg->du, false, corner_a(a, g), false, 1.0f, 1.0f);
  else {
    esp_tensor d = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&dx), esp_tensor_cols(&dx));
    ops->matmul(run->be, d, vg->du, false, corner_a(a, g), false, 1.0f, 0.0f);
    esp_dropout(a, run, g, dx, d, 1.0f);
  }
  esp_stack_release(run->stack, mark);
}

static bool vera_wants_output(const esp_adapter *a) {
  return false; /* only where tails do not fit, which the caller knows */
}

static void vera_destroy(esp_adapter *a) {
  vera_shared *v = a->impl;
  if (v && v->e) a->params->be->ops->free(a->params->be, v->e);
}

/* ---- merge and export ---- */

static int64_t vera_low_rank(esp_adapter *a, esp_site *s, float *A, float *B) {
  const vera_site *vs = a->site_state[s->index];
  const vera_shared *v = a->impl;
  int64_t r = vs->r;
  if (!A && !B) return r;
  float *pa = esp_param_host(a, v->a), *pb = esp_param_host(a, v->b);
  float *b = esp_param_host(a, vs->b), *d = esp_param_host(a, vs->d);
  bool ok = pa && pb && b && d;
  for (int64_t k = 0; ok && A && k < r; k++)
    for (int64_t j = 0; j < s->in; j++) A[k * s->in + j] = d[k] * pa[k * v->in_max + j];
  for (int64_t i = 0; ok && B && i < s->out; i++)
    for (int64_t k = 0; k < r; k++) B[i * r + k] = (float)a->weight * b[i] * pb[i * r + k];
  esp_mem_free(pa);
  esp_mem_free(pb);
  esp_mem_free(b);
  esp_mem_free(d);
  return ok ? r : -1;
}

static esp_status vera_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  int64_t r = a->cfg.r;
  float *A = esp_mem_alloc(ESP_MEM_HOST, (size_t)((s->in + s->out) * r) * sizeof *A), *B = A + r * s->in;
  bool ok = A && vera_low_rank(a, s, A, B) == r;
  if (ok) esp_lowrank_add(w, n, s->in, A, B + r0 * r, r, 1.0f);
  esp_mem_free(A);
  return ok ? ESP_OK : ESP_ERR_MEMORY;
}

/* ---- configuration ---- */

static esp_status vera_check(const esp_adapter_cfg *c) {
  if (c->n_rank_pattern || c->n_alpha_pattern)
    return esp_fail(ESP_ERR_RECIPE, "adapter.%s: vera's projections are shared: one rank for all and no alpha",
                    c->n_rank_pattern ? "rank_pattern" : "alpha_pattern");
  if (c->projection_key < 0 || c->projection_key > UINT32_MAX)
    return esp_fail(ESP_ERR_RECIPE, "adapter.projection_key: must be in [0, 2^32), is %lld",
                    (long long)c->projection_key);
  return esp_config_refuse(c, "vera", ESP_CFG_TOKENS);
}

static void vera_config_write(const esp_adapter *a, json_t *j) {
  const esp_adapter_cfg *c = &a->cfg;
  json_object_del(j, "trainable_token_indices");
  esp_config_exact_targets(a, j, ESP_CFG_EXCLUDE);
  if (strcmp(c->bias, "lora_only") == 0) json_object_set_new(j, "bias", json_string("vera_only"));
  json_object_set_new(j, "r", json_integer((json_int_t)c->r));
  json_object_set_new(j, "projection_prng_key", json_integer((json_int_t)c->projection_key));
  json_object_set_new(j, "save_projection", json_boolean(c->save_projection));
  json_object_set_new(j, "vera_dropout", json_real(c->dropout));
  json_object_set_new(j, "d_initial", json_real(c->d_initial > 0 ? c->d_initial : 0.1));
  json_object_set_new(j, "fan_in_fan_out", json_boolean(esp_model_describe(a->model)->transposed));
  json_object_set_new(j, "init_weights", json_true());
}

static esp_status vera_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  int save = 1;
  c->r = 256;
  c->alpha = 1;
  c->d_initial = 0.1;
  ESP_TRY(esp_json_i64(j, "r", path, 0, &c->r));
  ESP_TRY(esp_json_i64(j, "projection_prng_key", path, 0, &c->projection_key));
  ESP_TRY(esp_json_bool(j, "save_projection", path, 0, &save));
  ESP_TRY(esp_json_f64(j, "vera_dropout", path, 0, &c->dropout));
  ESP_TRY(esp_json_f64(j, "d_initial", path, 0, &c->d_initial));
  c->save_projection = save != 0;
  if (strcmp(c->bias, "vera_only") == 0) c->bias = "lora_only";
  return ESP_OK;
}

const esp_adapter_kind esp_kind_vera = {
    .name = "vera",
    .peft_type = "VERA",
    .summary = "shared random projections, two learned vectors per module (Kopiczko et al. 2024, arXiv:2310.11454)",
    .site_kinds = 1u << ESP_SITE_LINEAR,
    .mergeable = true,
    .targets = true,
    .reads_base = true,
    .declare = vera_declare,
    .init = vera_init,
    .tails = vera_tails,
    .output = vera_output,
    .tails_bwd = vera_tails_bwd,
    .input_bwd = vera_input_bwd,
    .wants_output = vera_wants_output,
    .destroy = vera_destroy,
    .config_write = vera_config_write,
    .config_read = vera_config_read,
    .config_check = vera_check,
    .materialise = vera_materialise,
    .low_rank = vera_low_rank,
};
