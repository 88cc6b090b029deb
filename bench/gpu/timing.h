/* timing.h: what the measuring programs over the op table share: a backend, device memory with random values, the
 * median time of an operation, its count of operations and bytes, one line of JSON per measurement.
 *
 * An operation is issued many times between two waits, so that its time is the device's and not the launch's, and it
 * takes its operands from memory that is far larger than the caches. Operations and bytes are those that the counting
 * backend counts for the same call. */
#ifndef BENCH_GPU_TIMING_H
#define BENCH_GPU_TIMING_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "backend/backend.h"
#include "core/rng.h"

enum { BENCH_SAMPLES = 7 };
static const double BENCH_SAMPLE_SECONDS = 0.02;

typedef struct bench {
  esp_backend *be, *count;
  bool small; /* sizes for a processor: shows that the program works */
} bench;

typedef void (*bench_fn)(esp_backend *be, void *ctx);

static inline double bench_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline void bench_check(const bench *b) {
  if (esp_backend_sync(b->be) == ESP_OK) return;
  fprintf(stderr, "error: %s\n", esp_error_message());
  exit(5);
}

static inline int bench_open(bench *b, int argc, char **argv) {
  const char *device = "cuda";
  *b = (bench){0};
  for (int i = 1; i < argc; i++) {
    if (!strcmp(argv[i], "--small")) {
      b->small = true;
    } else if (!strcmp(argv[i], "--device") && i + 1 < argc) {
      device = argv[++i];
    } else {
      fprintf(stderr, "usage: %s [--device cuda|cuda:N|cpu] [--small]\n", argv[0]);
      return 2;
    }
  }
  if (esp_backend_create(device, &b->be) != ESP_OK || esp_backend_create("count", &b->count) != ESP_OK) {
    fprintf(stderr, "error: %s\n", esp_error_message());
    return 5;
  }
  return 0;
}

static inline void bench_close(bench *b) {
  esp_backend_destroy(b->be);
  esp_backend_destroy(b->count);
}

/* Uniform in (-0.05, 0.05): zeros would run faster than data does. A block of a million draws, repeated. */
static inline void *bench_random_host(int64_t n, esp_dtype t) {
  enum { BLOCK = 1000003 };
  size_t size = esp_dtype_size(t);
  char *host = malloc((size_t)n * size);
  if (!host) exit(4);
  int64_t first = n < BLOCK ? n : BLOCK;
  for (int64_t i = 0; i < first; i++) {
    float x = (esp_rng_uniform(1, 2, (uint64_t)i) - 0.5f) * 0.1f;
    if (t == ESP_BF16)
      ((uint16_t *)host)[i] = esp_f32_to_bf16(x);
    else
      ((float *)host)[i] = x;
  }
  for (int64_t at = first; at < n; at += first)
    memcpy(host + (size_t)at * size, host, (size_t)(n - at < first ? n - at : first) * size);
  return host;
}

static inline esp_tensor bench_tensor(const bench *b, esp_dtype t, int64_t rows, int64_t cols) {
  int64_t n = rows * cols, bytes = n * (int64_t)esp_dtype_size(t);
  void *p = b->be->ops->alloc(b->be, ESP_MEM_WORKSPACE, bytes), *host = bench_random_host(n, t);
  if (!p) bench_check(b);
  if (!p) exit(4);
  b->be->ops->upload(b->be, p, host, bytes);
  bench_check(b);
  free(host);
  return esp_tensor_2d(p, t, rows, cols);
}

static inline void bench_release(const bench *b, esp_tensor t) {
  b->be->ops->free(b->be, t.data);
}

static inline int bench_by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static inline double bench_seconds(const bench *b, bench_fn fn, void *ctx) {
  double t[BENCH_SAMPLES];
  for (int i = 0; i < 2; i++) { /* the first choice of an algorithm, scratch memory */
    fn(b->be, ctx);
    bench_check(b);
  }
  double begin = bench_now();
  fn(b->be, ctx);
  bench_check(b);
  int n = (int)(BENCH_SAMPLE_SECONDS / (bench_now() - begin + 1e-9)) + 1;
  if (n > 1000) n = 1000;
  for (int i = 0; i < BENCH_SAMPLES; i++) {
    begin = bench_now();
    for (int r = 0; r < n; r++) fn(b->be, ctx);
    bench_check(b);
    t[i] = (bench_now() - begin) / n;
  }
  qsort(t, BENCH_SAMPLES, sizeof *t, bench_by_value);
  return t[BENCH_SAMPLES / 2];
}

/* Measures and prints. peak: the rate counts as what the device can do. `fields` is more JSON for the peer. */
static inline void bench_report(const bench *b, const char *name, bool peak, const char *fields, bench_fn fn,
                                bench_fn count, void *ctx) {
  esp_backend_stats before = b->count->stats;
  count(b->count, ctx);
  double flops = b->count->stats.flops - before.flops, bytes = b->count->stats.bytes - before.bytes;
  double s = bench_seconds(b, fn, ctx);
  printf("{\"name\": \"%s\", \"peak\": %s, \"flops\": %.0f, \"bytes\": %.0f, \"seconds\": %.9f, %s}\n", name,
         peak ? "true" : "false", flops, bytes, s, fields);
  fflush(stdout);
}

#endif
