/* watchdog.h: stops a run that diverges: a loss or gradient norm above a bound for `patience` steps in a row. */
#ifndef ESP_TRAIN_WATCHDOG_H
#define ESP_TRAIN_WATCHDOG_H

#include "recipe/recipe.h"

typedef struct esp_watch {        /* part of a checkpoint: a resumed run stops where the undisturbed one would */
  int64_t loss_above, grad_above; /* consecutive steps */
} esp_watch;
esp_status esp_watch_step(esp_watch *w, const esp_watchdog *cfg, int64_t step, double loss, double grad_norm);

#endif
