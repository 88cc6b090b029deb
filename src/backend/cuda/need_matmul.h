/* need_matmul.h: see need.h. */
#ifndef ESP_BACKEND_CUDA_NEED_MATMUL_H
#define ESP_BACKEND_CUDA_NEED_MATMUL_H

#include "backend/backend.h"

#endif
