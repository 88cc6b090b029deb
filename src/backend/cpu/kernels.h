/* kernels.h: the vector kernels of the cpu backend as one table per instruction set. Each works on a range of rows (or
 * elements, or columns) in the calling thread; the files beside it cut the work and call esp_parallel. The tables
 * come from one source (kernels.inc.h) compiled for each level. */
#ifndef ESP_BACKEND_CPU_KERNELS_H
#define ESP_BACKEND_CPU_KERNELS_H

#include "backend/backend.h"

typedef struct esp_attn_part { /* one (sequence, head, block of queries) of attention, or one (sequence, head) */
  const esp_attn_args *a;
  int64_t t0, len; /* first token and length of the sequence */
  int head;
  int64_t q0;       /* forward: first query, relative to t0 */
  void *scratch;    /* of the thread */
  const void *pack; /* tile path: operands of all keys, and the first block of this sequence */
  int64_t block0;
  float *dk, *dv; /* backward: fp32 [len, head_dim], of this query head */
} esp_attn_part;

#define ESP_SPARSE_BLOCK 128 /* tokens that a sparse product takes at a time */

/* Products with small blocks, merged so that a block's columns fill a register: `p` and `q` columns of x and y each,
 * the last one perhaps fewer. */
enum { ESP_BLOCK_SMALL = 64, ESP_BLOCK_LANES = 16, ESP_BLOCK_MERGED = ESP_BLOCK_SMALL * ESP_BLOCK_LANES };
typedef struct esp_block_part {
  esp_tensor x, y, dm; /* y: dy of a gradient */
  const float *m;      /* [p, ld] of the first block, zeros beyond q */
  int64_t to_next, ld, p, q;
  int64_t x_step, y_step; /* elements from a group of x and of y to the next */
  float alpha, beta;
} esp_block_part;

typedef struct esp_kernels {
  /* elementwise over rows [r0, r1) */
  void (*axpby)(esp_tensor y, float a, esp_tensor x, float b, int64_t r0, int64_t r1);
  void (*mul_cols)(esp_tensor y, esp_tensor x, esp_tensor v, int64_t r0, int64_t r1);
  /* y[to ? to[i] : i] = scale * x[from ? from[i] : i], i in [r0, r1) */
  void (*copy_rows)(esp_tensor y, const int32_t *to, esp_tensor x, const int32_t *from, float scale, int64_t r0,
                    int64_t r1);
  void (*dropout)(esp_tensor y, esp_tensor x, float p, uint64_t seed, uint64_t stream, float beta, int64_t r0,
                  int64_t r1);
  void (*act)(esp_tensor y, esp_tensor x, esp_act act, int64_t r0, int64_t r1);
  void (*act_bwd)(esp_tensor dx, esp_tensor dy, esp_tensor x, esp_act act, int64_t r0, int64_t r1);
  void (*glu)(esp_tensor h, esp_tensor gu, esp_act act, int64_t r0, int64_t r1);
  void (*glu_bwd)(esp_tensor dgu, esp_tensor dh, esp_tensor gu, esp_act act, int64_t r0, int64_t r1);
  void (*norm)(const esp_norm_args *a, int64_t r0, int64_t r1);
  void (*norm_bwd)(const esp_norm_bwd_args *a, int64_t r0, int64_t r1);
  void (*rope)(const esp_rope_args *a, int64_t r0, int64_t r1);
  /* columns [c0, c1), all rows in order: sums that do not depend on the cutting */
  void (*norm_bwd_cols)(const esp_norm_bwd_args *a, int64_t c0, int64_t c1);
  void (*col_sum)(float *out, esp_tensor x, int64_t c0, int64_t c1);
  void (*embed_bwd)(float *dtable, esp_tensor dy, const int32_t *ids, float scale, int64_t c0, int64_t c1);
  double (*dot)(const float *a, const float *b, int64_t n);
  void (*update)(const esp_update_args *a, int64_t e0, int64_t e1);
  /* weight * nll of row r, and everything else that esp_ce_args asks of it */
  double (*cross_entropy)(const esp_ce_args *a, int64_t r, double *hit);
  double (*distill)(const esp_distill_args *a, int64_t r); /* weight * factor * KL of row r, and its d */
  double (*hidden_loss)(const esp_hidden_args *a, int64_t r);
  /* parts of adapter kinds: rows, but for col_dot (columns, all rows in order) */
  void (*mul)(esp_tensor y, esp_tensor a, esp_tensor b, float beta, int64_t r0, int64_t r1);
  void (*mul_rows)(esp_tensor y, esp_tensor x, esp_tensor v, float beta, int64_t r0, int64_t r1);
  void (*col_dot)(float *out, esp_tensor a, esp_tensor b, int64_t c0, int64_t c1);
  void (*row_dot)(float *out, esp_tensor a, esp_tensor b, float beta, int64_t r0, int64_t r1);
  /* columns of a block of tokens; rows of a sparse matrix */
  void (*by_column)(float *xt, esp_tensor x, int64_t c0, int64_t c1);
  void (*sparse_rows)(esp_tensor y, const float *xt, const esp_csr *s, int64_t r0, int64_t r1);
  void (*sparse_dots)(float *dvalues, esp_tensor dy, const float *xt, const esp_csr *s, int64_t r0, int64_t r1);
  void (*khatri_rao)(esp_tensor y, esp_tensor x, esp_tensor z, int64_t r0, int64_t r1);
  void (*khatri_rao_bwd)(esp_tensor dx, esp_tensor dz, esp_tensor dy, esp_tensor x, esp_tensor z, int64_t r0,
                         int64_t r1);
  void (*rank_gate)(esp_tensor y, esp_tensor x, const esp_gate *g, int64_t r0, int64_t r1);
  void (*rank_gate_bwd)(esp_tensor dx, esp_tensor dy, esp_tensor x, const esp_gate *g, int64_t r0, int64_t r1);
  void (*block_matmul)(const esp_block_part *o, int64_t r0, int64_t r1, int64_t g0, int64_t g1);
  void (*block_grad)(const esp_block_part *o, int64_t g0, int64_t g1);
  void (*invert)(float *a, int64_t ld, int64_t n);
  void (*attn)(const esp_attn_part *p);
  void (*attn_bwd)(const esp_attn_part *p);
  /* o row of one (sequence, head) of decoding */
  void (*attn_decode)(const esp_decode_args *a, int64_t b, int head, float *scores);
} esp_kernels;

extern const esp_kernels esp_kernels_plain, esp_kernels_avx2, esp_kernels_avx512, esp_kernels_amx;
const esp_kernels *esp_cpu_kernels(void); /* of esp_cpu_isa() */

static inline void *esp_row(const esp_tensor *t, int64_t r) {
  return (char *)t->data + (size_t)(r * t->ld) * (t->dtype == ESP_BF16 ? 2 : 4);
}
static inline bool esp_is_b(const esp_tensor *t) {
  return t->dtype == ESP_BF16;
}

/* Scratch of one thread in attention, bytes; max_len: the longest sequence. */
#define ESP_ATTN_BQ 64
#define ESP_ATTN_BK 64
static inline int64_t esp_attn_dp(int head_dim) { /* head_dim padded so that every loop runs in whole registers */
  return (head_dim + 63) / 64 * 64;
}
static inline int64_t esp_attn_scratch(int head_dim) {
  int64_t d = esp_attn_dp(head_dim), q = ESP_ATTN_BQ, k = ESP_ATTN_BK;
  /* Qt, Ot [d, q], K, V [k, d], S [k, q] */
  return 4 * (2 * d * q + 2 * k * d + k * q);
}
static inline int64_t esp_attn_bwd_scratch(int head_dim, int64_t max_len) {
  int64_t d = esp_attn_dp(head_dim), q = ESP_ATTN_BQ, k = ESP_ATTN_BK, lp = (max_len + q - 1) / q * q;
  /* Q, dO [q, d] and transposed, K, V, dK, dV [k, d], P, dS [k, q], dQt [lp/q][d, q], delta [lp] */
  return 4 * (4 * d * q + 4 * k * d + 2 * k * q + lp * d + lp);
}

#endif
