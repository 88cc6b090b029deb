/* cublaslt_desc.c: handle, descriptors, layouts and preferences of the cuBLASLt stand-in. Attributes are checked for
 * size alone, as the library does: their values are judged where they are used. */
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "cublaslt_impl.h"

struct cublasLtContext {
  uint32_t magic;
};

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
  int device;
  if (!handle) return CUBLAS_STATUS_INVALID_VALUE;
  if (cudaGetDevice(&device) != cudaSuccess) return CUBLAS_STATUS_NOT_INITIALIZED;
  struct cublasLtContext *h = malloc(sizeof *h);
  if (!h) return CUBLAS_STATUS_ALLOC_FAILED;
  h->magic = LT_HANDLE;
  *handle = (cublasLtHandle_t)h;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  struct cublasLtContext *h = (struct cublasLtContext *)handle;
  if (!h || h->magic != LT_HANDLE) return CUBLAS_STATUS_NOT_INITIALIZED;
  h->magic = 0;
  free(h);
  return CUBLAS_STATUS_SUCCESS;
}

size_t cublasLtGetVersion(void) {
  return CUBLAS_VER_MAJOR * 10000 + CUBLAS_VER_MINOR * 100 + CUBLAS_VER_PATCH;
}

size_t cublasLtGetCudartVersion(void) {
  return CUDART_VERSION;
}

#define LT_STATUS(X)                                                                                                   \
  X(CUBLAS_STATUS_SUCCESS, "success")                                                                                  \
  X(CUBLAS_STATUS_NOT_INITIALIZED, "the library was not initialized")                                                  \
  X(CUBLAS_STATUS_ALLOC_FAILED, "the resource allocation failed")                                                      \
  X(CUBLAS_STATUS_INVALID_VALUE, "an unsupported value or parameter was passed to the function")                       \
  X(CUBLAS_STATUS_ARCH_MISMATCH, "the function requires an architectural feature absent from the device")              \
  X(CUBLAS_STATUS_MAPPING_ERROR, "an access to GPU memory space failed")                                               \
  X(CUBLAS_STATUS_EXECUTION_FAILED, "the function failed to launch on the GPU")                                        \
  X(CUBLAS_STATUS_INTERNAL_ERROR, "an internal operation failed")                                                      \
  X(CUBLAS_STATUS_NOT_SUPPORTED, "the requested functionality is not supported")                                       \
  X(CUBLAS_STATUS_LICENSE_ERROR, "the license check failed")

const char *cublasLtGetStatusName(cublasStatus_t status) {
  switch (status) {
#define LT_NAME(code, text)                                                                                            \
  case code:                                                                                                           \
    return #code;
    LT_STATUS(LT_NAME)
  default:
    return "CUBLAS_STATUS_UNKNOWN";
  }
}

const char *cublasLtGetStatusString(cublasStatus_t status) {
  switch (status) {
#define LT_TEXT(code, text)                                                                                            \
  case code:                                                                                                           \
    return text;
    LT_STATUS(LT_TEXT)
  default:
    return "unknown status";
  }
}

/* ---- attributes: a table of (name, offset, size) per structure ---- */
typedef struct lt_field {
  int attr;
  size_t offset, size;
} lt_field;

#define LT_FIELD(attr, type, member)                                                                                   \
  { attr, offsetof(type, member), sizeof(((type *)0)->member) }

static const lt_field desc_fields[] = {
    LT_FIELD(CUBLASLT_MATMUL_DESC_COMPUTE_TYPE, lt_desc, compute),
    LT_FIELD(CUBLASLT_MATMUL_DESC_SCALE_TYPE, lt_desc, scale),
    LT_FIELD(CUBLASLT_MATMUL_DESC_POINTER_MODE, lt_desc, pointer_mode),
    LT_FIELD(CUBLASLT_MATMUL_DESC_TRANSA, lt_desc, trans_a),
    LT_FIELD(CUBLASLT_MATMUL_DESC_TRANSB, lt_desc, trans_b),
    LT_FIELD(CUBLASLT_MATMUL_DESC_TRANSC, lt_desc, trans_c),
    LT_FIELD(CUBLASLT_MATMUL_DESC_FILL_MODE, lt_desc, fill),
    LT_FIELD(CUBLASLT_MATMUL_DESC_EPILOGUE, lt_desc, epilogue),
    LT_FIELD(CUBLASLT_MATMUL_DESC_BIAS_POINTER, lt_desc, bias),
    LT_FIELD(CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, lt_desc, bias_stride),
    LT_FIELD(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, lt_desc, aux),
    LT_FIELD(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, lt_desc, aux_ld),
    LT_FIELD(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE, lt_desc, aux_stride),
    LT_FIELD(CUBLASLT_MATMUL_DESC_ALPHA_VECTOR_BATCH_STRIDE, lt_desc, alpha_stride),
    LT_FIELD(CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, lt_desc, sm_target),
    LT_FIELD(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, lt_desc, scale_ptr[0]),
    LT_FIELD(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, lt_desc, scale_ptr[1]),
    LT_FIELD(CUBLASLT_MATMUL_DESC_C_SCALE_POINTER, lt_desc, scale_ptr[2]),
    LT_FIELD(CUBLASLT_MATMUL_DESC_D_SCALE_POINTER, lt_desc, scale_ptr[3]),
    LT_FIELD(CUBLASLT_MATMUL_DESC_AMAX_D_POINTER, lt_desc, scale_ptr[4]),
    LT_FIELD(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_SCALE_POINTER, lt_desc, scale_ptr[5]),
    LT_FIELD(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_AMAX_POINTER, lt_desc, scale_ptr[6]),
    LT_FIELD(CUBLASLT_MATMUL_DESC_D_OUT_SCALE_POINTER, lt_desc, scale_ptr[7]),
    LT_FIELD(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE, lt_desc, aux_type),
    LT_FIELD(CUBLASLT_MATMUL_DESC_FAST_ACCUM, lt_desc, fast_accum),
    LT_FIELD(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, lt_desc, bias_type),
};

static const lt_field layout_fields[] = {
    LT_FIELD(CUBLASLT_MATRIX_LAYOUT_TYPE, lt_layout, type),
    LT_FIELD(CUBLASLT_MATRIX_LAYOUT_ORDER, lt_layout, order),
    LT_FIELD(CUBLASLT_MATRIX_LAYOUT_ROWS, lt_layout, rows),
    LT_FIELD(CUBLASLT_MATRIX_LAYOUT_COLS, lt_layout, cols),
    LT_FIELD(CUBLASLT_MATRIX_LAYOUT_LD, lt_layout, ld),
    LT_FIELD(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, lt_layout, batch),
    LT_FIELD(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, lt_layout, stride),
    LT_FIELD(CUBLASLT_MATRIX_LAYOUT_PLANE_OFFSET, lt_layout, plane),
    LT_FIELD(CUBLASLT_MATRIX_LAYOUT_BATCH_MODE, lt_layout, batch_mode),
};

static const lt_field pref_fields[] = {
    LT_FIELD(CUBLASLT_MATMUL_PREF_SEARCH_MODE, lt_pref, search),
    LT_FIELD(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, lt_pref, workspace),
    LT_FIELD(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, lt_pref, reduction),
    LT_FIELD(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, lt_pref, align[0]),
    LT_FIELD(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, lt_pref, align[1]),
    LT_FIELD(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, lt_pref, align[2]),
    LT_FIELD(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, lt_pref, align[3]),
    LT_FIELD(CUBLASLT_MATMUL_PREF_MAX_WAVES_COUNT, lt_pref, waves),
    LT_FIELD(CUBLASLT_MATMUL_PREF_IMPL_MASK, lt_pref, impl),
};

static const lt_field algo_fields[] = {
    LT_FIELD(CUBLASLT_ALGO_CONFIG_ID, lt_algo, id),
    LT_FIELD(CUBLASLT_ALGO_CONFIG_TILE_ID, lt_algo, tile),
    LT_FIELD(CUBLASLT_ALGO_CONFIG_SPLITK_NUM, lt_algo, split_k),
    LT_FIELD(CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, lt_algo, reduction),
    LT_FIELD(CUBLASLT_ALGO_CONFIG_STAGES_ID, lt_algo, stages),
};

#define LT_COUNT(table) (sizeof(table) / sizeof *(table))

static const lt_field *find(const lt_field *fields, size_t n, int attr) {
  for (size_t i = 0; i < n; i++)
    if (fields[i].attr == attr) return fields + i;
  return NULL;
}

static cublasStatus_t set(void *object, uint32_t magic, const lt_field *fields, size_t n, int attr, const void *buf,
                          size_t bytes) {
  if (!object || *(uint32_t *)object != magic) return CUBLAS_STATUS_INVALID_VALUE;
  const lt_field *f = find(fields, n, attr);
  if (!f || !buf || bytes != f->size) return CUBLAS_STATUS_INVALID_VALUE;
  memcpy((char *)object + f->offset, buf, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t get(const void *object, uint32_t magic, const lt_field *fields, size_t n, int attr, void *buf,
                          size_t bytes, size_t *written) {
  if (!object || *(const uint32_t *)object != magic) return CUBLAS_STATUS_INVALID_VALUE;
  const lt_field *f = find(fields, n, attr);
  if (!f || (!bytes && !written)) return CUBLAS_STATUS_INVALID_VALUE;
  if (bytes) {
    if (!buf || bytes != f->size) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(buf, (const char *)object + f->offset, bytes);
  }
  if (written) *written = f->size;
  return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t destroy(void *object, uint32_t magic) {
  if (!object || *(uint32_t *)object != magic) return CUBLAS_STATUS_INVALID_VALUE;
  *(uint32_t *)object = 0;
  free(object);
  return CUBLAS_STATUS_SUCCESS;
}

/* ---- matmul descriptor ---- */
cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t desc, size_t size, cublasComputeType_t compute,
                                               cudaDataType_t scale) {
  if (!desc || size < sizeof *desc) return CUBLAS_STATUS_ALLOC_FAILED;
  memset(desc, 0, sizeof *desc);
  *(lt_desc *)desc = (lt_desc){.magic = LT_DESC,
                               .compute = (int32_t)compute,
                               .scale = (int32_t)scale,
                               .pointer_mode = CUBLASLT_POINTER_MODE_HOST,
                               .trans_a = CUBLAS_OP_N,
                               .trans_b = CUBLAS_OP_N,
                               .trans_c = CUBLAS_OP_N,
                               .fill = CUBLAS_FILL_MODE_FULL,
                               .epilogue = CUBLASLT_EPILOGUE_DEFAULT,
                               .bias_type = -1,
                               .aux_type = -1};
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute, cudaDataType_t scale) {
  if (!desc) return CUBLAS_STATUS_INVALID_VALUE;
  *desc = malloc(sizeof **desc);
  return *desc ? cublasLtMatmulDescInit_internal(*desc, sizeof **desc, compute, scale) : CUBLAS_STATUS_ALLOC_FAILED;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
  return destroy(desc, LT_DESC);
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attr,
                                              const void *buf, size_t bytes) {
  return set(desc, LT_DESC, desc_fields, LT_COUNT(desc_fields), (int)attr, buf, bytes);
}

cublasStatus_t cublasLtMatmulDescGetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attr, void *buf,
                                              size_t bytes, size_t *written) {
  return get(desc, LT_DESC, desc_fields, LT_COUNT(desc_fields), (int)attr, buf, bytes, written);
}

/* ---- matrix layout ---- */
cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout, size_t size, cudaDataType type,
                                                 uint64_t rows, uint64_t cols, int64_t ld) {
  if (!layout || size < sizeof *layout) return CUBLAS_STATUS_ALLOC_FAILED;
  memset(layout, 0, sizeof *layout);
  *(lt_layout *)layout = (lt_layout){
      .magic = LT_LAYOUT, .type = type, .order = CUBLASLT_ORDER_COL, .batch = 1, .rows = rows, .cols = cols, .ld = ld};
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows,
                                          uint64_t cols, int64_t ld) {
  if (!layout) return CUBLAS_STATUS_INVALID_VALUE;
  *layout = malloc(sizeof **layout);
  return *layout ? cublasLtMatrixLayoutInit_internal(*layout, sizeof **layout, type, rows, cols, ld)
                 : CUBLAS_STATUS_ALLOC_FAILED;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  return destroy(layout, LT_LAYOUT);
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t attr,
                                                const void *buf, size_t bytes) {
  return set(layout, LT_LAYOUT, layout_fields, LT_COUNT(layout_fields), (int)attr, buf, bytes);
}

cublasStatus_t cublasLtMatrixLayoutGetAttribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t attr,
                                                void *buf, size_t bytes, size_t *written) {
  return get(layout, LT_LAYOUT, layout_fields, LT_COUNT(layout_fields), (int)attr, buf, bytes, written);
}

/* ---- preference ---- */
cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t pref, size_t size) {
  if (!pref || size < sizeof *pref) return CUBLAS_STATUS_ALLOC_FAILED;
  memset(pref, 0, sizeof *pref);
  *(lt_pref *)pref = (lt_pref){
      .magic = LT_PREF, .reduction = CUBLASLT_REDUCTION_SCHEME_MASK, .align = {256, 256, 256, 256}, .impl = UINT64_MAX};
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *pref) {
  if (!pref) return CUBLAS_STATUS_INVALID_VALUE;
  *pref = malloc(sizeof **pref);
  return *pref ? cublasLtMatmulPreferenceInit_internal(*pref, sizeof **pref) : CUBLAS_STATUS_ALLOC_FAILED;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t pref) {
  return destroy(pref, LT_PREF);
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t pref,
                                                    cublasLtMatmulPreferenceAttributes_t attr, const void *buf,
                                                    size_t bytes) {
  return set(pref, LT_PREF, pref_fields, LT_COUNT(pref_fields), (int)attr, buf, bytes);
}

cublasStatus_t cublasLtMatmulPreferenceGetAttribute(cublasLtMatmulPreference_t pref,
                                                    cublasLtMatmulPreferenceAttributes_t attr, void *buf, size_t bytes,
                                                    size_t *written) {
  return get(pref, LT_PREF, pref_fields, LT_COUNT(pref_fields), (int)attr, buf, bytes, written);
}

cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t *algo,
                                                    cublasLtMatmulAlgoConfigAttributes_t attr, void *buf, size_t bytes,
                                                    size_t *written) {
  return get(algo, LT_ALGO, algo_fields, LT_COUNT(algo_fields), (int)attr, buf, bytes, written);
}

/* The library lets many things be changed here; which of them runs is judged by the check that follows. */
cublasStatus_t cublasLtMatmulAlgoConfigSetAttribute(cublasLtMatmulAlgo_t *algo,
                                                    cublasLtMatmulAlgoConfigAttributes_t attr, const void *buf,
                                                    size_t bytes) {
  if (attr == CUBLASLT_ALGO_CONFIG_ID) return CUBLAS_STATUS_INVALID_VALUE; /* read only */
  return set(algo, LT_ALGO, algo_fields, LT_COUNT(algo_fields), (int)attr, buf, bytes);
}
