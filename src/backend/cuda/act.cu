/* act.cu: activations, plain and gated, forward beside backward. The product act(g) u is not stored for the backward
 * pass but computed again from gu. Bound by memory: gated forward moves 6 bytes per element of h in bf16, backward
 * 10. */
#include "backend/cuda/view.cuh"

namespace {

__device__ __forceinline__ float sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + expf(-x));
}

/* The normal distribution function, 0.5 (1 + erf(x/sqrt 2)), without cancellation in the lower tail. Minimax
 * polynomials of erf after N. Juffa, as in the cpu backend. */
__device__ __forceinline__ float normal_cdf(float x) {
  float u = x * 0.70710678118654752f, t = fabsf(u), s = u * u;
  float r = fmaf(-1.72853470e-5f, t, 3.83197126e-4f);
  float q = fmaf(-3.88396438e-3f, t, 2.42546219e-2f);
  r = fmaf(r, s, q);
  r = fmaf(r, t, -1.06777877e-1f);
  r = fmaf(r, t, -6.34846687e-1f);
  r = fmaf(r, t, -1.28717512e-1f);
  r = fmaf(r, t, -t);
  float e = 0.5f * expf(fmaxf(r, -104.0f)); /* 0.5 erfc(t); the polynomial overflows for huge t */
  float far = u < 0.0f ? e : 1.0f - e;
  float m = -5.96761703e-4f;
  m = fmaf(m, s, 4.99119423e-3f);
  m = fmaf(m, s, -2.67681349e-2f);
  m = fmaf(m, s, 1.12819925e-1f);
  m = fmaf(m, s, -3.76125336e-1f);
  m = fmaf(m, s, 1.28379166e-1f);
  float near = 0.5f + 0.5f * fmaf(m, u, u);
  return t < 0.927734375f ? near : far;
}

/* 0.5 (1 + tanh z) == sigmoid(2 z), z = sqrt(2/pi) (x + 0.044715 x^3) */
__device__ __forceinline__ float gelu_tanh_gate(float x) {
  return sigmoid(1.5957691216057308f * fmaf(x * x * x, 0.044715f, x));
}

/* One of these per activation: its value, and its slope beside the value. */
struct act_silu {
  static __device__ __forceinline__ float value(float x) {
    return x * sigmoid(x);
  }
  static __device__ __forceinline__ float slope(float x, float *value) {
    float s = sigmoid(x);
    *value = x * s;
    return s * (1.0f + x * (1.0f - s));
  }
};
struct act_gelu_tanh {
  static __device__ __forceinline__ float value(float x) {
    return x * gelu_tanh_gate(x);
  }
  static __device__ __forceinline__ float slope(float x, float *value) {
    float s = gelu_tanh_gate(x);
    *value = x * s;
    float dz = 1.5957691216057308f * fmaf(x * x, 3 * 0.044715f, 1.0f);
    return s + x * s * (1.0f - s) * dz;
  }
};
struct act_gelu_erf {
  static __device__ __forceinline__ float value(float x) {
    return x * normal_cdf(x);
  }
  static __device__ __forceinline__ float slope(float x, float *value) {
    float c = normal_cdf(x);
    *value = x * c;
    return c + x * 0.3989422804014327f * expf(-0.5f * x * x);
  }
};
struct act_tanh {
  static __device__ __forceinline__ float value(float x) {
    return tanhf(x);
  }
  static __device__ __forceinline__ float slope(float x, float *value) {
    *value = tanhf(x);
    return 4.0f * sigmoid(2.0f * x) * sigmoid(-2.0f * x); /* 1 - tanh^2 without cancellation */
  }
};
struct act_relu { /* a NaN stays one */
  static __device__ __forceinline__ float value(float x) {
    return x < 0.0f ? 0.0f : x;
  }
  static __device__ __forceinline__ float slope(float x, float *value) {
    *value = x < 0.0f ? 0.0f : x;
    return x > 0.0f ? 1.0f : 0.0f;
  }
};

template <class A, class T, int N>
__global__ void __launch_bounds__(256) act_kernel(esp_view<T> y, esp_view<T> x, int64_t rows, int64_t cols) {
  int64_t r = esp_cover_row();
  if (r >= rows) return;
  for (int64_t c = esp_cover_col<N>(); c < cols; c += esp_cover_step<N>()) {
    float u[N];
    x.load(u, r, c);
#pragma unroll
    for (int i = 0; i < N; i++) u[i] = A::value(u[i]);
    y.store(r, c, u);
  }
}

template <class A, class T, int N>
__global__ void __launch_bounds__(256)
    act_bwd_kernel(esp_view<T> dx, esp_view<T> dy, esp_view<T> x, int64_t rows, int64_t cols) {
  int64_t r = esp_cover_row();
  if (r >= rows) return;
  for (int64_t c = esp_cover_col<N>(); c < cols; c += esp_cover_step<N>()) {
    float u[N], d[N];
    x.load(u, r, c);
    dy.load(d, r, c);
#pragma unroll
    for (int i = 0; i < N; i++) {
      float value;
      d[i] *= A::slope(u[i], &value);
    }
    dx.store(r, c, d);
  }
}

/* cols: of h; gu = [g | u] is twice as wide. The width of h is a multiple of N, so u is aligned as g is. */
template <class A, class T, int N>
__global__ void __launch_bounds__(256) glu_kernel(esp_view<T> h, esp_view<T> gu, int64_t rows, int64_t cols) {
  int64_t r = esp_cover_row();
  if (r >= rows) return;
  for (int64_t c = esp_cover_col<N>(); c < cols; c += esp_cover_step<N>()) {
    float g[N], u[N];
    gu.load(g, r, c);
    gu.load(u, r, cols + c);
#pragma unroll
    for (int i = 0; i < N; i++) u[i] *= A::value(g[i]);
    h.store(r, c, u);
  }
}

/* dgu may be gu: a thread reads both halves of its columns before it writes them. */
template <class A, class T, int N>
__global__ void __launch_bounds__(256)
    glu_bwd_kernel(esp_view<T> dgu, esp_view<T> dh, esp_view<T> gu, int64_t rows, int64_t cols) {
  int64_t r = esp_cover_row();
  if (r >= rows) return;
  for (int64_t c = esp_cover_col<N>(); c < cols; c += esp_cover_step<N>()) {
    float g[N], u[N], d[N];
    gu.load(g, r, c);
    gu.load(u, r, cols + c);
    dh.load(d, r, c);
#pragma unroll
    for (int i = 0; i < N; i++) {
      float value, slope = A::slope(g[i], &value);
      g[i] = d[i] * u[i] * slope;
      u[i] = d[i] * value;
    }
    dgu.store(r, c, g);
    dgu.store(r, cols + c, u);
  }
}

/* Calls launch(activation, instance). Mixed types, which no model has, go element by element: fewer instances. */
template <class F> void by_act(esp_act act, esp_access access, F launch) {
  if (access == ESP_BY_MIXED8) access = ESP_BY_ONE;
  auto with = [&](auto a) {
    switch (access) {
    case ESP_BY_BF16X8:
      return launch(a, esp_instance<bf16, 8>());
    case ESP_BY_F32X4:
      return launch(a, esp_instance<float, 4>());
    default:
      return launch(a, esp_instance<void, 1>());
    }
  };
  switch (act) {
  case ESP_ACT_SILU:
    return with(act_silu());
  case ESP_ACT_GELU_TANH:
    return with(act_gelu_tanh());
  case ESP_ACT_GELU_ERF:
    return with(act_gelu_erf());
  case ESP_ACT_TANH:
    return with(act_tanh());
  default:
    return with(act_relu());
  }
}

} // namespace

void esp_cuda_act(esp_backend *be, esp_tensor y, esp_tensor x, esp_act act) {
  if (esp_idle(be, y)) return;
  int64_t rows = esp_tensor_rows(&y), cols = esp_tensor_cols(&y);
  by_act(act, esp_access_of({&y, &x}), [&](auto a, auto i) {
    using T = typename decltype(i)::type;
    auto kernel = act_kernel<decltype(a), T, decltype(i)::n>;
    esp_cover cover = esp_cover_of(rows, cols, decltype(i)::n);
    ESP_LAUNCH(be, "act", kernel, cover.grid, cover.block, 0, esp_view_of<T>(y), esp_view_of<T>(x), rows, cols);
  });
}

void esp_cuda_act_bwd(esp_backend *be, esp_tensor dx, esp_tensor dy, esp_tensor x, esp_act act) {
  if (esp_idle(be, x)) return;
  int64_t rows = esp_tensor_rows(&x), cols = esp_tensor_cols(&x);
  by_act(act, esp_access_of({&dx, &dy, &x}), [&](auto a, auto i) {
    using T = typename decltype(i)::type;
    auto kernel = act_bwd_kernel<decltype(a), T, decltype(i)::n>;
    esp_cover cover = esp_cover_of(rows, cols, decltype(i)::n);
    ESP_LAUNCH(be, "act_bwd", kernel, cover.grid, cover.block, 0, esp_view_of<T>(dx), esp_view_of<T>(dy),
               esp_view_of<T>(x), rows, cols);
  });
}

void esp_cuda_glu(esp_backend *be, esp_tensor h, esp_tensor gu, esp_act act) {
  if (esp_idle(be, h)) return;
  int64_t rows = esp_tensor_rows(&h), cols = esp_tensor_cols(&h);
  by_act(act, esp_access_of({&h, &gu}), [&](auto a, auto i) {
    using T = typename decltype(i)::type;
    auto kernel = glu_kernel<decltype(a), T, decltype(i)::n>;
    esp_cover cover = esp_cover_of(rows, cols, decltype(i)::n);
    ESP_LAUNCH(be, "glu", kernel, cover.grid, cover.block, 0, esp_view_of<T>(h), esp_view_of<T>(gu), rows, cols);
  });
}

void esp_cuda_glu_bwd(esp_backend *be, esp_tensor dgu, esp_tensor dh, esp_tensor gu, esp_act act) {
  if (esp_idle(be, dh)) return;
  int64_t rows = esp_tensor_rows(&dh), cols = esp_tensor_cols(&dh);
  by_act(act, esp_access_of({&dgu, &dh, &gu}), [&](auto a, auto i) {
    using T = typename decltype(i)::type;
    auto kernel = glu_bwd_kernel<decltype(a), T, decltype(i)::n>;
    esp_cover cover = esp_cover_of(rows, cols, decltype(i)::n);
    ESP_LAUNCH(be, "glu_bwd", kernel, cover.grid, cover.block, 0, esp_view_of<T>(dgu), esp_view_of<T>(dh),
               esp_view_of<T>(gu), rows, cols);
  });
}
