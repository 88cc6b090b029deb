/* check.c: `espalier check`: everything that is wrong, before anything is read in full. */
#include "cli/cli.h"

static const cli_option options[] = {
    {"set", "KEY=VALUE", 0, false, "override a value of the recipe; as a plain argument too"},
};

static int check(cli_args *a) {
  esp_job *job;
  char *facts = NULL;
  int code;
  if (!cli_open_job(a, &job, &code)) return code;
  esp_status st = esp_job_check(job, &facts);
  if (st == ESP_OK && a->json) {
    fputs("{\"ok\": true, \"facts\": ", stdout);
    cli_json_string(stdout, facts ? facts : "");
    puts("}");
  } else if (st == ESP_OK && !a->quiet) {
    fputs(facts ? facts : "", stdout);
    printf("%s: ok\n", a->positional[0]);
  }
  code = st == ESP_OK ? 0 : cli_fail(st);
  esp_free(facts);
  esp_job_close(job);
  return code;
}

const cli_verb cli_check = {
    "check",
    NULL,
    "RECIPE [key=value ...]",
    1,
    1,
    true,
    "say everything that is wrong with a recipe and its files",
    "Parses the recipe, reads the headers of the model, the tokenizer and the data, and resolves every target. All\n"
    "errors of the recipe come in one pass, each with file, line and column.",
    CLI_OPTIONS(options),
    check};
