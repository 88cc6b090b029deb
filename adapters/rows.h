/* rows.h: a pass in which each sequence chooses its adapter. A kind's hooks run over all rows as always; what they do
 * to rows of other sequences is taken back by 0/1 vectors over the rows, so that no kind knows of it. */
#ifndef ESP_ADAPTERS_ROWS_H
#define ESP_ADAPTERS_ROWS_H

#include "adapters/adapter.h"

typedef struct esp_rows {
  bool on; /* this pass chooses */
  esp_backend *be;
  int64_t tokens, cap;
  float *mask; /* backend memory [2n, tokens]: the rows of adapter k, then those of all others */
} esp_rows;

/* Reads run->batch->adapters and ->shares. ESP_ERR_RECIPE naming an active adapter whose effect is not row by row. */
esp_status esp_rows_begin(esp_rows *r, esp_run *run, esp_adapter *const *list, int n);
void esp_rows_leave(esp_rows *r);
/* A copy of x on the stack with the rows of others zero. */
esp_tensor esp_rows_only(const esp_rows *r, esp_run *run, int k, esp_tensor x);
esp_tensor esp_rows_copy(esp_run *run, esp_tensor x);
/* y keeps the rows of k and takes those of others from `before`. */
void esp_rows_join(const esp_rows *r, esp_run *run, int k, esp_tensor y, esp_tensor before);
/* y keeps the rows of others and takes those of k from `mine`, whose other rows are zero. */
void esp_rows_put(const esp_rows *r, esp_run *run, int k, esp_tensor y, esp_tensor mine);

#endif
