/* libs_test_cublaslt.c: the cuBLASLt stand-in against loops in double, and what it must refuse. Seen to catch: the
 * leading dimension of B taken for its number of rows in widen(). */
#include "libs_test.h"

#include <cublasLt.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

typedef struct gemm_case {
  int m, n, k, trans_a, trans_b, pad, batch;
  float alpha, beta;
  cudaDataType_t in, out;
  cublasComputeType_t compute;
  cublasLtEpilogue_t epilogue;
  int algo; /* which of the heuristic's results */
} gemm_case;

typedef struct gemm {
  cublasLtHandle_t handle;
  cublasLtMatmulDesc_t desc;
  cublasLtMatrixLayout_t a, b, d;
  cublasLtMatmulPreference_t pref;
  cublasLtMatmulHeuristicResult_t found[4];
  int n_found;
} gemm;

#define LT_OK(call) assert_int_equal((int)(call), CUBLAS_STATUS_SUCCESS)

static cublasLtMatrixLayout_t layout(cudaDataType_t type, int rows, int cols, int pad, int batch) {
  cublasLtMatrixLayout_t l;
  int64_t stride = (int64_t)(rows + pad) * cols;
  LT_OK(cublasLtMatrixLayoutCreate(&l, type, (uint64_t)rows, (uint64_t)cols, rows + pad));
  LT_OK(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch));
  LT_OK(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride));
  return l;
}

static void gemm_open(gemm *g, const gemm_case *c) {
  cublasOperation_t ta = c->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N, tb = c->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N;
  uint64_t workspace = 4 << 20;
  LT_OK(cublasLtCreate(&g->handle));
  LT_OK(cublasLtMatmulDescCreate(&g->desc, c->compute, CUDA_R_32F));
  LT_OK(cublasLtMatmulDescSetAttribute(g->desc, CUBLASLT_MATMUL_DESC_TRANSA, &ta, sizeof ta));
  LT_OK(cublasLtMatmulDescSetAttribute(g->desc, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof tb));
  LT_OK(cublasLtMatmulDescSetAttribute(g->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &c->epilogue, sizeof c->epilogue));
  g->a = layout(c->in, c->trans_a ? c->k : c->m, c->trans_a ? c->m : c->k, c->pad, c->batch);
  g->b = layout(c->in, c->trans_b ? c->n : c->k, c->trans_b ? c->k : c->n, 2 * c->pad, c->batch);
  g->d = layout(c->out, c->m, c->n, 3 * c->pad, c->batch);
  LT_OK(cublasLtMatmulPreferenceCreate(&g->pref));
  LT_OK(cublasLtMatmulPreferenceSetAttribute(g->pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                             sizeof workspace));
}

static cublasStatus_t gemm_find(gemm *g) {
  return cublasLtMatmulAlgoGetHeuristic(g->handle, g->desc, g->a, g->b, g->d, g->d, g->pref, 4, g->found, &g->n_found);
}

static void gemm_close(gemm *g) {
  cublasLtMatmulPreferenceDestroy(g->pref);
  cublasLtMatrixLayoutDestroy(g->a);
  cublasLtMatrixLayoutDestroy(g->b);
  cublasLtMatrixLayoutDestroy(g->d);
  cublasLtMatmulDescDestroy(g->desc);
  cublasLtDestroy(g->handle);
}

static float *fill(size_t n, cudaDataType_t type, uint64_t *seed) {
  float *v = malloc(n * sizeof *v);
  assert_non_null(v);
  for (size_t i = 0; i < n; i++) v[i] = libs_rounded(libs_uniform(seed), type);
  return v;
}

static double gelu_of(double x) {
  return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
}

static void check(const gemm_case *c) {
  gemm g;
  gemm_open(&g, c);
  uint64_t seed = 7;
  int lda = (c->trans_a ? c->k : c->m) + c->pad, ldb = (c->trans_b ? c->n : c->k) + 2 * c->pad, ldd = c->m + 3 * c->pad;
  int a_cols = c->trans_a ? c->m : c->k, b_cols = c->trans_b ? c->k : c->n;
  size_t na = (size_t)lda * a_cols * c->batch, nb = (size_t)ldb * b_cols * c->batch, nd = (size_t)ldd * c->n * c->batch;
  float *a = fill(na, c->in, &seed), *b = fill(nb, c->in, &seed), *d = fill(nd, c->out, &seed);
  float *bias = fill((size_t)c->m, c->out, &seed), *got = fill(nd, c->out, &seed);
  void *da = libs_device(na * 4), *db = libs_device(nb * 4), *dd = libs_device(nd * 4),
       *dbias = libs_device(c->m * 4 + 16);
  void *workspace = libs_device(4 << 20);
  libs_put(da, a, na, c->in);
  libs_put(db, b, nb, c->in);
  libs_put(dd, d, nd, c->out);
  libs_put(dbias, bias, (size_t)c->m, c->out);
  LT_OK(cublasLtMatmulDescSetAttribute(g.desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &dbias, sizeof dbias));
  LT_OK(gemm_find(&g));
  assert_true(g.n_found > c->algo);
  LT_OK(cublasLtMatmul(g.handle, g.desc, &c->alpha, da, g.a, db, g.b, &c->beta, dd, g.d, dd, g.d,
                       &g.found[c->algo].algo, workspace, g.found[c->algo].workspaceSize, NULL));
  CUDA_OK(cudaDeviceSynchronize());
  libs_get(got, dd, nd, c->out);
  bool bias_on = c->epilogue & CUBLASLT_EPILOGUE_BIAS, gelu_on = c->epilogue & CUBLASLT_EPILOGUE_GELU;
  double ulp = c->out == CUDA_R_32F ? 1e-6 : c->out == CUDA_R_16F ? 0x1p-11 : 0x1p-8;
  double slack = c->compute == CUBLAS_COMPUTE_32F_FAST_TF32 ? c->k * 2e-3 : c->k * 1e-7;
  for (int s = 0; s < c->batch; s++)
    for (int j = 0; j < c->n; j++)
      for (int i = 0; i < ldd; i++) {
        size_t at = (size_t)s * ldd * c->n + (size_t)j * ldd + i;
        if (i >= c->m) { /* padding is nobody's */
          assert_true(got[at] == d[at]);
          continue;
        }
        double v = 0, size = 0;
        for (int q = 0; q < c->k; q++) {
          double x = a[(size_t)s * lda * a_cols + (c->trans_a ? (size_t)i * lda + q : (size_t)q * lda + i)];
          double y = b[(size_t)s * ldb * b_cols + (c->trans_b ? (size_t)q * ldb + j : (size_t)j * ldb + q)];
          v += x * y;
          size += fabs(x * y);
        }
        v = c->alpha * v + (c->beta != 0 ? c->beta * (double)d[at] : 0) + (bias_on ? bias[i] : 0);
        if (gelu_on) v = gelu_of(v);
        double err = fabs(got[at] - v), allowed = ulp * fabs(v) + slack * (1 + size / c->k);
        if (!(err <= allowed))
          fail_msg("m%d n%d k%d t%d%d algo %d: [%d,%d] %g, not %g", c->m, c->n, c->k, c->trans_a, c->trans_b, c->algo,
                   i, j, got[at], v);
      }
  void *device[] = {da, db, dd, dbias, workspace};
  for (int i = 0; i < 5; i++) CUDA_OK(cudaFree(device[i]));
  free(a), free(b), free(d), free(bias), free(got);
  gemm_close(&g);
}

void libs_cublaslt_products(void **state) {
  (void)state;
  static const cudaDataType_t BF = CUDA_R_16BF, HF = CUDA_R_16F, F = CUDA_R_32F;
  static const cublasComputeType_t C32 = CUBLAS_COMPUTE_32F, TF = CUBLAS_COMPUTE_32F_FAST_TF32;
  static const cublasLtEpilogue_t NONE = CUBLASLT_EPILOGUE_DEFAULT, BIAS = CUBLASLT_EPILOGUE_BIAS,
                                  GELU_BIAS = CUBLASLT_EPILOGUE_GELU_BIAS;
  const gemm_case cases[] = {
      {17, 9, 33, 0, 0, 0, 1, 1, 0, F, F, C32, NONE, 0},    {17, 9, 33, 1, 0, 3, 1, 1, 0, F, F, C32, NONE, 0},
      {17, 9, 33, 0, 1, 5, 1, 0.5f, 1, F, F, C32, NONE, 0}, {17, 9, 33, 1, 1, 1, 1, -2, 0.25f, F, F, C32, NONE, 0},
      {64, 48, 96, 1, 0, 8, 1, 1, 1, BF, BF, C32, NONE, 0}, {64, 48, 96, 1, 0, 8, 1, 1, 1, BF, BF, C32, NONE, 1},
      {64, 48, 96, 0, 1, 8, 1, 1, 0, BF, BF, C32, NONE, 2}, {40, 24, 16, 0, 0, 0, 5, 1, 1, BF, BF, C32, NONE, 0},
      {40, 24, 72, 1, 0, 0, 1, 1, 0, BF, F, C32, NONE, 0},  {33, 7, 21, 1, 0, 2, 1, 1, 0, HF, HF, C32, BIAS, 0},
      {64, 32, 64, 1, 0, 8, 1, 1, 1, BF, BF, C32, BIAS, 0}, {64, 32, 64, 1, 0, 0, 1, 1, 0, BF, BF, C32, GELU_BIAS, 0},
      {32, 32, 64, 1, 0, 0, 1, 1, 0, F, F, TF, NONE, 0},    {1, 1, 1, 0, 0, 0, 1, 1, 0, F, F, C32, BIAS, 0},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) check(cases + i);
}

/* The operands of TF32 are cut to 10 bits of mantissa: 1 + 2^-11 counts as 1. */
void libs_cublaslt_tf32(void **state) {
  (void)state;
  gemm_case c = {
      8, 8, 8, 0, 0, 0, 1, 1, 0, CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F_FAST_TF32, CUBLASLT_EPILOGUE_DEFAULT, 0};
  gemm g;
  gemm_open(&g, &c);
  float a[64], b[64], d[64], one = 1, zero = 0;
  for (int i = 0; i < 64; i++) a[i] = 1 + 0x1p-11f, b[i] = i % 9 ? 0 : 1;
  void *da = libs_device(sizeof a), *db = libs_device(sizeof b), *dd = libs_device(sizeof d);
  libs_put(da, a, 64, CUDA_R_32F);
  libs_put(db, b, 64, CUDA_R_32F);
  LT_OK(cublasLtMatmul(g.handle, g.desc, &one, da, g.a, db, g.b, &zero, dd, g.d, dd, g.d, NULL, NULL, 0, NULL));
  CUDA_OK(cudaDeviceSynchronize());
  libs_get(d, dd, 64, CUDA_R_32F);
  for (int i = 0; i < 64; i++) assert_true(d[i] == 1);
  CUDA_OK(cudaFree(da));
  CUDA_OK(cudaFree(db));
  CUDA_OK(cudaFree(dd));
  gemm_close(&g);
}

static const gemm_case plain = {
    64, 32, 64, 1, 0, 0, 1, 1, 0, CUDA_R_16BF, CUDA_R_16BF, CUBLAS_COMPUTE_32F, CUBLASLT_EPILOGUE_DEFAULT, 0};

void libs_cublaslt_refusals(void **state) {
  (void)state;
  enum { INVALID = CUBLAS_STATUS_INVALID_VALUE, UNSUPPORTED = CUBLAS_STATUS_NOT_SUPPORTED };
  gemm g;
  gemm_case c = plain;
  c.out = CUDA_R_16F; /* bf16 times bf16 into fp16 */
  gemm_open(&g, &c);
  assert_int_equal(gemm_find(&g), UNSUPPORTED);
  gemm_close(&g);
  c = plain;
  c.compute = CUBLAS_COMPUTE_32F_FAST_TF32; /* of bf16 */
  gemm_open(&g, &c);
  assert_int_equal(gemm_find(&g), UNSUPPORTED);
  gemm_close(&g);

  gemm_open(&g, &plain);
  int64_t ld = 63;
  LT_OK(cublasLtMatrixLayoutSetAttribute(g.a, CUBLASLT_MATRIX_LAYOUT_LD, &ld, sizeof ld));
  assert_int_equal(gemm_find(&g), INVALID);
  ld = 64;
  LT_OK(cublasLtMatrixLayoutSetAttribute(g.a, CUBLASLT_MATRIX_LAYOUT_LD, &ld, sizeof ld));
  uint64_t rows = 48; /* op(A)'s depth no longer that of B */
  LT_OK(cublasLtMatrixLayoutSetAttribute(g.a, CUBLASLT_MATRIX_LAYOUT_ROWS, &rows, sizeof rows));
  assert_int_equal(gemm_find(&g), INVALID);
  rows = 64;
  LT_OK(cublasLtMatrixLayoutSetAttribute(g.a, CUBLASLT_MATRIX_LAYOUT_ROWS, &rows, sizeof rows));
  assert_int_equal(cublasLtMatrixLayoutSetAttribute(g.a, CUBLASLT_MATRIX_LAYOUT_ROWS, &rows, 4), INVALID);
  uint32_t align = 1;
  LT_OK(cublasLtMatmulPreferenceSetAttribute(g.pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align, sizeof align));
  assert_int_equal(gemm_find(&g), UNSUPPORTED);
  gemm_close(&g);

  cublasLtMatmulDescOpaque_t never;
  memset(&never, 0, sizeof never);
  gemm_open(&g, &plain);
  int n;
  assert_int_equal(cublasLtMatmulAlgoGetHeuristic(g.handle, &never, g.a, g.b, g.d, g.d, g.pref, 1, g.found, &n),
                   INVALID);
  assert_int_equal(cublasLtMatmulAlgoGetHeuristic(NULL, g.desc, g.a, g.b, g.d, g.d, g.pref, 1, g.found, &n),
                   CUBLAS_STATUS_NOT_INITIALIZED);
  LT_OK(cublasLtMatmulAlgoGetHeuristic(g.handle, g.desc, g.a, g.b, g.d, g.d, g.pref, 1, g.found, &n));
  assert_int_equal(n, 1);
  uint64_t none = 0;
  LT_OK(cublasLtMatmulPreferenceSetAttribute(g.pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &none, sizeof none));
  LT_OK(gemm_find(&g));
  for (int i = 0; i < g.n_found; i++) assert_int_equal(g.found[i].workspaceSize, 0);
  gemm_close(&g);
}

/* An algorithm chosen for aligned operands must not be given others, nor too small a workspace. */
void libs_cublaslt_launch_refusals(void **state) {
  (void)state;
  enum { INVALID = CUBLAS_STATUS_INVALID_VALUE, UNSUPPORTED = CUBLAS_STATUS_NOT_SUPPORTED };
  gemm g;
  gemm_open(&g, &plain);
  LT_OK(gemm_find(&g));
  const cublasLtMatmulAlgo_t *algo = &g.found[0].algo;
  size_t need = g.found[0].workspaceSize;
  assert_true(need > 0);
  char *memory = libs_device(1 << 20), *workspace = libs_device(need + 256), *out = memory + 131072;
  float one = 1, zero = 0;
#define LAUNCH(at, ws, bytes, how)                                                                                     \
  cublasLtMatmul(g.handle, g.desc, &one, at, g.a, memory + 65536, g.b, &zero, out, g.d, out, g.d, how, ws, bytes, NULL)
  LT_OK(LAUNCH(memory, workspace, need, algo));
  assert_int_equal(LAUNCH(memory + 2, workspace, need, algo), UNSUPPORTED);
  LT_OK(LAUNCH(memory + 2, workspace, need, NULL));
  assert_int_equal(LAUNCH(memory, workspace, need - 1, algo), INVALID);
  assert_int_equal(LAUNCH(memory, workspace + 16, need, algo), INVALID);
  assert_int_equal(LAUNCH(NULL, workspace, need, algo), INVALID);
  cublasOperation_t n = CUBLAS_OP_N;
  LT_OK(cublasLtMatmulDescSetAttribute(g.desc, CUBLASLT_MATMUL_DESC_TRANSA, &n, sizeof n));
  assert_int_equal(LAUNCH(memory, workspace, need, algo), INVALID); /* another problem's algorithm */
  CUDA_OK(cudaDeviceSynchronize());
  CUDA_OK(cudaFree(memory));
  CUDA_OK(cudaFree(workspace));
  gemm_close(&g);
}
