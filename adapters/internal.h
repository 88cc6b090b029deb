/* internal.h: what the files of this room share. Not a contract for other rooms. */
#ifndef ESP_ADAPTERS_INTERNAL_H
#define ESP_ADAPTERS_INTERNAL_H

#include "adapters/adapter.h"
#include "core/arena.h"

#define ESP_PEFT_PREFIX "base_model.model."

/* registry.c */
extern const esp_adapter_kind esp_kind_loha, esp_kind_lokr, esp_kind_lotr, esp_kind_pmss, esp_kind_hut;
extern const esp_adapter_kind esp_kind_fish, esp_kind_spu, esp_kind_layers, esp_kind_s2ft;
extern const esp_adapter_kind esp_kind_mora, esp_kind_olora_cl, esp_kind_incremental_rank, esp_kind_mora_rank;
extern const esp_adapter_kind esp_kind_dora, esp_kind_vera;
extern const esp_adapter_kind esp_kind_ia3, esp_kind_ln_tuning, esp_kind_bitfit;
extern const esp_adapter_kind esp_kind_adalora, esp_kind_increlora, esp_kind_elalora, esp_kind_dyrank;
extern const esp_adapter_kind esp_kind_lora, esp_kind_full, esp_kind_none;

extern const esp_adapter_kind esp_kind_miss;
extern const esp_adapter_kind esp_kind_bat, esp_kind_hra, esp_kind_oft;

extern const esp_adapter_kind esp_kind_prompt, esp_kind_prefix;

/* prompt.c: for kinds of virtual tokens. params: "prompt_embeddings" [n, width]. */
int64_t esp_virtual_count(const esp_adapter *a);
esp_status esp_virtual_check(const esp_adapter_cfg *c);
esp_status esp_virtual_params(esp_adapter *a, int64_t width);
void esp_virtual_config_write(const esp_adapter *a, struct json_t *j, int heads, int64_t width);
esp_status esp_virtual_config_read(const struct json_t *j, const char *path, esp_adapter_cfg *c);

/* miss.c: for kinds that have one rank, one start and no bias of their own */
esp_status esp_plain_config_check(const esp_adapter_cfg *c);
void esp_miss_config_write(const esp_adapter *a, struct json_t *j);
esp_status esp_miss_config_read(const struct json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c);

/* target.c */
bool esp_target_is_all_linear(const esp_adapter_cfg *cfg);
bool esp_in_modules_to_save(const esp_adapter_cfg *cfg, const char *path);
bool esp_saved_in_full(const esp_adapter_cfg *cfg, const char *path);
double esp_pattern_value(const esp_pattern *list, int n, const char *path, double fallback);
esp_status esp_target_check(const esp_adapter_cfg *cfg);
/* Fills a->targeted. strict: every listed name must match a site (recipes; files of other versions may name more). */
esp_status esp_target_resolve(esp_adapter *a, bool strict);

/* create.c. loading: parameters are filled from a file afterwards, so only an init that rewrites the base runs. */
esp_status esp_adapter_build(esp_model *m, const esp_adapter_cfg *cfg, const char *name, bool trainable, bool loading,
                             esp_adapter **out);
esp_status esp_cfg_copy(esp_arena *arena, const esp_adapter_cfg *in, esp_adapter_cfg *out);

/* train_modules.c: what is trained beside the kind's own parameters, the same for every kind. */
typedef struct esp_train_modules {
  int *weight, *bias;    /* per site: parameter index of the full copy, -1: frozen */
  bool *file_transposed; /* per parameter: the file holds the transpose (Conv1D, embedding LoRA) */
  int file_cap;
  /* replaced rows of the input embedding (and of the tied head) */
  esp_site *embed, *head;
  int tokens; /* parameter [n, dim]; -1: none */
  int n_tokens;
  int32_t *order;   /* positions in cfg.trainable_tokens sorted by token id */
  float *base_rows; /* backend memory [n, dim]: what the frozen tied head uses for these rows */
  void *select;     /* backend memory [vocab, n], compute type: one-hot columns, tied head only */
} esp_train_modules;
esp_status esp_train_modules_create(esp_adapter *a);
esp_status esp_train_modules_declare(esp_adapter *a);
esp_status esp_train_modules_init(esp_adapter *a, bool loading);
void esp_train_modules_destroy(esp_adapter *a);
void esp_train_modules_embed(esp_adapter *a, esp_run *run, esp_site *s, const int32_t *ids, esp_tensor y);
void esp_train_modules_embed_bwd(esp_adapter *a, esp_run *run, esp_site *s, const int32_t *ids, esp_tensor dy);
int esp_train_modules_tails(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max);
int esp_train_modules_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy,
                                esp_tail *tails, int max);
/* Declares the full copy of a weight or bias; `inner` stands between the module's path and its name in the file. */
esp_status esp_train_module_add(esp_adapter *a, esp_site *s, const char *inner, bool weight, bool pad);
/* Remembers that the file holds parameter `index` transposed. */
esp_status esp_mark_transposed(esp_adapter *a, int index);

/* dropout.c. dropped: x with entries dropped, on the stack; x itself where nothing is. dropout: y = mask(x) + beta*y.
 */
bool esp_drops(const esp_adapter *a, const esp_run *run);
void esp_dropout(esp_adapter *a, esp_run *run, const esp_group *g, esp_tensor y, esp_tensor x, float beta);
esp_tensor esp_dropped(esp_adapter *a, esp_run *run, const esp_group *g, esp_tensor x);

/* lora.c */
typedef struct esp_lora_site {
  int64_t r;
  float s; /* alpha/r or alpha/sqrt(r) */
  int a, b, bias;
  int64_t t0;     /* first column in the group's T */
  float *A0, *B0; /* what the base was rewritten with: W - s B0 A0; host, NULL: as it was */
  bool quantised; /* of that, the quantised form (loftq) */
  float *inverse; /* LoRA-FA: (A A^T)^-1 / s^2, backend memory [r, r] */
} esp_lora_site;
/* lora_init.c. init_from_data: a pass over data gives A and B. gives_way: the base is W - s B0 A0, so that the adapter
 * of the file is [A; A0], [B, -B0]. keep: A0 and B0 from these. */
esp_status esp_lora_init(esp_adapter *a, esp_site *s);
bool esp_lora_init_from_data(const char *init);
bool esp_lora_init_known(const char *init);
bool esp_lora_gives_way(const esp_adapter *a);
esp_status esp_lora_keep(esp_lora_site *ls, const esp_site *s, const float *A, const float *B);
/* lora_loftq.c */
esp_status esp_loftq_init(esp_adapter *a, esp_site *s, esp_lora_site *ls, float *A, float *B);
esp_status esp_loftq_add(esp_adapter *a, esp_site *s, const esp_lora_site *ls, int64_t r0, int64_t n, float *w);
/* lora_data.c */
esp_status esp_lora_data_check(const esp_adapter *a, const esp_site *s, int64_t r);
int64_t esp_lora_rank_most(const esp_adapter *a, const esp_site *s, int64_t r);
int64_t esp_lora_wants_data(const esp_adapter *a, bool *gradients);
void esp_lora_see(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy);
esp_status esp_lora_restart(esp_adapter *a, esp_arena *arena, esp_adapter_cfg *out);
esp_status esp_lora_savable(const esp_adapter *a);
void esp_lora_data_free(esp_adapter *a);
/* lora_fa.c */
double esp_lora_fa_before_step(esp_adapter *a, int64_t step, int64_t total);
/* Materialised change of a linear site: w[n, in] += scale * B[r0 .. r0+n, :] A. */
void esp_lowrank_add(float *w, int64_t n, int64_t in, const float *A, const float *B, int64_t r, float scale);

/* peft_json.c, peft_config.c */
struct json_t *esp_json_number(double x); /* an integer where it is one */
/* rank_pattern, alpha_pattern: as PEFT reads them, values times `factor` */
struct json_t *esp_json_patterns(const esp_adapter *a, const esp_pattern *list, int n, double fallback, double factor);
esp_status esp_json_read_patterns(const struct json_t *j, const char *key, const char *path, esp_arena *arena,
                                  const esp_pattern **list, int *n);
/* A list of names or a regular expression. */
esp_status esp_json_read_names(const struct json_t *j, const char *key, const char *path, esp_arena *arena,
                               const char *const **list, int *n, const char **regex);
/* Keys that not every configuration of PEFT has. refuse: a recipe sets one that the kind does not have. exact_targets:
 * what LAYERS and EXCLUDE say goes into target_modules as exact paths (ALWAYS: in any case), and their keys out. */
enum { ESP_CFG_BIAS = 1, ESP_CFG_TOKENS = 2, ESP_CFG_DROPOUT = 4, ESP_CFG_LAYERS = 8, ESP_CFG_EXCLUDE = 16 };
enum { ESP_CFG_ALWAYS = 32 };
esp_status esp_config_refuse(const esp_adapter_cfg *c, const char *kind, unsigned keys);
void esp_config_exact_targets(const esp_adapter *a, struct json_t *j, unsigned keys);
/* lora_config.c */
esp_status esp_lora_config_check(const esp_adapter_cfg *c);
void esp_lora_config_write(const esp_adapter *a, struct json_t *j);
esp_status esp_lora_config_read(const struct json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c);

/* peft_ints.c */
struct esp_st_writer;
struct esp_st;
esp_status esp_ints_declare(const esp_adapter *a, struct esp_st_writer *w);
esp_status esp_ints_put(const esp_adapter *a, struct esp_st_writer *w);
bool esp_ints_own(const esp_adapter *a, const char *name);
esp_status esp_ints_fill(esp_adapter *a, const struct esp_st *f, const char *path);

/* peft_save.c / peft_load.c */
float *esp_param_host(const esp_adapter *a, int index); /* host copy in the file's layout; esp_mem_free */
void esp_param_file_shape(const esp_adapter *a, int index, int *ndim, int64_t shape[ESP_MAX_DIMS]);

#endif
