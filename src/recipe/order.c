/* order.c: continual.order puts the tasks of the tree into another order, or takes some of them, before it is bound: so
 * that each task keeps its place in the file, and an order is a value like any other (an override, an axis of a sweep).
 */
#include <string.h>

#include "recipe/bind.h"

static esp_node **find(esp_node *map, const char *name) {
  const esp_key *k = esp_schema_find(&esp_schema_root, name);
  for (int i = 0; map && map->kind == ESP_NODE_MAP && i < map->n; i++)
    if (!strcmp(map->keys[i]->text, name) || (k && esp_key_has_alias(k, map->keys[i]->text))) return &map->items[i];
  return NULL;
}

static const char *name_of(const esp_node *task) {
  const esp_node *name = task->kind == ESP_NODE_MAP ? esp_node_get(task, "name", NULL) : NULL;
  return name && name->kind == ESP_NODE_SCALAR ? name->text : NULL;
}

void esp_order_apply(esp_binder *b, esp_node *root) {
  esp_node **continual = find(root, "continual"), **tasks = find(root, "tasks");
  esp_node *order = continual && (*continual)->kind == ESP_NODE_MAP ? esp_node_get(*continual, "order", NULL) : NULL;
  if (!order || order->kind != ESP_NODE_LIST || order->n == 0 || !tasks || (*tasks)->kind != ESP_NODE_LIST) return;
  const char **names = esp_bind_alloc(b, (size_t)((*tasks)->n + 1) * sizeof *names);
  esp_node *sorted = esp_bind_alloc(b, sizeof *sorted);
  if (!names || !sorted) return;
  *sorted = **tasks; /* its own list: an alias shares nodes */
  sorted->keys = sorted->items = NULL;
  sorted->n = sorted->cap = 0;
  int n_names = 0;
  for (int i = 0; i < (*tasks)->n; i++)
    if (name_of((*tasks)->items[i])) names[n_names++] = name_of((*tasks)->items[i]);
  for (int i = 0; i < order->n; i++) {
    const esp_node *want = order->items[i];
    char shown[80], hint[100];
    esp_node *found = NULL;
    if (want->kind != ESP_NODE_SCALAR) return; /* told when the key is bound */
    for (int t = 0; t < (*tasks)->n && !found; t++)
      if (name_of((*tasks)->items[t]) && !strcmp(name_of((*tasks)->items[t]), want->text)) found = (*tasks)->items[t];
    for (int k = 0; k < sorted->n && found; k++)
      if (sorted->items[k] == found) {
        esp_bind_error(b, want, "continual.order: %s stands twice", esp_node_show(want, shown, sizeof shown));
        return;
      }
    if (!found) {
      esp_bind_error(b, want, "continual.order: no task is named %s%s", esp_node_show(want, shown, sizeof shown),
                     esp_suggest(want->text, names, n_names, hint, sizeof hint));
      return;
    }
    if (!esp_node_add(b->arena, sorted, NULL, found)) {
      b->oom = true;
      return;
    }
  }
  *tasks = sorted;
}
