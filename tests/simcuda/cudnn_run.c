/* cudnn_run.c: a program carried out, one sequence (b) at a time. Tensors inside the graph are dense fp32 arrays,
 * rounded to their declared type when they are written and full of NaN before. Nothing is done for rows beyond a true
 * length, and columns beyond it stay undefined unless the product pads them: a mask that is forgotten shows as NaN.
 * Ragged tensors are touched in the rows that their offsets span, and nowhere else.
 *
 * The whole workspace is overwritten first, so that memory of the caller's that lies in it shows. */
#include <cblas.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cudnn_impl.h"
#include "num.h"
#include "simcuda.h"

typedef struct env {
  const dnn_job *job;
  const dnn_program *p;
  int64_t b;
  float *inside[DNN_MAX_TENSORS]; /* [h, rows, columns] of virtual tensors */
} env;

static void *take(size_t bytes) {
  void *p = malloc(bytes ? bytes : 1);
  if (!p) simcuda_die("cudnn: no memory on the host");
  return p;
}

/* ---- numbers in memory ---- */
static float load(const void *base, int64_t dtype, int64_t i) {
  switch (dtype) {
  case CUDNN_DATA_FLOAT:
    return ((const float *)base)[i];
  case CUDNN_DATA_BFLOAT16:
    return simcuda_bf16_f32(((const uint16_t *)base)[i]);
  case CUDNN_DATA_HALF:
    return simcuda_f16_f32(((const uint16_t *)base)[i]);
  case CUDNN_DATA_INT32:
    return (float)((const int32_t *)base)[i];
  case CUDNN_DATA_INT64:
    return (float)((const int64_t *)base)[i];
  case CUDNN_DATA_BOOLEAN:
    return ((const uint8_t *)base)[i] != 0;
  default:
    return (float)((const double *)base)[i];
  }
}

static void store(void *base, int64_t dtype, int64_t i, float v) {
  switch (dtype) {
  case CUDNN_DATA_FLOAT:
    ((float *)base)[i] = v;
    break;
  case CUDNN_DATA_BFLOAT16:
    ((uint16_t *)base)[i] = simcuda_f32_bf16(v);
    break;
  case CUDNN_DATA_HALF:
    ((uint16_t *)base)[i] = simcuda_f32_f16(v);
    break;
  case CUDNN_DATA_INT32:
    ((int32_t *)base)[i] = (int32_t)v;
    break;
  case CUDNN_DATA_INT64:
    ((int64_t *)base)[i] = (int64_t)v;
    break;
  case CUDNN_DATA_BOOLEAN:
    ((uint8_t *)base)[i] = v != 0;
    break;
  default:
    ((double *)base)[i] = v;
    break;
  }
}

static float rounded(float v, int64_t dtype) {
  if (dtype == CUDNN_DATA_BFLOAT16) return simcuda_bf16_f32(simcuda_f32_bf16(v));
  if (dtype == CUDNN_DATA_HALF) return simcuda_f16_f32(simcuda_f32_f16(v));
  return v;
}

static int64_t bytes_of(int64_t dtype) {
  switch (dtype) {
  case CUDNN_DATA_BFLOAT16:
  case CUDNN_DATA_HALF:
    return 2;
  case CUDNN_DATA_BOOLEAN:
    return 1;
  case CUDNN_DATA_DOUBLE:
  case CUDNN_DATA_INT64:
    return 8;
  default:
    return 4;
  }
}

/* ---- where a tensor's part of this sequence lies ---- */
static int64_t offset_at(const env *e, const dnn_tensor *t, int64_t b) {
  const dnn_tensor *r = &e->p->tensor[t->ragged];
  const void *base = e->job->pointer[t->ragged];
  int64_t v = r->dtype == CUDNN_DATA_INT64 ? ((const int64_t *)base)[b] : ((const int32_t *)base)[b];
  return v * t->ragged_factor;
}

static int64_t base_of(const env *e, const dnn_tensor *t) {
  return t->ragged >= 0 ? offset_at(e, t, e->b) : (t->dim[0] == 1 ? 0 : e->b) * t->stride[0];
}

/* Lines of dimension 2 (or 3, for a transposed one) that exist in memory. */
static int64_t lines_of(const env *e, const dnn_tensor *t) {
  int64_t bound = t->dim[t->rows_line];
  if (t->ragged < 0) return bound;
  int64_t span = offset_at(e, t, e->b + 1) - offset_at(e, t, e->b), lines = span / t->stride[t->rows_line];
  return lines < bound ? lines : bound;
}

static int64_t length_of(const env *e, int64_t lengths, int64_t bound) {
  if (lengths < 0) return bound;
  int64_t n = ((const int32_t *)e->job->pointer[lengths])[e->b];
  if (n < 0 || n > bound)
    simcuda_die("cudnn: length %lld of sequence %lld, bound %lld", (long long)n, (long long)e->b, (long long)bound);
  return n;
}

static int64_t rows_done(const env *e, const dnn_tensor *t) {
  return length_of(e, t->length[0], t->dim[2]);
}

/* n numbers of row i of head h, repeated where the tensor has one; NaN where no memory is. */
static void load_row(const env *e, int64_t index, int64_t h, int64_t i, int64_t n, float *out) {
  const dnn_tensor *t = &e->p->tensor[index];
  int64_t stored = t->dim[3], lines;
  if (t->dim[1] == 1) h = 0;
  if (t->dim[2] == 1) i = 0;
  if (t->by_value) {
    for (int64_t j = 0; j < n; j++) out[j] = (float)e->job->value[index];
    return;
  }
  if (t->is_virtual) {
    const float *from = e->inside[index] + (h * t->dim[2] + i) * stored;
    if (stored == n)
      memcpy(out, from, (size_t)n * sizeof *out);
    else
      for (int64_t j = 0; j < n; j++) out[j] = from[0];
    return;
  }
  lines = lines_of(e, t);
  int64_t base = base_of(e, t) + h * t->stride[1] + i * t->stride[2], there = stored;
  if (t->rows_line == 2 && i >= lines) there = 0;
  if (t->rows_line == 3 && lines < there) there = lines;
  for (int64_t j = 0; j < n; j++) {
    int64_t column = stored == 1 ? 0 : j;
    out[j] = column < there ? load(e->job->pointer[index], t->dtype, base + column * t->stride[3]) : NAN;
  }
}

static void store_row(const env *e, int64_t index, int64_t h, int64_t i, const float *v) {
  const dnn_tensor *t = &e->p->tensor[index];
  if (t->is_virtual) {
    float *to = e->inside[index] + (h * t->dim[2] + i) * t->dim[3];
    for (int64_t j = 0; j < t->dim[3]; j++) to[j] = rounded(v[j], t->dtype);
    return;
  }
  int64_t lines = lines_of(e, t), n = t->dim[3];
  int64_t base = base_of(e, t) + h * t->stride[1] + i * t->stride[2];
  if (t->rows_line == 2 && i >= lines) return;
  if (t->rows_line == 3 && lines < n) n = lines;
  for (int64_t j = 0; j < n; j++) {
    int64_t at = base + j * t->stride[3];
    float old = t->adds ? load(e->job->pointer[index], t->dtype, at) : 0;
    store(e->job->pointer[index], t->dtype, at, t->adds ? old + v[j] : v[j]);
  }
}

/* ---- operations ---- */
static float combine(int64_t mode, float x, float b, float t) {
  switch (mode) {
  case CUDNN_POINTWISE_ADD:
    return x + b;
  case CUDNN_POINTWISE_SUB:
    return x - b;
  case CUDNN_POINTWISE_MUL:
    return x * b;
  case CUDNN_POINTWISE_DIV:
    return x / b;
  case CUDNN_POINTWISE_MAX:
    return x > b || x != x ? x : b;
  case CUDNN_POINTWISE_MIN:
    return x < b || x != x ? x : b;
  case CUDNN_POINTWISE_POW:
    return powf(x, b);
  case CUDNN_POINTWISE_CMP_EQ:
    return x == b;
  case CUDNN_POINTWISE_CMP_NEQ:
    return x != b;
  case CUDNN_POINTWISE_CMP_GT:
    return x > b;
  case CUDNN_POINTWISE_CMP_GE:
    return x >= b;
  case CUDNN_POINTWISE_CMP_LT:
    return x < b;
  case CUDNN_POINTWISE_CMP_LE:
    return x <= b;
  case CUDNN_POINTWISE_LOGICAL_AND:
    return x != 0 && b != 0;
  case CUDNN_POINTWISE_LOGICAL_OR:
    return x != 0 || b != 0;
  case CUDNN_POINTWISE_LOGICAL_NOT:
    return x == 0;
  case CUDNN_POINTWISE_BINARY_SELECT:
    return t != 0 ? x : b;
  case CUDNN_POINTWISE_EXP:
    return expf(x);
  case CUDNN_POINTWISE_LOG:
    return logf(x);
  case CUDNN_POINTWISE_NEG:
    return -x;
  case CUDNN_POINTWISE_ABS:
    return fabsf(x);
  case CUDNN_POINTWISE_SQRT:
    return sqrtf(x);
  case CUDNN_POINTWISE_RSQRT:
    return 1.0f / sqrtf(x);
  case CUDNN_POINTWISE_RECIPROCAL:
    return 1.0f / x;
  case CUDNN_POINTWISE_TANH_FWD:
    return tanhf(x);
  default:
    return x; /* IDENTITY */
  }
}

/* The mode is a constant in each loop that the compiler makes of this. */
#define ROW_LOOP(which)                                                                                                \
  case which:                                                                                                          \
    for (int64_t j = 0; j < n; j++) y[j] = combine(which, x[j], b[j], t[j]);                                           \
    break
static void combine_row(int64_t mode, int64_t n, const float *x, const float *b, const float *t, float *y) {
  switch (mode) {
    ROW_LOOP(CUDNN_POINTWISE_ADD);
    ROW_LOOP(CUDNN_POINTWISE_SUB);
    ROW_LOOP(CUDNN_POINTWISE_MUL);
    ROW_LOOP(CUDNN_POINTWISE_DIV);
    ROW_LOOP(CUDNN_POINTWISE_CMP_GE);
    ROW_LOOP(CUDNN_POINTWISE_CMP_LT);
    ROW_LOOP(CUDNN_POINTWISE_CMP_GT);
    ROW_LOOP(CUDNN_POINTWISE_LOGICAL_AND);
    ROW_LOOP(CUDNN_POINTWISE_BINARY_SELECT);
    ROW_LOOP(CUDNN_POINTWISE_EXP);
  default:
    for (int64_t j = 0; j < n; j++) y[j] = combine(mode, x[j], b[j], t[j]);
  }
}

static void run_pointwise(const env *e, const dnn_op *op) {
  const dnn_tensor *y = &e->p->tensor[op->out];
  int64_t n = y->dim[3], rows = rows_done(e, y);
  float *buffer = take((size_t)n * 4 * sizeof *buffer), *row[3], *out = buffer + 3 * n;
  memset(buffer, 0, (size_t)n * 4 * sizeof *buffer);
  for (int k = 0; k < 3; k++) row[k] = buffer + k * n;
  for (int64_t h = 0; h < y->dim[1]; h++)
    for (int64_t i = 0; i < rows; i++) {
      if (op->mode == CUDNN_POINTWISE_GEN_INDEX) {
        const int64_t at[4] = {e->b, h, i, 0};
        for (int64_t j = 0; j < n; j++) out[j] = (float)(op->axis == 3 ? j : at[op->axis]);
      } else {
        for (int k = 0; k < 3; k++)
          if (op->in[k] >= 0) load_row(e, op->in[k], h, i, n, row[k]);
        combine_row(op->mode, n, row[0], row[1], row[2], out);
      }
      store_row(e, op->out, h, i, out);
    }
  free(buffer);
}

/* An operand of a product as dense fp32; a wide one inside the graph is rounded to the other's type, as the tensor
 * cores want it. */
static void gather(const env *e, int64_t index, int64_t h, int64_t rows, int64_t n, int64_t narrow, float *out) {
  const dnn_tensor *t = &e->p->tensor[index];
  bool round = t->is_virtual && t->dtype == CUDNN_DATA_FLOAT && narrow != CUDNN_DATA_FLOAT;
  for (int64_t i = 0; i < rows; i++) {
    load_row(e, index, h, i, n, out + i * n);
    for (int64_t j = 0; round && j < n; j++) out[i * n + j] = rounded(out[i * n + j], narrow);
  }
}

static void run_matmul(const env *e, const dnn_op *op) {
  const dnn_tensor *a = &e->p->tensor[op->in[0]], *b = &e->p->tensor[op->in[1]], *c = &e->p->tensor[op->out];
  int64_t M = c->dim[2], N = c->dim[3], K = a->dim[3];
  int64_t m = length_of(e, op->length[0], M), n = length_of(e, op->length[1], N), k = length_of(e, op->length[2], K);
  if (!m) return;
  float *x = take((size_t)(m * K) * sizeof *x), *y = take((size_t)(k * N) * sizeof *y);
  float *z = take((size_t)(m * N) * sizeof *z);
  for (int64_t h = 0; h < c->dim[1]; h++) {
    gather(e, op->in[0], h / (c->dim[1] / a->dim[1]), m, K, b->dtype, x);
    gather(e, op->in[1], h / (c->dim[1] / b->dim[1]), k, N, a->dtype, y);
    for (int64_t i = 0; i < m * N; i++) z[i] = op->padded ? (float)op->padding : NAN;
    for (int64_t i = 0; !k && i < m; i++) memset(z + i * N, 0, (size_t)n * sizeof *z);
    if (n && k)
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)m, (int)n, (int)k, 1.0f, x, (int)K, y, (int)N, 0.0f,
                  z, (int)N);
    for (int64_t i = 0; i < m; i++) store_row(e, op->out, h, i, z + i * N);
  }
  free(x);
  free(y);
  free(z);
}

static void run_reduction(const env *e, const dnn_op *op) {
  const dnn_tensor *x = &e->p->tensor[op->in[0]], *y = &e->p->tensor[op->out];
  int64_t n = x->dim[3], width = y->dim[3], rows = y->dim[2] == 1 ? rows_done(e, x) : rows_done(e, y);
  int64_t group = x->dim[1] / y->dim[1], down = y->dim[2] == 1 && x->dim[2] > 1;
  float *row = take((size_t)n * sizeof *row), *out = take((size_t)width * sizeof *out);
  double *sum = take((size_t)(y->dim[2] * width) * sizeof *sum), start = 0;
  if (op->mode == CUDNN_REDUCE_TENSOR_MAX) start = -INFINITY;
  if (op->mode == CUDNN_REDUCE_TENSOR_MIN) start = INFINITY;
  for (int64_t h = 0; h < y->dim[1]; h++) {
    for (int64_t i = 0; i < y->dim[2] * width; i++) sum[i] = start;
    for (int64_t g = 0; g < group; g++)
      for (int64_t i = 0; i < rows; i++) {
        load_row(e, op->in[0], h * group + g, i, n, row);
        for (int64_t j = 0; j < n; j++) {
          double *s = sum + (down ? 0 : i * width) + (width == 1 ? 0 : j), v = row[j];
          if (op->mode == CUDNN_REDUCE_TENSOR_AMAX) v = fabs(v);
          if (op->mode == CUDNN_REDUCE_TENSOR_ADD)
            *s += v;
          else if (op->mode == CUDNN_REDUCE_TENSOR_MIN ? v < *s : v > *s)
            *s = v;
          else if (v != v)
            *s = v; /* what a kernel makes of NaN is undefined: show it */
        }
      }
    for (int64_t i = 0; i < (down ? 1 : rows); i++) {
      for (int64_t j = 0; j < width; j++) out[j] = (float)sum[i * width + j];
      store_row(e, op->out, h, i, out);
    }
  }
  free(row);
  free(out);
  free(sum);
}

static void run_reshape(const env *e, const dnn_op *op) {
  const dnn_tensor *x = &e->p->tensor[op->in[0]], *y = &e->p->tensor[op->out];
  int64_t plane = x->dim[2] * x->dim[3];
  float *all = take((size_t)(x->dim[1] * plane) * sizeof *all), *out = take((size_t)y->dim[3] * sizeof *out);
  for (int64_t h = 0; h < x->dim[1]; h++)
    for (int64_t i = 0; i < x->dim[2]; i++) load_row(e, op->in[0], h, i, x->dim[3], all + h * plane + i * x->dim[3]);
  const int64_t step[4] = {0, plane, x->dim[3], 1};
  int64_t by[4];
  for (int k = 0; k < 4; k++) by[k] = op->from[k] < 0 ? 0 : step[op->from[k]];
  for (int64_t h = 0; h < y->dim[1]; h++)
    for (int64_t i = 0; i < y->dim[2]; i++) {
      for (int64_t j = 0; j < y->dim[3]; j++) out[j] = all[h * by[1] + i * by[2] + j * by[3]];
      store_row(e, op->out, h, i, out);
    }
  free(all);
  free(out);
}

/* ---- memory that a kernel would fault on ---- */
static void need(const void *ptr, int64_t bytes, int64_t uid) {
  if (!simcuda_is_device(ptr, (size_t)bytes))
    simcuda_die("cudnn: tensor %lld (%p, %lld bytes) is not device memory", (long long)uid, ptr, (long long)bytes);
}

static bool is_offsets(const dnn_program *p, int64_t index) {
  for (int64_t i = 0; i < p->n_tensors; i++)
    if (p->tensor[i].ragged == index) return true;
  return false;
}

static void need_offsets(const env *e) {
  for (int64_t i = 0; i < e->p->n_tensors; i++) {
    const dnn_tensor *t = &e->p->tensor[i];
    if (is_offsets(e->p, i)) need(e->job->pointer[i], t->dim[0] * bytes_of(t->dtype), t->uid);
  }
}

/* This sequence's part of every tensor; a true length must lie within the rows that the offsets give. */
static void need_tensors(const env *e) {
  for (int64_t i = 0; i < e->p->n_tensors; i++) {
    const dnn_tensor *t = &e->p->tensor[i];
    if (t->is_virtual || t->by_value || is_offsets(e->p, i)) continue;
    int64_t lines = lines_of(e, t), last = base_of(e, t);
    int64_t length = length_of(e, t->length[t->rows_line - 2], t->dim[t->rows_line]);
    if (t->ragged >= 0 && length > lines && t->length[t->rows_line - 2] >= 0)
      simcuda_die("cudnn: tensor %lld: length %lld of sequence %lld, %lld rows by its offsets", (long long)t->uid,
                  (long long)length, (long long)e->b, (long long)lines);
    if (!lines) continue;
    for (int k = 1; k < 4; k++) last += ((k == t->rows_line ? lines : t->dim[k]) - 1) * t->stride[k];
    need(e->job->pointer[i], (last + 1) * bytes_of(t->dtype), t->uid);
  }
}

/* ---- */
static void run_sequence(env *e) {
  for (int64_t i = 0; i < e->p->n_tensors; i++) {
    const dnn_tensor *t = &e->p->tensor[i];
    int64_t n = t->dim[1] * t->dim[2] * t->dim[3];
    for (int64_t j = 0; t->is_virtual && j < n; j++) e->inside[i][j] = NAN;
  }
  for (int64_t i = 0; i < e->p->n_ops; i++) {
    const dnn_op *op = &e->p->op[i];
    switch (op->kind) {
    case DNN_MATMUL:
      run_matmul(e, op);
      break;
    case DNN_POINTWISE:
      run_pointwise(e, op);
      break;
    case DNN_REDUCTION:
      run_reduction(e, op);
      break;
    default:
      run_reshape(e, op);
      break;
    }
  }
}

/* A sequence of no rows: nothing to do, nothing to touch. */
static bool is_empty(const env *e) {
  bool any = false, zero = true;
  for (int64_t i = 0; i < e->p->n_ops; i++)
    for (int j = 0; j < 3; j++) {
      int64_t lengths = e->p->op[i].length[j];
      if (lengths < 0) continue;
      any = true;
      zero = zero && ((const int32_t *)e->job->pointer[lengths])[e->b] == 0;
    }
  return any && zero;
}

void dnn_run(void *arg) {
  const dnn_job *job = arg;
  const dnn_program *p = job->program;
  env e = {.job = job, .p = p};
  if (p->dead) simcuda_die("cudnn: a plan was destroyed before its work ran");
  if (p->workspace) {
    need(job->workspace, p->workspace, 0);
    memset(job->workspace, 0xff, (size_t)p->workspace);
  }
  openblas_set_num_threads(1); /* the order of a sum must not depend on the machine */
  need_offsets(&e);
  for (int64_t i = 0; i < p->n_ops; i++) /* lengths are read before the tensors are looked at */
    for (int j = 0; j < 3; j++)
      if (p->op[i].length[j] >= 0) {
        const dnn_tensor *t = &p->tensor[p->op[i].length[j]];
        need(job->pointer[p->op[i].length[j]], t->dim[0] * bytes_of(t->dtype), t->uid);
      }
  for (int64_t i = 0; i < p->n_tensors; i++) {
    const dnn_tensor *t = &p->tensor[i];
    if (t->is_virtual) e.inside[i] = take((size_t)(t->dim[1] * t->dim[2] * t->dim[3]) * sizeof(float));
  }
  for (e.b = 0; e.b < p->tensor[p->op[0].out].dim[0]; e.b++) {
    if (is_empty(&e)) continue;
    need_tensors(&e);
    run_sequence(&e);
  }
  for (int64_t i = 0; i < p->n_tensors; i++) free(e.inside[i]);
}
