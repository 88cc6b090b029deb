/* tools.h: what happens to adapters and runs afterwards, and questions about files and the machine. Texts that come
 * back are the caller's (esp_free). */
#ifndef ESPALIER_TOOLS_H
#define ESPALIER_TOOLS_H

#include <stdint.h>

#include "espalier/run.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How several task vectors (what training changed) become one: docs/merging.md has formulas and papers. Begin with
 * ESP_MERGE_METHOD; what is NaN or NULL there is the method's own default, and giving what it does not read is an
 * error.
 */
typedef struct esp_merge_method {
  const char *name;
  const double *density; /* ties, dare_*, breadcrumbs*, magnitude_prune*: share of entries that stay; one or one each */
  int n_density;
  double lambda;                  /* factor of the merged change */
  double gamma;                   /* breadcrumbs*: share of the largest entries that leave */
  double t;                       /* slerp, nuslerp: 0 is the first, 1 the second */
  double alpha;                   /* opcm: share of the spectrum whose directions are closed to later tasks */
  double lines_alpha, lines_beta; /* LiNeS: block l of L is multiplied by alpha + beta l/(L-1), the rest by alpha */
  const double *metrics;          /* mwa: one each */
  int n_metrics;
  const char *better;   /* mwa: "higher" (NULL: this) or "lower" */
  double power;         /* mwa */
  const char *rescale;  /* dare_*: "inverse", "l1" or "none" */
  const char *majority; /* election of signs: "total" or "frequency" */
  int normalize;        /* election, linear, task_arithmetic: divide by the weights; -1: the method's own */
  uint64_t seed;        /* dare_* */
} esp_merge_method;
#define ESP_MERGE_METHOD                                                                                               \
  {                                                                                                                    \
    .lambda = __builtin_nan(""), .gamma = __builtin_nan(""), .t = __builtin_nan(""), .alpha = __builtin_nan(""),       \
    .lines_alpha = __builtin_nan(""), .lines_beta = __builtin_nan(""), .power = __builtin_nan(""), .normalize = -1     \
  }
/* Names for models (combine 0), or for adapters that become one. */
ESP_API const char *const *esp_merge_methods(int combine, int *n);

typedef struct esp_merge_options {
  const char *base;          /* model directory */
  const char *const *inputs; /* adapters, merged in order; with a method also models and stored differences */
  const double *weights;     /* NULL: 1 each */
  int n_inputs;
  const char *out;   /* model directory to write; with as_adapter an adapter directory */
  const char *dtype; /* NULL: as stored */
  int64_t verify;    /* adapters only: samples whose logits are compared, merged against unmerged; 0: none */
  const esp_merge_method *method; /* NULL: the adapters add up */
  int as_adapter;                 /* with a method: adapters become one LoRA */
  int into_model;                 /* with as_adapter: and that is merged into the base, `out` is a model */
  int64_t
      rank; /* of that LoRA at most; 0: what carries it exactly, where it has to be cut the largest of the adapters */
} esp_merge_options;
typedef struct esp_merge_result {
  int64_t tensors, changed;     /* written, of them changed */
  double max_delta, lost_share; /* largest change of a weight; share of changed weights that rounding undid */
  double max_abs, max_rel;      /* logits, verified */
  double top1_agreement;
  int64_t rows; /* compared */
  int sites;    /* combined modules, and the rank of the LoRA */
  int64_t rank;
  double max_error, mean_error; /* relative Frobenius error of a truncation */
} esp_merge_result;
ESP_API esp_status esp_merge(const esp_merge_options *o, esp_merge_result *out);

typedef struct esp_extract_options {
  const char *base, *tuned, *out;
  int64_t rank;       /* of a LoRA */
  const char *target; /* of a LoRA; NULL: all-linear; else comma-separated names or a regex */
  /* NULL: a LoRA. "lowrank" or "1bit": the whole difference of the models (tuned may be an adapter), stored small; a
   * merge by a method reads it like a model. */
  const char *as;
  double energy;  /* lowrank: share of the squares that is held; 0: 0.9 */
  int bits;       /* lowrank: of an entry, 8, 16 or 32; 0: 16 */
  int per_matrix; /* 1bit: one scale of each matrix, not of each row */
} esp_extract_options;
typedef struct esp_extract_result {
  int sites;
  int64_t rank;                 /* of the LoRA (the largest), 0: the adapter as it was */
  double max_error, mean_error; /* relative Frobenius error */
  int64_t bytes, full_bytes;    /* of a stored difference, and of the model */
} esp_extract_result;
ESP_API esp_status esp_extract(const esp_extract_options *o, esp_extract_result *out);

typedef struct esp_export_options {
  const char *base, *adapter, *out;
  const char *as;     /* NULL: as it is; "lora" */
  const char *target; /* NULL or "vllm" */
  int64_t rank;       /* as lora: 0 is the exact rank where there is one */
} esp_export_options;
ESP_API esp_status esp_export(const esp_export_options *o, esp_extract_result *out);

/* A model directory, an adapter directory, a checkpoint, a run or a safetensors file. */
ESP_API esp_status esp_inspect(const char *path, int json, char **text);
typedef struct esp_matrix_options { /* all zero: the defaults */
  int json;
  const char *bwt;               /* "gem" (NULL: this) or "trace": the denominator of BWT */
  int64_t window;                /* steps of windowed forgetting and plasticity; 0: 10 */
  const char *const *references; /* runs to compare with: one per task alone, or one of all tasks together */
  int n_references;
} esp_matrix_options;
/* The score matrix of a run and what follows from it and from the evaluations inside tasks, with their formulas. */
ESP_API esp_status esp_run_matrix(const char *run_dir, const esp_matrix_options *options, char **text);
/* A self-contained HTML page about a run, or about several side by side; one directory with a sweep.json stands for the
 * runs of that sweep. out NULL: report.html in the one directory. */
ESP_API esp_status esp_run_report(const char *const *dirs, int n, const char *out);
/* The same for a terminal. */
ESP_API esp_status esp_run_report_text(const char *const *dirs, int n, char **text);

/* Runs side by side: variants of a recipe over orders of tasks and seeds. */
typedef struct esp_run_place {
  const char *dir, *variant, *order; /* variant NULL: the directory; order NULL: the only one */
  int64_t seed;
} esp_run_place;
/* Mean, spread and paired differences to the first variant, from the runs that have finished: as a table or as JSON.
 * With `dir`, sweep.json and sweep.md are written there. */
ESP_API esp_status esp_runs_compare(const esp_run_place *runs, int n, const char *dir, int json, char **text);

/* What this machine offers and what is used of it; calibrate: measures its matmul and memory ceilings. */
ESP_API esp_status esp_doctor(int calibrate, int json, char **text);
/* The recipe's schema: "text", "json" or "markdown". NULL on failure. */
ESP_API char *esp_schema(const char *format);
/* A commented recipe to start from. NULL on failure. */
ESP_API char *esp_init_recipe(const char *base_model);

#ifdef __cplusplus
}
#endif
#endif
