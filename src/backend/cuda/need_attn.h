/* need_attn.h: see need.h. */
#ifndef ESP_BACKEND_CUDA_NEED_ATTN_H
#define ESP_BACKEND_CUDA_NEED_ATTN_H

#include "backend/backend.h"
#include "backend/cuda/need_flash.h"

#endif
