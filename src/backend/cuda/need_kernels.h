/* need_kernels.h: scratch of the kernels that are neither products nor attention; see need.h. */
#ifndef ESP_BACKEND_CUDA_NEED_KERNELS_H
#define ESP_BACKEND_CUDA_NEED_KERNELS_H

#include "backend/backend.h"

/* Sums over the rows of [rows, cols] are taken in two ordered stages: first over slices of rows, then over the slices.
 * As many slices as keep a large device busy, at most 1 MiB of partial sums, never fewer than 32 rows each. */
static inline int64_t esp_cuda_col_slices(int64_t rows, int64_t cols) {
  int64_t most = (rows + 31) / 32, wanted = cols > 0 ? (256 << 10) / cols : 1;
  if (wanted > 1024) wanted = 1024;
  if (wanted > most) wanted = most;
  return wanted > 1 ? wanted : 1;
}
/* `sums`: how many values are summed per column */
static inline int64_t esp_cuda_need_col_sum(int64_t rows, int64_t cols, int sums) {
  return esp_cuda_col_slices(rows, cols) * cols * sums * 4;
}
static inline int64_t esp_cuda_need_norm_bwd(const esp_norm_bwd_args *a) {
  if (!a->dw && !a->db) return 0;
  return esp_cuda_need_col_sum(esp_tensor_rows(&a->r), esp_tensor_cols(&a->r), 2);
}
/* The tokens in the order of their ids. */
static inline int64_t esp_cuda_need_embed_bwd(int64_t tokens) {
  return tokens * 4;
}
/* Partial sums of dot, in double. */
static inline int64_t esp_cuda_dot_parts(int64_t n) {
  int64_t parts = (n + 8191) / 8192;
  return parts < 1024 ? (parts > 1 ? parts : 1) : 1024;
}
static inline int64_t esp_cuda_need_dot(int64_t n) {
  return esp_cuda_dot_parts(n) * 8;
}

#endif
