/* flash_scalar.cu: exact attention in fp32 arithmetic for every head size and layout (FlashAttention-2, arXiv
 * 2307.08691). It serves fp32 and the odd shapes that tensor cores do not, and is what the tensor core kernels are
 * compared with.
 *
 * All three kernels are made of the same two products over tiles in shared memory: a tile of R "rows" that the block
 * owns (queries, or keys in the kernel of dK and dV) against tiles of R "columns" that it walks through. 128 threads
 * are 8 groups of 16 lanes; a group owns R/8 rows, its lanes share the columns of the scores and the elements of the
 * head. So a row never leaves its half-warp: maxima and sums are shuffles, and scores are handed from the first product
 * to the second within one warp. Bound by fp32 multiply-adds: four per 1.5 16-byte reads of shared memory. */
#include "backend/cuda/flash.cuh"

namespace {

enum { THREADS = 128, LANES = 16, GROUPS = 8 };

/* Shape of a kernel: heads padded to DP elements (64, 128 or 256), tiles of R rows. At DP = 256 half as many rows keep
 * the accumulators in registers and the tiles within the 99 KiB that every device has. */
template <int DP> struct shape {
  enum { R = DP == 256 ? 16 : 32, RPT = R / GROUPS, CPT = R / LANES, LD = DP + 4, LDS = R + 4, TILE = R * LD };
  enum { SUB = ESP_FLASH_TILE / R }; /* blocks of one tile of esp_cuda_seqs */
};

/* Rows [row, row + rows) of head h as fp32 [R, DP], zeros past the last row and past head_dim. */
template <int DP, class T>
__device__ void load_tile(float *dst, const flash_args<T> &p, const flash_view<T> &x, int64_t row, int rows, int h) {
  typedef shape<DP> S;
  if (p.vec) {
    constexpr int N = 16 / sizeof(T), PER_ROW = DP / N;
    for (int i = threadIdx.x; i < S::R * PER_ROW; i += THREADS) {
      int r = i / PER_ROW, c = i % PER_ROW * N;
      float v[N] = {};
      if (r < rows && c < p.head_dim) load_vec<T, N>(v, x.data + flash_at(row + r, x.ld, h, p.head_dim) + c);
#pragma unroll
      for (int e = 0; e < N; e++) dst[r * S::LD + c + e] = v[e];
    }
  } else {
    for (int i = threadIdx.x; i < S::R * DP; i += THREADS) {
      int r = i / DP, c = i % DP;
      float v = 0;
      if (r < rows && c < p.head_dim) v = to_float(x.data[flash_at(row + r, x.ld, h, p.head_dim) + c]);
      dst[r * S::LD + c] = v;
    }
  }
}

/* s[i][j] = <row i of this group, column lane + 16 j> over the first n (a multiple of 4) elements. */
template <int DP>
__device__ __forceinline__ void scores(float (&s)[shape<DP>::RPT][shape<DP>::CPT], const float *rows, const float *cols,
                                       int lane, int n) {
  typedef shape<DP> S;
#pragma unroll
  for (int i = 0; i < S::RPT; i++)
#pragma unroll
    for (int j = 0; j < S::CPT; j++) s[i][j] = 0;
  for (int d = 0; d < n; d += 4) {
    float4 b[S::CPT];
#pragma unroll
    for (int j = 0; j < S::CPT; j++) b[j] = *reinterpret_cast<const float4 *>(cols + (lane + LANES * j) * S::LD + d);
#pragma unroll
    for (int i = 0; i < S::RPT; i++) {
      float4 a = *reinterpret_cast<const float4 *>(rows + i * S::LD + d);
#pragma unroll
      for (int j = 0; j < S::CPT; j++) {
        s[i][j] = fmaf(a.x, b[j].x, s[i][j]);
        s[i][j] = fmaf(a.y, b[j].y, s[i][j]);
        s[i][j] = fmaf(a.z, b[j].z, s[i][j]);
        s[i][j] = fmaf(a.w, b[j].w, s[i][j]);
      }
    }
  }
}

__device__ __forceinline__ void add_scaled(float (&acc)[4], float a, const float4 &b) {
  acc[0] = fmaf(a, b.x, acc[0]);
  acc[1] = fmaf(a, b.y, acc[1]);
  acc[2] = fmaf(a, b.z, acc[2]);
  acc[3] = fmaf(a, b.w, acc[3]);
}
/* acc[i][e] += sum over the R columns c of s[row i][c] * cols[c][4 lane + 64 e ..]. */
template <int DP>
__device__ __forceinline__ void accumulate(float (&acc)[shape<DP>::RPT][DP / 64][4], const float *s, const float *cols,
                                           int lane) {
  typedef shape<DP> S;
  for (int c = 0; c < S::R; c += 4) {
    float4 a[S::RPT];
#pragma unroll
    for (int i = 0; i < S::RPT; i++) a[i] = *reinterpret_cast<const float4 *>(s + i * S::LDS + c);
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
      for (int e = 0; e < DP / 64; e++) {
        float4 b = *reinterpret_cast<const float4 *>(cols + (c + k) * S::LD + 4 * lane + 64 * e);
#pragma unroll
        for (int i = 0; i < S::RPT; i++)
          add_scaled(acc[i][e], k == 0 ? a[i].x : k == 1 ? a[i].y : k == 2 ? a[i].z : a[i].w, b);
      }
  }
}

template <int DP, class T>
__device__ __forceinline__ void store_rows(const flash_args<T> &p, const flash_view<T> &x, int64_t row, int rows, int h,
                                           int lane, const float (&acc)[shape<DP>::RPT][DP / 64][4]) {
#pragma unroll
  for (int i = 0; i < shape<DP>::RPT; i++) {
    if (i >= rows) continue;
    T *dst = x.data + flash_at(row + i, x.ld, h, p.head_dim);
#pragma unroll
    for (int e = 0; e < DP / 64; e++) {
      int c = 4 * lane + 64 * e;
      if (p.vec) {
        if (c < p.head_dim) store_vec<T, 4>(dst + c, acc[i][e]);
      } else {
#pragma unroll
        for (int k = 0; k < 4; k++)
          if (c + k < p.head_dim) dst[c + k] = from_float<T>(acc[i][e][k]);
      }
    }
  }
}

template <int N, int E> __device__ __forceinline__ void clear(float (&acc)[N][E][4]) {
#pragma unroll
  for (int i = 0; i < N; i++)
#pragma unroll
    for (int e = 0; e < E; e++)
#pragma unroll
      for (int k = 0; k < 4; k++) acc[i][e][k] = 0;
}

/* Over the 16 lanes that share a row; all get the result. */
__device__ __forceinline__ float lanes_max(float v) {
#pragma unroll
  for (int o = LANES / 2; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}
__device__ __forceinline__ float lanes_sum(float v) {
#pragma unroll
  for (int o = LANES / 2; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

template <class T> __device__ __forceinline__ float capped(const flash_args<T> &p, float s) {
  return p.softcap > 0 ? p.softcap * tanhf(s / p.softcap) : s;
}
/* Which rows this block owns. `late` first: under a causal mask the last queries of a sequence have the most keys. */
template <int DP, class T> __device__ __forceinline__ bool owned(const flash_args<T> &p, bool late, flash_tile *t) {
  typedef shape<DP> S;
  int block = late ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  if (!flash_find(p, block / S::SUB, t)) return false;
  t->first += block % S::SUB * S::R;
  return t->first < t->len;
}

template <int DP, class T> __global__ void __launch_bounds__(THREADS) forward_kernel(flash_args<T> p) {
  typedef shape<DP> S;
  ESP_DYNAMIC_SMEM(float, smem);
  float *q = smem, *k = q + S::TILE, *v = k + S::TILE, *ps = v + S::TILE;
  flash_tile t;
  if (!owned<DP>(p, true, &t)) return;
  const int h = blockIdx.y, kvh = h / p.group, lane = threadIdx.x % LANES, r0 = threadIdx.x / LANES * S::RPT;
  const int d4 = (p.head_dim + 3) / 4 * 4, i0 = t.first + r0;
  load_tile<DP>(q, p, p.q, t.row0 + t.first, t.len - t.first, h);
  float acc[S::RPT][DP / 64][4], m[S::RPT], l[S::RPT];
  clear(acc);
#pragma unroll
  for (int i = 0; i < S::RPT; i++) m[i] = -1e30f, l[i] = 0; /* finite: a wholly hidden tile leaves no NaN */
  flash_range keys = flash_keys(p, t.first, S::R, t.len, S::R);
  for (int j0 = keys.begin; j0 < keys.end; j0 += S::R) {
    __syncthreads();
    load_tile<DP>(k, p, p.k, t.row0 + j0, t.len - j0, kvh);
    load_tile<DP>(v, p, p.v, t.row0 + j0, t.len - j0, kvh);
    __syncthreads();
    float s[S::RPT][S::CPT];
    scores<DP>(s, q + r0 * S::LD, k, lane, d4);
#pragma unroll
    for (int i = 0; i < S::RPT; i++) {
      float top = m[i];
#pragma unroll
      for (int j = 0; j < S::CPT; j++) {
        s[i][j] = capped(p, s[i][j] * p.scale);
        if (!flash_sees(p, i0 + i, j0 + lane + LANES * j, t.len)) s[i][j] = -INFINITY;
        top = fmaxf(top, s[i][j]);
      }
      top = lanes_max(top);
      float fade = expf(m[i] - top), sum = 0;
#pragma unroll
      for (int j = 0; j < S::CPT; j++) {
        float e = expf(s[i][j] - top);
        ps[(r0 + i) * S::LDS + lane + LANES * j] = e;
        sum += e;
      }
      l[i] = fmaf(l[i], fade, lanes_sum(sum));
      m[i] = top;
#pragma unroll
      for (int e = 0; e < DP / 64; e++)
#pragma unroll
        for (int c = 0; c < 4; c++) acc[i][e][c] *= fade;
    }
    __syncwarp();
    accumulate<DP>(acc, ps + r0 * S::LDS, v, lane);
  }
#pragma unroll
  for (int i = 0; i < S::RPT; i++) {
    float inverse = 1.0f / l[i];
#pragma unroll
    for (int e = 0; e < DP / 64; e++)
#pragma unroll
      for (int c = 0; c < 4; c++) acc[i][e][c] *= inverse;
    if (p.lse && lane == 0 && i0 + i < t.len)
      p.lse[(static_cast<int64_t>(t.row0) + i0 + i) * p.heads + h] = m[i] + logf(l[i]);
  }
  store_rows<DP>(p, p.o, t.row0 + i0, t.len - i0, h, lane, acc);
}

/* P and dS = P (dP - delta) scale of one pair, from its score and dP; both 0 where the key is hidden. */
template <class T>
__device__ __forceinline__ void grads(const flash_args<T> &p, float &s, float &dp, float lse, float delta, bool sees) {
  float x = capped(p, s * p.scale), slope = p.scale;
  if (p.softcap > 0) { /* d capped / d s = 1 - (capped / cap)^2 */
    float y = x / p.softcap;
    slope *= 1.0f - y * y;
  }
  s = sees ? expf(x - lse) : 0.0f;
  dp = s * (dp - delta) * slope;
}

/* dK, dV of R keys of one key and value head, over its query heads in their order and over their queries in theirs. */
template <int DP, class T> __global__ void __launch_bounds__(THREADS) dkv_kernel(flash_args<T> p) {
  typedef shape<DP> S;
  ESP_DYNAMIC_SMEM(float, smem);
  float *k = smem, *v = k + S::TILE, *q = v + S::TILE, *g = q + S::TILE, *ps = g + S::TILE, *ds = ps + S::R * S::LDS;
  flash_tile t;
  if (!owned<DP>(p, false, &t)) return;
  const int kvh = blockIdx.y, lane = threadIdx.x % LANES, r0 = threadIdx.x / LANES * S::RPT;
  const int d4 = (p.head_dim + 3) / 4 * 4, k0 = t.first + r0;
  load_tile<DP>(k, p, p.k, t.row0 + t.first, t.len - t.first, kvh);
  load_tile<DP>(v, p, p.v, t.row0 + t.first, t.len - t.first, kvh);
  float dk[S::RPT][DP / 64][4], dv[S::RPT][DP / 64][4];
  clear(dk);
  clear(dv);
  flash_range queries = flash_queries(p, t.first, S::R, t.len, S::R);
  for (int h = kvh * p.group; h < (kvh + 1) * p.group; h++)
    for (int i0 = queries.begin; i0 < queries.end; i0 += S::R) {
      __syncthreads();
      load_tile<DP>(q, p, p.q, t.row0 + i0, t.len - i0, h);
      load_tile<DP>(g, p, p.d_o, t.row0 + i0, t.len - i0, h);
      __syncthreads();
      float s[S::RPT][S::CPT], dp[S::RPT][S::CPT];
      scores<DP>(s, k + r0 * S::LD, q, lane, d4);
      scores<DP>(dp, v + r0 * S::LD, g, lane, d4);
#pragma unroll
      for (int j = 0; j < S::CPT; j++) {
        int i = i0 + lane + LANES * j;
        int64_t at = (static_cast<int64_t>(t.row0) + i) * p.heads + h;
        float lse = i < t.len ? p.lse[at] : 0.0f, delta = i < t.len ? p.delta[at] : 0.0f;
#pragma unroll
        for (int r = 0; r < S::RPT; r++) {
          grads(p, s[r][j], dp[r][j], lse, delta, flash_sees(p, i, k0 + r, t.len));
          ps[(r0 + r) * S::LDS + lane + LANES * j] = s[r][j];
          ds[(r0 + r) * S::LDS + lane + LANES * j] = dp[r][j];
        }
      }
      __syncwarp();
      accumulate<DP>(dv, ps + r0 * S::LDS, g, lane);
      accumulate<DP>(dk, ds + r0 * S::LDS, q, lane);
    }
  store_rows<DP>(p, p.d_k, t.row0 + k0, t.len - k0, kvh, lane, dk);
  store_rows<DP>(p, p.d_v, t.row0 + k0, t.len - k0, kvh, lane, dv);
}

template <int DP, class T> __global__ void __launch_bounds__(THREADS) dq_kernel(flash_args<T> p) {
  typedef shape<DP> S;
  ESP_DYNAMIC_SMEM(float, smem);
  float *q = smem, *g = q + S::TILE, *k = g + S::TILE, *v = k + S::TILE, *ds = v + S::TILE;
  flash_tile t;
  if (!owned<DP>(p, true, &t)) return;
  const int h = blockIdx.y, kvh = h / p.group, lane = threadIdx.x % LANES, r0 = threadIdx.x / LANES * S::RPT;
  const int d4 = (p.head_dim + 3) / 4 * 4, i0 = t.first + r0;
  load_tile<DP>(q, p, p.q, t.row0 + t.first, t.len - t.first, h);
  load_tile<DP>(g, p, p.d_o, t.row0 + t.first, t.len - t.first, h);
  float dq[S::RPT][DP / 64][4], lse[S::RPT], delta[S::RPT];
  clear(dq);
#pragma unroll
  for (int i = 0; i < S::RPT; i++) {
    int64_t at = (static_cast<int64_t>(t.row0) + i0 + i) * p.heads + h;
    lse[i] = i0 + i < t.len ? p.lse[at] : 0.0f;
    delta[i] = i0 + i < t.len ? p.delta[at] : 0.0f;
  }
  flash_range keys = flash_keys(p, t.first, S::R, t.len, S::R);
  for (int j0 = keys.begin; j0 < keys.end; j0 += S::R) {
    __syncthreads();
    load_tile<DP>(k, p, p.k, t.row0 + j0, t.len - j0, kvh);
    load_tile<DP>(v, p, p.v, t.row0 + j0, t.len - j0, kvh);
    __syncthreads();
    float s[S::RPT][S::CPT], dp[S::RPT][S::CPT];
    scores<DP>(s, q + r0 * S::LD, k, lane, d4);
    scores<DP>(dp, g + r0 * S::LD, v, lane, d4);
#pragma unroll
    for (int i = 0; i < S::RPT; i++)
#pragma unroll
      for (int j = 0; j < S::CPT; j++) {
        grads(p, s[i][j], dp[i][j], lse[i], delta[i], flash_sees(p, i0 + i, j0 + lane + LANES * j, t.len));
        ds[(r0 + i) * S::LDS + lane + LANES * j] = dp[i][j];
      }
    __syncwarp();
    accumulate<DP>(dq, ds + r0 * S::LDS, k, lane);
  }
  store_rows<DP>(p, p.d_q, t.row0 + i0, t.len - i0, h, lane, dq);
}

template <int DP, class T> void forward(esp_backend *be, const flash_args<T> &p, int n_tiles) {
  typedef shape<DP> S;
  auto kernel = forward_kernel<DP, T>;
  size_t smem = (3 * S::TILE + S::R * S::LDS) * sizeof(float);
  if (!esp_allow_smem(be, kernel, smem)) return;
  ESP_LAUNCH(be, "attention", kernel, dim3(n_tiles * S::SUB, p.heads), dim3(THREADS), smem, p);
}
template <int DP, class T> void backward(esp_backend *be, const flash_args<T> &p, int n_tiles) {
  typedef shape<DP> S;
  auto dkv = dkv_kernel<DP, T>;
  auto dq = dq_kernel<DP, T>;
  size_t dkv_smem = (4 * S::TILE + 2 * S::R * S::LDS) * sizeof(float);
  size_t dq_smem = (4 * S::TILE + S::R * S::LDS) * sizeof(float);
  if (!esp_allow_smem(be, dkv, dkv_smem) || !esp_allow_smem(be, dq, dq_smem)) return;
  ESP_LAUNCH(be, "attention dK dV", dkv, dim3(n_tiles * S::SUB, p.heads / p.group), dim3(THREADS), dkv_smem, p);
  ESP_LAUNCH(be, "attention dQ", dq, dim3(n_tiles * S::SUB, p.heads), dim3(THREADS), dq_smem, p);
}

} // namespace

template <class T> void flash_scalar_forward(esp_backend *be, const flash_args<T> &p, int n_tiles) {
  if (p.head_dim <= 64)
    forward<64>(be, p, n_tiles);
  else if (p.head_dim <= 128)
    forward<128>(be, p, n_tiles);
  else
    forward<256>(be, p, n_tiles);
}
template <class T> void flash_scalar_backward(esp_backend *be, const flash_args<T> &p, int n_tiles) {
  if (p.head_dim <= 64)
    backward<64>(be, p, n_tiles);
  else if (p.head_dim <= 128)
    backward<128>(be, p, n_tiles);
  else
    backward<256>(be, p, n_tiles);
}
template void flash_scalar_forward<float>(esp_backend *be, const flash_args<float> &p, int n_tiles);
template void flash_scalar_forward<bf16>(esp_backend *be, const flash_args<bf16> &p, int n_tiles);
template void flash_scalar_backward<float>(esp_backend *be, const flash_args<float> &p, int n_tiles);
template void flash_scalar_backward<bf16>(esp_backend *be, const flash_args<bf16> &p, int n_tiles);
