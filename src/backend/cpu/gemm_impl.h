/* gemm_impl.h: one matrix product as a job, shared by the driver (gemm.c) and its two engines: AMX tiles (gemm_amx.c)
 * and blocks of single-threaded sgemm (gemm_blas.c).
 *
 *   c[m,n] = alpha * sum_k a(m,k) b(n,k) + sum_tails sum_r ta(m,r) tb(n,r) + bias[n] + beta * c[m,n]
 *
 * A job is cut into (k part, m block, n block) chunks by its shape alone. With more than one k part each chunk writes
 * fp32 partial sums, which a second pass adds in order.
 */
#ifndef ESP_BACKEND_CPU_GEMM_IMPL_H
#define ESP_BACKEND_CPU_GEMM_IMPL_H

#include "backend/cpu/gemm.h"

enum {
  ESP_GEMM_BLOCK = 2048, /* bytes of a 32 x 32 bf16 block: two tiles */
  ESP_GEMM_MAX_TAILS = 16,
  ESP_GEMM_SHARED = 16 * 1024 * 1024, /* bytes of an operand that is made once for all threads, at most */
  ESP_GEMM_HUGE = 4 * 1024 * 1024     /* elements of an fp32 result that is written past the caches */
};

/* Where element (i, k) of an operand lies; i is the row (a) or the column (b) of the result. */
typedef enum esp_goper_kind {
  ESP_GOPER_ROWS,   /* data[i * ld + k] */
  ESP_GOPER_COLS,   /* data[k * ld + i] */
  ESP_GOPER_VNNI,   /* packed panels: block (i/32, k/32), two tiles [16 k pairs][16 i][2] */
  ESP_GOPER_VNNI_T, /* the same panels with i and k exchanged: block (k/32, i/32) */
  ESP_GOPER_TILES   /* a only: block (i/32, k/32), two tiles [16 i][32 k] */
} esp_goper_kind;

typedef struct esp_goper {
  const void *data;
  esp_dtype dtype; /* ESP_BF16 or ESP_F32 */
  esp_goper_kind kind;
  int64_t ld; /* elements; for the packed kinds: blocks of one panel */
} esp_goper;

typedef struct esp_gtail {
  esp_goper a, b; /* b's column 0 is the result's column n0 */
  int64_t n0, n1, k;
} esp_gtail;

typedef struct esp_gjob {
  int64_t m, n, k;
  esp_goper a, b;
  const esp_wview *added; /* b is this weight with sparse matrices added to it; NULL: as it is */
  int n_tails;
  esp_gtail tails[ESP_GEMM_MAX_TAILS];
  void *c;
  esp_dtype c_type;
  int64_t ldc;
  bool c_trans; /* c is stored [n, m] */
  float alpha, beta;
  const void *bias;
  esp_dtype bias_type;
  esp_gemm_take take; /* not NULL: sums go there and not to c */
  void *take_ctx;
  /* plan */
  bool amx;
  int64_t mb, nb, kb, kc; /* rows, columns and contraction of a block; contraction of a k part (multiple of kb) */
  int64_t nmb, nnb, nkc;
  float *partial; /* [nkc][m][n], n padded to 32; NULL when nkc == 1 */
  uint64_t id;    /* never repeats: tags what a thread's scratch holds */
} esp_gjob;

/* One thread's scratch; the pieces are cut from one allocation by the plan. */
typedef struct esp_gscratch {
  char *base;
  size_t bytes;
  char *a, *b, *t, *c, *pad;
  uint64_t a_tag[4], b_tag[4], t_tag[4];
} esp_gscratch;

/* Rows of a block in fp32, at most. Scratch is for as many, where there are as many rows: blocks are of equal size, and
 * those of a larger product may be smaller, but what it takes holds for every smaller one. */
enum { ESP_GEMM_BLAS_ROWS = 256 };

typedef struct esp_gsizes {
  size_t a, b, t, c, pad;
} esp_gsizes;

/* Engines. */
esp_gsizes esp_gemm_amx_sizes(const esp_gjob *j);
void esp_gemm_amx_chunk(const esp_gjob *j, esp_gscratch *s, int64_t kc, int64_t mb, int64_t nb);
/* Makes all panels of operand b ([n/32][k/32] blocks) in so many independent chunks. */
/* The same for operand a of kind COLS; chunk in [0, k/32). */
void esp_gemm_amx_fill_a(void *tiles, const esp_goper *a, int64_t chunk, int64_t m, int64_t k);
int64_t esp_gemm_amx_fill_chunks(const esp_goper *b, int64_t n, int64_t k);
void esp_gemm_amx_fill(void *panels, const esp_goper *b, int64_t chunk, int64_t n, int64_t k);
/* gemm_added.c: the panels of a packed weight with what is added to it, of its transpose where `exchanged`, in so many
 * independent chunks. */
int64_t esp_gemm_added_chunks(const esp_wview *w);
void esp_gemm_added_fill(void *panels, const esp_wview *w, bool exchanged, int64_t chunk);
esp_gsizes esp_gemm_blas_sizes(const esp_gjob *j);
void esp_gemm_blas_chunk(const esp_gjob *j, esp_gscratch *s, int64_t kc, int64_t mb, int64_t nb);
void esp_gemm_blas_init(void);

/* rows x cols of fp32 sums at `sum` (row stride lds) become c's block at (m0, n0). */
void esp_gemm_epilogue(const esp_gjob *j, int64_t m0, int64_t n0, int64_t rows, int64_t cols, const float *sum,
                       int64_t lds);
void esp_gemm_epilogue_avx512(const esp_gjob *j, int64_t m0, int64_t n0, int64_t rows, int64_t cols, const float *sum,
                              int64_t lds);

/* One 32 x 32 block of packed panels from 32 rows (bf16, row stride ld, zero-padded by rows/cols). */
void esp_amx_block_from_rows(uint16_t *dst, const uint16_t *src, int64_t ld, int64_t rows, int64_t cols);

/* pack.c */
typedef struct esp_packed {
  int64_t out, in;
  esp_dtype dtype;
  bool vnni;
  int64_t blocks; /* of one panel: in rounded up to 32, over 32 */
  void *data;     /* vnni: [out/32][in/32][2 tiles]; else dense [out, in] */
} esp_packed;

static inline int64_t esp_ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
static inline int64_t esp_min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}
static inline int64_t esp_max64(int64_t a, int64_t b) {
  return a > b ? a : b;
}

#endif
