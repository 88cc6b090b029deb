/* hra.c: Householder reflection adaptation (Yuan et al. 2024, arXiv:2405.17484; PEFT's HRA): W' = W H_0 H_1 .. H_{r-1},
 * H_i = I - 2 u_i u_i^T / |u_i|^2. Neither W' nor the product of reflections is built: in compact WY form
 *   H_0 .. H_{r-1} = I - U N U^T,   N^-1 = strictly upper part of U^T U + half its diagonal        (Joffrain et al.
 * 2006) so that y = W x + b - (W U) N U^T x is a low-rank change whose B = W U comes from the frozen product on the r
 * columns of U, once per pass and not per token. With apply_gs (Gram-Schmidt before the reflections, all at once) W' =
 * W (I - 2 Q Q^T) and Q Q^T = U (U^T U)^-1 U^T: the same with N^-1 = U^T U / 2. P = x U [T, r];  V = P N^T;  y += V
 * B^T, B = -W U. Backward: dV = dy B; dP = dV N; dN = dV^T P; dN^-1 = -N^T dN N^T, which the mask above carries to U^T
 * U; dU = x^T dP + U (dG + dG^T) - W^T (dy^T V).
 *
 * Columns start in equal pairs (uniform in +-1/sqrt(r/2)), whose reflections cancel: the start is the base, r is even.
 * With apply_gs no start is the base (and a pair would have no Gram-Schmidt form), so that columns are drawn one by
 * one. The store holds U^T, [r, in], sites of a group back to back; the file holds PEFT's [in, r].
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "adapters/internal.h"
#include "core/rng.h"
#include "io/json.h"

typedef struct hra_site {
  int64_t r; /* first: esp_adapter_rank reads it */
  int u;
} hra_site;

typedef struct hra_group {
  int n, first;
  esp_site *sites[3];
  esp_tensor p, v, dp; /* [T, n r] */
  esp_tensor inv;      /* N of each site, fp32 [n r, r] */
  esp_tensor b[3];     /* -W U, [out, r] */
  bool late_fwd, late_bwd;
} hra_group;

typedef struct hra_impl {
  esp_tensor mask; /* fp32 [3 r, r]: U^T U to N^-1 */
  esp_tensor eye;  /* [r, r] */
} hra_impl;

static esp_status hra_constants(esp_adapter *a) {
  esp_backend *be = esp_model_backend(a->model);
  esp_dtype t = esp_model_compute(a->model);
  int64_t r = a->cfg.r, n = 3 * r * r, size = (int64_t)esp_dtype_size(t);
  hra_impl *im = a->impl = esp_arena_alloc(a->arena, sizeof *im);
  float *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *host);
  void *conv = esp_mem_alloc(ESP_MEM_HOST, (size_t)(r * r * size));
  esp_status st = im && host && conv ? ESP_OK : ESP_ERR_MEMORY;
  if (st == ESP_OK) {
    im->mask = esp_tensor_2d(be->ops->alloc(be, ESP_MEM_PARAMS, n * 4), ESP_F32, 3 * r, r);
    im->eye = esp_tensor_2d(be->ops->alloc(be, ESP_MEM_PARAMS, r * r * size), t, r, r);
    if (!im->mask.data || !im->eye.data) st = esp_backend_why_null(be);
  }
  if (st == ESP_OK) {
    for (int64_t i = 0; i < r; i++) host[i * r + i] = 1.0f;
    esp_convert(conv, t, host, ESP_F32, r * r);
    be->ops->upload(be, im->eye.data, conv, r * r * size);
    for (int64_t i = 0; i < 3 * r; i++)
      for (int64_t j = 0; j < r; j++) host[i * r + j] = a->cfg.apply_gs || i % r == j ? 0.5f : j > i % r ? 1.0f : 0.0f;
    be->ops->upload(be, im->mask.data, host, n * 4);
  }
  esp_mem_free(host);
  esp_mem_free(conv);
  return st;
}

static esp_status hra_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  hra_group *hg = esp_arena_alloc(a->arena, sizeof *hg);
  if (!hg) return ESP_ERR_MEMORY;
  if (!a->impl) ESP_TRY(hra_constants(a));
  if (a->cfg.r > g->in)
    return esp_fail(ESP_ERR_RECIPE, "adapter.r: %lld is more than the %lld inputs of %s", (long long)a->cfg.r,
                    (long long)g->in, g->sites[0]->path);
  for (int i = 0; i < g->n_sites; i++) {
    esp_site *s = g->sites[i];
    if (!hit[i]) continue;
    hra_site *hs = esp_arena_alloc(a->arena, sizeof *hs);
    char name[512];
    if (!hs) return ESP_ERR_MEMORY;
    snprintf(name, sizeof name, ESP_PEFT_PREFIX "%s.hra_u", s->path);
    hs->r = a->cfg.r;
    hs->u = esp_params_add(a->params, name, 2, (int64_t[]){hs->r, s->in}, hg->n == 0);
    if (hs->u < 0) return ESP_ERR_MEMORY;
    ESP_TRY(esp_mark_transposed(a, hs->u));
    if (hg->n == 0) hg->first = hs->u;
    a->site_state[s->index] = hs;
    hg->sites[hg->n++] = s;
  }
  a->group_state[g->index] = hg;
  return ESP_OK;
}

static esp_status hra_init(esp_adapter *a, esp_site *s) {
  const hra_site *hs = a->site_state[s->index];
  int64_t r = hs->r;
  bool pairs = !a->cfg.apply_gs;
  if (pairs && r % 2)
    return esp_fail(ESP_ERR_RECIPE,
                    "adapter.r: hra starts from pairs of reflections that cancel: r must be even, is %lld",
                    (long long)r);
  float *u = esp_mem_alloc(ESP_MEM_HOST, (size_t)(r * s->in) * sizeof *u);
  if (!u) return ESP_ERR_MEMORY;
  uint64_t stream = esp_rng_stream_name(ESP_RNG_INIT, s->path);
  float bound = 1.0f / sqrtf((float)(pairs ? r / 2 : r));
  for (int64_t k = 0; k < r; k++) {
    int64_t draw = pairs ? k / 2 : k;
    for (int64_t c = 0; c < s->in; c++)
      u[k * s->in + c] = bound * (2.0f * esp_rng_uniform(a->cfg.seed, stream, (uint64_t)(draw * s->in + c)) - 1.0f);
  }
  esp_params_set(a->params, hs->u, u);
  esp_mem_free(u);
  return ESP_OK;
}

static void hra_destroy(esp_adapter *a) {
  esp_backend *be = esp_model_backend(a->model);
  hra_impl *im = a->impl;
  if (im && im->mask.data) be->ops->free(be, im->mask.data);
  if (im && im->eye.data) be->ops->free(be, im->eye.data);
}

/* ---- the step ---- */

static esp_tensor site_rows(const esp_adapter *a, esp_tensor t, int i) {
  return esp_tensor_rows_view(&t, i * a->cfg.r, a->cfg.r);
}
static esp_tensor site_cols(const esp_adapter *a, esp_tensor t, int i) {
  return esp_tensor_cols_view(&t, i * a->cfg.r, a->cfg.r);
}
static esp_tensor out_cols(const hra_group *hg, esp_tensor y, int i) {
  return esp_tensor_cols_view(&y, hg->sites[i]->col0, hg->sites[i]->out);
}

/* N of every site, fp32, from the U that the products read. */
static void make_inverse(esp_adapter *a, esp_run *run, hra_group *hg, esp_tensor u) {
  const esp_backend_ops *ops = run->be->ops;
  const hra_impl *im = a->impl;
  int64_t mark = esp_stack_mark(run->stack), rows = esp_tensor_rows(&u);
  esp_tensor gram = esp_stack_tensor(run->stack, ESP_F32, rows, a->cfg.r);
  esp_tensor masked = esp_stack_tensor(run->stack, ESP_F32, rows, a->cfg.r);
  for (int i = 0; i < hg->n; i++)
    ops->matmul(run->be, site_rows(a, gram, i), site_rows(a, u, i), false, site_rows(a, u, i), true, 1.0f, 0.0f);
  ops->mul(run->be, masked, gram, esp_tensor_rows_view(&im->mask, 0, rows), 0.0f);
  ops->block_inverse(run->be, hg->inv, masked, hg->n);
  esp_stack_release(run->stack, mark);
}

static int hra_tails(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max, void **slot) {
  hra_group *hg = a->group_state[g->index];
  if (!hg) return 0;
  const esp_backend_ops *ops = run->be->ops;
  const hra_impl *im = a->impl;
  int64_t rows = esp_tensor_rows(&x), width = hg->n * a->cfg.r;
  esp_tensor u = esp_params_stacked(a->params, hg->first, hg->n, 0);
  hg->p = esp_stack_tensor(run->stack, run->compute, rows, width);
  hg->v = esp_stack_tensor(run->stack, run->compute, rows, width);
  hg->inv = esp_stack_tensor(run->stack, ESP_F32, width, a->cfg.r);
  for (int i = 0; i < hg->n; i++) hg->b[i] = esp_stack_tensor(run->stack, run->compute, hg->sites[i]->out, a->cfg.r);
  int64_t mark = esp_stack_mark(run->stack);
  ops->matmul(run->be, hg->p, x, false, u, true, 1.0f, 0.0f);
  make_inverse(a, run, hg, u);
  ops->block_matmul(run->be, hg->v, hg->p, hg->inv, hg->n, false, true, 1.0f, 0.0f);
  esp_tensor wu = esp_stack_tensor(run->stack, run->compute, width, g->out);
  esp_group_apply(run, g, u, wu);
  /* turned over by a product with I: exact, and it brings the sign along */
  for (int i = 0; i < hg->n; i++) {
    esp_tensor of_site = site_rows(a, out_cols(hg, wu, i), i);
    ops->matmul(run->be, hg->b[i], of_site, true, im->eye, false, -1.0f, 0.0f);
  }
  esp_stack_release(run->stack, mark);
  hg->late_fwd = max < hg->n;
  for (int i = 0; i < hg->n && !hg->late_fwd; i++)
    tails[i] = (esp_tail){hg->sites[i]->col0, site_cols(a, hg->v, i), hg->b[i]};
  return hg->late_fwd ? 0 : hg->n;
}

static void hra_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  hra_group *hg = a->group_state[g->index];
  for (int i = 0; hg && hg->late_fwd && i < hg->n; i++)
    run->be->ops->matmul(run->be, out_cols(hg, y, i), site_cols(a, hg->v, i), false, hg->b[i], true, 1.0f, 1.0f);
}

static bool hra_wants_output(const esp_adapter *a) {
  return false; /* unless tails have no room, which the caller knows */
}

/* The part of dU that comes through N: U (dG + dG^T), with dV and P given. */
static void inverse_grad(esp_adapter *a, esp_run *run, hra_group *hg, esp_tensor u, esp_tensor dv) {
  const esp_backend_ops *ops = run->be->ops;
  const hra_impl *im = a->impl;
  int64_t r = a->cfg.r, rows = hg->n * r;
  esp_tensor dn = esp_stack_tensor(run->stack, ESP_F32, rows, r), z = esp_stack_tensor(run->stack, ESP_F32, rows, r);
  esp_tensor grad = esp_params_stacked(a->params, hg->first, hg->n, 2);
  ops->zero(run->be, dn.data, rows * r * 4);
  ops->block_grad(run->be, dn, dv, hg->p, hg->n, false, 1.0f);
  for (int i = 0; i < hg->n; i++) {
    esp_tensor n = site_rows(a, hg->inv, i), di = site_rows(a, dn, i), zi = site_rows(a, z, i);
    ops->matmul(run->be, zi, di, false, n, true, 1.0f, 0.0f);
    ops->matmul(run->be, di, n, true, zi, false, -1.0f, 0.0f);
  }
  ops->mul(run->be, z, dn, esp_tensor_rows_view(&im->mask, 0, rows), 0.0f);
  for (int i = 0; i < hg->n; i++)
    for (int turn = 0; turn < 2; turn++)
      ops->matmul(run->be, site_rows(a, grad, i), site_rows(a, z, i), turn, site_rows(a, u, i), false, 1.0f, 1.0f);
}

/* The part through B = -W U: dU^T -= (V^T dy) W. */
static void base_grad(esp_adapter *a, esp_run *run, esp_group *g, hra_group *hg, esp_tensor dy) {
  const esp_backend_ops *ops = run->be->ops;
  int64_t width = hg->n * a->cfg.r;
  esp_tensor d = esp_stack_tensor(run->stack, run->compute, width, g->out);
  esp_tensor du = esp_stack_tensor(run->stack, run->compute, width, g->in);
  ops->zero(run->be, d.data, esp_tensor_bytes(&d));
  for (int i = 0; i < hg->n; i++)
    ops->matmul(run->be, site_rows(a, out_cols(hg, d, i), i), site_cols(a, hg->v, i), true, out_cols(hg, dy, i), false,
                -1.0f, 0.0f);
  esp_group_apply_dx(run, g, d, du);
  ops->axpby(run->be, esp_params_stacked(a->params, hg->first, hg->n, 2), 1.0f, du, 1.0f);
}

static int hra_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                         int max, void **slot) {
  hra_group *hg = a->group_state[g->index];
  if (!hg) return 0;
  const esp_backend_ops *ops = run->be->ops;
  int64_t rows = esp_tensor_rows(&x), width = hg->n * a->cfg.r;
  esp_tensor u = esp_params_stacked(a->params, hg->first, hg->n, 0);
  hg->dp = esp_stack_tensor(run->stack, run->compute, rows, width);
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor dv = esp_stack_tensor(run->stack, run->compute, rows, width);
  for (int i = 0; i < hg->n; i++)
    ops->matmul(run->be, site_cols(a, dv, i), out_cols(hg, dy, i), false, hg->b[i], false, 1.0f, 0.0f);
  ops->block_matmul(run->be, hg->dp, dv, hg->inv, hg->n, false, false, 1.0f, 0.0f);
  if (a->trainable) {
    ops->matmul(run->be, esp_params_stacked(a->params, hg->first, hg->n, 2), hg->dp, true, x, false, 1.0f, 1.0f);
    inverse_grad(a, run, hg, u, dv);
    base_grad(a, run, g, hg, dy);
  }
  esp_stack_release(run->stack, mark);
  hg->late_bwd = max < 1;
  if (hg->late_bwd) return 0;
  tails[0] = (esp_tail){0, hg->dp, u};
  return 1;
}

static void hra_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  hra_group *hg = a->group_state[g->index];
  if (!hg || !hg->late_bwd || !dx.data) return;
  run->be->ops->matmul(run->be, dx, hg->dp, false, esp_params_stacked(a->params, hg->first, hg->n, 0), false, 1.0f,
                       1.0f);
}

/* ---- merge, export, file ---- */

/* U^T with unit rows, in double; orthonormal ones where Gram-Schmidt is asked for. */
static double *unit_rows(const esp_adapter *a, const esp_site *s) {
  const hra_site *hs = a->site_state[s->index];
  int64_t r = hs->r, in = s->in;
  float *u = esp_mem_alloc(ESP_MEM_HOST, (size_t)(r * in) * sizeof *u);
  double *q = esp_mem_alloc(ESP_MEM_HOST, (size_t)(r * in) * sizeof *q);
  if (u && q) {
    esp_params_get(a->params, hs->u, u);
    for (int64_t i = 0; i < r; i++) {
      double *qi = q + i * in, norm = 0;
      for (int64_t c = 0; c < in; c++) qi[c] = u[i * in + c];
      for (int64_t k = 0; a->cfg.apply_gs && k < i; k++) {
        double dot = 0;
        for (int64_t c = 0; c < in; c++) dot += q[k * in + c] * qi[c];
        for (int64_t c = 0; c < in; c++) qi[c] -= dot * q[k * in + c];
      }
      for (int64_t c = 0; c < in; c++) norm += qi[c] * qi[c];
      for (int64_t c = 0; c < in; c++) qi[c] /= sqrt(norm);
    }
  } else {
    esp_mem_free(q);
    q = NULL;
  }
  esp_mem_free(u);
  return q;
}

static esp_status hra_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  int64_t in = s->in;
  double *q = unit_rows(a, s), *row = esp_mem_alloc(ESP_MEM_HOST, (size_t)in * sizeof *row);
  esp_status st = q && row ? ESP_OK : ESP_ERR_MEMORY;
  for (int64_t i = 0; i < n && st == ESP_OK; i++) {
    for (int64_t c = 0; c < in; c++) row[c] = w[i * in + c];
    /* orthonormal reflections commute, so that one loop serves both forms */
    for (int64_t k = 0; k < a->cfg.r; k++) {
      double dot = 0;
      for (int64_t c = 0; c < in; c++) dot += row[c] * q[k * in + c];
      for (int64_t c = 0; c < in; c++) row[c] -= 2 * dot * q[k * in + c];
    }
    for (int64_t c = 0; c < in; c++) w[i * in + c] = (float)row[c];
  }
  esp_mem_free(q);
  esp_mem_free(row);
  return st;
}

/* W H_0 .. H_{r-1} - W = sum_k B_k u_k^T with B_k = -2 (W H_0 .. H_{k-1}) u_k. */
static int64_t hra_low_rank(esp_adapter *a, esp_site *s, float *A, float *B) {
  int64_t r = a->cfg.r, in = s->in;
  if (!A && !B) return r;
  double *q = unit_rows(a, s), *row = esp_mem_alloc(ESP_MEM_HOST, (size_t)in * sizeof *row);
  float *w = esp_mem_alloc(ESP_MEM_HOST, (size_t)in * sizeof *w);
  bool ok = q && row && w;
  for (int64_t i = 0; ok && A && i < r * in; i++) A[i] = (float)q[i];
  for (int64_t o = 0; ok && B && o < s->out; o++) {
    ok = esp_site_read_weight_rows(a->model, s, o, 1, w) == ESP_OK;
    for (int64_t c = 0; c < in; c++) row[c] = w[c];
    for (int64_t k = 0; k < r; k++) {
      double dot = 0;
      for (int64_t c = 0; c < in; c++) dot += row[c] * q[k * in + c];
      for (int64_t c = 0; c < in; c++) row[c] -= 2 * dot * q[k * in + c];
      B[o * r + k] = (float)(-2 * dot);
    }
  }
  esp_mem_free(q);
  esp_mem_free(row);
  esp_mem_free(w);
  return ok ? r : -1;
}

static esp_status hra_config_check(const esp_adapter_cfg *c) {
  ESP_TRY(esp_config_refuse(c, "hra", ESP_CFG_DROPOUT));
  return esp_plain_config_check(c);
}

static void hra_config_write(const esp_adapter *a, json_t *j) {
  json_object_del(j, "trainable_token_indices"); /* PEFT has it for LoRA only */
  json_object_set_new(j, "apply_GS", json_boolean(a->cfg.apply_gs));
  json_object_set_new(j, "init_weights", json_true());
  json_object_set_new(j, "r", json_integer((json_int_t)a->cfg.r));
}

static esp_status hra_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  (void)arena;
  int gs = 0;
  c->r = 8;
  ESP_TRY(esp_json_i64(j, "r", path, 0, &c->r));
  ESP_TRY(esp_json_bool(j, "apply_GS", path, 0, &gs));
  c->apply_gs = gs != 0;
  return ESP_OK;
}

const esp_adapter_kind esp_kind_hra = {
    .name = "hra",
    .peft_type = "HRA",
    .summary = "r Householder reflections of the input, W' = W H_0 .. H_{r-1} (arXiv:2405.17484)",
    .site_kinds = 1u << ESP_SITE_LINEAR,
    .mergeable = true,
    .targets = true,
    .alone = true,
    .declare = hra_declare,
    .init = hra_init,
    .tails = hra_tails,
    .output = hra_output,
    .tails_bwd = hra_tails_bwd,
    .input_bwd = hra_input_bwd,
    .wants_output = hra_wants_output,
    .destroy = hra_destroy,
    .config_write = hra_config_write,
    .config_read = hra_config_read,
    .config_check = hra_config_check,
    .materialise = hra_materialise,
    .low_rank = hra_low_rank,
};
