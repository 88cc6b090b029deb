/* sdpa_graph.h: attention of packed sequences as cuDNN's composite graph, forward and backward, written with the
 * backend descriptor API from plain C. Everything here is a pure function of a shape: no device, no handle, no memory
 * of tensors, so that every graph the engine can emit is built and compiled by a test on any machine.
 *
 * Tensors are dims (b, h, s, d) over rows of tokens: token t of sequence i, head h, lies at
 * offset_i + t*ld + h*d elements from the tensor's pointer, offset_i = (first row of i) * ld being the ragged offset.
 * So a column view of a fused projection is a tensor like any other. Statistics are [tokens, heads]. Full-head
 * gradients of grouped keys and values are tensors of ours with cuDNN's convention: the ragged offset of dK (dV), which
 * it multiplies by the size of the group. With everything ragged, memory grows with the tokens and not with b*s. */
#ifndef ESP_BACKEND_CUDA_SDPA_GRAPH_H
#define ESP_BACKEND_CUDA_SDPA_GRAPH_H

#include <cudnn.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/error.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The functions of libcudnn that are used: opened at run time, so that a machine without cuDNN has the own kernels. */
typedef struct esp_cudnn {
  size_t (*version)(void);
  cudnnStatus_t (*create)(cudnnHandle_t *handle);
  cudnnStatus_t (*destroy)(cudnnHandle_t handle);
  cudnnStatus_t (*set_stream)(cudnnHandle_t handle, cudaStream_t stream);
  cudnnStatus_t (*make)(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t *out);
  cudnnStatus_t (*unmake)(cudnnBackendDescriptor_t d);
  cudnnStatus_t (*set)(cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                       int64_t count, const void *values);
  cudnnStatus_t (*get)(cudnnBackendDescriptor_t const d, cudnnBackendAttributeName_t name,
                       cudnnBackendAttributeType_t type, int64_t room, int64_t *count, void *values);
  cudnnStatus_t (*finalize)(cudnnBackendDescriptor_t d);
  cudnnStatus_t (*execute)(cudnnHandle_t handle, cudnnBackendDescriptor_t plan, cudnnBackendDescriptor_t variants);
  const char *(*status_text)(cudnnStatus_t status);
  void (*last_error)(char *message, size_t room);
} esp_cudnn;
/* sdpa_plan.c: NULL where there is none; `why` (optional) gets one line. Opened once per process. */
const esp_cudnn *esp_cudnn_open(char *why, size_t room);

/* All that a graph depends on. Fields are 64 bits wide, so that shapes compare and hash by their bytes. */
typedef struct esp_sdpa_shape {
  int64_t b, s;                       /* sequences (the surplus ones are empty), bound of their lengths */
  int64_t heads, kv_heads, head_dim;  /* of this call, perhaps a part of the layer's */
  int64_t ld_q, ld_k, ld_v, ld_o;     /* elements from one token to the next */
  int64_t ld_stats;                   /* heads of the layer: the statistics are [tokens, ld_stats] */
  int64_t ld_do, ld_dq, ld_dk, ld_dv; /* backward; 0 in forward */
  int64_t window;                     /* 0: none */
  int64_t causal, backward;
  int64_t atomic; /* dQ is summed by atomic additions, in no fixed order, in ESP_SDPA_DQ_SUM */
} esp_sdpa_shape;

/* Names of the tensors that an execution binds. Ragged offsets: ESP_SDPA_RAGGED + i is an array [b+1] of int64, first
 * rows times the i-th of esp_sdpa_strides. By value: SCALE, ONE, WINDOW and the two NINFs, one fp32 in host memory. */
enum {
  ESP_SDPA_Q = 1001,
  ESP_SDPA_K,
  ESP_SDPA_V,
  ESP_SDPA_O,
  ESP_SDPA_STATS,
  ESP_SDPA_DO,
  ESP_SDPA_DQ,
  ESP_SDPA_DK,
  ESP_SDPA_DV,
  ESP_SDPA_LENS,    /* [b] int32: lengths of queries */
  ESP_SDPA_LENS_KV, /* the same, of keys */
  ESP_SDPA_SUM,     /* backward: rowsum(dO * O), [tokens, ld_stats] fp32 */
  ESP_SDPA_DK_FULL, /* grouped heads: [tokens, ld_dk * group] and alike */
  ESP_SDPA_DV_FULL,
  ESP_SDPA_DQ_SUM, /* atomic: [tokens, ld_dq] fp32 */
  ESP_SDPA_SCALE,
  ESP_SDPA_ONE,
  ESP_SDPA_WINDOW,
  ESP_SDPA_NINF_PADDING,
  ESP_SDPA_NINF_CAUSAL,
  ESP_SDPA_NINF_WINDOW,
  ESP_SDPA_RAGGED = 1101
};
enum { ESP_SDPA_MAX_STRIDES = 9, ESP_SDPA_MAX_DESCRIPTORS = 224 };

typedef struct esp_sdpa_graph {
  cudnnBackendDescriptor_t opgraph;
  cudnnBackendDescriptor_t all[ESP_SDPA_MAX_DESCRIPTORS]; /* opgraph's parts and itself, in the order made */
  int n_all, n_ops;
  char why[256]; /* of a failure */
} esp_sdpa_graph;

/* The distinct strides of a shape's ragged tensors, in the order of their ragged offsets. Returns how many. */
int esp_sdpa_strides(const esp_sdpa_shape *s, int64_t out[ESP_SDPA_MAX_STRIDES]);
/* `handle` may be NULL: the graph is then for a device that is described (esp_sdpa_plan_make). A failure leaves nothing
 * to free and its reason in `why`; the thread's message stays as it is, for the caller may go on without cuDNN. */
esp_status esp_sdpa_build(const esp_cudnn *dnn, const esp_sdpa_shape *s, cudnnHandle_t handle, esp_sdpa_graph *out);
void esp_sdpa_graph_free(const esp_cudnn *dnn, esp_sdpa_graph *g);

/* One shape of each kind that the engine emits: every supported head size, grouping, mask, layout and direction.
 * Writes at most `max`, returns how many there are. */
int esp_sdpa_enumerate(esp_sdpa_shape *out, int max);

/* sdpa_plan.c: the first plan that the heuristics offer and that can be made, for the device of `handle` or, where that
 * is NULL, for `device` (a finalised CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR). A failure: graph.why. */
typedef struct esp_sdpa_plan {
  cudnnBackendDescriptor_t plan;
  int64_t workspace; /* bytes */
  esp_sdpa_graph graph;
} esp_sdpa_plan;
esp_status esp_sdpa_plan_make(const esp_cudnn *dnn, cudnnHandle_t handle, cudnnBackendDescriptor_t device, int cc,
                              const esp_sdpa_shape *s, esp_sdpa_plan *out);
void esp_sdpa_plan_free(const esp_cudnn *dnn, esp_sdpa_plan *p);

#ifdef __cplusplus
}
#endif
#endif
