/* backend.h: the op table, the first of the five narrow waists. Everything above it (model, adapters, optimizers,
 * trainer) is written once over these operations; cpu/, count/ and cuda/ (a plug-in loaded at run time) implement them.
 *
 * Conventions
 *  - Tensors are views (core/tensor.h); data pointers belong to the backend that allocated them. Activations are
 *    [T, width] with T = all tokens of a micro-batch, in the compute type (ESP_BF16 or ESP_F32), possibly with a row
 *    stride (column views of a fused projection). Master parameters, gradients, losses and statistics are fp32.
 *  - Accumulation is fp32 whatever the storage; a result is rounded once.
 *  - Operations return nothing. A failure is sticky: later operations do nothing and esp_backend_sync returns it.
 *  - Shape errors are bugs of the caller: asserted in debug builds.
 *  - `count` computes nothing: it adds bytes, floating-point operations and launches to `stats`.
 *  - Results do not depend on the thread count, and two runs give the same bits.
 *  - Work may be asynchronous: host memory given to upload may be reused at once, a download has arrived when it
 *    returns, everything else is finished after esp_backend_sync.
 */
#ifndef ESP_BACKEND_H
#define ESP_BACKEND_H

#include <stdbool.h>
#include <stdint.h>

#include "core/error.h"
#include "core/mem.h"
#include "core/tensor.h"

typedef struct esp_backend esp_backend;

/* A sparse matrix by rows; everything in backend memory. Entry k has the value values[order[k]] (order NULL:
 * values[k]), so that a matrix and its transpose share one array of values. */
typedef struct esp_csr {
  int64_t rows, entries;
  const int32_t *start; /* [rows+1] */
  const int32_t *index; /* [entries], the column */
  const int32_t *order; /* [entries] or NULL */
  const float *values;  /* [entries] */
} esp_csr;

/* A sparse matrix that is added to rows [row0, row0 + m.rows) of a weight while a product with it is made. */
typedef struct esp_added {
  int64_t row0;
  esp_csr m;
} esp_added;

/* A frozen weight as an operation sees it, between borrow and return (model/weight.h). For matmul operands `packed`
 * is the backend's own layout made once by `pack`; a trained weight has packed == NULL and a dense [out, in].
 * added: only what `linear_adds` has said yes to; the sum is rounded to the type of the weight, as a merge would. */
typedef struct esp_wview {
  int64_t out, in;
  const void *packed;
  esp_tensor dense;
  const esp_added *added;
  int n_added;
} esp_wview;

/* y[:, col0 : col0+w.rows] += x w^T   (linear):     x [T,R], w [n,R]
 * dx                       += x w     (linear_dx):  x [T,R], w [R,in], col0 == 0
 * The low-rank part of an adapter, added while the base product is still in registers. Same dtype as x / dy. */
typedef struct esp_tail {
  int64_t col0;
  esp_tensor x, w;
} esp_tail;

typedef struct esp_attn_args {
  esp_tensor q, k, v, o;     /* [T, heads*head_dim], [T, kv_heads*head_dim] x2, [T, heads*head_dim]; views allowed */
  float *lse;                /* heads*T log-sum-exps in the backend's own order; written by forward, read by backward */
  const int32_t *cu_seqlens; /* HOST pointer, [n_seqs+1], cu_seqlens[n_seqs] == T; the one given to attn_begin */
  int n_seqs;
  int heads, kv_heads, head_dim;
  float scale;   /* 1/sqrt(head_dim) unless the model says otherwise */
  float softcap; /* 0: none; else cap*tanh(s/cap) */
  int window;    /* 0: none; else a query sees the `window` latest keys, itself included (HF) */
  bool causal;
  esp_tensor d_o, d_q, d_k, d_v; /* backward only; d_q, d_k, d_v overwritten */
} esp_attn_args;

/* One new token per sequence against a cache. */
typedef struct esp_decode_args {
  esp_tensor q, o;             /* [B, heads*head_dim] */
  esp_tensor k_cache, v_cache; /* [B*max_len, kv_heads*head_dim]: sequence b owns rows b*max_len.. */
  const int32_t *positions;    /* backend memory [B]: position of the new token; it sees positions[b]+1 cached keys */
  int64_t max_len;
  int heads, kv_heads, head_dim;
  float scale, softcap;
  int window;
} esp_decode_args;

typedef enum esp_act { ESP_ACT_SILU, ESP_ACT_GELU_TANH, ESP_ACT_GELU_ERF, ESP_ACT_TANH, ESP_ACT_RELU } esp_act;
typedef enum esp_norm_kind { ESP_NORM_RMS, ESP_NORM_LAYER } esp_norm_kind;

/* y = norm(r) * (w + offset) + b, with r = x + residual when residual.data != NULL (r is then written to r_out, which
 * may alias residual or x). RMS: r * rstd; LAYER: (r - mean) * rstd. Only rstd (and mean for LAYER) are saved. */
typedef struct esp_norm_args {
  esp_norm_kind kind;
  esp_tensor x, residual, r_out, y; /* [T, d] or heads as [T*heads, head_dim] rows */
  esp_tensor w, b;                  /* fp32 or compute type, [d]; b.data NULL: none */
  float eps, offset;                /* offset 1 for Gemma's (1 + w) */
  float *rstd, *mean;               /* [rows]; NULL when nothing is to be saved */
} esp_norm_args;
/* dx = (+=, when accumulate) d norm / dx applied to dy; dw, db accumulate in fp32 when not NULL (trained norms). */
typedef struct esp_norm_bwd_args {
  esp_norm_kind kind;
  esp_tensor r, dy, dx; /* r: the input of the norm (r_out of forward) */
  esp_tensor w;
  float offset;
  const float *rstd, *mean;
  float *dw, *db;
  bool accumulate;
} esp_norm_bwd_args;

/* Rotates pairs (i, i + rot/2) of the first `rot` elements of each head ("rotate half"). table: [positions, rot/2]
 * cos then sin as two arrays. inverse: the backward pass. In place on x [T, heads*head_dim] (view). */
typedef struct esp_rope_args {
  esp_tensor x;
  const float *cos_t, *sin_t; /* backend memory, [max_pos, rot/2] each */
  const int32_t *positions;   /* backend memory, [T] */
  int heads, head_dim, rot;
  bool inverse;
} esp_rope_args;

/* Softmax cross-entropy over rows of fp32 logits [n, V]. Adds sum_t weight_t * (lse_t - logit_t[target_t]) to
 * sums[0] and the number of rows whose largest logit (the first of equals) is the target to sums[1], and writes d =
 * scale * weight * (softmax - onehot) in the type of `d` (d.data NULL: evaluation only; a row of d may begin where its
 * row of logits begins, which it then overwrites). logprob (optional, [n]): log p(target). softcap as in attention,
 * applied to the logits. */
typedef struct esp_ce_args {
  esp_tensor logits, d;
  const int32_t *targets; /* backend memory [n]; all valid */
  const float *weights;   /* backend memory [n] */
  float scale, softcap;
  double *sums; /* backend memory, [2] */
  float *logprob;
} esp_ce_args;

/* Distillation over rows of fp32 logits [n, V]: p = softmax(teacher/T), q = softmax(student/T), softcap as above. Adds
 * factor * sum_t weight_t KL(p_t || q_t) to sums[0] and writes d = scale * factor * weight * dKL/dstudent, fp32 (data
 * NULL: evaluation only; may be `teacher` itself). Rows that are equal bit by bit give exactly 0 in both. */
typedef struct esp_distill_args {
  esp_tensor student, teacher, d;
  const float *weights; /* backend memory [n] */
  float temperature, factor, scale, softcap;
  double *sums; /* backend memory, [2] */
} esp_distill_args;

/* How far hidden states x are from a teacher's h, per row of n elements:
 *   L2     mean (x - h)^2
 *   L1     mean |x - h|
 *   BELOW  mean max(0, h - x)^2: only what fell below the teacher (I-LoRA, arXiv 2402.18865)
 *   MARGIN GeRe (arXiv 2508.04676): a state that the teacher has below low[j] shall stay below it, one above high[j]
 *          above it, one between them between them; the mean over the elements that violate theirs. x = h gives 0. */
typedef enum esp_hidden_loss {
  ESP_HIDDEN_NONE,
  ESP_HIDDEN_L2,
  ESP_HIDDEN_L1,
  ESP_HIDDEN_BELOW,
  ESP_HIDDEN_MARGIN
} esp_hidden_loss;
/* Adds factor * sum_t weight_t loss_t to sums[0] and, where d has data, scale * factor * weight * dloss/dx to d. Any
 * mix of bf16 and fp32. */
typedef struct esp_hidden_args {
  esp_hidden_loss kind;
  esp_tensor x, teacher, d;
  const float *low, *high; /* MARGIN: backend memory [cols] */
  const float *weights;    /* backend memory [n] */
  float factor, scale;
  double *sums; /* backend memory, [2] */
} esp_hidden_args;

/* One optimizer's elementwise update over a run of parameters; the mathematics of each rule is in optim_rules.h,
 * one header compiled for every backend. */
typedef struct esp_update_args {
  int rule; /* esp_optim_rule */
  int64_t n;
  float *master;
  const float *grad;
  void *shadow; /* compute-type copy refreshed in the same pass; NULL: none */
  esp_dtype shadow_dtype;
  float *state[4];
  float hyper[16];
  float grad_scale; /* clipping */
} esp_update_args;

/* Ranks that gate themselves (mora_rank). Each row is the activations t of one module. s = t / |t| (0 where |t| is 0),
 * w = softmax(s / tau) over the row; kept: s >= threshold (when that is above 0) and among the `top` largest (0: all;
 * of equals the first). */
enum { ESP_GATE_MOST = 1024 }; /* columns at most */
typedef struct esp_gate {
  int64_t top;
  float tau, threshold, scale;
} esp_gate;

/* The groups of block_matmul and block_grad: tokens, columns of one, elements from one to the next, one of them. */
static inline int64_t esp_block_tokens(const esp_tensor *x) {
  return x->ndim == 3 ? x->shape[1] : esp_tensor_rows(x);
}
static inline int64_t esp_block_width(const esp_tensor *x, int blocks) {
  return x->ndim == 3 ? x->shape[2] : esp_tensor_cols(x) / blocks;
}
static inline int64_t esp_block_step(const esp_tensor *x, int blocks) {
  return x->ndim == 3 ? x->shape[1] * x->shape[2] : esp_tensor_cols(x) / blocks;
}
static inline esp_tensor esp_block_of(const esp_tensor *x, int blocks, int64_t g) {
  int64_t width = esp_block_width(x, blocks);
  if (x->ndim != 3) return esp_tensor_cols_view(x, g * width, width);
  char *data = (char *)x->data + (size_t)(g * x->shape[1] * width) * esp_dtype_size(x->dtype);
  return esp_tensor_2d(data, x->dtype, x->shape[1], width);
}

typedef struct esp_backend_stats {
  double flops, bytes; /* floating-point operations; bytes read + written */
  int64_t launches;
} esp_backend_stats;

typedef struct esp_backend_ops {
  const char *name; /* "cpu", "count", "cuda" */

  /* memory */
  void *(*alloc)(esp_backend *be, esp_mem_kind kind, int64_t bytes); /* zeroed; NULL, error set */
  void (*free)(esp_backend *be, void *ptr);
  void (*upload)(esp_backend *be, void *dst, const void *host, int64_t bytes);
  void (*download)(esp_backend *be, void *host, const void *src, int64_t bytes); /* zeros from `count` */
  void (*zero)(esp_backend *be, void *dst, int64_t bytes);
  esp_status (*sync)(esp_backend *be);
  void (*destroy)(esp_backend *be);
  /* Host memory that copies run from and to at full speed beside the computation (page-locked on a device). */
  void *(*host_alloc)(esp_backend *be, int64_t bytes); /* NULL, error set */
  void (*host_free)(esp_backend *be, void *ptr);
  void (*download_later)(esp_backend *be, void *host, const void *src, int64_t bytes); /* arrived after sync */
  /* The scratch that operations share, made at least so large; its size. `count` answers what a run will need, which a
   * run reserves before its first step. NULL: nothing to reserve. */
  int64_t (*scratch)(esp_backend *be, int64_t at_least);
  /* Copies of frozen weights beside the computation, on one of two channels; NULL, with pack_host, where all memory is
   * the host's. stage: dst <- host (host_alloc memory),
   * begun when everything issued so far is done; stage_wait: what is issued from here on waits for the channel. */
  void (*stage)(esp_backend *be, int channel, void *dst, const void *host, int64_t bytes);
  void (*stage_wait)(esp_backend *be, int channel);
  /* A piece of a pass that is the same operations on the same addresses whenever `key` is the same; values that differ
   * lie in backend memory. begin answers true when it has replayed what was recorded: the caller then issues nothing.
   * `pair` != 0: it replays only when that piece is recorded too (a backward needs what the host kept of its forward).
   * Both NULL: never. Use esp_backend_piece_begin/_end. */
  bool (*piece_begin)(esp_backend *be, uint64_t key, uint64_t pair);
  void (*piece_end)(esp_backend *be);

  /* matmul. pack: n weights [out_i, in] (host memory, bf16/fp16/fp32; data NULL only for `count`) stacked along out,
   * into one operand for products in `compute` type. With `transposed` each is stored [in, out_i] (GPT-2 Conv1D).
   * unpack_rows is not needed: the file is the original. */
  void *(*pack)(esp_backend *be, const esp_tensor *w, int n, bool transposed, esp_dtype compute);
  void (*pack_free)(esp_backend *be, void *packed);
  /* The same operand in host memory, and its size: `stage` brings it into a buffer of that many bytes, which is then a
   * packed operand. */
  int64_t (*pack_bytes)(esp_backend *be, int64_t out, int64_t in, esp_dtype compute);
  void *(*pack_host)(esp_backend *be, const esp_tensor *w, int n, bool transposed, esp_dtype compute);
  /* y = x W^T + bias + tails + beta*y.  bias fp32 or compute type [out], data NULL: none. beta is 0 or 1.
   * y may be fp32 while x is bf16 (logits). */
  void (*linear)(esp_backend *be, esp_tensor y, esp_tensor x, const esp_wview *w, esp_tensor bias,
                 const esp_tail *tails, int n_tails, float beta);
  /* dx = dy W + tails + beta*dx */
  void (*linear_dx)(esp_backend *be, esp_tensor dx, esp_tensor dy, const esp_wview *w, const esp_tail *tails,
                    int n_tails, float beta);
  /* Whether linear and linear_dx of so many rows as x has, of its type, take `m` as added to w, which costs less than a
   * product of its own. NULL: never. */
  bool (*linear_adds)(esp_backend *be, esp_tensor x, const esp_wview *w, const esp_csr *m);
  /* c = alpha * op(a) op(b) + beta * c; any mix of bf16 and fp32; thin shapes (rank 8 to 64) have own kernels:
   * T = s x A^T, dT = s dy B, dB += dy^T T, dA += dT^T x (gradients fp32). */
  void (*matmul)(esp_backend *be, esp_tensor c, esp_tensor a, bool trans_a, esp_tensor b, bool trans_b, float alpha,
                 float beta);

  /* transformer parts, forward beside backward */
  void (*embed)(esp_backend *be, esp_tensor y, esp_tensor table, const int32_t *ids,
                float scale); /* table may be host mmap for cpu */
  void (*embed_bwd)(esp_backend *be, float *dtable, esp_tensor dy, const int32_t *ids, float scale); /* deterministic */
  void (*norm)(esp_backend *be, const esp_norm_args *a);
  void (*norm_bwd)(esp_backend *be, const esp_norm_bwd_args *a);
  void (*rope)(esp_backend *be, const esp_rope_args *a);
  /* Before the attention calls of a pass: the sequences they will name (host, copied). Returns what of them the issued
   * operations depend on (bucketed counts and lengths), for the key of a piece. */
  uint64_t (*attn_begin)(esp_backend *be, const int32_t *cu_seqlens, int n_seqs);
  void (*attn)(esp_backend *be, const esp_attn_args *a);
  void (*attn_bwd)(esp_backend *be, const esp_attn_args *a);
  void (*attn_decode)(esp_backend *be, const esp_decode_args *a);
  /* h = act(gu[:, :F]) * gu[:, F:]   and   dgu from dh and gu (dgu may alias gu) */
  void (*glu)(esp_backend *be, esp_tensor h, esp_tensor gu, esp_act act);
  void (*glu_bwd)(esp_backend *be, esp_tensor dgu, esp_tensor dh, esp_tensor gu, esp_act act);
  void (*act)(esp_backend *be, esp_tensor y, esp_tensor x, esp_act act);
  void (*act_bwd)(esp_backend *be, esp_tensor dx, esp_tensor dy, esp_tensor x, esp_act act); /* dx may alias dy */
  void (*cross_entropy)(esp_backend *be, const esp_ce_args *a);
  void (*distill)(esp_backend *be, const esp_distill_args *a);
  void (*hidden_loss)(esp_backend *be, const esp_hidden_args *a);

  /* elementwise, rows, reductions. Any mix of bf16 and fp32. */
  void (*axpby)(esp_backend *be, esp_tensor y, float a, esp_tensor x,
                float b); /* y = a*x + b*y; b == 0 never reads y */
  /* Parts of adapter kinds. Any mix of bf16 and fp32 where nothing else is said; views allowed; beta 0 never reads.
   * What is written may be the same view as an operand of the same type in mul, mul_rows and block_inverse, and
   * overlaps no operand elsewhere. */
  void (*mul)(esp_backend *be, esp_tensor y, esp_tensor a, esp_tensor b, float beta); /* y = a*b + beta*y */
  /* y[t,:] = x[t,:]*v[t] + beta*y;  v: [T], or a column [T, 1] with a stride. row_dot and col_dot are its backward and
   * that of mul_cols. */
  void (*mul_rows)(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor v, float beta);
  void (*col_dot)(esp_backend *be, float *out, esp_tensor a, esp_tensor b);             /* out[j] += sum_t a b */
  void (*row_dot)(esp_backend *be, float *out, esp_tensor a, esp_tensor b, float beta); /* out[t] = sum_j a b + .. */
  /* x [T, G*p], y [T, G*q], or either by groups, [G, T, p] without gaps; m: G blocks stacked by rows, [G*p, q], or
   * [G*q, p] when `trans`; `shared`: one block for all. y_g = alpha x_g op(m_g) + beta y_g, so that dx =
   * block_matmul(dy, m, !trans).  block_grad: dm_g += alpha x_g^T dy_g (fp32 dm [G*p, q]; summed over g when shared; of
   * a transposed m: exchange x and dy). */
  void (*block_matmul)(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor m, int blocks, bool shared, bool trans,
                       float alpha, float beta);
  void (*block_grad)(esp_backend *be, esp_tensor dm, esp_tensor x, esp_tensor dy, int blocks, bool shared, float alpha);
  /* fp32 [G*n, n]; without pivoting: for blocks whose symmetric part is positive definite (I + skew, say). */
  void (*block_inverse)(esp_backend *be, esp_tensor inv, esp_tensor m, int blocks);
  /* Each row as [a, b] becomes [b, a]. Its backward is transpose_rows(b, a). */
  void (*transpose_rows)(esp_backend *be, esp_tensor y, esp_tensor x, int64_t a, int64_t b);
  /* y[i, p*cols(z)+q] = x[i,p] z[i,q];  dx, dz (fp32, added to; data NULL: skip) from dy. */
  void (*khatri_rao)(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor z);
  void (*khatri_rao_bwd)(esp_backend *be, esp_tensor dx, esp_tensor dz, esp_tensor dy, esp_tensor x, esp_tensor z);
  /* y[t, r] += sum over the entries k of row r of value(k) x[t, index[k]]  (y [T, rows], x [T, columns]);  sparse_grad:
   * the gradient of value(k), where it lies, += sum_t dy[t, r] x[t, index[k]]. dx = sparse_matmul(dy) with the
   * transpose. Values may be rounded to bf16 where x and y are. */
  void (*sparse_matmul)(esp_backend *be, esp_tensor y, esp_tensor x, const esp_csr *s);
  void (*sparse_grad)(esp_backend *be, float *dvalues, esp_tensor dy, esp_tensor x, const esp_csr *s);
  /* y = scale * w * t where kept, else 0; columns between the runs are left alone. Backward takes what is kept as a
   * constant; dx may be the same view as dy. */
  void (*rank_gate)(esp_backend *be, esp_tensor y, esp_tensor x, const esp_gate *g);
  void (*rank_gate_bwd)(esp_backend *be, esp_tensor dx, esp_tensor dy, esp_tensor x, const esp_gate *g);
  void (*mul_cols)(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor v);            /* y[t,j] = x[t,j] * v[j] */
  void (*gather_rows)(esp_backend *be, esp_tensor y, esp_tensor x, const int32_t *rows);  /* y[i] = x[rows[i]] */
  void (*scatter_rows)(esp_backend *be, esp_tensor y, esp_tensor x, const int32_t *rows); /* y[rows[i]] = x[i] */
  /* y = x * mask/(1-p) + beta*y; mask element e = draw e of (esp_draw_seed(seed, *draw), stream). Element index =
   * row*cols+col, views allowed. draw: backend memory, so that a recorded piece draws anew when it is replayed. */
  void (*dropout)(esp_backend *be, esp_tensor y, esp_tensor x, float p, uint64_t seed, const uint64_t *draw,
                  uint64_t stream, float beta);
  void (*col_sum)(esp_backend *be, float *out, esp_tensor x);                           /* out[j] += sum_t x[t,j] */
  void (*dot)(esp_backend *be, double *out, const float *a, const float *b, int64_t n); /* *out = <a,b>, fixed order */
  void (*update)(esp_backend *be, const esp_update_args *a);
} esp_backend_ops;

struct esp_backend {
  const esp_backend_ops *ops;
  void *impl;
  esp_status sticky;
  char device[64];         /* "cpu", "cuda:0 NVIDIA H200", "count" */
  bool on_host;            /* memory can be read and written by the processor: cpu, and count, which models it */
  bool tf32;               /* products of fp32 operands may round them to 10 bits of mantissa (cuda) */
  esp_backend_stats stats; /* kept by every backend that is asked to (count always) */
};

/* name: "cpu"; "cuda" or "cuda:N" (the plug-in, see backend/plugin.h); "count" and "count:cuda", which need no device,
 * read no weight and account the memory that the cpu or the cuda backend would hold. */
esp_status esp_backend_create(const char *name, esp_backend **out);
void esp_backend_destroy(esp_backend *be);
static inline esp_status esp_backend_sync(esp_backend *be) {
  return be->ops->sync(be);
}
/* After an allocation that gave NULL: what failed before it (a lost device, say), else memory. */
static inline esp_status esp_backend_why_null(const esp_backend *be) {
  return be->sticky != ESP_OK ? be->sticky : ESP_ERR_MEMORY;
}
static inline bool esp_backend_counts(const esp_backend *be) {
  return be->ops->name[0] == 'c' && be->ops->name[1] == 'o';
}
/* Memory of the backend can be read and written by the processor (cpu; count, which touches nothing). */
static inline bool esp_backend_on_host(const esp_backend *be) {
  return be->on_host;
}
/* key 0: not a piece. Each begin is followed by an end. */
static inline bool esp_backend_piece_begin(esp_backend *be, uint64_t key, uint64_t pair) {
  return key && be->ops->piece_begin && be->ops->piece_begin(be, key, pair);
}
static inline void esp_backend_piece_end(esp_backend *be, uint64_t key) {
  if (key && be->ops->piece_end) be->ops->piece_end(be);
}

/* registry: one line per backend */
esp_status esp_cpu_backend_create(esp_backend **out);
esp_status esp_count_backend_create(bool cuda, esp_backend **out);

#endif
