/* lokr.c: LoKr, a Kronecker product (LyCORIS, arXiv:2309.14859), with the options of PEFT's LoKrConfig for linears:
 *   delta W = s W1 (x) W2,  W1 [l, m], W2 [k, n],  out = l k,  in = m n,  s = alpha / r,
 * where (m, n) and (l, k) are divisor pairs of in and out (`factorization` of PEFT). W2 = w2_a w2_b of rank r where
 * r < max(k, n) / 2, W1 = w1_a w1_b with decompose_both where r < max(l, m) / 2, else they are trained whole.
 *
 * With x as rows of m pieces of n, y as rows of l pieces of k and q = r or, with W2 whole, n:
 *   Z1 = X w2_b^T     [T m, q]   (X itself where W2 is whole)
 *   Z2 = turned Z1    [T q, m]   each token's m x q becomes q x m
 *   Z3 = turned s Z2 W1^T        [T l, q], kept for backward
 *   Y += Z3 w2_a^T    [T l, k]   (W2^T where it is whole)
 * and the same chain mirrored for the gradients. Z2 is made again in backward. */
#include <math.h>
#include <string.h>

#include "adapters/factors.h"
#include "io/json.h"

typedef struct lokr_site {
  int64_t r; /* adapter.r */
  float s;
  int64_t l, k, m, n, q;
  int w1, w1_a, w1_b, w2, w2_a, w2_b; /* -1: the other form */
  esp_tensor z3;                      /* [T, l q], carries s */
} lokr_site;

typedef struct lokr_group {
  int n;
  esp_site *sites[3];
  esp_tensor dx; /* [T, in] */
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

static esp_status lokr_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  lokr_group *lg = esp_arena_alloc(a->arena, sizeof *lg);
  if (!lg) return ESP_ERR_MEMORY;
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

static esp_tensor as(esp_tensor x, int64_t rows, int64_t cols) {
  return esp_tensor_2d(x.data, x.dtype, rows, cols);
}

static esp_tensor dense(esp_run *run, esp_tensor x) { /* a column view cannot be cut into pieces */
  if (x.ld == esp_tensor_cols(&x)) return x;
  esp_tensor y = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), esp_tensor_cols(&x));
  run->be->ops->axpby(run->be, y, 1.0f, x, 0.0f);
  return y;
}

static esp_tensor turned(esp_run *run, esp_tensor x, int64_t tokens, int64_t rows, int64_t cols) {
  esp_tensor y = esp_stack_tensor(run->stack, run->compute, tokens, rows * cols);
  run->be->ops->transpose_rows(run->be, y, as(x, tokens, rows * cols), rows, cols);
  return y;
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

static esp_tensor make_z2(esp_adapter *a, esp_run *run, const lokr_site *ls, esp_tensor x) { /* [T, q m] */
  int64_t t = esp_tensor_rows(&x);
  esp_tensor z1 = dense(run, x);
  if (ls->w2 < 0) {
    esp_tensor low = esp_stack_tensor(run->stack, run->compute, t * ls->m, ls->q);
    run->be->ops->matmul(run->be, low, as(z1, t * ls->m, ls->n), false, esp_param_shadow(a->params, ls->w2_b), true,
                         1.0f, 0.0f);
    z1 = low;
  }
  return turned(run, z1, t, ls->m, ls->q);
}

static void lokr_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  lokr_group *lg = a->group_state[g->index];
  if (!lg) return;
  const esp_backend_ops *ops = run->be->ops;
  int64_t t = esp_tensor_rows(&x);
  for (int i = 0; i < lg->n; i++) {
    esp_site *s = lg->sites[i];
    lokr_site *ls = a->site_state[s->index];
    esp_tensor yi = esp_tensor_cols_view(&y, s->col0, s->out);
    ls->z3 = esp_stack_tensor(run->stack, run->compute, t, ls->l * ls->q);
    int64_t mark = esp_stack_mark(run->stack);
    esp_tensor z2 = make_z2(a, run, ls, x), w1 = left(a, run, ls);
    esp_tensor mixed = esp_stack_tensor(run->stack, run->compute, t * ls->q, ls->l);
    ops->matmul(run->be, mixed, as(z2, t * ls->q, ls->m), false, w1, true, scale_of(a, ls), 0.0f);
    ops->transpose_rows(run->be, ls->z3, as(mixed, t, ls->q * ls->l), ls->q, ls->l);
    bool apart = yi.ld != s->out;
    esp_tensor out = apart ? esp_stack_tensor(run->stack, run->compute, t, s->out) : yi;
    ops->matmul(run->be, as(out, t * ls->l, ls->k), as(ls->z3, t * ls->l, ls->q), false, right(a, ls), true, 1.0f,
                apart ? 0.0f : 1.0f);
    if (apart) ops->axpby(run->be, yi, 1.0f, out, 1.0f);
    esp_stack_release(run->stack, mark);
  }
}

/* dw1 [l, m] = g2^T z2, straight into W1's gradient or through it into those of its factors. */
static void left_grad(esp_adapter *a, esp_run *run, const lokr_site *ls, esp_tensor g2, esp_tensor z2) {
  const esp_backend_ops *ops = run->be->ops;
  if (ls->w1 >= 0) {
    ops->matmul(run->be, esp_param_grad(a->params, ls->w1), g2, true, z2, false, 1.0f, 1.0f);
    return;
  }
  esp_tensor d = esp_stack_tensor(run->stack, ESP_F32, ls->l, ls->m);
  ops->matmul(run->be, d, g2, true, z2, false, 1.0f, 0.0f);
  ops->matmul(run->be, esp_param_grad(a->params, ls->w1_a), d, false, esp_param_shadow(a->params, ls->w1_b), true, 1.0f,
              1.0f);
  ops->matmul(run->be, esp_param_grad(a->params, ls->w1_b), esp_param_shadow(a->params, ls->w1_a), true, d, false, 1.0f,
              1.0f);
}

static void site_bwd(esp_adapter *a, esp_run *run, const lokr_site *ls, esp_tensor x, esp_tensor dyi, esp_tensor dx,
                     bool first) {
  const esp_backend_ops *ops = run->be->ops;
  int64_t t = esp_tensor_rows(&x), l = ls->l, k = ls->k, m = ls->m, n = ls->n, q = ls->q;
  esp_tensor d_y = as(dense(run, dyi), t * l, k), z3 = as(ls->z3, t * l, q);
  if (a->trainable)
    ops->matmul(run->be, esp_param_grad(a->params, ls->w2 >= 0 ? ls->w2 : ls->w2_a), d_y, true, z3, false, 1.0f, 1.0f);
  esp_tensor d_z3 = esp_stack_tensor(run->stack, run->compute, t * l, q);
  ops->matmul(run->be, d_z3, d_y, false, right(a, ls), false, scale_of(a, ls), 0.0f);
  esp_tensor g2 = as(turned(run, d_z3, t, l, q), t * q, l);
  if (a->trainable) left_grad(a, run, ls, g2, as(make_z2(a, run, ls, x), t * q, m));
  esp_tensor d_z2 = esp_stack_tensor(run->stack, run->compute, t * q, m);
  ops->matmul(run->be, d_z2, g2, false, left(a, run, ls), false, 1.0f, 0.0f);
  esp_tensor d_z1 = turned(run, d_z2, t, q, m); /* [T, m q] */
  if (ls->w2 >= 0) {
    ops->axpby(run->be, dx, 1.0f, d_z1, first ? 0.0f : 1.0f);
    return;
  }
  d_z1 = as(d_z1, t * m, q);
  if (a->trainable)
    ops->matmul(run->be, esp_param_grad(a->params, ls->w2_b), d_z1, true, as(dense(run, x), t * m, n), false, 1.0f,
                1.0f);
  ops->matmul(run->be, as(dx, t * m, n), d_z1, false, esp_param_shadow(a->params, ls->w2_b), false, 1.0f,
              first ? 0.0f : 1.0f);
}

static int lokr_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                          int max, void **slot) {
  lokr_group *lg = a->group_state[g->index];
  if (!lg) return 0;
  lg->dx = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), g->in);
  for (int i = 0; i < lg->n; i++) {
    int64_t mark = esp_stack_mark(run->stack);
    esp_site *s = lg->sites[i];
    site_bwd(a, run, a->site_state[s->index], x, esp_tensor_cols_view(&dy, s->col0, s->out), lg->dx, i == 0);
    esp_stack_release(run->stack, mark);
  }
  return 0;
}

static void lokr_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  lokr_group *lg = a->group_state[g->index];
  if (lg && dx.data) run->be->ops->axpby(run->be, dx, 1.0f, lg->dx, 1.0f);
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
    .config_write = lokr_config_write,
    .config_read = lokr_config_read,
    .config_check = lokr_config_check,
    .materialise = lokr_materialise,
};
