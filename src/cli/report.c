/* report.c: `espalier report`: a page about a run. */
#include "cli/cli.h"

static const cli_option options[] = {
    {"out", "FILE", 'o', false, "where to write it (default RUN_DIR/report.html; several runs: report.html)"},
    {"text", NULL, 0, false, "print it for the terminal instead"},
};

static int report(cli_args *a) {
  const char *out = cli_value(a, "out");
  const char *const *dirs = a->positional;
  if (cli_flag(a, "text")) {
    char *text = NULL;
    if (out) return cli_usage_error(a->verb, "--text is printed: --out is for the page");
    esp_status st = esp_run_report_text(dirs, a->n_positional, &text);
    return cli_print_text(st, text);
  }
  if (!out && a->n_positional > 1) out = "report.html";
  esp_status st = esp_run_report(dirs, a->n_positional, out);
  if (st != ESP_OK) return cli_fail(st);
  if (!a->quiet) printf("%s%s\n", out ? out : dirs[0], out ? "" : "/report.html");
  return 0;
}

const cli_verb cli_report = {"report",
                             NULL,
                             "RUN_DIR ...",
                             1,
                             256,
                             false,
                             "write a self-contained HTML page about a run, several runs or a sweep",
                             "One run: heat map of the score matrix, scores and loss over steps with the task switches "
                             "marked, change per layer,\n"
                             "memory, answers before and after each task. Several runs, or the folder of a sweep: the "
                             "variants side by side and\n"
                             "forgetting against memory. No script or font from elsewhere.",
                             CLI_OPTIONS(options),
                             report};
