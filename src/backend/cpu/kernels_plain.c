/* kernels_plain.c: the vector kernels in portable C (SSE2 on x86-64). */
#define ESP_K_TABLE esp_kernels_plain
#include "backend/cpu/kernels.inc.h"
