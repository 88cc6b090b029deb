/* attention_amx.c: flash attention of bf16 tensors through AMX tiles; same structure as k_attention.h (scores held
 * transposed, S[keys, queries], lanes are queries), with every product as tiles:
 *
 *   forward   S^T = K Q^T      O^T += V^T P^T
 *   backward  S^T = K Q^T      dP^T = V dO^T      dV += P^T dO      dK += dS^T Q      dQ^T += K^T dS^T
 *
 * A operands are 16 rows of 32 bf16; B operands are 16 rows of 16 pairs. K, V and their transposes are cut into tiles
 * once per call (esp_amx_attn_pack), Q and dO once per head. P and dS leave the registers as bf16 in tile order.
 * Needs head_dim a multiple of 32; everything else takes the vector kernels. */
#include "backend/cpu/attention_amx.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define TILE 1024 /* bytes */
#define BQ ESP_ATTN_BQ
#define BK ESP_ATTN_BK
#define HIDDEN -2e30f
#define LOG2E 1.44269504088896341f

typedef struct tile_config {
  uint8_t palette, start_row, reserved[14];
  uint16_t colsb[16];
  uint8_t rows[16];
} tile_config;

INLINE void configure(void) {
  tile_config c = {.palette = 1};
  for (int i = 0; i < 8; i++) c.colsb[i] = 64, c.rows[i] = 16;
  /* not _tile_loadconfig: gcc 12's tells the compiler of 8 bytes of the 64, and the other stores may vanish */
  __asm__ volatile("ldtilecfg %0" ::"m"(c));
}

INLINE __m512 exp2v(__m512 x) { /* Cephes' exp2f polynomial, relative error 2e-7; 0 far below */
  __m512 n = _mm512_roundscale_ps(x, 8), f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.535336188319500e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.339887440266574e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618437357674640e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550332471162809e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402264791363012e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931472028550421e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

INLINE void transpose16(__m512i *r) {
  __m512i t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int g = 0; g < 16; g += 4) {
    u[g] = _mm512_unpacklo_epi64(t[g], t[g + 2]);
    u[g + 1] = _mm512_unpackhi_epi64(t[g], t[g + 2]);
    u[g + 2] = _mm512_unpacklo_epi64(t[g + 1], t[g + 3]);
    u[g + 3] = _mm512_unpackhi_epi64(t[g + 1], t[g + 3]);
  }
  for (int j = 0; j < 4; j++) {
    __m512i a = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
    __m512i c = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd), d = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
    r[j] = _mm512_shuffle_i32x4(a, b, 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
    r[4 + j] = _mm512_shuffle_i32x4(c, d, 0x88);
    r[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
}

INLINE const uint16_t *head_row(const esp_tensor *x, int64_t t, int64_t col) {
  return (const uint16_t *)x->data + t * x->ld + col;
}

/* ---- operands from K and V: blocks of 32 keys ---- */

/* [32 keys, d] as A tiles [2 key halves][d/32] of [16 keys][32] */
static void tiles_rows(uint16_t *out, const esp_tensor *x, int64_t t, int64_t n, int64_t col, int64_t d) {
  for (int64_t k = 0; k < 32; k++)
    for (int64_t c = 0; c < d / 32; c++) {
      uint16_t *o = out + ((k / 16 * (d / 32) + c) * 16 + k % 16) * 32;
      if (k < n)
        memcpy(o, head_row(x, t + k, col) + c * 32, 64);
      else
        memset(o, 0, 64);
    }
}
/* [32 keys, d] transposed as A tiles [d/16] of [16 of d][32 keys] */
static void tiles_transposed(uint16_t *out, const esp_tensor *x, int64_t t, int64_t n, int64_t col, int64_t d) {
  uint16_t pick[32] __attribute__((aligned(64)));
  for (int i = 0; i < 32; i++) pick[i] = (uint16_t)(2 * i);
  const __m512i even = _mm512_load_si512(pick), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
  for (int64_t c = 0; c < d; c += 32) {
    __m512i r[2][16];
    for (int h = 0; h < 2; h++) {
      for (int k = 0; k < 16; k++)
        r[h][k] = h * 16 + k < n ? _mm512_loadu_si512(head_row(x, t + h * 16 + k, col) + c) : _mm512_setzero_si512();
      transpose16(r[h]); /* row: a pair along d; lane: a key */
    }
    for (int i = 0; i < 16; i++) {
      _mm512_storeu_si512(out + (c + 2 * i) * 32, _mm512_permutex2var_epi16(r[0][i], even, r[1][i]));
      _mm512_storeu_si512(out + (c + 2 * i + 1) * 32, _mm512_permutex2var_epi16(r[0][i], odd, r[1][i]));
    }
  }
}
INLINE void prefetch_rows(const esp_tensor *x, int64_t t, int64_t n, int64_t col, int64_t d) {
  for (int64_t r = 0; r < n; r++)
    for (int64_t i = 0; i < d; i += 32) _mm_prefetch((const char *)(head_row(x, t + r, col) + i), _MM_HINT_T0);
}

void esp_amx_attn_pack(const esp_attn_args *a, bool backward, void *pack, int kv_head, int64_t block) {
  int64_t d = a->head_dim, size = 32 * d, kinds = backward ? 3 : 2, col = kv_head * d;
  for (int s = 0; s < a->n_seqs; s++) {
    int64_t t0 = a->cu_seqlens[s], len = a->cu_seqlens[s + 1] - t0, b = block - esp_amx_first_block(a, s);
    if (b < 0 || b * 32 >= len) continue;
    uint16_t *out = (uint16_t *)pack + (kv_head * esp_amx_blocks(a) + block) * kinds * size;
    int64_t t = t0 + b * 32, n = len - b * 32 < 32 ? len - b * 32 : 32;
    tiles_rows(out, &a->k, t, n, col, d);
    if (backward) {
      tiles_rows(out + size, &a->v, t, n, col, d);
      tiles_transposed(out + 2 * size, &a->k, t, n, col, d);
    } else {
      tiles_transposed(out + size, &a->v, t, n, col, d);
    }
    return;
  }
}

/* ---- operands from Q and dO: blocks of 64 queries ---- */

/* [64 queries, d] transposed as B tiles [d/32][4 query groups]: row = pair along d, column = query */
static void tiles_b_transposed(uint16_t *out, const esp_tensor *x, int64_t t, int64_t n, int64_t col, int64_t d) {
  for (int64_t g = 0; g < BQ / 16; g++)
    for (int64_t c = 0; c < d / 32; c++) {
      __m512i r[16];
      for (int64_t q = 0; q < 16; q++)
        r[q] = g * 16 + q < n ? _mm512_loadu_si512(head_row(x, t + g * 16 + q, col) + c * 32) : _mm512_setzero_si512();
      transpose16(r);
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + ((c * (BQ / 16) + g) * 16 + i) * 32, r[i]);
    }
}
/* [64 queries, d] as B tiles [2][d/16]: row = pair of queries, column = one of d */
static void tiles_b_pairs(uint16_t *out, const esp_tensor *x, int64_t t, int64_t n, int64_t col, int64_t d) {
  for (int64_t q = 0; q < BQ; q += 2)
    for (int64_t i = 0; i < d; i += 16) {
      __m512i a = _mm512_setzero_si512(), b = a;
      if (q < n) a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(head_row(x, t + q, col) + i)));
      if (q + 1 < n) b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(head_row(x, t + q + 1, col) + i)));
      _mm512_storeu_si512(out + ((q / 32 * (d / 16) + i / 16) * 16 + q % 32 / 2) * 32,
                          _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
    }
}

/* s[32 keys, 64 queries] = A tiles (rows of keys) x B tiles (transposed queries) */
INLINE void product_scores(float *s, const char *a, const char *b, int64_t dc) {
  for (int g = 0; g < BQ / 16; g += 2) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t c = 0; c < dc; c++) {
      _tile_loadd(4, a + c * TILE, 64);
      _tile_loadd(6, b + (c * (BQ / 16) + g) * TILE, 64);
      _tile_loadd(7, b + (c * (BQ / 16) + g + 1) * TILE, 64);
      _tile_loadd(5, a + (dc + c) * TILE, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, s + g * 16, BQ * 4);
    _tile_stored(1, s + g * 16 + 16, BQ * 4);
    _tile_stored(2, s + 16 * BQ + g * 16, BQ * 4);
    _tile_stored(3, s + 16 * BQ + g * 16 + 16, BQ * 4);
  }
}
/* c[32, 32] (row stride ld floats) += sum over n steps of A tiles a0, a1 and B tiles b0, b1 */
INLINE void product_add(float *c, int64_t ld, int n, const char *a0, const char *a1, int64_t a_step, const char *b0,
                        const char *b1, int64_t b_step) {
  _tile_loadd(0, c, ld * 4);
  _tile_loadd(1, c + 16, ld * 4);
  _tile_loadd(2, c + 16 * ld, ld * 4);
  _tile_loadd(3, c + 16 * ld + 16, ld * 4);
  for (int i = 0; i < n; i++) {
    _tile_loadd(4, a0 + i * a_step, 64);
    _tile_loadd(6, b0 + i * b_step, 64);
    _tile_loadd(7, b1 + i * b_step, 64);
    _tile_loadd(5, a1 + i * a_step, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ld * 4);
  _tile_stored(1, c + 16, ld * 4);
  _tile_stored(2, c + 16 * ld, ld * 4);
  _tile_stored(3, c + 16 * ld + 16, ld * 4);
}

/* Hides keys past the sequence, after the query (causal) or before the window, in S[rows, 64]. */
static void hide(const esp_attn_args *a, float *s, int64_t len, int64_t q0, int64_t k0, int64_t rows) {
  bool past = k0 + rows > len, causal = a->causal && k0 + rows - 1 > q0;
  bool window = a->window > 0 && k0 <= q0 + BQ - 1 - a->window;
  if (!past && !causal && !window) return;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t k = 0; k < rows; k++)
    for (int64_t g = 0; g < BQ; g += 16) {
      __m512i i = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)(q0 + g))), j = _mm512_set1_epi32((int)(k0 + k));
      __mmask16 out = k0 + k >= len ? 0xffff : 0;
      if (causal) out |= _mm512_cmplt_epi32_mask(i, j);
      if (window) out |= _mm512_cmple_epi32_mask(j, _mm512_sub_epi32(i, _mm512_set1_epi32(a->window)));
      if (out) _mm512_mask_storeu_ps(s + k * BQ + g, out, _mm512_set1_ps(HIDDEN));
    }
}
static void softcap(float *s, int64_t n, float cap, float scale) {
  for (int64_t i = 0; i < n; i++) s[i] = cap * tanhf(s[i] * scale / cap);
}

INLINE __m512i to_pairs(__m512 even, __m512 odd) { /* 16 x (even, odd) as bf16 pairs */
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}
/* out rows [64 of block, d] bf16 = transpose of in[d, 64], each query times mul */
static void store_transposed(const esp_tensor *x, int64_t t, int64_t n, int64_t col, const float *in, int64_t d,
                             const float *mul) {
  for (int64_t g = 0; g < BQ && g < n; g += 16)
    for (int64_t i = 0; i < d; i += 16) {
      __m512i r[16];
      __m512 m = _mm512_loadu_ps(mul + g);
      for (int k = 0; k < 16; k++) r[k] = (__m512i)_mm512_mul_ps(_mm512_loadu_ps(in + (i + k) * BQ + g), m);
      transpose16(r);
      for (int64_t q = 0; q < 16 && g + q < n; q++)
        _mm256_storeu_si256((void *)((uint16_t *)x->data + (t + g + q) * x->ld + col + i),
                            (__m256i)_mm512_cvtneps_pbh((__m512)r[q]));
    }
}

void esp_amx_attn(const esp_attn_part *p) {
  const esp_attn_args *a = p->a;
  const int64_t d = a->head_dim, dc = d / 32, size = 32 * d * 2;
  const int kvh = p->head / (a->heads / a->kv_heads);
  const int64_t nq = p->len - p->q0 < BQ ? p->len - p->q0 : BQ;
  const char *kv = (const char *)p->pack + (kvh * esp_amx_blocks(a) + p->block0) * 2 * size;
  char *qb = p->scratch, *pt = qb + d * BQ * 2;
  float *s = (float *)(pt + BK * BQ * 2), *ot = s + BK * BQ;
  float m[BQ], l[BQ], corr[BQ] __attribute__((aligned(64)));
  const float to_log2 = a->softcap > 0 ? LOG2E : a->scale * LOG2E;
  const __m512 c = _mm512_set1_ps(to_log2);

  configure();
  tiles_b_transposed((uint16_t *)qb, &a->q, p->t0 + p->q0, nq, p->head * d, d);
  memset(ot, 0, (size_t)(d * BQ) * 4);
  for (int i = 0; i < BQ; i++) m[i] = -1e30f, l[i] = 0;
  int64_t end = a->causal ? p->q0 + nq : p->len, k0 = 0;
  if (a->window > 0 && p->q0 - a->window + 1 > 0) k0 = (p->q0 - a->window + 1) / BK * BK;
  for (; k0 < end; k0 += BK) {
    int halves = end - k0 > 32 ? 2 : 1, rows = 32 * halves;
    const char *block = kv + k0 / 32 * 2 * size;
    for (int h = 0; h < halves; h++) product_scores(s + h * 32 * BQ, block + h * 2 * size, qb, dc);
    if (a->softcap > 0) softcap(s, rows * BQ, a->softcap, a->scale);
    hide(a, s, p->len, p->q0, k0, rows);
    bool moved = false;
    for (int g = 0; g < BQ; g += 16) {
      __m512 old = _mm512_loadu_ps(m + g), t0 = old, t1 = old;
      for (int k = 0; k < rows; k += 2) {
        t0 = _mm512_max_ps(t0, _mm512_load_ps(s + k * BQ + g));
        t1 = _mm512_max_ps(t1, _mm512_load_ps(s + (k + 1) * BQ + g));
      }
      __m512 top = _mm512_max_ps(t0, t1), s0 = _mm512_setzero_ps(), s1 = s0;
      /* 0 where every key so far is hidden: there the rounding of top * c would outweigh everything */
      __m512 off = _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(top, _mm512_set1_ps(-1e29f), _CMP_NLT_UQ), top, c);
      for (int k = 0; k < rows; k += 2) {
        __m512 e0 = exp2v(_mm512_fmsub_ps(_mm512_load_ps(s + k * BQ + g), c, off));
        __m512 e1 = exp2v(_mm512_fmsub_ps(_mm512_load_ps(s + (k + 1) * BQ + g), c, off));
        s0 = _mm512_add_ps(s0, e0);
        s1 = _mm512_add_ps(s1, e1);
        _mm512_store_si512(pt + (k / 32 * (BQ / 16) + g / 16) * TILE + k % 32 / 2 * 64, to_pairs(e0, e1));
      }
      __m512 r = exp2v(_mm512_fmsub_ps(old, c, off));
      if (_mm512_cmp_ps_mask(old, top, _CMP_NEQ_UQ)) moved = true;
      _mm512_storeu_ps(m + g, top);
      _mm512_storeu_ps(l + g, _mm512_fmadd_ps(_mm512_loadu_ps(l + g), r, _mm512_add_ps(s0, s1)));
      _mm512_store_ps(corr + g, r);
    }
    if (moved)
      for (int g = 0; g < BQ; g += 16) {
        __m512 r = _mm512_load_ps(corr + g);
        for (int64_t i = 0; i < d; i++)
          _mm512_store_ps(ot + i * BQ + g, _mm512_mul_ps(_mm512_load_ps(ot + i * BQ + g), r));
      }
    const char *vt = block + size;
    for (int64_t i = 0; i < d / 16; i += 2)
      for (int g = 0; g < BQ / 16; g += 2)
        product_add(ot + i * 16 * BQ + g * 16, BQ, halves, vt + i * TILE, vt + (i + 1) * TILE, 2 * size, pt + g * TILE,
                    pt + (g + 1) * TILE, BQ / 16 * TILE);
  }
  _tile_release();
  for (int64_t r = 0; r < BQ; r++) {
    if (a->lse && r < nq)
      a->lse[(int64_t)p->head * esp_tensor_rows(&a->q) + p->t0 + p->q0 + r] = m[r] * (to_log2 / LOG2E) + logf(l[r]);
    corr[r] = 1.0f / l[r];
  }
  store_transposed(&a->o, p->t0 + p->q0, nq, p->head * d, ot, d, corr);
}

/* One block of 64 queries against 32 keys: P^T and dS^T as A tiles (pa, da), dS^T as B tiles (db). */
INLINE void probabilities(const esp_attn_args *a, const float *s, const float *dp, const float *lse2,
                          const float *delta, const float *slope, char *pa, char *da, char *db) {
  const __m512 c = _mm512_set1_ps(a->softcap > 0 ? LOG2E : a->scale * LOG2E), scale = _mm512_set1_ps(a->scale);
  for (int g = 0; g < BQ; g += 32) {
    const __m512 l0 = _mm512_loadu_ps(lse2 + g), l1 = _mm512_loadu_ps(lse2 + g + 16);
    const __m512 e0 = _mm512_loadu_ps(delta + g), e1 = _mm512_loadu_ps(delta + g + 16);
    for (int k = 0; k < 32; k += 2) {
      __m512 d[2][2];
      for (int r = 0; r < 2; r++) {
        const float *sr = s + (k + r) * BQ + g, *dr = dp + (k + r) * BQ + g;
        __m512 p0 = exp2v(_mm512_fmsub_ps(_mm512_load_ps(sr), c, l0));
        __m512 p1 = exp2v(_mm512_fmsub_ps(_mm512_load_ps(sr + 16), c, l1));
        d[r][0] = _mm512_mul_ps(_mm512_mul_ps(p0, scale), _mm512_sub_ps(_mm512_load_ps(dr), e0));
        d[r][1] = _mm512_mul_ps(_mm512_mul_ps(p1, scale), _mm512_sub_ps(_mm512_load_ps(dr + 16), e1));
        if (slope) {
          d[r][0] = _mm512_mul_ps(d[r][0], _mm512_load_ps(slope + (k + r) * BQ + g));
          d[r][1] = _mm512_mul_ps(d[r][1], _mm512_load_ps(slope + (k + r) * BQ + g + 16));
        }
        int64_t at = ((k / 16) * 2 + g / 32) * TILE + (k + r) % 16 * 64;
        _mm512_store_si512(pa + at, (__m512i)_mm512_cvtne2ps_pbh(p1, p0));
        _mm512_store_si512(da + at, (__m512i)_mm512_cvtne2ps_pbh(d[r][1], d[r][0]));
      }
      int64_t at = (k / 32 * (BQ / 16) + g / 16) * TILE + k % 32 / 2 * 64;
      _mm512_store_si512(db + at, to_pairs(d[0][0], d[1][0]));
      _mm512_store_si512(db + at + TILE, to_pairs(d[0][1], d[1][1]));
    }
  }
}

/* Operands of a run of queries (a few hundred, so that they and dQ stay in the second-level cache). */
typedef struct query_run {
  char *qt, *gt, *qp, *gp; /* per block of 64: Q and dO as B tiles, transposed and in pairs */
  float *dqt, *delta, *lse2;
} query_run;

static void prepare_queries(const esp_attn_part *p, const query_run *r, int64_t first, int64_t blocks) {
  const esp_attn_args *a = p->a;
  const int64_t d = a->head_dim, part = BQ * d * 2, col = p->head * d;
  const float *lse = a->lse + (int64_t)p->head * esp_tensor_rows(&a->q) + p->t0;
  memset(r->dqt, 0, (size_t)(blocks * BQ * d) * 4);
  for (int64_t b = 0; b < blocks; b++) {
    int64_t q0 = first + b * BQ, n = p->len - q0 < BQ ? p->len - q0 : BQ, t = p->t0 + q0;
    prefetch_rows(&a->q, t, n, col, d);
    prefetch_rows(&a->d_o, t, n, col, d);
    prefetch_rows(&a->o, t, n, col, d);
    tiles_b_transposed((uint16_t *)(r->qt + b * part), &a->q, t, n, col, d);
    tiles_b_pairs((uint16_t *)(r->qp + b * part), &a->q, t, n, col, d);
    tiles_b_transposed((uint16_t *)(r->gt + b * part), &a->d_o, t, n, col, d);
    tiles_b_pairs((uint16_t *)(r->gp + b * part), &a->d_o, t, n, col, d);
    for (int64_t i = 0; i < BQ; i++) {
      __m512 sum = _mm512_setzero_ps();
      if (i < n)
        for (int64_t c = 0; c < d; c += 16) {
          __m512i o = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(head_row(&a->o, t + i, col) + c)));
          __m512i g = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(head_row(&a->d_o, t + i, col) + c)));
          sum = _mm512_fmadd_ps((__m512)_mm512_slli_epi32(o, 16), (__m512)_mm512_slli_epi32(g, 16), sum);
        }
      r->delta[b * BQ + i] = _mm512_reduce_add_ps(sum);
      r->lse2[b * BQ + i] = i < n ? lse[q0 + i] * LOG2E : 1e30f; /* lanes past the end: P = 0 */
    }
  }
}

void esp_amx_attn_bwd(const esp_attn_part *p) {
  const esp_attn_args *a = p->a;
  const int64_t d = a->head_dim, dc = d / 32, size = 32 * d * 2, len = p->len, part = BQ * d * 2;
  const int kvh = p->head / (a->heads / a->kv_heads);
  const char *kv = (const char *)p->pack + (kvh * esp_amx_blocks(a) + p->block0) * 3 * size;
  const int64_t run = ESP_AMX_RUN / BQ; /* blocks */
  query_run r = {.qt = p->scratch};
  r.gt = r.qt + run * part;
  r.qp = r.gt + run * part;
  r.gp = r.qp + run * part;
  r.dqt = (float *)(r.gp + run * part);
  r.delta = r.dqt + run * BQ * d;
  r.lse2 = r.delta + run * BQ;
  float *s = r.lse2 + run * BQ, *dp = s + BK * BQ, *slope = dp + BK * BQ, *dk = slope + BK * BQ, *dv = dk + BK * d;
  char *pa = (char *)(dv + BK * d), *da = pa + BK * BQ * 2, *db = da + BK * BQ * 2;
  float one[BQ];
  for (int i = 0; i < BQ; i++) one[i] = 1;

  configure();
  for (int64_t first = 0; first < len; first += ESP_AMX_RUN) {
    int64_t last = first + ESP_AMX_RUN < len ? first + ESP_AMX_RUN : len;
    prepare_queries(p, &r, first, (last - first + BQ - 1) / BQ);
    int64_t k0 = 0;
    if (a->window > 0 && first - a->window + 1 > 0) k0 = (first - a->window + 1) / BK * BK;
    for (; k0 < (a->causal ? last : len); k0 += BK) {
      int halves = len - k0 > 32 ? 2 : 1;
      int64_t nk = len - k0 < BK ? len - k0 : BK, begin = first, stop = last;
      const char *block = kv + k0 / 32 * 3 * size;
      if (a->causal && k0 > begin) begin = k0;
      if (a->window > 0 && k0 + nk - 1 + a->window < stop) stop = k0 + nk - 1 + a->window;
      memset(dk, 0, (size_t)(2 * BK * d) * 4);
      if (k0 < first || (!a->causal && first > 0)) { /* an earlier run met these keys */
        memcpy(dk, p->dk + k0 * d, (size_t)(nk * d) * 4);
        memcpy(dv, p->dv + k0 * d, (size_t)(nk * d) * 4);
      }
      for (int64_t q0 = begin; q0 < stop; q0 += BQ) {
        int64_t b = (q0 - first) / BQ;
        for (int h = 0; h < halves; h++) { /* 32 keys at a time: what passes between the phases stays in L1 */
          const char *half = block + h * 3 * size;
          product_scores(s, half, r.qt + b * part, dc);
          product_scores(dp, half + size, r.gt + b * part, dc);
          if (a->softcap > 0) {
            softcap(s, 32 * BQ, a->softcap, a->scale);
            for (int i = 0; i < 32 * BQ; i++) slope[i] = 1 - s[i] / a->softcap * (s[i] / a->softcap);
          }
          hide(a, s, len, q0, k0 + 32 * h, 32);
          char *db_half = db + h * (BQ / 16) * TILE;
          if (a->softcap > 0)
            probabilities(a, s, dp, r.lse2 + b * BQ, r.delta + b * BQ, slope, pa, da, db_half);
          else
            probabilities(a, s, dp, r.lse2 + b * BQ, r.delta + b * BQ, NULL, pa, da, db_half);
          for (int64_t i = 0; i < d / 16; i += 2) {
            int64_t at = h * 32 * d + i * 16, row = d / 16 * TILE;
            const char *g = r.gp + b * part + i * TILE, *q = r.qp + b * part + i * TILE;
            product_add(dv + at, d, 2, pa, pa + 2 * TILE, TILE, g, g + TILE, row);
            product_add(dk + at, d, 2, da, da + 2 * TILE, TILE, q, q + TILE, row);
          }
        }
        const char *kt = block + 2 * size;
        for (int64_t i = 0; i < d / 16; i += 2)
          for (int g = 0; g < BQ / 16; g += 2)
            product_add(r.dqt + b * BQ * d + i * 16 * BQ + g * 16, BQ, halves, kt + i * TILE, kt + (i + 1) * TILE,
                        3 * size, db + g * TILE, db + (g + 1) * TILE, BQ / 16 * TILE);
      }
      memcpy(p->dk + k0 * d, dk, (size_t)(nk * d) * 4);
      memcpy(p->dv + k0 * d, dv, (size_t)(nk * d) * 4);
    }
    for (int64_t q0 = first; q0 < last; q0 += BQ)
      store_transposed(&a->d_q, p->t0 + q0, last - q0, p->head * d, r.dqt + (q0 - first) * d, d, one);
  }
  _tile_release();
}
#else
void esp_amx_attn_pack(const esp_attn_args *a, bool backward, void *pack, int kv_head, int64_t block) {
}
void esp_amx_attn(const esp_attn_part *p) {
}
void esp_amx_attn_bwd(const esp_attn_part *p) {
}
#endif
