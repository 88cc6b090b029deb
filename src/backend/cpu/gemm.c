/* gemm.c: entry points, plan and driver of the cpu backend's matrix products (gemm_impl.h has the picture). */
#include "backend/cpu/gemm.h"

#include <assert.h>
#include <string.h>

#include "backend/cpu/gemm_impl.h"
#include "core/cpu.h"
#include "core/threads.h"

/* Scratch of the products: one block per pool thread, grown to the largest need seen and kept. Operations are issued
 * by one host thread at a time, so growing needs no lock. */
static struct {
  int threads;
  esp_gscratch *scratch;
  float *partial;
  size_t partial_bytes;
  char *panels, *tiles; /* operands b and a made for all threads */
  size_t panels_bytes, tiles_bytes;
  uint64_t next_id;
} g;

void esp_cpu_gemm_shutdown(void) {
  for (int i = 0; i < g.threads; i++) esp_mem_free(g.scratch[i].base);
  esp_mem_free(g.scratch);
  esp_mem_free(g.partial);
  g.threads = 0;
  g.scratch = NULL;
  esp_mem_free(g.panels);
  g.partial = NULL;
  g.partial_bytes = 0;
  esp_mem_free(g.tiles);
  g.panels = g.tiles = NULL;
  g.panels_bytes = g.tiles_bytes = 0;
}

/* Set while the counting backend asks what a product would take: it is planned, its scratch noted, and not run. */
static esp_gemm_need *dry;

void esp_cpu_gemm_dry(esp_gemm_need *need) {
  dry = need;
}

static size_t most(size_t a, size_t b) {
  return a > b ? a : b;
}

static esp_status ensure(void **buf, size_t *have, size_t want) {
  if (want <= *have) return ESP_OK;
  esp_mem_free(*buf);
  *have = 0;
  *buf = esp_mem_alloc(ESP_MEM_WORKSPACE, want);
  if (!*buf) return ESP_ERR_MEMORY;
  *have = want;
  return ESP_OK;
}

static size_t round64(size_t n) {
  return (n + 63) & ~(size_t)63;
}

static esp_status ensure_scratch(const esp_gsizes *z) {
  int n = esp_threads_count();
  if (n > g.threads && !dry) {
    esp_gscratch *s = esp_mem_realloc(ESP_MEM_WORKSPACE, g.scratch, (size_t)n * sizeof *s);
    if (!s) return ESP_ERR_MEMORY;
    memset(s + g.threads, 0, (size_t)(n - g.threads) * sizeof *s);
    g.scratch = s;
    g.threads = n;
  }
  /* 64 bytes beyond each piece keep neighbours off one cache line even when a kernel reads a whole vector */
  size_t a = round64(z->a), b = round64(z->b), t = round64(z->t), c = round64(z->c), pad = round64(z->pad);
  size_t total = a + b + t + c + pad + 64;
  if (dry) {
    dry->scratch = most(dry->scratch, total * (size_t)n);
    return ESP_OK;
  }
  for (int i = 0; i < n; i++) {
    esp_gscratch *s = &g.scratch[i];
    if (s->bytes < total) {
      esp_mem_free(s->base);
      s->bytes = 0;
      s->base = esp_mem_alloc(ESP_MEM_WORKSPACE, total);
      if (!s->base) return ESP_ERR_MEMORY;
      s->bytes = total;
    }
    s->a = s->base;
    s->b = s->a + a;
    s->t = s->b + b;
    s->c = s->t + t;
    s->pad = s->c + c;
  }
  return ESP_OK;
}

static int64_t round32(int64_t n) {
  return (n + 31) & ~(int64_t)31;
}

/* Blocks of nearly equal size, multiples of 32. */
static int64_t even_block(int64_t n, int64_t most) {
  return round32(esp_ceil_div(n, esp_ceil_div(n, most)));
}

enum { ESP_GEMM_MIN_CHUNKS = 8 };

static void plan_amx(esp_gjob *j) {
  int64_t kpad = esp_max64(round32(j->k), 32);
  bool fill_a = j->a.kind == ESP_GOPER_COLS, fill_b = j->b.kind != ESP_GOPER_VNNI;
  j->kc = kpad;
  if (fill_a && j->m <= 64 && !j->take) {
    /* thin result over long columns (dB, dA): parts of the contraction, each read once as L2-sized blocks */
    int64_t parts = esp_max64(1, esp_min64(j->k / 128, 8));
    j->kb = even_block(esp_ceil_div(esp_max64(j->k, 1), parts), 128);
    j->kc = j->kb * esp_ceil_div(j->k, j->kb * parts);
    j->mb = round32(j->m);
    j->nb = even_block(j->n, 1536);
    return;
  }
  /* A block of b (columns x contraction) stays in the second-level cache while the rows pass by. Wide blocks let a be
   * read few times; the whole contraction at once spares sums their way through memory. Measured optima: 576 columns
   * at a contraction of 576, 288 at 1536, 192 at 3072. */
  enum { BLOCK_BYTES = 1200 * 1024, PARTIAL_BYTES = 16 * 1024 * 1024 };
  j->nb = even_block(j->n, esp_max64(192, esp_min64(640, (BLOCK_BYTES / (2 * kpad)) & ~(int64_t)31)));
  j->kb = even_block(esp_max64(j->k, 1), (BLOCK_BYTES / (2 * j->nb)) & ~(int64_t)31);
  int64_t parts = esp_min64(8, PARTIAL_BYTES / (4 * j->m * round32(j->n)));
  if (fill_b && j->k >= 8192 && parts >= 2 &&
      !j->take) { /* parts of a long contraction: each piece of b is made once */
    j->nb = even_block(j->n, 640);
    j->kb = even_block(esp_ceil_div(j->k, parts), (BLOCK_BYTES / (2 * j->nb)) & ~(int64_t)31);
    j->kc = j->kb * esp_ceil_div(j->k, j->kb * parts);
    j->mb = even_block(j->m, 1024);
    return;
  }
  bool refill = fill_b && j->kb < kpad; /* then each block of rows makes b again */
  j->mb = even_block(j->m, refill ? 1024 : 256);
  while (esp_ceil_div(j->m, j->mb) * esp_ceil_div(j->n, j->nb) < ESP_GEMM_MIN_CHUNKS) {
    if (j->mb > 128)
      j->mb = even_block(j->m, j->mb / 2);
    else if (j->nb > 96)
      j->nb = even_block(j->n, j->nb / 2);
    else
      break;
  }
}

static void plan_blas(esp_gjob *j) {
  int64_t k = esp_max64(j->k, 1);
  bool widen = j->a.dtype != ESP_F32 || j->b.dtype != ESP_F32;
  j->mb = even_block(j->m, ESP_GEMM_BLAS_ROWS);
  j->nb = even_block(j->n, 384);
  j->kc = round32(k);
  j->kb = widen ? esp_min64(j->kc, 1024) : j->kc;
  if (esp_ceil_div(j->m, j->mb) * esp_ceil_div(j->n, j->nb) < ESP_GEMM_MIN_CHUNKS / 2 && k >= 1024) {
    j->kc = round32(esp_ceil_div(k, 8));
    j->kb = esp_min64(j->kb, j->kc);
  }
}

static void chunk_fn(void *ctx, int64_t chunk, int thread) {
  const esp_gjob *j = ctx;
  int64_t nb = chunk / j->nmb % j->nnb, mb = chunk % j->nmb, kc = chunk / (j->nmb * j->nnb);
  if (j->nkc > 1) { /* column blocks fastest: the part of a stays */
    nb = chunk % j->nnb;
    mb = chunk / j->nnb % j->nmb;
  }
  if (j->amx)
    esp_gemm_amx_chunk(j, &g.scratch[thread], kc, mb, nb);
  else
    esp_gemm_blas_chunk(j, &g.scratch[thread], kc, mb, nb);
}

enum { REDUCE_ROWS = 16, REDUCE_COLS = 64 };

/* Adds the parts in order and stores. */
static void reduce_fn(void *ctx, int64_t chunk, int thread) {
  const esp_gjob *j = ctx;
  (void)thread;
  float sum[REDUCE_ROWS * REDUCE_COLS];
  int64_t npad = round32(j->n), m0 = chunk * REDUCE_ROWS, rows = esp_min64(REDUCE_ROWS, j->m - m0);
  for (int64_t n0 = 0; n0 < j->n; n0 += REDUCE_COLS) {
    int64_t cols = esp_min64(REDUCE_COLS, j->n - n0);
    for (int64_t r = 0; r < rows; r++) {
      float *s = sum + r * REDUCE_COLS;
      const float *p = j->partial + (m0 + r) * npad + n0;
      for (int64_t i = 0; i < cols; i++) s[i] = p[i];
      for (int64_t part = 1; part < j->nkc; part++) {
        p += j->m * npad;
        for (int64_t i = 0; i < cols; i++) s[i] += p[i];
      }
    }
    esp_gemm_epilogue(j, m0, n0, rows, cols, sum, REDUCE_COLS);
  }
}

enum { SHARE_LEAST = 64 * 1024 };

static void share_fn(void *ctx, int64_t chunk, int thread) {
  const esp_gjob *j = ctx;
  (void)thread;
  esp_gemm_amx_fill(g.panels, &j->b, chunk, j->n, j->k);
}

/* Makes all panels of b once for all threads, when they are more than a trifle and no more than a few megabytes: the
 * price of one stored copy of a frozen weight is then paid once per product, not once per thread and row block. */
static esp_status share_b(esp_gjob *j) {
  int64_t blocks = esp_ceil_div(j->k, 32), bytes = esp_ceil_div(j->n, 32) * blocks * ESP_GEMM_BLOCK;
  bool thin = j->a.kind == ESP_GOPER_COLS && j->m <= 64;
  if (j->b.kind == ESP_GOPER_VNNI || thin || bytes < SHARE_LEAST || bytes > ESP_GEMM_SHARED || j->m < 64) return ESP_OK;
  if (dry) {
    dry->panels = most(dry->panels, (size_t)bytes);
  } else {
    ESP_TRY(ensure((void **)&g.panels, &g.panels_bytes, (size_t)bytes));
    esp_parallel(esp_gemm_amx_fill_chunks(&j->b, j->n, j->k), share_fn, j);
  }
  j->b = (esp_goper){g.panels, ESP_BF16, ESP_GOPER_VNNI, blocks};
  return ESP_OK;
}

static void share_added_fn(void *ctx, int64_t chunk, int thread) {
  const esp_gjob *j = ctx;
  (void)thread;
  esp_gemm_added_fill(g.panels, j->added, j->b.kind == ESP_GOPER_VNNI_T, chunk);
}

/* The same for a weight with something added. */
static esp_status share_added(esp_gjob *j) {
  int64_t blocks = esp_ceil_div(j->k, 32), bytes = esp_ceil_div(j->n, 32) * blocks * ESP_GEMM_BLOCK;
  if (dry) {
    dry->panels = most(dry->panels, (size_t)bytes);
  } else {
    ESP_TRY(ensure((void **)&g.panels, &g.panels_bytes, (size_t)bytes));
    esp_parallel(esp_gemm_added_chunks(j->added), share_added_fn, j);
  }
  j->b = (esp_goper){g.panels, ESP_BF16, ESP_GOPER_VNNI, blocks};
  return ESP_OK;
}

static void share_a_fn(void *ctx, int64_t chunk, int thread) {
  const esp_gjob *j = ctx;
  (void)thread;
  esp_gemm_amx_fill_a(g.tiles, &j->a, chunk, j->m, j->k);
}

/* The same for an operand a that lies transposed (the gradient of a dense weight). */
static esp_status share_a(esp_gjob *j) {
  int64_t blocks = esp_ceil_div(j->k, 32), bytes = esp_ceil_div(j->m, 32) * blocks * ESP_GEMM_BLOCK;
  if (j->a.kind != ESP_GOPER_COLS || j->m <= 64 || bytes > ESP_GEMM_SHARED) return ESP_OK;
  if (dry) {
    dry->tiles = most(dry->tiles, (size_t)bytes);
  } else {
    ESP_TRY(ensure((void **)&g.tiles, &g.tiles_bytes, (size_t)bytes));
    esp_parallel(blocks, share_a_fn, j);
  }
  j->a = (esp_goper){g.tiles, ESP_BF16, ESP_GOPER_TILES, blocks};
  return ESP_OK;
}

static bool is_bf16_job(const esp_gjob *j) {
  bool all = j->a.dtype == ESP_BF16 && j->b.dtype == ESP_BF16;
  for (int i = 0; i < j->n_tails; i++) all = all && j->tails[i].a.dtype == ESP_BF16 && j->tails[i].b.dtype == ESP_BF16;
  return all;
}

static esp_status run(esp_gjob *j) {
  if (j->m <= 0 || j->n <= 0) return ESP_OK;
  bool packed = j->b.kind == ESP_GOPER_VNNI || j->b.kind == ESP_GOPER_VNNI_T;
  j->amx = is_bf16_job(j) && (packed || esp_cpu_isa() == ESP_ISA_AMX);
  if (packed && !j->amx) return esp_fail(ESP_ERR_INTERNAL, "a product with packed bf16 weights needs bf16 operands");
  j->id = ++g.next_id;
  if (j->amx) {
    if (j->added) ESP_TRY(share_added(j));
    ESP_TRY(share_b(j));
    ESP_TRY(share_a(j));
    plan_amx(j);
  } else {
    plan_blas(j);
  }
  j->nmb = esp_ceil_div(j->m, j->mb);
  j->nnb = esp_ceil_div(j->n, j->nb);
  j->nkc = esp_max64(1, esp_ceil_div(j->k, j->kc));
  esp_gsizes z = j->amx ? esp_gemm_amx_sizes(j) : esp_gemm_blas_sizes(j);
  ESP_TRY(ensure_scratch(&z));
  if (j->nkc > 1) {
    size_t bytes = (size_t)(j->nkc * j->m * round32(j->n)) * sizeof(float);
    if (dry) {
      dry->partial = most(dry->partial, bytes);
      return ESP_OK;
    }
    ESP_TRY(ensure((void **)&g.partial, &g.partial_bytes, bytes));
    j->partial = g.partial;
  }
  if (dry) return ESP_OK;
  if (!j->amx) esp_gemm_blas_init();
  esp_parallel(j->nkc * j->nmb * j->nnb, chunk_fn, j);
  if (j->nkc > 1) esp_parallel(esp_ceil_div(j->m, REDUCE_ROWS), reduce_fn, j);
  return ESP_OK;
}

static esp_goper oper(const esp_tensor *t, esp_goper_kind kind) {
  assert(t->dtype == ESP_BF16 || t->dtype == ESP_F32);
  return (esp_goper){t->data, t->dtype, kind, t->ld};
}

/* The weight as operand b: (i, k) = (out, in) for linear, exchanged for linear_dx. */
static esp_goper weight_oper(const esp_wview *w, bool exchanged, esp_dtype x) {
  if (w->packed && dry) { /* nothing was packed: the layout it would have */
    if (x == ESP_BF16 && esp_cpu_isa() == ESP_ISA_AMX)
      return (esp_goper){NULL, x, exchanged ? ESP_GOPER_VNNI_T : ESP_GOPER_VNNI, esp_ceil_div(w->in, 32)};
    return (esp_goper){NULL, x, exchanged ? ESP_GOPER_COLS : ESP_GOPER_ROWS, w->in};
  }
  if (!w->packed) return oper(&w->dense, exchanged ? ESP_GOPER_COLS : ESP_GOPER_ROWS);
  const esp_packed *p = w->packed;
  if (p->vnni) return (esp_goper){p->data, p->dtype, exchanged ? ESP_GOPER_VNNI_T : ESP_GOPER_VNNI, p->blocks};
  return (esp_goper){p->data, p->dtype, exchanged ? ESP_GOPER_COLS : ESP_GOPER_ROWS, p->in};
}

static void product(esp_backend *be, esp_tensor c, esp_tensor a, const esp_wview *w, bool exchanged, esp_tensor bias,
                    const esp_tail *tails, int n_tails, float beta) {
  if (be->sticky != ESP_OK) return;
  if (n_tails > ESP_GEMM_MAX_TAILS) {
    be->sticky = esp_fail(ESP_ERR_INTERNAL, "%d adapters on one product, at most %d", n_tails, ESP_GEMM_MAX_TAILS);
    return;
  }
  esp_gjob j = {.m = esp_tensor_rows(&a), .n = exchanged ? w->in : w->out, .k = exchanged ? w->out : w->in};
  assert(esp_tensor_cols(&a) == j.k && esp_tensor_cols(&c) == j.n && esp_tensor_rows(&c) == j.m);
  j.a = oper(&a, ESP_GOPER_ROWS);
  j.b = weight_oper(w, exchanged, a.dtype);
  j.added = w->n_added > 0 ? w : NULL;
  j.c = c.data;
  j.c_type = c.dtype;
  j.ldc = c.ld;
  j.alpha = 1;
  j.beta = beta;
  j.bias = bias.data;
  j.bias_type = bias.dtype;
  for (int i = 0; i < n_tails; i++) {
    const esp_tail *t = &tails[i];
    esp_gtail *d = &j.tails[j.n_tails++];
    d->a = oper(&t->x, ESP_GOPER_ROWS);
    d->b = oper(&t->w, exchanged ? ESP_GOPER_COLS : ESP_GOPER_ROWS);
    d->k = esp_tensor_cols(&t->x);
    d->n0 = t->col0;
    d->n1 = t->col0 + (exchanged ? esp_tensor_cols(&t->w) : esp_tensor_rows(&t->w));
    assert(d->n0 >= 0 && d->n1 <= j.n && esp_tensor_rows(&t->x) == j.m);
  }
  esp_status st = run(&j);
  if (st != ESP_OK) be->sticky = st;
}

void esp_cpu_linear(esp_backend *be, esp_tensor y, esp_tensor x, const esp_wview *w, esp_tensor bias,
                    const esp_tail *tails, int n_tails, float beta) {
  product(be, y, x, w, false, bias, tails, n_tails, beta);
}

void esp_cpu_linear_dx(esp_backend *be, esp_tensor dx, esp_tensor dy, const esp_wview *w, const esp_tail *tails,
                       int n_tails, float beta) {
  esp_tensor none = {0};
  product(be, dx, dy, w, true, none, tails, n_tails, beta);
}

void esp_cpu_matmul(esp_backend *be, esp_tensor c, esp_tensor a, bool trans_a, esp_tensor b, bool trans_b, float alpha,
                    float beta) {
  if (be->sticky != ESP_OK) return;
  esp_gjob j = {.m = trans_a ? esp_tensor_cols(&a) : esp_tensor_rows(&a),
                .k = trans_a ? esp_tensor_rows(&a) : esp_tensor_cols(&a),
                .n = trans_b ? esp_tensor_rows(&b) : esp_tensor_cols(&b)};
  assert(j.k == (trans_b ? esp_tensor_cols(&b) : esp_tensor_rows(&b)));
  assert(esp_tensor_rows(&c) == j.m && esp_tensor_cols(&c) == j.n);
  j.a = oper(&a, trans_a ? ESP_GOPER_COLS : ESP_GOPER_ROWS);
  j.b = oper(&b, trans_b ? ESP_GOPER_ROWS : ESP_GOPER_COLS);
  j.c = c.data;
  j.c_type = c.dtype;
  j.ldc = c.ld;
  j.alpha = alpha;
  j.beta = beta;
  /* dB += dy^T T: as (T^T dy)^T the wide operand needs only its row pairs interleaved */
  if (trans_a && j.n <= 64 && j.n < j.m) {
    esp_goper o = j.a;
    int64_t m = j.m;
    j.a = j.b;
    j.b = o;
    j.m = j.n;
    j.n = m;
    j.c_trans = true;
  }
  esp_status st = run(&j);
  if (st != ESP_OK) be->sticky = st;
}

void esp_cpu_matmul_taken(esp_backend *be, esp_tensor a, esp_tensor b, esp_gemm_take take, void *ctx) {
  if (be->sticky != ESP_OK) return;
  esp_gjob j = {.m = esp_tensor_cols(&a), .n = esp_tensor_cols(&b), .k = esp_tensor_rows(&a), .take = take};
  assert(esp_tensor_rows(&b) == j.k && a.dtype == ESP_BF16 && b.dtype == ESP_BF16);
  j.take_ctx = ctx;
  j.a = oper(&a, ESP_GOPER_COLS);
  j.b = oper(&b, ESP_GOPER_COLS);
  j.c_type = ESP_F32;
  j.alpha = 1;
  esp_status st = run(&j);
  if (st != ESP_OK) be->sticky = st;
}

static float load_elem(const void *p, esp_dtype t, int64_t i) {
  return t == ESP_BF16 ? esp_bf16_to_f32(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

void esp_gemm_epilogue(const esp_gjob *j, int64_t m0, int64_t n0, int64_t rows, int64_t cols, const float *sum,
                       int64_t lds) {
  if (esp_cpu_isa() == ESP_ISA_AMX) {
    esp_gemm_epilogue_avx512(j, m0, n0, rows, cols, sum, lds);
    return;
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < cols; i++) {
      int64_t e = j->c_trans ? (n0 + i) * j->ldc + m0 + r : (m0 + r) * j->ldc + n0 + i;
      float v = j->alpha * sum[r * lds + i];
      if (j->bias) v += load_elem(j->bias, j->bias_type, n0 + i);
      if (j->beta != 0) v += j->beta * load_elem(j->c, j->c_type, e);
      if (j->c_type == ESP_BF16)
        ((uint16_t *)j->c)[e] = esp_f32_to_bf16(v);
      else
        ((float *)j->c)[e] = v;
    }
}
