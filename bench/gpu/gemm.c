/* gemm.c: speed of a backend's matrix products: large squares, which say what the device can do at most, and every
 * product of a LoRA step of the 8B Llama shape (hidden 4096, ffn 14336, 32 heads of 128 and 8 of keys, vocabulary
 * 128256; 8192 tokens, rank 16), the adapters' thin ones included.
 *
 *   bench_cuda_gemm [--device cuda|cuda:N|cpu] [--small]      one line of JSON per product; peer_ops.py runs the same
 * in torch */
#include "timing.h"

typedef enum product { LINEAR, LINEAR_DX, MATMUL } product;

typedef struct job {
  product kind;
  esp_wview w;
  esp_tensor y, x; /* of MATMUL: c and a */
  esp_tensor b;
  bool trans_a, trans_b;
  float beta;
} job;

static void issue(esp_backend *be, void *ctx) {
  job *j = ctx;
  esp_tensor none = {0};
  if (j->kind == LINEAR)
    be->ops->linear(be, j->y, j->x, &j->w, none, NULL, 0, j->beta);
  else if (j->kind == LINEAR_DX)
    be->ops->linear_dx(be, j->y, j->x, &j->w, NULL, 0, j->beta);
  else
    be->ops->matmul(be, j->y, j->x, j->trans_a, j->b, j->trans_b, 1.0f, j->beta);
}

/* The packed operand belongs to the measured backend; counting needs its size only, which is in the view. */
static void frozen(bench *b, const char *what, product kind, int64_t t, int64_t out, int64_t in, bool y_f32,
                   bool peak) {
  job j = {.kind = kind, .w = {.out = out, .in = in}};
  void *host = bench_random_host(out * in, ESP_BF16);
  esp_tensor stored = esp_tensor_2d(host, ESP_BF16, out, in);
  j.w.packed = b->be->ops->pack(b->be, &stored, 1, false, ESP_BF16);
  bench_check(b);
  free(host);
  bool dx = kind == LINEAR_DX;
  j.x = bench_tensor(b, ESP_BF16, t, dx ? out : in);
  j.y = bench_tensor(b, y_f32 ? ESP_F32 : ESP_BF16, t, dx ? in : out);
  char name[96], fields[160];
  snprintf(name, sizeof name, "%s %lldx%lldx%lld", what, (long long)t, (long long)(dx ? in : out),
           (long long)(dx ? out : in));
  snprintf(fields, sizeof fields, "\"op\": \"%s\", \"dims\": [%lld, %lld, %lld], \"f32\": %s",
           dx ? "linear_dx" : "linear", (long long)t, (long long)out, (long long)in, y_f32 ? "true" : "false");
  bench_report(b, name, peak, fields, issue, issue, &j);
  b->be->ops->pack_free(b->be, (void *)j.w.packed);
  bench_release(b, j.x);
  bench_release(b, j.y);
}

/* c [m, n] (+)= op(a) op(b) over k */
static void thin(bench *b, const char *what, int64_t m, int64_t n, int64_t k, bool trans_a, bool trans_b, bool grad,
                 float beta) {
  job j = {.kind = MATMUL, .trans_a = trans_a, .trans_b = trans_b, .beta = beta};
  j.x = trans_a ? bench_tensor(b, ESP_BF16, k, m) : bench_tensor(b, ESP_BF16, m, k);
  j.b = trans_b ? bench_tensor(b, ESP_BF16, n, k) : bench_tensor(b, ESP_BF16, k, n);
  j.y = bench_tensor(b, grad ? ESP_F32 : ESP_BF16, m, n);
  char name[96], fields[200];
  snprintf(name, sizeof name, "%s %lldx%lldx%lld", what, (long long)m, (long long)n, (long long)k);
  snprintf(fields, sizeof fields,
           "\"op\": \"matmul\", \"dims\": [%lld, %lld, %lld], \"trans_a\": %s, \"trans_b\": %s, \"f32\": %s, "
           "\"beta\": %g",
           (long long)m, (long long)n, (long long)k, trans_a ? "true" : "false", trans_b ? "true" : "false",
           grad ? "true" : "false", (double)beta);
  bench_report(b, name, false, fields, issue, issue, &j);
  bench_release(b, j.x);
  bench_release(b, j.b);
  bench_release(b, j.y);
}

int main(int argc, char **argv) {
  bench b;
  int rc = bench_open(&b, argc, argv);
  if (rc) return rc;
  int64_t s = b.small ? 32 : 1; /* the small form divides every size */
  int64_t t = 8192 / s, h = 4096 / s, ffn = 14336 / s, qkv = 6144 / s, vocab = 128256 / s, r = 16, chunk = 2048 / s;
  for (int64_t n = 4096; n <= 16384; n *= 2) frozen(&b, "square", LINEAR, n / s, n / s, n / s, false, true);
  frozen(&b, "qkv", LINEAR, t, qkv, h, false, false);
  frozen(&b, "qkv dx", LINEAR_DX, t, qkv, h, false, false);
  frozen(&b, "o", LINEAR, t, h, h, false, false);
  frozen(&b, "o dx", LINEAR_DX, t, h, h, false, false);
  frozen(&b, "gate, up", LINEAR, t, 2 * ffn, h, false, false);
  frozen(&b, "gate, up dx", LINEAR_DX, t, 2 * ffn, h, false, false);
  frozen(&b, "down", LINEAR, t, h, ffn, false, false);
  frozen(&b, "down dx", LINEAR_DX, t, h, ffn, false, false);
  frozen(&b, "logits", LINEAR, chunk, vocab, h, true, false);
  frozen(&b, "logits dx", LINEAR_DX, chunk, vocab, h, false, false);
  thin(&b, "T = x A^T, q k v", t, 3 * r, h, false, true, false, 0);
  thin(&b, "T = h A^T, down", t, r, ffn, false, true, false, 0);
  thin(&b, "y += T B^T, o", t, h, r, false, true, false, 1);
  thin(&b, "y += T B^T, up", t, ffn, r, false, true, false, 1);
  thin(&b, "dT = dy B, o", t, r, h, false, false, false, 0);
  thin(&b, "dT = dy B, up", t, r, ffn, false, false, false, 0);
  thin(&b, "dB += dy^T T, up", ffn, r, t, true, false, true, 1);
  thin(&b, "dA += dT^T x, q k v", 3 * r, h, t, true, false, true, 1);
  thin(&b, "dA += dT^T h, down", r, ffn, t, true, false, true, 1);
  thin(&b, "dx += dT A, q k v", t, h, 3 * r, false, false, false, 1);
  bench_close(&b);
  return 0;
}
