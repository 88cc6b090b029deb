/* mem.c: counted allocation. Each block has a 64-byte header in front of it, so that freeing needs no size and the
 * block itself starts on a cache line. Large blocks are mapped directly, on a huge page's boundary and with huge pages
 * asked for (a packed weight read once per token is bound by page walks otherwise). Weights of a middling size, which
 * live long, share mappings of 32 MiB, or most of a small model would lie in small pages. */
#include "core/mem.h"

#include <malloc.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core/error.h"

#define HEADER_BYTES 64
#define MAP_THRESHOLD ((size_t)2 << 20)
#define HUGE_PAGE ((size_t)2 << 20)
#define SHARE_THRESHOLD ((size_t)64 << 10)
#define SHARED_BYTES ((size_t)32 << 20)
#define MAGIC 0x65737062u

/* In a sanitizer build every block comes from malloc, so that overruns of large blocks are seen too. */
#if defined(ESP_ARENA_PASSTHROUGH) || defined(__SANITIZE_ADDRESS__)
#define USE_MAP 0
#else
#define USE_MAP 1
#endif

/* A mapping cut into blocks from its start; unmapped with its last block, so a block is never zeroed by hand. */
typedef struct shared_map {
  size_t used;
  int64_t live;
} shared_map;

typedef struct block_header {
  size_t bytes;       /* asked for */
  size_t mapped;      /* bytes of the block's own mapping, 0 when it has none */
  shared_map *shared; /* the mapping it was cut from, NULL: none */
  uint32_t kind;
  uint32_t magic;
} block_header;
_Static_assert(sizeof(block_header) <= HEADER_BYTES, "the header must fit in front of the block");

static _Atomic int64_t now_bytes[ESP_MEM_KINDS], peak_bytes[ESP_MEM_KINDS];
static _Atomic int64_t now_total, peak_total, now_device, peak_device;

const char *esp_mem_kind_name(esp_mem_kind kind) {
  static const char *const names[ESP_MEM_KINDS] = {"weights",   "params",   "optim", "activations",
                                                   "workspace", "strategy", "data",  "host"};
  return (unsigned)kind < ESP_MEM_KINDS ? names[kind] : "unknown";
}

static void raise_peak(_Atomic int64_t *peak, int64_t value) {
  int64_t seen = atomic_load_explicit(peak, memory_order_relaxed);
  while (value > seen &&
         !atomic_compare_exchange_weak_explicit(peak, &seen, value, memory_order_relaxed, memory_order_relaxed)) {
  }
}

static void account(_Atomic int64_t *now, _Atomic int64_t *peak, int64_t delta) {
  int64_t value = atomic_fetch_add_explicit(now, delta, memory_order_relaxed) + delta;
  if (delta > 0) raise_peak(peak, value);
}

void esp_mem_account(esp_mem_kind kind, int64_t delta) {
  account(&now_bytes[kind], &peak_bytes[kind], delta);
  account(&now_total, &peak_total, delta);
}

void esp_mem_account_device(esp_mem_kind kind, int64_t delta) {
  account(&now_bytes[kind], &peak_bytes[kind], delta);
  account(&now_device, &peak_device, delta);
}

static block_header *header_of(void *ptr) {
  block_header *h = (block_header *)((char *)ptr - HEADER_BYTES);
  if (h->magic != MAGIC) abort(); /* a foreign or freed pointer: going on would corrupt the heap */
  return h;
}

/* Zeroed pages from a huge page's boundary on; NULL when the system has none. */
static char *map_pages(size_t bytes) {
  char *p = mmap(NULL, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return NULL;
  char *base = p + (-(uintptr_t)p & (HUGE_PAGE - 1));
  if (base > p) munmap(p, (size_t)(base - p));
  munmap(base + bytes, (size_t)(p + HUGE_PAGE - base));
  madvise(base, bytes, MADV_HUGEPAGE); /* advice only: without huge pages nothing changes but speed */
  return base;
}

static pthread_mutex_t shared_lock = PTHREAD_MUTEX_INITIALIZER;
static shared_map *shared_now; /* the one that is being cut */

static char *shared_take(size_t total, shared_map **from) {
  char *base = NULL;
  pthread_mutex_lock(&shared_lock);
  shared_map *s = shared_now;
  if (!s || s->used + total > SHARED_BYTES) {
    s = (shared_map *)map_pages(SHARED_BYTES);
    if (!s) goto out;
    s->used = HEADER_BYTES;
    shared_now = s;
  }
  base = (char *)s + s->used;
  s->used += total;
  s->live++;
  *from = s;
out:
  pthread_mutex_unlock(&shared_lock);
  return base;
}

static void shared_give(shared_map *s) {
  pthread_mutex_lock(&shared_lock);
  if (--s->live == 0) {
    if (shared_now == s) shared_now = NULL;
    munmap(s, SHARED_BYTES);
  }
  pthread_mutex_unlock(&shared_lock);
}

void *esp_mem_alloc(esp_mem_kind kind, size_t bytes) {
  if (bytes > SIZE_MAX - HUGE_PAGE - HEADER_BYTES) {
    esp_fail_oom(esp_mem_kind_name(kind), bytes);
    return NULL;
  }
  size_t total = (bytes + HEADER_BYTES + 63) & ~(size_t)63;
  size_t mapped = 0;
  shared_map *shared = NULL;
  char *base;
  if (USE_MAP && kind == ESP_MEM_WEIGHTS && bytes >= SHARE_THRESHOLD && bytes < SHARED_BYTES / 4) {
    base = shared_take(total, &shared);
  } else if (USE_MAP && bytes >= MAP_THRESHOLD) {
    mapped = (total + 4095) & ~(size_t)4095;
    base = map_pages(mapped);
  } else {
    base = aligned_alloc(64, total);
    if (base) memset(base, 0, total);
  }
  if (!base) {
    esp_fail_oom(esp_mem_kind_name(kind), bytes);
    return NULL;
  }
  block_header *h = (block_header *)base;
  h->bytes = bytes;
  h->mapped = mapped;
  h->shared = shared;
  h->kind = (uint32_t)kind;
  h->magic = MAGIC;
  esp_mem_account(kind, (int64_t)bytes);
  return base + HEADER_BYTES;
}

void esp_mem_free(void *ptr) {
  if (!ptr) return;
  block_header *h = header_of(ptr);
  esp_mem_account((esp_mem_kind)h->kind, -(int64_t)h->bytes);
  h->magic = 0;
  if (h->shared)
    shared_give(h->shared);
  else if (h->mapped)
    munmap(h, h->mapped);
  else
    free(h);
}

void *esp_mem_realloc(esp_mem_kind kind, void *ptr, size_t bytes) {
  if (!ptr) return esp_mem_alloc(kind, bytes);
  block_header *h = header_of(ptr);
  size_t keep = h->bytes < bytes ? h->bytes : bytes;
  void *fresh = esp_mem_alloc(kind, bytes);
  if (!fresh) return NULL;
  memcpy(fresh, ptr, keep);
  esp_mem_free(ptr);
  return fresh;
}

char *esp_mem_strdup(esp_mem_kind kind, const char *s) {
  size_t n = strlen(s) + 1;
  char *copy = esp_mem_alloc(kind, n);
  if (copy) memcpy(copy, s, n);
  return copy;
}

char *esp_mem_printf(esp_mem_kind kind, const char *fmt, ...) {
  va_list ap, again;
  va_start(ap, fmt);
  va_copy(again, ap);
  int n = vsnprintf(NULL, 0, fmt, ap);
  va_end(ap);
  char *text = n < 0 ? NULL : esp_mem_alloc(kind, (size_t)n + 1);
  if (text) vsnprintf(text, (size_t)n + 1, fmt, again);
  va_end(again);
  return text;
}

void esp_mem_stats_get(esp_mem_stats *out) {
  for (int k = 0; k < ESP_MEM_KINDS; k++) {
    out->now[k] = atomic_load_explicit(&now_bytes[k], memory_order_relaxed);
    out->peak[k] = atomic_load_explicit(&peak_bytes[k], memory_order_relaxed);
  }
  out->now_total = atomic_load_explicit(&now_total, memory_order_relaxed);
  out->peak_total = atomic_load_explicit(&peak_total, memory_order_relaxed);
  out->now_device = atomic_load_explicit(&now_device, memory_order_relaxed);
  out->peak_device = atomic_load_explicit(&peak_device, memory_order_relaxed);
}

void esp_mem_stats_reset_peak(void) {
  for (int k = 0; k < ESP_MEM_KINDS; k++) atomic_store(&peak_bytes[k], atomic_load(&now_bytes[k]));
  atomic_store(&peak_total, atomic_load(&now_total));
  atomic_store(&peak_device, atomic_load(&now_device));
}

void esp_mem_trim(void) {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

int64_t esp_mem_rss_peak(void) {
  FILE *f = fopen("/proc/self/status", "re");
  if (!f) return 0;
  char line[256];
  long long kib = 0;
  while (fgets(line, sizeof line, f))
    if (sscanf(line, "VmHWM: %lld kB", &kib) == 1) break;
  fclose(f);
  return (int64_t)kib * 1024;
}
