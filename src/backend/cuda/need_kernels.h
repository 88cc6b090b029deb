/* need_kernels.h: see need.h. */
#ifndef ESP_BACKEND_CUDA_NEED_KERNELS_H
#define ESP_BACKEND_CUDA_NEED_KERNELS_H

#include "backend/backend.h"

#endif
