/* math.h: the device's functions that a host's library lacks. Those with reduced precision on the device (__expf and
 * the like) are the precise ones here: tests compare within tolerances that allow for either. */
#ifndef SIMCUDA_MATH_H
#define SIMCUDA_MATH_H

#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <cmath>
#include <limits>
#include <type_traits>

/* bits of one type as another */
namespace simcuda {
template <class To, class From> inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
} // namespace simcuda
static inline unsigned __float_as_uint(float x) {
  return simcuda::bit_cast<unsigned>(x);
}
static inline int __float_as_int(float x) {
  return simcuda::bit_cast<int>(x);
}
static inline float __uint_as_float(unsigned x) {
  return simcuda::bit_cast<float>(x);
}
static inline float __int_as_float(int x) {
  return simcuda::bit_cast<float>(x);
}
static inline long long __double_as_longlong(double x) {
  return simcuda::bit_cast<long long>(x);
}
static inline double __longlong_as_double(long long x) {
  return simcuda::bit_cast<double>(x);
}

/* one operation, rounded to nearest */
static inline float __fadd_rn(float a, float b) {
  return a + b;
}
static inline float __fsub_rn(float a, float b) {
  return a - b;
}
static inline float __fmul_rn(float a, float b) {
  return a * b;
}
static inline float __fdiv_rn(float a, float b) {
  return a / b;
}
static inline float __fmaf_rn(float a, float b, float c) {
  return fmaf(a, b, c);
}
static inline float __fsqrt_rn(float x) {
  return sqrtf(x);
}
static inline float __frcp_rn(float x) {
  return 1.0f / x;
}
static inline float __frsqrt_rn(float x) {
  return static_cast<float>(1.0 / sqrt(static_cast<double>(x)));
}
static inline double __dadd_rn(double a, double b) {
  return a + b;
}
static inline double __dmul_rn(double a, double b) {
  return a * b;
}
static inline double __fma_rn(double a, double b, double c) {
  return fma(a, b, c);
}

static inline float rsqrtf(float x) {
  return __frsqrt_rn(x);
}
static inline double rsqrt(double x) {
  return 1.0 / sqrt(x);
}
/* The host's <math.h> declares these names for itself (and defines none of them), so they cannot be functions here. */
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __exp10f(x) exp10f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __sincosf(x, s, c) sincosf(x, s, c)
/* On the device a divisor above 2^126 gives 0; such a divisor is a mistake here as well, so it does so too. */
static inline float __fdividef(float a, float b) {
  return fabsf(b) > 0x1p126f && !std::isinf(a) ? 0.0f : a / b;
}
static inline float fdividef(float a, float b) {
  return a / b;
}
static inline float __saturatef(float x) {
  return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f;
}
static inline float normcdff(float x) {
  return 0.5f * erfcf(-x * 0.70710678f);
}

/* conversions: rn to nearest, rz toward zero, ru up, rd down; out of range gives the nearest end, NaN gives 0 */
namespace simcuda {
template <class I> inline I to_integer(double rounded) {
  constexpr I lowest = std::numeric_limits<I>::min(), highest = std::numeric_limits<I>::max();
  if (std::isnan(rounded)) return 0;
  if (rounded <= static_cast<double>(lowest)) return lowest;
  if (rounded >= static_cast<double>(highest)) return highest;
  return static_cast<I>(rounded);
}
} // namespace simcuda
static inline int __float2int_rn(float x) {
  return simcuda::to_integer<int>(nearbyint(static_cast<double>(x)));
}
static inline int __float2int_rz(float x) {
  return simcuda::to_integer<int>(trunc(static_cast<double>(x)));
}
static inline int __float2int_ru(float x) {
  return simcuda::to_integer<int>(ceil(static_cast<double>(x)));
}
static inline int __float2int_rd(float x) {
  return simcuda::to_integer<int>(floor(static_cast<double>(x)));
}
static inline unsigned __float2uint_rn(float x) {
  return simcuda::to_integer<unsigned>(nearbyint(static_cast<double>(x)));
}
static inline unsigned __float2uint_rz(float x) {
  return simcuda::to_integer<unsigned>(trunc(static_cast<double>(x)));
}
static inline float __int2float_rn(int x) {
  return static_cast<float>(x);
}
static inline float __uint2float_rn(unsigned x) {
  return static_cast<float>(x);
}
static inline float __double2float_rn(double x) {
  return static_cast<float>(x);
}
static inline float __ull2float_rn(unsigned long long x) {
  return static_cast<float>(x);
}

/* integers */
static inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
static inline int __popcll(unsigned long long x) {
  return __builtin_popcountll(x);
}
static inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
static inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
static inline int __ffs(int x) {
  return __builtin_ffs(x);
}
static inline int __ffsll(long long x) {
  return __builtin_ffsll(x);
}
static inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (x >> i & 1u) << (31 - i);
  return r;
}
static inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
static inline int __mulhi(int a, int b) {
  return static_cast<int>(static_cast<long long>(a) * b >> 32);
}
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
static inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift) {
  unsigned long long both = static_cast<unsigned long long>(hi) << 32 | lo;
  return static_cast<unsigned>(both << (shift & 31) >> 32);
}
static inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
  unsigned long long both = static_cast<unsigned long long>(hi) << 32 | lo;
  return static_cast<unsigned>(both >> (shift & 31));
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  unsigned long long both = static_cast<unsigned long long>(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) {
    unsigned pick = selector >> (4 * i);
    unsigned byte = static_cast<unsigned>(both >> (8 * (pick & 7))) & 0xffu;
    if (pick & 8) byte = byte & 0x80u ? 0xffu : 0u; /* the byte's sign, repeated */
    r |= byte << (8 * i);
  }
  return r;
}

/* min and max over mixed arithmetic types, as the device's overloads take them; NaN loses, as with fminf */
template <class A, class B, class = std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value>>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  T x = static_cast<T>(a), y = static_cast<T>(b);
  return x < y || y != y ? x : y;
}
template <class A, class B, class = std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value>>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  T x = static_cast<T>(a), y = static_cast<T>(b);
  return x > y || y != y ? x : y;
}

#endif
