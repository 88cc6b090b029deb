#include "core/log.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <time.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static esp_log_sink sink_fn;
static void *sink_ctx;

void esp_log_set_sink(esp_log_sink sink, void *ctx) {
  pthread_mutex_lock(&lock);
  sink_fn = sink;
  sink_ctx = ctx;
  pthread_mutex_unlock(&lock);
}

void esp_log(esp_log_level level, const char *fmt, ...) {
  char line[2048];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(line, sizeof line, fmt, ap);
  va_end(ap);
  pthread_mutex_lock(&lock); /* lines of several threads come out whole */
  if (sink_fn) sink_fn(sink_ctx, level, line);
  pthread_mutex_unlock(&lock);
}

double esp_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
