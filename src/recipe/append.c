/* append.c: tasks added to the recipe of a run. The file holds `tasks`, a list as in a recipe, and perhaps `eval:
 * {sets:
 * [...]}` with evaluation sets that are new; or one task alone. Its relative paths are relative to its own folder. */
#include <string.h>

#include "io/file.h"
#include "recipe/bind.h"

/* Paths of data are made absolute: the recipe they become part of lies elsewhere. */
static bool place_paths(esp_binder *b, const char *dir, esp_node *n) {
  for (int i = 0; i < n->n; i++) {
    esp_node *item = n->items[i];
    bool path = n->kind == ESP_NODE_MAP && n->keys[i]->text && !strcmp(n->keys[i]->text, "path");
    if (path && item->kind == ESP_NODE_SCALAR && item->text && item->text[0] != '/' && item->text[0] != '$' && *dir) {
      item->text = esp_arena_printf(b->arena, "%s/%s", dir, item->text);
      if (!item->text) return false;
    }
    if (!place_paths(b, dir, item)) return false;
  }
  return true;
}

/* The list at key (of the map at `parent`, where that is not NULL) of the recipe, made where it is absent. */
static esp_node *list_of(esp_binder *b, esp_node *root, const char *parent, const char *key) {
  esp_node *map = root;
  if (parent && !(map = esp_node_get(root, parent, NULL))) {
    map = esp_node_new(b->arena, ESP_NODE_MAP);
    if (!map || !esp_node_add(b->arena, root, esp_node_scalar(b->arena, parent), map)) return NULL;
  }
  esp_node *list = esp_node_get(map, key, NULL);
  if (list) return list;
  list = esp_node_new(b->arena, ESP_NODE_LIST);
  return list && esp_node_add(b->arena, map, esp_node_scalar(b->arena, key), list) ? list : NULL;
}

static bool add_all(esp_binder *b, esp_node *root, const char *parent, const char *key, esp_node *more) {
  if (!more) return true;
  if (more->kind != ESP_NODE_LIST) {
    esp_bind_error(b, more, "%s%s%s: expected a list", parent ? parent : "", parent ? "." : "", key);
    return true;
  }
  esp_node *list = list_of(b, root, parent, key);
  for (int i = 0; list && i < more->n; i++)
    if (!esp_node_add(b->arena, list, NULL, more->items[i])) return false;
  return list != NULL;
}

/* continual.order of the run names the tasks it has: those that are added come behind them. */
static bool extend_order(esp_binder *b, esp_node *root, int before) {
  esp_node *continual = esp_node_get(root, "continual", NULL), *tasks = esp_node_get(root, "tasks", NULL);
  esp_node *order = continual && continual->kind == ESP_NODE_MAP ? esp_node_get(continual, "order", NULL) : NULL;
  if (!order || order->kind != ESP_NODE_LIST || order->n == 0 || !tasks) return true;
  for (int i = before; i < tasks->n; i++) {
    esp_node *name = tasks->items[i]->kind == ESP_NODE_MAP ? esp_node_get(tasks->items[i], "name", NULL) : NULL;
    if (!name) esp_bind_error(b, tasks->items[i], "a task needs a name"); /* the order would pass it by */
    if (name && !esp_node_add(b->arena, order, NULL, name)) return false;
  }
  return true;
}

esp_status esp_append_apply(esp_binder *b, esp_node *root, const char *path) {
  char *text = NULL;
  size_t n = 0;
  esp_node *more = NULL, *eval;
  ESP_TRY(esp_file_read(path, &text, &n));
  const char *origin = esp_arena_printf(b->arena, "+%s", path);
  const char *slash = strrchr(path, '/');
  const char *dir = slash ? esp_arena_strndup(b->arena, path, slash == path ? 1 : (size_t)(slash - path)) : "";
  char *copy = esp_arena_strndup(b->arena, text, n); /* the tree keeps pointers into it */
  esp_mem_free(text);
  if (!origin || !dir || !copy) return ESP_ERR_MEMORY;
  esp_status st = esp_yaml_parse(copy, n, b->arena, origin, esp_bind_error_at, b, &more);
  if (!more || (st != ESP_OK && st != ESP_ERR_RECIPE)) return st == ESP_ERR_RECIPE ? ESP_OK : st;
  if (more->kind != ESP_NODE_MAP) {
    esp_bind_error(b, more, "expected tasks, and perhaps eval.sets, or one task");
    return ESP_OK;
  }
  if (!place_paths(b, dir, more)) return ESP_ERR_MEMORY;
  esp_node *had = esp_node_get(root, "tasks", NULL);
  int before = had ? had->n : 0;
  if (esp_node_get(more, "name", NULL) && esp_node_get(more, "data", NULL)) {
    esp_node *tasks = list_of(b, root, NULL, "tasks");
    return tasks && esp_node_add(b->arena, tasks, NULL, more) && extend_order(b, root, before) ? ESP_OK
                                                                                               : ESP_ERR_MEMORY;
  }
  for (int i = 0; i < more->n; i++)
    if (strcmp(more->keys[i]->text, "tasks") && strcmp(more->keys[i]->text, "eval"))
      esp_bind_error(b, more->keys[i], "%.60s: only tasks and eval.sets can be added to a run", more->keys[i]->text);
  if (!esp_node_get(more, "tasks", NULL)) esp_bind_error(b, more, "tasks: nothing is added");
  eval = esp_node_get(more, "eval", NULL);
  for (int i = 0; eval && i < eval->n; i++)
    if (eval->kind != ESP_NODE_MAP || strcmp(eval->keys[i]->text, "sets"))
      esp_bind_error(b, eval->kind == ESP_NODE_MAP ? eval->keys[i] : eval, "eval: only sets can be added to a run");
  bool fits =
      add_all(b, root, NULL, "tasks", esp_node_get(more, "tasks", NULL)) &&
      add_all(b, root, "eval", "sets", eval && eval->kind == ESP_NODE_MAP ? esp_node_get(eval, "sets", NULL) : NULL);
  return fits && extend_order(b, root, before) ? ESP_OK : ESP_ERR_MEMORY;
}
