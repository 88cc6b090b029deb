/* blocks_amx.c: products with small bf16 blocks and their gradients through AMX tiles (ops_blocks.c says when): p and q
 * up to 64, p even, x read where it lies. A operands are 16 rows of 32 bf16, B operands 16 rows of 16 pairs. Tiles of a
 * call are made and used by one thread, sums run over tokens in order. */
#include "backend/cpu/blocks_amx.h"

#include "backend/cpu/work.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
enum { SIDE = 16, DEEP = 32, TILE = SIDE * DEEP }; /* TILE: elements */

typedef struct tile_config {
  uint8_t palette, start_row, reserved[14];
  uint16_t colsb[16];
  uint8_t rows[16];
} tile_config;

/* tmm0..3: sums; 4, 5: A; 6, 7: B. `last`: depth of 5 and of 7, which may be the end of a contraction. */
INLINE void configure(int64_t last) {
  tile_config c = {.palette = 1};
  for (int i = 0; i < 8; i++) c.colsb[i] = 64, c.rows[i] = 16;
  c.colsb[5] = (uint16_t)(last * 2);
  c.rows[7] = (uint8_t)(last / 2);
  __asm__ volatile("ldtilecfg %0" ::"m"(c)); /* see attention_amx.c */
}
#define TILE_LOAD(tile, p, stride) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(p), "r"(stride) : "memory")
#define TILE_STORE(tile, p, stride)                                                                                    \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(p), "r"(stride) : "memory")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
#define TILE_DOT(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)
#define TILE_RELEASE() __asm__ volatile("tilerelease" ::)

void esp_amx_block_pack(uint16_t *to, esp_tensor m, int64_t g, int64_t p, int64_t q, bool trans) {
  memset(to, 0, (size_t)esp_amx_block_elements(p, q) * sizeof *to);
  for (int64_t j = 0; j < q; j++)
    for (int64_t i = 0; i < p; i++) {
      const uint16_t *row = esp_row(&m, trans ? g * q + j : g * p + i);
      to[((j / SIDE * esp_amx_block_depths(p) + i / DEEP) * SIDE + i % DEEP / 2) * DEEP + j % SIDE * 2 + i % 2] =
          row[trans ? i : j];
    }
}

/* The first n of 16 columns. */
INLINE __mmask16 columns(int64_t n) {
  return n >= SIDE ? 0xffff : (__mmask16)((1u << n) - 1);
}

/* Columns [c, c + 16) of y, as far as `keep` goes, in n rows from r on: from 16 x 16 sums. */
INLINE void put(const esp_amx_blocks *o, int64_t r, int64_t n, int64_t c, __mmask16 keep, const float *sum) {
  __m512 alpha = _mm512_set1_ps(o->alpha), beta = _mm512_set1_ps(o->beta);
  bool adds = o->beta != 0;
  if (esp_is_b(&o->y)) {
    uint16_t *at = (uint16_t *)esp_row(&o->y, r) + c;
    for (int64_t t = 0, ld = o->y.ld; t < n; t++, at += ld) {
      __m512 v = _mm512_mul_ps(alpha, _mm512_load_ps(sum + t * SIDE));
      if (adds) {
        __m512i old = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(keep, at)), 16);
        v = _mm512_fmadd_ps(beta, (__m512)old, v);
      }
      _mm256_mask_storeu_epi16(at, keep, (__m256i)_mm512_cvtneps_pbh(v));
    }
  } else {
    float *at = (float *)esp_row(&o->y, r) + c;
    for (int64_t t = 0, ld = o->y.ld; t < n; t++, at += ld) {
      __m512 v = _mm512_mul_ps(alpha, _mm512_load_ps(sum + t * SIDE));
      if (adds) v = _mm512_fmadd_ps(beta, _mm512_maskz_loadu_ps(keep, at), v);
      _mm512_mask_storeu_ps(at, keep, v);
    }
  }
}

/* Sixteen rows of a group of x, at most n of them there: 4 their first half where there are two, 5 their last. */
INLINE void load_rows(const esp_amx_blocks *o, int64_t r, int64_t n, int64_t g, int64_t deep, uint16_t *pad) {
  int64_t stride = o->x.ld * 2;
  const uint16_t *x = (const uint16_t *)esp_row(&o->x, r) + g * o->x_step;
  if (n < SIDE) {
    for (int64_t t = 0; t < n; t++) memcpy(pad + t * 2 * DEEP, x + t * o->x.ld, (size_t)o->p * 2);
    x = pad, stride = 4 * DEEP;
  }
  if (deep == 2) TILE_LOAD(4, x, stride);
  TILE_LOAD(5, x + (deep - 1) * DEEP, stride);
}
#define PRODUCT(sum, b)                                                                                                \
  do {                                                                                                                 \
    TILE_ZERO(sum);                                                                                                    \
    if (deep == 2) {                                                                                                   \
      TILE_LOAD(6, b, tile_row);                                                                                       \
      TILE_DOT(sum, 4, 6);                                                                                             \
    }                                                                                                                  \
    TILE_LOAD(7, (b) + (deep - 1) * TILE, tile_row);                                                                   \
    TILE_DOT(sum, 5, 7);                                                                                               \
  } while (0)

/* 32 rows after the other, all groups of them: what lies beside each other is read and written together. */
void esp_amx_block_matmul(const esp_amx_blocks *o, int64_t r0, int64_t r1, int64_t g0, int64_t g1) {
  float sum[4][SIDE * SIDE] __attribute__((aligned(64)));
  uint16_t pad[SIDE * 2 * DEEP] __attribute__((aligned(64)));
  int64_t p = o->p, q = o->q, deep = esp_amx_block_depths(p), last = p - (deep - 1) * DEEP, tile_row = 64;
  configure(last);
  memset(pad, 0, sizeof pad);
  for (int64_t r = r0; r < r1; r += 2 * SIDE)
    for (int64_t g = g0; g < g1; g++) {
      int64_t n = r1 - r, low = n - SIDE;
      for (int64_t j = 0; j < q; j += 2 * SIDE) {
        const uint16_t *b = o->m + g * o->to_next + j / SIDE * deep * TILE;
        bool right = j + SIDE<q, lower = low> 0;
        int64_t c = g * o->y_step + j;
        load_rows(o, r, n, g, deep, pad);
        PRODUCT(0, b);
        if (right) PRODUCT(1, b + deep * TILE);
        if (lower) {
          load_rows(o, r + SIDE, low, g, deep, pad);
          PRODUCT(2, b);
          if (right) PRODUCT(3, b + deep * TILE);
        }
        TILE_STORE(0, sum[0], tile_row);
        if (right) TILE_STORE(1, sum[1], tile_row);
        if (lower) TILE_STORE(2, sum[2], tile_row);
        if (lower && right) TILE_STORE(3, sum[3], tile_row);
        put(o, r, n < SIDE ? n : SIDE, c, columns(q - j), sum[0]);
        if (right) put(o, r, n < SIDE ? n : SIDE, c + SIDE, columns(q - j - SIDE), sum[1]);
        if (lower) put(o, r + SIDE, low < SIDE ? low : SIDE, c, columns(q - j), sum[2]);
        if (lower && right) put(o, r + SIDE, low < SIDE ? low : SIDE, c + SIDE, columns(q - j - SIDE), sum[3]);
      }
    }
  TILE_RELEASE();
}

/* Sixteen columns of 32 tokens as pairs of tokens: [16 pairs][16][2]; zeros from the last token on and in the columns
 * that are not of `keep`. */
INLINE void pairs(__m512i *to, const esp_tensor *x, int64_t t, int64_t end, int64_t c, __mmask16 keep) {
  const uint16_t *at = (const uint16_t *)esp_row(x, t) + c;
  int64_t ld = x->ld;
  if (end - t >= DEEP) {
    for (int i = 0; i < SIDE; i++, at += 2 * ld) {
      __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(keep, at));
      __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(keep, at + ld));
      to[i] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    }
    return;
  }
  for (int i = 0; i < SIDE; i++, at += 2 * ld) {
    int64_t left = end - t - 2 * i;
    __m512i even = _mm512_setzero_si512(), odd = even;
    if (left > 0) even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(keep, at));
    if (left > 1) odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(keep, at + ld));
    to[i] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
  }
}
INLINE void turn16(__m512i *r) { /* 16 x 16 words, as in attention_amx.c */
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

/* The corner of a block at (i0, j0), at most 32 x 32: which quarters there are, and the columns of each operand. */
typedef struct corner {
  int64_t i0, j0;
  bool lower, right;
  __mmask16 rows[2], cols[2];
} corner;
INLINE corner corner_at(const esp_amx_blocks *o, int64_t i0, int64_t j0) {
  corner c = {i0, j0, i0 + SIDE < o->p, j0 + SIDE < o->q, {0}, {0}};
  c.rows[0] = columns(o->p - i0), c.cols[0] = columns(o->q - j0);
  if (c.lower) c.rows[1] = columns(o->p - i0 - SIDE);
  if (c.right) c.cols[1] = columns(o->q - j0 - SIDE);
  return c;
}
INLINE void corner_zero(void) {
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
}
/* += x_g^T dy_g over tokens [t, t + 32), those from `end` on left out */
INLINE void corner_add(const esp_amx_blocks *o, const corner *c, int64_t g, int64_t t, int64_t end) {
  __m512i a[2][SIDE], b[2][SIDE];
  int64_t tile_row = 64, at = g * o->x_step + c->i0, by = g * o->y_step + c->j0;
  pairs(a[0], &o->x, t, end, at, c->rows[0]);
  turn16(a[0]);
  pairs(b[0], &o->y, t, end, by, c->cols[0]);
  if (c->lower) {
    pairs(a[1], &o->x, t, end, at + SIDE, c->rows[1]);
    turn16(a[1]);
  }
  if (c->right) pairs(b[1], &o->y, t, end, by + SIDE, c->cols[1]);
  TILE_LOAD(4, a[0], tile_row);
  TILE_LOAD(6, b[0], tile_row);
  TILE_DOT(0, 4, 6);
  if (c->right) {
    TILE_LOAD(7, b[1], tile_row);
    TILE_DOT(1, 4, 7);
  }
  if (c->lower) {
    TILE_LOAD(5, a[1], tile_row);
    TILE_DOT(2, 5, 6);
  }
  if (c->lower && c->right) TILE_DOT(3, 5, 7);
}
/* Block g of dm += alpha times the sums. */
INLINE void corner_put(const esp_amx_blocks *o, const corner *c, int64_t g) {
  float sum[SIDE * SIDE] __attribute__((aligned(64)));
  __m512 alpha = _mm512_set1_ps(o->alpha);
  int64_t tile_row = 64;
  for (int part = 0; part < 4; part++) {
    int64_t i = c->i0 + part / 2 * SIDE, j = c->j0 + part % 2 * SIDE;
    if (i >= o->p || j >= o->q) continue;
    if (part == 0) TILE_STORE(0, sum, tile_row);
    if (part == 1) TILE_STORE(1, sum, tile_row);
    if (part == 2) TILE_STORE(2, sum, tile_row);
    if (part == 3) TILE_STORE(3, sum, tile_row);
    for (int64_t k = 0; k < SIDE && i + k < o->p; k++) {
      float *d = (float *)esp_row(&o->dm, g * o->p + i + k) + j;
      __m512 old = _mm512_maskz_loadu_ps(c->cols[part % 2], d);
      _mm512_mask_storeu_ps(d, c->cols[part % 2], _mm512_fmadd_ps(alpha, _mm512_load_ps(sum + k * SIDE), old));
    }
  }
}

void esp_amx_block_grad(const esp_amx_blocks *o, int64_t g0, int64_t g1) {
  int64_t tokens = esp_block_tokens(&o->x);
  configure(DEEP);
  for (int64_t g = g0; g < g1; g++)
    for (int64_t i = 0; i < o->p; i += 2 * SIDE)
      for (int64_t j = 0; j < o->q; j += 2 * SIDE) {
        corner c = corner_at(o, i, j);
        corner_zero();
        for (int64_t t = 0; t < tokens; t += DEEP) corner_add(o, &c, g, t, tokens);
        corner_put(o, &c, g);
      }
  TILE_RELEASE();
}

void esp_amx_block_grad_shared(const esp_amx_blocks *o, int blocks, int64_t t0, int64_t t1, int64_t part) {
  configure(DEEP);
  for (int64_t i = 0; i < o->p; i += 2 * SIDE)
    for (int64_t j = 0; j < o->q; j += 2 * SIDE) {
      corner c = corner_at(o, i, j);
      corner_zero();
      for (int64_t t = t0; t < t1; t += DEEP)
        for (int64_t g = 0; g < blocks; g++) corner_add(o, &c, g, t, t1);
      corner_put(o, &c, part);
    }
  TILE_RELEASE();
}
#else
void esp_amx_block_pack(uint16_t *to, esp_tensor m, int64_t g, int64_t p, int64_t q, bool trans) {
}
void esp_amx_block_matmul(const esp_amx_blocks *o, int64_t r0, int64_t r1, int64_t g0, int64_t g1) {
}
void esp_amx_block_grad(const esp_amx_blocks *o, int64_t g0, int64_t g1) {
}
void esp_amx_block_grad_shared(const esp_amx_blocks *o, int blocks, int64_t t0, int64_t t1, int64_t part) {
}
#endif
