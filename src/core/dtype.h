/* dtype.h: element types and exact conversions. bf16 and fp16 are stored as uint16_t; rounding is to nearest even. */
#ifndef ESP_CORE_DTYPE_H
#define ESP_CORE_DTYPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" { /* kernels files */
#endif

typedef enum esp_dtype {
  ESP_F32,
  ESP_BF16,
  ESP_F16,
  ESP_F64,
  ESP_I64,
  ESP_I32,
  ESP_I16,
  ESP_I8,
  ESP_U8,
  ESP_BOOL,
  ESP_DTYPES
} esp_dtype;

size_t esp_dtype_size(esp_dtype t);
const char *esp_dtype_name(esp_dtype t);    /* "fp32", "bf16", ... as in recipes */
const char *esp_dtype_st_name(esp_dtype t); /* "F32", "BF16", ... as in safetensors */
/* From either spelling; -1 when unknown. */
int esp_dtype_parse(const char *name);

static inline float esp_bf16_to_f32(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint16_t esp_f32_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u); /* NaN stays NaN */
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
float esp_f16_to_f32(uint16_t h);
uint16_t esp_f32_to_f16(float f);

/* n elements between any two of F32, BF16, F16, F64 (rounded once); buffers must not overlap. */
void esp_convert(void *dst, esp_dtype dst_type, const void *src, esp_dtype src_type, int64_t n);

#ifdef __cplusplus
}
#endif
#endif
