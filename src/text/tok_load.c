/* tok_load.c: vocab and merges of tokenizer.json, read in one forward pass. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "io/json.h"
#include "text/json_scan.h"
#include "text/tok_priv.h"
#include "text/utf8.h"

#define MAX_ID (1 << 24)

int32_t esp_vocab_find(const esp_vocab *v, const char *s, size_t n) {
  uint64_t h = XXH3_64bits(s, n), tag = h & 0xFFFFFFFF00000000ull;
  for (uint64_t i = h & v->mask;; i = (i + 1) & v->mask) {
    uint64_t slot = v->slots[i];
    if (!slot) return -1;
    if ((slot & 0xFFFFFFFF00000000ull) != tag) continue;
    uint32_t id = (uint32_t)slot - 1;
    if (v->length[id] == n && !memcmp(v->pool + v->offset[id], s, n)) return (int32_t)id;
  }
}

typedef struct vocab_item {
  uint32_t offset, length;
  int64_t id;
} vocab_item;

static esp_status vocab_index(esp_vocab *v, const vocab_item *items, int64_t n, const char *path) {
  int64_t top = -1;
  for (int64_t i = 0; i < n; i++) top = items[i].id > top ? items[i].id : top;
  v->n_ids = top + 1;
  v->offset = esp_mem_alloc(ESP_MEM_DATA, (size_t)(top + 2) * sizeof *v->offset);
  v->length = esp_mem_alloc(ESP_MEM_DATA, (size_t)(top + 2) * sizeof *v->length);
  uint64_t size = 16;
  while (size < (uint64_t)n * 2) size *= 2;
  v->slots = esp_mem_alloc(ESP_MEM_DATA, size * sizeof *v->slots);
  if (!v->offset || !v->length || !v->slots) return ESP_ERR_MEMORY;
  v->mask = size - 1;
  memset(v->length, 0xFF, (size_t)(top + 2) * sizeof *v->length);
  for (int64_t i = 0; i < n; i++) {
    const char *s = v->pool + items[i].offset;
    int32_t old = esp_vocab_find(v, s, items[i].length);
    int64_t id = items[i].id;
    if (old >= 0) return esp_fail(ESP_ERR_DATA, "%s: model.vocab: token '%s' twice", path, s);
    if (v->length[id] != UINT32_MAX)
      return esp_fail(ESP_ERR_DATA, "%s: model.vocab: tokens '%s' and '%s' share id %lld", path,
                      v->pool + v->offset[id], s, (long long)id);
    v->offset[id] = items[i].offset;
    v->length[id] = items[i].length;
    uint64_t h = XXH3_64bits(s, items[i].length), at = h & v->mask;
    while (v->slots[at]) at = (at + 1) & v->mask;
    v->slots[at] = (h & 0xFFFFFFFF00000000ull) | (uint64_t)(id + 1);
  }
  v->count = n;
  return ESP_OK;
}

static esp_status load_vocab(esp_tokenizer *t, esp_scan *s) {
  esp_status st = ESP_OK;
  esp_vocab *v = &t->vocab;
  vocab_item *items = NULL;
  int64_t n = 0, cap = 0;
  size_t used = 0;
  if (v->pool) return esp_scan_fail(s, "key 'vocab' twice");
  v->pool = esp_mem_alloc(ESP_MEM_DATA, (size_t)(s->end - s->p) + 8);
  if (!v->pool) return ESP_ERR_MEMORY;
  ESP_GOTO(esp_scan_expect(s, '{'));
  bool more = !esp_scan_take(s, '}');
  while (more) {
    if (n == cap) {
      cap = cap * 2 + 1024;
      void *p = esp_mem_realloc(ESP_MEM_DATA, items, (size_t)cap * sizeof *items);
      if (!p) {
        st = ESP_ERR_MEMORY;
        goto out;
      }
      items = p;
    }
    size_t len;
    ESP_GOTO(esp_scan_string(s, v->pool + used, &len));
    ESP_GOTO(esp_scan_expect(s, ':'));
    items[n] = (vocab_item){(uint32_t)used, (uint32_t)len, 0};
    ESP_GOTO(esp_scan_int(s, &items[n].id));
    if (items[n].id < 0 || items[n].id >= MAX_ID) {
      st = esp_scan_fail(s, "token id out of range");
      goto out;
    }
    used += len + 1;
    n++;
    if (esp_scan_take(s, '}')) break;
    ESP_GOTO(esp_scan_expect(s, ','));
  }
  void *p = esp_mem_realloc(ESP_MEM_DATA, v->pool, used + 1);
  if (p) v->pool = p;
  ESP_GOTO(vocab_index(v, items, n, t->path));
out:
  esp_mem_free(items);
  return st;
}

/* ---- merges: "a b" strings or ["a", "b"] pairs; kept as text until the vocabulary is known ---- */
static esp_status count_merges(esp_scan *s, int64_t *n) {
  *n = 0;
  ESP_TRY(esp_scan_expect(s, '['));
  if (esp_scan_take(s, ']')) return ESP_OK;
  const char *a, *b;
  for (;;) {
    ESP_TRY(esp_scan_skip(s, &a, &b));
    ++*n;
    if (esp_scan_take(s, ']')) return ESP_OK;
    ESP_TRY(esp_scan_expect(s, ','));
  }
}

static void merge_put(esp_bpe *m, int32_t left, int32_t right, int32_t rank, int32_t id) {
  uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
  uint64_t i = (pair * 0x9E3779B97F4A7C15ull) >> m->shift;
  while (m->merges[i].pair != UINT64_MAX && m->merges[i].pair != pair) i = (i + 1) & m->mask;
  m->merges[i] = (esp_merge_slot){pair, rank, id};
}

/* One merge: left and right are in buf (left first, right behind its zero). */
static esp_status load_merge(esp_tokenizer *t, esp_scan *s, char *buf, const char **left, size_t *nl,
                             const char **right, size_t *nr) {
  if (esp_scan_take(s, '[')) {
    ESP_TRY(esp_scan_string(s, buf, nl));
    ESP_TRY(esp_scan_expect(s, ','));
    ESP_TRY(esp_scan_string(s, buf + *nl + 1, nr));
    *left = buf;
    *right = buf + *nl + 1;
    return esp_scan_expect(s, ']');
  }
  size_t n;
  ESP_TRY(esp_scan_string(s, buf, &n));
  char *space = memchr(buf, ' ', n);
  if (!space || memchr(space + 1, ' ', n - (size_t)(space + 1 - buf)))
    return esp_scan_fail(s, "a merge must be two tokens with one space between");
  *space = 0;
  *left = buf;
  *nl = (size_t)(space - buf);
  *right = space + 1;
  *nr = n - *nl - 1;
  return ESP_OK;
}

static bool crosses_mark(const char *left, size_t nl, const char *right, size_t nr) {
  const char *mark = "\xE2\x96\x81";
  bool right_marked = nr >= 3 && !memcmp(right, mark, 3), left_ends = nl >= 3 && !memcmp(left + nl - 3, mark, 3);
  return right_marked && !left_ends;
}

static esp_status load_merges(esp_tokenizer *t, esp_scan *s, int64_t n) {
  esp_status st = ESP_OK;
  esp_bpe *m = &t->bpe;
  int bits = 4;
  while ((1ll << bits) < n * 2) bits++;
  m->mask = (1ull << bits) - 1;
  m->shift = 64 - bits;
  m->merges = esp_mem_alloc(ESP_MEM_DATA, sizeof *m->merges << bits);
  char *buf = esp_mem_alloc(ESP_MEM_DATA, (size_t)(s->end - s->p) + 16), *joined = NULL;
  size_t cap_joined = 0;
  if (!m->merges || !buf) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  memset(m->merges, 0xFF, sizeof *m->merges << bits);
  m->space_cut = esp_vocab_find(&t->vocab, "\xE2\x96\x81", 3) >= 0;
  ESP_GOTO(esp_scan_expect(s, '['));
  for (int64_t i = 0; i < n; i++) {
    const char *left = NULL, *right = NULL;
    size_t nl = 0, nr = 0;
    if (i) ESP_GOTO(esp_scan_expect(s, ','));
    ESP_GOTO(load_merge(t, s, buf, &left, &nl, &right, &nr));
    size_t cut = nr >= m->n_prefix ? m->n_prefix : 0;
    if (nl + nr + 1 > cap_joined) {
      cap_joined = (nl + nr) * 2 + 64;
      void *p = esp_mem_realloc(ESP_MEM_DATA, joined, cap_joined);
      if (!p) {
        st = ESP_ERR_MEMORY;
        goto out;
      }
      joined = p;
    }
    memcpy(joined, left, nl);
    memcpy(joined + nl, right + cut, nr - cut);
    int32_t a = esp_vocab_find(&t->vocab, left, nl), b = esp_vocab_find(&t->vocab, right, nr);
    int32_t c = esp_vocab_find(&t->vocab, joined, nl + nr - cut);
    if (a < 0 || b < 0 || c < 0) {
      st = esp_fail(ESP_ERR_DATA, "%s: model.merges[%lld]: '%s' + '%s': %s is not in the vocabulary", t->path,
                    (long long)i, left, right,
                    a < 0   ? "the first"
                    : b < 0 ? "the second"
                            : "their union");
      goto out;
    }
    if (m->space_cut && crosses_mark(left, nl, right, nr)) m->space_cut = false;
    merge_put(m, a, b, (int32_t)i, c);
  }
out:
  esp_mem_free(buf);
  esp_mem_free(joined);
  return st;
}

/* ---- the small keys ---- */
static esp_status optional_string(esp_tokenizer *t, const json_t *o, const char *key, const char **out, size_t *n) {
  const char *s = NULL;
  ESP_TRY(esp_json_str(o, key, t->path, 0, &s));
  *n = s ? strlen(s) : 0;
  *out = "";
  if (s && !(*out = esp_arena_strdup(t->arena, s))) return ESP_ERR_MEMORY;
  return ESP_OK;
}

static esp_status optional_bool(esp_tokenizer *t, const json_t *o, const char *key, bool *out) {
  int v = *out;
  ESP_TRY(esp_json_bool(o, key, t->path, 0, &v));
  *out = v != 0;
  return ESP_OK;
}

static esp_status known_keys(esp_tokenizer *t, const json_t *o, const char *const *names) {
  const char *key;
  json_t *value;
  json_object_foreach((json_t *)o, key, value) {
    bool known = false;
    for (int i = 0; names[i]; i++) known = known || !strcmp(names[i], key);
    if (!known) return esp_fail(ESP_ERR_DATA, "%s: model: key '%s' is not understood", t->path, key);
  }
  return ESP_OK;
}

static esp_status unknown_token(esp_tokenizer *t, const json_t *o, bool required, int32_t *out) {
  const char *unk = NULL;
  ESP_TRY(esp_json_str(o, "unk_token", t->path, required, &unk));
  *out = -1;
  if (!unk) return ESP_OK;
  *out = esp_vocab_find(&t->vocab, unk, strlen(unk));
  if (*out < 0) return esp_fail(ESP_ERR_DATA, "%s: model.unk_token '%s' is not in the vocabulary", t->path, unk);
  return ESP_OK;
}

static esp_status bpe_options(esp_tokenizer *t, const json_t *o) {
  static const char *const names[] = {"type",     "dropout",       "unk_token",     "continuing_subword_prefix",
                                      "fuse_unk", "byte_fallback", "ignore_merges", "end_of_word_suffix",
                                      NULL};
  esp_bpe *m = &t->bpe;
  double dropout = 0;
  ESP_TRY(known_keys(t, o, names));
  ESP_TRY(esp_json_f64(o, "dropout", t->path, 0, &dropout));
  if (dropout != 0) return esp_fail(ESP_ERR_DATA, "%s: model.dropout is not supported", t->path);
  ESP_TRY(optional_bool(t, o, "fuse_unk", &m->fuse_unk));
  ESP_TRY(optional_bool(t, o, "byte_fallback", &m->byte_fallback));
  ESP_TRY(optional_bool(t, o, "ignore_merges", &m->ignore_merges));
  ESP_TRY(optional_string(t, o, "continuing_subword_prefix", &m->prefix, &m->n_prefix));
  ESP_TRY(optional_string(t, o, "end_of_word_suffix", &m->suffix, &m->n_suffix));
  ESP_TRY(unknown_token(t, o, false, &m->unk));
  for (int b = 0; b < 256; b++) {
    char name[8];
    int n = snprintf(name, sizeof name, "<0x%02X>", b);
    m->fallback_id[b] = esp_vocab_find(&t->vocab, name, (size_t)n);
    n = esp_utf8_put(name, esp_byte_to_cp((unsigned char)b));
    m->byte_id[b] = esp_vocab_find(&t->vocab, name, (size_t)n);
    name[0] = (char)b;
    if (b < 128) m->ascii_id[b] = esp_vocab_find(&t->vocab, name, 1);
  }
  return ESP_OK;
}

static esp_status wordpiece_options(esp_tokenizer *t, const json_t *o) {
  static const char *const names[] = {"type", "unk_token", "continuing_subword_prefix", "max_input_chars_per_word",
                                      NULL};
  ESP_TRY(known_keys(t, o, names));
  t->wordpiece = true;
  t->wp.max_chars = 100;
  ESP_TRY(esp_json_i64(o, "max_input_chars_per_word", t->path, 0, &t->wp.max_chars));
  ESP_TRY(optional_string(t, o, "continuing_subword_prefix", &t->wp.prefix, &t->wp.n_prefix));
  return unknown_token(t, o, true, &t->wp.unk);
}

esp_status esp_tok_load_model(esp_tokenizer *t, const char *json, size_t n, const char *path) {
  esp_status st = ESP_OK;
  esp_scan s = {json, json, json + n, path};
  esp_strbuf rest; /* the object without vocab and merges */
  esp_strbuf_init(&rest);
  json_t *o = NULL;
  const char *merges = NULL, *merges_end = NULL, *a, *b;
  char *key = esp_mem_alloc(ESP_MEM_DATA, n + 8);
  size_t key_n;
  int64_t n_merges = 0;
  bool any = false;
  if (!key) return ESP_ERR_MEMORY;
  esp_strbuf_putc(&rest, '{');
  ESP_GOTO(esp_scan_expect(&s, '{'));
  bool more = !esp_scan_take(&s, '}');
  while (more) {
    ESP_GOTO(esp_scan_string(&s, key, &key_n));
    ESP_GOTO(esp_scan_expect(&s, ':'));
    esp_scan_space(&s);
    if (!strcmp(key, "vocab") && s.p < s.end && *s.p == '{') {
      ESP_GOTO(load_vocab(t, &s));
    } else if (!strcmp(key, "vocab")) {
      st = esp_fail(ESP_ERR_DATA, "%s: model of type Unigram is not understood (vocab is a list)", path);
      goto out;
    } else if (!strcmp(key, "merges")) {
      merges = s.p;
      ESP_GOTO(count_merges(&s, &n_merges));
      merges_end = s.p;
    } else {
      ESP_GOTO(esp_scan_skip(&s, &a, &b));
      if (any) esp_strbuf_putc(&rest, ',');
      any = true;
      esp_strbuf_json(&rest, key, key_n);
      esp_strbuf_putc(&rest, ':');
      esp_strbuf_add(&rest, a, (size_t)(b - a));
    }
    if (esp_scan_take(&s, '}')) break;
    ESP_GOTO(esp_scan_expect(&s, ','));
  }
  esp_strbuf_putc(&rest, '}');
  if (rest.failed) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  ESP_GOTO(esp_json_parse(rest.data, rest.len, path, &o));
  if (!t->vocab.pool) {
    st = esp_fail(ESP_ERR_DATA, "%s: model has no vocab", path);
    goto out;
  }
  /* Files of before 2021 have no type: merges tell. */
  const char *type = merges ? "BPE" : "WordPiece";
  ESP_GOTO(esp_json_str(o, "type", path, 0, &type));
  if (!strcmp(type, "BPE")) {
    if (!merges) {
      st = esp_fail(ESP_ERR_DATA, "%s: model has no merges", path);
      goto out;
    }
    ESP_GOTO(bpe_options(t, o));
    esp_scan ms = {json, merges, merges_end, path};
    ESP_GOTO(load_merges(t, &ms, n_merges));
    esp_bpe *m = &t->bpe;
    m->space_cut = m->space_cut && !m->ignore_merges && !m->n_prefix && !m->n_suffix;
  } else if (!strcmp(type, "WordPiece")) {
    ESP_GOTO(wordpiece_options(t, o));
  } else {
    st = esp_fail(ESP_ERR_DATA, "%s: model of type %s is not understood", path, type);
  }
out:
  json_decref(o);
  esp_mem_free(key);
  esp_strbuf_deinit(&rest);
  return st;
}
