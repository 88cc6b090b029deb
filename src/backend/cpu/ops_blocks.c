/* ops_blocks.c: products with blocks, their gradients and inverses (backend.h) on the cpu. Blocks of at most
 * ESP_BLOCK_SMALL columns have own kernels; larger ones are one product each, or one of all when they share it. */
#include <assert.h>
#include <string.h>

#include "backend/cpu/blocks_amx.h"
#include "backend/cpu/gemm.h"
#include "backend/cpu/ops.h"
#include "backend/cpu/range.h"
#include "backend/cpu/work.h"
#include "core/cpu.h"

enum { BLOCK_ROWS = 64, BLOCK_COLUMNS = 512 }; /* of a chunk: small blocks of m are read once for 64 tokens */

typedef struct block_op {
  esp_block_part part;
  esp_tensor m;
  float *packed;
  int64_t p, q, blocks; /* as the caller has them */
  int64_t merged, n;    /* blocks in one merged block, merged blocks */
  int64_t groups;       /* merged blocks of a chunk */
  bool shared, trans;
} block_op;

static float load(const esp_tensor *t, int64_t r, int64_t c) {
  const void *row = esp_row(t, r);
  return esp_is_b(t) ? esp_bf16_to_f32(((const uint16_t *)row)[c]) : ((const float *)row)[c];
}

/* Merged blocks [a, b): the blocks along the diagonal of [merged * p, ld], the rest zeros. */
static void pack_part(const void *op, const esp_kernels *k, int64_t a, int64_t b) {
  (void)k;
  const block_op *o = op;
  int64_t ld = o->part.ld, size = o->merged * o->p * ld;
  memset(o->packed + a * size, 0, (size_t)((b - a) * size) * sizeof(float));
  for (int64_t e = a * o->merged; e < b * o->merged && e < o->blocks; e++) {
    int64_t n = e % o->merged, g = o->shared ? 0 : e;
    float *to = o->packed + e / o->merged * size + n * o->p * ld + n * o->q;
    for (int64_t i = 0; i < o->p; i++)
      for (int64_t j = 0; j < o->q; j++)
        to[i * ld + j] = o->trans ? load(&o->m, g * o->q + j, i) : load(&o->m, g * o->p + i, j);
  }
}

static void matmul_part(const void *op, const esp_kernels *k, int64_t a, int64_t b) {
  const block_op *o = op;
  int64_t across = (o->n + o->groups - 1) / o->groups, rows = esp_block_tokens(&o->part.y);
  for (int64_t c = a; c < b; c++) {
    int64_t r0 = c / across * BLOCK_ROWS, g0 = c % across * o->groups;
    int64_t r1 = r0 + BLOCK_ROWS < rows ? r0 + BLOCK_ROWS : rows, g1 = g0 + o->groups < o->n ? g0 + o->groups : o->n;
    k->block_matmul(&o->part, r0, r1, g0, g1);
  }
}

/* ---- the same through tiles ---- */
typedef struct tiles_op {
  esp_amx_blocks part;
  esp_tensor m;
  uint16_t *packed;
  int64_t n, groups; /* blocks of a chunk */
  bool trans;
} tiles_op;

static bool by_tiles(const esp_tensor *x, const esp_tensor *other, int64_t p, int64_t q) {
  return esp_cpu_isa() == ESP_ISA_AMX && esp_amx_blocks_fit(x, other, p, q);
}
static void pack_tiles_part(const void *op, const esp_kernels *k, int64_t a, int64_t b) {
  (void)k;
  const tiles_op *o = op;
  int64_t size = esp_amx_block_elements(o->part.p, o->part.q);
  for (int64_t g = a; g < b; g++) esp_amx_block_pack(o->packed + g * size, o->m, g, o->part.p, o->part.q, o->trans);
}
static void tiles_part(const void *op, const esp_kernels *k, int64_t a, int64_t b) {
  (void)k;
  const tiles_op *o = op;
  int64_t across = (o->n + o->groups - 1) / o->groups, rows = esp_block_tokens(&o->part.y);
  for (int64_t c = a; c < b; c++) {
    int64_t r0 = c / across * BLOCK_ROWS, g0 = c % across * o->groups;
    int64_t r1 = r0 + BLOCK_ROWS < rows ? r0 + BLOCK_ROWS : rows, g1 = g0 + o->groups < o->n ? g0 + o->groups : o->n;
    esp_amx_block_matmul(&o->part, r0, r1, g0, g1);
  }
}
static void matmul_tiles(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor m, int blocks, bool shared, bool trans,
                         float alpha, float beta) {
  int64_t p = esp_block_width(&x, blocks), q = esp_block_width(&y, blocks), size = esp_amx_block_elements(p, q);
  if (be->sticky != ESP_OK || esp_tensor_numel(&y) == 0) return;
  tiles_op o = {.m = m, .trans = trans, .n = blocks, .groups = 1 + BLOCK_COLUMNS / q};
  o.part = (esp_amx_blocks){.x = x, .y = y, .p = p, .q = q, .alpha = alpha, .beta = beta};
  o.part.to_next = shared ? 0 : size;
  o.part.x_step = esp_block_step(&x, blocks), o.part.y_step = esp_block_step(&y, blocks);
  o.part.m = o.packed = esp_cpu_work(be, esp_cpu_work_block_matmul(p, q, blocks, shared));
  if (!o.packed) return;
  esp_split(be, shared ? 1 : blocks, esp_row_step(size), &o, pack_tiles_part);
  int64_t across = (o.n + o.groups - 1) / o.groups, down = (esp_block_tokens(&y) + BLOCK_ROWS - 1) / BLOCK_ROWS;
  esp_split(be, across * down, 1, &o, tiles_part);
}
static void grad_tiles_part(const void *op, const esp_kernels *k, int64_t g0, int64_t g1) {
  (void)k;
  esp_amx_block_grad(op, g0, g1);
}

static void matmul_small(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor m, int blocks, bool shared, bool trans,
                         float alpha, float beta) {
  if (be->sticky != ESP_OK || esp_tensor_numel(&y) == 0) return;
  block_op o = {.m = m, .blocks = blocks, .shared = shared, .trans = trans};
  o.p = esp_block_width(&x, blocks);
  o.q = esp_block_width(&y, blocks);
  o.merged = x.ndim == 3 || y.ndim == 3 ? 1 : esp_cpu_block_merge(o.q, blocks);
  o.n = (blocks + o.merged - 1) / o.merged;
  o.part = (esp_block_part){.x = x, .y = y, .p = o.p * o.merged, .q = o.q * o.merged, .alpha = alpha, .beta = beta};
  o.part.x_step = x.ndim == 3 ? esp_block_step(&x, blocks) : o.part.p;
  o.part.y_step = y.ndim == 3 ? esp_block_step(&y, blocks) : o.part.q;
  o.part.ld = esp_cpu_block_ld(o.q, o.merged);
  o.part.to_next = shared ? 0 : o.part.p * o.part.ld;
  o.part.m = o.packed = esp_cpu_work(be, esp_cpu_work_block_matmul(o.p, o.q, blocks, shared));
  if (!o.packed) return;
  esp_split(be, shared ? 1 : o.n, esp_row_step(o.part.p * o.part.ld), &o, pack_part);
  o.groups = 1 + BLOCK_COLUMNS / o.part.q;
  int64_t across = (o.n + o.groups - 1) / o.groups, down = (esp_block_tokens(&y) + BLOCK_ROWS - 1) / BLOCK_ROWS;
  esp_split(be, across * down, 1, &o, matmul_part);
}

/* [T, G*p] as [T*G, p] */
static esp_tensor as_rows(esp_tensor t, int blocks) {
  return esp_tensor_2d(t.data, t.dtype, esp_tensor_rows(&t) * blocks, esp_tensor_cols(&t) / blocks);
}

void esp_cpu_block_matmul(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor m, int blocks, bool shared,
                          bool trans, float alpha, float beta) {
  int64_t p = esp_block_width(&x, blocks), q = esp_block_width(&y, blocks), rows = trans ? q : p;
  assert(esp_tensor_rows(&m) == (shared ? rows : rows * blocks) && esp_tensor_cols(&m) == (trans ? p : q));
  assert(esp_block_tokens(&y) == esp_block_tokens(&x));
  if (esp_cpu_block_small(p, q, blocks) && by_tiles(&x, &m, p, q)) {
    matmul_tiles(be, y, x, m, blocks, shared, trans, alpha, beta);
    return;
  }
  if (esp_cpu_block_small(p, q, blocks)) {
    matmul_small(be, y, x, m, blocks, shared, trans, alpha, beta);
    return;
  }
  if (shared && esp_cpu_block_rows(&x) && esp_cpu_block_rows(&y)) {
    esp_cpu_matmul(be, as_rows(y, blocks), as_rows(x, blocks), false, m, trans, alpha, beta);
    return;
  }
  for (int g = 0; g < blocks; g++)
    esp_cpu_matmul(be, esp_block_of(&y, blocks, g), esp_block_of(&x, blocks, g), false,
                   esp_tensor_rows_view(&m, shared ? 0 : g * rows, rows), trans, alpha, beta);
}

typedef struct shared_op {
  esp_amx_blocks part;
  int64_t step; /* tokens of a part */
  int blocks;
} shared_op;
static void shared_part(const void *op, const esp_kernels *k, int64_t t0, int64_t t1) {
  (void)k;
  const shared_op *o = op;
  esp_amx_block_grad_shared(&o->part, o->blocks, t0, t1, t0 / o->step);
}
static void grad_shared(esp_backend *be, esp_tensor dm, esp_tensor x, esp_tensor dy, int blocks, float alpha,
                        int64_t bytes) {
  int64_t p = esp_block_width(&x, blocks), q = esp_block_width(&dy, blocks), tokens = esp_block_tokens(&x), n = blocks;
  float *sums = esp_cpu_work(be, bytes);
  if (!sums) return;
  if (by_tiles(&x, &dy, p, q)) {
    shared_op o = {.step = esp_cpu_block_part(tokens), .blocks = blocks};
    n = (tokens + o.step - 1) / o.step;
    memset(sums, 0, (size_t)(n * p * q) * sizeof *sums);
    o.part = (esp_amx_blocks){.x = x, .y = dy, .p = p, .q = q, .alpha = alpha};
    o.part.dm = esp_tensor_2d(sums, ESP_F32, n * p, q);
    o.part.x_step = esp_block_step(&x, blocks), o.part.y_step = esp_block_step(&dy, blocks);
    esp_split(be, tokens, o.step, &o, shared_part);
  } else {
    memset(sums, 0, (size_t)(n * p * q) * sizeof *sums);
    esp_cpu_block_grad(be, esp_tensor_2d(sums, ESP_F32, n * p, q), x, dy, blocks, false, alpha);
  }
  for (int64_t i = 0; i < n * p; i++) {
    float *d = esp_row(&dm, i % p);
    for (int64_t j = 0; j < q; j++) d[j] += sums[i * q + j];
  }
}

static void grad_part(const void *op, const esp_kernels *k, int64_t g0, int64_t g1) {
  k->block_grad(op, g0, g1);
}
void esp_cpu_block_grad(esp_backend *be, esp_tensor dm, esp_tensor x, esp_tensor dy, int blocks, bool shared,
                        float alpha) {
  int64_t p = esp_block_width(&x, blocks), q = esp_block_width(&dy, blocks);
  int64_t x_step = esp_block_step(&x, blocks), y_step = esp_block_step(&dy, blocks);
  assert(dm.dtype == ESP_F32 && esp_tensor_rows(&dm) == (shared ? p : p * blocks) && esp_tensor_cols(&dm) == q);
  int64_t apart = esp_cpu_work_block_grad(&x, &dy, blocks, shared);
  if (apart > 0) {
    grad_shared(be, dm, x, dy, blocks, alpha, apart);
    return;
  }
  if (!shared && esp_cpu_block_small(p, q, blocks) && by_tiles(&x, &dy, p, q)) {
    esp_amx_blocks part = {.x = x, .y = dy, .dm = dm, .p = p, .q = q, .alpha = alpha};
    part.x_step = x_step, part.y_step = y_step;
    esp_split(be, blocks, ESP_CHUNK_COLS / (p > q ? p : q), &part, grad_tiles_part);
    return;
  }
  if (!shared && esp_cpu_block_small(p, q, blocks)) {
    esp_block_part part = {.x = x, .y = dy, .dm = dm, .p = p, .q = q, .alpha = alpha};
    part.x_step = x_step, part.y_step = y_step;
    esp_split(be, blocks, ESP_CHUNK_COLS / (p > q ? p : q), &part, grad_part);
    return;
  }
  if (shared && esp_cpu_block_rows(&x) && esp_cpu_block_rows(&dy)) {
    esp_cpu_matmul(be, dm, as_rows(x, blocks), true, as_rows(dy, blocks), false, alpha, 1.0f);
    return;
  }
  for (int g = 0; g < blocks; g++)
    esp_cpu_matmul(be, esp_tensor_rows_view(&dm, shared ? 0 : g * p, p), esp_block_of(&x, blocks, g), true,
                   esp_block_of(&dy, blocks, g), false, alpha, 1.0f);
}

typedef struct inverse_op {
  esp_tensor inv, m;
  int64_t n;
} inverse_op;
static void inverse_part(const void *op, const esp_kernels *k, int64_t g0, int64_t g1) {
  const inverse_op *o = op;
  for (int64_t g = g0; g < g1; g++) {
    for (int64_t i = g * o->n; i < (g + 1) * o->n; i++)
      memmove(esp_row(&o->inv, i), esp_row(&o->m, i), (size_t)o->n * sizeof(float));
    k->invert(esp_row(&o->inv, g * o->n), o->inv.ld, o->n);
  }
}
void esp_cpu_block_inverse(esp_backend *be, esp_tensor inv, esp_tensor m, int blocks) {
  int64_t n = esp_tensor_cols(&m);
  assert(m.dtype == ESP_F32 && inv.dtype == ESP_F32 && esp_tensor_rows(&m) == n * blocks);
  assert(esp_tensor_rows(&inv) == n * blocks && esp_tensor_cols(&inv) == n);
  inverse_op o = {inv, m, n};
  esp_split(be, blocks, esp_row_step(n * n), &o, inverse_part);
}
