/* test_backend_gate.c: ranks that gate themselves: forward against fp64 on every instruction set, all mixes of types,
 * odd shapes, budgets, thresholds, equals; backward against central differences, also in place; rows of zeros; one
 * thread against two.
 * Seen to catch: ds without the mean of dw (a) in k_rank_gate_bwd. */
#include "ops/ops_check.h"

static const struct {
  int64_t rows, cols, top;
  float tau, threshold, scale;
} gates[] = {
    {1, 1, 0, 1, 0, 1},         {5, 8, 0, 0.2f, 0, 8},       {7, 16, 4, 0.2f, 0, 2},
    {4, 15, 0, 0.5f, 0, -1.5f}, {9, 8, 3, 0.1f, 0, 1},       {6, 12, 5, 0.3f, 0.2f, 1},
    {3, 40, 0, 1, 0.05f, 3},    {33, 99, 7, 0.05f, 0, 0.5f}, {2, 1024, 100, 0.1f, 0, 4},
};
enum { N_GATES = sizeof gates / sizeof *gates };

typedef struct gate_test {
  buf x, y, dy, dx;
  double *start;
  bool *keep, in_place; /* keep: [rows, n] */
  esp_gate g;
} gate_test;

static double at(const gate_test *t, int64_t r, int64_t i) {
  return t->x.v[r * t->x.t.shape[1] + i];
}

/* s and w of a row */
static void gate_ref(const gate_test *t, int64_t r, double *s, double *w) {
  int64_t n = t->x.t.shape[1];
  double norm = 0, sum = 0;
  for (int64_t i = 0; i < n; i++) norm += at(t, r, i) * at(t, r, i);
  norm = sqrt(norm);
  for (int64_t i = 0; i < n; i++) s[i] = norm > 0 ? at(t, r, i) / norm : 0;
  for (int64_t i = 0; i < n; i++) sum += w[i] = exp(s[i] / t->g.tau);
  for (int64_t i = 0; i < n; i++) w[i] /= sum;
}
static void keep_ref(gate_test *t) {
  int64_t n = t->x.t.shape[1];
  double s[ESP_GATE_MOST], w[ESP_GATE_MOST];
  for (int64_t r = 0; r < t->x.t.shape[0]; r++) {
    gate_ref(t, r, s, w);
    for (int64_t i = 0; i < n; i++) {
      int64_t before = 0;
      for (int64_t j = 0; j < n; j++) before += at(t, r, j) > at(t, r, i) || (at(t, r, j) == at(t, r, i) && j < i);
      t->keep[r * n + i] = (t->g.top == 0 || before < t->g.top) && (t->g.threshold <= 0 || s[i] >= t->g.threshold);
    }
  }
}
static double y_ref(const gate_test *t, int64_t r, int64_t i, const double *w) {
  return t->keep[r * t->x.t.shape[1] + i] ? t->g.scale * w[i] * at(t, r, i) : 0;
}
static double gate_loss(void *ctx) {
  gate_test *t = ctx;
  int64_t n = t->x.t.shape[1];
  double s[ESP_GATE_MOST], w[ESP_GATE_MOST], l = 0;
  for (int64_t r = 0; r < t->x.t.shape[0]; r++) {
    gate_ref(t, r, s, w);
    for (int64_t i = 0; i < n; i++) l += t->dy.v[r * n + i] * y_ref(t, r, i, w);
  }
  return l;
}

static void fill(buf *b, const double *v) {
  for (int64_t i = 0; i < buf_n(b); i++) buf_store(b, i, v[i]);
}
static void gate_run(void *ctx) {
  gate_test *t = ctx;
  fill(&t->y, t->start);
  check_be->ops->rank_gate(check_be, t->y.t, t->x.t, &t->g);
}
static void gate_bwd_run(void *ctx) {
  gate_test *t = ctx;
  fill(&t->dx, t->in_place ? t->dy.v : t->start);
  check_be->ops->rank_gate_bwd(check_be, t->dx.t, t->in_place ? t->dx.t : t->dy.t, t->x.t, &t->g);
}

static gate_test gate_new(size_t i, esp_dtype tx, esp_dtype ty, int64_t gap) {
  gate_test t = {.g = {gates[i].top, gates[i].tau, gates[i].threshold, gates[i].scale}};
  int64_t rows = gates[i].rows, cols = gates[i].cols;
  t.x = buf_new(tx, rows, cols, gap, 1), t.y = buf_new(ty, rows, cols, 2 * gap, 1);
  t.dy = buf_new(ty, rows, cols, gap, 1), t.dx = buf_new(ty, rows, cols, gap, 1);
  t.start = malloc((size_t)(rows * cols) * 8);
  memcpy(t.start, t.y.v, (size_t)(rows * cols) * 8);
  t.keep = calloc((size_t)(rows * cols), sizeof *t.keep);
  keep_ref(&t);
  return t;
}
static void gate_free(gate_test *t) {
  buf_free(&t->x), buf_free(&t->y), buf_free(&t->dy), buf_free(&t->dx);
  free(t->start);
  free(t->keep);
}

static void check_forward(gate_test *t, double *want) {
  int64_t n = t->x.t.shape[1];
  double s[ESP_GATE_MOST], w[ESP_GATE_MOST];
  for (int64_t r = 0; r < t->x.t.shape[0]; r++) {
    gate_ref(t, r, s, w);
    for (int64_t i = 0; i < n; i++) want[r * n + i] = y_ref(t, r, i, w);
  }
  out_ref outs[] = {{t->y.t.data, t->y.bytes}};
  check_threads(gate_run, t, outs, 1);
  buf_close("rank_gate", &t->y, want, type_tol(t->y.t.dtype, 2e-5), 1e-3);
  buf_guard(&t->x);
}

static void test_forward(void **state) {
  (void)state;
  EACH_ISA EACH_TYPE(tx) EACH_TYPE(ty) for (size_t i = 0; i < N_GATES; i++) {
    gate_test t = gate_new(i, tx, ty, i % 3 * 4);
    double *want = malloc((size_t)buf_n(&t.y) * 8);
    check_forward(&t, want);
    free(want);
    gate_free(&t);
  }
}

static void test_backward(void **state) {
  (void)state;
  EACH_ISA EACH_TYPE(tx) EACH_TYPE(ty) for (size_t i = 0; i < N_GATES; i++) for (int form = 0; form < 2; form++) {
    gate_test t = gate_new(i, tx, ty, i % 3 * 4);
    t.in_place = form == 1;
    out_ref outs[] = {{t.dx.t.data, t.dx.bytes}};
    check_threads(gate_bwd_run, &t, outs, 1);
    check_grad(form ? "dx in place" : "dx", gate_loss, &t, &t.x, &t.dx, 24, ty == ESP_BF16 ? 0.0079 : 2e-4, 0.05);
    gate_free(&t);
  }
}

/* Equals: the first are kept. A row of zeros, and one that a gate underflows on, give zeros and no NaN. */
static void test_edges(void **state) {
  (void)state;
  EACH_ISA EACH_TYPE(type) {
    gate_test t = gate_new(2, type, type, 0);
    double *want = malloc((size_t)buf_n(&t.y) * 8);
    for (int64_t i = 0; i < buf_n(&t.x); i++) buf_store(&t.x, i, i / 16 == 0 ? 0 : i / 16 == 1 ? 1 : (double)(i % 3));
    keep_ref(&t);
    t.g.tau = 0.002f;
    check_forward(&t, want);
    for (int64_t i = 0; i < 16; i++) assert_true(buf_load(&t.y, i) == 0);
    for (int64_t i = 16; i < 32; i++) assert_true((buf_load(&t.y, i) != 0) == (i < 20));
    gate_bwd_run(&t);
    for (int64_t i = 0; i < buf_n(&t.dx); i++) assert_true(isfinite(buf_load(&t.dx, i)));
    free(want);
    gate_free(&t);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_forward),
      cmocka_unit_test(test_backward),
      cmocka_unit_test(test_edges),
  };
  return cmocka_run_group_tests(tests, check_setup, check_teardown);
}
