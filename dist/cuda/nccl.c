/* nccl.c: ranks with one device each. Everything that lies in host memory goes through the communicator that started
 * the ranks (MPI); gradients on devices are reduced by NCCL without coming to the host.
 *
 * The order of the sum does not depend on NCCL's choice of algorithm: each rank owns one segment, receives every rank's
 * copy of it, adds them in rank order and the sums are gathered, as dist/mpi.c does on the host. The same bytes move as
 * in a ring.
 *
 * A rank that died must not leave the others waiting on a stream for ever: the stream is polled beside NCCL's own
 * asynchronous errors until a deadline, then the communicator is aborted. */
#include <dlfcn.h>
#include <nccl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "backend/cuda/cuda.h"
#include "dist/comm.h"

enum { TIMEOUT_SECONDS = 600 };

/* The library is opened when ranks first need it: a machine with one device may be without it. */
#define FUNCTIONS(X)                                                                                                   \
  X(GetUniqueId)                                                                                                       \
  X(CommInitRankConfig)                                                                                                \
  X(CommAbort)                                                                                                         \
  X(CommDestroy)                                                                                                       \
  X(CommGetAsyncError)                                                                                                 \
  X(GroupStart)                                                                                                        \
  X(GroupEnd)                                                                                                          \
  X(Send)                                                                                                              \
  X(Recv)                                                                                                              \
  X(GetErrorString)                                                                                                    \
  X(GetLastError)
static struct {
#define MEMBER(name) __typeof__(&nccl##name) name;
  FUNCTIONS(MEMBER)
} nccl;

static esp_status open_library(void) {
#ifdef ESP_SIMCUDA
#define TAKE(name) nccl.name = nccl##name;
  FUNCTIONS(TAKE)
#else
  void *so = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL), *f;
  if (!so) return esp_fail(ESP_ERR_DEVICE, "NCCL: %s", dlerror());
#define TAKE(name)                                                                                                     \
  f = dlsym(so, "nccl" #name);                                                                                         \
  if (!f) return esp_fail(ESP_ERR_DEVICE, "NCCL: libnccl.so.2 has no nccl" #name);                                     \
  memcpy(&nccl.name, &f, sizeof f);
  FUNCTIONS(TAKE)
#endif
  return ESP_OK;
}

typedef struct nccl_impl {
  esp_backend *be;
  esp_comm *host;
  ncclComm_t comm;
  float *work; /* device: [size, segment] */
  int64_t segment;
} nccl_impl;

static esp_status nccl_error(ncclResult_t rc, ncclComm_t comm, const char *what) {
  if (rc == ncclSuccess || rc == ncclInProgress) return ESP_OK;
  const char *more = comm ? nccl.GetLastError(comm) : "";
  return esp_fail(ESP_ERR_DEVICE, "NCCL: %s: %s%s%s", what, nccl.GetErrorString(rc), more && *more ? ": " : "",
                  more ? more : "");
}
#define NCCL_TRY(call, what) ESP_TRY(nccl_error((call), n->comm, (what)))

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Until the collective has run on the stream. */
static esp_status wait_for(nccl_impl *n) {
  double deadline = now() + TIMEOUT_SECONDS;
  for (;;) {
    /* NCCL first: work of a collective that failed may end on the stream as if nothing had happened. */
    cudaError_t e = cudaStreamQuery(esp_cuda_of(n->be)->stream);
    ncclResult_t rc = ncclSuccess;
    nccl.CommGetAsyncError(n->comm, &rc);
    if (e == cudaSuccess && rc == ncclSuccess) return ESP_OK;
    if (e != cudaSuccess && e != cudaErrorNotReady) {
      esp_cuda_ok(n->be, e, "a collective");
      return n->be->sticky;
    }
    bool late = now() > deadline;
    if ((rc == ncclSuccess || rc == ncclInProgress) && !late) continue;
    esp_status st = late
                        ? esp_fail(ESP_ERR_DEVICE, "NCCL: a collective did not finish in %d s: a rank is gone or stuck",
                                   TIMEOUT_SECONDS)
                        : nccl_error(rc, n->comm, "a collective");
    nccl.CommAbort(n->comm);
    n->comm = NULL;
    return n->be->sticky = st;
  }
}

/* n->segment * size elements at most. */
static esp_status reduce_chunk(esp_comm *c, float *buf, int64_t count) {
  nccl_impl *n = c->impl;
  cudaStream_t stream = esp_cuda_of(n->be)->stream;
  int64_t seg = (count + c->size - 1) / c->size;
  int64_t mine = count - c->rank * seg; /* elements of this rank's segment; later ranks may have none */
  if (mine > seg) mine = seg;
  if (mine < 0) mine = 0;
  NCCL_TRY(nccl.GroupStart(), "group");
  for (int r = 0; r < c->size; r++) {
    int64_t theirs = count - r * seg;
    if (theirs > seg) theirs = seg;
    if (theirs > 0) NCCL_TRY(nccl.Send(buf + r * seg, (size_t)theirs, ncclFloat32, r, n->comm, stream), "send");
    if (mine > 0)
      NCCL_TRY(nccl.Recv(n->work + r * n->segment, (size_t)mine, ncclFloat32, r, n->comm, stream), "receive");
  }
  NCCL_TRY(nccl.GroupEnd(), "all-to-all");
  if (mine > 0) {
    esp_tensor sum = esp_tensor_1d(n->work, ESP_F32, mine);
    for (int r = 1; r < c->size; r++)
      esp_cuda_axpby(n->be, sum, 1.0f, esp_tensor_1d(n->work + r * n->segment, ESP_F32, mine), 1.0f);
  }
  /* each rank gives its segment to all */
  NCCL_TRY(nccl.GroupStart(), "group");
  for (int r = 0; r < c->size; r++) {
    int64_t theirs = count - r * seg;
    if (theirs > seg) theirs = seg;
    if (mine > 0) NCCL_TRY(nccl.Send(n->work, (size_t)mine, ncclFloat32, r, n->comm, stream), "send");
    if (theirs > 0) NCCL_TRY(nccl.Recv(buf + r * seg, (size_t)theirs, ncclFloat32, r, n->comm, stream), "receive");
  }
  NCCL_TRY(nccl.GroupEnd(), "gather");
  return wait_for(n);
}

static esp_status reduce_device(esp_comm *c, float *buf, int64_t count) {
  nccl_impl *n = c->impl;
  if (n->be->sticky != ESP_OK) return n->be->sticky;
  if (!n->comm) return esp_fail(ESP_ERR_DEVICE, "NCCL: the communicator was aborted");
  int64_t most = n->segment * c->size;
  for (int64_t at = 0; at < count; at += most)
    ESP_TRY(reduce_chunk(c, buf + at, count - at < most ? count - at : most));
  return ESP_OK;
}

/* ---- host memory: the communicator underneath ---- */
static esp_comm *under(esp_comm *c) {
  return ((nccl_impl *)c->impl)->host;
}
static esp_status reduce_f32(esp_comm *c, float *buf, int64_t n) {
  return under(c)->ops->all_reduce_f32(under(c), buf, n);
}
static esp_status reduce_f64(esp_comm *c, double *buf, int64_t n) {
  return under(c)->ops->all_reduce_f64(under(c), buf, n);
}
static esp_status gather(esp_comm *c, const void *mine, void *all, size_t bytes_each) {
  return under(c)->ops->all_gather(under(c), mine, all, bytes_each);
}
static esp_status broadcast(esp_comm *c, void *buf, size_t bytes, int root) {
  return under(c)->ops->broadcast(under(c), buf, bytes, root);
}
static esp_status barrier(esp_comm *c) {
  return under(c)->ops->barrier(under(c));
}
static void abort_all(esp_comm *c, int code) {
  nccl_impl *n = c->impl;
  if (n->comm) nccl.CommAbort(n->comm);
  n->comm = NULL;
  n->host->ops->abort(n->host, code);
}
static void destroy(esp_comm *c) {
  nccl_impl *n = c->impl;
  if (n->comm) nccl.CommDestroy(n->comm);
  if (n->work) esp_cuda_free(n->be, n->work);
  free(n);
  free(c);
}

static const esp_comm_ops ops = {.name = "nccl",
                                 .all_reduce_f32 = reduce_f32,
                                 .all_reduce_f64 = reduce_f64,
                                 .all_gather = gather,
                                 .broadcast = broadcast,
                                 .barrier = barrier,
                                 .abort = abort_all,
                                 .destroy = destroy,
                                 .all_reduce_device = reduce_device};

esp_status esp_comm_nccl_create(esp_backend *be, esp_comm *host, int64_t most,
                                esp_status (*agree)(esp_comm *c, esp_status mine), esp_comm **out);
esp_status esp_comm_nccl_create(esp_backend *be, esp_comm *host, int64_t most,
                                esp_status (*agree)(esp_comm *c, esp_status mine), esp_comm **out) {
  *out = NULL;
  esp_status st = ESP_OK;
  ncclUniqueId id;
  ncclConfig_t cfg = NCCL_CONFIG_INITIALIZER;
  esp_comm *c = calloc(1, sizeof *c);
  nccl_impl *n = calloc(1, sizeof *n);
  if (!c || !n) ESP_GOTO(esp_fail(ESP_ERR_MEMORY, "NCCL: out of host memory"));
  *c = (esp_comm){&ops, n, host->rank, host->size};
  n->be = be;
  n->host = host;
  n->segment = esp_comm_device_segment(host->size, most);
  memset(&id, 0, sizeof id);
  esp_status opened = open_library(); /* every rank goes on to the broadcast, or none could */
  if (host->rank == 0 && opened == ESP_OK) st = nccl_error(nccl.GetUniqueId(&id), NULL, "unique id");
  esp_status sent = host->ops->broadcast(host, &id, sizeof id, 0);
  if (opened != ESP_OK) st = opened;
  if (st == ESP_OK) st = sent;
  if (agree(host, st) != ESP_OK) st = st == ESP_OK ? ESP_ERR_DEVICE : st; /* starting needs all of them */
  if (st == ESP_OK) st = nccl_error(nccl.CommInitRankConfig(&n->comm, host->size, id, host->rank, &cfg), NULL, "start");
  if (st != ESP_OK) goto out;
  n->work = esp_cuda_alloc(be, ESP_MEM_WORKSPACE, esp_comm_device_workspace(host->size, most));
  if (!n->work) st = be->sticky;
out:
  if (st == ESP_OK) {
    *out = c;
  } else {
    if (n && n->comm) nccl.CommAbort(n->comm);
    free(n);
    free(c);
  }
  return st;
}
