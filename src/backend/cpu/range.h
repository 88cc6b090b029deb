/* range.h: a job over a range of rows, elements or columns, cut in fixed steps: by shape, never by thread count. */
#ifndef ESP_BACKEND_CPU_RANGE_H
#define ESP_BACKEND_CPU_RANGE_H

#include "backend/cpu/kernels.h"
#include "core/threads.h"

#define ESP_CHUNK_ELEMENTS 16384 /* 32 to 64 KiB: amortises the hand-over, finer than any imbalance */
#define ESP_CHUNK_COLS 64

typedef void (*esp_range_fn)(const void *op, const esp_kernels *k, int64_t a, int64_t b);
typedef struct esp_range_job {
  esp_range_fn fn;
  const void *op;
  const esp_kernels *k;
  int64_t n, step;
} esp_range_job;

static inline void esp_run_range(void *ctx, int64_t chunk, int thread) {
  (void)thread;
  const esp_range_job *j = ctx;
  int64_t a = chunk * j->step, b = a + j->step < j->n ? a + j->step : j->n;
  j->fn(j->op, j->k, a, b);
}

static inline void esp_split(esp_backend *be, int64_t n, int64_t step, const void *op, esp_range_fn fn) {
  if (be->sticky != ESP_OK || n <= 0) return;
  esp_range_job j = {fn, op, esp_cpu_kernels(), n, step < 1 ? 1 : step};
  int64_t chunks = (n + j.step - 1) / j.step;
  if (chunks == 1)
    esp_run_range(&j, 0, 0);
  else
    esp_parallel(chunks, esp_run_range, &j);
}

/* Rows of so many elements that make one chunk. */
static inline int64_t esp_row_step(int64_t cols) {
  int64_t s = ESP_CHUNK_ELEMENTS / (cols > 0 ? cols : 1);
  return s > 0 ? s : 1;
}

#endif
