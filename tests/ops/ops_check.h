/* ops_check.h: what the op conformance tests share: random buffers of either type with their exact values in double,
 * comparison against an fp64 reference, central differences, every instruction set, and one thread against two. Under
 * ESP_TEST_BACKEND=cuda the same on a device (or its simulation) through mirror.h: instruction sets are one, and
 * instead of thread counts two runs are compared. */
#ifndef TESTS_OPS_CHECK_H
#define TESTS_OPS_CHECK_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "backend_env.h"
#include "core/cpu.h"
#include "core/rng.h"
#include "core/threads.h"
#include "ops/mirror.h"

static esp_backend *check_be;
static uint64_t check_draw;

static inline double check_normal(void) {
  return esp_rng_normal(77, 1, check_draw++);
}
static inline int64_t check_below(int64_t n) {
  return (int64_t)esp_rng_below(77, 2, check_draw++, (uint64_t)n);
}

/* What messages name: the instruction set of the cpu, else the backend. */
static inline const char *check_where(void) {
  return test_on_cpu() ? esp_isa_name(esp_cpu_isa()) : test_backend_name();
}

typedef struct buf { /* [rows, cols] with a row stride; `v` the exact values, contiguous */
  esp_tensor t;
  double *v;
  size_t bytes;
} buf;

static inline void buf_store(buf *b, int64_t i, double x) {
  int64_t at = i / b->t.shape[1] * b->t.ld + i % b->t.shape[1];
  if (b->t.dtype == ESP_BF16) {
    ((uint16_t *)b->t.data)[at] = esp_f32_to_bf16((float)x);
    b->v[i] = esp_bf16_to_f32(((uint16_t *)b->t.data)[at]);
  } else {
    ((float *)b->t.data)[at] = (float)x;
    b->v[i] = (float)x;
  }
}
static inline double buf_load(const buf *b, int64_t i) {
  int64_t at = i / b->t.shape[1] * b->t.ld + i % b->t.shape[1];
  return b->t.dtype == ESP_BF16 ? (double)esp_bf16_to_f32(((uint16_t *)b->t.data)[at]) : ((float *)b->t.data)[at];
}
static inline int64_t buf_n(const buf *b) {
  return b->t.shape[0] * b->t.shape[1];
}
/* Normal values of the given spread; `gap` extra elements between rows hold a guard that must survive. */
static inline buf buf_new(esp_dtype t, int64_t rows, int64_t cols, int64_t gap, double spread) {
  buf b = {.t = esp_tensor_2d(NULL, t, rows, cols)};
  b.t.ld = cols + gap;
  b.bytes = (size_t)(rows * b.t.ld) * esp_dtype_size(t);
  b.t.data = malloc(b.bytes + 1);
  memset(b.t.data, 0x3c, b.bytes);
  b.v = malloc((size_t)(rows * cols + 1) * sizeof *b.v);
  for (int64_t i = 0; i < rows * cols; i++) buf_store(&b, i, spread * check_normal());
  return b;
}
static inline void buf_free(buf *b) {
  free(b->t.data);
  free(b->v);
}
static inline void buf_guard(const buf *b) {
  size_t s = esp_dtype_size(b->t.dtype);
  for (int64_t r = 0; r < b->t.shape[0]; r++)
    for (int64_t c = b->t.shape[1]; c < b->t.ld; c++) {
      uint32_t word = 0;
      memcpy(&word, (char *)b->t.data + (size_t)(r * b->t.ld + c) * s, s);
      if (word != (s == 2 ? 0x3c3cu : 0x3c3c3c3cu)) fail_msg("written past the end of row %ld", (long)r);
    }
}

/* |got - want| <= tol * (|want| + floor). */
static inline void check_close(const char *what, double got, double want, double tol, double floor_) {
  double err = fabs(got - want);
  if (!(err <= tol * (fabs(want) + floor_))) fail_msg("%s: got %.9g, want %.9g (tolerance %g)", what, got, want, tol);
}
static inline double type_tol(esp_dtype t, double fp32) {
  return t == ESP_BF16 ? 0.0079 : fp32;
}
static inline void buf_close(const char *what, const buf *got, const double *want, double tol, double floor_) {
  for (int64_t i = 0; i < buf_n(got); i++) {
    char name[96];
    snprintf(name, sizeof name, "%s[%ld] of [%ld, %ld] %s, %s", what, (long)i, (long)got->t.shape[0],
             (long)got->t.shape[1], esp_dtype_name(got->t.dtype), check_where());
    check_close(name, buf_load(got, i), want[i], tol, floor_);
  }
  buf_guard(got);
}

/* Central difference of loss(ctx) in *x. */
static inline double check_slope(double (*loss)(void *), void *ctx, double *x) {
  double h = 1e-4, keep = *x;
  *x = keep + h;
  double up = loss(ctx);
  *x = keep - h;
  double down = loss(ctx);
  *x = keep;
  return (up - down) / (2 * h);
}
/* Up to `samples` elements of `grad` against the slope of loss in x->v. */
static inline void check_grad(const char *what, double (*loss)(void *), void *ctx, buf *x, const buf *grad, int samples,
                              double tol, double floor_) {
  int64_t n = buf_n(x);
  for (int64_t s = 0; s < (n < samples ? n : samples); s++) {
    int64_t i = n <= samples ? s : check_below(n);
    char name[96];
    snprintf(name, sizeof name, "%s[%ld] of %ld, %s, %s", what, (long)i, (long)n, esp_dtype_name(grad->t.dtype),
             check_where());
    check_close(name, buf_load(grad, i), check_slope(loss, ctx, &x->v[i]), tol, floor_);
  }
  buf_guard(grad);
}

/* Runs `run` with one thread and with two (which a device does not know: there it is run twice); the outputs must have
 * equal bits. */
typedef struct out_ref {
  void *data;
  size_t bytes;
} out_ref;
static inline void check_threads(void (*run)(void *), void *ctx, const out_ref *outs, int n) {
  void *copy[8];
  assert_int_equal(esp_threads_init(1), ESP_OK);
  run(ctx);
  for (int i = 0; i < n; i++) {
    copy[i] = malloc(outs[i].bytes + 1);
    memcpy(copy[i], outs[i].data, outs[i].bytes);
  }
  assert_int_equal(esp_threads_init(2), ESP_OK);
  run(ctx);
  for (int i = 0; i < n; i++) {
    if (memcmp(copy[i], outs[i].data, outs[i].bytes)) fail_msg("output %d differs between two runs", i);
    free(copy[i]);
  }
  assert_int_equal(esp_backend_sync(check_be), ESP_OK);
}

static inline esp_isa check_last_isa(void) {
  return test_on_cpu() ? esp_cpu_isa_available() : ESP_ISA_PLAIN;
}
#define EACH_ISA for (esp_isa isa = ESP_ISA_PLAIN; esp_cpu_isa_set(isa), isa <= check_last_isa(); isa++)
#define EACH_TYPE(t) for (esp_dtype t = ESP_F32; t <= ESP_BF16; t++)

static inline int check_setup(void **state) {
  (void)state;
  esp_backend *be;
  test_backend_or_exit();
  if (esp_backend_create(test_backend_name(), &be) != ESP_OK) return -1;
  if (!test_on_cpu() || getenv("ESP_TEST_MIRROR")) return mirror_create(be, &check_be) == ESP_OK ? 0 : -1;
  check_be = be;
  return 0;
}
static inline int check_teardown(void **state) {
  (void)state;
  esp_cpu_isa_set(esp_cpu_isa_available());
  esp_backend_destroy(check_be);
  esp_threads_shutdown();
  return 0;
}

#endif
