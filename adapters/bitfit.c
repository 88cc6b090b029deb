/* bitfit.c: BitFit (Ben Zaken et al. 2022, arXiv:2106.10199): the biases of the targeted modules are trained, nothing
 * else. Modules without a bias have nothing to train: under the default target they are passed over, named in a recipe
 * they are an error, because merging could not give them one. The biases are those of train_modules.c, under the names
 * of the base. */
#include "adapters/internal.h"
#include "io/json.h"

static esp_status add_bias(esp_adapter *a, esp_site *s) {
  if (s->bias_tensor) return esp_train_module_add(a, s, "", false, true);
  if (!esp_target_is_all_linear(&a->cfg))
    return esp_fail(ESP_ERR_RECIPE, "adapter.target: %s has no bias, which bitfit trains", s->path);
  a->targeted[s->index] = false;
  return ESP_OK;
}

static esp_status bitfit_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  for (int i = 0; i < g->n_sites; i++)
    if (hit[i]) ESP_TRY(add_bias(a, g->sites[i]));
  return ESP_OK;
}

/* Weights are the base's. */
static esp_status bitfit_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  return ESP_OK;
}

static esp_status bitfit_open(esp_adapter *a) {
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites);
  for (int i = 0; i < n; i++)
    if (sites[i]->bias_tensor) return ESP_OK;
  return esp_fail(ESP_ERR_RECIPE, "adapter.type: bitfit trains biases, %s has none", esp_model_dir(a->model));
}

static esp_status bitfit_check(const esp_adapter_cfg *c) {
  return esp_config_refuse(c, "bitfit", ESP_CFG_BIAS | ESP_CFG_TOKENS | ESP_CFG_DROPOUT);
}

static esp_status bitfit_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  c->r = 1;
  c->alpha = 1;
  return ESP_OK;
}

const esp_adapter_kind esp_kind_bitfit = {
    .name = "bitfit",
    .peft_type = "BITFIT",
    .summary = "the biases are trained, nothing else (Ben Zaken et al. 2022, arXiv:2106.10199)",
    .site_kinds = 1u << ESP_SITE_LINEAR | 1u << ESP_SITE_NORM,
    .mergeable = true,
    .targets = true,
    .alone = true,
    .open = bitfit_open,
    .declare = bitfit_declare,
    .declare_site = add_bias,
    .config_read = bitfit_config_read,
    .config_check = bitfit_check,
    .materialise = bitfit_materialise,
};
