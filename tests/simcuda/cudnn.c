/* cudnn.c: the entry points of the cuDNN stand-in: handle, messages, descriptors and their attributes, execution.
 * Attributes are checked against one table for type and count when they are set; what they mean is checked when the
 * descriptor is finalised (cudnn_check.c, cudnn_graph.c). */
#include <cuda_runtime_api.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cudnn_impl.h"
#include "simcuda.h"

/* ---- messages ---- */
static _Thread_local char last_error[512];

cudnnStatus_t dnn_fail(cudnnStatus_t status, const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(last_error, sizeof last_error, format, args);
  va_end(args);
  if (getenv("SIMCUDA_VERBOSE")) fprintf(stderr, "simcuda: cudnn: %s: %s\n", cudnnGetErrorString(status), last_error);
  return status;
}

void cudnnGetLastErrorString(char *message, size_t room) {
  if (message && room) snprintf(message, room, "%s", last_error);
  last_error[0] = 0;
}

const char *cudnnGetErrorString(cudnnStatus_t status) {
#define DNN_NAME(code)                                                                                                 \
  case code:                                                                                                           \
    return #code
  switch (status) {
    DNN_NAME(CUDNN_STATUS_SUCCESS);
    DNN_NAME(CUDNN_STATUS_NOT_INITIALIZED);
    DNN_NAME(CUDNN_STATUS_SERIALIZATION_VERSION_MISMATCH);
    DNN_NAME(CUDNN_STATUS_BAD_PARAM);
    DNN_NAME(CUDNN_STATUS_BAD_PARAM_NULL_POINTER);
    DNN_NAME(CUDNN_STATUS_BAD_PARAM_MISALIGNED_POINTER);
    DNN_NAME(CUDNN_STATUS_BAD_PARAM_NOT_FINALIZED);
    DNN_NAME(CUDNN_STATUS_BAD_PARAM_OUT_OF_BOUND);
    DNN_NAME(CUDNN_STATUS_BAD_PARAM_SIZE_INSUFFICIENT);
    DNN_NAME(CUDNN_STATUS_BAD_PARAM_SHAPE_MISMATCH);
    DNN_NAME(CUDNN_STATUS_BAD_PARAM_DUPLICATED_ENTRIES);
    DNN_NAME(CUDNN_STATUS_BAD_PARAM_ATTRIBUTE_TYPE);
    DNN_NAME(CUDNN_STATUS_BAD_PARAM_DESCRIPTOR_TYPE);
    DNN_NAME(CUDNN_STATUS_NOT_SUPPORTED);
    DNN_NAME(CUDNN_STATUS_NOT_SUPPORTED_GRAPH_PATTERN);
    DNN_NAME(CUDNN_STATUS_NOT_SUPPORTED_SHAPE);
    DNN_NAME(CUDNN_STATUS_NOT_SUPPORTED_DATA_TYPE);
    DNN_NAME(CUDNN_STATUS_NOT_SUPPORTED_LAYOUT);
    DNN_NAME(CUDNN_STATUS_INTERNAL_ERROR);
    DNN_NAME(CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED);
    DNN_NAME(CUDNN_STATUS_EXECUTION_FAILED);
    DNN_NAME(CUDNN_STATUS_EXECUTION_FAILED_CUDART);
  default:
    return "CUDNN_STATUS_UNKNOWN";
  }
}

size_t cudnnGetVersion(void) {
  return CUDNN_VERSION;
}

size_t cudnnGetCudartVersion(void) {
  return CUDART_VERSION;
}

/* ---- handle ---- */
static bool is_handle(cudnnHandle_t h) {
  return h && h->magic == DNN_HANDLE;
}

cudnnStatus_t cudnnCreate(cudnnHandle_t *handle) {
  int device;
  if (!handle) return dnn_fail(CUDNN_STATUS_BAD_PARAM_NULL_POINTER, "handle");
  if (cudaGetDevice(&device) != cudaSuccess) return dnn_fail(CUDNN_STATUS_NOT_INITIALIZED, "no device");
  *handle = calloc(1, sizeof **handle);
  if (!*handle) return dnn_fail(CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED, "handle");
  (*handle)->magic = DNN_HANDLE;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnDestroy(cudnnHandle_t handle) {
  if (!is_handle(handle)) return dnn_fail(CUDNN_STATUS_BAD_PARAM, "handle");
  handle->magic = 0;
  free(handle);
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
  if (!is_handle(handle)) return dnn_fail(CUDNN_STATUS_BAD_PARAM, "handle");
  handle->stream = stream;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t *stream) {
  if (!is_handle(handle) || !stream) return dnn_fail(CUDNN_STATUS_BAD_PARAM, "handle or stream");
  *stream = handle->stream;
  return CUDNN_STATUS_SUCCESS;
}

/* ---- what may be set on which descriptor ---- */
typedef struct dnn_rule {
  cudnnBackendDescriptorType_t desc;
  int name, type;
  int64_t most; /* elements, at least 1 */
} dnn_rule;

#define RULE(desc, name, type, most)                                                                                   \
  { CUDNN_BACKEND_##desc##_DESCRIPTOR, CUDNN_ATTR_##name, CUDNN_TYPE_##type, most }
static const dnn_rule rules[] = {
    RULE(TENSOR, TENSOR_DATA_TYPE, DATA_TYPE, 1),
    RULE(TENSOR, TENSOR_DIMENSIONS, INT64, CUDNN_DIM_MAX),
    RULE(TENSOR, TENSOR_STRIDES, INT64, CUDNN_DIM_MAX),
    RULE(TENSOR, TENSOR_UNIQUE_ID, INT64, 1),
    RULE(TENSOR, TENSOR_BYTE_ALIGNMENT, INT64, 1),
    RULE(TENSOR, TENSOR_IS_VIRTUAL, BOOLEAN, 1),
    RULE(TENSOR, TENSOR_IS_BY_VALUE, BOOLEAN, 1),
    RULE(TENSOR, TENSOR_REORDERING_MODE, TENSOR_REORDERING_MODE, 1),
    RULE(TENSOR, TENSOR_RAGGED_OFFSET_DESC, BACKEND_DESCRIPTOR, 1),
    RULE(POINTWISE, POINTWISE_MODE, POINTWISE_MODE, 1),
    RULE(POINTWISE, POINTWISE_MATH_PREC, DATA_TYPE, 1),
    RULE(POINTWISE, POINTWISE_AXIS, INT64, 1),
    RULE(MATMUL, MATMUL_COMP_TYPE, DATA_TYPE, 1),
    RULE(MATMUL, MATMUL_PADDING_VALUE, DOUBLE, 1),
    RULE(REDUCTION, REDUCTION_OPERATOR, REDUCTION_OPERATOR_TYPE, 1),
    RULE(REDUCTION, REDUCTION_COMP_TYPE, DATA_TYPE, 1),
    RULE(REDUCTION, REDUCTION_IS_DETERMINISTIC, BOOLEAN, 1),
    RULE(OPERATION_MATMUL, OPERATION_MATMUL_ADESC, BACKEND_DESCRIPTOR, 1),
    RULE(OPERATION_MATMUL, OPERATION_MATMUL_BDESC, BACKEND_DESCRIPTOR, 1),
    RULE(OPERATION_MATMUL, OPERATION_MATMUL_CDESC, BACKEND_DESCRIPTOR, 1),
    RULE(OPERATION_MATMUL, OPERATION_MATMUL_DESC, BACKEND_DESCRIPTOR, 1),
    RULE(OPERATION_MATMUL, OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC, BACKEND_DESCRIPTOR, 1),
    RULE(OPERATION_MATMUL, OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC, BACKEND_DESCRIPTOR, 1),
    RULE(OPERATION_MATMUL, OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC, BACKEND_DESCRIPTOR, 1),
    RULE(OPERATION_POINTWISE, OPERATION_POINTWISE_PW_DESCRIPTOR, BACKEND_DESCRIPTOR, 1),
    RULE(OPERATION_POINTWISE, OPERATION_POINTWISE_XDESC, BACKEND_DESCRIPTOR, 1),
    RULE(OPERATION_POINTWISE, OPERATION_POINTWISE_BDESC, BACKEND_DESCRIPTOR, 1),
    RULE(OPERATION_POINTWISE, OPERATION_POINTWISE_TDESC, BACKEND_DESCRIPTOR, 1),
    RULE(OPERATION_POINTWISE, OPERATION_POINTWISE_YDESC, BACKEND_DESCRIPTOR, 1),
    RULE(OPERATION_REDUCTION, OPERATION_REDUCTION_DESC, BACKEND_DESCRIPTOR, 1),
    RULE(OPERATION_REDUCTION, OPERATION_REDUCTION_XDESC, BACKEND_DESCRIPTOR, 1),
    RULE(OPERATION_REDUCTION, OPERATION_REDUCTION_YDESC, BACKEND_DESCRIPTOR, 1),
    RULE(OPERATION_RESHAPE, OPERATION_RESHAPE_XDESC, BACKEND_DESCRIPTOR, 1),
    RULE(OPERATION_RESHAPE, OPERATION_RESHAPE_YDESC, BACKEND_DESCRIPTOR, 1),
    RULE(OPERATIONGRAPH, OPERATIONGRAPH_OPS, BACKEND_DESCRIPTOR, DNN_MAX_OPS),
    RULE(OPERATIONGRAPH, OPERATIONGRAPH_HANDLE, HANDLE, 1),
    RULE(ENGINEHEUR, ENGINEHEUR_OPERATION_GRAPH, BACKEND_DESCRIPTOR, 1),
    RULE(ENGINEHEUR, ENGINEHEUR_MODE, HEUR_MODE, 1),
    RULE(ENGINEHEUR, ENGINEHEUR_DEVICEPROP, BACKEND_DESCRIPTOR, 1),
    RULE(ENGINEHEUR, ENGINEHEUR_SM_COUNT_TARGET, INT32, 1),
    RULE(ENGINE, ENGINE_OPERATION_GRAPH, BACKEND_DESCRIPTOR, 1),
    RULE(ENGINE, ENGINE_GLOBAL_INDEX, INT64, 1),
    RULE(ENGINE, ENGINE_SM_COUNT_TARGET, INT32, 1),
    RULE(ENGINE, ENGINE_DEVICEPROP, BACKEND_DESCRIPTOR, 1),
    RULE(ENGINECFG, ENGINECFG_ENGINE, BACKEND_DESCRIPTOR, 1),
    RULE(ENGINECFG, ENGINECFG_KNOB_CHOICES, BACKEND_DESCRIPTOR, 64),
    RULE(KNOB_CHOICE, KNOB_CHOICE_KNOB_TYPE, KNOB_TYPE, 1),
    RULE(KNOB_CHOICE, KNOB_CHOICE_KNOB_VALUE, INT64, 1),
    RULE(EXECUTION_PLAN, EXECUTION_PLAN_HANDLE, HANDLE, 1),
    RULE(EXECUTION_PLAN, EXECUTION_PLAN_ENGINE_CONFIG, BACKEND_DESCRIPTOR, 1),
    RULE(EXECUTION_PLAN, EXECUTION_PLAN_DEVICEPROP, BACKEND_DESCRIPTOR, 1),
    RULE(EXECUTION_PLAN, EXECUTION_PLAN_JSON_REPRESENTATION, CHAR, INT32_MAX),
    RULE(VARIANT_PACK, VARIANT_PACK_UNIQUE_IDS, INT64, DNN_MAX_TENSORS),
    RULE(VARIANT_PACK, VARIANT_PACK_DATA_POINTERS, VOID_PTR, DNN_MAX_TENSORS),
    RULE(VARIANT_PACK, VARIANT_PACK_WORKSPACE, VOID_PTR, 1),
    RULE(DEVICEPROP, DEVICEPROP_DEVICE_ID, INT32, 1),
    RULE(DEVICEPROP, DEVICEPROP_HANDLE, HANDLE, 1),
    RULE(DEVICEPROP, DEVICEPROP_JSON_REPRESENTATION, CHAR, INT32_MAX),
};

static size_t element_bytes(int type) {
  switch (type) {
  case CUDNN_TYPE_HANDLE:
  case CUDNN_TYPE_BACKEND_DESCRIPTOR:
  case CUDNN_TYPE_VOID_PTR:
  case CUDNN_TYPE_INT64:
  case CUDNN_TYPE_DOUBLE:
    return 8;
  case CUDNN_TYPE_BOOLEAN:
    return sizeof(bool);
  case CUDNN_TYPE_CHAR:
    return 1;
  default:
    return 4; /* enumerations, INT32, FLOAT */
  }
}

static const dnn_rule *rule_of(const dnn_desc *d, int name) {
  for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
    if (rules[i].desc == d->type && rules[i].name == name) return rules + i;
  return NULL;
}

const dnn_attr *dnn_get(const dnn_desc *d, int name) {
  for (int i = 0; i < d->n_attrs; i++)
    if (d->attrs[i].name == name) return d->attrs + i;
  return NULL;
}

int64_t dnn_int(const dnn_desc *d, int name, int64_t otherwise) {
  const dnn_attr *a = dnn_get(d, name);
  if (!a) return otherwise;
  if (element_bytes(a->type) == 8) return *(const int64_t *)a->data;
  return element_bytes(a->type) == 1 ? *(const bool *)a->data : *(const int32_t *)a->data;
}

const dnn_desc *dnn_ref(const dnn_desc *d, int name) {
  const dnn_attr *a = dnn_get(d, name);
  return a ? *(dnn_desc *const *)a->data : NULL;
}

/* ---- life of descriptors ---- */
static dnn_program *launched; /* every program that ever ran */

void dnn_program_release(dnn_program *p) {
  if (!p || --p->refs > 0) return;
  p->dead = true;
  if (!p->launched) free(p);
}

static bool is_desc(const void *p) {
  return p && ((const dnn_desc *)p)->magic == DNN_DESC;
}

static void release(dnn_desc *d) {
  if (--d->refs > 0) return;
  for (int i = 0; i < d->n_attrs; i++) {
    if (d->attrs[i].type == CUDNN_TYPE_BACKEND_DESCRIPTOR)
      for (int64_t j = 0; j < d->attrs[i].count; j++) release(((dnn_desc **)d->attrs[i].data)[j]);
    free(d->attrs[i].data);
  }
  free(d->attrs);
  dnn_program_release(d->program);
  d->magic = 0;
  free(d);
}

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t *out) {
  bool known = false;
  if (!out) return dnn_fail(CUDNN_STATUS_BAD_PARAM_NULL_POINTER, "descriptor");
  for (size_t i = 0; i < sizeof rules / sizeof *rules; i++) known = known || rules[i].desc == type;
  if (!known) return dnn_fail(CUDNN_STATUS_NOT_SUPPORTED, "descriptor type %d is not simulated", (int)type);
  dnn_desc *d = calloc(1, sizeof *d);
  if (!d) return dnn_fail(CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED, "descriptor");
  d->magic = DNN_DESC;
  d->type = type;
  d->refs = 1;
  *out = d;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
  if (!is_desc(descriptor)) return dnn_fail(CUDNN_STATUS_BAD_PARAM_NULL_POINTER, "descriptor");
  release(descriptor);
  return CUDNN_STATUS_SUCCESS;
}

/* ---- attributes ---- */
static cudnnStatus_t put(dnn_desc *d, int name, int type, int64_t count, const void *values) {
  size_t bytes = (size_t)count * element_bytes(type);
  dnn_attr *slot = (dnn_attr *)dnn_get(d, name);
  void *copy = malloc(bytes);
  if (!slot) {
    dnn_attr *grown = realloc(d->attrs, (size_t)(d->n_attrs + 1) * sizeof *grown);
    if (!grown || !copy) return dnn_fail(CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED, "attribute");
    d->attrs = grown;
    slot = &grown[d->n_attrs++];
    *slot = (dnn_attr){0};
  }
  memcpy(copy, values, bytes);
  if (type == CUDNN_TYPE_BACKEND_DESCRIPTOR) {
    for (int64_t i = 0; i < count; i++) ((dnn_desc **)copy)[i]->refs++;
    for (int64_t i = 0; slot->data && i < slot->count; i++) release(((dnn_desc **)slot->data)[i]);
  }
  free(slot->data);
  *slot = (dnn_attr){name, type, count, copy};
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t count, const void *values) {
  dnn_desc *d = descriptor;
  if (!is_desc(d)) return dnn_fail(CUDNN_STATUS_BAD_PARAM_NULL_POINTER, "descriptor");
  if (d->final) return dnn_fail(CUDNN_STATUS_BAD_PARAM, "attribute %d set after finalize", (int)name);
  const dnn_rule *r = rule_of(d, (int)name);
  if (!r) return dnn_fail(CUDNN_STATUS_BAD_PARAM, "descriptor %d has no attribute %d", (int)d->type, (int)name);
  if (r->type != (int)type)
    return dnn_fail(CUDNN_STATUS_BAD_PARAM_ATTRIBUTE_TYPE, "attribute %d: type %d != %d", (int)name, (int)type,
                    r->type);
  if (!values || count < 1 || count > r->most)
    return dnn_fail(CUDNN_STATUS_BAD_PARAM, "attribute %d: %lld elements", (int)name, (long long)count);
  if (type == CUDNN_TYPE_BACKEND_DESCRIPTOR)
    for (int64_t i = 0; i < count; i++) {
      const dnn_desc *other = ((dnn_desc *const *)values)[i];
      if (!is_desc(other)) return dnn_fail(CUDNN_STATUS_BAD_PARAM_NULL_POINTER, "attribute %d", (int)name);
      if (!other->final) return dnn_fail(CUDNN_STATUS_BAD_PARAM_NOT_FINALIZED, "attribute %d", (int)name);
    }
  if (type == CUDNN_TYPE_HANDLE && !is_handle(*(const cudnnHandle_t *)values))
    return dnn_fail(CUDNN_STATUS_BAD_PARAM, "attribute %d is not a handle", (int)name);
  return put(d, (int)name, (int)type, count, values);
}

/* The three results of a heuristic differ in nothing that shows here: one is enough for callers to choose from. */
static cudnnStatus_t heuristic_results(const dnn_desc *d, int64_t room, int64_t *count, dnn_desc **out) {
  *count = 1;
  if (room < 1 || !out) return CUDNN_STATUS_SUCCESS;
  if (!is_desc(out[0]) || out[0]->type != CUDNN_BACKEND_ENGINECFG_DESCRIPTOR)
    return dnn_fail(CUDNN_STATUS_BAD_PARAM_DESCRIPTOR_TYPE, "results of the heuristic want engine configurations");
  dnn_attr graph = *dnn_get(d, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH);
  cudnnBackendDescriptor_t engine;
  int64_t index = 0;
  cudnnStatus_t s = cudnnBackendCreateDescriptor(CUDNN_BACKEND_ENGINE_DESCRIPTOR, &engine);
  if (s == CUDNN_STATUS_SUCCESS)
    s = put(engine, CUDNN_ATTR_ENGINE_OPERATION_GRAPH, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, graph.data);
  if (s == CUDNN_STATUS_SUCCESS) s = put(engine, CUDNN_ATTR_ENGINE_GLOBAL_INDEX, CUDNN_TYPE_INT64, 1, &index);
  if (s != CUDNN_STATUS_SUCCESS) return s;
  ((dnn_desc *)engine)->final = true;
  s = put(out[0], CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &engine);
  release(engine);
  out[0]->final = true;
  return s;
}

cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t const descriptor, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t room, int64_t *count, void *values) {
  const dnn_desc *d = descriptor;
  int64_t unused;
  if (!count) count = &unused;
  *count = 0;
  if (!is_desc(d)) return dnn_fail(CUDNN_STATUS_BAD_PARAM_NULL_POINTER, "descriptor");
  if (!d->final) return dnn_fail(CUDNN_STATUS_BAD_PARAM_NOT_FINALIZED, "attribute %d read before finalize", (int)name);
  if (name == CUDNN_ATTR_ENGINEHEUR_RESULTS && d->type == CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)
    return type == CUDNN_TYPE_BACKEND_DESCRIPTOR
               ? heuristic_results(d, room, count, values)
               : dnn_fail(CUDNN_STATUS_BAD_PARAM_ATTRIBUTE_TYPE, "results of the heuristic");
  if (d->type == CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR && name == CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE) {
    if (type != CUDNN_TYPE_INT64) return dnn_fail(CUDNN_STATUS_BAD_PARAM_ATTRIBUTE_TYPE, "workspace size");
    *count = 1;
    if (room >= 1 && values) *(int64_t *)values = d->program->workspace;
    return CUDNN_STATUS_SUCCESS;
  }
  if (d->type == CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR && name == CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION) {
    if (type != CUDNN_TYPE_CHAR) return dnn_fail(CUDNN_STATUS_BAD_PARAM_ATTRIBUTE_TYPE, "text of a plan");
    char *text = dnn_program_text(d->program);
    if (!text) return dnn_fail(CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED, "text of a plan");
    *count = (int64_t)strlen(text) + 1;
    if (values && room > 0) memcpy(values, text, (size_t)(room < *count ? room : *count));
    free(text);
    return CUDNN_STATUS_SUCCESS;
  }
  const dnn_attr *a = dnn_get(d, (int)name);
  if (!a) return dnn_fail(CUDNN_STATUS_BAD_PARAM, "descriptor %d has no attribute %d", (int)d->type, (int)name);
  if (a->type != (int)type) return dnn_fail(CUDNN_STATUS_BAD_PARAM_ATTRIBUTE_TYPE, "attribute %d", (int)name);
  *count = a->count;
  if (values && room > 0) memcpy(values, a->data, (size_t)(room < a->count ? room : a->count) * element_bytes(a->type));
  return CUDNN_STATUS_SUCCESS;
}

/* ---- finalize ---- */
static cudnnStatus_t finalize_plan(dnn_desc *d) {
  const dnn_attr *text = dnn_get(d, CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION);
  const dnn_desc *config = dnn_ref(d, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG);
  if (!dnn_get(d, CUDNN_ATTR_EXECUTION_PLAN_HANDLE) && !dnn_get(d, CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP))
    return dnn_fail(CUDNN_STATUS_BAD_PARAM, "plan: neither handle nor device");
  if (text && !config) {
    const char *chars = text->data;
    if (chars[text->count - 1]) return dnn_fail(CUDNN_STATUS_BAD_PARAM, "plan: text does not end");
    return dnn_program_parse(chars, &d->program);
  }
  if (!config) return dnn_fail(CUDNN_STATUS_BAD_PARAM, "plan: no engine configuration");
  const dnn_desc *graph = dnn_ref(dnn_ref(config, CUDNN_ATTR_ENGINECFG_ENGINE), CUDNN_ATTR_ENGINE_OPERATION_GRAPH);
  cudnnStatus_t s = dnn_supported(graph->program);
  if (s != CUDNN_STATUS_SUCCESS) return s;
  d->program = graph->program;
  d->program->refs++;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t descriptor) {
  dnn_desc *d = descriptor;
  if (!is_desc(d)) return dnn_fail(CUDNN_STATUS_BAD_PARAM_NULL_POINTER, "descriptor");
  if (d->final) return dnn_fail(CUDNN_STATUS_BAD_PARAM, "descriptor finalised twice");
  cudnnStatus_t s = dnn_check(d);
  if (s == CUDNN_STATUS_SUCCESS && d->type == CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR) s = dnn_compile(d, &d->program);
  if (s == CUDNN_STATUS_SUCCESS && d->type == CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR) s = finalize_plan(d);
  d->final = s == CUDNN_STATUS_SUCCESS;
  return s;
}

/* ---- execute ---- */
static double value_at(const void *host, int64_t dtype) {
  switch (dtype) {
  case CUDNN_DATA_FLOAT:
    return *(const float *)host;
  case CUDNN_DATA_INT32:
    return *(const int32_t *)host;
  case CUDNN_DATA_INT64:
    return (double)*(const int64_t *)host;
  default:
    return *(const double *)host;
  }
}

/* Pointers of the variant pack for every tensor outside the graph; values by reference are read now. */
static cudnnStatus_t bind(dnn_job *job, const dnn_desc *pack) {
  const dnn_program *p = job->program;
  const dnn_attr *ids = dnn_get(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS);
  const dnn_attr *pointers = dnn_get(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS);
  for (int64_t i = 0; i < p->n_tensors; i++) {
    const dnn_tensor *t = &p->tensor[i];
    int64_t at = 0;
    if (t->is_virtual) continue;
    while (at < ids->count && ((const int64_t *)ids->data)[at] != t->uid) at++;
    if (at == ids->count) return dnn_fail(CUDNN_STATUS_BAD_PARAM, "no pointer for tensor %lld", (long long)t->uid);
    void *ptr = ((void *const *)pointers->data)[at];
    if (!ptr) return dnn_fail(CUDNN_STATUS_BAD_PARAM_NULL_POINTER, "tensor %lld", (long long)t->uid);
    if (t->by_value && simcuda_is_device(ptr, 1))
      return dnn_fail(CUDNN_STATUS_BAD_PARAM, "tensor %lld by value lies on the device", (long long)t->uid);
    if (!t->by_value && (uintptr_t)ptr % (uintptr_t)t->alignment)
      return dnn_fail(CUDNN_STATUS_BAD_PARAM_MISALIGNED_POINTER, "tensor %lld", (long long)t->uid);
    job->pointer[i] = ptr;
    if (t->by_value) job->value[i] = value_at(ptr, t->dtype);
  }
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t plan, cudnnBackendDescriptor_t pack) {
  dnn_desc *d = plan, *v = pack;
  if (!is_handle(handle)) return dnn_fail(CUDNN_STATUS_BAD_PARAM, "handle");
  if (!is_desc(d) || !is_desc(v)) return dnn_fail(CUDNN_STATUS_BAD_PARAM_NULL_POINTER, "plan or variant pack");
  if (d->type != CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR || v->type != CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)
    return dnn_fail(CUDNN_STATUS_BAD_PARAM_DESCRIPTOR_TYPE, "plan or variant pack");
  if (!d->final || !v->final) return dnn_fail(CUDNN_STATUS_BAD_PARAM_NOT_FINALIZED, "plan or variant pack");
  dnn_job job = {.program = d->program};
  cudnnStatus_t s = bind(&job, v);
  if (s != CUDNN_STATUS_SUCCESS) return s;
  const dnn_attr *workspace = dnn_get(v, CUDNN_ATTR_VARIANT_PACK_WORKSPACE);
  job.workspace = workspace ? *(void *const *)workspace->data : NULL;
  if (d->program->workspace && !job.workspace) return dnn_fail(CUDNN_STATUS_BAD_PARAM_NULL_POINTER, "workspace");
  if ((uintptr_t)job.workspace % 16) return dnn_fail(CUDNN_STATUS_BAD_PARAM_MISALIGNED_POINTER, "workspace");
  if (!d->program->launched) {
    d->program->launched = true;
    d->program->next = launched;
    launched = d->program;
  }
  return simcuda_enqueue(handle->stream, dnn_run, &job, sizeof job) == cudaSuccess
             ? CUDNN_STATUS_SUCCESS
             : dnn_fail(CUDNN_STATUS_EXECUTION_FAILED_CUDART, "launch");
}
