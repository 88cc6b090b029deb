/* kernels_amx.c: the vector kernels for processors with AMX, which have AVX-512's bf16 conversion as well. */
#define ESP_K_TABLE esp_kernels_amx
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")
#define ESP_K_AVX512
#define ESP_K_BF16
#endif
#include "backend/cpu/kernels.inc.h"
