/* gemm_amx.c: the bf16 engine. A stripe of 32 rows meets a panel of 32 columns in four fp32 tiles; per step of 32 in
 * the contraction two tiles of each operand are loaded for four TDPBF16PS. Operand a is read where it lies (only the
 * end of a contraction that is no multiple of 32 is copied); operand b is streamed from packed panels, or made once
 * per block into this thread's scratch, which stays in the second-level cache while the rows pass by.
 *
 * Tile instructions are own assembly: gcc 12's intrinsics do not tell the compiler which memory they touch. */
#include <string.h>

#include "backend/cpu/gemm_impl.h"
#include "backend/cpu/gemm_tiles.h"

/* Contraction elements of a stripe that stay in the first-level cache: 32 rows x 640 x 2 bytes = 40 KiB of 48. */
enum { RUN = 640 };

typedef struct tile_config {
  uint8_t palette, start_row, reserved[14];
  uint16_t colsb[16];
  uint8_t rows[16];
} tile_config;

#define TILE_LOAD(tile, p, stride) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(p), "r"(stride) : "memory")
/* The same with the hint that the data will not be wanted again soon: b streams past the stripe of a, which stays in
 * the first-level cache (2.0 instead of 1.5 TFLOP/s at a contraction of 576). */
#define TILE_STREAM(tile, p, stride)                                                                                   \
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #tile ::"r"(p), "r"(stride) : "memory")
#define TILE_STORE(tile, p, stride)                                                                                    \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(p), "r"(stride) : "memory")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
#define TILE_DOT(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

/* tmm0..3: sums (2 x 2), tmm4, 5: a, tmm6, 7: b, for a stripe of `rows` rows. */
static void configure(int64_t rows) {
  tile_config c;
  memset(&c, 0, sizeof c);
  c.palette = 1;
  uint8_t top = (uint8_t)esp_min64(rows, 16), bottom = (uint8_t)(rows > 16 ? rows - 16 : 16);
  for (int i = 0; i < 8; i++) c.colsb[i] = 64;
  c.rows[0] = c.rows[1] = c.rows[4] = top;
  c.rows[2] = c.rows[3] = c.rows[5] = bottom;
  c.rows[6] = c.rows[7] = 16;
  __asm__ volatile("ldtilecfg %0" ::"m"(c));
}

static void release(void) {
  __asm__ volatile("tilerelease" ::);
}

/* A run of steps: a advances by a_step bytes, b by one block. */
typedef struct seg {
  const char *a0, *a1; /* upper and lower 16 rows */
  int64_t a_stride, a_step;
  const char *b;
  int64_t steps;
} seg;

static inline __attribute__((always_inline)) void multiply(const seg *segs, int n_segs, const float *in, int64_t ld_in,
                                                           float *out, int64_t ld_out, bool lower, bool right) {
  int64_t si = ld_in * 4, so = ld_out * 4;
  if (in) {
    TILE_LOAD(0, in, si);
    if (right) TILE_LOAD(1, in + 16, si);
    if (lower) TILE_LOAD(2, in + 16 * ld_in, si);
    if (lower && right) TILE_LOAD(3, in + 16 * ld_in + 16, si);
  } else {
    TILE_ZERO(0);
    if (right) TILE_ZERO(1);
    if (lower) TILE_ZERO(2);
    if (lower && right) TILE_ZERO(3);
  }
  int64_t tile_row = 64;
  for (int s = 0; s < n_segs; s++) {
    const char *a0 = segs[s].a0, *a1 = segs[s].a1, *b = segs[s].b;
    int64_t stride = segs[s].a_stride, step = segs[s].a_step, steps = segs[s].steps;
    for (; steps > 0; steps--) {
      TILE_STREAM(6, b, tile_row);
      if (right) TILE_STREAM(7, b + 1024, tile_row);
      TILE_LOAD(4, a0, stride);
      TILE_DOT(0, 4, 6);
      if (right) TILE_DOT(1, 4, 7);
      if (lower) {
        TILE_LOAD(5, a1, stride);
        TILE_DOT(2, 5, 6);
        if (right) TILE_DOT(3, 5, 7);
      }
      a0 += step;
      a1 += step;
      b += ESP_GEMM_BLOCK;
    }
  }
  TILE_STORE(0, out, so);
  if (right) TILE_STORE(1, out + 16, so);
  if (lower) TILE_STORE(2, out + 16 * ld_out, so);
  if (lower && right) TILE_STORE(3, out + 16 * ld_out + 16, so);
}

static void multiply_any(const seg *segs, int n, const float *in, int64_t ld_in, float *out, int64_t ld_out, bool lower,
                         bool right) {
  if (lower && right)
    multiply(segs, n, in, ld_in, out, ld_out, true, true);
  else if (lower)
    multiply(segs, n, in, ld_in, out, ld_out, true, false);
  else if (right)
    multiply(segs, n, in, ld_in, out, ld_out, false, true);
  else
    multiply(segs, n, in, ld_in, out, ld_out, false, false);
}

/* Bytes between panels in scratch: written across panels, lines a power of two apart would fight for one cache set. */
enum { PANEL_GAP = 192 };

esp_gsizes esp_gemm_amx_sizes(const esp_gjob *j) {
  esp_gsizes z = {0};
  size_t blocks = (size_t)j->kb / 32, panels = (size_t)j->nb / 32;
  if (j->a.kind == ESP_GOPER_COLS) z.a = (size_t)j->mb / 32 * blocks * ESP_GEMM_BLOCK;
  if (j->b.kind != ESP_GOPER_VNNI) z.b = panels * (blocks * ESP_GEMM_BLOCK + PANEL_GAP);
  for (int i = 0; i < j->n_tails; i++) z.t += panels * (size_t)esp_ceil_div(j->tails[i].k, 32) * ESP_GEMM_BLOCK;
  z.c = (size_t)((j->kc > j->kb ? j->mb : 32) * j->nb) * 4;
  z.pad = (size_t)(1 + j->n_tails) * ESP_GEMM_BLOCK;
  return z;
}

/* Panels of columns [n0, n0+n) and contraction [k0, k0+nk), column `origin` of the result being the operand's 0. */
static void fill_b(uint16_t *dst, int64_t panel, const esp_goper *o, int64_t n0, int64_t n, int64_t origin,
                   int64_t n_end, int64_t k0, int64_t nk) {
  const uint16_t *p = o->data;
  int64_t blocks = esp_ceil_div(nk, 32);
  if (o->kind == ESP_GOPER_COLS && origin == 0 && n_end >= n0 + n) {
    esp_amx_b_from_long_rows(dst, panel, p + k0 * o->ld + n0, o->ld, n, nk);
    return;
  }
  for (int64_t c = n0; c < n0 + n; c += 32, dst += panel) {
    int64_t lo = esp_max64(0, origin - c), hi = esp_min64(32, n_end - c);
    if (lo >= hi) continue; /* never read: the tail does not meet this panel */
    for (int64_t b = 0; b < blocks; b++) {
      int64_t k = k0 + 32 * b, left = k0 + nk - k;
      if (o->kind == ESP_GOPER_ROWS)
        esp_amx_b_from_rows(dst + b * 1024, p + (c - origin) * o->ld + k, o->ld, lo, hi, left);
      else if (o->kind == ESP_GOPER_COLS)
        esp_amx_b_from_cols(dst + b * 1024, p + k * o->ld + (c - origin), o->ld, lo, hi, left);
      else
        esp_amx_b_exchange(dst + b * 1024, p + (k / 32 * o->ld + c / 32) * 1024);
    }
  }
}

int64_t esp_gemm_amx_fill_chunks(const esp_goper *b, int64_t n, int64_t k) {
  return b->kind == ESP_GOPER_COLS ? esp_ceil_div(k, 32) : esp_ceil_div(n, 32);
}

void esp_gemm_amx_fill(void *panels, const esp_goper *b, int64_t chunk, int64_t n, int64_t k) {
  int64_t panel = esp_ceil_div(k, 32) * 1024;
  uint16_t *d = panels;
  if (b->kind == ESP_GOPER_COLS)
    fill_b(d + chunk * 1024, panel, b, 0, n, 0, n, 32 * chunk, esp_min64(32, k - 32 * chunk));
  else
    fill_b(d + chunk * panel, panel, b, 32 * chunk, esp_min64(32, n - 32 * chunk), 0, n, 0, k);
}

/* Blocks of rows [m0, m0+m), a step of the contraction after the other: 32 streams of memory. */
static void fill_a(uint16_t *dst, int64_t stripe, const esp_goper *o, int64_t m0, int64_t m, int64_t k0, int64_t nk) {
  const uint16_t *p = (const uint16_t *)o->data + k0 * o->ld + m0;
  for (int64_t k = 0; k < nk; k += 32)
    for (int64_t r = 0; r < m; r += 32)
      esp_amx_a_from_cols(dst + r / 32 * stripe + k / 32 * 1024, p + k * o->ld + r, o->ld, 0, m - r, nk - k);
}

void esp_gemm_amx_fill_a(void *tiles, const esp_goper *a, int64_t chunk, int64_t m, int64_t k) {
  int64_t stripe = esp_ceil_div(k, 32) * 1024;
  fill_a((uint16_t *)tiles + chunk * 1024, stripe, a, 0, m, 32 * chunk, esp_min64(32, k - 32 * chunk));
}

static bool retag(uint64_t *tag, uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
  if (tag[0] == a && tag[1] == b && tag[2] == c && tag[3] == d) return false;
  tag[0] = a;
  tag[1] = b;
  tag[2] = c;
  tag[3] = d;
  return true;
}

/* Segments of rows [m, m+rows) of an operand read in place: whole steps, then the padded end. Returns how many. */
static int a_segments(seg *segs, const esp_goper *o, int64_t m, int64_t rows, int64_t k0, int64_t nk, char *pad) {
  const uint16_t *p = (const uint16_t *)o->data + m * o->ld + k0;
  int n = 0;
  int64_t stride = o->ld * 2, steps = nk / 32, rest = nk % 32;
  if (steps > 0) segs[n++] = (seg){(const char *)p, (const char *)p + 16 * stride, stride, 64, NULL, steps};
  if (rest > 0) {
    esp_amx_a_pad((uint16_t *)pad, p + steps * 32, o->ld, rows, rest);
    segs[n++] = (seg){pad, pad + 1024, 64, 64, NULL, 1};
  }
  return n;
}

/* Points n segments at consecutive blocks of b. */
static int b_segments(seg *segs, const seg *a, int n, const char *b) {
  for (int i = 0; i < n; i++) {
    segs[i] = a[i];
    segs[i].b = b;
    b += a[i].steps * ESP_GEMM_BLOCK;
  }
  return n;
}

typedef struct stripe {
  const esp_gjob *j;
  int64_t m, rows, n0, n1, kc;
  bool first, last, parts; /* of the contraction; parts: sums end in j->partial */
  float *keep;             /* sums between runs of the contraction, column n0 first */
  int64_t ld_keep;
} stripe;

/* The result's lines arrive while the product is made. */
static void prefetch_result(const esp_gjob *j, int64_t m, int64_t n, int64_t rows) {
  int64_t es = j->c_type == ESP_F32 ? 4 : 2;
  if (es == 4 && j->m * j->n >= ESP_GEMM_HUGE) return; /* written past the caches */
  const char *p = (const char *)j->c + (m * j->ldc + n) * es;
  for (int64_t r = 0; r < rows; r++, p += j->ldc * es) {
    __builtin_prefetch(p, 1, 3);
    if (es == 4) __builtin_prefetch(p + 64, 1, 3);
  }
}

/* 32 rows against the columns of a block, over contraction [k0, k0+nk). The rows are taken in runs that fit the
 * first-level cache beside what streams past; between runs the sums rest in `keep`. */
static void run_stripe(const stripe *st, const char *tiles_a, int64_t k0, int64_t nk, const char *b, int64_t b_panel,
                       char *const *tail_b, char *pad) {
  const esp_gjob *j = st->j;
  int64_t runs = esp_max64(1, esp_ceil_div(nk, RUN)), run = 32 * esp_ceil_div(nk, 32 * runs);
  for (int64_t at = 0, r = 0; r < runs; r++, at += run) {
    int64_t len = esp_min64(run, nk - at);
    bool last = st->last && r == runs - 1;
    seg a[2 * (1 + ESP_GEMM_MAX_TAILS)];
    int count[1 + ESP_GEMM_MAX_TAILS] = {0}, end;
    if (tiles_a) {
      const char *p = tiles_a + at / 32 * ESP_GEMM_BLOCK;
      a[0] = (seg){p, p + 1024, 64, ESP_GEMM_BLOCK, NULL, esp_ceil_div(len, 32)};
      count[0] = 1;
    } else {
      count[0] = a_segments(a, &j->a, st->m, st->rows, k0 + at, len, pad);
    }
    end = count[0];
    for (int i = 0; tail_b && last && i < j->n_tails; i++) {
      const esp_gtail *t = &j->tails[i];
      count[1 + i] = a_segments(a + end, &t->a, st->m, st->rows, 0, t->k, pad + (1 + i) * ESP_GEMM_BLOCK);
      end += count[1 + i];
    }
    for (int64_t n = st->n0, pan = 0; n < st->n1; n += 32, pan++) {
      int64_t cols = esp_min64(32, st->n1 - n);
      seg segs[2 * (1 + ESP_GEMM_MAX_TAILS)];
      int n_segs = b_segments(segs, a, count[0], b + pan * b_panel + at / 32 * ESP_GEMM_BLOCK);
      end = count[0];
      for (int i = 0; tail_b && last && i < j->n_tails; i++) {
        const esp_gtail *t = &j->tails[i];
        if (t->n0 < n + cols && n < t->n1)
          n_segs += b_segments(segs + n_segs, a + end, count[1 + i],
                               tail_b[i] + pan * esp_ceil_div(t->k, 32) * ESP_GEMM_BLOCK);
        end += count[1 + i];
      }
      float done[32 * 32] __attribute__((aligned(64)));
      float *keep = st->keep + (n - st->n0);
      bool begin = st->first && r == 0, store = last && !st->parts && !j->take;
      if (store && !j->c_trans) prefetch_result(j, st->m, n, st->rows);
      multiply_any(segs, n_segs, begin ? NULL : keep, st->ld_keep, store ? done : keep, store ? 32 : st->ld_keep,
                   st->rows > 16, cols > 16);
      if (!store) continue;
      esp_gemm_epilogue_avx512(j, st->m, n, st->rows, cols, done, 32);
    }
  }
}

void esp_gemm_amx_chunk(const esp_gjob *j, esp_gscratch *s, int64_t kc, int64_t mb, int64_t nb) {
  int64_t m0 = mb * j->mb, m1 = esp_min64(m0 + j->mb, j->m), n0 = nb * j->nb, n1 = esp_min64(n0 + j->nb, j->n);
  int64_t kbeg = kc * j->kc, kend = esp_min64(kbeg + j->kc, j->k), npad = (j->n + 31) & ~(int64_t)31;
  bool own_b = j->b.kind != ESP_GOPER_VNNI, own_a = j->a.kind == ESP_GOPER_COLS, parts = j->nkc > 1;
  bool tails = j->n_tails > 0 && kc == j->nkc - 1;
  char *tail_b[ESP_GEMM_MAX_TAILS];
  if (tails) {
    char *p = s->t;
    for (int i = 0; i < j->n_tails; i++) {
      tail_b[i] = p;
      p += j->nb / 32 * esp_ceil_div(j->tails[i].k, 32) * ESP_GEMM_BLOCK;
    }
    if (retag(s->t_tag, j->id, (uint64_t)nb, 0, 0))
      for (int i = 0; i < j->n_tails; i++) {
        const esp_gtail *t = &j->tails[i];
        fill_b((uint16_t *)tail_b[i], esp_ceil_div(t->k, 32) * 1024, &t->b, n0, n1 - n0, t->n0, t->n1, 0, t->k);
      }
  }
  int64_t configured = 0, k0 = kbeg;
  do { /* once even for an empty contraction: bias and beta still apply */
    int64_t nk = esp_max64(0, esp_min64(j->kb, kend - k0)), blocks = esp_ceil_div(nk, 32);
    bool first = k0 == kbeg, last = k0 + nk >= kend;
    const char *b = (const char *)j->b.data + (n0 / 32 * j->b.ld + k0 / 32) * ESP_GEMM_BLOCK;
    int64_t b_panel = j->b.ld * ESP_GEMM_BLOCK;
    if (own_b) {
      b_panel = blocks * ESP_GEMM_BLOCK + PANEL_GAP;
      if (retag(s->b_tag, j->id, (uint64_t)nb, (uint64_t)kc, (uint64_t)k0))
        fill_b((uint16_t *)s->b, b_panel / 2, &j->b, n0, n1 - n0, 0, j->n, k0, nk);
      b = s->b;
    }
    if (own_a && retag(s->a_tag, j->id, (uint64_t)mb, (uint64_t)kc, (uint64_t)k0))
      fill_a((uint16_t *)s->a, blocks * 1024, &j->a, m0, m1 - m0, k0, nk);
    for (int64_t m = m0; m < m1; m += 32) {
      int64_t rows = esp_min64(32, m1 - m);
      if (rows != configured) configure(configured = rows);
      stripe st = {j, m, rows, n0, n1, kc, first, last, parts, NULL, 0};
      if (parts) {
        st.ld_keep = npad;
        st.keep = j->partial + (kc * j->m + m) * npad + n0;
      } else {
        st.ld_keep = j->nb;
        st.keep = (float *)s->c + (j->kb < j->kc ? (m - m0) * j->nb : 0);
      }
      const char *a = NULL;
      if (own_a)
        a = s->a + (m - m0) / 32 * blocks * ESP_GEMM_BLOCK;
      else if (j->a.kind == ESP_GOPER_TILES)
        a = (const char *)j->a.data + (m / 32 * j->a.ld + k0 / 32) * ESP_GEMM_BLOCK;
      run_stripe(&st, a, k0, nk, b, b_panel, tails && last ? tail_b : NULL, s->pad);
      if (j->take && last) j->take(j->take_ctx, m, rows, n0, n1 - n0, st.keep, st.ld_keep);
    }
    k0 += esp_max64(nk, 1);
  } while (k0 < kend);
  if (j->c_type == ESP_F32 && j->m * j->n >= ESP_GEMM_HUGE) __asm__ volatile("sfence" ::: "memory");
  release();
}
