/* eval.c: `espalier eval`: the recipe's evaluation sets on the base or on an adapter. */
#include <math.h>

#include "cli/cli.h"

static const cli_option options[] = {
    {"adapter", "DIR", 'a', false, "PEFT adapter directory; without it the base is measured"},
    {"ensemble", "DIR", 'e', false, "a second adapter: the larger of the probabilities of both counts (LAE)"},
    {"threads", "N", 't', false, "threads of this process (parallel.threads)"},
    {"device", "NAME", 'd', false, "auto, cpu, cuda or cuda:N (parallel.device)"},
    {"set", "KEY=VALUE", 0, false, "override a value of the recipe; as a plain argument too"},
};

static int eval(cli_args *a) {
  static esp_score scores[256];
  esp_job *job;
  int code, n = 0;
  if (!cli_open_job(a, &job, &code)) return code;
  esp_run_options o = {.ensemble = cli_value(a, "ensemble")};
  cli_catch_signals();
  esp_status st = esp_job_eval(job, cli_value(a, "adapter"), &o, scores, 256, &n);
  if (st == ESP_OK)
    for (int i = 0; i < n && i < 256; i++) {
      if (a->json) {
        fputs("{\"set\": ", stdout);
        cli_json_string(stdout, scores[i].set);
        printf(", \"metric\": \"%s\", \"score\": ", scores[i].metric);
        cli_json_number(stdout, scores[i].value);
        if (!isnan(scores[i].malformed)) {
          fputs(", \"malformed\": ", stdout);
          cli_json_number(stdout, scores[i].malformed);
        }
        printf(", \"samples\": %lld}\n", (long long)scores[i].samples);
      } else {
        printf("%-24s %-12s %10.4f  (%lld samples", scores[i].set, scores[i].metric, scores[i].value,
               (long long)scores[i].samples);
        if (!isnan(scores[i].malformed)) printf(", %.1f%% none of the labels", 100 * scores[i].malformed);
        puts(")");
      }
    }
  code = st == ESP_OK ? 0 : cli_fail(st);
  esp_job_close(job);
  return code;
}

const cli_verb cli_eval = {
    "eval",
    NULL,
    "RECIPE [key=value ...]",
    1,
    1,
    true,
    "measure the recipe's evaluation sets",
    "Perplexity, choice by label likelihood, exact match and ROUGE-L of generated text, as the sets say.",
    CLI_OPTIONS(options),
    eval};
