/* flash.cuh: what the own attention kernels share: their operands, which rows a block owns, what a query sees. */
#ifndef ESP_BACKEND_CUDA_FLASH_CUH
#define ESP_BACKEND_CUDA_FLASH_CUH

#include "backend/cuda/device.cuh"

template <class T> struct flash_view { /* [T, n*head_dim], rows ld elements apart */
  T *data;
  int64_t ld;
};

/* By value to every kernel: a recorded launch keeps it. */
template <class T> struct flash_args {
  flash_view<T> q, k, v, o, d_o, d_q, d_k, d_v;
  float *lse, *delta;        /* [tokens, heads] */
  const int32_t *cu, *tiles; /* esp_cuda_seqs */
  int n;
  int64_t tokens;
  int heads, group, head_dim; /* group: query heads of one key and value head */
  float scale, softcap;
  int window;
  bool causal;
  bool vec; /* every row of every operand can be read 16 bytes at a time */
};

/* Rows [first, first + ...) of the sequence whose first row is row0 and which has len rows. */
struct flash_tile {
  int row0, len, first;
};

/* The rows of tile `tile` of ESP_FLASH_TILE rows; false past the last sequence (the grid is a bound). The number of
 * steps depends on the bucket of sequences only, all threads read the same words. */
template <class T> __device__ __forceinline__ bool flash_find(const flash_args<T> &p, int tile, flash_tile *out) {
  if (tile >= p.tiles[p.n]) return false;
  int lo = 0, hi = p.n; /* tiles[lo] <= tile < tiles[hi]; an empty sequence has no tile and is never lo at the end */
  while (hi - lo > 1) {
    int mid = (lo + hi) / 2;
    if (p.tiles[mid] <= tile)
      lo = mid;
    else
      hi = mid;
  }
  out->row0 = p.cu[lo];
  out->len = p.cu[lo + 1] - out->row0;
  out->first = (tile - p.tiles[lo]) * ESP_FLASH_TILE;
  return true;
}

/* Does query i see key j, both counted from the start of a sequence of len rows? */
template <class T> __device__ __forceinline__ bool flash_sees(const flash_args<T> &p, int i, int j, int len) {
  return i < len && j < len && (!p.causal || j <= i) && (p.window <= 0 || j > i - p.window);
}
/* Is everything in these ranges seen (so that no pair needs the question)? */
template <class T>
__device__ __forceinline__ bool flash_sees_all(const flash_args<T> &p, int i0, int ni, int j0, int nj, int len) {
  return i0 + ni <= len && j0 + nj <= len && (!p.causal || j0 + nj - 1 <= i0) &&
         (p.window <= 0 || j0 > i0 + ni - 1 - p.window);
}

/* Is nothing seen? */
template <class T>
__device__ __forceinline__ bool flash_sees_none(const flash_args<T> &p, int i0, int ni, int j0, int nj, int len) {
  return i0 >= len || j0 >= len || (p.causal && j0 > i0 + ni - 1) || (p.window > 0 && j0 + nj - 1 <= i0 - p.window);
}

struct flash_range {
  int begin, end;
};
/* Keys that queries [i0, i0 + ni) can see, begun at a multiple of `step`. */
template <class T>
__device__ __forceinline__ flash_range flash_keys(const flash_args<T> &p, int i0, int ni, int len, int step) {
  flash_range r;
  r.begin = p.window > 0 && i0 - p.window + 1 > 0 ? (i0 - p.window + 1) / step * step : 0;
  r.end = p.causal && i0 + ni < len ? i0 + ni : len;
  return r;
}
/* Queries that can see keys [j0, j0 + nj). */
template <class T>
__device__ __forceinline__ flash_range flash_queries(const flash_args<T> &p, int j0, int nj, int len, int step) {
  flash_range r;
  r.begin = p.causal ? j0 / step * step : 0;
  int64_t last = static_cast<int64_t>(j0) + nj - 1 + p.window;
  r.end = p.window > 0 && last < len ? static_cast<int>(last) : len;
  return r;
}

/* Element offset of row `row` (of the whole batch), head h. */
__device__ __forceinline__ int64_t flash_at(int64_t row, int64_t ld, int h, int head_dim) {
  return row * ld + static_cast<int64_t>(h) * head_dim;
}

/* flash_scalar.cu: any head_dim up to 256, fp32 or bf16. flash_mma_fwd.cu, flash_mma_bwd.cu: bf16 on tensor cores,
 * where rows can be read 16 bytes at a time. */
template <class T> void flash_scalar_forward(esp_backend *be, const flash_args<T> &p, int n_tiles);
template <class T> void flash_scalar_backward(esp_backend *be, const flash_args<T> &p, int n_tiles);
void flash_mma_forward(esp_backend *be, const flash_args<bf16> &p, int n_tiles);
void flash_mma_backward(esp_backend *be, const flash_args<bf16> &p, int n_tiles);

#endif
