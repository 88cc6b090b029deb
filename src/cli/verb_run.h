/* verb_run.h: what run and resume share. */
#ifndef ESP_CLI_VERB_RUN_H
#define ESP_CLI_VERB_RUN_H

#include "cli/cli.h"

/* Trains with progress and signals; closes the job; the exit code. */
int cli_train(cli_args *a, esp_job *job, bool resume);
void cli_print_result(const cli_args *a, esp_status st, const esp_run_result *r, const char *run_dir);

#endif
