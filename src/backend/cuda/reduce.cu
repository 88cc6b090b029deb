/* reduce.cu: column sums and dot products, ordered in two stages: no atomic addition of floats anywhere, two runs give
 * the same bits. Bound by memory: the operand is read once. */
#include "backend/cuda/columns.cuh"

namespace {

/* Block of 32 columns x 8: each of the 8 adds every eighth slice, then the 8 are added in order. */
__global__ void __launch_bounds__(256)
    add_slices_kernel(float *out, const float *part, int64_t slices, int64_t stride, int64_t cols) {
  __shared__ float all[8][32];
  int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float sum = 0.0f;
  if (c < cols)
    for (int64_t s = threadIdx.y; s < slices; s += 8) sum += part[s * stride + c];
  all[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && c < cols) {
    sum = all[0][threadIdx.x];
    for (int y = 1; y < 8; y++) sum += all[y][threadIdx.x];
    out[c] += sum;
  }
}

template <class T, int N> struct sum_body {
  static constexpr int n = N, sums = 1;
  esp_view<T> x;

  __device__ __forceinline__ void add(float (&acc)[1][N], int64_t row, int64_t col) const {
    float v[N];
    x.load(v, row, col);
#pragma unroll
    for (int i = 0; i < N; i++) acc[0][i] += v[i];
  }
};

} // namespace

void esp_cuda_add_slices(esp_backend *be, float *out, const float *part, int64_t slices, int64_t stride, int64_t cols) {
  dim3 grid(static_cast<unsigned>((cols + 31) / 32));
  ESP_LAUNCH(be, "add_slices", add_slices_kernel, grid, dim3(32, 8), 0, out, part, slices, stride, cols);
}

void esp_cuda_col_sum(esp_backend *be, float *out, esp_tensor x) {
  if (esp_idle(be, x)) return;
  int64_t rows = esp_tensor_rows(&x), cols = esp_tensor_cols(&x);
  float *part = static_cast<float *>(esp_cuda_scratch(be, esp_cuda_need_col_sum(rows, cols, 1)));
  if (!part) return;
  esp_by_access(esp_access_of({&x}), [&](auto i) {
    using T = typename decltype(i)::type;
    sum_body<T, decltype(i)::n> body = {esp_view_of<T>(x)};
    esp_sum_slices(be, "col_sum", body, part, rows, cols);
  });
  esp_cuda_add_slices(be, out, part, esp_cuda_col_slices(rows, cols), cols, cols);
}

namespace {

__global__ void __launch_bounds__(256)
    dot_parts_kernel(double *part, const float *a, const float *b, int64_t n, bool aligned) {
  __shared__ double warps[8];
  const int64_t step = static_cast<int64_t>(gridDim.x) * 256;
  const int64_t me = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int64_t quads = aligned ? n / 4 : 0;
  double sum = 0;
  for (int64_t q = me; q < quads; q += step) {
    float u[4], v[4];
    load_vec<float, 4>(u, a + 4 * q);
    load_vec<float, 4>(v, b + 4 * q);
#pragma unroll
    for (int i = 0; i < 4; i++) sum += static_cast<double>(u[i]) * static_cast<double>(v[i]);
  }
  for (int64_t i = 4 * quads + me; i < n; i += step) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  sum = block_sum(sum, warps);
  if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(256) dot_total_kernel(double *out, const double *part, int parts) {
  __shared__ double warps[8];
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < parts; i += 256) sum += part[i];
  sum = block_sum(sum, warps);
  if (threadIdx.x == 0) *out = sum;
}

} // namespace

/* Writes 0 for n == 0. */
void esp_cuda_dot_device(esp_backend *be, double *device_out, const float *a, const float *b, int64_t n) {
  if (be->sticky != ESP_OK) return;
  int64_t parts = esp_cuda_dot_parts(n);
  double *part = static_cast<double *>(esp_cuda_scratch(be, esp_cuda_need_dot(n)));
  if (!part) return;
  bool aligned = (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0;
  ESP_LAUNCH(be, "dot", dot_parts_kernel, dim3(static_cast<unsigned>(parts)), dim3(256), 0, part, a, b, n, aligned);
  ESP_LAUNCH(be, "dot total", dot_total_kernel, dim3(1), dim3(256), 0, device_out, part, static_cast<int>(parts));
}
