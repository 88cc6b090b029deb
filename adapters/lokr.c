/* lokr.c: LoKr, a Kronecker product (LyCORIS, arXiv:2309.14859), with the options of PEFT's LoKrConfig for linears:
 *   delta W = s W1 (x) W2,  W1 [l, m], W2 [k, n],  out = l k,  in = m n,  s = alpha / r,
 * where (m, n) and (l, k) are divisor pairs of in and out (`factorization` of PEFT). W2 = w2_a w2_b of rank r where
 * r < max(k, n) / 2, W1 = w1_a w1_b with decompose_both where r < max(l, m) / 2, else they are trained whole.
 *
 * With x as m columns of pieces X_p [T, n], y as l columns of pieces Y_i [T, k] and q = r or, with W2 whole, n:
 *   Z1_p = X_p w2_b^T               [m, T, q], kept for backward (W2 whole: the identity in the place of w2_b)
 *   Z3_i = s sum_p W1[i, p] Z1_p    [l, T, q], kept: one product over the pieces as they lie, W1 by [m, T q]
 *   Y_i += Z3_i w2_a^T              (W2^T where it is whole)
 * and the same chain mirrored for the gradients. The first and the last are products with one shared block on pieces
 * where they lie (block_matmul), so that nothing is turned or copied. */
#include <math.h>
#include <string.h>

#include "adapters/factors.h"
#include "io/json.h"

typedef struct lokr_site {
  int64_t r; /* adapter.r */
  float s;
  int64_t l, k, m, n, q;
  int w1, w1_a, w1_b, w2, w2_a, w2_b; /* -1: the other form */
  esp_tensor z1, z3, dz1;             /* [m, T, q], [l, T, q] with s in it, [m, T, q] */
} lokr_site;

typedef struct lokr_impl {
  esp_tensor eye; /* compute type, as wide as the widest whole W2; data NULL: none is whole */
} lokr_impl;

typedef struct lokr_group {
  int n;
  esp_site *sites[3];
} lokr_group;

/* PEFT's factorization(dimension, factor): `factor` where it divides, else the pair nearest to a square whose first is
 * at most `factor` (0: any). */
static void factorization(int64_t dim, int64_t factor, int64_t *first, int64_t *second) {
  int64_t m = 1, n = dim, length = m + n;
  if (factor > 0 && dim % factor == 0) {
    *first = factor;
    *second = dim / factor;
    return;
  }
  if (factor <= 0) factor = dim;
  while (m < n) {
    int64_t new_m = m + 1;
    while (dim % new_m) new_m++;
    int64_t new_n = dim / new_m;
    if (new_m + new_n > length || new_m > factor) break;
    m = new_m;
    n = new_n;
  }
  *first = m < n ? m : n;
  *second = m < n ? n : m;
}

static float scale_of(const esp_adapter *a, const lokr_site *ls) {
  return (float)(ls->s * a->weight);
}

/* An identity of at least n, of which a corner serves every smaller one. */
static esp_status make_eye(esp_adapter *a, int64_t n) {
  lokr_impl *im = a->impl;
  if (im->eye.data && esp_tensor_rows(&im->eye) >= n) return ESP_OK;
  esp_backend *be = esp_model_backend(a->model);
  esp_dtype t = esp_model_compute(a->model);
  int64_t bytes = n * n * (int64_t)esp_dtype_size(t);
  float *ones = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n * n) * sizeof *ones); /* zeroed */
  void *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)bytes), *data = NULL;
  esp_status st = ones && host ? ESP_OK : ESP_ERR_MEMORY;
  if (st == ESP_OK && !(data = be->ops->alloc(be, ESP_MEM_PARAMS, bytes))) st = esp_backend_why_null(be);
  if (st == ESP_OK) {
    for (int64_t i = 0; i < n; i++) ones[i * n + i] = 1.0f;
    esp_convert(host, t, ones, ESP_F32, n * n);
    be->ops->upload(be, data, host, bytes);
    if (im->eye.data) be->ops->free(be, im->eye.data);
    im->eye = esp_tensor_2d(data, t, n, n);
  }
  esp_mem_free(ones);
  esp_mem_free(host);
  return st;
}

static void lokr_destroy(esp_adapter *a) {
  lokr_impl *im = a->impl;
  esp_backend *be = esp_model_backend(a->model);
  if (im && im->eye.data) be->ops->free(be, im->eye.data);
}

static esp_status lokr_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  lokr_group *lg = esp_arena_alloc(a->arena, sizeof *lg);
  if (!a->impl) a->impl = esp_arena_alloc(a->arena, sizeof(lokr_impl));
  if (!lg || !a->impl) return ESP_ERR_MEMORY;
  for (int i = 0; i < g->n_sites; i++) {
    if (!hit[i]) continue;
    esp_site *s = g->sites[i];
    lokr_site *ls = esp_arena_alloc(a->arena, sizeof *ls);
    if (!ls) return ESP_ERR_MEMORY;
    int64_t r = ls->r = esp_factor_rank(a, s);
    ls->s = (float)esp_factor_scale(a, s, r);
    factorization(s->in, a->cfg.decompose_factor, &ls->m, &ls->n);
    factorization(s->out, a->cfg.decompose_factor, &ls->l, &ls->k);
    ls->w1 = ls->w1_a = ls->w1_b = ls->w2 = ls->w2_a = ls->w2_b = -1;
    int64_t wide1 = ls->l > ls->m ? ls->l : ls->m, wide2 = ls->k > ls->n ? ls->k : ls->n;
    bool low1 = a->cfg.decompose_both && 2 * r < wide1, low2 = 2 * r < wide2, ok = true;
    ls->q = low2 ? r : ls->n;
    if (low1) {
      ok &= (ls->w1_a = esp_factor_add(a, s, "lokr_w1_a", ls->l, r)) >= 0;
      ok &= (ls->w1_b = esp_factor_add(a, s, "lokr_w1_b", r, ls->m)) >= 0;
    } else
      ok &= (ls->w1 = esp_factor_add(a, s, "lokr_w1", ls->l, ls->m)) >= 0;
    if (low2) {
      ok &= (ls->w2_a = esp_factor_add(a, s, "lokr_w2_a", ls->k, r)) >= 0;
      ok &= (ls->w2_b = esp_factor_add(a, s, "lokr_w2_b", r, ls->n)) >= 0;
    } else
      ok &= (ls->w2 = esp_factor_add(a, s, "lokr_w2", ls->k, ls->n)) >= 0;
    if (!ok) return ESP_ERR_MEMORY;
    if (!low2) ESP_TRY(make_eye(a, ls->n));
    a->site_state[s->index] = ls;
    lg->sites[lg->n++] = s;
  }
  a->group_state[g->index] = lg;
  return ESP_OK;
}

/* W1 (or w1_a) starts at zero, the rest as PEFT: uniform by the second dimension. */
static esp_status lokr_init(esp_adapter *a, esp_site *s) {
  const lokr_site *ls = a->site_state[s->index];
  ESP_TRY(esp_factor_constant(a, ls->w1 >= 0 ? ls->w1 : ls->w1_a, 0.0f));
  if (ls->w1_b >= 0) ESP_TRY(esp_factor_uniform(a, ls->w1_b, ls->m));
  if (ls->w2 >= 0) return esp_factor_uniform(a, ls->w2, ls->n);
  ESP_TRY(esp_factor_uniform(a, ls->w2_a, ls->r));
  return esp_factor_uniform(a, ls->w2_b, ls->n);
}

/* ---- the step; everything pushed on the stack ---- */

static esp_tensor pieces(esp_run *run, int64_t n, int64_t tokens, int64_t width) { /* [n, T, width] */
  void *data = esp_stack_push(run->stack, n * tokens * width * (int64_t)esp_dtype_size(run->compute));
  return (esp_tensor){data, run->compute, 3, {n, tokens, width, 1}, width};
}

/* [n, T, q] as [n, T q], which W1 mixes */
static esp_tensor flat(esp_tensor z) {
  return esp_tensor_2d(z.data, z.dtype, z.shape[0], z.shape[1] * z.shape[2]);
}

static esp_tensor left(esp_adapter *a, esp_run *run, const lokr_site *ls) { /* W1 [l, m] */
  if (ls->w1 >= 0) return esp_param_shadow(a->params, ls->w1);
  esp_tensor w = esp_stack_tensor(run->stack, run->compute, ls->l, ls->m);
  run->be->ops->matmul(run->be, w, esp_param_shadow(a->params, ls->w1_a), false, esp_param_shadow(a->params, ls->w1_b),
                       false, 1.0f, 0.0f);
  return w;
}

static esp_tensor right(const esp_adapter *a, const lokr_site *ls) { /* W2 or w2_a, [k, q] */
  return esp_param_shadow(a->params, ls->w2 >= 0 ? ls->w2 : ls->w2_a);
}

static esp_tensor narrow(const esp_adapter *a, const lokr_site *ls) { /* w2_b [q, n] */
  if (ls->w2 < 0) return esp_param_shadow(a->params, ls->w2_b);
  esp_tensor eye = ((const lokr_impl *)a->impl)->eye, corner = esp_tensor_rows_view(&eye, 0, ls->n);
  return esp_tensor_cols_view(&corner, 0, ls->n);
}

static void lokr_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  lokr_group *lg = a->group_state[g->index];
  if (!lg) return;
  const esp_backend_ops *ops = run->be->ops;
  int64_t t = esp_tensor_rows(&x);
  for (int i = 0; i < lg->n; i++) {
    esp_site *s = lg->sites[i];
    lokr_site *ls = a->site_state[s->index];
    ls->z1 = pieces(run, ls->m, t, ls->q);
    ls->z3 = pieces(run, ls->l, t, ls->q);
    int64_t mark = esp_stack_mark(run->stack);
    ops->block_matmul(run->be, ls->z1, x, narrow(a, ls), (int)ls->m, true, true, 1.0f, 0.0f);
    ops->matmul(run->be, flat(ls->z3), left(a, run, ls), false, flat(ls->z1), false, scale_of(a, ls), 0.0f);
    ops->block_matmul(run->be, esp_tensor_cols_view(&y, s->col0, s->out), ls->z3, right(a, ls), (int)ls->l, true, true,
                      1.0f, 1.0f);
    esp_stack_release(run->stack, mark);
  }
}

/* dw1 [l, m] = dZ3 Z1^T, straight into W1's gradient or through it into those of its factors. */
static void left_grad(esp_adapter *a, esp_run *run, const lokr_site *ls, esp_tensor dz3) {
  const esp_backend_ops *ops = run->be->ops;
  if (ls->w1 >= 0) {
    ops->matmul(run->be, esp_param_grad(a->params, ls->w1), flat(dz3), false, flat(ls->z1), true, 1.0f, 1.0f);
    return;
  }
  esp_tensor d = esp_stack_tensor(run->stack, ESP_F32, ls->l, ls->m);
  ops->matmul(run->be, d, flat(dz3), false, flat(ls->z1), true, 1.0f, 0.0f);
  ops->matmul(run->be, esp_param_grad(a->params, ls->w1_a), d, false, esp_param_shadow(a->params, ls->w1_b), true, 1.0f,
              1.0f);
  ops->matmul(run->be, esp_param_grad(a->params, ls->w1_b), esp_param_shadow(a->params, ls->w1_a), true, d, false, 1.0f,
              1.0f);
}

/* Fills dz1 and the gradients of the parameters. */
static void site_bwd(esp_adapter *a, esp_run *run, const lokr_site *ls, esp_tensor x, esp_tensor dyi) {
  const esp_backend_ops *ops = run->be->ops;
  int l = (int)ls->l, m = (int)ls->m;
  esp_tensor dz3 = pieces(run, ls->l, esp_tensor_rows(&x), ls->q);
  if (a->trainable)
    ops->block_grad(run->be, esp_param_grad(a->params, ls->w2 >= 0 ? ls->w2 : ls->w2_a), dyi, ls->z3, l, true, 1.0f);
  ops->block_matmul(run->be, dz3, dyi, right(a, ls), l, true, false, scale_of(a, ls), 0.0f);
  if (a->trainable) left_grad(a, run, ls, dz3);
  ops->matmul(run->be, flat(ls->dz1), left(a, run, ls), true, flat(dz3), false, 1.0f, 0.0f);
  if (a->trainable && ls->w2 < 0)
    ops->block_grad(run->be, esp_param_grad(a->params, ls->w2_b), ls->dz1, x, m, true, 1.0f);
}

static int lokr_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                          int max, void **slot) {
  lokr_group *lg = a->group_state[g->index];
  for (int i = 0; lg && i < lg->n; i++) {
    esp_site *s = lg->sites[i];
    lokr_site *ls = a->site_state[s->index];
    ls->dz1 = pieces(run, ls->m, esp_tensor_rows(&x), ls->q);
    int64_t mark = esp_stack_mark(run->stack);
    site_bwd(a, run, ls, x, esp_tensor_cols_view(&dy, s->col0, s->out));
    esp_stack_release(run->stack, mark);
  }
  return 0;
}

static void lokr_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  lokr_group *lg = a->group_state[g->index];
  for (int i = 0; lg && dx.data && i < lg->n; i++) {
    const lokr_site *ls = a->site_state[lg->sites[i]->index];
    run->be->ops->block_matmul(run->be, dx, ls->dz1, narrow(a, ls), (int)ls->m, true, false, 1.0f, 1.0f);
  }
}

/* ---- merge, export and extraction ---- */

static float *host_product(const esp_adapter *a, int whole, int first, int second, int64_t rows, int64_t r,
                           int64_t cols) {
  if (whole >= 0) return esp_param_host(a, whole);
  float *x = esp_param_host(a, first), *y = esp_param_host(a, second);
  float *w = esp_mem_alloc(ESP_MEM_HOST, (size_t)(rows * cols) * sizeof *w); /* zeroed */
  if (x && y && w) esp_lowrank_add(w, rows, cols, y, x, r, 1.0f);
  bool ok = x && y;
  esp_mem_free(x);
  esp_mem_free(y);
  if (ok) return w;
  esp_mem_free(w);
  return NULL;
}

static esp_status lokr_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t rows, float *w) {
  const lokr_site *ls = a->site_state[s->index];
  float *w1 = host_product(a, ls->w1, ls->w1_a, ls->w1_b, ls->l, ls->r, ls->m);
  float *w2 = host_product(a, ls->w2, ls->w2_a, ls->w2_b, ls->k, ls->r, ls->n);
  if (w1 && w2)
    for (int64_t o = 0; o < rows; o++) {
      const float *left_row = w1 + (r0 + o) / ls->k * ls->m, *right_row = w2 + (r0 + o) % ls->k * ls->n;
      for (int64_t p = 0; p < ls->m; p++)
        for (int64_t c = 0; c < ls->n; c++)
          w[o * s->in + p * ls->n + c] += scale_of(a, ls) * (left_row[p] * right_row[c]);
    }
  esp_status st = w1 && w2 ? ESP_OK : ESP_ERR_MEMORY;
  esp_mem_free(w1);
  esp_mem_free(w2);
  return st;
}

/* ---- configuration ---- */

static void lokr_config_write(const esp_adapter *a, json_t *j) {
  esp_lycoris_config_write(a, j);
  json_object_set_new(j, "decompose_both", json_boolean(a->cfg.decompose_both));
  json_object_set_new(j, "decompose_factor",
                      json_integer(a->cfg.decompose_factor ? (json_int_t)a->cfg.decompose_factor : -1));
  json_object_set_new(j, "rank_dropout_scale", json_false());
}

static esp_status lokr_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  int both = 0;
  int64_t factor = -1;
  ESP_TRY(esp_lycoris_config_read(j, path, arena, c));
  ESP_TRY(esp_json_bool(j, "decompose_both", path, 0, &both));
  ESP_TRY(esp_json_i64(j, "decompose_factor", path, 0, &factor));
  if (factor < -1) return esp_fail(ESP_ERR_DATA, "%s: decompose_factor must be -1 or positive", path);
  c->decompose_both = both != 0;
  c->decompose_factor = factor < 0 ? 0 : factor == 0 ? 1 : factor; /* 0 keeps one whole side in PEFT, as 1 does */
  return ESP_OK;
}

static esp_status lokr_config_check(const esp_adapter_cfg *c) {
  ESP_TRY(esp_factor_check(c));
  if (c->decompose_factor < 0) return esp_fail(ESP_ERR_RECIPE, "adapter.decompose_factor: must be positive or auto");
  return ESP_OK;
}

const esp_adapter_kind esp_kind_lokr = {
    .name = "lokr",
    .peft_type = "LOKR",
    .summary = "Kronecker product of two small matrices, the second of low rank (LyCORIS, arXiv:2309.14859)",
    .site_kinds = 1u << ESP_SITE_LINEAR,
    .mergeable = true,
    .targets = true,
    .declare = lokr_declare,
    .init = lokr_init,
    .output = lokr_output,
    .tails_bwd = lokr_tails_bwd,
    .input_bwd = lokr_input_bwd,
    .destroy = lokr_destroy,
    .config_write = lokr_config_write,
    .config_read = lokr_config_read,
    .config_check = lokr_config_check,
    .materialise = lokr_materialise,
};
