/* extra.h: samples of a strategy's own that belong to no task's data, trained beside the step's rows. */
#ifndef ESP_TASKS_EXTRA_H
#define ESP_TASKS_EXTRA_H

#include "tasks/strategy.h"

typedef struct esp_extra {
  /* As esp_dataset_sample. */
  void (*sample)(const void *ctx, int64_t i, const int32_t **ids, const float **weights, int64_t *n);
  const void *ctx;
  int64_t count;
  int64_t *list, n, cap; /* those of the step */
  esp_rows rows;         /* of the last micro-batch */
} esp_extra;

void esp_extra_deinit(esp_extra *e);
/* n for the step `task_step`: all are gone through in random order, again and again, the same on all ranks. `stream`
 * sets uses of ESP_RNG_DATA apart. Adds the weight of their trained tokens. */
esp_status esp_extra_draw(esp_extra *e, const esp_sequence *q, uint64_t stream, int64_t task_step, int64_t n,
                          double *weight);
/* Samples list[0..n) as one micro-batch in e->rows, padded; under the counting backend each as long as the longest. */
esp_status esp_extra_rows(esp_extra *e, const esp_sequence *q, const int64_t *list, int64_t n);

#endif
