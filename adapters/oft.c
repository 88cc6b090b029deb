/* oft.c: orthogonal fine-tuning (Qiu et al. 2023, arXiv:2306.07280; input side and Cayley-Neumann series: Qiu et al.
 * 2025, arXiv:2506.19847), as PEFT computes it: x' = x blockdiag(R_1 .. R_n), y = W x' + b, so that W' = W
 * blockdiag(R)^T. Each block [b, b] comes from the skew matrix Q of its parameters (strict upper triangle by rows,
 * Q_ij = v, Q_ji = -v). PEFT's two modes have opposite signs, one file gives R in one and about R^T in the other:
 *   cayley_terms 0       R = (I - Q)(I + Q)^-1 = 2 (I + Q)^-1 - I: exactly orthogonal; no pivoting is needed, because
 *                        the symmetric part of I + Q is I
 *   cayley_terms k >= 2  R = I + 2 Q + 2 Q^2 + .. + Q^p, the series of (I + Q)(I - Q)^-1 cut off, p = k - 1 with the
 *                        last term halved; k = 2 is I + 2 Q, and k = 3 has p = 3 like k = 4: so does PEFT
 * block_share: one R for all blocks. coft: after each step ||Q||_F of every block is brought back to coft_eps/sqrt(n).
 * Zero is the start, R = I.
 *
 * Every site has its own rotation, so that the kind makes the product of its sites itself; x' lives as long as the
 * product. Lists of blocks exist in two layouts: `stack`, [n b, b], and `side` by side, [b, n b], which is what a
 * product of blocks takes from the left; gather_rows turns one into the other. Backward: dx' = dy W, dR = x^T dx' by
 * blocks, dx += dx' R^T; through Horner's form S_k = c_k I + S_k+1 Q of the series: dS_0 = dR, dQ += S_k+1^T dS_k,
 * dS_k+1 = dS_k Q^T; through the inverse N: dQ = -2 N^T dR N^T. The skew matrix is one sparse product.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "adapters/internal.h"
#include "io/json.h"

enum { MOST_TERMS = 32 };

typedef struct oft_shape { /* what blocks of one size and number share */
  struct oft_shape *next;
  int64_t b, n;       /* n: distinct blocks */
  esp_csr skew, fold; /* parameters to Q, and back */
  int32_t *to_side, *to_stack;
  esp_tensor eye_stack, eye_side;
} oft_shape;

typedef struct oft_site {
  int64_t blocks; /* of the input */
  int v;
  const oft_shape *shape;
} oft_site;

/* ---- constants ---- */

static void *upload(esp_adapter *a, const void *host, int64_t bytes) {
  esp_backend *be = esp_model_backend(a->model);
  void *data = be->ops->alloc(be, ESP_MEM_PARAMS, bytes);
  if (data) be->ops->upload(be, data, host, bytes);
  return data;
}

static esp_status make_eyes(esp_adapter *a, oft_shape *sh) {
  int64_t b = sh->b, n = sh->n, count = n * b * b;
  float *eye = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * count) * sizeof *eye), *side = eye + count;
  int32_t *at = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * n * b) * sizeof *at), *back = at + n * b;
  esp_status st = eye && at ? ESP_OK : ESP_ERR_MEMORY;
  for (int64_t g = 0; st == ESP_OK && g < n; g++)
    for (int64_t i = 0; i < b; i++) {
      eye[(g * b + i) * b + i] = side[(i * n + g) * b + i] = 1.0f;
      at[i * n + g] = (int32_t)(g * b + i);
      back[g * b + i] = (int32_t)(i * n + g);
    }
  if (st == ESP_OK) {
    sh->eye_stack = esp_tensor_2d(upload(a, eye, count * 4), ESP_F32, n * b, b);
    sh->eye_side = esp_tensor_2d(upload(a, side, count * 4), ESP_F32, b, n * b);
    sh->to_side = upload(a, at, n * b * 4);
    sh->to_stack = upload(a, back, n * b * 4);
    if (!sh->eye_stack.data || !sh->eye_side.data || !sh->to_side || !sh->to_stack)
      st = esp_backend_why_null(esp_model_backend(a->model));
  }
  esp_mem_free(eye);
  esp_mem_free(at);
  return st;
}

/* Q = skew(v) as a sparse matrix [b b, b(b-1)/2] of +1 and -1, and its transpose. */
static esp_status make_skew(esp_adapter *a, oft_shape *sh) {
  int64_t b = sh->b, pairs = b * (b - 1) / 2, all = 2 * pairs;
  int64_t ints = b * b + 1 + pairs + 1 + 2 * all;
  int32_t *start = esp_mem_alloc(ESP_MEM_HOST, (size_t)ints * sizeof *start);
  float *value = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * all) * sizeof *value);
  esp_status st = start && value ? ESP_OK : ESP_ERR_MEMORY;
  if (st == ESP_OK) {
    int32_t *fold_start = start + b * b + 1, *index = fold_start + pairs + 1, *fold_index = index + all, at = 0;
    float *fold_value = value + all;
    for (int64_t i = 0; i < b; i++)
      for (int64_t j = 0; j < b; j++) {
        int64_t lo = i < j ? i : j, hi = i < j ? j : i, e = lo * b - lo * (lo + 1) / 2 + hi - lo - 1;
        if (i != j) {
          index[at] = (int32_t)e;
          value[at++] = i < j ? 1.0f : -1.0f;
          fold_index[2 * e + (i > j)] = (int32_t)(i * b + j);
          fold_value[2 * e + (i > j)] = i < j ? 1.0f : -1.0f;
        }
        start[i * b + j + 1] = at;
      }
    for (int64_t e = 0; e <= pairs; e++) fold_start[e] = (int32_t)(2 * e);
    int32_t *d_ints = upload(a, start, ints * 4);
    float *d_values = upload(a, value, 2 * all * 4);
    if (!d_ints || !d_values) st = esp_backend_why_null(esp_model_backend(a->model));
    sh->skew = (esp_csr){b * b, all, d_ints, d_ints + (index - start), NULL, d_values};
    sh->fold =
        (esp_csr){pairs, all, d_ints + (fold_start - start), d_ints + (fold_index - start), NULL, d_values + all};
  }
  esp_mem_free(start);
  esp_mem_free(value);
  return st;
}

static esp_status shape_of(esp_adapter *a, int64_t b, int64_t n, const oft_shape **out) {
  for (oft_shape *sh = a->impl; sh; sh = sh->next)
    if (sh->b == b && sh->n == n) {
      *out = sh;
      return ESP_OK;
    }
  oft_shape *sh = esp_arena_alloc(a->arena, sizeof *sh);
  if (!sh) return ESP_ERR_MEMORY;
  sh->b = b;
  sh->n = n;
  sh->next = a->impl;
  a->impl = sh;
  *out = sh;
  ESP_TRY(make_eyes(a, sh));
  return make_skew(a, sh);
}

static void oft_destroy(esp_adapter *a) {
  esp_backend *be = esp_model_backend(a->model);
  for (oft_shape *sh = a->impl; sh; sh = sh->next) {
    void *const owned[] = {sh->eye_stack.data,
                           sh->eye_side.data,
                           sh->to_side,
                           sh->to_stack,
                           (void *)(uintptr_t)sh->skew.start,
                           (void *)(uintptr_t)sh->skew.values};
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++)
      if (owned[i]) be->ops->free(be, owned[i]);
  }
}

static esp_status oft_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  const esp_adapter_cfg *c = &a->cfg;
  int64_t b = c->oft_blocks ? g->in / c->oft_blocks : c->oft_block_size;
  if (b < 1 || g->in % b || (c->oft_blocks && g->in % c->oft_blocks))
    return esp_fail(ESP_ERR_RECIPE, "adapter.%s: %lld does not divide the %lld inputs of %s",
                    c->oft_blocks ? "oft_blocks" : "oft_block_size",
                    (long long)(c->oft_blocks ? c->oft_blocks : c->oft_block_size), (long long)g->in,
                    g->sites[0]->path);
  if (b < 2)
    return esp_fail(ESP_ERR_RECIPE, "adapter.oft_blocks: %s has %lld inputs, a block of one has nothing to turn",
                    g->sites[0]->path, (long long)g->in);
  for (int i = 0; i < g->n_sites; i++) {
    esp_site *s = g->sites[i];
    if (!hit[i]) continue;
    oft_site *os = esp_arena_alloc(a->arena, sizeof *os);
    char name[512];
    if (!os) return ESP_ERR_MEMORY;
    os->blocks = g->in / b;
    ESP_TRY(shape_of(a, b, c->oft_block_share ? 1 : os->blocks, &os->shape));
    snprintf(name, sizeof name, ESP_PEFT_PREFIX "%s.oft_R.weight", s->path);
    os->v = esp_params_add(a->params, name, 2, (int64_t[]){os->shape->n, b * (b - 1) / 2}, true);
    if (os->v < 0) return ESP_ERR_MEMORY;
    a->site_state[s->index] = os;
  }
  return ESP_OK;
}

/* ---- R and the way back ---- */

static int powers(int64_t terms) { /* the highest power of the series */
  return terms <= 2 ? (int)terms - 1 : terms == 3 ? 3 : (int)terms - 1;
}
static float coefficient(int k, int64_t terms) {
  return k == 0 || (k == powers(terms) && terms > 2) ? 1.0f : 2.0f;
}

typedef struct rotation {       /* of one site in one pass */
  esp_tensor q, r;              /* stack: fp32; compute type */
  esp_tensor inverse;           /* stack: exact mode */
  esp_tensor s[MOST_TERMS + 1]; /* side: S_k of the series; S_0 is R itself */
} rotation;

static esp_tensor blocks32(esp_run *run, const oft_shape *sh, bool side) {
  return side ? esp_stack_tensor(run->stack, ESP_F32, sh->b, sh->n * sh->b)
              : esp_stack_tensor(run->stack, ESP_F32, sh->n * sh->b, sh->b);
}

static void zero(esp_run *run, esp_tensor t) {
  run->be->ops->zero(run->be, t.data, esp_tensor_bytes(&t));
}

/* The same memory seen row by row of `width`. */
static esp_tensor rows_of(esp_tensor t, int64_t width) {
  return esp_tensor_2d(t.data, t.dtype, esp_tensor_numel(&t) / width, width);
}

/* gather_rows moves rows of b elements: [n b, b] to [b, n, b] or back. */
static void turn(esp_run *run, const oft_shape *sh, esp_tensor y, esp_tensor x, const int32_t *rows) {
  run->be->ops->gather_rows(run->be, rows_of(y, sh->b), rows_of(x, sh->b), rows);
}

static void make_series(esp_adapter *a, esp_run *run, const oft_shape *sh, rotation *rot) {
  const esp_backend_ops *ops = run->be->ops;
  int64_t terms = a->cfg.cayley_terms;
  int p = powers(terms);
  rot->s[p] = sh->eye_side;
  for (int k = p - 1; k >= 0; k--) {
    rot->s[k] = blocks32(run, sh, true);
    ops->axpby(run->be, rot->s[k], coefficient(k, terms), sh->eye_side, 0.0f);
    ops->block_matmul(run->be, rot->s[k], rot->s[k + 1], rot->q, (int)sh->n, false, false,
                      k == p - 1 ? coefficient(p, terms) : 1.0f, 1.0f);
  }
  turn(run, sh, rot->r, rot->s[0], sh->to_stack);
}

static void make_exact(esp_run *run, const oft_shape *sh, rotation *rot) {
  const esp_backend_ops *ops = run->be->ops;
  esp_tensor sum = blocks32(run, sh, false);
  rot->inverse = blocks32(run, sh, false);
  ops->axpby(run->be, sum, 1.0f, sh->eye_stack, 0.0f);
  ops->axpby(run->be, sum, 1.0f, rot->q, 1.0f);
  ops->block_inverse(run->be, rot->inverse, sum, (int)sh->n);
  ops->axpby(run->be, sum, 2.0f, rot->inverse, 0.0f);
  ops->axpby(run->be, sum, -1.0f, sh->eye_stack, 1.0f);
  ops->axpby(run->be, rot->r, 1.0f, sum, 0.0f);
}

/* Everything is left on the run's stack. */
static void make_rotation(esp_adapter *a, esp_run *run, const oft_site *os, rotation *rot) {
  const oft_shape *sh = os->shape;
  esp_tensor v = esp_param_master(a->params, os->v);
  rot->q = blocks32(run, sh, false);
  rot->r = esp_stack_tensor(run->stack, run->compute, sh->n * sh->b, sh->b);
  zero(run, rot->q);
  run->be->ops->sparse_matmul(run->be, rows_of(rot->q, sh->b * sh->b), v, &sh->skew);
  if (a->cfg.cayley_terms)
    make_series(a, run, sh, rot);
  else
    make_exact(run, sh, rot);
}

/* dr: stack, fp32. Adds to the parameters' gradient. */
static void rotation_grad(esp_adapter *a, esp_run *run, const oft_site *os, const rotation *rot, esp_tensor dr) {
  const esp_backend_ops *ops = run->be->ops;
  const oft_shape *sh = os->shape;
  int n = (int)sh->n;
  int64_t terms = a->cfg.cayley_terms;
  esp_tensor dq = blocks32(run, sh, false), ds = blocks32(run, sh, true), next = blocks32(run, sh, true);
  zero(run, dq);
  turn(run, sh, ds, dr, sh->to_side);
  if (terms) {
    int p = powers(terms);
    for (int k = 0; k < p; k++) {
      esp_tensor swap = ds;
      ops->block_grad(run->be, dq, rot->s[k + 1], ds, n, false, k == p - 1 ? coefficient(p, terms) : 1.0f);
      if (k == p - 1) break;
      ops->block_matmul(run->be, next, ds, rot->q, n, false, true, 1.0f, 0.0f);
      ds = next;
      next = swap;
    }
  } else {
    esp_tensor side = blocks32(run, sh, true);
    turn(run, sh, side, rot->inverse, sh->to_side);
    ops->block_matmul(run->be, next, ds, rot->inverse, n, false, true, 1.0f, 0.0f);
    ops->block_grad(run->be, dq, side, next, n, false, -2.0f);
  }
  ops->sparse_matmul(run->be, esp_param_grad(a->params, os->v), rows_of(dq, sh->b * sh->b), &sh->fold);
}

/* ---- the step ---- */

static void oft_forward(esp_adapter *a, esp_run *run, esp_site *s, const esp_wview *w, esp_tensor bias, esp_tensor x,
                        esp_tensor y) {
  const oft_site *os = a->site_state[s->index];
  int64_t mark = esp_stack_mark(run->stack);
  rotation rot;
  make_rotation(a, run, os, &rot);
  esp_tensor turned = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), s->in);
  run->be->ops->block_matmul(run->be, turned, x, rot.r, (int)os->blocks, a->cfg.oft_block_share, false, 1.0f, 0.0f);
  run->be->ops->linear(run->be, y, turned, w, bias, NULL, 0, 0.0f);
  esp_stack_release(run->stack, mark);
}

static void oft_backward(esp_adapter *a, esp_run *run, esp_site *s, const esp_wview *w, esp_tensor x, esp_tensor dy,
                         esp_tensor dx, float beta) {
  const esp_backend_ops *ops = run->be->ops;
  const oft_site *os = a->site_state[s->index];
  int64_t mark = esp_stack_mark(run->stack);
  rotation rot;
  make_rotation(a, run, os, &rot);
  esp_tensor dturned = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), s->in);
  ops->linear_dx(run->be, dturned, dy, w, NULL, 0, 0.0f);
  if (a->trainable) {
    esp_tensor dr = blocks32(run, os->shape, false);
    zero(run, dr);
    ops->block_grad(run->be, dr, x, dturned, (int)os->blocks, a->cfg.oft_block_share, 1.0f);
    rotation_grad(a, run, os, &rot, dr);
  }
  if (dx.data)
    ops->block_matmul(run->be, dx, dturned, rot.r, (int)os->blocks, a->cfg.oft_block_share, true, 1.0f, beta);
  esp_stack_release(run->stack, mark);
}

/* ---- coft: the constraint, on the host between steps ---- */

static esp_status project(esp_adapter *a) {
  if (!a->cfg.coft || esp_backend_counts(a->params->be)) return ESP_OK;
  esp_site **sites;
  int n_sites = esp_model_sites(a->model, &sites);
  for (int i = 0; i < n_sites; i++) {
    if (!a->targeted[i]) continue;
    const oft_site *os = a->site_state[i];
    const esp_param *p = &a->params->list[os->v];
    int64_t n = p->shape[0], pairs = p->shape[1];
    float *v = esp_mem_alloc(ESP_MEM_HOST, (size_t)p->numel * sizeof *v);
    if (!v) return ESP_ERR_MEMORY;
    esp_params_get(a->params, os->v, v);
    double limit = a->cfg.coft_eps / sqrt((double)n);
    bool any = false;
    for (int64_t g = 0; g < n; g++) {
      double sum = 0;
      for (int64_t k = 0; k < pairs; k++) sum += 2.0 * v[g * pairs + k] * v[g * pairs + k];
      if (sqrt(sum) <= limit) continue;
      for (int64_t k = 0; k < pairs; k++) v[g * pairs + k] *= (float)(limit / sqrt(sum));
      any = true;
    }
    if (any) esp_params_set(a->params, os->v, v);
    esp_mem_free(v);
  }
  return ESP_OK;
}

static esp_status oft_after_step(esp_adapter *a, int64_t step, int64_t total) {
  (void)step;
  (void)total;
  return project(a);
}

/* ---- merge ---- */

/* R of block g in double, [b, b]; work: 3 b b. */
static void host_rotation(const esp_adapter *a, const float *v, int64_t b, double *r, double *work) {
  double *q = work, *t = work + b * b, *u = work + 2 * b * b;
  int64_t e = 0, terms = a->cfg.cayley_terms;
  memset(q, 0, (size_t)(b * b) * sizeof *q);
  for (int64_t i = 0; i < b; i++)
    for (int64_t j = i + 1; j < b; j++, e++) {
      q[i * b + j] = v[e];
      q[j * b + i] = -v[e];
    }
  memset(r, 0, (size_t)(b * b) * sizeof *r);
  for (int64_t i = 0; i < b; i++) r[i * b + i] = 1;
  if (terms) {
    memcpy(t, r, (size_t)(b * b) * sizeof *t);
    for (int k = 1; k <= powers(terms); k++) {
      for (int64_t i = 0; i < b; i++)
        for (int64_t j = 0; j < b; j++) {
          double sum = 0;
          for (int64_t l = 0; l < b; l++) sum += t[i * b + l] * q[l * b + j];
          u[i * b + j] = sum;
        }
      memcpy(t, u, (size_t)(b * b) * sizeof *t);
      for (int64_t i = 0; i < b * b; i++) r[i] += coefficient(k, terms) * t[i];
    }
    return;
  }
  for (int64_t i = 0; i < b * b; i++) t[i] = q[i] + r[i]; /* Gauss-Jordan of I + Q on [t | r] */
  for (int64_t k = 0; k < b; k++) {
    double pivot = 1 / t[k * b + k];
    for (int64_t j = 0; j < b; j++) {
      t[k * b + j] *= pivot;
      r[k * b + j] *= pivot;
    }
    for (int64_t i = 0; i < b; i++) {
      double f = t[i * b + k];
      for (int64_t j = 0; i != k && j < b; j++) {
        t[i * b + j] -= f * t[k * b + j];
        r[i * b + j] -= f * r[k * b + j];
      }
    }
  }
  for (int64_t i = 0; i < b * b; i++) r[i] = 2 * r[i] - (i % (b + 1) == 0);
}

static esp_status oft_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  (void)r0; /* every row is turned the same way */
  const oft_site *os = a->site_state[s->index];
  const esp_param *p = &a->params->list[os->v];
  int64_t b = os->shape->b, pairs = p->shape[1];
  float *v = esp_mem_alloc(ESP_MEM_HOST, (size_t)p->numel * sizeof *v);
  double *r = esp_mem_alloc(ESP_MEM_HOST, (size_t)(4 * b * b + b) * sizeof *r), *work = r + b * b, *row = r + 4 * b * b;
  esp_status st = v && r ? ESP_OK : ESP_ERR_MEMORY;
  if (st == ESP_OK) esp_params_get(a->params, os->v, v);
  for (int64_t g = 0; st == ESP_OK && g < os->blocks; g++) {
    if (g < os->shape->n) host_rotation(a, v + g * pairs, b, r, work);
    for (int64_t i = 0; i < n; i++) {
      float *wi = w + i * s->in + g * b;
      for (int64_t j = 0; j < b; j++) {
        row[j] = 0;
        for (int64_t k = 0; k < b; k++) row[j] += wi[k] * r[j * b + k]; /* W' = W R^T */
      }
      for (int64_t j = 0; j < b; j++) wi[j] = (float)row[j];
    }
  }
  esp_mem_free(v);
  esp_mem_free(r);
  return st;
}

/* ---- configuration ---- */

static esp_status oft_config_check(const esp_adapter_cfg *c) {
  ESP_TRY(esp_plain_config_check(c));
  if (c->cayley_terms < 0 || c->cayley_terms == 1 || c->cayley_terms > MOST_TERMS)
    return esp_fail(ESP_ERR_RECIPE, "adapter.cayley_terms: must be 0 (exact) or from 2 to %d, is %lld", MOST_TERMS,
                    (long long)c->cayley_terms);
  if (c->oft_blocks < 0 || (c->oft_blocks == 0 && c->oft_block_size < 2))
    return esp_fail(ESP_ERR_RECIPE, "adapter.oft_block_size: must be at least 2, is %lld",
                    (long long)c->oft_block_size);
  if (c->coft && !(c->coft_eps > 0))
    return esp_fail(ESP_ERR_RECIPE, "adapter.coft_eps: must be above 0, is %g", c->coft_eps);
  return esp_config_refuse(c, "oft", ESP_CFG_DROPOUT);
}

static void oft_config_write(const esp_adapter *a, json_t *j) {
  const esp_adapter_cfg *c = &a->cfg;
  json_object_del(j, "trainable_token_indices"); /* PEFT has it for LoRA only */
  json_object_set_new(j, "block_share", json_boolean(c->oft_block_share));
  json_object_set_new(j, "coft", json_boolean(c->coft));
  json_object_set_new(j, "eps", json_real(c->coft ? c->coft_eps : 6e-5));
  json_object_set_new(j, "fan_in_fan_out", json_boolean(esp_model_describe(a->model)->transposed));
  json_object_set_new(j, "init_weights", json_true());
  json_object_set_new(j, "module_dropout", json_real(0.0));
  json_object_set_new(j, "num_cayley_neumann_terms", json_integer(c->cayley_terms ? (json_int_t)c->cayley_terms : 5));
  json_object_set_new(j, "oft_block_size", json_integer(c->oft_blocks ? 0 : (json_int_t)c->oft_block_size));
  json_object_set_new(j, "r", json_integer((json_int_t)c->oft_blocks));
  json_object_set_new(j, "use_cayley_neumann", json_boolean(c->cayley_terms != 0));
}

/* module_dropout is read by nothing in PEFT's forward either. */
static esp_status oft_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  (void)arena;
  int share = 0, coft = 0, series = 1;
  c->r = 1; /* has no meaning here */
  c->oft_block_size = 32;
  c->cayley_terms = 5;
  c->coft_eps = 6e-5;
  ESP_TRY(esp_json_i64(j, "r", path, 0, &c->oft_blocks));
  ESP_TRY(esp_json_i64(j, "oft_block_size", path, 1, &c->oft_block_size));
  ESP_TRY(esp_json_i64(j, "num_cayley_neumann_terms", path, 0, &c->cayley_terms));
  ESP_TRY(esp_json_f64(j, "eps", path, 0, &c->coft_eps));
  ESP_TRY(esp_json_bool(j, "block_share", path, 0, &share));
  ESP_TRY(esp_json_bool(j, "coft", path, 0, &coft));
  ESP_TRY(esp_json_bool(j, "use_cayley_neumann", path, 0, &series));
  c->oft_block_share = share != 0;
  c->coft = coft != 0;
  if (!series) c->cayley_terms = 0;
  return ESP_OK;
}

const esp_adapter_kind esp_kind_oft = {
    .name = "oft",
    .peft_type = "OFT",
    .summary = "rotations of blocks of the input, y = W blockdiag(R)^T x (arXiv:2306.07280)",
    .site_kinds = 1u << ESP_SITE_LINEAR,
    .mergeable = true,
    .targets = true,
    .alone = true,
    .product = ESP_PRODUCT_OWN,
    .declare = oft_declare,
    .site_forward = oft_forward,
    .site_backward = oft_backward,
    .destroy = oft_destroy,
    .after_step = oft_after_step,
    .loaded = project,
    .config_write = oft_config_write,
    .config_read = oft_config_read,
    .config_check = oft_config_check,
    .materialise = oft_materialise,
};
