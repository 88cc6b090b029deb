/* mem.h: the process's own allocations, counted by category so that `plan` can be held to the measured peak.
 *
 * Everything of size (weights, activations, adapter and optimizer state, data, workspaces) comes from here; small
 * bookkeeping may use arenas (arena.h), which draw from here too. Blocks are 64-byte aligned and zeroed.
 */
#ifndef ESP_CORE_MEM_H
#define ESP_CORE_MEM_H

#include <stddef.h>
#include <stdint.h>

typedef enum esp_mem_kind {
  ESP_MEM_WEIGHTS,     /* frozen base, packed or dense */
  ESP_MEM_PARAMS,      /* trained parameters: master, shadow, gradient */
  ESP_MEM_OPTIM,       /* optimizer state */
  ESP_MEM_ACTIVATIONS, /* the activation stack */
  ESP_MEM_WORKSPACE,   /* scratch of operations */
  ESP_MEM_STRATEGY,    /* what strategies against forgetting remember */
  ESP_MEM_DATA,        /* tokens, tokenizer, datasets */
  ESP_MEM_HOST,        /* everything else */
  ESP_MEM_KINDS
} esp_mem_kind;

const char *esp_mem_kind_name(esp_mem_kind kind);

/* NULL, with the error set, when it cannot be had. bytes == 0 gives a valid unique pointer. */
void *esp_mem_alloc(esp_mem_kind kind, size_t bytes);
/* Keeps the first min(old, new) bytes; the rest is zeroed. On NULL the old block is still valid. */
void *esp_mem_realloc(esp_mem_kind kind, void *ptr, size_t bytes);
void esp_mem_free(void *ptr); /* NULL is allowed */
char *esp_mem_strdup(esp_mem_kind kind, const char *s);
char *esp_mem_printf(esp_mem_kind kind, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

typedef struct esp_mem_stats {
  int64_t now[ESP_MEM_KINDS], peak[ESP_MEM_KINDS]; /* bytes; peaks per category need not coincide in time */
  int64_t now_total, peak_total;                   /* memory of the host */
  int64_t now_device, peak_device;                 /* memory of a device; the categories hold both */
} esp_mem_stats;
void esp_mem_stats_get(esp_mem_stats *out);
void esp_mem_stats_reset_peak(void);
/* For memory obtained elsewhere but owned by us, and for the counting backend (adds to the same books). */
void esp_mem_account(esp_mem_kind kind, int64_t delta_bytes);
void esp_mem_account_device(esp_mem_kind kind, int64_t delta_bytes);
/* Gives pages of freed small blocks back to the system: for the end of a phase that made and freed many. */
void esp_mem_trim(void);

/* Reads /proc/self/status: peak resident set in bytes, 0 where unknown. */
int64_t esp_mem_rss_peak(void);

#endif
