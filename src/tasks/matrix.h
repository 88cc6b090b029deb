/* matrix.h: the score matrix of a sequence of tasks and what it says about forgetting.
 *
 * R[i][j] is the score on set j after training task i; row 0 is the untouched base. With T tasks and c(t) the column of
 * task t's own evaluation set, t = 1..T, and larger scores better (a column where smaller is better, perplexity, enters
 * with its sign turned):
 *   ACC        = 1/T      sum_t R[T][c(t)]
 *   BWT        = 1/(T-1)  sum_{t<T} (R[T][c(t)] - R[t][c(t)])           Lopez-Paz & Ranzato 2017 (GEM)
 *   forgetting = 1/(T-1)  sum_{t<T} (max_{1<=i<T} R[i][c(t)] - R[T][c(t)])   Chaudhry et al. 2018
 *   FWT        = 1/(T-1)  sum_{t>1} (R[t-1][c(t)] - R[0][c(t)])         base model as the baseline
 *   min-ACC    = min_t R[T][c(t)]
 * Sets that belong to no task are probes: shown, not counted.
 */
#ifndef ESP_TASKS_MATRIX_H
#define ESP_TASKS_MATRIX_H

#include <stdbool.h>

#include "core/strbuf.h"
#include "espalier/status.h"

#define ESP_MATRIX_NAME 64

typedef struct esp_matrix {
  int tasks, sets; /* rows - 1, columns */
  char (*task_name)[ESP_MATRIX_NAME];
  char (*set_name)[ESP_MATRIX_NAME];
  char (*set_metric)[ESP_MATRIX_NAME];
  bool *smaller_better; /* [sets] */
  int *column;          /* [tasks]: the set of each task, -1: none */
  double *score;        /* [(tasks + 1) * sets], NaN: not measured */
} esp_matrix;

typedef struct esp_matrix_summary { /* NaN where not defined (one task, missing cells) */
  double acc, bwt, forgetting, fwt, min_acc, learning_acc;
} esp_matrix_summary;

esp_status esp_matrix_create(int tasks, int sets, esp_matrix **out); /* all cells NaN */
void esp_matrix_destroy(esp_matrix *m);
static inline double *esp_matrix_cell(const esp_matrix *m, int row, int set) {
  return &m->score[row * m->sets + set];
}
void esp_matrix_summarise(const esp_matrix *m, esp_matrix_summary *out);
/* Rows, summary and, with `formulas`, the definitions. */
void esp_matrix_render_text(const esp_matrix *m, bool formulas, esp_strbuf *out);
void esp_matrix_render_json(const esp_matrix *m, esp_strbuf *out);
esp_status esp_matrix_save(const esp_matrix *m, const char *path); /* JSON, atomic */
esp_status esp_matrix_load(const char *path, esp_matrix **out);

#endif
