/* matrix.c: `espalier matrix`: the score matrix of a run. */
#include "cli/cli.h"

static const cli_option options[] = {
    {"bwt", "FORM", 0, false, "denominator of BWT: gem (T-1, default) or trace (T)"},
    {"window", "STEPS", 'w', false, "of windowed forgetting and plasticity (default 10)"},
    {"reference", "RUN_DIR", 0, false,
     "compare with runs of single tasks, or with one of all tasks together; may be repeated"},
};

static int matrix(cli_args *a) {
  char *text = NULL;
  const char *references[CLI_MAX_ARGS];
  esp_matrix_options o = {.json = a->json, .bwt = cli_value(a, "bwt"), .references = references};
  o.n_references = cli_values(a, "reference", references, CLI_MAX_ARGS);
  if (!cli_integer(a, "window", 1, INT64_MAX / 2, &o.window)) return ESP_ERR_RECIPE;
  esp_status st = esp_run_matrix(a->positional[0], &o, &text);
  return cli_print_text(st, text);
}

const cli_verb cli_matrix = {
    "matrix",
    NULL,
    "RUN_DIR",
    1,
    1,
    false,
    "print the score matrix of a run",
    "Rows: after each task; columns: evaluation sets. With accuracy, transfer and forgetting in the forms that the\n"
    "literature uses, and, from evaluation inside tasks (eval.every), worst-case accuracy, windowed forgetting and\n"
    "plasticity and the stability gap; the formulas stand beside the numbers.",
    CLI_OPTIONS(options),
    matrix};
