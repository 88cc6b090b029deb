/* kernels_avx2.c: the vector kernels for AVX2 with FMA; the plain ones where the architecture has no such thing. */
#define ESP_K_TABLE esp_kernels_avx2
#if defined(__x86_64__)
#define ESP_K_AVX2
#endif
#include "backend/cpu/kernels.inc.h"
