/* sdpa.h: plans of cuDNN's attention, kept per shape in memory and on disk. A shape that cuDNN refuses is remembered,
 * so that the choice between cuDNN and the own kernels is the same whenever a shape comes again. */
#ifndef ESP_BACKEND_CUDA_SDPA_H
#define ESP_BACKEND_CUDA_SDPA_H

#include "backend/cuda/sdpa_graph.h"

typedef struct esp_sdpa_plans esp_sdpa_plans;

typedef struct esp_sdpa_facts {
  int64_t version;           /* cuDNN's: 91900 for 9.19.0; 0: not there */
  int made, loaded, refused; /* plans compiled, plans read from disk, shapes refused */
  char why[256];             /* why cuDNN is not used, or the latest refusal; "" */
} esp_sdpa_facts;

/* For one device and one stream. Never fails for want of cuDNN: then every shape is refused. `gpu` names the device in
 * the path of saved plans, $XDG_CACHE_HOME/espalier/sdpa-<gpu>-<version>/. */
esp_status esp_sdpa_plans_open(cudaStream_t stream, const char *gpu, int cc, esp_sdpa_plans **out);
void esp_sdpa_plans_close(esp_sdpa_plans *p);
/* Does this cuDNN on this device do attention of packed sequences at all? Opens it on the first call. */
bool esp_sdpa_plans_usable(esp_sdpa_plans *p, bool backward);
/* The plan of a shape, from memory, from disk, or compiled now (a second or less). NULL: refused, or it wants more than
 * `max_workspace` bytes. */
const esp_sdpa_plan *esp_sdpa_plans_get(esp_sdpa_plans *p, const esp_sdpa_shape *s, int64_t max_workspace);

/* Runs a plan on the stream. uids and pointers name the tensors; values by reference to host memory are read before it
 * returns. */
typedef struct esp_sdpa_binding {
  int64_t uid[32];
  void *pointer[32];
  int n;
} esp_sdpa_binding;
static inline void esp_sdpa_bind(esp_sdpa_binding *b, int64_t uid, const void *pointer) {
  b->uid[b->n] = uid;
  b->pointer[b->n++] = (void *)pointer;
}
esp_status esp_sdpa_run(esp_sdpa_plans *p, const esp_sdpa_plan *plan, const esp_sdpa_binding *binding, void *workspace);
void esp_sdpa_plans_facts(const esp_sdpa_plans *p, esp_sdpa_facts *out);

#endif
