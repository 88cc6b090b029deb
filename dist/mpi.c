/* mpi.c: ranks over MPI, on host memory.
 *
 * MPI_Allreduce may add in an order that depends on the message size, the topology and the version. Reductions here
 * are done by hand: each rank owns one segment, receives every rank's copy of it (all-to-all), adds them in rank order,
 * and the sums are gathered. That moves the same bytes as a ring and gives the same bits on every rank and every run of
 * the same number of ranks. Work goes in chunks, so that the workspace is bounded.
 */
#ifdef ESP_HAVE_MPI
#include <mpi.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "dist/comm.h"

#define MESSAGE ((size_t)1 << 30) /* bytes of one message: counts are int */

typedef struct mpi_impl {
  MPI_Comm comm;
  void *work; /* 2 * size * ESP_COMM_SEGMENT doubles at most, grown on demand */
  size_t work_bytes;
} mpi_impl;

static esp_status mpi_error(int rc, const char *what) {
  if (rc == MPI_SUCCESS) return ESP_OK;
  char text[MPI_MAX_ERROR_STRING] = "";
  int n = 0;
  MPI_Error_string(rc, text, &n);
  return esp_fail(ESP_ERR_DEVICE, "MPI %s: %s", what, text);
}
#define MPI_TRY(call, what) ESP_TRY(mpi_error((call), (what)))

static void *workspace(mpi_impl *m, size_t bytes) {
  if (bytes > m->work_bytes) {
    esp_mem_free(m->work);
    m->work_bytes = 0;
    m->work = esp_mem_alloc(ESP_MEM_WORKSPACE, bytes);
    if (m->work) m->work_bytes = bytes;
  }
  return m->work;
}

/* Both element types share the text: sums a chunk of n <= size * ESP_COMM_SEGMENT elements. */
#define DEFINE_REDUCE(T, SUFFIX, MPI_T)                                                                                \
  static esp_status reduce_chunk_##SUFFIX(esp_comm *c, T *buf, int64_t n) {                                            \
    mpi_impl *m = c->impl;                                                                                             \
    int64_t seg = (n + c->size - 1) / c->size;                                                                         \
    T *send = workspace(m, 2 * (size_t)(seg * c->size) * sizeof(T));                                                   \
    if (!send) return ESP_ERR_MEMORY;                                                                                  \
    T *recv = send + seg * c->size;                                                                                    \
    memcpy(send, buf, (size_t)n * sizeof(T));                                                                          \
    memset(send + n, 0, (size_t)(seg * c->size - n) * sizeof(T));                                                      \
    MPI_TRY(MPI_Alltoall(send, (int)seg, MPI_T, recv, (int)seg, MPI_T, m->comm), "all-to-all");                        \
    for (int64_t i = 0; i < seg; i++) {                                                                                \
      T sum = recv[i];                                                                                                 \
      for (int r = 1; r < c->size; r++) sum += recv[r * seg + i];                                                      \
      recv[i] = sum;                                                                                                   \
    }                                                                                                                  \
    MPI_TRY(MPI_Allgather(recv, (int)seg, MPI_T, send, (int)seg, MPI_T, m->comm), "all-gather");                       \
    memcpy(buf, send, (size_t)n * sizeof(T));                                                                          \
    return ESP_OK;                                                                                                     \
  }                                                                                                                    \
  static esp_status mpi_reduce_##SUFFIX(esp_comm *c, T *buf, int64_t n) {                                              \
    if (c->size == 1) return ESP_OK;                                                                                   \
    int64_t chunk = (int64_t)ESP_COMM_SEGMENT * c->size;                                                               \
    for (int64_t at = 0; at < n; at += chunk)                                                                          \
      ESP_TRY(reduce_chunk_##SUFFIX(c, buf + at, n - at < chunk ? n - at : chunk));                                    \
    return ESP_OK;                                                                                                     \
  }
DEFINE_REDUCE(float, f32, MPI_FLOAT)
DEFINE_REDUCE(double, f64, MPI_DOUBLE)

static esp_status mpi_gather(esp_comm *c, const void *mine, void *all, size_t bytes_each) {
  mpi_impl *m = c->impl;
  if (bytes_each > MESSAGE) return esp_fail(ESP_ERR_INTERNAL, "MPI all-gather of %zu bytes per rank", bytes_each);
  MPI_TRY(MPI_Allgather(mine, (int)bytes_each, MPI_BYTE, all, (int)bytes_each, MPI_BYTE, m->comm), "all-gather");
  return ESP_OK;
}

static esp_status mpi_broadcast(esp_comm *c, void *buf, size_t bytes, int root) {
  mpi_impl *m = c->impl;
  for (size_t at = 0; at < bytes; at += MESSAGE) {
    size_t n = bytes - at < MESSAGE ? bytes - at : MESSAGE;
    MPI_TRY(MPI_Bcast((char *)buf + at, (int)n, MPI_BYTE, root, m->comm), "broadcast");
  }
  return ESP_OK;
}

static esp_status mpi_barrier(esp_comm *c) {
  mpi_impl *m = c->impl;
  return mpi_error(MPI_Barrier(m->comm), "barrier");
}

static void mpi_abort(esp_comm *c, int code) {
  mpi_impl *m = c->impl;
  if (c->size > 1) MPI_Abort(m->comm, code);
}

static void mpi_destroy(esp_comm *c) {
  mpi_impl *m = c->impl;
  MPI_Comm_free(&m->comm);
  esp_mem_free(m->work);
  esp_mem_free(m);
  esp_mem_free(c);
}

/* MPI can be started once in a process, while communicators may come and go: it is ended with the process. */
static void finalize(void) {
  int done = 0;
  MPI_Finalized(&done);
  if (!done) MPI_Finalize();
}

static const esp_comm_ops mpi_ops = {.name = "mpi",
                                     .all_reduce_f32 = mpi_reduce_f32,
                                     .all_reduce_f64 = mpi_reduce_f64,
                                     .all_gather = mpi_gather,
                                     .broadcast = mpi_broadcast,
                                     .barrier = mpi_barrier,
                                     .abort = mpi_abort,
                                     .destroy = mpi_destroy};

esp_status esp_comm_mpi_create(esp_comm **out) {
  *out = NULL;
  int started = 0, provided = 0;
  MPI_TRY(MPI_Initialized(&started), "initialized");
  if (!started) {
    /* All calls come from the thread that runs the step; the pool's workers never call MPI. */
    MPI_TRY(MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided), "init");
    if (provided < MPI_THREAD_FUNNELED) return esp_fail(ESP_ERR_DEVICE, "MPI offers no MPI_THREAD_FUNNELED");
    atexit(finalize);
  }
  esp_comm *c = esp_mem_alloc(ESP_MEM_HOST, sizeof *c);
  mpi_impl *m = esp_mem_alloc(ESP_MEM_HOST, sizeof *m);
  esp_status st = ESP_ERR_MEMORY;
  if (!c || !m) goto fail;
  /* An own communicator, so that a caller's messages and ours cannot meet. */
  st = mpi_error(MPI_Comm_dup(MPI_COMM_WORLD, &m->comm), "dup");
  if (st != ESP_OK) goto fail;
  MPI_Comm_set_errhandler(m->comm, MPI_ERRORS_RETURN);
  MPI_Comm_rank(m->comm, &c->rank);
  MPI_Comm_size(m->comm, &c->size);
  c->ops = &mpi_ops;
  c->impl = m;
  *out = c;
  return ESP_OK;
fail:
  esp_mem_free(m);
  esp_mem_free(c);
  return st;
}
#else
/* Without MPI this file is empty but for one declaration: ISO C wants one. */
typedef int esp_mpi_not_built;
#endif
