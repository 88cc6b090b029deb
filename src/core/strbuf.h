/* strbuf.h: a growing byte string, always zero-terminated. A failed growth sets `failed` and later appends do nothing,
 * so a long run of appends needs one check at its end. */
#ifndef ESP_CORE_STRBUF_H
#define ESP_CORE_STRBUF_H

#include <stdbool.h>
#include <stddef.h>

typedef struct esp_strbuf {
  char *data; /* never NULL after the first append; owned, esp_mem */
  size_t len, cap;
  bool failed;
} esp_strbuf;

void esp_strbuf_init(esp_strbuf *b);
void esp_strbuf_deinit(esp_strbuf *b);
void esp_strbuf_clear(esp_strbuf *b);
void esp_strbuf_add(esp_strbuf *b, const char *bytes, size_t n);
void esp_strbuf_puts(esp_strbuf *b, const char *s);
void esp_strbuf_putc(esp_strbuf *b, char c);
void esp_strbuf_printf(esp_strbuf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Adds `s` as a JSON string literal, quotes included. */
void esp_strbuf_json(esp_strbuf *b, const char *s, size_t n);
/* The text, owned by the caller (esp_mem_free); the buffer is empty afterwards. NULL if `failed`. */
char *esp_strbuf_take(esp_strbuf *b);

#endif
