/* arena.h: bump allocation for bookkeeping of one lifetime (a config, a dataset index, a model's site table).
 * In a build with ESP_ARENA_PASSTHROUGH each allocation is its own malloc, so that sanitizers see overruns. */
#ifndef ESP_CORE_ARENA_H
#define ESP_CORE_ARENA_H

#include <stddef.h>

#include "core/mem.h"

typedef struct esp_arena esp_arena;
esp_arena *esp_arena_create(esp_mem_kind kind);    /* NULL on failure, error set */
void esp_arena_destroy(esp_arena *a);              /* NULL is allowed */
void *esp_arena_alloc(esp_arena *a, size_t bytes); /* zeroed, 16-byte aligned; NULL on failure, error set */
char *esp_arena_strdup(esp_arena *a, const char *s);
char *esp_arena_strndup(esp_arena *a, const char *s, size_t n);
char *esp_arena_printf(esp_arena *a, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
size_t esp_arena_bytes(const esp_arena *a);

#endif
