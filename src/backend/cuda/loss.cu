/* loss.cu: softmax cross-entropy over rows of fp32 logits. A block owns a row: it reads it once for the maximum and the
 * sum together (online softmax, Milakov and Gimelshein, arXiv 1805.02867) and once for the gradient, in the same order
 * of threads. Bytes per element: 4 + 4 read, 2 or 4 written; the second read comes from the L2 cache as far as the rows
 * in flight fit there, which is why a large row has one block per multiprocessor and no more. */
#include "backend/cuda/device.cuh"
#include "backend/cuda/need_flash.h"
#include "backend/cuda/ptx.cuh"

namespace {

enum { PER = 16 }; /* elements of a chunk that a thread holds: four 16-byte reads in flight */

struct ce_args {
  const float *logits;
  void *d;
  int64_t logits_ld, d_ld;
  int width; /* of a row; rows may lie further apart than an int counts */
  const int32_t *targets;
  const float *weights;
  float scale, softcap;
  float *logprob;
  double *rows; /* [n, 2]: loss and hit of every row */
};

/* Where the e-th element that a thread holds of the chunk at `base` lies. Groups of four stay together when the row is
 * read 16 bytes at a time; a warp always reads and writes one run. */
template <int THREADS, bool VEC> __device__ __forceinline__ int ce_index(int base, int e) {
  return VEC ? base + (e / 4 * THREADS + static_cast<int>(threadIdx.x)) * 4 + e % 4
             : base + e * THREADS + static_cast<int>(threadIdx.x);
}
template <int THREADS, bool VEC>
__device__ __forceinline__ void ce_load(float (&x)[PER], const float *row, int base, int width) {
#pragma unroll
  for (int e = 0; e < PER; e += 4) {
    int j = ce_index<THREADS, VEC>(base, e);
    if (VEC && j + 4 <= width) {
      float4 v = *reinterpret_cast<const float4 *>(row + j);
      x[e] = v.x;
      x[e + 1] = v.y;
      x[e + 2] = v.z;
      x[e + 3] = v.w;
    } else {
#pragma unroll
      for (int i = e; i < e + 4; i++) {
        int at = ce_index<THREADS, VEC>(base, i);
        x[i] = at < width ? row[at] : -INFINITY;
      }
    }
  }
}
__device__ __forceinline__ float ce_capped(float x, float cap) {
  return cap > 0 ? cap * tanhf(x / cap) : x;
}

/* What lies past the end of the row stays -inf: such an element is never a maximum and adds nothing to a sum. A logit
 * of -inf that is there becomes -cap. */
template <int THREADS, bool VEC>
__device__ __forceinline__ void ce_cap(float (&x)[PER], float cap, int base, int width) {
#pragma unroll
  for (int e = 0; e < PER; e++)
    if (ce_index<THREADS, VEC>(base, e) < width) x[e] = ce_capped(x[e], cap);
}
/* e^x for x <= 0, to 2e-6 of itself where it is above 1e-12 */
__device__ __forceinline__ float ce_exp(float x) {
  return fast_exp2(x * 1.4426950408889634f);
}

/* What a block knows of its row between the two readings. */
struct ce_row {
  float lse, d_target;
};

template <class D, int THREADS, bool VEC>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS) ce_kernel(ce_args a) {
  constexpr int CHUNK = THREADS * PER, WARPS = THREADS / 32;
  __shared__ float part_best[WARPS], part_sum[WARPS];
  __shared__ int part_above[WARPS];
  __shared__ ce_row known;
  const int64_t r = blockIdx.x;
  const float *row = a.logits + r * a.logits_ld;
  const int target = a.targets[r];
  const float raw_target = row[target], cap = a.softcap;

  float best = -INFINITY, sum = 0; /* of this thread, at most 300 elements of a row of 300k */
  int above = 0;                   /* is there a larger logit, or an equal one before the target? */
  for (int base = 0; base < a.width; base += CHUNK) {
    float x[PER];
    ce_load<THREADS, VEC>(x, row, base, a.width);
    float top = best;
#pragma unroll
    for (int e = 0; e < PER; e++)
      above |= x[e] > raw_target || (x[e] == raw_target && ce_index<THREADS, VEC>(base, e) < target);
    if (cap > 0) ce_cap<THREADS, VEC>(x, cap, base, a.width);
#pragma unroll
    for (int e = 0; e < PER; e++) top = fmaxf(top, x[e]);
    if (top == -INFINITY) continue; /* nothing of this chunk, or only impossible tokens so far */
    sum *= ce_exp(best - top);
    best = top;
#pragma unroll
    for (int e = 0; e < PER; e++) sum += ce_exp(x[e] - top);
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float warp_best = warp_max(best);
  sum = warp_sum(best > -INFINITY ? sum * expf(best - warp_best) : 0.0f);
  above = __any_sync(0xffffffffu, above);
  if (lane == 0) {
    part_best[warp] = warp_best;
    part_sum[warp] = sum;
    part_above[warp] = above;
  }
  __syncthreads();
  const float weight = a.weights[r], w = a.scale * weight;
  if (warp == 0) { /* fp64 is slow on many devices: one warp, and one thread for what is left */
    float part = lane < WARPS ? part_best[lane] : -INFINITY;
    best = warp_max(part);
    double total = part > -INFINITY ? static_cast<double>(part_sum[lane]) * expf(part - best) : 0.0;
    total = warp_sum(total);
    above = __any_sync(0xffffffffu, lane < WARPS && part_above[lane]);
    if (lane == 0) {
      const float xt = ce_capped(raw_target, cap);
      const double lse = static_cast<double>(best) + log(total), loss = lse - static_cast<double>(xt);
      if (a.logprob) a.logprob[r] = static_cast<float>(-loss);
      a.rows[2 * r] = static_cast<double>(weight) * loss;
      a.rows[2 * r + 1] = above ? 0.0 : 1.0;
      /* the target's element from the probability in fp64, so that the difference is rounded once */
      double y = cap > 0 ? static_cast<double>(xt) / cap : 0.0;
      known.d_target = static_cast<float>(w * (exp(-loss) - 1) * (1 - y * y));
      known.lse = static_cast<float>(lse);
    }
  }
  if (!a.d) return;

  /* The row of d may begin where its row of logits begins. With elements of at most 4 bytes, chunk c of d then lies
   * over logits before the end of chunk c: they are all read before the barrier, and the next chunk, which is read
   * ahead, is not yet covered. */
  D *d = static_cast<D *>(a.d) + r * a.d_ld;
  __syncthreads();
  const float l = known.lse, d_target = known.d_target;
  float x[PER], next[PER];
  ce_load<THREADS, VEC>(x, row, 0, a.width);
  for (int base = 0; base < a.width; base += CHUNK) {
    if (base + CHUNK < a.width) ce_load<THREADS, VEC>(next, row, base + CHUNK, a.width);
    __syncthreads();
    if (cap > 0) {
      ce_cap<THREADS, VEC>(x, cap, base, a.width);
#pragma unroll
      for (int e = 0; e < PER; e++) {
        float y = x[e] / cap;
        x[e] = w * ce_exp(x[e] - l) * (1.0f - y * y);
      }
    } else {
#pragma unroll
      for (int e = 0; e < PER; e++) x[e] = w * ce_exp(x[e] - l);
    }
#pragma unroll
    for (int e = 0; e < PER; e++)
      if (ce_index<THREADS, VEC>(base, e) == target) x[e] = d_target;
#pragma unroll
    for (int e = 0; e < PER; e += 4) {
      int j = ce_index<THREADS, VEC>(base, e);
      if (VEC && j + 4 <= a.width) {
        float four[4] = {x[e], x[e + 1], x[e + 2], x[e + 3]};
        store_vec<D, 4>(d + j, four);
      } else {
#pragma unroll
        for (int i = e; i < e + 4; i++) {
          int at = ce_index<THREADS, VEC>(base, i);
          if (at < a.width) d[at] = from_float<D>(x[i]);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < PER; e++) x[e] = next[e];
  }
}

enum { SUM_THREADS = 256 };
/* One block: thread t sums rows t, t + 256, ... and the threads are summed in order. */
__global__ void __launch_bounds__(SUM_THREADS) loss_sum_kernel(const double *rows, int64_t n, double *sums) {
  __shared__ double part[2][SUM_THREADS / 32];
  double loss = 0, hits = 0;
  for (int64_t r = threadIdx.x; r < n; r += SUM_THREADS) {
    loss += rows[2 * r];
    hits += rows[2 * r + 1];
  }
  loss = block_sum(loss, part[0]);
  hits = block_sum(hits, part[1]);
  if (threadIdx.x == 0) {
    sums[0] += loss;
    sums[1] += hits;
  }
}

template <class D> void ce_rows(esp_backend *be, const ce_args &p, int64_t n, bool vec) {
  dim3 grid(static_cast<unsigned>(n));
  if (p.width > 8192) {
    auto wide = vec ? ce_kernel<D, 1024, true> : ce_kernel<D, 1024, false>;
    ESP_LAUNCH(be, "cross entropy", wide, grid, dim3(1024), 0, p);
  } else {
    auto narrow = vec ? ce_kernel<D, 128, true> : ce_kernel<D, 128, false>;
    ESP_LAUNCH(be, "cross entropy", narrow, grid, dim3(128), 0, p);
  }
}

} // namespace

void esp_cuda_cross_entropy(esp_backend *be, const esp_ce_args *a) {
  int64_t n = esp_tensor_rows(&a->logits);
  if (be->sticky != ESP_OK || n == 0) return;
  ce_args p = {};
  p.logits = static_cast<const float *>(a->logits.data);
  p.logits_ld = a->logits.ld;
  p.width = static_cast<int>(esp_tensor_cols(&a->logits));
  p.d = a->d.data;
  p.d_ld = a->d.ld;
  p.targets = a->targets;
  p.weights = a->weights;
  p.scale = a->scale;
  p.softcap = a->softcap;
  p.logprob = a->logprob;
  p.rows = static_cast<double *>(esp_cuda_scratch(be, esp_cuda_need_loss_rows(&a->logits)));
  if (!p.rows) return;
  bool vec = reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 && p.logits_ld % 4 == 0;
  if (p.d && (reinterpret_cast<uintptr_t>(p.d) % 16 != 0 || p.d_ld % 4 != 0)) vec = false;
  if (p.d && a->d.dtype == ESP_BF16)
    ce_rows<bf16>(be, p, n, vec);
  else
    ce_rows<float>(be, p, n, vec);
  esp_cuda_sum_losses(be, p.rows, n, a->sums);
}

void esp_cuda_sum_losses(esp_backend *be, const double *rows, int64_t n, double *sums) {
  ESP_LAUNCH(be, "sum of losses", loss_sum_kernel, dim3(1), dim3(SUM_THREADS), 0, rows, n, sums);
}
