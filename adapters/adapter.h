/* adapter.h: the adapter kind, an operator on sites of the base. One file per kind, one line in registry.c. A kind is
 * written over the op table only; merge, unmerge, save, load, export, checks and composition are written once over this
 * table (adapters/attach.c, src/merge). */
#ifndef ESP_ADAPTERS_ADAPTER_H
#define ESP_ADAPTERS_ADAPTER_H

#include "core/arena.h"
#include "core/regex.h"
#include "model/model.h"

struct json_t; /* jansson */

typedef struct esp_kept { /* the ranks of a module that were kept, of those it started with */
  const char *path;
  int n;
  const uint8_t *keep;
} esp_kept;

typedef struct esp_skeleton { /* rows and columns of a module's weight */
  const char *path;
  int n;
  const int32_t *rows, *cols;
} esp_skeleton;

typedef struct esp_lora_start { /* first values of a module that a pass over data gave */
  const char *path;
  int64_t in, out, r;
  const float *A, *B; /* [r, in], [out, r] */
} esp_lora_start;

typedef struct esp_mean_gates { /* of a module whose ranks gate themselves: what they come to on average */
  const char *path;
  int n;
  const float *values;
  double error; /* share of the change that is missed with them in the place of the gates */
} esp_mean_gates;

typedef struct esp_adapter_cfg {
  const char *type; /* registry name: lora, full, none */
  int64_t r;
  double alpha, dropout;
  bool rslora;
  const char *init; /* esp_lora_init_known */
  const char *bias; /* none | all | lora_only */
  bool lora_bias;
  /* target: exactly one of a list of names, a regex (fullmatch on the path), or "all-linear" */
  const char *const *target;
  int n_target;
  const char *target_regex;
  const char *const *exclude;
  int n_exclude;
  const char *exclude_regex;
  const int *layers; /* layers_to_transform */
  int n_layers;
  const char *layers_pattern;
  const esp_pattern *rank_pattern, *alpha_pattern; /* PEFT's matching, re.match(r"(.*\.)?(key)$", path) */
  int n_rank_pattern, n_alpha_pattern;
  const char *const *modules_to_save;
  int n_modules_to_save;
  const int32_t *trainable_tokens; /* rows of the input embedding that are trained */
  int n_trainable_tokens;
  uint64_t seed;
  /* lora; 0 and NULL: PEFT's defaults. Of the inits eva, corda, lora_ga, and loftq */
  int64_t init_batches; /* micro-batches that the pass over data sees */
  double eva_rho, eva_tau;
  bool eva_whiten, eva_adjust_alpha;
  const char *corda_method;            /* ipm | kpm */
  const char *ga_direction, *ga_scale; /* ArB2r | A2rBr | ArBr | random; stable | weight_svd | gd_scale | unit */
  double ga_gamma;
  int64_t loftq_bits, loftq_iter;
  const esp_lora_start *start; /* what the pass gave */
  int n_start;
  bool lora_fa; /* A stays as it began */
  /* lokr */
  bool decompose_both;
  int64_t decompose_factor; /* 0: divisors near the root */
  /* pmss */
  const char *pmss_select;      /* pivot (NULL: this) | norm | uniform */
  const esp_skeleton *skeleton; /* from a file: what was selected */
  int n_skeleton;
  /* adalora, and kinds whose ranks are moved by importance; steps below 1 are a share of the task's */
  int64_t target_r, interval;
  double tinit, tfinal, beta1, beta2, orth_weight;
  double elastic_share, threshold; /* elalora; dyrank */
  int64_t total_step;              /* from a file: what tinit and tfinal were steps of */
  const esp_kept *kept;
  int n_kept;
  /* ia3: modules whose input is scaled, in the place of the output */
  const char *const *feedforward;
  int n_feedforward;
  const char *feedforward_regex;
  /* vera */
  int64_t projection_key; /* seed of the shared projections */
  bool save_projection;   /* they are in the file */
  double d_initial;       /* of lambda_d; 0: 0.1 */
  /* layers */
  int64_t top_layers; /* the last so many blocks; 0: those of `layers` */
  /* fish, spu; 0 and NULL: the defaults of the kind */
  double sparse_density;
  const char *sparse_mask; /* data | random */
  int64_t sparse_batches;  /* micro-batches that the mask is chosen from */
  /* s2ft: per block */
  int64_t s2ft_heads, s2ft_channels;
  /* mora */
  const char *mora_type; /* sharing (NULL: this) | rotation */
  /* miss */
  const char *miss_type; /* default (NULL: this) | mini */
  int64_t mini_r;
  /* hra */
  bool apply_gs;
  /* oft */
  int64_t oft_block_size, oft_blocks; /* blocks of this size, or this many (0: by size) */
  int64_t cayley_terms;               /* 0: exact */
  bool oft_block_share, coft;
  double coft_eps;
  /* prompt, prefix */
  int64_t virtual_tokens;    /* rows in front of every sequence; 0: 20 */
  const char *prompt_init;   /* NULL, default: the kind's */
  const char *prompt_text;   /* prompt_init text: the rows start as its embeddings */
  const int32_t *prompt_ids; /* its tokens: filled in where there is a tokenizer */
  int n_prompt_ids;
  bool prefix_projection; /* trained through a network of one hidden layer */
  int64_t encoder_hidden; /* its width; 0: that of keys */
  /* mora_rank */
  double gate_temperature, gate_threshold;
  int64_t gate_top_k;               /* 0: all */
  const esp_mean_gates *mean_gates; /* from a file */
  int n_mean_gates;
  /* olora_cl, incremental_rank, mora_rank: tasks there is room for, the present one, those that were begun; 0 of the
   * first: 1 */
  int tasks, task, begun;
  /* olora_cl */
  const char *orthogonal; /* l1 (NULL: this) | frobenius */
  double orthogonal_lambda;
} esp_adapter_cfg;

typedef struct esp_adapter esp_adapter;

typedef struct esp_adapter_ints { /* whole numbers in an adapter's file */
  const char *name;
  int64_t n;
  int32_t *values; /* host, owned by the kind */
} esp_adapter_ints;

typedef struct esp_adapter_kind {
  const char *name;      /* in recipes */
  const char *peft_type; /* in adapter_config.json */
  const char *summary;   /* one line: what it is for, formula, paper */
  unsigned site_kinds;   /* bit set of 1 << esp_site_kind it can attach to */
  bool mergeable;
  bool targets;    /* reads target, exclude, layers; false: `full` and `none` */
  bool whole_base; /* every weight of the base is a trained parameter (`full`) */
  bool on_host;    /* its hooks do work on the host in each pass: a pass is then never replayed from a recording */
  bool alone;      /* its change is no sum: no other active adapter on the same site, and no weight other than 1 */
  bool reads_base; /* init keeps something of the base: it also runs before the values of a file are set */
  /* Optional: gradients of this site are made in input_bwd, so dx is wanted even where nothing below is trained. */
  bool (*needs_dx)(const esp_adapter *a, const esp_site *s);

  /* Optional. open: before anything is declared: checks that need the base; may declare parameters that belong to no
   * site. trains: the module is trained in full, as if modules_to_save named it. */
  esp_status (*open)(esp_adapter *a);
  bool (*trains)(const esp_adapter *a, const esp_site *s);

  /* Declares the parameters of one group: called once per group that has targeted sites, in model order, so that a
   * kind may place parameters of neighbouring sites back to back (stacked products). `hit[i]`: site i is targeted. */
  esp_status (*declare)(esp_adapter *a, esp_group *g, const bool *hit);
  esp_status (*declare_site)(esp_adapter *a, esp_site *s); /* EMBED, NORM */
  esp_status (*declare_last)(esp_adapter *a);              /* optional: behind these, once */
  /* Fills master values (host, through esp_params_set) after the store is finalized; may call esp_site_add_delta. */
  esp_status (*init)(esp_adapter *a, esp_site *s);
  esp_status (*start)(esp_adapter *a); /* optional: the same for parameters that belong to no site */

  /* Optional: before every forward pass, and never in a recording of one: what is made of parameters that have changed
   * since (params->writes, ->steps). */
  esp_status (*pass)(esp_adapter *a);
  /* the step: see esp_adapter_hooks for the contract of each; NULL: does nothing */
  void (*input)(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor *x, void **slot);
  int (*tails)(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max, void **slot);
  int (*added)(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, const esp_wview *w, esp_added *list, int max);
  void (*output)(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot);
  void (*output_bwd)(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, void **slot);
  int (*tails_bwd)(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails, int max,
                   void **slot);
  void (*input_bwd)(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot);
  /* Kinds that make the product of their sites themselves (`product` not BASE); such a kind is `alone`. */
  esp_site_product product;
  void (*site_forward)(esp_adapter *a, esp_run *run, esp_site *s, const esp_wview *w, esp_tensor bias, esp_tensor x,
                       esp_tensor y);
  void (*site_backward)(esp_adapter *a, esp_run *run, esp_site *s, const esp_wview *w, esp_tensor x, esp_tensor dy,
                        esp_tensor dx, float beta);
  void (*embed)(esp_adapter *a, esp_run *run, esp_site *s, const int32_t *ids, esp_tensor y, void **slot);
  void (*embed_bwd)(esp_adapter *a, esp_run *run, esp_site *s, const int32_t *ids, esp_tensor dy, void **slot);

  /* Kinds of virtual tokens: rows that this adapter puts in front of a sequence, see esp_adapter_hooks; `kv` and
   * kv_bwd are for those that replace keys and values. Such a kind is `alone`, and with no other that is. */
  int64_t (*virtual_tokens)(const esp_adapter *a);
  void (*kv)(esp_adapter *a, esp_run *run, int layer, esp_tensor k, esp_tensor v);
  void (*kv_bwd)(esp_adapter *a, esp_run *run, int layer, esp_tensor dk, esp_tensor dv);

  /* Optional. wants_output: false where `output` has nothing to do for this configuration (a recomputed block then
   * skips the base product). destroy: what the arena does not own. */
  bool (*wants_output)(const esp_adapter *a);
  void (*destroy)(esp_adapter *a);

  /* Optional: called around optimizer steps. before_step: gradients are complete (all micro-batches, all ranks) and not
   * yet clipped: may add those of a penalty and answers its value (0: none). after_step: parameters are new; may change
   * ranks (esp_adapter_resize). step: 0-based within the
   * task in before_step, steps done in after_step; total: the task's steps, 0 where nobody knows (a session).
   * step_sums: fp32 statistics of this process's rows of the step, which are added over ranks before before_step. */
  esp_tensor (*step_sums)(const esp_adapter *a);
  double (*before_step)(esp_adapter *a, int64_t step, int64_t total);
  esp_status (*after_step)(esp_adapter *a, int64_t step, int64_t total);
  esp_status (*task_begin)(esp_adapter *a, int task); /* on resume before the saved state replaces what it did */
  esp_status (*task_end)(esp_adapter *a, int task);

  /* Kinds whose parameters change shape, or that keep statistics over steps. states: flat fp32 buffers, one element per
   * parameter element, that follow the parameters and are part of checkpoints. resized: shapes have changed.
   * state_write and state_read: what else a checkpoint must hold. All optional. */
  int n_states;
  const char *state_names[4];
  void (*resized)(esp_adapter *a);
  void (*state_write)(const esp_adapter *a, struct json_t *j);
  esp_status (*state_read)(esp_adapter *a, const struct json_t *j, const char *path);

  /* The kind's own keys of adapter_config.json, beside those every kind has (targets, layers, modules_to_save, bias).
   * check: errors of a recipe that need no base. NULL: none. */
  void (*config_write)(const esp_adapter *a, struct json_t *j);
  esp_status (*config_read)(const struct json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c);
  esp_status (*config_check)(const esp_adapter_cfg *c);
  /* Optional: several kinds share a peft_type; true: this one wrote the file. The first that has no such function takes
   * the files that none claims. */
  bool (*config_is)(const struct json_t *j);

  /* After parameters were filled from a file. NULL: nothing to do. */
  esp_status (*loaded)(esp_adapter *a);

  /* Optional: a pass over data on the frozen base before training, for what a kind takes from gradients or activations.
   * wants_data: micro-batches, 0: none; whether gradients are wanted. see: for each group its input and the gradient
   * of its output (of the batch's summed log-probability; dy.data NULL where only activations are wanted). seen: after
   * the last batch. Under the counting backend too. wants_data may answer less once enough was seen. restart
   * (optional): the configuration to make the adapter from anew, on the base read again, with what the pass gave:
   * memory of the arena. */
  int64_t (*wants_data)(const esp_adapter *a, bool *gradients);
  void (*see)(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy);
  esp_status (*seen)(esp_adapter *a);
  esp_status (*restart)(esp_adapter *a, esp_arena *arena, esp_adapter_cfg *out);

  /* Optional: whole numbers that the file holds beside the parameters (a mask). False: there are no more than i. On
   * loading they are written to `values` before `loaded`. savable: an error when there is nothing to save yet. */
  bool (*ints)(const esp_adapter *a, int i, esp_adapter_ints *out);
  esp_status (*savable)(const esp_adapter *a);

  /* Optional: whether a parameter is written to the adapter's file. */
  bool (*in_file)(const esp_adapter *a, int index);

  /* rows [r0, r0+n) of the effective weight, fp32 host: in: w holds the base rows [n, in]; out: the merged rows. Used
   * by merge, export and extraction only, never in a step. */
  esp_status (*materialise)(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w);
  /* The same for the module's bias, [out]; NULL: the kind never changes a bias. */
  esp_status (*materialise_bias)(esp_adapter *a, esp_site *s, float *bias);
  /* Optional: the parameters of the low-rank change that is trained now, A [r, in] and B [out, r]; false: none here. */
  bool (*factors)(const esp_adapter *a, const esp_site *s, int *A, int *B);
  /* The exact low-rank form, where there is one: A [r,in], B [out,r] fp32 host with delta = B A (scale folded in B).
   * Returns r, writes when a/b not NULL. NULL function: none. */
  int64_t (*low_rank)(esp_adapter *a, esp_site *s, float *A, float *B);
  /* Optional: the change of a linear site becomes B A, A [r, in] and B [out, r], r at most the site's rank. What is
   * left of the rank keeps its A and starts at B = 0, so that it can be trained. */
  esp_status (*start_from)(esp_adapter *a, esp_site *s, int64_t r, const float *A, const float *B);
  /* Optional, of kinds that are not mergeable: factors near the change on data like those it was trained on, as in
   * low_rank; error: share of the change that they miss. 0: the rank; -1: none, with the reason as the error. */
  int64_t (*near_low_rank)(esp_adapter *a, esp_site *s, float *A, float *B, double *error);
} esp_adapter_kind;

struct esp_adapter { /* one named adapter on one model */
  const esp_adapter_kind *kind;
  esp_adapter_cfg cfg; /* deep copy, owned by arena */
  char name[64];       /* "default" unless said otherwise */
  esp_model *model;
  esp_params *params;
  esp_arena *arena;
  bool *targeted;     /* per site index */
  void **site_state;  /* per site index: the kind's own record, arena memory */
  void **group_state; /* per group index */
  void *impl;
  struct esp_train_modules *modules; /* what is trained beside the kind: modules_to_save, bias, token rows */
  bool trainable;
  double weight;         /* multiplies the adapter's effect when summed (composition); 1 */
  uint64_t revision;     /* counts changes of shape or address of its parameters (ranks that grow or shrink) */
  int64_t backwards;     /* backward passes seen: a trained adapter whose B is still zero is not saved */
  float *state[4];       /* of kind->state_names, backend memory */
  float grad_scale;      /* what clipping has multiplied the last gradients with; set before after_step */
  double lr;             /* of the last step; the same */
  int64_t ranks, budget; /* of kinds that move ranks: in force after the last step, and what was allowed; 0: none */
};

const esp_adapter_kind *esp_adapter_find(const char *name);
const char *const *esp_adapter_names(int *n);
/* Type none, and nothing beside it. */
bool esp_adapter_trains_nothing(const esp_adapter_cfg *c);
/* An init of LoRA after which the base is not the one that was loaded. NULL: no. */
bool esp_lora_rewrites_base(const char *init);

/* Resolves targets, declares, allocates and initialises on an opened model (before esp_model_load_weights). Errors:
 * a target that matches nothing, a site both targeted and in modules_to_save, ... (ESP_ERR_RECIPE, naming the key). */
esp_status esp_adapter_create(esp_model *m, const esp_adapter_cfg *cfg, const char *name, bool trainable,
                              esp_adapter **out);
void esp_adapter_destroy(esp_adapter *a);
/* The ordered list of adapters that are active on the model: their hooks are installed and modules that they train in
 * full take the place of the base's. n == 0: base mode; after an init that rewrites the base (pissa, olora) that is the
 * rewritten base. Merge and save read the file and are exact in any case. */
esp_status esp_adapters_activate(esp_model *m, esp_adapter **list, int n);
/* Only whether these can be active together (ESP_ERR_RECIPE, naming two that cannot). */
esp_status esp_adapters_check(esp_model *m, esp_adapter *const *list, int n);

/* One micro-batch of the pass over data that the kind wants before training; the caller ends it with kind->seen. */
esp_status esp_adapter_calibrate(esp_adapter *a, esp_stack *stack, const esp_batch *b, esp_ckpt_mode ckpt);

/* What the adapter makes of a site, for merge, export and `--verify`; covers the kind's own change, fully trained
 * copies (modules_to_save, bias, `full`) and replaced embedding rows (the tied head reads the same rows). Rows are
 * those of the effective weight as the product sees it: LINEAR [out, in], EMBED [vocab, dim] (site->in rows), NORM [1,
 * dim]. In: the base's rows, fp32. Out: the effective rows. */
bool esp_adapter_changes(const esp_adapter *a, const esp_site *s);
esp_status esp_adapter_effective_rows(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w);
bool esp_adapter_changes_bias(const esp_adapter *a, const esp_site *s);
esp_status esp_adapter_effective_bias(esp_adapter *a, esp_site *s, float *bias);
/* Of several that are active together, in any order: forward computes a module that one of them trains in full from
 * that copy, and the changes of the others add to it. */
esp_status esp_adapters_effective_rows(esp_adapter *const *list, int n, esp_site *s, int64_t r0, int64_t rows,
                                       float *w);
esp_status esp_adapters_effective_bias(esp_adapter *const *list, int n, esp_site *s, float *bias);
/* The effective rank of a site (rank_pattern applied), 0 where it is not targeted or the kind has none. */
int64_t esp_adapter_rank(const esp_adapter *a, const esp_site *s);

/* resize.c: parameters that change shape in the middle of a run. Along `axis`, row or column i of the new tensor is
 * from[i] of the old one, or new and zero (-1). Masters, shadow and whatever follows the parameters (optimizer state,
 * the kind's statistics) move with them, gradients are zero afterwards, a->revision counts up and kind->resized is
 * called. Host work: for the few steps at which ranks move. */
typedef struct esp_resize {
  int param, axis;
  int64_t n;
  const int32_t *from; /* [n]; NULL: all new */
} esp_resize;
esp_status esp_adapter_resize(esp_adapter *a, const esp_resize *list, int n);
/* Shapes and the kind's own state as JSON (a new reference; NULL: no memory), and back: ranks first, values after. */
bool esp_adapter_has_state(const esp_adapter *a);
struct json_t *esp_adapter_state_json(const esp_adapter *a);
esp_status esp_adapter_state_restore(esp_adapter *a, const struct json_t *j, const char *path);

/* PEFT directory, both ways (adapter_config.json + adapter_model.safetensors). Loading is strict: every tensor of the
 * file consumed once, every slot filled once, else an error listing both sets (at most 5 of each and the counts). */
esp_status esp_adapter_save(const esp_adapter *a, const char *dir);
int64_t esp_adapter_save_bytes(const esp_adapter *a); /* the values that it has on the host at a time */
esp_status esp_adapter_load(esp_model *m, const char *dir, const char *name, bool trainable, esp_adapter **out);
/* Only the configuration: for check, inspect and plan. Strings live in the arena. */
esp_status esp_adapter_cfg_load(const char *dir, esp_arena *arena, esp_adapter_cfg *out);
/* PEFT's target matching, exposed for tests: does `path` match this configuration? */
bool esp_adapter_matches(const esp_adapter_cfg *cfg, const esp_site *s);

#endif
