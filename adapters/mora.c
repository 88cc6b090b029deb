/* mora.c: MoRA, high-rank updating (Jiang et al. 2024, arXiv:2405.12130): y = W x + b + D(M C(drop(x))) with one square
 * matrix M [n, n] per site, n = floor(sqrt((in + out) r) + 1/2), hence the parameters of a LoRA of rank r, and with C
 * and D that have no parameters. The authors' two recommended pairs, as their code (kongds/MoRA, types 1 and 6) has
 * them:
 *   sharing   C(x)[j] = sum of x[i] over i = j mod n; x is continued by its own first columns to a multiple of n.
 *             D repeats the n outputs until `out` columns are filled.
 *   rotation  x, continued the same way, is cut into segments of n; segment g is turned by the rotary angles of
 *             position g (base 10000, halves paired, n even); M is applied to each; the results stand side by side,
 *             cut or repeated to `out` columns. Segments beyond the cut have no effect and are not computed.
 * There is no scale: alpha is not used. M starts at zero.
 *
 * Nothing is kept for backward: C(x) is made again from x, which costs one pass over it. Neighbouring sites with the
 * same n share C(x) and the way back through it.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "adapters/internal.h"
#include "core/rng.h"
#include "io/json.h"

typedef struct mora_site {
  int64_t rank; /* of the exact low-rank form, 0: none (esp_adapter_rank reads it) */
  int64_t n;
  int64_t segments, used; /* of x; rotation: those that reach an output, else 1 */
  int m;
} mora_site;

typedef struct mora_run { /* neighbouring sites that share C(x) */
  int first, count;
  esp_tensor du;
} mora_run;

typedef struct mora_group {
  int n, n_runs;
  esp_site *sites[3];
  mora_run runs[3];
  float *cosine[3], *sine[3]; /* per run, backend memory [used * n]; rotation only */
} mora_group;

static bool rotates(const esp_adapter_cfg *cfg) {
  return cfg->mora_type && strcmp(cfg->mora_type, "rotation") == 0;
}

static double angle(int64_t n, int64_t segment, int64_t j) { /* of the pair (j, j + n/2) */
  return (double)segment * pow(10000.0, -(double)(2 * j) / (double)n);
}

static esp_status new_site(esp_adapter *a, esp_site *s, mora_site **out) {
  mora_site *ms = *out = esp_arena_alloc(a->arena, sizeof *ms);
  char name[512];
  if (!ms) return ESP_ERR_MEMORY;
  double r = esp_pattern_value(a->cfg.rank_pattern, a->cfg.n_rank_pattern, s->path, (double)a->cfg.r);
  ms->n = (int64_t)(sqrt((double)(s->in + s->out) * r) + 0.5);
  if (rotates(&a->cfg)) ms->n -= ms->n % 2;
  if (ms->n > s->in || ms->n > s->out || ms->n < 1)
    return esp_fail(ESP_ERR_RECIPE,
                    "adapter.r: the square matrix of mora would be %lld wide at rank %g, %s is [%lld, %lld]",
                    (long long)ms->n, r, s->path, (long long)s->out, (long long)s->in);
  ms->segments = (s->in + ms->n - 1) / ms->n;
  int64_t reach = (s->out + ms->n - 1) / ms->n;
  ms->used = !rotates(&a->cfg) ? 1 : reach < ms->segments ? reach : ms->segments;
  ms->rank = rotates(&a->cfg) ? 0 : ms->n;
  snprintf(name, sizeof name, ESP_PEFT_PREFIX "%s.mora_A.weight", s->path);
  ms->m = esp_params_add(a->params, name, 2, (int64_t[]){ms->n, ms->n}, true);
  a->site_state[s->index] = ms;
  return ms->m < 0 ? ESP_ERR_MEMORY : ESP_OK;
}

static esp_status make_table(esp_adapter *a, const mora_site *ms, float **cosine, float **sine) {
  esp_backend *be = esp_model_backend(a->model);
  int64_t count = ms->used * ms->n, half = ms->n / 2;
  float *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * count) * sizeof *host);
  if (!host) return ESP_ERR_MEMORY;
  for (int64_t i = 0; i < count; i++) {
    double t = angle(ms->n, i / ms->n, i % ms->n % half);
    host[i] = (float)cos(t);
    host[count + i] = (float)sin(t);
  }
  *cosine = be->ops->alloc(be, ESP_MEM_PARAMS, count * 4);
  *sine = be->ops->alloc(be, ESP_MEM_PARAMS, count * 4);
  esp_status st = *cosine && *sine ? ESP_OK : esp_backend_why_null(be);
  if (st == ESP_OK) {
    be->ops->upload(be, *cosine, host, count * 4);
    be->ops->upload(be, *sine, host + count, count * 4);
  }
  esp_mem_free(host);
  return st;
}

static esp_status mora_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  mora_group *mg = a->group_state[g->index] = esp_arena_alloc(a->arena, sizeof *mg);
  const mora_site *last = NULL;
  if (!mg) return ESP_ERR_MEMORY;
  for (int i = 0; i < g->n_sites; i++) {
    mora_site *ms;
    if (!hit[i]) continue;
    ESP_TRY(new_site(a, g->sites[i], &ms));
    if (!last || last->n != ms->n || last->used != ms->used) {
      int k = mg->n_runs++;
      mg->runs[k].first = mg->n;
      if (rotates(&a->cfg)) ESP_TRY(make_table(a, ms, &mg->cosine[k], &mg->sine[k]));
    }
    mg->runs[mg->n_runs - 1].count++;
    mg->sites[mg->n++] = g->sites[i];
    last = ms;
  }
  return ESP_OK;
}

static void mora_destroy(esp_adapter *a) {
  esp_group **groups;
  esp_backend *be = esp_model_backend(a->model);
  int n = esp_model_groups(a->model, &groups);
  for (int i = 0; i < n; i++) {
    mora_group *mg = a->group_state[i];
    for (int k = 0; mg && k < mg->n_runs; k++) {
      if (mg->cosine[k]) be->ops->free(be, mg->cosine[k]);
      if (mg->sine[k]) be->ops->free(be, mg->sine[k]);
    }
  }
}

static const mora_site *run_site(const esp_adapter *a, const mora_group *mg, const mora_run *r) {
  return a->site_state[mg->sites[r->first]->index];
}

/* ---- C and the way back ---- */

/* dst[:, j] (+)= src[:, ring position at + j], the ring being the columns of src; or its transpose. */
static void ring_copy(esp_run *run, esp_tensor dst, esp_tensor src, int64_t at, float beta, bool back) {
  int64_t width = esp_tensor_cols(&dst), ring = esp_tensor_cols(&src);
  for (int64_t j = 0; j < width;) {
    int64_t from = (at + j) % ring, n = width - j < ring - from ? width - j : ring - from;
    esp_tensor d = esp_tensor_cols_view(&dst, j, n), s = esp_tensor_cols_view(&src, from, n);
    if (back)
      run->be->ops->axpby(run->be, s, 1.0f, d, 1.0f);
    else
      run->be->ops->axpby(run->be, d, 1.0f, s, beta);
    j += n;
  }
}

/* y = x turned by the angles of each segment (inverse: turned back); [T, used * n], y does not overlap x. */
static void rotate(esp_run *run, const mora_group *mg, int k, const mora_site *ms, esp_tensor y, esp_tensor x,
                   bool inverse) {
  const esp_backend_ops *ops = run->be->ops;
  int64_t rows = esp_tensor_rows(&x), width = ms->used * ms->n, half = ms->n / 2;
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor xs = esp_stack_tensor(run->stack, run->compute, rows, width);
  ops->mul_cols(run->be, y, x, esp_tensor_1d(mg->cosine[k], ESP_F32, width));
  ops->mul_cols(run->be, xs, x, esp_tensor_1d(mg->sine[k], ESP_F32, width));
  esp_tensor ys = esp_tensor_2d(y.data, y.dtype, rows * ms->used, ms->n);
  xs = esp_tensor_2d(xs.data, xs.dtype, rows * ms->used, ms->n);
  ops->axpby(run->be, esp_tensor_cols_view(&ys, 0, half), inverse ? 1.0f : -1.0f, esp_tensor_cols_view(&xs, half, half),
             1.0f);
  ops->axpby(run->be, esp_tensor_cols_view(&ys, half, half), inverse ? -1.0f : 1.0f, esp_tensor_cols_view(&xs, 0, half),
             1.0f);
  esp_stack_release(run->stack, mark);
}

/* C(x) as rows of n: [T * used, n], on the stack. */
static esp_tensor compress(esp_adapter *a, esp_run *run, const mora_group *mg, int k, esp_tensor x) {
  const mora_site *ms = run_site(a, mg, &mg->runs[k]);
  int64_t rows = esp_tensor_rows(&x), width = ms->used * ms->n;
  esp_tensor u = esp_stack_tensor(run->stack, run->compute, rows, width);
  int64_t mark = esp_stack_mark(run->stack);
  if (rotates(&a->cfg)) {
    esp_tensor padded = esp_stack_tensor(run->stack, run->compute, rows, width);
    ring_copy(run, padded, x, 0, 0.0f, false);
    rotate(run, mg, k, ms, u, padded, false);
  } else { /* the sum in fp32, rounded once */
    esp_tensor sum = run->compute == ESP_F32 ? u : esp_stack_tensor(run->stack, ESP_F32, rows, width);
    for (int64_t s = 0; s < ms->segments; s++) ring_copy(run, sum, x, s * ms->n, s > 0 ? 1.0f : 0.0f, false);
    if (run->compute != ESP_F32) run->be->ops->axpby(run->be, u, 1.0f, sum, 0.0f);
  }
  esp_stack_release(run->stack, mark);
  return esp_tensor_2d(u.data, u.dtype, rows * ms->used, ms->n);
}

/* dx += C^T du. */
static void compress_bwd(esp_adapter *a, esp_run *run, const mora_group *mg, int k, esp_tensor dx) {
  const mora_site *ms = run_site(a, mg, &mg->runs[k]);
  int64_t rows = esp_tensor_rows(&dx), width = ms->used * ms->n;
  esp_tensor du = esp_tensor_2d(mg->runs[k].du.data, mg->runs[k].du.dtype, rows, width);
  int64_t mark = esp_stack_mark(run->stack);
  if (rotates(&a->cfg)) {
    esp_tensor back = esp_stack_tensor(run->stack, run->compute, rows, width);
    rotate(run, mg, k, ms, back, du, true);
    ring_copy(run, back, dx, 0, 1.0f, true);
  } else
    for (int64_t s = 0; s < ms->segments; s++) ring_copy(run, du, dx, s * ms->n, 1.0f, true);
  esp_stack_release(run->stack, mark);
}

/* ---- dropout on x, drawn once per group and drawn again in backward ---- */

static bool drops(const esp_adapter *a, const esp_run *run) {
  return run->train && a->trainable && a->cfg.dropout > 0;
}

static void dropped(esp_adapter *a, esp_run *run, const esp_group *g, esp_tensor y, esp_tensor x, float beta) {
  uint64_t stream = esp_rng_stream(ESP_RNG_DROPOUT, (uint64_t)run->part, (uint64_t)g->index,
                                   esp_rng_stream_name(ESP_RNG_DROPOUT, a->name));
  run->be->ops->dropout(run->be, y, x, (float)a->cfg.dropout, run->seed, run->draw, stream, beta);
}

static esp_tensor maybe_dropped(esp_adapter *a, esp_run *run, const esp_group *g, esp_tensor x) {
  if (!drops(a, run)) return x;
  esp_tensor y = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), esp_tensor_cols(&x));
  dropped(a, run, g, y, x, 0.0f);
  return y;
}

/* ---- the step ---- */

static void mora_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  const mora_group *mg = a->group_state[g->index];
  const esp_backend_ops *ops = run->be->ops;
  if (!mg) return;
  int64_t mark = esp_stack_mark(run->stack), rows = esp_tensor_rows(&x);
  esp_tensor xd = maybe_dropped(a, run, g, x);
  for (int k = 0; k < mg->n_runs; k++) {
    const mora_site *shared = run_site(a, mg, &mg->runs[k]);
    int64_t width = shared->used * shared->n;
    esp_tensor u = compress(a, run, mg, k, xd);
    esp_tensor z = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&u), shared->n);
    for (int i = mg->runs[k].first; i < mg->runs[k].first + mg->runs[k].count; i++) {
      const esp_site *s = mg->sites[i];
      const mora_site *ms = a->site_state[s->index];
      ops->matmul(run->be, z, u, false, esp_param_shadow(a->params, ms->m), true, (float)a->weight, 0.0f);
      esp_tensor row = esp_tensor_2d(z.data, z.dtype, rows, width);
      for (int64_t t = 0; t < s->out; t += width) {
        int64_t n = s->out - t < width ? s->out - t : width;
        ops->axpby(run->be, esp_tensor_cols_view(&y, s->col0 + t, n), 1.0f, esp_tensor_cols_view(&row, 0, n), 1.0f);
      }
    }
  }
  esp_stack_release(run->stack, mark);
}

/* D^T dy: [T * used, n] on the stack; the sum over the repetitions in fp32. */
static esp_tensor expand_bwd(esp_run *run, const mora_site *ms, const esp_site *s, esp_tensor dy) {
  const esp_backend_ops *ops = run->be->ops;
  int64_t rows = esp_tensor_rows(&dy), width = ms->used * ms->n;
  esp_tensor dz = esp_stack_tensor(run->stack, run->compute, rows, width);
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor sum = dz;
  if (s->out > width && run->compute != ESP_F32) sum = esp_stack_tensor(run->stack, ESP_F32, rows, width);
  if (s->out < width) ops->zero(run->be, dz.data, esp_tensor_bytes(&dz));
  for (int64_t t = 0; t < s->out; t += width) {
    int64_t n = s->out - t < width ? s->out - t : width;
    ops->axpby(run->be, esp_tensor_cols_view(&sum, 0, n), 1.0f, esp_tensor_cols_view(&dy, s->col0 + t, n),
               t > 0 ? 1.0f : 0.0f);
  }
  if (sum.data != dz.data) ops->axpby(run->be, dz, 1.0f, sum, 0.0f);
  esp_stack_release(run->stack, mark);
  return esp_tensor_2d(dz.data, dz.dtype, rows * ms->used, ms->n);
}

/* dM += (D^T dy)^T C(x); du = (D^T dy) M waits for input_bwd. */
static int mora_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                          int max, void **slot) {
  mora_group *mg = a->group_state[g->index];
  const esp_backend_ops *ops = run->be->ops;
  if (!mg) return 0;
  int64_t rows = esp_tensor_rows(&x);
  for (int k = 0; k < mg->n_runs; k++) {
    const mora_site *ms = run_site(a, mg, &mg->runs[k]);
    mg->runs[k].du = esp_stack_tensor(run->stack, run->compute, rows * ms->used, ms->n);
  }
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor xd = a->trainable ? maybe_dropped(a, run, g, x) : x;
  for (int k = 0; k < mg->n_runs; k++) {
    int64_t inner = esp_stack_mark(run->stack);
    esp_tensor u = a->trainable ? compress(a, run, mg, k, xd) : xd;
    for (int i = 0; i < mg->runs[k].count; i++) {
      const esp_site *s = mg->sites[mg->runs[k].first + i];
      const mora_site *ms = a->site_state[s->index];
      int64_t each = esp_stack_mark(run->stack);
      esp_tensor dz = expand_bwd(run, ms, s, dy);
      if (a->trainable)
        ops->matmul(run->be, esp_param_grad(a->params, ms->m), dz, true, u, false, (float)a->weight, 1.0f);
      ops->matmul(run->be, mg->runs[k].du, dz, false, esp_param_shadow(a->params, ms->m), false, (float)a->weight,
                  i > 0 ? 1.0f : 0.0f);
      esp_stack_release(run->stack, each);
    }
    esp_stack_release(run->stack, inner);
  }
  esp_stack_release(run->stack, mark);
  return 0;
}

static void mora_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  const mora_group *mg = a->group_state[g->index];
  if (!mg || !dx.data) return;
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor d = dx;
  if (drops(a, run)) { /* the mask stands between the two */
    d = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&dx), esp_tensor_cols(&dx));
    run->be->ops->zero(run->be, d.data, esp_tensor_bytes(&d));
  }
  for (int k = 0; k < mg->n_runs; k++) compress_bwd(a, run, mg, k, d);
  if (drops(a, run)) dropped(a, run, g, dx, d, 1.0f);
  esp_stack_release(run->stack, mark);
}

/* ---- merge, export ---- */

/* One row of the change, before the columns are folded onto the ring: c[segments * n]. */
static void change_row(const esp_adapter *a, const mora_site *ms, const float *M, int64_t o, float *c) {
  int64_t n = ms->n, half = n / 2, at = o % (ms->used * n);
  const float *row = M + at % n * n;
  memset(c, 0, (size_t)(ms->segments * n) * sizeof *c);
  if (!rotates(&a->cfg)) {
    for (int64_t g = 0; g < ms->segments; g++) memcpy(c + g * n, row, (size_t)n * sizeof *c);
    return;
  }
  int64_t g = at / n;
  for (int64_t j = 0; j < half; j++) {
    float cs = (float)cos(angle(n, g, j)), sn = (float)sin(angle(n, g, j));
    c[g * n + j] = row[j] * cs + row[j + half] * sn;
    c[g * n + half + j] = row[j + half] * cs - row[j] * sn;
  }
}

static esp_status mora_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  const mora_site *ms = a->site_state[s->index];
  int64_t width = ms->segments * ms->n;
  float *M = esp_mem_alloc(ESP_MEM_HOST, (size_t)(ms->n * ms->n + width + s->in) * sizeof *M);
  if (!M) return ESP_ERR_MEMORY;
  float *c = M + ms->n * ms->n, *sum = c + width;
  esp_params_get(a->params, ms->m, M);
  for (int64_t o = 0; o < n; o++) {
    change_row(a, ms, M, r0 + o, c);
    memset(sum, 0, (size_t)s->in * sizeof *sum);
    for (int64_t i = 0; i < width; i++) sum[i % s->in] += c[i];
    for (int64_t i = 0; i < s->in; i++) w[o * s->in + i] += (float)a->weight * sum[i];
  }
  esp_mem_free(M);
  return ESP_OK;
}

/* sharing: A = M C, and B repeats the identity. The rotated form has the full rank of its blocks: none. */
static int64_t mora_low_rank(esp_adapter *a, esp_site *s, float *A, float *B) {
  const mora_site *ms = a->site_state[s->index];
  int64_t n = ms->n;
  if (ms->rank == 0 || (!A && !B)) return ms->rank;
  for (int64_t o = 0; B && o < s->out; o++)
    for (int64_t k = 0; k < n; k++) B[o * n + k] = k == o % n ? 1.0f : 0.0f;
  if (!A) return n;
  memset(A, 0, (size_t)(n * s->in) * sizeof *A);
  return mora_materialise(a, s, 0, n, A) == ESP_OK ? n : -1; /* its first n rows */
}

/* ---- configuration ---- */

static void mora_config_write(const esp_adapter *a, json_t *j) {
  json_object_set_new(j, "r", json_integer((json_int_t)a->cfg.r));
  json_object_set_new(j, "mora_type", json_integer(rotates(&a->cfg) ? 6 : 1));
  json_object_set_new(j, "mora_dropout", json_real(a->cfg.dropout));
  json_object_set_new(j, "rank_pattern",
                      esp_json_patterns(a, a->cfg.rank_pattern, a->cfg.n_rank_pattern, (double)a->cfg.r, 1));
}

static esp_status mora_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  int64_t type = 1;
  ESP_TRY(esp_json_i64(j, "r", path, 1, &c->r));
  ESP_TRY(esp_json_i64(j, "mora_type", path, 0, &type));
  ESP_TRY(esp_json_f64(j, "mora_dropout", path, 0, &c->dropout));
  if (type != 1 && type != 6)
    return esp_fail(ESP_ERR_DATA, "%s: mora_type %lld is not supported (1: sharing, 6: rotation)", path,
                    (long long)type);
  c->mora_type = type == 6 ? "rotation" : "sharing";
  return esp_json_read_patterns(j, "rank_pattern", path, arena, &c->rank_pattern, &c->n_rank_pattern);
}

static esp_status mora_config_check(const esp_adapter_cfg *c) {
  if (c->mora_type && strcmp(c->mora_type, "sharing") && strcmp(c->mora_type, "rotation"))
    return esp_fail(ESP_ERR_RECIPE, "adapter.mora_type: '%s' is not one of sharing, rotation", c->mora_type);
  if (strcmp(c->init, "default"))
    return esp_fail(ESP_ERR_RECIPE, "adapter.init: '%s' is for lora; mora starts at zero", c->init);
  if (c->rslora || c->lora_bias)
    return esp_fail(ESP_ERR_RECIPE, "adapter.%s: is for lora; mora has no scale and no B",
                    c->rslora ? "rslora" : "lora_bias");
  if (c->n_alpha_pattern) return esp_fail(ESP_ERR_RECIPE, "adapter.alpha_pattern: is for lora; mora has no scale");
  return ESP_OK;
}

const esp_adapter_kind esp_kind_mora = {
    .name = "mora",
    .peft_type = "MORA",
    .summary = "one square matrix between sharing or rotating operators, y = W x + D(M C(x)) (arXiv:2405.12130)",
    .site_kinds = 1u << ESP_SITE_LINEAR,
    .mergeable = true,
    .targets = true,
    .declare = mora_declare,
    .output = mora_output,
    .tails_bwd = mora_tails_bwd,
    .input_bwd = mora_input_bwd,
    .destroy = mora_destroy,
    .materialise = mora_materialise,
    .low_rank = mora_low_rank,
    .config_write = mora_config_write,
    .config_read = mora_config_read,
    .config_check = mora_config_check,
};
