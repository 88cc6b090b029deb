/* tokenizer.c: loading, encoding, and what other rooms ask of a tokenizer. */
#include "text/tokenizer.h"

#include <stdio.h>
#include <string.h>

#include "io/file.h"
#include "io/json.h"
#include "text/json_scan.h"
#include "text/tok_priv.h"
#include "text/utf8.h"

/* ---- growable ids ---- */
void esp_ids_deinit(esp_ids *ids) {
  esp_mem_free(ids->data);
  memset(ids, 0, sizeof *ids);
}

esp_status esp_ids_reserve(esp_ids *ids, int64_t more) {
  if (ids->n + more <= ids->cap) return ESP_OK;
  int64_t cap = (ids->n + more) * 2 + 64;
  void *p = esp_mem_realloc(ESP_MEM_DATA, ids->data, (size_t)cap * sizeof *ids->data);
  if (!p) return ESP_ERR_MEMORY;
  ids->data = p;
  ids->cap = cap;
  return ESP_OK;
}

esp_status esp_ids_push(esp_ids *ids, int32_t id) {
  if (ids->n == ids->cap) ESP_TRY(esp_ids_reserve(ids, 1));
  ids->data[ids->n++] = id;
  return ESP_OK;
}

/* ---- GPT-2's byte letters: printable Latin-1 stands for itself, the other 68 bytes for U+0100.. in order ---- */
static bool byte_prints(int b) {
  return (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
}

uint32_t esp_byte_to_cp(unsigned char b) {
  if (byte_prints(b)) return b;
  if (b <= 32) return 0x100u + b;
  if (b <= 0xA0) return 0x100u + 33 + (b - 127u);
  return 0x100u + 67; /* 0xAD */
}

int esp_cp_to_byte(uint32_t cp) {
  if (cp < 0x100) return byte_prints((int)cp) ? (int)cp : -1;
  if (cp >= 0x100 + 68) return -1;
  cp -= 0x100;
  return cp < 33 ? (int)cp : cp < 67 ? (int)cp - 33 + 127 : 0xAD;
}

void esp_byte_map(const char *s, size_t n, esp_strbuf *out) {
  for (size_t i = 0; i < n; i++) {
    char b[4];
    esp_strbuf_add(out, b, (size_t)esp_utf8_put(b, esp_byte_to_cp((unsigned char)s[i])));
  }
}

/* ---- encoders ---- */
esp_status esp_encoder_create(esp_encoder **out) {
  esp_encoder *e = esp_mem_alloc(ESP_MEM_DATA, sizeof *e);
  if (!e) return ESP_ERR_MEMORY;
  esp_status st = esp_regex_state_create(&e->regex);
  if (st != ESP_OK) {
    esp_mem_free(e);
    return st;
  }
  *out = e;
  return ESP_OK;
}

void esp_encoder_destroy(esp_encoder *e) {
  if (!e) return;
  esp_regex_state_destroy(e->regex);
  esp_strbuf_deinit(&e->text);
  esp_strbuf_deinit(&e->norm);
  esp_strbuf_deinit(&e->spare);
  esp_strbuf_deinit(&e->mapped);
  esp_strbuf_deinit(&e->stand_in);
  esp_mem_free(e->cache);
  esp_mem_free(e->pieces);
  esp_mem_free(e->pieces2);
  esp_mem_free(e->symbols);
  esp_mem_free(e->heap);
  esp_mem_free(e);
}

static esp_status encoder_borrow(const esp_tokenizer *t, esp_encoder **out) {
  esp_tokenizer *m = (esp_tokenizer *)t; /* the list of idle encoders is the only thing that changes, under the lock */
  pthread_mutex_lock(&m->lock);
  esp_encoder *e = m->free_encoders;
  if (e) m->free_encoders = e->next;
  pthread_mutex_unlock(&m->lock);
  if (!e) return esp_encoder_create(out);
  *out = e;
  return ESP_OK;
}

static void encoder_return(const esp_tokenizer *t, esp_encoder *e) {
  esp_tokenizer *m = (esp_tokenizer *)t;
  pthread_mutex_lock(&m->lock);
  e->next = m->free_encoders;
  m->free_encoders = e;
  pthread_mutex_unlock(&m->lock);
}

/* Names and texts from files come into messages: a line break in one must not break the message into lines. */
esp_status esp_text_one_line(esp_status st) {
  char line[4096];
  if (st == ESP_OK) return st;
  snprintf(line, sizeof line, "%s", esp_error_message());
  for (char *c = line; *c; c++)
    if ((unsigned char)*c < 0x20 || *c == 0x7F) *c = '?';
  return strcmp(line, esp_error_message()) ? esp_fail(st, "%s", line) : st;
}

/* ---- loading ---- */
/* Takes the top-level object apart: `model` stays text, every other member goes to jansson as one object. */
static esp_status split_file(const char *json, size_t n, const char *path, const char **model, size_t *n_model,
                             json_t **rest) {
  esp_status st = ESP_OK;
  esp_scan s = {json, json, json + n, path};
  esp_strbuf other;
  esp_strbuf_init(&other);
  const char *a, *b, *ka;
  bool any = false;
  *model = NULL;
  *rest = NULL;
  esp_strbuf_putc(&other, '{');
  ESP_GOTO(esp_scan_expect(&s, '{'));
  bool more = !esp_scan_take(&s, '}');
  while (more) {
    ESP_GOTO(esp_scan_skip(&s, &ka, &b));
    size_t key_n = (size_t)(b - ka);
    if (ka[0] != '"') {
      st = esp_scan_fail(&s, "expected a key");
      goto out;
    }
    ESP_GOTO(esp_scan_expect(&s, ':'));
    ESP_GOTO(esp_scan_skip(&s, &a, &b));
    if (key_n == 7 && !memcmp(ka, "\"model\"", 7)) {
      if (*model) {
        st = esp_scan_fail(&s, "key 'model' twice");
        goto out;
      }
      *model = a;
      *n_model = (size_t)(b - a);
    } else {
      if (any) esp_strbuf_putc(&other, ',');
      any = true;
      esp_strbuf_add(&other, ka, key_n);
      esp_strbuf_putc(&other, ':');
      esp_strbuf_add(&other, a, (size_t)(b - a));
    }
    if (esp_scan_take(&s, '}')) break;
    ESP_GOTO(esp_scan_expect(&s, ','));
  }
  esp_scan_space(&s);
  if (s.p != s.end) {
    st = esp_scan_fail(&s, "text after the end of the object");
    goto out;
  }
  esp_strbuf_putc(&other, '}');
  if (other.failed)
    st = ESP_ERR_MEMORY;
  else
    st = esp_json_parse(other.data, other.len, path, rest);
out:
  esp_strbuf_deinit(&other);
  return st;
}

esp_status esp_tokenizer_parse(const char *json, size_t len, const char *path, esp_tokenizer **out) {
  esp_status st = ESP_OK;
  json_t *rest = NULL;
  const char *model;
  size_t n_model = 0;
  esp_classes_init();
  if (len >= UINT32_MAX / 2) return esp_fail(ESP_ERR_DATA, "%s: file of %zu bytes is too large", path, len);
  size_t good = esp_utf8_valid(json, len);
  if (good != len) return esp_fail(ESP_ERR_DATA, "%s: invalid UTF-8 at byte %zu", path, good);
  esp_tokenizer *t = esp_mem_alloc(ESP_MEM_DATA, sizeof *t);
  if (!t) return ESP_ERR_MEMORY;
  pthread_mutex_init(&t->lock, NULL);
  snprintf(t->path, sizeof t->path, "%s", path);
  t->bos = t->eos = t->pad = t->bpe.unk = t->wp.unk = -1;
  esp_hash_hex(json, len, t->fingerprint);
  t->arena = esp_arena_create(ESP_MEM_DATA);
  if (!t->arena) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  ESP_GOTO(split_file(json, len, path, &model, &n_model, &rest));
  if (!model) {
    st = esp_fail(ESP_ERR_DATA, "%s: no key 'model'", path);
    goto out;
  }
  ESP_GOTO(esp_tok_load_model(t, model, n_model, path));
  ESP_GOTO(esp_tok_load_normalizer(t, json_object_get(rest, "normalizer"), path));
  ESP_GOTO(esp_tok_load_pre(t, json_object_get(rest, "pre_tokenizer"), path));
  ESP_GOTO(esp_tok_load_post(t, json_object_get(rest, "post_processor"), path));
  ESP_GOTO(esp_tok_load_decoder(t, json_object_get(rest, "decoder"), path));
  ESP_GOTO(esp_tok_load_added(t, json_object_get(rest, "added_tokens"), path));
  *out = t;
  t = NULL;
out:
  json_decref(rest);
  esp_tokenizer_destroy(t);
  return esp_text_one_line(st);
}

void esp_tokenizer_trim(esp_tokenizer *t) {
  pthread_mutex_lock(&t->lock);
  esp_encoder *list = t->free_encoders;
  t->free_encoders = NULL;
  pthread_mutex_unlock(&t->lock);
  for (esp_encoder *e = list, *next; e; e = next) {
    next = e->next;
    esp_encoder_destroy(e);
  }
}

void esp_tokenizer_destroy(esp_tokenizer *t) {
  if (!t) return;
  esp_tokenizer_trim(t);
  for (int i = 0; t->norms && i < t->n_norms; i++) esp_regex_destroy(t->norms[i].regex);
  for (int i = 0; t->pres && i < t->n_pres; i++) esp_regex_destroy(t->pres[i].regex);
  for (int i = 0; t->decs && i < t->n_decs; i++) esp_regex_destroy(t->decs[i].regex);
  esp_trie_deinit(&t->raw);
  esp_trie_deinit(&t->normalized);
  esp_mem_free(t->added_of_id);
  esp_mem_free(t->vocab.pool);
  esp_mem_free(t->vocab.offset);
  esp_mem_free(t->vocab.length);
  esp_mem_free(t->vocab.slots);
  esp_mem_free(t->bpe.merges);
  esp_arena_destroy(t->arena);
  pthread_mutex_destroy(&t->lock);
  esp_mem_free(t);
}

/* A token's name in tokenizer_config.json: a string, or an object with `content`. */
static esp_status special_name(esp_tokenizer *t, const json_t *j, const char *key, const char *path, int32_t *id,
                               bool *given) {
  const json_t *v = json_object_get(j, key);
  *given = v != NULL;
  if (!v || json_is_null(v)) return ESP_OK;
  const char *name = json_is_object(v) ? json_string_value(json_object_get(v, "content")) : json_string_value(v);
  if (!name) return esp_fail(ESP_ERR_DATA, "%s: key '%s' must be a token", path, key);
  *id = esp_tokenizer_id(t, name);
  if (*id < 0) return esp_fail(ESP_ERR_DATA, "%s: %s '%s' is not in the vocabulary", path, key, name);
  return ESP_OK;
}

/* Transformers writes 1e30 as an integer for "no maximal length": numbers are read as reals here, none is needed. */
static esp_status load_names(const char *path, json_t **out) {
  char *text;
  size_t n;
  json_error_t error;
  ESP_TRY(esp_file_read(path, &text, &n));
  *out = json_loadb(text, n, JSON_REJECT_DUPLICATES | JSON_DECODE_INT_AS_REAL, &error);
  esp_mem_free(text);
  if (!*out) return esp_fail(ESP_ERR_DATA, "%s:%d:%d: not valid JSON: %s", path, error.line, error.column, error.text);
  return ESP_OK;
}

static esp_status load_config(esp_tokenizer *t, const char *dir) {
  static const char *const files[] = {"tokenizer_config.json", "special_tokens_map.json"};
  static const char *const keys[] = {"bos_token", "eos_token", "pad_token"};
  int32_t *const ids[] = {&t->bos, &t->eos, &t->pad};
  bool known[3] = {false, false, false};
  char path[4096];
  esp_status st = ESP_OK;
  json_t *j = NULL;
  for (int f = 0; f < 2; f++) {
    if (!esp_file_exists(esp_path_join(path, sizeof path, dir, files[f]))) continue;
    ESP_GOTO(load_names(path, &j));
    for (int k = 0; k < 3; k++)
      if (!known[k]) ESP_GOTO(special_name(t, j, keys[k], path, ids[k], &known[k]));
    const json_t *chat = json_object_get(j, "chat_template");
    t->chat_template = t->chat_template || (chat && !json_is_null(chat));
    json_decref(j);
    j = NULL;
  }
  t->chat_template = t->chat_template || esp_file_exists(esp_path_join(path, sizeof path, dir, "chat_template.jinja"));
  /* Where the tokenizer's own files are silent, the model's config knows the ids. */
  if ((!known[0] || !known[1]) && esp_file_exists(esp_path_join(path, sizeof path, dir, "config.json"))) {
    static const char *const id_keys[] = {"bos_token_id", "eos_token_id"};
    ESP_GOTO(esp_json_load(path, &j));
    for (int k = 0; k < 2; k++) {
      const json_t *v = json_object_get(j, id_keys[k]);
      if (json_is_array(v)) v = json_array_get(v, 0);
      if (known[k] || !json_is_integer(v)) continue;
      int64_t id = json_integer_value(v);
      if (id >= 0 && id < t->n_vocab && esp_tokenizer_token(t, (int32_t)id)) *ids[k] = (int32_t)id;
    }
  }
out:
  json_decref(j);
  return st;
}

esp_status esp_tokenizer_load(const char *dir, esp_tokenizer **out) {
  char path[4096], *text = NULL;
  size_t n;
  esp_tokenizer *t = NULL;
  ESP_TRY(esp_file_read(esp_path_join(path, sizeof path, dir, "tokenizer.json"), &text, &n));
  esp_status st = esp_tokenizer_parse(text, n, path, &t);
  esp_mem_free(text);
  if (st == ESP_OK) st = load_config(t, dir);
  if (st == ESP_OK)
    *out = t;
  else
    esp_tokenizer_destroy(t);
  return esp_text_one_line(st);
}

/* ---- encoding ---- */
static esp_status normalized_part(const esp_tokenizer *t, esp_encoder *e, const char *s, size_t n, esp_section where,
                                  esp_ids *out) {
  if (t->n_norms) {
    ESP_TRY(esp_tok_normalize(t, e, s, n, where == ESP_SECTION_MIDDLE, &e->norm));
    s = e->norm.data ? e->norm.data : "";
    n = e->norm.len;
  }
  size_t at = 0, start, stop;
  int index;
  while (esp_trie_find(&t->normalized, t->added, s, n, at, &start, &stop, &index)) {
    ESP_TRY(esp_tok_section(t, e, s + at, start - at, at ? ESP_SECTION_FRESH : where, out));
    ESP_TRY(esp_ids_push(out, t->added[index].id));
    at = stop;
  }
  return esp_tok_section(t, e, s + at, n - at, at ? ESP_SECTION_FRESH : where, out);
}

static esp_status encode_text(const esp_tokenizer *t, esp_encoder *e, const char *s, size_t n, esp_section where,
                              esp_ids *out) {
  if (esp_utf8_valid(s, n) != n) {
    esp_strbuf_clear(&e->text);
    for (size_t at = 0; at < n;) {
      size_t good = esp_utf8_valid(s + at, n - at);
      esp_strbuf_add(&e->text, s + at, good);
      at += good;
      if (at == n) break;
      esp_strbuf_puts(&e->text, "\xEF\xBF\xBD");
      at += esp_utf8_bad(s + at, n - at);
    }
    if (e->text.failed) return ESP_ERR_MEMORY;
    s = e->text.data;
    n = e->text.len;
  }
  size_t at = 0, start, stop;
  int index;
  while (esp_trie_find(&t->raw, t->added, s, n, at, &start, &stop, &index)) {
    if (start > at) ESP_TRY(normalized_part(t, e, s + at, start - at, at ? ESP_SECTION_FRESH : where, out));
    ESP_TRY(esp_ids_push(out, t->added[index].id));
    at = stop;
  }
  if (at == n) return ESP_OK;
  return normalized_part(t, e, s + at, n - at, at ? ESP_SECTION_FRESH : where, out);
}

static esp_status encode_at(const esp_tokenizer *t, const char *text, size_t n, esp_section where, esp_ids *out) {
  esp_encoder *e = NULL;
  ESP_TRY(encoder_borrow(t, &e));
  int64_t before = out->n;
  esp_status st = encode_text(t, e, text, n, where, out);
  if (st != ESP_OK) out->n = before;
  encoder_return(t, e);
  return st;
}

esp_status esp_tokenizer_encode(const esp_tokenizer *t, const char *text, size_t n, bool special, esp_ids *out) {
  for (int i = 0; special && i < t->n_before; i++) ESP_TRY(esp_ids_push(out, t->before[i]));
  ESP_TRY(encode_at(t, text, n, ESP_SECTION_START, out));
  for (int i = 0; special && i < t->n_after; i++) ESP_TRY(esp_ids_push(out, t->after[i]));
  return ESP_OK;
}

esp_status esp_tokenizer_encode_more(const esp_tokenizer *t, const char *text, size_t n, esp_ids *out) {
  bool fresh = out->n == 0 || esp_tokenizer_is_added(t, out->data[out->n - 1]);
  return encode_at(t, text, n, out->n == 0 ? ESP_SECTION_START : fresh ? ESP_SECTION_FRESH : ESP_SECTION_MIDDLE, out);
}

/* ---- questions ---- */
int64_t esp_tokenizer_vocab(const esp_tokenizer *t) {
  return t->n_vocab;
}

int32_t esp_tokenizer_id(const esp_tokenizer *t, const char *token) {
  size_t n = strlen(token);
  for (int i = 0; i < t->n_added; i++)
    if (t->added[i].n == n && !memcmp(t->added[i].content, token, n)) return t->added[i].id;
  return esp_vocab_find(&t->vocab, token, n);
}

bool esp_tokenizer_is_added(const esp_tokenizer *t, int32_t id) {
  return id >= 0 && id < t->n_vocab && t->added_of_id[id];
}

const char *esp_tokenizer_token(const esp_tokenizer *t, int32_t id) {
  if (esp_tokenizer_is_added(t, id)) return t->added[t->added_of_id[id] - 1].content;
  if (id < 0 || id >= t->vocab.n_ids || t->vocab.length[id] == UINT32_MAX) return NULL;
  return t->vocab.pool + t->vocab.offset[id];
}

bool esp_tokenizer_is_special(const esp_tokenizer *t, int32_t id) {
  return esp_tokenizer_is_added(t, id) && t->added[t->added_of_id[id] - 1].special;
}

int32_t esp_tokenizer_bos(const esp_tokenizer *t) {
  return t->bos;
}
int32_t esp_tokenizer_eos(const esp_tokenizer *t) {
  return t->eos;
}
int32_t esp_tokenizer_pad(const esp_tokenizer *t) {
  return t->pad;
}
bool esp_tokenizer_has_chat_template(const esp_tokenizer *t) {
  return t->chat_template;
}
const char *esp_tokenizer_fingerprint(const esp_tokenizer *t) {
  return t->fingerprint;
}
