/* num.h: the number formats of device memory, widened and rounded as the libraries do: one rounding to nearest even. */
#ifndef SIMCUDA_NUM_H
#define SIMCUDA_NUM_H

#include <stdint.h>
#include <string.h>

static inline float simcuda_bits_f32(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

static inline uint32_t simcuda_f32_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}

static inline float simcuda_bf16_f32(uint16_t h) {
  return simcuda_bits_f32((uint32_t)h << 16);
}

static inline uint16_t simcuda_f32_bf16(float f) {
  uint32_t u = simcuda_f32_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff; /* the device's one NaN */
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float simcuda_f16_f32(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exp = (h >> 10) & 31u, man = h & 1023u;
  if (exp == 31) return simcuda_bits_f32(sign | 0x7f800000u | man << 13);
  if (exp == 0) { /* subnormal: man * 2^-24, exact in fp32 */
    float v = (float)man * 0x1p-24f;
    return sign ? -v : v;
  }
  return simcuda_bits_f32(sign | (exp + 112u) << 23 | man << 13);
}

static inline uint16_t simcuda_f32_f16(float f) {
  uint32_t u = simcuda_f32_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return 0x7fff;
  if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above round to infinity */
  if (a < 0x38800000u) {                                   /* below 2^-14: the adder rounds to multiples of 2^-24 */
    float v = simcuda_bits_f32(a) + 0.5f;
    return (uint16_t)(sign | (simcuda_f32_bits(v) - 0x3f000000u));
  }
  a += 0xfffu + ((a >> 13) & 1u);
  return (uint16_t)(sign | ((a - 0x38000000u) >> 13));
}

/* What a TF32 multiplier sees of an fp32 operand: 10 bits of mantissa, the rest cut off. */
static inline float simcuda_tf32(float f) {
  return simcuda_bits_f32(simcuda_f32_bits(f) & 0xffffe000u);
}

#endif
