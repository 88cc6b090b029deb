/* cudnn_graph.c: from a graph of operations to a program. Each identifier is one tensor; each virtual tensor is made
 * once and used; operations are put in order. What an engine of the library would refuse (types, head sizes, layouts)
 * is refused when the plan is made. The workspace is what cuDNN 9.19's plans for sm_90 report. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cudnn_impl.h"

#define PATTERN(...) return dnn_fail(CUDNN_STATUS_NOT_SUPPORTED_GRAPH_PATTERN, __VA_ARGS__)

/* ---- tensors ---- */
static cudnnStatus_t add_tensor(dnn_program *p, const dnn_desc *d, int64_t *index) {
  if (d->type != CUDNN_BACKEND_TENSOR_DESCRIPTOR)
    return dnn_fail(CUDNN_STATUS_BAD_PARAM_DESCRIPTOR_TYPE, "operand is not a tensor");
  const dnn_attr *dims = dnn_get(d, CUDNN_ATTR_TENSOR_DIMENSIONS);
  if (dims->count != 4) return dnn_fail(CUDNN_STATUS_NOT_SUPPORTED, "tensor with %d dimensions", (int)dims->count);
  dnn_tensor t = {.uid = dnn_int(d, CUDNN_ATTR_TENSOR_UNIQUE_ID, 0),
                  .dtype = dnn_int(d, CUDNN_ATTR_TENSOR_DATA_TYPE, 0),
                  .is_virtual = dnn_int(d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, 0),
                  .by_value = dnn_int(d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, 0),
                  .alignment = dnn_int(d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, 1),
                  .ragged = -1,
                  .ragged_factor = 1,
                  .length = {-1, -1}};
  memcpy(t.dim, dims->data, sizeof t.dim);
  memcpy(t.stride, dnn_get(d, CUDNN_ATTR_TENSOR_STRIDES)->data, sizeof t.stride);
  t.rows_line = t.dim[3] > 1 && (t.dim[2] == 1 || t.stride[3] > t.stride[2]) ? 3 : 2;
  const dnn_desc *ragged = dnn_ref(d, CUDNN_ATTR_TENSOR_RAGGED_OFFSET_DESC);
  if (ragged) {
    cudnnStatus_t s = add_tensor(p, ragged, &t.ragged);
    if (s != CUDNN_STATUS_SUCCESS) return s;
  }
  for (int64_t i = 0; i < p->n_tensors; i++)
    if (p->tensor[i].uid == t.uid) {
      if (memcmp(&p->tensor[i], &t, sizeof t))
        return dnn_fail(CUDNN_STATUS_BAD_PARAM_DUPLICATED_ENTRIES, "two tensors with identifier %" PRId64, t.uid);
      *index = i;
      return CUDNN_STATUS_SUCCESS;
    }
  if (p->n_tensors == DNN_MAX_TENSORS) PATTERN("more than %d tensors", DNN_MAX_TENSORS);
  *index = p->n_tensors++;
  p->tensor[*index] = t;
  return CUDNN_STATUS_SUCCESS;
}

static cudnnStatus_t operand(dnn_program *p, const dnn_desc *op, int name, int64_t *index) {
  const dnn_desc *d = dnn_ref(op, name);
  *index = -1;
  return d ? add_tensor(p, d, index) : CUDNN_STATUS_SUCCESS;
}

/* ---- operations ---- */
typedef struct slot {
  int name;
  int64_t *index;
} slot;

/* Same memory, other dimensions: each dimension of y must be one of x, by stride. */
static cudnnStatus_t match_reshape(const dnn_program *p, dnn_op *op) {
  const dnn_tensor *x = &p->tensor[op->in[0]], *y = &p->tensor[op->out];
  bool taken[4] = {false};
  for (int i = 0; i < 4; i++) {
    op->from[i] = -1;
    if (y->dim[i] == 1) continue;
    for (int j = 0; j < 4 && op->from[i] < 0; j++)
      if (!taken[j] && x->dim[j] == y->dim[i] && x->stride[j] == y->stride[i]) op->from[i] = j;
    if (op->from[i] < 0 || (op->from[i] == 0) != (i == 0)) PATTERN("reshape is not a transposition");
    taken[op->from[i]] = true;
  }
  return CUDNN_STATUS_SUCCESS;
}

static cudnnStatus_t add_op(dnn_program *p, const dnn_desc *d, dnn_op *op) {
  *op = (dnn_op){.in = {-1, -1, -1}, .out = -1, .length = {-1, -1, -1}};
  const slot matmul[] = {{CUDNN_ATTR_OPERATION_MATMUL_ADESC, &op->in[0]},
                         {CUDNN_ATTR_OPERATION_MATMUL_BDESC, &op->in[1]},
                         {CUDNN_ATTR_OPERATION_MATMUL_CDESC, &op->out},
                         {CUDNN_ATTR_OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC, &op->length[0]},
                         {CUDNN_ATTR_OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC, &op->length[1]},
                         {CUDNN_ATTR_OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC, &op->length[2]}};
  const slot pointwise[] = {{CUDNN_ATTR_OPERATION_POINTWISE_XDESC, &op->in[0]},
                            {CUDNN_ATTR_OPERATION_POINTWISE_BDESC, &op->in[1]},
                            {CUDNN_ATTR_OPERATION_POINTWISE_TDESC, &op->in[2]},
                            {CUDNN_ATTR_OPERATION_POINTWISE_YDESC, &op->out}};
  const slot reduction[] = {{CUDNN_ATTR_OPERATION_REDUCTION_XDESC, &op->in[0]},
                            {CUDNN_ATTR_OPERATION_REDUCTION_YDESC, &op->out}};
  const slot reshape[] = {{CUDNN_ATTR_OPERATION_RESHAPE_XDESC, &op->in[0]},
                          {CUDNN_ATTR_OPERATION_RESHAPE_YDESC, &op->out}};
  const slot *slots = matmul;
  size_t n = sizeof matmul / sizeof *matmul;
  const dnn_desc *how;
  switch ((int)d->type) {
  case CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR:
    op->kind = DNN_MATMUL;
    how = dnn_ref(d, CUDNN_ATTR_OPERATION_MATMUL_DESC);
    op->padded = dnn_get(how, CUDNN_ATTR_MATMUL_PADDING_VALUE) != NULL;
    if (op->padded) op->padding = *(const double *)dnn_get(how, CUDNN_ATTR_MATMUL_PADDING_VALUE)->data;
    break;
  case CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR:
    op->kind = DNN_POINTWISE;
    how = dnn_ref(d, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR);
    op->mode = dnn_int(how, CUDNN_ATTR_POINTWISE_MODE, 0);
    op->axis = dnn_int(how, CUDNN_ATTR_POINTWISE_AXIS, 0);
    slots = pointwise;
    n = sizeof pointwise / sizeof *pointwise;
    break;
  case CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR:
    op->kind = DNN_REDUCTION;
    op->mode = dnn_int(dnn_ref(d, CUDNN_ATTR_OPERATION_REDUCTION_DESC), CUDNN_ATTR_REDUCTION_OPERATOR, 0);
    slots = reduction;
    n = sizeof reduction / sizeof *reduction;
    break;
  case CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR:
    op->kind = DNN_RESHAPE;
    slots = reshape;
    n = sizeof reshape / sizeof *reshape;
    break;
  default:
    return dnn_fail(CUDNN_STATUS_BAD_PARAM_DESCRIPTOR_TYPE, "descriptor %d is no operation", (int)d->type);
  }
  for (size_t i = 0; i < n; i++) {
    cudnnStatus_t s = operand(p, d, slots[i].name, slots[i].index);
    if (s != CUDNN_STATUS_SUCCESS) return s;
  }
  return op->kind == DNN_RESHAPE ? match_reshape(p, op) : CUDNN_STATUS_SUCCESS;
}

/* ---- the whole ---- */
static int64_t maker(const dnn_program *p, int64_t tensor) {
  for (int64_t i = 0; i < p->n_ops; i++)
    if (p->op[i].out == tensor) return i;
  return -1;
}

static bool used(const dnn_program *p, int64_t tensor) {
  for (int64_t i = 0; i < p->n_ops; i++)
    for (int j = 0; j < 3; j++)
      if (p->op[i].in[j] == tensor || p->op[i].length[j] == tensor) return true;
  return false;
}

static cudnnStatus_t check_flow(const dnn_program *p) {
  for (int64_t i = 0; i < p->n_ops; i++) {
    const dnn_tensor *y = &p->tensor[p->op[i].out];
    if (maker(p, p->op[i].out) != i)
      return dnn_fail(CUDNN_STATUS_BAD_PARAM, "node->linkEdges: tensor %" PRId64 " is made twice", y->uid);
    if (y->by_value) return dnn_fail(CUDNN_STATUS_BAD_PARAM, "result %" PRId64 " is by value", y->uid);
  }
  for (int64_t i = 0; i < p->n_tensors; i++) {
    const dnn_tensor *t = &p->tensor[i];
    if (t->is_virtual && maker(p, i) < 0) PATTERN("virtual tensor %" PRId64 " is never made", t->uid);
    if (t->is_virtual && !used(p, i)) PATTERN("virtual tensor %" PRId64 " is never used", t->uid);
  }
  return CUDNN_STATUS_SUCCESS;
}

/* Each operation after those that make what it reads; otherwise as given. */
static cudnnStatus_t put_in_order(dnn_program *p) {
  dnn_op sorted[DNN_MAX_OPS];
  bool done[DNN_MAX_OPS] = {false};
  for (int64_t n = 0; n < p->n_ops;) {
    int64_t before = n;
    for (int64_t i = 0; i < p->n_ops; i++) {
      bool ready = !done[i];
      for (int j = 0; ready && j < 3; j++) {
        int64_t from = p->op[i].in[j] < 0 ? -1 : maker(p, p->op[i].in[j]);
        ready = from < 0 || done[from];
      }
      if (!ready) continue;
      done[i] = true;
      sorted[n++] = p->op[i];
    }
    if (n == before) return dnn_fail(CUDNN_STATUS_BAD_PARAM, "the operations form a circle");
  }
  memcpy(p->op, sorted, (size_t)p->n_ops * sizeof *sorted);
  return CUDNN_STATUS_SUCCESS;
}

static void give_length(dnn_program *p, int64_t tensor, int line, int64_t length) {
  dnn_tensor *t = &p->tensor[tensor];
  if (length >= 0 && t->length[line] < 0 && t->dim[2 + line] > 1) t->length[line] = length;
}

/* Which dimensions have a true length beside their bound: said by the products, passed on by the rest. */
static void spread_lengths(dnn_program *p) {
  for (int64_t i = 0; i < p->n_ops; i++) {
    const dnn_op *op = &p->op[i];
    if (op->kind != DNN_MATMUL) continue;
    const int64_t m = op->length[0], n = op->length[1], k = op->length[2];
    const int64_t said[3][2] = {{m, k}, {k, n}, {m, n}}, of[3] = {op->in[0], op->in[1], op->out};
    for (int j = 0; j < 3; j++)
      for (int line = 0; line < 2; line++) give_length(p, of[j], line, said[j][line]);
  }
  for (int64_t i = 0; i < p->n_ops; i++) {
    const dnn_op *op = &p->op[i];
    const dnn_tensor *y = &p->tensor[op->out];
    for (int j = 0; j < 3 && op->kind != DNN_MATMUL; j++) {
      if (op->in[j] < 0) continue;
      const dnn_tensor *x = &p->tensor[op->in[j]];
      for (int line = 0; line < 2; line++) {
        int64_t from = op->kind == DNN_RESHAPE ? op->from[2 + line] - 2 : line;
        if (from >= 0 && x->dim[2 + from] == y->dim[2 + line]) give_length(p, op->out, line, x->length[from]);
      }
    }
  }
}

static int64_t elements(const dnn_tensor *t) {
  return t->dim[0] * t->dim[1] * t->dim[2] * t->dim[3];
}

/* What is special about attention's backward: the sum of dQ over blocks is added atomically into fp32 memory, or dS
 * goes through the workspace; grouped keys get a gradient per query head, whose ragged offsets the kernel scales
 * itself. */
static void backward_habits(dnn_program *p) {
  int64_t products = 0, workspace = 256, square = 0;
  bool ragged = false, adds = false;
  for (int64_t i = 0; i < p->n_ops; i++) {
    const dnn_op *op = &p->op[i];
    dnn_tensor *y = &p->tensor[op->out];
    if (op->kind == DNN_MATMUL) {
      const dnn_tensor *a = &p->tensor[op->in[0]];
      products++;
      y->adds = !y->is_virtual && y->dtype == CUDNN_DATA_FLOAT && used(p, op->out);
      adds = adds || y->adds;
      if (a->is_virtual && elements(a) > square) square = elements(a);
    }
    if (op->kind == DNN_REDUCTION && p->tensor[op->in[0]].dim[1] != y->dim[1]) {
      dnn_tensor *x = &p->tensor[op->in[0]];
      if (x->is_virtual) workspace += 2 * elements(x);
      if (!x->is_virtual && x->ragged >= 0 && x->ragged == y->ragged) x->ragged_factor = x->dim[1] / y->dim[1];
    }
    ragged = ragged || y->ragged >= 0;
  }
  if (ragged) workspace += 16384 + 192 * p->tensor[p->op[0].out].dim[0];
  if (products == 5 && !adds) workspace += 2 * square;
  p->workspace = workspace;
}

cudnnStatus_t dnn_compile(const dnn_desc *graph, dnn_program **out) {
  const dnn_attr *ops = dnn_get(graph, CUDNN_ATTR_OPERATIONGRAPH_OPS);
  dnn_program *p = calloc(1, sizeof *p);
  cudnnStatus_t s = CUDNN_STATUS_SUCCESS;
  if (!p) return dnn_fail(CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED, "program");
  p->refs = 1;
  for (int64_t i = 0; i < ops->count && s == CUDNN_STATUS_SUCCESS; i++)
    s = add_op(p, ((dnn_desc *const *)ops->data)[i], &p->op[p->n_ops++]);
  if (s == CUDNN_STATUS_SUCCESS) s = check_flow(p);
  if (s == CUDNN_STATUS_SUCCESS) s = put_in_order(p);
  if (s != CUDNN_STATUS_SUCCESS) {
    free(p);
    return s;
  }
  spread_lengths(p);
  backward_habits(p);
  *out = p;
  return s;
}

/* ---- what the attention engines take ---- */
cudnnStatus_t dnn_supported(const dnn_program *p) {
  int64_t products = 0;
  for (int64_t i = 0; i < p->n_ops; i++) {
    if (p->op[i].kind != DNN_MATMUL) continue;
    products++;
    for (int j = 0; j < 2; j++) {
      const dnn_tensor *t = &p->tensor[p->op[i].in[j]];
      if (t->is_virtual) continue;
      if (t->dtype != CUDNN_DATA_BFLOAT16 && t->dtype != CUDNN_DATA_HALF)
        return dnn_fail(CUDNN_STATUS_NOT_SUPPORTED_DATA_TYPE, "operand %" PRId64 " is neither BFLOAT16 nor HALF",
                        t->uid);
      int inner = t->rows_line == 2 ? 3 : 2;
      if (t->stride[inner] != 1)
        return dnn_fail(CUDNN_STATUS_NOT_SUPPORTED_LAYOUT, "heads of tensor %" PRId64 " are not contiguous", t->uid);
      if (t->dim[inner] % 8 || t->dim[inner] > 256)
        return dnn_fail(CUDNN_STATUS_NOT_SUPPORTED_SHAPE, "head size %" PRId64, t->dim[inner]);
      if (t->stride[t->rows_line] % 8 || t->stride[1] % 8)
        return dnn_fail(CUDNN_STATUS_NOT_SUPPORTED_LAYOUT, "rows of tensor %" PRId64 " are not aligned", t->uid);
      if (t->alignment < 16) return dnn_fail(CUDNN_STATUS_NOT_SUPPORTED, "alignment of tensor %" PRId64, t->uid);
    }
  }
  if (products != 2 && products != 5) PATTERN("%d products are no attention", (int)products);
  return CUDNN_STATUS_SUCCESS;
}

/* ---- plans as text ---- */
enum { TEXT_HEAD = 3 }; /* n_tensors, n_ops, workspace */

static size_t program_words(const dnn_program *p) {
  return TEXT_HEAD + ((size_t)p->n_tensors * sizeof(dnn_tensor) + (size_t)p->n_ops * sizeof(dnn_op)) / sizeof(int64_t);
}

char *dnn_program_text(const dnn_program *p) {
  size_t n = program_words(p), room = 128 + 22 * n, len;
  char *text = malloc(room);
  int64_t *words = malloc(n * sizeof *words);
  if (text && words) {
    memcpy(words, &p->n_tensors, TEXT_HEAD * sizeof *words);
    memcpy(words + TEXT_HEAD, p->tensor, (size_t)p->n_tensors * sizeof *p->tensor);
    memcpy((char *)(words + TEXT_HEAD) + (size_t)p->n_tensors * sizeof *p->tensor, p->op,
           (size_t)p->n_ops * sizeof *p->op);
    len = (size_t)snprintf(text, room, "{\"simulated_plan\": %d, \"words\": [%zu", CUDNN_VERSION, n);
    for (size_t i = 0; i < n; i++) len += (size_t)snprintf(text + len, room - len, ", %" PRId64, words[i]);
    snprintf(text + len, room - len, "]}");
  }
  free(words);
  if (!words) {
    free(text);
    return NULL;
  }
  return text;
}

cudnnStatus_t dnn_program_parse(const char *text, dnn_program **out) {
  int version = 0, at = 0;
  size_t n = 0;
  if (sscanf(text, "{\"simulated_plan\": %d, \"words\": [%zu%n", &version, &n, &at) != 2 || n < TEXT_HEAD ||
      n > sizeof(dnn_program) / sizeof(int64_t))
    return dnn_fail(CUDNN_STATUS_BAD_PARAM, "text is not a plan");
  if (version != CUDNN_VERSION)
    return dnn_fail(CUDNN_STATUS_SERIALIZATION_VERSION_MISMATCH, "plan of version %d", version);
  dnn_program *p = calloc(1, sizeof *p);
  int64_t *words = malloc(n * sizeof *words);
  bool ok = p && words;
  const char *s = text + at;
  for (size_t i = 0; ok && i < n; i++) {
    char *end;
    ok = s[0] == ',';
    if (ok) words[i] = strtoll(s + 1, &end, 10);
    if (ok) s = end;
  }
  ok = ok && !strcmp(s, "]}");
  if (ok) memcpy(&p->n_tensors, words, TEXT_HEAD * sizeof *words);
  ok = ok && p->n_tensors > 0 && p->n_tensors <= DNN_MAX_TENSORS && p->n_ops > 0 && p->n_ops <= DNN_MAX_OPS &&
       program_words(p) == n;
  if (ok) {
    size_t bytes = (size_t)p->n_tensors * sizeof *p->tensor;
    memcpy(p->tensor, words + TEXT_HEAD, bytes);
    memcpy(p->op, (char *)(words + TEXT_HEAD) + bytes, (size_t)p->n_ops * sizeof *p->op);
    p->refs = 1;
    *out = p;
  } else {
    free(p);
  }
  free(words);
  return ok ? CUDNN_STATUS_SUCCESS : dnn_fail(CUDNN_STATUS_BAD_PARAM, "text of a plan is damaged");
}
