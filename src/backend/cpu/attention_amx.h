/* attention_amx.h: the tile path of attention, and the bytes it needs. */
#ifndef ESP_BACKEND_CPU_ATTENTION_AMX_H
#define ESP_BACKEND_CPU_ATTENTION_AMX_H

#include "backend/cpu/kernels.h"

/* Operands from K and V lie in blocks of 32 keys; a sequence begins a block. */
static inline int64_t esp_amx_blocks(const esp_attn_args *a) {
  return esp_tensor_rows(&a->q) / 32 + a->n_seqs + 1;
}
static inline int64_t esp_amx_first_block(const esp_attn_args *a, int s) {
  return a->cu_seqlens[s] / 32 + s;
}
static inline int64_t esp_amx_pack_bytes(const esp_attn_args *a, bool backward) {
  return a->kv_heads * esp_amx_blocks(a) * (backward ? 3 : 2) * 64 * a->head_dim;
}
static inline int64_t esp_amx_scratch(int head_dim) {
  return 2 * head_dim * ESP_ATTN_BQ + 6 * ESP_ATTN_BK * ESP_ATTN_BQ + 4 * head_dim * ESP_ATTN_BQ;
}
#define ESP_AMX_RUN 512 /* queries whose operands are alive at a time in the backward pass */
static inline int64_t esp_amx_bwd_scratch(int head_dim) {
  int64_t tile = ESP_ATTN_BK * ESP_ATTN_BQ;
  return 12 * ESP_AMX_RUN * head_dim + 8 * ESP_AMX_RUN + 12 * tile + 8 * ESP_ATTN_BK * head_dim + 6 * tile;
}

/* One block of one key head: K and V^T (forward), or K, V and K^T (backward). */
void esp_amx_attn_pack(const esp_attn_args *a, bool backward, void *pack, int kv_head, int64_t block);
void esp_amx_attn(const esp_attn_part *p);
void esp_amx_attn_bwd(const esp_attn_part *p);

#endif
