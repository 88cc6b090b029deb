/* tree.h: YAML text as a tree of nodes that remember where they stood. Aliases share nodes; `<<` is merged; a repeated
 * key, a tag, a second document or a nesting deeper than ESP_YAML_DEPTH is an error. */
#ifndef ESP_RECIPE_TREE_H
#define ESP_RECIPE_TREE_H

#include <stdbool.h>
#include <stddef.h>

#include "core/arena.h"
#include "core/error.h"

#define ESP_YAML_DEPTH 24
#define ESP_YAML_NODES 100000 /* after expansion of aliases: bounds the work of whoever walks the tree */
#define ESP_YAML_KEYS 4096    /* of one mapping */
#define ESP_YAML_BYTES (1 << 20)

typedef enum esp_node_kind { ESP_NODE_SCALAR, ESP_NODE_LIST, ESP_NODE_MAP } esp_node_kind;

typedef struct esp_node {
  esp_node_kind kind;
  bool plain;           /* a scalar without quotes: may be null, a number or a boolean */
  int line, column;     /* 1-based; 0: the node has no place in the file */
  const char *override; /* the "key=value" it came from; NULL: the file (or a default) */
  const char *text;     /* scalar, zero-terminated and free of zero bytes */
  struct esp_node **keys, **items;
  int n, cap;
  long weight; /* nodes below, aliases expanded */
} esp_node;

/* Error sink: syntax errors and repeated keys. A message has no place in front: the node (or NULL) has it. */
typedef void (*esp_yaml_error_fn)(void *ctx, int line, int column, const char *override, const char *message);

/* NULL root with ESP_OK: the text is empty. ESP_ERR_RECIPE: errors were reported; *root is NULL when the text cannot be
 * read at all, else a tree without the repeated keys. */
esp_status esp_yaml_parse(const char *text, size_t n, esp_arena *arena, const char *override, esp_yaml_error_fn fn,
                          void *ctx, esp_node **root);

esp_node *esp_node_scalar(esp_arena *arena, const char *text); /* plain */
esp_node *esp_node_new(esp_arena *arena, esp_node_kind kind);
esp_node *esp_node_get(const esp_node *map, const char *key, int *index); /* NULL when absent */
bool esp_node_add(esp_arena *arena, esp_node *parent, esp_node *key, esp_node *item);
bool esp_node_is_null(const esp_node *n);

#endif
