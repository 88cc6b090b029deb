/* k_elementwise.h: rows, columns and reductions (kernel bodies, see kernels.inc.h). */
#include "core/rng.h"

/* Calls BODY(yb, xb) with constant types. */
#define BY_TYPES2(BODY, y, x)                                                                                          \
  do {                                                                                                                 \
    if (esp_is_b(&(y))) {                                                                                              \
      if (esp_is_b(&(x)))                                                                                              \
        BODY(true, true);                                                                                              \
      else                                                                                                             \
        BODY(true, false);                                                                                             \
    } else {                                                                                                           \
      if (esp_is_b(&(x)))                                                                                              \
        BODY(false, true);                                                                                             \
      else                                                                                                             \
        BODY(false, false);                                                                                            \
    }                                                                                                                  \
  } while (0)

INLINE void axpby_row(void *y, const bool yb, float a, const void *x, const bool xb, float b, int64_t n) {
  vf va = vset(a), vb = vset(b);
  if (b == 0) {
    VEC_LOOP(i, n) stt(y, i, yb, va * ldt(x, i, xb, left), left);
  } else {
    VEC_LOOP(i, n) stt(y, i, yb, va * ldt(x, i, xb, left) + vb * ldt(y, i, yb, left), left);
  }
}
/* Short rows of one type are moved as they are, maybe to where they lie: 32 bytes are a row of a small block of bf16.
 */
INLINE void move_rows(esp_tensor y, const int32_t *to, esp_tensor x, const int32_t *from, int64_t r0, int64_t r1,
                      const size_t bytes) {
  for (int64_t r = r0; r < r1; r++) memmove(esp_row(&y, to ? to[r] : r), esp_row(&x, from ? from[r] : r), bytes);
}
INLINE bool moved(esp_tensor y, const int32_t *to, esp_tensor x, const int32_t *from, float scale, int64_t r0,
                  int64_t r1) {
  size_t bytes = (size_t)esp_tensor_cols(&y) * esp_dtype_size(y.dtype);
  if (scale != 1.0f || y.dtype != x.dtype || bytes > 128) return false;
  if (bytes == 32)
    move_rows(y, to, x, from, r0, r1, 32);
  else if (bytes == 64)
    move_rows(y, to, x, from, r0, r1, 64);
  else
    move_rows(y, to, x, from, r0, r1, bytes);
  return true;
}

static void k_axpby(esp_tensor y, float a, esp_tensor x, float b, int64_t r0, int64_t r1) {
  int64_t n = esp_tensor_cols(&y);
  if (b == 0 && moved(y, NULL, x, NULL, a, r0, r1)) return;
#define BODY(yb, xb)                                                                                                   \
  for (int64_t r = r0; r < r1; r++) axpby_row(esp_row(&y, r), yb, a, esp_row(&x, r), xb, b, n)
  BY_TYPES2(BODY, y, x);
#undef BODY
}

INLINE void mul_row(void *y, const bool yb, const void *x, const bool xb, const void *v, bool vb, int64_t n) {
  VEC_LOOP(i, n) stt(y, i, yb, ldt(x, i, xb, left) * ldt(v, i, vb, left), left);
}
static void k_mul_cols(esp_tensor y, esp_tensor x, esp_tensor v, int64_t r0, int64_t r1) {
  int64_t n = esp_tensor_cols(&y);
  bool vb = esp_is_b(&v);
#define BODY(yb, xb)                                                                                                   \
  for (int64_t r = r0; r < r1; r++) mul_row(esp_row(&y, r), yb, esp_row(&x, r), xb, v.data, vb, n)
  BY_TYPES2(BODY, y, x);
#undef BODY
}

static void k_copy_rows(esp_tensor y, const int32_t *to, esp_tensor x, const int32_t *from, float scale, int64_t r0,
                        int64_t r1) {
  int64_t n = esp_tensor_cols(&y);
  if (moved(y, to, x, from, scale, r0, r1)) return;
#define BODY(yb, xb)                                                                                                   \
  for (int64_t r = r0; r < r1; r++)                                                                                    \
  axpby_row(esp_row(&y, to ? to[r] : r), yb, scale, esp_row(&x, from ? from[r] : r), xb, 0.0f, n)
  BY_TYPES2(BODY, y, x);
#undef BODY
}

/* Words of blocks b .. b+VL-1 of the stream, one block per lane, written in element order: out[4*VL]. */
#if defined(ESP_K_AVX512)
INLINE void mul_wide(__m512i a, __m512i m, __m512i *hi, __m512i *lo) { /* 32 x 32 -> 64 bits in every lane */
  __m512i even = _mm512_mul_epu32(a, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
  *lo = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  *hi = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}
INLINE void philox_blocks(uint64_t seed, uint64_t stream, uint64_t b, uint32_t *out) {
  const __m512i m0 = _mm512_set1_epi32((int)0xD2511F53u), m1 = _mm512_set1_epi32((int)0xCD9E8D57u);
  uint32_t lo[VL] __attribute__((aligned(64))), hi[VL] __attribute__((aligned(64)));
  for (int i = 0; i < VL; i++) lo[i] = (uint32_t)(b + (uint64_t)i), hi[i] = (uint32_t)((b + (uint64_t)i) >> 32);
  __m512i c0 = _mm512_load_si512(lo), c1 = _mm512_load_si512(hi);
  __m512i c2 = _mm512_set1_epi32((int)(uint32_t)stream), c3 = _mm512_set1_epi32((int)(uint32_t)(stream >> 32));
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    __m512i h0, l0, h1, l1;
    mul_wide(c0, m0, &h0, &l0);
    mul_wide(c2, m1, &h1, &l1);
    c0 = _mm512_ternarylogic_epi32(h1, c1, _mm512_set1_epi32((int)k0), 0x96); /* xor of the three */
    c2 = _mm512_ternarylogic_epi32(h0, c3, _mm512_set1_epi32((int)k1), 0x96);
    c1 = l1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  /* [word][block] -> [block][word] */
  __m512i t0 = _mm512_unpacklo_epi32(c0, c1), t1 = _mm512_unpackhi_epi32(c0, c1);
  __m512i t2 = _mm512_unpacklo_epi32(c2, c3), t3 = _mm512_unpackhi_epi32(c2, c3);
  __m512i u0 = _mm512_unpacklo_epi64(t0, t2), u1 = _mm512_unpackhi_epi64(t0, t2);
  __m512i u2 = _mm512_unpacklo_epi64(t1, t3), u3 = _mm512_unpackhi_epi64(t1, t3); /* u_j lane L: block 4L+j */
  __m512i a = _mm512_shuffle_i32x4(u0, u1, 0x44), c = _mm512_shuffle_i32x4(u2, u3, 0x44);
  __m512i d = _mm512_shuffle_i32x4(u0, u1, 0xee), e = _mm512_shuffle_i32x4(u2, u3, 0xee);
  _mm512_store_si512(out, _mm512_shuffle_i32x4(a, c, 0x88));
  _mm512_store_si512(out + 16, _mm512_shuffle_i32x4(a, c, 0xdd));
  _mm512_store_si512(out + 32, _mm512_shuffle_i32x4(d, e, 0x88));
  _mm512_store_si512(out + 48, _mm512_shuffle_i32x4(d, e, 0xdd));
}
#else
INLINE void philox_blocks(uint64_t seed, uint64_t stream, uint64_t b, uint32_t *out) {
  uint32_t c[4][VL], k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int i = 0; i < VL; i++) {
    uint64_t n = b + (uint64_t)i;
    c[0][i] = (uint32_t)n;
    c[1][i] = (uint32_t)(n >> 32);
    c[2][i] = (uint32_t)stream;
    c[3][i] = (uint32_t)(stream >> 32);
  }
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < VL; i++) {
      uint64_t p0 = (uint64_t)0xD2511F53u * c[0][i], p1 = (uint64_t)0xCD9E8D57u * c[2][i];
      uint32_t n0 = (uint32_t)(p1 >> 32) ^ c[1][i] ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c[3][i] ^ k1;
      c[1][i] = (uint32_t)p1;
      c[3][i] = (uint32_t)p0;
      c[0][i] = n0;
      c[2][i] = n2;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < VL; i++)
    for (int j = 0; j < 4; j++) out[4 * i + j] = c[j][i];
}
#endif

/* Element e is kept when its 24-bit uniform is >= p: esp_rng_uniform(seed, stream, e). */
INLINE void dropout_row(void *y, const bool yb, const void *x, const bool xb, float p, uint64_t seed, uint64_t stream,
                        float beta, uint64_t e0, int64_t n) {
  enum { RUN = 4 * VL };
  uint32_t words[RUN + 4] __attribute__((aligned(64)));
  float keep[RUN + VL] __attribute__((aligned(64)));
  const float scale = 1.0f / (1.0f - p);
  for (int64_t i = 0; i < n;) {
    uint64_t e = e0 + (uint64_t)i;
    int skip = (int)(e & 3); /* a row may begin inside a block of four draws */
    int64_t m = n - i < RUN - skip ? n - i : RUN - skip;
    philox_blocks(seed, stream, e >> 2, words);
    for (int k = 0; k < (int)m; k++) keep[k] = (float)(words[k + skip] >> 8) * 0x1p-24f >= p ? scale : 0.0f;
    for (int64_t k = 0; k < m; k += VL) {
      int64_t left = m - k;
      vf v = ldt(x, i + k, xb, left) * ld(keep + k);
      if (beta != 0) v = v + vset(beta) * ldt(y, i + k, yb, left);
      stt(y, i + k, yb, v, left);
    }
    i += m;
  }
}
static void k_dropout(esp_tensor y, esp_tensor x, float p, uint64_t seed, uint64_t stream, float beta, int64_t r0,
                      int64_t r1) {
  int64_t n = esp_tensor_cols(&y);
#define BODY(yb, xb)                                                                                                   \
  for (int64_t r = r0; r < r1; r++)                                                                                    \
  dropout_row(esp_row(&y, r), yb, esp_row(&x, r), xb, p, seed, stream, beta, (uint64_t)(r * n), n)
  BY_TYPES2(BODY, y, x);
#undef BODY
}

static void k_col_sum(float *out, esp_tensor x, int64_t c0, int64_t c1) {
  int64_t rows = esp_tensor_rows(&x);
  bool b = esp_is_b(&x);
  for (int64_t c = c0; c < c1; c += VL) {
    int64_t left = c1 - c;
    vf s = vset(0);
    for (int64_t r = 0; r < rows; r++) s += ldt(esp_row(&x, r), c, b, left);
    stt(out, c, false, s + ldt(out, c, false, left), left);
  }
}

static void k_embed_bwd(float *dtable, esp_tensor dy, const int32_t *ids, float scale, int64_t c0, int64_t c1) {
  int64_t rows = esp_tensor_rows(&dy), width = esp_tensor_cols(&dy);
  bool b = esp_is_b(&dy);
  vf s = vset(scale);
  for (int64_t r = 0; r < rows; r++) {
    float *d = dtable + (int64_t)ids[r] * width;
    const void *g = esp_row(&dy, r);
    for (int64_t c = c0; c < c1; c += VL) {
      int64_t left = c1 - c;
      stt(d, c, false, ldt(d, c, false, left) + s * ldt(g, c, b, left), left);
    }
  }
}

static double k_dot(const float *a, const float *b, int64_t n) {
  double s[16] = {0};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; j++) s[j] += (double)a[i + j] * (double)b[i + j];
  for (int j = 0; i < n; i++, j++) s[j] += (double)a[i] * (double)b[i];
  double sum = 0;
  for (int j = 0; j < 16; j++) sum += s[j];
  return sum;
}

/* [T, heads*head_dim]: pairs (i, i + rot/2) of each head by the angle of the token's position (RoFormer, arXiv
 * 2104.09864, in the half-split order of Hugging Face's Llama). */
INLINE void rope_head(void *x, const bool b, const float *cs, const float *sn, int64_t half, float sign) {
  vf sg = vset(sign);
  VEC_LOOP(i, half) {
    vf c = ldt(cs, i, false, left), s = sg * ldt(sn, i, false, left);
    vf u = ldt(x, i, b, left), v = ldt(x, half + i, b, left);
    stt(x, i, b, u * c - v * s, left);
    stt(x, half + i, b, v * c + u * s, left);
  }
}
static void k_rope(const esp_rope_args *a, int64_t r0, int64_t r1) {
  int64_t half = a->rot / 2;
  bool b = esp_is_b(&a->x);
  float sign = a->inverse ? -1.0f : 1.0f;
  for (int64_t r = r0; r < r1; r++) {
    const float *cs = a->cos_t + a->positions[r] * half, *sn = a->sin_t + a->positions[r] * half;
    char *x = esp_row(&a->x, r);
    for (int h = 0; h < a->heads; h++) {
      if (b)
        rope_head(x + (size_t)h * a->head_dim * 2, true, cs, sn, half, sign);
      else
        rope_head(x + (size_t)h * a->head_dim * 4, false, cs, sn, half, sign);
    }
  }
}
