/* test_backend_kinds.c: conformance of the parts of adapter kinds: every operation against fp64 on every instruction
 * set, all mixes of types, odd shapes, strided views, the operands that may coincide, beta 0 over NaN; the backward of
 * each pair against central differences of its forward; one thread against two.
 * Seen to catch: sparse_grad adding to dvalues[e] where `order` says dvalues[order[e]]. */
#include "ops/kinds_check.h"

static esp_tensor flat_row(const buf *b) {
  return esp_tensor_1d(b->t.data, b->t.dtype, b->t.shape[1]);
}

static const struct {
  int64_t rows, cols;
} shapes[] = {{1, 1}, {3, 2}, {5, 16}, {2, 17}, {7, 33}, {3, 64}, {33, 8}, {4, 100}, {70, 5}};
#define EACH_SHAPE(i) for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)

/* ---- products by element and by row ---- */
static void mul_run(void *ctx) {
  kind_test *t = ctx;
  put(&t->y, t->start);
  check_be->ops->mul(check_be, t->y.t, t->x[0].t, t->x[1].t, t->beta);
}
static void test_mul(void **state) {
  (void)state;
  EACH_ISA EACH_MIX EACH_SHAPE(i) for (int add = 0; add < 2; add++) {
    kind_test t = {.beta = add ? -0.5f : 0};
    int64_t gap = i % 3 == 0 ? 0 : i % 3 == 1 ? 8 : 3;
    y_new(&t, ty, shapes[i].rows, shapes[i].cols, gap, add);
    t.x[0] = buf_new(ta, shapes[i].rows, shapes[i].cols, gap, 1);
    t.x[1] = buf_new(tb, shapes[i].rows, shapes[i].cols, 2 * gap, 1);
    for (int64_t e = 0; e < buf_n(&t.y); e++) t.want[e] = t.x[0].v[e] * t.x[1].v[e] + before(&t, e);
    kind_check("mul", mul_run, &t, 1e-6, 1);
    kind_free(&t);
  }
}
/* y the same view as an operand: a gate applied in place, a square. */
static void test_in_place(void **state) {
  (void)state;
  EACH_ISA EACH_TYPE(type) EACH_TYPE(other) EACH_SHAPE(i) {
    int64_t rows = shapes[i].rows, cols = shapes[i].cols;
    double *want = malloc((size_t)(rows * cols) * 8);
    for (int form = 0; form < 4; form++) {
      buf y = buf_new(type, rows, cols, 3, 1), b = buf_new(other, rows, cols, 0, 1), v = buf_new(other, 1, rows, 0, 1);
      float beta = form == 2 ? 0.25f : 0;
      for (int64_t e = 0; e < rows * cols; e++)
        want[e] = y.v[e] * (form == 0 ? b.v[e] : form == 3 ? v.v[e / cols] : y.v[e]) + beta * y.v[e];
      if (form == 0)
        check_be->ops->mul(check_be, y.t, b.t, y.t, 0);
      else if (form == 3)
        check_be->ops->mul_rows(check_be, y.t, y.t, flat_row(&v), 0);
      else
        check_be->ops->mul(check_be, y.t, y.t, y.t, beta);
      buf_close("in place", &y, want, type_tol(type, 1e-6), 1);
      buf_free(&y), buf_free(&b), buf_free(&v);
    }
    free(want);
  }
}
static void mul_rows_run(void *ctx) {
  kind_test *t = ctx;
  put(&t->y, t->start);
  esp_tensor v = t->trans ? t->x[1].t : flat_row(&t->x[1]);
  check_be->ops->mul_rows(check_be, t->y.t, t->x[0].t, v, t->beta);
}
static void test_mul_rows(void **state) {
  (void)state;
  EACH_ISA EACH_MIX EACH_SHAPE(i) for (int form = 0; form < 4; form++) {
    kind_test t = {.beta = form & 1 ? 2 : 0, .trans = form & 2}; /* trans: v is a column of a wider matrix */
    int64_t rows = shapes[i].rows, cols = shapes[i].cols;
    y_new(&t, ty, rows, cols, form ? 3 : 0, t.beta != 0);
    t.x[0] = buf_new(ta, rows, cols, form ? 8 : 0, 1);
    t.x[1] = t.trans ? buf_new(tb, rows, 1, 6, 1) : buf_new(tb, 1, rows, 0, 1);
    for (int64_t e = 0; e < rows * cols; e++) t.want[e] = t.x[0].v[e] * t.x[1].v[e / cols] + before(&t, e);
    kind_check("mul_rows", mul_rows_run, &t, 1e-6, 1);
    kind_free(&t);
  }
}

/* ---- sums of products: the backward of mul_cols and mul_rows ---- */
static void col_dot_run(void *ctx) {
  kind_test *t = ctx;
  put(&t->y, t->start);
  check_be->ops->col_dot(check_be, t->y.t.data, t->x[0].t, t->x[1].t);
}
static void row_dot_run(void *ctx) {
  kind_test *t = ctx;
  put(&t->y, t->start);
  check_be->ops->row_dot(check_be, t->y.t.data, t->x[0].t, t->x[1].t, t->beta);
}
static void test_dots(void **state) {
  (void)state;
  EACH_ISA EACH_TYPE(ta) EACH_TYPE(tb) EACH_SHAPE(i) for (int form = 0; form < 3; form++) {
    int64_t rows = shapes[i].rows, cols = shapes[i].cols;
    kind_test t = {.beta = form == 1 ? 0.5f : form == 2}; /* form 2: by columns, which always adds */
    bool by_cols = form == 2;
    y_new(&t, ESP_F32, 1, by_cols ? cols : rows, 0, t.beta != 0);
    t.x[0] = buf_new(ta, rows, cols, form ? 0 : 8, 1);
    t.x[1] = buf_new(tb, rows, cols, form ? 5 : 16, 1);
    for (int64_t e = 0; e < buf_n(&t.y); e++) t.want[e] = before(&t, e);
    for (int64_t e = 0; e < rows * cols; e++) t.want[by_cols ? e % cols : e / cols] += t.x[0].v[e] * t.x[1].v[e];
    kind_check(by_cols ? "col_dot" : "row_dot", by_cols ? col_dot_run : row_dot_run, &t, 2e-6, 3);
    kind_free(&t);
  }
}
/* loss = <dy, f> with f = x scaled by rows or by columns; slopes in the scales */
typedef struct scale_test {
  buf x, v, dy;
  bool by_cols;
} scale_test;
static double scale_loss(void *ctx) {
  scale_test *t = ctx;
  double l = 0;
  int64_t n = t->x.t.shape[1];
  for (int64_t e = 0; e < buf_n(&t->x); e++) l += t->dy.v[e] * t->x.v[e] * t->v.v[t->by_cols ? e % n : e / n];
  return l;
}
static void test_scale_gradients(void **state) {
  (void)state;
  EACH_ISA EACH_TYPE(type) for (int by_cols = 0; by_cols < 2; by_cols++) {
    enum { ROWS = 9, COLS = 21 };
    scale_test t = {.x = buf_new(type, ROWS, COLS, 2, 1), .dy = buf_new(type, ROWS, COLS, 0, 1), .by_cols = by_cols};
    t.v = buf_new(ESP_F32, 1, by_cols ? COLS : ROWS, 0, 1);
    buf dv = buf_new(ESP_F32, 1, by_cols ? COLS : ROWS, 0, 1);
    memset(dv.t.data, 0, dv.bytes);
    if (by_cols)
      check_be->ops->col_dot(check_be, dv.t.data, t.dy.t, t.x.t);
    else
      check_be->ops->row_dot(check_be, dv.t.data, t.dy.t, t.x.t, 0);
    check_grad("dscale", scale_loss, &t, &t.v, &dv, 30, 1e-5, 1);
    buf_free(&t.x), buf_free(&t.dy), buf_free(&t.v), buf_free(&dv);
  }
}

/* ---- rows as matrices ---- */
static void transpose_run(void *ctx) {
  kind_test *t = ctx;
  put(&t->y, t->start);
  check_be->ops->transpose_rows(check_be, t->y.t, t->x[0].t, t->a, t->b);
}
static void test_transpose_rows(void **state) {
  (void)state;
  static const int64_t sizes[][3] = {{1, 1, 1}, {3, 1, 7},   {2, 7, 1},   {5, 2, 3},   {2, 8, 16},
                                     {4, 5, 9}, {3, 33, 17}, {2, 40, 64}, {1, 70, 35}, {300, 4, 8}};
  EACH_ISA EACH_TYPE(ty) EACH_TYPE(tx) for (size_t c = 0; c < sizeof sizes / sizeof *sizes; c++) {
    int64_t rows = sizes[c][0], a = sizes[c][1], b = sizes[c][2];
    kind_test t = {.a = a, .b = b};
    y_new(&t, ty, rows, a * b, c % 3, false);
    t.x[0] = buf_new(tx, rows, a * b, c % 2 * 8, 1);
    for (int64_t e = 0; e < rows * a * b; e++) {
      int64_t r = e / (a * b), i = e / b % a, j = e % b;
      t.want[r * a * b + j * a + i] = t.x[0].v[e];
    }
    kind_check("transpose_rows", transpose_run, &t, 0, 0);
    kind_free(&t);
  }
}

/* ---- Khatri-Rao products ---- */
static const int64_t kr_shapes[][3] = {{1, 1, 1},  {4, 3, 5},  {7, 8, 16}, {2, 17, 4},
                                       {3, 6, 33}, {40, 2, 2}, {2, 9, 64}};
#define EACH_KR(i) for (size_t i = 0; i < sizeof kr_shapes / sizeof *kr_shapes; i++)
static void kr_run(void *ctx) {
  kind_test *t = ctx;
  put(&t->y, t->start);
  check_be->ops->khatri_rao(check_be, t->y.t, t->x[0].t, t->x[1].t);
}
static void test_khatri_rao(void **state) {
  (void)state;
  EACH_ISA EACH_MIX EACH_KR(i) {
    int64_t rows = kr_shapes[i][0], p = kr_shapes[i][1], q = kr_shapes[i][2];
    kind_test t = {0};
    y_new(&t, ty, rows, p * q, i % 2 * 3, false);
    t.x[0] = buf_new(ta, rows, p, i % 3, 1);
    t.x[1] = buf_new(tb, rows, q, i % 2 * 8, 1);
    for (int64_t e = 0; e < rows * p * q; e++) t.want[e] = t.x[0].v[e / q] * t.x[1].v[e / (p * q) * q + e % q];
    kind_check("khatri_rao", kr_run, &t, 1e-6, 0.1);
    kind_free(&t);
  }
}
typedef struct kr_test {
  buf x, z, dy, dx, dz;
  int skip; /* 1: no dx, 2: no dz */
} kr_test;
static double kr_loss(void *ctx) {
  kr_test *t = ctx;
  int64_t p = t->x.t.shape[1], q = t->z.t.shape[1];
  double l = 0;
  for (int64_t e = 0; e < buf_n(&t->dy); e++) l += t->dy.v[e] * t->x.v[e / q] * t->z.v[e / (p * q) * q + e % q];
  return l;
}
static void kr_bwd_run(void *ctx) {
  kr_test *t = ctx;
  esp_tensor none = {0};
  put(&t->dx, t->dx.v);
  put(&t->dz, t->dz.v);
  check_be->ops->khatri_rao_bwd(check_be, t->skip == 1 ? none : t->dx.t, t->skip == 2 ? none : t->dz.t, t->dy.t, t->x.t,
                                t->z.t);
}
static void test_khatri_rao_bwd(void **state) {
  (void)state;
  EACH_ISA EACH_MIX EACH_KR(i) for (int skip = 0; skip < 3; skip++) {
    int64_t rows = kr_shapes[i][0], p = kr_shapes[i][1], q = kr_shapes[i][2];
    kr_test t = {.skip = skip};
    t.x = buf_new(ta, rows, p, i % 3, 1), t.z = buf_new(tb, rows, q, i % 2 * 8, 1);
    t.dy = buf_new(ty, rows, p * q, i % 2 * 5, 1);
    t.dx = buf_new(ESP_F32, rows, p, 2, 1), t.dz = buf_new(ESP_F32, rows, q, i % 2 * 4, 1);
    out_ref outs[] = {{t.dx.t.data, t.dx.bytes}, {t.dz.t.data, t.dz.bytes}};
    check_threads(kr_bwd_run, &t, outs, 2);
    buf *grads[] = {&t.dx, &t.dz}, *of[] = {&t.x, &t.z};
    for (int g = 0; g < 2; g++) { /* what was there before is added to, or kept */
      if (skip == g + 1) {
        buf_close("skipped", grads[g], grads[g]->v, 0, 0);
        continue;
      }
      for (int64_t e = 0; e < buf_n(grads[g]); e++) {
        double now = buf_load(grads[g], e), was = grads[g]->v[e];
        buf_store(grads[g], e, now - was);
      }
      check_grad(g ? "dz" : "dx", kr_loss, &t, of[g], grads[g], 12, 1e-5, 2);
    }
    buf_free(&t.x), buf_free(&t.z), buf_free(&t.dy), buf_free(&t.dx), buf_free(&t.dz);
  }
}

/* ---- sparse matrices ---- */
typedef struct sparse_test {
  buf x, y, dy, v, dv; /* x [T, cols], y and dy [T, rows], v and dv [1, entries] */
  double *start;
  esp_csr s;
  int32_t *start_of, *index, *order;
} sparse_test;

/* About a third of all places, some rows empty; `order` scattered, as of a matrix that is the transpose of another. */
static void sparse_new(sparse_test *t, int64_t rows, int64_t cols, bool ordered) {
  t->start_of = malloc((size_t)(rows + 1) * 4);
  t->index = malloc((size_t)(rows * cols + 1) * 4);
  t->order = malloc((size_t)(rows * cols + 1) * 4);
  int32_t n = 0;
  for (int64_t r = 0; r < rows; r++) {
    t->start_of[r] = n;
    for (int64_t c = 0; c < cols && r % 4 != 1; c++)
      if (check_below(3) == 0) t->index[n++] = (int32_t)c;
  }
  t->start_of[rows] = n;
  for (int32_t k = 0; k < n; k++) t->order[k] = k;
  for (int32_t k = n - 1; k > 0; k--) {
    int32_t other = (int32_t)check_below(k + 1), keep = t->order[k];
    t->order[k] = t->order[other];
    t->order[other] = keep;
  }
  t->v = buf_new(ESP_F32, 1, n, 0, 1);
  t->dv = buf_new(ESP_F32, 1, n, 0, 1);
  t->s = (esp_csr){rows, n, t->start_of, t->index, ordered ? t->order : NULL, t->v.t.data};
}
static void sparse_free(sparse_test *t) {
  buf *all[] = {&t->x, &t->y, &t->dy, &t->v, &t->dv};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) buf_free(all[i]);
  free(t->start_of), free(t->index), free(t->order), free(t->start);
}
static int32_t place(const sparse_test *t, int32_t k) {
  return t->s.order ? t->s.order[k] : k;
}
static void sparse_ref(const sparse_test *t, double *y) {
  int64_t cols = t->x.t.shape[1];
  for (int64_t i = 0; i < t->x.t.shape[0]; i++)
    for (int64_t r = 0; r < t->s.rows; r++)
      for (int32_t k = t->start_of[r]; k < t->start_of[r + 1]; k++)
        y[i * t->s.rows + r] += t->v.v[place(t, k)] * t->x.v[i * cols + t->index[k]];
}
static double sparse_loss(void *ctx) {
  sparse_test *t = ctx;
  double *y = calloc((size_t)buf_n(&t->y), 8), l = 0;
  sparse_ref(t, y);
  for (int64_t i = 0; i < buf_n(&t->y); i++) l += y[i] * t->dy.v[i];
  free(y);
  return l;
}
static void sparse_run(void *ctx) {
  sparse_test *t = ctx;
  put(&t->y, t->start);
  put(&t->dv, t->dv.v);
  check_be->ops->sparse_matmul(check_be, t->y.t, t->x.t, &t->s);
  check_be->ops->sparse_grad(check_be, t->dv.t.data, t->dy.t, t->x.t, &t->s);
}
static void test_sparse(void **state) {
  (void)state;
  static const int64_t sizes[][3] = {{1, 1, 1},    {3, 5, 4},     {17, 9, 12},   {40, 20, 33},
                                     {130, 6, 10}, {33, 270, 20}, {70, 70, 700}, {1100, 70, 600}};
  EACH_ISA EACH_MIX for (size_t c = 0; c < sizeof sizes / sizeof *sizes; c++) for (int ordered = 0; ordered < 2;
                                                                                   ordered++) {
    int64_t tokens = sizes[c][0], rows = sizes[c][1], cols = sizes[c][2];
    if (cols >= 600 && !(ta == ESP_BF16 && tb == ESP_BF16 && ty == ESP_BF16))
      continue; /* blocks of the tiles' product */
    sparse_test t = {.x = buf_new(tb, tokens, cols, c % 3, 1), .y = buf_new(ty, tokens, rows, c % 2 * 3, 1)};
    t.dy = buf_new(ta, tokens, rows, c % 2, 1);
    sparse_new(&t, rows, cols, ordered);
    t.start = malloc((size_t)buf_n(&t.y) * 8);
    memcpy(t.start, t.y.v, (size_t)buf_n(&t.y) * 8);
    double *want = malloc((size_t)buf_n(&t.y) * 8);
    memcpy(want, t.start, (size_t)buf_n(&t.y) * 8);
    sparse_ref(&t, want);
    out_ref outs[] = {{t.y.t.data, t.y.bytes}, {t.dv.t.data, t.dv.bytes}};
    check_threads(sparse_run, &t, outs, 2);
    bool rounded = ty == ESP_BF16 && tb == ESP_BF16; /* then the values may be, too */
    buf_close("sparse_matmul", &t.y, want, type_tol(ty, 3e-6), rounded ? 6 + (double)cols / 60 : 3);
    for (int64_t e = 0; e < buf_n(&t.dv); e++) {
      double now = buf_load(&t.dv, e), was = t.dv.v[e];
      buf_store(&t.dv, e, now - was);
    }
    check_grad("dvalues", sparse_loss, &t, &t.v, &t.dv, 12, 1e-5, 4);
    sparse_free(&t);
    free(want);
  }
}

/* ---- shapes large enough to be cut into many pieces: the same bits with one thread and with two ---- */
typedef struct large_test {
  buf x, z, y, m, dm, r, c, sy, dv;
  esp_csr s;
} large_test;
static void large_run(void *ctx) {
  large_test *t = ctx;
  const esp_backend_ops *o = check_be->ops;
  memset(t->dm.t.data, 0, t->dm.bytes);
  memset(t->c.t.data, 0, t->c.bytes);
  memset(t->sy.t.data, 0, t->sy.bytes);
  memset(t->dv.t.data, 0, t->dv.bytes);
  o->block_matmul(check_be, t->y.t, t->x.t, t->m.t, 16, false, false, 1, 0);
  o->mul(check_be, t->y.t, t->y.t, t->z.t, 1);
  o->block_grad(check_be, t->dm.t, t->x.t, t->y.t, 16, false, 1);
  o->row_dot(check_be, t->r.t.data, t->x.t, t->y.t, 0);
  o->col_dot(check_be, t->c.t.data, t->x.t, t->y.t);
  o->sparse_matmul(check_be, t->sy.t, t->x.t, &t->s);
  o->sparse_grad(check_be, t->dv.t.data, t->sy.t, t->x.t, &t->s);
}
static void test_large_is_thread_independent(void **state) {
  (void)state;
  enum { WIDTH = 512, GROUPS = 16, OUT = 64 };
  int64_t tokens = test_on_cpu() ? 700 : 150;
  EACH_ISA EACH_TYPE(type) {
    large_test t = {.x = buf_new(type, tokens, WIDTH, 0, 1), .z = buf_new(type, tokens, WIDTH, 0, 1)};
    t.y = buf_new(type, tokens, WIDTH, 0, 1), t.m = buf_new(ESP_F32, WIDTH, WIDTH / GROUPS, 0, 0.2);
    t.dm = buf_new(ESP_F32, WIDTH, WIDTH / GROUPS, 0, 1), t.r = buf_new(ESP_F32, 1, tokens, 0, 1);
    t.c = buf_new(ESP_F32, 1, WIDTH, 0, 1), t.sy = buf_new(type, tokens, OUT, 0, 1);
    sparse_test sp = {0};
    sparse_new(&sp, OUT, WIDTH, true);
    t.s = sp.s, t.dv = sp.dv;
    out_ref outs[] = {{t.y.t.data, t.y.bytes}, {t.dm.t.data, t.dm.bytes}, {t.r.t.data, t.r.bytes},
                      {t.c.t.data, t.c.bytes}, {t.sy.t.data, t.sy.bytes}, {t.dv.t.data, t.dv.bytes}};
    check_threads(large_run, &t, outs, 6);
    double sums[2] = {0, 0}; /* and the sums of one matrix by rows and by columns agree */
    for (int64_t i = 0; i < tokens; i++) sums[0] += buf_load(&t.r, i);
    for (int64_t i = 0; i < WIDTH; i++) sums[1] += buf_load(&t.c, i);
    check_close("sums", sums[0], sums[1], 1e-3, 100);
    buf *all[] = {&t.x, &t.z, &t.y, &t.m, &t.dm, &t.r, &t.c, &t.sy, &t.dv, &sp.v};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) buf_free(all[i]);
    free(sp.start_of), free(sp.index), free(sp.order);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_mul),
      cmocka_unit_test(test_in_place),
      cmocka_unit_test(test_mul_rows),
      cmocka_unit_test(test_dots),
      cmocka_unit_test(test_scale_gradients),
      cmocka_unit_test(test_transpose_rows),
      cmocka_unit_test(test_khatri_rao),
      cmocka_unit_test(test_khatri_rao_bwd),
      cmocka_unit_test(test_sparse),
      cmocka_unit_test(test_large_is_thread_independent),
  };
  return cmocka_run_group_tests(tests, check_setup, check_teardown);
}
