/* need.h: device memory that the CUDA operations hold beside their operands, as pure functions of the arguments. The
 * plug-in allocates by them and the counting backend accounts by them, so the plan cannot drift from the run. */
#ifndef ESP_BACKEND_CUDA_NEED_H
#define ESP_BACKEND_CUDA_NEED_H

#include "backend/cuda/need_attn.h"
#include "backend/cuda/need_kernels.h"
#include "backend/cuda/need_matmul.h"

/* TEMP until matmul and attention land */
#ifndef ESP_CUDA_TEMP
#define ESP_CUDA_TEMP
#define esp_cuda_pack_bytes(o, i, c) ((o) * (i) * (int64_t)esp_dtype_size(c))
#define esp_cuda_need_linear(...) 0
#define esp_cuda_need_linear_dx(...) 0
#define esp_cuda_need_matmul(...) 0
#define esp_cuda_need_attn(a) 0
#define esp_cuda_need_attn_bwd(a) 0
#define esp_cuda_need_fixed() 64
#endif
#endif
