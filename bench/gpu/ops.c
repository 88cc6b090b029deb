/* ops.c: speed of a backend's other operations at the 8B Llama shape (hidden 4096, ffn 14336, 32 heads of 128 and 8 of
 * keys; two sequences of 4096 tokens), beside a plain copy, which says what memory can do at most.
 *
 *   bench_cuda_ops [--device cuda|cuda:N|cpu] [--small]       one line of JSON per operation; peer_ops.py runs the same
 *                                                             in torch */
#include "backend/optim_rules.h"
#include "timing.h"

typedef struct sizes {
  int64_t tokens, hidden, ffn, heads, kv, head_dim, vocab, chunk, copy, params;
} sizes;

typedef struct job {
  esp_tensor a, b, c, d;
  esp_norm_args norm;
  esp_norm_bwd_args norm_bwd;
  esp_rope_args rope;
  esp_attn_args attn;
  esp_ce_args ce;
  esp_update_args update;
  const int32_t *ids;
  const uint64_t *draw;
} job;

static void copy(esp_backend *be, void *ctx) {
  job *j = ctx;
  be->ops->axpby(be, j->b, 1.0f, j->a, 0.0f);
}
static void norm(esp_backend *be, void *ctx) {
  be->ops->norm(be, &((job *)ctx)->norm);
}
static void norm_bwd(esp_backend *be, void *ctx) {
  be->ops->norm_bwd(be, &((job *)ctx)->norm_bwd);
}
static void rope(esp_backend *be, void *ctx) {
  be->ops->rope(be, &((job *)ctx)->rope);
}
static void glu(esp_backend *be, void *ctx) {
  job *j = ctx;
  be->ops->glu(be, j->b, j->a, ESP_ACT_SILU);
}
static void glu_bwd(esp_backend *be, void *ctx) {
  job *j = ctx;
  be->ops->glu_bwd(be, j->c, j->b, j->a, ESP_ACT_SILU);
}
static void attn(esp_backend *be, void *ctx) {
  be->ops->attn(be, &((job *)ctx)->attn);
}
static void attn_bwd(esp_backend *be, void *ctx) {
  be->ops->attn_bwd(be, &((job *)ctx)->attn);
}
static void cross_entropy(esp_backend *be, void *ctx) {
  be->ops->cross_entropy(be, &((job *)ctx)->ce);
}
static void embed(esp_backend *be, void *ctx) {
  job *j = ctx;
  be->ops->embed(be, j->b, j->a, j->ids, 1.0f);
}
static void dropout(esp_backend *be, void *ctx) {
  job *j = ctx;
  be->ops->dropout(be, j->b, j->a, 0.1f, 7, j->draw, 1, 0.0f);
}
static void update(esp_backend *be, void *ctx) {
  be->ops->update(be, &((job *)ctx)->update);
}

static void report(bench *b, const char *name, bool peak, bench_fn fn, job *j, const char *dims) {
  char fields[256];
  snprintf(fields, sizeof fields, "\"op\": \"%s\", \"dims\": [%s]", name, dims);
  bench_report(b, name, peak, fields, fn, fn, j);
}

static void *ints(bench *b, int64_t n, int64_t below) {
  int32_t *host = malloc((size_t)n * sizeof *host);
  void *p = b->be->ops->alloc(b->be, ESP_MEM_WORKSPACE, n * 4);
  if (!host || !p) exit(4);
  for (int64_t i = 0; i < n; i++) host[i] = (int32_t)esp_rng_below(3, 4, (uint64_t)i, (uint64_t)below);
  b->be->ops->upload(b->be, p, host, n * 4);
  bench_check(b);
  free(host);
  return p;
}

static void rows(bench *b, const sizes *z) { /* norms, rotations, activations, the embedding */
  char dims[128];
  job j = {0};
  esp_tensor x = bench_tensor(b, ESP_BF16, z->tokens, z->hidden), y = bench_tensor(b, ESP_BF16, z->tokens, z->hidden);
  esp_tensor r = bench_tensor(b, ESP_BF16, z->tokens, z->hidden), w = bench_tensor(b, ESP_F32, 1, z->hidden);
  esp_tensor rstd = bench_tensor(b, ESP_F32, 1, z->tokens);
  w = esp_tensor_1d(w.data, ESP_F32, z->hidden);
  snprintf(dims, sizeof dims, "%lld, %lld", (long long)z->tokens, (long long)z->hidden);
  j.norm = (esp_norm_args){ESP_NORM_RMS, x, r, x, y, w, {0}, 1e-5f, 0, rstd.data, NULL};
  report(b, "norm", false, norm, &j, dims);
  j.norm_bwd = (esp_norm_bwd_args){.r = r, .dy = y, .dx = x, .w = w, .rstd = rstd.data, .accumulate = true};
  report(b, "norm_bwd", false, norm_bwd, &j, dims);

  int64_t half = z->head_dim / 2, seq = z->tokens / 2;
  esp_tensor cos_t = bench_tensor(b, ESP_F32, seq, half), sin_t = bench_tensor(b, ESP_F32, seq, half);
  int32_t *positions = ints(b, z->tokens, seq);
  j.rope =
      (esp_rope_args){x, cos_t.data, sin_t.data, positions, (int)z->heads, (int)z->head_dim, (int)z->head_dim, false};
  snprintf(dims, sizeof dims, "%lld, %lld, %lld", (long long)z->tokens, (long long)z->heads, (long long)z->head_dim);
  report(b, "rope", false, rope, &j, dims);

  esp_tensor table = bench_tensor(b, ESP_BF16, z->vocab, z->hidden);
  j.a = table, j.b = y, j.ids = ints(b, z->tokens, z->vocab);
  snprintf(dims, sizeof dims, "%lld, %lld, %lld", (long long)z->tokens, (long long)z->hidden, (long long)z->vocab);
  report(b, "embed", false, embed, &j, dims);
  j.a = x, j.draw = b->be->ops->alloc(b->be, ESP_MEM_WORKSPACE, 8);
  snprintf(dims, sizeof dims, "%lld, %lld", (long long)z->tokens, (long long)z->hidden);
  report(b, "dropout", false, dropout, &j, dims);
  b->be->ops->free(b->be, (void *)j.draw);
  b->be->ops->free(b->be, (void *)j.ids);
  b->be->ops->free(b->be, positions);
  esp_tensor all[] = {x, y, r, rstd, w, cos_t, sin_t, table};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) bench_release(b, all[i]);

  j.a = bench_tensor(b, ESP_BF16, z->tokens, 2 * z->ffn);
  j.b = bench_tensor(b, ESP_BF16, z->tokens, z->ffn);
  j.c = bench_tensor(b, ESP_BF16, z->tokens, 2 * z->ffn);
  snprintf(dims, sizeof dims, "%lld, %lld", (long long)z->tokens, (long long)z->ffn);
  report(b, "glu", false, glu, &j, dims);
  report(b, "glu_bwd", false, glu_bwd, &j, dims);
  bench_release(b, j.a);
  bench_release(b, j.b);
  bench_release(b, j.c);
}

static void attention(bench *b, const sizes *z) {
  int64_t q = z->heads * z->head_dim, kv = z->kv * z->head_dim;
  int32_t cu[3] = {0, (int32_t)(z->tokens / 2), (int32_t)z->tokens};
  job j = {0};
  esp_tensor qkv = bench_tensor(b, ESP_BF16, z->tokens, q + 2 * kv),
             d = bench_tensor(b, ESP_BF16, z->tokens, q + 2 * kv);
  esp_tensor o = bench_tensor(b, ESP_BF16, z->tokens, q), d_o = bench_tensor(b, ESP_BF16, z->tokens, q);
  esp_tensor lse = bench_tensor(b, ESP_F32, z->heads, z->tokens);
  j.attn = (esp_attn_args){.q = esp_tensor_cols_view(&qkv, 0, q),
                           .k = esp_tensor_cols_view(&qkv, q, kv),
                           .v = esp_tensor_cols_view(&qkv, q + kv, kv),
                           .o = o,
                           .lse = lse.data,
                           .cu_seqlens = cu,
                           .n_seqs = 2,
                           .heads = (int)z->heads,
                           .kv_heads = (int)z->kv,
                           .head_dim = (int)z->head_dim,
                           .scale = 1.0f / sqrtf((float)z->head_dim),
                           .causal = true,
                           .d_o = d_o,
                           .d_q = esp_tensor_cols_view(&d, 0, q),
                           .d_k = esp_tensor_cols_view(&d, q, kv),
                           .d_v = esp_tensor_cols_view(&d, q + kv, kv)};
  char dims[128];
  snprintf(dims, sizeof dims, "2, %lld, %lld, %lld, %lld", (long long)(z->tokens / 2), (long long)z->heads,
           (long long)z->kv, (long long)z->head_dim);
  b->be->ops->attn_begin(b->be, cu, 2);
  b->count->ops->attn_begin(b->count, cu, 2);
  report(b, "attn", false, attn, &j, dims);
  report(b, "attn_bwd", false, attn_bwd, &j, dims);
  esp_tensor all[] = {qkv, d, o, d_o, lse};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) bench_release(b, all[i]);
}

static void loss_and_update(bench *b, const sizes *z) {
  char dims[128];
  job j = {0};
  esp_tensor logits = bench_tensor(b, ESP_F32, z->chunk, z->vocab), w = bench_tensor(b, ESP_F32, 1, z->chunk);
  esp_tensor d = bench_tensor(b, ESP_BF16, z->chunk, z->vocab);
  double *sums = b->be->ops->alloc(b->be, ESP_MEM_WORKSPACE, 16);
  int32_t *targets = ints(b, z->chunk, z->vocab);
  j.ce = (esp_ce_args){.logits = logits, .d = d, .targets = targets, .weights = w.data, .scale = 1, .sums = sums};
  snprintf(dims, sizeof dims, "%lld, %lld", (long long)z->chunk, (long long)z->vocab);
  report(b, "cross_entropy", false, cross_entropy, &j, dims);
  b->be->ops->free(b->be, sums);
  b->be->ops->free(b->be, targets);
  esp_tensor loss[] = {logits, w, d};
  for (size_t i = 0; i < sizeof loss / sizeof *loss; i++) bench_release(b, loss[i]);

  esp_tensor master = bench_tensor(b, ESP_F32, 1, z->params), grad = bench_tensor(b, ESP_F32, 1, z->params);
  esp_tensor shadow = bench_tensor(b, ESP_BF16, 1, z->params);
  float *m = b->be->ops->alloc(b->be, ESP_MEM_OPTIM, z->params * 4),
        *v = b->be->ops->alloc(b->be, ESP_MEM_OPTIM, z->params * 4);
  if (!m || !v) exit(4);
  j.update = (esp_update_args){.rule = ESP_RULE_ADAMW,
                               .n = z->params,
                               .master = master.data,
                               .grad = grad.data,
                               .shadow = shadow.data,
                               .shadow_dtype = ESP_BF16,
                               .state = {m, v},
                               .hyper = {[ESP_ADAMW_KEEP] = 1,
                                         [ESP_ADAMW_1MB1] = 0.1f,
                                         [ESP_ADAMW_B2] = 0.999f,
                                         [ESP_ADAMW_1MB2] = 0.001f,
                                         [ESP_ADAMW_RSQRT_BC2] = 1,
                                         [ESP_ADAMW_EPS] = 1e-8f,
                                         [ESP_ADAMW_STEP] = 1e-4f},
                               .grad_scale = 1};
  snprintf(dims, sizeof dims, "%lld", (long long)z->params);
  report(b, "update", false, update, &j, dims);
  b->be->ops->free(b->be, m);
  b->be->ops->free(b->be, v);
  esp_tensor state[] = {master, grad, shadow};
  for (size_t i = 0; i < sizeof state / sizeof *state; i++) bench_release(b, state[i]);
}

int main(int argc, char **argv) {
  bench b;
  int rc = bench_open(&b, argc, argv);
  if (rc) return rc;
  sizes z = {8192, 4096, 14336, 32, 8, 128, 128256, 2048, 1 << 28, 41943040};
  if (b.small) z = (sizes){256, 256, 896, 4, 2, 64, 4096, 64, 1 << 20, 1 << 18};
  job j = {0};
  char dims[64];
  snprintf(dims, sizeof dims, "%lld", (long long)z.copy);
  j.a = bench_tensor(&b, ESP_F32, z.copy / 4096, 4096);
  j.b = bench_tensor(&b, ESP_F32, z.copy / 4096, 4096);
  report(&b, "copy", true, copy, &j, dims);
  bench_release(&b, j.a);
  bench_release(&b, j.b);
  rows(&b, &z);
  attention(&b, &z);
  loss_and_update(&b, &z);
  bench_close(&b);
  return 0;
}
