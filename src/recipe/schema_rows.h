/* schema_rows.h: how the rows of the table are written. */
#ifndef ESP_RECIPE_SCHEMA_ROWS_H
#define ESP_RECIPE_SCHEMA_ROWS_H

#include "recipe/schema.h"

#define COUNT(a) ((int)(sizeof(a) / sizeof((a)[0])))
#define AT(field) .offset = offsetof(esp_recipe, field)
#define LIST(field, counter) .offset = offsetof(esp_recipe, field), .count_offset = offsetof(esp_recipe, counter)
#define WORDS(...)                                                                                                     \
  .words = (const char *const[]) {                                                                                     \
    __VA_ARGS__, NULL                                                                                                  \
  }
#define RANGE(lo, hi) .min = (lo), .max = (hi)
#define BIG 9007199254740992.0 /* 2^53: every integer below is a double */
#define SECTION_OBJECT(n, h) static const esp_object n##_object = {#n, h, n##_keys, COUNT(n##_keys), 0}

/* schema_merge.c: after[].merge_tasks. */
extern const esp_object esp_schema_merge_tasks;
/* schema_strategies.c: the keys of each strategy, continual.<its name>. */
#define STRATEGY(n, h) const esp_object esp_schema_##n = {#n, h, n##_keys, COUNT(n##_keys), 0}

/* schema_strategies.c, schema_projections.c: the keys of each strategy, continual.<its name>. */
extern const esp_object esp_schema_agem;
extern const esp_object esp_schema_bank;
extern const esp_object esp_schema_ewc;
extern const esp_object esp_schema_gem;
extern const esp_object esp_schema_gpm;
extern const esp_object esp_schema_group_lasso;
extern const esp_object esp_schema_l2;
extern const esp_object esp_schema_migu;
extern const esp_object esp_schema_ncm;
extern const esp_object esp_schema_nullspace;
extern const esp_object esp_schema_ogd;
extern const esp_object esp_schema_osf;
extern const esp_object esp_schema_perturb;
extern const esp_object esp_schema_refactor;
extern const esp_object esp_schema_reglora;
extern const esp_object esp_schema_upgd;
extern const esp_object esp_schema_replay;
extern const esp_object esp_schema_si;
extern const esp_object esp_schema_replay, esp_schema_l2, esp_schema_lwf;
extern const esp_object esp_schema_seqkd, esp_schema_gere;
extern const esp_object esp_schema_lae, esp_schema_ilora, esp_schema_mos;

#endif
