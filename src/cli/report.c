/* report.c: `espalier report`: a page about a run. */
#include "cli/cli.h"

static const cli_option options[] = {
    {"out", "FILE", 'o', false, "where to write it (default RUN_DIR/report.html)"},
};

static int report(cli_args *a) {
  const char *out = cli_value(a, "out");
  esp_status st = esp_run_report(a->positional[0], out);
  if (st != ESP_OK) return cli_fail(st);
  if (!a->quiet) printf("%s%s\n", out ? out : a->positional[0], out ? "" : "/report.html");
  return 0;
}

const cli_verb cli_report = {
    "report",
    NULL,
    "RUN_DIR",
    1,
    1,
    false,
    "write a self-contained HTML page about a run",
    "Loss curves, heat map of the score matrix, norms per layer; no script or font from elsewhere.",
    CLI_OPTIONS(options),
    report};
