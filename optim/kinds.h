/* kinds.h: the optimizer kinds that registry.c lists. */
#ifndef ESP_OPTIM_KINDS_H
#define ESP_OPTIM_KINDS_H

#include "backend/optim_rules.h"
#include "optim/optim.h"

extern const esp_optim_kind esp_optim_adamw;
extern const esp_optim_kind esp_optim_sgd;

#endif
