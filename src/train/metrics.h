/* metrics.h: what a run leaves behind of its course: metrics.jsonl (one object per line) and a TensorBoard event file.
 * Their lengths are part of a checkpoint: a resumed run cuts them there, so that every step is in them once. */
#ifndef ESP_TRAIN_METRICS_H
#define ESP_TRAIN_METRICS_H

#include <stdio.h>

#include "train/train.h"

typedef struct esp_metrics {
  FILE *jsonl, *events; /* NULL: off (another rank, or the recipe says so) */
} esp_metrics;
/* Cuts the files to the given lengths first (0: new files). */
esp_status esp_metrics_open(esp_metrics *m, const esp_recipe *r, int64_t jsonl_bytes, int64_t events_bytes);
void esp_metrics_close(esp_metrics *m);
esp_status esp_metrics_step(esp_metrics *m, const esp_event *e);
esp_status esp_metrics_eval(esp_metrics *m, const esp_event *e);
/* Flushes to disk; the lengths for a checkpoint. */
esp_status esp_metrics_sync(esp_metrics *m, int64_t *jsonl_bytes, int64_t *events_bytes);

#endif
