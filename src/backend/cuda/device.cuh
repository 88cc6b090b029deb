/* device.cuh: what kernels share: the one launch macro, dynamic shared memory, storage types, 16-byte accesses, and
 * ordered reductions over a warp and a block. */
#ifndef ESP_BACKEND_CUDA_DEVICE_CUH
#define ESP_BACKEND_CUDA_DEVICE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>

#include <cstring>
#include <type_traits>

#include "backend/cuda/cuda.h"

/* Opens an NVTX range, launches on the backend's stream, checks the launch. Nothing is launched after a failure. A
 * kernel with commas in its template arguments goes through `auto k = kernel<a, b>;`. */
#ifdef ESP_SIMCUDA
#define ESP_LAUNCH(be, name, kernel, grid, block, smem, ...)                                                           \
  do {                                                                                                                 \
    if ((be)->sticky == ESP_OK)                                                                                        \
      esp_cuda_ok((be), simcuda::launch((kernel), (grid), (block), (smem), esp_cuda_of(be)->stream, __VA_ARGS__),      \
                  (name));                                                                                             \
  } while (0)
#define ESP_DYNAMIC_SMEM(type, var) type *var = static_cast<type *>(simcuda::dynamic_smem())
#else
#define ESP_LAUNCH(be, name, kernel, grid, block, smem, ...)                                                           \
  do {                                                                                                                 \
    if ((be)->sticky == ESP_OK) {                                                                                      \
      nvtxRangePushA(name);                                                                                            \
      kernel<<<(grid), (block), (smem), esp_cuda_of(be)->stream>>>(__VA_ARGS__);                                       \
      esp_cuda_ok((be), cudaGetLastError(), (name));                                                                   \
      nvtxRangePop();                                                                                                  \
    }                                                                                                                  \
  } while (0)
/* One extern array per program: every use names the same memory, whatever its type. */
extern __shared__ __align__(128) unsigned char esp_dynamic_smem[];
#define ESP_DYNAMIC_SMEM(type, var) type *var = reinterpret_cast<type *>(esp_dynamic_smem)
#endif

/* More than 48 KiB of dynamic shared memory has to be asked for once per kernel. */
template <class K> static inline bool esp_allow_smem(esp_backend *be, K kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return true;
  return esp_cuda_ok(be,
                     cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
                     "dynamic shared memory");
}

typedef __nv_bfloat16 bf16;

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(bf16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

/* N values in one 16-byte access (or less): the pointer must be aligned to the size of the whole. */
template <class T, int N> struct alignas(sizeof(T) * N) esp_vec { T v[N]; };
template <class T, int N> __device__ __forceinline__ void load_vec(float (&out)[N], const T *p) {
  esp_vec<T, N> x = *reinterpret_cast<const esp_vec<T, N> *>(p);
#pragma unroll
  for (int i = 0; i < N; i++) out[i] = to_float(x.v[i]);
}
/* 8 and 16 bytes of anything. Stores to device memory go through them and an intrinsic, and pairs of bf16 are converted
 * by one instruction: of two plain stores in a row the compiler made up to eight single ones. */
#ifdef ESP_SIMCUDA
struct __attribute__((may_alias, aligned(8))) esp_words2 {
  unsigned x, y;
};
struct __attribute__((may_alias, aligned(16))) esp_words4 {
  unsigned x, y, z, w;
};
#else
typedef uint2 esp_words2;
typedef uint4 esp_words4;
#endif
template <class W, class V> __device__ __forceinline__ void store_as(void *p, const V &value) {
  W words[sizeof(V) / sizeof(W)];
  memcpy(words, &value, sizeof value);
#pragma unroll
  for (unsigned i = 0; i < sizeof(V) / sizeof(W); i++) __stwb(static_cast<W *>(p) + i, words[i]);
}
template <class V> __device__ __forceinline__ void store_whole(void *p, const V &value) {
  if constexpr (sizeof(V) % 16 == 0)
    store_as<esp_words4>(p, value);
  else if constexpr (sizeof(V) == 8)
    store_as<esp_words2>(p, value);
  else
    *static_cast<V *>(p) = value;
}
template <class T, int N> __device__ __forceinline__ void store_vec(T *p, const float (&in)[N]) {
  if constexpr (sizeof(T) == sizeof(bf16) && N % 2 == 0) {
    static_assert(std::is_same<T, bf16>::value, "fp16 is only read");
    esp_vec<__nv_bfloat162, N / 2> x;
#pragma unroll
    for (int i = 0; i < N / 2; i++) x.v[i] = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
    store_whole(p, x);
  } else {
    esp_vec<T, N> x;
#pragma unroll
    for (int i = 0; i < N; i++) x.v[i] = from_float<T>(in[i]);
    store_whole(p, x);
  }
}

/* All lanes get the sum; the order is fixed, so the bits are. */
template <class T> __device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}
/* All threads get the sum. `part`: one value per warp of shared memory, free for reuse after the next barrier the
 * caller makes; the block is a multiple of 32 threads. */
template <class T> __device__ __forceinline__ T block_sum(T v, T *part) {
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
  __syncthreads();
  T s = 0;
  for (unsigned w = 0; w < blockDim.x >> 5; w++) s += part[w];
  return s;
}

/* Rows of a tensor may be apart by more than their width. */
template <class T> __device__ __forceinline__ T *row_of(T *base, int64_t ld, int64_t row) {
  return base + row * ld;
}
/* Can rows of this view be read N elements at a time? */
static inline bool esp_rows_aligned(const esp_tensor *t, int bytes) {
  int64_t size = static_cast<int64_t>(esp_dtype_size(t->dtype));
  return reinterpret_cast<uintptr_t>(t->data) % bytes == 0 && t->ld * size % bytes == 0 &&
         esp_tensor_cols(t) * size % bytes == 0;
}

#endif
