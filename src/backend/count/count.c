/* count.c: the counting backend. It computes nothing: each operation adds its floating-point operations, the bytes it
 * must read and write, and one launch. Memory is fake (addresses that fault when touched) but accounted in the same
 * books as real memory, and scratch grows exactly as that of the modelled backend (cpu or cuda) does, so `plan` is a
 * training step on it. */
#include <string.h>

#include "backend/backend.h"
#include "backend/cpu/gemm.h"
#include "backend/cpu/ops.h"
#include "backend/cpu/work.h"
#include "backend/cuda/need.h"
#include "core/cpu.h"

#define FAKE_BASE 0x0100000000000000ull /* not canonical on x86-64: a dereference faults at once */

typedef struct fake_block {
  uint64_t at;
  esp_mem_kind kind;
  int64_t bytes;
  bool host; /* of the host, whatever is modelled */
} fake_block;

typedef struct count_impl {
  esp_backend_ops ops;
  bool cuda; /* models the cuda backend, else the cpu's */
  uint64_t next;
  fake_block *blocks;
  int count, cap;
  uint64_t attn_buckets; /* powers of two, see attn_begin */
  int64_t work_bytes;    /* as esp_cpu_work or esp_cuda_scratch holds them */
  esp_gemm_need gemm;    /* as the products hold them */
} count_impl;

static void account(const count_impl *c, bool host, esp_mem_kind kind, int64_t delta) {
  if (c->cuda && !host)
    esp_mem_account_device(kind, delta);
  else
    esp_mem_account(kind, delta);
}

static void *fake_block_new(esp_backend *be, bool host, esp_mem_kind kind, int64_t bytes) {
  count_impl *c = be->impl;
  if (c->count == c->cap) {
    int cap = c->cap ? 2 * c->cap : 256;
    fake_block *blocks = esp_mem_realloc(ESP_MEM_HOST, c->blocks, (size_t)cap * sizeof *blocks);
    if (!blocks) return NULL;
    c->blocks = blocks;
    c->cap = cap;
  }
  c->blocks[c->count++] = (fake_block){c->next, kind, bytes, host};
  void *p = (void *)(uintptr_t)c->next;
  c->next += ((uint64_t)bytes + 127) / 64 * 64; /* one line between blocks: each address is unique */
  account(c, host, kind, bytes);
  return p;
}
static void *fake_alloc(esp_backend *be, esp_mem_kind kind, int64_t bytes) {
  return fake_block_new(be, false, kind, bytes);
}
static void fake_free(esp_backend *be, void *ptr) {
  count_impl *c = be->impl;
  for (int i = c->count - 1; i >= 0; i--)
    if (c->blocks[i].at == (uint64_t)(uintptr_t)ptr) {
      account(c, c->blocks[i].host, c->blocks[i].kind, -c->blocks[i].bytes);
      memmove(c->blocks + i, c->blocks + i + 1, (size_t)(c->count - i - 1) * sizeof *c->blocks);
      c->count--;
      return;
    }
}
static void work(esp_backend *be, int64_t bytes) {
  count_impl *c = be->impl;
  if (bytes <= c->work_bytes) return;
  account(c, false, ESP_MEM_WORKSPACE, -c->work_bytes);
  account(c, false, ESP_MEM_WORKSPACE, bytes);
  c->work_bytes = bytes;
}

static bool models_cuda(const esp_backend *be) {
  return ((const count_impl *)be->impl)->cuda;
}

static void add(esp_backend *be, double flops, double bytes) {
  be->stats.flops += flops;
  be->stats.bytes += bytes;
  be->stats.launches++;
}
static double bytes_of(esp_tensor t) {
  return t.data ? (double)esp_tensor_bytes(&t) : 0;
}
static double numel(esp_tensor t) {
  return (double)esp_tensor_numel(&t);
}

static void upload(esp_backend *be, void *dst, const void *host, int64_t bytes) {
  (void)be, (void)dst, (void)host, (void)bytes;
}
static void download(esp_backend *be, void *host, const void *src, int64_t bytes) {
  (void)be, (void)src;
  memset(host, 0, (size_t)bytes);
}
static void zero(esp_backend *be, void *dst, int64_t bytes) {
  (void)dst;
  add(be, 0, (double)bytes);
}
static esp_status sync(esp_backend *be) {
  return be->sticky;
}
static void destroy(esp_backend *be) {
  count_impl *c = be->impl;
  if (c) {
    for (int i = 0; i < c->count; i++) account(c, c->blocks[i].host, c->blocks[i].kind, -c->blocks[i].bytes);
    account(c, false, ESP_MEM_WORKSPACE, -c->work_bytes);
    esp_mem_account(ESP_MEM_WORKSPACE, -esp_gemm_need_bytes(&c->gemm));
    esp_mem_free(c->blocks);
  }
  esp_mem_free(c);
  esp_mem_free(be);
}

static void *host_alloc(esp_backend *be, int64_t bytes) {
  return fake_block_new(be, true, ESP_MEM_HOST, bytes);
}
static int64_t scratch(esp_backend *be, int64_t at_least) {
  work(be, at_least);
  return ((count_impl *)be->impl)->work_bytes;
}
static void stage(esp_backend *be, int channel, void *dst, const void *host, int64_t bytes) {
  (void)channel, (void)dst, (void)host;
  add(be, 0, (double)bytes);
}
static void stage_wait(esp_backend *be, int channel) {
  (void)be, (void)channel;
}
/* A device keeps a description of the sequences for each bucket of counts that occurs: this one and, in other rows of a
 * run, probably all smaller ones. */
static uint64_t attn_begin(esp_backend *be, const int32_t *cu_seqlens, int n_seqs) {
  (void)cu_seqlens;
  count_impl *c = be->impl;
  for (int64_t n = 1; c->cuda && n <= esp_attn_count_bucket(n_seqs); n *= 2) {
    if (c->attn_buckets & (uint64_t)n) continue;
    c->attn_buckets |= (uint64_t)n;
    if (!fake_alloc(be, ESP_MEM_WORKSPACE, esp_cuda_need_attn_begin(n))) be->sticky = ESP_ERR_MEMORY;
  }
  return 0;
}

static int64_t pack_bytes(esp_backend *be, int64_t out, int64_t in, esp_dtype compute) {
  const count_impl *c = be->impl;
  return c->cuda ? esp_cuda_pack_bytes(out, in, compute) : esp_cpu_pack_bytes(out, in, compute);
}
static int64_t packed_size(esp_backend *be, const esp_tensor *w, int n, bool transposed, esp_dtype compute) {
  int64_t out = 0, in = n ? w[0].shape[transposed ? 0 : 1] : 0;
  for (int i = 0; i < n; i++) out += w[i].shape[transposed ? 1 : 0];
  return pack_bytes(be, out, in, compute);
}
static void *pack_host(esp_backend *be, const esp_tensor *w, int n, bool transposed, esp_dtype compute) {
  return host_alloc(be, packed_size(be, w, n, transposed, compute));
}
static void *pack(esp_backend *be, const esp_tensor *w, int n, bool transposed, esp_dtype compute) {
  return fake_alloc(be, ESP_MEM_WEIGHTS, packed_size(be, w, n, transposed, compute));
}
static double weight_bytes(const esp_wview *w, esp_tensor x) {
  return w->packed ? (double)(w->out * w->in) * (double)esp_dtype_size(x.dtype) : bytes_of(w->dense);
}
static void tails_cost(const esp_tail *tails, int n, esp_tensor y, double *flops, double *bytes) {
  for (int i = 0; i < n; i++) {
    *flops += 2 * numel(tails[i].x) * numel(tails[i].w) / (double)esp_tensor_cols(&tails[i].x);
    *bytes += bytes_of(tails[i].x) + bytes_of(tails[i].w);
  }
  (void)y;
}
/* Brackets a product in its dry form: what its scratch grows by enters the books. */
static esp_gemm_need products_begin(esp_backend *be) {
  count_impl *c = be->impl;
  esp_cpu_gemm_dry(&c->gemm);
  return c->gemm;
}
static void products_end(esp_backend *be, esp_gemm_need old) {
  const esp_gemm_need *n = &((count_impl *)be->impl)->gemm;
  esp_cpu_gemm_dry(NULL);
  esp_mem_account(ESP_MEM_WORKSPACE, esp_gemm_need_bytes(n) - esp_gemm_need_bytes(&old));
}
static void linear(esp_backend *be, esp_tensor y, esp_tensor x, const esp_wview *w, esp_tensor bias,
                   const esp_tail *tails, int n_tails, float beta) {
  double flops = 2 * (double)esp_tensor_rows(&x) * (double)w->out * (double)w->in;
  double bytes = bytes_of(x) + weight_bytes(w, x) + bytes_of(bias) + bytes_of(y) * (beta != 0 ? 2 : 1);
  tails_cost(tails, n_tails, y, &flops, &bytes);
  add(be, flops, bytes);
  if (models_cuda(be)) {
    work(be, esp_cuda_need_linear(y, x, w, bias, tails, n_tails));
    return;
  }
  esp_gemm_need old = products_begin(be);
  esp_cpu_linear(be, y, x, w, bias, tails, n_tails, beta);
  products_end(be, old);
}
static bool linear_adds(esp_backend *be, esp_tensor x, const esp_wview *w, const esp_csr *m) {
  return !models_cuda(be) && w->packed && esp_cpu_adds(&x, w, m);
}
static void linear_dx(esp_backend *be, esp_tensor dx, esp_tensor dy, const esp_wview *w, const esp_tail *tails,
                      int n_tails, float beta) {
  double flops = 2 * (double)esp_tensor_rows(&dy) * (double)w->out * (double)w->in;
  double bytes = bytes_of(dy) + weight_bytes(w, dy) + bytes_of(dx) * (beta != 0 ? 2 : 1);
  tails_cost(tails, n_tails, dx, &flops, &bytes);
  add(be, flops, bytes);
  if (models_cuda(be)) {
    work(be, esp_cuda_need_linear_dx(dx, dy, w, tails, n_tails));
    return;
  }
  esp_gemm_need old = products_begin(be);
  esp_cpu_linear_dx(be, dx, dy, w, tails, n_tails, beta);
  products_end(be, old);
}
static void matmul(esp_backend *be, esp_tensor c, esp_tensor a, bool trans_a, esp_tensor b, bool trans_b, float alpha,
                   float beta) {
  double k = (double)(trans_a ? esp_tensor_rows(&a) : esp_tensor_cols(&a));
  add(be, 2 * numel(c) * k, bytes_of(a) + bytes_of(b) + bytes_of(c) * (beta != 0 ? 2 : 1));
  if (models_cuda(be)) {
    work(be, esp_cuda_need_matmul(c, a, trans_a, b, trans_b));
    return;
  }
  esp_gemm_need old = products_begin(be);
  esp_cpu_matmul(be, c, a, trans_a, b, trans_b, alpha, beta);
  products_end(be, old);
}

static void embed(esp_backend *be, esp_tensor y, esp_tensor table, const int32_t *ids, float scale) {
  (void)ids, (void)scale;
  add(be, numel(y), bytes_of(y) + numel(y) * (double)esp_dtype_size(table.dtype));
}
static void embed_bwd(esp_backend *be, float *dtable, esp_tensor dy, const int32_t *ids, float scale) {
  (void)dtable, (void)ids, (void)scale;
  if (models_cuda(be)) work(be, esp_cuda_need_embed_bwd(esp_tensor_rows(&dy)));
  add(be, 2 * numel(dy), bytes_of(dy) + 8 * numel(dy));
}
static void norm(esp_backend *be, const esp_norm_args *a) {
  add(be, 6 * numel(a->x),
      bytes_of(a->x) + bytes_of(a->residual) + bytes_of(a->residual.data ? a->r_out : a->residual) + bytes_of(a->y));
}
static void norm_bwd(esp_backend *be, const esp_norm_bwd_args *a) {
  if (models_cuda(be)) work(be, esp_cuda_need_norm_bwd(a));
  double passes = a->dw || a->db ? 2 : 1;
  add(be, 10 * numel(a->r) * passes,
      passes * (bytes_of(a->r) + bytes_of(a->dy)) + bytes_of(a->dx) * (a->accumulate ? 2 : 1));
}
static void rope(esp_backend *be, const esp_rope_args *a) {
  double touched = (double)esp_tensor_rows(&a->x) * a->heads * a->rot;
  add(be, 3 * touched, 2 * touched * (double)esp_dtype_size(a->x.dtype));
}
/* (query, key) pairs that attend, of all sequences */
static double attn_pairs(const esp_attn_args *a) {
  double pairs = 0;
  for (int s = 0; s < a->n_seqs; s++) {
    double n = a->cu_seqlens[s + 1] - a->cu_seqlens[s], w = a->window;
    double p = a->causal ? n * (n + 1) / 2 : n * n;
    if (a->window > 0 && w < n) p -= (n - w) * (n - w + 1) / 2; /* pairs further back than the window */
    pairs += p;
  }
  return pairs;
}
static void attn(esp_backend *be, const esp_attn_args *a) {
  work(be, models_cuda(be) ? esp_cuda_need_attn(a) : esp_cpu_work_attn(a));
  add(be, 4 * attn_pairs(a) * a->heads * a->head_dim,
      bytes_of(a->q) + bytes_of(a->k) + bytes_of(a->v) + bytes_of(a->o));
}
static void attn_bwd(esp_backend *be, const esp_attn_args *a) {
  work(be, models_cuda(be) ? esp_cuda_need_attn_bwd(a) : esp_cpu_work_attn_bwd(a));
  add(be, 10 * attn_pairs(a) * a->heads * a->head_dim,
      2 * (bytes_of(a->q) + bytes_of(a->k) + bytes_of(a->v) + bytes_of(a->o)));
}
static void attn_decode(esp_backend *be, const esp_decode_args *a) {
  work(be, models_cuda(be) ? esp_cuda_need_decode(a) : esp_cpu_work_decode(a));
  double keys = (double)(esp_tensor_rows(&a->q) * a->max_len); /* the most there can be: lengths are not known here */
  add(be, 4 * keys * a->heads * a->head_dim,
      2 * keys * a->kv_heads * a->head_dim * (double)esp_dtype_size(a->k_cache.dtype));
}
static void glu(esp_backend *be, esp_tensor h, esp_tensor gu, esp_act act) {
  (void)act;
  add(be, 20 * numel(h), bytes_of(h) + bytes_of(gu));
}
static void glu_bwd(esp_backend *be, esp_tensor dgu, esp_tensor dh, esp_tensor gu, esp_act act) {
  (void)act;
  add(be, 25 * numel(dh), bytes_of(dgu) + bytes_of(dh) + bytes_of(gu));
}
static void act(esp_backend *be, esp_tensor y, esp_tensor x, esp_act act) {
  (void)act;
  add(be, 20 * numel(y), bytes_of(y) + bytes_of(x));
}
static void act_bwd(esp_backend *be, esp_tensor dx, esp_tensor dy, esp_tensor x, esp_act act) {
  (void)act;
  add(be, 25 * numel(x), bytes_of(dx) + bytes_of(dy) + bytes_of(x));
}
static void cross_entropy(esp_backend *be, const esp_ce_args *a) {
  work(be, models_cuda(be) ? esp_cuda_need_loss_rows(&a->logits) : esp_cpu_work_ce(esp_tensor_rows(&a->logits)));
  add(be, (a->d.data ? 40 : 20) * numel(a->logits), bytes_of(a->logits) + bytes_of(a->d));
}
static void distill(esp_backend *be, const esp_distill_args *a) {
  work(be, models_cuda(be) ? esp_cuda_need_loss_rows(&a->student) : esp_cpu_work_ce(esp_tensor_rows(&a->student)));
  add(be, (a->d.data ? 80 : 60) * numel(a->student), bytes_of(a->student) + bytes_of(a->teacher) + bytes_of(a->d));
}
static void hidden_loss(esp_backend *be, const esp_hidden_args *a) {
  work(be, models_cuda(be) ? esp_cuda_need_loss_rows(&a->x) : esp_cpu_work_ce(esp_tensor_rows(&a->x)));
  add(be, 8 * numel(a->x), bytes_of(a->x) + bytes_of(a->teacher) + 2 * bytes_of(a->d));
}
static void axpby(esp_backend *be, esp_tensor y, float a, esp_tensor x, float b) {
  (void)a;
  add(be, 2 * numel(y), bytes_of(x) + bytes_of(y) * (b != 0 ? 2 : 1));
}
static void mul_cols(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor v) {
  add(be, numel(y), bytes_of(x) + bytes_of(y) + bytes_of(v));
}
static void mul(esp_backend *be, esp_tensor y, esp_tensor a, esp_tensor b, float beta) {
  add(be, 2 * numel(y), bytes_of(a) + bytes_of(b) + bytes_of(y) * (beta != 0 ? 2 : 1));
}
static void mul_rows(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor v, float beta) {
  add(be, 2 * numel(y), bytes_of(x) + bytes_of(v) + bytes_of(y) * (beta != 0 ? 2 : 1));
}
static void col_dot(esp_backend *be, float *out, esp_tensor a, esp_tensor b) {
  (void)out;
  if (models_cuda(be)) work(be, esp_cuda_need_col_sum(esp_tensor_rows(&a), esp_tensor_cols(&a), 1));
  add(be, 2 * numel(a), bytes_of(a) + bytes_of(b) + 8 * (double)esp_tensor_cols(&a));
}
static void row_dot(esp_backend *be, float *out, esp_tensor a, esp_tensor b, float beta) {
  (void)out;
  add(be, 2 * numel(a), bytes_of(a) + bytes_of(b) + (beta != 0 ? 8 : 4) * (double)esp_tensor_rows(&a));
}
static void block_matmul(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor m, int blocks, bool shared, bool trans,
                         float alpha, float beta) {
  add(be, 2 * numel(y) * (double)esp_block_width(&x, blocks),
      bytes_of(x) + bytes_of(m) + bytes_of(y) * (beta != 0 ? 2 : 1));
  if (models_cuda(be)) {
    work(be, esp_cuda_need_block_matmul(y, x, m, blocks, shared, trans));
    return;
  }
  int64_t p = esp_block_width(&x, blocks), q = esp_block_width(&y, blocks);
  if (esp_cpu_block_small(p, q, blocks)) {
    work(be, esp_cpu_work_block_matmul(p, q, blocks, shared));
    return;
  }
  esp_gemm_need old = products_begin(be);
  esp_cpu_block_matmul(be, y, x, m, blocks, shared, trans, alpha, beta);
  products_end(be, old);
}
static void block_grad(esp_backend *be, esp_tensor dm, esp_tensor x, esp_tensor dy, int blocks, bool shared,
                       float alpha) {
  add(be, 2 * numel(x) * (double)esp_block_width(&dy, blocks), bytes_of(x) + bytes_of(dy) + 2 * bytes_of(dm));
  if (models_cuda(be)) {
    work(be, esp_cuda_need_block_grad(dm, x, dy, blocks, shared));
    return;
  }
  int64_t p = esp_block_width(&x, blocks), q = esp_block_width(&dy, blocks);
  int64_t apart = esp_cpu_work_block_grad(&x, &dy, blocks, shared);
  work(be, apart);
  if (apart > 0 || (!shared && esp_cpu_block_small(p, q, blocks))) return; /* sums stay with their threads */
  esp_gemm_need old = products_begin(be);
  esp_cpu_block_grad(be, dm, x, dy, blocks, shared, alpha);
  products_end(be, old);
}
static void block_inverse(esp_backend *be, esp_tensor inv, esp_tensor m, int blocks) {
  (void)blocks;
  add(be, 2 * numel(m) * (double)esp_tensor_cols(&m), bytes_of(m) + bytes_of(inv));
}
static void transpose_rows(esp_backend *be, esp_tensor y, esp_tensor x, int64_t a, int64_t b) {
  (void)a, (void)b;
  add(be, 0, bytes_of(x) + bytes_of(y));
}
static void khatri_rao(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor z) {
  add(be, numel(y), bytes_of(x) + bytes_of(z) + bytes_of(y));
}
static void khatri_rao_bwd(esp_backend *be, esp_tensor dx, esp_tensor dz, esp_tensor dy, esp_tensor x, esp_tensor z) {
  add(be, 2 * numel(dy) * ((dx.data != NULL) + (dz.data != NULL)),
      bytes_of(dy) + bytes_of(x) + bytes_of(z) + 2 * bytes_of(dx) + 2 * bytes_of(dz));
}
static double csr_bytes(const esp_csr *s) {
  return 4 * (double)s->rows + (s->order ? 12 : 8) * (double)s->entries;
}
static void sparse_on_cpu(esp_backend *be, esp_tensor y, esp_tensor x, const esp_csr *s, float *grad) {
  work(be, esp_cpu_work_sparse(&y, &x, s, grad != NULL));
  if (!esp_cpu_sparse_dense(&y, &x, s)) return;
  esp_gemm_need old = products_begin(be);
  esp_cpu_sparse_products(be, y, x, s, grad, NULL, true);
  products_end(be, old);
}
static void sparse_matmul(esp_backend *be, esp_tensor y, esp_tensor x, const esp_csr *s) {
  if (models_cuda(be)) work(be, esp_cuda_need_sparse_matmul(x));
  if (!models_cuda(be)) sparse_on_cpu(be, y, x, s, NULL);
  add(be, 2 * (double)esp_tensor_rows(&x) * (double)s->entries, bytes_of(x) + 2 * bytes_of(y) + csr_bytes(s));
}
static void sparse_grad(esp_backend *be, float *dvalues, esp_tensor dy, esp_tensor x, const esp_csr *s) {
  if (!models_cuda(be)) sparse_on_cpu(be, dy, x, s, dvalues);
  if (models_cuda(be)) work(be, esp_cuda_need_sparse_grad(dy, x));
  add(be, 2 * (double)esp_tensor_rows(&x) * (double)s->entries,
      bytes_of(x) + bytes_of(dy) + csr_bytes(s) + 4 * (double)s->entries);
}
static void rank_gate(esp_backend *be, esp_tensor y, esp_tensor x, const esp_gate *g) {
  double n = numel(x);
  add(be, 16 * n, n * (double)(esp_dtype_size(x.dtype) + esp_dtype_size(y.dtype)));
}
static void rank_gate_bwd(esp_backend *be, esp_tensor dx, esp_tensor dy, esp_tensor x, const esp_gate *g) {
  double n = numel(x);
  add(be, 28 * n, n * (double)(esp_dtype_size(x.dtype) + esp_dtype_size(dx.dtype) + esp_dtype_size(dy.dtype)));
}
static void gather_rows(esp_backend *be, esp_tensor y, esp_tensor x, const int32_t *rows) {
  (void)x, (void)rows;
  add(be, 0, 2 * bytes_of(y));
}
static void scatter_rows(esp_backend *be, esp_tensor y, esp_tensor x, const int32_t *rows) {
  (void)y, (void)rows;
  add(be, 0, 2 * bytes_of(x));
}
static void dropout(esp_backend *be, esp_tensor y, esp_tensor x, float p, uint64_t seed, const uint64_t *draw,
                    uint64_t stream, float beta) {
  (void)p, (void)seed, (void)draw, (void)stream;
  add(be, 2 * numel(y), bytes_of(x) + bytes_of(y) * (beta != 0 ? 2 : 1));
}
static void col_sum(esp_backend *be, float *out, esp_tensor x) {
  (void)out;
  if (models_cuda(be)) work(be, esp_cuda_need_col_sum(esp_tensor_rows(&x), esp_tensor_cols(&x), 1));
  add(be, numel(x), bytes_of(x));
}
static void dot(esp_backend *be, double *out, const float *a, const float *b, int64_t n) {
  if (models_cuda(be)) work(be, esp_cuda_need_dot(n));
  *out = 0; /* a host double: read by clipping at once */
  add(be, 2 * (double)n, (a == b ? 4 : 8) * (double)n);
}
static void update(esp_backend *be, const esp_update_args *a) {
  double bytes = 12; /* parameter read and written, gradient read */
  for (int i = 0; i < 4; i++) bytes += a->state[i] ? 8 : 0;
  if (a->shadow) bytes += (double)esp_dtype_size(a->shadow_dtype);
  add(be, 15 * (double)a->n, bytes * (double)a->n);
}

static const esp_backend_ops ops = {
    .name = "count",
    .alloc = fake_alloc,
    .free = fake_free,
    .upload = upload,
    .download = download,
    .zero = zero,
    .sync = sync,
    .destroy = destroy,
    .host_alloc = host_alloc,
    .host_free = fake_free,
    .download_later = download,
    .scratch = scratch,
    .stage = stage,
    .stage_wait = stage_wait,
    .pack = pack,
    .pack_free = fake_free,
    .pack_bytes = pack_bytes,
    .pack_host = pack_host,
    .linear = linear,
    .linear_dx = linear_dx,
    .linear_adds = linear_adds,
    .matmul = matmul,
    .embed = embed,
    .embed_bwd = embed_bwd,
    .norm = norm,
    .norm_bwd = norm_bwd,
    .rope = rope,
    .attn_begin = attn_begin,
    .attn = attn,
    .attn_bwd = attn_bwd,
    .attn_decode = attn_decode,
    .glu = glu,
    .glu_bwd = glu_bwd,
    .act = act,
    .act_bwd = act_bwd,
    .cross_entropy = cross_entropy,
    .distill = distill,
    .hidden_loss = hidden_loss,
    .axpby = axpby,
    .mul = mul,
    .mul_rows = mul_rows,
    .col_dot = col_dot,
    .row_dot = row_dot,
    .block_matmul = block_matmul,
    .block_grad = block_grad,
    .block_inverse = block_inverse,
    .transpose_rows = transpose_rows,
    .khatri_rao = khatri_rao,
    .khatri_rao_bwd = khatri_rao_bwd,
    .rank_gate = rank_gate,
    .rank_gate_bwd = rank_gate_bwd,
    .sparse_matmul = sparse_matmul,
    .sparse_grad = sparse_grad,
    .mul_cols = mul_cols,
    .gather_rows = gather_rows,
    .scatter_rows = scatter_rows,
    .dropout = dropout,
    .col_sum = col_sum,
    .dot = dot,
    .update = update,
};

esp_status esp_count_backend_create(bool cuda, esp_backend **out) {
  *out = NULL;
  esp_backend *be = esp_mem_alloc(ESP_MEM_HOST, sizeof *be);
  if (!be) return ESP_ERR_MEMORY;
  count_impl *c = esp_mem_alloc(ESP_MEM_HOST, sizeof *c);
  if (!c) {
    esp_mem_free(be);
    return ESP_ERR_MEMORY;
  }
  c->next = FAKE_BASE;
  c->cuda = cuda;
  c->ops = ops;
  if (!cuda) { /* what the cpu backend does not have */
    c->ops.scratch = NULL;
    c->ops.stage = NULL;
    c->ops.stage_wait = NULL;
    c->ops.pack_host = NULL;
  }
  be->ops = &c->ops;
  be->on_host = !cuda;
  strcpy(be->device, "count");
  be->impl = c;
  /* what the device backend holds from its start */
  if (cuda && !fake_alloc(be, ESP_MEM_WORKSPACE, esp_cuda_need_fixed())) {
    destroy(be);
    return ESP_ERR_MEMORY;
  }
  *out = be;
  return ESP_OK;
}
