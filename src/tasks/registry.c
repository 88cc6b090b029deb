/* registry.c: the strategies. One line each. */
#include <string.h>

#include "tasks/internal.h"

/* clang-format off */
static const esp_strategy_kind *const kinds[] = {
    &esp_strategy_bank,
    &esp_strategy_ncm,
    &esp_strategy_replay,
    &esp_strategy_l2,
    &esp_strategy_gem,
    &esp_strategy_agem,
    &esp_strategy_ewc,
    &esp_strategy_si,
    &esp_strategy_group_lasso,
    &esp_strategy_reglora,
    &esp_strategy_lwf,
    &esp_strategy_seqkd,
    &esp_strategy_gere,
    &esp_strategy_gpm,
    &esp_strategy_nullspace,
    &esp_strategy_branch,
    &esp_strategy_lae,
    &esp_strategy_ilora,
    &esp_strategy_coin_ema,
    &esp_strategy_mos,
    &esp_strategy_osf,
    &esp_strategy_ogd,
    &esp_strategy_refactor,
    &esp_strategy_perturb,
    &esp_strategy_upgd,
    &esp_strategy_migu,
};
/* clang-format on */
enum { N_KINDS = sizeof kinds / sizeof kinds[0] };

const esp_strategy_kind *esp_strategy_find(const char *name) {
  for (int i = 0; i < N_KINDS; i++)
    if (strcmp(kinds[i]->name, name) == 0) return kinds[i];
  return NULL;
}

const char *const *esp_strategy_names(int *n) {
  static const char *names[N_KINDS];
  for (int i = 0; i < N_KINDS; i++) names[i] = kinds[i]->name;
  *n = N_KINDS;
  return names;
}
