/* comm.h: the communicator. Collectives over host memory (self, mpi) and over device memory (nccl, which is in the CUDA
 * plug-in and stands on a communicator of the host). Every call is collective: all ranks, same order. Reductions have a
 * fixed order for a given number of ranks. */
#ifndef ESP_DIST_COMM_H
#define ESP_DIST_COMM_H

#include <stddef.h>
#include <stdint.h>

#include "backend/backend.h"
#include "core/error.h"

typedef struct esp_comm esp_comm;
typedef struct esp_comm_ops {
  const char *name;                                                  /* "self", "mpi", "nccl" */
  esp_status (*all_reduce_f32)(esp_comm *c, float *buf, int64_t n);  /* sum, in place */
  esp_status (*all_reduce_f64)(esp_comm *c, double *buf, int64_t n); /* sum, in place */
  esp_status (*all_gather)(esp_comm *c, const void *mine, void *all, size_t bytes_each);
  esp_status (*broadcast)(esp_comm *c, void *buf, size_t bytes, int root);
  esp_status (*barrier)(esp_comm *c);
  void (*abort)(esp_comm *c, int code); /* ends every rank; does not return for size > 1 */
  void (*destroy)(esp_comm *c);
  esp_status (*all_reduce_device)(esp_comm *c, float *buf, int64_t n); /* buf on the rank's device; NULL: not offered */
} esp_comm_ops;
struct esp_comm {
  const esp_comm_ops *ops;
  void *impl;
  int rank, size;
};
/* name: "self", "mpi", or "auto" (mpi when started by mpirun/srun and built with it, else self). */
esp_status esp_comm_create(const char *name, esp_comm **out);
void esp_comm_destroy(esp_comm *c); /* NULL is allowed */
/* Every rank says how its part went; every rank gets the worst answer. A rank that did well while another failed gets a
 * message naming that rank. A collective call: use it where ranks may fail alone (files, memory, a step). */
esp_status esp_comm_agree(esp_comm *c, esp_status mine);
/* Bytes that a reduction of n floats over `size` > 1 ranks holds: for the plan. */
enum { ESP_COMM_SEGMENT = 131072 }; /* elements of one rank's segment of a chunk */
/* The same on a device: elements of a segment, and the buffer of one from every rank. */
static inline int64_t esp_comm_device_segment(int size, int64_t n) {
  int64_t each = (n + size - 1) / size, most = INT64_C(4) << 20;
  return each < most ? each : most;
}
static inline int64_t esp_comm_device_workspace(int size, int64_t n) {
  return esp_comm_device_segment(size, n) * size * (int64_t)sizeof(float);
}
int64_t esp_comm_workspace(int size, int64_t n);

/* Sums n floats of the backend's memory over the ranks: on the device where the communicator can, else through the
 * host. */
esp_status esp_comm_reduce(esp_comm *c, esp_backend *be, float *buf, int64_t n);

/* registry: one line per communicator */
esp_status esp_comm_self_create(esp_comm **out);
#ifdef ESP_HAVE_MPI
esp_status esp_comm_mpi_create(esp_comm **out);
#endif

#endif
