/* kinds_check.h: what the suites of the parts of adapter kinds share: one operation, its operands and what it should
 * write. */
#ifndef TESTS_OPS_KINDS_CHECK_H
#define TESTS_OPS_KINDS_CHECK_H

#include "ops/ops_check.h"

enum { MAX_OPERANDS = 4 };

/* One operation on one set of operands: `y` is what it writes, `x` what it reads, `want` the result in fp64. `run`
 * gives y the same contents before each call. */
typedef struct kind_test {
  buf y, x[MAX_OPERANDS];
  double *start; /* of y */
  double *want;
  int blocks;
  bool shared, trans;
  float alpha, beta;
  int64_t a, b;
  esp_csr s;
} kind_test;

static void put(buf *b, const double *v) {
  for (int64_t i = 0; i < buf_n(b); i++) buf_store(b, i, v[i]);
}
/* y before the call: NaN where the operation must not read it. */
static void y_new(kind_test *t, esp_dtype type, int64_t rows, int64_t cols, int64_t gap, bool read) {
  t->y = buf_new(type, rows, cols, gap, 1);
  for (int64_t i = 0; i < rows * cols && !read; i++) buf_store(&t->y, i, NAN);
  t->start = malloc((size_t)(rows * cols + 1) * 8);
  t->want = calloc((size_t)(rows * cols + 1), 8);
  memcpy(t->start, t->y.v, (size_t)(rows * cols) * 8);
}
static double before(const kind_test *t, int64_t i) {
  return t->beta == 0 ? 0 : t->beta * t->start[i];
}
static void kind_free(kind_test *t) {
  buf_free(&t->y);
  for (int i = 0; i < MAX_OPERANDS; i++)
    if (t->x[i].v) buf_free(&t->x[i]);
  free(t->start);
  free(t->want);
}
static void kind_check(const char *what, void (*run)(void *), kind_test *t, double tol, double floor_) {
  out_ref outs[] = {{t->y.t.data, t->y.bytes}};
  check_threads(run, t, outs, 1);
  buf_close(what, &t->y, t->want, type_tol(t->y.t.dtype, tol), floor_);
  for (int i = 0; i < MAX_OPERANDS; i++)
    if (t->x[i].v) buf_guard(&t->x[i]);
}

/* ty, ta, tb: all eight mixes */
#define EACH_MIX EACH_TYPE(ty) EACH_TYPE(ta) EACH_TYPE(tb)

#endif
