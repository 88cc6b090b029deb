/* ops_sparse.c: products with sparse matrices (backend.h) on the cpu. Entry by entry: block after block of tokens,
 * first turned into columns, then row by row of the matrix. The tiles of AMX are faster on a dense matrix, zeros and
 * all, unless there is next to nothing in it: some rows of it at a time, in scratch; of a gradient 32 rows at a time,
 * from which the entries are picked while they are in the cache. Values are rounded to bf16 there, as those of every
 * other adapter are. */
#include <assert.h>
#include <string.h>

#include "backend/cpu/gemm.h"
#include "backend/cpu/ops.h"
#include "backend/cpu/range.h"
#include "backend/cpu/work.h"

typedef struct sparse_op {
  esp_tensor y, a;
  float *out, *grad;
  const esp_csr *s;
  int64_t cols, r0; /* of a dense piece: its first row */
  void *dense;
} sparse_op;

/* ---- entry by entry ---- */
static void by_column_part(const void *op, const esp_kernels *k, int64_t c0, int64_t c1) {
  const sparse_op *o = op;
  k->by_column(o->out, o->a, c0, c1);
}
static void sparse_rows_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const sparse_op *o = op;
  k->sparse_rows(o->y, o->out, o->s, r0, r1);
}
static void sparse_dots_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const sparse_op *o = op;
  k->sparse_dots(o->grad, o->y, o->out, o->s, r0, r1);
}

static void sparse_blocks(esp_backend *be, esp_tensor y, esp_tensor x, const esp_csr *s, float *grad, esp_range_fn fn) {
  int64_t tokens = esp_tensor_rows(&x), cols = esp_tensor_cols(&x);
  sparse_op o = {.s = s, .grad = grad, .out = esp_cpu_work(be, esp_cpu_work_sparse(&y, &x, s, grad != NULL))};
  if (!o.out) return;
  int64_t per_row = s->entries / (s->rows > 0 ? s->rows : 1) + 8, step = 1 + ESP_CHUNK_ELEMENTS / (per_row * 8);
  for (int64_t t = 0; t < tokens; t += ESP_SPARSE_BLOCK) {
    int64_t n = tokens - t < ESP_SPARSE_BLOCK ? tokens - t : ESP_SPARSE_BLOCK;
    o.a = esp_tensor_rows_view(&x, t, n);
    o.y = esp_tensor_rows_view(&y, t, n);
    esp_split(be, cols, ESP_CHUNK_ELEMENTS / ESP_SPARSE_BLOCK, &o, by_column_part);
    esp_split(be, s->rows, step, &o, fn);
  }
}

/* ---- as a dense matrix ---- */
static void spread_part(const void *op, const esp_kernels *k, int64_t a, int64_t b) {
  (void)k;
  const sparse_op *o = op;
  uint16_t *dense = o->dense;
  memset(dense + a * o->cols, 0, (size_t)((b - a) * o->cols) * sizeof *dense);
  for (int64_t r = a; r < b; r++)
    for (int32_t e = o->s->start[o->r0 + r]; e < o->s->start[o->r0 + r + 1]; e++)
      dense[r * o->cols + o->s->index[e]] = esp_f32_to_bf16(o->s->values[o->s->order ? o->s->order[e] : e]);
}
/* Of the gradient of the whole matrix the entries that are there, as its rows are made. */
static void pick(void *ctx, int64_t m, int64_t rows, int64_t n, int64_t cols, const float *sum, int64_t ld) {
  const sparse_op *o = ctx;
  const esp_csr *s = o->s;
  for (int64_t r = m; r < m + rows; r++, sum += ld) {
    int32_t e = s->start[r], end = s->start[r + 1];
    for (int32_t high = n > 0 ? end : e; e < high;) { /* the first entry from column n on */
      int32_t middle = e + (high - e) / 2;
      if (s->index[middle] < n)
        e = middle + 1;
      else
        high = middle;
    }
    for (; e < end && s->index[e] < n + cols; e++) o->grad[s->order ? s->order[e] : e] += sum[s->index[e] - n];
  }
}

void esp_cpu_sparse_products(esp_backend *be, esp_tensor y, esp_tensor x, const esp_csr *s, float *grad, void *scratch,
                             bool dry) {
  sparse_op o = {.s = s, .grad = grad, .cols = esp_tensor_cols(&x), .dense = scratch};
  if (grad) {
    esp_cpu_matmul_taken(be, y, x, pick, &o);
    return;
  }
  for (; o.r0 < s->rows; o.r0 += ESP_SPARSE_ROWS) {
    int64_t n = s->rows - o.r0 < ESP_SPARSE_ROWS ? s->rows - o.r0 : ESP_SPARSE_ROWS;
    if (!dry) esp_split(be, n, esp_row_step(o.cols), &o, spread_part);
    esp_cpu_matmul(be, esp_tensor_cols_view(&y, o.r0, n), x, false, esp_tensor_2d(scratch, ESP_BF16, n, o.cols), true,
                   1.0f, 1.0f);
  }
}

static void run(esp_backend *be, esp_tensor y, esp_tensor x, const esp_csr *s, float *grad, esp_range_fn fn) {
  assert(esp_tensor_cols(&y) == s->rows && esp_tensor_rows(&y) == esp_tensor_rows(&x));
  if (!esp_cpu_sparse_dense(&y, &x, s)) {
    sparse_blocks(be, y, x, s, grad, fn);
    return;
  }
  void *scratch = grad ? NULL : esp_cpu_work(be, esp_cpu_work_sparse(&y, &x, s, false));
  if (scratch || grad) esp_cpu_sparse_products(be, y, x, s, grad, scratch, false);
}
void esp_cpu_sparse_matmul(esp_backend *be, esp_tensor y, esp_tensor x, const esp_csr *s) {
  run(be, y, x, s, NULL, sparse_rows_part);
}
void esp_cpu_sparse_grad(esp_backend *be, float *dvalues, esp_tensor dy, esp_tensor x, const esp_csr *s) {
  run(be, dy, x, s, dvalues, sparse_dots_part);
}
