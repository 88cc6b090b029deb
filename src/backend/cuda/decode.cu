/* decode.cu: attention of one new token per sequence against a cache ("flash decoding": the keys are split over blocks
 * and the parts combined). The grid follows from max_len alone and the lengths lie in device memory, so that a recorded
 * step can be replayed while the sequences grow; a block whose keys are not there yet, or have left the window, exits
 * at once. A block serves all query heads of a key and value head, eight at a time, so the cache is read from memory
 * once: bytes moved are those of the visible keys and values, plus (head_dim + 2) * 4 per head and chunk of keys. */
#include "backend/cuda/device.cuh"
#include "backend/cuda/need_flash.h"

namespace {

enum { THREADS = 128, VEC = 8, MAX_CHUNK = 256 };

struct decode_args {
  const void *q, *k, *v;
  void *o;
  int64_t q_ld, k_ld, v_ld, o_ld, max_len;
  const int32_t *positions;
  int heads, group, head_dim, window, chunk, splits;
  float scale, softcap;
  float *out, *stats; /* [batch, heads, splits, head_dim] and [batch, heads, splits, 2]: maximum, sum */
};

/* Keys [begin, end) that sequence b sees. */
struct decode_keys {
  int64_t begin, end;
};
__device__ __forceinline__ decode_keys decode_visible(const decode_args &p, int b) {
  decode_keys k;
  k.end = static_cast<int64_t>(p.positions[b]) + 1;
  if (k.end > p.max_len) k.end = p.max_len;
  k.begin = p.window > 0 && k.end > p.window ? k.end - p.window : 0;
  return k;
}

/* Eight elements of a row from c on, zeros past head_dim. */
template <class T, bool ALIGNED>
__device__ __forceinline__ void load_eight(float (&x)[VEC], const T *row, int c, int head_dim) {
#pragma unroll
  for (int i = 0; i < VEC; i++) x[i] = 0;
  if (ALIGNED) {
    constexpr int N = 16 / sizeof(T);
    if (c < head_dim) {
#pragma unroll
      for (int i = 0; i < VEC; i += N) {
        float part[N];
        load_vec<T, N>(part, row + c + i);
#pragma unroll
        for (int j = 0; j < N; j++) x[i + j] = part[j];
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < VEC; i++)
      if (c + i < head_dim) x[i] = to_float(row[c + i]);
  }
}

/* A team of LANES (a power of two, LANES * 8 >= head_dim) takes a row of the cache, a lane eight of its elements; the
 * teams of a block share the keys of the chunk. GROUP query heads at a time. */
template <class T, int LANES, int GROUP, bool ALIGNED>
__global__ void __launch_bounds__(THREADS) decode_kernel(decode_args p) {
  constexpr int TEAMS = THREADS / LANES;
  __shared__ float weights[GROUP][MAX_CHUNK];
  __shared__ float parts[TEAMS][GROUP][LANES * VEC];
  const int split = blockIdx.x, kvh = blockIdx.y, b = blockIdx.z;
  decode_keys keys = decode_visible(p, b);
  int64_t first = static_cast<int64_t>(split) * p.chunk, last = first + p.chunk;
  if (first < keys.begin) first = keys.begin;
  if (last > keys.end) last = keys.end;
  if (first >= last) return; /* the whole block; the second stage asks the same question */
  const int n = static_cast<int>(last - first), team = threadIdx.x / LANES, lane = threadIdx.x % LANES, c = lane * VEC;
  const int64_t row0 = b * p.max_len + first;
  const T *k = static_cast<const T *>(p.k) + row0 * p.k_ld + static_cast<int64_t>(kvh) * p.head_dim;
  const T *v = static_cast<const T *>(p.v) + row0 * p.v_ld + static_cast<int64_t>(kvh) * p.head_dim;
  const int steps = (n + TEAMS - 1) / TEAMS; /* the same for all lanes: they meet in shuffles */

  for (int g0 = 0; g0 < p.group; g0 += GROUP) {
    const int h0 = kvh * p.group + g0, heads = p.group - g0 < GROUP ? p.group - g0 : GROUP;
    float q[GROUP][VEC];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      int h = g < heads ? h0 + g : h0;
      load_eight<T, ALIGNED>(q[g], static_cast<const T *>(p.q) + b * p.q_ld + static_cast<int64_t>(h) * p.head_dim, c,
                             p.head_dim);
    }
    if (g0 > 0) __syncthreads(); /* the last heads' weights are read */
#pragma unroll 4
    for (int step = 0; step < steps; step++) {
      int j = step * TEAMS + team;
      float x[VEC] = {};
      if (j < n) load_eight<T, ALIGNED>(x, k + j * p.k_ld, c, p.head_dim);
#pragma unroll
      for (int g = 0; g < GROUP; g++) {
        float s = 0;
#pragma unroll
        for (int i = 0; i < VEC; i++) s = fmaf(q[g][i], x[i], s);
#pragma unroll
        for (int o = LANES / 2; o > 0; o >>= 1) s += __shfl_xor_sync(0xffffffffu, s, o);
        if (lane == 0 && j < n) {
          s *= p.scale;
          weights[g][j] = p.softcap > 0 ? p.softcap * tanhf(s / p.softcap) : s;
        }
      }
    }
    __syncthreads();

    /* a warp per head: its maximum, its sum, and the scores become weights */
    for (int g = threadIdx.x / 32; g < heads; g += THREADS / 32) {
      int at = threadIdx.x % 32;
      float top = -INFINITY, sum = 0;
      for (int j = at; j < n; j += 32) top = fmaxf(top, weights[g][j]);
      top = warp_max(top);
      for (int j = at; j < n; j += 32) {
        float e = expf(weights[g][j] - top);
        weights[g][j] = e;
        sum += e;
      }
      sum = warp_sum(sum);
      if (at == 0) {
        float *stat = p.stats + ((static_cast<int64_t>(b) * p.heads + h0 + g) * p.splits + split) * 2;
        stat[0] = top;
        stat[1] = sum;
      }
    }
    __syncthreads();

    float acc[GROUP][VEC];
#pragma unroll
    for (int g = 0; g < GROUP; g++)
#pragma unroll
      for (int i = 0; i < VEC; i++) acc[g][i] = 0;
#pragma unroll 4
    for (int j = team; j < n; j += TEAMS) {
      float x[VEC];
      load_eight<T, ALIGNED>(x, v + j * p.v_ld, c, p.head_dim);
#pragma unroll
      for (int g = 0; g < GROUP; g++) {
        float w = g < heads ? weights[g][j] : 0.0f;
#pragma unroll
        for (int i = 0; i < VEC; i++) acc[g][i] = fmaf(w, x[i], acc[g][i]);
      }
    }
#pragma unroll
    for (int g = 0; g < GROUP; g++)
#pragma unroll
      for (int i = 0; i < VEC; i++) parts[team][g][c + i] = acc[g][i];
    __syncthreads();
    for (int i = threadIdx.x; i < heads * LANES * VEC; i += THREADS) { /* the teams in order */
      int g = i / (LANES * VEC), e = i % (LANES * VEC);
      if (e >= p.head_dim) continue;
      float sum = 0;
#pragma unroll
      for (int t = 0; t < TEAMS; t++) sum += parts[t][g][e];
      p.out[((static_cast<int64_t>(b) * p.heads + h0 + g) * p.splits + split) * p.head_dim + e] = sum;
    }
  }
}

/* A block per (sequence, head): the chunks that have keys, in order. */
template <class T> __global__ void __launch_bounds__(THREADS) combine_kernel(decode_args p) {
  const int h = blockIdx.x, b = blockIdx.y;
  const int64_t at = (static_cast<int64_t>(b) * p.heads + h) * p.splits;
  decode_keys keys = decode_visible(p, b);
  const int begin = static_cast<int>(keys.begin / p.chunk);
  const int end = static_cast<int>((keys.end + p.chunk - 1) / p.chunk);
  const float *stats = p.stats + at * 2, *out = p.out + at * p.head_dim;
  float top = -INFINITY, sum = 0;
  for (int s = begin; s < end; s++) top = fmaxf(top, stats[2 * s]);
  for (int s = begin; s < end; s++) sum = fmaf(stats[2 * s + 1], expf(stats[2 * s] - top), sum);
  float inverse = end > begin ? 1.0f / sum : 0.0f;
  T *o = static_cast<T *>(p.o) + b * p.o_ld + static_cast<int64_t>(h) * p.head_dim;
  for (int c = threadIdx.x; c < p.head_dim; c += THREADS) {
    float acc = 0;
#pragma unroll 4
    for (int s = begin; s < end; s++)
      acc = fmaf(out[static_cast<int64_t>(s) * p.head_dim + c], expf(stats[2 * s] - top), acc);
    o[c] = from_float<T>(acc * inverse);
  }
}

/* Groups of 1, up to 4, and more (eight at a time); rows that cannot be read 16 bytes at a time are rare. */
template <class T, int LANES> void decode_group(esp_backend *be, const decode_args &p, dim3 grid) {
  auto one = decode_kernel<T, LANES, 1, true>;
  auto four = decode_kernel<T, LANES, 4, true>;
  auto eight = decode_kernel<T, LANES, 8, true>;
  auto kernel = p.group == 1 ? one : p.group <= 4 ? four : eight;
  ESP_LAUNCH(be, "decode", kernel, grid, dim3(THREADS), 0, p);
}
template <class T> void decode(esp_backend *be, const decode_args &p, int64_t batch, bool aligned) {
  dim3 grid(p.splits, p.heads / p.group, static_cast<unsigned>(batch));
  auto unaligned = decode_kernel<T, 32, 4, false>;
  if (!aligned)
    ESP_LAUNCH(be, "decode", unaligned, grid, dim3(THREADS), 0, p);
  else if (p.head_dim <= 64)
    decode_group<T, 8>(be, p, grid);
  else if (p.head_dim <= 128)
    decode_group<T, 16>(be, p, grid);
  else
    decode_group<T, 32>(be, p, grid);
  auto combine = combine_kernel<T>;
  ESP_LAUNCH(be, "decode combine", combine, dim3(p.heads, static_cast<unsigned>(batch)), dim3(THREADS), 0, p);
}

} // namespace

void esp_cuda_attn_decode(esp_backend *be, const esp_decode_args *a) {
  int64_t batch = esp_tensor_rows(&a->q);
  if (be->sticky != ESP_OK || batch == 0) return;
  const esp_tensor *t[] = {&a->q, &a->k_cache, &a->v_cache, &a->o};
  bool aligned = a->head_dim % VEC == 0;
  for (int i = 0; i < 4; i++) {
    if (t[i]->dtype != a->q.dtype || (t[i]->dtype != ESP_F32 && t[i]->dtype != ESP_BF16)) {
      esp_cuda_fail(be, "decode", "operands", "storage types differ, or are neither fp32 nor bf16");
      return;
    }
    aligned = aligned && esp_rows_aligned(t[i], 16);
  }
  if (a->head_dim > 256) {
    esp_cuda_fail(be, "decode", "operands", "head_dim above 256");
    return;
  }
  decode_args p = {};
  p.q = a->q.data;
  p.k = a->k_cache.data;
  p.v = a->v_cache.data;
  p.o = a->o.data;
  p.q_ld = a->q.ld;
  p.k_ld = a->k_cache.ld;
  p.v_ld = a->v_cache.ld;
  p.o_ld = a->o.ld;
  p.max_len = a->max_len;
  p.positions = a->positions;
  p.heads = a->heads;
  p.group = a->heads / a->kv_heads;
  p.head_dim = a->head_dim;
  p.window = a->window;
  p.chunk = esp_cuda_decode_chunk(a->max_len);
  p.splits = static_cast<int>(esp_cuda_decode_splits(a->max_len));
  p.scale = a->scale;
  p.softcap = a->softcap;
  p.out = static_cast<float *>(esp_cuda_scratch(be, esp_cuda_need_decode(a)));
  if (!p.out) return;
  p.stats = p.out + batch * p.heads * p.splits * p.head_dim;
  if (a->q.dtype == ESP_F32)
    decode<float>(be, p, batch, aligned);
  else
    decode<bf16>(be, p, batch, aligned);
}
