#include "core/strbuf.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "core/mem.h"

void esp_strbuf_init(esp_strbuf *b) {
  memset(b, 0, sizeof *b);
}

void esp_strbuf_deinit(esp_strbuf *b) {
  esp_mem_free(b->data);
  memset(b, 0, sizeof *b);
}

void esp_strbuf_clear(esp_strbuf *b) {
  b->len = 0;
  b->failed = false;
  if (b->data) b->data[0] = 0;
}

/* Room for n more bytes and the zero. */
static bool reserve(esp_strbuf *b, size_t n) {
  if (b->failed) return false;
  if (n < b->cap - b->len) return true; /* cap 0: 0 - 0, so n < 0 is false */
  size_t cap = b->cap ? b->cap : 64;
  while (cap - b->len <= n) {
    if (cap > SIZE_MAX / 4) {
      b->failed = true;
      return false;
    }
    cap *= 2;
  }
  char *grown = esp_mem_realloc(ESP_MEM_HOST, b->data, cap);
  if (!grown) {
    b->failed = true;
    return false;
  }
  b->data = grown;
  b->cap = cap;
  return true;
}

void esp_strbuf_add(esp_strbuf *b, const char *bytes, size_t n) {
  if (!reserve(b, n)) return;
  if (n) memcpy(b->data + b->len, bytes, n);
  b->len += n;
  b->data[b->len] = 0;
}

void esp_strbuf_puts(esp_strbuf *b, const char *s) {
  esp_strbuf_add(b, s, strlen(s));
}

void esp_strbuf_putc(esp_strbuf *b, char c) {
  esp_strbuf_add(b, &c, 1);
}

void esp_strbuf_printf(esp_strbuf *b, const char *fmt, ...) {
  va_list ap, again;
  va_start(ap, fmt);
  va_copy(again, ap);
  int n = vsnprintf(NULL, 0, fmt, ap);
  va_end(ap);
  if (n < 0) {
    b->failed = true;
  } else if (reserve(b, (size_t)n)) {
    vsnprintf(b->data + b->len, (size_t)n + 1, fmt, again);
    b->len += (size_t)n;
  }
  va_end(again);
}

void esp_strbuf_json(esp_strbuf *b, const char *s, size_t n) {
  esp_strbuf_putc(b, '"');
  size_t from = 0;
  for (size_t i = 0; i < n; i++) {
    unsigned char c = (unsigned char)s[i];
    if (c >= 0x20 && c != '"' && c != '\\' && c != 0x7f) continue;
    esp_strbuf_add(b, s + from, i - from);
    from = i + 1;
    switch (c) {
    case '"':
      esp_strbuf_puts(b, "\\\"");
      break;
    case '\\':
      esp_strbuf_puts(b, "\\\\");
      break;
    case '\n':
      esp_strbuf_puts(b, "\\n");
      break;
    case '\r':
      esp_strbuf_puts(b, "\\r");
      break;
    case '\t':
      esp_strbuf_puts(b, "\\t");
      break;
    default:
      esp_strbuf_printf(b, "\\u%04x", c);
    }
  }
  esp_strbuf_add(b, s + from, n - from);
  esp_strbuf_putc(b, '"');
}

char *esp_strbuf_take(esp_strbuf *b) {
  if (!b->failed && !b->data) esp_strbuf_add(b, "", 0);
  char *text = b->failed ? NULL : b->data;
  if (!text) esp_mem_free(b->data);
  memset(b, 0, sizeof *b);
  return text;
}
