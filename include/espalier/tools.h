/* tools.h: what happens to adapters and runs afterwards, and questions about files and the machine. Texts that come
 * back are the caller's (esp_free). */
#ifndef ESPALIER_TOOLS_H
#define ESPALIER_TOOLS_H

#include <stdint.h>

#include "espalier/run.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct esp_merge_options {
  const char *base;              /* model directory */
  const char *const *adapters;   /* PEFT directories, merged in order */
  const double *adapter_weights; /* NULL: 1 each */
  int n_adapters;
  const char *out;   /* model directory to write */
  const char *dtype; /* NULL: as stored */
  int64_t verify;    /* samples whose logits are compared, merged against unmerged; 0: none */
  /* The adapters become one LoRA first (NULL: no): linear, svd, cat, ties, ties_svd, dare_ties, dare_linear,
   * dare_ties_svd, dare_linear_svd, magnitude_prune or magnitude_prune_svd. `out` is then an adapter directory, and
   * with into_model the model that it is merged into. */
  const char *combine;
  int into_model;
  double density;            /* ties, dare_*, magnitude_prune*: share of entries that stay */
  const char *majority_sign; /* ties*, dare_ties*: "total" (NULL: this) or "frequency" */
  uint64_t seed;             /* dare_* */
  int64_t rank; /* at most; 0: what carries the combination, for the svd types the largest of the adapters */
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
  int64_t rank;
  const char *target; /* NULL: all-linear; else comma-separated names or a regex */
} esp_extract_options;
typedef struct esp_extract_result {
  int sites;
  int64_t rank;                 /* of the LoRA, 0: the adapter as it was */
  double max_error, mean_error; /* relative Frobenius error of the truncation */
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
/* The score matrix of a run with ACC, BWT, FWT and forgetting and their formulas. */
ESP_API esp_status esp_run_matrix(const char *run_dir, int json, char **text);
/* A self-contained HTML page; out NULL: <run_dir>/report.html. */
ESP_API esp_status esp_run_report(const char *run_dir, const char *out);

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
