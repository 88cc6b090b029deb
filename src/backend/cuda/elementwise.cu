/* elementwise.cu: axpby, products with a row vector, bias and dropout. All are bound by memory: each tensor is read or
 * written once, in accesses of 16 bytes where its rows allow. */
#include "backend/cuda/view.cuh"
#include "core/rng.h"

namespace {

template <class T, int N>
__global__ void __launch_bounds__(256)
    axpby_kernel(esp_view<T> y, float a, esp_view<T> x, float b, int64_t rows, int64_t cols) {
  int64_t r = esp_cover_row();
  if (r >= rows) return;
  for (int64_t c = esp_cover_col<N>(); c < cols; c += esp_cover_step<N>()) {
    float u[N];
    x.load(u, r, c);
    if (b == 0.0f) { /* y may be uninitialised */
#pragma unroll
      for (int i = 0; i < N; i++) u[i] *= a;
    } else {
      float v[N];
      y.load(v, r, c);
#pragma unroll
      for (int i = 0; i < N; i++) u[i] = a * u[i] + b * v[i];
    }
    y.store(r, c, u);
  }
}

void axpby_views(esp_backend *be, const esp_tensor &y, float a, const esp_tensor &x, float b) {
  if (esp_idle(be, y)) return;
  int64_t rows = esp_tensor_rows(&y), cols = esp_tensor_cols(&y);
  esp_by_access(esp_access_of({&y, &x}), [&](auto i) {
    using T = typename decltype(i)::type;
    auto kernel = axpby_kernel<T, decltype(i)::n>;
    esp_cover cover = esp_cover_of(rows, cols, decltype(i)::n);
    ESP_LAUNCH(be, "axpby", kernel, cover.grid, cover.block, 0, esp_view_of<T>(y), a, esp_view_of<T>(x), b, rows, cols);
  });
}

bool contiguous(const esp_tensor &t) {
  return t.ndim == 1 || t.ld == t.shape[t.ndim - 1];
}
esp_tensor flat_part(const esp_tensor &t, int64_t first, int64_t n) {
  return esp_tensor_1d(static_cast<char *>(t.data) + first * static_cast<int64_t>(esp_dtype_size(t.dtype)), t.dtype, n);
}

} // namespace

void esp_cuda_axpby(esp_backend *be, esp_tensor y, float a, esp_tensor x, float b) {
  if (!contiguous(y) || !contiguous(x)) {
    axpby_views(be, y, a, x, b);
    return;
  }
  /* One long row: the last elements, which do not fill an access, on their own. */
  int64_t n = esp_tensor_numel(&y), whole = n / 8 * 8;
  axpby_views(be, flat_part(y, 0, whole), a, flat_part(x, 0, whole), b);
  axpby_views(be, flat_part(y, whole, n - whole), a, flat_part(x, whole, n - whole), b);
}

namespace {

/* y = x * v (product) or x + v (bias), v one value per column. */
template <class T, int N, bool SUM>
__global__ void __launch_bounds__(256)
    columns_kernel(esp_view<T> y, esp_view<T> x, esp_view<void> v, int64_t rows, int64_t cols) {
  int64_t r = esp_cover_row();
  if (r >= rows) return;
  for (int64_t c = esp_cover_col<N>(); c < cols; c += esp_cover_step<N>()) {
    float u[N], k[N];
    x.load(u, r, c);
    v.load(k, 0, c);
#pragma unroll
    for (int i = 0; i < N; i++) u[i] = SUM ? u[i] + k[i] : u[i] * k[i];
    y.store(r, c, u);
  }
}

template <bool SUM>
void with_columns(esp_backend *be, const char *name, const esp_tensor &y, const esp_tensor &x, const esp_tensor &v) {
  if (esp_idle(be, y)) return;
  int64_t rows = esp_tensor_rows(&y), cols = esp_tensor_cols(&y);
  esp_access access = esp_access_of({&y, &x});
  if (!esp_rows_aligned(&v, 8 * static_cast<int>(esp_dtype_size(v.dtype)))) access = ESP_BY_ONE;
  esp_by_access(access, [&](auto i) {
    using T = typename decltype(i)::type;
    auto kernel = columns_kernel<T, decltype(i)::n, SUM>;
    esp_cover cover = esp_cover_of(rows, cols, decltype(i)::n);
    ESP_LAUNCH(be, name, kernel, cover.grid, cover.block, 0, esp_view_of<T>(y), esp_view_of<T>(x), esp_view_of<void>(v),
               rows, cols);
  });
}

} // namespace

void esp_cuda_mul_cols(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor v) {
  with_columns<false>(be, "mul_cols", y, x, v);
}
void esp_cuda_add_bias(esp_backend *be, esp_tensor y, esp_tensor bias) {
  with_columns<true>(be, "add_bias", y, y, bias);
}

namespace {

/* Element e of the tensor, counted row by row without gaps, is kept when its 24-bit uniform is >= p:
 * esp_rng_uniform(seed, stream, e). One block of the generator gives the four elements of an aligned quadruple; rows
 * that are read several elements at a time begin at one. */
template <class T, int N>
__global__ void __launch_bounds__(256)
    dropout_kernel(esp_view<T> y, esp_view<T> x, float p, float scale, uint64_t seed, const uint64_t *draw,
                   uint64_t stream, float beta, int64_t rows, int64_t cols) {
  int64_t r = esp_cover_row();
  if (r >= rows) return;
  const uint64_t key = esp_draw_seed(seed, *draw);
  for (int64_t c = esp_cover_col<N>(); c < cols; c += esp_cover_step<N>()) {
    uint64_t e = static_cast<uint64_t>(r * cols + c);
    uint32_t words[N];
    if constexpr (N == 1) {
      words[0] = esp_rng_u32(key, stream, e);
    } else {
#pragma unroll
      for (int q = 0; q < N / 4; q++) {
        uint32_t four[4];
        esp_rng_block(key, stream, (e >> 2) + static_cast<uint64_t>(q), four);
#pragma unroll
        for (int i = 0; i < 4; i++) words[4 * q + i] = four[i];
      }
    }
    float u[N];
    x.load(u, r, c);
#pragma unroll
    for (int i = 0; i < N; i++) u[i] *= static_cast<float>(words[i] >> 8) * 0x1p-24f >= p ? scale : 0.0f;
    if (beta != 0.0f) {
      float v[N];
      y.load(v, r, c);
#pragma unroll
      for (int i = 0; i < N; i++) u[i] += beta * v[i];
    }
    y.store(r, c, u);
  }
}

} // namespace

void esp_cuda_dropout(esp_backend *be, esp_tensor y, esp_tensor x, float p, uint64_t seed, const uint64_t *draw,
                      uint64_t stream, float beta) {
  if (esp_idle(be, y)) return;
  int64_t rows = esp_tensor_rows(&y), cols = esp_tensor_cols(&y);
  float scale = 1.0f / (1.0f - p);
  esp_by_access(esp_access_of({&y, &x}), [&](auto i) {
    using T = typename decltype(i)::type;
    auto kernel = dropout_kernel<T, decltype(i)::n>;
    esp_cover cover = esp_cover_of(rows, cols, decltype(i)::n);
    ESP_LAUNCH(be, "dropout", kernel, cover.grid, cover.block, 0, esp_view_of<T>(y), esp_view_of<T>(x), p, scale, seed,
               draw, stream, beta, rows, cols);
  });
}
