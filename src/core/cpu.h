/* cpu.h: what this processor can do, by CPUID feature bits and operating system permission, never by model number.
 * ESPALIER_ISA=plain|avx2|avx512|amx forces a lower level (an unavailable one is an error at backend creation). */
#ifndef ESP_CORE_CPU_H
#define ESP_CORE_CPU_H

#include <stdbool.h>

typedef enum esp_isa { ESP_ISA_PLAIN, ESP_ISA_AVX2, ESP_ISA_AVX512, ESP_ISA_AMX } esp_isa;

esp_isa esp_cpu_isa(void);           /* the level in use: the best available, or the forced one */
esp_isa esp_cpu_isa_available(void); /* the best available, tile permission asked of the kernel */
const char *esp_isa_name(esp_isa isa);
const char *esp_cpu_brand(void);
bool esp_cpu_isa_forced_invalid(const char **value); /* ESPALIER_ISA is unknown or above what is available */
void esp_cpu_isa_set(esp_isa isa);                   /* tests: switch the level in this process (<= available) */

#endif
