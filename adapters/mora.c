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
 * Nothing is kept for backward. sharing: C(x) is made again from x, which costs one pass over it. rotation: no turned x
 * is ever made, M R_g acts on segment g of x in its place. Neighbouring sites with the same n share C(x) and the way
 * back.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "adapters/internal.h"
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

/* Rows [rows, used * n], fp32, each segment turned by its angles (inverse: back); y does not overlap x. */
static void rotate(esp_run *run, const mora_group *mg, int k, const mora_site *ms, esp_tensor y, esp_tensor x,
                   bool inverse) {
  const esp_backend_ops *ops = run->be->ops;
  int64_t rows = esp_tensor_rows(&x), width = ms->used * ms->n, half = ms->n / 2;
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor xs = esp_stack_tensor(run->stack, ESP_F32, rows, width);
  ops->mul_cols(run->be, y, x, esp_tensor_1d(mg->cosine[k], ESP_F32, width));
  ops->mul_cols(run->be, xs, x, esp_tensor_1d(mg->sine[k], ESP_F32, width));
  esp_tensor ys = esp_tensor_2d(y.data, ESP_F32, rows * ms->used, ms->n);
  xs = esp_tensor_2d(xs.data, ESP_F32, rows * ms->used, ms->n);
  ops->axpby(run->be, esp_tensor_cols_view(&ys, 0, half), inverse ? 1.0f : -1.0f, esp_tensor_cols_view(&xs, half, half),
             1.0f);
  ops->axpby(run->be, esp_tensor_cols_view(&ys, half, half), inverse ? -1.0f : 1.0f, esp_tensor_cols_view(&xs, 0, half),
             1.0f);
  esp_stack_release(run->stack, mark);
}

/* Turning x is turning M back: [n, used * n] on the stack, block g is M R_g. M is much smaller than x. */
static esp_tensor turned(esp_adapter *a, esp_run *run, const mora_group *mg, int k, const mora_site *ms) {
  const esp_backend_ops *ops = run->be->ops;
  int64_t width = ms->used * ms->n;
  esp_tensor w = esp_stack_tensor(run->stack, run->compute, ms->n, width);
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor copies = esp_stack_tensor(run->stack, ESP_F32, ms->n, width);
  esp_tensor exact = run->compute == ESP_F32 ? w : esp_stack_tensor(run->stack, ESP_F32, ms->n, width);
  for (int64_t g = 0; g < ms->used; g++)
    ops->axpby(run->be, esp_tensor_cols_view(&copies, g * ms->n, ms->n), 1.0f, esp_param_master(a->params, ms->m),
               0.0f);
  rotate(run, mg, k, ms, exact, copies, true);
  if (run->compute != ESP_F32) ops->axpby(run->be, w, 1.0f, exact, 0.0f);
  esp_stack_release(run->stack, mark);
  return w;
}

/* dM += the blocks of dw, turned forth. */
static void turned_bwd(esp_adapter *a, esp_run *run, const mora_group *mg, int k, const mora_site *ms, esp_tensor dw) {
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor back = esp_stack_tensor(run->stack, ESP_F32, ms->n, ms->used * ms->n);
  rotate(run, mg, k, ms, back, dw, false);
  for (int64_t g = 0; g < ms->used; g++)
    run->be->ops->axpby(run->be, esp_param_grad(a->params, ms->m), 1.0f, esp_tensor_cols_view(&back, g * ms->n, ms->n),
                        1.0f);
  esp_stack_release(run->stack, mark);
}

/* Segment g of x: a view, but for the last one where x is continued by its first columns. */
static esp_tensor segment(esp_run *run, const mora_site *ms, esp_tensor x, int64_t g) {
  if ((g + 1) * ms->n <= esp_tensor_cols(&x)) return esp_tensor_cols_view(&x, g * ms->n, ms->n);
  esp_tensor s = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), ms->n);
  ring_copy(run, s, x, g * ms->n, 0.0f, false);
  return s;
}

/* Block g of w where it acts on the columns of y that there are. */
static esp_tensor block(const mora_site *ms, const esp_tensor *w, int64_t g, const esp_tensor *y, esp_tensor *yg) {
  int64_t left = esp_tensor_cols(y) - g * ms->n, n = left < ms->n ? left : ms->n;
  esp_tensor b = esp_tensor_cols_view(w, g * ms->n, ms->n);
  *yg = esp_tensor_cols_view(y, g * ms->n, n);
  return esp_tensor_rows_view(&b, 0, n);
}

/* sharing: C(x), [T, n] on the stack: the sum in fp32, rounded once. */
static esp_tensor compress(esp_run *run, const mora_site *ms, esp_tensor x) {
  int64_t rows = esp_tensor_rows(&x);
  esp_tensor u = esp_stack_tensor(run->stack, run->compute, rows, ms->n);
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor sum = run->compute == ESP_F32 ? u : esp_stack_tensor(run->stack, ESP_F32, rows, ms->n);
  for (int64_t s = 0; s < ms->segments; s++) ring_copy(run, sum, x, s * ms->n, s > 0 ? 1.0f : 0.0f, false);
  if (run->compute != ESP_F32) run->be->ops->axpby(run->be, u, 1.0f, sum, 0.0f);
  esp_stack_release(run->stack, mark);
  return u;
}

/* ---- the step ---- */

/* y += D z, z [T, used * n]. */
static void expand(esp_run *run, const esp_site *s, esp_tensor y, esp_tensor z) {
  int64_t width = esp_tensor_cols(&z);
  for (int64_t t = 0; t < s->out; t += width) {
    int64_t n = s->out - t < width ? s->out - t : width;
    run->be->ops->axpby(run->be, esp_tensor_cols_view(&y, s->col0 + t, n), 1.0f, esp_tensor_cols_view(&z, 0, n), 1.0f);
  }
}

/* D^T dy, [T, used * n] or as many columns as dy has: a view where nothing repeats; the sum in fp32. */
static esp_tensor expand_bwd(esp_run *run, const mora_site *ms, const esp_site *s, esp_tensor dy) {
  const esp_backend_ops *ops = run->be->ops;
  int64_t rows = esp_tensor_rows(&dy), width = ms->used * ms->n;
  if (s->out <= width) return esp_tensor_cols_view(&dy, s->col0, s->out);
  esp_tensor dz = esp_stack_tensor(run->stack, run->compute, rows, width);
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor sum = run->compute == ESP_F32 ? dz : esp_stack_tensor(run->stack, ESP_F32, rows, width);
  for (int64_t t = 0; t < s->out; t += width) {
    int64_t n = s->out - t < width ? s->out - t : width;
    ops->axpby(run->be, esp_tensor_cols_view(&sum, 0, n), 1.0f, esp_tensor_cols_view(&dy, s->col0 + t, n),
               t > 0 ? 1.0f : 0.0f);
  }
  if (run->compute != ESP_F32) ops->axpby(run->be, dz, 1.0f, sum, 0.0f);
  esp_stack_release(run->stack, mark);
  return dz;
}

static void rotation_forward(esp_adapter *a, esp_run *run, const mora_group *mg, int k, const esp_site *s, esp_tensor x,
                             esp_tensor y) {
  const mora_site *ms = a->site_state[s->index];
  int64_t width = ms->used * ms->n;
  bool direct = s->out <= width; /* nothing repeats: straight into y */
  esp_tensor w = turned(a, run, mg, k, ms), z = esp_tensor_cols_view(&y, s->col0, s->out);
  if (!direct) z = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), width);
  for (int64_t g = 0; g < ms->used; g++) {
    int64_t mark = esp_stack_mark(run->stack);
    esp_tensor zg, wg = block(ms, &w, g, &z, &zg);
    run->be->ops->matmul(run->be, zg, segment(run, ms, x, g), false, wg, true, (float)a->weight, direct ? 1.0f : 0.0f);
    esp_stack_release(run->stack, mark);
  }
  if (!direct) expand(run, s, y, z);
}

static void mora_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  const mora_group *mg = a->group_state[g->index];
  if (!mg) return;
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor xd = esp_dropped(a, run, g, x);
  for (int k = 0; k < mg->n_runs; k++) {
    const mora_site *shared = run_site(a, mg, &mg->runs[k]);
    int64_t inner = esp_stack_mark(run->stack);
    esp_tensor u = rotates(&a->cfg) ? xd : compress(run, shared, xd);
    for (int i = mg->runs[k].first; i < mg->runs[k].first + mg->runs[k].count; i++) {
      const esp_site *s = mg->sites[i];
      const mora_site *ms = a->site_state[s->index];
      int64_t each = esp_stack_mark(run->stack);
      if (rotates(&a->cfg)) {
        rotation_forward(a, run, mg, k, s, xd, y);
      } else {
        esp_tensor z = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&u), ms->n);
        run->be->ops->matmul(run->be, z, u, false, esp_param_shadow(a->params, ms->m), true, (float)a->weight, 0.0f);
        expand(run, s, y, z);
      }
      esp_stack_release(run->stack, each);
    }
    esp_stack_release(run->stack, inner);
  }
  esp_stack_release(run->stack, mark);
}

/* Of one site: dM, and du (+)= (D^T dy) M, for rotation with the blocks of M turned back. */
static void rotation_backward(esp_adapter *a, esp_run *run, const mora_group *mg, int k, const esp_site *s,
                              esp_tensor x, esp_tensor dz, float beta) {
  const mora_site *ms = a->site_state[s->index];
  const esp_backend_ops *ops = run->be->ops;
  esp_tensor w = turned(a, run, mg, k, ms), dw = esp_stack_tensor(run->stack, ESP_F32, ms->n, ms->used * ms->n);
  ops->zero(run->be, dw.data, esp_tensor_bytes(&dw)); /* rows that no output has */
  for (int64_t g = 0; g < ms->used; g++) {
    int64_t mark = esp_stack_mark(run->stack);
    esp_tensor dzg, wg = block(ms, &w, g, &dz, &dzg), dwg = block(ms, &dw, g, &dz, &dzg);
    if (a->trainable) ops->matmul(run->be, dwg, dzg, true, segment(run, ms, x, g), false, (float)a->weight, 0.0f);
    ops->matmul(run->be, esp_tensor_cols_view(&mg->runs[k].du, g * ms->n, ms->n), dzg, false, wg, false,
                (float)a->weight, beta);
    esp_stack_release(run->stack, mark);
  }
  if (a->trainable) turned_bwd(a, run, mg, k, ms, dw);
}

static int mora_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                          int max, void **slot) {
  mora_group *mg = a->group_state[g->index];
  const esp_backend_ops *ops = run->be->ops;
  if (!mg) return 0;
  for (int k = 0; k < mg->n_runs; k++) {
    const mora_site *ms = run_site(a, mg, &mg->runs[k]);
    mg->runs[k].du = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), ms->used * ms->n);
  }
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor xd = a->trainable ? esp_dropped(a, run, g, x) : x;
  for (int k = 0; k < mg->n_runs; k++) {
    int64_t inner = esp_stack_mark(run->stack);
    bool compressed = a->trainable && !rotates(&a->cfg);
    esp_tensor u = compressed ? compress(run, run_site(a, mg, &mg->runs[k]), xd) : xd;
    for (int i = 0; i < mg->runs[k].count; i++) {
      const esp_site *s = mg->sites[mg->runs[k].first + i];
      const mora_site *ms = a->site_state[s->index];
      int64_t each = esp_stack_mark(run->stack);
      float beta = i > 0 ? 1.0f : 0.0f;
      esp_tensor dz = expand_bwd(run, ms, s, dy);
      if (rotates(&a->cfg)) {
        rotation_backward(a, run, mg, k, s, xd, dz, beta);
      } else {
        if (a->trainable)
          ops->matmul(run->be, esp_param_grad(a->params, ms->m), dz, true, u, false, (float)a->weight, 1.0f);
        ops->matmul(run->be, mg->runs[k].du, dz, false, esp_param_shadow(a->params, ms->m), false, (float)a->weight,
                    beta);
      }
      esp_stack_release(run->stack, each);
    }
    esp_stack_release(run->stack, inner);
  }
  esp_stack_release(run->stack, mark);
  return 0;
}

/* dx += C^T du, at the places that the segments came from. */
static void mora_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  const mora_group *mg = a->group_state[g->index];
  if (!mg || !dx.data) return;
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor d = dx;
  if (esp_drops(a, run)) { /* the mask stands between the two */
    d = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&dx), esp_tensor_cols(&dx));
    run->be->ops->zero(run->be, d.data, esp_tensor_bytes(&d));
  }
  for (int k = 0; k < mg->n_runs; k++) {
    const mora_site *ms = run_site(a, mg, &mg->runs[k]);
    int64_t times = rotates(&a->cfg) ? 1 : ms->segments;
    for (int64_t s = 0; s < times; s++) ring_copy(run, mg->runs[k].du, d, s * ms->n, 1.0f, true);
  }
  if (esp_drops(a, run)) esp_dropout(a, run, g, dx, d, 1.0f);
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
