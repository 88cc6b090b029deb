/* report.h: runs as self-contained HTML pages and as text for the terminal. No scripts, no network.
 *
 * One run: its numbers, the score matrix as a heat map, scores and training curves over steps with the task switches
 * marked, how far each task moved each layer, what was held in memory, answers before and after each task. Several runs
 * (or a sweep): the variants side by side, forgetting against memory, the mean matrix of each. */
#ifndef ESP_EVAL_REPORT_H
#define ESP_EVAL_REPORT_H

#include "eval/compare.h"

/* Reads metrics.jsonl, and what else there is of matrix.json, result.json, adapters/ and samples/; writes the page
 * atomically. out NULL: <run_dir>/report.html. */
esp_status esp_report_write(const char *run_dir, const char *out);
esp_status esp_report_text(const char *run_dir, esp_strbuf *out);

/* runs: read already. */
esp_status esp_report_compare_write(const esp_compared *runs, int n, const char *title, const char *out);

/* The runs of <dir>/sweep.json, read; a run whose folder is no longer where it was is looked for below dir. */
typedef struct esp_sweep {
  json_t *json; /* the strings are its own */
  char **dirs;
  esp_compared *runs;
  int n;
} esp_sweep;
esp_status esp_sweep_read(const char *dir, esp_sweep *out);
void esp_sweep_deinit(esp_sweep *s);

#endif
