/* kernels_avx512.c: the vector kernels for AVX-512 (F, BW, VL, DQ). */
#define ESP_K_TABLE esp_kernels_avx512
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#define ESP_K_AVX512
#endif
#include "backend/cpu/kernels.inc.h"
