/* schema_strategies.c: the keys of the strategies against forgetting: one object per strategy that has any. */
#include "recipe/schema_rows.h"

#define STRATEGY(n, h) const esp_object esp_schema_##n = {#n, h, n##_keys, COUNT(n##_keys), 0}

static const esp_key l2_keys[] = {
    {"weight", ESP_T_NUMBER, AT(continual.strategy.l2.weight), .def = "1", .flags = ESP_K_ABOVE_MIN, RANGE(0, 1e12),
     .help = "lambda of lambda/2 |theta - theta_previous|^2"},
};
STRATEGY(l2, "Strategy l2: parameters stay near those of the task before.");
