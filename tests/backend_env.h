/* backend_env.h: the backend that a suite runs on, from the environment, so that the suites written for the cpu hold a
 * device (or its simulation) to the same statements.
 *
 *  ESP_TEST_BACKEND  cpu (default), cuda, cuda:N
 *  ESP_TEST_QUICK    set: smaller lists of sizes; the simulation runs kernels as fibres, 20 to 50 times slower than C
 *  ESP_TEST_SKIP     set: where the backend is not to be had the suite prints why and exits with 77
 */
#ifndef TESTS_BACKEND_ENV_H
#define TESTS_BACKEND_ENV_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/backend.h"

static inline const char *test_backend_name(void) {
  const char *name = getenv("ESP_TEST_BACKEND");
  return name && *name ? name : "cpu";
}
static inline bool test_on_cpu(void) {
  return !strcmp(test_backend_name(), "cpu");
}
static inline bool test_quick(void) {
  const char *quick = getenv("ESP_TEST_QUICK");
  return quick && *quick;
}
/* The counting backend that keeps the books of the backend under test. */
static inline const char *test_count_name(void) {
  return test_on_cpu() ? "count" : "count:cuda";
}

/* First thing in main. Ends the program where the backend cannot be made: 77 where that may be, else 1. */
static inline void test_backend_or_exit(void) {
  esp_backend *be;
  if (test_on_cpu()) return;
  if (esp_backend_create(test_backend_name(), &be) == ESP_OK) {
    esp_backend_destroy(be);
    return;
  }
  bool skips = getenv("ESP_TEST_SKIP") != NULL;
  printf("%s: %s\n", skips ? "SKIPPED" : "FAILED", esp_error_message());
  exit(skips ? 77 : 1);
}

/* Backend memory as host memory; free() it. */
static inline void *test_read(esp_backend *be, const void *src, int64_t bytes) {
  void *host = malloc((size_t)bytes + 1);
  if (!host) abort();
  be->ops->download(be, host, src, bytes);
  return host;
}

#endif
