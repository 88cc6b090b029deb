/* work.h: scratch that operations of the cpu backend ask for, as functions of the shapes alone (and of the thread
 * count), shared with the counting backend so that the plan holds the same bytes. */
#ifndef ESP_BACKEND_CPU_WORK_H
#define ESP_BACKEND_CPU_WORK_H

#include "backend/cpu/kernels.h"
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
static inline int64_t esp_cpu_work_sparse(int64_t cols) {
  return cols * ESP_SPARSE_BLOCK * (int64_t)sizeof(float);
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
static inline int64_t esp_cpu_work_block_matmul(int64_t p, int64_t q, int blocks, bool shared) {
  int64_t merged = esp_cpu_block_merge(q, blocks), n = shared ? 1 : (blocks + merged - 1) / merged;
  return n * merged * p * esp_cpu_block_ld(q, merged) * 4;
}

/* The backend's one scratch buffer, grown to `bytes`; NULL with the sticky error set. */
void *esp_cpu_work(esp_backend *be, int64_t bytes);

#endif
