/* job.h: a job is one resolved recipe and what can be done with it: check, plan, run, evaluate, look at its data. */
#ifndef ESPALIER_JOB_H
#define ESPALIER_JOB_H

#include <stddef.h>
#include <stdint.h>

#include "espalier/run.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct esp_job esp_job;

/* Overrides are "key=value" as on the command line ("optim.lr=1e-4", "tasks[1].train.epochs=2"). */
ESP_API esp_status esp_job_open(const char *recipe_path, const char *const *overrides, int n_overrides, esp_job **out);
/* The same from text; `path` is for messages and is what relative paths are relative to. */
ESP_API esp_status esp_job_open_text(const char *yaml, size_t n, const char *path, const char *const *overrides,
                                     int n_overrides, esp_job **out);
/* The recipe that a run directory keeps. */
ESP_API esp_status esp_job_open_run(const char *run_dir, const char *device, esp_job **out);
/* The same with the tasks of a file behind those it has: esp_job_resume then trains these. */
ESP_API esp_status esp_job_open_more(const char *run_dir, const char *tasks_path, const char *device, esp_job **out);
ESP_API void esp_job_close(esp_job *job); /* NULL is allowed */

ESP_API const char *esp_job_name(const esp_job *job);
ESP_API const char *esp_job_output_dir(const esp_job *job);
/* Whether the recipe wants lines on the standard output, and after how many steps one (log.stdout, log.every). */
ESP_API int esp_job_prints(const esp_job *job, int64_t *every);
/* The resolved recipe with the origin of each value (esp_free). NULL on failure. */
ESP_API char *esp_job_resolved(const esp_job *job);

/* Reads headers, tokenizer and data, resolves every target; opens no weight. `facts` (optional, esp_free): one line
 * per counted fact. */
ESP_API esp_status esp_job_check(esp_job *job, char **facts);
ESP_API esp_status esp_job_plan(esp_job *job, esp_plan **out);
typedef enum esp_found { ESP_FOUND_NONE, ESP_FOUND_UNFINISHED, ESP_FOUND_FINISHED } esp_found;
/* Whether the job's output directory holds its run already; the run of another recipe is ESP_ERR_RECIPE. */
ESP_API esp_status esp_job_found(const esp_job *job, esp_found *found);
ESP_API uint64_t esp_job_seed(const esp_job *job);

/* Both may be called by every rank of an MPI job. `result` may be NULL. */
ESP_API esp_status esp_job_run(esp_job *job, const esp_run_options *options, esp_run_result *result);
ESP_API esp_status esp_job_resume(esp_job *job, const esp_run_options *options, esp_run_result *result);

/* ---- evaluation sets of the recipe, on the base (adapter_dir NULL) or with an adapter ---- */
typedef struct esp_score {
  char set[64], metric[32];
  double value;
  int64_t samples;
  double malformed; /* share of answers that are none of the labels; NaN: not asked of this set */
} esp_score;
/* `scores` has room for `max`; *n is how many sets there are. */
ESP_API esp_status esp_job_eval(esp_job *job, const char *adapter_dir, const esp_run_options *options,
                                esp_score *scores, int max, int *n);

/* ---- what the model will see ---- */
typedef struct esp_data_token {
  int32_t id;
  float weight;     /* loss weight of predicting this token */
  const char *text; /* what it adds to the text before it */
} esp_data_token;
typedef struct esp_data_sample {
  const char *task, *origin; /* origin: "path:line" */
  int64_t index, total;
  const esp_data_token *tokens;
  int64_t n;
} esp_data_sample;
typedef void (*esp_data_fn)(void *ctx, const esp_data_sample *sample);
/* The first `count` samples of a task (NULL: of each task), tokenised and weighted as in training. */
ESP_API esp_status esp_job_data(esp_job *job, const char *task, int64_t count, esp_data_fn fn, void *ctx);

#ifdef __cplusplus
}
#endif
#endif
