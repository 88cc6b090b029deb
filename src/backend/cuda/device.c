/* device.c: the device itself: streams, memory with its books, copies, and how failures are told.
 *
 * Uploads from ordinary memory pass through a ring of page-locked chunks, so that the caller's buffer is free when the
 * call returns and the copy runs in the stream's order. Nothing here waits in a step except a download. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/cuda.h"

typedef struct esp_cuda_block {
  void *at;
  int64_t bytes;
  esp_mem_kind kind;
} block;

bool esp_cuda_ok(esp_backend *be, cudaError_t e, const char *what) {
  if (e == cudaSuccess) return be->sticky == ESP_OK;
  if (be->sticky == ESP_OK) {
    esp_status st = e == cudaErrorMemoryAllocation ? ESP_ERR_MEMORY : ESP_ERR_DEVICE;
    be->sticky = esp_fail(st, "cuda: %s: %s: %s", what, cudaGetErrorName(e), cudaGetErrorString(e));
  }
  return false;
}

bool esp_cuda_fail(esp_backend *be, const char *library, const char *what, const char *text) {
  if (be->sticky == ESP_OK) be->sticky = esp_fail(ESP_ERR_DEVICE, "cuda: %s: %s: %s", library, what, text);
  return false;
}

/* ---- memory ---- */

static bool remember(esp_backend *be, void *at, int64_t bytes, esp_mem_kind kind) {
  esp_cuda *c = esp_cuda_of(be);
  if (c->n_blocks == c->cap_blocks) {
    int cap = c->cap_blocks ? 2 * c->cap_blocks : 512;
    block *list = realloc(c->blocks, (size_t)cap * sizeof *list);
    if (!list) {
      be->sticky = esp_fail(ESP_ERR_MEMORY, "cuda: out of host memory");
      return false;
    }
    c->blocks = list;
    c->cap_blocks = cap;
  }
  c->blocks[c->n_blocks++] = (block){at, bytes, kind};
  esp_mem_account_device(kind, bytes);
  return true;
}

static void *take(esp_backend *be, esp_mem_kind kind, int64_t bytes, bool zeroed) {
  esp_cuda *c = esp_cuda_of(be);
  void *p = NULL;
  if (be->sticky != ESP_OK) return NULL;
  cudaError_t e = cudaMalloc(&p, (size_t)(bytes > 0 ? bytes : 1));
  if (e == cudaErrorMemoryAllocation) {
    size_t unused = 0, total = 0;
    cudaGetLastError(); /* an allocation that fails leaves nothing behind */
    cudaMemGetInfo(&unused, &total);
    be->sticky = esp_fail(ESP_ERR_MEMORY,
                          "cuda:%d: %.1f MiB for %s do not fit: %.1f of %.1f MiB are free (another process may hold "
                          "the rest)",
                          c->device, (double)bytes / 1048576, esp_mem_kind_name(kind), (double)unused / 1048576,
                          (double)total / 1048576);
    return NULL;
  }
  if (!esp_cuda_ok(be, e, "cudaMalloc")) return NULL;
  if (zeroed && bytes > 0 && !esp_cuda_ok(be, cudaMemsetAsync(p, 0, (size_t)bytes, c->stream), "cudaMemset")) {
    cudaFree(p);
    return NULL;
  }
  if (remember(be, p, bytes, kind)) return p;
  cudaFree(p);
  return NULL;
}

void *esp_cuda_alloc(esp_backend *be, esp_mem_kind kind, int64_t bytes) {
  return take(be, kind, bytes, true);
}

void esp_cuda_free(esp_backend *be, void *ptr) {
  esp_cuda *c = esp_cuda_of(be);
  if (!ptr) return;
  for (int i = c->n_blocks - 1; i >= 0; i--) {
    if (c->blocks[i].at != ptr) continue;
    cudaStreamSynchronize(c->stream); /* operations under way may use it */
    cudaFree(ptr);
    esp_mem_account_device(c->blocks[i].kind, -c->blocks[i].bytes);
    c->blocks[i] = c->blocks[--c->n_blocks];
    return;
  }
}

void *esp_cuda_scratch(esp_backend *be, int64_t bytes) {
  esp_cuda *c = esp_cuda_of(be);
  if (be->sticky != ESP_OK) return NULL;
  if (bytes <= c->scratch_bytes && c->scratch) return c->scratch;
  if (c->capturing) {
    be->sticky = esp_fail(ESP_ERR_INTERNAL, "cuda: scratch would grow from %lld to %lld bytes inside a recorded piece",
                          (long long)c->scratch_bytes, (long long)bytes);
    return NULL;
  }
  /* Recorded pieces name the old block, which then stays to the end; a run reserves the largest before its first step,
   * so that this does not happen. */
  if (!c->pieces) esp_cuda_free(be, c->scratch); /* first: the peak is the larger one, not the sum */
  c->scratch_bytes = 0;
  c->scratch = take(be, ESP_MEM_WORKSPACE, bytes, false);
  if (c->scratch) c->scratch_bytes = bytes;
  return c->scratch;
}

int64_t esp_cuda_scratch_reserve(esp_backend *be, int64_t at_least) {
  if (at_least > esp_cuda_of(be)->scratch_bytes) esp_cuda_scratch(be, at_least);
  return esp_cuda_of(be)->scratch_bytes;
}

void *esp_cuda_host_alloc(esp_backend *be, int64_t bytes) {
  void *p = NULL;
  size_t total = (size_t)bytes + 64; /* the size lies in front, for the books */
  if (!esp_cuda_ok(be, cudaHostAlloc(&p, total, cudaHostAllocDefault), "page-locked host memory")) return NULL;
  memset(p, 0, total);
  memcpy(p, &bytes, sizeof bytes);
  esp_mem_account(ESP_MEM_HOST, bytes);
  return (char *)p + 64;
}

void esp_cuda_host_free(esp_backend *be, void *ptr) {
  int64_t bytes;
  (void)be;
  if (!ptr) return;
  memcpy(&bytes, (char *)ptr - 64, sizeof bytes);
  esp_mem_account(ESP_MEM_HOST, -bytes);
  cudaFreeHost((char *)ptr - 64);
}

/* ---- copies ---- */

/* The chunk that is being filled; when it is full the next one, as soon as its copies are over. Small uploads share a
 * chunk, so that the host runs several passes ahead of the device. */
static esp_cuda_chunk *room(esp_backend *be) {
  esp_cuda *c = esp_cuda_of(be);
  esp_cuda_chunk *k = &c->ring[c->ring_at];
  if (k->used < ESP_CUDA_RING_BYTES) return k;
  if (!esp_cuda_ok(be, cudaEventRecord(k->done, c->stream), "upload")) return NULL;
  k->busy = true;
  c->ring_at = (c->ring_at + 1) % ESP_CUDA_RING;
  k = &c->ring[c->ring_at];
  if (k->busy && !esp_cuda_ok(be, cudaEventSynchronize(k->done), "upload")) return NULL;
  k->busy = false;
  k->used = 0;
  return k;
}

void esp_cuda_upload(esp_backend *be, void *dst, const void *host, int64_t bytes) {
  esp_cuda *c = esp_cuda_of(be);
  for (int64_t at = 0; at < bytes && be->sticky == ESP_OK;) {
    esp_cuda_chunk *k = room(be);
    if (!k) return;
    size_t left = ESP_CUDA_RING_BYTES - k->used, n = (size_t)(bytes - at) < left ? (size_t)(bytes - at) : left;
    memcpy(k->host + k->used, (const char *)host + at, n);
    esp_cuda_ok(be, cudaMemcpyAsync((char *)dst + at, k->host + k->used, n, cudaMemcpyHostToDevice, c->stream),
                "upload");
    k->used += (n + 63) / 64 * 64;
    at += (int64_t)n;
  }
}

void esp_cuda_download_later(esp_backend *be, void *host, const void *src, int64_t bytes) {
  if (be->sticky != ESP_OK || bytes <= 0) return;
  esp_cuda_ok(be, cudaMemcpyAsync(host, src, (size_t)bytes, cudaMemcpyDeviceToHost, esp_cuda_of(be)->stream),
              "download");
}

void esp_cuda_download(esp_backend *be, void *host, const void *src, int64_t bytes) {
  if (be->sticky != ESP_OK) memset(host, 0, (size_t)bytes);
  esp_cuda_download_later(be, host, src, bytes);
  esp_cuda_sync(be);
}

void esp_cuda_zero(esp_backend *be, void *dst, int64_t bytes) {
  if (be->sticky != ESP_OK || bytes <= 0) return;
  esp_cuda_ok(be, cudaMemsetAsync(dst, 0, (size_t)bytes, esp_cuda_of(be)->stream), "zero");
}

esp_status esp_cuda_sync(esp_backend *be) {
  if (be->sticky == ESP_OK) esp_cuda_ok(be, cudaStreamSynchronize(esp_cuda_of(be)->stream), "the device");
  return be->sticky;
}

void esp_cuda_stage(esp_backend *be, int channel, void *dst, const void *host, int64_t bytes) {
  esp_cuda *c = esp_cuda_of(be);
  cudaStream_t copy = c->copy[channel];
  if (be->sticky != ESP_OK) return;
  esp_cuda_ok(be, cudaEventRecord(c->issued[channel], c->stream), "stage");
  esp_cuda_ok(be, cudaStreamWaitEvent(copy, c->issued[channel], 0), "stage");
  esp_cuda_ok(be, cudaMemcpyAsync(dst, host, (size_t)bytes, cudaMemcpyHostToDevice, copy), "stage");
  esp_cuda_ok(be, cudaEventRecord(c->staged[channel], copy), "stage");
}

void esp_cuda_stage_wait(esp_backend *be, int channel) {
  esp_cuda *c = esp_cuda_of(be);
  if (be->sticky == ESP_OK) esp_cuda_ok(be, cudaStreamWaitEvent(c->stream, c->staged[channel], 0), "stage");
}

/* ---- life ---- */

esp_status esp_cuda_device_open(esp_backend *be, int device) {
  struct cudaDeviceProp p;
  esp_cuda *c = calloc(1, sizeof *c);
  if (!c) return esp_fail(ESP_ERR_MEMORY, "cuda: out of host memory");
  be->impl = c;
  c->device = device;
  const char *graphs = getenv("ESPALIER_CUDA_GRAPHS");
  c->no_pieces = graphs && !strcmp(graphs, "0");
  if (!esp_cuda_ok(be, cudaSetDevice(device), "choosing the device") ||
      !esp_cuda_ok(be, cudaGetDeviceProperties(&p, device), "reading the device"))
    return be->sticky;
  c->cc = p.major * 10 + p.minor;
  snprintf(be->device, sizeof be->device, "cuda:%d %.48s", device, p.name);
  c->sms = p.multiProcessorCount;
  c->smem_block_optin = (int)p.sharedMemPerBlockOptin;
  c->l2_bytes = p.l2CacheSize;
  if (c->cc < 80)
    return be->sticky = esp_fail(ESP_ERR_DEVICE, "cuda:%d: %.100s has compute capability %d.%d, 8.0 is needed", device,
                                 p.name, p.major, p.minor);
  esp_cuda_ok(be, cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking), "a stream");
  for (int i = 0; i < ESP_CUDA_CHANNELS; i++) {
    esp_cuda_ok(be, cudaStreamCreateWithFlags(&c->copy[i], cudaStreamNonBlocking), "a stream");
    esp_cuda_ok(be, cudaEventCreateWithFlags(&c->issued[i], cudaEventDisableTiming), "an event");
    esp_cuda_ok(be, cudaEventCreateWithFlags(&c->staged[i], cudaEventDisableTiming), "an event");
  }
  for (int i = 0; i < ESP_CUDA_RING; i++) {
    esp_cuda_ok(be, cudaEventCreateWithFlags(&c->ring[i].done, cudaEventDisableTiming), "an event");
    esp_cuda_ok(be, cudaHostAlloc((void **)&c->ring[i].host, ESP_CUDA_RING_BYTES, cudaHostAllocDefault),
                "page-locked host memory");
  }
  c->sum = esp_cuda_alloc(be, ESP_MEM_WORKSPACE, sizeof(double));
  return be->sticky;
}

void esp_cuda_device_close(esp_backend *be) {
  esp_cuda *c = esp_cuda_of(be);
  for (int i = 0; i < c->n_blocks; i++) {
    cudaFree(c->blocks[i].at);
    esp_mem_account_device(c->blocks[i].kind, -c->blocks[i].bytes);
  }
  for (int i = 0; i < ESP_CUDA_RING; i++) {
    if (c->ring[i].host) cudaFreeHost(c->ring[i].host);
    if (c->ring[i].done) cudaEventDestroy(c->ring[i].done);
  }
  for (int i = 0; i < ESP_CUDA_CHANNELS; i++) {
    if (c->copy[i]) cudaStreamDestroy(c->copy[i]);
    if (c->issued[i]) cudaEventDestroy(c->issued[i]);
    if (c->staged[i]) cudaEventDestroy(c->staged[i]);
  }
  if (c->stream) cudaStreamDestroy(c->stream);
  free(c->blocks);
  free(c);
  be->impl = NULL;
}
