/* Host factorisations against their definitions, in double.
 * Mutation seen to fail: U and V^T of the SVD not exchanged for the transposed layout (fails for m != n). */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "core/linalg.h"
#include "core/mem.h"
#include "core/rng.h"
#include "core/threads.h"

static float *random_matrix(int64_t m, int64_t n, uint64_t seed) {
  float *a = esp_mem_alloc(ESP_MEM_HOST, (size_t)(m * n) * sizeof *a);
  for (int64_t i = 0; i < m * n; i++) a[i] = esp_rng_normal(seed, 1, (uint64_t)i);
  return a;
}

static float *copy_of(const float *a, int64_t n) {
  float *b = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *b);
  memcpy(b, a, (size_t)n * sizeof *b);
  return b;
}

/* Largest |X^T X - I|; X [m,n] row-major. */
static double not_orthonormal(const float *x, int64_t m, int64_t n) {
  double worst = 0;
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < n; j++) {
      double s = i == j ? -1 : 0;
      for (int64_t k = 0; k < m; k++) s += (double)x[k * n + i] * x[k * n + j];
      worst = fmax(worst, fabs(s));
    }
  return worst;
}

static void transpose(const float *a, int64_t m, int64_t n, float *out) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) out[j * m + i] = a[i * n + j];
}

static const int64_t shapes[][2] = {{1, 1}, {5, 1}, {7, 7}, {33, 12}, {130, 65}, {300, 17}};

static void test_qr(void **state) {
  for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
    int64_t m = shapes[s][0], n = shapes[s][1];
    float *a = random_matrix(m, n, s), *q = copy_of(a, m * n), *r = random_matrix(n, n, 9);
    assert_int_equal(esp_linalg_qr(m, n, q, r), ESP_OK);
    assert_true(not_orthonormal(q, m, n) < 1e-5);
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < i; j++) assert_true(r[i * n + j] == 0);
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++) {
        double v = 0;
        for (int64_t k = 0; k < n; k++) v += (double)q[i * n + k] * r[k * n + j];
        assert_true(fabs(v - a[i * n + j]) < 2e-5);
      }
    esp_mem_free(a);
    esp_mem_free(q);
    esp_mem_free(r);
  }
  float wide[6] = {1, 2, 3, 4, 5, 6};
  assert_int_equal(esp_linalg_qr(2, 3, wide, NULL), ESP_ERR_INTERNAL);
}

static void check_svd(int64_t m, int64_t n) {
  int64_t k = m < n ? m : n;
  float *a = random_matrix(m, n, 5), *work = copy_of(a, m * n), *u = random_matrix(m, k, 1),
        *s = random_matrix(1, k, 1), *vt = random_matrix(k, n, 1), *v = random_matrix(n, k, 1);
  assert_int_equal(esp_linalg_svd(m, n, work, u, s, vt), ESP_OK);
  transpose(vt, k, n, v);
  assert_true(not_orthonormal(u, m, k) < 2e-5);
  assert_true(not_orthonormal(v, n, k) < 2e-5);
  for (int64_t i = 0; i + 1 < k; i++) assert_true(s[i] >= s[i + 1] && s[i + 1] >= 0);
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      double x = 0;
      for (int64_t c = 0; c < k; c++) x += (double)u[i * k + c] * s[c] * vt[c * n + j];
      assert_true(fabs(x - a[i * n + j]) < 5e-5);
    }
  esp_mem_free(a);
  esp_mem_free(work);
  esp_mem_free(u);
  esp_mem_free(s);
  esp_mem_free(vt);
  esp_mem_free(v);
}

static void test_svd(void **state) {
  for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
    check_svd(shapes[s][0], shapes[s][1]);
    check_svd(shapes[s][1], shapes[s][0]);
  }
}

/* The error of the truncation is as small as the best one, sqrt(sum of the dropped squares), to one part in 1000. */
static void check_truncated(int64_t m, int64_t n, int64_t rank, float *s_out) {
  int64_t k = m < n ? m : n;
  float *a = random_matrix(m, n, 8), *work = copy_of(a, m * n), *u = random_matrix(m, k, 1),
        *s = random_matrix(1, k, 1), *vt = random_matrix(k, n, 1);
  assert_int_equal(esp_linalg_svd(m, n, work, u, s, vt), ESP_OK);
  double best = 0, got = 0;
  for (int64_t c = rank; c < k; c++) best += (double)s[c] * s[c];
  assert_int_equal(esp_linalg_svd_truncated(m, n, a, rank, 10, 16, 42, u, s, vt), ESP_OK);
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      double x = a[i * n + j];
      for (int64_t c = 0; c < rank; c++) x -= (double)u[i * rank + c] * s[c] * vt[c * n + j];
      got += x * x;
    }
  assert_true(got <= best * 1.001 + 1e-6);
  assert_true(not_orthonormal(u, m, rank) < 2e-5);
  memcpy(s_out, s, (size_t)rank * sizeof *s);
  memcpy(s_out + rank, u, (size_t)(m * rank) * sizeof *u);
  esp_mem_free(a);
  esp_mem_free(work);
  esp_mem_free(u);
  esp_mem_free(s);
  esp_mem_free(vt);
}

static void test_truncated(void **state) {
  float one[8 + 8 * 520], two[8 + 8 * 520];
  check_truncated(40, 30, 30, one); /* the exact path */
  check_truncated(90, 200, 8, one);
  /* a function of the inputs alone: the same bits with one thread and with three */
  esp_threads_init(1);
  check_truncated(520, 90, 8, one);
  esp_threads_init(3);
  check_truncated(520, 90, 8, two);
  assert_memory_equal(one, two, sizeof one);
  esp_threads_shutdown();
}

static void test_gemm(void **state) {
  const int64_t m = 300, n = 7, k = 33;
  float *a = random_matrix(m, k, 1), *at = random_matrix(k, m, 1), *b = random_matrix(k, n, 2),
        *bt = random_matrix(n, k, 1), *c = random_matrix(m, n, 3);
  transpose(a, m, k, at);
  transpose(b, k, n, bt);
  for (int ta = 0; ta < 2; ta++)
    for (int tb = 0; tb < 2; tb++) {
      float *out = copy_of(c, m * n);
      esp_linalg_gemm(ta, tb, m, n, k, 2, ta ? at : a, ta ? m : k, tb ? bt : b, tb ? k : n, -1, out, n);
      for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
          double x = -c[i * n + j];
          for (int64_t p = 0; p < k; p++) x += 2.0 * a[i * k + p] * b[p * n + j];
          assert_true(fabs(x - out[i * n + j]) < 1e-4);
        }
      esp_mem_free(out);
    }
  esp_mem_free(a);
  esp_mem_free(at);
  esp_mem_free(b);
  esp_mem_free(bt);
  esp_mem_free(c);
}

static void test_refusals(void **state) {
  float a[4] = {1, NAN, 3, 4}, u[4], s[2], vt[4];
  assert_int_equal(esp_linalg_svd(2, 2, a, u, s, vt), ESP_ERR_DIVERGED);
  a[1] = INFINITY;
  assert_int_equal(esp_linalg_qr(2, 2, a, u), ESP_ERR_DIVERGED);
  a[1] = 0;
  assert_int_equal(esp_linalg_svd_truncated(2, 2, a, 3, 0, 1, 1, u, s, vt), ESP_ERR_INTERNAL);
  memset(a, 0, sizeof a); /* the zero matrix has a decomposition as well */
  assert_int_equal(esp_linalg_svd(2, 2, a, u, s, vt), ESP_OK);
  assert_true(s[0] == 0 && s[1] == 0);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_qr),   cmocka_unit_test(test_svd),      cmocka_unit_test(test_truncated),
      cmocka_unit_test(test_gemm), cmocka_unit_test(test_refusals),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
