/* registry.c: the kinds. One line each. */
#include <string.h>

#include "adapters/internal.h"

static const esp_adapter_kind *const kinds[] = {
    &esp_kind_lora, &esp_kind_loha, &esp_kind_lokr, &esp_kind_full, &esp_kind_none, &esp_kind_layers, &esp_kind_s2ft, &esp_kind_mora,
};
enum { N_KINDS = sizeof kinds / sizeof kinds[0] };

const esp_adapter_kind *esp_adapter_find(const char *name) {
  for (int i = 0; i < N_KINDS; i++)
    if (strcmp(kinds[i]->name, name) == 0) return kinds[i];
  return NULL;
}

const char *const *esp_adapter_names(int *n) {
  static const char *names[N_KINDS + 1];
  for (int i = 0; i < N_KINDS; i++) names[i] = kinds[i]->name;
  *n = N_KINDS;
  return names;
}
