/* matmul_plan.c: the table of shapes: descriptors, and the algorithm cuBLASLt's heuristic names for each.
 *
 * Sums over parts of k are allowed only through fp32 partial sums added in a step of their own
 * (CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE): the schemes that add in place or in the stored type would round on the way
 * or depend on which part ends first. With one algorithm per shape, one stream and one workspace, two runs give the
 * same bits. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/matmul_impl.h"
#include "backend/cuda/need_matmul.h"

enum { FIRST_CAP = 256, MOST_ENTRIES = 8192 };

bool esp_mm_ok(esp_backend *be, cublasStatus_t st, const char *what) {
  if (st == CUBLAS_STATUS_SUCCESS) return be->sticky == ESP_OK;
  return esp_cuda_fail(be, "cublasLt", what, cublasLtGetStatusString(st));
}

/* ---- life ---- */

esp_status esp_cuda_matmul_create(esp_backend *be) {
  esp_cuda *c = esp_cuda_of(be);
  esp_cuda_matmul *mm = calloc(1, sizeof *mm);
  uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  if (!mm) return be->sticky = esp_fail(ESP_ERR_MEMORY, "cuda: out of host memory");
  c->mm = mm;
  mm->workspace_bytes = (size_t)esp_cuda_matmul_workspace(c->cc);
  mm->workspace = esp_cuda_alloc(be, ESP_MEM_WORKSPACE, (int64_t)mm->workspace_bytes);
  mm->cap = FIRST_CAP;
  mm->table = calloc((size_t)mm->cap, sizeof *mm->table);
  if (!mm->table) return be->sticky = esp_fail(ESP_ERR_MEMORY, "cuda: out of host memory");
  if (!mm->workspace || !esp_mm_ok(be, cublasLtCreate(&mm->lt), "opening the library") ||
      !esp_mm_ok(be, cublasLtMatmulPreferenceInit(&mm->pref), "preferences") ||
      !esp_mm_ok(be,
                 cublasLtMatmulPreferenceSetAttribute(&mm->pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                      &mm->workspace_bytes, sizeof mm->workspace_bytes),
                 "preferences") ||
      !esp_mm_ok(be,
                 cublasLtMatmulPreferenceSetAttribute(&mm->pref, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes,
                                                      sizeof schemes),
                 "preferences"))
    return be->sticky;
  esp_mm_tune_open(be);
  return be->sticky;
}

void esp_cuda_matmul_destroy(esp_backend *be) {
  esp_cuda *c = esp_cuda_of(be);
  esp_cuda_matmul *mm = c->mm;
  if (!mm) return;
  esp_mm_tune_close(be);
  if (mm->lt) cublasLtDestroy(mm->lt);
  esp_cuda_free(be, mm->workspace);
  free(mm->table);
  free(mm);
  c->mm = NULL;
}

/* ---- table ---- */

static uint64_t hash_of(const esp_mm_key *key) {
  uint64_t words[sizeof *key / 8], h = 0x9e3779b97f4a7c15u;
  memcpy(words, key, sizeof *key);
  for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
    h = (h ^ words[i]) * 0xff51afd7ed558ccdu;
    h ^= h >> 32;
  }
  return h;
}
_Static_assert(sizeof(esp_mm_key) % 8 == 0, "hashed by words");

/* The entry of this key, or the free place where it belongs. */
static esp_mm_entry *place_of(esp_mm_entry *table, int cap, const esp_mm_key *key) {
  uint64_t i = hash_of(key);
  for (;; i++) {
    esp_mm_entry *e = &table[i & (uint64_t)(cap - 1)];
    if (!e->used || memcmp(&e->key, key, sizeof *key) == 0) return e;
  }
}

/* At most three quarters full. A run whose shapes never repeat begins anew instead of growing without end. */
static bool make_room(esp_backend *be, esp_cuda_matmul *mm) {
  if (mm->count < mm->cap / 4 * 3) return true;
  if (mm->count >= MOST_ENTRIES) {
    memset(mm->table, 0, (size_t)mm->cap * sizeof *mm->table);
    mm->count = 0;
    return true;
  }
  esp_mm_entry *bigger = calloc((size_t)mm->cap * 2, sizeof *bigger);
  if (!bigger) {
    be->sticky = esp_fail(ESP_ERR_MEMORY, "cuda: out of host memory");
    return false;
  }
  for (int i = 0; i < mm->cap; i++)
    if (mm->table[i].used) *place_of(bigger, mm->cap * 2, &mm->table[i].key) = mm->table[i];
  free(mm->table);
  mm->table = bigger;
  mm->cap *= 2;
  return true;
}

/* ---- one shape ---- */

static cudaDataType_t cuda_type(int dtype) {
  return dtype == ESP_BF16 ? CUDA_R_16BF : CUDA_R_32F;
}

/* Row-major [rows, cols] with ld is column-major [cols, rows] with the same ld. */
static cublasStatus_t layout_of(cublasLtMatrixLayoutOpaque_t *l, int dtype, int64_t rows, int64_t cols, int64_t ld) {
  return cublasLtMatrixLayoutInit(l, cuda_type(dtype), (uint64_t)cols, (uint64_t)rows, ld);
}
static cublasStatus_t batch_of(cublasLtMatrixLayoutOpaque_t *l, int64_t batch, int64_t to_next) {
  int32_t count = (int32_t)batch;
  cublasStatus_t st = cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count);
  if (st != CUBLAS_STATUS_SUCCESS) return st;
  return cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &to_next, sizeof to_next);
}

static cublasStatus_t set_desc(esp_mm_entry *e, cublasLtMatmulDescAttributes_t attr, int32_t value) {
  return cublasLtMatmulDescSetAttribute(&e->desc, attr, &value, sizeof value);
}

static cublasStatus_t set_bias(esp_mm_entry *e, const void *bias) {
  return cublasLtMatmulDescSetAttribute(&e->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
}

static cublasStatus_t describe(esp_mm_entry *e, const void *bias) {
  const esp_mm_key *k = &e->key;
  cublasComputeType_t compute =
      k->tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F; /* for bf16 operands too: sums are fp32 */
  cublasStatus_t st = cublasLtMatmulDescInit(&e->desc, compute, CUDA_R_32F);
  if (st == CUBLAS_STATUS_SUCCESS)
    st = set_desc(e, CUBLASLT_MATMUL_DESC_TRANSA, k->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (st == CUBLAS_STATUS_SUCCESS)
    st = set_desc(e, CUBLASLT_MATMUL_DESC_TRANSB, k->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (st == CUBLAS_STATUS_SUCCESS && bias) {
    st = set_desc(e, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    if (st == CUBLAS_STATUS_SUCCESS) st = set_desc(e, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, (int32_t)cuda_type(k->out));
    if (st == CUBLAS_STATUS_SUCCESS) st = set_bias(e, bias); /* the choice looks at its alignment */
  }
  if (st == CUBLAS_STATUS_SUCCESS)
    st = layout_of(&e->a, k->in, k->trans_a ? k->k : k->m, k->trans_a ? k->m : k->k, k->lda);
  if (st == CUBLAS_STATUS_SUCCESS)
    st = layout_of(&e->b, k->in, k->trans_b ? k->n : k->k, k->trans_b ? k->k : k->n, k->ldb);
  if (st == CUBLAS_STATUS_SUCCESS) st = layout_of(&e->c, k->out, k->m, k->n, k->ldc);
  if (!k->batch) return st;
  if (st == CUBLAS_STATUS_SUCCESS) st = batch_of(&e->a, k->batch, k->to_a);
  if (st == CUBLAS_STATUS_SUCCESS) st = batch_of(&e->b, k->batch, k->to_b);
  if (st == CUBLAS_STATUS_SUCCESS) st = batch_of(&e->c, k->batch, k->to_c);
  return st;
}

static cublasStatus_t candidates(esp_cuda_matmul *mm, esp_mm_entry *e, cublasLtMatmulHeuristicResult_t *found,
                                 int wanted, int *n) {
  const uint8_t *align = e->key.align;
  const struct {
    cublasLtMatmulPreferenceAttributes_t attr;
    uint32_t bytes;
  } min_align[] = {{CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, align[1]},
                   {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, align[0]},
                   {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, align[2]},
                   {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, align[2]}};
  cublasStatus_t st = CUBLAS_STATUS_SUCCESS;
  for (int i = 0; i < 4 && st == CUBLAS_STATUS_SUCCESS; i++)
    st = cublasLtMatmulPreferenceSetAttribute(&mm->pref, min_align[i].attr, &min_align[i].bytes,
                                              sizeof min_align[i].bytes);
  *n = 0;
  if (st == CUBLAS_STATUS_SUCCESS)
    st = cublasLtMatmulAlgoGetHeuristic(mm->lt, &e->desc, &e->b, &e->a, &e->c, &e->c, &mm->pref, wanted, found, n);
  if (st == CUBLAS_STATUS_SUCCESS && (*n == 0 || found[0].state != CUBLAS_STATUS_SUCCESS))
    st = CUBLAS_STATUS_NOT_SUPPORTED;
  return st;
}

static bool choose(esp_backend *be, esp_mm_entry *e, const esp_mm_data *data) {
  esp_cuda *c = esp_cuda_of(be);
  esp_cuda_matmul *mm = c->mm;
  const esp_mm_key *k = &e->key;
  cublasLtMatmulHeuristicResult_t found[ESP_MM_CANDIDATES];
  bool measure = mm->tune && !c->capturing;
  int n = 0;
  cublasStatus_t st = describe(e, data->bias);
  if (st == CUBLAS_STATUS_SUCCESS && mm->tune && esp_mm_tuned_find(mm, e)) return true;
  if (st == CUBLAS_STATUS_SUCCESS) st = candidates(mm, e, found, measure ? ESP_MM_CANDIDATES : 1, &n);
  if (st == CUBLAS_STATUS_NOT_SUPPORTED && data->bias) {
    e->apart = true;
    st = describe(e, NULL);
    if (st == CUBLAS_STATUS_SUCCESS) st = candidates(mm, e, found, measure ? ESP_MM_CANDIDATES : 1, &n);
  }
  if (st != CUBLAS_STATUS_SUCCESS) {
    char what[200];
    snprintf(what, sizeof what, "no algorithm for a product [%lld, %lld] x [%lld, %lld] of %s into %s", (long long)k->m,
             (long long)k->k, (long long)k->k, (long long)k->n, esp_dtype_name((esp_dtype)k->in),
             esp_dtype_name((esp_dtype)k->out));
    return esp_mm_ok(be, st, what);
  }
  int best = measure ? esp_mm_measure(be, e, data, found, n) : 0;
  e->algo = found[best].algo;
  return be->sticky == ESP_OK;
}

esp_mm_entry *esp_mm_find(esp_backend *be, const esp_mm_key *key, const esp_mm_data *data) {
  esp_cuda_matmul *mm = esp_cuda_of(be)->mm;
  esp_mm_entry *e = place_of(mm->table, mm->cap, key);
  if (!e->used) {
    if (!make_room(be, mm)) return NULL;
    e = place_of(mm->table, mm->cap, key);
    memset(e, 0, sizeof *e);
    e->key = *key;
    if (!choose(be, e, data)) return NULL;
    e->used = true;
    mm->count++;
  }
  if (data->bias && !e->apart && !esp_mm_ok(be, set_bias(e, data->bias), "the bias")) return NULL;
  return e;
}
