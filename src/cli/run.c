/* run.c: `espalier run`, all tasks of a recipe. */
#include <string.h>

#include "cli/verb_run.h"

static const cli_option options[] = {
    {"output", "DIR", 'o', false, "the run's folder (checkpoint.output_dir)"},
    {"overwrite", NULL, 0, false, "remove a run that is already in the folder"},
    {"append", "TASKS", 0, false, "add the tasks of this file to the finished run in the folder RECIPE and train them"},
    {"stop-after", "N", 0, false, "stop with a complete checkpoint after step N of the run"},
    {"dry-run", NULL, 0, false, "what `plan` does"},
    {"threads", "N", 't', false, "threads of this process (parallel.threads)"},
    {"device", "NAME", 'd', false, "auto, cpu, cuda or cuda:N (parallel.device)"},
    {"set", "KEY=VALUE", 0, false, "override a value of the recipe; as a plain argument too"},
};

static void result_json(const esp_run_result *r, esp_status st) {
  printf("{\"event\": \"result\", \"status\": %d, \"steps\": %lld, \"tokens\": %lld, \"trainable\": %lld, "
         "\"parameters\": %lld, \"memory_peak\": %lld, \"device_peak\": %lld, \"device\": \"%s\", \"seconds\": ",
         (int)st, (long long)r->steps, (long long)r->tokens, (long long)r->trainable, (long long)r->parameters,
         (long long)r->memory_peak, (long long)r->device_peak, r->device);
  cli_json_number(stdout, r->seconds);
  fputs(", \"last_loss\": ", stdout);
  cli_json_number(stdout, r->last_loss);
  if (r->has_matrix) {
    const char *const names[] = {"acc", "bwt", "fwt", "forgetting", "lowest"};
    const double values[] = {r->acc, r->bwt, r->fwt, r->forgetting, r->lowest};
    for (int i = 0; i < 5; i++) {
      printf(", \"%s\": ", names[i]);
      cli_json_number(stdout, values[i]);
    }
  }
  puts("}");
}

void cli_print_result(const cli_args *a, esp_status st, const esp_run_result *r, const char *run_dir) {
  char seconds[24], rate[24], memory[24], trainable[24];
  if (a->json) {
    result_json(r, st);
    return;
  }
  if (!r->steps || a->quiet) return;
  printf("%lld steps in %s, %s tokens/s, last loss %.4f, %s trained parameters (%.2f%%), peak %s\n",
         (long long)r->steps, cli_duration(r->seconds, seconds, sizeof seconds),
         cli_count(r->seconds > 0 ? (double)r->tokens / r->seconds : 0, rate, sizeof rate), r->last_loss,
         cli_count((double)r->trainable, trainable, sizeof trainable),
         r->parameters ? 100.0 * (double)r->trainable / (double)r->parameters : 0,
         cli_bytes((double)(r->device_peak ? r->device_peak : r->memory_peak), memory, sizeof memory));
  if (r->device_peak)
    printf("on %s; peak in host memory %s\n", r->device, cli_bytes((double)r->memory_peak, memory, sizeof memory));
  if (!r->has_matrix || st != ESP_OK) return;
  char *text = NULL;
  if (esp_run_matrix(run_dir, NULL, &text) == ESP_OK) fputs(text, stdout);
  esp_free(text);
}

int cli_train(cli_args *a, esp_job *job, bool resume) {
  esp_run_options o = {0};
  esp_run_result result = {0};
  if (!cli_integer(a, "stop-after", 1, INT64_MAX / 2, &o.stop_after)) {
    esp_job_close(job);
    return ESP_ERR_RECIPE;
  }
  o.overwrite = cli_flag(a, "overwrite");
  cli_progress *progress = cli_progress_create(a, job);
  o.on_event = progress ? cli_progress_event : NULL;
  o.ctx = progress;
  cli_catch_signals();
  esp_status st = resume ? esp_job_resume(job, &o, &result) : esp_job_run(job, &o, &result);
  bool first_rank = cli_progress_active(progress);
  cli_progress_destroy(progress);
  if (first_rank && (st == ESP_OK || st == ESP_ERR_INTERRUPTED))
    cli_print_result(a, st, &result, esp_job_output_dir(job));
  if (st != ESP_OK) (void)cli_fail(st);
  if (st == ESP_ERR_INTERRUPTED && first_rank && !a->quiet)
    fprintf(stderr, "continue with: espalier resume %s\n", esp_job_output_dir(job));
  esp_job_close(job);
  return (int)st;
}

static int run(cli_args *a) {
  if (cli_flag(a, "dry-run")) return cli_plan.run(a);
  esp_job *job;
  int code;
  if (cli_value(a, "append")) {
    esp_status st = esp_job_open_more(a->positional[0], cli_value(a, "append"), cli_value(a, "device"), &job);
    return st == ESP_OK ? cli_train(a, job, true) : cli_fail(st);
  }
  if (!cli_open_job(a, &job, &code)) return code;
  return cli_train(a, job, false);
}

const cli_verb cli_run = {
    "run",
    "train",
    "RECIPE [key=value ...]",
    1,
    1,
    true,
    "train all tasks of a recipe",
    "Trains the tasks in their order, fills the score matrix after each, and does what the recipe's `after` says. The\n"
    "run's folder keeps the resolved recipe, metrics, checkpoints and one PEFT adapter folder per task. SIGINT, "
    "SIGTERM\n"
    "and SIGUSR1 finish the step, write a complete checkpoint and end with code 6; `resume` continues to the same "
    "bits.\n"
    "Under mpirun or srun every rank runs this command; rank 0 prints.",
    CLI_OPTIONS(options),
    run};
