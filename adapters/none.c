/* none.c: the base alone, for evaluation and as the reference of comparisons. */
#include "adapters/internal.h"

const esp_adapter_kind esp_kind_none = {
    .name = "none",
    .peft_type = "NONE",
    .summary = "the base model as it is; nothing is trained",
    .mergeable = true,
};
