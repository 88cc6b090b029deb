/* blocks_amx.c: products with small bf16 blocks and their gradients through AMX tiles (ops_blocks.c says when): p and q
 * multiples of 16 up to 64, x read where it lies. A operands are 16 rows of 32 bf16, B operands 16 rows of 16 pairs.
 * Tiles of a call are made and used by one thread, sums run over tokens in order. */
#include "backend/cpu/blocks_amx.h"

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

/* Columns of 16 outputs, by depths of 32: [q/16][depths][16 pairs][16][2]. */
static int64_t depths(int64_t p) {
  return (p + DEEP - 1) / DEEP;
}
int64_t esp_amx_block_elements(int64_t p, int64_t q) {
  return q / SIDE * depths(p) * TILE;
}
void esp_amx_block_pack(uint16_t *to, esp_tensor m, int64_t g, int64_t p, int64_t q, bool trans) {
  for (int64_t j = 0; j < q; j++)
    for (int64_t i = 0; i < p; i++) {
      const uint16_t *row = esp_row(&m, trans ? g * q + j : g * p + i);
      to[((j / SIDE * depths(p) + i / DEEP) * SIDE + i % DEEP / 2) * DEEP + j % SIDE * 2 + i % 2] = row[trans ? i : j];
    }
}

/* One row of y from 16 sums. */
INLINE void put(const esp_amx_blocks *o, int64_t r, int64_t c, const float *sum) {
  __m512 v = _mm512_mul_ps(_mm512_set1_ps(o->alpha), _mm512_loadu_ps(sum));
  void *y = esp_row(&o->y, r);
  if (esp_is_b(&o->y)) {
    uint16_t *at = (uint16_t *)y + c;
    if (o->beta != 0) {
      __m512i old = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at)), 16);
      v = _mm512_fmadd_ps(_mm512_set1_ps(o->beta), (__m512)old, v);
    }
    _mm256_storeu_si256((__m256i *)at, (__m256i)_mm512_cvtneps_pbh(v));
  } else {
    float *at = (float *)y + c;
    if (o->beta != 0) v = _mm512_fmadd_ps(_mm512_set1_ps(o->beta), _mm512_loadu_ps(at), v);
    _mm512_storeu_ps(at, v);
  }
}

void esp_amx_block_matmul(const esp_amx_blocks *o, int64_t r0, int64_t r1, int64_t g0, int64_t g1) {
  float sum[SIDE * SIDE] __attribute__((aligned(64)));
  uint16_t pad[SIDE * 2 * DEEP] __attribute__((aligned(64)));
  int64_t p = o->p, q = o->q, deep = depths(p), last = p - (deep - 1) * DEEP, tile_row = 64,
          pad_row = sizeof pad / SIDE;
  configure(last);
  memset(pad, 0, sizeof pad);
  for (int64_t g = g0; g < g1; g++) {
    const uint16_t *m = o->m + g * o->to_next;
    for (int64_t r = r0; r < r1; r += SIDE) {
      int64_t n = r1 - r < SIDE ? r1 - r : SIDE, stride = o->x.ld * 2;
      const uint16_t *x = (const uint16_t *)esp_row(&o->x, r) + g * o->x_step;
      if (n < SIDE) {
        for (int64_t t = 0; t < n; t++) memcpy(pad + t * (pad_row / 2), x + t * o->x.ld, (size_t)p * 2);
        x = pad, stride = pad_row;
      }
      if (deep == 2) TILE_LOAD(4, x, stride);
      TILE_LOAD(5, x + (deep - 1) * DEEP, stride);
      for (int64_t j = 0; j < q; j += SIDE) {
        const uint16_t *b = m + j / SIDE * deep * TILE;
        TILE_ZERO(0);
        if (deep == 2) {
          TILE_LOAD(6, b, tile_row);
          TILE_DOT(0, 4, 6);
        }
        TILE_LOAD(7, b + (deep - 1) * TILE, tile_row);
        TILE_DOT(0, 5, 7);
        TILE_STORE(0, sum, tile_row);
        for (int64_t t = 0; t < n; t++) put(o, r + t, g * o->y_step + j, sum + t * SIDE);
      }
    }
  }
  TILE_RELEASE();
}

/* Sixteen columns of 32 tokens as pairs of tokens: [16 pairs][16][2]; zeros behind the last token. */
INLINE void pairs(__m512i *to, const esp_tensor *x, int64_t t, int64_t tokens, int64_t c) {
  for (int i = 0; i < SIDE; i++) {
    __m512i v[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int k = 0; k < 2; k++)
      if (t + 2 * i + k < tokens)
        v[k] = _mm512_cvtepu16_epi32(
            _mm256_loadu_si256((const __m256i *)((const uint16_t *)esp_row(x, t + 2 * i + k) + c)));
    to[i] = _mm512_or_si512(v[0], _mm512_slli_epi32(v[1], 16));
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

/* dm[i0.., j0..] of one block, at most 32 x 32, over all tokens. */
static void grad_corner(const esp_amx_blocks *o, int64_t g, int64_t i0, int64_t j0) {
  __m512i a[2][SIDE], b[2][SIDE];
  float sum[SIDE * SIDE] __attribute__((aligned(64)));
  int64_t tokens = esp_block_tokens(&o->x), tile_row = 64, q = o->q;
  bool lower = i0 + SIDE < o->p, right = j0 + SIDE < q;
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int64_t t = 0; t < tokens; t += DEEP) {
    pairs(a[0], &o->x, t, tokens, g * o->x_step + i0);
    turn16(a[0]);
    pairs(b[0], &o->y, t, tokens, g * o->y_step + j0);
    if (lower) {
      pairs(a[1], &o->x, t, tokens, g * o->x_step + i0 + SIDE);
      turn16(a[1]);
    }
    if (right) pairs(b[1], &o->y, t, tokens, g * o->y_step + j0 + SIDE);
    TILE_LOAD(4, a[0], tile_row);
    TILE_LOAD(6, b[0], tile_row);
    TILE_DOT(0, 4, 6);
    if (right) {
      TILE_LOAD(7, b[1], tile_row);
      TILE_DOT(1, 4, 7);
    }
    if (lower) {
      TILE_LOAD(5, a[1], tile_row);
      TILE_DOT(2, 5, 6);
    }
    if (lower && right) TILE_DOT(3, 5, 7);
  }
  __m512 alpha = _mm512_set1_ps(o->alpha);
  for (int part = 0; part < 4; part++) {
    int64_t i = i0 + part / 2 * SIDE, j = j0 + part % 2 * SIDE;
    if (i >= o->p || j >= q) continue;
    if (part == 0) TILE_STORE(0, sum, tile_row);
    if (part == 1) TILE_STORE(1, sum, tile_row);
    if (part == 2) TILE_STORE(2, sum, tile_row);
    if (part == 3) TILE_STORE(3, sum, tile_row);
    for (int64_t k = 0; k < SIDE; k++) {
      float *d = (float *)esp_row(&o->dm, g * o->p + i + k) + j;
      _mm512_storeu_ps(d, _mm512_fmadd_ps(alpha, _mm512_loadu_ps(sum + k * SIDE), _mm512_loadu_ps(d)));
    }
  }
}

void esp_amx_block_grad(const esp_amx_blocks *o, int64_t g0, int64_t g1) {
  configure(DEEP);
  for (int64_t g = g0; g < g1; g++)
    for (int64_t i = 0; i < o->p; i += 2 * SIDE)
      for (int64_t j = 0; j < o->q; j += 2 * SIDE) grad_corner(o, g, i, j);
  TILE_RELEASE();
}
#else
int64_t esp_amx_block_elements(int64_t p, int64_t q) {
  return p * q;
}
void esp_amx_block_pack(uint16_t *to, esp_tensor m, int64_t g, int64_t p, int64_t q, bool trans) {
}
void esp_amx_block_matmul(const esp_amx_blocks *o, int64_t r0, int64_t r1, int64_t g0, int64_t g1) {
}
void esp_amx_block_grad(const esp_amx_blocks *o, int64_t g0, int64_t g1) {
}
#endif
