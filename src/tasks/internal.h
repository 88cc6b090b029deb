/* internal.h: the strategies that registry.c lists. */
#ifndef ESP_TASKS_INTERNAL_H
#define ESP_TASKS_INTERNAL_H

#include "tasks/strategy.h"

extern const esp_strategy_kind esp_strategy_replay;
extern const esp_strategy_kind esp_strategy_l2;

#endif
