/* flash_mma_bwd.cu: the backward pass of attention on tensor cores: dS = P (dP - delta) with P from the saved lse, then
 * dV = P^T dO and dK = dS^T Q by tiles of keys, dQ = dS K by tiles of queries. The kernel of dK and dV computes the
 * transposed scores K Q^T, so that P^T and dS^T are operands without leaving their registers. Both are bound as the
 * forward pass is; together 7 products per visible pair where one kernel with unordered sums would need 5. */
#include "backend/cuda/flash_mma.cuh"

using namespace flash_mma;

namespace {

enum { ROWS = ESP_FLASH_TILE, WARP_ROWS = 16 };

/* Heads above 128: twice the warps, each with half of a row's dK and dV in its registers (and the same scores). */
template <int DP> struct dkv_shape {
  enum { SPLIT = DP > 128 ? 2 : 1, THREADS = 128 * SPLIT, ND = DP / 8 / SPLIT };
};

/* s and dp = dO V^T of one tile become P and dS / scale; 0 where the key is hidden. The lane's first pair is query i
 * and key j; queries are the rows of the tile, or its columns. lse and delta are read at the place of the query among
 * the lane's: 0 and 1 for its two rows, 8 n and 8 n + 1 for its columns. */
template <bool QUERIES_ARE_ROWS, int NB>
__device__ __forceinline__ void tile_grads(const flash_args<bf16> &p, float (&s)[NB][4], float (&dp)[NB][4],
                                           const float *lse, const float *delta, int i, int j, int len, bool all) {
  const float unit = logit_unit(p);
  if (p.softcap > 0)
#pragma unroll
    for (int n = 0; n < NB; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) { /* d capped / d s = 1 - (capped / cap)^2 */
        float y = tanhf(s[n][e] * p.scale / p.softcap),
              grad = dp[n][e] - delta[QUERIES_ARE_ROWS ? e / 2 : 8 * n + e % 2];
        s[n][e] = p.softcap * y;
        dp[n][e] = grad * (1.0f - y * y);
      }
  else
#pragma unroll
    for (int n = 0; n < NB; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) dp[n][e] -= delta[QUERIES_ARE_ROWS ? e / 2 : 8 * n + e % 2];
#pragma unroll
  for (int n = 0; n < NB; n++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      s[n][e] = fast_exp2(fmaf(s[n][e], unit, -FLASH_LOG2E * lse[QUERIES_ARE_ROWS ? e / 2 : 8 * n + e % 2]));
  if (!all)
#pragma unroll
    for (int n = 0; n < NB; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        int row = e / 2 * 8, col = 8 * n + e % 2;
        if (!flash_sees(p, i + (QUERIES_ARE_ROWS ? row : col), j + (QUERIES_ARE_ROWS ? col : row), len)) s[n][e] = 0;
      }
#pragma unroll
  for (int n = 0; n < NB; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) dp[n][e] *= s[n][e];
}

template <int DP, int COLS, int STAGES>
__global__ void __launch_bounds__(dkv_shape<DP>::THREADS, dkv_shape<DP>::SPLIT == 1 ? 2 : 1)
    dkv_kernel(flash_args<bf16> p) {
  constexpr int LD = flash_ld<DP>::value, NB = COLS / 8, ND = dkv_shape<DP>::ND, THREADS = dkv_shape<DP>::THREADS;
  constexpr int STAGE = 2 * COLS * LD + 4 * COLS; /* Q, dO, and COLS fp32 lse and delta */
  ESP_DYNAMIC_SMEM(bf16, smem);
  bf16 *k = smem, *v = k + ROWS * LD, *stages = v + ROWS * LD;
  flash_tile t;
  if (!flash_find(p, blockIdx.x, &t)) return;
  const int kvh = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp / 4;
  const int own = warp % 4 * WARP_ROWS, k0 = t.first + own, mine = k0 + lane / 4, c0 = part * ND * 8;
  flash_range queries = flash_queries(p, t.first, ROWS, t.len, COLS);
  const int per_head = (queries.end - queries.begin + COLS - 1) / COLS, rounds = per_head * p.group;

  /* round r: the query heads in order, each over its queries in order */
  auto load = [&](int r, bf16 *to) {
    int h = kvh * p.group + r / per_head, i0 = queries.begin + r % per_head * COLS;
    int64_t row = static_cast<int64_t>(t.row0) + i0;
    load_tile<DP, COLS, THREADS>(to, p, p.q, row, t.len - i0, h);
    load_tile<DP, COLS, THREADS>(to + COLS * LD, p, p.d_o, row, t.len - i0, h);
    float *stats = reinterpret_cast<float *>(to + 2 * COLS * LD);
    for (int c = threadIdx.x; c < 2 * COLS; c += THREADS) {
      const float *from = c < COLS ? p.lse : p.delta;
      bool valid = i0 + c % COLS < t.len;
      copy_async4(stats + c, valid ? from + (row + c % COLS) * p.heads + h : from, valid);
    }
  };
  load_tile<DP, ROWS, THREADS>(k, p, p.k, static_cast<int64_t>(t.row0) + t.first, t.len - t.first, kvh);
  load_tile<DP, ROWS, THREADS>(v, p, p.v, static_cast<int64_t>(t.row0) + t.first, t.len - t.first, kvh);
  if (STAGES == 2) load(0, stages);
  copy_async_commit();

  float dk[1][ND][4], dv[1][ND][4];
  clear(dk);
  clear(dv);
  for (int r = 0; r < rounds; r++) {
    bf16 *q = stages + (STAGES == 2 ? r % 2 * STAGE : 0), *g = q + COLS * LD;
    const float *lse = reinterpret_cast<const float *>(g + COLS * LD), *delta = lse + COLS;
    if (STAGES == 1) load(r, q);
    if (STAGES == 2 && r + 1 < rounds) load(r + 1, stages + (r + 1) % 2 * STAGE);
    copy_async_commit();
    copy_async_wait<STAGES - 1>();
    __syncthreads();

    const int i0 = queries.begin + r % per_head * COLS;
    if (!flash_sees_none(p, i0, COLS, k0, WARP_ROWS, t.len)) { /* the same for all lanes */
      float s[1][NB][4], dp[1][NB][4];
      score_tile<DP>(s, k + own * LD, q, lane);
      score_tile<DP>(dp, v + own * LD, g, lane);
      const bool all = flash_sees_all(p, i0, COLS, k0, WARP_ROWS, t.len);
      const int c = lane % 4 * 2;
      tile_grads<false>(p, s[0], dp[0], lse + c, delta + c, i0 + c, mine, t.len, all);
      add_product<DP>(dv, s, g + c0, lane);
      add_product<DP>(dk, dp, q + c0, lane);
    }
    __syncthreads();
  }
  copy_async_wait<0>();
  __syncthreads();
  multiply(dk, p.scale);
  /* a warp's rows and columns of K and V are its own now */
  const int64_t row = static_cast<int64_t>(t.row0) + k0;
  store_tile<DP>(p, p.d_k, row, t.len - k0, kvh, c0, dk, k + own * LD + c0, lane);
  store_tile<DP>(p, p.d_v, row, t.len - k0, kvh, c0, dv, v + own * LD + c0, lane);
}

template <int DP, int COLS, int STAGES> __global__ void __launch_bounds__(128, 2) dq_kernel(flash_args<bf16> p) {
  constexpr int LD = flash_ld<DP>::value, NB = COLS / 8, ND = DP / 8, THREADS = 128, STAGE = 2 * COLS * LD;
  ESP_DYNAMIC_SMEM(bf16, smem);
  bf16 *q = smem, *g = q + ROWS * LD, *stages = g + ROWS * LD;
  flash_tile t;
  if (!flash_find(p, gridDim.x - 1 - blockIdx.x, &t)) return;
  const int h = blockIdx.y, kvh = h / p.group, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int own = warp * WARP_ROWS, i0 = t.first + own, mine = i0 + lane / 4;
  const int64_t row = static_cast<int64_t>(t.row0) + i0;
  flash_range keys = flash_keys(p, t.first, ROWS, t.len, COLS);

  auto load = [&](int j0, bf16 *to) {
    load_tile<DP, COLS, THREADS>(to, p, p.k, static_cast<int64_t>(t.row0) + j0, t.len - j0, kvh);
    load_tile<DP, COLS, THREADS>(to + COLS * LD, p, p.v, static_cast<int64_t>(t.row0) + j0, t.len - j0, kvh);
  };
  load_tile<DP, ROWS, THREADS>(q, p, p.q, static_cast<int64_t>(t.row0) + t.first, t.len - t.first, h);
  load_tile<DP, ROWS, THREADS>(g, p, p.d_o, static_cast<int64_t>(t.row0) + t.first, t.len - t.first, h);
  if (STAGES == 2) load(keys.begin, stages);
  copy_async_commit();

  float lse[2], delta[2], dq[1][ND][4];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int64_t at = (row + lane / 4 + r * 8) * p.heads + h;
    bool valid = mine + r * 8 < t.len;
    lse[r] = valid ? p.lse[at] : 0.0f;
    delta[r] = valid ? p.delta[at] : 0.0f;
  }
  clear(dq);
  int stage = 0;
  for (int j0 = keys.begin; j0 < keys.end; j0 += COLS) {
    bf16 *k = stages + stage * STAGE, *v = k + COLS * LD;
    if (STAGES == 1) load(j0, k);
    if (STAGES == 2) {
      stage ^= 1;
      if (j0 + COLS < keys.end) load(j0 + COLS, stages + stage * STAGE);
    }
    copy_async_commit();
    copy_async_wait<STAGES - 1>();
    __syncthreads();

    if (!flash_sees_none(p, i0, WARP_ROWS, j0, COLS, t.len)) { /* the same for all lanes */
      float s[1][NB][4], dp[1][NB][4];
      score_tile<DP>(s, q + own * LD, k, lane);
      score_tile<DP>(dp, g + own * LD, v, lane);
      const bool all = flash_sees_all(p, i0, WARP_ROWS, j0, COLS, t.len);
      tile_grads<true>(p, s[0], dp[0], lse, delta, mine, j0 + lane % 4 * 2, t.len, all);
      add_product<DP>(dq, dp, k, lane);
    }
    __syncthreads();
  }
  copy_async_wait<0>();
  multiply(dq, p.scale);
  store_tile<DP>(p, p.d_q, row, t.len - i0, h, 0, dq, q + own * LD, lane);
}

template <int DP, int COLS, int STAGES> void backward(esp_backend *be, const flash_args<bf16> &p, int n_tiles) {
  auto dkv = dkv_kernel<DP, COLS, STAGES>;
  auto dq = dq_kernel<DP, COLS, STAGES>;
  size_t smem = (2 * ROWS + STAGES * 2 * COLS) * flash_ld<DP>::value * sizeof(bf16);
  size_t dkv_smem = smem + STAGES * 2 * COLS * sizeof(float);
  if (!esp_allow_smem(be, dkv, dkv_smem) || !esp_allow_smem(be, dq, smem)) return;
  ESP_LAUNCH(be, "attention dK dV", dkv, dim3(n_tiles, p.heads / p.group), dim3(dkv_shape<DP>::THREADS), dkv_smem, p);
  ESP_LAUNCH(be, "attention dQ", dq, dim3(n_tiles, p.heads), dim3(128), smem, p);
}

} // namespace

void flash_mma_backward(esp_backend *be, const flash_args<bf16> &p, int n_tiles) {
  if (p.head_dim <= 64)
    backward<64, 64, 2>(be, p, n_tiles);
  else if (p.head_dim <= 96)
    backward<96, 32, 2>(be, p, n_tiles);
  else if (p.head_dim <= 128)
    backward<128, 32, 2>(be, p, n_tiles); /* 70 KiB */
  else if (esp_cuda_of(be)->smem_block_optin >= 136 * 1024)
    backward<256, 32, 2>(be, p, n_tiles);
  else
    backward<256, 16, 1>(be, p, n_tiles); /* 83 KiB */
}
