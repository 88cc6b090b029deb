/* template.h: the built-in chat templates, rendered with provenance: each piece of text is known to be literal, or the
 * content of a message, so that loss masks follow from where a byte came from and are never searched for. */
#ifndef ESP_TEXT_TEMPLATE_H
#define ESP_TEXT_TEMPLATE_H

#include <stdbool.h>
#include <stddef.h>

#include "core/error.h"

typedef struct esp_message {
  const char *role, *content; /* system, user, assistant, tool */
  int train;                  /* -1: by role; 0; 1 (per-message flag of the data) */
} esp_message;

typedef struct esp_segment { /* a run of rendered text */
  const char *text;
  size_t len;
  int message;     /* index, -1: outside any */
  bool content;    /* the message's own content, else template literal */
  bool terminator; /* the literal that ends an assistant turn */
} esp_segment;

typedef struct esp_rendered {
  esp_segment *segments;
  int n;
  void *owner;
} esp_rendered;

/* name: "chatml", "llama3", "mistral", "gemma", "alpaca". generation_prompt: end with the header of an assistant turn.
 */
esp_status esp_template_render(const char *name, const esp_message *messages, int n, bool generation_prompt,
                               esp_rendered *out);
void esp_rendered_deinit(esp_rendered *r);
const char *const *esp_template_names(int *n);
/* Which built-in to name in the error for chat_template: auto, judged from the tokenizer's special tokens; NULL. */
struct esp_tokenizer;
const char *esp_template_suggest(const struct esp_tokenizer *t);

#endif
