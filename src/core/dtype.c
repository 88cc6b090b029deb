/* dtype.c: names, scalar conversions by integer arithmetic, and bulk conversions.
 *
 * All paths give the same bits. The worker threads run with denormals flushed, so nothing here lets the floating-point
 * unit see a value that may be denormal: narrow floats are widened and narrowed by integer operations (F16C ignores the
 * flush modes for fp16 denormals), and double goes through integers. */
#include "core/dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/cpu.h"

static const struct {
  const char *name, *st_name;
  size_t size;
} types[ESP_DTYPES] = {
    [ESP_F32] = {"fp32", "F32", 4},   [ESP_BF16] = {"bf16", "BF16", 2}, [ESP_F16] = {"fp16", "F16", 2},
    [ESP_F64] = {"fp64", "F64", 8},   [ESP_I64] = {"int64", "I64", 8},  [ESP_I32] = {"int32", "I32", 4},
    [ESP_I16] = {"int16", "I16", 2},  [ESP_I8] = {"int8", "I8", 1},     [ESP_U8] = {"uint8", "U8", 1},
    [ESP_BOOL] = {"bool", "BOOL", 1},
};

size_t esp_dtype_size(esp_dtype t) {
  return (unsigned)t < ESP_DTYPES ? types[t].size : 0;
}

const char *esp_dtype_name(esp_dtype t) {
  return (unsigned)t < ESP_DTYPES ? types[t].name : "unknown";
}

const char *esp_dtype_st_name(esp_dtype t) {
  return (unsigned)t < ESP_DTYPES ? types[t].st_name : "unknown";
}

int esp_dtype_parse(const char *name) {
  for (int t = 0; t < ESP_DTYPES; t++)
    if (strcmp(name, types[t].name) == 0 || strcmp(name, types[t].st_name) == 0) return t;
  /* torch's spellings, as in config.json */
  static const struct {
    const char *name;
    esp_dtype type;
  } other[] = {{"float32", ESP_F32}, {"bfloat16", ESP_BF16}, {"float16", ESP_F16}, {"float64", ESP_F64}};
  for (size_t i = 0; i < sizeof other / sizeof *other; i++)
    if (strcmp(name, other[i].name) == 0) return other[i].type;
  return -1;
}

static inline float bits_f32(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static inline uint32_t f32_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

float esp_f16_to_f32(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = h >> 10 & 31u, mantissa = h & 1023u;
  if (exponent == 31) return bits_f32(sign | 0x7f800000u | mantissa << 13 | (mantissa ? 0x400000u : 0));
  if (exponent) return bits_f32(sign | (exponent + 112) << 23 | mantissa << 13);
  if (!mantissa) return bits_f32(sign);
  int shift = __builtin_clz(mantissa) - 21; /* brings the leading one to bit 10 */
  return bits_f32(sign | (uint32_t)(113 - shift) << 23 | (mantissa << shift & 1023u) << 13);
}

uint16_t esp_f32_to_f16(float f) {
  uint32_t u = f32_bits(f), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (a >> 13 & 0x3ffu)); /* NaN keeps its payload, quiet */
  if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);                     /* rounds to 2^16 or beyond */
  if (a >= 0x38800000u) {                                                      /* normal */
    uint32_t r = a - 0x38000000u;
    return (uint16_t)(sign | (r + 0xfffu + (r >> 13 & 1u)) >> 13);
  }
  if (a <= 0x33000000u) return (uint16_t)sign; /* up to half of the smallest denormal: even is zero */
  uint32_t m = (a & 0x7fffffu) | 0x800000u, drop = 126 - (a >> 23);
  uint32_t q = m >> drop, rest = m & ((1u << drop) - 1), half = 1u << (drop - 1);
  return (uint16_t)(sign | (q + (rest > half || (rest == half && (q & 1u)))));
}

/* Narrows a double, rounded once, to a format with `ebits` and `mbits`. Returns the bits. */
static uint32_t f64_narrow(double d, int ebits, int mbits) {
  uint64_t u;
  memcpy(&u, &d, 8);
  uint32_t sign = (uint32_t)(u >> 63) << (ebits + mbits), top = (1u << ebits) - 1;
  int exponent = (int)(u >> 52 & 0x7ff), bias = (1 << (ebits - 1)) - 1;
  uint64_t mantissa = u & 0xfffffffffffffull;
  if (exponent == 0x7ff) {
    uint32_t quiet = mantissa ? 1u << (mbits - 1) | (uint32_t)(mantissa >> (52 - mbits)) : 0;
    return sign | top << mbits | quiet;
  }
  if (exponent == 0) return sign; /* zero, or far below every narrow denormal */
  int e = exponent - 1023 + bias, drop = 52 - mbits;
  mantissa |= 1ull << 52;
  if (e <= 0) drop += 1 - e;
  if (drop > 54) return sign;
  uint64_t q = mantissa >> drop, rest = mantissa & ((1ull << drop) - 1), half = 1ull << (drop - 1);
  if (rest > half || (rest == half && (q & 1))) q++;
  /* A carry out of the mantissa moves into the exponent by itself. */
  uint64_t out = e <= 0 ? q : q + ((uint64_t)(e - 1) << mbits);
  if (out >= (uint64_t)top << mbits) out = (uint64_t)top << mbits;
  return sign | (uint32_t)out;
}

static double f32_widen(uint32_t u) {
  uint32_t mantissa = u & 0x7fffffu;
  if ((u >> 23 & 255u) == 0) return (u >> 31 ? -1.0 : 1.0) * (double)mantissa * 0x1p-149;
  return (double)bits_f32(u);
}

/* ---- bulk ---- */

#if defined(__x86_64__)
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define AVX2 __attribute__((target("avx2,fma,f16c")))

AVX512 static int64_t bf16_to_f32_512(float *dst, const uint16_t *src, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(src + i)));
    _mm512_storeu_si512(dst + i, _mm512_slli_epi32(w, 16));
  }
  return i;
}

AVX512 static int64_t f32_to_bf16_512(uint16_t *dst, const float *src, int64_t n) {
  const __m512i bias = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1), quiet = _mm512_set1_epi32(0x40);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), inf = _mm512_set1_epi32(0x7f800000);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __m512i u = _mm512_loadu_si512(src + i), high = _mm512_srli_epi32(u, 16);
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, bias), _mm512_and_si512(high, one));
    r = _mm512_srli_epi32(r, 16);
    __mmask16 nan = _mm512_cmpgt_epi32_mask(_mm512_and_si512(u, magnitude), inf);
    r = _mm512_mask_or_epi32(r, nan, high, quiet);
    _mm256_storeu_si256((__m256i *)(dst + i), _mm512_cvtepi32_epi16(r));
  }
  return i;
}

AVX512 static int64_t f16_to_f32_512(float *dst, const uint16_t *src, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(src + i))));
  return i;
}

AVX512 static int64_t f32_to_f16_512(uint16_t *dst, const float *src, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __m256i h = _mm512_cvtps_ph(_mm512_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256((__m256i *)(dst + i), h);
  }
  return i;
}

AVX2 static int64_t bf16_to_f32_256(float *dst, const uint16_t *src, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(src + i)));
    _mm256_storeu_si256((__m256i *)(dst + i), _mm256_slli_epi32(w, 16));
  }
  return i;
}

AVX2 static int64_t f32_to_bf16_256(uint16_t *dst, const float *src, int64_t n) {
  const __m256i bias = _mm256_set1_epi32(0x7fff), one = _mm256_set1_epi32(1), quiet = _mm256_set1_epi32(0x40);
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff), inf = _mm256_set1_epi32(0x7f800000);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256i u = _mm256_loadu_si256((const __m256i *)(src + i)), high = _mm256_srli_epi32(u, 16);
    __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, bias), _mm256_and_si256(high, one));
    r = _mm256_srli_epi32(r, 16);
    __m256i nan = _mm256_cmpgt_epi32(_mm256_and_si256(u, magnitude), inf);
    r = _mm256_blendv_epi8(r, _mm256_or_si256(high, quiet), nan);
    __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
    _mm_storeu_si128((__m128i *)(dst + i), packed);
  }
  return i;
}

AVX2 static int64_t f16_to_f32_256(float *dst, const uint16_t *src, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(src + i))));
  return i;
}

AVX2 static int64_t f32_to_f16_256(uint16_t *dst, const float *src, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128((__m128i *)(dst + i), h);
  }
  return i;
}

/* The vector part, by the level in use; returns how many elements it did. */
#define VECTOR_PART(name, dst, src, n)                                                                                 \
  (esp_cpu_isa() >= ESP_ISA_AVX512 ? name##_512(dst, src, n)                                                           \
                                   : (esp_cpu_isa() >= ESP_ISA_AVX2 ? name##_256(dst, src, n) : 0))
#else
#define VECTOR_PART(name, dst, src, n) 0
#endif

/* Source and destination may be unaligned inside a file mapping: memcpy for single elements. */
static inline uint16_t load16(const uint16_t *p) {
  uint16_t v;
  memcpy(&v, p, 2);
  return v;
}

static void bf16_to_f32(float *dst, const uint16_t *src, int64_t n) {
  int64_t i = VECTOR_PART(bf16_to_f32, dst, src, n);
  for (; i < n; i++) {
    uint32_t u = (uint32_t)load16((const uint16_t *)((const char *)src + 2 * i)) << 16;
    memcpy((char *)dst + 4 * i, &u, 4);
  }
}

static void f32_to_bf16(uint16_t *dst, const float *src, int64_t n) {
  int64_t i = VECTOR_PART(f32_to_bf16, dst, src, n);
  for (; i < n; i++) {
    float f;
    memcpy(&f, (const char *)src + 4 * i, 4);
    uint16_t h = esp_f32_to_bf16(f);
    memcpy((char *)dst + 2 * i, &h, 2);
  }
}

static void f16_to_f32(float *dst, const uint16_t *src, int64_t n) {
  int64_t i = VECTOR_PART(f16_to_f32, dst, src, n);
  for (; i < n; i++) {
    float f = esp_f16_to_f32(load16((const uint16_t *)((const char *)src + 2 * i)));
    memcpy((char *)dst + 4 * i, &f, 4);
  }
}

static void f32_to_f16(uint16_t *dst, const float *src, int64_t n) {
  int64_t i = VECTOR_PART(f32_to_f16, dst, src, n);
  for (; i < n; i++) {
    float f;
    memcpy(&f, (const char *)src + 4 * i, 4);
    uint16_t h = esp_f32_to_f16(f);
    memcpy((char *)dst + 2 * i, &h, 2);
  }
}

static void from_f64(void *dst, esp_dtype t, const void *src, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    double d;
    memcpy(&d, (const char *)src + 8 * i, 8);
    uint32_t u = t == ESP_F32 ? f64_narrow(d, 8, 23) : t == ESP_BF16 ? f64_narrow(d, 8, 7) : f64_narrow(d, 5, 10);
    uint16_t h = (uint16_t)u;
    if (t == ESP_F32)
      memcpy((char *)dst + 4 * i, &u, 4);
    else
      memcpy((char *)dst + 2 * i, &h, 2);
  }
}

static void to_f64(void *dst, const void *src, esp_dtype t, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t u;
    uint16_t h;
    if (t == ESP_F32) {
      memcpy(&u, (const char *)src + 4 * i, 4);
    } else {
      memcpy(&h, (const char *)src + 2 * i, 2);
      u = t == ESP_BF16 ? (uint32_t)h << 16 : f32_bits(esp_f16_to_f32(h));
    }
    double d = f32_widen(u);
    memcpy((char *)dst + 8 * i, &d, 8);
  }
}

/* Between the two 16-bit types through fp32: widening is exact, so there is one rounding. */
static void half_to_half(uint16_t *dst, esp_dtype dt, const uint16_t *src, int64_t n) {
  float block[256];
  for (int64_t i = 0; i < n; i += 256) {
    int64_t m = n - i < 256 ? n - i : 256;
    if (dt == ESP_BF16) {
      f16_to_f32(block, src + i, m);
      f32_to_bf16(dst + i, block, m);
    } else {
      bf16_to_f32(block, src + i, m);
      f32_to_f16(dst + i, block, m);
    }
  }
}

void esp_convert(void *dst, esp_dtype dt, const void *src, esp_dtype st, int64_t n) {
  if (n <= 0) return;
  if (dt == st) {
    memcpy(dst, src, (size_t)n * esp_dtype_size(dt));
  } else if (st == ESP_F64) {
    from_f64(dst, dt, src, n);
  } else if (dt == ESP_F64) {
    to_f64(dst, src, st, n);
  } else if (st == ESP_BF16 && dt == ESP_F32) {
    bf16_to_f32(dst, src, n);
  } else if (st == ESP_F32 && dt == ESP_BF16) {
    f32_to_bf16(dst, src, n);
  } else if (st == ESP_F16 && dt == ESP_F32) {
    f16_to_f32(dst, src, n);
  } else if (st == ESP_F32 && dt == ESP_F16) {
    f32_to_f16(dst, src, n);
  } else {
    half_to_half(dst, dt, src, n);
  }
}
