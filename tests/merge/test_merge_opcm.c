/* OPCM's projection on single matrices: orthogonal to what is merged already, the closed block empty, everything
 * outside of the merged one's singular spaces untouched, a second projection changes nothing; against doubles. Mutation
 * seen to be caught: the diagonal left in place by keep_closed (opcm.c) fails "equals_doubles". */
#include "merge/blend.h"
#include "naive.h"

static float *drawn(int64_t n, uint64_t stream, float scale) {
  float *x = malloc((size_t)n * sizeof *x);
  for (int64_t i = 0; i < n; i++) x[i] = scale * esp_rng_normal(9, stream, (uint64_t)i);
  return x;
}

static double inner(const float *a, const float *b, int64_t n) {
  double s = 0;
  for (int64_t i = 0; i < n; i++) s += (double)a[i] * b[i];
  return s;
}

/* <a, b> / (|a| |b|) */
static double cosine(const float *a, const float *b, int64_t n) {
  return inner(a, b, n) / sqrt(inner(a, a, n) * inner(b, b, n));
}

static float *product(int64_t rows, int64_t cols, int64_t rank, uint64_t stream) {
  float *b = drawn(rows * rank, stream, 0.3f), *a = drawn(rank * cols, stream + 1, 0.3f);
  float *x = calloc((size_t)(rows * cols), sizeof *x);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t k = 0; k < rank; k++)
      for (int64_t j = 0; j < cols; j++) x[i * cols + j] += b[i * rank + k] * a[k * cols + j];
  free(a), free(b);
  return x;
}

static const struct { int64_t rows, cols; } shapes[] = {{40, 24}, {24, 40}, {32, 32}, {1, 17}, {90, 3}};
enum { SHAPES = sizeof shapes / sizeof shapes[0] };

static void orthogonal_to_the_merged(void **state) {
  (void)state;
  for (int s = 0; s < SHAPES; s++)
    for (int similar = 0; similar < 3; similar++) { /* also of tasks that go nearly the same way */
      int64_t n = shapes[s].rows * shapes[s].cols;
      float *sum = drawn(n, 1, 0.05f);
      for (int task = 2; task < 6; task++) {
        float *tau = drawn(n, (uint64_t)task, 0.05f);
        for (int64_t i = 0; i < n; i++)
          tau[i] = similar == 2 ? 0.999f * sum[i] + 0.03f * tau[i] : tau[i] + (float)similar * sum[i];
        assert_true(!similar || fabs(cosine(tau, sum, n)) > 0.1);
        OK(esp_opcm_project(sum, shapes[s].rows, shapes[s].cols, 0.5, tau));
        double left = inner(tau, tau, n) > 0 ? cosine(tau, sum, n) : 0;
        if (!(fabs(left) < 1e-6))
          fail_msg("[%ld, %ld], task %d: %g", (long)shapes[s].rows, (long)shapes[s].cols, task, left);
        for (int64_t i = 0; i < n; i++) sum[i] += tau[i];
        free(tau);
      }
      free(sum);
    }
}

static void equals_doubles(void **state) {
  (void)state;
  static const double alphas[] = {0, 0.3, 0.5, 0.9, 1};
  for (int s = 0; s < 3; s++)
    for (int a = 0; a < 5; a++) {
      int64_t n = shapes[s].rows * shapes[s].cols, closed;
      float *sum = drawn(n, 1, 0.05f), *tau = drawn(n, 2, 0.05f), *once;
      double *x = malloc((size_t)n * 8), *want = malloc((size_t)n * 8);
      for (int64_t i = 0; i < n; i++) x[i] = sum[i], want[i] = tau[i];
      nv_project(x, shapes[s].rows, shapes[s].cols, alphas[a], want, &closed);
      assert_true((closed > 0) == (alphas[a] > 0 && alphas[a] < 1));
      OK(esp_opcm_project(sum, shapes[s].rows, shapes[s].cols, alphas[a], tau));
      for (int64_t i = 0; i < n; i++) assert_true(fabs(tau[i] - want[i]) < 1e-6);
      once = malloc((size_t)n * sizeof *once);
      memcpy(once, tau, (size_t)n * sizeof *once);
      OK(esp_opcm_project(sum, shapes[s].rows, shapes[s].cols, alphas[a], tau));
      for (int64_t i = 0; i < n; i++) assert_true(fabsf(tau[i] - once[i]) < 1e-6f);
      free(sum), free(tau), free(x), free(want), free(once);
    }
}

/* A merged vector of rank 3 (adapters): a task in other rows and columns stays as it is, to the last bit but the
 * rounding; a basis of the null space would take parts of it. */
static void what_lies_outside_stays(void **state) {
  (void)state;
  enum { R = 36, C = 28 };
  float *sum = product(R, C, 3, 20), *tau = product(R, C, 4, 30), was[R * C];
  for (int i = 0; i < R; i++)
    for (int j = 0; j < C; j++) {
      if (i >= 12 || j >= 12) sum[i * C + j] = 0;
      if (i < 12 || j < 12) tau[i * C + j] = 0;
    }
  memcpy(was, tau, sizeof was);
  OK(esp_opcm_project(sum, R, C, 0.5, tau));
  for (int i = 0; i < R * C; i++) assert_true(fabsf(tau[i] - was[i]) < 1e-7f);
  free(sum), free(tau);
}

static void nothing_merged_yet(void **state) {
  (void)state;
  float sum[12] = {0}, tau[12], was[12];
  for (int i = 0; i < 12; i++) tau[i] = was[i] = (float)i;
  OK(esp_opcm_project(sum, 3, 4, 0.5, tau));
  assert_memory_equal(tau, was, sizeof was);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(orthogonal_to_the_merged),
      cmocka_unit_test(equals_doubles),
      cmocka_unit_test(what_lies_outside_stays),
      cmocka_unit_test(nothing_merged_yet),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
