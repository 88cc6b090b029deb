/* The pool: each chunk once, no call lost, nested and concurrent calls, flush modes, fork.
 * Mutation seen to fail: leaving out the reset of pool.next in run_job. */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "core/threads.h"

#ifdef __SANITIZE_THREAD__
/* The sanitizer ends a forked child that starts threads unless told otherwise; test_fork does just that. */
__attribute__((visibility("default"))) const char *__tsan_default_options(void);
const char *__tsan_default_options(void) {
  return "die_after_fork=0";
}
#endif

typedef struct count_job {
  _Atomic int hits[1000];
  _Atomic int wrong;
} count_job;

static void hit(void *ctx, int64_t chunk, int thread) {
  count_job *j = ctx;
  if (thread < 0 || thread >= esp_threads_count()) atomic_fetch_add(&j->wrong, 1);
  atomic_fetch_add(&j->hits[chunk], 1);
}

static void check_jobs(int rounds) {
  static count_job j;
  memset(&j, 0, sizeof j);
  for (int r = 0; r < rounds; r++) esp_parallel(1000, hit, &j);
  for (int i = 0; i < 1000; i++) assert_int_equal(j.hits[i], rounds);
  assert_int_equal(j.wrong, 0);
}

static void test_each_chunk_once(void **state) {
  static const int counts[] = {1, 2, 3, 8, 2};
  for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
    assert_int_equal(esp_threads_init(counts[i]), ESP_OK);
    assert_int_equal(esp_threads_count(), counts[i]);
    check_jobs(20);
  }
}

static void add_one(void *ctx, int64_t chunk, int thread) {
  atomic_fetch_add((_Atomic int64_t *)ctx, chunk + 1);
}

/* Many tiny jobs: a lost wake-up hangs here, a stale chunk counter miscounts. Pauses let workers fall asleep. */
static void test_small_jobs(void **state) {
  assert_int_equal(esp_threads_init(4), ESP_OK);
  for (int i = 0; i < 20000; i++) {
    _Atomic int64_t sum = 0;
    esp_parallel(3, add_one, &sum);
    assert_int_equal(sum, 6);
    if (i % 1000 == 0) usleep(500);
  }
}

static void inner(void *ctx, int64_t chunk, int thread) {
  int *threads = ctx;
  assert_int_equal(threads[0], thread);
  threads[1]++;
}

static void outer(void *ctx, int64_t chunk, int thread) {
  int mine[2] = {thread, 0};
  esp_parallel(5, inner, mine);
  if (mine[1] == 5) atomic_fetch_add((_Atomic int *)ctx, 1);
}

static void test_nested_is_serial(void **state) {
  _Atomic int ok = 0;
  esp_parallel(64, outer, &ok);
  assert_int_equal(ok, 64);
}

static void *caller(void *arg) {
  for (int i = 0; i < 500; i++) {
    _Atomic int64_t sum = 0;
    esp_parallel(10, add_one, &sum);
    if (sum != 55) *(int *)arg = 1;
  }
  return NULL;
}

static void test_concurrent_callers(void **state) {
  pthread_t t[3];
  int bad[3] = {0};
  for (int i = 0; i < 3; i++) assert_int_equal(pthread_create(&t[i], NULL, caller, &bad[i]), 0);
  for (int i = 0; i < 3; i++) pthread_join(t[i], NULL);
  assert_int_equal(bad[0] + bad[1] + bad[2], 0);
}

static volatile float tiny = 1e-38f, tenth = 0.01f;

static void flushes(void *ctx, int64_t chunk, int thread) {
  if (tiny * tenth != 0.0f) atomic_fetch_add((_Atomic int *)ctx, 1);
}

static void test_denormals_flushed_inside_only(void **state) {
  static const int counts[] = {1, 4};
  for (int i = 0; i < 2; i++) {
    _Atomic int kept = 0;
    esp_threads_init(counts[i]);
    esp_parallel(200, flushes, &kept);
    assert_int_equal(kept, 0);
    assert_true(tiny * tenth != 0.0f);
  }
}

/* A child has none of the parent's workers and must start its own. */
static void test_fork(void **state) {
  esp_threads_init(3);
  _Atomic int64_t sum = 0;
  esp_parallel(10, add_one, &sum);
  pid_t child = fork();
  if (child == 0) {
    alarm(10);
    sum = 0;
    esp_threads_init(2);
    esp_parallel(10, add_one, &sum);
    _exit(sum == 55 ? 0 : 1);
  }
  int status = 0;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  esp_parallel(10, add_one, &sum);
  assert_int_equal(sum, 110);
}

static void test_limits(void **state) {
  _Atomic int64_t sum = 0;
  esp_parallel(0, add_one, &sum);
  esp_parallel(-3, add_one, &sum);
  assert_int_equal(sum, 0);
  assert_int_equal(esp_threads_init(1000000), ESP_ERR_RECIPE);
  esp_threads_shutdown();
  esp_threads_shutdown();
  setenv("ESPALIER_THREADS", "3", 1);
  assert_int_equal(esp_threads_count(), 3); /* lazily, by the environment */
  esp_parallel(1, add_one, &sum);
  assert_int_equal(sum, 1);
  esp_threads_shutdown();
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_each_chunk_once),
      cmocka_unit_test(test_small_jobs),
      cmocka_unit_test(test_nested_is_serial),
      cmocka_unit_test(test_concurrent_callers),
      cmocka_unit_test(test_denormals_flushed_inside_only),
      cmocka_unit_test(test_fork),
      cmocka_unit_test(test_limits),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
