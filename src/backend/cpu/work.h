/* work.h: scratch that operations of the cpu backend ask for, as functions of the shapes alone (and of the thread
 * count), shared with the counting backend so that the plan holds the same bytes. */
#ifndef ESP_BACKEND_CPU_WORK_H
#define ESP_BACKEND_CPU_WORK_H

#include "backend/cpu/gemm.h"
#include "backend/cpu/gemm_impl.h"
#include "backend/cpu/kernels.h"
#include "core/cpu.h"
#include "core/threads.h"

/* Query heads whose fp32 dK, dV are alive at a time in attention's backward pass: whole groups, about 16. */
static inline int esp_attn_bwd_heads(const esp_attn_args *a) {
  int group = a->heads / a->kv_heads, n = 16 / group * group;
  if (n < group) n = group;
  return n < a->heads ? n : a->heads;
}
static inline int64_t esp_attn_max_len(const esp_attn_args *a) {
  int64_t m = 0;
  for (int s = 0; s < a->n_seqs; s++)
    if (a->cu_seqlens[s + 1] - a->cu_seqlens[s] > m) m = a->cu_seqlens[s + 1] - a->cu_seqlens[s];
  return m;
}
int64_t esp_cpu_work_attn(const esp_attn_args *a);
int64_t esp_cpu_work_attn_bwd(const esp_attn_args *a);
static inline int64_t esp_cpu_work_decode(const esp_decode_args *a) {
  return (a->max_len + 15) / 16 * 64 * esp_threads_count();
}
/* ops_sparse.c: whether through tiles of the dense matrix, and so many rows of it at a time. Entry by entry turns x by
 * columns and writes y by columns whatever the number of entries, which tiles beat down to about one entry in 10000. */
enum { ESP_SPARSE_ROWS = 256, ESP_SPARSE_LEAST = 20000 };
static inline bool esp_cpu_sparse_tiles(const esp_tensor *x, const esp_csr *s, int64_t cols) {
  return esp_cpu_isa() == ESP_ISA_AMX && esp_is_b(x) && esp_tensor_rows(x) >= 32 &&
         s->entries * ESP_SPARSE_LEAST > s->rows * cols;
}
static inline bool esp_cpu_sparse_dense(const esp_tensor *y, const esp_tensor *x, const esp_csr *s) {
  return esp_is_b(y) && esp_cpu_sparse_tiles(x, s, esp_tensor_cols(x));
}
/* gemm_added.c: whether it is added to a packed weight instead. */
static inline bool esp_cpu_adds(const esp_tensor *x, const esp_wview *w, const esp_csr *m) {
  return esp_cpu_sparse_tiles(x, m, w->in) && esp_cpu_pack_bytes(w->out, w->in, ESP_BF16) <= ESP_GEMM_SHARED;
}
static inline int64_t esp_cpu_work_sparse(const esp_tensor *y, const esp_tensor *x, const esp_csr *s, bool grad) {
  int64_t cols = esp_tensor_cols(x);
  if (!esp_cpu_sparse_dense(y, x, s)) return cols * ESP_SPARSE_BLOCK * (int64_t)sizeof(float);
  return grad ? 0 : (s->rows < ESP_SPARSE_ROWS ? s->rows : (int64_t)ESP_SPARSE_ROWS) * cols * 2;
}
static inline int64_t esp_cpu_work_ce(int64_t rows) {
  return (rows + 3) / 4 * 64; /* loss and hit of each row */
}
/* Small blocks as fp32 (ops_kinds.c), merged until they fill a register. */
static inline int64_t esp_cpu_block_merge(int64_t q, int64_t blocks) {
  int64_t n = (ESP_BLOCK_LANES + q - 1) / q;
  return n < blocks ? n : blocks;
}
static inline int64_t esp_cpu_block_ld(int64_t q, int64_t merged) { /* two whole registers are read at a time */
  return (q * merged + 2 * ESP_BLOCK_LANES - 1) / (2 * ESP_BLOCK_LANES) * (2 * ESP_BLOCK_LANES);
}
static inline bool esp_cpu_block_small(int64_t p, int64_t q, int blocks) {
  return blocks > 1 && p <= ESP_BLOCK_SMALL && q <= ESP_BLOCK_SMALL;
}
/* Elements of one block packed for tiles: columns of 16 outputs by depths of 32, [q/16][depths][16 pairs][16][2]. */
static inline int64_t esp_amx_block_depths(int64_t p) {
  return (p + 31) / 32;
}
static inline int64_t esp_amx_block_elements(int64_t p, int64_t q) {
  return (q + 15) / 16 * esp_amx_block_depths(p) * 512;
}
static inline int64_t esp_cpu_work_block_matmul(int64_t p, int64_t q, int blocks, bool shared) {
  int64_t merged = esp_cpu_block_merge(q, blocks), n = shared ? 1 : (blocks + merged - 1) / merged;
  int64_t small = n * merged * p * esp_cpu_block_ld(q, merged) * 4;
  int64_t tiles = (shared ? 1 : blocks) * esp_amx_block_elements(p, q) * 2;
  return small > tiles ? small : tiles;
}
/* The gradient of one small block that serves all: sums apart, of each group or of tokens [ESP_BLOCK_PARTS of them at
 * most], then added in order. Not where x and dy are rows of groups without gaps, which is one product. */
enum { ESP_BLOCK_PARTS = 32 };
static inline int64_t esp_cpu_block_part(int64_t tokens) {
  int64_t least = (tokens + ESP_BLOCK_PARTS - 1) / ESP_BLOCK_PARTS;
  return least < 64 ? 64 : (least + 31) / 32 * 32;
}
static inline bool esp_cpu_block_rows(const esp_tensor *t) {
  return t->ndim == 1 || (t->ndim == 2 && t->ld == t->shape[1]);
}
static inline int64_t esp_cpu_work_block_grad(const esp_tensor *x, const esp_tensor *dy, int blocks, bool shared) {
  int64_t p = esp_block_width(x, blocks), q = esp_block_width(dy, blocks);
  if (!shared || !esp_cpu_block_small(p, q, blocks) || (esp_cpu_block_rows(x) && esp_cpu_block_rows(dy))) return 0;
  return (blocks > ESP_BLOCK_PARTS ? blocks : (int64_t)ESP_BLOCK_PARTS) * p * q * 4;
}

/* The backend's one scratch buffer, grown to `bytes`; NULL with the sticky error set. */
void *esp_cpu_work(esp_backend *be, int64_t bytes);

#endif
