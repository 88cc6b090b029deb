/* kernels_amx.c: the vector kernels for processors with AMX, which have AVX-512's bf16 conversion as well. */
#define ESP_K_TABLE esp_kernels_amx
#if defined(__x86_64__)
#define ESP_K_AVX512
#define ESP_K_BF16
#endif
#include "backend/cpu/kernels.inc.h"
