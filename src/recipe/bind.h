/* bind.h: from the tree to the struct, by the schema: private to this room. */
#ifndef ESP_RECIPE_BIND_H
#define ESP_RECIPE_BIND_H

#include "core/strbuf.h"
#include "recipe/schema.h"
#include "recipe/tree.h"

typedef struct esp_issue {
  int line, column, order;
  const char *override, *text;
} esp_issue;

/* Where a value came from, by the address of its field: values that are not here are defaults. */
typedef struct esp_origin {
  const void *field;
  int line;
  const char *override;
} esp_origin;
typedef struct esp_origins {
  esp_origin *slots; /* open addressing */
  size_t n, cap;
} esp_origins;

typedef struct esp_binder {
  esp_arena *arena;
  esp_recipe *recipe;
  const char *path, *dir; /* of the file; dir is "" for the working directory */
  esp_issue *issues;
  int n_issues, cap_issues;
  long total_issues;
  bool oom;
} esp_binder;

/* Records an error at a node (NULL: the top of the file). */
void esp_bind_error(esp_binder *b, const esp_node *at, const char *fmt, ...) ESP_PRINTF(3, 4);
void esp_bind_error_at(void *binder, int line, int column, const char *override, const char *text);
esp_status esp_bind_finish(esp_binder *b); /* all errors, in the order of the file, as one message */
void *esp_bind_alloc(esp_binder *b, size_t bytes);

void esp_origin_set(esp_binder *b, const void *field, const esp_node *node);
const esp_origin *esp_origin_get(const esp_recipe *r, const void *field);

/* values.c: one value. `path` is the whole name for messages ("tasks[1].optim.lr"). False: an error was recorded. */
bool esp_value_set(esp_binder *b, const esp_key *k, const esp_node *node, const char *path, void *base);
bool esp_value_default(esp_binder *b, const esp_key *k, void *base);
const char *esp_value_path(esp_binder *b, const esp_node *node, const char *text, const char *path);
bool esp_text_is_integer(const char *s);
bool esp_text_is_number(const char *s);
/* The node as it may appear in a message: quoted, short, one line. */
const char *esp_node_show(const esp_node *n, char *buf, size_t size);
/* "(did you mean 'x'?)" with a blank in front, or "". */
const char *esp_suggest(const char *word, const char *const *names, int n, char *buf, size_t size);

/* render.c */
void esp_value_render(const esp_recipe *r, const esp_key *k, const void *base, bool for_hash, esp_strbuf *out);
void esp_render_string(esp_strbuf *out, const char *s);

/* bind.c */
void esp_bind_recipe(esp_binder *b, const esp_node *root);
/* check.c: rules between keys, after everything is bound. */
void esp_check_recipe(esp_binder *b, const esp_node *root);
/* override.c: puts "a.b[1].c=value" into the tree. */
esp_status esp_override_apply(esp_binder *b, esp_node **root, const char *override);
/* append.c: adds the tasks of a file to the tree. */
esp_status esp_append_apply(esp_binder *b, esp_node *root, const char *path);
/* joint.c: policy joint: *out has one task in the place of r's, in the same arena. */
esp_status esp_recipe_join(esp_recipe *r, esp_recipe **out);
/* order.c: the tasks of the tree as continual.order says. */
void esp_order_apply(esp_binder *b, esp_node *root);

static inline void *esp_field(const void *base, size_t offset) {
  return (char *)(uintptr_t)base + offset;
}

#endif
