/* bpe_train.c: byte-level BPE from text (Sennrich et al. 2016), in the order of the `tokenizers` trainer: the most
 * frequent pair first, of equals the one with the smallest ids. The result depends on the text alone. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "io/file.h"
#include "text/tok_priv.h"
#include "text/utf8.h"

typedef struct word {
  int32_t *ids; /* into the pool of all words */
  int32_t n;
  int64_t count;
} word;

typedef struct pair_info {
  uint64_t pair; /* left << 32 | right */
  int64_t count;
  int32_t *words; /* that hold, or once held, the pair; a word may be listed twice */
  int32_t n, cap;
} pair_info;

typedef struct heap_item {
  int64_t count;
  uint64_t pair;
} heap_item;

typedef struct trainer {
  word *words;
  int64_t n_words, cap_words;
  int64_t *word_slots; /* hash -> word + 1 */
  uint64_t word_mask;
  const char **word_text;
  int32_t *pool;
  pair_info *pairs;
  int64_t n_pairs, cap_pairs;
  int64_t *pair_slots; /* hash -> pair + 1 */
  uint64_t pair_mask;
  heap_item *heap;
  int64_t n_heap, cap_heap;
  esp_strbuf *tokens; /* by id: raw bytes of the token */
  int n_tokens;
  esp_strbuf merges; /* JSON */
} trainer;

static esp_status grow(void *slot, int64_t *cap, size_t size) {
  void **p = slot;
  int64_t bigger = *cap * 2 + 64;
  void *q = esp_mem_realloc(ESP_MEM_DATA, *p, (size_t)bigger * size);
  if (!q) return ESP_ERR_MEMORY;
  *p = q;
  *cap = bigger;
  return ESP_OK;
}

/* ---- words and their counts ---- */
static esp_status word_slots_grow(trainer *t) {
  uint64_t size = t->word_slots ? (t->word_mask + 1) * 2 : 4096;
  esp_mem_free(t->word_slots);
  t->word_slots = esp_mem_alloc(ESP_MEM_DATA, size * sizeof *t->word_slots);
  if (!t->word_slots) return ESP_ERR_MEMORY;
  t->word_mask = size - 1;
  for (int64_t w = 0; w < t->n_words; w++) {
    uint64_t i = XXH3_64bits(t->word_text[w], (size_t)t->words[w].n) & t->word_mask;
    while (t->word_slots[i]) i = (i + 1) & t->word_mask;
    t->word_slots[i] = w + 1;
  }
  return ESP_OK;
}

static esp_status count_word(trainer *t, const char *s, int32_t n) {
  if (!t->word_slots || (uint64_t)t->n_words * 2 > t->word_mask) ESP_TRY(word_slots_grow(t));
  uint64_t i = XXH3_64bits(s, (size_t)n) & t->word_mask;
  for (; t->word_slots[i]; i = (i + 1) & t->word_mask) {
    int64_t w = t->word_slots[i] - 1;
    if (t->words[w].n == n && !memcmp(t->word_text[w], s, (size_t)n)) {
      t->words[w].count++;
      return ESP_OK;
    }
  }
  if (t->n_words == t->cap_words) {
    int64_t cap = t->cap_words;
    ESP_TRY(grow(&t->words, &cap, sizeof *t->words));
    ESP_TRY(grow(&t->word_text, &t->cap_words, sizeof *t->word_text));
  }
  t->word_text[t->n_words] = s;
  t->words[t->n_words] = (word){NULL, n, 1};
  t->word_slots[i] = ++t->n_words;
  return ESP_OK;
}

/* ---- pairs ---- */
static esp_status pair_slots_grow(trainer *t) {
  uint64_t size = t->pair_slots ? (t->pair_mask + 1) * 2 : 4096;
  esp_mem_free(t->pair_slots);
  t->pair_slots = esp_mem_alloc(ESP_MEM_DATA, size * sizeof *t->pair_slots);
  if (!t->pair_slots) return ESP_ERR_MEMORY;
  t->pair_mask = size - 1;
  for (int64_t p = 0; p < t->n_pairs; p++) {
    uint64_t i = XXH3_64bits(&t->pairs[p].pair, 8) & t->pair_mask;
    while (t->pair_slots[i]) i = (i + 1) & t->pair_mask;
    t->pair_slots[i] = p + 1;
  }
  return ESP_OK;
}

static esp_status pair_get(trainer *t, uint64_t pair, pair_info **out) {
  if (!t->pair_slots || (uint64_t)t->n_pairs * 2 > t->pair_mask) ESP_TRY(pair_slots_grow(t));
  uint64_t i = XXH3_64bits(&pair, 8) & t->pair_mask;
  for (; t->pair_slots[i]; i = (i + 1) & t->pair_mask)
    if (t->pairs[t->pair_slots[i] - 1].pair == pair) {
      *out = &t->pairs[t->pair_slots[i] - 1];
      return ESP_OK;
    }
  if (t->n_pairs == t->cap_pairs) ESP_TRY(grow(&t->pairs, &t->cap_pairs, sizeof *t->pairs));
  t->pairs[t->n_pairs] = (pair_info){.pair = pair};
  t->pair_slots[i] = t->n_pairs + 1;
  *out = &t->pairs[t->n_pairs++];
  return ESP_OK;
}

static esp_status pair_add(trainer *t, int32_t left, int32_t right, int64_t count, int64_t w) {
  pair_info *p;
  ESP_TRY(pair_get(t, (uint64_t)(uint32_t)left << 32 | (uint32_t)right, &p));
  p->count += count;
  if (count < 0 || (p->n && p->words[p->n - 1] == w)) return ESP_OK;
  if (p->n == p->cap) {
    int64_t cap = p->cap;
    ESP_TRY(grow(&p->words, &cap, sizeof *p->words));
    p->cap = (int32_t)cap;
  }
  p->words[p->n++] = (int32_t)w;
  return ESP_OK;
}

/* ---- heap: largest count first, then smallest pair ---- */
static bool before(const heap_item *a, const heap_item *b) {
  return a->count > b->count || (a->count == b->count && a->pair < b->pair);
}

static esp_status heap_push(trainer *t, int64_t count, uint64_t pair) {
  if (t->n_heap == t->cap_heap) ESP_TRY(grow(&t->heap, &t->cap_heap, sizeof *t->heap));
  heap_item item = {count, pair};
  int64_t i = t->n_heap++;
  while (i && before(&item, &t->heap[(i - 1) / 2])) {
    t->heap[i] = t->heap[(i - 1) / 2];
    i = (i - 1) / 2;
  }
  t->heap[i] = item;
  return ESP_OK;
}

static heap_item heap_pop(trainer *t) {
  heap_item top = t->heap[0], last = t->heap[--t->n_heap];
  int64_t i = 0;
  for (int64_t c; (c = 2 * i + 1) < t->n_heap; i = c) {
    if (c + 1 < t->n_heap && before(&t->heap[c + 1], &t->heap[c])) c++;
    if (!before(&t->heap[c], &last)) break;
    t->heap[i] = t->heap[c];
  }
  t->heap[i] = last;
  return top;
}

/* ---- one merge ---- */
/* Replaces (left, right) by id in word w; counts of the neighbouring pairs follow. New pairs go onto the heap once the
 * whole merge is done: `fresh` collects them. */
static esp_status merge_word(trainer *t, int64_t w, int32_t left, int32_t right, int32_t id, esp_ids *fresh) {
  word *x = &t->words[w];
  int32_t n = 0;
  for (int32_t i = 0; i < x->n;) {
    if (i + 1 < x->n && x->ids[i] == left && x->ids[i + 1] == right) {
      if (n) {
        ESP_TRY(pair_add(t, x->ids[n - 1], left, -x->count, w));
        ESP_TRY(pair_add(t, x->ids[n - 1], id, x->count, w));
        ESP_TRY(esp_ids_push(fresh, x->ids[n - 1]));
        ESP_TRY(esp_ids_push(fresh, id));
      }
      if (i + 2 < x->n) {
        ESP_TRY(pair_add(t, right, x->ids[i + 2], -x->count, w));
        ESP_TRY(pair_add(t, id, x->ids[i + 2], x->count, w));
        ESP_TRY(esp_ids_push(fresh, id));
        ESP_TRY(esp_ids_push(fresh, x->ids[i + 2]));
      }
      x->ids[n++] = id;
      i += 2;
    } else {
      x->ids[n++] = x->ids[i++];
    }
  }
  x->n = n;
  return ESP_OK;
}

static void add_json_token(const trainer *t, int32_t id, esp_strbuf *out, int special) {
  if (id < special)
    esp_strbuf_add(out, t->tokens[id].data, t->tokens[id].len);
  else
    esp_byte_map(t->tokens[id].data, t->tokens[id].len, out);
}

/* A token of these bytes exists already (made by another merge): its id, else -1. Special tokens do not count. */
static int32_t same_token(const trainer *t, const esp_strbuf *bytes, int special) {
  for (int i = special; i < t->n_tokens; i++)
    if (t->tokens[i].len == bytes->len && !memcmp(t->tokens[i].data, bytes->data, bytes->len)) return i;
  return -1;
}

static esp_status train(trainer *t, int vocab, int special) {
  esp_status st = ESP_OK;
  esp_ids fresh = {0};
  esp_strbuf quoted;
  esp_strbuf_init(&quoted);
  for (int64_t w = 0; w < t->n_words; w++)
    for (int32_t i = 0; i + 1 < t->words[w].n; i++)
      ESP_GOTO(pair_add(t, t->words[w].ids[i], t->words[w].ids[i + 1], t->words[w].count, w));
  for (int64_t p = 0; p < t->n_pairs; p++) ESP_GOTO(heap_push(t, t->pairs[p].count, t->pairs[p].pair));
  while (t->n_tokens < vocab && t->n_heap) {
    heap_item top = heap_pop(t);
    pair_info *p;
    ESP_GOTO(pair_get(t, top.pair, &p));
    if (p->count != top.count) { /* stale */
      if (p->count > 0) ESP_GOTO(heap_push(t, p->count, p->pair));
      continue;
    }
    if (p->count < 1) continue;
    int32_t left = (int32_t)(top.pair >> 32), right = (int32_t)(uint32_t)top.pair;
    esp_strbuf *token = &t->tokens[t->n_tokens];
    esp_strbuf_init(token);
    esp_strbuf_add(token, t->tokens[left].data, t->tokens[left].len);
    esp_strbuf_add(token, t->tokens[right].data, t->tokens[right].len);
    if (token->failed) {
      st = ESP_ERR_MEMORY;
      goto out;
    }
    int32_t id = same_token(t, token, special);
    if (id >= 0)
      esp_strbuf_deinit(token);
    else
      id = t->n_tokens++;
    esp_strbuf_clear(&quoted);
    add_json_token(t, left, &quoted, special);
    esp_strbuf_putc(&quoted, ' ');
    add_json_token(t, right, &quoted, special);
    esp_strbuf_puts(&t->merges, t->merges.len ? ",\n" : "\n");
    esp_strbuf_json(&t->merges, quoted.data, quoted.len);
    int32_t *words = p->words, n = p->n; /* p moves when pairs are added */
    p->words = NULL;
    p->n = p->cap = 0;
    p->count = 0;
    fresh.n = 0;
    for (int32_t k = 0; k < n && st == ESP_OK; k++) st = merge_word(t, words[k], left, right, id, &fresh);
    esp_mem_free(words);
    if (st != ESP_OK) goto out;
    ESP_GOTO(pair_get(t, top.pair, &p));
    p->count = 0; /* overlapping occurrences ("aaa") have been counted down as neighbours */
    for (int64_t k = 0; k < fresh.n; k += 2) {
      uint64_t pair = (uint64_t)(uint32_t)fresh.data[k] << 32 | (uint32_t)fresh.data[k + 1];
      pair_info *q;
      ESP_GOTO(pair_get(t, pair, &q));
      if (q->count > 0) ESP_GOTO(heap_push(t, q->count, pair));
    }
  }
  if (quoted.failed || t->merges.failed) st = ESP_ERR_MEMORY;
out:
  esp_ids_deinit(&fresh);
  esp_strbuf_deinit(&quoted);
  return st;
}

/* ---- files ---- */
static const char *role_of(const char *const *special, int n, const char *const *names) {
  for (; *names; names++)
    for (int i = 0; i < n; i++)
      if (!strcmp(special[i], *names)) return special[i];
  return NULL;
}

static esp_status write_files(const trainer *t, const char *const *special, int n_special, const char *dir) {
  static const char *const bos_names[] = {"<s>", "<|bos|>", "<bos>", "<|begin_of_text|>", NULL};
  static const char *const eos_names[] = {"</s>",       "<|eos|>", "<eos>", "<|endoftext|>", "<|end_of_text|>",
                                          "<|im_end|>", NULL};
  static const char *const pad_names[] = {"<pad>", "<|pad|>", "[PAD]", NULL};
  const char *bos = role_of(special, n_special, bos_names), *eos = role_of(special, n_special, eos_names);
  const char *pad = role_of(special, n_special, pad_names);
  char path[4096];
  esp_strbuf b, token;
  esp_strbuf_init(&b);
  esp_strbuf_init(&token);
  esp_strbuf_puts(&b, "{\n\"version\":\"1.0\",\n\"truncation\":null,\n\"padding\":null,\n\"added_tokens\":[");
  for (int i = 0; i < n_special; i++) {
    esp_strbuf_printf(&b, "%s\n{\"id\":%d,\"content\":", i ? "," : "", i);
    esp_strbuf_json(&b, special[i], strlen(special[i]));
    esp_strbuf_puts(&b, ",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\"normalized\":false,"
                        "\"special\":true}");
  }
  esp_strbuf_puts(&b, "],\n\"normalizer\":null,\n\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,"
                      "\"trim_offsets\":true,\"use_regex\":true},\n\"post_processor\":");
  if (bos) {
    esp_strbuf_puts(&b, "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":");
    esp_strbuf_json(&b, bos, strlen(bos));
    esp_strbuf_puts(&b, ",\"type_id\":0}},{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}],\"pair\":[{\"SpecialToken\":"
                        "{\"id\":");
    esp_strbuf_json(&b, bos, strlen(bos));
    esp_strbuf_puts(&b, ",\"type_id\":0}},{\"Sequence\":{\"id\":\"A\",\"type_id\":0}},{\"Sequence\":{\"id\":\"B\","
                        "\"type_id\":1}}],\"special_tokens\":{");
    esp_strbuf_json(&b, bos, strlen(bos));
    esp_strbuf_puts(&b, ":{\"id\":");
    esp_strbuf_json(&b, bos, strlen(bos));
    int id = 0;
    while (special[id] != bos) id++;
    esp_strbuf_printf(&b, ",\"ids\":[%d],\"tokens\":[", id);
    esp_strbuf_json(&b, bos, strlen(bos));
    esp_strbuf_puts(&b, "]}}}");
  } else {
    esp_strbuf_puts(&b, "null");
  }
  esp_strbuf_puts(&b, ",\n\"decoder\":{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"trim_offsets\":true,"
                      "\"use_regex\":true},\n\"model\":{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":null,"
                      "\"continuing_subword_prefix\":null,\"end_of_word_suffix\":null,\"fuse_unk\":false,"
                      "\"byte_fallback\":false,\"ignore_merges\":false,\n\"vocab\":{");
  for (int i = 0; i < t->n_tokens; i++) {
    esp_strbuf_clear(&token);
    add_json_token(t, i, &token, n_special);
    esp_strbuf_puts(&b, i ? ",\n" : "\n");
    esp_strbuf_json(&b, token.data, token.len);
    esp_strbuf_printf(&b, ":%d", i);
  }
  esp_strbuf_puts(&b, "},\n\"merges\":[");
  esp_strbuf_add(&b, t->merges.data ? t->merges.data : "", t->merges.len);
  esp_strbuf_puts(&b, "]}\n}\n");
  esp_status st = b.failed || token.failed ? ESP_ERR_MEMORY : esp_mkdirs(dir);
  if (st == ESP_OK) st = esp_file_write_atomic(esp_path_join(path, sizeof path, dir, "tokenizer.json"), b.data, b.len);
  esp_strbuf_clear(&b);
  const char *const keys[] = {"bos_token", "eos_token", "pad_token"}, *const values[] = {bos, eos, pad};
  esp_strbuf_puts(&b,
                  "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n  \"clean_up_tokenization_spaces\": false");
  for (int i = 0; i < 3; i++) {
    esp_strbuf_printf(&b, ",\n  \"%s\": ", keys[i]);
    if (values[i])
      esp_strbuf_json(&b, values[i], strlen(values[i]));
    else
      esp_strbuf_puts(&b, "null");
  }
  esp_strbuf_puts(&b, "\n}\n");
  if (st == ESP_OK && b.failed) st = ESP_ERR_MEMORY;
  if (st == ESP_OK)
    st = esp_file_write_atomic(esp_path_join(path, sizeof path, dir, "tokenizer_config.json"), b.data, b.len);
  esp_strbuf_deinit(&b);
  esp_strbuf_deinit(&token);
  return st;
}

static void trainer_deinit(trainer *t) {
  for (int i = 0; t->tokens && i <= t->n_tokens; i++)
    esp_strbuf_deinit(&t->tokens[i]); /* the last one may be half made */
  for (int64_t i = 0; i < t->n_pairs; i++) esp_mem_free(t->pairs[i].words);
  esp_mem_free(t->words);
  esp_mem_free(t->word_slots);
  esp_mem_free(t->word_text);
  esp_mem_free(t->pool);
  esp_mem_free(t->pairs);
  esp_mem_free(t->pair_slots);
  esp_mem_free(t->heap);
  esp_mem_free(t->tokens);
  esp_strbuf_deinit(&t->merges);
}

esp_status esp_bpe_train(const char *text, size_t n, int vocab, const char *const *special, int n_special,
                         const char *dir) {
  esp_status st = ESP_OK;
  trainer t = {0};
  int32_t byte_id[256];
  int64_t total = 0, used = 0;
  esp_classes_init();
  if (vocab < n_special + 256 || vocab > 1 << 20)
    return esp_fail(ESP_ERR_RECIPE, "a byte-level vocabulary of %d tokens: at least %d are needed", vocab,
                    n_special + 256);
  if (esp_utf8_valid(text, n) != n) return esp_fail(ESP_ERR_DATA, "training text: invalid UTF-8");
  t.tokens = esp_mem_alloc(ESP_MEM_DATA, sizeof *t.tokens * (size_t)(vocab + 2));
  if (!t.tokens) return ESP_ERR_MEMORY;
  for (int i = 0; i < n_special; i++) esp_strbuf_puts(&t.tokens[t.n_tokens++], special[i]);
  for (uint32_t cp = 0; cp < 0x100 + 68; cp++) { /* bytes in the order of their letters */
    int b = esp_cp_to_byte(cp);
    if (b < 0) continue;
    byte_id[b] = t.n_tokens;
    esp_strbuf_putc(&t.tokens[t.n_tokens++], (char)b);
  }
  for (size_t at = 0; at < n;) {
    size_t stop = esp_split_next(ESP_SPLIT_GPT2, text, n, at);
    if (stop - at > INT32_MAX / 2) {
      st = esp_fail(ESP_ERR_DATA, "training text: a word of %zu bytes", stop - at);
      goto out;
    }
    ESP_GOTO(count_word(&t, text + at, (int32_t)(stop - at)));
    at = stop;
  }
  for (int64_t w = 0; w < t.n_words; w++) total += t.words[w].n;
  t.pool = esp_mem_alloc(ESP_MEM_DATA, sizeof *t.pool * (size_t)total);
  if (!t.pool) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  for (int64_t w = 0; w < t.n_words; w++) {
    t.words[w].ids = t.pool + used;
    for (int32_t i = 0; i < t.words[w].n; i++) t.pool[used++] = byte_id[(unsigned char)t.word_text[w][i]];
  }
  ESP_GOTO(train(&t, vocab, n_special));
  ESP_GOTO(write_files(&t, special, n_special, dir));
out:
  trainer_deinit(&t);
  return st;
}
