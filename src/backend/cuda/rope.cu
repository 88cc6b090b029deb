/* rope.cu: rotary positions (RoFormer, arXiv 2104.09864) in the half-split order of Hugging Face's Llama, in place.
 * Bound by memory: the rotated part of x is read and written once; the rows of the table stay in cache across heads. */
#include "backend/cuda/view.cuh"

namespace {

/* A thread rotates N neighbouring pairs of one head, elements (i, i + half). cols: pairs of a row, heads * half. */
template <class T, int N>
__global__ void __launch_bounds__(256)
    rope_kernel(esp_view<T> x, const float *cos_t, const float *sin_t, const int32_t *positions, float sign,
                int64_t rows, int cols, int half, int head_dim) {
  int64_t r = esp_cover_row();
  if (r >= rows) return;
  const int64_t at = static_cast<int64_t>(positions[r]) * half;
  for (int64_t p = esp_cover_col<N>(); p < cols; p += esp_cover_step<N>()) {
    int head = static_cast<int>(p) / half, i = static_cast<int>(p) - head * half;
    int64_t c = static_cast<int64_t>(head) * head_dim + i;
    float u[N], v[N], co[N], si[N];
    x.load(u, r, c);
    x.load(v, r, c + half);
    load_vec<float, N>(co, cos_t + at + i);
    load_vec<float, N>(si, sin_t + at + i);
#pragma unroll
    for (int j = 0; j < N; j++) {
      float s = sign * si[j], a = u[j];
      u[j] = a * co[j] - v[j] * s;
      v[j] = v[j] * co[j] + a * s;
    }
    x.store(r, c, u);
    x.store(r, c + half, v);
  }
}

} // namespace

void esp_cuda_rope(esp_backend *be, const esp_rope_args *a) {
  int64_t rows = esp_tensor_rows(&a->x);
  int half = a->rot / 2, cols = a->heads * half;
  if (esp_idle(be, a->x) || cols == 0) return;
  /* Each head and each half of it has to begin where an access may. */
  esp_access access = esp_access_of({&a->x});
  int n = access == ESP_BY_BF16X8 ? 8 : 4;
  bool tables = (reinterpret_cast<uintptr_t>(a->cos_t) | reinterpret_cast<uintptr_t>(a->sin_t)) % (4 * n) == 0;
  if (access == ESP_BY_MIXED8 || half % n || a->head_dim % n || !tables) access = ESP_BY_ONE;
  esp_by_access(access, [&](auto i) {
    using T = typename decltype(i)::type;
    auto kernel = rope_kernel<T, decltype(i)::n>;
    esp_cover cover = esp_cover_of(rows, cols, decltype(i)::n);
    ESP_LAUNCH(be, "rope", kernel, cover.grid, cover.block, 0, esp_view_of<T>(a->x), a->cos_t, a->sin_t, a->positions,
               a->inverse ? -1.0f : 1.0f, rows, cols, half, a->head_dim);
  });
}
