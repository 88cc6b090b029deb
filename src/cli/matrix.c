/* matrix.c: `espalier matrix`: the score matrix of a run. */
#include "cli/cli.h"

static int matrix(cli_args *a) {
  char *text = NULL;
  esp_status st = esp_run_matrix(a->positional[0], a->json, &text);
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
    "Rows: after each task; columns: evaluation sets. With ACC, BWT, FWT and forgetting and their formulas.",
    NULL,
    0,
    matrix};
