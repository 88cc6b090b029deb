#include "core/arena.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "core/error.h"

#define FIRST_BLOCK 4096
#define LARGEST_BLOCK ((size_t)1 << 20)

typedef struct arena_block {
  struct arena_block *next;
  size_t used, cap;
  _Alignas(16) char data[];
} arena_block;

struct esp_arena {
  arena_block *head;
  size_t next_cap, bytes;
  esp_mem_kind kind;
};

esp_arena *esp_arena_create(esp_mem_kind kind) {
  esp_arena *a = esp_mem_alloc(kind, sizeof *a);
  if (!a) return NULL;
  a->kind = kind;
  a->next_cap = FIRST_BLOCK;
  return a;
}

void esp_arena_destroy(esp_arena *a) {
  if (!a) return;
  for (arena_block *b = a->head; b;) {
    arena_block *next = b->next;
    esp_mem_free(b);
    b = next;
  }
  esp_mem_free(a);
}

void *esp_arena_alloc(esp_arena *a, size_t bytes) {
  if (bytes > SIZE_MAX / 2) {
    esp_fail_oom("an arena", bytes);
    return NULL;
  }
#ifdef ESP_ARENA_PASSTHROUGH
  const size_t need = bytes; /* exact, so that one byte too far is seen */
  const int fits = 0;
#else
  const size_t need = (bytes + 15) & ~(size_t)15;
  const int fits = a->head && a->head->cap - a->head->used >= need;
#endif
  if (!fits) {
    size_t cap = need;
#ifndef ESP_ARENA_PASSTHROUGH
    if (cap < a->next_cap) cap = a->next_cap;
    if (a->next_cap < LARGEST_BLOCK) a->next_cap *= 2;
#endif
    arena_block *b = esp_mem_alloc(a->kind, sizeof *b + cap);
    if (!b) return NULL;
    b->cap = cap;
    b->next = a->head;
    a->head = b;
  }
  void *p = a->head->data + a->head->used;
  a->head->used += need;
  a->bytes += bytes;
  return p;
}

char *esp_arena_strndup(esp_arena *a, const char *s, size_t n) {
  char *copy = esp_arena_alloc(a, n + 1);
  if (copy) memcpy(copy, s, n);
  return copy;
}

char *esp_arena_strdup(esp_arena *a, const char *s) {
  return esp_arena_strndup(a, s, strlen(s));
}

char *esp_arena_printf(esp_arena *a, const char *fmt, ...) {
  va_list ap, again;
  va_start(ap, fmt);
  va_copy(again, ap);
  int n = vsnprintf(NULL, 0, fmt, ap);
  va_end(ap);
  char *text = n < 0 ? NULL : esp_arena_alloc(a, (size_t)n + 1);
  if (text) vsnprintf(text, (size_t)n + 1, fmt, again);
  va_end(again);
  return text;
}

size_t esp_arena_bytes(const esp_arena *a) {
  return a->bytes;
}
