/* sdpa_graph.c: see sdpa_graph.h. The operations and their order follow what NVIDIA's own frontend emits for cuDNN 9:
 * the library recognises attention by the pattern, so the pattern is the contract.
 *
 * Forward (Dao et al., FlashAttention-2): S = scale Q K^T, masks, stats = max + log sum exp, P = softmax(S), O = P V.
 * Backward: P = exp(S - stats), D = rowsum(dO * O), dV = P^T dO, dS = scale P * (dO V^T - D), dK = dS^T Q, dQ = dS K.
 * The deterministic backward writes dS [b, heads, s, s] to its workspace and multiplies it by K afterwards; the atomic
 * one adds partial dQ into fp32 memory as blocks finish. */
#include "backend/cuda/sdpa_graph.h"

#include <stdio.h>
#include <string.h>

typedef struct tensor {
  cudnnBackendDescriptor_t d;
  int64_t dim[4], stride[4];
} tensor;

typedef struct build {
  const esp_cudnn *dnn;
  const esp_sdpa_shape *s;
  esp_sdpa_graph *g;
  cudnnBackendDescriptor_t ops[48];
  int64_t next_uid; /* of virtual tensors */
  cudnnStatus_t status;
  const char *what; /* failed first */
  int64_t strides[ESP_SDPA_MAX_STRIDES];
  int n_strides;
  cudnnBackendDescriptor_t ragged[ESP_SDPA_MAX_STRIDES];
  tensor lens_q, lens_kv;
} build;

enum { F32 = CUDNN_DATA_FLOAT, BF16 = CUDNN_DATA_BFLOAT16, I32 = CUDNN_DATA_INT32, BOOLEAN = CUDNN_DATA_BOOLEAN };

/* ---- descriptors ---- */

static void check(build *b, cudnnStatus_t status, const char *what) {
  if (status == CUDNN_STATUS_SUCCESS || b->status != CUDNN_STATUS_SUCCESS) return;
  b->status = status;
  b->what = what;
}

static cudnnBackendDescriptor_t make(build *b, cudnnBackendDescriptorType_t type) {
  cudnnBackendDescriptor_t d = NULL;
  if (b->status != CUDNN_STATUS_SUCCESS) return NULL;
  if (b->g->n_all == ESP_SDPA_MAX_DESCRIPTORS) {
    check(b, CUDNN_STATUS_INTERNAL_ERROR, "descriptors of a graph");
    return NULL;
  }
  check(b, b->dnn->make(type, &d), "create a descriptor");
  if (d) b->g->all[b->g->n_all++] = d;
  return d;
}

static void set(build *b, cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name,
                cudnnBackendAttributeType_t type, int64_t n, const void *values) {
  if (b->status == CUDNN_STATUS_SUCCESS) check(b, b->dnn->set(d, name, type, n, values), "set an attribute");
}

static void set_desc(build *b, cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name,
                     const cudnnBackendDescriptor_t *value) {
  set(b, d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, value);
}

static void finalize(build *b, cudnnBackendDescriptor_t d, const char *what) {
  if (b->status == CUDNN_STATUS_SUCCESS) check(b, b->dnn->finalize(d), what);
}

static void push(build *b, cudnnBackendDescriptor_t op, const char *what) {
  finalize(b, op, what);
  if (b->status != CUDNN_STATUS_SUCCESS) return;
  if (b->g->n_ops == (int)(sizeof b->ops / sizeof *b->ops)) {
    check(b, CUDNN_STATUS_INTERNAL_ERROR, "operations of a graph");
    return;
  }
  b->ops[b->g->n_ops++] = op;
}

/* uid 0: virtual, it exists only inside the graph. Pointers are multiples of 16 bytes, but where the heads are taken in
 * parts, the statistics of a part may begin at any number. */
static tensor tensor_of(build *b, int64_t uid, int type, const int64_t dim[4], const int64_t stride[4], bool by_value,
                        cudnnBackendDescriptor_t ragged) {
  tensor t = {make(b, CUDNN_BACKEND_TENSOR_DESCRIPTOR), {0}, {0}};
  memcpy(t.dim, dim, sizeof t.dim);
  memcpy(t.stride, stride, sizeof t.stride);
  cudnnDataType_t data_type = (cudnnDataType_t)type;
  int64_t id = uid ? uid : b->next_uid++, alignment = 16;
  bool per_head = uid == ESP_SDPA_STATS || uid == ESP_SDPA_SUM;
  if (per_head && b->s->heads != b->s->ld_stats && b->s->heads % 4 != 0) alignment = 4;
  bool yes = true;
  set(b, t.d, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &data_type);
  set(b, t.d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, dim);
  set(b, t.d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, stride);
  set(b, t.d, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &id);
  set(b, t.d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment);
  if (!uid) set(b, t.d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &yes);
  if (by_value) set(b, t.d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &yes);
  if (ragged) set_desc(b, t.d, CUDNN_ATTR_TENSOR_RAGGED_OFFSET_DESC, &ragged);
  finalize(b, t.d, "tensor");
  return t;
}

static tensor like(build *b, tensor x, int type) {
  return tensor_of(b, 0, type, x.dim, x.stride, false, NULL);
}
static tensor scalar(build *b, int64_t uid) {
  return tensor_of(b, uid, F32, (int64_t[]){1, 1, 1, 1}, (int64_t[]){1, 1, 1, 1}, true, NULL);
}
static tensor column(build *b, int64_t uid, int type, int64_t n) {
  return tensor_of(b, uid, type, (int64_t[]){n, 1, 1, 1}, (int64_t[]){1, 1, 1, 1}, false, NULL);
}

/* ---- operations ---- */

/* c = a b; the true extents of each sequence override the bounds. Lines beyond them count as zeros where `padded`. */
static void matmul(build *b, tensor x, tensor y, tensor z, const tensor *m, const tensor *n, const tensor *k,
                   bool padded) {
  cudnnDataType_t compute = CUDNN_DATA_FLOAT;
  double zero = 0;
  cudnnBackendDescriptor_t how = make(b, CUDNN_BACKEND_MATMUL_DESCRIPTOR);
  set(b, how, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute);
  if (padded) set(b, how, CUDNN_ATTR_MATMUL_PADDING_VALUE, CUDNN_TYPE_DOUBLE, 1, &zero);
  finalize(b, how, "matmul");
  cudnnBackendDescriptor_t op = make(b, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
  set_desc(b, op, CUDNN_ATTR_OPERATION_MATMUL_ADESC, &x.d);
  set_desc(b, op, CUDNN_ATTR_OPERATION_MATMUL_BDESC, &y.d);
  set_desc(b, op, CUDNN_ATTR_OPERATION_MATMUL_CDESC, &z.d);
  set_desc(b, op, CUDNN_ATTR_OPERATION_MATMUL_DESC, &how);
  if (m) set_desc(b, op, CUDNN_ATTR_OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC, &m->d);
  if (n) set_desc(b, op, CUDNN_ATTR_OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC, &n->d);
  if (k) set_desc(b, op, CUDNN_ATTR_OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC, &k->d);
  push(b, op, "matmul operation");
}

/* y = mode(x[, second][, third]); `axis` of GEN_INDEX alone */
static void pointwise(build *b, cudnnPointwiseMode_t mode, int precision, tensor x, const tensor *second,
                      const tensor *third, tensor y, int64_t axis) {
  cudnnDataType_t math = (cudnnDataType_t)precision;
  cudnnBackendDescriptor_t how = make(b, CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
  set(b, how, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
  set(b, how, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &math);
  if (mode == CUDNN_POINTWISE_GEN_INDEX) set(b, how, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, &axis);
  finalize(b, how, "pointwise");
  cudnnBackendDescriptor_t op = make(b, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
  set_desc(b, op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, &how);
  set_desc(b, op, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, &x.d);
  if (second) set_desc(b, op, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, &second->d);
  if (third) set_desc(b, op, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, &third->d);
  set_desc(b, op, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, &y.d);
  push(b, op, "pointwise operation");
}

static void unary(build *b, cudnnPointwiseMode_t mode, tensor x, tensor y) {
  pointwise(b, mode, F32, x, NULL, NULL, y, 0);
}
static void binary(build *b, cudnnPointwiseMode_t mode, int precision, tensor x, tensor second, tensor y) {
  pointwise(b, mode, precision, x, &second, NULL, y, 0);
}

static void reduce(build *b, cudnnReduceTensorOp_t mode, tensor x, tensor y) {
  cudnnDataType_t compute = CUDNN_DATA_FLOAT;
  cudnnBackendDescriptor_t how = make(b, CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
  set(b, how, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &mode);
  set(b, how, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute);
  finalize(b, how, "reduction");
  cudnnBackendDescriptor_t op = make(b, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
  set_desc(b, op, CUDNN_ATTR_OPERATION_REDUCTION_DESC, &how);
  set_desc(b, op, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, &x.d);
  set_desc(b, op, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, &y.d);
  push(b, op, "reduction operation");
}

static void reshape(build *b, tensor x, tensor y) {
  cudnnBackendDescriptor_t op = make(b, CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR);
  set_desc(b, op, CUDNN_ATTR_OPERATION_RESHAPE_XDESC, &x.d);
  set_desc(b, op, CUDNN_ATTR_OPERATION_RESHAPE_YDESC, &y.d);
  push(b, op, "reshape operation");
}

/* ---- tensors of attention ---- */

static cudnnBackendDescriptor_t ragged_of(build *b, int64_t ld) {
  for (int i = 0; i < b->n_strides; i++)
    if (b->strides[i] == ld) return b->ragged[i];
  check(b, CUDNN_STATUS_INTERNAL_ERROR, "ragged offset");
  return NULL;
}

/* [tokens, heads*d] at row stride ld as (b, h, s, d) */
static tensor rows(build *b, int64_t uid, int type, int64_t heads, int64_t ld) {
  const esp_sdpa_shape *s = b->s;
  return tensor_of(b, uid, type, (int64_t[]){s->b, heads, s->s, s->head_dim},
                   (int64_t[]){s->s * ld, s->head_dim, ld, 1}, false, ragged_of(b, ld));
}
/* the same memory as (b, h, d, s) */
static tensor rows_transposed(build *b, int64_t uid, int64_t heads, int64_t ld) {
  const esp_sdpa_shape *s = b->s;
  return tensor_of(b, uid, BF16, (int64_t[]){s->b, heads, s->head_dim, s->s},
                   (int64_t[]){s->s * ld, s->head_dim, 1, ld}, false, ragged_of(b, ld));
}
/* one number per query: [tokens, ld_stats] as (b, h, s, 1) */
static tensor statistics(build *b, int64_t uid) {
  const esp_sdpa_shape *s = b->s;
  int64_t ld = s->ld_stats;
  return tensor_of(b, uid, F32, (int64_t[]){s->b, s->heads, s->s, 1}, (int64_t[]){s->s * ld, 1, ld, 1}, false,
                   ragged_of(b, ld));
}
/* inside the graph: one number per query, and one per (query, key), optionally transposed */
static tensor per_query(build *b) {
  const esp_sdpa_shape *s = b->s;
  return tensor_of(b, 0, F32, (int64_t[]){s->b, s->heads, s->s, 1}, (int64_t[]){s->heads * s->s, s->s, 1, 1}, false,
                   NULL);
}
static tensor scores(build *b, int type, bool transposed) {
  const esp_sdpa_shape *s = b->s;
  int64_t square = s->s * s->s;
  return tensor_of(b, 0, type, (int64_t[]){s->b, s->heads, s->s, s->s},
                   (int64_t[]){s->heads * square, square, transposed ? 1 : s->s, transposed ? s->s : 1}, false, NULL);
}

static void common_tensors(build *b) {
  b->n_strides = esp_sdpa_strides(b->s, b->strides);
  for (int i = 0; i < b->n_strides; i++) b->ragged[i] = column(b, ESP_SDPA_RAGGED + i, CUDNN_DATA_INT64, b->s->b + 1).d;
  b->lens_q = column(b, ESP_SDPA_LENS, I32, b->s->b);
  b->lens_kv = column(b, ESP_SDPA_LENS_KV, I32, b->s->b);
}

/* ---- masks: x where `keep`, else -inf ---- */

static tensor select_kept(build *b, tensor x, tensor keep, int64_t ninf_uid) {
  tensor ninf = scalar(b, ninf_uid), y = like(b, x, F32);
  pointwise(b, CUDNN_POINTWISE_BINARY_SELECT, F32, x, &ninf, &keep, y, 0);
  return y;
}
static tensor index_of(build *b, tensor x, int64_t axis, int precision) {
  tensor i = like(b, x, I32);
  pointwise(b, CUDNN_POINTWISE_GEN_INDEX, precision, x, NULL, NULL, i, axis);
  return i;
}

static tensor mask_padding(build *b, tensor x) {
  tensor row = index_of(b, x, 2, I32), col = index_of(b, x, 3, I32);
  tensor in_q = like(b, x, BOOLEAN), in_kv = like(b, x, BOOLEAN), keep = like(b, x, BOOLEAN);
  binary(b, CUDNN_POINTWISE_CMP_LT, BOOLEAN, row, b->lens_q, in_q);
  binary(b, CUDNN_POINTWISE_CMP_LT, BOOLEAN, col, b->lens_kv, in_kv);
  binary(b, CUDNN_POINTWISE_LOGICAL_AND, BOOLEAN, in_q, in_kv, keep);
  return select_kept(b, x, keep, ESP_SDPA_NINF_PADDING);
}
/* row >= col */
static tensor mask_causal(build *b, tensor x) {
  tensor row = index_of(b, x, 2, F32), col = index_of(b, x, 3, F32), keep = like(b, x, BOOLEAN);
  binary(b, CUDNN_POINTWISE_CMP_GE, BOOLEAN, row, col, keep);
  return select_kept(b, x, keep, ESP_SDPA_NINF_CAUSAL);
}
/* col + window > row, the left side in fp32 as cuDNN wants it */
static tensor mask_window(build *b, tensor x) {
  tensor row = index_of(b, x, 2, F32), col = index_of(b, x, 3, F32);
  tensor shifted = like(b, x, F32), keep = like(b, x, BOOLEAN), window = scalar(b, ESP_SDPA_WINDOW);
  binary(b, CUDNN_POINTWISE_ADD, F32, col, window, shifted);
  binary(b, CUDNN_POINTWISE_CMP_GT, BOOLEAN, shifted, row, keep);
  return select_kept(b, x, keep, ESP_SDPA_NINF_WINDOW);
}
static tensor mask_band(build *b, tensor x) {
  if (b->s->causal) x = mask_causal(b, x);
  if (b->s->window) x = mask_window(b, x);
  return x;
}

/* ---- the two graphs ---- */

static void forward(build *b) {
  const esp_sdpa_shape *s = b->s;
  tensor q = rows(b, ESP_SDPA_Q, BF16, s->heads, s->ld_q), kt = rows_transposed(b, ESP_SDPA_K, s->kv_heads, s->ld_k);
  tensor v = rows(b, ESP_SDPA_V, BF16, s->kv_heads, s->ld_v), o = rows(b, ESP_SDPA_O, BF16, s->heads, s->ld_o);
  tensor product = scores(b, F32, false), scaled = scores(b, F32, false);
  matmul(b, q, kt, product, &b->lens_q, &b->lens_kv, NULL, true);
  binary(b, CUDNN_POINTWISE_MUL, F32, product, scalar(b, ESP_SDPA_SCALE), scaled);
  tensor masked = mask_band(b, mask_padding(b, scaled));

  tensor max = per_query(b), sum = per_query(b);
  tensor below_max = scores(b, F32, false), e = scores(b, F32, false), p = scores(b, BF16, false);
  reduce(b, CUDNN_REDUCE_TENSOR_MAX, masked, max);
  binary(b, CUDNN_POINTWISE_SUB, F32, masked, max, below_max);
  unary(b, CUDNN_POINTWISE_EXP, below_max, e);
  reduce(b, CUDNN_REDUCE_TENSOR_ADD, e, sum);
  tensor log_sum = per_query(b), stats = statistics(b, ESP_SDPA_STATS);
  unary(b, CUDNN_POINTWISE_LOG, sum, log_sum);
  binary(b, CUDNN_POINTWISE_ADD, F32, max, log_sum, stats);
  binary(b, CUDNN_POINTWISE_DIV, F32, e, sum, p);
  matmul(b, p, v, o, &b->lens_q, NULL, &b->lens_kv, false);
}

/* out = left^T-like product over the queries: dV = P^T dO, dK = dS^T Q. Grouped heads first get a gradient each. */
static void kv_gradient(build *b, tensor probabilities, tensor right, int64_t uid, int64_t ld, int64_t full_uid) {
  const esp_sdpa_shape *s = b->s;
  tensor left = scores(b, BF16, true), out = rows(b, uid, BF16, s->kv_heads, ld);
  reshape(b, probabilities, left);
  if (s->heads == s->kv_heads) {
    matmul(b, left, right, out, &b->lens_kv, NULL, &b->lens_q, false);
    return;
  }
  int64_t group = s->heads / s->kv_heads;
  tensor full = tensor_of(b, full_uid, BF16, (int64_t[]){s->b, s->heads, s->s, s->head_dim},
                          (int64_t[]){s->s * ld * group, s->head_dim, ld * group, 1}, false, ragged_of(b, ld));
  matmul(b, left, right, full, &b->lens_kv, NULL, &b->lens_q, false);
  reduce(b, CUDNN_REDUCE_TENSOR_ADD, full, out);
}

static void backward(build *b) {
  const esp_sdpa_shape *s = b->s;
  tensor q = rows(b, ESP_SDPA_Q, BF16, s->heads, s->ld_q), kt = rows_transposed(b, ESP_SDPA_K, s->kv_heads, s->ld_k);
  tensor vt = rows_transposed(b, ESP_SDPA_V, s->kv_heads, s->ld_v), o = rows(b, ESP_SDPA_O, BF16, s->heads, s->ld_o);
  tensor d_o = rows(b, ESP_SDPA_DO, BF16, s->heads, s->ld_do), d_q = rows(b, ESP_SDPA_DQ, BF16, s->heads, s->ld_dq);
  tensor stats = statistics(b, ESP_SDPA_STATS), scale = scalar(b, ESP_SDPA_SCALE);

  /* D = rowsum(dO * O) * 1 */
  int64_t square = s->s * s->head_dim;
  tensor product = tensor_of(b, 0, F32, (int64_t[]){s->b, s->heads, s->s, s->head_dim},
                             (int64_t[]){s->heads * square, square, s->head_dim, 1}, false, NULL);
  tensor row_sum = per_query(b), sum = statistics(b, ESP_SDPA_SUM);
  binary(b, CUDNN_POINTWISE_MUL, F32, d_o, o, product);
  reduce(b, CUDNN_REDUCE_TENSOR_ADD, product, row_sum);
  binary(b, CUDNN_POINTWISE_MUL, F32, row_sum, scalar(b, ESP_SDPA_ONE), sum);

  /* P = exp(masked(scale Q K^T) - stats) */
  tensor raw = scores(b, F32, false), scaled = scores(b, F32, false), shifted = scores(b, F32, false);
  tensor p = scores(b, F32, false);
  matmul(b, q, kt, raw, &b->lens_q, &b->lens_kv, NULL, false);
  binary(b, CUDNN_POINTWISE_MUL, F32, raw, scale, scaled);
  binary(b, CUDNN_POINTWISE_SUB, F32, mask_padding(b, scaled), stats, shifted);
  unary(b, CUDNN_POINTWISE_EXP, mask_band(b, shifted), p);
  kv_gradient(b, p, d_o, ESP_SDPA_DV, s->ld_dv, ESP_SDPA_DV_FULL);

  /* dS = P * (dO V^T - D) * scale */
  tensor dp = scores(b, F32, false), centred = scores(b, F32, false), weighted = scores(b, F32, false);
  tensor ds = scores(b, F32, false);
  matmul(b, d_o, vt, dp, &b->lens_q, &b->lens_kv, NULL, false);
  binary(b, CUDNN_POINTWISE_SUB, F32, dp, sum, centred);
  binary(b, CUDNN_POINTWISE_MUL, F32, centred, p, weighted);
  binary(b, CUDNN_POINTWISE_MUL, F32, weighted, scale, ds);
  kv_gradient(b, ds, q, ESP_SDPA_DK, s->ld_dk, ESP_SDPA_DK_FULL);

  /* dQ = dS K */
  tensor k = rows(b, 0, BF16, s->kv_heads, s->ld_k);
  reshape(b, kt, k);
  if (s->atomic) {
    tensor acc = rows(b, ESP_SDPA_DQ_SUM, F32, s->heads, s->ld_dq);
    matmul(b, ds, k, acc, &b->lens_q, NULL, &b->lens_kv, false);
    unary(b, CUDNN_POINTWISE_IDENTITY, acc, d_q);
  } else {
    matmul(b, ds, k, d_q, &b->lens_q, NULL, &b->lens_kv, false);
  }
}

/* ---- */

int esp_sdpa_strides(const esp_sdpa_shape *s, int64_t out[ESP_SDPA_MAX_STRIDES]) {
  const int64_t all[ESP_SDPA_MAX_STRIDES] = {s->ld_q,  s->ld_k,  s->ld_v,  s->ld_o, s->ld_stats,
                                             s->ld_do, s->ld_dq, s->ld_dk, s->ld_dv};
  int n = 0;
  for (int i = 0; i < ESP_SDPA_MAX_STRIDES; i++) {
    bool seen = all[i] == 0;
    for (int j = 0; j < n; j++) seen = seen || out[j] == all[i];
    if (!seen) out[n++] = all[i];
  }
  return n;
}

void esp_sdpa_graph_free(const esp_cudnn *dnn, esp_sdpa_graph *g) {
  for (int i = g->n_all - 1; i >= 0; i--) dnn->unmake(g->all[i]);
  *g = (esp_sdpa_graph){0};
}

esp_status esp_sdpa_build(const esp_cudnn *dnn, const esp_sdpa_shape *s, cudnnHandle_t handle, esp_sdpa_graph *out) {
  *out = (esp_sdpa_graph){0};
  build b = {.dnn = dnn, .s = s, .g = out, .next_uid = 1, .status = CUDNN_STATUS_SUCCESS};
  common_tensors(&b);
  if (s->backward)
    backward(&b);
  else
    forward(&b);
  out->opgraph = make(&b, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
  set(&b, out->opgraph, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, out->n_ops, b.ops);
  if (handle) set(&b, out->opgraph, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
  finalize(&b, out->opgraph, "graph");
  if (b.status == CUDNN_STATUS_SUCCESS) return ESP_OK;
  char text[160] = "", why[sizeof out->why];
  dnn->last_error(text, sizeof text);
  snprintf(why, sizeof why, "graph: %s: %.40s: %s", b.what, dnn->status_text(b.status), text);
  esp_sdpa_graph_free(dnn, out);
  memcpy(out->why, why, sizeof why);
  return ESP_ERR_DEVICE;
}

/* ---- the kinds of graphs there are ---- */

typedef struct layer {
  int64_t heads, kv_heads, head_dim;
} layer;

/* q, k and v as columns of one projection, or (where a norm follows the projection) q and k on their own. */
static esp_sdpa_shape shape_of(layer l, int64_t b, int64_t s, bool fused) {
  int64_t q = l.heads * l.head_dim, kv = l.kv_heads * l.head_dim;
  esp_sdpa_shape x = {.b = b, .s = s, .heads = l.heads, .kv_heads = l.kv_heads, .head_dim = l.head_dim, .causal = 1};
  x.ld_q = fused ? q + 2 * kv : q;
  x.ld_k = fused ? q + 2 * kv : kv;
  x.ld_v = q + 2 * kv;
  x.ld_o = q;
  x.ld_stats = l.heads;
  return x;
}
/* `kv_heads` of the layer's at a time; grouped gradients of keys and values go through memory of their own. */
static esp_sdpa_shape backward_of(esp_sdpa_shape x, int64_t kv_heads) {
  int64_t group = x.heads / x.kv_heads;
  x.backward = 1;
  x.ld_do = x.ld_o;
  x.ld_dq = x.ld_q;
  x.ld_dk = group > 1 ? x.kv_heads * x.head_dim : x.ld_k;
  x.ld_dv = group > 1 ? x.kv_heads * x.head_dim : x.ld_v;
  x.heads = kv_heads * group;
  x.kv_heads = kv_heads;
  return x;
}

typedef struct list {
  esp_sdpa_shape *out;
  int max, n;
} list;
static void add(list *l, esp_sdpa_shape s) {
  if (l->n < l->max) l->out[l->n] = s;
  l->n++;
}

int esp_sdpa_enumerate(esp_sdpa_shape *out, int max) {
  static const layer layers[] = {{32, 8, 128}, {9, 3, 64},   {8, 4, 256},  {8, 1, 256}, {16, 8, 128},
                                 {32, 8, 64},  {12, 12, 64}, {32, 32, 80}, {32, 32, 96}};
  enum { LAYERS = sizeof layers / sizeof *layers, ALL_MASKS = 3 };
  static const struct { int64_t causal, window; } masks[] = {{1, 0}, {1, 512}, {0, 0}, {0, 512}};
  list l = {out, max, 0};
  for (int i = 0; i < LAYERS; i++)
    for (int m = 0; m < (i < ALL_MASKS ? 4 : 1); m++)
      for (int fused = m == 0 && i < ALL_MASKS ? 0 : 1; fused < 2; fused++) {
        esp_sdpa_shape s = shape_of(layers[i], 4, 1024, fused);
        s.causal = masks[m].causal;
        s.window = masks[m].window;
        add(&l, s);
        add(&l, backward_of(s, layers[i].kv_heads));
      }
  /* some heads at a time, bounds of counts and lengths, sums by atomics */
  add(&l, backward_of(shape_of(layers[0], 4, 1024, true), 2));
  add(&l, backward_of(shape_of(layers[1], 4, 1024, true), 1));
  add(&l, backward_of(shape_of(layers[6], 4, 1024, true), 3));
  static const int64_t buckets[][2] = {{1, 128}, {1, 8192}, {2, 4096}, {7, 2048}, {33, 256}, {128, 128}};
  for (size_t i = 0; i < sizeof buckets / sizeof *buckets; i++) {
    esp_sdpa_shape s = shape_of(layers[0], buckets[i][0], buckets[i][1], true);
    add(&l, s);
    add(&l, backward_of(s, 1));
  }
  esp_sdpa_shape atomic = backward_of(shape_of(layers[0], 4, 1024, true), layers[0].kv_heads);
  atomic.atomic = 1;
  add(&l, atomic);
  return l.n;
}
