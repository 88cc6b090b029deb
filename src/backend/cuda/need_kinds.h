/* need_kinds.h: how the parts of adapter kinds are cut on the device, and their scratch; functions of the shapes alone,
 * so that the bits do not change between devices. See need.h. */
#ifndef ESP_BACKEND_CUDA_NEED_KINDS_H
#define ESP_BACKEND_CUDA_NEED_KINDS_H

#include "backend/backend.h"
#include "backend/cuda/need_matmul.h"

/* ---- products with blocks: one product over [T*G] rows when one block serves all, a batch of cuBLASLt when the blocks
 * fill its tiles and the types go together, else the own kernels, which take everything. ---- */
typedef enum esp_cuda_blocks_way { ESP_BLOCKS_AS_ONE, ESP_BLOCKS_BATCH, ESP_BLOCKS_OWN } esp_cuda_blocks_way;

/* x and y: the tensors that are cut into columns of p and of q; `in` the type of the second operand, `out` of the
 * result. */
static inline esp_cuda_blocks_way esp_cuda_blocks_way_of(const esp_tensor *x, const esp_tensor *y, esp_dtype in,
                                                         esp_dtype out, int blocks, bool shared) {
  int64_t p = esp_block_width(x, blocks), q = esp_block_width(y, blocks);
  bool flat = x->ndim < 3 && y->ndim < 3;
  bool dense = flat && (x->ndim == 1 || x->ld == x->shape[1]) && (y->ndim == 1 || y->ld == y->shape[1]);
  if ((blocks == 1 && flat) || (shared && dense && p >= 8 && q >= 8)) return ESP_BLOCKS_AS_ONE;
  bool fits = p >= 32 && q >= 32 && p % 8 == 0 && q % 8 == 0;
  bool together = x->dtype == in && (out == in || out == ESP_F32);
  return fits && together && !shared ? ESP_BLOCKS_BATCH : ESP_BLOCKS_OWN;
}
/* [T, G*p] as [T*G, p] */
static inline esp_tensor esp_cuda_blocks_as_rows(esp_tensor t, int blocks) {
  if (blocks == 1) return t;
  return esp_tensor_2d(t.data, t.dtype, esp_tensor_rows(&t) * blocks, esp_tensor_cols(&t) / blocks);
}
static inline int64_t esp_cuda_need_block_matmul(esp_tensor y, esp_tensor x, esp_tensor m, int blocks, bool shared,
                                                 bool trans) {
  if (esp_cuda_blocks_way_of(&x, &y, m.dtype, y.dtype, blocks, shared) != ESP_BLOCKS_AS_ONE) return 0;
  return esp_cuda_need_matmul(esp_cuda_blocks_as_rows(y, blocks), esp_cuda_blocks_as_rows(x, blocks), false, m, trans);
}
/* Sums over tokens: slices of at least 128 of them, as many as keep a large device busy, at most 16 MiB of partial sums
 * of all blocks [G*p, q]. */
static inline int64_t esp_cuda_block_grad_slices(int64_t tokens, int64_t blocks, int64_t p, int64_t q) {
  int64_t wanted = (4 << 20) / (blocks * p * q), most = (tokens + 127) / 128;
  if (wanted > 64) wanted = 64;
  if (wanted > most) wanted = most;
  return wanted > 1 ? wanted : 1;
}
static inline int64_t esp_cuda_need_block_grad(esp_tensor dm, esp_tensor x, esp_tensor dy, int blocks, bool shared) {
  esp_cuda_blocks_way way = esp_cuda_blocks_way_of(&x, &dy, dy.dtype, dm.dtype, blocks, shared);
  if (way == ESP_BLOCKS_BATCH) return 0;
  if (way == ESP_BLOCKS_AS_ONE)
    return esp_cuda_need_matmul(dm, esp_cuda_blocks_as_rows(x, blocks), true, esp_cuda_blocks_as_rows(dy, blocks),
                                false);
  int64_t p = esp_block_width(&x, blocks), q = esp_block_width(&dy, blocks);
  return esp_cuda_block_grad_slices(esp_block_tokens(&x), blocks, p, q) * blocks * p * q * 4;
}

/* ---- sparse matrices: tokens in chunks, transposed to [columns, chunk] so that an entry meets consecutive tokens; a
 * chunk stays in the second-level cache. ---- */
enum { ESP_SPARSE_CHUNK = 1024, ESP_SPARSE_TILE = 128 };
static inline int64_t esp_cuda_sparse_chunk(int64_t tokens) {
  int64_t all = (tokens + ESP_SPARSE_TILE - 1) / ESP_SPARSE_TILE * ESP_SPARSE_TILE;
  return all < ESP_SPARSE_CHUNK ? all : (int64_t)ESP_SPARSE_CHUNK;
}
static inline int64_t esp_cuda_need_sparse_matmul(esp_tensor x) {
  return esp_cuda_sparse_chunk(esp_tensor_rows(&x)) * esp_tensor_cols(&x) * (int64_t)esp_dtype_size(x.dtype);
}
static inline int64_t esp_cuda_need_sparse_grad(esp_tensor dy, esp_tensor x) {
  int64_t size = dy.dtype == ESP_BF16 && x.dtype == ESP_BF16 ? 2 : 4;
  return esp_cuda_sparse_chunk(esp_tensor_rows(&x)) * (esp_tensor_cols(&x) + esp_tensor_cols(&dy)) * size;
}

#endif
