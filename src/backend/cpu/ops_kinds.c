/* ops_kinds.c: the parts of adapter kinds (backend.h) on the cpu: cut the work by shape, run the kernels. */
#include <assert.h>
#include <string.h>

#include "backend/cpu/ops.h"
#include "backend/cpu/range.h"
#include "backend/cpu/work.h"

typedef struct kind_op {
  esp_tensor y, a, b, dx, dz;
  float *out;
  float beta;
  int64_t p, q;
} kind_op;

static void mul_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const kind_op *o = op;
  k->mul(o->y, o->a, o->b, o->beta, r0, r1);
}
void esp_cpu_mul(esp_backend *be, esp_tensor y, esp_tensor a, esp_tensor b, float beta) {
  assert(esp_tensor_numel(&y) == esp_tensor_numel(&a) && esp_tensor_numel(&y) == esp_tensor_numel(&b));
  kind_op o = {.y = y, .a = a, .b = b, .beta = beta};
  esp_split(be, esp_tensor_rows(&y), esp_row_step(esp_tensor_cols(&y)), &o, mul_part);
}

static void mul_rows_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const kind_op *o = op;
  k->mul_rows(o->y, o->a, o->b, o->beta, r0, r1);
}
void esp_cpu_mul_rows(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor v, float beta) {
  assert(esp_tensor_numel(&v) == esp_tensor_rows(&y) && esp_tensor_numel(&y) == esp_tensor_numel(&x));
  kind_op o = {.y = y, .a = x, .b = v, .beta = beta};
  esp_split(be, esp_tensor_rows(&y), esp_row_step(esp_tensor_cols(&y)), &o, mul_rows_part);
}

static void col_dot_part(const void *op, const esp_kernels *k, int64_t c0, int64_t c1) {
  const kind_op *o = op;
  k->col_dot(o->out, o->a, o->b, c0, c1);
}
void esp_cpu_col_dot(esp_backend *be, float *out, esp_tensor a, esp_tensor b) {
  assert(esp_tensor_numel(&a) == esp_tensor_numel(&b));
  kind_op o = {.a = a, .b = b, .out = out};
  esp_split(be, esp_tensor_cols(&a), ESP_CHUNK_COLS, &o, col_dot_part);
}

static void row_dot_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const kind_op *o = op;
  k->row_dot(o->out, o->a, o->b, o->beta, r0, r1);
}
void esp_cpu_row_dot(esp_backend *be, float *out, esp_tensor a, esp_tensor b, float beta) {
  assert(esp_tensor_numel(&a) == esp_tensor_numel(&b));
  kind_op o = {.a = a, .b = b, .out = out, .beta = beta};
  esp_split(be, esp_tensor_rows(&a), esp_row_step(esp_tensor_cols(&a)), &o, row_dot_part);
}

/* ---- rows as matrices ---- */
typedef uint16_t eight __attribute__((vector_size(16)));

/* A tile of 8 x 8 halfwords in registers, of which na rows and nb columns are there. */
static inline __attribute__((always_inline)) void turn_tile(uint16_t *y, int64_t ldy, const uint16_t *x, int64_t ldx,
                                                            const int na, const int nb) {
  eight r[8] = {{0}}, s[8];
  for (int i = 0; i < na; i++) memcpy(&r[i], x + i * ldx, (size_t)nb * 2);
  for (int round = 0; round < 3; round++) { /* rows i and i + 4 are shuffled together, three times */
    for (int i = 0; i < 4; i++) {
      s[2 * i] = __builtin_shufflevector(r[i], r[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      s[2 * i + 1] = __builtin_shufflevector(r[i], r[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    memcpy(r, s, sizeof r);
  }
  for (int j = 0; j < nb; j++) memcpy(y + j * ldy, &r[j], (size_t)na * 2);
}

/* x [a, b] to y [b, a] */
static void turn_halfwords(uint16_t *y, const uint16_t *x, int64_t a, int64_t b) {
  for (int64_t i = 0, na; i < a; i += na) {
    na = a - i >= 8 ? 8 : a - i >= 4 ? 4 : 1;
    for (int64_t j = 0, nb; j < b; j += nb) {
      nb = b - j >= 8 ? 8 : b - j >= 4 ? 4 : 1;
      uint16_t *to = y + j * a + i;
      const uint16_t *from = x + i * b + j;
      if (na == 8 && nb == 8)
        turn_tile(to, a, from, b, 8, 8);
      else if (na == 8 && nb == 4)
        turn_tile(to, a, from, b, 8, 4);
      else if (na == 4 && nb == 8)
        turn_tile(to, a, from, b, 4, 8);
      else if (na == 4 && nb == 4)
        turn_tile(to, a, from, b, 4, 4);
      else
        for (int64_t k = 0; k < na; k++)
          for (int64_t l = 0; l < nb; l++) to[l * a + k] = from[k * b + l];
    }
  }
}

/* By tiles of 16 x 16, so that what is written by columns stays in the first-level cache. */
#define TRANSPOSE(to, from, CONVERT)                                                                                   \
  for (int64_t i0 = 0; i0 < a; i0 += 16)                                                                               \
    for (int64_t j0 = 0; j0 < b; j0 += 16)                                                                             \
      for (int64_t j = j0; j < j0 + 16 && j < b; j++)                                                                  \
        for (int64_t i = i0; i < i0 + 16 && i < a; i++) to[j * a + i] = CONVERT(from[i * b + j])
static void transpose_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  (void)k;
  const kind_op *o = op;
  int64_t a = o->p, b = o->q;
  for (int64_t r = r0; r < r1; r++) {
    uint16_t *yh = esp_row(&o->y, r);
    float *yf = esp_row(&o->y, r);
    const uint16_t *xh = esp_row(&o->a, r);
    const float *xf = esp_row(&o->a, r);
    if (esp_is_b(&o->y) && esp_is_b(&o->a))
      turn_halfwords(yh, xh, a, b);
    else if (esp_is_b(&o->y))
      TRANSPOSE(yh, xf, esp_f32_to_bf16);
    else if (esp_is_b(&o->a))
      TRANSPOSE(yf, xh, esp_bf16_to_f32);
    else
      TRANSPOSE(yf, xf, );
  }
}
#undef TRANSPOSE
void esp_cpu_transpose_rows(esp_backend *be, esp_tensor y, esp_tensor x, int64_t a, int64_t b) {
  assert(esp_tensor_cols(&x) == a * b && esp_tensor_cols(&y) == a * b && esp_tensor_rows(&y) == esp_tensor_rows(&x));
  kind_op o = {.y = y, .a = x, .p = a, .q = b};
  esp_split(be, esp_tensor_rows(&y), esp_row_step(a * b), &o, transpose_part);
}

static void khatri_rao_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const kind_op *o = op;
  k->khatri_rao(o->y, o->a, o->b, r0, r1);
}
void esp_cpu_khatri_rao(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor z) {
  assert(esp_tensor_cols(&y) == esp_tensor_cols(&x) * esp_tensor_cols(&z));
  kind_op o = {.y = y, .a = x, .b = z};
  esp_split(be, esp_tensor_rows(&y), esp_row_step(esp_tensor_cols(&y)), &o, khatri_rao_part);
}
static void khatri_rao_bwd_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const kind_op *o = op;
  k->khatri_rao_bwd(o->dx, o->dz, o->y, o->a, o->b, r0, r1);
}
void esp_cpu_khatri_rao_bwd(esp_backend *be, esp_tensor dx, esp_tensor dz, esp_tensor dy, esp_tensor x, esp_tensor z) {
  assert(esp_tensor_cols(&dy) == esp_tensor_cols(&x) * esp_tensor_cols(&z));
  assert((!dx.data || dx.dtype == ESP_F32) && (!dz.data || dz.dtype == ESP_F32));
  kind_op o = {.y = dy, .a = x, .b = z, .dx = dx, .dz = dz};
  esp_split(be, esp_tensor_rows(&dy), esp_row_step(esp_tensor_cols(&dy)), &o, khatri_rao_bwd_part);
}

/* ---- ranks that gate themselves ---- */
typedef struct gate_op {
  esp_tensor y, x, dy;
  const esp_gate *g;
} gate_op;
static void rank_gate_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const gate_op *o = op;
  k->rank_gate(o->y, o->x, o->g, r0, r1);
}
static void rank_gate_bwd_part(const void *op, const esp_kernels *k, int64_t r0, int64_t r1) {
  const gate_op *o = op;
  k->rank_gate_bwd(o->y, o->dy, o->x, o->g, r0, r1);
}
void esp_cpu_rank_gate(esp_backend *be, esp_tensor y, esp_tensor x, const esp_gate *g) {
  assert(esp_tensor_rows(&y) == esp_tensor_rows(&x) && esp_tensor_cols(&x) <= ESP_GATE_MOST);
  gate_op o = {.y = y, .x = x, .g = g};
  esp_split(be, esp_tensor_rows(&y), esp_row_step(8 * esp_tensor_cols(&x)), &o, rank_gate_part);
}
void esp_cpu_rank_gate_bwd(esp_backend *be, esp_tensor dx, esp_tensor dy, esp_tensor x, const esp_gate *g) {
  assert(esp_tensor_rows(&dx) == esp_tensor_rows(&x) && esp_tensor_cols(&x) <= ESP_GATE_MOST);
  gate_op o = {.y = dx, .x = x, .dy = dy, .g = g};
  esp_split(be, esp_tensor_rows(&dx), esp_row_step(8 * esp_tensor_cols(&x)), &o, rank_gate_bwd_part);
}
