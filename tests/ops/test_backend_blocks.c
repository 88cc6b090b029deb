/* test_backend_blocks.c: conformance of products with small blocks, their gradients and inverses: against fp64 on every
 * instruction set, all mixes of types, strided views and rows by groups; the backward against central differences.
 * Seen to catch: block_matmul reading the first block for all groups. */
#include "ops/kinds_check.h"

/* ---- products with blocks ---- */
static const struct {
  int64_t rows, p, q;
  int blocks;
} block_shapes[] = {{1, 1, 1, 1},    {5, 2, 2, 7},    {3, 3, 5, 4},    {17, 4, 4, 9},   {9, 8, 8, 3},
                    {20, 7, 13, 5},  {33, 16, 16, 4}, {70, 32, 32, 3}, {4, 31, 17, 2},  {6, 64, 8, 3},
                    {40, 64, 64, 2}, {35, 96, 80, 2}, {37, 48, 16, 5}, {21, 16, 48, 3}, {64, 32, 64, 2},
                    {130, 24, 8, 6}, {99, 8, 24, 5},  {70, 50, 40, 2}};
#define EACH_BLOCKS(i) for (size_t i = 0; i < sizeof block_shapes / sizeof *block_shapes; i++)

/* y_g += x_g op(m_g) over everything, in fp64 */
static void block_ref(double *y, const double *x, const double *m, int64_t rows, int64_t p, int64_t q, int blocks,
                      bool shared, bool trans, double alpha) {
  for (int64_t t = 0; t < rows; t++)
    for (int g = 0; g < blocks; g++)
      for (int64_t i = 0; i < p; i++)
        for (int64_t j = 0; j < q; j++) {
          const double *block = m + (shared ? 0 : g * p * q);
          double w = trans ? block[j * p + i] : block[i * q + j];
          y[(t * blocks + g) * q + j] += alpha * x[(t * blocks + g) * p + i] * w;
        }
}
static void block_run(void *ctx) {
  kind_test *t = ctx;
  put(&t->y, t->start);
  check_be->ops->block_matmul(check_be, t->y.t, t->x[0].t, t->x[1].t, t->blocks, t->shared, t->trans, t->alpha,
                              t->beta);
}
static void test_block_matmul(void **state) {
  (void)state;
  EACH_ISA EACH_MIX EACH_BLOCKS(i) for (int form = 0; form < 4; form++) {
    int64_t rows = block_shapes[i].rows, p = block_shapes[i].p, q = block_shapes[i].q;
    int g = block_shapes[i].blocks;
    kind_test t = {.blocks = g, .shared = form & 1, .trans = form & 2, .alpha = form == 1 ? 1 : -0.5f};
    t.beta = form == 0 || form == 3 ? 0 : 1;
    y_new(&t, ty, rows, g * q, form % 3, t.beta != 0);
    int64_t gap = form == 1 ? 8 : form;
    t.x[0] = buf_new(ta, rows, g * p, gap, 1);
    t.x[1] = buf_new(tb, (t.shared ? 1 : g) * (t.trans ? q : p), t.trans ? p : q, gap, 1);
    for (int64_t e = 0; e < buf_n(&t.y); e++) t.want[e] = before(&t, e);
    block_ref(t.want, t.x[0].v, t.x[1].v, rows, p, q, g, t.shared, t.trans, t.alpha);
    kind_check("block_matmul", block_run, &t, 4e-6, 5);
    kind_free(&t);
  }
}
static void block_grad_run(void *ctx) {
  kind_test *t = ctx;
  put(&t->y, t->start);
  check_be->ops->block_grad(check_be, t->y.t, t->x[0].t, t->x[1].t, t->blocks, t->shared, t->alpha);
}
static void test_block_grad(void **state) {
  (void)state;
  EACH_ISA EACH_TYPE(ta) EACH_TYPE(tb) EACH_BLOCKS(i) for (int shared = 0; shared < 2; shared++) {
    int64_t rows = block_shapes[i].rows, p = block_shapes[i].p, q = block_shapes[i].q;
    int g = block_shapes[i].blocks;
    kind_test t = {.blocks = g, .shared = shared, .alpha = shared ? 1 : 0.5f};
    y_new(&t, ESP_F32, (shared ? 1 : g) * p, q, shared ? 0 : 3, true);
    t.x[0] = buf_new(ta, rows, g * p, shared ? 4 : 0, 1);
    t.x[1] = buf_new(tb, rows, g * q, shared ? 0 : 7, 1);
    memcpy(t.want, t.start, (size_t)buf_n(&t.y) * 8);
    for (int64_t r = 0; r < rows * g; r++)
      for (int64_t e = 0; e < p * q; e++)
        t.want[(shared ? 0 : r % g * p * q) + e] += (double)t.alpha * t.x[0].v[r * p + e / q] * t.x[1].v[r * q + e % q];
    kind_check("block_grad", block_grad_run, &t, 4e-6, 8);
    kind_free(&t);
  }
}

/* x, y or both by groups, [G, T, width]. `a`: bit 0 of x, bit 1 of y (of dy in a gradient). */
static esp_tensor by_groups(const buf *b, int blocks, bool groups) {
  esp_tensor t = b->t;
  if (groups) t.ndim = 3, t.shape[2] = t.shape[1], t.shape[1] = t.shape[0] / blocks, t.shape[0] = blocks;
  return t;
}
static buf groups_new(esp_dtype type, int64_t rows, int64_t width, int blocks, bool groups) {
  return groups ? buf_new(type, rows * blocks, width, 0, 1) : buf_new(type, rows, width * blocks, 3, 1);
}
static int64_t group_at(int64_t t, int64_t g, int64_t rows, int blocks, bool groups) {
  return groups ? g * rows + t : t * blocks + g;
}
static void groups_run(void *ctx) {
  kind_test *t = ctx;
  put(&t->y, t->start);
  check_be->ops->block_matmul(check_be, by_groups(&t->y, t->blocks, t->a & 2), by_groups(&t->x[0], t->blocks, t->a & 1),
                              t->x[1].t, t->blocks, t->shared, t->trans, t->alpha, t->beta);
}
static void groups_grad_run(void *ctx) {
  kind_test *t = ctx;
  put(&t->y, t->start);
  check_be->ops->block_grad(check_be, t->y.t, by_groups(&t->x[0], t->blocks, t->a & 1),
                            by_groups(&t->x[1], t->blocks, t->a & 2), t->blocks, t->shared, t->alpha);
}
static void test_blocks_by_groups(void **state) {
  (void)state;
  EACH_ISA EACH_TYPE(ta) EACH_TYPE(ty) EACH_BLOCKS(i) for (int form = 1; form < 7; form++) {
    int64_t rows = block_shapes[i].rows, p = block_shapes[i].p, q = block_shapes[i].q;
    int blocks = block_shapes[i].blocks;
    bool shared = form > 3;
    kind_test t = {.blocks = blocks, .shared = shared, .trans = form % 3 == 2, .alpha = 0.5f, .beta = form % 3 == 0};
    t.a = shared ? form - 3 : form;
    kind_test d = t;
    t.y = groups_new(ty, rows, q, blocks, t.a & 2);
    t.start = malloc((size_t)buf_n(&t.y) * 8), t.want = malloc((size_t)buf_n(&t.y) * 8);
    memcpy(t.start, t.y.v, (size_t)buf_n(&t.y) * 8);
    for (int64_t e = 0; e < buf_n(&t.y); e++) t.want[e] = before(&t, e);
    t.x[0] = groups_new(ta, rows, p, blocks, t.a & 1);
    t.x[1] = buf_new(ta, (shared ? 1 : blocks) * (t.trans ? q : p), t.trans ? p : q, 0, 1);
    y_new(&d, ESP_F32, (shared ? 1 : blocks) * p, q, 3, true);
    memcpy(d.want, d.start, (size_t)buf_n(&d.y) * 8);
    d.x[0] = groups_new(ta, rows, p, blocks, t.a & 1), d.x[1] = groups_new(ty, rows, q, blocks, t.a & 2);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t g = 0; g < blocks; g++)
        for (int64_t e = 0; e < p * q; e++) {
          int64_t u = e / q, v = e % q, x = group_at(r, g, rows, blocks, t.a & 1) * p + u;
          int64_t y = group_at(r, g, rows, blocks, t.a & 2) * q + v, m = shared ? 0 : g * p * q;
          t.want[y] += 0.5 * t.x[0].v[x] * t.x[1].v[m + (t.trans ? v * p + u : e)];
          d.want[m + e] += 0.5 * d.x[0].v[x] * d.x[1].v[y];
        }
    kind_check("block_matmul by groups", groups_run, &t, 4e-6, 5);
    kind_check("block_grad by groups", groups_grad_run, &d, 4e-6, 8);
    kind_free(&t);
    kind_free(&d);
  }
}
typedef struct block_loss_test {
  buf x, m, dy;
  int blocks;
  bool shared, trans;
} block_loss_test;
static double block_loss(void *ctx) {
  block_loss_test *t = ctx;
  int64_t rows = t->x.t.shape[0], n = buf_n(&t->dy);
  double *y = calloc((size_t)n, 8), l = 0;
  block_ref(y, t->x.v, t->m.v, rows, t->x.t.shape[1] / t->blocks, t->dy.t.shape[1] / t->blocks, t->blocks, t->shared,
            t->trans, 1);
  for (int64_t i = 0; i < n; i++) l += y[i] * t->dy.v[i];
  free(y);
  return l;
}
/* As backend.h has it: dx from the same blocks with `trans` turned, the gradient of a transposed block from x and dy
 * exchanged. */
static void test_block_gradients(void **state) {
  (void)state;
  EACH_ISA EACH_TYPE(type) for (int form = 0; form < 4; form++) {
    enum { ROWS = 11, P = 6, Q = 9, G = 3 };
    bool shared = form & 1, trans = form & 2;
    block_loss_test t = {.x = buf_new(type, ROWS, G * P, 0, 1), .dy = buf_new(type, ROWS, G * Q, 1, 1)};
    t.m = buf_new(type, (shared ? 1 : G) * (trans ? Q : P), trans ? P : Q, 0, 1);
    t.blocks = G, t.shared = shared, t.trans = trans;
    buf dx = buf_new(type, ROWS, G * P, 2, 1), dm = buf_new(ESP_F32, t.m.t.shape[0], t.m.t.shape[1], 0, 1);
    memset(dm.t.data, 0, dm.bytes);
    check_be->ops->block_matmul(check_be, dx.t, t.dy.t, t.m.t, G, shared, !trans, 1, 0);
    check_be->ops->block_grad(check_be, dm.t, trans ? t.dy.t : t.x.t, trans ? t.x.t : t.dy.t, G, shared, 1);
    check_grad("dx", block_loss, &t, &t.x, &dx, 15, type_tol(type, 1e-5), 2);
    check_grad("dm", block_loss, &t, &t.m, &dm, 15, 1e-5, 2);
    buf_free(&t.x), buf_free(&t.dy), buf_free(&t.m), buf_free(&dx), buf_free(&dm);
  }
}

/* ---- inverses: I + a skew matrix, as the Cayley transform has it ---- */
static void inverse_run(void *ctx) {
  kind_test *t = ctx;
  put(&t->y, t->start);
  check_be->ops->block_inverse(check_be, t->y.t, t->trans ? t->y.t : t->x[0].t, t->blocks);
}
static void test_block_inverse(void **state) {
  (void)state;
  static const int sizes[] = {1, 2, 3, 4, 8, 16, 19, 32, 33, 64, 65, 100};
  EACH_ISA for (size_t c = 0; c < sizeof sizes / sizeof *sizes; c++) for (int in_place = 0; in_place < 2; in_place++) {
    int64_t n = sizes[c];
    kind_test t = {.blocks = n > 40 ? 2 : 3, .trans = in_place};
    y_new(&t, ESP_F32, t.blocks * n, n, c % 3, false);
    t.x[0] = buf_new(ESP_F32, t.blocks * n, n, c % 2 * 4, 1);
    for (int64_t g = 0; g < t.blocks; g++)
      for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j <= i; j++) {
          double v = check_normal();
          buf_store(&t.x[0], (g * n + i) * n + j, i == j ? 1 : v);
          if (i != j) buf_store(&t.x[0], (g * n + j) * n + i, -v);
        }
    if (in_place) memcpy(t.start, t.x[0].v, (size_t)buf_n(&t.y) * 8);
    out_ref outs[] = {{t.y.t.data, t.y.bytes}};
    check_threads(inverse_run, &t, outs, 1);
    for (int64_t e = 0; e < t.blocks * n * n; e++) {
      int64_t g = e / (n * n), i = e / n % n, j = e % n;
      double s = 0;
      for (int64_t k = 0; k < n; k++) s += buf_load(&t.y, (g * n + i) * n + k) * t.x[0].v[(g * n + k) * n + j];
      check_close("inverse", s, i == j, 1e-4, 1);
    }
    buf_guard(&t.y);
    buf_guard(&t.x[0]);
    kind_free(&t);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_block_matmul),     cmocka_unit_test(test_block_grad),
      cmocka_unit_test(test_blocks_by_groups), cmocka_unit_test(test_block_gradients),
      cmocka_unit_test(test_block_inverse),
  };
  return cmocka_run_group_tests(tests, check_setup, check_teardown);
}
