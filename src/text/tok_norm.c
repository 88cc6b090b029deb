/* tok_norm.c: the normalizers. Each reads one buffer and writes another. */
#include <stdlib.h>
#include <utf8proc.h>

#include "text/tok_priv.h"
#include "text/utf8.h"

/* A character that no form changes and that never joins the one before it: text may be cut in front of it. (The
 * composed forms of NFC: Latin, punctuation, ideographs, kana, Hangul syllables; for the others ASCII is enough.) */
static bool stands_alone(uint32_t c, bool nfc) {
  if (c < 0x80) return true;
  if (!nfc) return false;
  return c < 0x300 || (c >= 0x370 && c < 0x374) || (c >= 0x388 && c < 0x483) || (c >= 0x2002 && c < 0x20D0) ||
         (c >= 0x3041 && c < 0x3099) || (c >= 0x30A1 && c < 0x3100) || (c >= 0x4E00 && c < 0xA000) ||
         (c >= 0xAC00 && c < 0xD7A4) || (c >= 0x1F300 && c < 0x1FB00);
}

static esp_status form_span(const char *s, size_t n, int options, esp_strbuf *out) {
  utf8proc_uint8_t *r = NULL;
  utf8proc_ssize_t m = utf8proc_map((const utf8proc_uint8_t *)s, (utf8proc_ssize_t)n, &r, (utf8proc_option_t)options);
  if (m < 0) return esp_fail(ESP_ERR_DATA, "Unicode normalisation failed: %s", utf8proc_errmsg(m));
  esp_strbuf_add(out, (const char *)r, (size_t)m);
  free(r);
  return ESP_OK;
}

static esp_status form(const char *s, size_t n, esp_norm_kind kind, esp_strbuf *out) {
  bool nfc = kind == ESP_NORM_NFC;
  int options = UTF8PROC_STABLE;
  options |= nfc || kind == ESP_NORM_NFKC ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
  if (kind == ESP_NORM_NFKC || kind == ESP_NORM_NFKD) options |= UTF8PROC_COMPAT;
  size_t copied = 0, last = 0; /* last: start of the latest character that stands alone */
  for (size_t i = 0; i < n;) {
    int len;
    if (i + 8 <= n) { /* eight ASCII bytes at once */
      uint64_t w;
      memcpy(&w, s + i, 8);
      if (!(w & 0x8080808080808080ull)) {
        last = i + 7;
        i += 8;
        continue;
      }
    }
    if (stands_alone(esp_utf8_get(s + i, &len), nfc)) {
      last = i;
      i += (size_t)len;
      continue;
    }
    size_t end = i + (size_t)len;
    while (end < n && !stands_alone(esp_utf8_get(s + end, &len), nfc)) end += (size_t)len;
    esp_strbuf_add(out, s + copied, last - copied);
    ESP_TRY(form_span(s + last, end - last, options, out));
    copied = last = i = end;
  }
  esp_strbuf_add(out, s + copied, n - copied);
  return ESP_OK;
}

static void put(esp_strbuf *out, uint32_t cp) {
  char b[4];
  esp_strbuf_add(out, b, (size_t)esp_utf8_put(b, cp));
}

static void lower(const char *s, size_t n, esp_strbuf *out) {
  char block[256];
  for (size_t i = 0; i < n;) {
    size_t m = 0;
    for (; i < n && m < sizeof block && (unsigned char)s[i] < 0x80; i++)
      block[m++] = (char)(s[i] >= 'A' && s[i] <= 'Z' ? s[i] + 32 : s[i]);
    esp_strbuf_add(out, block, m);
    if (i == n) break;
    int len;
    uint32_t c = esp_utf8_get(s + i, &len);
    if (c == 0x130)
      esp_strbuf_puts(out, "i\xCC\x87"); /* the one unconditional mapping to two characters */
    else
      put(out, (uint32_t)utf8proc_tolower((utf8proc_int32_t)c));
    i += (size_t)len;
  }
}

static void drop(const char *s, size_t n, bool (*what)(uint32_t), esp_strbuf *out) {
  for (size_t i = 0; i < n;) {
    int len;
    if (!what(esp_utf8_get(s + i, &len))) esp_strbuf_add(out, s + i, (size_t)len);
    i += (size_t)len;
  }
}

static esp_status bert(const esp_norm *k, const char *s, size_t n, esp_strbuf *out) {
  esp_status st = ESP_OK;
  esp_strbuf a, b;
  esp_strbuf_init(&a);
  esp_strbuf_init(&b);
  for (size_t i = 0; i < n;) {
    size_t plain = i; /* a run of printable ASCII passes as it is */
    while (plain < n && s[plain] >= ' ' && s[plain] < 0x7F) plain++;
    esp_strbuf_add(&a, s + i, plain - i);
    i = plain;
    if (i == n) break;
    int len;
    uint32_t c = esp_utf8_get(s + i, &len);
    bool space = esp_cp_space(c), cjk = k->cjk && esp_cp_cjk(c);
    if (!(k->clean && esp_cp_control(c))) {
      if (cjk) esp_strbuf_putc(&a, ' ');
      if (k->clean && space)
        esp_strbuf_putc(&a, ' ');
      else
        esp_strbuf_add(&a, s + i, (size_t)len);
      if (cjk) esp_strbuf_putc(&a, ' ');
    }
    i += (size_t)len;
  }
  if (k->strip_accents && a.len) {
    ESP_GOTO(form(a.data, a.len, ESP_NORM_NFD, &b));
    esp_strbuf_clear(&a);
    drop(b.data, b.len, esp_cp_nonspacing, &a);
  }
  if (k->lower)
    lower(a.data, a.len, out);
  else
    esp_strbuf_add(out, a.data ? a.data : "", a.len);
  if (a.failed || b.failed) st = ESP_ERR_MEMORY;
out:
  esp_strbuf_deinit(&a);
  esp_strbuf_deinit(&b);
  return st;
}

static void replace(const char *s, size_t n, const esp_norm *k, esp_strbuf *out) {
  size_t at = 0;
  if (k->na == 1 && k->nb <= 4) { /* " " -> U+2581 */
    char block[1024 + 4];
    size_t m = 0;
    for (size_t i = 0; i < n; i++) {
      if (s[i] == k->a[0]) {
        memcpy(block + m, k->b, k->nb);
        m += k->nb;
      } else {
        block[m++] = s[i];
      }
      if (m >= 1024) {
        esp_strbuf_add(out, block, m);
        m = 0;
      }
    }
    esp_strbuf_add(out, block, m);
    return;
  }
  while (k->na && at < n) {
    const char *hit = memmem(s + at, n - at, k->a, k->na);
    if (!hit) break;
    esp_strbuf_add(out, s + at, (size_t)(hit - s) - at);
    esp_strbuf_add(out, k->b, k->nb);
    at = (size_t)(hit - s) + k->na;
  }
  esp_strbuf_add(out, s + at, n - at);
}

static esp_status replace_regex(esp_encoder *e, const char *s, size_t n, const esp_norm *k, esp_strbuf *out) {
  size_t at = 0, from = 0, start, stop;
  int rc;
  const char *seen = esp_regex_text(s, n, &e->stand_in);
  if (!seen) return ESP_ERR_MEMORY;
  while (from <= n && (rc = esp_regex_find(k->regex, e->regex, seen, n, from, &start, &stop)) != 0) {
    if (rc < 0) return ESP_ERR_DATA;
    esp_strbuf_add(out, s + at, start - at);
    esp_strbuf_add(out, k->b, k->nb);
    at = stop;
    from = stop;
    if (start == stop) {
      int len = 1;
      if (stop < n) esp_utf8_get(s + stop, &len);
      from += (size_t)len;
    }
  }
  esp_strbuf_add(out, s + at, n - at);
  return ESP_OK;
}

static void strip(const char *s, size_t n, const esp_norm *k, esp_strbuf *out) {
  size_t from = 0;
  int len;
  while (k->left && from < n && esp_cp_space(esp_utf8_get(s + from, &len))) from += (size_t)len;
  while (k->right && n > from && esp_cp_space(esp_utf8_get(s + n - esp_utf8_back(s + n), &len)))
    n -= (size_t)esp_utf8_back(s + n);
  esp_strbuf_add(out, s + from, n - from);
}

static esp_status apply(const esp_norm *k, esp_encoder *e, const char *s, size_t n, bool middle, esp_strbuf *out) {
  switch (k->kind) {
  case ESP_NORM_NFC:
  case ESP_NORM_NFD:
  case ESP_NORM_NFKC:
  case ESP_NORM_NFKD:
    return form(s, n, k->kind, out);
  case ESP_NORM_LOWERCASE:
    lower(s, n, out);
    break;
  case ESP_NORM_STRIP:
    strip(s, n, k, out);
    break;
  case ESP_NORM_STRIP_ACCENTS:
    drop(s, n, esp_cp_mark, out);
    break;
  case ESP_NORM_PREPEND:
    if (n && !middle) esp_strbuf_add(out, k->a, k->na);
    esp_strbuf_add(out, s, n);
    break;
  case ESP_NORM_REPLACE:
    replace(s, n, k, out);
    break;
  case ESP_NORM_REPLACE_REGEX:
    return replace_regex(e, s, n, k, out);
  case ESP_NORM_BERT:
    return bert(k, s, n, out);
  case ESP_NORM_BYTE_LEVEL:
    esp_byte_map(s, n, out);
    break;
  }
  return ESP_OK;
}

esp_status esp_tok_normalize(const esp_tokenizer *t, esp_encoder *e, const char *in, size_t n, bool middle,
                             esp_strbuf *out) {
  for (int i = 0; i < t->n_norms; i++) {
    esp_strbuf *to = (t->n_norms - i) % 2 ? out : &e->spare; /* the last one writes `out` */
    esp_strbuf_clear(to);
    ESP_TRY(apply(&t->norms[i], e, in, n, middle, to));
    if (to->failed) return ESP_ERR_MEMORY;
    in = to->data ? to->data : "";
    n = to->len;
  }
  return ESP_OK;
}
