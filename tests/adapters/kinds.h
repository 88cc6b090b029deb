/* kinds.h: every registered kind on the tiny bases, as a recipe that names little more than the type configures it. */
#ifndef TESTS_KINDS_H
#define TESTS_KINDS_H

#include "adapter_fixture.h"
#include "recipe/recipe.h"

/* Kinds that need a key of their own, or that a small base does not suit. */
static const char *const kinds_keys[][2] = {
    {"layers", "top_layers: 1"},     {"adalora", "target_r: 2"},     {"oft", "oft_block_size: 4"},
    {"fish", "sparse_mask: random"}, {"spu", "sparse_mask: random"},
};

static inline esp_recipe *kinds_recipe(const char *type, const char *more) {
  char yaml[512];
  const char *own = "";
  for (size_t i = 0; i < sizeof kinds_keys / sizeof kinds_keys[0]; i++)
    if (strcmp(kinds_keys[i][0], type) == 0) own = kinds_keys[i][1];
  snprintf(yaml, sizeof yaml,
           "model: {base_model: base}\nadapter: {type: %s, r: 4, alpha: 8%s%s%s}\n"
           "tasks: [{name: t, data: [{path: t.jsonl}]}]\n",
           type, *own ? ", " : "", own, more);
  esp_recipe *out;
  OK(esp_recipe_parse(yaml, strlen(yaml), "r.yaml", NULL, 0, &out));
  return out;
}

/* With every parameter shaken, so that it has an effect. NULL with the error set: the kind cannot be on this base. */
static inline esp_adapter *kinds_adapter(fx_run *r, const char *type, const char *more, const char *name,
                                         bool trainable, uint64_t seed) {
  esp_adapter *a = NULL;
  esp_recipe *recipe = kinds_recipe(type, more);
  OK(esp_adapter_create(r->m, &recipe->adapter, name, trainable, &a));
  esp_recipe_destroy(recipe);
  fx_shake(a, 0.05f, seed);
  return a;
}

#endif
