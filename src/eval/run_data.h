/* run_data.h: what a run directory holds, read back: metrics.jsonl as curves over steps, matrix.json, result.json. */
#ifndef ESP_EVAL_RUN_DATA_H
#define ESP_EVAL_RUN_DATA_H

#include "io/json.h"
#include "tasks/matrix.h"

enum { ESP_RUN_WINDOW = 10 }; /* steps of windowed forgetting and plasticity, unless said otherwise */
enum { ESP_RUN_LOSS, ESP_RUN_LR, ESP_RUN_GRAD_NORM, ESP_RUN_SECONDS, ESP_RUN_VALUES };

typedef struct esp_run_curve { /* one evaluation set under one metric, in the order of the steps */
  char set[ESP_MATRIX_NAME], metric[ESP_MATRIX_NAME];
  double *step, *score, *task; /* task: index into names */
  int64_t n, cap;
} esp_run_curve;

typedef struct esp_run_switch { /* the first step of a task */
  double step;
  char name[ESP_MATRIX_NAME];
} esp_run_switch;

typedef struct esp_run_data {
  double *step, *value[ESP_RUN_VALUES]; /* one value per optimizer step */
  int64_t n, cap;
  esp_run_switch *switches;
  int n_switches;
  char (*names)[ESP_MATRIX_NAME]; /* tasks in the order in which they appear */
  int n_names;
  esp_run_curve *curves;
  int n_curves;
  double seconds, tokens_per_second, memory; /* of all steps; mean; largest */
  esp_matrix *matrix;                        /* NULL: the run has none */
  json_t *result;                            /* NULL: the run has not finished */
} esp_run_data;

/* ESP_ERR_DATA with file and line when one of the files cannot be read; only metrics.jsonl must be there. */
esp_status esp_run_data_read(const char *run_dir, esp_run_data *out);
void esp_run_data_deinit(esp_run_data *d);
/* NaN when there is no step. The median: a step beside a checkpoint or an evaluation does not count. */
double esp_run_data_step_seconds(const esp_run_data *d);
/* The curve of a set under a metric, NULL: never measured. */
const esp_run_curve *esp_run_data_curve(const esp_run_data *d, const char *set, const char *metric);
/* The numbers from inside tasks: of the curves of metrics.jsonl, or, where it has none, of the matrix's rows (then
 * nothing that has a window). All NaN without a matrix. */
esp_status esp_run_data_inside(const esp_run_data *d, double window, esp_curve_summary *out);
/* Bytes that the strategies of a finished run hold, 0: it has none; NaN: it has not finished. */
double esp_run_data_strategies(const esp_run_data *d);
/* What the run held, by category and strategy, as lines of text; nothing for one that has not finished. */
void esp_run_data_memory(const esp_run_data *d, esp_strbuf *out);
/* A number of result.json, NaN when it has none; "a.b" is b inside a. */
double esp_run_data_result(const esp_run_data *d, const char *key);

#endif
