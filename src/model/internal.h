/* internal.h: what the files of this room share. One block part per file, forward beside backward; decoder.c strings
 * them together. Two kinds of memory are used while a pass runs:
 *  - the activation stack (backend/stack.h) holds what backward needs, released block by block;
 *  - the work buffers (esp_work) hold what lives inside one block part. They are not on the stack because adapters push
 *    what they keep in the middle of a part, above anything that would have to be released before it. */
#ifndef ESP_MODEL_INTERNAL_H
#define ESP_MODEL_INTERNAL_H

#include "core/arena.h"
#include "core/map.h"
#include "io/safetensors.h"
#include "model/model.h"

#define ESP_MAX_TAILS 32
#define ESP_MAX_ADDED 16

/* How the base product of a group is done. */
typedef enum esp_group_mode {
  ESP_GROUP_PACKED,  /* all frozen: one operand, group->weight */
  ESP_GROUP_STACKED, /* all trained and neighbours in one store: one dense operand */
  ESP_GROUP_SPLIT    /* a mixture: one product per site */
} esp_group_mode;

typedef struct esp_group_state {
  esp_group_mode mode;
  esp_weight site_weight[3]; /* SPLIT: the frozen sites */
  esp_weight site_dense[3];  /* SPLIT: the sites whose adapter reads dense rows */
  bool trains;               /* some site of the group has gradients of its weight or bias */
  unsigned bias_trained;     /* bit per site: of group->bias, what is refreshed from the store before use */
} esp_group_state;

typedef struct esp_site_state {
  const esp_st_entry *weight, *bias; /* NULL with random_init */
  float *delta;                      /* [out, in] or NULL */
  esp_tensor w, b;                   /* NORM: fp32 on the backend. EMBED: the table (w) */
  bool w_owned;                      /* w came from the backend's alloc (else the mapping) */
  bool loaded;
} esp_site_state;

typedef struct esp_block {
  esp_site *norm1, *norm2, *q_norm, *k_norm; /* q_norm, k_norm: NULL without QK-norm */
  esp_group *qkv, *o, *up, *down;            /* up: {gate, up} or {c_fc} */
} esp_block;

/* What one block leaves for its backward; the tensors are on the stack. */
typedef struct esp_saved {
  int64_t mark;
  esp_tensor r0, r1, qkv, o, gu; /* r0: input of norm1, r1: input of norm2 */
  float *lse, *rstd1, *mean1, *rstd2, *mean2, *rstd_q, *rstd_k;
} esp_saved;

/* Work buffers, [tokens, width] each; the comments name the users of one buffer in order. */
typedef enum esp_work_id {
  ESP_W_NORMED, /* a norm's output: input of qkv, up and head */
  ESP_W_Y,      /* output of o and down; backward: copy of dy, then dx of qkv and up */
  ESP_W_WIDE,   /* gated product h; d(qkv); gathered rows of the head */
  ESP_W_DWIDE,  /* d h, d o, d normed rows of the head */
  ESP_W_DR,     /* gradient of the residual stream */
  ESP_W_QK0,    /* QK-norm: three contiguous [q | k] buffers */
  ESP_W_QK1,
  ESP_W_QK2,
  ESP_W_LOGITS,  /* fp32 [chunk, vocab], then their gradients */
  ESP_W_TEACH,   /* fp32 [chunk, vocab] of a teacher, then the gradient of its term; only where there is one */
  ESP_W_STAT,    /* rstd and mean of the final norm */
  ESP_W_IDS,     /* ids, positions, rows, targets, weights, logprob: [tokens] of 4 bytes each */
  ESP_W_VIRTUAL, /* rows of virtual tokens, and which each is: 2 x [n] of 4 bytes */
  ESP_W_TOTAL,   /* the sums of the loss (two doubles), the draw of dropout */
  ESP_W_COUNT
} esp_work_id;
typedef struct esp_work {
  void *buf[ESP_W_COUNT];
  int64_t bytes[ESP_W_COUNT];
  uint64_t revision; /* changes when an address does */
} esp_work;

struct esp_model {
  esp_model_desc d;
  const char *dir;
  char fingerprint[33];
  esp_backend *be;
  esp_model_options opt;
  esp_arena *arena;
  esp_st *st;
  esp_map *by_path;
  esp_site **sites;
  esp_site_state *ss; /* per site index */
  int n_sites;
  esp_group **groups;
  esp_group_state *gs; /* per group index */
  int n_groups;
  esp_block *blocks;
  esp_site *embed, *positions, *final_norm; /* positions: learned ones, else NULL */
  esp_group *head;
  const esp_adapter_hooks *hooks;
  esp_model_look look;
  void *look_ctx;
  void **slots; /* per group index, then per site index (embeddings) */
  esp_saved *saved;
  float *cos_t, *sin_t; /* [rope_rows, rot/2], backend memory */
  int64_t rope_rows;
  esp_work work;
  struct esp_stream *stream; /* NULL: weights are resident */
  uint64_t loads;            /* changes when a weight is loaded or moves */
  bool loaded;
};

struct esp_kv {
  esp_model *model;
  int batch;
  int64_t max_len;
  void *k, *v; /* per layer [batch*max_len, kv_heads*head_dim], one block each */
  int32_t *lens;
  const int32_t *adapters; /* of each sequence of the last prefill, NULL: all */
  float *shares;           /* the same, weighted */
  int n_shares;
  int filled; /* sequences of the last prefill */
};

/* One pass over the tokens of a batch. `run` is first: hooks get a pointer to it. */
typedef struct esp_pass {
  esp_run run;
  int64_t tokens;
  esp_kv *kv;    /* NULL: no cache */
  bool decode;   /* attention reads the cache only */
  uint64_t seqs; /* what attn_begin answered */
  int32_t *d_rows;
} esp_pass;

/* A batch with the virtual tokens of the active adapters in it; the caller's own where there are none. */
typedef struct esp_virtual {
  esp_batch batch;
  int64_t n;             /* virtual rows */
  int32_t *rows, *which; /* [n]: where they lie, which row of the adapter each is */
  int32_t *row_of;       /* where the caller's tokens lie; NULL: where they were */
  int32_t *ids, *positions, *targets, *cu;
  float *weights;
  void *block;
} esp_virtual;

/* desc.c: ESP_ERR_DATA with a message that stays one line whatever names the files bring. */
esp_status esp_model_refuse(const char *fmt, ...) ESP_PRINTF(1, 2);

/* sites.c */
esp_status esp_sites_build(esp_model *m);

/* weights.c, weights_read.c */
bool esp_model_streams(const esp_model *m); /* frozen weights lie in host memory and are brought in as needed */
/* weights_stream.c. add takes `host` (pack_host's answer) over when it succeeds and fills w's table. Destroyed after
 * every weight that was added. */
typedef struct esp_stream esp_stream;
esp_status esp_stream_create(esp_stream **out);
esp_status esp_stream_add(esp_stream *s, esp_backend *be, void *host, esp_weight *w, esp_dtype compute);
void esp_stream_destroy(esp_stream *s, esp_backend *be);
esp_status esp_weights_bind(esp_model *m); /* tensors of the file to sites, strictly */
void esp_weights_release(esp_model *m);
/* Rows [r0, r0+n) as fp32 [n, in]. */
esp_status esp_read_rows(const esp_model *m, const esp_site *s, int64_t r0, int64_t n, float *out);
esp_status esp_check_finite(const esp_st_entry *e);
void esp_random_rows(const esp_model *m, const esp_site *s, int64_t r0, int64_t n, float *out);

/* rope.c */
void esp_rope_inv_freq(const esp_model_desc *d, float *inv); /* [rot/2] */
esp_status esp_rope_ensure(esp_model *m, int64_t positions);

/* work.c */
esp_status esp_work_ensure(esp_model *m, int64_t tokens, int64_t head_rows, int64_t n_virtual, bool train);
void esp_work_release(esp_model *m);
esp_tensor esp_work_tensor(const esp_model *m, esp_work_id id, int64_t rows, int64_t cols);
esp_status esp_work_teach(esp_model *m, int64_t head_rows); /* after ensure: a second buffer like ESP_W_LOGITS */
int64_t esp_head_chunk(const esp_model *m, int64_t rows);   /* rows of logits that exist at a time */
int64_t esp_logits_stride(const esp_model *m);              /* elements from one row of logits to the next */
int32_t *esp_work_ints(const esp_model *m, int which);
enum { ESP_INTS_IDS, ESP_INTS_POS, ESP_INTS_ROWS, ESP_INTS_TARGETS, ESP_INTS_WEIGHTS, ESP_INTS_LOGP };
#define ESP_INTS_COUNT 6
enum { ESP_TOTAL_SUMS = 0, ESP_TOTAL_DRAW = 16, ESP_TOTAL_BYTES = 24 }; /* bytes in ESP_W_TOTAL */

/* group.c. keep_only: the product itself is not needed (recomputation), only what hooks keep for backward. */
void esp_group_forward(esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, bool keep_only);
void esp_group_backward(esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy,
                        esp_tensor dx);                            /* dx.data NULL: skip */
bool esp_group_uses_input(const esp_model *m, const esp_group *g); /* backward needs the group's input again */
/* dy for a group's backward: hooks may change it in place, so a shared gradient is copied into `copy` first. */
esp_tensor esp_group_dy(esp_run *run, esp_tensor dy, esp_tensor copy);

/* norm.c. residual.data NULL: none. rstd, mean NULL: nothing saved. */
void esp_norm_forward(esp_run *run, esp_site *s, esp_tensor x, esp_tensor residual, esp_tensor r_out, esp_tensor y,
                      float *rstd, float *mean);
void esp_norm_backward(esp_run *run, esp_site *s, esp_tensor r, esp_tensor dy, esp_tensor dx, const float *rstd,
                       const float *mean, bool accumulate);
bool esp_site_trained(const esp_site *s);

/* embed.c */
void esp_embed_forward(esp_run *run, esp_tensor y);
void esp_embed_backward(esp_run *run, esp_tensor dy);

/* attention.c, mlp.c. x: what the previous part adds to the residual stream (data NULL: r0 is given). */
void esp_attention_forward(esp_pass *p, int layer, esp_tensor x, esp_tensor residual, esp_saved *s);
void esp_attention_backward(esp_pass *p, int layer, esp_saved *s, bool need_dx);
void esp_mlp_forward(esp_pass *p, int layer, esp_saved *s, bool keep_only);
void esp_mlp_backward(esp_pass *p, int layer, esp_saved *s);

/* loss.c. Both read the residual stream in ESP_W_Y. */
/* weight_sum: of the labelled rows; the loss goes to the sums in ESP_W_TOTAL. */
esp_status esp_head_loss(esp_pass *p, float scale, bool train, bool need_dx, double *weight_sum, float *logprob);
esp_status esp_head_features(esp_pass *p, esp_tensor out);
esp_status esp_head_logits(esp_pass *p, const int32_t *rows, int64_t n, float *logits);

/* virtual.c. labelled: sequences without a label stay as they are. */
esp_status esp_virtual_begin(esp_virtual *v, const esp_model *m, const esp_batch *b, bool labelled);
void esp_virtual_end(esp_virtual *v);

/* decoder.c */
esp_status esp_batch_check(const esp_model *m, const esp_batch *b, bool labels);
/* v lives as long as the pass. */
esp_status esp_pass_begin(esp_pass *p, esp_model *m, esp_stack *stack, const esp_virtual *v, int64_t head_rows,
                          bool train);
/* piece: what esp_pass_piece answered, 0: none; pair: the backward's. Leaves the residual stream in ESP_W_Y. */
void esp_decoder_forward(esp_pass *p, esp_ckpt_mode ckpt, uint64_t piece, uint64_t pair);
/* The key of a part of this pass for replay, 0 where nothing may be replayed. */
uint64_t esp_pass_piece(const esp_pass *p, int part, int variant);
enum { ESP_PIECE_FORWARD = 1, ESP_PIECE_BACKWARD = 2 };

#endif
