/* kernels.cu: valid CUDA apart from the planted faults; compiled for the simulated device only. */
#include "tests/simcuda/faults/kernels.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

static __device__ __forceinline__ float warp_sum(float v) {
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

template <int THREADS> static __global__ void row_sum(int fault, float *out, const float *__restrict__ in, int width) {
  __shared__ float part[THREADS / 32];
  float sum = 0;
  for (int i = threadIdx.x; i < width; i += THREADS) sum += __ldg(in + (int64_t)blockIdx.x * width + i);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  if (fault != REMOVED_BARRIER) __syncthreads();
  float total = 0;
  for (int w = 0; w < THREADS / 32; w++) total += part[w];
  if (threadIdx.x == 0) out[blockIdx.x] = total;
}

static __global__ void add(int fault, float *out, const float *in, float x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  int last = fault == OFF_BY_ONE_STORE ? n : n - 1;
  int shift = fault == OFF_BY_ONE_READ ? 1 : 0;
  if (i <= last) out[i] = (i < n ? in[i + shift] : 0.0f) + x;
}

static __global__ void rounds(int fault, float *out) {
  __shared__ float cell;
  for (int k = 0; k < 4; k++) {
    if (threadIdx.x == 0) cell = (float)k;
    __syncthreads();
    out[k * 64 + threadIdx.x] = cell;
    if (fault != REMOVED_BARRIER_LOOP) __syncthreads();
  }
}

static __device__ __forceinline__ void reverse(int fault, float *out, const float *in, float *kept, int missing) {
  int t = threadIdx.x;
  if (fault == BARRIER_AFTER_RETURN && t == 40) return;
  if (t != missing) kept[t] = in[t];
  if (fault == DIVERGENT_BARRIER) {
    if (t & 1) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else {
    __syncthreads();
  }
  out[t] = kept[63 - t];
}

static __global__ void reversed_static(int fault, float *out, const float *in) {
  __shared__ float kept[64];
  int past = fault == OFF_BY_ONE_SHARED ? 64 : 63;
  if (threadIdx.x == 0) kept[past] = 0;
  __syncthreads();
  reverse(fault, out, in, kept, fault == UNINITIALISED_STATIC ? 17 : -1);
}

static __global__ void reversed_dynamic(int fault, float *out, const float *in) {
  float *kept = static_cast<float *>(simcuda::dynamic_smem());
  if (fault == OFF_BY_ONE_DYNAMIC && threadIdx.x == 0) kept[64] = 0;
  reverse(fault, out, in, kept, fault == UNINITIALISED_DYNAMIC ? 17 : -1);
}

static __global__ void half_sums(int fault, float *out, const float *in) {
  int lane = threadIdx.x;
  unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  float v = in[lane];
  if (fault == WRONG_MASK && lane < 16) half = 0xffffffffu;
  if (fault == WRONG_MASK && lane >= 16) return;
  if (fault == MASKS_DIFFER) half = lane < 16 ? 0xffffffffu : 0xffff0001u;
  for (int o = 8; o > 0; o >>= 1) v += __shfl_xor_sync(half, v, fault == SHUFFLE_OUTSIDE ? o * 2 : o);
  out[lane] = v;
}

static __global__ void count(int fault, int *total) {
  __shared__ int mine;
  if (threadIdx.x == 0) mine = 0;
  __syncthreads();
  atomicAdd(&mine, 1);
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (fault == CROSS_BLOCK_RACE) {
    *total = blockIdx.x < 63 ? mine : mine + 1; /* the last to write wins */
  } else {
    atomicAdd(total, mine);
  }
}

static __global__ void swap(int fault, float *out, const float *in) {
  __shared__ float kept[64];
  int t = threadIdx.x;
  kept[t] = in[t];
  if (fault != REMOVED_SYNCWARP) __syncwarp();
  out[t] = kept[t ^ 1];
}

static __global__ void plane(float *out) {
  int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
  if (x >= 24 || y >= 10) return;
  out[y * 24 + x] = __bfloat162float(__float2bfloat16_rn((float)x)) + 100.0f * (float)y;
}

static __global__ void votes(unsigned *out) {
  int lane = threadIdx.x;
  unsigned even = __ballot_sync(0xffffffffu, lane % 2 == 0);
  int any = __any_sync(0xffffffffu, lane == 3), all = __all_sync(0xffffffffu, lane < 31);
  unsigned sum = __reduce_add_sync(0xffffffffu, (unsigned)lane);
  int up = __shfl_up_sync(0xffffffffu, lane, 1), down = __shfl_down_sync(0xffffffffu, lane, 1, 16);
  int least = __reduce_min_sync(0xffffffffu, lane - 20), odd = __syncthreads_count(lane & 1);
  if (lane == 15) out[4] = (unsigned)(up * 100 + down); /* 14, and 15: the part of 16 lanes ends here */
  if (lane != 0) return;
  out[0] = even;
  out[1] = (unsigned)any;
  out[2] = (unsigned)all;
  out[3] = sum;
  out[5] = (unsigned)(odd - least);
}

cudaError_t launch_row_sum(int fault, float *out, const float *in, int rows, int width, cudaStream_t stream) {
  return simcuda::launch(row_sum<128>, rows, 128, 0, stream, fault, out, in, width);
}
cudaError_t launch_add(int fault, float *out, const float *in, float x, int n, cudaStream_t stream) {
  return simcuda::launch(add, n / 64 + 1, 64, 0, stream, fault, out, in, x, n);
}
cudaError_t launch_rounds(int fault, float *out, cudaStream_t stream) {
  return simcuda::launch(rounds, 1, 64, 0, stream, fault, out);
}
cudaError_t launch_reversed(int fault, float *out, const float *in, int dynamic, cudaStream_t stream) {
  if (dynamic) return simcuda::launch(reversed_dynamic, 1, 64, 64 * sizeof(float), stream, fault, out, in);
  return simcuda::launch(reversed_static, 1, 64, 0, stream, fault, out, in);
}
cudaError_t launch_half_sums(int fault, float *out, const float *in, cudaStream_t stream) {
  return simcuda::launch(half_sums, 1, 32, 0, stream, fault, out, in);
}
cudaError_t launch_count(int fault, int *total, cudaStream_t stream) {
  return simcuda::launch(count, 64, 32, 0, stream, fault, total);
}
cudaError_t launch_swap(int fault, float *out, const float *in, cudaStream_t stream) {
  return simcuda::launch(swap, 1, 64, 0, stream, fault, out, in);
}
cudaError_t launch_plane(float *out, cudaStream_t stream) {
  return simcuda::launch(plane, dim3(3, 3), dim3(8, 4), 0, stream, out);
}
cudaError_t launch_votes(unsigned *out, cudaStream_t stream) {
  return simcuda::launch(votes, 1, 32, 0, stream, out);
}
