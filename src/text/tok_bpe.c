/* tok_bpe.c: byte-pair encoding of one piece: a cache of whole words in front of the merge loop. The merge order is the
 * one of the `tokenizers` package: lowest rank first, leftmost among equals. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "text/tok_priv.h"
#include "text/utf8.h"

static inline const esp_merge_slot *merge_find(const esp_bpe *m, int32_t left, int32_t right) {
  uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
  uint64_t i = (pair * 0x9E3779B97F4A7C15ull) >> m->shift;
  for (;; i = (i + 1) & m->mask) {
    if (m->merges[i].pair == pair) return &m->merges[i];
    if (m->merges[i].pair == UINT64_MAX) return NULL;
  }
}

/* ---- few symbols: scan for the lowest rank, merge, repeat ---- */
#define SMALL 40

static int merge_small(const esp_bpe *m, int32_t *ids, int n) {
  const esp_merge_slot *slot[SMALL];
  for (int i = 0; i + 1 < n; i++) slot[i] = merge_find(m, ids[i], ids[i + 1]);
  while (n > 1) {
    int best = -1;
    int32_t rank = INT32_MAX;
    for (int i = 0; i + 1 < n; i++)
      if (slot[i] && slot[i]->rank < rank) {
        rank = slot[i]->rank;
        best = i;
      }
    if (best < 0) break;
    ids[best] = slot[best]->id;
    n--;
    for (int i = best + 1; i < n; i++) ids[i] = ids[i + 1];
    for (int i = best + 1; i + 1 < n; i++) slot[i] = slot[i + 1];
    if (best > 0) slot[best - 1] = merge_find(m, ids[best - 1], ids[best]);
    if (best + 1 < n) slot[best] = merge_find(m, ids[best], ids[best + 1]);
  }
  return n;
}

/* ---- many symbols: linked list and heap, O(n log n) ---- */
static bool heap_less(const struct esp_heap_item *a, const struct esp_heap_item *b) {
  return a->rank < b->rank || (a->rank == b->rank && a->pos < b->pos);
}

static esp_status heap_push(esp_encoder *e, const esp_bpe *m, int64_t pos) {
  struct esp_symbol *s = &e->symbols[pos];
  if (s->next < 0) return ESP_OK;
  const esp_merge_slot *slot = merge_find(m, s->id, e->symbols[s->next].id);
  if (!slot) return ESP_OK;
  if (e->n_heap == e->cap_heap) {
    int64_t cap = e->cap_heap * 2 + 256;
    void *p = esp_mem_realloc(ESP_MEM_DATA, e->heap, (size_t)cap * sizeof *e->heap);
    if (!p) return ESP_ERR_MEMORY;
    e->heap = p;
    e->cap_heap = cap;
  }
  struct esp_heap_item item = {slot->rank, (int32_t)pos, slot->id, s->id, e->symbols[s->next].id};
  int64_t i = e->n_heap++;
  while (i > 0 && heap_less(&item, &e->heap[(i - 1) / 2])) {
    e->heap[i] = e->heap[(i - 1) / 2];
    i = (i - 1) / 2;
  }
  e->heap[i] = item;
  return ESP_OK;
}

static struct esp_heap_item heap_pop(esp_encoder *e) {
  struct esp_heap_item top = e->heap[0], last = e->heap[--e->n_heap];
  int64_t i = 0, n = e->n_heap;
  for (;;) {
    int64_t c = 2 * i + 1;
    if (c >= n) break;
    if (c + 1 < n && heap_less(&e->heap[c + 1], &e->heap[c])) c++;
    if (!heap_less(&e->heap[c], &last)) break;
    e->heap[i] = e->heap[c];
    i = c;
  }
  e->heap[i] = last;
  return top;
}

/* Merges e->symbols[0..n), which hold the starting ids, and appends what remains to out. */
static esp_status merge_large(const esp_bpe *m, esp_encoder *e, int64_t n, esp_ids *out) {
  e->n_heap = 0;
  for (int64_t i = 0; i < n; i++) {
    e->symbols[i].prev = (int32_t)(i - 1);
    e->symbols[i].next = i + 1 < n ? (int32_t)(i + 1) : -1;
  }
  for (int64_t i = 0; i < n; i++) ESP_TRY(heap_push(e, m, i));
  while (e->n_heap) {
    struct esp_heap_item top = heap_pop(e);
    struct esp_symbol *s = &e->symbols[top.pos];
    /* Stale when either side has changed since (a swallowed symbol has id -1). */
    if (s->id != top.left || s->next < 0 || e->symbols[s->next].id != top.right) continue;
    struct esp_symbol *right = &e->symbols[s->next];
    s->id = top.id;
    s->next = right->next;
    right->id = -1;
    if (s->next >= 0) e->symbols[s->next].prev = top.pos;
    if (s->prev >= 0) ESP_TRY(heap_push(e, m, s->prev));
    ESP_TRY(heap_push(e, m, top.pos));
  }
  for (int64_t i = 0; i >= 0; i = e->symbols[i].next) ESP_TRY(esp_ids_push(out, e->symbols[i].id));
  return ESP_OK;
}

static esp_status symbols_reserve(esp_encoder *e, int64_t n) {
  if (n <= e->cap_symbols) return ESP_OK;
  int64_t cap = n + n / 2 + 256;
  void *p = esp_mem_realloc(ESP_MEM_DATA, e->symbols, (size_t)cap * sizeof *e->symbols);
  if (!p) return ESP_ERR_MEMORY;
  e->symbols = p;
  e->cap_symbols = cap;
  return ESP_OK;
}

/* Starting symbols of a piece of characters: the character's token, else its bytes, else the unknown token (runs of
 * which may be fused), else nothing. e->symbols must have room for n + 1. */
static esp_status start_chars(const esp_tokenizer *t, esp_encoder *e, const char *s, size_t n, int64_t *count) {
  const esp_bpe *m = &t->bpe;
  int64_t k = 0;
  bool unknown = false; /* an unknown token is due */
  for (size_t at = 0; at < n;) {
    int len;
    esp_utf8_get(s + at, &len);
    const char *key = s + at;
    size_t key_n = (size_t)len;
    bool first = at == 0, last = at + (size_t)len == n;
    if ((m->n_prefix && !first) || (m->n_suffix && last)) {
      esp_strbuf_clear(&e->mapped);
      if (m->n_prefix && !first) esp_strbuf_add(&e->mapped, m->prefix, m->n_prefix);
      esp_strbuf_add(&e->mapped, s + at, (size_t)len);
      if (m->n_suffix && last) esp_strbuf_add(&e->mapped, m->suffix, m->n_suffix);
      if (e->mapped.failed) return ESP_ERR_MEMORY;
      key = e->mapped.data;
      key_n = e->mapped.len;
      ESP_TRY(symbols_reserve(e, k + (int64_t)(n - at + key_n) + 2));
    }
    int32_t id = key == s + at && len == 1 ? m->ascii_id[(unsigned char)s[at]] : esp_vocab_find(&t->vocab, key, key_n);
    at += (size_t)len;
    if (id >= 0) {
      if (unknown) e->symbols[k++].id = m->unk;
      unknown = false;
      e->symbols[k++].id = id;
      continue;
    }
    if (m->byte_fallback) {
      bool all = true;
      for (size_t b = 0; b < key_n; b++) all = all && m->fallback_id[(unsigned char)key[b]] >= 0;
      if (all) {
        for (size_t b = 0; b < key_n; b++) e->symbols[k++].id = m->fallback_id[(unsigned char)key[b]];
        continue;
      }
    }
    if (m->unk < 0) continue;
    if (unknown && !m->fuse_unk) e->symbols[k++].id = m->unk;
    unknown = true;
  }
  if (unknown) e->symbols[k++].id = m->unk;
  *count = k;
  return ESP_OK;
}

static esp_status merge_piece(const esp_tokenizer *t, esp_encoder *e, const char *s, size_t n, esp_ids *out) {
  const esp_bpe *m = &t->bpe;
  if (m->ignore_merges) {
    const char *key = s;
    size_t key_n = n;
    if (m->bytes) {
      esp_strbuf_clear(&e->mapped);
      esp_byte_map(s, n, &e->mapped);
      if (e->mapped.failed) return ESP_ERR_MEMORY;
      key = e->mapped.data;
      key_n = e->mapped.len;
    }
    int32_t id = esp_vocab_find(&t->vocab, key, key_n);
    if (id >= 0) return esp_ids_push(out, id);
  }
  if (m->bytes && n <= SMALL) {
    ESP_TRY(esp_ids_reserve(out, SMALL));
    int32_t *ids = out->data + out->n;
    for (size_t i = 0; i < n; i++) ids[i] = m->byte_id[(unsigned char)s[i]];
    out->n += merge_small(m, ids, (int)n);
    return ESP_OK;
  }
  if (n >= INT32_MAX / 2) return esp_fail(ESP_ERR_DATA, "a piece of %zu bytes is too long to tokenise", n);
  ESP_TRY(symbols_reserve(e, (int64_t)n + 2));
  int64_t count = (int64_t)n;
  if (m->bytes)
    for (size_t i = 0; i < n; i++) e->symbols[i].id = m->byte_id[(unsigned char)s[i]];
  else
    ESP_TRY(start_chars(t, e, s, n, &count));
  if (count == 0) return ESP_OK;
  if (count > SMALL) return merge_large(m, e, count, out);
  ESP_TRY(esp_ids_reserve(out, SMALL));
  int32_t *ids = out->data + out->n;
  for (int64_t i = 0; i < count; i++) ids[i] = e->symbols[i].id;
  out->n += merge_small(m, ids, (int)count);
  return ESP_OK;
}

#define CACHE_BITS 17

static inline uint64_t load64(const char *p) {
  uint64_t v;
  memcpy(&v, p, 8);
  return v;
}
static inline uint32_t load32(const char *p) {
  uint32_t v;
  memcpy(&v, p, 4);
  return v;
}

/* Equality of two strings of n <= ESP_CACHE_KEY bytes without a call. */
static inline bool same_key(const char *a, const char *b, size_t n) {
  if (n >= 8) {
    if (load64(a) != load64(b) || load64(a + n - 8) != load64(b + n - 8)) return false;
    return n <= 16 || load64(a + 8) == load64(b + 8);
  }
  if (n >= 4) return load32(a) == load32(b) && load32(a + n - 4) == load32(b + n - 4);
  return a[0] == b[0] && a[n - 1] == b[n - 1] && a[n / 2] == b[n / 2];
}

/* Words recur: most pieces are one hash and one cache line. */
esp_status esp_cached_piece(const esp_tokenizer *t, esp_encoder *e, const char *s, size_t n, esp_ids *out) {
  if (n > ESP_CACHE_KEY) return t->wordpiece ? esp_wordpiece_piece(t, s, n, out) : merge_piece(t, e, s, n, out);
  if (!e->cache) {
    e->cache = esp_mem_alloc(ESP_MEM_DATA, sizeof(esp_cache_slot) << CACHE_BITS);
    if (!e->cache) return ESP_ERR_MEMORY;
  }
  uint64_t hash = XXH3_64bits(s, n);
  esp_cache_slot *slot = &e->cache[hash >> (64 - CACHE_BITS)];
  if (slot->hash == hash && slot->len == n && same_key(slot->key, s, n)) {
    if (out->n + ESP_CACHE_IDS > out->cap) ESP_TRY(esp_ids_reserve(out, ESP_CACHE_IDS));
    memcpy(out->data + out->n, slot->ids, sizeof slot->ids); /* always all: the rest is overwritten or beyond n */
    out->n += slot->n;
    return ESP_OK;
  }
  int64_t before = out->n;
  ESP_TRY(t->wordpiece ? esp_wordpiece_piece(t, s, n, out) : merge_piece(t, e, s, n, out));
  int64_t made = out->n - before;
  if (made > ESP_CACHE_IDS) return ESP_OK;
  slot->hash = hash;
  slot->len = (uint8_t)n;
  slot->n = (uint8_t)made;
  memcpy(slot->key, s, n);
  if (made) memcpy(slot->ids, out->data + before, (size_t)made * sizeof *slot->ids);
  return ESP_OK;
}

esp_status esp_bpe_piece(const esp_tokenizer *t, esp_encoder *e, const char *s, size_t n, esp_ids *out) {
  if (n == 0) return ESP_OK;
  if (!t->bpe.space_cut) return esp_cached_piece(t, e, s, n, out);
  /* U+2581 is E2 96 81: cut before each run of them. */
  size_t from = 0;
  for (;;) {
    size_t at = from;
    while (n - at >= 3 && !memcmp(s + at, "\xE2\x96\x81", 3)) at += 3;
    const char *mark = at < n ? memmem(s + at, n - at, "\xE2\x96\x81", 3) : NULL;
    size_t end = mark ? (size_t)(mark - s) : n;
    ESP_TRY(esp_cached_piece(t, e, s + from, end - from, out));
    if (!mark) return ESP_OK;
    from = end;
  }
}
