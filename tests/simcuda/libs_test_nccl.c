/* libs_test_nccl.c: the NCCL stand-in between forked processes: every collective against sums taken here, and a rank
 * that dies. Seen to catch: sums taken from the last rank down, and the liveness of ranks not looked at. */
#include "libs_test.h"

#include <nccl.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { RANKS = 3, N = 9001 }; /* more than one chunk, and no multiple of anything */

#define CHILD_OK(call)                                                                                                 \
  if (call) return __LINE__ % 200 + 1 /* the line, as an exit status */

static float value(int rank, int i) {
  return (float)((rank + 1) * (i % 17)) * 0.37f + (rank == 1 ? 1e6f : 0) - (rank == 2 ? 3.3e7f : 0);
}

static int collectives(ncclComm_t comm, int rank) {
  float *host = malloc(RANKS * N * sizeof *host), *got = malloc(RANKS * N * sizeof *got);
  float *a, *b;
  CHILD_OK(!host || !got);
  CHILD_OK(cudaMalloc((void **)&a, RANKS * N * 4));
  CHILD_OK(cudaMalloc((void **)&b, RANKS * N * 4));
  for (int i = 0; i < RANKS * N; i++) host[i] = value(rank, i);
  CHILD_OK(cudaMemcpy(a, host, RANKS * N * 4, cudaMemcpyHostToDevice));

  CHILD_OK(ncclAllReduce(a, b, N, ncclFloat32, ncclSum, comm, NULL));
  CHILD_OK(cudaMemcpy(got, b, N * 4, cudaMemcpyDeviceToHost));
  for (int i = 0; i < N; i++) CHILD_OK(got[i] != (value(0, i) + value(1, i)) + value(2, i)); /* to the bit */

  CHILD_OK(ncclReduceScatter(a, b, N, ncclFloat32, ncclMax, comm, NULL));
  CHILD_OK(cudaMemcpy(got, b, N * 4, cudaMemcpyDeviceToHost));
  for (int i = 0; i < N; i++) CHILD_OK(got[i] != value(1, rank * N + i));

  CHILD_OK(ncclAllGather(a, b, N, ncclFloat32, comm, NULL));
  CHILD_OK(cudaMemcpy(got, b, RANKS * N * 4, cudaMemcpyDeviceToHost));
  for (int i = 0; i < RANKS * N; i++) CHILD_OK(got[i] != value(i / N, i % N));

  CHILD_OK(ncclBroadcast(a, b, N, ncclUint8, 1, comm, NULL));
  CHILD_OK(cudaMemcpy(got, b, N, cudaMemcpyDeviceToHost));
  for (int i = 0; i < RANKS * N; i++) host[i] = value(1, i);
  CHILD_OK(memcmp(got, host, N));

  /* everybody to everybody, itself included; the sends come first, which would block without the group */
  CHILD_OK(ncclGroupStart());
  for (int r = 0; r < RANKS; r++) CHILD_OK(ncclSend(a + r * N, N, ncclFloat32, r, comm, NULL));
  for (int r = 0; r < RANKS; r++) CHILD_OK(ncclRecv(b + r * N, N, ncclFloat32, r, comm, NULL));
  CHILD_OK(ncclGroupEnd());
  CHILD_OK(cudaMemcpy(got, b, RANKS * N * 4, cudaMemcpyDeviceToHost));
  for (int i = 0; i < RANKS * N; i++) CHILD_OK(got[i] != value(i / N, rank * N + i % N));

  CHILD_OK(ncclAllReduce(a, b, N, (ncclDataType_t)77, ncclSum, comm, NULL) != ncclInvalidArgument);
  CHILD_OK(ncclSend(a, N, ncclFloat32, RANKS, comm, NULL) != ncclInvalidArgument);
  CHILD_OK(cudaFree(a));
  CHILD_OK(cudaFree(b));
  free(host);
  free(got);
  return 0;
}

static int bereft(ncclComm_t comm, int rank) {
  ncclResult_t error = ncclSuccess;
  float *a;
  CHILD_OK(cudaMalloc((void **)&a, N * 4));
  if (rank == 2) _exit(0); /* without a word */
  ncclAllReduce(a, a, N, ncclFloat32, ncclSum, comm, NULL);
  CHILD_OK(ncclCommGetAsyncError(comm, &error));
  CHILD_OK(error != ncclRemoteError);
  CHILD_OK(!*ncclGetLastError(comm));
  CHILD_OK(ncclAllReduce(a, a, N, ncclFloat32, ncclSum, comm, NULL) != ncclRemoteError);
  CHILD_OK(ncclCommAbort(comm));
  return 0;
}

static void with_ranks(int (*body)(ncclComm_t, int), bool destroy) {
  ncclUniqueId id;
  pid_t child[RANKS];
  assert_int_equal(ncclGetUniqueId(&id), ncclSuccess);
  fflush(NULL);
  for (int r = 0; r < RANKS; r++) {
    child[r] = fork();
    assert_true(child[r] >= 0);
    if (child[r]) continue;
    ncclComm_t comm;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    setenv("SIMNCCL_TIMEOUT", "20", 1);
    int rc = ncclCommInitRankConfig(&comm, RANKS, id, r, &config) ? 255 : body(comm, r);
    if (destroy && !rc) rc = (int)ncclCommDestroy(comm);
    _exit(rc);
  }
  int wrong = 0;
  for (int r = 0; r < RANKS; r++) { /* whoever ends first is reaped first: a zombie still has its number */
    int status;
    pid_t who = wait(&status);
    if (!WIFEXITED(status) || WEXITSTATUS(status)) {
      print_error("process %d: status %d, line %d modulo 200\n", (int)who, status, WEXITSTATUS(status) - 1);
      wrong++;
    }
  }
  assert_int_equal(wrong, 0);
}

void libs_nccl_collectives(void **state) {
  (void)state;
  with_ranks(collectives, true);
}

void libs_nccl_dead_rank(void **state) {
  (void)state;
  struct timespec from, to;
  clock_gettime(CLOCK_MONOTONIC, &from);
  with_ranks(bereft, false);
  clock_gettime(CLOCK_MONOTONIC, &to);
  assert_true(to.tv_sec - from.tv_sec < 15); /* found by its absence, not by the clock */
}
