/* plugin.h: the contract between the program and libespalier-cuda.so, which it opens at run time when a device is asked
 * for. The plug-in holds everything that needs CUDA libraries; the program itself links none of them. */
#ifndef ESP_BACKEND_PLUGIN_H
#define ESP_BACKEND_PLUGIN_H

#include <stdarg.h>

#include "backend/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The tables that both sides share, by their sizes: a plug-in of another build is told from its own. */
enum { ESP_PLUGIN_ABI = 1 << 24 | (int)sizeof(esp_backend) << 12 | (int)sizeof(esp_backend_ops) };
/* Device memory that a context, cuBLASLt's and cuDNN's modules and the kernels take before anything of ours. */
#define ESP_CUDA_OVERHEAD ((int64_t)640 << 20)

/* What the plug-in may use of the program: one set of books, one error message per thread. */
typedef struct esp_plugin_host {
  int abi;
  esp_status (*vfail)(esp_status status, const char *fmt, va_list args);
  void (*account)(esp_mem_kind kind, int64_t delta_bytes, bool device);
  const char *(*kind_name)(esp_mem_kind kind);
} esp_plugin_host;

typedef struct esp_device_info {
  char name[128];
  int ordinal, cc;
  int64_t memory_bytes, free_bytes;
} esp_device_info;

typedef struct esp_plugin_probe {
  int driver, runtime;           /* 13000 for 13.0; driver 0: none */
  int64_t cublaslt, cudnn, nccl; /* the libraries' own version numbers; 0: could not be loaded */
  int n_devices;
  esp_device_info device[16];
  char why_not[256]; /* one line; empty: usable */
} esp_plugin_probe;

typedef struct esp_comm esp_comm;
typedef struct esp_plugin {
  int abi;
  void (*probe)(esp_plugin_probe *out);
  esp_status (*create)(int device, esp_backend **out);
  /* On top of a communicator over host memory, which must outlive it: buffers on the device, of `most` floats at most,
   * are reduced by NCCL. Collective; `agree` is esp_comm_agree. */
  esp_status (*comm)(esp_backend *be, esp_comm *host, int64_t most, esp_status (*agree)(esp_comm *c, esp_status mine),
                     esp_comm **out);
} esp_plugin;
/* The one exported symbol. NULL: the abi does not fit. */
typedef const esp_plugin *(*esp_plugin_open_fn)(const esp_plugin_host *host);
#define ESP_PLUGIN_SYMBOL "esp_cuda_plugin"

/* ---- the program's side (plugin.c) ---- */
/* Opens the plug-in: ESPALIER_CUDA_PLUGIN, else beside the program, else ../lib/espalier, else where the loader looks.
 * Once per process. ESP_ERR_DEVICE with why it cannot be used. */
esp_status esp_plugin_load(const esp_plugin **out);
/* "cuda" or "cuda:N"; N defaults to the local rank modulo the number of devices. */
esp_status esp_plugin_backend(const char *name, esp_backend **out);
/* What `auto` means here: "cuda" where the plug-in, a driver and a device are there, else "cpu"; `why` (optional, one
 * line) says why not cuda. */
const char *esp_device_auto(char *why, size_t size);

#ifdef __cplusplus
}
#endif
#endif
