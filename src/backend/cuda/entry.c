/* entry.c: the plug-in's one exported symbol, the probe of this machine, and the program's services under the names the
 * shared sources use. */
#include <cublasLt.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/cuda.h"
#include "backend/plugin.h"

static const esp_plugin_host *host;

esp_status esp_fail(esp_status status, const char *fmt, ...) {
  va_list args;
  va_start(args, fmt);
  host->vfail(status, fmt, args);
  va_end(args);
  return status;
}
const char *esp_mem_kind_name(esp_mem_kind kind) {
  return host->kind_name(kind);
}
void esp_mem_account(esp_mem_kind kind, int64_t delta) {
  host->account(kind, delta, false);
}
void esp_mem_account_device(esp_mem_kind kind, int64_t delta) {
  host->account(kind, delta, true);
}

/* A version number without binding the library for good: it may be absent. */
static int64_t version_of(const char *file, const char *symbol, bool by_pointer) {
  int64_t v = 0;
#ifdef ESP_SIMCUDA
  void *so = NULL;
  void *fn = dlsym(RTLD_DEFAULT, symbol);
  (void)file;
#else
  void *so = dlopen(file, RTLD_NOW | RTLD_LOCAL);
  void *fn = so ? dlsym(so, symbol) : NULL;
#endif
  if (fn && by_pointer) {
    int (*get)(int *);
    int n = 0;
    memcpy(&get, &fn, sizeof get);
    if (get(&n) == 0) v = n;
  } else if (fn) {
    size_t (*get)(void);
    memcpy(&get, &fn, sizeof get);
    v = (int64_t)get();
  }
  (void)so; /* stays open: closing libraries of a driver is not safe */
  return v;
}

static void probe(esp_plugin_probe *out) {
  *out = (esp_plugin_probe){0};
  cudaDriverGetVersion(&out->driver);
  cudaRuntimeGetVersion(&out->runtime);
  out->cublaslt = (int64_t)cublasLtGetVersion();
  out->cudnn = version_of("libcudnn.so.9", "cudnnGetVersion", false);
  out->nccl = version_of("libnccl.so.2", "ncclGetVersion", true);
  int n = 0;
  cudaError_t e = cudaGetDeviceCount(&n); /* left untouched on failure */
  if (e == cudaErrorInsufficientDriver && out->driver == 0) {
    snprintf(out->why_not, sizeof out->why_not, "no NVIDIA driver on this machine");
  } else if (e == cudaErrorInsufficientDriver) {
    snprintf(out->why_not, sizeof out->why_not,
             "the driver is for CUDA %d.%d, this build needs CUDA %d.%d: update the driver", out->driver / 1000,
             out->driver % 1000 / 10, out->runtime / 1000, out->runtime % 1000 / 10);
  } else if (e == cudaErrorNoDevice || (e == cudaSuccess && n == 0)) {
    snprintf(out->why_not, sizeof out->why_not, "a driver but no device (or CUDA_VISIBLE_DEVICES hides it)");
  } else if (e != cudaSuccess) {
    snprintf(out->why_not, sizeof out->why_not, "%s: %s", cudaGetErrorName(e), cudaGetErrorString(e));
  }
  if (out->why_not[0]) return;
  int before = 0;
  cudaGetDevice(&before);
  enum { MOST = sizeof out->device / sizeof *out->device };
  out->n_devices = n < MOST ? n : MOST;
  for (int i = 0; i < out->n_devices; i++) {
    struct cudaDeviceProp p;
    esp_device_info *d = &out->device[i];
    if (cudaGetDeviceProperties(&p, i) != cudaSuccess) continue;
    snprintf(d->name, sizeof d->name, "%.127s", p.name);
    d->ordinal = i;
    d->cc = p.major * 10 + p.minor;
    d->memory_bytes = (int64_t)p.totalGlobalMem;
    size_t unused = 0, total = 0;
    if (cudaSetDevice(i) == cudaSuccess && cudaMemGetInfo(&unused, &total) == cudaSuccess)
      d->free_bytes = (int64_t)unused;
    if (d->cc < 80 && out->n_devices == 1)
      snprintf(out->why_not, sizeof out->why_not, "%.100s has compute capability %d.%d, 8.0 is needed", d->name,
               p.major, p.minor);
  }
  cudaSetDevice(before);
}

esp_status esp_cuda_create(int device, esp_backend **out);
esp_status esp_comm_nccl_create(esp_backend *be, esp_comm *over, int64_t most,
                                esp_status (*agree)(esp_comm *c, esp_status mine), esp_comm **out);

static const esp_plugin plugin = {ESP_PLUGIN_ABI, probe, esp_cuda_create, esp_comm_nccl_create};

__attribute__((visibility("default"))) const esp_plugin *esp_cuda_plugin(const esp_plugin_host *h);
const esp_plugin *esp_cuda_plugin(const esp_plugin_host *h) {
  if (h->abi != ESP_PLUGIN_ABI) return NULL;
  host = h;
  return &plugin;
}
