/* need.h: device memory that the CUDA operations hold beside their operands, as pure functions of the arguments. The
 * plug-in allocates by them and the counting backend accounts by them, so the plan cannot drift from the run. */
#ifndef ESP_BACKEND_CUDA_NEED_H
#define ESP_BACKEND_CUDA_NEED_H

#include "backend/cuda/need_attn.h"
#include "backend/cuda/need_kernels.h"
#include "backend/cuda/need_matmul.h"

#endif
