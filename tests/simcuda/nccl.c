/* nccl.c: NCCL between processes of one machine. Each ordered pair of ranks has a channel in POSIX shared memory (one
 * slot, two counters); every collective is made of sends and receives over them, all of a group progressing at once, so
 * that no order of calls can block. Sums are taken in the order of the ranks.
 *
 * A rank whose process is gone, or a wait beyond SIMNCCL_TIMEOUT seconds (default 60), is ncclRemoteError for the
 * others: from ncclCommGetAsyncError, and from every later call. A message of another size than the receiver expects
 * ends the program, where the real library would hang or overwrite. */
#include <nccl.h>

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "num.h"
#include "simcuda.h"

enum { MAX_RANKS = 16, SLOT_BYTES = 16 << 10, MAX_OPS = 64, MAGIC = 0x4e43434c };

typedef struct channel {
  _Atomic uint64_t written, read; /* chunks */
  uint64_t message;               /* bytes of the message that the chunk belongs to */
  char slot[SLOT_BYTES];
} channel;

typedef struct shared {
  _Atomic int joined, aborted;
  _Atomic int pid[MAX_RANKS];
  channel channels[]; /* [from][to] */
} shared;

struct ncclComm {
  uint32_t magic;
  int rank, size, device;
  shared *mem;
  size_t bytes;
  _Atomic int error; /* ncclResult_t */
  char text[128];
  struct ncclComm *next; /* destroyed ones: work recorded earlier still names them */
};

typedef enum { SEND, RECV, BROADCAST, ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER } op_kind;
typedef struct op {
  op_kind kind;
  const void *send;
  void *recv;
  size_t count;
  ncclDataType_t type;
  ncclRedOp_t how;
  int peer; /* or root */
} op;

typedef struct job { /* the operations of one group, on one communicator and stream */
  ncclComm_t comm;
  int n;
  op ops[MAX_OPS];
} job;

static _Thread_local int group_depth;
static _Thread_local cudaStream_t group_stream;
static _Thread_local job group;
static _Thread_local ncclResult_t group_result;

/* ---- small things ---- */
ncclResult_t ncclGetVersion(int *version) {
  if (!version) return ncclInvalidArgument;
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result) {
  switch (result) {
  case ncclSuccess:
    return "no error";
  case ncclUnhandledCudaError:
    return "unhandled cuda error";
  case ncclSystemError:
    return "unhandled system error";
  case ncclInternalError:
    return "internal error";
  case ncclInvalidArgument:
    return "invalid argument";
  case ncclInvalidUsage:
    return "invalid usage";
  case ncclRemoteError:
    return "remote process exited or there was a network error";
  case ncclInProgress:
    return "NCCL operation in progress";
  default:
    return "unknown result code";
  }
}

static bool is_comm(ncclComm_t c) {
  return c && c->magic == MAGIC;
}

const char *ncclGetLastError(ncclComm_t comm) {
  return is_comm(comm) ? comm->text : "";
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static double patience(void) {
  const char *s = getenv("SIMNCCL_TIMEOUT");
  return s ? atof(s) : 60;
}

static ncclResult_t fail(ncclComm_t c, ncclResult_t result, const char *text) {
  c->error = (int)result;
  snprintf(c->text, sizeof c->text, "%s", text);
  return result;
}

/* A little sleep; false when there is nothing left to wait for. */
static bool keep_waiting(ncclComm_t c, double deadline) {
  if (c->mem->aborted) return fail(c, ncclRemoteError, "another rank aborted"), false;
  for (int r = 0; r < c->size; r++) {
    int pid = c->mem->pid[r];
    if (pid && kill(pid, 0) && errno == ESRCH) return fail(c, ncclRemoteError, "the process of a rank is gone"), false;
  }
  if (now() > deadline) return fail(c, ncclRemoteError, "a rank did not come in time"), false;
  struct timespec pause = {0, 50000};
  nanosleep(&pause, NULL);
  return true;
}

/* ---- communicators ---- */
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
  if (!id) return ncclInvalidArgument;
  memset(id, 0, sizeof *id);
  return getrandom(id->internal, 16, 0) == 16 ? ncclSuccess : ncclSystemError;
}

static void name_of(const ncclUniqueId *id, char name[48]) {
  int at = snprintf(name, 48, "/simnccl-");
  for (int i = 0; i < 16; i++) at += snprintf(name + at, (size_t)(48 - at), "%02x", (unsigned char)id->internal[i]);
}

static ncclResult_t join(ncclComm_t c, const ncclUniqueId *id) {
  char name[48];
  name_of(id, name);
  c->bytes = sizeof(shared) + (size_t)(c->size * c->size) * sizeof(channel);
  int fd = shm_open(name, O_RDWR | O_CREAT, 0600);
  if (fd < 0) return ncclSystemError;
  void *p =
      ftruncate(fd, (off_t)c->bytes) ? MAP_FAILED : mmap(NULL, c->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (p == MAP_FAILED) return ncclSystemError;
  c->mem = p;
  if (c->mem->pid[c->rank]) return fail(c, ncclInvalidUsage, "two processes with one rank");
  c->mem->pid[c->rank] = getpid();
  c->mem->joined++;
  double deadline = now() + patience();
  while (c->mem->joined < c->size)
    if (!keep_waiting(c, deadline)) break;
  shm_unlink(name); /* everybody has it, or nobody will */
  return (ncclResult_t)c->error;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int n, ncclUniqueId id, int rank, ncclConfig_t *config) {
  static const char none[16];
  ncclConfig_t plain = NCCL_CONFIG_INITIALIZER;
  if (!comm || n < 1 || n > MAX_RANKS || rank < 0 || rank >= n) return ncclInvalidArgument;
  if (config && (config->magic != plain.magic || config->size > sizeof *config)) return ncclInvalidArgument;
  if (!memcmp(id.internal, none, sizeof none)) return ncclInvalidArgument;
  struct ncclComm *c = calloc(1, sizeof *c);
  if (!c) return ncclSystemError;
  c->rank = rank;
  c->size = n;
  ncclResult_t r = cudaGetDevice(&c->device) == cudaSuccess ? join(c, &id) : ncclUnhandledCudaError;
  if (r == ncclSuccess) {
    c->magic = MAGIC;
    *comm = c;
  } else {
    if (c->mem) munmap(c->mem, c->bytes);
    free(c);
  }
  return r;
}

ncclResult_t ncclCommInitRank(ncclComm_t *comm, int n, ncclUniqueId id, int rank) {
  return ncclCommInitRankConfig(comm, n, id, rank, NULL);
}

static struct ncclComm *destroyed;

static ncclResult_t leave(ncclComm_t c, bool abort) {
  if (!is_comm(c)) return ncclInvalidArgument;
  if (abort) c->mem->aborted = 1;
  c->mem->pid[c->rank] = 0; /* gone by its own will */
  munmap(c->mem, c->bytes);
  c->mem = NULL;
  c->magic = 0;
  c->next = destroyed;
  destroyed = c;
  return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  return leave(comm, false);
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  return leave(comm, true);
}
ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  return is_comm(comm) ? (ncclResult_t)comm->error : ncclInvalidArgument;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) {
  if (!is_comm(comm) || !error) return ncclInvalidArgument;
  *error = (ncclResult_t)comm->error;
  return ncclSuccess;
}
ncclResult_t ncclCommCount(const ncclComm_t comm, int *count) {
  if (!is_comm(comm) || !count) return ncclInvalidArgument;
  *count = comm->size;
  return ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank) {
  if (!is_comm(comm) || !rank) return ncclInvalidArgument;
  *rank = comm->rank;
  return ncclSuccess;
}
ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int *device) {
  if (!is_comm(comm) || !device) return ncclInvalidArgument;
  *device = comm->device;
  return ncclSuccess;
}

/* ---- moving bytes ---- */
typedef struct transfer {
  bool sends;
  int peer;
  char *at;
  size_t bytes, done;
  bool begun; /* an empty message is one chunk too */
} transfer;

typedef struct flight {
  ncclComm_t comm;
  transfer *t;
  int n, room;
  void *temporary[MAX_OPS]; /* of reductions: every rank's copy */
} flight;

static void add(flight *f, bool sends, int peer, const void *at, size_t bytes) {
  if (f->n == f->room) {
    f->room = f->room ? 2 * f->room : 64;
    f->t = realloc(f->t, (size_t)f->room * sizeof *f->t);
    if (!f->t) simcuda_die("nccl: no memory on the host");
  }
  f->t[f->n++] = (transfer){sends, peer, (char *)at, bytes, 0, false};
}

static bool finished(const transfer *t) {
  return t->begun && t->done == t->bytes;
}

/* One chunk at most; true when something moved. */
static bool push(ncclComm_t c, transfer *t) {
  channel *ch = &c->mem->channels[t->sends ? c->rank * c->size + t->peer : t->peer * c->size + c->rank];
  uint64_t written = ch->written, read = ch->read;
  if (t->sends ? written != read : written == read) return false;
  size_t n = t->bytes - t->done < SLOT_BYTES ? t->bytes - t->done : SLOT_BYTES;
  if (t->sends) {
    memcpy(ch->slot, t->at + t->done, n);
    ch->message = t->bytes;
    ch->written = written + 1;
  } else {
    if (ch->message != t->bytes)
      simcuda_die("nccl: rank %d expects %zu bytes of rank %d, which sends %llu", c->rank, t->bytes, t->peer,
                  (unsigned long long)ch->message);
    memcpy(t->at + t->done, ch->slot, n);
    ch->read = read + 1;
  }
  t->done += n;
  t->begun = true;
  return true;
}

/* Transfers of one direction and peer go in order; all others side by side. */
static void fly(flight *f) {
  double deadline = now() + patience();
  for (;;) {
    bool moved = false, left = false, busy[2][MAX_RANKS] = {{false}};
    for (int i = 0; i < f->n; i++) {
      transfer *t = &f->t[i];
      if (finished(t) || busy[t->sends][t->peer]) continue;
      left = busy[t->sends][t->peer] = true;
      if (push(f->comm, t)) moved = true;
    }
    if (!left) return;
    if (moved)
      deadline = now() + patience();
    else if (!keep_waiting(f->comm, deadline))
      return;
  }
}

/* ---- arithmetic ---- */
static size_t type_bytes(ncclDataType_t type) {
  switch (type) {
  case ncclInt8:
  case ncclUint8:
    return 1;
  case ncclFloat16:
  case ncclBfloat16:
    return 2;
  case ncclInt32:
  case ncclUint32:
  case ncclFloat32:
    return 4;
  case ncclInt64:
  case ncclUint64:
  case ncclFloat64:
    return 8;
  default:
    return 0;
  }
}

/* out = from[0] (+) from[1] (+) ..., in that order. */
#define REDUCE(T, WIDE, GET, PUT)                                                                                      \
  do {                                                                                                                 \
    for (size_t i = 0; i < n; i++) {                                                                                   \
      const T *v = (const T *)from + i;                                                                                \
      WIDE s = GET(v[0]);                                                                                              \
      for (int r = 1; r < ranks; r++) {                                                                                \
        WIDE x = GET(v[(size_t)r * n]);                                                                                \
        s = how == ncclProd ? s * x : how == ncclMax ? (x > s ? x : s) : how == ncclMin ? (x < s ? x : s) : s + x;     \
      }                                                                                                                \
      if (how == ncclAvg) s = s / (WIDE)ranks;                                                                         \
      ((T *)out)[i] = PUT(s);                                                                                          \
    }                                                                                                                  \
  } while (0)

static void reduce(void *out, const void *from, size_t n, int ranks, ncclDataType_t type, ncclRedOp_t how) {
  switch (type) {
  case ncclFloat32:
    REDUCE(float, float, (float), (float));
    break;
  case ncclFloat64:
    REDUCE(double, double, (double), (double));
    break;
  case ncclBfloat16:
    REDUCE(uint16_t, float, simcuda_bf16_f32, simcuda_f32_bf16);
    break;
  case ncclFloat16:
    REDUCE(uint16_t, float, simcuda_f16_f32, simcuda_f32_f16);
    break;
  case ncclInt8:
    REDUCE(int8_t, int64_t, (int64_t), (int8_t));
    break;
  case ncclUint8:
    REDUCE(uint8_t, int64_t, (int64_t), (uint8_t));
    break;
  case ncclInt32:
    REDUCE(int32_t, int64_t, (int64_t), (int32_t));
    break;
  case ncclUint32:
    REDUCE(uint32_t, int64_t, (int64_t), (uint32_t));
    break;
  case ncclInt64:
    REDUCE(int64_t, int64_t, (int64_t), (int64_t));
    break;
  default:
    REDUCE(uint64_t, uint64_t, (uint64_t), (uint64_t));
    break;
  }
}

/* ---- a group on the stream ---- */
static void need(const op *o, const void *p, size_t bytes) {
  if (!simcuda_is_device(p, bytes))
    simcuda_die("nccl: operation %d: %p, %zu bytes, is not device memory", (int)o->kind, p, bytes);
}

static void expand(flight *f, const op *o, int index) {
  ncclComm_t c = f->comm;
  size_t bytes = o->count * type_bytes(o->type), every = (size_t)c->size * bytes;
  bool reads = o->kind != RECV && !(o->kind == BROADCAST && o->peer != c->rank);
  if (reads) need(o, o->send, o->kind == REDUCE_SCATTER ? every : bytes);
  if (o->kind != SEND) need(o, o->recv, o->kind == ALL_GATHER ? every : bytes);
  char *to = o->recv;
  if (o->kind == ALL_REDUCE || o->kind == REDUCE_SCATTER) {
    to = f->temporary[index] = malloc(every + 1);
    if (!to) simcuda_die("nccl: no memory on the host");
  }
  if (o->kind == SEND) add(f, true, o->peer, o->send, bytes);
  if (o->kind == RECV) add(f, false, o->peer, o->recv, bytes);
  if (o->kind == BROADCAST) add(f, false, o->peer, o->recv, bytes);
  for (int r = 0; r < c->size && o->kind > RECV; r++) {
    if (o->kind == BROADCAST) {
      if (o->peer == c->rank) add(f, true, r, o->send, bytes);
      continue;
    }
    add(f, true, r, (const char *)o->send + (o->kind == REDUCE_SCATTER ? (size_t)r * bytes : 0), bytes);
    add(f, false, r, to + (size_t)r * bytes, bytes);
  }
}

static void run(void *arg) {
  const job *j = arg;
  if (!is_comm(j->comm)) simcuda_die("nccl: a communicator was destroyed before its work ran");
  if (j->comm->error) return;
  flight f = {.comm = j->comm};
  for (int i = 0; i < j->n; i++) expand(&f, &j->ops[i], i);
  fly(&f);
  for (int i = 0; i < j->n; i++) {
    const op *o = &j->ops[i];
    if (!f.temporary[i]) continue;
    if (!j->comm->error) reduce(o->recv, f.temporary[i], o->count, j->comm->size, o->type, o->how);
    free(f.temporary[i]);
  }
  free(f.t);
}

/* Runs inside the launch where the stream is idle: what went wrong there is told at once. */
static ncclResult_t launch(const job *j, cudaStream_t stream) {
  size_t bytes = offsetof(job, ops) + (size_t)j->n * sizeof *j->ops;
  if (simcuda_enqueue(stream, run, j, bytes) != cudaSuccess) return ncclUnhandledCudaError;
  return (ncclResult_t)j->comm->error;
}

ncclResult_t ncclGroupStart(void) {
  if (!group_depth++) {
    group.n = 0;
    group.comm = NULL;
    group_result = ncclSuccess;
  }
  return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void) {
  if (!group_depth) return ncclInvalidUsage;
  if (--group_depth || !group.n) return group_result;
  return group_result == ncclSuccess ? launch(&group, group_stream) : group_result;
}

static ncclResult_t submit(ncclComm_t comm, op o, cudaStream_t stream) {
  ncclResult_t r = ncclSuccess;
  if (!is_comm(comm) || !type_bytes(o.type) || o.peer < 0 || o.peer >= comm->size) r = ncclInvalidArgument;
  if (r == ncclSuccess && (o.how < ncclSum || o.how > ncclAvg)) r = ncclInvalidArgument;
  if (r == ncclSuccess && comm->error) r = (ncclResult_t)comm->error;
  if (r == ncclSuccess && group_depth) {
    bool other = group.n && (group.comm != comm || group_stream != stream);
    if (other || group.n == MAX_OPS) r = ncclInvalidUsage;
  }
  if (r != ncclSuccess || !group_depth) {
    if (group_depth) group_result = r;
    if (r != ncclSuccess) return r;
    return launch(&(job){comm, 1, {o}}, stream);
  }
  group.comm = comm;
  group_stream = stream;
  group.ops[group.n++] = o;
  return ncclSuccess;
}

ncclResult_t ncclSend(const void *send, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  return submit(comm, (op){SEND, send, NULL, count, type, ncclSum, peer}, stream);
}
ncclResult_t ncclRecv(void *recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  return submit(comm, (op){RECV, NULL, recv, count, type, ncclSum, peer}, stream);
}
ncclResult_t ncclBroadcast(const void *send, void *recv, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
  return submit(comm, (op){BROADCAST, send, recv, count, type, ncclSum, root}, stream);
}
ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  return submit(comm, (op){ALL_GATHER, send, recv, count, type, ncclSum, 0}, stream);
}
ncclResult_t ncclAllReduce(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t how,
                           ncclComm_t comm, cudaStream_t stream) {
  return submit(comm, (op){ALL_REDUCE, send, recv, count, type, how, 0}, stream);
}
ncclResult_t ncclReduceScatter(const void *send, void *recv, size_t count, ncclDataType_t type, ncclRedOp_t how,
                               ncclComm_t comm, cudaStream_t stream) {
  return submit(comm, (op){REDUCE_SCATTER, send, recv, count, type, how, 0}, stream);
}
