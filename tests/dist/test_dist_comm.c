/* The conformance suite of the communicator: run alone it is on `self`, under mpirun on `mpi` (2 and 4 ranks).
 * Mutation seen caught: `r = 1` changed to `r = 2` in the sum of reduce_chunk (mpi.c): test_reduce fails under mpirun.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "dist/comm.h"

static esp_comm *comm;

/* What rank r holds at i: exact in fp32 and different for every rank. */
static double value(int r, int64_t i) {
  return (double)((i * 7 + r * 13) % 1001) - 500.0;
}

static void test_reduce(void **state) {
  static const int64_t sizes[] = {0, 1, 2, 3, 5, 1000, 131072, 131073, 700001};
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
    int64_t n = sizes[s];
    float *f = malloc((size_t)(n + 1) * sizeof *f);
    double *d = malloc((size_t)(n + 1) * sizeof *d);
    for (int64_t i = 0; i < n; i++) d[i] = value(comm->rank, i), f[i] = (float)d[i];
    f[n] = 12345.0f, d[n] = 12345.0;
    assert_int_equal(comm->ops->all_reduce_f32(comm, f, n), ESP_OK);
    assert_int_equal(comm->ops->all_reduce_f64(comm, d, n), ESP_OK);
    for (int64_t i = 0; i < n; i++) {
      double want = 0;
      for (int r = 0; r < comm->size; r++) want += value(r, i);
      assert_true(f[i] == (float)want);
      assert_true(d[i] == want);
    }
    assert_true(f[n] == 12345.0f && d[n] == 12345.0); /* nothing behind the end is touched */
    free(f);
    free(d);
  }
}

/* Inexact sums: every rank ends with the same bits, and they are the sum in rank order. */
static void test_fixed_order(void **state) {
  enum { N = 4099 };
  static float f[N], want[N], all[64 * N];
  if (comm->size > 64) skip();
  for (int i = 0; i < N; i++) f[i] = (float)(1.0 / (1.0 + i + 3.7 * comm->rank) * (comm->rank % 2 ? -1e4 : 1.0));
  assert_int_equal(comm->ops->all_gather(comm, f, all, sizeof f), ESP_OK);
  for (int i = 0; i < N; i++) {
    want[i] = all[i];
    for (int r = 1; r < comm->size; r++) want[i] += all[r * N + i];
  }
  assert_int_equal(comm->ops->all_reduce_f32(comm, f, N), ESP_OK);
  assert_memory_equal(f, want, sizeof f);
}

static void test_gather_broadcast(void **state) {
  int32_t mine[3] = {comm->rank, comm->rank * 10, -comm->rank};
  int32_t *all = malloc((size_t)comm->size * sizeof mine);
  assert_int_equal(comm->ops->all_gather(comm, mine, all, sizeof mine), ESP_OK);
  for (int r = 0; r < comm->size; r++) {
    assert_int_equal(all[3 * r], r);
    assert_int_equal(all[3 * r + 1], r * 10);
    assert_int_equal(all[3 * r + 2], -r);
  }
  free(all);
  for (int root = 0; root < comm->size; root++) {
    char buf[17];
    memset(buf, comm->rank + 1, sizeof buf);
    assert_int_equal(comm->ops->broadcast(comm, buf, sizeof buf, root), ESP_OK);
    for (size_t i = 0; i < sizeof buf; i++) assert_int_equal(buf[i], root + 1);
  }
  assert_int_equal(comm->ops->barrier(comm), ESP_OK);
}

static void test_agree(void **state) {
  assert_int_equal(esp_comm_agree(comm, ESP_OK), ESP_OK);
  int bad = comm->size - 1;
  esp_status mine = comm->rank == bad ? esp_fail(ESP_ERR_DATA, "here: the reason") : ESP_OK;
  assert_int_equal(esp_comm_agree(comm, mine), ESP_ERR_DATA);
  if (comm->rank == bad)
    assert_string_equal(esp_error_message(), "here: the reason");
  else
    assert_non_null(strstr(esp_error_message(), "failed"));
}

static void test_unknown(void **state) {
  esp_comm *c = NULL;
  assert_int_equal(esp_comm_create("carrier-pigeon", &c), ESP_ERR_RECIPE);
  assert_null(c);
  assert_int_equal(esp_comm_create("self", &c), ESP_OK);
  assert_int_equal(c->size, 1);
  esp_comm_destroy(c);
}

int main(void) {
  const char *want = getenv("ESP_TEST_RANKS"); /* set by the script: mpirun must really have made that many */
  if (esp_comm_create("auto", &comm) != ESP_OK) return 1;
  if (want && atoi(want) != comm->size) return 2;
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_reduce), cmocka_unit_test(test_fixed_order), cmocka_unit_test(test_gather_broadcast),
      cmocka_unit_test(test_agree),  cmocka_unit_test(test_unknown),
  };
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  esp_comm_destroy(comm);
  return failed;
}
