/* report.h: a run directory as one self-contained HTML page: the score matrix as a heat map, loss, learning rate and
 * gradient norm over steps with the task switches marked, and the size of each adapter's change per layer. No scripts,
 * no network. */
#ifndef ESP_EVAL_REPORT_H
#define ESP_EVAL_REPORT_H

#include "core/error.h"

/* Reads metrics.jsonl, and matrix.json and adapters/ where they are; writes the page atomically. out NULL:
 * <run_dir>/report.html. */
esp_status esp_report_write(const char *run_dir, const char *out);

#endif
