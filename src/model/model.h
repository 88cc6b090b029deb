/* model.h: the frozen base and its run-time: sites, groups, weights, and forward beside backward.
 *
 * A *site* is a module of the base that an adapter can attach to (a linear, an embedding, a norm), with the module path
 * of the Hugging Face model. A *group* is the set of linear sites that read the same input: {q,k,v}, {o}, {gate,up},
 * {down}, {lm_head}. The base weights of a group are packed as one operand and its outputs are column ranges of one
 * tensor, so a group costs one matmul in each direction.
 *
 * Adapters plug in through adapters/adapter.h; the model knows only the hooks it calls (esp_adapter_hooks below), so
 * that the include arrow goes adapters -> model.
 */
#ifndef ESP_MODEL_MODEL_H
#define ESP_MODEL_MODEL_H

#include "backend/param.h"
#include "backend/stack.h"
#include "model/desc.h"

typedef struct esp_model esp_model;
typedef struct esp_site esp_site;
typedef struct esp_group esp_group;

/* ---- frozen weight: borrow and return (third waist). Read-only; nothing is ever written back. ---- */
typedef struct esp_weight esp_weight;
typedef struct esp_weight_ops {
  esp_status (*borrow)(esp_weight *w, esp_backend *be, esp_wview *out);
  void (*give_back)(esp_weight *w, esp_backend *be, esp_wview *view);
  void (*destroy)(esp_weight *w, esp_backend *be);
} esp_weight_ops;
struct esp_weight { /* one operand: the stacked weights of a group */
  const esp_weight_ops *ops;
  void *impl;
  int64_t out, in;
};

/* Who makes a linear site's product. OWN: an adapter does (hooks site_forward, site_backward), and the group's other
 * sites get one product each; OWN_DENSE: the same, and it sees the frozen weight as dense rows [out, in]. */
typedef enum esp_site_product { ESP_PRODUCT_BASE, ESP_PRODUCT_OWN, ESP_PRODUCT_OWN_DENSE } esp_site_product;

typedef enum esp_site_kind { ESP_SITE_LINEAR, ESP_SITE_EMBED, ESP_SITE_NORM } esp_site_kind;
struct esp_site {
  esp_site_kind kind;
  const char *path;        /* "model.layers.0.self_attn.q_proj" */
  const char *leaf;        /* "q_proj" */
  const char *tensor;      /* key in the file, "<path>.weight" */
  const char *bias_tensor; /* key, NULL: the module has no bias */
  int layer;               /* -1 outside the blocks */
  int index;               /* in model->sites */
  int64_t out, in;         /* LINEAR: [out, in]; EMBED: out = dim, in = vocab; NORM: out = dim, in = 1 */
  bool transposed;         /* stored [in, out] */
  bool is_head;            /* the output embedding: never part of all-linear */
  esp_group *group;        /* LINEAR only */
  int64_t col0;            /* first column of this site in the group's output */
  /* A module that is trained in full (full fine-tuning, modules_to_save, bias, norms) has its weight here and not in
   * the group's packed operand: the store and index of the parameter, store NULL when frozen. */
  esp_params *trained;
  int trained_weight, trained_bias; /* -1: not trained */
  esp_site_product product;
};
struct esp_group {
  int n_sites;
  esp_site *sites[3];
  int layer, index;
  int64_t out, in;
  esp_weight weight;
  esp_tensor bias; /* [out] stacked on the backend, data NULL: none */
};

/* ---- one forward/backward ---- */
typedef struct esp_batch {                  /* token rows of one micro-batch, HOST memory */
  int64_t tokens;                           /* T */
  const int32_t *ids, *targets, *positions; /* [T]; targets[t] is the token that position t predicts */
  const float *weights;                     /* [T] loss weight of predicting targets[t]; 0: not trained */
  const int32_t *cu_seqlens;                /* [n_seqs+1] */
  int n_seqs;
  const int32_t *adapters; /* [n_seqs] the one active adapter of each sequence, -1: none. NULL: all, on every row */
  /* [n_seqs * active adapters] what each adapter's change is multiplied with on each sequence, in the place of
   * `adapters`; NULL: not. Other weights than 0 and 1 only where the changes are sums. */
  const float *shares;
  int n_shares;                  /* active adapters */
  const struct esp_teach *teach; /* NULL: the labels alone */
} esp_batch;

/* What a batch is taught beside its labels. The loss of a labelled row, times its weight, is
 *   CE + kl * T^2 KL(softmax(teacher/T) || softmax(student/T)) + hidden_weight * distance(x, features)
 * with x the final normed hidden state and `features` the teacher's: its logits are made of them by the frozen head,
 * chunk by chunk, beside those of the student. Reported losses hold all terms. Not with a head that is adapted. */
typedef struct esp_teach {
  esp_tensor features; /* [labelled rows, hidden] in backend memory (esp_model_features) */
  float kl, temperature;
  esp_hidden_loss hidden; /* ESP_HIDDEN_NONE: no such term */
  float hidden_weight;
  const float *low, *high; /* ESP_HIDDEN_MARGIN: backend memory [hidden] */
} esp_teach;

typedef struct esp_run { /* what every part needs while a step runs */
  esp_backend *be;
  esp_stack *stack;
  esp_model *model;
  const esp_batch *batch;
  const int32_t *d_ids, *d_positions; /* backend memory */
  esp_dtype compute;
  bool train; /* keep what backward needs */
  uint64_t seed;
  /* Virtual tokens: the rows of the batch that an adapter put there, and which of its rows each is; backend memory
   * [n_virtual]. */
  int64_t n_virtual;
  const int32_t *d_virtual, *d_which;
  /* Dropout: *draw (backend memory) is unique per (optimizer step, micro-batch) and the same when recomputed; `part`
   * sets the chunks of the head apart. */
  const uint64_t *draw;
  int64_t part;
} esp_run;

enum { ESP_EVERY_ADAPTER = -2 }; /* in the place of an adapter that a sequence chose: all that are active */

/* What the model calls around each group and the other sites; implemented once in adapters/attach.c over the kinds. */
typedef struct esp_adapter_hooks {
  void *ctx;
  /* LINEAR groups. `input` may replace *x (multiplicative kinds); `tails` returns low-rank tails for the base product
   * (<= max); `output` may change y in place. Whatever backward needs is pushed on run->stack and remembered in
   * slot (run-owned pointer, one per group). Backward mirrors in reverse: `output_bwd` may change dy, `tails_bwd`
   * accumulates parameter gradients and returns the tails for dx, `input_bwd` changes dx in place. */
  void (*input)(void *ctx, esp_run *run, esp_group *g, esp_tensor *x, void **slot);
  int (*tails)(void *ctx, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max, void **slot);
  /* Sparse matrices that are added to the group's frozen weight w while its product with x is made (in backward: with
   * dy, x being that): how many, <= max. Asked between tails and output, tails_bwd and input_bwd. NULL: none. */
  int (*added)(void *ctx, esp_run *run, esp_group *g, esp_tensor x, const esp_wview *w, esp_added *list, int max);
  void (*output)(void *ctx, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot);
  void (*output_bwd)(void *ctx, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, void **slot);
  int (*tails_bwd)(void *ctx, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails, int max,
                   void **slot);
  void (*input_bwd)(void *ctx, esp_run *run, esp_group *g, esp_tensor dx, void **slot);
  /* Sites with product OWN. w: the site's frozen weight, borrowed. y = the adapted product + bias. Backward accumulates
   * parameter gradients and makes dx = .. + beta*dx (dx.data NULL: only the gradients). x is the group's own input. */
  void (*site_forward)(void *ctx, esp_run *run, esp_site *s, const esp_wview *w, esp_tensor bias, esp_tensor x,
                       esp_tensor y);
  void (*site_backward)(void *ctx, esp_run *run, esp_site *s, const esp_wview *w, esp_tensor x, esp_tensor dy,
                        esp_tensor dx, float beta);
  /* EMBED: y is the embedding output [T, dim], ids on the backend. */
  void (*embed)(void *ctx, esp_run *run, esp_site *s, const int32_t *ids, esp_tensor y, void **slot);
  void (*embed_bwd)(void *ctx, esp_run *run, esp_site *s, const int32_t *ids, esp_tensor dy, void **slot);
  /* Rows that are put in front of a sequence whose choice is `adapter`, and the rotated keys and values [T, kv_heads *
   * head_dim] of a layer, which the rows of run->d_virtual may replace: their gradients are then taken out of dk, dv.
   */
  int64_t (*virtual_tokens)(void *ctx, int adapter);
  void (*kv)(void *ctx, esp_run *run, int layer, esp_tensor k, esp_tensor v);
  void (*kv_bwd)(void *ctx, esp_run *run, int layer, esp_tensor dk, esp_tensor dv);
  /* Any of the above may be NULL (without output_bwd the model saves a copy of the residual gradient per block part).
   * x in the backward hooks is the group's own input, as it was before `input`.
   * How far down backward has to go: the lowest block with a trained adapter; -1: an embedding is adapted; the number
   * of layers: only the head is. NULL: -1. */
  int (*lowest_layer)(void *ctx);
  /* What the operations that the hooks issue depend on beside the shapes: equal versions, equal operations on equal
   * addresses. 0 (or NULL): the hooks do work on the host, so that nothing may be replayed. */
  uint64_t (*version)(void *ctx);
  /* Before the operations of each pass, issued or replayed: what they depend on beside the activations. NULL: the
   * sequences of a batch cannot choose. */
  esp_status (*begin)(void *ctx, esp_run *run);
  /* After each backward pass, issued or replayed. NULL: not wanted. */
  void (*stepped)(void *ctx);
} esp_adapter_hooks;

typedef enum esp_ckpt_mode { ESP_CKPT_OFF, ESP_CKPT_FULL } esp_ckpt_mode;

typedef struct esp_model_options {
  esp_dtype compute; /* ESP_BF16 or ESP_F32 */
  bool random_init;  /* make fresh weights (normal, 0.02; residual projections scaled) instead of reading the file */
  uint64_t seed;
  bool offload_base; /* frozen weights stay in host memory and are streamed (a backend with pack_host) */
} esp_model_options;

/* Builds sites and groups from <dir>/config.json and the safetensors headers: reads no weight. */
esp_status esp_model_open(const char *dir, esp_backend *be, const esp_model_options *opt, esp_model **out);
/* Reads and packs the frozen weights (sizes only on the counting backend). Call after adapters have marked the sites
 * they train in full: those are not packed. Non-finite weights are an error naming file and tensor. */
esp_status esp_model_load_weights(esp_model *m);
void esp_model_close(esp_model *m);

const esp_model_desc *esp_model_describe(const esp_model *m);
esp_backend *esp_model_backend(const esp_model *m);
esp_dtype esp_model_compute(const esp_model *m);
int esp_model_sites(const esp_model *m, esp_site ***sites);
int esp_model_groups(const esp_model *m, esp_group ***groups);
esp_site *esp_model_embedding(const esp_model *m); /* of the tokens */
esp_site *esp_model_find_site(const esp_model *m, const char *path);
/* Reads a stored tensor as fp32 [out, in] (transposed back for Conv1D) into host memory: inits, merge, export. */
esp_status esp_site_read_weight(const esp_model *m, const esp_site *s, float *out);
esp_status esp_site_read_weight_rows(const esp_model *m, const esp_site *s, int64_t r0, int64_t n, float *out);
esp_status esp_site_read_bias(const esp_model *m, const esp_site *s, float *out);
/* An init that rewrites the base (PiSSA, OLoRA): the site's effective frozen weight becomes W + delta, fp32 [out, in],
 * rounded once to the compute type when packed. Call before esp_model_load_weights; delta is copied. */
esp_status esp_site_add_delta(esp_model *m, esp_site *s, const float *delta);
const char *esp_model_dir(const esp_model *m);
/* xxh3-128 over config.json and the safetensors headers, hex: the base's fingerprint stored with adapters. */
const char *esp_model_fingerprint(const esp_model *m);

/* The plain frozen product of a group on other rows, for kinds whose change is a function of the weight: y = x W^T, no
 * bias and no hooks; dx = dy W. */
void esp_group_apply(esp_run *run, esp_group *g, esp_tensor x, esp_tensor y);
void esp_group_apply_dx(esp_run *run, esp_group *g, esp_tensor dy, esp_tensor dx);

void esp_model_set_hooks(esp_model *m, const esp_adapter_hooks *hooks); /* NULL: base mode (adapters off) */
const esp_adapter_hooks *esp_model_hooks(const esp_model *m);
/* Called for every group in passes without gradients, once its output stands, with what hooks have made of x and y. The
 * head's rows come in chunks. NULL: nobody looks. */
typedef void (*esp_model_look)(void *ctx, esp_run *run, const esp_group *g, esp_tensor x, esp_tensor y);
void esp_model_set_look(esp_model *m, esp_model_look look, void *ctx);

typedef struct esp_loss_out {
  double loss_sum; /* sum of weight * nll */
  double weight_sum;
  int64_t correct; /* weighted rows whose argmax is the target */
} esp_loss_out;

/* Forward, loss and backward of one micro-batch. Gradients accumulate in the parameter stores (fp32), already scaled
 * by `scale` (1 / global trained-token weight of the optimizer step). dx below the lowest trained site is skipped.
 * logprob (optional, host [T]): log p(targets[t]) where weight != 0. train false: forward and loss only. */
/* out NULL: the sums are added to those of earlier steps, without waiting for the backend; esp_model_sums reads them.
 */
esp_status esp_model_step(esp_model *m, esp_stack *stack, const esp_batch *b, esp_ckpt_mode ckpt, bool train,
                          float scale, uint64_t seed, int64_t draw, esp_loss_out *out, float *logprob);
esp_status esp_model_sums_reset(esp_model *m);
/* Waits. loss_sum and correct of every step since the reset; weight_sum is the caller's. */
esp_status esp_model_sums(esp_model *m, esp_loss_out *out);
/* Forward only: the final normed hidden states of the rows that carry a label, in order, into `out` [at least so many,
 * hidden] of the compute type, in backend memory. */
esp_status esp_model_features(esp_model *m, esp_stack *stack, const esp_batch *b, esp_tensor out);
/* fp32 logits of chosen rows (host [n_rows, vocab]) for tests, verification and `merge --verify`. */
esp_status esp_model_logits(esp_model *m, esp_stack *stack, const esp_batch *b, const int32_t *rows, int n_rows,
                            float *logits);
/* The same of every position of one sequence without labels: host [n, vocab]. */
esp_status esp_model_sequence_logits(esp_model *m, esp_stack *stack, const int32_t *ids, int64_t n, float *logits);

/* Rows that the active adapters put in front of a sequence: they take positions of the model and room in a cache. */
int64_t esp_model_virtual_tokens(const esp_model *m);

/* ---- generation: batched, with a KV cache ---- */
typedef struct esp_kv esp_kv;
esp_status esp_kv_create(esp_model *m, int batch, int64_t max_len, esp_kv **out);
void esp_kv_destroy(esp_kv *kv);
/* Feeds each prompt (packed), fills the cache, returns logits of each prompt's last token: host [n_seqs, vocab]. */
esp_status esp_model_prefill(esp_model *m, esp_stack *stack, esp_kv *kv, const esp_batch *prompts, float *logits);
/* One token per sequence; done[i] sequences are skipped in the output but keep their row. */
esp_status esp_model_decode(esp_model *m, esp_stack *stack, esp_kv *kv, const int32_t *ids, float *logits);
/* Bytes of activation stack that prefill/decode/logits of this size need are found by running on `count`. */

#endif
