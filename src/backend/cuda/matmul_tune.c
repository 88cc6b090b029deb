/* matmul_tune.c: ESPALIER_CUDA_TUNE=1: the algorithm of a shape is chosen by measurement instead of by the library's
 * heuristic, and kept in XDG_CACHE_HOME/espalier/cublaslt-<device>-<version>.bin for later runs.
 *
 * Off by default: two measurements may name different algorithms, whose sums differ in rounding. With the file in place
 * nothing is measured again, and runs repeat one another. A file of another device, library or layout, or one that is
 * damaged, is ignored and written anew. */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "backend/cuda/matmul_impl.h"

enum { REPEATS = 5, MOST_TUNED = 65536 };

typedef struct header {
  char magic[8];
  uint32_t record_bytes, count;
  uint64_t version; /* of cuBLASLt */
  int32_t cc, sms;
  uint64_t checksum; /* of the records */
} header;

static const char magic[8] = "ESPLTMM1";

static uint64_t checksum(const void *data, size_t bytes) { /* FNV-1a */
  const unsigned char *p = data;
  uint64_t h = 14695981039346656037u;
  for (size_t i = 0; i < bytes; i++) h = (h ^ p[i]) * 1099511628211u;
  return h;
}

static header header_of(const esp_cuda *c, const esp_mm_tuned *records, int n) {
  header h = {.record_bytes = sizeof *records, .count = (uint32_t)n, .version = cublasLtGetVersion()};
  memcpy(h.magic, magic, sizeof h.magic);
  h.cc = c->cc;
  h.sms = c->sms;
  h.checksum = checksum(records, (size_t)n * sizeof *records);
  return h;
}

/* ---- the file ---- */

static void choose_path(const esp_cuda *c, esp_cuda_matmul *mm) {
  struct cudaDeviceProp device;
  char name[64];
  const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
  if (cudaGetDeviceProperties(&device, c->device) != cudaSuccess) return;
  snprintf(name, sizeof name, "%.63s", device.name);
  for (char *p = name; *p; p++) *p = isalnum((unsigned char)*p) ? (char)tolower((unsigned char)*p) : '-';
  if (!(cache && cache[0] == '/') && !(home && home[0] == '/')) return;
  bool own = cache && cache[0] == '/';
  int n = snprintf(mm->path, sizeof mm->path, "%s%s/espalier/cublaslt-%s-%zu.bin", own ? cache : home,
                   own ? "" : "/.cache", name, cublasLtGetVersion());
  if (n < 0 || (size_t)n >= sizeof mm->path) mm->path[0] = 0;
}

static void read_file(const esp_cuda *c, esp_cuda_matmul *mm) {
  header h;
  FILE *f = mm->path[0] ? fopen(mm->path, "rb") : NULL;
  esp_mm_tuned *records = NULL;
  if (!f) return;
  if (fread(&h, sizeof h, 1, f) != 1 || h.count > MOST_TUNED) goto done;
  records = malloc(h.count * sizeof *records + 1);
  if (!records || fread(records, sizeof *records, h.count, f) != h.count) goto done;
  header expected = header_of(c, records, (int)h.count);
  if (memcmp(&h, &expected, sizeof h) != 0) goto done;
  mm->tuned = records;
  mm->n_tuned = mm->cap_tuned = (int)h.count;
  records = NULL;
done:
  free(records);
  fclose(f);
}

/* Each directory on the way to the file. */
static void make_directories(char *path) {
  for (char *p = path + 1; *p; p++) {
    if (*p != '/') continue;
    *p = 0;
    mkdir(path, 0777);
    *p = '/';
  }
}

/* Beside the file, then in its place: a reader sees the old or the new one. Not being able to is no failure of a run.
 */
static void write_file(const esp_cuda *c, esp_cuda_matmul *mm) {
  char temporary[sizeof mm->path + 32];
  header h = header_of(c, mm->tuned, mm->n_tuned);
  size_t n = (size_t)mm->n_tuned;
  make_directories(mm->path);
  snprintf(temporary, sizeof temporary, "%s.%ld", mm->path, (long)getpid());
  FILE *f = fopen(temporary, "wb");
  if (!f) return;
  bool ok = fwrite(&h, sizeof h, 1, f) == 1 && fwrite(mm->tuned, sizeof *mm->tuned, n, f) == n;
  ok = fclose(f) == 0 && ok;
  if (!ok || rename(temporary, mm->path) != 0) unlink(temporary);
}

void esp_mm_tune_open(esp_backend *be) {
  const esp_cuda *c = esp_cuda_of(be);
  const char *wanted = getenv("ESPALIER_CUDA_TUNE");
  c->mm->tune = wanted && strcmp(wanted, "1") == 0;
  if (!c->mm->tune) return;
  choose_path(c, c->mm);
  read_file(c, c->mm);
}

void esp_mm_tune_close(esp_backend *be) {
  esp_cuda_matmul *mm = esp_cuda_of(be)->mm;
  if (mm->tuned_new && mm->path[0]) write_file(esp_cuda_of(be), mm);
  free(mm->tuned);
  mm->tuned = NULL;
}

/* ---- choices ---- */

/* Shapes are looked for once each, so a walk through the list will do. */
bool esp_mm_tuned_find(esp_cuda_matmul *mm, esp_mm_entry *e) {
  for (int i = 0; i < mm->n_tuned; i++) {
    cublasLtMatmulHeuristicResult_t check;
    if (memcmp(&mm->tuned[i].key, &e->key, sizeof e->key) != 0) continue;
    if (cublasLtMatmulAlgoCheck(mm->lt, &e->desc, &e->b, &e->a, &e->c, &e->c, &mm->tuned[i].algo, &check) !=
            CUBLAS_STATUS_SUCCESS ||
        check.workspaceSize > mm->workspace_bytes)
      return false;
    e->algo = mm->tuned[i].algo;
    return true;
  }
  return false;
}

static void keep(esp_cuda_matmul *mm, const esp_mm_entry *e, const cublasLtMatmulAlgo_t *algo) {
  int at = 0;
  while (at < mm->n_tuned && memcmp(&mm->tuned[at].key, &e->key, sizeof e->key) != 0) at++;
  if (at == MOST_TUNED) return;
  if (at == mm->cap_tuned) {
    int cap = mm->cap_tuned ? 2 * mm->cap_tuned : 64;
    esp_mm_tuned *list = realloc(mm->tuned, (size_t)cap * sizeof *list);
    if (!list) return; /* then it is measured again another time */
    mm->tuned = list;
    mm->cap_tuned = cap;
  }
  mm->tuned[at] = (esp_mm_tuned){e->key, *algo};
  if (at == mm->n_tuned) mm->n_tuned++;
  mm->tuned_new = true;
}

/* Best of a few runs, the first of them to warm up; negative: it does not run. */
static float time_of(esp_cuda *c, esp_mm_entry *e, const cublasLtMatmulAlgo_t *algo, const esp_mm_data *data,
                     cudaEvent_t begin, cudaEvent_t end) {
  float best = -1;
  for (int i = 0; i < REPEATS; i++) {
    float ms = 0;
    cudaEventRecord(begin, c->stream);
    if (esp_mm_run(c, e, algo, data, 1.0f, e->key.adds ? 1.0f : 0.0f) != CUBLAS_STATUS_SUCCESS) return -1;
    cudaEventRecord(end, c->stream);
    if (cudaEventSynchronize(end) != cudaSuccess || cudaEventElapsedTime(&ms, begin, end) != cudaSuccess) return -1;
    if (i > 0 && (best < 0 || ms < best)) best = ms;
  }
  return best;
}

/* Into memory of its own, since a product that adds to c may run only once. An algorithm that cannot run is passed over
 * without a trace; a lost device is noticed by the operation that follows. */
int esp_mm_measure(esp_backend *be, esp_mm_entry *e, const esp_mm_data *data,
                   const cublasLtMatmulHeuristicResult_t *found, int n) {
  esp_cuda *c = esp_cuda_of(be);
  cudaEvent_t begin = NULL, end = NULL;
  void *copy = NULL;
  esp_mm_data into = *data;
  float best_ms = -1;
  int best = 0;
  size_t offset = (uintptr_t)data->c % 16; /* the alignment that the algorithm was asked for */
  int64_t last = e->key.batch ? (e->key.batch - 1) * e->key.to_c : 0;
  size_t bytes = (size_t)(last + e->key.m * e->key.ldc) * esp_dtype_size((esp_dtype)e->key.out) + 16;
  if (cudaMalloc(&copy, bytes) != cudaSuccess || cudaEventCreate(&begin) != cudaSuccess ||
      cudaEventCreate(&end) != cudaSuccess)
    goto done;
  into.c = (char *)copy + offset;
  for (int i = 0; i < n; i++) {
    float ms = found[i].state == CUBLAS_STATUS_SUCCESS ? time_of(c, e, &found[i].algo, &into, begin, end) : -1;
    if (ms < 0 || (best_ms >= 0 && ms >= best_ms)) continue;
    best_ms = ms;
    best = i;
  }
  if (best_ms >= 0) keep(c->mm, e, &found[best].algo);
done:
  if (begin) cudaEventDestroy(begin);
  if (end) cudaEventDestroy(end);
  if (copy) cudaFree(copy);
  cudaGetLastError(); /* no memory to measure in is no error */
  return best;
}
