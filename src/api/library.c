/* library.c: what belongs to no object. */
#include "api/api.h"
#include "core/log.h"
#include "core/threads.h"

const char *esp_version(void) {
  return ESP_VERSION;
}
void esp_free(void *ptr) {
  esp_mem_free(ptr);
}
esp_status esp_set_threads(int n) {
  return esp_threads_init(n);
}

static void (*log_fn)(void *ctx, int level, const char *line);

static void forward(void *ctx, esp_log_level level, const char *line) {
  log_fn(ctx, (int)level, line);
}
void esp_set_log(void (*fn)(void *ctx, int level, const char *line), void *ctx) {
  log_fn = fn;
  esp_log_set_sink(fn ? forward : NULL, ctx);
}
