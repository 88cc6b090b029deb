#include "core/map.h"

#include <stdint.h>
#include <string.h>
#include <xxhash.h>

#include "core/mem.h"

typedef struct map_slot {
  const char *key; /* NULL: empty */
  size_t len;
  uint64_t hash;
  void *value;
} map_slot;

struct esp_map {
  map_slot *slots;
  size_t cap, count; /* cap is a power of two, load below 3/4 */
};

esp_map *esp_map_create(size_t expected) {
  size_t cap = 16;
  while (cap / 4 * 3 <= expected) cap *= 2;
  esp_map *m = esp_mem_alloc(ESP_MEM_HOST, sizeof *m);
  if (!m) return NULL;
  m->slots = esp_mem_alloc(ESP_MEM_HOST, cap * sizeof *m->slots);
  if (!m->slots) {
    esp_mem_free(m);
    return NULL;
  }
  m->cap = cap;
  return m;
}

void esp_map_destroy(esp_map *m) {
  if (!m) return;
  esp_mem_free(m->slots);
  esp_mem_free(m);
}

/* The slot of the key, or the empty slot where it belongs. */
static map_slot *probe(map_slot *slots, size_t cap, const char *key, size_t len, uint64_t hash) {
  for (size_t i = hash & (cap - 1);; i = (i + 1) & (cap - 1)) {
    map_slot *s = &slots[i];
    if (!s->key) return s;
    if (s->hash == hash && s->len == len && memcmp(s->key, key, len) == 0) return s;
  }
}

static bool grow(esp_map *m) {
  size_t cap = m->cap * 2;
  map_slot *slots = esp_mem_alloc(ESP_MEM_HOST, cap * sizeof *slots);
  if (!slots) return false;
  for (size_t i = 0; i < m->cap; i++) {
    map_slot *s = &m->slots[i];
    if (s->key) *probe(slots, cap, s->key, s->len, s->hash) = *s;
  }
  esp_mem_free(m->slots);
  m->slots = slots;
  m->cap = cap;
  return true;
}

bool esp_map_put(esp_map *m, const char *key, size_t key_len, void *value) {
  uint64_t hash = XXH3_64bits(key, key_len);
  map_slot *s = probe(m->slots, m->cap, key, key_len, hash);
  if (s->key) {
    s->value = value;
    return true;
  }
  if ((m->count + 1) > m->cap / 4 * 3) {
    if (!grow(m)) return false;
    s = probe(m->slots, m->cap, key, key_len, hash);
  }
  *s = (map_slot){key, key_len, hash, value};
  m->count++;
  return true;
}

void *esp_map_get(const esp_map *m, const char *key, size_t key_len) {
  map_slot *s = probe(m->slots, m->cap, key, key_len, XXH3_64bits(key, key_len));
  return s->key ? s->value : NULL;
}

bool esp_map_has(const esp_map *m, const char *key, size_t key_len) {
  return probe(m->slots, m->cap, key, key_len, XXH3_64bits(key, key_len))->key != NULL;
}

size_t esp_map_count(const esp_map *m) {
  return m->count;
}

/* Levenshtein with transpositions of neighbours (the commonest slip of the fingers) counted as one. Words beyond 63
 * bytes are compared by their first 63. */
int esp_edit_distance(const char *a, const char *b) {
  enum { MOST = 64 };
  int n = (int)strnlen(a, MOST - 1), m = (int)strnlen(b, MOST - 1);
  int rows[3][MOST];
  for (int j = 0; j <= m; j++) rows[0][j] = j;
  for (int i = 1; i <= n; i++) {
    int *row = rows[i % 3], *up = rows[(i + 2) % 3], *up2 = rows[(i + 1) % 3];
    row[0] = i;
    for (int j = 1; j <= m; j++) {
      int best = up[j - 1] + (a[i - 1] != b[j - 1]);
      if (up[j] + 1 < best) best = up[j] + 1;
      if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && up2[j - 2] + 1 < best)
        best = up2[j - 2] + 1;
      row[j] = best;
    }
  }
  return rows[n % 3][m];
}

const char *esp_closest(const char *word, const char *const *names, int n) {
  const char *best = NULL;
  int least = 4, length = (int)strlen(word);
  for (int i = 0; i < n; i++) {
    int d = esp_edit_distance(word, names[i]);
    if (d < least && 3 * d <= length) {
      least = d;
      best = names[i];
    }
  }
  return best;
}
