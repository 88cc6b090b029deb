/* roofline.c: what a training step must cost at least. The step runs on the counting backend (no device, no weights
 * read) behind a table of wrappers: each operation's floating-point operations and bytes go to its class, and its floor
 * is the larger of operations over the rate of the matrix units and bytes over the bandwidth of memory, call by call.
 * LoRA on all linears.
 *
 *   bench_roofline MODEL_DIR TOKENS_OF_A_SEQUENCE SEQUENCES RANK TFLOPS TBPS        one JSON object
 *
 * The adapters' low-rank tails of a base product count as products of their own, which read and write the output once
 * more, as they do where the matrix library has no fused form. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/adapter.h"
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

static const esp_backend_ops *counted; /* the counting backend's own table */
static double flops[CLASSES], bytes[CLASSES], floors[CLASSES], flop_rate, byte_rate;
static long calls[CLASSES];
static double tails_flops; /* part of THIN that the counting backend was not asked about */
static int64_t vocabulary;

static void charge(cost_class c, double f, double b) {
  double by_flops = f / flop_rate, by_bytes = b / byte_rate;
  flops[c] += f;
  bytes[c] += b;
  floors[c] += by_flops > by_bytes ? by_flops : by_bytes;
  calls[c]++;
}

#define COUNTED(cls, call)                                                                                             \
  do {                                                                                                                 \
    esp_backend_stats before = be->stats;                                                                              \
    call;                                                                                                              \
    charge(cls, be->stats.flops - before.flops, be->stats.bytes - before.bytes);                                       \
  } while (0)

static void tails_apart(const esp_tail *tails, int n, esp_tensor y, bool dx) {
  double rows = (double)esp_tensor_rows(&y), each = (double)esp_dtype_size(y.dtype);
  for (int i = 0; i < n; i++) {
    double r = (double)esp_tensor_cols(&tails[i].x);
    double width = (double)(dx ? esp_tensor_cols(&tails[i].w) : esp_tensor_rows(&tails[i].w));
    tails_flops += 2 * rows * r * width;
    charge(THIN, 2 * rows * r * width, each * (rows * r + r * width + 2 * rows * width));
  }
}

static void linear(esp_backend *be, esp_tensor y, esp_tensor x, const esp_wview *w, esp_tensor bias,
                   const esp_tail *tails, int n_tails, float beta) {
  COUNTED(w->out == vocabulary ? HEAD : BASE, counted->linear(be, y, x, w, bias, NULL, 0, beta));
  tails_apart(tails, n_tails, y, false);
}
static void linear_dx(esp_backend *be, esp_tensor dx, esp_tensor dy, const esp_wview *w, const esp_tail *tails,
                      int n_tails, float beta) {
  COUNTED(w->out == vocabulary ? HEAD : BASE, counted->linear_dx(be, dx, dy, w, NULL, 0, beta));
  tails_apart(tails, n_tails, dx, true);
}
static void matmul(esp_backend *be, esp_tensor c, esp_tensor a, bool ta, esp_tensor b, bool tb, float alpha,
                   float beta) {
  COUNTED(THIN, counted->matmul(be, c, a, ta, b, tb, alpha, beta));
}
static void attn(esp_backend *be, const esp_attn_args *a) {
  COUNTED(ATTN, counted->attn(be, a));
}
static void attn_bwd(esp_backend *be, const esp_attn_args *a) {
  COUNTED(ATTN_BWD, counted->attn_bwd(be, a));
}
static void embed(esp_backend *be, esp_tensor y, esp_tensor table, const int32_t *ids, float scale) {
  COUNTED(ELEMENTWISE, counted->embed(be, y, table, ids, scale));
}
static void norm(esp_backend *be, const esp_norm_args *a) {
  COUNTED(ELEMENTWISE, counted->norm(be, a));
}
static void norm_bwd(esp_backend *be, const esp_norm_bwd_args *a) {
  COUNTED(ELEMENTWISE, counted->norm_bwd(be, a));
}
static void rope(esp_backend *be, const esp_rope_args *a) {
  COUNTED(ELEMENTWISE, counted->rope(be, a));
}
static void glu(esp_backend *be, esp_tensor h, esp_tensor gu, esp_act act) {
  COUNTED(ELEMENTWISE, counted->glu(be, h, gu, act));
}
static void glu_bwd(esp_backend *be, esp_tensor dgu, esp_tensor dh, esp_tensor gu, esp_act act) {
  COUNTED(ELEMENTWISE, counted->glu_bwd(be, dgu, dh, gu, act));
}
static void axpby(esp_backend *be, esp_tensor y, float a, esp_tensor x, float b) {
  COUNTED(ELEMENTWISE, counted->axpby(be, y, a, x, b));
}
static void cross_entropy(esp_backend *be, const esp_ce_args *a) {
  COUNTED(LOSS, counted->cross_entropy(be, a));
}
static void gather_rows(esp_backend *be, esp_tensor y, esp_tensor x, const int32_t *rows) {
  COUNTED(LOSS, counted->gather_rows(be, y, x, rows));
}
static void scatter_rows(esp_backend *be, esp_tensor y, esp_tensor x, const int32_t *rows) {
  COUNTED(LOSS, counted->scatter_rows(be, y, x, rows));
}
static void zero(esp_backend *be, void *dst, int64_t n) {
  COUNTED(OPTIMIZER, counted->zero(be, dst, n));
}
static void dot(esp_backend *be, double *out, const float *a, const float *b, int64_t n) {
  COUNTED(OPTIMIZER, counted->dot(be, out, a, b, n));
}
static void update(esp_backend *be, const esp_update_args *a) {
  COUNTED(OPTIMIZER, counted->update(be, a));
}

static void wrap(esp_backend *be, esp_backend_ops *table) {
  counted = be->ops;
  *table = *be->ops;
  table->linear = linear, table->linear_dx = linear_dx, table->matmul = matmul;
  table->attn = attn, table->attn_bwd = attn_bwd;
  table->embed = embed, table->norm = norm, table->norm_bwd = norm_bwd, table->rope = rope;
  table->glu = glu, table->glu_bwd = glu_bwd, table->axpby = axpby;
  table->cross_entropy = cross_entropy, table->gather_rows = gather_rows, table->scatter_rows = scatter_rows;
  table->zero = zero, table->dot = dot, table->update = update;
  be->ops = table;
}

/* A whole optimizer step of one micro-batch: gradients zeroed, forward, loss, backward, norm of the gradient, update.
 */
static esp_status step(esp_model *m, esp_adapter *a, esp_optim *o, esp_stack *stack, int64_t seq, int64_t n) {
  int64_t tokens = seq * n;
  esp_status st = ESP_OK;
  int32_t *ids = calloc(3 * (size_t)tokens, sizeof *ids), *cu = calloc((size_t)n + 1, sizeof *cu);
  float *weights = calloc((size_t)tokens, sizeof *weights);
  if (!ids || !cu || !weights) ESP_GOTO(esp_fail_oom("a batch", 16 * (size_t)tokens));
  for (int64_t t = 0; t < tokens; t++) {
    ids[2 * tokens + t] = (int32_t)(t % seq);
    weights[t] = t % seq < seq - 1; /* the last token of a row predicts nothing */
  }
  for (int64_t i = 0; i <= n; i++) cu[i] = (int32_t)(i * seq);
  esp_batch b = {tokens, ids, ids + tokens, ids + 2 * tokens, weights, cu, (int)n};
  esp_loss_out loss;
  esp_params_zero_grad(a->params);
  ESP_GOTO(esp_model_step(m, stack, &b, ESP_CKPT_OFF, true, 1.0f, 0, 0, &loss, NULL));
  esp_optim_grad_norm(o);
  esp_optim_step(o, 1e-4, 1.0f);
  ESP_GOTO(esp_backend_sync(esp_model_backend(m)));
out:
  free(ids);
  free(cu);
  free(weights);
  return st;
}

int main(int argc, char **argv) {
  if (argc != 7) {
    fprintf(stderr, "usage: %s MODEL_DIR TOKENS_OF_A_SEQUENCE SEQUENCES RANK TFLOPS TBPS\n", argv[0]);
    return 2;
  }
  esp_status st = ESP_OK;
  esp_backend *be = NULL;
  esp_model *m = NULL;
  esp_adapter *a = NULL;
  esp_optim *o = NULL;
  esp_stack stack = {0};
  bool has_stack = false;
  esp_backend_ops table;
  int64_t seq = atoll(argv[2]), n = atoll(argv[3]);
  esp_model_options opt = {.compute = ESP_BF16, .random_init = true, .seed = 1};
  const char *const all[] = {"all-linear"};
  esp_adapter_cfg cfg = {.type = "lora", .r = atoll(argv[4]), .alpha = 32, .init = "default", .bias = "none"};
  cfg.target = all, cfg.n_target = 1;
  esp_optim_cfg adamw = {.name = "adamw", .lr = 1e-4, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .max_grad_norm = 1};
  flop_rate = atof(argv[5]) * 1e12;
  byte_rate = atof(argv[6]) * 1e12;
  ESP_GOTO(esp_backend_create("count:cuda", &be));
  ESP_GOTO(esp_model_open(argv[1], be, &opt, &m));
  vocabulary = esp_model_describe(m)->vocab;
  ESP_GOTO(esp_adapter_create(m, &cfg, "default", true, &a));
  ESP_GOTO(esp_adapters_activate(m, &a, 1));
  ESP_GOTO(esp_model_load_weights(m));
  ESP_GOTO(esp_optim_create(&adamw, a->params, &o));
  ESP_GOTO(esp_stack_init(&stack, be, 0));
  has_stack = true;
  ESP_GOTO(step(m, a, o, &stack, seq, n)); /* buffers grow and are cleared in the first one */
  esp_backend_stats before = be->stats;
  wrap(be, &table);
  ESP_GOTO(step(m, a, o, &stack, seq, n));
  double all_flops = 0;
  printf("{\"tokens\": %lld, \"trainable\": %lld, \"stack_bytes\": %lld, \"classes\": {", (long long)(seq * n),
         (long long)a->params->total, (long long)stack.high);
  for (int c = 0; c < CLASSES; c++) {
    all_flops += flops[c];
    printf("%s\"%s\": {\"flops\": %.6g, \"bytes\": %.6g, \"floor_s\": %.6g, \"calls\": %ld}", c ? ", " : "",
           class_names[c], flops[c], bytes[c], floors[c], calls[c]);
  }
  printf("}, \"flops\": %.6g}\n", all_flops);
  double missed = be->stats.flops - before.flops - (all_flops - tails_flops);
  if (fabs(missed) > 1e-9 * all_flops)
    ESP_GOTO(esp_fail(ESP_ERR_INTERNAL, "%.6g operations of a step are in no class", missed));
out:
  if (st != ESP_OK) fprintf(stderr, "error: %s\n", esp_error_message());
  if (be && counted) be->ops = counted;
  if (has_stack) esp_stack_deinit(&stack);
  esp_optim_destroy(o);
  esp_adapter_destroy(a);
  esp_model_close(m);
  esp_backend_destroy(be);
  return st == ESP_OK ? 0 : 1;
}
