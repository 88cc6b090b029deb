/* flash_mma_fwd.cu: the forward pass of attention on tensor cores. 4 warps own 64 queries; tiles of keys and values are
 * brought into shared memory one ahead of the products. Bound by tensor cores and, nearly as much, by reading the tiles
 * from shared memory (each fragment serves 16 rows): 4 * head_dim operations per visible pair of query and key. */
#include "backend/cuda/flash_mma.cuh"

using namespace flash_mma;

namespace {

enum { THREADS = 128 };

template <int DP, int COLS> __global__ void __launch_bounds__(THREADS, 2) forward_kernel(flash_args<bf16> p) {
  constexpr int LD = flash_ld<DP>::value, NB = COLS / 8, ND = DP / 8;
  constexpr bool RESIDENT = DP <= 128; /* the queries' fragments stay in registers */
  ESP_DYNAMIC_SMEM(bf16, smem);
  bf16 *q = smem, *kv = q + ROWS * LD; /* two stages of K and V */
  flash_tile t;
  if (!flash_find(p, gridDim.x - 1 - blockIdx.x, &t)) return; /* the last tiles of a sequence have the most keys */
  const int h = blockIdx.y, kvh = h / p.group, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int i0 = t.first + warp * WARP_ROWS, mine = i0 + lane / 4; /* this thread's rows: mine, mine + 8 */
  const bf16 *rows = q + warp * WARP_ROWS * LD;
  flash_range keys = flash_keys(p, t.first, ROWS, t.len, COLS);

  load_tile<DP, ROWS, THREADS>(q, p, p.q, t.row0 + t.first, t.len - t.first, h);
  load_tile<DP, COLS, THREADS>(kv, p, p.k, t.row0 + keys.begin, t.len - keys.begin, kvh);
  load_tile<DP, COLS, THREADS>(kv + COLS * LD, p, p.v, t.row0 + keys.begin, t.len - keys.begin, kvh);
  copy_async_commit();

  uint32_t qf[RESIDENT ? DP / 16 : 1][4];
  float acc[ND][4], m[2] = {-1e30f, -1e30f}, l[2] = {0, 0}; /* m finite: a wholly hidden tile leaves no NaN */
  clear(acc);
  int stage = 0;
  for (int j0 = keys.begin; j0 < keys.end; j0 += COLS, stage ^= 1) {
    bf16 *k = kv + stage * 2 * COLS * LD, *v = k + COLS * LD, *ahead = kv + (stage ^ 1) * 2 * COLS * LD;
    if (j0 + COLS < keys.end) {
      int64_t row = static_cast<int64_t>(t.row0) + j0 + COLS;
      load_tile<DP, COLS, THREADS>(ahead, p, p.k, row, t.len - j0 - COLS, kvh);
      load_tile<DP, COLS, THREADS>(ahead + COLS * LD, p, p.v, row, t.len - j0 - COLS, kvh);
    }
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();

    float s[NB][4];
    if constexpr (RESIDENT) {
      if (j0 == keys.begin)
#pragma unroll
        for (int d = 0; d < DP / 16; d++) row_block<DP>(qf[d], rows, d * 16, lane);
      clear(s);
#pragma unroll
      for (int d = 0; d < DP / 16; d++) score_block<DP, NB>(s, qf[d], k, d * 16, lane);
    } else {
      score_tile<DP, NB>(s, rows, k, lane);
    }

    bool all = flash_sees_all(p, i0, WARP_ROWS, j0, COLS, t.len);
    float top[2] = {m[0], m[1]};
#pragma unroll
    for (int n = 0; n < NB; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        s[n][e] = flash_logit(p, s[n][e]);
        if (!all && !flash_sees(p, mine + e / 2 * 8, j0 + n * 8 + lane % 4 * 2 + e % 2, t.len)) s[n][e] = -INFINITY;
        top[e / 2] = fmaxf(top[e / 2], s[n][e]);
      }
    float fade[2], sum[2] = {0, 0};
#pragma unroll
    for (int r = 0; r < 2; r++) {
      top[r] = row_max(top[r]);
      fade[r] = exp2f(m[r] - top[r]);
      m[r] = top[r];
    }
#pragma unroll
    for (int n = 0; n < NB; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        s[n][e] = exp2f(s[n][e] - m[e / 2]);
        sum[e / 2] += s[n][e];
      }
#pragma unroll
    for (int r = 0; r < 2; r++) l[r] = fmaf(l[r], fade[r], sum[r]); /* of this lane's columns; joined at the end */
#pragma unroll
    for (int d = 0; d < ND; d++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[d][e] *= fade[e / 2];
    add_product<DP, NB, ND>(acc, s, v, lane);
    __syncthreads(); /* the next round writes over the stage that was read before this one */
  }
  copy_async_wait<0>();

#pragma unroll
  for (int r = 0; r < 2; r++) {
    l[r] = row_sum(l[r]);
    int i = mine + r * 8;
    if (p.lse && lane % 4 == 0 && i < t.len)
      p.lse[(static_cast<int64_t>(t.row0) + i) * p.heads + h] = (m[r] + log2f(l[r])) * FLASH_LN2;
    l[r] = 1.0f / l[r];
  }
#pragma unroll
  for (int d = 0; d < ND; d++)
#pragma unroll
    for (int e = 0; e < 4; e++) acc[d][e] *= l[e / 2];
  store_tile<DP, ND>(p, p.o, static_cast<int64_t>(t.row0) + i0, t.len - i0, h, 0, acc, q + warp * WARP_ROWS * LD, lane);
}

template <int DP, int COLS> void forward(esp_backend *be, const flash_args<bf16> &p, int n_tiles) {
  auto kernel = forward_kernel<DP, COLS>;
  size_t smem = (ROWS + 4 * COLS) * flash_ld<DP>::value * sizeof(bf16);
  if (!esp_allow_smem(be, kernel, smem)) return;
  ESP_LAUNCH(be, "attention", kernel, dim3(n_tiles, p.heads), dim3(THREADS), smem, p);
}

} // namespace

void flash_mma_forward(esp_backend *be, const flash_args<bf16> &p, int n_tiles) {
  if (p.head_dim <= 64)
    forward<64, 64>(be, p, n_tiles);
  else if (p.head_dim <= 96)
    forward<96, 64>(be, p, n_tiles);
  else if (p.head_dim <= 128)
    forward<128, 32>(be, p, n_tiles); /* 52 KiB: three blocks per multiprocessor */
  else
    forward<256, 32>(be, p, n_tiles); /* 99 KiB, what every device has */
}
