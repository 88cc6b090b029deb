/* tok_parts.c: normalizer, pre-tokenizer, post-processor, decoder and added tokens of tokenizer.json. What is not known
 * here is an error that names the component. */
#include "core/map.h"
#include "io/json.h"
#include "text/tok_priv.h"
#include "text/utf8.h"

static esp_status unknown(const char *path, const char *where, const char *type) {
  return esp_fail(ESP_ERR_DATA, "%s: %s of type %s is not understood", path, where, type);
}

static esp_status type_of(const json_t *j, const char *path, const char *where, const char **type) {
  if (!json_is_object(j)) return esp_fail(ESP_ERR_DATA, "%s: %s must be an object", path, where);
  *type = json_string_value(json_object_get(j, "type"));
  return *type ? ESP_OK : esp_fail(ESP_ERR_DATA, "%s: %s has no type", path, where);
}

static esp_status get_bool(const json_t *j, const char *key, const char *path, bool *out) {
  int v = *out;
  ESP_TRY(esp_json_bool(j, key, path, 0, &v));
  *out = v != 0;
  return ESP_OK;
}

static esp_status get_str(esp_tokenizer *t, const json_t *j, const char *key, const char *path, const char **out,
                          size_t *n) {
  const char *s = NULL;
  ESP_TRY(esp_json_str(j, key, path, 1, &s));
  *n = strlen(s);
  *out = esp_arena_strdup(t->arena, s);
  return *out ? ESP_OK : ESP_ERR_MEMORY;
}

/* pattern: {"String": s} or {"Regex": s} */
static esp_status get_pattern(esp_tokenizer *t, const json_t *j, const char *path, const char *where, const char **text,
                              size_t *n, bool *is_regex) {
  const json_t *p = json_object_get(j, "pattern");
  const json_t *s = json_object_get(p, "String"), *r = json_object_get(p, "Regex");
  const json_t *v = s ? s : r;
  if (!json_is_string(v))
    return esp_fail(ESP_ERR_DATA, "%s: %s: pattern must be {\"String\": ...} or {\"Regex\": ...}", path, where);
  *is_regex = !s;
  *n = json_string_length(v);
  *text = esp_arena_strndup(t->arena, json_string_value(v), *n);
  return *text ? ESP_OK : ESP_ERR_MEMORY;
}

/* ---- lists that a Sequence flattens into ---- */
static int flat_count(const json_t *j, const char *list) {
  const char *type = json_string_value(json_object_get(j, "type"));
  if (!type || strcmp(type, "Sequence")) return 1;
  int n = 0;
  const json_t *l = json_object_get(j, list);
  for (size_t i = 0; i < json_array_size(l); i++) n += flat_count(json_array_get(l, i), list);
  return n;
}

typedef esp_status (*part_fn)(esp_tokenizer *t, const json_t *j, const char *type, const char *path);

static esp_status flatten(esp_tokenizer *t, const json_t *j, const char *where, const char *list, const char *path,
                          part_fn fn, int depth) {
  const char *type;
  ESP_TRY(type_of(j, path, where, &type));
  if (strcmp(type, "Sequence")) return fn(t, j, type, path);
  const json_t *l = json_object_get(j, list);
  if (!json_is_array(l) || depth > 16)
    return esp_fail(ESP_ERR_DATA, "%s: %s of type Sequence needs a list '%s'", path, where, list);
  for (size_t i = 0; i < json_array_size(l); i++)
    ESP_TRY(flatten(t, json_array_get(l, i), where, list, path, fn, depth + 1));
  return ESP_OK;
}

/* ---- normalizer ---- */
static esp_status add_norm(esp_tokenizer *t, const json_t *j, const char *type, const char *path) {
  static const struct {
    const char *name;
    esp_norm_kind kind;
  } names[] = {{"NFC", ESP_NORM_NFC},
               {"NFD", ESP_NORM_NFD},
               {"NFKC", ESP_NORM_NFKC},
               {"NFKD", ESP_NORM_NFKD},
               {"Lowercase", ESP_NORM_LOWERCASE},
               {"Strip", ESP_NORM_STRIP},
               {"StripAccents", ESP_NORM_STRIP_ACCENTS},
               {"Prepend", ESP_NORM_PREPEND},
               {"Replace", ESP_NORM_REPLACE},
               {"BertNormalizer", ESP_NORM_BERT},
               {"ByteLevel", ESP_NORM_BYTE_LEVEL}};
  esp_norm *k = &t->norms[t->n_norms];
  size_t i = 0, count = sizeof names / sizeof *names;
  while (i < count && strcmp(names[i].name, type)) i++;
  if (i == count) return unknown(path, "normalizer", type);
  k->kind = names[i].kind;
  bool regex = false;
  switch (k->kind) {
  case ESP_NORM_STRIP:
    k->left = k->right = true;
    ESP_TRY(get_bool(j, "strip_left", path, &k->left));
    ESP_TRY(get_bool(j, "strip_right", path, &k->right));
    break;
  case ESP_NORM_PREPEND:
    ESP_TRY(get_str(t, j, "prepend", path, &k->a, &k->na));
    break;
  case ESP_NORM_REPLACE:
    ESP_TRY(get_pattern(t, j, path, "normalizer Replace", &k->a, &k->na, &regex));
    ESP_TRY(get_str(t, j, "content", path, &k->b, &k->nb));
    if (regex) {
      k->kind = ESP_NORM_REPLACE_REGEX;
      ESP_TRY(esp_regex_create(k->a, k->na, path, &k->regex));
    }
    break;
  case ESP_NORM_BERT: {
    const json_t *accents = json_object_get(j, "strip_accents");
    k->clean = k->cjk = k->lower = true;
    ESP_TRY(get_bool(j, "clean_text", path, &k->clean));
    ESP_TRY(get_bool(j, "handle_chinese_chars", path, &k->cjk));
    ESP_TRY(get_bool(j, "lowercase", path, &k->lower));
    k->strip_accents = accents && json_is_boolean(accents) ? json_is_true(accents) : k->lower;
    break;
  }
  default:
    break;
  }
  t->n_norms++;
  return ESP_OK;
}

esp_status esp_tok_load_normalizer(esp_tokenizer *t, json_t *j, const char *path) {
  if (!j || json_is_null(j)) return ESP_OK;
  t->norms = esp_arena_alloc(t->arena, sizeof *t->norms * (size_t)(flat_count(j, "normalizers") + 1));
  if (!t->norms) return ESP_ERR_MEMORY;
  return flatten(t, j, "normalizer", "normalizers", path, add_norm, 0);
}

/* ---- pre-tokenizer ---- */
static esp_status get_behavior(const json_t *j, const char *path, esp_behavior *out) {
  static const char *const names[] = {"Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
  const char *s = NULL;
  ESP_TRY(esp_json_str(j, "behavior", path, 0, &s));
  if (!s) return ESP_OK;
  for (int i = 0; i < 5; i++)
    if (!strcasecmp(names[i], s)) {
      *out = (esp_behavior)i;
      return ESP_OK;
    }
  return esp_fail(ESP_ERR_DATA, "%s: pre_tokenizer: behavior '%s' is not understood", path, s);
}

static esp_status load_metaspace(esp_tokenizer *t, const json_t *j, const char *path, esp_pre *p) {
  const char *scheme = NULL;
  bool prefix = true;
  p->split = true;
  p->behavior = ESP_BEHAVE_MERGED_NEXT;
  ESP_TRY(get_str(t, j, "replacement", path, &p->literal, &p->n_literal));
  if (!p->n_literal) return esp_fail(ESP_ERR_DATA, "%s: pre_tokenizer Metaspace: empty replacement", path);
  ESP_TRY(get_bool(j, "split", path, &p->split));
  ESP_TRY(get_bool(j, "add_prefix_space", path, &prefix));
  ESP_TRY(esp_json_str(j, "prepend_scheme", path, 0, &scheme));
  if (!scheme) scheme = prefix ? "always" : "never";
  p->scheme = !strcmp(scheme, "never") ? 0 : !strcmp(scheme, "first") ? 1 : !strcmp(scheme, "always") ? 2 : -1;
  if (p->scheme < 0)
    return esp_fail(ESP_ERR_DATA, "%s: pre_tokenizer Metaspace: prepend_scheme '%s' is not understood", path, scheme);
  return ESP_OK;
}

static esp_status load_split(esp_tokenizer *t, const json_t *j, const char *path, esp_pre *p) {
  bool regex;
  const char *text;
  size_t n;
  if (!json_object_get(j, "behavior")) return esp_fail(ESP_ERR_DATA, "%s: pre_tokenizer Split: no behavior", path);
  ESP_TRY(get_behavior(j, path, &p->behavior));
  ESP_TRY(get_bool(j, "invert", path, &p->invert));
  ESP_TRY(get_pattern(t, j, path, "pre_tokenizer Split", &text, &n, &regex));
  if (!regex) {
    if (!n) return esp_fail(ESP_ERR_DATA, "%s: pre_tokenizer Split: empty pattern", path);
    p->literal = text;
    p->n_literal = n;
    return ESP_OK;
  }
  p->known = esp_split_known(text, n);
  return p->known ? ESP_OK : esp_regex_create(text, n, path, &p->regex);
}

static esp_status add_pre(esp_tokenizer *t, const json_t *j, const char *type, const char *path) {
  static const struct {
    const char *name;
    esp_pre_kind kind;
  } names[] = {{"ByteLevel", ESP_PRE_BYTE_LEVEL},        {"Split", ESP_PRE_SPLIT},
               {"Whitespace", ESP_PRE_WHITESPACE},       {"WhitespaceSplit", ESP_PRE_WHITESPACE_SPLIT},
               {"BertPreTokenizer", ESP_PRE_BERT},       {"Digits", ESP_PRE_DIGITS},
               {"Punctuation", ESP_PRE_PUNCTUATION},     {"Metaspace", ESP_PRE_METASPACE},
               {"CharDelimiterSplit", ESP_PRE_DELIMITER}};
  esp_pre *p = &t->pres[t->n_pres];
  size_t i = 0, count = sizeof names / sizeof *names;
  while (i < count && strcmp(names[i].name, type)) i++;
  if (i == count) return unknown(path, "pre_tokenizer", type);
  p->kind = names[i].kind;
  switch (p->kind) {
  case ESP_PRE_BYTE_LEVEL:
    p->use_regex = p->add_prefix_space = true;
    p->known = ESP_SPLIT_GPT2;
    ESP_TRY(get_bool(j, "use_regex", path, &p->use_regex));
    ESP_TRY(get_bool(j, "add_prefix_space", path, &p->add_prefix_space));
    break;
  case ESP_PRE_SPLIT:
    ESP_TRY(load_split(t, j, path, p));
    break;
  case ESP_PRE_WHITESPACE_SPLIT:
    p->behavior = ESP_BEHAVE_REMOVED;
    break;
  case ESP_PRE_DIGITS:
    ESP_TRY(get_bool(j, "individual_digits", path, &p->individual));
    p->behavior = p->individual ? ESP_BEHAVE_ISOLATED : ESP_BEHAVE_CONTIGUOUS;
    break;
  case ESP_PRE_PUNCTUATION:
    ESP_TRY(get_behavior(j, path, &p->behavior));
    break;
  case ESP_PRE_METASPACE:
    ESP_TRY(load_metaspace(t, j, path, p));
    break;
  case ESP_PRE_DELIMITER:
    p->behavior = ESP_BEHAVE_REMOVED;
    ESP_TRY(get_str(t, j, "delimiter", path, &p->literal, &p->n_literal));
    if (!p->n_literal) return esp_fail(ESP_ERR_DATA, "%s: pre_tokenizer CharDelimiterSplit: empty delimiter", path);
    break;
  default:
    break;
  }
  t->n_pres++;
  return ESP_OK;
}

esp_status esp_tok_load_pre(esp_tokenizer *t, json_t *j, const char *path) {
  if (!j || json_is_null(j)) return ESP_OK;
  t->pres = esp_arena_alloc(t->arena, sizeof *t->pres * (size_t)(flat_count(j, "pretokenizers") + 1));
  if (!t->pres) return ESP_ERR_MEMORY;
  ESP_TRY(flatten(t, j, "pre_tokenizer", "pretokenizers", path, add_pre, 0));
  /* Raw bytes go straight to the model when ByteLevel comes last, once, and every byte has a token. */
  bool bytes = t->n_pres > 0 && t->pres[t->n_pres - 1].kind == ESP_PRE_BYTE_LEVEL && !t->wordpiece;
  for (int i = 0; i + 1 < t->n_pres; i++) bytes = bytes && t->pres[i].kind != ESP_PRE_BYTE_LEVEL;
  for (int b = 0; b < 256; b++) bytes = bytes && t->bpe.byte_id[b] >= 0;
  t->bpe.bytes = bytes && !t->bpe.n_prefix && !t->bpe.n_suffix;
  if (t->bpe.bytes) t->bpe.space_cut = false;
  return ESP_OK;
}

/* ---- post-processor ---- */
static esp_status wrap(esp_tokenizer *t, const int32_t *before, int nb, const int32_t *after, int na,
                       const char *path) {
  if (t->n_before || t->n_after)
    return esp_fail(ESP_ERR_DATA, "%s: post_processor: two components that add tokens are not understood", path);
  t->before = esp_arena_alloc(t->arena, sizeof(int32_t) * (size_t)(nb + 1));
  t->after = esp_arena_alloc(t->arena, sizeof(int32_t) * (size_t)(na + 1));
  if (!t->before || !t->after) return ESP_ERR_MEMORY;
  memcpy(t->before, before, sizeof(int32_t) * (size_t)nb);
  memcpy(t->after, after, sizeof(int32_t) * (size_t)na);
  t->n_before = nb;
  t->n_after = na;
  return ESP_OK;
}

static esp_status load_template(esp_tokenizer *t, const json_t *j, const char *path) {
  enum { MAX = 64 };
  int32_t ids[2][MAX];
  int n[2] = {0, 0}, side = 0;
  const json_t *single = json_object_get(j, "single"), *table = json_object_get(j, "special_tokens");
  if (!json_is_array(single)) return esp_fail(ESP_ERR_DATA, "%s: post_processor TemplateProcessing: no 'single'", path);
  for (size_t i = 0; i < json_array_size(single); i++) {
    const json_t *piece = json_array_get(single, i), *special = json_object_get(piece, "SpecialToken");
    const char *seq = json_string_value(json_object_get(json_object_get(piece, "Sequence"), "id"));
    if (seq && !strcmp(seq, "A") && side == 0) {
      side = 1;
      continue;
    }
    const char *name = json_string_value(json_object_get(special, "id"));
    const json_t *list = name ? json_object_get(json_object_get(table, name), "ids") : NULL;
    if (!json_is_array(list))
      return esp_fail(ESP_ERR_DATA, "%s: post_processor TemplateProcessing: piece %zu is not understood", path, i);
    for (size_t k = 0; k < json_array_size(list); k++) {
      const json_t *id = json_array_get(list, k);
      if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= 1 << 24 || n[side] == MAX)
        return esp_fail(ESP_ERR_DATA, "%s: post_processor TemplateProcessing: bad ids of '%s'", path, name);
      ids[side][n[side]++] = (int32_t)json_integer_value(id);
    }
  }
  if (!side) return esp_fail(ESP_ERR_DATA, "%s: post_processor TemplateProcessing: 'single' lacks sequence A", path);
  return wrap(t, ids[0], n[0], ids[1], n[1], path);
}

static esp_status named_id(const json_t *j, const char *key, const char *path, int32_t *out) {
  const json_t *id = json_array_get(json_object_get(j, key), 1);
  if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= 1 << 24)
    return esp_fail(ESP_ERR_DATA, "%s: post_processor: '%s' must be [token, id]", path, key);
  *out = (int32_t)json_integer_value(id);
  return ESP_OK;
}

static esp_status add_post(esp_tokenizer *t, const json_t *j, const char *type, const char *path) {
  if (!strcmp(type, "ByteLevel")) return ESP_OK; /* moves offsets only */
  if (!strcmp(type, "TemplateProcessing")) return load_template(t, j, path);
  if (strcmp(type, "RobertaProcessing") && strcmp(type, "BertProcessing")) return unknown(path, "post_processor", type);
  int32_t cls = -1, sep = -1;
  ESP_TRY(named_id(j, "cls", path, &cls));
  ESP_TRY(named_id(j, "sep", path, &sep));
  return wrap(t, &cls, 1, &sep, 1, path);
}

esp_status esp_tok_load_post(esp_tokenizer *t, json_t *j, const char *path) {
  if (!j || json_is_null(j)) return ESP_OK;
  return flatten(t, j, "post_processor", "processors", path, add_post, 0);
}

/* ---- decoder ---- */
static esp_status add_dec(esp_tokenizer *t, const json_t *j, const char *type, const char *path) {
  static const struct {
    const char *name;
    esp_dec_kind kind;
  } names[] = {{"ByteLevel", ESP_DEC_BYTE_LEVEL},
               {"ByteFallback", ESP_DEC_BYTE_FALLBACK},
               {"Fuse", ESP_DEC_FUSE},
               {"Replace", ESP_DEC_REPLACE},
               {"Strip", ESP_DEC_STRIP},
               {"Metaspace", ESP_DEC_METASPACE},
               {"WordPiece", ESP_DEC_WORDPIECE},
               {"BPEDecoder", ESP_DEC_BPE}};
  esp_dec *d = &t->decs[t->n_decs];
  size_t i = 0, count = sizeof names / sizeof *names;
  while (i < count && strcmp(names[i].name, type)) i++;
  if (i == count) return unknown(path, "decoder", type);
  d->kind = names[i].kind;
  if (d->kind == ESP_DEC_REPLACE) {
    bool regex;
    ESP_TRY(get_pattern(t, j, path, "decoder Replace", &d->a, &d->na, &regex));
    ESP_TRY(get_str(t, j, "content", path, &d->b, &d->nb));
    if (regex) ESP_TRY(esp_regex_create(d->a, d->na, path, &d->regex));
  } else if (d->kind == ESP_DEC_STRIP) {
    int64_t start = 0, stop = 0;
    ESP_TRY(get_str(t, j, "content", path, &d->a, &d->na));
    ESP_TRY(esp_json_i64(j, "start", path, 1, &start));
    ESP_TRY(esp_json_i64(j, "stop", path, 1, &stop));
    if (start < 0 || stop < 0 || start > 1 << 20 || stop > 1 << 20)
      return esp_fail(ESP_ERR_DATA, "%s: decoder Strip: start or stop out of range", path);
    d->start = (int)start;
    d->stop = (int)stop;
  } else if (d->kind == ESP_DEC_METASPACE) {
    esp_pre p = {0};
    ESP_TRY(load_metaspace(t, j, path, &p));
    d->a = p.literal;
    d->na = p.n_literal;
    d->flag = p.scheme != 0;
  } else if (d->kind == ESP_DEC_WORDPIECE) {
    d->flag = true;
    ESP_TRY(get_str(t, j, "prefix", path, &d->a, &d->na));
    ESP_TRY(get_bool(j, "cleanup", path, &d->flag));
  } else if (d->kind == ESP_DEC_BPE) {
    ESP_TRY(get_str(t, j, "suffix", path, &d->a, &d->na));
  }
  t->n_decs++;
  return ESP_OK;
}

esp_status esp_tok_load_decoder(esp_tokenizer *t, json_t *j, const char *path) {
  if (!j || json_is_null(j)) return ESP_OK;
  t->has_decoder = true;
  t->decs = esp_arena_alloc(t->arena, sizeof *t->decs * (size_t)(flat_count(j, "decoders") + 1));
  if (!t->decs) return ESP_ERR_MEMORY;
  return flatten(t, j, "decoder", "decoders", path, add_dec, 0);
}

/* ---- added tokens ---- */
static esp_status one_added(esp_tokenizer *t, const json_t *j, const char *path, esp_map *seen, int32_t *next) {
  esp_added *a = &t->added[t->n_added];
  int64_t id = -1;
  if (!json_is_object(j)) return esp_fail(ESP_ERR_DATA, "%s: added_tokens must hold objects", path);
  ESP_TRY(get_str(t, j, "content", path, &a->content, &a->n));
  ESP_TRY(esp_json_i64(j, "id", path, 1, &id));
  ESP_TRY(get_bool(j, "special", path, &a->special));
  ESP_TRY(get_bool(j, "lstrip", path, &a->lstrip));
  ESP_TRY(get_bool(j, "rstrip", path, &a->rstrip));
  ESP_TRY(get_bool(j, "single_word", path, &a->single_word));
  a->normalized = !a->special;
  ESP_TRY(get_bool(j, "normalized", path, &a->normalized));
  if (!a->n) return ESP_OK; /* the package ignores empty ones */
  int32_t known = esp_vocab_find(&t->vocab, a->content, a->n);
  if (known < 0 && esp_map_has(seen, a->content, a->n)) return ESP_OK;
  if (known < 0) known = *next;
  if (known != id)
    return esp_fail(ESP_ERR_DATA, "%s: added token '%s' has id %lld, but the vocabulary makes it %d", path, a->content,
                    (long long)id, known);
  if (known == *next) ++*next;
  a->id = known;
  t->n_added++;
  return esp_map_put(seen, a->content, a->n, a) ? ESP_OK : ESP_ERR_MEMORY;
}

esp_status esp_tok_load_added(esp_tokenizer *t, json_t *j, const char *path) {
  esp_status st = ESP_OK;
  esp_encoder *e = NULL;
  size_t n = json_array_size(j);
  if (j && !json_is_null(j) && !json_is_array(j))
    return esp_fail(ESP_ERR_DATA, "%s: added_tokens must be a list", path);
  esp_map *seen = esp_map_create(n);
  if (!seen) return ESP_ERR_MEMORY;
  t->added = esp_arena_alloc(t->arena, sizeof *t->added * (n + 1));
  if (!t->added) ESP_GOTO(ESP_ERR_MEMORY);
  int32_t next = (int32_t)t->vocab.count;
  for (size_t i = 0; i < n; i++) ESP_GOTO(one_added(t, json_array_get(j, i), path, seen, &next));
  t->n_vocab = t->vocab.n_ids;
  for (int i = 0; i < t->n_added; i++)
    if (t->added[i].id >= t->n_vocab) t->n_vocab = t->added[i].id + 1;
  t->added_of_id = esp_mem_alloc(ESP_MEM_DATA, sizeof(int32_t) * (size_t)(t->n_vocab + 1));
  if (!t->added_of_id) ESP_GOTO(ESP_ERR_MEMORY);
  ESP_GOTO(esp_encoder_create(&e));
  /* Special ones first: of two with equal normalised text the first counts. */
  for (int pass = 0; pass < 2; pass++)
    for (int i = 0; i < t->n_added; i++) {
      esp_added *a = &t->added[i];
      if (a->special != (pass == 0)) continue;
      t->added_of_id[a->id] = i + 1;
      if (!a->normalized || !t->n_norms) {
        ESP_GOTO(esp_trie_add(a->normalized ? &t->normalized : &t->raw, a->content, a->n, i));
        continue;
      }
      ESP_GOTO(esp_tok_normalize(t, e, a->content, a->n, false, &e->norm));
      if (e->norm.len) ESP_GOTO(esp_trie_add(&t->normalized, e->norm.data, e->norm.len, i));
    }
out:
  esp_map_destroy(seen);
  esp_encoder_destroy(e);
  return st;
}
