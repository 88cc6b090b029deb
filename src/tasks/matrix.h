/* matrix.h: the score matrix of a sequence of tasks and what it says about forgetting.
 *
 * R[i][j] is the score on set j after training task i; row 0 is the untouched base. With T tasks and c(t) the column of
 * task t's own evaluation set, t = 1..T, and larger scores better (a column where smaller is better, perplexity, enters
 * with its sign turned), R[i][t] short for R[i][c(t)]. Where the literature has several forms of one number, each has
 * its own name here, and the formulas are printed beside the numbers (esp_measures below):
 *   ACC            = 1/T     sum_t R[T][t]                              AP, OP, AA
 *   BWT            = 1/(T-1) sum_{t<T} (R[T][t] - R[t][t])              Lopez-Paz & Ranzato 2017 (GEM), mammoth
 *   BWT (trace)    = 1/T     sum_{t<T} (R[T][t] - R[t][t])              TRACE, SAPT's score.py
 *   BWT (rows)     = 2/(T(T-1)) sum_{i>t} (R[i][t] - R[t][t])           Diaz-Rodriguez et al. 2018
 *   forgetting     = 1/(T-1) sum_{t<T} (max_{1<=i<T} R[i][t] - R[T][t]) Chaudhry et al. 2018, SAPT
 *   forgetting >=0 = the same with the maximum over i <= T              mammoth
 *   FWT            = 1/(T-1) sum_{t>1} (R[t-1][t] - R[0][t])            GEM, with the base model as the baseline
 *   FWT (unseen)   = 2/(T(T-1)) sum_{1<=i<t} R[i][t]                    Diaz-Rodriguez et al. 2018: no baseline
 *   learning       = 1/T     sum_t R[t][t]                              learning accuracy (Riemer et al. 2019)
 *   anytime        = 1/T     sum_i 1/i sum_{t<=i} R[i][t]               average incremental accuracy
 *   lowest         = min_t R[T][t]
 * The forgetting of avalanche is -BWT. Sets that belong to no task are probes: shown, in no formula.
 *
 * What happens inside tasks is in curves: scores over steps (De Lange et al. 2023, arXiv:2205.13452; with A_t(s) the
 * score on task t's own set at step s, e_t the last step of task t, and evaluations only):
 *   min-ACC = 1/(T-1) sum_{t<T} min_{s > e_t} A_t(s)
 *   WC-ACC  = R[T][T]/T + (1 - 1/T) min-ACC
 *   WF      = 1/T sum_t max_{s < u <= s+w, s >= e_(t-1)} (A_t(s) - A_t(u)), at least 0
 *   WP      = the same with A_t(u) - A_t(s)
 * (the paper's window counts evaluations at every step; this one is w steps long, so that it means the same however
 * densely is evaluated), and
 *   gap     = mean over i > 1 and t < i of min(R[i-1][t], R[i][t]) - min_{e_(i-1) <= s <= e_i} A_t(s)
 * how far scores fall inside a task below both of its ends: 0 where only the ends are measured.
 */
#ifndef ESP_TASKS_MATRIX_H
#define ESP_TASKS_MATRIX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

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
  double *malformed;    /* the same shape: share of answers that are none of the labels, NaN: not asked of this set */
  bool joint;           /* all tasks were trained as one: the last row is after all of them */
} esp_matrix;

typedef struct esp_matrix_summary { /* NaN where not defined (one task, missing cells) */
  double acc, bwt, forgetting, fwt, learning_acc, lowest;
  double bwt_trace, bwt_rows, forgetting_all, fwt_unseen, anytime_acc;
} esp_matrix_summary;

esp_status esp_matrix_create(int tasks, int sets, esp_matrix **out); /* all cells NaN */
esp_status esp_matrix_like(const esp_matrix *m, esp_matrix **out);   /* of its tasks and sets, all cells NaN */
void esp_matrix_destroy(esp_matrix *m);
static inline double *esp_matrix_cell(const esp_matrix *m, int row, int set) {
  return &m->score[row * m->sets + set];
}
static inline double *esp_matrix_malformed(const esp_matrix *m, int row, int set) {
  return &m->malformed[row * m->sets + set];
}
void esp_matrix_copy_cells(esp_matrix *to, const esp_matrix *from); /* of the same shape */
/* What stands in front of a row: the task it comes after, "base" or "joint". */
const char *esp_matrix_row_name(const esp_matrix *m, int row);
/* The first row after which the task has been trained. */
int esp_matrix_row_of(const esp_matrix *m, int task);
/* The score of task t's own set in a row, larger better; NaN when the task has none. */
double esp_matrix_own(const esp_matrix *m, int row, int task);
bool esp_matrix_is_probe(const esp_matrix *m, int set);
void esp_matrix_summarise(const esp_matrix *m, esp_matrix_summary *out);

/* ---- inside tasks ---- */
typedef struct esp_score_point { /* one evaluation of a task's own set */
  int task;                      /* the task (from 0) that was being trained; at its end: still this one */
  double step, score;            /* as measured, not turned */
} esp_score_point;
typedef struct esp_score_points { /* in the order of the steps */
  esp_score_point *at;
  int64_t n;
} esp_score_points;
typedef struct esp_curve_summary { /* NaN where not defined: one task, no two evaluations within the window */
  double min_acc, wc_acc, wf, wp, gap;
  int64_t inside; /* evaluations that are not at a task's end */
} esp_curve_summary;
/* curves: [tasks]. window: steps. */
void esp_curve_summarise(const esp_matrix *m, const esp_score_points *curves, double window, esp_curve_summary *out);
/* The matrix's own rows as the curve of a task (for a run without others): at[] has room for tasks + 1; the number. */
int64_t esp_matrix_points(const esp_matrix *m, int task, esp_score_point *at);

/* ---- against other runs: S[t] from the last rows of single-task runs, or of one joint run ---- */
typedef struct esp_reference_summary {
  double learning_gap; /* 1/T sum_t (R[t][t] - S[t]): SAPT's FWT; minus intransigence (Chaudhry et al. 2018) */
  double final_gap;    /* 1/T sum_t (R[T][t] - S[t]) */
} esp_reference_summary;
/* A set is looked up by its name: in the run that has trained a task on it, else in any that measured it. */
void esp_reference_summarise(const esp_matrix *m, const esp_matrix *const *others, int n, esp_reference_summary *out);

/* ---- as text and JSON ---- */
typedef struct esp_matrix_view { /* all optional */
  bool formulas;
  bool bwt_trace; /* BWT by TRACE's denominator comes first, as "BWT (trace)" */
  const esp_curve_summary *curve;
  double window; /* of curve */
  const esp_reference_summary *reference;
} esp_matrix_view;
void esp_matrix_render_text(const esp_matrix *m, const esp_matrix_view *view, esp_strbuf *out);
void esp_matrix_render_json(const esp_matrix *m, const esp_matrix_view *view, esp_strbuf *out);
esp_status esp_matrix_save(const esp_matrix *m, const char *path); /* JSON, atomic */
esp_status esp_matrix_load(const char *path, esp_matrix **out);

/* The numbers by name, for tables elsewhere. */
typedef struct esp_measure_row {
  const char *key, *label, *formula;
  size_t offset; /* of the double in its summary */
  bool sign;     /* shown with its sign */
  enum { ESP_OF_MATRIX, ESP_OF_CURVE, ESP_OF_REFERENCE } of;
} esp_measure_row;
extern const esp_measure_row esp_measure_rows[];
extern const int esp_n_measure_rows;

#endif
