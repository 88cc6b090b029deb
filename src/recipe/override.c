/* override.c: "tasks[1].optim.lr=1e-4" becomes nodes in the tree before it is bound, so that an override is checked by
 * the same schema, with the same messages, as the file. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "recipe/bind.h"

static esp_node *mark(esp_binder *b, esp_node *n, const char *override) {
  if (!n) {
    b->oom = true;
    return NULL;
  }
  n->override = override;
  return n;
}

/* The key as it stands in the map, or under another accepted spelling; else a new entry of `kind`. */
static esp_node **child(esp_binder *b, esp_node *map, const esp_object *o, const char *name, esp_node_kind kind,
                        const char *override) {
  const esp_key *k = o ? esp_schema_find(o, name) : NULL;
  for (int i = 0; i < map->n; i++) {
    const char *key = map->keys[i]->text;
    if (strcmp(key, name) && !(k && (!strcmp(key, k->name) || esp_key_has_alias(k, key)))) continue;
    if (esp_node_is_null(map->items[i])) map->items[i] = mark(b, esp_node_new(b->arena, kind), override);
    return map->items[i] ? &map->items[i] : NULL;
  }
  esp_node *key = mark(b, esp_node_scalar(b->arena, esp_arena_strdup(b->arena, name)), override);
  esp_node *item = mark(b, esp_node_new(b->arena, kind), override);
  if (!key || !key->text || !item || !esp_node_add(b->arena, map, key, item)) b->oom = true;
  return b->oom ? NULL : &map->items[map->n - 1];
}

static void put(esp_binder *b, esp_node *map, const esp_object *o, const char *name, esp_node *value,
                const char *override) {
  const esp_key *k = o ? esp_schema_find(o, name) : NULL;
  int kept = 0; /* whatever spelling the file used gives way */
  for (int i = 0; i < map->n; i++) {
    const char *key = map->keys[i]->text;
    if (!strcmp(key, name) || (k && (!strcmp(key, k->name) || esp_key_has_alias(k, key)))) continue;
    map->keys[kept] = map->keys[i];
    map->items[kept++] = map->items[i];
  }
  map->n = kept;
  esp_node *key = mark(b, esp_node_scalar(b->arena, esp_arena_strdup(b->arena, name)), override);
  if (!key || !key->text || !esp_node_add(b->arena, map, key, value)) b->oom = true;
}

/* A copy with its own arrays: an alias shares nodes, and an override must change one place only. */
static esp_node *own(esp_binder *b, esp_node *n) {
  esp_node *copy = esp_bind_alloc(b, sizeof *copy);
  if (!copy) return NULL;
  *copy = *n;
  copy->keys = copy->items = NULL;
  copy->n = copy->cap = 0;
  for (int i = 0; i < n->n; i++)
    if (!esp_node_add(b->arena, copy, n->keys ? n->keys[i] : NULL, n->items[i])) return b->oom = true, NULL;
  return copy;
}

static const esp_object *inner(const esp_object *o, const char *name) {
  const esp_key *k = o ? esp_schema_find(o, name) : NULL;
  return k ? k->object : NULL;
}

/* "[2]" or "[name]" of a list. */
static int list_index(const esp_node *list, const char *text) {
  if (!*text) return -1;
  if (!text[strspn(text, "0123456789")]) return strlen(text) > 6 ? -1 : atoi(text);
  for (int i = 0; i < list->n; i++) {
    const esp_node *name = esp_node_get(list->items[i], "name", NULL);
    if (name && name->kind == ESP_NODE_SCALAR && !strcmp(name->text, text)) return i;
  }
  return -1;
}

esp_status esp_override_apply(esp_binder *b, esp_node **root, const char *override) {
  const char *eq = strchr(override, '=');
  esp_node here = {.override = override, .line = 1, .column = 1};
  if (!eq || eq == override || eq - override > 200) {
    esp_bind_error(b, &here, "expected key=value");
    return ESP_OK;
  }
  esp_node *value = NULL;
  esp_status st = esp_yaml_parse(eq + 1, strlen(eq + 1), b->arena, override, esp_bind_error_at, b, &value);
  if (st == ESP_ERR_RECIPE) return ESP_OK; /* recorded */
  if (st != ESP_OK) return st;
  if (!value) value = mark(b, esp_node_scalar(b->arena, ""), override);
  if (!value) return ESP_OK;
  char path[208];
  memcpy(path, override, (size_t)(eq - override));
  path[eq - override] = 0;
  if (!*root || esp_node_is_null(*root)) *root = mark(b, esp_node_new(b->arena, ESP_NODE_MAP), override);
  esp_node *at = *root;
  const esp_object *o = &esp_schema_root;
  for (char *p = path; at && !b->oom;) {
    char *end = p + strcspn(p, ".["), stop = *end;
    *end = 0;
    if (!*p || strspn(p, "abcdefghijklmnopqrstuvwxyz_0123456789") != strlen(p)) {
      esp_bind_error(b, &here, "'%.40s' is not a key", p);
      return ESP_OK;
    }
    if (at->kind != ESP_NODE_MAP) {
      esp_bind_error(b, &here, "'%.40s' has nothing to stand in", p);
      return ESP_OK;
    }
    if (!stop) {
      put(b, at, o, p, value, override);
      return ESP_OK;
    }
    esp_node **next = child(b, at, o, p, stop == '[' ? ESP_NODE_LIST : ESP_NODE_MAP, override);
    esp_node *mine = next ? own(b, *next) : NULL;
    if (!mine) return ESP_OK;
    *next = mine;
    o = inner(o, p);
    at = mine;
    if (stop == '[') {
      char *close = strchr(end + 1, ']');
      if (!close || (close[1] && close[1] != '.') || at->kind != ESP_NODE_LIST) {
        esp_bind_error(b, &here, at->kind == ESP_NODE_LIST ? "expected '[number]' behind '%s'" : "'%s' is not a list",
                       p);
        return ESP_OK;
      }
      *close = 0;
      int index = list_index(at, end + 1);
      if (index < 0 || index >= at->n) {
        esp_bind_error(b, &here, "'%s' has %d entries, there is no [%.40s]", p, at->n, end + 1);
        return ESP_OK;
      }
      if (!close[1]) {
        at->items[index] = value;
        return ESP_OK;
      }
      mine = own(b, at->items[index]);
      if (!mine) return ESP_OK;
      at->items[index] = mine;
      at = mine;
      end = close + 1;
    }
    p = end + 1;
  }
  return ESP_OK;
}
