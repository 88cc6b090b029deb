/* report_samples.h: the answers that a run kept (samples/<row>.json), row by row of its score matrix. */
#ifndef ESP_EVAL_REPORT_SAMPLES_H
#define ESP_EVAL_REPORT_SAMPLES_H

#include "io/json.h"

typedef struct esp_sample_rows {
  json_t **row; /* [rows]: arrays of {set, index, prompt, answer, reference}; NULL: not kept */
  int rows, n;  /* n: samples of each row */
} esp_sample_rows;
/* n == 0 where a run has none. */
esp_status esp_sample_rows_read(const char *run_dir, int tasks, esp_sample_rows *out);
void esp_sample_rows_deinit(esp_sample_rows *s);
/* A text of sample i; row -1: of any row. NULL: not there. */
const char *esp_sample_text(const esp_sample_rows *s, int row, int i, const char *key);

#endif
