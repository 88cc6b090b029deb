/* resume.c: `espalier resume`. */
#include "cli/verb_run.h"

static const cli_option options[] = {
    {"device", "NAME", 'd', false, "auto, cpu, cuda or cuda:N instead of the recipe's"},
    {"stop-after", "N", 0, false, "stop with a complete checkpoint after step N of the run"},
};

static int resume(cli_args *a) {
  esp_job *job = NULL;
  esp_status st = esp_job_open_run(a->positional[0], cli_value(a, "device"), &job);
  if (st != ESP_OK) return cli_fail(st);
  return cli_train(a, job, true);
}

const cli_verb cli_resume = {
    "resume",
    NULL,
    "RUN_DIR",
    1,
    1,
    false,
    "continue a run from its newest complete checkpoint",
    "Reads the resolved recipe from the run's folder and continues; the end is bit for bit the one of a run that was\n"
    "never stopped. A checkpoint that does not belong to the recipe is refused.",
    CLI_OPTIONS(options),
    resume};
