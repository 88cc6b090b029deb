/* mirror.c: see mirror.h. Each operation is one call: list its operands as ranges of host memory, join the ranges that
 * overlap (an operand that lies over another does so on the device as well), copy, translate the pointers, run, sync,
 * compare and copy back. Seen to catch: copy_rows_kernel storing the scaled row to its source as well. */
#include "ops/mirror.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MAX_RANGES = 48, GUARD = 256 };

typedef struct range {
  const char *host;
  int64_t bytes;
  bool written;
  char *block; /* backend memory: lead bytes of guard, the range, tail bytes of guard */
  int64_t lead, tail;
} range;

typedef struct mirror {
  esp_backend *real;
  esp_backend_ops ops;
  uint64_t calls;
} mirror;

typedef struct call {
  esp_backend *be, *real;
  const char *name;
  range r[MAX_RANGES];
  int n;
} call;

static mirror *mirror_of(esp_backend *be) {
  return be->impl;
}
esp_backend *mirror_real(esp_backend *be) {
  return mirror_of(be)->real;
}

static call call_of(esp_backend *be, const char *name) {
  return (call){.be = be, .real = mirror_of(be)->real, .name = name};
}

/* ---- operands ---- */
static void use(call *c, const void *host, int64_t bytes, bool written) {
  if (!host || bytes <= 0) return;
  if (c->n == MAX_RANGES) fail_msg("%s: more operands than the mirror has room for", c->name);
  c->r[c->n++] = (range){.host = host, .bytes = bytes, .written = written};
}
/* From the first element to the last: gaps between rows lie inside, what follows the last row does not. */
static int64_t span(const esp_tensor *t) {
  int64_t rows = esp_tensor_rows(t), cols = esp_tensor_cols(t);
  if (rows == 0 || cols == 0) return 0;
  if (t->ndim == 3) return esp_tensor_bytes(t); /* by groups, without gaps */
  return ((rows - 1) * t->ld + cols) * (int64_t)esp_dtype_size(t->dtype);
}
static void reads(call *c, esp_tensor t) {
  if (t.data) use(c, t.data, span(&t), false);
}
static void writes(call *c, esp_tensor t) {
  if (t.data) use(c, t.data, span(&t), true);
}

static int by_address(const void *a, const void *b) {
  const range *x = a, *y = b;
  return x->host < y->host ? -1 : x->host > y->host;
}
static void join(call *c) {
  qsort(c->r, (size_t)c->n, sizeof *c->r, by_address);
  int n = 0;
  for (int i = 0; i < c->n; i++) {
    range *last = n ? &c->r[n - 1] : NULL;
    if (!last || c->r[i].host >= last->host + last->bytes) {
      c->r[n++] = c->r[i];
      continue;
    }
    int64_t end = c->r[i].host + c->r[i].bytes - last->host;
    if (end > last->bytes) last->bytes = end;
    last->written |= c->r[i].written;
  }
  c->n = n;
}

/* Operands keep their place within 256 bytes, so that a kernel sees the alignment that the test gave. Every other call
 * ends a block with its operand, for tools that know the bounds of a block; the others put a guard behind it. */
static void begin(call *c) {
  mirror *m = mirror_of(c->be);
  bool exact = m->calls++ % 2;
  c->real->tf32 = c->be->tf32;
  join(c);
  for (int i = 0; i < c->n; i++) {
    range *r = &c->r[i];
    r->lead = (int64_t)((uintptr_t)r->host % GUARD);
    r->tail = exact ? 0 : GUARD;
    int64_t all = r->lead + r->bytes + r->tail;
    r->block = c->real->ops->alloc(c->real, ESP_MEM_ACTIVATIONS, all);
    if (!r->block) fail_msg("%s: %s", c->name, esp_error_message());
    char *image = malloc((size_t)all);
    memset(image, 0xff, (size_t)all); /* NaN in every type */
    memcpy(image + r->lead, r->host, (size_t)r->bytes);
    c->real->ops->upload(c->real, r->block, image, all);
    free(image);
  }
}
static void *there(const call *c, const void *host) {
  if (!host) return NULL;
  for (int i = 0; i < c->n; i++) {
    const range *r = &c->r[i];
    if ((const char *)host >= r->host && (const char *)host < r->host + r->bytes)
      return r->block + r->lead + ((const char *)host - r->host);
  }
  return NULL; /* an operand without elements */
}
static esp_tensor there_t(const call *c, esp_tensor t) {
  t.data = there(c, t.data);
  return t;
}

static void check_range(const call *c, const range *r, const char *image) {
  for (int64_t i = 0; i < r->lead + r->bytes + r->tail; i++) {
    bool inside = i >= r->lead && i < r->lead + r->bytes;
    if (inside && r->written) continue;
    if (image[i] != (inside ? r->host[i - r->lead] : (char)0xff))
      fail_msg("%s: byte %ld of an operand of %ld, which is not to be written, was", c->name, (long)(i - r->lead),
               (long)r->bytes);
  }
}
static void end(call *c) {
  if (esp_backend_sync(c->real) != ESP_OK) {
    c->be->sticky = c->real->sticky;
    fail_msg("%s: %s", c->name, esp_error_message());
  }
  for (int i = 0; i < c->n; i++) {
    range *r = &c->r[i];
    int64_t all = r->lead + r->bytes + r->tail;
    char *image = malloc((size_t)all);
    c->real->ops->download(c->real, image, r->block, all);
    check_range(c, r, image);
    if (r->written) memcpy((char *)(uintptr_t)r->host, image + r->lead, (size_t)r->bytes);
    free(image);
    c->real->ops->free(c->real, r->block);
  }
}

/* ---- products ---- */
static void use_weight(call *c, const esp_wview *w, const esp_tail *tails, int n_tails) {
  reads(c, w->dense);
  for (int i = 0; i < n_tails; i++) {
    reads(c, tails[i].x);
    reads(c, tails[i].w);
  }
}
static esp_wview there_w(const call *c, const esp_wview *w) {
  esp_wview v = *w;
  v.dense = there_t(c, w->dense);
  return v;
}
static void there_tails(const call *c, const esp_tail *tails, int n, esp_tail *out) {
  for (int i = 0; i < n; i++) out[i] = (esp_tail){tails[i].col0, there_t(c, tails[i].x), there_t(c, tails[i].w)};
}
static void linear(esp_backend *be, esp_tensor y, esp_tensor x, const esp_wview *w, esp_tensor bias,
                   const esp_tail *tails, int n_tails, float beta) {
  call c = call_of(be, "linear");
  esp_tail t[16];
  writes(&c, y);
  reads(&c, x);
  reads(&c, bias);
  use_weight(&c, w, tails, n_tails);
  begin(&c);
  there_tails(&c, tails, n_tails, t);
  esp_wview v = there_w(&c, w);
  c.real->ops->linear(c.real, there_t(&c, y), there_t(&c, x), &v, there_t(&c, bias), t, n_tails, beta);
  end(&c);
}
static void linear_dx(esp_backend *be, esp_tensor dx, esp_tensor dy, const esp_wview *w, const esp_tail *tails,
                      int n_tails, float beta) {
  call c = call_of(be, "linear_dx");
  esp_tail t[16];
  writes(&c, dx);
  reads(&c, dy);
  use_weight(&c, w, tails, n_tails);
  begin(&c);
  there_tails(&c, tails, n_tails, t);
  esp_wview v = there_w(&c, w);
  c.real->ops->linear_dx(c.real, there_t(&c, dx), there_t(&c, dy), &v, t, n_tails, beta);
  end(&c);
}
static void matmul(esp_backend *be, esp_tensor y, esp_tensor a, bool trans_a, esp_tensor b, bool trans_b, float alpha,
                   float beta) {
  call c = call_of(be, "matmul");
  writes(&c, y);
  reads(&c, a);
  reads(&c, b);
  begin(&c);
  c.real->ops->matmul(c.real, there_t(&c, y), there_t(&c, a), trans_a, there_t(&c, b), trans_b, alpha, beta);
  end(&c);
}
/* Operands of products stay the real backend's own: host weights in, an opaque operand out. */
static void *pack(esp_backend *be, const esp_tensor *w, int n, bool transposed, esp_dtype compute) {
  esp_backend *real = mirror_real(be);
  return real->ops->pack(real, w, n, transposed, compute);
}
static void pack_free(esp_backend *be, void *packed) {
  esp_backend *real = mirror_real(be);
  real->ops->pack_free(real, packed);
}

/* ---- rows, norms, positions ---- */
static void embed(esp_backend *be, esp_tensor y, esp_tensor table, const int32_t *ids, float scale) {
  call c = call_of(be, "embed");
  writes(&c, y);
  reads(&c, table);
  use(&c, ids, esp_tensor_rows(&y) * 4, false);
  begin(&c);
  c.real->ops->embed(c.real, there_t(&c, y), there_t(&c, table), there(&c, ids), scale);
  end(&c);
}
static void embed_bwd(esp_backend *be, float *dtable, esp_tensor dy, const int32_t *ids, float scale) {
  call c = call_of(be, "embed_bwd");
  int64_t last = -1; /* the table's own length is not an argument */
  for (int64_t i = 0; i < esp_tensor_rows(&dy); i++)
    if (ids[i] > last) last = ids[i];
  use(&c, dtable, (last + 1) * esp_tensor_cols(&dy) * 4, true);
  reads(&c, dy);
  use(&c, ids, esp_tensor_rows(&dy) * 4, false);
  begin(&c);
  c.real->ops->embed_bwd(c.real, there(&c, dtable), there_t(&c, dy), there(&c, ids), scale);
  end(&c);
}
static void gather_rows(esp_backend *be, esp_tensor y, esp_tensor x, const int32_t *rows) {
  call c = call_of(be, "gather_rows");
  writes(&c, y);
  reads(&c, x);
  use(&c, rows, esp_tensor_rows(&y) * 4, false);
  begin(&c);
  c.real->ops->gather_rows(c.real, there_t(&c, y), there_t(&c, x), there(&c, rows));
  end(&c);
}
static void scatter_rows(esp_backend *be, esp_tensor y, esp_tensor x, const int32_t *rows) {
  call c = call_of(be, "scatter_rows");
  writes(&c, y);
  reads(&c, x);
  use(&c, rows, esp_tensor_rows(&x) * 4, false);
  begin(&c);
  c.real->ops->scatter_rows(c.real, there_t(&c, y), there_t(&c, x), there(&c, rows));
  end(&c);
}
static void norm(esp_backend *be, const esp_norm_args *args) {
  call c = call_of(be, "norm");
  esp_norm_args a = *args;
  int64_t rows = esp_tensor_rows(&a.x);
  reads(&c, a.x);
  reads(&c, a.residual);
  if (a.residual.data) writes(&c, a.r_out);
  writes(&c, a.y);
  reads(&c, a.w);
  reads(&c, a.b);
  use(&c, a.rstd, rows * 4, true);
  use(&c, a.mean, rows * 4, true);
  begin(&c);
  esp_tensor *all[] = {&a.x, &a.residual, &a.r_out, &a.y, &a.w, &a.b};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) *all[i] = there_t(&c, *all[i]);
  a.rstd = there(&c, a.rstd);
  a.mean = there(&c, a.mean);
  c.real->ops->norm(c.real, &a);
  end(&c);
}
static void norm_bwd(esp_backend *be, const esp_norm_bwd_args *args) {
  call c = call_of(be, "norm_bwd");
  esp_norm_bwd_args a = *args;
  int64_t rows = esp_tensor_rows(&a.r), cols = esp_tensor_cols(&a.r);
  reads(&c, a.r);
  reads(&c, a.dy);
  writes(&c, a.dx);
  reads(&c, a.w);
  use(&c, a.rstd, rows * 4, false);
  if (a.kind == ESP_NORM_LAYER) use(&c, a.mean, rows * 4, false);
  use(&c, a.dw, cols * 4, true);
  use(&c, a.db, cols * 4, true);
  begin(&c);
  esp_tensor *all[] = {&a.r, &a.dy, &a.dx, &a.w};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) *all[i] = there_t(&c, *all[i]);
  a.rstd = there(&c, a.rstd);
  a.mean = there(&c, a.mean);
  a.dw = there(&c, a.dw);
  a.db = there(&c, a.db);
  c.real->ops->norm_bwd(c.real, &a);
  end(&c);
}
static void rope(esp_backend *be, const esp_rope_args *args) {
  call c = call_of(be, "rope");
  esp_rope_args a = *args;
  int64_t last = -1; /* so many rows of the tables are used */
  for (int64_t i = 0; i < esp_tensor_rows(&a.x); i++)
    if (a.positions[i] > last) last = a.positions[i];
  writes(&c, a.x);
  use(&c, a.cos_t, (last + 1) * (a.rot / 2) * 4, false);
  use(&c, a.sin_t, (last + 1) * (a.rot / 2) * 4, false);
  use(&c, a.positions, esp_tensor_rows(&a.x) * 4, false);
  begin(&c);
  a.x = there_t(&c, a.x);
  a.cos_t = there(&c, a.cos_t);
  a.sin_t = there(&c, a.sin_t);
  a.positions = there(&c, a.positions);
  c.real->ops->rope(c.real, &a);
  end(&c);
}

/* ---- attention: the sequences stay in host memory, as the contract has it ---- */
static uint64_t attn_begin(esp_backend *be, const int32_t *cu_seqlens, int n_seqs) {
  esp_backend *real = mirror_real(be);
  return real->ops->attn_begin(real, cu_seqlens, n_seqs);
}
static void attn_call(esp_backend *be, const esp_attn_args *args, bool bwd) {
  call c = call_of(be, bwd ? "attn_bwd" : "attn");
  esp_attn_args a = *args;
  reads(&c, a.q);
  reads(&c, a.k);
  reads(&c, a.v);
  use(&c, a.lse, esp_tensor_rows(&a.q) * a.heads * 4, !bwd);
  if (bwd) {
    reads(&c, a.o);
    reads(&c, a.d_o);
    writes(&c, a.d_q);
    writes(&c, a.d_k);
    writes(&c, a.d_v);
  } else {
    writes(&c, a.o);
  }
  begin(&c);
  esp_tensor *all[] = {&a.q, &a.k, &a.v, &a.o, &a.d_o, &a.d_q, &a.d_k, &a.d_v};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) *all[i] = there_t(&c, *all[i]);
  a.lse = there(&c, a.lse);
  c.real->ops->attn_begin(c.real, a.cu_seqlens, a.n_seqs);
  if (bwd)
    c.real->ops->attn_bwd(c.real, &a);
  else
    c.real->ops->attn(c.real, &a);
  end(&c);
}
static void attn(esp_backend *be, const esp_attn_args *a) {
  attn_call(be, a, false);
}
static void attn_bwd(esp_backend *be, const esp_attn_args *a) {
  attn_call(be, a, true);
}
static void attn_decode(esp_backend *be, const esp_decode_args *args) {
  call c = call_of(be, "attn_decode");
  esp_decode_args a = *args;
  reads(&c, a.q);
  writes(&c, a.o);
  reads(&c, a.k_cache);
  reads(&c, a.v_cache);
  use(&c, a.positions, esp_tensor_rows(&a.q) * 4, false);
  begin(&c);
  esp_tensor *all[] = {&a.q, &a.o, &a.k_cache, &a.v_cache};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) *all[i] = there_t(&c, *all[i]);
  a.positions = there(&c, a.positions);
  c.real->ops->attn_decode(c.real, &a);
  end(&c);
}

#include "ops/mirror_kinds.h"
#include "ops/mirror_rows.h"

/* ---- memory: the host's ---- */
static void *host_alloc(esp_backend *be, int64_t bytes) {
  (void)be;
  return esp_mem_alloc(ESP_MEM_HOST, (size_t)bytes);
}
static void *alloc(esp_backend *be, esp_mem_kind kind, int64_t bytes) {
  (void)be;
  return esp_mem_alloc(kind, (size_t)bytes);
}
static void free_host(esp_backend *be, void *ptr) {
  (void)be;
  esp_mem_free(ptr);
}
static void copy(esp_backend *be, void *dst, const void *src, int64_t bytes) {
  (void)be;
  memcpy(dst, src, (size_t)bytes);
}
static void zero(esp_backend *be, void *dst, int64_t bytes) {
  (void)be;
  memset(dst, 0, (size_t)bytes);
}
static esp_status sync_real(esp_backend *be) {
  return esp_backend_sync(mirror_real(be));
}
static void destroy(esp_backend *be) {
  esp_backend_destroy(mirror_real(be));
  esp_mem_free(be->impl);
  esp_mem_free(be);
}

esp_status mirror_create(esp_backend *real, esp_backend **out) {
  esp_backend *be = esp_mem_alloc(ESP_MEM_HOST, sizeof *be);
  mirror *m = esp_mem_alloc(ESP_MEM_HOST, sizeof *m);
  if (!be || !m) {
    esp_mem_free(be);
    esp_mem_free(m);
    return ESP_ERR_MEMORY;
  }
  m->real = real;
  m->ops = (esp_backend_ops){.name = real->ops->name,
                             .alloc = alloc,
                             .free = free_host,
                             .upload = copy,
                             .download = copy,
                             .zero = zero,
                             .sync = sync_real,
                             .destroy = destroy,
                             .host_alloc = host_alloc,
                             .host_free = free_host,
                             .download_later = copy,
                             .pack = pack,
                             .pack_free = pack_free,
                             .linear = linear,
                             .linear_dx = linear_dx,
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
                             .mul_cols = mul_cols,
                             .gather_rows = gather_rows,
                             .scatter_rows = scatter_rows,
                             .dropout = dropout,
                             .col_sum = col_sum,
                             .dot = dot,
                             .update = update};
  add_kinds(&m->ops, real->ops);
  be->ops = &m->ops;
  be->impl = m;
  be->on_host = true;
  *out = be;
  return ESP_OK;
}
