/* recipe.h: the resolved recipe. One schema table (schema.c) drives parsing, defaults, range checks, `espalier schema`,
 * the docs page, `init` and the error text. Every configuration struct belongs to the room that reads it; this header
 * composes them. Strings live in the recipe's arena. */
#ifndef ESP_RECIPE_RECIPE_H
#define ESP_RECIPE_RECIPE_H

#include "adapters/adapter.h"
#include "core/arena.h"
#include "optim/optim.h"
#include "tasks/strategy.h"
#include "text/dataset.h"

typedef struct esp_recipe_model {
  const char *base_model; /* directory */
  esp_dtype dtype;        /* compute type: bf16 | fp32 */
  bool random_init;       /* make a new base from config.json alone */
  const char *tokenizer;  /* directory; default base_model */
} esp_recipe_model;

typedef struct esp_recipe_train {
  double epochs;                                         /* used when max_steps == 0 */
  int64_t max_steps;                                     /* 0: by epochs */
  int64_t micro_batch_size, gradient_accumulation_steps; /* rows per rank per micro-batch; micro-batches per step */
} esp_recipe_train;

typedef enum esp_metric {
  ESP_METRIC_PERPLEXITY,
  ESP_METRIC_CHOICE,
  ESP_METRIC_EXACT_MATCH,
  ESP_METRIC_ROUGE_L,
  ESP_METRIC_BASE_XENT,
  ESP_METRIC_BASE_KL
} esp_metric;
static inline bool esp_metric_lower(esp_metric m) { /* smaller is better */
  return m == ESP_METRIC_PERPLEXITY || m == ESP_METRIC_BASE_XENT || m == ESP_METRIC_BASE_KL;
}
typedef enum esp_midway { ESP_MIDWAY_OWN, ESP_MIDWAY_SEEN, ESP_MIDWAY_ALL } esp_midway;

typedef struct esp_eval_set {
  const char *name;
  esp_data_source source;
  esp_metric metric;
  int64_t max_new_tokens;
  int64_t limit; /* 0: all */
} esp_eval_set;

typedef enum esp_after_kind {
  ESP_AFTER_MERGE,
  ESP_AFTER_MERGE_TASKS,
  ESP_AFTER_EXPORT,
  ESP_AFTER_REPORT
} esp_after_kind;
/* after: merge_tasks, the options of espalier/tools.h; ESP_AFTER_OWN: not given, the method's own. */
#define ESP_AFTER_OWN (-1e30)
typedef struct esp_after_method {
  const char *name;
  bool as_adapter;
  const double *weight, *density, *lines; /* one or one of each task; of lines alpha, or alpha and beta */
  int n_weight, n_density, n_lines;
  double lambda, gamma, t, alpha, power;
  const char *metric;                         /* mwa: an evaluation set, NULL: the mean over the tasks' own */
  const char *rescale, *majority, *normalize; /* NULL: not given */
  uint64_t seed;
  int64_t rank; /* 0: as the method needs */
} esp_after_method;
typedef struct esp_after_step {
  esp_after_kind kind;     /* in `before` there is only one, and this says nothing */
  const char *out;         /* merge: the model directory; export: the adapter directory; report: html path. Joined with
                            * checkpoint.output_dir when relative */
  const char *dtype;       /* merge: NULL = as stored */
  int64_t verify;          /* merge: rows to compare, 0: none */
  const char *target;      /* export: "vllm" or NULL */
  esp_after_method method; /* merge_tasks */
} esp_after_step;

typedef struct esp_recipe_task {
  const char *name;
  esp_data_source *data;
  int n_data;
  int *eval; /* indices into recipe.eval.sets; the first is the matrix column of this task */
  int n_eval;
  /* sections with the task's overrides applied */
  esp_adapter_cfg adapter;
  esp_data_cfg data_cfg;
  esp_optim_cfg optim;
  esp_schedule schedule;
  esp_recipe_train train;
  esp_after_step *before; /* NULL: not given; given, of length 0 too, it stands for the recipe's */
  int n_before;
  const esp_after_step *start; /* the merge of all earlier tasks that it starts from; NULL: none */
} esp_recipe_task;

typedef enum esp_adapter_policy {
  ESP_POLICY_CONTINUE,
  ESP_POLICY_NEW_PER_TASK,
  ESP_POLICY_MERGE_THEN_NEW,
  ESP_POLICY_STACK, /* a new one on top of the earlier ones, which are frozen */
  ESP_POLICY_JOINT  /* all tasks as one */
} esp_adapter_policy;

typedef struct esp_watchdog {
  double loss_above, grad_norm_above; /* 0: off */
  int patience;                       /* consecutive steps above */
} esp_watchdog;

typedef struct esp_recipe {
  esp_arena *arena;
  const char *path; /* of the file, "<demo>" ... */
  const char *name;
  uint64_t seed;
  esp_recipe_model model;
  esp_adapter_cfg adapter;
  esp_data_cfg data;
  esp_optim_cfg optim;
  esp_schedule schedule;
  bool schedule_restart; /* per_task, else continuous over all tasks */
  esp_recipe_train train;
  struct {
    esp_ckpt_mode activation_checkpointing;
    int64_t limit_bytes; /* 0: what the machine has (share below) */
    double limit_share;  /* 0.95 */
    bool offload_base;   /* frozen weights stay in host memory and are streamed to the device */
  } memory;
  struct {
    const char *comm;   /* auto | self | mpi */
    int threads;        /* 0: auto */
    const char *device; /* auto | cpu | cuda | cuda:N */
    bool tf32;
  } parallel;
  struct {
    int64_t every;                    /* steps; 0: only at task ends */
    int64_t dense_steps, dense_every; /* and every dense_every of the first dense_steps of each task; 0: not */
    esp_midway midway;                /* which sets then */
    int64_t samples;                  /* completions of this many rows of each set are kept at task ends */
    esp_eval_set *sets;
    int n_sets;
    int64_t batch_tokens; /* tokens per evaluation micro-batch */
  } eval;
  struct {
    esp_adapter_policy policy;
    const char *const *order; /* names of tasks; `tasks` stands in this order already */
    int n_order;
    bool baseline;        /* row 0 of the matrix: the untouched base */
    bool reset_optimizer; /* at a new task */
    esp_strategy_cfg strategy;
  } continual;
  esp_recipe_task *tasks;
  int n_tasks;
  esp_after_step *before, *after;
  int n_before, n_after;
  struct {
    int64_t every;
    bool stdout_on, jsonl, tensorboard;
    esp_watchdog watchdog;
  } log;
  struct {
    const char *output_dir; /* ${name} expanded */
    int64_t every;          /* steps; 0: only at task ends and on signals */
    int keep;
    const char *keep_best_metric; /* eval set name, or "loss"; NULL: off */
    bool keep_best_max;
  } checkpoint;
  const struct esp_recipe *whole; /* policy joint: the recipe as it was written, whose tasks are one here; else NULL */
  struct esp_origins *origins;    /* where each value came from; private to this room */
} esp_recipe;

/* Parses, applies overrides ("optim.lr=1e-4", "tasks[1].train.epochs=2"), fills defaults, checks ranges and references.
 * All errors in one pass: the message has one line per error ("recipe.yaml:31:5: unknown key 'lora_rnak' in adapter
 * (did you mean 'rank'?)"), status ESP_ERR_RECIPE; the message is cut behind the last line that fits, with a count.
 * Relative paths of the file are relative to its folder, those of overrides to the working directory. */
esp_status esp_recipe_load(const char *path, const char *const *overrides, int n_overrides, esp_recipe **out);
/* append: a file of tasks (and evaluation sets) that come to stand behind those of the recipe; NULL: none. */
esp_status esp_recipe_load_more(const char *path, const char *const *overrides, int n_overrides, const char *append,
                                esp_recipe **out);
/* The hash that the recipe had while it had only the first `tasks` tasks and `sets` evaluation sets. */
void esp_recipe_hash_first(const esp_recipe *r, int tasks, int sets, char out[33]);
esp_status esp_recipe_parse(const char *yaml, size_t n, const char *path, const char *const *overrides, int n_overrides,
                            esp_recipe **out);
void esp_recipe_destroy(esp_recipe *r);
/* The resolved recipe as YAML, each value followed by "# origin" (default, file line, override). Caller frees
 * (esp_mem_free). Parsing it again gives the same recipe. */
char *esp_recipe_resolved(const esp_recipe *r);
/* xxh3-128 hex over the resolved values that change the result (not log, not output_dir): checked on resume. */
void esp_recipe_hash(const esp_recipe *r, char out[33]);

/* The schema, for docs and errors. format: "text", "json" (JSON Schema), "markdown". Caller frees. */
char *esp_schema_render(const char *format);
/* A commented recipe with the most used keys. Caller frees. */
char *esp_recipe_template(const char *base_model);

#endif
