/* need_flash.h: see need.h. Scratch of the own attention kernels, of decoding and of the loss. */
#ifndef ESP_BACKEND_CUDA_NEED_FLASH_H
#define ESP_BACKEND_CUDA_NEED_FLASH_H

#include "backend/backend.h"

/* delta[T, heads] = rowsum(dO * O) */
static inline int64_t esp_cuda_need_flash_bwd(const esp_attn_args *a) {
  return esp_tensor_rows(&a->q) * a->heads * 4;
}

/* Keys that one block of the first stage of decoding serves: few enough that one short batch fills the device, more for
 * long caches, where the partial results would begin to weigh. A function of max_len alone, so that a recorded step can
 * be replayed. */
static inline int esp_cuda_decode_chunk(int64_t max_len) {
  return max_len <= 4096 ? 64 : max_len <= 16384 ? 128 : 256;
}
static inline int64_t esp_cuda_decode_splits(int64_t max_len) {
  return (max_len + esp_cuda_decode_chunk(max_len) - 1) / esp_cuda_decode_chunk(max_len);
}
/* Of every split of every head: the output not yet divided [head_dim], its maximum and its sum. */
static inline int64_t esp_cuda_need_decode(const esp_decode_args *a) {
  return esp_tensor_rows(&a->q) * a->heads * esp_cuda_decode_splits(a->max_len) * (a->head_dim + 2) * 4;
}

/* The loss and the hit of every row, fp64, before they are summed in order. */
static inline int64_t esp_cuda_need_loss_rows(const esp_tensor *rows) {
  return esp_tensor_rows(rows) * 2 * 8;
}

#endif
