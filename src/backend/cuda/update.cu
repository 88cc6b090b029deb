/* update.cu: one optimizer step over a run of parameters, any rule of optim_rules.h, with the compute-type copy
 * refreshed in the same pass. Bound by memory: AdamW reads 16 and writes 12 bytes per parameter, and 2 for the copy. */
#include "backend/cuda/device.cuh"
#include "backend/optim_rules.h"

namespace {

/* What the kernel needs of esp_update_args, by value. */
struct update_run {
  int64_t n;
  float *master;
  const float *grad;
  void *shadow;
  bool shadow_bf16;
  float *state[4];
  float hyper[16];
  float grad_scale;
};

template <int RULE> struct update_rule;
template <> struct update_rule<ESP_RULE_ADAMW> {
  static constexpr int states = 2;
  template <int N>
  static __device__ __forceinline__ float step(float p, float g, float (&s)[2][N], int i, const float *h) {
    return esp_rule_adamw(p, g, &s[0][i], &s[1][i], h);
  }
};
template <> struct update_rule<ESP_RULE_SGD> {
  static constexpr int states = 1;
  template <int N>
  static __device__ __forceinline__ float step(float p, float g, float (&s)[1][N], int i, const float *h) {
    return esp_rule_sgd(p, g, &s[0][i], h);
  }
};
template <> struct update_rule<ESP_RULE_SENSITIVITY> {
  static constexpr int states = 2;
  template <int N>
  static __device__ __forceinline__ float step(float p, float g, float (&s)[2][N], int i, const float *h) {
    return esp_rule_sensitivity(p, g, &s[0][i], &s[1][i], h);
  }
};
template <> struct update_rule<ESP_RULE_SHRINK> {
  static constexpr int states = 1; /* read and written as it is; the caller gives the gradient's buffer a second time */
  template <int N> static __device__ __forceinline__ float step(float p, float, float (&)[1][N], int, const float *h) {
    return esp_rule_shrink(p, h);
  }
};

template <int RULE, int N> __device__ __forceinline__ void update_at(const update_run &u, int64_t at) {
  constexpr int S = update_rule<RULE>::states;
  float p[N], g[N], s[S][N];
  load_vec<float, N>(p, u.master + at);
  load_vec<float, N>(g, u.grad + at);
#pragma unroll
  for (int k = 0; k < S; k++) load_vec<float, N>(s[k], u.state[k] + at);
#pragma unroll
  for (int i = 0; i < N; i++) p[i] = update_rule<RULE>::template step<N>(p[i], u.grad_scale * g[i], s, i, u.hyper);
  store_vec<float, N>(u.master + at, p);
#pragma unroll
  for (int k = 0; k < S; k++) store_vec<float, N>(u.state[k] + at, s[k]);
  if (!u.shadow) return;
  if (u.shadow_bf16)
    store_vec<bf16, N>(static_cast<bf16 *>(u.shadow) + at, p);
  else
    store_vec<float, N>(static_cast<float *>(u.shadow) + at, p);
}

/* quads: how many groups of four parameters are aligned; the rest one by one. */
template <int RULE> __global__ void __launch_bounds__(256) update_kernel(update_run u, int64_t quads) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * 256;
  const int64_t me = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  for (int64_t q = me; q < quads; q += step) update_at<RULE, 4>(u, 4 * q);
  for (int64_t i = 4 * quads + me; i < u.n; i += step) update_at<RULE, 1>(u, i);
}

} // namespace

void esp_cuda_update(esp_backend *be, const esp_update_args *a) {
  if (be->sticky != ESP_OK || a->n <= 0) return;
  update_run u = {};
  u.n = a->n;
  u.master = a->master;
  u.grad = a->grad;
  u.shadow = a->shadow;
  u.shadow_bf16 = a->shadow_dtype == ESP_BF16;
  u.grad_scale = a->grad_scale;
  uintptr_t bits = reinterpret_cast<uintptr_t>(a->master) | reinterpret_cast<uintptr_t>(a->grad);
  for (int i = 0; i < 4; i++) {
    u.state[i] = a->state[i];
    bits |= reinterpret_cast<uintptr_t>(a->state[i]);
  }
  for (int i = 0; i < 16; i++) u.hyper[i] = a->hyper[i];
  bool aligned = bits % 16 == 0 && reinterpret_cast<uintptr_t>(a->shadow) % (u.shadow_bf16 ? 8 : 16) == 0;
  int64_t quads = aligned ? a->n / 4 : 0, blocks = ((aligned ? (a->n + 3) / 4 : a->n) + 255) / 256;
  dim3 grid(static_cast<unsigned>(blocks < (1 << 30) ? blocks : 1 << 30));
  switch (a->rule) {
  case ESP_RULE_ADAMW:
    ESP_LAUNCH(be, "adamw", update_kernel<ESP_RULE_ADAMW>, grid, dim3(256), 0, u, quads);
    break;
  case ESP_RULE_SGD:
    ESP_LAUNCH(be, "sgd", update_kernel<ESP_RULE_SGD>, grid, dim3(256), 0, u, quads);
    break;
  case ESP_RULE_SENSITIVITY:
    ESP_LAUNCH(be, "sensitivity", update_kernel<ESP_RULE_SENSITIVITY>, grid, dim3(256), 0, u, quads);
    break;
  case ESP_RULE_SHRINK:
    ESP_LAUNCH(be, "shrink", update_kernel<ESP_RULE_SHRINK>, grid, dim3(256), 0, u, quads);
    break;
  default:
    esp_cuda_fail(be, "update", "rule", "not known to this backend");
  }
}
