/* step.c: where a training step's time must go and, on a device, where it goes. The engine's own step (LoRA on all
 * linears, AdamW, nothing recomputed) runs on the counting backend behind a table of wrappers: each operation's
 * floating-point operations and bytes go to its class, and its floor is the larger of operations over the rate of the
 * matrix units and bytes over the bandwidth of memory, call by call. With DEVICE the same step then runs there: first
 * as it is, then with a wait around every operation, whose time is set beside its floor.
 *
 *   bench_step MODEL_DIR TOKENS_OF_A_SEQUENCE SEQUENCES RANK TFLOPS TBPS [DEVICE]        one JSON object
 *
 * MODEL_DIR needs config.json only; without model.safetensors the weights are random. The adapters' low-rank tails of a
 * base product have a floor of their own, which reads and writes the output once more, as it is where the matrix
 * library has no fused form; their time on a device is in the base product's. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "adapters/adapter.h"
#include "io/file.h"
#include "optim/optim.h"

typedef enum cost_class {
  BASE,        /* frozen matrices of the blocks, forward and gradient of the input */
  HEAD,        /* the output head's products */
  THIN,        /* the adapters' products */
  ATTN,        /* attention forward */
  ATTN_BWD,    /* attention backward */
  ELEMENTWISE, /* norms, rotations, gated activations, embedding */
  LOSS,        /* cross-entropy, choice of rows */
  OPTIMIZER,   /* gradients zeroed and clipped, update */
  CLASSES
} cost_class;
static const char *const class_names[CLASSES] = {"base_matmul",   "head_matmul", "thin_matmul", "attention_fwd",
                                                 "attention_bwd", "elementwise", "loss",        "optimizer"};

/* All operations of one kind and size. */
typedef struct kind {
  const char *op;
  cost_class cls;
  int64_t dim[3];
  int tails;
  long calls;
  double flops, bytes, floor, seconds; /* sums; those of tails included */
} kind;
enum { KINDS = 512, TIMED_STEPS = 5, WARM_STEPS = 3 };

static kind kinds[KINDS];
static int n_kinds;
static double class_flops[CLASSES], class_bytes[CLASSES], class_floor[CLASSES];
static long class_calls[CLASSES];
static double tails_flops; /* of THIN, which the counting backend was not asked about */
static double flop_rate, byte_rate;
static int64_t vocabulary;
static const esp_backend_ops *own; /* the wrapped backend's table */
static bool timing;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static kind *kind_of(const char *op, cost_class cls, int64_t a, int64_t b, int64_t c, int tails) {
  for (int i = 0; i < n_kinds; i++) {
    kind *k = &kinds[i];
    if (!strcmp(k->op, op) && k->cls == cls && k->dim[0] == a && k->dim[1] == b && k->dim[2] == c && k->tails == tails)
      return k;
  }
  if (n_kinds == KINDS) {
    fprintf(stderr, "error: more than %d kinds of operations\n", KINDS);
    exit(1);
  }
  kind *k = &kinds[n_kinds++];
  *k = (kind){.op = op, .cls = cls, .dim = {a, b, c}, .tails = tails};
  return k;
}

static void charge(kind *k, cost_class cls, double flops, double bytes) {
  double floor = flops / flop_rate > bytes / byte_rate ? flops / flop_rate : bytes / byte_rate;
  class_flops[cls] += flops, class_bytes[cls] += bytes, class_floor[cls] += floor;
  class_calls[cls]++;
  k->flops += flops, k->bytes += bytes, k->floor += floor;
}

/* Around an operation: counts it, or waits before and after it. */
typedef struct around {
  esp_backend_stats before;
  double begin;
} around;
static around enter(esp_backend *be) {
  around a = {be->stats, 0};
  if (timing) {
    esp_backend_sync(be);
    a.begin = now();
  }
  return a;
}
static void leave(esp_backend *be, around a, kind *k) {
  if (timing) {
    esp_backend_sync(be);
    k->seconds += now() - a.begin;
    return;
  }
  k->calls++;
  charge(k, k->cls, be->stats.flops - a.before.flops, be->stats.bytes - a.before.bytes);
}
#define WRAPPED(op, cls, a, b, c, tails, call)                                                                         \
  do {                                                                                                                 \
    around around_ = enter(be);                                                                                        \
    call;                                                                                                              \
    leave(be, around_, kind_of(op, cls, a, b, c, tails));                                                              \
  } while (0)
#define WRAPPED_2D(op, cls, t, call) WRAPPED(op, cls, esp_tensor_rows(&(t)), esp_tensor_cols(&(t)), 0, 0, call)

static void tails_apart(kind *k, const esp_tail *tails, int n, esp_tensor y, bool dx) {
  double rows = (double)esp_tensor_rows(&y), each = (double)esp_dtype_size(y.dtype);
  for (int i = 0; i < n && !timing; i++) {
    double r = (double)esp_tensor_cols(&tails[i].x);
    double width = (double)(dx ? esp_tensor_cols(&tails[i].w) : esp_tensor_rows(&tails[i].w));
    tails_flops += 2 * rows * r * width;
    charge(k, THIN, 2 * rows * r * width, each * (rows * r + r * width + 2 * rows * width));
  }
}

static void linear(esp_backend *be, esp_tensor y, esp_tensor x, const esp_wview *w, esp_tensor bias,
                   const esp_tail *tails, int n_tails, float beta) {
  cost_class cls = w->out == vocabulary ? HEAD : BASE;
  int issued = timing ? n_tails : 0;
  WRAPPED("linear", cls, esp_tensor_rows(&x), w->out, w->in, n_tails,
          own->linear(be, y, x, w, bias, tails, issued, beta));
  tails_apart(kind_of("linear", cls, esp_tensor_rows(&x), w->out, w->in, n_tails), tails, n_tails, y, false);
}
static void linear_dx(esp_backend *be, esp_tensor dx, esp_tensor dy, const esp_wview *w, const esp_tail *tails,
                      int n_tails, float beta) {
  cost_class cls = w->out == vocabulary ? HEAD : BASE;
  int issued = timing ? n_tails : 0;
  WRAPPED("linear_dx", cls, esp_tensor_rows(&dy), w->out, w->in, n_tails,
          own->linear_dx(be, dx, dy, w, tails, issued, beta));
  tails_apart(kind_of("linear_dx", cls, esp_tensor_rows(&dy), w->out, w->in, n_tails), tails, n_tails, dx, true);
}
static void matmul(esp_backend *be, esp_tensor c, esp_tensor a, bool ta, esp_tensor b, bool tb, float alpha,
                   float beta) {
  WRAPPED("matmul", THIN, esp_tensor_rows(&c), esp_tensor_cols(&c), ta ? esp_tensor_rows(&a) : esp_tensor_cols(&a), 0,
          own->matmul(be, c, a, ta, b, tb, alpha, beta));
}
static void attn(esp_backend *be, const esp_attn_args *a) {
  WRAPPED_2D("attn", ATTN, a->q, own->attn(be, a));
}
static void attn_bwd(esp_backend *be, const esp_attn_args *a) {
  WRAPPED_2D("attn_bwd", ATTN_BWD, a->q, own->attn_bwd(be, a));
}
static void embed(esp_backend *be, esp_tensor y, esp_tensor table, const int32_t *ids, float scale) {
  WRAPPED_2D("embed", ELEMENTWISE, y, own->embed(be, y, table, ids, scale));
}
static void norm(esp_backend *be, const esp_norm_args *a) {
  WRAPPED_2D(a->residual.data ? "norm of a sum" : "norm", ELEMENTWISE, a->x, own->norm(be, a));
}
static void norm_bwd(esp_backend *be, const esp_norm_bwd_args *a) {
  WRAPPED_2D("norm_bwd", ELEMENTWISE, a->r, own->norm_bwd(be, a));
}
static void rope(esp_backend *be, const esp_rope_args *a) {
  WRAPPED_2D("rope", ELEMENTWISE, a->x, own->rope(be, a));
}
static void glu(esp_backend *be, esp_tensor h, esp_tensor gu, esp_act act) {
  WRAPPED_2D("glu", ELEMENTWISE, h, own->glu(be, h, gu, act));
}
static void glu_bwd(esp_backend *be, esp_tensor dgu, esp_tensor dh, esp_tensor gu, esp_act act) {
  WRAPPED_2D("glu_bwd", ELEMENTWISE, dh, own->glu_bwd(be, dgu, dh, gu, act));
}
static void axpby(esp_backend *be, esp_tensor y, float a, esp_tensor x, float b) {
  WRAPPED_2D("axpby", ELEMENTWISE, y, own->axpby(be, y, a, x, b));
}
static void cross_entropy(esp_backend *be, const esp_ce_args *a) {
  WRAPPED_2D("cross_entropy", LOSS, a->logits, own->cross_entropy(be, a));
}
static void gather_rows(esp_backend *be, esp_tensor y, esp_tensor x, const int32_t *rows) {
  WRAPPED_2D("gather_rows", LOSS, y, own->gather_rows(be, y, x, rows));
}
static void scatter_rows(esp_backend *be, esp_tensor y, esp_tensor x, const int32_t *rows) {
  WRAPPED_2D("scatter_rows", LOSS, x, own->scatter_rows(be, y, x, rows));
}
static void zero(esp_backend *be, void *dst, int64_t n) {
  WRAPPED("zero", OPTIMIZER, n, 0, 0, 0, own->zero(be, dst, n));
}
static void dot(esp_backend *be, double *out, const float *a, const float *b, int64_t n) {
  WRAPPED("dot", OPTIMIZER, n, 0, 0, 0, own->dot(be, out, a, b, n));
}
static void update(esp_backend *be, const esp_update_args *a) {
  WRAPPED("update", OPTIMIZER, a->n, 0, 0, 0, own->update(be, a));
}

static void wrap(esp_backend *be, esp_backend_ops *table) {
  own = be->ops;
  *table = *be->ops;
  table->linear = linear, table->linear_dx = linear_dx, table->matmul = matmul;
  table->attn = attn, table->attn_bwd = attn_bwd;
  table->embed = embed, table->norm = norm, table->norm_bwd = norm_bwd, table->rope = rope;
  table->glu = glu, table->glu_bwd = glu_bwd, table->axpby = axpby;
  table->cross_entropy = cross_entropy, table->gather_rows = gather_rows, table->scatter_rows = scatter_rows;
  table->zero = zero, table->dot = dot, table->update = update;
  table->piece_begin = NULL, table->piece_end = NULL; /* a replayed piece would hide its operations */
  be->ops = table;
}

/* ---- what a step runs on ---- */
typedef struct engine {
  esp_backend *be;
  esp_model *m;
  esp_adapter *a;
  esp_optim *o;
  esp_stack stack;
  bool has_stack;
  const esp_backend_ops *plain; /* the table before it was wrapped */
} engine;

static esp_status open_engine(engine *e, const char *backend, const char *dir, int64_t rank, int64_t stack_bytes,
                              int64_t scratch) {
  char file[4096];
  snprintf(file, sizeof file, "%s/model.safetensors", dir);
  esp_model_options opt = {.compute = ESP_BF16, .random_init = !esp_file_exists(file), .seed = 1};
  const char *const all[] = {"all-linear"};
  esp_adapter_cfg cfg = {.type = "lora", .r = rank, .alpha = 32, .init = "default", .bias = "none"};
  esp_optim_cfg adamw = {.name = "adamw", .lr = 1e-4, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .max_grad_norm = 1};
  cfg.target = all, cfg.n_target = 1;
  ESP_TRY(esp_backend_create(backend, &e->be));
  e->plain = e->be->ops;
  ESP_TRY(esp_model_open(dir, e->be, &opt, &e->m));
  ESP_TRY(esp_adapter_create(e->m, &cfg, "default", true, &e->a));
  ESP_TRY(esp_adapters_activate(e->m, &e->a, 1));
  ESP_TRY(esp_model_load_weights(e->m));
  ESP_TRY(esp_optim_create(&adamw, e->a->params, &e->o));
  ESP_TRY(esp_stack_init(&e->stack, e->be, stack_bytes));
  e->has_stack = true;
  if (scratch && e->be->ops->scratch) e->be->ops->scratch(e->be, scratch);
  return esp_backend_sync(e->be);
}
static void close_engine(engine *e) {
  if (!e->be) return;
  e->be->ops = e->plain;
  if (e->has_stack) esp_stack_deinit(&e->stack);
  esp_optim_destroy(e->o);
  esp_adapter_destroy(e->a);
  esp_model_close(e->m);
  esp_backend_destroy(e->be);
}

typedef struct rows {
  int64_t seq, n;
  int32_t *ids, *cu;
  float *weights;
} rows;

static esp_status make_rows(rows *r, int64_t vocab) {
  int64_t tokens = r->seq * r->n;
  r->ids = calloc(3 * (size_t)tokens, sizeof *r->ids);
  r->cu = calloc((size_t)r->n + 1, sizeof *r->cu);
  r->weights = calloc((size_t)tokens, sizeof *r->weights);
  if (!r->ids || !r->cu || !r->weights) return esp_fail_oom("a batch", 16 * (size_t)tokens);
  for (int64_t t = 0; t < tokens; t++) {
    r->ids[t] = (int32_t)((uint64_t)(t + 1) * 2654435761u % (uint64_t)vocab);
    r->ids[tokens + t] = (int32_t)((uint64_t)(t + 2) * 2654435761u % (uint64_t)vocab);
    r->ids[2 * tokens + t] = (int32_t)(t % r->seq);
    r->weights[t] = t % r->seq < r->seq - 1; /* the last token of a row predicts nothing */
  }
  for (int64_t i = 0; i <= r->n; i++) r->cu[i] = (int32_t)(i * r->seq);
  return ESP_OK;
}

/* A whole optimizer step of one micro-batch: gradients zeroed, forward, loss, backward, norm of the gradient, update.
 */
static esp_status step(engine *e, const rows *r) {
  int64_t tokens = r->seq * r->n;
  esp_batch b = {tokens, r->ids, r->ids + tokens, r->ids + 2 * tokens, r->weights, r->cu, (int)r->n};
  esp_loss_out loss;
  esp_params_zero_grad(e->a->params);
  ESP_TRY(esp_model_step(e->m, &e->stack, &b, ESP_CKPT_OFF, true, 1.0f / (float)tokens, 0, 0, &loss, NULL));
  esp_optim_grad_norm(e->o);
  esp_optim_step(e->o, 1e-4, 1.0f);
  return esp_backend_sync(e->be);
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* As it is (seconds of a step), then with a wait around every operation. */
static esp_status time_steps(engine *e, const rows *r, double *seconds) {
  double t[TIMED_STEPS];
  esp_backend_ops table;
  for (int i = 0; i < WARM_STEPS; i++) ESP_TRY(step(e, r));
  for (int i = 0; i < TIMED_STEPS; i++) {
    double begin = now();
    ESP_TRY(step(e, r));
    t[i] = now() - begin;
  }
  qsort(t, TIMED_STEPS, sizeof *t, by_value);
  *seconds = t[TIMED_STEPS / 2];
  timing = true;
  wrap(e->be, &table);
  for (int i = 0; i < TIMED_STEPS; i++) {
    esp_status st = step(e, r);
    if (st != ESP_OK) e->be->ops = e->plain;
    if (st != ESP_OK) return st;
    for (int k = 0; k < n_kinds && i == 0; k++) kinds[k].seconds = 0; /* the first one chooses algorithms */
  }
  e->be->ops = e->plain;
  for (int k = 0; k < n_kinds; k++) kinds[k].seconds /= TIMED_STEPS - 1;
  return ESP_OK;
}

static void print(const engine *counted, const rows *r, double seconds) {
  double flops = 0;
  printf("{\"tokens\": %lld, \"trainable\": %lld, \"stack_bytes\": %lld, \"classes\": {", (long long)(r->seq * r->n),
         (long long)counted->a->params->total, (long long)counted->stack.high);
  for (int c = 0; c < CLASSES; c++) {
    double measured = 0;
    for (int k = 0; k < n_kinds; k++)
      if (kinds[k].cls == (cost_class)c) measured += kinds[k].seconds;
    flops += class_flops[c];
    printf("%s\"%s\": {\"flops\": %.6g, \"bytes\": %.6g, \"floor_s\": %.6g, \"calls\": %ld, \"seconds\": %.6g}",
           c ? ", " : "", class_names[c], class_flops[c], class_bytes[c], class_floor[c], class_calls[c], measured);
  }
  printf("}, \"flops\": %.6g, \"step_seconds\": %.6g, \"operations\": [", flops, seconds);
  for (int i = 0; i < n_kinds; i++) {
    const kind *k = &kinds[i];
    printf("%s{\"op\": \"%s\", \"class\": \"%s\", \"dims\": [%lld, %lld, %lld], \"tails\": %d, \"calls\": %ld, "
           "\"flops\": %.6g, \"bytes\": %.6g, \"floor_s\": %.6g, \"seconds\": %.6g}",
           i ? ", " : "", k->op, class_names[k->cls], (long long)k->dim[0], (long long)k->dim[1], (long long)k->dim[2],
           k->tails, k->calls, k->flops, k->bytes, k->floor, k->seconds);
  }
  puts("]}");
}

int main(int argc, char **argv) {
  if (argc != 7 && argc != 8) {
    fprintf(stderr, "usage: %s MODEL_DIR TOKENS_OF_A_SEQUENCE SEQUENCES RANK TFLOPS TBPS [DEVICE]\n", argv[0]);
    return 2;
  }
  esp_status st = ESP_OK;
  engine counted = {0}, device = {0};
  esp_backend_ops table;
  double seconds = 0, missed = 0;
  rows r = {.seq = atoll(argv[2]), .n = atoll(argv[3])};
  int64_t rank = atoll(argv[4]), scratch = 0;
  flop_rate = atof(argv[5]) * 1e12;
  byte_rate = atof(argv[6]) * 1e12;
  bool on_cpu = argc == 8 && !strcmp(argv[7], "cpu");
  ESP_GOTO(open_engine(&counted, on_cpu ? "count" : "count:cuda", argv[1], rank, 0, 0));
  vocabulary = esp_model_describe(counted.m)->vocab;
  ESP_GOTO(make_rows(&r, vocabulary));
  ESP_GOTO(step(&counted, &r)); /* buffers grow and are cleared in the first one */
  missed = counted.be->stats.flops;
  wrap(counted.be, &table);
  ESP_GOTO(step(&counted, &r));
  missed = counted.be->stats.flops - missed + tails_flops;
  for (int c = 0; c < CLASSES; c++) missed -= class_flops[c];
  if (fabs(missed) > 1e-9 * counted.be->stats.flops)
    ESP_GOTO(esp_fail(ESP_ERR_INTERNAL, "%.6g operations of a step are in no class", missed));
  if (argc == 8) {
    if (counted.plain->scratch) scratch = counted.plain->scratch(counted.be, 0);
    ESP_GOTO(open_engine(&device, argv[7], argv[1], rank, counted.stack.high, scratch));
    ESP_GOTO(time_steps(&device, &r, &seconds));
  }
  print(&counted, &r, seconds);
out:
  if (st != ESP_OK) fprintf(stderr, "error: %s\n", esp_error_message());
  close_engine(&device);
  close_engine(&counted);
  free(r.ids);
  free(r.cu);
  free(r.weights);
  return st == ESP_OK ? 0 : 1;
}
