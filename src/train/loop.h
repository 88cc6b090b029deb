/* loop.h: what the files of the loop share: one run in progress. */
#ifndef ESP_TRAIN_LOOP_H
#define ESP_TRAIN_LOOP_H

#include <stdio.h>

#include "train/background.h"
#include "train/metrics.h"

typedef struct esp_loop {
  const esp_recipe *r;
  esp_comm *comm;
  const esp_train_hooks *hooks;
  const esp_run_options *opt;
  esp_train_data data;
  esp_plan_detail plan;
  esp_engine engine;
  esp_metrics metrics;
  esp_matrix *matrix; /* NULL: no evaluation sets */
  esp_run_state state;
  const char *phase;
  char checkpoint[ESP_PATH]; /* the newest, "" when there is none */
  int64_t total_steps, tokens;
  esp_status pending;           /* rank 0 could not write its metrics: told to the others with the next step */
  FILE *log;                    /* run.log, rank 0 */
  double started, step_seconds; /* step_seconds: running mean, for the ETA */
  esp_rows rows;
  esp_background *background; /* the checkpoint being written beside the steps; NULL before the first */
} esp_loop;

/* report.c: events, on rank 0. */
void esp_loop_emit(esp_loop *l, esp_event *e);
void esp_loop_phase(esp_loop *l, const char *phase);
void esp_loop_note(esp_loop *l, const char *fmt, ...) ESP_PRINTF(2, 3);
esp_event esp_loop_event(const esp_loop *l, esp_event_kind kind);
void esp_loop_result(const esp_loop *l, esp_run_result *result);

/* Opens run.log (appending) and writes the events since; a run goes on without it when it cannot be written. */
void esp_loop_log_open(esp_loop *l);
/* result.json: what esp_run_result says, and the plan beside the measured peak. Rank 0. */
esp_status esp_loop_save_result(const esp_loop *l, const esp_run_result *r);

/* rundir.c: the run directory. Rank 0 acts, all ranks agree. */
/* Whether a run may be put there; changes nothing. */
esp_status esp_rundir_check(const esp_recipe *r, esp_comm *comm, bool overwrite);
esp_status esp_rundir_prepare(const esp_recipe *r, esp_comm *comm, bool resume, bool overwrite);
/* The recipe of the folder, written anew. */
esp_status esp_rundir_recipe(const esp_recipe *r, esp_comm *comm);
esp_status esp_rundir_base(const esp_loop *l, char out[ESP_PATH]); /* of the present task */

/* start.c: what task i starts from is merged, and with adapters becomes the values of the present one. Collective. */
esp_status esp_loop_start(esp_loop *l, int i);
/* evaluate.c */
/* Set `i`; events and metrics. Collective. */
esp_status esp_loop_score(esp_loop *l, int i, esp_score_result *out);
/* All sets into a row of the matrix. */
esp_status esp_loop_matrix_row(esp_loop *l, int row);
/* In the middle of a task: whether it is time; the sets of eval.midway, and the best adapter so far. */
bool esp_loop_midway_due(const esp_loop *l);
esp_status esp_loop_midway(esp_loop *l, const esp_recipe_task *t);
/* The same at a task's end, from the row just measured. */
esp_status esp_loop_best_of_row(esp_loop *l, int row);
esp_status esp_loop_save_adapter(esp_loop *l, const char *folder, const char *name, char path[ESP_PATH]);

#endif
