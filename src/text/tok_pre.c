/* tok_pre.c: pre-tokenizers: a section of text becomes pieces. Most only cut; ByteLevel and Metaspace rewrite too. */
#include "text/tok_priv.h"
#include "text/utf8.h"

static esp_status push(esp_encoder *e, size_t at, size_t stop, bool first) {
  if (stop == at) return ESP_OK; /* empty pieces vanish */
  if (e->n_pieces == e->cap_pieces) {
    int64_t cap = e->cap_pieces * 2 + 64;
    void *p = esp_mem_realloc(ESP_MEM_DATA, e->pieces, (size_t)cap * sizeof *e->pieces);
    if (!p) return ESP_ERR_MEMORY;
    e->pieces = p;
    e->cap_pieces = cap;
  }
  e->pieces[e->n_pieces++] = (esp_piece){(uint32_t)at, (uint32_t)(stop - at), first};
  return ESP_OK;
}

/* Next match of a cutter in s[from, n): 1 and [*start, *stop), or 0; -1 on error. */
static int match(const esp_pre *p, esp_encoder *e, const char *s, size_t n, size_t from, size_t *start, size_t *stop) {
  int len;
  if (p->kind == ESP_PRE_BYTE_LEVEL || p->kind == ESP_PRE_SPLIT) {
    if (p->known) {
      if (from >= n) return 0;
      *start = from;
      *stop = esp_split_next(p->known, s, n, from);
      return 1;
    }
    if (p->regex) return esp_regex_find(p->regex, e->regex, s, n, from, start, stop);
  }
  if (p->literal) {
    const char *hit = from < n ? memmem(s + from, n - from, p->literal, p->n_literal) : NULL;
    if (!hit) return 0;
    *start = (size_t)(hit - s);
    *stop = *start + p->n_literal;
    return 1;
  }
  for (size_t i = from; i < n; i += (size_t)len) {
    uint32_t c = esp_utf8_get(s + i, &len);
    bool hit = p->kind == ESP_PRE_DIGITS        ? esp_cp_numeric(c)
               : p->kind == ESP_PRE_PUNCTUATION ? esp_cp_punct(c)
                                                : esp_cp_space(c);
    if (!hit) continue;
    *start = i;
    *stop = i + (size_t)len;
    return 1;
  }
  return 0;
}

typedef struct cut { /* a run being built out of matches and gaps */
  size_t at;
  bool open, hit;
} cut;

/* One span of the text, in order; is_match already inverted where asked. */
static esp_status span(esp_encoder *e, const esp_pre *p, cut *c, size_t base, size_t at, size_t stop, bool is_match,
                       bool first) {
  bool begins = first && at == 0;
  switch (p->behavior) {
  case ESP_BEHAVE_REMOVED:
    return is_match ? ESP_OK : push(e, base + at, base + stop, begins);
  case ESP_BEHAVE_CONTIGUOUS:
    if (c->open && c->hit == is_match) {
      e->pieces[e->n_pieces - 1].n += (uint32_t)(stop - at);
      return ESP_OK;
    }
    break;
  case ESP_BEHAVE_MERGED_PREVIOUS:
    if (c->open && is_match && !c->hit) {
      e->pieces[e->n_pieces - 1].n += (uint32_t)(stop - at);
      c->hit = true;
      return ESP_OK;
    }
    break;
  case ESP_BEHAVE_MERGED_NEXT:
    if (c->open && c->hit && !is_match) {
      e->pieces[e->n_pieces - 1].n += (uint32_t)(stop - at);
      c->hit = false;
      return ESP_OK;
    }
    break;
  case ESP_BEHAVE_ISOLATED:
    break;
  }
  if (stop == at) return ESP_OK;
  c->open = true;
  c->hit = is_match;
  return push(e, base + at, base + stop, begins);
}

static esp_status cut_piece(const esp_pre *p, esp_encoder *e, const char *text, esp_piece piece) {
  const char *s = text + piece.at;
  size_t n = piece.n, done = 0, from = 0, start, stop, last = SIZE_MAX;
  cut c = {0};
  int rc;
  if (p->regex && !(s = esp_regex_text(s, n, &e->stand_in))) return ESP_ERR_MEMORY;
  while (from <= n && (rc = match(p, e, s, n, from, &start, &stop)) != 0) {
    if (rc < 0) return ESP_ERR_DATA;
    bool empty = start == stop;
    if (!(empty && start == last)) {
      if (start > done) ESP_TRY(span(e, p, &c, piece.at, done, start, p->invert, piece.first));
      if (!empty) ESP_TRY(span(e, p, &c, piece.at, start, stop, !p->invert, piece.first));
      if (empty) c.open = false; /* an empty match still separates */
      done = last = stop;
    }
    from = stop;
    if (empty) {
      int len = 1;
      if (stop < n) esp_utf8_get(s + stop, &len);
      from += (size_t)len;
    }
  }
  if (done < n) ESP_TRY(span(e, p, &c, piece.at, done, n, p->invert, piece.first));
  return ESP_OK;
}

/* Whitespace: \w+|[^\w\s]+ */
static esp_status cut_words(esp_encoder *e, const char *text, esp_piece piece) {
  size_t at = piece.at, end = piece.at + piece.n;
  while (at < end) {
    int len, kind = -1;
    size_t start = at;
    while (at < end) {
      uint32_t c = esp_utf8_get(text + at, &len);
      int k = esp_cp_word(c) ? 1 : esp_cp_space(c) ? 0 : 2;
      if (kind < 0) kind = k;
      if (k != kind) break;
      at += (size_t)len;
    }
    if (kind) ESP_TRY(push(e, start, at, piece.first && start == piece.at));
  }
  return ESP_OK;
}

/* BertPreTokenizer: white space vanishes, punctuation stands alone. */
static esp_status cut_bert(esp_encoder *e, const char *text, esp_piece piece) {
  size_t at = piece.at, end = piece.at + piece.n, start = at;
  while (at < end) {
    int len;
    uint32_t c = esp_utf8_get(text + at, &len);
    bool space = esp_cp_space(c);
    if (space || esp_cp_punct(c)) {
      ESP_TRY(push(e, start, at, false));
      if (!space) ESP_TRY(push(e, at, at + (size_t)len, false));
      start = at + (size_t)len;
    }
    at += (size_t)len;
  }
  return push(e, start, at, false);
}

static esp_status metaspace(const esp_pre *p, esp_encoder *e, const char *text, esp_piece piece, bool middle,
                            esp_strbuf *out) {
  static const esp_pre by_mark = {.kind = ESP_PRE_DELIMITER, .behavior = ESP_BEHAVE_MERGED_NEXT};
  size_t at = out->len;
  bool starts = piece.n >= p->n_literal && !memcmp(text + piece.at, p->literal, p->n_literal);
  starts = starts || text[piece.at] == ' ';
  if (!starts && !middle && (p->scheme == 2 || (p->scheme == 1 && piece.first)))
    esp_strbuf_add(out, p->literal, p->n_literal);
  for (size_t i = piece.at; i < (size_t)piece.at + piece.n; i++) {
    if (text[i] == ' ')
      esp_strbuf_add(out, p->literal, p->n_literal);
    else
      esp_strbuf_putc(out, text[i]);
  }
  if (out->failed) return ESP_ERR_MEMORY;
  esp_piece made = {(uint32_t)at, (uint32_t)(out->len - at), piece.first};
  if (!p->split) return push(e, made.at, made.at + made.n, made.first);
  esp_pre mark = by_mark;
  mark.literal = p->literal;
  mark.n_literal = p->n_literal;
  return cut_piece(&mark, e, out->data, made);
}

/* Maps bytes to letters after cutting; each cut piece is rewritten into out. */
static esp_status byte_level(const esp_pre *p, esp_encoder *e, const char *text, esp_piece piece, bool middle,
                             esp_strbuf *spaced, esp_strbuf *out) {
  if (p->add_prefix_space && !middle && text[piece.at] != ' ') {
    size_t at = spaced->len;
    esp_strbuf_putc(spaced, ' ');
    esp_strbuf_add(spaced, text + piece.at, piece.n);
    if (spaced->failed) return ESP_ERR_MEMORY;
    text = spaced->data;
    piece.at = (uint32_t)at;
    piece.n++;
  }
  int64_t from = e->n_pieces;
  if (p->use_regex)
    ESP_TRY(cut_piece(p, e, text, piece));
  else
    ESP_TRY(push(e, piece.at, piece.at + piece.n, piece.first));
  for (int64_t i = from; i < e->n_pieces; i++) {
    size_t at = out->len;
    esp_byte_map(text + e->pieces[i].at, e->pieces[i].n, out);
    e->pieces[i].at = (uint32_t)at;
    e->pieces[i].n = (uint32_t)(out->len - at);
  }
  return out->failed ? ESP_ERR_MEMORY : ESP_OK;
}

static esp_status feed(const esp_tokenizer *t, esp_encoder *e, const char *s, size_t n, esp_ids *out) {
  return t->wordpiece ? esp_cached_piece(t, e, s, n, out) : esp_bpe_piece(t, e, s, n, out);
}

/* The last pre-tokenizer is ByteLevel and the model takes raw bytes: cut and encode in one go. */
static esp_status byte_level_direct(const esp_tokenizer *t, const esp_pre *p, esp_encoder *e, const char *text,
                                    esp_piece piece, bool middle, esp_ids *out) {
  if (p->add_prefix_space && !middle && text[piece.at] != ' ') {
    esp_strbuf_clear(&e->spare);
    esp_strbuf_putc(&e->spare, ' ');
    esp_strbuf_add(&e->spare, text + piece.at, piece.n);
    if (e->spare.failed) return ESP_ERR_MEMORY;
    text = e->spare.data;
    piece = (esp_piece){0, piece.n + 1, piece.first};
  }
  const char *s = text + piece.at;
  if (!p->use_regex) return esp_bpe_piece(t, e, s, piece.n, out);
  for (size_t at = 0; at < piece.n;) {
    size_t stop = esp_split_next(p->known, s, piece.n, at);
    ESP_TRY(esp_bpe_piece(t, e, s + at, stop - at, out));
    at = stop;
  }
  return ESP_OK;
}

/* A whole section that one hand-written Split cuts before a regex-free ByteLevel (Llama 3, Qwen2), or that goes
 * straight to the fused ByteLevel (GPT-2): no list of pieces at all. */
static const esp_pre *direct_cutter(const esp_tokenizer *t) {
  if (!t->bpe.bytes || t->n_pres != 2) return NULL;
  const esp_pre *a = &t->pres[0], *b = &t->pres[1];
  bool ok = a->kind == ESP_PRE_SPLIT && a->known && a->behavior == ESP_BEHAVE_ISOLATED && !a->invert && !b->use_regex &&
            !b->add_prefix_space;
  return ok ? a : NULL;
}

esp_status esp_tok_section(const esp_tokenizer *t, esp_encoder *e, const char *text, size_t n, esp_section where,
                           esp_ids *out) {
  if (n == 0) return ESP_OK;
  if (n >= UINT32_MAX / 8) return esp_fail(ESP_ERR_DATA, "a text of %zu bytes is too long to tokenise", n);
  esp_piece whole = {0, (uint32_t)n, where == ESP_SECTION_START};
  bool middle = where == ESP_SECTION_MIDDLE;
  const esp_pre *cutter = direct_cutter(t);
  if (cutter) {
    for (size_t at = 0; at < n;) {
      size_t stop = esp_split_next(cutter->known, text, n, at);
      ESP_TRY(esp_bpe_piece(t, e, text + at, stop - at, out));
      at = stop;
    }
    return ESP_OK;
  }
  if (t->n_pres == 0) return feed(t, e, text, n, out);
  if (t->n_pres == 1 && t->bpe.bytes) return byte_level_direct(t, &t->pres[0], e, text, whole, middle, out);

  esp_strbuf made[2], spaced; /* rewritten text: each rewriting stage reads one and writes the other */
  esp_strbuf_init(&made[0]);
  esp_strbuf_init(&made[1]);
  esp_strbuf_init(&spaced);
  esp_status st = ESP_OK;
  int turn = 0;
  e->n_pieces = 0;
  ESP_GOTO(push(e, 0, n, whole.first));
  for (int k = 0; k < t->n_pres; k++) {
    const esp_pre *p = &t->pres[k];
    esp_piece *from = e->pieces;
    int64_t n_from = e->n_pieces, cap_from = e->cap_pieces;
    bool last = k + 1 == t->n_pres, rewrites = p->kind == ESP_PRE_METASPACE || p->kind == ESP_PRE_BYTE_LEVEL;
    e->pieces = e->pieces2;
    e->cap_pieces = e->cap_pieces2;
    e->pieces2 = from;
    e->cap_pieces2 = cap_from;
    e->n_pieces = 0;
    esp_strbuf *to = &made[turn];
    if (rewrites) esp_strbuf_clear(to);
    esp_strbuf_clear(&spaced);
    for (int64_t i = 0; i < n_from; i++) {
      bool mid = middle && from[i].at == 0 && i == 0;
      if (last && t->bpe.bytes)
        st = byte_level_direct(t, p, e, text, from[i], mid, out);
      else if (p->kind == ESP_PRE_METASPACE)
        st = metaspace(p, e, text, from[i], mid, to);
      else if (p->kind == ESP_PRE_BYTE_LEVEL)
        st = byte_level(p, e, text, from[i], mid, &spaced, to);
      else if (p->kind == ESP_PRE_WHITESPACE)
        st = cut_words(e, text, from[i]);
      else if (p->kind == ESP_PRE_BERT)
        st = cut_bert(e, text, from[i]);
      else
        st = cut_piece(p, e, text, from[i]);
      if (st != ESP_OK) goto out;
    }
    if (last && t->bpe.bytes) goto out;
    if (rewrites) {
      text = to->data ? to->data : "";
      turn ^= 1;
    }
  }
  for (int64_t i = 0; i < e->n_pieces && st == ESP_OK; i++)
    st = feed(t, e, text + e->pieces[i].at, e->pieces[i].n, out);
out:
  esp_strbuf_deinit(&made[0]);
  esp_strbuf_deinit(&made[1]);
  esp_strbuf_deinit(&spaced);
  return st;
}
