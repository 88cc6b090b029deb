/* kernels.h: small kernels, each with one fault that can be switched on, and what the host needs to launch them. */
#ifndef SIMCUDA_FAULTS_KERNELS_H
#define SIMCUDA_FAULTS_KERNELS_H

#include "tests/simcuda/include/simcuda.h"

enum Fault {
  CONTROL,
  REMOVED_BARRIER,       /* between writing and reading partial sums */
  REMOVED_BARRIER_LOOP,  /* at the end of a loop that uses shared memory again */
  DIVERGENT_BARRIER,     /* two branches with a barrier each */
  BARRIER_AFTER_RETURN,  /* some threads have left */
  OFF_BY_ONE_STORE,      /* behind an allocation */
  OFF_BY_ONE_READ,       /* the same, reading */
  OFF_BY_ONE_SHARED,     /* behind a static shared array */
  OFF_BY_ONE_DYNAMIC,    /* behind dynamic shared memory */
  WRONG_MASK,            /* names lanes that never arrive */
  MASKS_DIFFER,          /* two halves of a warp, each with its own mask, wait for each other */
  SHUFFLE_OUTSIDE,       /* reads from a lane outside the mask */
  UNINITIALISED_STATIC,  /* one element of static shared memory is read but never written */
  UNINITIALISED_DYNAMIC, /* the same of dynamic shared memory */
  UNINITIALISED_DEVICE,  /* the same of device memory */
  CROSS_BLOCK_RACE,      /* blocks add to one place without atomics */
  REMOVED_SYNCWARP,      /* lanes of a warp pass values through shared memory */
};

#ifdef __cplusplus
extern "C" {
#endif

/* out[b] = sum of the b-th row of in [rows, width], by a block of 128 threads per row. */
cudaError_t launch_row_sum(int fault, float *out, const float *in, int rows, int width, cudaStream_t stream);
/* out[i] = in[i] + add, n elements; the off-by-one faults reach element n. */
cudaError_t launch_add(int fault, float *out, const float *in, float add, int n, cudaStream_t stream);
/* Four rounds through one shared cell; out[k * 64 + t] = k. */
cudaError_t launch_rounds(int fault, float *out, cudaStream_t stream);
/* out[t] = in[63 - t] for 64 threads, through shared memory, dynamic if asked for. */
cudaError_t launch_reversed(int fault, float *out, const float *in, int dynamic, cudaStream_t stream);
/* out[t] = sum over the half of the warp that lane t is in of in[]; 32 threads. */
cudaError_t launch_half_sums(int fault, float *out, const float *in, cudaStream_t stream);
/* Each of 64 blocks of 32 threads counts its threads into *count. */
cudaError_t launch_count(int fault, int *count, cudaStream_t stream);
/* out[t] = in[t ^ 1] for 64 threads, the lanes of a warp passing values through shared memory. */
cudaError_t launch_swap(int fault, float *out, const float *in, cudaStream_t stream);
/* A two-dimensional grid of two-dimensional blocks: out[y * 24 + x] = x + 100 * y for 24 x 10. */
cudaError_t launch_plane(float *out, cudaStream_t stream);
/* Votes and reductions over 32 lanes: out[0..3] = ballot of even lanes, any(lane == 3), all(lane < 31), sum of lanes.
 */
cudaError_t launch_votes(unsigned *out, cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
