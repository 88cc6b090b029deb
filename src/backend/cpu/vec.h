/* vec.h: one vector register of floats in the width of the level being compiled, with loads and stores of fp32 and
 * bf16, masked tails, and exp, tanh, erf. Included by kernels.inc.h, which is compiled once per level. */
#ifndef ESP_BACKEND_CPU_VEC_H
#define ESP_BACKEND_CPU_VEC_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "core/dtype.h"

#if defined(ESP_K_AVX512) || defined(ESP_K_AVX2)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline, unused))

#if defined(ESP_K_AVX512)
#define VL 16
#elif defined(ESP_K_AVX2)
#define VL 8
#else
#define VL 4
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef float vf_mem __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef uint16_t vh_mem __attribute__((vector_size(2 * VL), aligned(1), may_alias));

#if defined(ESP_K_AVX512)
INLINE vf vset(float x) {
  return _mm512_set1_ps(x);
}
INLINE vf vfma(vf a, vf b, vf c) {
  return _mm512_fmadd_ps(a, b, c);
}
INLINE vf vmax(vf a, vf b) {
  return _mm512_max_ps(a, b);
}
INLINE vf vmin(vf a, vf b) {
  return _mm512_min_ps(a, b);
}
INLINE vf vround(vf a) {
  return _mm512_roundscale_ps(a, 8);
}
INLINE vi vtoi(vf a) {
  return (vi)_mm512_cvtps_epi32(a);
}
INLINE float vhsum(vf a) {
  return _mm512_reduce_add_ps(a);
}
INLINE float vhmax(vf a) {
  return _mm512_reduce_max_ps(a);
}
/* lt ? a : b */
INLINE vf vsel_lt(vf x, vf y, vf a, vf b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), b, a);
}
INLINE vf ldb(const uint16_t *p) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
#if defined(ESP_K_BF16)
INLINE __m256i vtob(vf v) {
  return (__m256i)_mm512_cvtneps_pbh(v);
}
#else
INLINE __m256i vtob(vf v) {
  __m512i u = (__m512i)v;
  __m512i r = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  r = _mm512_add_epi32(r, _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1)));
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
#endif
INLINE void stb(uint16_t *p, vf v) {
  _mm256_storeu_si256((__m256i *)p, vtob(v));
}
#elif defined(ESP_K_AVX2)
INLINE vf vset(float x) {
  return _mm256_set1_ps(x);
}
INLINE vf vfma(vf a, vf b, vf c) {
  return _mm256_fmadd_ps(a, b, c);
}
INLINE vf vmax(vf a, vf b) {
  return _mm256_max_ps(a, b);
}
INLINE vf vmin(vf a, vf b) {
  return _mm256_min_ps(a, b);
}
INLINE vf vround(vf a) {
  return _mm256_round_ps(a, 8);
}
INLINE vi vtoi(vf a) {
  return (vi)_mm256_cvtps_epi32(a);
}
INLINE vf vsel_lt(vf x, vf y, vf a, vf b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, y, _CMP_LT_OQ));
}
INLINE vf ldb(const uint16_t *p) {
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
INLINE void stb(uint16_t *p, vf v) {
  __m256i u = (__m256i)v;
  __m256i r = _mm256_add_epi32(u, _mm256_set1_epi32(0x7fff));
  r = _mm256_add_epi32(r, _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1)));
  r = (__m256i)_mm256_blendv_ps((__m256)r, (__m256)_mm256_or_si256(u, _mm256_set1_epi32(0x400000)),
                                _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  r = _mm256_srli_epi32(r, 16);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
}
#else
INLINE vf vset(float x) {
  return (vf){x, x, x, x};
}
INLINE vf vfma(vf a, vf b, vf c) {
  return a * b + c;
}
INLINE vf vpick(vi mask, vf a, vf b) {
  return (vf)((mask & (vi)a) | (~mask & (vi)b));
}
INLINE vf vmax(vf a, vf b) { /* b where either is NaN, as the x86 instruction */
  return vpick(a > b, a, b);
}
INLINE vf vmin(vf a, vf b) {
  return vpick(a < b, a, b);
}
INLINE vi vtoi(vf a) { /* to nearest even, |a| < 2^22 */
  vf magic = vset(12582912.0f);
  return (vi)(a + magic) - (vi)magic;
}
INLINE vf vround(vf a) {
  vf magic = vset(12582912.0f);
  return (a + magic) - magic;
}
INLINE vf vsel_lt(vf x, vf y, vf a, vf b) {
  return vpick(x < y, a, b);
}
INLINE vf ldb(const uint16_t *p) {
  vh h = *(const vh_mem *)p;
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
INLINE void stb(uint16_t *p, vf v) {
  for (int i = 0; i < VL; i++) p[i] = esp_f32_to_bf16(v[i]);
}
#endif

#if !defined(ESP_K_AVX512)
INLINE float vhsum(vf a) {
#if VL == 8
  return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
#else
  return (a[0] + a[2]) + (a[1] + a[3]);
#endif
}
INLINE float vhmax(vf a) {
  float m = a[0];
  for (int i = 1; i < VL; i++) m = a[i] > m ? a[i] : m;
  return m;
}
#endif

INLINE vf ld(const float *p) {
  return *(const vf_mem *)p;
}
INLINE void st(float *p, vf v) {
  *(vf_mem *)p = v;
}
/* The first n < VL elements; the others read as 0. */
INLINE vf ldn(const float *p, int n) {
#if defined(ESP_K_AVX512)
  return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  float t[VL] __attribute__((aligned(64))) = {0};
  for (int i = 0; i < n; i++) t[i] = p[i];
  return ld(t);
#endif
}
INLINE void stn(float *p, vf v, int n) {
#if defined(ESP_K_AVX512)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v);
#else
  float t[VL] __attribute__((aligned(64)));
  st(t, v);
  for (int i = 0; i < n; i++) p[i] = t[i];
#endif
}
INLINE vf ldbn(const uint16_t *p, int n) {
  uint16_t t[VL] __attribute__((aligned(64))) = {0};
  for (int i = 0; i < n; i++) t[i] = p[i];
  return ldb(t);
}
INLINE void stbn(uint16_t *p, vf v, int n) {
  uint16_t t[VL] __attribute__((aligned(64)));
  stb(t, v);
  for (int i = 0; i < n; i++) p[i] = t[i];
}

/* Element i of a row of either type; `b` is a constant after inlining. n in (0, VL]: how many are left. */
INLINE vf ldt(const void *p, int64_t i, bool b, int64_t n) {
  if (b) return n >= VL ? ldb((const uint16_t *)p + i) : ldbn((const uint16_t *)p + i, (int)n);
  return n >= VL ? ld((const float *)p + i) : ldn((const float *)p + i, (int)n);
}
INLINE void stt(void *p, int64_t i, bool b, vf v, int64_t n) {
  if (b) {
    if (n >= VL)
      stb((uint16_t *)p + i, v);
    else
      stbn((uint16_t *)p + i, v, (int)n);
  } else {
    if (n >= VL)
      st((float *)p + i, v);
    else
      stn((float *)p + i, v, (int)n);
  }
}
/* What a store in this type and a load give back. */
INLINE vf vrounded(vf v, bool b) {
  if (!b) return v;
#if defined(ESP_K_AVX512)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(vtob(v)), 16);
#else
  uint16_t t[VL] __attribute__((aligned(64)));
  stb(t, v);
  return ldb(t);
#endif
}
/* 1/x to about 1 ulp, x finite. The divider takes 16 cycles for a register of AVX-512, this 4. */
INLINE vf vrecip(vf x) {
#if defined(ESP_K_AVX512)
  vf r = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(r, _mm512_fnmadd_ps(x, r, vset(2.0f)));
#else
  return vset(1.0f) / x;
#endif
}

/* exp with the reduction and polynomial of Cephes' expf: below 2 ulp; 0 below -87.3, 2^127.9 above 88.37. */
INLINE vf vexp(vf x0) {
  vf x = vmin(vset(88.37f), vmax(vset(-87.33f), x0)); /* this order keeps a NaN */
  vf n = vround(x * vset(1.44269504088896341f));
  vf r = vfma(n, vset(-0.693359375f), x);
  r = vfma(n, vset(2.12194440e-4f), r);
  vf p = vset(1.9875691500e-4f);
  p = vfma(p, r, vset(1.3981999507e-3f));
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  p = vfma(p, r * r, r) + vset(1.0f);
#if defined(ESP_K_AVX512)
  vf y = _mm512_scalef_ps(p, n);
#else
  vf y = (vf)((vi)p + (vtoi(n) << 23));
#endif
  return vsel_lt(x0, vset(-87.33f), vset(0.0f), y);
}
INLINE vf vabs(vf x) {
  return (vf)((vi)x & 0x7fffffff);
}
/* 1/(1+exp(-x)) */
INLINE vf vsigmoid(vf x) {
  return vrecip(vset(1.0f) + vexp(-x));
}
/* tanh: odd polynomial (Cephes) near 0, else by exp. */
INLINE vf vtanh(vf x) {
  vf a = vabs(x), z = x * x;
  vf p = vset(-5.70498872745e-3f);
  p = vfma(p, z, vset(2.06390887954e-2f));
  p = vfma(p, z, vset(-5.37397155531e-2f));
  p = vfma(p, z, vset(1.33314422036e-1f));
  p = vfma(p, z, vset(-3.33332819422e-1f));
  vf small = vfma(p * z, x, x);
  vf big = vset(1.0f) - vset(2.0f) * vrecip(vexp(a + a) + vset(1.0f));
  big = vsel_lt(x, vset(0.0f), -big, big);
  return vsel_lt(a, vset(0.625f), small, big);
}
/* The normal distribution function, 0.5 (1 + erf(x/sqrt 2)), without cancellation in the lower tail. Minimax
 * polynomials of erf after N. Juffa (about 1 ulp). */
INLINE vf vphi(vf x) {
  vf u = x * vset(0.70710678118654752f), t = vabs(u), s = u * u;
  vf r = vfma(vset(-1.72853470e-5f), t, vset(3.83197126e-4f));
  vf q = vfma(vset(-3.88396438e-3f), t, vset(2.42546219e-2f));
  r = vfma(r, s, q);
  r = vfma(r, t, vset(-1.06777877e-1f));
  r = vfma(r, t, vset(-6.34846687e-1f));
  r = vfma(r, t, vset(-1.28717512e-1f));
  r = vfma(r, t, -t);
  vf e = vset(0.5f) * vexp(r); /* 0.5 erfc(t) */
  vf far = vsel_lt(u, vset(0.0f), e, vset(1.0f) - e);
  vf m = vset(-5.96761703e-4f);
  m = vfma(m, s, vset(4.99119423e-3f));
  m = vfma(m, s, vset(-2.67681349e-2f));
  m = vfma(m, s, vset(1.12819925e-1f));
  m = vfma(m, s, vset(-3.76125336e-1f));
  m = vfma(m, s, vset(1.28379166e-1f));
  vf near = vset(0.5f) + vset(0.5f) * vfma(m, u, u);
  return vsel_lt(t, vset(0.927734375f), near, far);
}

/* for (i, n left) over a row, in registers */
#define VEC_LOOP(i, n) for (int64_t i = 0, left = (n); left > 0; i += VL, left -= VL)

#endif
