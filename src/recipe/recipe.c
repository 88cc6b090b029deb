/* recipe.c: text and overrides to a recipe, by way of tree, binding and checks. */
#include "recipe/recipe.h"

#include <stdio.h>
#include <string.h>

#include "io/file.h"
#include "recipe/bind.h"

/* "a/b/my run.yaml" -> "my-run": what a recipe without a name is called. */
static const char *default_name(esp_arena *arena, const char *path) {
  const char *base = strrchr(path, '/');
  char name[64];
  size_t n = 0;
  for (const char *p = base ? base + 1 : path; *p && n < sizeof name - 1; p++) {
    if (!strcmp(p, ".yaml") || !strcmp(p, ".yml")) break;
    bool good = (*p >= 'a' && *p <= 'z') || (*p >= 'A' && *p <= 'Z') || (*p >= '0' && *p <= '9') || strchr("._-", *p);
    if (good && !(n == 0 && *p == '.'))
      name[n++] = *p;
    else if (n)
      name[n++] = '-';
  }
  while (n && name[n - 1] == '-') n--;
  name[n] = 0;
  return esp_arena_strdup(arena, n ? name : "run");
}

static esp_status parse(const char *yaml, size_t n, const char *path, const char *const *overrides, int n_overrides,
                        const char *append, esp_recipe **out) {
  *out = NULL;
  esp_status st = ESP_OK;
  esp_node *root = NULL;
  esp_arena *arena = esp_arena_create(ESP_MEM_HOST);
  if (!arena) return ESP_ERR_MEMORY;
  esp_recipe *r = esp_arena_alloc(arena, sizeof *r);
  esp_binder b = {.arena = arena, .recipe = r, .path = esp_arena_strdup(arena, path)};
  if (!r || !b.path || !(r->origins = esp_arena_alloc(arena, sizeof *r->origins)) ||
      !(r->name = default_name(arena, path))) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  r->arena = arena;
  r->path = b.path;
  const char *slash = strrchr(b.path, '/');
  b.dir = slash ? esp_arena_strndup(arena, b.path, slash == b.path ? 1 : (size_t)(slash - b.path)) : "";
  if (!b.dir) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  st = esp_yaml_parse(yaml, n, arena, NULL, esp_bind_error_at, &b, &root);
  if (st != ESP_OK && st != ESP_ERR_RECIPE) goto out;
  bool readable = st == ESP_OK || root;
  for (int i = 0; i < n_overrides && readable; i++) {
    const char *copy = esp_arena_strdup(arena, overrides[i]);
    if (!copy) {
      st = ESP_ERR_MEMORY;
      goto out;
    }
    st = esp_override_apply(&b, &root, copy);
    if (st != ESP_OK) goto out;
  }
  if (readable && append && root) {
    st = esp_append_apply(&b, root, append);
    if (st != ESP_OK) goto out;
  }
  if (readable) { /* else the syntax error is all there is to say */
    esp_order_apply(&b, root);
    esp_bind_recipe(&b, root);
    if (!b.oom) esp_check_recipe(&b, root);
  }
  st = esp_bind_finish(&b);
  if (st == ESP_OK && r->continual.policy == ESP_POLICY_JOINT && r->n_tasks > 1) st = esp_recipe_join(r, &r);
out:
  if (st == ESP_OK)
    *out = r;
  else
    esp_arena_destroy(arena);
  return st;
}

esp_status esp_recipe_parse(const char *yaml, size_t n, const char *path, const char *const *overrides, int n_overrides,
                            esp_recipe **out) {
  return parse(yaml, n, path, overrides, n_overrides, NULL, out);
}

esp_status esp_recipe_load(const char *path, const char *const *overrides, int n_overrides, esp_recipe **out) {
  return esp_recipe_load_more(path, overrides, n_overrides, NULL, out);
}

esp_status esp_recipe_load_more(const char *path, const char *const *overrides, int n_overrides, const char *append,
                                esp_recipe **out) {
  char *text = NULL;
  size_t n = 0;
  *out = NULL;
  if (esp_file_read(path, &text, &n) != ESP_OK) /* a recipe that is not there is an error of the recipe */
    return esp_fail(ESP_ERR_RECIPE, "%s", esp_error_message());
  esp_status st = parse(text, n, path, overrides, n_overrides, append, out);
  esp_mem_free(text);
  return st;
}

void esp_recipe_destroy(esp_recipe *r) {
  if (r) esp_arena_destroy(r->arena);
}
