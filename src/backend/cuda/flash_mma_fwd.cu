/* flash_mma_fwd.cu: the forward pass of attention on tensor cores. 4 warps own 64 or 128 queries; tiles of keys and
 * values are brought into shared memory one ahead of the products. Bound by tensor cores: 4 * head_dim operations per
 * visible pair of query and key; 128 queries halve what is read per operation from shared memory (a fragment serves 32
 * rows of a warp) and from the L2 cache (a tile serves 128), both of which would otherwise bind on sm_90. */
#include "backend/cuda/flash_mma.cuh"

using namespace flash_mma;

namespace {

enum { THREADS = 128 };

/* One tile's scores: capped, hidden pairs to -inf, and the rows' new maxima taken into m; they become P. l: of this
 * lane's columns only. fade: what the sums so far are to be multiplied by. */
template <int NB>
__device__ __forceinline__ void softmax_tile(const flash_args<bf16> &p, float (&s)[NB][4], float (&m)[2], float (&l)[2],
                                             float (&fade)[2], int i, int j, int len, bool all) {
  if (p.softcap > 0)
#pragma unroll
    for (int n = 0; n < NB; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[n][e] = p.softcap * tanhf(s[n][e] * p.scale / p.softcap);
  if (!all)
#pragma unroll
    for (int n = 0; n < NB; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (!flash_sees(p, i + e / 2 * 8, j + n * 8 + e % 2, len)) s[n][e] = -INFINITY;
  const float unit = logit_unit(p);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float top = m[r], sum = 0;
#pragma unroll
    for (int n = 0; n < NB; n++) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    top = row_max(top);
    fade[r] = fast_exp2((m[r] - top) * unit);
    m[r] = top;
#pragma unroll
    for (int n = 0; n < NB; n++)
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; e++) {
        s[n][e] = fast_exp2(fmaf(s[n][e], unit, -top * unit));
        sum += s[n][e];
      }
    l[r] = fmaf(l[r], fade[r], sum);
  }
}

template <int DP, int COLS, int MF> __global__ void __launch_bounds__(THREADS, 2) forward_kernel(flash_args<bf16> p) {
  constexpr int LD = flash_ld<DP>::value, NB = COLS / 8, ND = DP / 8, WARP_ROWS = 16 * MF, ROWS = 4 * WARP_ROWS;
  constexpr bool RESIDENT = DP * MF <= 128; /* the queries' fragments stay in registers */
  ESP_DYNAMIC_SMEM(bf16, smem);
  bf16 *q = smem, *kv = q + ROWS * LD; /* two stages of K and V */
  flash_tile t;
  if (!flash_find(p, gridDim.x - 1 - blockIdx.x, &t)) return; /* the last tiles of a sequence have the most keys */
  if (t.first % ROWS) return;                                 /* the tile before takes it along */
  const int h = blockIdx.y, kvh = h / p.group, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int i0 = t.first + warp * WARP_ROWS, mine = i0 + lane / 4; /* this lane's rows: mine + 8 n */
  bf16 *rows = q + warp * WARP_ROWS * LD;
  flash_range keys = flash_keys(p, t.first, ROWS, t.len, COLS);

  load_tile<DP, ROWS, THREADS>(q, p, p.q, static_cast<int64_t>(t.row0) + t.first, t.len - t.first, h);
  auto load = [&](int j0, bf16 *to) {
    load_tile<DP, COLS, THREADS>(to, p, p.k, static_cast<int64_t>(t.row0) + j0, t.len - j0, kvh);
    load_tile<DP, COLS, THREADS>(to + COLS * LD, p, p.v, static_cast<int64_t>(t.row0) + j0, t.len - j0, kvh);
  };
  load(keys.begin, kv);
  copy_async_commit();

  uint32_t qf[RESIDENT ? DP / 16 : 1][MF][4];
  float acc[MF][ND][4], m[MF][2], l[MF][2];
  clear(acc);
#pragma unroll
  for (int f = 0; f < MF; f++) { /* m finite: a wholly hidden tile leaves no NaN */
    m[f][0] = m[f][1] = -1e30f;
    l[f][0] = l[f][1] = 0;
  }
  int stage = 0;
  for (int j0 = keys.begin; j0 < keys.end; j0 += COLS, stage ^= 1) {
    const bf16 *k = kv + stage * 2 * COLS * LD, *v = k + COLS * LD;
    if (j0 + COLS < keys.end) load(j0 + COLS, kv + (stage ^ 1) * 2 * COLS * LD);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    if (RESIDENT && j0 == keys.begin)
#pragma unroll
      for (int d = 0; d < (RESIDENT ? DP / 16 : 0); d++)
#pragma unroll
        for (int f = 0; f < MF; f++) row_block<DP>(qf[d][f], rows + f * 16 * LD, d * 16, lane);

    if (!flash_sees_none(p, i0, WARP_ROWS, j0, COLS, t.len)) { /* the same for all lanes */
      float s[MF][NB][4];
      if (RESIDENT) {
        clear(s);
#pragma unroll
        for (int d = 0; d < (RESIDENT ? DP / 16 : 0); d++) score_block<DP>(s, qf[d], k, d * 16, lane);
      } else {
        score_tile<DP>(s, rows, k, lane);
      }
      bool all = flash_sees_all(p, i0, WARP_ROWS, j0, COLS, t.len);
#pragma unroll
      for (int f = 0; f < MF; f++) {
        float fade[2];
        softmax_tile(p, s[f], m[f], l[f], fade, mine + f * 16, j0 + lane % 4 * 2, t.len, all);
#pragma unroll
        for (int d = 0; d < ND; d++)
#pragma unroll
          for (int e = 0; e < 4; e++) acc[f][d][e] *= fade[e / 2];
      }
      add_product<DP>(acc, s, v, lane);
    }
    __syncthreads(); /* the next round writes over the stage that this one read */
  }
  copy_async_wait<0>();

  const float natural = logit_unit(p) * FLASH_LN2;
#pragma unroll
  for (int f = 0; f < MF; f++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      int i = mine + f * 16 + r * 8;
      float sum = row_sum(l[f][r]), inverse = 1.0f / sum;
      if (p.lse && lane % 4 == 0 && i < t.len)
        p.lse[(static_cast<int64_t>(t.row0) + i) * p.heads + h] = fmaf(m[f][r], natural, logf(sum));
#pragma unroll
      for (int d = 0; d < ND; d++) {
        acc[f][d][2 * r] *= inverse;
        acc[f][d][2 * r + 1] *= inverse;
      }
    }
  store_tile<DP>(p, p.o, static_cast<int64_t>(t.row0) + i0, t.len - i0, h, 0, acc, rows, lane);
}

template <int DP, int COLS, int MF> void forward(esp_backend *be, const flash_args<bf16> &p, int n_tiles) {
  auto kernel = forward_kernel<DP, COLS, MF>;
  size_t smem = (64 * MF + 4 * COLS) * flash_ld<DP>::value * sizeof(bf16);
  if (!esp_allow_smem(be, kernel, smem)) return;
  ESP_LAUNCH(be, "attention", kernel, dim3(n_tiles, p.heads), dim3(THREADS), smem, p);
}

} // namespace

void flash_mma_forward(esp_backend *be, const flash_args<bf16> &p, int n_tiles) {
  if (p.head_dim <= 64)
    forward<64, 64, 2>(be, p, n_tiles);
  else if (p.head_dim <= 96)
    forward<96, 32, 2>(be, p, n_tiles);
  else if (p.head_dim <= 128)
    forward<128, 32, 2>(be, p, n_tiles); /* 68 KiB: two blocks per multiprocessor */
  else
    forward<256, 32, 1>(be, p, n_tiles); /* 99 KiB, what every device has */
}
