/* attention.c: cuts attention into (sequence, head, block of queries) forward and (sequence, head) backward, orders the
 * pieces longest first, and sums the key and value gradients of a group of query heads in head order. */
#include "backend/cpu/attention_amx.h"
#include "backend/cpu/ops.h"
#include "backend/cpu/work.h"
#include "core/cpu.h"
#include "core/threads.h"

static bool use_tiles(const esp_attn_args *a, bool backward) {
  if (esp_cpu_isa() != ESP_ISA_AMX || a->head_dim % 32 || a->head_dim > 256) return false;
  const esp_tensor *t[] = {&a->q, &a->k, &a->v, &a->o, &a->d_o, &a->d_q};
  for (int i = 0; i < (backward ? 6 : 4); i++)
    if (t[i]->dtype != ESP_BF16) return false;
  return true;
}
static int64_t round64(int64_t n) {
  return (n + 63) / 64 * 64;
}
static int64_t fwd_scratch(const esp_attn_args *a) {
  return use_tiles(a, false) ? esp_amx_scratch(a->head_dim) : esp_attn_scratch(a->head_dim);
}
static int64_t bwd_scratch(const esp_attn_args *a) {
  int64_t n = esp_attn_max_len(a);
  return round64(use_tiles(a, true) ? esp_amx_bwd_scratch(a->head_dim) : esp_attn_bwd_scratch(a->head_dim, n));
}
static int64_t sums_bytes(const esp_attn_args *a) {
  return round64(esp_tensor_rows(&a->q) * esp_attn_bwd_heads(a) * a->head_dim * 2 * 4);
}
int64_t esp_cpu_work_attn(const esp_attn_args *a) {
  return fwd_scratch(a) * esp_threads_count() + (use_tiles(a, false) ? esp_amx_pack_bytes(a, false) : 0);
}
int64_t esp_cpu_work_attn_bwd(const esp_attn_args *a) {
  return bwd_scratch(a) * esp_threads_count() + sums_bytes(a) + (use_tiles(a, true) ? esp_amx_pack_bytes(a, true) : 0);
}

typedef struct attn_op {
  const esp_attn_args *a;
  const esp_kernels *k;
  char *scratch;
  int64_t scratch_bytes;
  int head0, n_heads; /* backward: the query heads of this pass */
  int64_t tokens;
  float *dk, *dv; /* backward: [n_heads][T, head_dim] fp32 */
  void *pack;     /* tile path */
  bool backward;
} attn_op;

#define PACK_BLOCKS 8
static void pack_chunk(void *ctx, int64_t chunk, int thread) {
  (void)thread;
  const attn_op *o = ctx;
  int64_t blocks = esp_amx_blocks(o->a), end = (chunk + 1) * PACK_BLOCKS;
  for (int64_t b = chunk * PACK_BLOCKS; b < end && b < blocks * o->a->kv_heads; b++)
    esp_amx_attn_pack(o->a, o->backward, o->pack, (int)(b / blocks), b % blocks);
}
static void pack_all(attn_op *o) {
  esp_parallel((esp_amx_blocks(o->a) * o->a->kv_heads + PACK_BLOCKS - 1) / PACK_BLOCKS, pack_chunk, o);
}

/* Chunk -> (sequence, block, head): blocks of one sequence from its last (the longest under a causal mask). */
static void attn_chunk(void *ctx, int64_t chunk, int thread) {
  const attn_op *o = ctx;
  const esp_attn_args *a = o->a;
  int64_t block = chunk / a->heads;
  for (int s = 0; s < a->n_seqs; s++) {
    int64_t len = a->cu_seqlens[s + 1] - a->cu_seqlens[s], n = (len + ESP_ATTN_BQ - 1) / ESP_ATTN_BQ;
    if (block >= n) {
      block -= n;
      continue;
    }
    esp_attn_part p = {.a = a,
                       .t0 = a->cu_seqlens[s],
                       .len = len,
                       .head = (int)(chunk % a->heads),
                       .q0 = (n - 1 - block) * ESP_ATTN_BQ,
                       .scratch = o->scratch + thread * o->scratch_bytes,
                       .pack = o->pack,
                       .block0 = esp_amx_first_block(a, s)};
    if (o->pack)
      esp_amx_attn(&p);
    else
      o->k->attn(&p);
    return;
  }
}

void esp_cpu_attn(esp_backend *be, const esp_attn_args *a) {
  if (be->sticky != ESP_OK) return;
  attn_op o = {.a = a, .k = esp_cpu_kernels(), .scratch_bytes = fwd_scratch(a)};
  o.scratch = esp_cpu_work(be, esp_cpu_work_attn(a));
  if (!o.scratch) return;
  if (use_tiles(a, false)) {
    o.pack = o.scratch + o.scratch_bytes * esp_threads_count();
    pack_all(&o);
  }
  int64_t blocks = 0;
  for (int s = 0; s < a->n_seqs; s++)
    blocks += (a->cu_seqlens[s + 1] - a->cu_seqlens[s] + ESP_ATTN_BQ - 1) / ESP_ATTN_BQ;
  esp_parallel(blocks * a->heads, attn_chunk, &o);
}

static void attn_bwd_chunk(void *ctx, int64_t chunk, int thread) {
  const attn_op *o = ctx;
  const esp_attn_args *a = o->a;
  int s = (int)(chunk / o->n_heads), h = (int)(chunk % o->n_heads);
  int64_t t0 = a->cu_seqlens[s], at = (h * o->tokens + t0) * a->head_dim;
  esp_attn_part p = {.a = a,
                     .t0 = t0,
                     .len = a->cu_seqlens[s + 1] - t0,
                     .head = o->head0 + h,
                     .scratch = o->scratch + thread * o->scratch_bytes,
                     .pack = o->pack,
                     .block0 = esp_amx_first_block(a, s),
                     .dk = o->dk + at,
                     .dv = o->dv + at};
  if (p.len <= 0) return;
  if (o->pack)
    esp_amx_attn_bwd(&p);
  else
    o->k->attn_bwd(&p);
}

#define SUM_ROWS 16
/* d_k[t, kv head] = sum of its query heads' dK, in head order; likewise d_v. */
static void attn_bwd_sum(void *ctx, int64_t chunk, int thread) {
  (void)thread;
  const attn_op *o = ctx;
  const esp_attn_args *a = o->a;
  int group = a->heads / a->kv_heads, d = a->head_dim;
  int64_t t1 = (chunk + 1) * SUM_ROWS < o->tokens ? (chunk + 1) * SUM_ROWS : o->tokens;
  for (int64_t t = chunk * SUM_ROWS; t < t1; t++)
    for (int h = 0; h < o->n_heads; h += group)
      for (int which = 0; which < 2; which++) {
        float *src = (which ? o->dv : o->dk) + (h * o->tokens + t) * d;
        for (int g = 1; g < group; g++)
          for (int i = 0; i < d; i++) src[i] += src[g * o->tokens * d + i];
        esp_tensor out = which ? a->d_v : a->d_k;
        esp_tensor row = esp_tensor_1d(
            (char *)esp_row(&out, t) + (size_t)((o->head0 + h) / group * d) * esp_dtype_size(out.dtype), out.dtype, d);
        o->k->axpby(row, 1.0f, esp_tensor_1d(src, ESP_F32, d), 0.0f, 0, 1);
      }
}

void esp_cpu_attn_bwd(esp_backend *be, const esp_attn_args *a) {
  if (be->sticky != ESP_OK) return;
  attn_op o = {.a = a,
               .k = esp_cpu_kernels(),
               .scratch_bytes = bwd_scratch(a),
               .tokens = esp_tensor_rows(&a->q),
               .backward = true};
  o.scratch = esp_cpu_work(be, esp_cpu_work_attn_bwd(a));
  if (!o.scratch) return;
  int batch = esp_attn_bwd_heads(a);
  o.dk = (float *)(o.scratch + o.scratch_bytes * esp_threads_count());
  if (use_tiles(a, true)) {
    o.pack = (char *)o.dk + sums_bytes(a);
    pack_all(&o);
  }
  for (o.head0 = 0; o.head0 < a->heads; o.head0 += batch) {
    o.n_heads = a->heads - o.head0 < batch ? a->heads - o.head0 : batch;
    o.dv = o.dk + o.n_heads * o.tokens * a->head_dim;
    esp_parallel((int64_t)a->n_seqs * o.n_heads, attn_bwd_chunk, &o);
    esp_parallel((o.tokens + SUM_ROWS - 1) / SUM_ROWS, attn_bwd_sum, &o);
  }
}

typedef struct decode_op {
  const esp_decode_args *a;
  const esp_kernels *k;
  float *scores;
  int64_t stride;
} decode_op;
static void decode_chunk(void *ctx, int64_t chunk, int thread) {
  const decode_op *o = ctx;
  o->k->attn_decode(o->a, chunk / o->a->heads, (int)(chunk % o->a->heads), o->scores + thread * o->stride);
}
void esp_cpu_attn_decode(esp_backend *be, const esp_decode_args *a) {
  if (be->sticky != ESP_OK) return;
  decode_op o = {a, esp_cpu_kernels(), esp_cpu_work(be, esp_cpu_work_decode(a)), (a->max_len + 15) / 16 * 16};
  if (o.scores) esp_parallel(esp_tensor_rows(&a->q) * a->heads, decode_chunk, &o);
}
