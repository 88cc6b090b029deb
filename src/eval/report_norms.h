/* report_norms.h: how far each task's adapter moved each layer, read from the adapter files of a run. */
#ifndef ESP_EVAL_REPORT_NORMS_H
#define ESP_EVAL_REPORT_NORMS_H

#include "core/error.h"

typedef struct esp_layer_norms {
  int adapters, layers;
  char (*name)[64]; /* adapter directories, in the order of the tasks of matrix.json, else by name */
  double *value;    /* [adapters * layers]: sqrt of the sum over the layer's sites of ||s B A||_F^2 */
} esp_layer_norms;

/* ESP_ERR_DATA when <run_dir>/adapters holds no low-rank adapter. */
esp_status esp_layer_norms_read(const char *run_dir, esp_layer_norms *out);
void esp_layer_norms_deinit(esp_layer_norms *n);

#endif
