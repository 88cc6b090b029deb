/* cudnn_impl.h: descriptors of the cuDNN stand-in, and the program that a graph of operations becomes. */
#ifndef SIMCUDA_CUDNN_IMPL_H
#define SIMCUDA_CUDNN_IMPL_H

#include <cudnn.h>
#include <stdbool.h>
#include <stdint.h>

/* ---- a graph, checked and put in order: plain data, so that a plan can be written as a list of numbers ---- */
enum { DNN_MAX_TENSORS = 128, DNN_MAX_OPS = 64 };

typedef struct dnn_tensor {
  int64_t uid, dtype, is_virtual, by_value, alignment;
  int64_t dim[4], stride[4]; /* (b, h, rows, columns) */
  int64_t ragged;            /* tensor of the offsets of each b, in elements; -1: stride[0] */
  int64_t ragged_factor; /* heads per group in the full-head gradient of grouped keys, else 1: as the library does */
  int64_t rows_line;     /* dimension (2 or 3) that the ragged offsets count */
  int64_t length[2];     /* tensors with the true length of dimensions 2 and 3, per b; -1: none */
  int64_t adds;          /* products are added to what is there: the atomic sum of dQ */
} dnn_tensor;

typedef enum dnn_kind { DNN_MATMUL, DNN_POINTWISE, DNN_REDUCTION, DNN_RESHAPE } dnn_kind;

typedef struct dnn_op {
  int64_t kind, mode, axis;
  int64_t in[3], out; /* A B | x b t | x; absent: -1 */
  int64_t length[3];  /* matmul: tensors that override M, N, K */
  int64_t padded;     /* matmul: lines beyond the true lengths count as `padding`, else they are undefined */
  int64_t from[4];    /* reshape: dimension of x that dimension i of y is; -1 for one of size 1 */
  double padding;
} dnn_op;

typedef struct dnn_program {
  struct dnn_program *next; /* of those that were launched: kept, so that work recorded earlier finds them */
  int refs;
  bool launched, dead;
  int64_t n_tensors, n_ops, workspace;
  dnn_tensor tensor[DNN_MAX_TENSORS];
  dnn_op op[DNN_MAX_OPS];
} dnn_program;

/* ---- descriptors: a bag of attributes each ---- */
enum { DNN_DESC = 0x64445343, DNN_HANDLE = 0x64484e44 };

typedef struct dnn_attr {
  int name, type;
  int64_t count;
  void *data;
} dnn_attr;

typedef struct dnn_desc {
  uint32_t magic;
  cudnnBackendDescriptorType_t type;
  int refs; /* its maker's, and one per descriptor that names it */
  bool final;
  dnn_attr *attrs;
  int n_attrs;
  dnn_program *program; /* of a graph, and of a plan */
} dnn_desc;

struct cudnnContext {
  uint32_t magic;
  cudaStream_t stream;
};

/* cudnn.c. Sets the thread's last error; returns `status`. */
cudnnStatus_t dnn_fail(cudnnStatus_t status, const char *format, ...) __attribute__((format(printf, 2, 3)));
const dnn_attr *dnn_get(const dnn_desc *d, int name); /* NULL: not set */
int64_t dnn_int(const dnn_desc *d, int name, int64_t otherwise);
const dnn_desc *dnn_ref(const dnn_desc *d, int name);
void dnn_program_release(dnn_program *p);

/* cudnn_check.c: is this one descriptor sound? */
cudnnStatus_t dnn_check(const dnn_desc *d);
/* cudnn_graph.c */
cudnnStatus_t dnn_compile(const dnn_desc *graph, dnn_program **out);
cudnnStatus_t dnn_supported(const dnn_program *p); /* what an engine would refuse */
char *dnn_program_text(const dnn_program *p);      /* JSON; the caller frees it */
cudnnStatus_t dnn_program_parse(const char *text, dnn_program **out);
/* cudnn_run.c: everything the execution needs, by value */
typedef struct dnn_job {
  const dnn_program *program;
  void *workspace;
  void *pointer[DNN_MAX_TENSORS];
  double value[DNN_MAX_TENSORS];
} dnn_job;
void dnn_run(void *job);

#endif
