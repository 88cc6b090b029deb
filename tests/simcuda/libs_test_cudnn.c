/* libs_test_cudnn.c: the cuDNN stand-in carries out the engine's own attention graphs and is compared with attention
 * written as loops in double; and what it must refuse. Seen to catch: the ragged offset of the keys ignored in
 * base_of(), the heads of a group taken modulo instead of divided in run_matmul(), the factor of full-head gradients
 * left out of offset_at(); and in the engine's graph, a padding mask left out. */
#include "libs_test.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "backend/cuda/sdpa_graph.h"

#define DNN_OK(call)                                                                                                   \
  do {                                                                                                                 \
    cudnnStatus_t s_ = (call);                                                                                         \
    char text_[256] = "";                                                                                              \
    if (s_ != CUDNN_STATUS_SUCCESS) {                                                                                  \
      cudnnGetLastErrorString(text_, sizeof text_);                                                                    \
      fail_msg("%s: %s: %s", #call, cudnnGetErrorString(s_), text_);                                                   \
    }                                                                                                                  \
  } while (0)

static const esp_cudnn dnn = {.version = cudnnGetVersion,
                              .create = cudnnCreate,
                              .destroy = cudnnDestroy,
                              .set_stream = cudnnSetStream,
                              .make = cudnnBackendCreateDescriptor,
                              .unmake = cudnnBackendDestroyDescriptor,
                              .set = cudnnBackendSetAttribute,
                              .get = cudnnBackendGetAttribute,
                              .finalize = cudnnBackendFinalize,
                              .execute = cudnnBackendExecute,
                              .status_text = cudnnGetErrorString,
                              .last_error = cudnnGetLastErrorString};

typedef cudnnBackendDescriptor_t desc;

static desc make(cudnnBackendDescriptorType_t type) {
  desc d;
  DNN_OK(cudnnBackendCreateDescriptor(type, &d));
  return d;
}

static void set(desc d, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t n, const void *v) {
  DNN_OK(cudnnBackendSetAttribute(d, name, type, n, v));
}

/* ---- from a graph to work on the stream ---- */
static cudnnStatus_t plan_of(cudnnHandle_t handle, desc graph, desc *plan) {
  desc heuristic = make(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR), config = make(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
  cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
  int64_t n = 0;
  set(heuristic, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &graph);
  set(heuristic, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
  DNN_OK(cudnnBackendFinalize(heuristic));
  DNN_OK(cudnnBackendGetAttribute(heuristic, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &n,
                                  &config));
  assert_int_equal(n, 1);
  *plan = make(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
  set(*plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
  set(*plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &config);
  cudnnStatus_t s = cudnnBackendFinalize(*plan);
  cudnnBackendDestroyDescriptor(config);
  cudnnBackendDestroyDescriptor(heuristic);
  return s;
}

typedef struct binding {
  int64_t uid[40];
  void *ptr[40];
  int n;
} binding;

static void bind(binding *b, int64_t uid, const void *ptr) {
  b->uid[b->n] = uid;
  b->ptr[b->n++] = (void *)ptr;
}

static cudnnStatus_t execute(cudnnHandle_t handle, desc plan, const binding *b, void *workspace) {
  desc pack = make(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
  set(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, b->n, b->uid);
  set(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, b->n, b->ptr);
  set(pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
  DNN_OK(cudnnBackendFinalize(pack));
  cudnnStatus_t s = cudnnBackendExecute(handle, plan, pack);
  cudnnBackendDestroyDescriptor(pack);
  return s;
}

/* The plan again, from its text. */
static void through_text(cudnnHandle_t handle, desc *plan) {
  int64_t n = 0, m = 0;
  DNN_OK(cudnnBackendGetAttribute(*plan, CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, 0, &n, NULL));
  char *text = malloc((size_t)n);
  assert_non_null(text);
  DNN_OK(cudnnBackendGetAttribute(*plan, CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, n, &m, text));
  assert_int_equal(n, m);
  DNN_OK(cudnnBackendDestroyDescriptor(*plan));
  *plan = make(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
  set(*plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
  set(*plan, CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, n, text);
  DNN_OK(cudnnBackendFinalize(*plan));
  free(text);
}

/* ---- attention as loops ---- */
enum { MAX_B = 5 };
typedef struct problem {
  const char *name;
  int b, s, heads, kv_heads, d, window, causal, atomic;
  int lens[MAX_B];
} problem;

typedef struct arrays { /* [tokens, heads*d] in bf16 values; q, k and v are columns of one projection */
  int tokens, ld;
  float *qkv, *o, *d_o, *stats, *dq, *dk, *dv;
} arrays;

static const float *row_of(const float *base, int64_t token, int64_t ld, int64_t column) {
  return base + token * ld + column;
}

static bool sees(const problem *p, int i, int j) {
  if (p->causal && j > i) return false;
  return !p->window || j > i - p->window;
}

/* O, statistics and the three gradients in double; q and k and v of a token lie at 0, q and q + kv columns. */
static void reference(const problem *p, const arrays *x, double *o, double *stats, double *dq, double *dk, double *dv) {
  int d = p->d, q_width = p->heads * d, kv_width = p->kv_heads * d, first = 0;
  double scale = 1 / sqrt(d);
  memset(dq, 0, (size_t)x->tokens * q_width * sizeof *dq);
  memset(dk, 0, (size_t)x->tokens * kv_width * sizeof *dk);
  memset(dv, 0, (size_t)x->tokens * kv_width * sizeof *dv);
  for (int b = 0; b < p->b; first += p->lens[b++])
    for (int h = 0; h < p->heads; h++) {
      int kv = h / (p->heads / p->kv_heads);
      for (int i = 0; i < p->lens[b]; i++) {
        double prob[64], max = -INFINITY, sum = 0, dot = 0;
        const float *q = row_of(x->qkv, first + i, x->ld, h * d), *g = row_of(x->d_o, first + i, q_width, h * d);
        double *oi = o + (int64_t)(first + i) * q_width + h * d, *dqi = dq + (int64_t)(first + i) * q_width + h * d;
        for (int j = 0; j < p->lens[b]; j++) {
          const float *k = row_of(x->qkv, first + j, x->ld, q_width + kv * d);
          prob[j] = 0;
          for (int c = 0; c < d; c++) prob[j] += scale * q[c] * k[c];
          if (sees(p, i, j) && prob[j] > max) max = prob[j];
        }
        for (int j = 0; j < p->lens[b]; j++) sum += prob[j] = sees(p, i, j) ? exp(prob[j] - max) : 0;
        stats[(first + i) * p->heads + h] = max + log(sum);
        for (int c = 0; c < d; c++) oi[c] = 0;
        for (int j = 0; j < p->lens[b]; j++) {
          const float *v = row_of(x->qkv, first + j, x->ld, q_width + kv_width + kv * d);
          prob[j] /= sum;
          for (int c = 0; c < d; c++) oi[c] += prob[j] * v[c];
        }
        for (int c = 0; c < d; c++) dot += g[c] * oi[c];
        for (int j = 0; j < p->lens[b]; j++) {
          const float *k = row_of(x->qkv, first + j, x->ld, q_width + kv * d);
          const float *v = row_of(x->qkv, first + j, x->ld, q_width + kv_width + kv * d);
          double ds = 0;
          for (int c = 0; c < d; c++) ds += g[c] * v[c];
          ds = scale * prob[j] * (ds - dot);
          for (int c = 0; c < d; c++) {
            dqi[c] += ds * k[c];
            dk[(int64_t)(first + j) * kv_width + kv * d + c] += ds * q[c];
            dv[(int64_t)(first + j) * kv_width + kv * d + c] += prob[j] * g[c];
          }
        }
      }
    }
}

/* ||got - want|| / ||want|| */
static double distance(const float *got, const double *want, int64_t n) {
  double up = 0, down = 0;
  for (int64_t i = 0; i < n; i++) {
    up += (got[i] - want[i]) * (got[i] - want[i]);
    down += want[i] * want[i];
  }
  return sqrt(up / down);
}

/* ---- one problem on the simulated device ---- */
typedef struct device {
  uint16_t *qkv, *o, *d_o, *dq, *dk, *dv, *dk_full, *dv_full;
  float *stats, *sum, *dq_sum;
  int32_t *lens;
  int64_t *offsets[ESP_SDPA_MAX_STRIDES];
  float scale, one, window, ninf;
} device;

static void bind_common(const problem *p, const esp_sdpa_shape *s, device *g, binding *b) {
  int64_t strides[ESP_SDPA_MAX_STRIDES], row = 0, host[MAX_B + 1];
  int n = esp_sdpa_strides(s, strides);
  for (int i = 0; i < n; i++) {
    row = 0;
    for (int j = 0; j <= p->b; j++) {
      host[j] = row * strides[i];
      if (j < p->b) row += p->lens[j];
    }
    CUDA_OK(cudaMemcpy(g->offsets[i], host, sizeof host, cudaMemcpyHostToDevice));
    bind(b, ESP_SDPA_RAGGED + i, g->offsets[i]);
  }
  bind(b, ESP_SDPA_Q, g->qkv);
  bind(b, ESP_SDPA_K, g->qkv + p->heads * p->d);
  bind(b, ESP_SDPA_V, g->qkv + (p->heads + p->kv_heads) * p->d);
  bind(b, ESP_SDPA_O, g->o);
  bind(b, ESP_SDPA_STATS, g->stats);
  bind(b, ESP_SDPA_LENS, g->lens);
  bind(b, ESP_SDPA_LENS_KV, g->lens);
  bind(b, ESP_SDPA_SCALE, &g->scale);
  bind(b, ESP_SDPA_WINDOW, &g->window);
  bind(b, ESP_SDPA_ONE, &g->one);
  bind(b, ESP_SDPA_NINF_PADDING, &g->ninf);
  bind(b, ESP_SDPA_NINF_CAUSAL, &g->ninf);
  bind(b, ESP_SDPA_NINF_WINDOW, &g->ninf);
}

static void run(cudnnHandle_t handle, const problem *p, esp_sdpa_shape *s, device *g) {
  binding b = {.n = 0};
  desc plan;
  esp_sdpa_graph graph;
  int64_t bytes = 0, n = 0;
  assert_int_equal(esp_sdpa_build(&dnn, s, handle, &graph), ESP_OK);
  DNN_OK(plan_of(handle, graph.opgraph, &plan));
  esp_sdpa_graph_free(&dnn, &graph); /* a plan outlives its graph */
  through_text(handle, &plan);
  DNN_OK(cudnnBackendGetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &n, &bytes));
  if (s->backward && !s->atomic) assert_true(bytes >= s->b * s->heads * s->s * s->s * 2);
  void *workspace = libs_device((size_t)bytes + 1);
  bind_common(p, s, g, &b);
  if (s->backward) {
    bind(&b, ESP_SDPA_DO, g->d_o);
    bind(&b, ESP_SDPA_DQ, g->dq);
    bind(&b, ESP_SDPA_DK, g->dk);
    bind(&b, ESP_SDPA_DV, g->dv);
    bind(&b, ESP_SDPA_DK_FULL, g->dk_full);
    bind(&b, ESP_SDPA_DV_FULL, g->dv_full);
    bind(&b, ESP_SDPA_SUM, g->sum);
    bind(&b, ESP_SDPA_DQ_SUM, g->dq_sum);
  }
  DNN_OK(execute(handle, plan, &b, workspace));
  CUDA_OK(cudaDeviceSynchronize());
  DNN_OK(cudnnBackendDestroyDescriptor(plan));
  CUDA_OK(cudaFree(workspace));
}

static void close_to(const problem *p, const char *what, const void *got, const double *want, int64_t n,
                     cudaDataType_t type, double allowed) {
  float *v = malloc((size_t)n * sizeof *v);
  assert_non_null(v);
  libs_get(v, got, (size_t)n, type);
  double away = distance(v, want, n);
  if (!(away < allowed)) fail_msg("%s: %s is %g away", p->name, what, away);
  free(v);
}

static float *randoms(size_t n, uint64_t *seed) {
  float *v = malloc(n * sizeof *v);
  assert_non_null(v);
  for (size_t i = 0; i < n; i++) v[i] = libs_rounded(2 * libs_uniform(seed), CUDA_R_16BF);
  return v;
}

static void check(const problem *p) {
  arrays x = {.ld = (p->heads + 2 * p->kv_heads) * p->d};
  uint64_t seed = 3;
  for (int i = 0; i < p->b; i++) x.tokens += p->lens[i];
  size_t q = (size_t)x.tokens * p->heads * p->d, kv = (size_t)x.tokens * p->kv_heads * p->d;
  size_t rows = (size_t)x.tokens * p->heads, all = (size_t)x.tokens * x.ld;
  x.qkv = randoms(all, &seed);
  x.d_o = randoms(q, &seed);
  double *want = malloc((2 * q + rows + 2 * kv) * sizeof *want);
  assert_non_null(want);
  double *o = want, *dq = o + q, *stats = dq + q, *dk = stats + rows, *dv = dk + kv;
  reference(p, &x, o, stats, dq, dk, dv);

  device g = {.scale = 1 / sqrtf((float)p->d), .one = 1, .window = (float)p->window, .ninf = -INFINITY};
  void **slots[] = {(void **)&g.qkv,   (void **)&g.o,   (void **)&g.d_o,     (void **)&g.dq,
                    (void **)&g.dk,    (void **)&g.dv,  (void **)&g.dk_full, (void **)&g.dv_full,
                    (void **)&g.stats, (void **)&g.sum, (void **)&g.dq_sum,  (void **)&g.lens};
  size_t sizes[] = {all * 2, q * 2, q * 2, q * 2, kv * 2, kv * 2, q * 2, q * 2, rows * 4, rows * 4, q * 4, 4 * MAX_B};
  for (size_t i = 0; i < sizeof slots / sizeof *slots; i++) *slots[i] = libs_device(sizes[i]);
  for (int i = 0; i < ESP_SDPA_MAX_STRIDES; i++) g.offsets[i] = libs_device((MAX_B + 1) * sizeof(int64_t));
  libs_put(g.qkv, x.qkv, all, CUDA_R_16BF);
  libs_put(g.d_o, x.d_o, q, CUDA_R_16BF);
  CUDA_OK(cudaMemcpy(g.lens, p->lens, sizeof p->lens, cudaMemcpyHostToDevice));
  CUDA_OK(cudaMemset(g.dq_sum, 0, q * 4));

  cudnnHandle_t handle;
  DNN_OK(cudnnCreate(&handle));
  esp_sdpa_shape s = {.b = p->b,
                      .s = p->s,
                      .heads = p->heads,
                      .kv_heads = p->kv_heads,
                      .head_dim = p->d,
                      .ld_q = x.ld,
                      .ld_k = x.ld,
                      .ld_v = x.ld,
                      .ld_o = p->heads * p->d,
                      .ld_stats = p->heads,
                      .window = p->window,
                      .causal = p->causal};
  run(handle, p, &s, &g);
  close_to(p, "o", g.o, o, (int64_t)q, CUDA_R_16BF, 6e-3);
  close_to(p, "stats", g.stats, stats, (int64_t)rows, CUDA_R_32F, 1e-5);
  s.backward = 1;
  s.atomic = p->atomic;
  s.ld_do = s.ld_dq = s.ld_o;
  s.ld_dk = s.ld_dv = p->kv_heads * p->d;
  run(handle, p, &s, &g);
  close_to(p, "dq", g.dq, dq, (int64_t)q, CUDA_R_16BF, 2e-2);
  close_to(p, "dk", g.dk, dk, (int64_t)kv, CUDA_R_16BF, 2e-2);
  close_to(p, "dv", g.dv, dv, (int64_t)kv, CUDA_R_16BF, 1e-2);
  DNN_OK(cudnnDestroy(handle));
  for (size_t i = 0; i < sizeof slots / sizeof *slots; i++) CUDA_OK(cudaFree(*slots[i]));
  for (int i = 0; i < ESP_SDPA_MAX_STRIDES; i++) CUDA_OK(cudaFree(g.offsets[i]));
  free(x.qkv), free(x.d_o), free(want);
}

void libs_cudnn_attention(void **state) {
  (void)state;
  static const problem problems[] = {
      {"causal", 2, 32, 2, 2, 16, 0, 1, 0, {32, 19}},
      {"causal, grouped", 3, 32, 6, 2, 16, 0, 1, 0, {7, 1, 32}},
      {"causal, grouped, atomic", 3, 32, 4, 2, 16, 0, 1, 1, {7, 30, 12}},
      {"window", 2, 48, 4, 1, 8, 9, 1, 0, {48, 31}},
      {"neither", 2, 32, 4, 2, 24, 0, 0, 0, {13, 32}},
      {"empty sequences", 5, 32, 4, 2, 16, 0, 1, 0, {9, 0, 21, 0, 0}},
  };
  for (size_t i = 0; i < sizeof problems / sizeof *problems; i++) check(problems + i);
}

/* ---- refusals ---- */
static desc tensor(int64_t uid, cudnnDataType_t type, int64_t h, int64_t rows, int64_t columns, bool is_virtual) {
  const int64_t dim[4] = {2, h, rows, columns}, stride[4] = {h * rows * columns, rows * columns, columns, 1},
                align = 16;
  desc d = make(CUDNN_BACKEND_TENSOR_DESCRIPTOR);
  set(d, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type);
  set(d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, dim);
  set(d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, stride);
  set(d, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &uid);
  set(d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &align);
  set(d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &is_virtual);
  DNN_OK(cudnnBackendFinalize(d));
  return d;
}

static desc product(desc a, desc b, desc c) {
  cudnnDataType_t type = CUDNN_DATA_FLOAT;
  desc how = make(CUDNN_BACKEND_MATMUL_DESCRIPTOR), op = make(CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
  set(how, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type);
  DNN_OK(cudnnBackendFinalize(how));
  set(op, CUDNN_ATTR_OPERATION_MATMUL_ADESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &a);
  set(op, CUDNN_ATTR_OPERATION_MATMUL_BDESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &b);
  set(op, CUDNN_ATTR_OPERATION_MATMUL_CDESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &c);
  set(op, CUDNN_ATTR_OPERATION_MATMUL_DESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &how);
  DNN_OK(cudnnBackendDestroyDescriptor(how));
  return op;
}

static desc pointwise(cudnnPointwiseMode_t mode, desc x, desc b, desc y) {
  cudnnDataType_t type = CUDNN_DATA_FLOAT;
  desc how = make(CUDNN_BACKEND_POINTWISE_DESCRIPTOR), op = make(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
  set(how, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
  set(how, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &type);
  DNN_OK(cudnnBackendFinalize(how));
  set(op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &how);
  set(op, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &x);
  if (b) set(op, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &b);
  set(op, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &y);
  DNN_OK(cudnnBackendDestroyDescriptor(how));
  return op;
}

static cudnnStatus_t graph_of(int n, const desc *ops, desc *out) {
  desc d = make(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
  set(d, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, n, ops);
  cudnnStatus_t s = cudnnBackendFinalize(d);
  if (out)
    *out = d;
  else
    DNN_OK(cudnnBackendDestroyDescriptor(d));
  return s;
}

void libs_cudnn_refusals(void **state) {
  (void)state;
  enum { BAD = CUDNN_STATUS_BAD_PARAM };
  const cudnnDataType_t F = CUDNN_DATA_FLOAT, H = CUDNN_DATA_BFLOAT16;
  cudnnDataType_t type = CUDNN_DATA_FLOAT;
  int64_t one = 1;
  desc t = make(CUDNN_BACKEND_TENSOR_DESCRIPTOR);
  assert_int_equal(cudnnBackendFinalize(t), BAD);
  assert_int_equal(cudnnBackendSetAttribute(t, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_INT64, 1, &one),
                   CUDNN_STATUS_BAD_PARAM_ATTRIBUTE_TYPE);
  assert_int_equal(cudnnBackendSetAttribute(t, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 2, &type), BAD);
  assert_int_equal(cudnnBackendSetAttribute(t, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type), BAD);
  assert_int_equal(cudnnBackendSetAttribute(NULL, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type),
                   CUDNN_STATUS_BAD_PARAM_NULL_POINTER);
  DNN_OK(cudnnBackendDestroyDescriptor(t));

  desc a = tensor(1, H, 4, 8, 16, false), b = tensor(2, H, 2, 16, 8, false), s = tensor(3, F, 4, 8, 8, true);
  desc e = tensor(4, F, 4, 8, 8, true), o = tensor(7, H, 4, 8, 16, false), three = tensor(8, H, 3, 16, 8, false);
  assert_int_equal(cudnnBackendSetAttribute(a, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type), BAD);
  assert_int_equal(cudnnBackendFinalize(a), BAD);
  desc bad[] = {product(a, a, s),
                product(a, three, s),
                product(a, b, o),
                pointwise(CUDNN_POINTWISE_MUL, a, NULL, a),
                pointwise(CUDNN_POINTWISE_MUL, s, a, e),
                pointwise(CUDNN_POINTWISE_BINARY_SELECT, s, e, s)};
  desc graph = make(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    assert_int_equal(cudnnBackendFinalize(bad[i]), BAD);
    assert_int_equal(
        cudnnBackendSetAttribute(graph, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, bad + i),
        CUDNN_STATUS_BAD_PARAM_NOT_FINALIZED);
    DNN_OK(cudnnBackendDestroyDescriptor(bad[i]));
  }
  assert_int_equal(cudnnBackendFinalize(graph), BAD);
  desc left[] = {graph, a, b, s, e, o, three};
  for (size_t i = 0; i < sizeof left / sizeof *left; i++) DNN_OK(cudnnBackendDestroyDescriptor(left[i]));
}

void libs_cudnn_graph_refusals(void **state) {
  (void)state;
  const cudnnDataType_t F = CUDNN_DATA_FLOAT, H = CUDNN_DATA_BFLOAT16;
  desc a = tensor(1, H, 4, 8, 16, false), b = tensor(2, H, 2, 16, 8, false), s = tensor(3, F, 4, 8, 8, true);
  desc p = tensor(5, H, 4, 8, 8, true), v = tensor(6, H, 2, 8, 16, false), o = tensor(7, H, 4, 8, 16, false);
  desc same = tensor(1, H, 2, 8, 16, false), lonely = tensor(9, F, 4, 8, 8, true);
  desc qk = product(a, b, s), e = pointwise(CUDNN_POINTWISE_EXP, s, NULL, p), pv = product(p, v, o);
  desc twice = product(p, same, o), unmade = pointwise(CUDNN_POINTWISE_EXP, lonely, NULL, p);
  desc all[] = {qk, e, pv, twice, unmade}, graph, plan;
  for (int i = 0; i < 5; i++) DNN_OK(cudnnBackendFinalize(all[i]));
  assert_int_equal(graph_of(3, (desc[]){qk, e, pv}, &graph), CUDNN_STATUS_SUCCESS);
  DNN_OK(cudnnBackendDestroyDescriptor(graph));
  assert_int_equal(graph_of(3, (desc[]){pv, qk, e}, &graph), CUDNN_STATUS_SUCCESS); /* any order */
  assert_int_equal(graph_of(4, (desc[]){qk, e, pv, qk}, NULL), CUDNN_STATUS_BAD_PARAM);
  assert_int_equal(graph_of(3, (desc[]){qk, e, twice}, NULL), CUDNN_STATUS_BAD_PARAM_DUPLICATED_ENTRIES);
  assert_int_equal(graph_of(2, (desc[]){unmade, pv}, NULL), CUDNN_STATUS_NOT_SUPPORTED_GRAPH_PATTERN);
  assert_int_equal(graph_of(2, (desc[]){qk, e}, NULL), CUDNN_STATUS_NOT_SUPPORTED_GRAPH_PATTERN);

  /* at the launch: a missing pointer, a pointer of 8 bytes' alignment, a value that lies on the device */
  cudnnHandle_t handle;
  DNN_OK(cudnnCreate(&handle));
  DNN_OK(plan_of(handle, graph, &plan));
  char *memory = libs_device(1 << 20), *workspace = libs_device(1 << 20);
  CUDA_OK(cudaMemset(memory, 0, 1 << 20));
  binding full = {.n = 0};
  const int64_t uids[] = {1, 2, 6, 7};
  for (int i = 0; i < 4; i++) bind(&full, uids[i], memory + 65536 * i);
  DNN_OK(execute(handle, plan, &full, workspace));
  binding wrong = full;
  wrong.n = 3;
  assert_int_equal(execute(handle, plan, &wrong, workspace), CUDNN_STATUS_BAD_PARAM);
  wrong = full;
  wrong.ptr[1] = memory + 65536 + 8;
  assert_int_equal(execute(handle, plan, &wrong, workspace), CUDNN_STATUS_BAD_PARAM_MISALIGNED_POINTER);
  assert_int_equal(execute(handle, plan, &full, NULL), CUDNN_STATUS_BAD_PARAM_NULL_POINTER);
  CUDA_OK(cudaDeviceSynchronize());
  CUDA_OK(cudaFree(memory));
  CUDA_OK(cudaFree(workspace));

  /* head sizes that no engine takes */
  esp_sdpa_shape odd = {.b = 1,
                        .s = 32,
                        .heads = 2,
                        .kv_heads = 2,
                        .head_dim = 20,
                        .ld_q = 40,
                        .ld_k = 40,
                        .ld_v = 40,
                        .ld_o = 40,
                        .ld_stats = 2,
                        .causal = 1};
  esp_sdpa_graph g;
  desc none;
  assert_int_equal(esp_sdpa_build(&dnn, &odd, handle, &g), ESP_OK);
  assert_int_equal(plan_of(handle, g.opgraph, &none), CUDNN_STATUS_NOT_SUPPORTED_SHAPE);
  esp_sdpa_graph_free(&dnn, &g);
  desc left[] = {none, plan, graph, a, b, s, p, v, o, same, lonely, qk, e, pv, twice, unmade};
  for (size_t i = 0; i < sizeof left / sizeof *left; i++) DNN_OK(cudnnBackendDestroyDescriptor(left[i]));
  DNN_OK(cudnnDestroy(handle));
}
