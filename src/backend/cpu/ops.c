/* ops.c: elementwise, row, column and reduction operations: cut the work, run the kernels. */
#include "backend/cpu/ops.h"

#include <assert.h>
#include <string.h>

#include "backend/cpu/range.h"
#include "backend/cpu/work.h"
#include "core/rng.h"

/* y, x, v and scalars: enough for every simple operation */
typedef struct simple_op {
  esp_tensor y, x, v;
  float a, b;
  uint64_t seed, stream;
  esp_act act;
  const int32_t *to, *from;
} simple_op;

static void axpby_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const simple_op *o = op;
  k->axpby(o->y, o->a, o->x, o->b, r0, r1);
}
/* Contiguous rows (a flat buffer of parameters above all) are cut by elements instead. */
static void axpby_flat(const void *op, const esp_kernels *k, int64_t e0, int64_t e1) {
  const simple_op *o = op;
  esp_tensor y = esp_tensor_1d((char *)o->y.data + (size_t)e0 * esp_dtype_size(o->y.dtype), o->y.dtype, e1 - e0);
  esp_tensor x = esp_tensor_1d((char *)o->x.data + (size_t)e0 * esp_dtype_size(o->x.dtype), o->x.dtype, e1 - e0);
  k->axpby(y, o->a, x, o->b, 0, 1);
}
static bool contiguous(const esp_tensor *t) {
  return t->ndim == 1 || t->ld == t->shape[1];
}
void esp_cpu_axpby(esp_backend *be, esp_tensor y, float a, esp_tensor x, float b) {
  assert(esp_tensor_numel(&y) == esp_tensor_numel(&x));
  simple_op o = {.y = y, .x = x, .a = a, .b = b};
  if (contiguous(&y) && contiguous(&x))
    esp_split(be, esp_tensor_numel(&y), ESP_CHUNK_ELEMENTS, &o, axpby_flat);
  else
    esp_split(be, esp_tensor_rows(&y), esp_row_step(esp_tensor_cols(&y)), &o, axpby_part);
}

static void mul_cols_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const simple_op *o = op;
  k->mul_cols(o->y, o->x, o->v, r0, r1);
}
void esp_cpu_mul_cols(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor v) {
  simple_op o = {.y = y, .x = x, .v = v};
  esp_split(be, esp_tensor_rows(&y), esp_row_step(esp_tensor_cols(&y)), &o, mul_cols_part);
}

static void copy_rows_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const simple_op *o = op;
  k->copy_rows(o->y, o->to, o->x, o->from, o->a, r0, r1);
}
void esp_cpu_gather_rows(esp_backend *be, esp_tensor y, esp_tensor x, const int32_t *rows) {
  simple_op o = {.y = y, .x = x, .a = 1.0f, .from = rows};
  esp_split(be, esp_tensor_rows(&y), esp_row_step(esp_tensor_cols(&y)), &o, copy_rows_part);
}
void esp_cpu_scatter_rows(esp_backend *be, esp_tensor y, esp_tensor x, const int32_t *rows) {
  simple_op o = {.y = y, .x = x, .a = 1.0f, .to = rows};
  esp_split(be, esp_tensor_rows(&x), esp_row_step(esp_tensor_cols(&x)), &o, copy_rows_part);
}

/* A table in another storage type (fp16 files): one row at a time through fp32. */
static void embed_convert(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const simple_op *o = op;
  int64_t n = esp_tensor_cols(&o->y);
  size_t size = esp_dtype_size(o->x.dtype);
  enum { RUN = 512 };
  float buf[RUN];
  for (int64_t r = r0; r < r1; r++)
    for (int64_t c = 0; c < n; c += RUN) {
      int64_t m = n - c < RUN ? n - c : RUN;
      esp_convert(buf, ESP_F32, (const char *)o->x.data + (size_t)(o->from[r] * o->x.ld + c) * size, o->x.dtype, m);
      esp_tensor y = esp_tensor_1d((char *)esp_row(&o->y, r) + (size_t)c * esp_dtype_size(o->y.dtype), o->y.dtype, m);
      k->axpby(y, o->a, esp_tensor_1d(buf, ESP_F32, m), 0.0f, 0, 1);
    }
}
void esp_cpu_embed(esp_backend *be, esp_tensor y, esp_tensor table, const int32_t *ids, float scale) {
  simple_op o = {.y = y, .x = table, .a = scale, .from = ids};
  bool direct = table.dtype == ESP_BF16 || table.dtype == ESP_F32;
  esp_split(be, esp_tensor_rows(&y), esp_row_step(esp_tensor_cols(&y)), &o, direct ? copy_rows_part : embed_convert);
}

typedef struct col_op {
  float *out;
  esp_tensor x;
  const int32_t *ids;
  float scale;
} col_op;
static void embed_bwd_part(const void *op, const esp_kernels *k, int64_t c0, int64_t c1) {
  const col_op *o = op;
  k->embed_bwd(o->out, o->x, o->ids, o->scale, c0, c1);
}
void esp_cpu_embed_bwd(esp_backend *be, float *dtable, esp_tensor dy, const int32_t *ids, float scale) {
  col_op o = {dtable, dy, ids, scale};
  esp_split(be, esp_tensor_cols(&dy), ESP_CHUNK_COLS, &o, embed_bwd_part);
}
static void col_sum_part(const void *op, const esp_kernels *k, int64_t c0, int64_t c1) {
  const col_op *o = op;
  k->col_sum(o->out, o->x, c0, c1);
}
void esp_cpu_col_sum(esp_backend *be, float *out, esp_tensor x) {
  col_op o = {.out = out, .x = x};
  esp_split(be, esp_tensor_cols(&x), ESP_CHUNK_COLS, &o, col_sum_part);
}

static void dropout_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const simple_op *o = op;
  k->dropout(o->y, o->x, o->a, o->seed, o->stream, o->b, r0, r1);
}
void esp_cpu_dropout(esp_backend *be, esp_tensor y, esp_tensor x, float p, uint64_t seed, const uint64_t *draw,
                     uint64_t stream, float beta) {
  simple_op o = {.y = y, .x = x, .a = p, .b = beta, .seed = esp_draw_seed(seed, *draw), .stream = stream};
  esp_split(be, esp_tensor_rows(&y), esp_row_step(esp_tensor_cols(&y)), &o, dropout_part);
}

static void act_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const simple_op *o = op;
  k->act(o->y, o->x, o->act, r0, r1);
}
void esp_cpu_act(esp_backend *be, esp_tensor y, esp_tensor x, esp_act act) {
  simple_op o = {.y = y, .x = x, .act = act};
  esp_split(be, esp_tensor_rows(&y), esp_row_step(esp_tensor_cols(&y)), &o, act_part);
}
static void act_bwd_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const simple_op *o = op;
  k->act_bwd(o->y, o->v, o->x, o->act, r0, r1);
}
void esp_cpu_act_bwd(esp_backend *be, esp_tensor dx, esp_tensor dy, esp_tensor x, esp_act act) {
  simple_op o = {.y = dx, .x = x, .v = dy, .act = act};
  esp_split(be, esp_tensor_rows(&x), esp_row_step(esp_tensor_cols(&x)), &o, act_bwd_part);
}
static void glu_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const simple_op *o = op;
  k->glu(o->y, o->x, o->act, r0, r1);
}
void esp_cpu_glu(esp_backend *be, esp_tensor h, esp_tensor gu, esp_act act) {
  assert(esp_tensor_cols(&gu) == 2 * esp_tensor_cols(&h));
  simple_op o = {.y = h, .x = gu, .act = act};
  esp_split(be, esp_tensor_rows(&h), esp_row_step(esp_tensor_cols(&gu)), &o, glu_part);
}
static void glu_bwd_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const simple_op *o = op;
  k->glu_bwd(o->y, o->v, o->x, o->act, r0, r1);
}
void esp_cpu_glu_bwd(esp_backend *be, esp_tensor dgu, esp_tensor dh, esp_tensor gu, esp_act act) {
  simple_op o = {.y = dgu, .x = gu, .v = dh, .act = act};
  esp_split(be, esp_tensor_rows(&dh), esp_row_step(esp_tensor_cols(&gu)), &o, glu_bwd_part);
}

static void norm_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  k->norm(op, r0, r1);
}
void esp_cpu_norm(esp_backend *be, const esp_norm_args *a) {
  esp_split(be, esp_tensor_rows(&a->x), esp_row_step(esp_tensor_cols(&a->x)), a, norm_part);
}
static void norm_bwd_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  k->norm_bwd(op, r0, r1);
}
static void norm_bwd_cols_part(const void *op, const esp_kernels *k, int64_t c0, int64_t c1) {
  k->norm_bwd_cols(op, c0, c1);
}
void esp_cpu_norm_bwd(esp_backend *be, const esp_norm_bwd_args *a) {
  /* columns first: dx may be the same memory as dy */
  if (a->dw || a->db) esp_split(be, esp_tensor_cols(&a->r), ESP_CHUNK_COLS, a, norm_bwd_cols_part);
  if (a->dx.data) esp_split(be, esp_tensor_rows(&a->r), esp_row_step(esp_tensor_cols(&a->r)), a, norm_bwd_part);
}
static void rope_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  k->rope(op, r0, r1);
}
void esp_cpu_rope(esp_backend *be, const esp_rope_args *a) {
  esp_split(be, esp_tensor_rows(&a->x), esp_row_step((int64_t)a->heads * a->head_dim), a, rope_part);
}

typedef struct loss_op { /* one of them */
  const esp_ce_args *ce;
  const esp_distill_args *distill;
  const esp_hidden_args *hidden;
  double *row; /* loss, hit */
} loss_op;
static void loss_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const loss_op *o = op;
  for (int64_t r = r0; r < r1; r++) {
    double *row = &o->row[2 * r];
    row[1] = 0;
    row[0] = o->ce        ? k->cross_entropy(o->ce, r, &row[1])
             : o->distill ? k->distill(o->distill, r)
                          : k->hidden_loss(o->hidden, r);
  }
}
static void loss_rows(esp_backend *be, esp_tensor x, loss_op o, double *sums) {
  int64_t n = esp_tensor_rows(&x);
  if (be->sticky != ESP_OK || n == 0) return;
  o.row = esp_cpu_work(be, esp_cpu_work_ce(n));
  if (!o.row) return;
  esp_split(be, n, esp_row_step(esp_tensor_cols(&x)), &o, loss_part);
  double sum[2] = {0, 0}; /* in row order */
  for (int64_t r = 0; r < 2 * n; r++) sum[r & 1] += o.row[r];
  sums[0] += sum[0];
  sums[1] += sum[1];
}
void esp_cpu_cross_entropy(esp_backend *be, const esp_ce_args *a) {
  loss_rows(be, a->logits, (loss_op){.ce = a}, a->sums);
}
void esp_cpu_distill(esp_backend *be, const esp_distill_args *a) {
  loss_rows(be, a->student, (loss_op){.distill = a}, a->sums);
}
void esp_cpu_hidden_loss(esp_backend *be, const esp_hidden_args *a) {
  loss_rows(be, a->x, (loss_op){.hidden = a}, a->sums);
}

#define DOT_PARTS 64
typedef struct dot_op {
  const float *a, *b;
  int64_t n, step;
  double part[DOT_PARTS];
} dot_op;
static void dot_part(const void *op, const esp_kernels *k, int64_t p0, int64_t p1) {
  dot_op *o = (dot_op *)op;
  for (int64_t p = p0; p < p1; p++) {
    int64_t e0 = p * o->step, e1 = e0 + o->step < o->n ? e0 + o->step : o->n;
    o->part[p] = e0 < e1 ? k->dot(o->a + e0, o->b + e0, e1 - e0) : 0;
  }
}
void esp_cpu_dot(esp_backend *be, double *out, const float *a, const float *b, int64_t n) {
  dot_op o = {.a = a, .b = b, .n = n, .step = ((n + DOT_PARTS - 1) / DOT_PARTS + 15) / 16 * 16};
  if (be->sticky != ESP_OK) return;
  esp_split(be, DOT_PARTS, n < ESP_CHUNK_ELEMENTS ? DOT_PARTS : 4, &o, dot_part);
  double sum = 0;
  for (int i = 0; i < DOT_PARTS; i++) sum += o.part[i];
  *out = sum;
}

static void update_part(const void *op, const esp_kernels *k, int64_t e0, int64_t e1) {
  k->update(op, e0, e1);
}
void esp_cpu_update(esp_backend *be, const esp_update_args *a) {
  esp_split(be, a->n, ESP_CHUNK_ELEMENTS, a, update_part);
}
