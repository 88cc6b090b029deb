/* tree.c: YAML events of libyaml become nodes with places. */
#include "recipe/tree.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <yaml.h>

typedef struct anchor {
  const char *name;
  esp_node *node;
} anchor;

typedef struct frame {  /* an open list or mapping */
  esp_node *node, *key; /* key: read, its value still to come */
  const char *anchor;
} frame;

typedef struct reader {
  esp_arena *arena;
  const char *override;
  esp_yaml_error_fn fn;
  void *ctx;
  frame stack[ESP_YAML_DEPTH];
  int depth;
  anchor *anchors;
  int n_anchors, cap_anchors;
  long total;
  esp_node *root;
  bool failed, fatal, oom;
} reader;

static void report(reader *r, int line, int column, bool fatal, const char *fmt, ...) ESP_PRINTF(5, 6);
static void report(reader *r, int line, int column, bool fatal, const char *fmt, ...) {
  char text[512];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(text, sizeof text, fmt, ap);
  va_end(ap);
  r->fn(r->ctx, line, column, r->override, text);
  r->failed = true;
  r->fatal |= fatal;
}

bool esp_node_is_null(const esp_node *n) {
  return n->kind == ESP_NODE_SCALAR && n->plain &&
         (!n->text[0] || !strcmp(n->text, "~") || !strcmp(n->text, "null") || !strcmp(n->text, "Null") ||
          !strcmp(n->text, "NULL"));
}

esp_node *esp_node_new(esp_arena *arena, esp_node_kind kind) {
  esp_node *n = esp_arena_alloc(arena, sizeof *n);
  if (!n) return NULL;
  n->kind = kind;
  n->weight = 1;
  return n;
}

esp_node *esp_node_scalar(esp_arena *arena, const char *text) {
  esp_node *n = esp_node_new(arena, ESP_NODE_SCALAR);
  if (!n) return NULL;
  n->plain = true;
  n->text = text;
  return n;
}

esp_node *esp_node_get(const esp_node *map, const char *key, int *index) {
  if (!map || map->kind != ESP_NODE_MAP) return NULL;
  for (int i = 0; i < map->n; i++)
    if (!strcmp(map->keys[i]->text, key)) {
      if (index) *index = i;
      return map->items[i];
    }
  return NULL;
}

bool esp_node_add(esp_arena *arena, esp_node *parent, esp_node *key, esp_node *item) {
  if (parent->n == parent->cap) {
    int cap = parent->cap ? 2 * parent->cap : 4;
    esp_node **items = esp_arena_alloc(arena, (size_t)cap * sizeof *items);
    esp_node **keys = parent->kind == ESP_NODE_MAP ? esp_arena_alloc(arena, (size_t)cap * sizeof *keys) : NULL;
    if (!items || (parent->kind == ESP_NODE_MAP && !keys)) return false;
    if (parent->n) {
      memcpy(items, parent->items, (size_t)parent->n * sizeof *items);
      if (keys) memcpy(keys, parent->keys, (size_t)parent->n * sizeof *keys);
    }
    parent->items = items;
    parent->keys = keys;
    parent->cap = cap;
  }
  if (parent->kind == ESP_NODE_MAP) parent->keys[parent->n] = key;
  parent->items[parent->n++] = item;
  parent->weight += item->weight + (key ? 1 : 0);
  return true;
}

static void add(reader *r, esp_node *parent, esp_node *key, esp_node *item) {
  if (!esp_node_add(r->arena, parent, key, item)) r->oom = r->fatal = true;
  r->total += item->weight;
  if (r->total > ESP_YAML_NODES && !r->fatal)
    report(r, item->line, item->column, true, "more than %d values once aliases are expanded", ESP_YAML_NODES);
}

/* `<<: *base`: keys of the other mapping that this one does not have. */
static void merge_keys(reader *r, esp_node *map) {
  int at;
  esp_node *from = esp_node_get(map, "<<", &at);
  if (!from || !map->keys[at]->plain) return;
  esp_node *key = map->keys[at];
  memmove(&map->keys[at], &map->keys[at + 1], (size_t)(map->n - at - 1) * sizeof *map->keys);
  memmove(&map->items[at], &map->items[at + 1], (size_t)(map->n - at - 1) * sizeof *map->items);
  map->n--;
  esp_node *one[1] = {from}, **list = one;
  int n = 1;
  if (from->kind == ESP_NODE_LIST) list = from->items, n = from->n;
  for (int i = 0; i < n && !r->fatal; i++) {
    if (list[i]->kind != ESP_NODE_MAP) {
      report(r, key->line, key->column, false, "'<<' takes a mapping or a list of mappings");
      return;
    }
    for (int k = 0; k < list[i]->n && !r->fatal; k++) {
      if (esp_node_get(map, list[i]->keys[k]->text, NULL)) continue;
      if (map->n >= ESP_YAML_KEYS) {
        report(r, key->line, key->column, true, "more than %d keys in one mapping", ESP_YAML_KEYS);
        return;
      }
      add(r, map, list[i]->keys[k], list[i]->items[k]);
    }
  }
}

static void remember(reader *r, const char *name, esp_node *node) {
  if (!name || r->fatal) return;
  for (int i = 0; i < r->n_anchors; i++)
    if (!strcmp(r->anchors[i].name, name)) { /* YAML allows it: the later one counts */
      r->anchors[i].node = node;
      return;
    }
  if (r->n_anchors == 256) {
    report(r, node->line, node->column, true, "more than 256 anchors");
    return;
  }
  if (r->n_anchors == r->cap_anchors) {
    int cap = r->cap_anchors ? 2 * r->cap_anchors : 8;
    anchor *a = esp_arena_alloc(r->arena, (size_t)cap * sizeof *a);
    if (!a) {
      r->oom = r->fatal = true;
      return;
    }
    if (r->n_anchors) memcpy(a, r->anchors, (size_t)r->n_anchors * sizeof *a);
    r->anchors = a;
    r->cap_anchors = cap;
  }
  r->anchors[r->n_anchors++] = (anchor){name, node};
}

/* A complete node goes to whoever is open. */
static void place(reader *r, esp_node *node) {
  if (r->fatal) return;
  if (!r->depth) {
    r->root = node;
    return;
  }
  frame *f = &r->stack[r->depth - 1];
  if (f->node->kind == ESP_NODE_LIST) {
    add(r, f->node, NULL, node);
  } else if (!f->key) {
    if (node->kind != ESP_NODE_SCALAR)
      report(r, node->line, node->column, true, "a key must be a single word, not a list or mapping");
    f->key = node;
  } else {
    esp_node *key = f->key;
    int at;
    f->key = NULL;
    if (esp_node_get(f->node, key->text, &at))
      report(r, key->line, key->column, false, "duplicate key '%s' (first at line %d)", key->text,
             f->node->keys[at]->line);
    else if (f->node->n >= ESP_YAML_KEYS)
      report(r, key->line, key->column, true, "more than %d keys in one mapping", ESP_YAML_KEYS);
    else
      add(r, f->node, key, node);
  }
}

static esp_node *make(reader *r, const yaml_event_t *e, esp_node_kind kind, const yaml_char_t *tag) {
  esp_node *n = esp_node_new(r->arena, kind);
  if (!n) {
    r->oom = r->fatal = true;
    return NULL;
  }
  n->line = (int)e->start_mark.line + 1;
  n->column = (int)e->start_mark.column + 1;
  n->override = r->override;
  if (tag) report(r, n->line, n->column, false, "tags are not supported (%.40s)", (const char *)tag);
  return n;
}

static void open_node(reader *r, esp_node *node, const yaml_char_t *anchor_name) {
  if (!node) return;
  if (r->depth == ESP_YAML_DEPTH) {
    report(r, node->line, node->column, true, "nested deeper than %d levels", ESP_YAML_DEPTH);
    return;
  }
  frame *f = &r->stack[r->depth++];
  *f = (frame){.node = node};
  if (anchor_name && !(f->anchor = esp_arena_strdup(r->arena, (const char *)anchor_name))) r->oom = r->fatal = true;
}

static void close_node(reader *r) {
  frame f = r->stack[--r->depth];
  if (f.node->kind == ESP_NODE_MAP) merge_keys(r, f.node);
  remember(r, f.anchor, f.node);
  place(r, f.node);
}

static void scalar(reader *r, const yaml_event_t *e) {
  const yaml_char_t *tag = e->data.scalar.tag;
  if (tag && e->data.scalar.plain_implicit) tag = NULL;
  esp_node *n = make(r, e, ESP_NODE_SCALAR, tag);
  if (!n) return;
  const char *text = (const char *)e->data.scalar.value;
  if (memchr(text, 0, e->data.scalar.length)) {
    report(r, n->line, n->column, false, "a text with a zero byte");
    text = "";
  }
  n->plain = e->data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
  n->text = esp_arena_strdup(r->arena, text);
  const char *name = NULL;
  if (e->data.scalar.anchor) name = esp_arena_strdup(r->arena, (const char *)e->data.scalar.anchor);
  if (!n->text || (e->data.scalar.anchor && !name)) {
    r->oom = r->fatal = true;
    return;
  }
  remember(r, name, n);
  place(r, n);
}

static void alias(reader *r, const yaml_event_t *e) {
  const char *name = (const char *)e->data.alias.anchor;
  for (int i = 0; i < r->n_anchors; i++)
    if (!strcmp(r->anchors[i].name, name)) {
      place(r, r->anchors[i].node);
      return;
    }
  /* An anchor counts only once its node is complete, so a node can never contain itself. */
  report(r, (int)e->start_mark.line + 1, (int)e->start_mark.column + 1, true, "unknown anchor '*%.60s'", name);
}

static void syntax_error(reader *r, const yaml_parser_t *p) {
  const yaml_mark_t *m = &p->problem_mark;
  int line = (int)m->line + 1, column = (int)m->column + 1;
  const char *problem = p->problem ? p->problem : "unreadable";
  if (p->error == YAML_MEMORY_ERROR)
    r->oom = r->fatal = true;
  else if (p->error == YAML_READER_ERROR)
    report(r, 1, 1, true, "not readable as text: %s at byte %zu", problem, p->problem_offset);
  else if (p->context)
    report(r, line, column, true, "YAML syntax: %s (%s that began on line %d)", problem, p->context,
           (int)p->context_mark.line + 1);
  else
    report(r, line, column, true, "YAML syntax: %s", problem);
}

esp_status esp_yaml_parse(const char *text, size_t n, esp_arena *arena, const char *override, esp_yaml_error_fn fn,
                          void *ctx, esp_node **root) {
  reader r = {.arena = arena, .override = override, .fn = fn, .ctx = ctx};
  *root = NULL;
  if (n > ESP_YAML_BYTES) {
    report(&r, 1, 1, true, "larger than %d bytes", ESP_YAML_BYTES);
    return ESP_ERR_RECIPE;
  }
  yaml_parser_t p;
  if (!yaml_parser_initialize(&p)) return esp_fail_oom("YAML parser", sizeof p);
  yaml_parser_set_input_string(&p, (const unsigned char *)text, n);
  int documents = 0;
  for (bool end = false; !end && !r.fatal;) {
    yaml_event_t e;
    if (!yaml_parser_parse(&p, &e)) {
      syntax_error(&r, &p);
      break;
    }
    switch (e.type) {
    case YAML_DOCUMENT_START_EVENT:
      if (documents++)
        report(&r, (int)e.start_mark.line + 1, (int)e.start_mark.column + 1, true, "a second YAML document");
      break;
    case YAML_SCALAR_EVENT:
      scalar(&r, &e);
      break;
    case YAML_ALIAS_EVENT:
      alias(&r, &e);
      break;
    case YAML_SEQUENCE_START_EVENT:
      open_node(&r, make(&r, &e, ESP_NODE_LIST, e.data.sequence_start.implicit ? NULL : e.data.sequence_start.tag),
                e.data.sequence_start.anchor);
      break;
    case YAML_MAPPING_START_EVENT:
      open_node(&r, make(&r, &e, ESP_NODE_MAP, e.data.mapping_start.implicit ? NULL : e.data.mapping_start.tag),
                e.data.mapping_start.anchor);
      break;
    case YAML_SEQUENCE_END_EVENT:
    case YAML_MAPPING_END_EVENT:
      close_node(&r);
      break;
    case YAML_STREAM_END_EVENT:
      end = true;
      break;
    default:
      break;
    }
    yaml_event_delete(&e);
  }
  yaml_parser_delete(&p);
  if (r.oom) return esp_fail_oom("YAML tree", n);
  if (!r.fatal) *root = r.root;
  return r.failed ? ESP_ERR_RECIPE : ESP_OK;
}
