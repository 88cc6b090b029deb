/* kinds.cu: parts of adapter kinds that are products by element or by row and their sums (backend.h). All are bound by
 * memory: each large tensor is read or written once, in accesses of 16 bytes where its rows allow. */
#include "backend/cuda/columns.cuh"

namespace {

/* u + beta * what y holds; y may be uninitialised when beta is 0. */
template <class T, int N>
__device__ __forceinline__ void store_scaled(const esp_view<T> &y, int64_t r, int64_t c, float (&u)[N], float beta) {
  if (beta != 0.0f) {
    float old[N];
    y.load(old, r, c);
#pragma unroll
    for (int i = 0; i < N; i++) u[i] += beta * old[i];
  }
  y.store(r, c, u);
}

template <class T, int N>
__global__ void __launch_bounds__(256)
    mul_kernel(esp_view<T> y, esp_view<T> a, esp_view<T> b, float beta, int64_t rows, int64_t cols) {
  int64_t r = esp_cover_row();
  if (r >= rows) return;
  for (int64_t c = esp_cover_col<N>(); c < cols; c += esp_cover_step<N>()) {
    float u[N], v[N];
    a.load(u, r, c);
    b.load(v, r, c);
#pragma unroll
    for (int i = 0; i < N; i++) u[i] *= v[i];
    store_scaled(y, r, c, u, beta);
  }
}

/* v: one value per row, `step` elements apart */
template <class T, int N>
__global__ void __launch_bounds__(256) mul_rows_kernel(esp_view<T> y, esp_view<T> x, esp_view<void> v, int64_t step,
                                                       float beta, int64_t rows, int64_t cols) {
  int64_t r = esp_cover_row();
  if (r >= rows) return;
  float k[1];
  v.load(k, 0, r * step);
  for (int64_t c = esp_cover_col<N>(); c < cols; c += esp_cover_step<N>()) {
    float u[N];
    x.load(u, r, c);
#pragma unroll
    for (int i = 0; i < N; i++) u[i] *= k[0];
    store_scaled(y, r, c, u, beta);
  }
}

} // namespace

void esp_cuda_mul(esp_backend *be, esp_tensor y, esp_tensor a, esp_tensor b, float beta) {
  if (esp_idle(be, y)) return;
  int64_t rows = esp_tensor_rows(&y), cols = esp_tensor_cols(&y);
  esp_by_access(esp_access_of({&y, &a, &b}), [&](auto i) {
    using T = typename decltype(i)::type;
    auto kernel = mul_kernel<T, decltype(i)::n>;
    esp_cover cover = esp_cover_of(rows, cols, decltype(i)::n);
    ESP_LAUNCH(be, "mul", kernel, cover.grid, cover.block, 0, esp_view_of<T>(y), esp_view_of<T>(a), esp_view_of<T>(b),
               beta, rows, cols);
  });
}

void esp_cuda_mul_rows(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor v, float beta) {
  if (esp_idle(be, y)) return;
  int64_t rows = esp_tensor_rows(&y), cols = esp_tensor_cols(&y), step = v.ndim == 2 ? v.ld : 1;
  esp_by_access(esp_access_of({&y, &x}), [&](auto i) {
    using T = typename decltype(i)::type;
    auto kernel = mul_rows_kernel<T, decltype(i)::n>;
    esp_cover cover = esp_cover_of(rows, cols, decltype(i)::n);
    ESP_LAUNCH(be, "mul_rows", kernel, cover.grid, cover.block, 0, esp_view_of<T>(y), esp_view_of<T>(x),
               esp_view_of<void>(v), step, beta, rows, cols);
  });
}

namespace {

template <class T, int N> struct dot_body {
  static constexpr int n = N, sums = 1;
  esp_view<T> a, b;

  __device__ __forceinline__ void add(float (&acc)[1][N], int64_t row, int64_t col) const {
    float u[N], v[N];
    a.load(u, row, col);
    b.load(v, row, col);
#pragma unroll
    for (int i = 0; i < N; i++) acc[0][i] += u[i] * v[i];
  }
};

/* One warp per row. */
template <class T, int N>
__global__ void __launch_bounds__(256)
    row_dot_kernel(float *out, esp_view<T> a, esp_view<T> b, float beta, int64_t rows, int64_t cols) {
  int64_t r = static_cast<int64_t>(blockIdx.x) * 8 + (threadIdx.x >> 5);
  if (r >= rows) return; /* the whole warp */
  float sum = 0.0f;
  for (int64_t c = static_cast<int64_t>(threadIdx.x & 31) * N; c < cols; c += 32 * N) {
    float u[N], v[N];
    a.load(u, r, c);
    b.load(v, r, c);
#pragma unroll
    for (int i = 0; i < N; i++) sum += u[i] * v[i];
  }
  sum = warp_sum(sum);
  if ((threadIdx.x & 31) == 0) out[r] = beta == 0.0f ? sum : sum + beta * out[r];
}

} // namespace

void esp_cuda_col_dot(esp_backend *be, float *out, esp_tensor a, esp_tensor b) {
  if (esp_idle(be, a)) return;
  int64_t rows = esp_tensor_rows(&a), cols = esp_tensor_cols(&a);
  float *part = static_cast<float *>(esp_cuda_scratch(be, esp_cuda_need_col_sum(rows, cols, 1)));
  if (!part) return;
  esp_by_access(esp_access_of({&a, &b}), [&](auto i) {
    using T = typename decltype(i)::type;
    dot_body<T, decltype(i)::n> body = {esp_view_of<T>(a), esp_view_of<T>(b)};
    esp_sum_slices(be, "col_dot", body, part, rows, cols);
  });
  esp_cuda_add_slices(be, out, part, esp_cuda_col_slices(rows, cols), cols, cols);
}

void esp_cuda_row_dot(esp_backend *be, float *out, esp_tensor a, esp_tensor b, float beta) {
  int64_t rows = esp_tensor_rows(&a), cols = esp_tensor_cols(&a);
  if (be->sticky != ESP_OK || rows == 0) return;
  esp_by_access(esp_access_of({&a, &b}), [&](auto i) {
    using T = typename decltype(i)::type;
    auto kernel = row_dot_kernel<T, decltype(i)::n>;
    ESP_LAUNCH(be, "row_dot", kernel, dim3(static_cast<unsigned>((rows + 7) / 8)), dim3(256), 0, out, esp_view_of<T>(a),
               esp_view_of<T>(b), beta, rows, cols);
  });
}

namespace {

/* Stores are whole; loads gather within one row, which stays in the first-level cache. */
template <class T, int N>
__global__ void __launch_bounds__(256)
    transpose_rows_kernel(esp_view<T> y, esp_view<T> x, int64_t a, int64_t b, int64_t rows) {
  int64_t r = esp_cover_row();
  if (r >= rows) return;
  for (int64_t c = esp_cover_col<N>(); c < a * b; c += esp_cover_step<N>()) {
    float u[N];
    int64_t j = c / a, i = c % a;
#pragma unroll
    for (int k = 0; k < N; k++) {
      float one[1];
      x.load(one, r, i * b + j);
      u[k] = one[0];
      if (++i == a) i = 0, j++;
    }
    y.store(r, c, u);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(256)
    khatri_rao_kernel(esp_view<T> y, esp_view<void> x, esp_view<void> z, int64_t q_n, int64_t rows, int64_t cols) {
  int64_t r = esp_cover_row();
  if (r >= rows) return;
  for (int64_t c = esp_cover_col<N>(); c < cols; c += esp_cover_step<N>()) {
    float u[N], left[1];
    int64_t p = c / q_n, q = c % q_n;
    x.load(left, r, p);
#pragma unroll
    for (int k = 0; k < N; k++) {
      float right[1];
      if (q == q_n) {
        q = 0;
        x.load(left, r, ++p);
      }
      z.load(right, r, q++);
      u[k] = left[0] * right[0];
    }
    y.store(r, c, u);
  }
}

/* One block per row: a warp sums along q for each of its p, a thread along p for each of its q; the second reading of
 * the row of dy comes out of a cache. */
__global__ void __launch_bounds__(128)
    khatri_rao_bwd_kernel(float *dx, int64_t dx_ld, float *dz, int64_t dz_ld, esp_view<void> dy, esp_view<void> x,
                          esp_view<void> z, int64_t p_n, int64_t q_n) {
  const int64_t r = blockIdx.x;
  float g[1], k[1];
  if (dx)
    for (int64_t p = threadIdx.x >> 5; p < p_n; p += 4) {
      float sum = 0.0f;
      for (int64_t q = threadIdx.x & 31; q < q_n; q += 32) {
        dy.load(g, r, p * q_n + q);
        z.load(k, r, q);
        sum += g[0] * k[0];
      }
      sum = warp_sum(sum);
      if ((threadIdx.x & 31) == 0) dx[r * dx_ld + p] += sum;
    }
  if (dz)
    for (int64_t q = threadIdx.x; q < q_n; q += 128) {
      float sum = 0.0f;
      for (int64_t p = 0; p < p_n; p++) {
        dy.load(g, r, p * q_n + q);
        x.load(k, r, p);
        sum += g[0] * k[0];
      }
      dz[r * dz_ld + q] += sum;
    }
}

} // namespace

void esp_cuda_transpose_rows(esp_backend *be, esp_tensor y, esp_tensor x, int64_t a, int64_t b) {
  if (esp_idle(be, y)) return;
  int64_t rows = esp_tensor_rows(&y);
  esp_access access = esp_access_of({&y});
  if (x.dtype != y.dtype && access != ESP_BY_ONE)
    access = esp_rows_aligned(&y, 8 * static_cast<int>(esp_dtype_size(y.dtype))) ? ESP_BY_MIXED8 : ESP_BY_ONE;
  esp_by_access(access, [&](auto i) {
    using T = typename decltype(i)::type;
    auto kernel = transpose_rows_kernel<T, decltype(i)::n>;
    esp_cover cover = esp_cover_of(rows, a * b, decltype(i)::n);
    ESP_LAUNCH(be, "transpose_rows", kernel, cover.grid, cover.block, 0, esp_view_of<T>(y), esp_view_of<T>(x), a, b,
               rows);
  });
}

void esp_cuda_khatri_rao(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor z) {
  if (esp_idle(be, y)) return;
  int64_t rows = esp_tensor_rows(&y), cols = esp_tensor_cols(&y), q_n = esp_tensor_cols(&z);
  esp_by_access(esp_access_of({&y}), [&](auto i) {
    using T = typename decltype(i)::type;
    auto kernel = khatri_rao_kernel<T, decltype(i)::n>;
    esp_cover cover = esp_cover_of(rows, cols, decltype(i)::n);
    ESP_LAUNCH(be, "khatri_rao", kernel, cover.grid, cover.block, 0, esp_view_of<T>(y), esp_view_of<void>(x),
               esp_view_of<void>(z), q_n, rows, cols);
  });
}

void esp_cuda_khatri_rao_bwd(esp_backend *be, esp_tensor dx, esp_tensor dz, esp_tensor dy, esp_tensor x, esp_tensor z) {
  if (esp_idle(be, dy) || (!dx.data && !dz.data)) return;
  ESP_LAUNCH(be, "khatri_rao_bwd", khatri_rao_bwd_kernel, dim3(static_cast<unsigned>(esp_tensor_rows(&dy))), dim3(128),
             0, static_cast<float *>(dx.data), dx.ld, static_cast<float *>(dz.data), dz.ld, esp_view_of<void>(dy),
             esp_view_of<void>(x), esp_view_of<void>(z), esp_tensor_cols(&x), esp_tensor_cols(&z));
}
