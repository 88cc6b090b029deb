/* kernels_avx512.c: the vector kernels for AVX-512 (F, BW, VL, DQ). */
#define ESP_K_TABLE esp_kernels_avx512
#if defined(__x86_64__)
#define ESP_K_AVX512
#endif
#include "backend/cpu/kernels.inc.h"
