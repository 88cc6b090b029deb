/* sweep.h: what the two files of `espalier sweep` share: the runs of a sweep (sweep.c) and the processes that train
 * them (sweep_jobs.c). */
#ifndef ESP_CLI_SWEEP_H
#define ESP_CLI_SWEEP_H

#include "cli/cli.h"

enum { SWEEP_MAX_RUNS = 4096, SWEEP_LABEL = 96, SWEEP_OVERRIDES = 128, SWEEP_PATH = 4096 };

typedef struct sweep_run {
  const char *recipe, *variant, *order; /* labels; order "": the only one */
  int64_t seed;
  const char *overrides[SWEEP_OVERRIDES]; /* without those of the command line that hold for all */
  int n_overrides;
  char dir[SWEEP_PATH];
  esp_found found;
  int code; /* of its process; -1: not run */
} sweep_run;

typedef struct sweep {
  cli_args *args;
  const char *out;
  sweep_run *runs;
  int n;
  const char *devices[64]; /* one per job, in turn; none: the recipe's */
  int n_devices;
  int64_t jobs, threads; /* threads: of one run, 0: as the recipe says */
} sweep;

/* Trains what is not finished, `jobs` at a time; `done` after each. The exit code: of the first run that failed, or
 * ESP_ERR_INTERRUPTED. */
int sweep_train(sweep *s, void (*done)(sweep *s));

#endif
