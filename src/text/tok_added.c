/* tok_added.c: added tokens are found in the text before anything else sees it: leftmost, then longest. */
#include "text/tok_priv.h"
#include "text/utf8.h"

static uint32_t trie_node(esp_trie *t, unsigned char byte) {
  if (t->n + 1 >= t->cap) {
    uint32_t cap = t->cap * 2 + 64;
    void *p = esp_mem_realloc(ESP_MEM_DATA, t->nodes, cap * sizeof *t->nodes);
    if (!p) return 0;
    t->nodes = p;
    t->cap = cap;
  }
  uint32_t i = ++t->n; /* node 0 is never used */
  memset(&t->nodes[i], 0, sizeof t->nodes[i]);
  t->nodes[i].byte = byte;
  return i;
}

static uint32_t child_of(const esp_trie *t, uint32_t node, unsigned char byte) {
  uint32_t c = t->nodes[node].child;
  while (c && t->nodes[c].byte != byte) c = t->nodes[c].sibling;
  return c;
}

esp_status esp_trie_add(esp_trie *t, const char *s, size_t n, int added) {
  uint32_t at = t->first[(unsigned char)s[0]];
  if (!at) {
    at = trie_node(t, (unsigned char)s[0]);
    if (!at) return ESP_ERR_MEMORY;
    t->first[(unsigned char)s[0]] = at;
  }
  for (size_t i = 1; i < n; i++) {
    uint32_t c = child_of(t, at, (unsigned char)s[i]);
    if (!c) {
      c = trie_node(t, (unsigned char)s[i]);
      if (!c) return ESP_ERR_MEMORY;
      t->nodes[c].sibling = t->nodes[at].child;
      t->nodes[at].child = c;
    }
    at = c;
  }
  if (!t->nodes[at].added) t->nodes[at].added = added + 1; /* equal contents: the first one counts */
  return ESP_OK;
}

void esp_trie_deinit(esp_trie *t) {
  esp_mem_free(t->nodes);
  memset(t, 0, sizeof *t);
}

static bool alone(const char *text, size_t n, size_t start, size_t stop) {
  int len;
  if (start > 0 && esp_cp_word(esp_utf8_get(text + start - esp_utf8_back(text + start), &len))) return false;
  return stop == n || !esp_cp_word(esp_utf8_get(text + stop, &len));
}

bool esp_trie_find(const esp_trie *t, const esp_added *added, const char *text, size_t n, size_t from, size_t *start,
                   size_t *stop, int *index) {
  if (!t->n) return false;
  for (size_t at = from; at < n; at++) {
    uint32_t node = t->first[(unsigned char)text[at]];
    if (!node) continue;
    int found = 0;
    size_t end = at;
    for (size_t i = at;;) {
      i++;
      if (t->nodes[node].added) {
        found = t->nodes[node].added;
        end = i;
      }
      if (i >= n || !(node = child_of(t, node, (unsigned char)text[i]))) break;
    }
    if (!found) continue;
    const esp_added *a = &added[found - 1];
    if (a->single_word && !alone(text, n, at, end)) {
      at = end - 1; /* a discarded match still takes its place */
      continue;
    }
    int len;
    if (a->lstrip)
      while (at > from && esp_cp_space(esp_utf8_get(text + at - esp_utf8_back(text + at), &len)))
        at -= (size_t)esp_utf8_back(text + at);
    if (a->rstrip)
      while (end < n && esp_cp_space(esp_utf8_get(text + end, &len))) end += (size_t)len;
    *start = at;
    *stop = end;
    *index = found - 1;
    return true;
  }
  return false;
}
