/* registry.c: the kinds. One line each. */
#include <string.h>

#include "adapters/internal.h"

/* clang-format off */
static const esp_adapter_kind *const kinds[] = {
    &esp_kind_lora,
    &esp_kind_vera,
    &esp_kind_dora,
    &esp_kind_loha,
    &esp_kind_lokr,
    &esp_kind_lotr,
    &esp_kind_hut,
    &esp_kind_pmss,
    &esp_kind_ia3,
    &esp_kind_ln_tuning,
    &esp_kind_bitfit,
    &esp_kind_full,
    &esp_kind_none,
    &esp_kind_layers,
    &esp_kind_s2ft,
    &esp_kind_fish,
    &esp_kind_spu,
    &esp_kind_mora,
    &esp_kind_olora_cl,
    &esp_kind_increlora,
    &esp_kind_elalora,
    &esp_kind_dyrank,
    &esp_kind_incremental_rank,
    &esp_kind_mora_rank,
    &esp_kind_adalora,
    &esp_kind_miss,
    &esp_kind_bat,
    &esp_kind_hra,
    &esp_kind_oft,
    &esp_kind_prompt,
    &esp_kind_prefix,
};
/* clang-format on */
enum { N_KINDS = sizeof kinds / sizeof kinds[0] };

/* Other spellings in recipes. */
static const char *const aliases[][2] = {{"o-lora", "olora_cl"}};
enum { N_ALIASES = sizeof aliases / sizeof aliases[0] };

const esp_adapter_kind *esp_adapter_find(const char *name) {
  for (int i = 0; i < N_ALIASES; i++)
    if (strcmp(aliases[i][0], name) == 0) name = aliases[i][1];
  for (int i = 0; i < N_KINDS; i++)
    if (strcmp(kinds[i]->name, name) == 0) return kinds[i];
  return NULL;
}

const char *const *esp_adapter_names(int *n) {
  static const char *names[N_KINDS + N_ALIASES + 1];
  for (int i = 0; i < N_KINDS; i++) names[i] = kinds[i]->name;
  for (int i = 0; i < N_ALIASES; i++) names[N_KINDS + i] = aliases[i][0];
  *n = N_KINDS + N_ALIASES;
  return names;
}
