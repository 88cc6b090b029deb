/* view.cuh: tensors as row kernels see them, and how a kernel is cut over rows and columns.
 *
 * Every kernel over rows is a template over <T, N>: T the storage type of all its tensors and N the elements of one
 * access. T = void reads the type at run time, through a branch that is the same for all threads. Four instances serve
 * every call: bf16 by 8 and fp32 by 4 (16 bytes), mixed types by 8, and single elements for odd widths. */
#ifndef ESP_BACKEND_CUDA_VIEW_CUH
#define ESP_BACKEND_CUDA_VIEW_CUH

#include <initializer_list>

#include "backend/cuda/device.cuh"

template <class T> struct esp_view {
  T *data;
  int64_t ld;

  template <int N> __device__ __forceinline__ void load(float (&v)[N], int64_t row, int64_t col) const {
    load_vec<T, N>(v, data + row * ld + col);
  }
  template <int N> __device__ __forceinline__ void store(int64_t row, int64_t col, const float (&v)[N]) const {
    store_vec<T, N>(data + row * ld + col, v);
  }
};

template <> struct esp_view<void> {
  void *data;
  int64_t ld;
  esp_dtype dtype;

  template <int N> __device__ __forceinline__ void load(float (&v)[N], int64_t row, int64_t col) const {
    int64_t i = row * ld + col;
    if (dtype == ESP_BF16)
      load_vec<bf16, N>(v, static_cast<const bf16 *>(data) + i);
    else if (dtype == ESP_F32)
      load_vec<float, N>(v, static_cast<const float *>(data) + i);
    else /* tables of fp16 files */
      load_vec<__half, N>(v, static_cast<const __half *>(data) + i);
  }
  template <int N> __device__ __forceinline__ void store(int64_t row, int64_t col, const float (&v)[N]) const {
    int64_t i = row * ld + col;
    if (dtype == ESP_BF16)
      store_vec<bf16, N>(static_cast<bf16 *>(data) + i, v);
    else
      store_vec<float, N>(static_cast<float *>(data) + i, v);
  }
};

template <class T> static inline esp_view<T> esp_view_of(const esp_tensor &t) {
  return {static_cast<T *>(t.data), t.ld};
}
template <> inline esp_view<void> esp_view_of<void>(const esp_tensor &t) {
  return {t.data, t.ld, t.dtype};
}

enum esp_access { ESP_BY_BF16X8, ESP_BY_F32X4, ESP_BY_MIXED8, ESP_BY_ONE };

/* The widest access that all tensors of a call allow; absent ones (data NULL) do not count. */
static inline esp_access esp_access_of(std::initializer_list<const esp_tensor *> tensors) {
  bool bf16x8 = true, f32x4 = true, mixed = true;
  for (const esp_tensor *t : tensors) {
    if (!t->data) continue;
    bf16x8 = bf16x8 && t->dtype == ESP_BF16 && esp_rows_aligned(t, 16);
    f32x4 = f32x4 && t->dtype == ESP_F32 && esp_rows_aligned(t, 16);
    mixed = mixed && esp_rows_aligned(t, 8 * static_cast<int>(esp_dtype_size(t->dtype)));
  }
  return bf16x8 ? ESP_BY_BF16X8 : f32x4 ? ESP_BY_F32X4 : mixed ? ESP_BY_MIXED8 : ESP_BY_ONE;
}

/* Calls launch(instance) with the types of the access: `typename decltype(i)::type` and `decltype(i)::n`. */
template <class T, int N> struct esp_instance {
  using type = T;
  static constexpr int n = N;
};
template <class F> static inline void esp_by_access(esp_access access, F launch) {
  switch (access) {
  case ESP_BY_BF16X8:
    return launch(esp_instance<bf16, 8>());
  case ESP_BY_F32X4:
    return launch(esp_instance<float, 4>());
  case ESP_BY_MIXED8:
    return launch(esp_instance<void, 8>());
  default:
    return launch(esp_instance<void, 1>());
  }
}

/* Blocks of 256 threads over [rows, cols], N columns per thread: rows along x of the grid, which has no small limit;
 * columns along y, where each thread strides on when there are more than 65535 blocks of them. */
struct esp_cover {
  dim3 grid, block;
};
static inline esp_cover esp_cover_of(int64_t rows, int64_t cols, int n) {
  int64_t vecs = (cols + n - 1) / n, tx = 1;
  while (tx < vecs && tx < 256) tx *= 2;
  int64_t ty = 256 / tx, along = (vecs + tx - 1) / tx;
  if (along > 65535) along = 65535;
  return {dim3(static_cast<unsigned>((rows + ty - 1) / ty), static_cast<unsigned>(along)),
          dim3(static_cast<unsigned>(tx), static_cast<unsigned>(ty))};
}
__device__ __forceinline__ int64_t esp_cover_row() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}
template <int N> __device__ __forceinline__ int64_t esp_cover_col() {
  return (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
}
template <int N> __device__ __forceinline__ int64_t esp_cover_step() {
  return static_cast<int64_t>(gridDim.y) * blockDim.x * N;
}

/* Nothing to do after a failure or for an empty tensor. */
static inline bool esp_idle(const esp_backend *be, const esp_tensor &t) {
  return be->sticky != ESP_OK || esp_tensor_numel(&t) == 0;
}

#endif
