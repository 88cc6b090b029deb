/* cudnn_check.c: soundness of one descriptor when it is finalised. The rules on shapes are those that cuDNN 9.19 was
 * seen to apply; where it stays silent and goes wrong later (an operation over unknown modes, dimensions that do not
 * broadcast) this one speaks at once. */
#include <string.h>

#include "cudnn_impl.h"

#define NEED(d, name)                                                                                                  \
  if (!dnn_get(d, name)) return dnn_fail(CUDNN_STATUS_BAD_PARAM, "%s is not set", #name)
#define BAD(...) return dnn_fail(CUDNN_STATUS_BAD_PARAM, __VA_ARGS__)

static int type_size(int64_t dtype) {
  switch (dtype) {
  case CUDNN_DATA_FLOAT:
  case CUDNN_DATA_INT32:
    return 4;
  case CUDNN_DATA_HALF:
  case CUDNN_DATA_BFLOAT16:
    return 2;
  case CUDNN_DATA_DOUBLE:
  case CUDNN_DATA_INT64:
    return 8;
  case CUDNN_DATA_BOOLEAN:
    return 1;
  default:
    return 0;
  }
}

static cudnnStatus_t check_ragged(const dnn_desc *d, const int64_t *dims) {
  const dnn_desc *r = dnn_ref(d, CUDNN_ATTR_TENSOR_RAGGED_OFFSET_DESC);
  if (!r) return CUDNN_STATUS_SUCCESS;
  if (r->type != CUDNN_BACKEND_TENSOR_DESCRIPTOR)
    return dnn_fail(CUDNN_STATUS_BAD_PARAM_DESCRIPTOR_TYPE, "ragged offset is not a tensor");
  const dnn_attr *shape = dnn_get(r, CUDNN_ATTR_TENSOR_DIMENSIONS);
  const int64_t *rd = shape->data;
  for (int64_t i = 0; i < shape->count; i++)
    if (rd[i] != (i ? 1 : dims[0] + 1)) BAD("ragged offset must be (b + 1, 1, 1, 1)");
  int64_t dtype = dnn_int(r, CUDNN_ATTR_TENSOR_DATA_TYPE, -1);
  if (dtype != CUDNN_DATA_INT32 && dtype != CUDNN_DATA_INT64) BAD("ragged offset must be INT32 or INT64");
  if (dnn_int(r, CUDNN_ATTR_TENSOR_IS_VIRTUAL, 0)) BAD("ragged offset cannot be virtual");
  return CUDNN_STATUS_SUCCESS;
}

static cudnnStatus_t check_tensor(const dnn_desc *d) {
  const dnn_attr *dims = dnn_get(d, CUDNN_ATTR_TENSOR_DIMENSIONS), *strides = dnn_get(d, CUDNN_ATTR_TENSOR_STRIDES);
  if (!dims) BAD("_nbDims < 1");
  if (!strides || dims->count != strides->count) BAD("_nbDims != _nbStrides");
  NEED(d, CUDNN_ATTR_TENSOR_DATA_TYPE);
  NEED(d, CUDNN_ATTR_TENSOR_UNIQUE_ID);
  int64_t dtype = dnn_int(d, CUDNN_ATTR_TENSOR_DATA_TYPE, -1);
  int size = type_size(dtype);
  if (!size) return dnn_fail(CUDNN_STATUS_NOT_SUPPORTED_DATA_TYPE, "data type %d", (int)dtype);
  int64_t alignment = dnn_int(d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, 0);
  if (alignment <= 0 || alignment % size)
    BAD("(_ptrAlignment <= 0) || _ptrAlignment %% sizeofCudnnType(_dataType) != 0");
  for (int64_t i = 0; i < dims->count; i++) {
    if (((const int64_t *)dims->data)[i] < 1) BAD("dimension %d is not positive", (int)i);
    if (((const int64_t *)strides->data)[i] < 0) BAD("_strA[d] < 0");
  }
  if (dnn_int(d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, 0) && dnn_int(d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, 0))
    BAD("a virtual tensor has no value");
  if (dnn_int(d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, 0))
    for (int64_t i = 0; i < dims->count; i++)
      if (((const int64_t *)dims->data)[i] != 1) BAD("a tensor by value has one element");
  return check_ragged(d, dims->data);
}

/* ---- operations: they see 4-D tensors ---- */
static cudnnStatus_t shape_of(const dnn_desc *op, int name, const char *what, bool needed, const int64_t **dims) {
  const dnn_desc *t = dnn_ref(op, name);
  *dims = NULL;
  if (!t) return needed ? dnn_fail(CUDNN_STATUS_BAD_PARAM, "%s is not set", what) : CUDNN_STATUS_SUCCESS;
  if (t->type != CUDNN_BACKEND_TENSOR_DESCRIPTOR)
    return dnn_fail(CUDNN_STATUS_BAD_PARAM_DESCRIPTOR_TYPE, "%s is not a tensor", what);
  const dnn_attr *a = dnn_get(t, CUDNN_ATTR_TENSOR_DIMENSIONS);
  if (a->count != 4) return dnn_fail(CUDNN_STATUS_NOT_SUPPORTED, "%s has %d dimensions", what, (int)a->count);
  *dims = a->data;
  return CUDNN_STATUS_SUCCESS;
}

#define SHAPE(dims, op, name, needed)                                                                                  \
  const int64_t *dims;                                                                                                 \
  do {                                                                                                                 \
    cudnnStatus_t s_ = shape_of(op, name, #name, needed, &dims);                                                       \
    if (s_ != CUDNN_STATUS_SUCCESS) return s_;                                                                         \
  } while (0)

static cudnnStatus_t descriptor_is(const dnn_desc *op, int name, cudnnBackendDescriptorType_t type) {
  const dnn_desc *x = dnn_ref(op, name);
  if (!x) BAD("operation without its mode, attribute %d", name);
  if (x->type != type) return dnn_fail(CUDNN_STATUS_BAD_PARAM_DESCRIPTOR_TYPE, "attribute %d", name);
  return CUDNN_STATUS_SUCCESS;
}

static cudnnStatus_t check_matmul(const dnn_desc *op) {
  static const int overrides[3] = {CUDNN_ATTR_OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC,
                                   CUDNN_ATTR_OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC,
                                   CUDNN_ATTR_OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC};
  SHAPE(a, op, CUDNN_ATTR_OPERATION_MATMUL_ADESC, true);
  SHAPE(b, op, CUDNN_ATTR_OPERATION_MATMUL_BDESC, true);
  SHAPE(c, op, CUDNN_ATTR_OPERATION_MATMUL_CDESC, true);
  if (a[3] != b[2] || a[2] != c[2] || b[3] != c[3]) BAD("aDesc, bDesc and cDesc are not those of a product");
  if (a[0] != c[0] || b[0] != c[0]) BAD("batches of a product differ");
  if (a[1] % b[1] && b[1] % a[1]) BAD("aDesc.getDimA()[bIdx] %% bDesc.getDimA()[bIdx] != 0");
  if (c[1] != (a[1] > b[1] ? a[1] : b[1])) BAD("heads of a product");
  for (int i = 0; i < 3; i++) {
    SHAPE(lengths, op, overrides[i], false);
    if (!lengths) continue;
    if (lengths[0] != c[0] || lengths[1] != 1 || lengths[2] != 1 || lengths[3] != 1)
      BAD("override of M, N or K must be (b, 1, 1, 1)");
    if (dnn_int(dnn_ref(op, overrides[i]), CUDNN_ATTR_TENSOR_DATA_TYPE, -1) != CUDNN_DATA_INT32)
      BAD("override of M, N or K must be INT32");
  }
  return descriptor_is(op, CUDNN_ATTR_OPERATION_MATMUL_DESC, CUDNN_BACKEND_MATMUL_DESCRIPTOR);
}

/* Operands of a mode: x, x and b, or x, b and the boolean t. 0: unknown. */
static int operands(int64_t mode) {
  switch (mode) {
  case CUDNN_POINTWISE_ADD:
  case CUDNN_POINTWISE_SUB:
  case CUDNN_POINTWISE_MUL:
  case CUDNN_POINTWISE_DIV:
  case CUDNN_POINTWISE_MAX:
  case CUDNN_POINTWISE_MIN:
  case CUDNN_POINTWISE_POW:
  case CUDNN_POINTWISE_CMP_EQ:
  case CUDNN_POINTWISE_CMP_NEQ:
  case CUDNN_POINTWISE_CMP_GT:
  case CUDNN_POINTWISE_CMP_GE:
  case CUDNN_POINTWISE_CMP_LT:
  case CUDNN_POINTWISE_CMP_LE:
  case CUDNN_POINTWISE_LOGICAL_AND:
  case CUDNN_POINTWISE_LOGICAL_OR:
    return 2;
  case CUDNN_POINTWISE_BINARY_SELECT:
    return 3;
  case CUDNN_POINTWISE_EXP:
  case CUDNN_POINTWISE_LOG:
  case CUDNN_POINTWISE_NEG:
  case CUDNN_POINTWISE_ABS:
  case CUDNN_POINTWISE_SQRT:
  case CUDNN_POINTWISE_RSQRT:
  case CUDNN_POINTWISE_RECIPROCAL:
  case CUDNN_POINTWISE_TANH_FWD:
  case CUDNN_POINTWISE_LOGICAL_NOT:
  case CUDNN_POINTWISE_IDENTITY:
  case CUDNN_POINTWISE_GEN_INDEX:
    return 1;
  default:
    return 0;
  }
}

static cudnnStatus_t broadcasts(const char *what, const int64_t *x, const int64_t *y) {
  for (int i = 0; i < 4; i++)
    if (x[i] != y[i] && x[i] != 1)
      BAD("%s does not broadcast: dimension %d is %lld, not %lld", what, i, (long long)x[i], (long long)y[i]);
  return CUDNN_STATUS_SUCCESS;
}

static cudnnStatus_t check_pointwise(const dnn_desc *op) {
  cudnnStatus_t s = descriptor_is(op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
  if (s != CUDNN_STATUS_SUCCESS) return s;
  int64_t mode = dnn_int(dnn_ref(op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR), CUDNN_ATTR_POINTWISE_MODE, -1);
  int n = operands(mode);
  SHAPE(x, op, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, true);
  SHAPE(y, op, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, true);
  SHAPE(b, op, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, n > 1);
  SHAPE(t, op, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, n > 2);
  if ((s = broadcasts("x", x, y)) != CUDNN_STATUS_SUCCESS) return s;
  if (n > 1 && (s = broadcasts("b", b, y)) != CUDNN_STATUS_SUCCESS) return s;
  if (n > 2 && (s = broadcasts("t", t, y)) != CUDNN_STATUS_SUCCESS) return s;
  if ((n < 2 && b) || (n < 3 && t)) BAD("more operands than mode %d takes", (int)mode);
  if (n > 2 &&
      dnn_int(dnn_ref(op, CUDNN_ATTR_OPERATION_POINTWISE_TDESC), CUDNN_ATTR_TENSOR_DATA_TYPE, -1) != CUDNN_DATA_BOOLEAN)
    BAD("the choice of BINARY_SELECT is not BOOLEAN");
  bool truth = (mode >= CUDNN_POINTWISE_CMP_EQ && mode <= CUDNN_POINTWISE_CMP_LE) ||
               (mode >= CUDNN_POINTWISE_LOGICAL_AND && mode <= CUDNN_POINTWISE_LOGICAL_NOT);
  int64_t out = dnn_int(dnn_ref(op, CUDNN_ATTR_OPERATION_POINTWISE_YDESC), CUDNN_ATTR_TENSOR_DATA_TYPE, -1);
  if (truth && out != CUDNN_DATA_BOOLEAN) BAD("result of mode %d is not BOOLEAN", (int)mode);
  if (mode == CUDNN_POINTWISE_GEN_INDEX && out != CUDNN_DATA_INT32) BAD("result of GEN_INDEX is not INT32");
  return CUDNN_STATUS_SUCCESS;
}

static cudnnStatus_t check_reduction(const dnn_desc *op) {
  SHAPE(x, op, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, true);
  SHAPE(y, op, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, true);
  for (int i = 0; i < 4; i++)
    if (y[i] != x[i] && y[i] != 1 && !(i == 1 && x[i] % y[i] == 0)) BAD("dimension %d of a reduction", i);
  if (x[0] != y[0]) return dnn_fail(CUDNN_STATUS_NOT_SUPPORTED, "reduction over the batch");
  return descriptor_is(op, CUDNN_ATTR_OPERATION_REDUCTION_DESC, CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
}

static cudnnStatus_t check_reshape(const dnn_desc *op) {
  int64_t nx = 1, ny = 1;
  SHAPE(x, op, CUDNN_ATTR_OPERATION_RESHAPE_XDESC, true);
  SHAPE(y, op, CUDNN_ATTR_OPERATION_RESHAPE_YDESC, true);
  for (int i = 0; i < 4; i++) {
    nx *= x[i];
    ny *= y[i];
  }
  if (nx != ny) BAD("reshape changes the number of elements");
  return CUDNN_STATUS_SUCCESS;
}

/* ---- modes, and the steps to a plan ---- */
static cudnnStatus_t check_mode(const dnn_desc *d) {
  if (d->type == CUDNN_BACKEND_MATMUL_DESCRIPTOR) {
    if (dnn_int(d, CUDNN_ATTR_MATMUL_COMP_TYPE, -1) != CUDNN_DATA_FLOAT) BAD("product not summed in FLOAT");
  } else if (d->type == CUDNN_BACKEND_REDUCTION_DESCRIPTOR) {
    int64_t how = dnn_int(d, CUDNN_ATTR_REDUCTION_OPERATOR, -1);
    if (how != CUDNN_REDUCE_TENSOR_ADD && how != CUDNN_REDUCE_TENSOR_MAX && how != CUDNN_REDUCE_TENSOR_MIN &&
        how != CUDNN_REDUCE_TENSOR_AMAX)
      BAD("reduction %d", (int)how);
    if (dnn_int(d, CUDNN_ATTR_REDUCTION_COMP_TYPE, -1) != CUDNN_DATA_FLOAT) BAD("reduction not in FLOAT");
  } else {
    NEED(d, CUDNN_ATTR_POINTWISE_MATH_PREC);
    int64_t mode = dnn_int(d, CUDNN_ATTR_POINTWISE_MODE, -1), axis = dnn_int(d, CUDNN_ATTR_POINTWISE_AXIS, -1);
    if (!operands(mode)) BAD("pointwise mode %d", (int)mode);
    if (mode == CUDNN_POINTWISE_GEN_INDEX && (axis < 0 || axis > 3)) BAD("GEN_INDEX without an axis");
  }
  return CUDNN_STATUS_SUCCESS;
}

static cudnnStatus_t check_pack(const dnn_desc *d) {
  const dnn_attr *ids = dnn_get(d, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS);
  const dnn_attr *pointers = dnn_get(d, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS);
  if (!ids || !pointers || ids->count != pointers->count) BAD("variant pack: identifiers and pointers");
  for (int64_t i = 0; i < ids->count; i++)
    for (int64_t j = 0; j < i; j++)
      if (((const int64_t *)ids->data)[i] == ((const int64_t *)ids->data)[j])
        return dnn_fail(CUDNN_STATUS_BAD_PARAM_DUPLICATED_ENTRIES, "variant pack: tensor %lld twice",
                        (long long)((const int64_t *)ids->data)[i]);
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t dnn_check(const dnn_desc *d) {
  switch ((int)d->type) {
  case CUDNN_BACKEND_TENSOR_DESCRIPTOR:
    return check_tensor(d);
  case CUDNN_BACKEND_MATMUL_DESCRIPTOR:
  case CUDNN_BACKEND_REDUCTION_DESCRIPTOR:
  case CUDNN_BACKEND_POINTWISE_DESCRIPTOR:
    return check_mode(d);
  case CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR:
    return check_matmul(d);
  case CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR:
    return check_pointwise(d);
  case CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR:
    return check_reduction(d);
  case CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR:
    return check_reshape(d);
  case CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR:
    NEED(d, CUDNN_ATTR_OPERATIONGRAPH_OPS);
    return CUDNN_STATUS_SUCCESS;
  case CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR:
    NEED(d, CUDNN_ATTR_ENGINEHEUR_MODE);
    NEED(d, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH);
    return descriptor_is(d, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
  case CUDNN_BACKEND_ENGINE_DESCRIPTOR:
    NEED(d, CUDNN_ATTR_ENGINE_GLOBAL_INDEX);
    return descriptor_is(d, CUDNN_ATTR_ENGINE_OPERATION_GRAPH, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
  case CUDNN_BACKEND_ENGINECFG_DESCRIPTOR:
    return descriptor_is(d, CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_BACKEND_ENGINE_DESCRIPTOR);
  case CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR:
    NEED(d, CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE);
    NEED(d, CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE);
    return CUDNN_STATUS_SUCCESS;
  case CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR:
    if (!dnn_ref(d, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG)) return CUDNN_STATUS_SUCCESS; /* a plan from its text */
    return descriptor_is(d, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
  case CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR:
    return check_pack(d);
  default:
    return CUDNN_STATUS_SUCCESS; /* a device: whatever it says */
  }
}
