/* tokenizer.c: encoding speed of one thread: tokenizer DIR FILE [seconds]. Prints one line of JSON: bytes, tokens, best
 * MB/s of CPU and of wall time over passes through the whole file, and the CPU time to load the tokenizer. The file is
 * encoded in documents of `ESP_BENCH_DOC` bytes (default 65536, cut at line breaks), as a dataset would be. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/log.h"
#include "core/mem.h"
#include "io/file.h"
#include "text/tokenizer.h"

/* CPU time of this thread: on a shared machine the clock on the wall measures the neighbours too. */
static double cpu(void) {
  struct timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static esp_status run(const char *dir, const char *path, double seconds) {
  esp_tokenizer *t = NULL;
  char *text = NULL;
  size_t n;
  esp_ids ids = {0};
  double start = cpu(), load, best = 1e30, best_wall = 1e30;
  esp_status st = esp_tokenizer_load(dir, &t);
  load = cpu() - start;
  if (st == ESP_OK) st = esp_file_read(path, &text, &n);
  const char *doc = getenv("ESP_BENCH_DOC");
  size_t size = doc ? (size_t)atoll(doc) : 65536;
  start = esp_now();
  while (st == ESP_OK) {
    double from = cpu(), wall = esp_now();
    ids.n = 0;
    for (size_t at = 0; at < n && st == ESP_OK;) {
      size_t end = at + size < n ? at + size : n;
      const char *nl = end < n ? memchr(text + end, '\n', n - end) : NULL;
      end = nl ? (size_t)(nl - text) + 1 : n;
      st = esp_tokenizer_encode(t, text + at, end - at, false, &ids);
      at = end;
    }
    double took = cpu() - from;
    if (took < best) best = took;
    if (esp_now() - wall < best_wall) best_wall = esp_now() - wall;
    if (esp_now() - start > seconds) break;
  }
  if (st == ESP_OK)
    printf("{\"bytes\":%zu,\"tokens\":%lld,\"mb_per_s\":%.2f,\"mb_per_s_wall\":%.2f,\"load_ms\":%.2f}\n", n,
           (long long)ids.n, (double)n / best * 1e-6, (double)n / best_wall * 1e-6, load * 1e3);
  esp_ids_deinit(&ids);
  esp_mem_free(text);
  esp_tokenizer_destroy(t);
  return st;
}

int main(int argc, char **argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: %s TOKENIZER_DIR TEXT_FILE [seconds]\n", argv[0]);
    return 2;
  }
  esp_status st = run(argv[1], argv[2], argc > 3 ? atof(argv[3]) : 3.0);
  if (st != ESP_OK) fprintf(stderr, "%s\n", esp_error_message());
  return (int)st;
}
