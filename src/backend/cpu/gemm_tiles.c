/* gemm_tiles.c: interleaving and transposing bf16 blocks into tile form with AVX-512 (gemm_tiles.h). */
#include "backend/cpu/gemm_tiles.h"

#include <immintrin.h>

#include "backend/cpu/gemm_impl.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

/* 16 x 16 transpose of 32-bit elements in registers. */
static inline __attribute__((always_inline)) TARGET void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

static inline __mmask32 mask_below(int64_t n) {
  return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1;
}

TARGET void esp_amx_b_from_rows(uint16_t *dst, const uint16_t *src, int64_t ld, int64_t lo, int64_t hi, int64_t k) {
  __mmask32 mk = mask_below(k);
  for (int h = 0; h < 2; h++) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) {
      int64_t row = 16 * h + i;
      r[i] = row >= lo && row < hi ? _mm512_maskz_loadu_epi16(mk, src + row * ld) : _mm512_setzero_si512();
    }
    transpose16(r);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(dst + h * 512 + i * 32, r[i]);
  }
}

void esp_amx_block_from_rows(uint16_t *dst, const uint16_t *src, int64_t ld, int64_t rows, int64_t cols) {
  esp_amx_b_from_rows(dst, src, ld, 0, rows, cols);
}

/* Columns 0..15 and 16..31 of two rows, their elements alternating. */
#define PAIRS(first, second)                                                                                           \
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,   \
                                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);                                    \
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16))

TARGET void esp_amx_b_from_cols(uint16_t *dst, const uint16_t *src, int64_t ld, int64_t lo, int64_t hi, int64_t k) {
  __mmask32 m = mask_below(hi) & ~mask_below(lo);
  PAIRS(first, second);
  for (int i = 0; i < 16; i++) {
    __m512i a = _mm512_setzero_si512(), b = a;
    if (2 * i < k) a = _mm512_maskz_loadu_epi16(m, src + 2 * i * ld);
    if (2 * i + 1 < k) b = _mm512_maskz_loadu_epi16(m, src + (2 * i + 1) * ld);
    _mm512_storeu_si512(dst + i * 32, _mm512_permutex2var_epi16(a, first, b));
    _mm512_storeu_si512(dst + 512 + i * 32, _mm512_permutex2var_epi16(a, second, b));
  }
}

TARGET void esp_amx_b_from_long_rows(uint16_t *dst, int64_t panel, const uint16_t *src, int64_t ld, int64_t cols,
                                     int64_t k) {
  PAIRS(first, second);
  for (int64_t q = 0; q < ((k + 31) & ~(int64_t)31); q += 2) {
    uint16_t *d = dst + q / 32 * 1024 + q % 32 / 2 * 32;
    const uint16_t *p = src + q * ld;
    int64_t c = 0;
    for (; q + 1 < k && c + 32 <= cols; c += 32, d += panel) {
      __m512i a = _mm512_loadu_si512(p + c), b = _mm512_loadu_si512(p + ld + c);
      _mm512_store_si512(d, _mm512_permutex2var_epi16(a, first, b));
      _mm512_store_si512(d + 512, _mm512_permutex2var_epi16(a, second, b));
    }
    for (; c < cols; c += 32, d += panel) { /* the last columns, the last row, or nothing */
      __mmask32 m = mask_below(cols - c);
      __m512i a = _mm512_setzero_si512(), b = a;
      if (q < k) a = _mm512_maskz_loadu_epi16(m, p + c);
      if (q + 1 < k) b = _mm512_maskz_loadu_epi16(m, p + ld + c);
      _mm512_store_si512(d, _mm512_permutex2var_epi16(a, first, b));
      _mm512_store_si512(d + 512, _mm512_permutex2var_epi16(a, second, b));
    }
  }
}

/* 8 x 8 transpose of 64-bit elements, rows stored 64 bytes apart. */
static inline __attribute__((always_inline)) TARGET void transpose8_store(__m512i r[8], uint16_t *dst) {
  __m512i t[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm512_unpacklo_epi64(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi64(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    r[i] = _mm512_shuffle_i64x2(t[i], t[2 + i], 0x88);
    r[2 + i] = _mm512_shuffle_i64x2(t[i], t[2 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i64x2(t[4 + i], t[6 + i], 0x88);
    r[6 + i] = _mm512_shuffle_i64x2(t[4 + i], t[6 + i], 0xdd);
  }
  for (int i = 0; i < 2; i++) {
    _mm512_storeu_si512(dst + 32 * i, _mm512_shuffle_i64x2(r[i], r[4 + i], 0x88));
    _mm512_storeu_si512(dst + 32 * (4 + i), _mm512_shuffle_i64x2(r[i], r[4 + i], 0xdd));
    _mm512_storeu_si512(dst + 32 * (2 + i), _mm512_shuffle_i64x2(r[2 + i], r[6 + i], 0x88));
    _mm512_storeu_si512(dst + 32 * (6 + i), _mm512_shuffle_i64x2(r[2 + i], r[6 + i], 0xdd));
  }
}

/* Within a source row (one pair of i, 16 k as dwords) swapping the middle words of each quadword gives the two
 * destination dwords (k pair, i) and (k pair, i+1); what remains is a transpose of quadwords. */
TARGET void esp_amx_b_exchange(uint16_t *dst, const uint16_t *block) {
  const __m512i swap = _mm512_broadcast_i32x4(_mm_set_epi8(15, 14, 11, 10, 13, 12, 9, 8, 7, 6, 3, 2, 5, 4, 1, 0));
  for (int tile = 0; tile < 2; tile++)
    for (int half = 0; half < 2; half++) {
      __m512i r[8];
      for (int i = 0; i < 8; i++)
        r[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(block + tile * 512 + (half * 8 + i) * 32), swap);
      transpose8_store(r, dst + half * 512 + tile * 256);
    }
}

TARGET void esp_amx_a_from_cols(uint16_t *dst, const uint16_t *src, int64_t ld, int64_t lo, int64_t hi, int64_t k) {
  uint16_t pairs[1024] __attribute__((aligned(64)));
  esp_amx_b_from_cols(pairs, src, ld, lo, hi, k);
  for (int h = 0; h < 2; h++) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(pairs + h * 512 + i * 32);
    transpose16(r);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(dst + h * 512 + i * 32, r[i]);
  }
}

TARGET void esp_amx_a_pad(uint16_t *dst, const uint16_t *src, int64_t ld, int64_t rows, int64_t cols) {
  __mmask32 m = mask_below(cols);
  for (int64_t r = 0; r < rows; r++) _mm512_storeu_si512(dst + r * 32, _mm512_maskz_loadu_epi16(m, src + r * ld));
}

TARGET static inline __m512 load16(const void *p, esp_dtype t, int64_t i, __mmask16 m) {
  if (t == ESP_F32) return _mm512_maskz_loadu_ps(m, (const float *)p + i);
  __m256i h = _mm256_maskz_loadu_epi16(m, (const uint16_t *)p + i);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

/* Whole panels to bf16, the case of nearly every product. */
TARGET static void epilogue_panel(const esp_gjob *j, uint16_t *c, int64_t n0, int64_t rows, const float *sum,
                                  int64_t lds) {
  __m512 b0 = _mm512_setzero_ps(), b1 = b0;
  if (j->bias) {
    b0 = load16(j->bias, j->bias_type, n0, 0xffff);
    b1 = load16(j->bias, j->bias_type, n0 + 16, 0xffff);
  }
  __m512 alpha = _mm512_set1_ps(j->alpha), beta = _mm512_set1_ps(j->beta);
  if (!j->bias && j->beta == 0) {
    for (int64_t r = 0; r < rows; r++)
      _mm512_storeu_si512(c + r * j->ldc,
                          (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(alpha, _mm512_load_ps(sum + r * lds + 16)),
                                                       _mm512_mul_ps(alpha, _mm512_load_ps(sum + r * lds))));
    return;
  }
  for (int64_t r = 0; r < rows; r++) {
    uint16_t *p = c + r * j->ldc;
    __m512 v0 = _mm512_add_ps(_mm512_mul_ps(alpha, _mm512_load_ps(sum + r * lds)), b0);
    __m512 v1 = _mm512_add_ps(_mm512_mul_ps(alpha, _mm512_load_ps(sum + r * lds + 16)), b1);
    if (j->beta != 0) {
      v0 = _mm512_add_ps(v0, _mm512_mul_ps(beta, load16(p, ESP_BF16, 0, 0xffff)));
      v1 = _mm512_add_ps(v1, _mm512_mul_ps(beta, load16(p, ESP_BF16, 16, 0xffff)));
    }
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(v1, v0));
  }
}

/* A transposed result (gradients of thin weights): a column of sums becomes a row of c. */
TARGET static void epilogue_transposed(const esp_gjob *j, int64_t m0, int64_t n0, int64_t rows, int64_t cols,
                                       const float *sum, int64_t lds) {
  __m512i at = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                  _mm512_set1_epi32((int)lds));
  __m512 alpha = _mm512_set1_ps(j->alpha), beta = _mm512_set1_ps(j->beta);
  for (int64_t i = 0; i < cols; i++)
    for (int64_t r = 0; r < rows; r += 16) {
      __mmask16 m = rows - r >= 16 ? 0xffff : (__mmask16)((1u << (rows - r)) - 1);
      int64_t e = (n0 + i) * j->ldc + m0 + r;
      __m512 v = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), m, at, sum + r * lds + i, 4);
      v = _mm512_mul_ps(v, alpha);
      if (j->beta != 0) v = _mm512_add_ps(v, _mm512_mul_ps(load16(j->c, j->c_type, e, m), beta));
      if (j->c_type == ESP_F32)
        _mm512_mask_storeu_ps((float *)j->c + e, m, v);
      else
        _mm256_mask_storeu_epi16((uint16_t *)j->c + e, m, (__m256i)_mm512_cvtneps_pbh(v));
    }
}

TARGET void esp_gemm_epilogue_avx512(const esp_gjob *j, int64_t m0, int64_t n0, int64_t rows, int64_t cols,
                                     const float *sum, int64_t lds) {
  if (j->c_trans) {
    epilogue_transposed(j, m0, n0, rows, cols, sum, lds);
    return;
  }
  if (cols == 32 && lds == 32 && j->c_type == ESP_BF16) {
    epilogue_panel(j, (uint16_t *)j->c + m0 * j->ldc + n0, n0, rows, sum, lds);
    return;
  }
  /* logits far larger than any cache are written past it, which spares reading the lines first */
  bool huge = j->c_type == ESP_F32 && j->beta == 0 && j->m * j->n >= ESP_GEMM_HUGE;
  bool scale = j->alpha != 1, beta = j->beta != 0;
  __m512 alpha = _mm512_set1_ps(j->alpha), vbeta = _mm512_set1_ps(j->beta);
  for (int64_t i = 0; i < cols; i += 16) {
    __mmask16 m = cols - i >= 16 ? 0xffff : (__mmask16)((1u << (cols - i)) - 1);
    bool stream = huge && m == 0xffff;
    __m512 bias = j->bias ? load16(j->bias, j->bias_type, n0 + i, m) : _mm512_setzero_ps();
    for (int64_t r = 0; r < rows; r++) {
      int64_t e = (m0 + r) * j->ldc + n0 + i;
      __m512 v = _mm512_maskz_loadu_ps(m, sum + r * lds + i);
      if (scale) v = _mm512_mul_ps(v, alpha);
      if (j->bias) v = _mm512_add_ps(v, bias);
      if (beta) v = _mm512_add_ps(v, _mm512_mul_ps(load16(j->c, j->c_type, e, m), vbeta));
      if (stream && ((uintptr_t)((float *)j->c + e) & 63) == 0)
        _mm512_stream_ps((float *)j->c + e, v);
      else if (j->c_type == ESP_F32)
        _mm512_mask_storeu_ps((float *)j->c + e, m, v);
      else
        _mm256_mask_storeu_epi16((uint16_t *)j->c + e, m, (__m256i)_mm512_cvtneps_pbh(v));
    }
  }
}
