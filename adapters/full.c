/* full.c: full-parameter training as an adapter kind: every weight, bias, norm and embedding of the base becomes a
 * trained fp32 master under its Hugging Face name. The declaring, the starting values and the saving are those of any
 * module that is trained in full (train_modules.c); the model computes such sites from the store itself. */
#include "adapters/internal.h"

const esp_adapter_kind esp_kind_full = {
    .name = "full",
    .peft_type = "FULL",
    .summary = "every parameter of the base is trained (no adapter; saved as a full model)",
    .site_kinds = 1u << ESP_SITE_LINEAR | 1u << ESP_SITE_EMBED | 1u << ESP_SITE_NORM,
    .mergeable = true,
    .whole_base = true,
};
