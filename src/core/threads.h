/* threads.h: the one thread pool. Short bounded spin, then futex (libgomp's spinning costs up to 100x on shared cores).
 * Worker threads and the caller run with FTZ/DAZ set. Work is cut into chunks whose boundaries do not depend on the
 * thread count, so results do not either. */
#ifndef ESP_CORE_THREADS_H
#define ESP_CORE_THREADS_H

#include <stdint.h>

#include "core/error.h"

/* n <= 0: ESPALIER_THREADS, else the CPUs of this process's affinity mask. May be called again with another n when no
 * work is running. Starts lazily with the default at first use. */
esp_status esp_threads_init(int n);
int esp_threads_count(void);
void esp_threads_shutdown(void);

/* Runs fn(ctx, chunk, thread) for chunk = 0..n_chunks-1, each exactly once, and returns when all are done.
 * `thread` is in [0, esp_threads_count()): index per-thread scratch with it. Calls from inside fn run serially. */
typedef void (*esp_parallel_fn)(void *ctx, int64_t chunk, int thread);
void esp_parallel(int64_t n_chunks, esp_parallel_fn fn, void *ctx);

/* Flush denormals in the calling thread (softmax gradients turn denormal and cost 5x). */
void esp_threads_ftz(void);

#endif
