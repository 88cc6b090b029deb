/* flash.cu: the own attention of the CUDA backend: arguments, delta = rowsum(dO * O), and which kernels serve a shape.
 * The backward pass is two kernels, one over tiles of keys (dK, dV) and one over tiles of queries (dQ): each output is
 * summed by one block in one order, so that two runs give the same bits, for one more computation of the scores. */
#include "backend/cuda/flash.cuh"
#include "backend/cuda/need_flash.h"

namespace {

enum { DELTA_WARPS = 8 };

/* A warp per (row, head). Bytes moved: o and d_o once. */
template <class T> __global__ void __launch_bounds__(DELTA_WARPS * 32) delta_kernel(flash_args<T> p) {
  int64_t at = static_cast<int64_t>(blockIdx.x) * DELTA_WARPS + threadIdx.x / 32;
  if (at >= p.tokens * p.heads) return; /* a whole warp */
  int64_t row = at / p.heads;
  int h = static_cast<int>(at % p.heads), lane = threadIdx.x % 32;
  const T *o = p.o.data + flash_at(row, p.o.ld, h, p.head_dim),
          *g = p.d_o.data + flash_at(row, p.d_o.ld, h, p.head_dim);
  float sum = 0;
  if (p.vec) {
    constexpr int N = 16 / sizeof(T);
    for (int c = lane * N; c < p.head_dim; c += 32 * N) {
      float a[N], b[N];
      load_vec<T, N>(a, o + c);
      load_vec<T, N>(b, g + c);
#pragma unroll
      for (int i = 0; i < N; i++) sum = fmaf(a[i], b[i], sum);
    }
  } else {
    for (int c = lane; c < p.head_dim; c += 32) sum = fmaf(to_float(o[c]), to_float(g[c]), sum);
  }
  sum = warp_sum(sum);
  if (lane == 0) p.delta[at] = sum;
}

template <class T> flash_view<T> view(const esp_tensor &x) {
  flash_view<T> v = {static_cast<T *>(x.data), x.ld};
  return v;
}
bool aligned(const esp_attn_args *a, const esp_tensor &x) {
  int64_t size = static_cast<int64_t>(esp_dtype_size(x.dtype));
  return esp_rows_aligned(&x, 16) && a->head_dim * size % 16 == 0;
}

template <class T>
flash_args<T> arguments(const esp_attn_args *a, const esp_cuda_seqs *s, bool backward, float *delta) {
  flash_args<T> p = {};
  p.q = view<T>(a->q);
  p.k = view<T>(a->k);
  p.v = view<T>(a->v);
  p.o = view<T>(a->o);
  p.vec = aligned(a, a->q) && aligned(a, a->k) && aligned(a, a->v) && aligned(a, a->o);
  if (backward) {
    p.d_o = view<T>(a->d_o);
    p.d_q = view<T>(a->d_q);
    p.d_k = view<T>(a->d_k);
    p.d_v = view<T>(a->d_v);
    p.vec = p.vec && aligned(a, a->d_o) && aligned(a, a->d_q) && aligned(a, a->d_k) && aligned(a, a->d_v);
  }
  p.lse = a->lse;
  p.delta = delta;
  p.cu = s->cu;
  p.tiles = s->tiles;
  p.n = s->n;
  p.tokens = esp_tensor_rows(&a->q);
  p.heads = a->heads;
  p.group = a->heads / a->kv_heads;
  p.head_dim = a->head_dim;
  p.scale = a->scale;
  p.softcap = a->softcap;
  p.window = a->window;
  p.causal = a->causal;
  return p;
}

/* One storage type for all operands, a head that fits the tiles. */
bool takes(esp_backend *be, const esp_attn_args *a, bool backward) {
  const esp_tensor *t[] = {&a->q, &a->k, &a->v, &a->o, &a->d_o, &a->d_q, &a->d_k, &a->d_v};
  for (int i = 0; i < (backward ? 8 : 4); i++)
    if (t[i]->dtype != a->q.dtype || (t[i]->dtype != ESP_F32 && t[i]->dtype != ESP_BF16))
      return esp_cuda_fail(be, "attention", "operands", "storage types differ, or are neither fp32 nor bf16");
  if (a->head_dim > 256) return esp_cuda_fail(be, "attention", "operands", "head_dim above 256");
  return true;
}

/* Tensor cores where rows can be read 16 bytes at a time (head_dim a multiple of 8). */
void forward(esp_backend *be, const flash_args<bf16> &p, int n_tiles) {
  if (p.vec)
    flash_mma_forward(be, p, n_tiles);
  else
    flash_scalar_forward(be, p, n_tiles);
}
void backward(esp_backend *be, const flash_args<bf16> &p, int n_tiles) {
  if (p.vec)
    flash_mma_backward(be, p, n_tiles);
  else
    flash_scalar_backward(be, p, n_tiles);
}
void forward(esp_backend *be, const flash_args<float> &p, int n_tiles) {
  flash_scalar_forward(be, p, n_tiles);
}
void backward(esp_backend *be, const flash_args<float> &p, int n_tiles) {
  flash_scalar_backward(be, p, n_tiles);
}

template <class T> void flash_bwd(esp_backend *be, const esp_attn_args *a, const esp_cuda_seqs *s) {
  float *scratch = static_cast<float *>(esp_cuda_scratch(be, esp_cuda_need_flash_bwd(a)));
  if (!scratch) return;
  flash_args<T> p = arguments<T>(a, s, true, scratch);
  int64_t blocks = (p.tokens * p.heads + DELTA_WARPS - 1) / DELTA_WARPS;
  ESP_LAUNCH(be, "attention delta", delta_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(DELTA_WARPS * 32), 0, p);
  backward(be, p, s->n_tiles);
}

} // namespace

void esp_cuda_flash(esp_backend *be, const esp_attn_args *a, const esp_cuda_seqs *s) {
  if (be->sticky != ESP_OK || esp_tensor_rows(&a->q) == 0 || !takes(be, a, false)) return;
  if (a->q.dtype == ESP_F32)
    forward(be, arguments<float>(a, s, false, nullptr), s->n_tiles);
  else
    forward(be, arguments<bf16>(a, s, false, nullptr), s->n_tiles);
}

void esp_cuda_flash_bwd(esp_backend *be, const esp_attn_args *a, const esp_cuda_seqs *s) {
  if (be->sticky != ESP_OK || esp_tensor_rows(&a->q) == 0 || !takes(be, a, true)) return;
  if (a->q.dtype == ESP_F32)
    flash_bwd<float>(be, a, s);
  else
    flash_bwd<bf16>(be, a, s);
}
