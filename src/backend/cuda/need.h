/* need.h: device memory that the CUDA operations hold beside their operands, as pure functions of the arguments. The
 * plug-in allocates by them and the counting backend accounts by them, so the plan cannot drift from the run. */
#ifndef ESP_BACKEND_CUDA_NEED_H
#define ESP_BACKEND_CUDA_NEED_H

#include "backend/cuda/need_attn.h"
#include "backend/cuda/need_kernels.h"
#include "backend/cuda/need_kinds.h"
#include "backend/cuda/need_matmul.h"

/* Held from the start: the workspace of products (that of the larger devices) and the result of dot. */
static inline int64_t esp_cuda_need_fixed(void) {
  return esp_cuda_matmul_workspace(90) + (int64_t)sizeof(double);
}

#endif
