/* test_backend_ops.c: conformance of the operations that are neither products nor attention: forward against fp64,
 * backward against central differences, on every instruction set, both types, odd shapes, strided views, one thread
 * against two.
 * Seen to catch: the mean term of LayerNorm's backward dropped (c0 = 0 in norm_bwd_row). */
#include "ops/ops_check.h"

static const int64_t widths[] = {1, 2, 15, 16, 17, 33, 64, 100};
#define N_WIDTHS ((int)(sizeof widths / sizeof *widths))

/* ---- activations and gated activations ---- */
static double act_ref(double x, esp_act act) {
  switch (act) {
  case ESP_ACT_SILU:
    return x / (1 + exp(-x));
  case ESP_ACT_GELU_TANH:
    return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  case ESP_ACT_GELU_ERF:
    return 0.5 * x * erfc(-x / sqrt(2));
  case ESP_ACT_TANH:
    return tanh(x);
  default:
    return x > 0 ? x : 0;
  }
}
typedef struct glu_test {
  buf x, y, dy, dx;
  esp_act act;
  bool gated;
} glu_test;
static double glu_loss(void *ctx) {
  glu_test *t = ctx;
  double l = 0;
  int64_t n = t->y.t.shape[1], w = t->x.t.shape[1];
  for (int64_t i = 0; i < buf_n(&t->y); i++) {
    const double *row = t->x.v + i / n * w;
    l += t->dy.v[i] * act_ref(row[i % n], t->act) * (t->gated ? row[n + i % n] : 1);
  }
  return l;
}
static void glu_run(void *ctx) {
  glu_test *t = ctx;
  if (t->gated) {
    check_be->ops->glu(check_be, t->y.t, t->x.t, t->act);
    check_be->ops->glu_bwd(check_be, t->dx.t, t->dy.t, t->x.t, t->act);
  } else {
    check_be->ops->act(check_be, t->y.t, t->x.t, t->act);
    check_be->ops->act_bwd(check_be, t->dx.t, t->dy.t, t->x.t, t->act);
  }
}
static void test_activations(void **state) {
  (void)state;
  EACH_TYPE(type)
  EACH_ISA for (int act = ESP_ACT_SILU; act <= ESP_ACT_RELU; act++) for (int gated = 0; gated < 2;
                                                                         gated++) for (int w = 0; w < N_WIDTHS; w++) {
    int64_t n = widths[w], rows = w % 3 + 1;
    glu_test t = {.act = (esp_act)act, .gated = gated};
    t.x = buf_new(type, rows, gated ? 2 * n : n, 3, 2.5);
    t.y = buf_new(type, rows, n, 1, 1);
    t.dy = buf_new(type, rows, n, 2, 1);
    t.dx = buf_new(type, rows, gated ? 2 * n : n, 5, 1);
    for (int64_t i = 0; i < buf_n(&t.x); i++) /* keep differences off relu's corner */
      if (fabs(t.x.v[i]) < 1e-3) buf_store(&t.x, i, 0.5);
    out_ref outs[] = {{t.y.t.data, t.y.bytes}, {t.dx.t.data, t.dx.bytes}};
    check_threads(glu_run, &t, outs, 2);
    double want[512];
    for (int64_t i = 0; i < rows * n; i++) {
      const double *row = t.x.v + i / n * t.x.t.shape[1];
      want[i] = act_ref(row[i % n], t.act) * (gated ? row[n + i % n] : 1);
    }
    buf_close("act", &t.y, want, type_tol(type, 2e-6), 0.1);
    check_grad("dact", glu_loss, &t, &t.x, &t.dx, 20, type_tol(type, 1e-5), 1e-1);
    buf_free(&t.x), buf_free(&t.y), buf_free(&t.dy), buf_free(&t.dx);
  }
}
static void test_activation_extremes(void **state) {
  (void)state;
  static const float xs[] = {-200, -100, -88, -30, -12, -6, -4, -1e-3f, 0, 1e-3f, 4, 12, 88, 100, 200, 1e30f};
  EACH_ISA for (int act = ESP_ACT_SILU; act <= ESP_ACT_RELU; act++) {
    float y[16], dx[16], one[16];
    for (int i = 0; i < 16; i++) one[i] = 1;
    esp_tensor tx = esp_tensor_2d((void *)xs, ESP_F32, 1, 16), ty = esp_tensor_2d(y, ESP_F32, 1, 16);
    esp_tensor td = esp_tensor_2d(dx, ESP_F32, 1, 16), t1 = esp_tensor_2d(one, ESP_F32, 1, 16);
    check_be->ops->act(check_be, ty, tx, (esp_act)act);
    check_be->ops->act_bwd(check_be, td, t1, tx, (esp_act)act);
    for (int i = 0; i < 16; i++) {
      check_close("extreme", y[i], act_ref(xs[i], (esp_act)act), 1e-5, 1e-3);
      if (xs[i] < 1e10f) assert_true(isfinite(dx[i]));
    }
  }
}

/* ---- norms ---- */
typedef struct norm_test {
  esp_norm_kind kind;
  buf x, res, r, y, w, b, dy, dx;
  float rstd[64], mean[64], dw[256], db[256], offset;
  bool residual, bias, accumulate;
  double eps, *out;
} norm_test;
static void norm_ref(norm_test *t) {
  int64_t n = t->x.t.shape[1];
  for (int64_t r = 0; r < t->x.t.shape[0]; r++) {
    const double *x = t->r.v + r * n;
    double mean = 0, var = 0;
    if (t->kind == ESP_NORM_LAYER) {
      for (int64_t i = 0; i < n; i++) mean += x[i];
      mean /= (double)n;
    }
    for (int64_t i = 0; i < n; i++) var += (x[i] - mean) * (x[i] - mean);
    double k = 1 / sqrt(var / (double)n + t->eps);
    for (int64_t i = 0; i < n; i++)
      t->out[r * n + i] = (x[i] - mean) * k * (t->w.v[i] + t->offset) + (t->bias ? t->b.v[i] : 0);
  }
}
static double norm_loss(void *ctx) {
  norm_test *t = ctx;
  norm_ref(t);
  double l = 0;
  for (int64_t i = 0; i < buf_n(&t->y); i++) l += t->out[i] * t->dy.v[i];
  return l;
}
static esp_tensor flat(const buf *b) {
  return esp_tensor_1d(b->t.data, b->t.dtype, b->t.shape[1]);
}
static void norm_run(void *ctx) {
  norm_test *t = ctx;
  esp_norm_args a = {.kind = t->kind,
                     .x = t->x.t,
                     .y = t->y.t,
                     .w = flat(&t->w),
                     .eps = (float)t->eps,
                     .offset = t->offset,
                     .rstd = t->rstd,
                     .mean = t->mean};
  if (t->bias) a.b = flat(&t->b);
  if (t->residual) {
    a.residual = t->res.t;
    a.r_out = t->r.t;
  }
  check_be->ops->norm(check_be, &a);
  for (int64_t i = 0; i < buf_n(&t->dx); i++) buf_store(&t->dx, i, t->accumulate ? 0.25 : 99);
  memset(t->dw, 0, sizeof t->dw);
  memset(t->db, 0, sizeof t->db);
  esp_norm_bwd_args g = {.kind = t->kind,
                         .r = t->residual ? t->r.t : t->x.t,
                         .dy = t->dy.t,
                         .dx = t->dx.t,
                         .w = flat(&t->w),
                         .offset = t->offset,
                         .rstd = t->rstd,
                         .mean = t->mean,
                         .dw = t->dw,
                         .db = t->bias ? t->db : NULL,
                         .accumulate = t->accumulate};
  check_be->ops->norm_bwd(check_be, &g);
}
static void test_norms(void **state) {
  (void)state;
  EACH_TYPE(type)
  EACH_ISA for (int kind = ESP_NORM_RMS; kind <= ESP_NORM_LAYER; kind++) for (int w = kind == ESP_NORM_LAYER;
                                                                              w < N_WIDTHS; w++) {
    int64_t n = widths[w], rows = w % 4 + 1;
    norm_test t = {.kind = (esp_norm_kind)kind, .eps = 1e-5, .offset = w % 2, .residual = w % 3 != 0};
    t.bias = w % 2 == 0, t.accumulate = w % 4 > 1;
    t.x = buf_new(type, rows, n, 2, 1.5), t.res = buf_new(type, rows, n, 0, 1), t.r = buf_new(type, rows, n, 1, 1);
    t.y = buf_new(type, rows, n, 3, 1), t.dy = buf_new(type, rows, n, 0, 1), t.dx = buf_new(type, rows, n, 4, 1);
    t.w = buf_new(w % 2 ? ESP_F32 : type, 1, n, 0, 1), t.b = buf_new(ESP_F32, 1, n, 0, 1);
    t.out = malloc((size_t)(rows * n) * 8);
    out_ref outs[] = {{t.y.t.data, t.y.bytes}, {t.dx.t.data, t.dx.bytes}, {t.dw, sizeof t.dw}, {t.db, sizeof t.db}};
    check_threads(norm_run, &t, outs, 4);
    for (int64_t i = 0; i < rows * n; i++) {
      double sum = t.residual ? t.x.v[i] + t.res.v[i] : t.x.v[i];
      buf_store(&t.r, i, sum); /* rounded once, as the kernel stored it */
    }
    norm_ref(&t);
    buf_close("norm", &t.y, t.out, type_tol(type, 4e-6), 1);
    for (int64_t i = 0; i < rows * n && t.accumulate; i++) buf_store(&t.dx, i, buf_load(&t.dx, i) - 0.25);
    double floor_ = n <= 2 ? 30 : 3; /* two elements: differences of nearly equal numbers */
    check_grad("dnorm", norm_loss, &t, &t.r, &t.dx, 20, type_tol(type, 2e-5), floor_);
    for (int64_t i = 0; i < n; i++) {
      check_close("dw", t.dw[i], check_slope(norm_loss, &t, &t.w.v[i]), 2e-5, 1);
      if (t.bias) check_close("db", t.db[i], check_slope(norm_loss, &t, &t.b.v[i]), 2e-5, 1);
    }
    buf *all[] = {&t.x, &t.res, &t.r, &t.y, &t.dy, &t.dx, &t.w, &t.b};
    for (int i = 0; i < 8; i++) buf_free(all[i]);
    free(t.out);
  }
}

/* ---- rotary positions: the definition, and inverse(forward) == identity ---- */
static void test_rope(void **state) {
  (void)state;
  static const struct {
    int heads, d, rot;
  } rows[] = {{1, 2, 2}, {3, 8, 8}, {2, 64, 64}, {2, 20, 12}, {1, 80, 32}, {4, 34, 34}};
  EACH_TYPE(type) EACH_ISA for (size_t c = 0; c < sizeof rows / sizeof *rows; c++) {
    enum { T = 5, POS = 16 };
    int heads = rows[c].heads, d = rows[c].d, half = rows[c].rot / 2;
    float *cs = malloc((size_t)(POS * half) * 4), *sn = malloc((size_t)(POS * half) * 4);
    for (int p = 0; p < POS; p++)
      for (int i = 0; i < half; i++) {
        double angle = p * pow(10000, -2.0 * i / rows[c].rot);
        cs[p * half + i] = (float)cos(angle), sn[p * half + i] = (float)sin(angle);
      }
    int32_t pos[T] = {0, 3, 15, 1, 0};
    buf x = buf_new(type, T, heads * d, 3, 1);
    double *want = malloc((size_t)buf_n(&x) * 8);
    memcpy(want, x.v, (size_t)buf_n(&x) * 8);
    for (int t = 0; t < T; t++)
      for (int h = 0; h < heads; h++)
        for (int i = 0; i < half; i++) {
          double *u = want + t * heads * d + h * d + i, *v = u + half, a = *u, b = *v;
          double co = cs[pos[t] * half + i], si = sn[pos[t] * half + i];
          *u = a * co - b * si;
          *v = b * co + a * si;
        }
    esp_rope_args a = {
        .x = x.t, .cos_t = cs, .sin_t = sn, .positions = pos, .heads = heads, .head_dim = d, .rot = rows[c].rot};
    check_be->ops->rope(check_be, &a);
    buf_close("rope", &x, want, type_tol(type, 1e-6), 1);
    a.inverse = true;
    check_be->ops->rope(check_be, &a);
    buf_close("rope and back", &x, x.v, type_tol(type, 1e-6) * 2, 1);
    buf_free(&x);
    free(want), free(cs), free(sn);
  }
}

/* ---- cross-entropy ---- */
typedef struct ce_test {
  buf x, d;
  int32_t target[8];
  float weight[8], logprob[8], scale, cap;
  double sums[2]; /* loss, hits */
} ce_test;
static double ce_capped(const ce_test *t, double x) {
  return t->cap > 0 ? t->cap * tanh(x / t->cap) : x;
}
static double ce_row_nll(const ce_test *t, int64_t r) {
  int64_t V = t->x.t.shape[1];
  double top = -1e300, sum = 0;
  for (int64_t j = 0; j < V; j++) top = fmax(top, ce_capped(t, t->x.v[r * V + j]));
  for (int64_t j = 0; j < V; j++) sum += exp(ce_capped(t, t->x.v[r * V + j]) - top);
  return top + log(sum) - ce_capped(t, t->x.v[r * V + t->target[r]]);
}
static double ce_loss(void *ctx) {
  ce_test *t = ctx;
  double l = 0;
  for (int64_t r = 0; r < t->x.t.shape[0]; r++) l += t->scale * t->weight[r] * ce_row_nll(t, r);
  return l;
}
static void ce_run(void *ctx) {
  ce_test *t = ctx;
  t->sums[0] = 0.5, t->sums[1] = 3; /* added to */
  esp_ce_args a = {.logits = t->x.t,
                   .d = t->d.t,
                   .targets = t->target,
                   .weights = t->weight,
                   .scale = t->scale,
                   .softcap = t->cap,
                   .sums = t->sums,
                   .logprob = t->logprob};
  check_be->ops->cross_entropy(check_be, &a);
}
static void test_cross_entropy(void **state) {
  (void)state;
  static const int64_t vocab[] = {1, 2, 7, 16, 50, 1023, 1025, 3000};
  EACH_TYPE(type) EACH_ISA for (int c = 0; c < 8; c++) {
    int64_t n = c % 4 + 1, V = vocab[c];
    ce_test t = {.scale = 0.125f, .cap = c % 3 == 2 ? 5.0f : 0};
    t.x = buf_new(ESP_F32, n, V, 3, c == 5 ? 40 : 3), t.d = buf_new(type, n, V, 1, 1);
    for (int64_t r = 0; r < n; r++) t.target[r] = (int32_t)check_below(V), t.weight[r] = r == 1 ? 0 : (float)r + 0.5f;
    if (V > 40) { /* a tie: the first wins */
      buf_store(&t.x, 30, 500);
      buf_store(&t.x, 37, 500);
      t.target[0] = 30; /* hit: the first of the two; in every other case the second, which is none */
      if (c % 2) t.target[0] = 37;
    }
    out_ref outs[] = {{t.d.t.data, t.d.bytes}, {t.sums, sizeof t.sums}, {t.logprob, sizeof t.logprob}};
    check_threads(ce_run, &t, outs, 3);
    check_close("loss", (t.sums[0] - 0.5) * t.scale, ce_loss(&t), 1e-6, 0.1);
    double hits = 3;
    check_grad("dlogits", ce_loss, &t, &t.x, &t.d, 12, type_tol(type, 1e-5), 1e-2);
    for (int64_t r = 0; r < n; r++) { /* the target's own column is the one that matters most */
      int64_t i = r * V + t.target[r];
      check_close("dtarget", buf_load(&t.d, i), check_slope(ce_loss, &t, &t.x.v[i]), type_tol(type, 1e-5), 1e-2);
      int64_t best = 0;
      for (int64_t j = 1; j < V; j++)
        if (t.x.v[r * V + j] > t.x.v[r * V + best]) best = j;
      hits += best == t.target[r];
      double lp = -ce_row_nll(&t, r);
      check_close("logprob", t.logprob[r], lp, 2e-6, 1);
    }
    assert_true(t.sums[1] == hits);
    buf_free(&t.x), buf_free(&t.d);
  }
}
static void test_cross_entropy_keeps_nan(void **state) {
  (void)state;
  EACH_ISA {
    float x[40] = {0};
    x[17] = NAN;
    int32_t target = 3;
    float weight = 1;
    double sums[2] = {0, 0};
    esp_ce_args a = {
        .logits = esp_tensor_2d(x, ESP_F32, 1, 40), .targets = &target, .weights = &weight, .scale = 1, .sums = sums};
    check_be->ops->cross_entropy(check_be, &a);
    assert_true(isnan(sums[0]));
  }
}

/* ---- elementwise, rows, reductions ---- */
static void test_rows_and_sums(void **state) {
  (void)state;
  EACH_TYPE(ty) EACH_TYPE(tx) EACH_ISA for (int w = 0; w < N_WIDTHS; w++) {
    enum { R = 7 };
    int64_t n = widths[w];
    double want[R * 100];
    double tol = ty == ESP_BF16 ? 0.004 : 1e-6;
    buf x = buf_new(tx, R, n, 2, 1), y = buf_new(ty, R, n, 3, 1), v = buf_new(w % 2 ? ESP_F32 : tx, 1, n, 0, 1);
    for (int64_t i = 0; i < R * n; i++) want[i] = 0.5 * x.v[i] - 2 * y.v[i];
    check_be->ops->axpby(check_be, y.t, 0.5f, x.t, -2);
    buf_close("axpby", &y, want, tol, 1);
    for (int64_t i = 0; i < buf_n(&y); i++) buf_store(&y, i, NAN); /* beta 0 never reads */
    for (int64_t i = 0; i < R * n; i++) want[i] = 3 * x.v[i];
    check_be->ops->axpby(check_be, y.t, 3, x.t, 0);
    buf_close("scale", &y, want, tol, 1);
    for (int64_t i = 0; i < R * n; i++) want[i] = v.v[i % n] * x.v[i];
    check_be->ops->mul_cols(check_be, y.t, x.t, flat(&v));
    buf_close("mul_cols", &y, want, tol, 1);
    static const int32_t perm[R] = {3, 0, 6, 1, 5, 2, 4}, repeat[R] = {2, 2, 0, 6, 6, 6, 1};
    check_be->ops->gather_rows(check_be, y.t, x.t, repeat);
    for (int64_t i = 0; i < R * n; i++) want[i] = x.v[repeat[i / n] * n + i % n];
    buf_close("gather", &y, want, tol, 1);
    check_be->ops->scatter_rows(check_be, y.t, x.t, perm);
    for (int64_t i = 0; i < R * n; i++) want[perm[i / n] * n + i % n] = x.v[i];
    buf_close("scatter", &y, want, tol, 1);
    check_be->ops->embed(check_be, y.t, x.t, repeat, 2);
    for (int64_t i = 0; i < R * n; i++) want[i] = 2 * x.v[repeat[i / n] * n + i % n];
    buf_close("embed", &y, want, tol, 1);
    float sums[100], table[R * 100];
    for (int64_t i = 0; i < n; i++) sums[i] = 1;
    for (int64_t i = 0; i < R * n; i++) table[i] = 2;
    check_be->ops->col_sum(check_be, sums, x.t);
    check_be->ops->embed_bwd(check_be, table, x.t, repeat, 0.5f);
    for (int64_t i = 0; i < n; i++) {
      double s = 1;
      for (int r = 0; r < R; r++) s += x.v[r * n + i];
      check_close("col_sum", sums[i], s, 1e-6, 2);
    }
    for (int64_t i = 0; i < R * n; i++) {
      double s = 2;
      for (int r = 0; r < R; r++)
        if (repeat[r] == i / n) s += 0.5 * x.v[r * n + i % n];
      check_close("embed_bwd", table[i], s, 1e-6, 2);
    }
    buf_free(&x), buf_free(&y), buf_free(&v);
  }
}
static void test_embed_fp16_table(void **state) {
  (void)state;
  uint16_t table[3 * 5];
  for (int i = 0; i < 15; i++) table[i] = esp_f32_to_f16((float)i * 0.25f);
  int32_t ids[2] = {2, 0};
  float y[10];
  check_be->ops->embed(check_be, esp_tensor_2d(y, ESP_F32, 2, 5), esp_tensor_2d(table, ESP_F16, 3, 5), ids, 4);
  for (int i = 0; i < 5; i++) {
    assert_float_equal(y[i], 10 + i, 0);
    assert_float_equal(y[5 + i], i, 0);
  }
}

typedef struct dropout_test {
  buf x, y;
  float p, beta;
  uint64_t draw;
} dropout_test;
enum { DROP_STREAM = 42 };
static const uint64_t drop_seed = 0x123456789abcdefull;
static void dropout_run(void *ctx) {
  dropout_test *t = ctx;
  for (int64_t i = 0; i < buf_n(&t->y); i++) buf_store(&t->y, i, 1);
  check_be->ops->dropout(check_be, t->y.t, t->x.t, t->p, drop_seed, &t->draw, (uint64_t)DROP_STREAM << 33 | 7, t->beta);
}
static void test_dropout_is_the_counter(void **state) {
  (void)state;
  EACH_TYPE(type) EACH_ISA for (int w = 0; w < N_WIDTHS; w++) {
    int64_t n = widths[w], rows = 9;
    dropout_test t = {.p = w % 2 ? 0.1f : 0.5f, .beta = (float)(w % 2), .draw = (uint64_t)w << 21};
    t.x = buf_new(type, rows, n, 2, 1), t.y = buf_new(type, rows, n, 1, 1);
    out_ref outs[] = {{t.y.t.data, t.y.bytes}};
    check_threads(dropout_run, &t, outs, 1);
    double want[900];
    for (int64_t i = 0; i < rows * n; i++) {
      uint64_t seed = esp_draw_seed(drop_seed, t.draw);
      bool keep = esp_rng_uniform(seed, (uint64_t)DROP_STREAM << 33 | 7, (uint64_t)i) >= t.p;
      want[i] = (keep ? t.x.v[i] / (1 - (double)t.p) : 0) + t.beta;
    }
    buf_close("dropout", &t.y, want, type == ESP_BF16 ? 0.004 : 1e-6, 1);
    buf_free(&t.x), buf_free(&t.y);
  }
}

typedef struct dot_test {
  buf a, b;
  double out;
} dot_test;
static void dot_run(void *ctx) {
  dot_test *t = ctx;
  check_be->ops->dot(check_be, &t->out, t->a.t.data, t->b.t.data, buf_n(&t->a));
}
static void test_dot(void **state) {
  (void)state;
  static const int64_t sizes[] = {1, 15, 1000, 100003};
  EACH_ISA for (int c = 0; c < 4; c++) {
    dot_test t = {.a = buf_new(ESP_F32, 1, sizes[c], 0, 1), .b = buf_new(ESP_F32, 1, sizes[c], 0, 1)};
    double want = 0;
    for (int64_t i = 0; i < sizes[c]; i++) want += t.a.v[i] * t.b.v[i];
    out_ref outs[] = {{&t.out, 8}};
    check_threads(dot_run, &t, outs, 1);
    check_close("dot", t.out, want, 1e-11, 1);
    buf_free(&t.a), buf_free(&t.b);
  }
}

/* Wide rows and many of them: more than one chunk of work. */
static void test_large_is_thread_independent(void **state) {
  (void)state;
  norm_test t = {.kind = ESP_NORM_RMS, .eps = 1e-5, .residual = true};
  t.x = buf_new(ESP_BF16, 60, 250, 0, 1), t.res = buf_new(ESP_BF16, 60, 250, 0, 1);
  t.r = buf_new(ESP_BF16, 60, 250, 0, 1), t.y = buf_new(ESP_BF16, 60, 250, 0, 1);
  t.dy = buf_new(ESP_BF16, 60, 250, 0, 1), t.dx = buf_new(ESP_BF16, 60, 250, 0, 1);
  t.w = buf_new(ESP_BF16, 1, 250, 0, 1), t.b = buf_new(ESP_F32, 1, 1, 0, 1);
  EACH_ISA {
    out_ref outs[] = {{t.y.t.data, t.y.bytes}, {t.dx.t.data, t.dx.bytes}, {t.dw, sizeof t.dw}};
    check_threads(norm_run, &t, outs, 3);
  }
  buf *all[] = {&t.x, &t.res, &t.r, &t.y, &t.dy, &t.dx, &t.w, &t.b};
  for (int i = 0; i < 8; i++) buf_free(all[i]);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_activations),
                                     cmocka_unit_test(test_activation_extremes),
                                     cmocka_unit_test(test_norms),
                                     cmocka_unit_test(test_rope),
                                     cmocka_unit_test(test_cross_entropy),
                                     cmocka_unit_test(test_cross_entropy_keeps_nan),
                                     cmocka_unit_test(test_rows_and_sums),
                                     cmocka_unit_test(test_embed_fp16_table),
                                     cmocka_unit_test(test_dropout_is_the_counter),
                                     cmocka_unit_test(test_dot),
                                     cmocka_unit_test(test_large_is_thread_independent)};
  return cmocka_run_group_tests_name("operations", tests, check_setup, check_teardown);
}
