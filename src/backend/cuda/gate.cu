/* gate.cu: ranks that gate themselves (esp_gate in backend.h). One warp per row; a row is read once into shared memory,
 * where each lane only touches every 32nd value, its own. */
#include "backend/cuda/view.cuh"

namespace {

enum { GATE_WARPS = 4, GATE_NONE = 0x7fffffff };

struct gate_row {
  float *t, *w, *u; /* shared memory, [n] */
  int n, lane;
  unsigned keep; /* of the lane's own values, one bit each */
  float inv;     /* 1 / |t| */
};

/* The largest that is not kept yet, of equals the first: one bit more in `keep` of the lane that holds it. */
__device__ __forceinline__ void keep_next(gate_row &o) {
  float best = 0.0f;
  int at = GATE_NONE;
  for (int i = o.lane, k = 0; i < o.n; i += 32, k++)
    if (!(o.keep >> k & 1u) && (at == GATE_NONE || o.t[i] > best)) {
      best = o.t[i];
      at = i;
    }
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) {
    float other = __shfl_xor_sync(0xffffffffu, best, d);
    int where = __shfl_xor_sync(0xffffffffu, at, d);
    if (where != GATE_NONE && (at == GATE_NONE || other > best || (other == best && where < at))) {
      best = other;
      at = where;
    }
  }
  at = __shfl_sync(0xffffffffu, at, 0); /* of values that are no numbers lanes may not agree */
  if (at != GATE_NONE && (at & 31) == o.lane) o.keep |= 1u << (at >> 5);
}

__device__ __forceinline__ void gate_of(gate_row &o, const esp_view<void> &x, int64_t r, const esp_gate &g) {
  float square = 0.0f, most = -2.0f, sum = 0.0f;
  for (int i = o.lane; i < o.n; i += 32) {
    float v[1];
    x.load(v, r, i);
    o.t[i] = v[0];
    square += v[0] * v[0];
  }
  square = warp_sum(square);
  o.inv = square > 1e-30f ? 1.0f / sqrtf(square) : 0.0f;
  for (int i = o.lane; i < o.n; i += 32) most = fmaxf(most, o.t[i] * o.inv);
  most = warp_max(most);
  for (int i = o.lane; i < o.n; i += 32) {
    o.w[i] = expf((o.t[i] * o.inv - most) / g.tau);
    sum += o.w[i];
  }
  sum = 1.0f / warp_sum(sum);
  for (int i = o.lane; i < o.n; i += 32) o.w[i] *= sum;
  bool all = g.top <= 0 || g.top >= o.n;
  o.keep = all ? 0xffffffffu : 0u;
  for (int64_t k = 0; !all && k < g.top; k++) keep_next(o);
  for (int i = o.lane, k = 0; g.threshold > 0.0f && i < o.n; i += 32, k++)
    if (!(o.t[i] * o.inv >= g.threshold)) o.keep &= ~(1u << k);
}

__device__ __forceinline__ bool gate_begin(gate_row &o, int64_t rows, int n, int64_t &r) {
  ESP_DYNAMIC_SMEM(float, shared);
  int warp = static_cast<int>(threadIdx.x >> 5);
  r = static_cast<int64_t>(blockIdx.x) * GATE_WARPS + warp;
  o.n = n;
  o.lane = static_cast<int>(threadIdx.x & 31);
  o.t = shared + warp * 3 * o.n;
  o.w = o.t + o.n;
  o.u = o.w + o.n;
  return r < rows; /* of a whole warp */
}

__global__ void __launch_bounds__(32 * GATE_WARPS)
    rank_gate_kernel(esp_view<void> y, esp_view<void> x, esp_gate g, int64_t rows, int n) {
  gate_row o;
  int64_t r;
  if (!gate_begin(o, rows, n, r)) return;
  gate_of(o, x, r, g);
  for (int i = o.lane, k = 0; i < o.n; i += 32, k++) {
    float v[1] = {o.keep >> k & 1u ? g.scale * o.w[i] * o.t[i] : 0.0f};
    y.store(r, i, v);
  }
}

/* See k_gate.h of the cpu. */
__global__ void __launch_bounds__(32 * GATE_WARPS)
    rank_gate_bwd_kernel(esp_view<void> dx, esp_view<void> dy, esp_view<void> x, esp_gate g, int64_t rows, int n) {
  gate_row o;
  int64_t r;
  if (!gate_begin(o, rows, n, r)) return;
  gate_of(o, x, r, g);
  float a = 0.0f, b = 0.0f;
  for (int i = o.lane, k = 0; i < o.n; i += 32, k++) {
    float v[1];
    dy.load(v, r, i);
    o.u[i] = o.keep >> k & 1u ? g.scale * v[0] : 0.0f;
    a += o.w[i] * (o.u[i] * o.t[i]);
  }
  a = warp_sum(a);
  for (int i = o.lane; i < o.n; i += 32) {
    float ds = o.w[i] / g.tau * (o.u[i] * o.t[i] - a);
    b += o.t[i] * o.inv * ds;
    o.u[i] = o.u[i] * o.w[i] + o.inv * ds;
  }
  b = warp_sum(b) * o.inv;
  for (int i = o.lane; i < o.n; i += 32) {
    float v[1] = {o.u[i] - b * (o.t[i] * o.inv)};
    dx.store(r, i, v);
  }
}

static inline dim3 gate_grid(int64_t rows) {
  return dim3(static_cast<unsigned>((rows + GATE_WARPS - 1) / GATE_WARPS));
}
static inline size_t gate_smem(int n) {
  return static_cast<size_t>(GATE_WARPS * 3 * n) * sizeof(float);
}

} // namespace

void esp_cuda_rank_gate(esp_backend *be, esp_tensor y, esp_tensor x, const esp_gate *g) {
  if (esp_idle(be, y)) return;
  int64_t rows = esp_tensor_rows(&y);
  int n = static_cast<int>(esp_tensor_cols(&x));
  ESP_LAUNCH(be, "rank_gate", rank_gate_kernel, gate_grid(rows), dim3(32 * GATE_WARPS), gate_smem(n),
             esp_view_of<void>(y), esp_view_of<void>(x), *g, rows, n);
}

void esp_cuda_rank_gate_bwd(esp_backend *be, esp_tensor dx, esp_tensor dy, esp_tensor x, const esp_gate *g) {
  if (esp_idle(be, dx)) return;
  int64_t rows = esp_tensor_rows(&dx);
  int n = static_cast<int>(esp_tensor_cols(&x));
  ESP_LAUNCH(be, "rank_gate_bwd", rank_gate_bwd_kernel, gate_grid(rows), dim3(32 * GATE_WARPS), gate_smem(n),
             esp_view_of<void>(dx), esp_view_of<void>(dy), esp_view_of<void>(x), *g, rows, n);
}
