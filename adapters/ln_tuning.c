/* ln_tuning.c: LayerNorm tuning (Zhao et al. 2023, arXiv:2312.11420) as PEFT's LNTuningConfig has it: each targeted
 * norm is replaced by a copy of its weight (and bias) that is trained whole. The copies are those of any module trained
 * in full (train_modules.c), under PEFT's name for them; they are fp32 masters, so that a weight of 1 moves by less
 * than bf16 could hold. */
#include "adapters/internal.h"
#include "io/json.h"

static esp_status ln_declare(esp_adapter *a, esp_site *s) {
  ESP_TRY(esp_train_module_add(a, s, ".ln_tuning_layers", true, true));
  return s->bias_tensor ? esp_train_module_add(a, s, ".ln_tuning_layers", false, true) : ESP_OK;
}

/* The copy is the effective weight already (esp_adapter_effective_rows). */
static esp_status ln_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  return ESP_OK;
}

static esp_status ln_check(const esp_adapter_cfg *c) {
  return esp_config_refuse(c, "ln_tuning", ESP_CFG_BIAS | ESP_CFG_TOKENS | ESP_CFG_DROPOUT);
}

static void ln_config_write(const esp_adapter *a, json_t *j) {
  json_object_del(j, "bias");
  json_object_del(j, "trainable_token_indices");
  esp_config_exact_targets(a, j, ESP_CFG_LAYERS);
}

static esp_status ln_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  c->r = 1;
  c->alpha = 1;
  return ESP_OK;
}

const esp_adapter_kind esp_kind_ln_tuning = {
    .name = "ln_tuning",
    .peft_type = "LN_TUNING",
    .summary = "the norms are trained, nothing else (Zhao et al. 2023, arXiv:2312.11420)",
    .site_kinds = 1u << ESP_SITE_NORM,
    .mergeable = true,
    .targets = true,
    .alone = true,
    .declare_site = ln_declare,
    .config_write = ln_config_write,
    .config_read = ln_config_read,
    .config_check = ln_check,
    .materialise = ln_materialise,
};
