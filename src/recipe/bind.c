/* bind.c: walks the tree along the schema. Every key is looked at, whatever went wrong before, so that one pass shows
 * all errors. */
#include "recipe/bind.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/map.h"

#define MAX_ISSUES 200
#define MAX_NAMES 512

/* ---- errors ---- */

void esp_bind_error_at(void *binder, int line, int column, const char *override, const char *text) {
  esp_binder *b = binder;
  b->total_issues++;
  if (b->n_issues == MAX_ISSUES) return;
  if (b->n_issues == b->cap_issues) {
    int cap = b->cap_issues ? 2 * b->cap_issues : 16;
    esp_issue *more = esp_arena_alloc(b->arena, (size_t)cap * sizeof *more);
    if (!more) {
      b->oom = true;
      return;
    }
    if (b->n_issues) memcpy(more, b->issues, (size_t)b->n_issues * sizeof *more);
    b->issues = more;
    b->cap_issues = cap;
  }
  char *copy = esp_arena_strdup(b->arena, text);
  if (!copy) {
    b->oom = true;
    return;
  }
  for (char *p = copy; *p; p++) /* a message is one line, whatever the recipe held */
    if ((unsigned char)*p < 0x20 || (unsigned char)*p == 0x7f) *p = '?';
  b->issues[b->n_issues] = (esp_issue){line, column, b->n_issues, override, copy};
  b->n_issues++;
}

void esp_bind_error(esp_binder *b, const esp_node *at, const char *fmt, ...) {
  char text[700];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(text, sizeof text, fmt, ap);
  va_end(ap);
  esp_bind_error_at(b, at && at->line ? at->line : 1, at && at->line ? at->column : 1, at ? at->override : NULL, text);
}

static int compare_issues(const void *pa, const void *pb) {
  const esp_issue *a = pa, *b = pb;
  if (!a->override != !b->override) return a->override ? 1 : -1;
  if (!a->override && a->line != b->line) return a->line < b->line ? -1 : 1;
  if (!a->override && a->column != b->column) return a->column < b->column ? -1 : 1;
  return a->order - b->order;
}

esp_status esp_bind_finish(esp_binder *b) {
  if (b->oom) return esp_fail_oom("recipe", 0);
  if (!b->n_issues) return ESP_OK;
  qsort(b->issues, (size_t)b->n_issues, sizeof *b->issues, compare_issues);
  char text[16000];
  size_t used = 0;
  long shown = 0;
  for (int i = 0; i < b->n_issues; i++) {
    const esp_issue *e = &b->issues[i];
    char line[1200], override[80];
    if (e->override && e->override[0] == '+') { /* a file of tasks that are added */
      snprintf(line, sizeof line, "%.400s:%d:%d: %s", e->override + 1, e->line, e->column, e->text);
    } else if (e->override) {
      size_t n = strcspn(e->override, "\n\r");
      snprintf(override, sizeof override, "%.*s", (int)(n < 70 ? n : 70), e->override);
      snprintf(line, sizeof line, "override '%s': %s", override, e->text);
    } else {
      snprintf(line, sizeof line, "%.400s:%d:%d: %s", b->path, e->line, e->column, e->text);
    }
    size_t n = strlen(line);
    if (used + n + 40 > sizeof text && shown) break;
    if (n + 40 > sizeof text) line[n = sizeof text - 41] = 0;
    used += (size_t)snprintf(text + used, sizeof text - used, "%s%s", shown ? "\n" : "", line);
    shown++;
  }
  if (shown < b->total_issues) snprintf(text + used, sizeof text - used, "\nand %ld more", b->total_issues - shown);
  return esp_fail(ESP_ERR_RECIPE, "%s", text);
}

void *esp_bind_alloc(esp_binder *b, size_t bytes) {
  void *p = esp_arena_alloc(b->arena, bytes);
  if (!p) b->oom = true;
  return p;
}

/* ---- origins ---- */

static size_t origin_slot(const esp_origins *o, const void *field) {
  size_t i = (size_t)((uintptr_t)field * UINT64_C(0x9E3779B97F4A7C15) >> 20) & (o->cap - 1);
  while (o->slots[i].field && o->slots[i].field != field) i = (i + 1) & (o->cap - 1);
  return i;
}

void esp_origin_set(esp_binder *b, const void *field, const esp_node *node) {
  esp_origins *o = b->recipe->origins;
  if (2 * (o->n + 1) > o->cap) {
    esp_origins more = {.cap = o->cap ? 2 * o->cap : 128};
    more.slots = esp_bind_alloc(b, more.cap * sizeof *more.slots);
    if (!more.slots) return;
    for (size_t i = 0; i < o->cap; i++)
      if (o->slots[i].field) more.slots[origin_slot(&more, o->slots[i].field)] = o->slots[i];
    more.n = o->n;
    *o = more;
  }
  esp_origin *slot = &o->slots[origin_slot(o, field)];
  if (!slot->field) o->n++;
  *slot = (esp_origin){field, node->line, node->override};
}

const esp_origin *esp_origin_get(const esp_recipe *r, const void *field) {
  const esp_origins *o = r->origins;
  if (!o || !o->cap) return NULL;
  const esp_origin *slot = &o->slots[origin_slot(o, field)];
  return slot->field ? slot : NULL;
}

/* ---- objects ---- */

static void bind_object(esp_binder *b, const esp_object *o, const esp_node *map, const char *path, void *base,
                        const esp_section *task_section);

static const char *place_name(const char *path) {
  return *path ? path : "the recipe";
}

/* The section that knows a key which stands in the wrong one: "chat_template" in model belongs to data. */
static const char *home_of(const char *word, const esp_key **key) {
  for (int i = 0; i < esp_schema_root.n; i++) {
    const esp_key *k = &esp_schema_root.keys[i];
    if (k->type != ESP_T_OBJECT) continue;
    *key = esp_schema_find(k->object, word);
    if (*key) return k->name;
  }
  return NULL;
}

static void unknown_key(esp_binder *b, const esp_object *o, const esp_node *key, const char *path) {
  const char *names[MAX_NAMES];
  const esp_key *found;
  char spelled[64][48], hint[160] = "", shown[80];
  int n = 0, n_spelled = 0;
  const char *word = key->text, *home;
  for (int i = 0; i < o->n && n < MAX_NAMES; i++) names[n++] = o->keys[i].name;
  for (int i = 0; i < o->n; i++)
    for (const char *p = o->keys[i].aliases; p && *p && n_spelled < 64;) {
      size_t w = strcspn(p, " ");
      snprintf(spelled[n_spelled], sizeof spelled[0], "%.*s", (int)w, p);
      names[n++] = spelled[n_spelled++];
      p += w + (p[w] == ' ');
    }
  const char *near = strlen(word) > 64 ? NULL : esp_closest(word, names, n);
  if (near) { /* lora_rank is accepted, rank says it here: else name the key itself, not another trainer's spelling */
    const char *bare = strncmp(near, "lora_", 5) ? NULL : near + 5;
    bool known = bare && esp_schema_find(o, bare) == esp_schema_find(o, near);
    snprintf(hint, sizeof hint, " (did you mean '%s'?)", known ? bare : esp_schema_find(o, near)->name);
  } else if (o != &esp_schema_root && esp_schema_find(&esp_schema_root, word))
    snprintf(hint, sizeof hint, " (it stands at the top of a recipe)");
  else if ((home = home_of(word, &found)) != NULL)
    snprintf(hint, sizeof hint, " (did you mean '%s.%s'?)", home, found->name);
  esp_bind_error(b, key, "unknown key %s in %s%s", esp_node_show(key, shown, sizeof shown), place_name(path), hint);
}

static void bind_list(esp_binder *b, const esp_key *k, const esp_node *node, const char *path, void *base) {
  if (node->kind != ESP_NODE_LIST) {
    char shown[80];
    esp_bind_error(b, node, "%s: expected a list of mappings, got %s", path, esp_node_show(node, shown, sizeof shown));
    return;
  }
  if (!node->n && (k->flags & ESP_K_NONEMPTY)) esp_bind_error(b, node, "%s: the list is empty", path);
  char *items = esp_bind_alloc(b, (size_t)(node->n + 1) * k->object->size);
  if (!items) return;
  *(void **)esp_field(base, k->offset) = items;
  *(int *)esp_field(base, k->count_offset) = node->n;
  for (int i = 0; i < node->n; i++) {
    char at[256];
    snprintf(at, sizeof at, "%s[%d]", path, i);
    void *item = items + (size_t)i * k->object->size;
    if (!strcmp(k->name, "tasks")) /* a task begins as a copy of the sections */
      for (int s = 0; s < esp_schema_n_sections; s++) {
        const esp_section *sec = &esp_schema_sections[s];
        memcpy(esp_field(item, sec->task_offset), esp_field(b->recipe, sec->recipe_offset), sec->size);
      }
    bind_object(b, k->object, node->items[i], at, item, NULL);
  }
}

static void bind_override(esp_binder *b, const esp_key *k, const esp_node *node, const char *path, void *task,
                          const esp_node *skip) {
  const esp_section *s = esp_schema_section(k->name);
  /* Rows of a section count from the start of the recipe: move the base so that they land in the task. */
  void *base = (void *)((uintptr_t)task + s->task_offset - s->recipe_offset);
  esp_node rest = *node;
  if (skip) { /* `data: {sources: ...}`: the other keys are the section's */
    rest.n = 0;
    rest.cap = node->n;
    rest.keys = esp_bind_alloc(b, (size_t)node->n * sizeof *rest.keys);
    rest.items = esp_bind_alloc(b, (size_t)node->n * sizeof *rest.items);
    if (!rest.keys || !rest.items) return;
    for (int i = 0; i < node->n; i++)
      if (node->keys[i] != skip) rest.keys[rest.n] = node->keys[i], rest.items[rest.n++] = node->items[i];
  }
  for (int i = 0; i < esp_schema_root.n; i++)
    if (!strcmp(esp_schema_root.keys[i].name, k->name))
      bind_object(b, esp_schema_root.keys[i].object, &rest, path, base, s);
}

static void bind_task_data(esp_binder *b, const esp_key *k, const esp_node *node, const char *path, void *task) {
  int at;
  const esp_node *sources = esp_node_get(node, "sources", &at);
  if (node->kind == ESP_NODE_MAP && sources) {
    char inner[256];
    snprintf(inner, sizeof inner, "%s.sources", path);
    bind_list(b, k, sources, inner, task);
    bind_override(b, k, node, path, task, node->keys[at]);
  } else if (node->kind == ESP_NODE_MAP) {
    esp_bind_error(b, node, "%s: expected a list of sources, or a mapping with sources and keys of data", path);
  } else {
    bind_list(b, k, node, path, task);
  }
}

static void bind_refs(esp_binder *b, const esp_key *k, const esp_node *node, const char *path, void *base) {
  const esp_node *one[1] = {node};
  const esp_node *const *items = one;
  int n = 1;
  if (node->kind == ESP_NODE_LIST) items = (const esp_node *const *)node->items, n = node->n;
  int *refs = esp_bind_alloc(b, (size_t)(n + 1) * sizeof *refs);
  const char **names = esp_bind_alloc(b, (size_t)(b->recipe->eval.n_sets + 1) * sizeof *names);
  if (!refs || !names) return;
  int n_names = 0, n_refs = 0;
  for (int i = 0; i < b->recipe->eval.n_sets; i++)
    if (b->recipe->eval.sets[i].name) names[n_names++] = b->recipe->eval.sets[i].name;
  for (int i = 0; i < n; i++) {
    char shown[80], hint[100];
    if (items[i]->kind != ESP_NODE_SCALAR || esp_node_is_null(items[i])) {
      esp_bind_error(b, items[i], "%s: expected the name of an evaluation set, got %s", path,
                     esp_node_show(items[i], shown, sizeof shown));
      continue;
    }
    int found = -1;
    for (int s = 0; s < b->recipe->eval.n_sets; s++)
      if (b->recipe->eval.sets[s].name && !strcmp(b->recipe->eval.sets[s].name, items[i]->text)) found = s;
    for (int s = 0; s < n_refs; s++)
      if (found >= 0 && refs[s] == found) {
        esp_bind_error(b, items[i], "%s: %s stands twice", path, esp_node_show(items[i], shown, sizeof shown));
        found = -2;
      }
    if (found >= 0)
      refs[n_refs++] = found;
    else if (found == -1)
      esp_bind_error(b, items[i], "%s: no evaluation set is named %s in eval.sets%s", path,
                     esp_node_show(items[i], shown, sizeof shown),
                     esp_suggest(items[i]->text, names, n_names, hint, sizeof hint));
  }
  *(int **)esp_field(base, k->offset) = refs;
  *(int *)esp_field(base, k->count_offset) = n_refs;
}

static void bind_after(esp_binder *b, const esp_key *k, const esp_node *node, const char *path, void *base) {
  char shown[80], at[256], kinds[80] = "";
  for (int i = 0; i < k->object->n; i++)
    snprintf(kinds + strlen(kinds), sizeof kinds - strlen(kinds), "%s%s", i ? ", " : "", k->object->keys[i].name);
  if (node->kind != ESP_NODE_LIST) {
    esp_bind_error(b, node, "%s: expected a list of %s, got %s", path, kinds, esp_node_show(node, shown, sizeof shown));
    return;
  }
  esp_after_step *steps = esp_bind_alloc(b, (size_t)(node->n + 1) * sizeof *steps);
  if (!steps) return;
  *(esp_after_step **)esp_field(base, k->offset) = steps;
  *(int *)esp_field(base, k->count_offset) = node->n;
  for (int i = 0; i < node->n; i++) {
    const esp_node *item = node->items[i];
    if (item->kind != ESP_NODE_MAP || item->n != 1) {
      esp_bind_error(b, item, "%s[%d]: expected %s%s with its keys", path, i, k->object->n > 1 ? "one of " : "", kinds);
      continue;
    }
    const esp_key *kind = esp_schema_find(k->object, item->keys[0]->text);
    snprintf(at, sizeof at, "%s[%d]", path, i);
    if (!kind) {
      unknown_key(b, k->object, item->keys[0], at);
      continue;
    }
    steps[i].kind = (esp_after_kind)(kind - k->object->keys);
    snprintf(at, sizeof at, "%s[%d].%s", path, i, kind->name);
    esp_node empty = *item->items[0];
    if (esp_node_is_null(&empty)) empty.kind = ESP_NODE_MAP, empty.n = 0;
    bind_object(b, kind->object, &empty, at, &steps[i], NULL);
  }
}

static void bind_value(esp_binder *b, const esp_key *k, const esp_node *node, const char *path, void *base) {
  switch (k->type) {
  case ESP_T_OBJECT:
    bind_object(b, k->object, node, path, base, NULL);
    break;
  case ESP_T_OBJECTS:
    bind_list(b, k, node, path, base);
    break;
  case ESP_T_TASK_DATA:
    bind_task_data(b, k, node, path, base);
    break;
  case ESP_T_OVERRIDE:
    bind_override(b, k, node, path, base, NULL);
    break;
  case ESP_T_EVAL_REFS:
    bind_refs(b, k, node, path, base);
    break;
  case ESP_T_AFTER:
    bind_after(b, k, node, path, base);
    break;
  default:
    if (esp_value_set(b, k, node, path, base)) {
      esp_origin_set(b, esp_field(base, k->offset), node);
      if (k->type == ESP_T_BETAS) esp_origin_set(b, esp_field(base, k->offset + sizeof(double)), node);
    }
  }
}

/* The node that holds a key's value: an override counts before the file, under whichever spelling. */
static const esp_node *find_value(esp_binder *b, const esp_key *k, const esp_node *map, const char *path) {
  const esp_node *found = NULL, *key = NULL;
  for (int i = 0; i < map->n; i++) {
    const esp_node *name = map->keys[i];
    if (strcmp(name->text, k->name) && !esp_key_has_alias(k, name->text)) continue;
    const esp_node *item = map->items[i];
    bool later = found && item->override && !found->override;
    if (found && !later && !(found->override && !item->override) && !(found->override && item->override))
      esp_bind_error(b, name, "%s%s%s says again what '%s' says at line %d", path, *path ? "." : "", name->text,
                     key->text, key->line);
    if (!found || later || (item->override && found->override)) {
      found = item;
      key = name;
    }
  }
  return found;
}

static void bind_object(esp_binder *b, const esp_object *o, const esp_node *map, const char *path, void *base,
                        const esp_section *task_section) {
  char at[256], shown[80];
  esp_node empty = {.kind = ESP_NODE_MAP, .line = map ? map->line : 0, .column = map ? map->column : 0};
  if (!map || esp_node_is_null(map)) map = &empty;
  if (map->kind != ESP_NODE_MAP) {
    esp_bind_error(b, map, "%s: expected a mapping, got %s", place_name(path), esp_node_show(map, shown, sizeof shown));
    map = &empty;
  }
  for (int i = 0; i < map->n; i++)
    if (!esp_schema_find(o, map->keys[i]->text)) unknown_key(b, o, map->keys[i], path);
  for (int i = 0; i < o->n; i++) {
    const esp_key *k = &o->keys[i];
    snprintf(at, sizeof at, "%s%s%s", path, *path ? "." : "", k->name);
    const esp_node *node = find_value(b, k, map, path);
    bool given = node && !esp_node_is_null(node);
    if (task_section) { /* only what is given: the rest is the section's */
      if (node && !esp_key_per_task(k, task_section))
        esp_bind_error(b, node, "%s: holds for the whole run, a task cannot set it", at);
      else if (given)
        bind_value(b, k, node, at, base);
      else if (node)
        esp_value_default(b, k, base);
      continue;
    }
    if (given) {
      if (k->def) esp_value_default(b, k, base); /* so that a wrong value leaves a sane one behind */
      bind_value(b, k, node, at, base);
    } else if (k->flags & ESP_K_REQUIRED) {
      esp_bind_error(b, map, "missing key '%s' (%s)", at, k->help);
    } else if (k->type == ESP_T_OBJECT) {
      bind_object(b, k->object, node, at, base, NULL);
    } else {
      esp_value_default(b, k, base);
    }
  }
}

void esp_bind_recipe(esp_binder *b, const esp_node *root) {
  bind_object(b, &esp_schema_root, root, "", b->recipe, NULL);
}
