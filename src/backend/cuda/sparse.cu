/* sparse.cu: products with a sparse matrix and the gradient of its values. Rows of x are gathered badly one token at a
 * time: a line of 128 bytes for one value. So tokens are taken in chunks that are transposed first, [columns, chunk];
 * an entry then meets 128 tokens in whole lines, and the chunk comes out of the second-level cache. Expected limit: its
 * bandwidth, entries * tokens * the size of an element. Every sum is one thread's or one warp's in the order of the
 * entries and of the tokens. */
#include "backend/cuda/need_kinds.h"
#include "backend/cuda/view.cuh"

namespace {

/* out [cols, chunk]: tokens [first, first + chunk) of x, zeros past the last one. Tiles of 32 x 32. */
template <class T>
__global__ void __launch_bounds__(256)
    sparse_transpose_kernel(T *out, esp_view<void> x, int64_t first, int64_t tokens, int64_t cols, int64_t chunk) {
  __shared__ float tile[32][33];
  const int64_t t0 = static_cast<int64_t>(blockIdx.y) * 32, c0 = static_cast<int64_t>(blockIdx.x) * 32;
  for (unsigned i = threadIdx.y; i < 32; i += 8) {
    int64_t t = first + t0 + i, c = c0 + threadIdx.x;
    float v[1] = {0.0f};
    if (t < tokens && c < cols) x.load(v, t, c);
    tile[i][threadIdx.x] = v[0];
  }
  __syncthreads();
  for (unsigned i = threadIdx.y; i < 32; i += 8)
    if (c0 + i < cols) out[(c0 + i) * chunk + t0 + threadIdx.x] = from_float<T>(tile[threadIdx.x][i]);
}

template <class T> void transpose_chunk(esp_backend *be, T *out, const esp_tensor &x, int64_t first, int64_t chunk) {
  int64_t cols = esp_tensor_cols(&x);
  dim3 grid(static_cast<unsigned>((cols + 31) / 32), static_cast<unsigned>(chunk / 32));
  auto kernel = sparse_transpose_kernel<T>;
  ESP_LAUNCH(be, "sparse transpose", kernel, grid, dim3(32, 8), 0, out, esp_view_of<void>(x), first,
             esp_tensor_rows(&x), cols, chunk);
}

/* 32 rows of the matrix against 128 tokens: each of 8 warps sums 4 rows, 4 tokens per lane; the tile of results turns
 * round in shared memory. */
template <class T>
__global__ void __launch_bounds__(256)
    sparse_matmul_kernel(esp_view<void> y, const T *xt, esp_csr s, int64_t first, int64_t tokens, int64_t chunk) {
  __shared__ float tile[32][ESP_SPARSE_TILE + 1];
  const int warp = static_cast<int>(threadIdx.x >> 5), lane = static_cast<int>(threadIdx.x & 31);
  const int64_t r0 = static_cast<int64_t>(blockIdx.x) * 32, t0 = static_cast<int64_t>(blockIdx.y) * ESP_SPARSE_TILE;
  for (int i = warp; i < 32; i += 8) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    int64_t r = r0 + i;
    if (r < s.rows)
      for (int32_t e = s.start[r]; e < s.start[r + 1]; e++) {
        float v[4], w = s.values[s.order ? s.order[e] : e];
        load_vec<T, 4>(v, xt + static_cast<int64_t>(s.index[e]) * chunk + t0 + lane * 4);
#pragma unroll
        for (int k = 0; k < 4; k++) sum[k] += w * v[k];
      }
#pragma unroll
    for (int k = 0; k < 4; k++) tile[i][lane * 4 + k] = sum[k];
  }
  __syncthreads();
  for (int t = warp; t < ESP_SPARSE_TILE; t += 8) {
    int64_t row = first + t0 + t, r = r0 + lane;
    if (row >= tokens || r >= s.rows) continue;
    float old[1];
    y.load(old, row, r);
    old[0] += tile[lane][t];
    y.store(row, r, old);
  }
}

/* One warp per row of the matrix. */
template <class T>
__global__ void __launch_bounds__(256)
    sparse_grad_kernel(float *dvalues, const T *dyt, const T *xt, esp_csr s, int64_t chunk) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * 8 + (threadIdx.x >> 5);
  const int lane = static_cast<int>(threadIdx.x & 31);
  if (r >= s.rows) return; /* the whole warp */
  for (int32_t e = s.start[r]; e < s.start[r + 1]; e++) {
    const T *column = xt + static_cast<int64_t>(s.index[e]) * chunk;
    float sum = 0.0f;
    for (int64_t t = lane * 4; t < chunk; t += ESP_SPARSE_TILE) {
      float g[4], v[4];
      load_vec<T, 4>(g, dyt + r * chunk + t);
      load_vec<T, 4>(v, column + t);
#pragma unroll
      for (int k = 0; k < 4; k++) sum += g[k] * v[k];
    }
    sum = warp_sum(sum);
    if (lane == 0) dvalues[s.order ? s.order[e] : e] += sum;
  }
}

template <class T>
void multiply(esp_backend *be, const esp_tensor &y, const esp_tensor &x, const esp_csr &s, void *scratch) {
  int64_t tokens = esp_tensor_rows(&x), chunk = esp_cuda_sparse_chunk(tokens);
  T *xt = static_cast<T *>(scratch);
  auto kernel = sparse_matmul_kernel<T>;
  dim3 grid(static_cast<unsigned>((s.rows + 31) / 32), static_cast<unsigned>(chunk / ESP_SPARSE_TILE));
  for (int64_t first = 0; first < tokens; first += chunk) {
    transpose_chunk<T>(be, xt, x, first, chunk);
    ESP_LAUNCH(be, "sparse_matmul", kernel, grid, dim3(256), 0, esp_view_of<void>(y), static_cast<const T *>(xt), s,
               first, tokens, chunk);
  }
}

template <class T>
void gradient(esp_backend *be, float *dvalues, const esp_tensor &dy, const esp_tensor &x, const esp_csr &s,
              void *scratch) {
  int64_t tokens = esp_tensor_rows(&x), chunk = esp_cuda_sparse_chunk(tokens);
  T *xt = static_cast<T *>(scratch), *dyt = xt + chunk * esp_tensor_cols(&x);
  auto kernel = sparse_grad_kernel<T>;
  for (int64_t first = 0; first < tokens; first += chunk) {
    transpose_chunk<T>(be, xt, x, first, chunk);
    transpose_chunk<T>(be, dyt, dy, first, chunk);
    ESP_LAUNCH(be, "sparse_grad", kernel, dim3(static_cast<unsigned>((s.rows + 7) / 8)), dim3(256), 0, dvalues,
               static_cast<const T *>(dyt), static_cast<const T *>(xt), s, chunk);
  }
}

} // namespace

void esp_cuda_sparse_matmul(esp_backend *be, esp_tensor y, esp_tensor x, const esp_csr *s) {
  if (esp_idle(be, y) || s->entries == 0) return;
  void *scratch = esp_cuda_scratch(be, esp_cuda_need_sparse_matmul(x));
  if (!scratch) return;
  if (x.dtype == ESP_BF16)
    multiply<bf16>(be, y, x, *s, scratch);
  else
    multiply<float>(be, y, x, *s, scratch);
}

void esp_cuda_sparse_grad(esp_backend *be, float *dvalues, esp_tensor dy, esp_tensor x, const esp_csr *s) {
  if (esp_idle(be, dy) || s->entries == 0) return;
  void *scratch = esp_cuda_scratch(be, esp_cuda_need_sparse_grad(dy, x));
  if (!scratch) return;
  if (x.dtype == ESP_BF16 && dy.dtype == ESP_BF16)
    gradient<bf16>(be, dvalues, dy, x, *s, scratch);
  else
    gradient<float>(be, dvalues, dy, x, *s, scratch);
}
