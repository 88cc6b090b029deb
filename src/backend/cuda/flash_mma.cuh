/* flash_mma.cuh: the parts of attention on tensor cores (FlashAttention-2, arXiv 2307.08691): tiles in shared memory
 * and the two products over them. A warp owns 16 or 32 "rows" (queries, or keys in the kernel of dK and dV) and walks
 * over tiles of COLS "columns". Scores stay in registers: the accumulator fragments of the first product are the
 * operand fragments of the second, so that nothing is written back between them. */
#ifndef ESP_BACKEND_CUDA_FLASH_MMA_CUH
#define ESP_BACKEND_CUDA_FLASH_MMA_CUH

#include "backend/cuda/flash.cuh"
#include "backend/cuda/ptx.cuh"

namespace flash_mma {

#define FLASH_LOG2E 1.4426950408889634f
#define FLASH_LN2 0.6931471805599453f

/* Row stride of a tile of heads padded to DP elements: 16 bytes more than the row, so that the eight rows of a matrix
 * lie in different banks. */
template <int DP> struct flash_ld {
  enum { value = DP + 8 };
};

/* Rows [row, row + rows) of head h into [R, DP], zeros past the last row and past head_dim; asynchronously. */
template <int DP, int R, int THREADS>
__device__ __forceinline__ void load_tile(bf16 *dst, const flash_args<bf16> &p, const flash_view<bf16> &x, int64_t row,
                                          int rows, int h) {
  constexpr int PER_ROW = DP / 8;
#pragma unroll 4
  for (int i = threadIdx.x; i < R * PER_ROW; i += THREADS) {
    int r = i / PER_ROW, c = i % PER_ROW * 8;
    bool valid = r < rows && c < p.head_dim;
    const bf16 *src = valid ? x.data + flash_at(row + r, x.ld, h, p.head_dim) + c : x.data;
    copy_async16(dst + r * flash_ld<DP>::value + c, src, valid);
  }
}

/* The 16 x 16 block at column k of this warp's rows, as first operand. */
template <int DP> __device__ __forceinline__ void row_block(uint32_t (&a)[4], const bf16 *rows, int k, int lane) {
  load_matrices(a, rows + lane % 16 * flash_ld<DP>::value + k + lane / 16 * 8);
}

/* s[m][n] += a[m] times the transposed columns [8 n, 8 n + 8), elements [k, k + 16). A fragment of the columns is read
 * once for all MF blocks of 16 rows. */
template <int DP, int MF, int NB>
__device__ __forceinline__ void score_block(float (&s)[MF][NB][4], const uint32_t (&a)[MF][4], const bf16 *cols, int k,
                                            int lane) {
#pragma unroll
  for (int n = 0; n < NB; n += 2) {
    uint32_t b[4];
    load_matrices(b, cols + (n * 8 + lane / 16 * 8 + lane % 8) * flash_ld<DP>::value + k + lane / 8 % 2 * 8);
#pragma unroll
    for (int m = 0; m < MF; m++) {
      mma_bf16(s[m][n], a[m], b[0], b[1]);
      mma_bf16(s[m][n + 1], a[m], b[2], b[3]);
    }
  }
}
template <int MF, int N> __device__ __forceinline__ void clear(float (&acc)[MF][N][4]) {
#pragma unroll
  for (int m = 0; m < MF; m++)
#pragma unroll
    for (int n = 0; n < N; n++) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0;
}
/* s = rows cols^T: lane l gets the rows 16 m + l/4 (elements 0, 1) and that + 8 (elements 2, 3) against the columns
 * 8 n + 2 (l%4) and the next. */
template <int DP, int MF, int NB>
__device__ __forceinline__ void score_tile(float (&s)[MF][NB][4], const bf16 *rows, const bf16 *cols, int lane) {
  clear(s);
#pragma unroll
  for (int k = 0; k < DP; k += 16) {
    uint32_t a[MF][4];
#pragma unroll
    for (int m = 0; m < MF; m++) row_block<DP>(a[m], rows + m * 16 * flash_ld<DP>::value, k, lane);
    score_block<DP>(s, a, cols, k, lane);
  }
}

/* acc[m][d] += s[m] (rounded to bf16) times the elements [8 d, 8 d + 8) of the columns. */
template <int DP, int MF, int NB, int ND>
__device__ __forceinline__ void add_product(float (&acc)[MF][ND][4], const float (&s)[MF][NB][4], const bf16 *cols,
                                            int lane) {
#pragma unroll
  for (int n = 0; n < NB; n += 2) {
    uint32_t a[MF][4];
#pragma unroll
    for (int m = 0; m < MF; m++) {
      a[m][0] = pack_bf16(s[m][n][0], s[m][n][1]);
      a[m][1] = pack_bf16(s[m][n][2], s[m][n][3]);
      a[m][2] = pack_bf16(s[m][n + 1][0], s[m][n + 1][1]);
      a[m][3] = pack_bf16(s[m][n + 1][2], s[m][n + 1][3]);
    }
#pragma unroll
    for (int d = 0; d < ND; d += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, cols + (n * 8 + lane % 16) * flash_ld<DP>::value + d * 8 + lane / 16 * 8);
#pragma unroll
      for (int m = 0; m < MF; m++) {
        mma_bf16(acc[m][d], a[m], b[0], b[1]);
        mma_bf16(acc[m][d + 1], a[m], b[2], b[3]);
      }
    }
  }
}

template <int MF, int N> __device__ __forceinline__ void multiply(float (&acc)[MF][N][4], float by) {
#pragma unroll
  for (int m = 0; m < MF; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[m][n][e] *= by;
}

/* Writes 16 MF rows of 8 ND elements from column c0 on, through this warp's own part of `stage` (stride DP + 8), so
 * that global memory sees 16-byte accesses. */
template <int DP, int MF, int ND>
__device__ __forceinline__ void store_tile(const flash_args<bf16> &p, const flash_view<bf16> &x, int64_t row, int rows,
                                           int h, int c0, const float (&acc)[MF][ND][4], bf16 *stage, int lane) {
  __syncwarp();
#pragma unroll
  for (int m = 0; m < MF; m++)
#pragma unroll
    for (int d = 0; d < ND; d++) {
      bf16 *at = stage + (m * 16 + lane / 4) * flash_ld<DP>::value + d * 8 + lane % 4 * 2;
      uint32_t upper = pack_bf16(acc[m][d][0], acc[m][d][1]), lower = pack_bf16(acc[m][d][2], acc[m][d][3]);
      *reinterpret_cast<uint32_t *>(at) = upper;
      *reinterpret_cast<uint32_t *>(at + 8 * flash_ld<DP>::value) = lower;
    }
  __syncwarp();
#pragma unroll 2
  for (int i = lane; i < 16 * MF * ND; i += 32) {
    int r = i / ND, c = i % ND * 8;
    if (r < rows && c0 + c < p.head_dim)
      *reinterpret_cast<uint4 *>(x.data + flash_at(row + r, x.ld, h, p.head_dim) + c0 + c) =
          *reinterpret_cast<const uint4 *>(stage + r * flash_ld<DP>::value + c);
  }
}

/* Over the four lanes that share a row. */
__device__ __forceinline__ float row_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
__device__ __forceinline__ float row_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

/* What a score is multiplied by to be a logit in units of log 2, for exp2; a cap has applied the scale before. */
__device__ __forceinline__ float logit_unit(const flash_args<bf16> &p) {
  return p.softcap > 0 ? FLASH_LOG2E : p.scale * FLASH_LOG2E;
}

} // namespace flash_mma
#endif
