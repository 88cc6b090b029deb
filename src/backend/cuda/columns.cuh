/* columns.cuh: sums down the columns of a tensor in two stages, always in the same order: a thread adds every
 * blockDim.y-th row of its slice, a block adds its threads' sums from the first to the last, and a second kernel adds
 * the slices. The geometry depends on the shape alone, so the bits do not change between devices. */
#ifndef ESP_BACKEND_CUDA_COLUMNS_CUH
#define ESP_BACKEND_CUDA_COLUMNS_CUH

#include "backend/cuda/need_kernels.h"
#include "backend/cuda/view.cuh"

/* out[j] += the sum over slices of part[slice * stride + j], j < cols. In reduce.cu. */
void esp_cuda_add_slices(esp_backend *be, float *out, const float *part, int64_t slices, int64_t stride, int64_t cols);

/* Body: static constexpr int n (columns per thread), sums (values per column);
 * add(float (&acc)[sums][n], row, col). part: [slices, sums, cols]. */
template <class Body>
__global__ void __launch_bounds__(256)
    esp_columns_kernel(Body body, float *part, int64_t rows, int64_t cols, int64_t per_slice) {
  constexpr int N = Body::n, SUMS = Body::sums;
  __shared__ float all[256 * N * SUMS]; /* [blockDim.y][SUMS][blockDim.x * N] */
  const int width = static_cast<int>(blockDim.x) * N;
  const int64_t first = blockIdx.x * per_slice;
  const int64_t last = first + per_slice < rows ? first + per_slice : rows;
  for (int64_t c0 = static_cast<int64_t>(blockIdx.y) * width; c0 < cols;
       c0 += static_cast<int64_t>(gridDim.y) * width) {
    float acc[SUMS][N];
#pragma unroll
    for (int s = 0; s < SUMS; s++)
#pragma unroll
      for (int i = 0; i < N; i++) acc[s][i] = 0.0f;
    int64_t c = c0 + threadIdx.x * N;
    if (c < cols)
      for (int64_t r = first + threadIdx.y; r < last; r += blockDim.y) body.add(acc, r, c);
#pragma unroll
    for (int s = 0; s < SUMS; s++)
#pragma unroll
      for (int i = 0; i < N; i++) all[(threadIdx.y * SUMS + s) * width + threadIdx.x * N + i] = acc[s][i];
    __syncthreads();
    int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
    for (int j = thread; j < SUMS * width; j += 256) {
      int64_t col = c0 + j % width;
      if (col >= cols) continue;
      float sum = 0.0f;
      for (unsigned y = 0; y < blockDim.y; y++) sum += all[y * SUMS * width + j];
      part[(static_cast<int64_t>(blockIdx.x) * SUMS + j / width) * cols + col] = sum;
    }
    __syncthreads();
  }
}

/* The first stage; part: esp_cuda_need_col_sum(rows, cols, Body::sums) bytes. */
template <class Body>
static inline void esp_sum_slices(esp_backend *be, const char *name, const Body &body, float *part, int64_t rows,
                                  int64_t cols) {
  int64_t slices = esp_cuda_col_slices(rows, cols), vecs = (cols + Body::n - 1) / Body::n, tx = 1;
  while (tx < vecs && tx < 32) tx *= 2;
  int64_t along = (vecs + tx - 1) / tx;
  dim3 grid(static_cast<unsigned>(slices), static_cast<unsigned>(along < 65535 ? along : 65535));
  dim3 block(static_cast<unsigned>(tx), static_cast<unsigned>(256 / tx));
  auto kernel = esp_columns_kernel<Body>;
  ESP_LAUNCH(be, name, kernel, grid, block, 0, body, part, rows, cols, (rows + slices - 1) / slices);
}

#endif
