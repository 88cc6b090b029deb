/* cublaslt.c: cublasLtMatmul on the host. The problem is judged as the library judges it (shapes, types, alignment,
 * workspace), an algorithm is chosen from three, and the product is summed in fp32 and rounded once.
 *
 * Two things are stricter than the library so that mistakes show: D is overwritten with NaN before A and B are read
 * (an operand that lies in D element for element is an error), and the workspace that an algorithm asked for is
 * overwritten as well. Every algorithm sums in its own fixed order: results are repeatable, and differ by algorithm. */
#include <cblas.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cublaslt_impl.h"
#include "num.h"
#include "simcuda.h"

enum { ALGO_PLAIN, ALGO_STAGED, ALGO_SPLIT, N_ALGOS }; /* no workspace; a workspace; K in two parts through fp32 */
enum { STAGED_BYTES = 16 << 10, EP_BIAS = 4, EP_RELU = 2, EP_GELU = 32, EP_DGELU = 64, EP_AUX = 128 };

typedef struct problem {
  lt_desc d;
  lt_layout m[4]; /* A, B, C, D */
  int64_t rows, cols, depth;
} problem;

/* ---- judging a problem ---- */
static int64_t type_bytes(uint32_t type) {
  switch (type) {
  case CUDA_R_32F:
    return 4;
  case CUDA_R_16BF:
  case CUDA_R_16F:
    return 2;
  default:
    return 0;
  }
}

static cublasStatus_t refuse(cublasStatus_t status, const char *why) {
  if (getenv("SIMCUDA_VERBOSE")) fprintf(stderr, "simcuda: cublasLt: %s: %s\n", cublasLtGetStatusName(status), why);
  return status;
}
#define INVALID(why) return refuse(CUBLAS_STATUS_INVALID_VALUE, why)
#define UNSUPPORTED(why) return refuse(CUBLAS_STATUS_NOT_SUPPORTED, why)

/* The table of types in the library's manual, restricted to fp32 sums. */
static bool types_known(const problem *p) {
  uint32_t a = p->m[0].type, b = p->m[1].type, c = p->m[2].type, d = p->m[3].type;
  if (p->d.scale != CUDA_R_32F || a != b || c != d || !type_bytes(a) || !type_bytes(d)) return false;
  switch (p->d.compute) {
  case CUBLAS_COMPUTE_32F:
  case CUBLAS_COMPUTE_32F_PEDANTIC:
    return a == d || d == CUDA_R_32F;
  case CUBLAS_COMPUTE_32F_FAST_TF32:
    return a == CUDA_R_32F && d == CUDA_R_32F;
  default:
    return false;
  }
}

static cublasStatus_t judge_epilogue(const problem *p) {
  const lt_desc *d = &p->d;
  uint32_t type = p->m[3].type;
  switch (d->epilogue) {
  case CUBLASLT_EPILOGUE_DEFAULT:
  case CUBLASLT_EPILOGUE_RELU:
  case CUBLASLT_EPILOGUE_GELU:
  case CUBLASLT_EPILOGUE_BIAS:
  case CUBLASLT_EPILOGUE_RELU_BIAS:
  case CUBLASLT_EPILOGUE_GELU_BIAS:
  case CUBLASLT_EPILOGUE_GELU_AUX:
  case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
  case CUBLASLT_EPILOGUE_DGELU:
    break;
  default:
    UNSUPPORTED("epilogue");
  }
  if (d->epilogue == CUBLASLT_EPILOGUE_DEFAULT) return CUBLAS_STATUS_SUCCESS;
  if (p->m[3].order != CUBLASLT_ORDER_COL) UNSUPPORTED("epilogue over a row-major D");
  if (d->bias_type != -1 && (uint32_t)d->bias_type != type) UNSUPPORTED("type of the bias");
  if (d->aux_type != -1 && (uint32_t)d->aux_type != type) UNSUPPORTED("type of the auxiliary matrix");
  if (d->epilogue & EP_AUX) {
    if (d->aux_ld < p->rows || d->aux_ld % 8) INVALID("leading dimension of the auxiliary matrix");
    if (p->m[3].batch > 1 && d->aux_stride % 8) INVALID("batch stride of the auxiliary matrix");
  }
  return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t judge(problem *p, cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                            const cublasLtMatrixLayout_t layouts[4]) {
  if (!handle || *(uint32_t *)handle != LT_HANDLE) return refuse(CUBLAS_STATUS_NOT_INITIALIZED, "handle");
  if (!desc || ((lt_desc *)desc)->magic != LT_DESC) INVALID("matmul descriptor not initialised");
  memcpy(&p->d, desc, sizeof p->d);
  for (int i = 0; i < 4; i++) {
    if (!layouts[i] || ((lt_layout *)layouts[i])->magic != LT_LAYOUT) INVALID("matrix layout not initialised");
    memcpy(&p->m[i], layouts[i], sizeof p->m[i]);
  }
  for (int i = 0; i < 4; i++) {
    const lt_layout *l = &p->m[i];
    if (l->order != CUBLASLT_ORDER_COL && l->order != CUBLASLT_ORDER_ROW) UNSUPPORTED("order of a matrix");
    if (l->plane || l->batch_mode) UNSUPPORTED("planes, or arrays of pointers");
    if (!l->rows || !l->cols || l->rows > INT32_MAX || l->cols > INT32_MAX) INVALID("empty or too large a matrix");
    if (l->ld < (int64_t)(l->order == CUBLASLT_ORDER_COL ? l->rows : l->cols)) INVALID("leading dimension too small");
    if (l->batch < 1 || l->batch != p->m[3].batch) INVALID("batch counts differ");
    if (l->stride < 0) INVALID("negative batch stride");
  }
  const lt_desc *d = &p->d;
  if (d->trans_c != CUBLAS_OP_N) UNSUPPORTED("transposed C");
  if (d->fill != CUBLAS_FILL_MODE_FULL) UNSUPPORTED("fill mode");
  if (d->pointer_mode != CUBLASLT_POINTER_MODE_HOST && d->pointer_mode != CUBLASLT_POINTER_MODE_DEVICE)
    UNSUPPORTED("pointer mode");
  if ((d->trans_a != CUBLAS_OP_N && d->trans_a != CUBLAS_OP_T) ||
      (d->trans_b != CUBLAS_OP_N && d->trans_b != CUBLAS_OP_T))
    INVALID("operation on A or B");
  for (int i = 0; i < 8; i++)
    if (d->scale_ptr[i]) INVALID("scale factors belong to 8-bit formats");
  int ta = d->trans_a == CUBLAS_OP_T, tb = d->trans_b == CUBLAS_OP_T;
  p->rows = (int64_t)(ta ? p->m[0].cols : p->m[0].rows);
  p->depth = (int64_t)(ta ? p->m[0].rows : p->m[0].cols);
  p->cols = (int64_t)(tb ? p->m[1].rows : p->m[1].cols);
  if ((int64_t)(tb ? p->m[1].cols : p->m[1].rows) != p->depth) INVALID("inner dimensions differ");
  for (int i = 2; i < 4; i++)
    if ((int64_t)p->m[i].rows != p->rows || (int64_t)p->m[i].cols != p->cols) INVALID("shape of C or D");
  if (!types_known(p)) UNSUPPORTED("combination of types");
  if (p->m[3].batch > 1) { /* the outputs of a batch must not lie in each other */
    const lt_layout *o = &p->m[3];
    int64_t lines = (int64_t)(o->order == CUBLASLT_ORDER_COL ? o->cols : o->rows);
    int64_t width = (int64_t)(o->order == CUBLASLT_ORDER_COL ? o->rows : o->cols);
    bool apart = o->stride >= (lines - 1) * o->ld + width,
         between = o->stride >= width && o->batch * o->stride <= o->ld;
    if (!apart && !between) INVALID("batch stride of D too small");
  }
  return judge_epilogue(p);
}

/* ---- algorithms ---- */
static uint64_t problem_key(const problem *p) {
  uint64_t fields[] = {(uint64_t)p->d.compute, (uint64_t)p->d.trans_a, (uint64_t)p->d.trans_b,  p->d.epilogue,
                       p->m[0].type,           p->m[3].type,           (uint64_t)p->m[0].order, (uint64_t)p->m[1].order,
                       (uint64_t)p->m[3].order};
  uint64_t h = 1469598103934665603u;
  for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) h = (h ^ fields[i]) * 1099511628211u;
  return h;
}

/* Bytes, at most 16, that every line of an operand is aligned to when its first element is aligned to `given`. */
static uint32_t line_alignment(const lt_layout *l, uint32_t given) {
  int64_t ld = l->ld * type_bytes(l->type), stride = l->batch > 1 ? l->stride * type_bytes(l->type) : 0;
  uint32_t a = 16;
  while (a > 1 && (given % a || ld % a || stride % a)) a /= 2;
  return a;
}

static uint32_t pointer_alignment(const void *p) {
  uint32_t a = 16;
  while ((uintptr_t)p % a) a /= 2; /* NULL counts as aligned */
  return a;
}

static uint64_t workspace_of(const lt_algo *a, const problem *p) {
  if (a->id == ALGO_STAGED) return STAGED_BYTES;
  if (a->id == ALGO_SPLIT) return (uint64_t)a->split_k * (uint64_t)p->rows * (uint64_t)p->cols * sizeof(float);
  return 0;
}

static bool algo_fits(const lt_algo *a, const problem *p) {
  if (a->id == ALGO_SPLIT)
    return a->split_k == 2 && p->m[3].batch == 1 && p->depth >= 64 &&
           a->reduction == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  return a->id >= 0 && a->id < N_ALGOS && a->split_k == 1 && a->reduction == CUBLASLT_REDUCTION_SCHEME_NONE;
}

static cublasStatus_t choose(const problem *p, const lt_pref *pref, int wanted, cublasLtMatmulHeuristicResult_t *out,
                             int *n) {
  static const int order[N_ALGOS] = {ALGO_STAGED, ALGO_SPLIT, ALGO_PLAIN};
  lt_algo a = {.magic = LT_ALGO, .key = problem_key(p)};
  *n = 0;
  for (int i = 0; i < 4; i++) {
    a.align[i] = (uint16_t)line_alignment(&p->m[i], pref->align[i]);
    if (a.align[i] < type_bytes(p->m[i].type)) UNSUPPORTED("alignment below the size of an element");
  }
  a.align[4] = a.align[5] = 1;
  if (p->d.epilogue & EP_BIAS) a.align[4] = (uint16_t)pointer_alignment(p->d.bias);
  if (p->d.epilogue & EP_AUX) a.align[5] = (uint16_t)pointer_alignment(p->d.aux);
  if (a.align[4] < type_bytes(p->m[3].type) && p->d.epilogue & EP_BIAS) UNSUPPORTED("alignment of the bias");
  if (a.align[5] < 16 && p->d.epilogue & EP_AUX) UNSUPPORTED("alignment of the auxiliary matrix");
  for (int i = 0; i < N_ALGOS && *n < wanted; i++) {
    a.id = order[i];
    a.split_k = a.id == ALGO_SPLIT ? 2 : 1;
    a.reduction = a.id == ALGO_SPLIT ? CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE : CUBLASLT_REDUCTION_SCHEME_NONE;
    a.tile = CUBLASLT_MATMUL_TILE_128x128;
    if (!algo_fits(&a, p) || workspace_of(&a, p) > pref->workspace) continue;
    if (a.reduction != CUBLASLT_REDUCTION_SCHEME_NONE && !(a.reduction & pref->reduction)) continue;
    cublasLtMatmulHeuristicResult_t *r = &out[(*n)++];
    memset(r, 0, sizeof *r);
    memcpy(&r->algo, &a, sizeof a);
    r->workspaceSize = workspace_of(&a, p);
    r->state = CUBLAS_STATUS_SUCCESS;
    r->wavesCount = (float)((p->rows + 127) / 128 * ((p->cols + 127) / 128) * p->m[3].batch) / 132.0f;
  }
  return *n ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[], int *n) {
  problem p;
  cublasStatus_t s = judge(&p, handle, desc, (cublasLtMatrixLayout_t[]){a, b, c, d});
  if (n) *n = 0;
  if (s != CUBLAS_STATUS_SUCCESS) return s;
  if (wanted <= 0 || !results || !n) INVALID("results");
  if (!preference || ((lt_pref *)preference)->magic != LT_PREF) INVALID("preference not initialised");
  return choose(&p, (const lt_pref *)preference, wanted, results, n);
}

static cublasStatus_t check_algo(const problem *p, const lt_algo *a) {
  if (a->magic != LT_ALGO) INVALID("algorithm not initialised");
  if (a->key != problem_key(p)) INVALID("algorithm of another problem");
  if (!algo_fits(a, p)) UNSUPPORTED("algorithm does not take this problem");
  for (int i = 0; i < 4; i++)
    if (line_alignment(&p->m[i], a->align[i]) < a->align[i]) UNSUPPORTED("leading dimension breaks the alignment");
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                       cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t *algo, cublasLtMatmulHeuristicResult_t *result) {
  problem p;
  cublasStatus_t s = judge(&p, handle, desc, (cublasLtMatrixLayout_t[]){a, b, c, d});
  if (s != CUBLAS_STATUS_SUCCESS) return s;
  if (!algo || !result) INVALID("algorithm");
  lt_algo chosen;
  memcpy(&chosen, algo, sizeof chosen);
  s = check_algo(&p, &chosen);
  result->state = s;
  if (s != CUBLAS_STATUS_SUCCESS) return s;
  result->workspaceSize = workspace_of(&chosen, &p);
  result->wavesCount = 1.0f;
  return s;
}

/* ---- arithmetic ---- */
typedef struct job {
  problem p;
  lt_algo algo;
  const void *a, *b, *c;
  void *d, *workspace;
  const float *alpha_ptr, *beta_ptr; /* on the device; else the values below */
  float alpha, beta;
} job;

static float load(const void *base, uint32_t type, int64_t i) {
  if (type == CUDA_R_32F) return ((const float *)base)[i];
  uint16_t h = ((const uint16_t *)base)[i];
  return type == CUDA_R_16BF ? simcuda_bf16_f32(h) : simcuda_f16_f32(h);
}

static void store(void *base, uint32_t type, int64_t i, float v) {
  if (type == CUDA_R_32F)
    ((float *)base)[i] = v;
  else
    ((uint16_t *)base)[i] = type == CUDA_R_16BF ? simcuda_f32_bf16(v) : simcuda_f32_f16(v);
}

/* Position of element (i, j) of matrix number `batch`. */
static int64_t at(const lt_layout *l, int64_t batch, int64_t i, int64_t j) {
  return batch * l->stride + (l->order == CUBLASLT_ORDER_COL ? i + j * l->ld : i * l->ld + j);
}

/* An operand as dense fp32, [lines, width] as it lies in memory. */
static float *widen(const void *base, const lt_layout *l, int64_t batch, bool tf32) {
  bool col = l->order == CUBLASLT_ORDER_COL;
  int64_t lines = (int64_t)(col ? l->cols : l->rows), width = (int64_t)(col ? l->rows : l->cols);
  float *f = malloc((size_t)(lines * width) * sizeof *f);
  if (!f) abort();
  for (int64_t y = 0; y < lines; y++)
    for (int64_t x = 0; x < width; x++) {
      float v = load(base, l->type, batch * l->stride + y * l->ld + x);
      f[y * width + x] = tf32 ? simcuda_tf32(v) : v;
    }
  return f;
}

/* sum[rows, cols], column by column, over k in [k0, k0 + kn). A dense operand whose lines are op()'s columns is read as
 * it is, else transposed. */
static void product(const problem *p, const float *a, const float *b, int64_t k0, int64_t kn, float *sum) {
  bool a_t = (p->d.trans_a == CUBLAS_OP_T) != (p->m[0].order == CUBLASLT_ORDER_ROW);
  bool b_t = (p->d.trans_b == CUBLAS_OP_T) != (p->m[1].order == CUBLASLT_ORDER_ROW);
  int64_t lda = a_t ? p->depth : p->rows, ldb = b_t ? p->cols : p->depth;
  cblas_sgemm(CblasColMajor, a_t ? CblasTrans : CblasNoTrans, b_t ? CblasTrans : CblasNoTrans, (int)p->rows,
              (int)p->cols, (int)kn, 1.0f, a + (a_t ? k0 : k0 * lda), (int)lda, b + (b_t ? k0 * ldb : k0), (int)ldb,
              0.0f, sum, (int)p->rows);
}

static float gelu(float x) {
  return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

static float gelu_slope(float x) {
  float t = tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x));
  return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.7978845608028654f * (1.0f + 3.0f * 0.044715f * x * x);
}

static float epilogue(const job *j, int64_t batch, int64_t row, int64_t col, float v) {
  const lt_desc *d = &j->p.d;
  uint32_t type = j->p.m[3].type, e = d->epilogue;
  int64_t aux = batch * d->aux_stride + row + col * d->aux_ld;
  if (e == CUBLASLT_EPILOGUE_DEFAULT) return v;
  if (e == CUBLASLT_EPILOGUE_DGELU) return v * gelu_slope(load(d->aux, type, aux));
  if (e & EP_BIAS) v += load(d->bias, type, batch * d->bias_stride + row);
  if (e & EP_AUX) store(d->aux, type, aux, v);
  if (e & EP_RELU) v = v > 0 ? v : 0;
  if (e & EP_GELU) v = gelu(v);
  return v;
}

static void run_batch(const job *j, int64_t batch, float alpha, float beta) {
  const problem *p = &j->p;
  const lt_layout *C = &p->m[2], *D = &p->m[3];
  int64_t n = p->rows * p->cols;
  float *own = malloc((size_t)n * sizeof *own), *old = beta != 0 ? malloc((size_t)n * sizeof *old) : NULL;
  if (!own || (beta != 0 && !old)) abort();
  for (int64_t y = 0; y < p->cols; y++)
    for (int64_t x = 0; x < p->rows; x++) {
      if (old) old[x + y * p->rows] = load(j->c, C->type, at(C, batch, x, y));
      store(j->d, D->type, at(D, batch, x, y), NAN);
    }
  bool tf32 = p->d.compute == CUBLAS_COMPUTE_32F_FAST_TF32;
  float *a = widen(j->a, &p->m[0], batch, tf32), *b = widen(j->b, &p->m[1], batch, tf32), *sum = own;
  if (j->algo.id == ALGO_SPLIT) { /* partial sums in fp32, added in order */
    int64_t half = p->depth / 2;
    sum = j->workspace;
    product(p, a, b, 0, half, sum);
    product(p, a, b, half, p->depth - half, sum + n);
    for (int64_t i = 0; i < n; i++) sum[i] += sum[n + i];
  } else {
    product(p, a, b, 0, p->depth, sum);
  }
  for (int64_t y = 0; y < p->cols; y++)
    for (int64_t x = 0; x < p->rows; x++) {
      float v = alpha * sum[x + y * p->rows];
      if (old) v += beta * old[x + y * p->rows];
      store(j->d, D->type, at(D, batch, x, y), epilogue(j, batch, x, y, v));
    }
  free(a);
  free(b);
  free(own);
  free(old);
}

/* A kernel would fault on memory that is not the device's. */
static void need_device(const char *what, const void *ptr, int64_t elements, uint32_t type) {
  if (!simcuda_is_device(ptr, (size_t)(elements * type_bytes(type))))
    simcuda_die("cublasLtMatmul: %s (%p, %lld elements) is not device memory", what, ptr, (long long)elements);
}

static int64_t extent(const lt_layout *l) {
  return at(l, l->batch - 1, (int64_t)l->rows - 1, (int64_t)l->cols - 1) + 1;
}

static void need_operands(const job *j, bool reads_c) {
  const problem *p = &j->p;
  const lt_desc *d = &p->d;
  uint32_t type = p->m[3].type;
  int64_t last = p->m[3].batch - 1;
  need_device("A", j->a, extent(&p->m[0]), p->m[0].type);
  need_device("B", j->b, extent(&p->m[1]), p->m[1].type);
  if (reads_c) need_device("C", j->c, extent(&p->m[2]), p->m[2].type);
  need_device("D", j->d, extent(&p->m[3]), type);
  if (d->epilogue & EP_BIAS) need_device("the bias", d->bias, last * d->bias_stride + p->rows, type);
  if (d->epilogue & EP_AUX)
    need_device("the auxiliary matrix", d->aux, last * d->aux_stride + (p->cols - 1) * d->aux_ld + p->rows, type);
  int64_t bytes = (int64_t)workspace_of(&j->algo, p);
  if (bytes) need_device("the workspace", j->workspace, bytes / 4, CUDA_R_32F);
}

static void run(void *arg) {
  const job *j = arg;
  float alpha = j->alpha_ptr ? *j->alpha_ptr : j->alpha, beta = j->beta_ptr ? *j->beta_ptr : j->beta;
  uint64_t bytes = workspace_of(&j->algo, &j->p);
  need_operands(j, beta != 0);
  if (bytes) memset(j->workspace, 0xff, bytes);
  openblas_set_num_threads(1); /* the order of a sum must not depend on the machine */
  for (int64_t b = 0; b < j->p.m[3].batch; b++) run_batch(j, b, alpha, beta);
}

/* ---- launch ---- */
static cublasStatus_t check_pointers(const job *j, uint64_t workspace_bytes) {
  const problem *p = &j->p;
  const void *ptr[6] = {j->a, j->b, j->c, j->d, p->d.bias, p->d.aux};
  if (!j->a || !j->b || !j->d) INVALID("A, B or D is NULL");
  if (!j->c && (j->beta_ptr || j->beta != 0)) INVALID("C is NULL and beta is not 0");
  if (p->d.epilogue & EP_BIAS && !p->d.bias) INVALID("no bias");
  if (p->d.epilogue & EP_AUX && !p->d.aux) INVALID("no auxiliary matrix");
  if (j->c == j->d && memcmp(&p->m[2], &p->m[3], sizeof(lt_layout))) INVALID("in place, with two layouts");
  for (int i = 0; i < 6; i++)
    if ((i < 4 || (i == 4 && p->d.epilogue & EP_BIAS) || (i == 5 && p->d.epilogue & EP_AUX)) &&
        (uintptr_t)ptr[i] % j->algo.align[i])
      UNSUPPORTED("a pointer is aligned worse than the algorithm was chosen for");
  if ((uintptr_t)j->workspace % 256) INVALID("workspace not aligned to 256 bytes");
  if (workspace_of(&j->algo, p) > (j->workspace ? workspace_bytes : 0)) INVALID("workspace too small");
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha, const void *A,
                              cublasLtMatrixLayout_t a, const void *B, cublasLtMatrixLayout_t b, const void *beta,
                              const void *C, cublasLtMatrixLayout_t c, void *D, cublasLtMatrixLayout_t d,
                              const cublasLtMatmulAlgo_t *algo, void *workspace, size_t workspace_bytes,
                              cudaStream_t stream) {
  job j = {.a = A, .b = B, .c = C, .d = D, .workspace = workspace};
  cublasStatus_t s = judge(&j.p, handle, desc, (cublasLtMatrixLayout_t[]){a, b, c, d});
  if (s != CUBLAS_STATUS_SUCCESS) return s;
  if (!alpha || !beta) INVALID("alpha or beta is NULL");
  if (j.p.d.pointer_mode == CUBLASLT_POINTER_MODE_HOST) {
    j.alpha = *(const float *)alpha;
    j.beta = *(const float *)beta;
  } else {
    j.alpha_ptr = alpha;
    j.beta_ptr = beta;
  }
  if (algo) {
    memcpy(&j.algo, algo, sizeof j.algo);
    s = check_algo(&j.p, &j.algo);
  } else { /* the library asks its own heuristic */
    lt_pref pref = {.workspace = workspace ? workspace_bytes : 0, .reduction = CUBLASLT_REDUCTION_SCHEME_MASK};
    const void *ptr[4] = {A, B, C, D};
    for (int i = 0; i < 4; i++) pref.align[i] = pointer_alignment(ptr[i]);
    cublasLtMatmulHeuristicResult_t r;
    int n;
    s = choose(&j.p, &pref, 1, &r, &n);
    if (s == CUBLAS_STATUS_SUCCESS) memcpy(&j.algo, &r.algo, sizeof j.algo);
  }
  if (s == CUBLAS_STATUS_SUCCESS) s = check_pointers(&j, workspace_bytes);
  if (s != CUBLAS_STATUS_SUCCESS) return s;
  return simcuda_enqueue(stream, run, &j, sizeof j) == cudaSuccess ? CUBLAS_STATUS_SUCCESS
                                                                   : CUBLAS_STATUS_EXECUTION_FAILED;
}
