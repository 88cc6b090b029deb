/* Matrix products against fp64 on every instruction set level this machine has (or on the device that ESP_TEST_BACKEND
 * names): random odd shapes, strides and alignments, exact small integers, guards around every output, one thread
 * against two.
 *
 * Mutation seen to fail: in gemm_tiles.c, transpose8_store, exchanging the two stores of rows 2 and 4 (the
 * re-interleave of linear_dx) fails dx_matches_fp64 and exact_integers. */
#include "backend/cpu/gemm.h"
#include "ops/ops_check.h"

static uint64_t draws;
static uint64_t below(uint64_t n) {
  return esp_rng_below(7, 1, draws++, n);
}
static int64_t between(int64_t lo, int64_t hi) {
  return lo + (int64_t)below((uint64_t)(hi - lo + 1));
}

/* A matrix with spare columns, an odd start and guard bytes; `v` is what it holds, exactly. */
typedef struct mat {
  esp_tensor t;
  char *base;
  double *v;
  size_t bytes;
} mat;

static bool integers; /* values in -3..3 instead of uniform */

static void put(mat *a, int64_t r, int64_t c, double x) {
  int64_t i = r * a->t.ld + c;
  if (a->t.dtype == ESP_BF16) {
    uint16_t h = esp_f32_to_bf16((float)x);
    ((uint16_t *)a->t.data)[i] = h;
    x = esp_bf16_to_f32(h);
  } else if (a->t.dtype == ESP_F16) {
    uint16_t h = esp_f32_to_f16((float)x);
    memcpy((char *)a->t.data + 2 * i, &h, 2);
    x = esp_f16_to_f32(h);
  } else {
    ((float *)a->t.data)[i] = (float)x;
    x = (float)x;
  }
  a->v[r * a->t.shape[1] + c] = x;
}

static mat make(esp_dtype dt, int64_t rows, int64_t cols) {
  mat a = {0};
  int64_t ld = cols + between(0, 9), shift = between(1, 33);
  size_t es = esp_dtype_size(dt);
  a.bytes = (size_t)(rows * ld + 64 + shift) * es;
  a.base = malloc(a.bytes);
  a.v = malloc((size_t)(rows * cols) * sizeof *a.v);
  assert_non_null(a.base);
  assert_non_null(a.v);
  memset(a.base, 0xff, a.bytes); /* NaN in every type: spare elements must not be used, nor written */
  a.t = esp_tensor_2d(a.base + (size_t)shift * es, dt, rows, cols);
  a.t.ld = ld;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < cols; c++)
      put(&a, r, c, integers ? (double)between(-3, 3) : (double)esp_rng_uniform(3, 5, draws++) * 2 - 1);
  return a;
}

static mat clone(const mat *a) {
  mat b = *a;
  b.base = malloc(a->bytes);
  assert_non_null(b.base);
  memcpy(b.base, a->base, a->bytes);
  b.t.data = b.base + ((char *)a->t.data - a->base);
  b.v = NULL;
  return b;
}

static void drop(mat *a) {
  free(a->base);
  free(a->v);
}

static double got(const mat *a, int64_t r, int64_t c) {
  int64_t i = r * a->t.ld + c;
  return a->t.dtype == ESP_BF16 ? (double)esp_bf16_to_f32(((uint16_t *)a->t.data)[i]) : (double)((float *)a->t.data)[i];
}

/* Bytes outside the matrix are still 0xff. */
static void check_guards(const mat *a) {
  size_t es = esp_dtype_size(a->t.dtype), start = (size_t)((char *)a->t.data - a->base);
  size_t row = (size_t)a->t.ld * es, width = (size_t)a->t.shape[1] * es;
  for (size_t i = 0; i < a->bytes; i++) {
    bool in = i >= start && (i - start) / row < (size_t)a->t.shape[0] && (i - start) % row < width;
    if (!in && (unsigned char)a->base[i] != 0xff) fail_msg("guard byte %zu written", i);
  }
}

/* sum (and the sum of magnitudes) of an element by its definition */
typedef struct sums {
  double v, mag;
  double stored; /* sum of |v| where a device may have stored (and rounded) y on the way: see check */
} sums;

static void add(sums *s, double x) {
  s->v += x;
  s->mag += fabs(x);
}

/* Devices add the tails to y in products of their own, so a bf16 y is rounded once more for each; a bias has the type
 * of y, or is added in a pass of its own: the bias or the sum before it is rounded. */
static void check(const mat *c, int64_t r, int64_t i, sums s, const char *what) {
  double g = got(c, r, i);
  double tol = s.mag * 4e-6 + (c->t.dtype == ESP_BF16 ? fabs(s.v) * 0x1p-8 : 0);
  if (!test_on_cpu() && c->t.dtype == ESP_BF16) tol += s.stored * 0x1p-8;
  if (integers && c->t.dtype == ESP_F32) tol = 0;
  if (!(fabs(g - s.v) <= tol))
    fail_msg("%s, %s: element (%lld, %lld) of %lld x %lld is %.9g, should be %.9g", what, check_where(), (long long)r,
             (long long)i, (long long)c->t.shape[0], (long long)c->t.shape[1], g, s.v);
}

typedef struct linear_case {
  esp_dtype compute;
  int64_t m, out[3], in;
  int n_out;
  bool packed, transposed, dx;
  esp_dtype stored;
  int n_tails;
  int64_t rank;
  float beta;
  bool bias, y_f32;
  int n_added; /* sparse matrices that are added to the weight, on the rows of the last sites */
} linear_case;

/* A third of rows [row0, out), some of them empty, as an operand and into the reference, rounded as the weight is. */
static esp_added sparse_rows(int64_t row0, int64_t out, int64_t in) {
  int64_t rows = out - row0;
  int32_t *start = calloc((size_t)(rows + 1), sizeof *start), *index = malloc((size_t)(rows * in) * sizeof *index);
  float *values = malloc((size_t)(rows * in) * sizeof *values);
  int32_t n = 0;
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = 0; c < in && r % 5 != 1; c++)
      if (below(3) == 0) values[n] = (float)between(-100, 100) / 64, index[n++] = (int32_t)c;
    start[r + 1] = n;
  }
  return (esp_added){row0, {rows, n, start, index, NULL, values}};
}
static void sparse_add(double *wd, const esp_added *a, int64_t in) {
  for (int64_t r = 0; r < a->m.rows; r++)
    for (int32_t e = a->m.start[r]; e < a->m.start[r + 1]; e++) {
      double *w = &wd[(a->row0 + r) * in + a->m.index[e]];
      *w = esp_bf16_to_f32(esp_f32_to_bf16((float)*w + a->m.values[e]));
    }
}
static void sparse_drop(esp_added *a) {
  free((void *)a->m.start), free((void *)a->m.index), free((void *)a->m.values);
}

static void run_linear(const linear_case *k) {
  int64_t out = 0;
  mat w[3];
  esp_tensor wt[3];
  for (int i = 0; i < k->n_out; i++) {
    w[i] = k->transposed ? make(k->stored, k->in, k->out[i]) : make(k->stored, k->out[i], k->in);
    wt[i] = w[i].t;
    out += k->out[i];
  }
  esp_wview view = {.out = out, .in = k->in};
  if (k->packed) {
    view.packed = check_be->ops->pack(check_be, wt, k->n_out, k->transposed, k->compute);
    assert_non_null(view.packed);
  } else {
    view.dense = wt[0];
  }
  int64_t kk = k->dx ? out : k->in, n = k->dx ? k->in : out;
  mat x = make(k->compute, k->m, kk);
  mat y = make(k->y_f32 ? ESP_F32 : k->compute, k->m, n), y2 = clone(&y);
  mat bias = make(below(2) ? ESP_F32 : k->compute, 1, n);
  mat tx[3], tw[3];
  esp_tail tails[3];
  for (int i = 0; i < k->n_tails; i++) {
    int64_t c0 = k->dx ? 0 : between(0, n - 1), nc = k->dx ? n : between(1, n - c0);
    tx[i] = make(k->compute, k->m, k->rank);
    tw[i] = k->dx ? make(k->compute, k->rank, nc) : make(k->compute, nc, k->rank);
    tails[i] = (esp_tail){c0, tx[i].t, tw[i].t};
  }
  esp_added added[2];
  for (int i = 0; i < k->n_added; i++) {
    added[i] = sparse_rows(i == 0 ? out - k->out[k->n_out - 1] : 0, i == 0 ? out : k->out[0], k->in);
    assert_true(check_be->ops->linear_adds(check_be, x.t, &view, &added[i].m));
  }
  view.added = added;
  view.n_added = k->n_added;
  esp_tensor bt = {0};
  if (k->bias) {
    bt = bias.t;
    bt.ndim = 1;
    bt.shape[0] = n;
  }
  for (int threads = 1; threads <= 2; threads++) {
    assert_int_equal(esp_threads_init(threads), ESP_OK);
    mat *d = threads == 1 ? &y : &y2;
    if (k->dx)
      check_be->ops->linear_dx(check_be, d->t, x.t, &view, tails, k->n_tails, k->beta);
    else
      check_be->ops->linear(check_be, d->t, x.t, &view, bt, tails, k->n_tails, k->beta);
    assert_int_equal(esp_backend_sync(check_be), ESP_OK);
    check_guards(d);
  }
  assert_memory_equal(y.base, y2.base, y.bytes);
  /* the weight as [out][in], rounded to the compute type as packing does */
  double *wd = malloc((size_t)(out * k->in) * sizeof *wd);
  assert_non_null(wd);
  int64_t o = 0;
  for (int i = 0; i < k->n_out; i++)
    for (int64_t r = 0; r < k->out[i]; r++, o++)
      for (int64_t c = 0; c < k->in; c++) {
        double v = w[i].v[k->transposed ? c * k->out[i] + r : r * k->in + c];
        wd[o * k->in + c] = k->packed && k->compute == ESP_BF16 ? esp_bf16_to_f32(esp_f32_to_bf16((float)v)) : v;
      }
  for (int i = 0; i < k->n_added; i++) sparse_add(wd, &added[i], k->in);
  for (int64_t r = 0; r < k->m; r++)
    for (int64_t i = 0; i < n; i++) {
      sums s = {0};
      for (int64_t q = 0; q < kk; q++) add(&s, x.v[r * kk + q] * (k->dx ? wd[q * k->in + i] : wd[i * k->in + q]));
      if (k->beta != 0) add(&s, y.v[r * n + i]);
      if (k->bias) {
        s.stored += fmax(fabs(s.v), fabs(bias.v[i]));
        add(&s, bias.v[i]);
      }
      for (int t = 0; t < k->n_tails; t++) {
        int64_t nc = k->dx ? n : tw[t].t.shape[0], c = i - tails[t].col0;
        if (c < 0 || c >= nc) continue;
        s.stored += fabs(s.v);
        for (int64_t q = 0; q < k->rank; q++)
          add(&s, tx[t].v[r * k->rank + q] * (k->dx ? tw[t].v[q * nc + c] : tw[t].v[c * k->rank + q]));
      }
      check(&y, r, i, s, k->dx ? "linear_dx" : "linear");
    }
  free(wd);
  for (int i = 0; i < k->n_added; i++) sparse_drop(&added[i]);
  if (view.packed) check_be->ops->pack_free(check_be, (void *)view.packed);
  for (int i = 0; i < k->n_out; i++) drop(&w[i]);
  for (int i = 0; i < k->n_tails; i++) {
    drop(&tx[i]);
    drop(&tw[i]);
  }
  drop(&x);
  drop(&y);
  drop(&y2);
  drop(&bias);
}

static void random_linear(bool dx, int repeats) {
  static const esp_dtype stored[] = {ESP_BF16, ESP_F32, ESP_F16};
  EACH_ISA {
    for (int i = 0; i < repeats; i++) {
      linear_case k = {.compute = below(3) ? ESP_BF16 : ESP_F32, .m = between(1, 90), .in = between(1, 150), .dx = dx};
      k.packed = below(4) != 0;
      k.transposed = k.packed && below(3) == 0;
      k.stored = k.packed ? stored[below(3)] : k.compute;
      k.n_out = k.packed ? (int)between(1, 3) : 1;
      for (int o = 0; o < k.n_out; o++) k.out[o] = between(1, 100);
      k.n_tails = (int)between(0, 3);
      k.rank = between(1, 70);
      k.beta = (float)below(2);
      k.bias = !dx && below(2);
      k.y_f32 = below(3) == 0;
      run_linear(&k);
    }
  }
}

static void linear_matches_fp64(void **state) {
  (void)state;
  random_linear(false, test_quick() ? 20 : 40);
}
static void dx_matches_fp64(void **state) {
  (void)state;
  random_linear(true, test_quick() ? 20 : 40);
}

/* Weights with something added to them, where the backend takes that: bf16 through tiles. Seen to catch: rows of a
 * matrix counted from the first of the weight (row0 left out). */
static void added_to_the_weight(void **state) {
  (void)state;
  EACH_ISA {
    if (!check_be->ops->linear_adds || strcmp(check_where(), "amx")) continue;
    for (int i = 0; i < (test_quick() ? 8 : 24); i++) {
      linear_case k = {.compute = ESP_BF16, .stored = ESP_BF16, .packed = true, .dx = i % 2, .n_added = 1 + i / 2 % 2};
      k.m = between(32, 90), k.in = between(1, 150), k.n_out = 2;
      k.out[0] = between(1, 100), k.out[1] = between(2, 100);
      k.n_tails = (int)between(0, 2), k.rank = between(1, 20), k.beta = (float)below(2), k.bias = !k.dx && below(2);
      run_linear(&k);
    }
  }
}

/* Contractions longer than a block, several row and column blocks. */
static void long_contractions(void **state) {
  (void)state;
  EACH_ISA {
    for (int dx = 0; dx < 2; dx++) {
      linear_case k = {.compute = ESP_BF16,
                       .m = 45,
                       .out = {dx ? 3111 : 70},
                       .in = dx ? 70 : 3111,
                       .n_out = 1,
                       .packed = true,
                       .dx = dx,
                       .stored = ESP_BF16,
                       .n_tails = 1,
                       .rank = 8,
                       .beta = 1};
      run_linear(&k);
      k.compute = k.stored = ESP_F32;
      run_linear(&k);
    }
    linear_case wide = {.compute = ESP_BF16,
                        .m = 530,
                        .out = {300, 301},
                        .in = 65,
                        .n_out = 2,
                        .packed = true,
                        .stored = ESP_BF16,
                        .n_tails = 2,
                        .rank = 16};
    run_linear(&wide);
    wide.dx = true;
    run_linear(&wide);
  }
  /* logits: a result larger than the caches, and the way back over as many outputs */
  esp_cpu_isa_set(check_last_isa());
  linear_case logits = {.compute = ESP_BF16,
                        .m = 70,
                        .out = {60100},
                        .in = 9,
                        .n_out = 1,
                        .packed = true,
                        .stored = ESP_BF16,
                        .y_f32 = true};
  run_linear(&logits);
  logits.dx = true;
  logits.y_f32 = false;
  run_linear(&logits);
}

static void run_matmul(esp_dtype ta, esp_dtype tb, esp_dtype tc, int64_t m, int64_t n, int64_t k, bool trans_a,
                       bool trans_b, float alpha, float beta) {
  mat a = trans_a ? make(ta, k, m) : make(ta, m, k), b = trans_b ? make(tb, n, k) : make(tb, k, n);
  mat c = make(tc, m, n), c2 = clone(&c);
  for (int threads = 1; threads <= 2; threads++) {
    assert_int_equal(esp_threads_init(threads), ESP_OK);
    mat *d = threads == 1 ? &c : &c2;
    check_be->ops->matmul(check_be, d->t, a.t, trans_a, b.t, trans_b, alpha, beta);
    assert_int_equal(esp_backend_sync(check_be), ESP_OK);
    check_guards(d);
  }
  assert_memory_equal(c.base, c2.base, c.bytes);
  for (int64_t r = 0; r < m; r++)
    for (int64_t i = 0; i < n; i++) {
      sums s = {0};
      for (int64_t q = 0; q < k; q++)
        add(&s, alpha * a.v[trans_a ? q * m + r : r * k + q] * b.v[trans_b ? i * k + q : q * n + i]);
      if (beta != 0) add(&s, beta * c.v[r * n + i]);
      check(&c, r, i, s, "matmul");
    }
  drop(&a);
  drop(&b);
  drop(&c);
  drop(&c2);
}

static esp_dtype either(void) {
  return below(3) ? ESP_BF16 : ESP_F32;
}

static void matmul_matches_fp64(void **state) {
  (void)state;
  EACH_ISA {
    for (int i = 0; i < 60; i++)
      run_matmul(either(), either(), either(), between(1, 100), between(1, 100), between(1, 200), below(2), below(2),
                 below(2) ? 1.0f : 0.25f, below(2) ? (float)below(2) : 0.5f);
  }
}

/* The four products of a low-rank adapter and the gradient of a dense weight, over more tokens than one part. */
static void thin_products(void **state) {
  (void)state;
  static const int64_t ranks[] = {4, 16, 64, 100};
  EACH_ISA {
    for (int i = 0; i < 4; i++) {
      int64_t r = ranks[i], t = 1100 + 17 * i, w = 90 + 5 * i;
      run_matmul(ESP_BF16, ESP_BF16, ESP_BF16, t, r, w, false, true, 2.0f, 0);
      run_matmul(ESP_BF16, ESP_BF16, ESP_BF16, t, r, w, false, false, 2.0f, 0);
      run_matmul(ESP_BF16, ESP_BF16, ESP_F32, w, r, t, true, false, 1, 1);
      run_matmul(ESP_BF16, ESP_BF16, ESP_F32, r, w, t, true, false, 1, 1);
    }
    run_matmul(ESP_BF16, ESP_BF16, ESP_F32, 310, 100, 2500, true, false, 1, 1);
    run_matmul(ESP_BF16, ESP_F32, ESP_F32, 16, 100, 1200, true, false, 1, 1);
  }
}

static void exact_integers(void **state) {
  (void)state;
  integers = true;
  EACH_ISA {
    for (int i = 0; i < 8; i++) {
      linear_case k = {.compute = i & 1 ? ESP_BF16 : ESP_F32,
                       .m = 67,
                       .out = {33, 64},
                       .in = 97,
                       .n_out = 2,
                       .packed = true,
                       .dx = i & 2,
                       .stored = ESP_BF16,
                       .n_tails = 2,
                       .rank = 9,
                       .beta = 1,
                       .bias = (i & 6) == 4,
                       .y_f32 = true};
      run_linear(&k);
      run_matmul(ESP_BF16, ESP_BF16, ESP_F32, 65, 40 + i, 700, i & 1, i & 2, 1, 1);
    }
  }
  integers = false;
}

/* Single rows, columns and contractions. (Spare elements are NaN in every test, so padding that reads them shows.) */
static void edges(void **state) {
  (void)state;
  EACH_ISA {
    run_matmul(ESP_BF16, ESP_BF16, ESP_F32, 1, 1, 1, false, true, 1, 0);
    run_matmul(ESP_F32, ESP_F32, ESP_BF16, 1, 65, 1, true, false, 1, 0);
    linear_case one = {.compute = ESP_BF16,
                       .m = 1,
                       .out = {577},
                       .in = 576,
                       .n_out = 1,
                       .packed = true,
                       .stored = ESP_BF16,
                       .n_tails = 1,
                       .rank = 16};
    run_linear(&one);
  }
}

/* An operand made in host memory and copied beside the computation, as streamed weights are, is the operand that pack
 * makes: equal bits. Only where the backend has such copies. */
static void staged_operand(void **state) {
  (void)state;
  esp_backend *real = test_on_cpu() ? check_be : mirror_real(check_be);
  if (!real->ops->stage || !real->ops->pack_host) skip();
  EACH_TYPE(compute) for (int transposed = 0; transposed < 2; transposed++) {
    enum { OUT = 60, IN = 37, M = 19 };
    mat w[2] = {transposed ? make(ESP_BF16, IN, 40) : make(ESP_BF16, 40, IN),
                transposed ? make(ESP_BF16, IN, 20) : make(ESP_BF16, 20, IN)};
    esp_tensor wt[2] = {w[0].t, w[1].t}, none = {0};
    mat x = make(compute, M, IN), y = make(compute, M, OUT), y2 = clone(&y);
    int64_t bytes = real->ops->pack_bytes(real, OUT, IN, compute);
    void *host = real->ops->pack_host(real, wt, 2, transposed, compute);
    void *buffer = real->ops->alloc(real, ESP_MEM_WEIGHTS, bytes);
    assert_non_null(host);
    assert_non_null(buffer);
    for (int channel = 0; channel < 2; channel++) { /* two weights may be under way at once */
      real->ops->zero(real, buffer, bytes);
      real->ops->stage(real, channel, buffer, host, bytes);
      real->ops->stage_wait(real, channel);
      esp_wview view = {.out = OUT, .in = IN, .packed = buffer};
      check_be->ops->linear(check_be, y2.t, x.t, &view, none, NULL, 0, 0);
      view.packed = check_be->ops->pack(check_be, wt, 2, transposed, compute);
      assert_non_null(view.packed);
      check_be->ops->linear(check_be, y.t, x.t, &view, none, NULL, 0, 0);
      check_be->ops->pack_free(check_be, (void *)view.packed);
      assert_memory_equal(y.base, y2.base, y.bytes);
    }
    real->ops->free(real, buffer);
    real->ops->host_free(real, host);
    drop(&w[0]), drop(&w[1]), drop(&x), drop(&y), drop(&y2);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(linear_matches_fp64), cmocka_unit_test(added_to_the_weight),
      cmocka_unit_test(dx_matches_fp64),     cmocka_unit_test(long_contractions),
      cmocka_unit_test(matmul_matches_fp64), cmocka_unit_test(thin_products),
      cmocka_unit_test(exact_integers),      cmocka_unit_test(edges),
      cmocka_unit_test(staged_operand),
  };
  int rc = cmocka_run_group_tests_name("products", tests, check_setup, check_teardown);
  esp_cpu_gemm_shutdown();
  return rc;
}
