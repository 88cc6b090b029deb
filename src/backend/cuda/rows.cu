/* rows.cu: embedding, its gradient, and gathering and scattering of rows. Bound by memory: each row moved is read once
 * and written once; the gradient reads dy once and reads and writes each row of the table that occurs once. */
#include "backend/cuda/need_kernels.h"
#include "backend/cuda/view.cuh"

namespace {

/* y[to ? to[r] : r] = scale * x[from ? from[r] : r] */
template <class T, int N>
__global__ void __launch_bounds__(256) copy_rows_kernel(esp_view<T> y, const int32_t *to, esp_view<T> x,
                                                        const int32_t *from, float scale, int64_t rows, int64_t cols) {
  int64_t r = esp_cover_row();
  if (r >= rows) return;
  int64_t yr = to ? to[r] : r, xr = from ? from[r] : r;
  for (int64_t c = esp_cover_col<N>(); c < cols; c += esp_cover_step<N>()) {
    float v[N];
    x.load(v, xr, c);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] *= scale;
    y.store(yr, c, v);
  }
}

void copy_rows(esp_backend *be, const char *name, const esp_tensor &y, const int32_t *to, const esp_tensor &x,
               const int32_t *from, float scale, int64_t rows) {
  int64_t cols = esp_tensor_cols(&y);
  if (be->sticky != ESP_OK || rows == 0 || cols == 0) return;
  esp_by_access(esp_access_of({&y, &x}), [&](auto i) {
    using T = typename decltype(i)::type;
    auto kernel = copy_rows_kernel<T, decltype(i)::n>;
    esp_cover cover = esp_cover_of(rows, cols, decltype(i)::n);
    ESP_LAUNCH(be, name, kernel, cover.grid, cover.block, 0, esp_view_of<T>(y), to, esp_view_of<T>(x), from, scale,
               rows, cols);
  });
}

} // namespace

void esp_cuda_gather_rows(esp_backend *be, esp_tensor y, esp_tensor x, const int32_t *rows) {
  copy_rows(be, "gather_rows", y, nullptr, x, rows, 1.0f, esp_tensor_rows(&y));
}
void esp_cuda_scatter_rows(esp_backend *be, esp_tensor y, esp_tensor x, const int32_t *rows) {
  copy_rows(be, "scatter_rows", y, rows, x, nullptr, 1.0f, esp_tensor_rows(&x));
}
void esp_cuda_embed(esp_backend *be, esp_tensor y, esp_tensor table, const int32_t *ids, float scale) {
  copy_rows(be, "embed", y, nullptr, table, ids, scale, esp_tensor_rows(&y));
}

namespace {

/* order[k]: the k-th token when tokens are sorted by id, equal ids in token order. A token's place is the number of
 * tokens before it in that order, counted by one warp: T^2 comparisons of ids that lie in the first-level cache, some
 * 40 us for 16k tokens, and nothing depends on the order in which threads run. */
__global__ void __launch_bounds__(256) order_tokens_kernel(int32_t *order, const int32_t *ids, int64_t tokens) {
  int64_t t = static_cast<int64_t>(blockIdx.x) * 8 + (threadIdx.x >> 5);
  if (t >= tokens) return; /* the whole warp */
  int64_t lane = threadIdx.x & 31;
  const int32_t id = ids[t];
  int before = 0;
  for (int64_t j = lane; j < t; j += 32) before += ids[j] <= id;
  for (int64_t j = t + 1 + lane; j < tokens; j += 32) before += ids[j] < id;
  before = warp_sum(before);
  if (lane == 0) order[before] = static_cast<int32_t>(t);
}

/* The first place after k that holds another id than place k does: in doubling steps, then by halves, because a
 * frequent token may fill thousands of places. */
__device__ __forceinline__ int64_t end_of_run(const int32_t *ids, const int32_t *order, int64_t k, int64_t tokens) {
  const int32_t id = ids[order[k]];
  int64_t same = k, other = k + 1;
  while (other < tokens && ids[order[other]] == id) {
    same = other;
    other += other - k;
  }
  if (other > tokens) other = tokens;
  while (other - same > 1) {
    int64_t middle = same + (other - same) / 2;
    if (ids[order[middle]] == id)
      same = middle;
    else
      other = middle;
  }
  return other;
}

/* One row of threads per place in the order; those where an id begins add all its rows, in token order, to the table's
 * row. A thread loads four rows ahead of the sums, which have to wait for each other. */
template <class T, int N>
__global__ void __launch_bounds__(256)
    embed_bwd_kernel(float *dtable, esp_view<T> dy, const int32_t *ids, const int32_t *order, float scale,
                     int64_t tokens, int64_t cols) {
  int64_t k = esp_cover_row();
  if (k >= tokens) return;
  const int32_t id = ids[order[k]];
  if (k > 0 && ids[order[k - 1]] == id) return;
  const int64_t end = end_of_run(ids, order, k, tokens);
  float *row = dtable + id * cols;
  for (int64_t c = esp_cover_col<N>(); c < cols; c += esp_cover_step<N>()) {
    float sum[N];
    load_vec<float, N>(sum, row + c);
    int64_t q = k;
    for (; q + 4 <= end; q += 4) {
      float g[4][N];
#pragma unroll
      for (int j = 0; j < 4; j++) dy.load(g[j], order[q + j], c);
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < N; i++) sum[i] += scale * g[j][i];
    }
    for (; q < end; q++) {
      float g[N];
      dy.load(g, order[q], c);
#pragma unroll
      for (int i = 0; i < N; i++) sum[i] += scale * g[i];
    }
    store_vec<float, N>(row + c, sum);
  }
}

} // namespace

void esp_cuda_embed_bwd(esp_backend *be, float *dtable, esp_tensor dy, const int32_t *ids, float scale) {
  if (esp_idle(be, dy)) return;
  int64_t tokens = esp_tensor_rows(&dy), cols = esp_tensor_cols(&dy);
  int32_t *order = static_cast<int32_t *>(esp_cuda_scratch(be, esp_cuda_need_embed_bwd(tokens)));
  if (!order) return;
  ESP_LAUNCH(be, "order tokens", order_tokens_kernel, dim3(static_cast<unsigned>((tokens + 7) / 8)), dim3(256), 0,
             order, ids, tokens);
  esp_tensor table = esp_tensor_2d(dtable, ESP_F32, 1, cols);
  esp_access access = esp_access_of({&dy});
  if (!esp_rows_aligned(&table, access == ESP_BY_F32X4 ? 16 : 32)) access = ESP_BY_ONE;
  esp_by_access(access, [&](auto i) {
    using T = typename decltype(i)::type;
    auto kernel = embed_bwd_kernel<T, decltype(i)::n>;
    esp_cover cover = esp_cover_of(tokens, cols, decltype(i)::n);
    ESP_LAUNCH(be, "embed_bwd", kernel, cover.grid, cover.block, 0, dtable, esp_view_of<T>(dy), ids,
               static_cast<const int32_t *>(order), scale, tokens, cols);
  });
}
