/* tok_decode.c: ids back to text. Decoders work on a list of strings, as in the `tokenizers` package. */
#include "text/tok_priv.h"
#include "text/utf8.h"

typedef struct strings { /* n strings in one buffer: string i is data[at[i] .. at[i+1]) */
  esp_strbuf data;
  size_t *at;
  int64_t n, cap;
} strings;

static esp_status end_string(strings *s) {
  if (s->n + 2 > s->cap) {
    int64_t cap = s->cap * 2 + 64;
    void *p = esp_mem_realloc(ESP_MEM_DATA, s->at, (size_t)cap * sizeof *s->at);
    if (!p) return ESP_ERR_MEMORY;
    s->at = p;
    s->cap = cap;
    s->at[0] = 0;
  }
  s->at[++s->n] = s->data.len;
  return s->data.failed ? ESP_ERR_MEMORY : ESP_OK;
}

static void strings_deinit(strings *s) {
  esp_strbuf_deinit(&s->data);
  esp_mem_free(s->at);
}

static void add_lossy(esp_strbuf *out, const char *s, size_t n) {
  while (n) {
    size_t good = esp_utf8_valid(s, n);
    esp_strbuf_add(out, s, good);
    if (good == n) break;
    esp_strbuf_puts(out, "\xEF\xBF\xBD");
    size_t bad = esp_utf8_bad(s + good, n - good);
    s += good + bad;
    n -= good + bad;
  }
}

static void replace_all(esp_strbuf *out, const char *s, size_t n, const char *a, size_t na, const char *b, size_t nb) {
  size_t at = 0;
  while (na) {
    const char *hit = memmem(s + at, n - at, a, na);
    if (!hit) break;
    esp_strbuf_add(out, s + at, (size_t)(hit - s) - at);
    esp_strbuf_add(out, b, nb);
    at = (size_t)(hit - s) + na;
  }
  esp_strbuf_add(out, s + at, n - at);
}

static esp_status replace_regex(esp_strbuf *out, const esp_dec *d, const char *s, size_t n) {
  esp_regex_state *state;
  ESP_TRY(esp_regex_state_create(&state));
  size_t at = 0, from = 0, start, stop;
  int rc = 0;
  while (from <= n && (rc = esp_regex_find(d->regex, state, s, n, from, &start, &stop)) > 0) {
    esp_strbuf_add(out, s + at, start - at);
    esp_strbuf_add(out, d->b, d->nb);
    at = from = stop;
    if (start == stop) {
      int len = 1;
      if (stop < n) esp_utf8_get(s + stop, &len);
      from += (size_t)len;
    }
  }
  esp_strbuf_add(out, s + at, n - at);
  esp_regex_state_destroy(state);
  return rc < 0 ? ESP_ERR_DATA : ESP_OK;
}

static int hex_digit(char c) {
  return c >= '0' && c <= '9'   ? c - '0'
         : c >= 'a' && c <= 'f' ? c - 'a' + 10
         : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                : -1;
}

/* "<0xNN>" -> the byte, else -1 */
static int fallback_byte(const char *s, size_t n) {
  if (n != 6 || memcmp(s, "<0x", 3) || s[5] != '>') return -1;
  /* Rust's from_str_radix takes a sign: "<0x+A>" is the byte 10. */
  if (s[3] == '+') return hex_digit(s[4]);
  int hi = hex_digit(s[3]), lo = hex_digit(s[4]);
  return hi < 0 || lo < 0 ? -1 : hi * 16 + lo;
}

static esp_status byte_fallback(const strings *in, strings *out) {
  esp_strbuf run;
  esp_strbuf_init(&run);
  esp_status st = ESP_OK;
  for (int64_t i = 0; i <= in->n; i++) {
    const char *s = i < in->n ? in->data.data + in->at[i] : NULL;
    size_t n = i < in->n ? in->at[i + 1] - in->at[i] : 0;
    int byte = s ? fallback_byte(s, n) : -1;
    if (byte >= 0) {
      esp_strbuf_putc(&run, (char)byte);
      continue;
    }
    if (run.len) {
      if (esp_utf8_valid(run.data, run.len) == run.len) {
        esp_strbuf_add(&out->data, run.data, run.len);
        ESP_GOTO(end_string(out));
      } else {
        for (size_t k = 0; k < run.len; k++) {
          esp_strbuf_puts(&out->data, "\xEF\xBF\xBD");
          ESP_GOTO(end_string(out));
        }
      }
      esp_strbuf_clear(&run);
    }
    if (!s) break;
    esp_strbuf_add(&out->data, s, n);
    ESP_GOTO(end_string(out));
  }
  if (run.failed) st = ESP_ERR_MEMORY;
out:
  esp_strbuf_deinit(&run);
  return st;
}

static esp_status byte_level(const strings *in, strings *out) {
  esp_strbuf bytes;
  esp_strbuf_init(&bytes);
  for (int64_t i = 0; i < in->n; i++) {
    const char *s = in->data.data + in->at[i];
    size_t n = in->at[i + 1] - in->at[i], mark = bytes.len;
    for (size_t k = 0; k < n;) {
      int len, b = esp_cp_to_byte(esp_utf8_get(s + k, &len));
      if (b < 0) { /* not a byte-level token (an added one): taken as it is */
        bytes.len = mark;
        esp_strbuf_add(&bytes, s, n);
        break;
      }
      esp_strbuf_putc(&bytes, (char)b);
      k += (size_t)len;
    }
  }
  if (bytes.len) add_lossy(&out->data, bytes.data, bytes.len);
  bool failed = bytes.failed;
  esp_strbuf_deinit(&bytes);
  return failed ? ESP_ERR_MEMORY : end_string(out);
}

static void strip(const esp_dec *d, const char *s, size_t n, esp_strbuf *out) {
  size_t from = 0, to = n;
  for (int i = 0; i < d->start && n - from >= d->na && d->na && !memcmp(s + from, d->a, d->na); i++) from += d->na;
  for (int i = 0; i < d->stop && to >= from + d->na && d->na && !memcmp(s + to - d->na, d->a, d->na); i++) to -= d->na;
  esp_strbuf_add(out, s + from, to - from);
}

static void cleanup(const char *s, size_t n, esp_strbuf *out) {
  static const char *const rules[][2] = {{" .", "."},   {" ?", "?"},     {" !", "!"},    {" ,", ","},
                                         {" ' ", "'"},  {" n't", "n't"}, {" 'm", "'m"},  {" do not", " don't"},
                                         {" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"}};
  esp_strbuf a, b;
  esp_strbuf_init(&a);
  esp_strbuf_init(&b);
  esp_strbuf_add(&a, s, n);
  for (size_t i = 0; i < sizeof rules / sizeof *rules; i++) {
    esp_strbuf_clear(&b);
    replace_all(&b, a.data, a.len, rules[i][0], strlen(rules[i][0]), rules[i][1], strlen(rules[i][1]));
    esp_strbuf t = a;
    a = b;
    b = t;
  }
  if (a.failed || b.failed) out->failed = true;
  esp_strbuf_add(out, a.data ? a.data : "", a.len);
  esp_strbuf_deinit(&a);
  esp_strbuf_deinit(&b);
}

static esp_status wordpiece(const esp_dec *d, const char *s, size_t n, int64_t i, esp_strbuf *out) {
  esp_strbuf word;
  esp_strbuf_init(&word);
  if (i && n >= d->na && !memcmp(s, d->a, d->na)) {
    esp_strbuf_add(&word, s + d->na, n - d->na);
  } else {
    if (i) esp_strbuf_putc(&word, ' ');
    esp_strbuf_add(&word, s, n);
  }
  if (d->flag && word.len)
    cleanup(word.data, word.len, out);
  else if (word.len)
    esp_strbuf_add(out, word.data, word.len);
  bool failed = word.failed;
  esp_strbuf_deinit(&word);
  return failed ? ESP_ERR_MEMORY : ESP_OK;
}

static esp_status apply(const esp_dec *d, const strings *in, strings *out) {
  if (d->kind == ESP_DEC_BYTE_LEVEL) return byte_level(in, out);
  if (d->kind == ESP_DEC_BYTE_FALLBACK) return byte_fallback(in, out);
  if (d->kind == ESP_DEC_FUSE) {
    if (in->data.len) esp_strbuf_add(&out->data, in->data.data, in->data.len);
    return end_string(out);
  }
  for (int64_t i = 0; i < in->n; i++) {
    const char *s = in->data.data ? in->data.data + in->at[i] : "";
    size_t n = in->at[i + 1] - in->at[i];
    switch (d->kind) {
    case ESP_DEC_REPLACE:
      if (d->regex)
        ESP_TRY(replace_regex(&out->data, d, s, n));
      else
        replace_all(&out->data, s, n, d->a, d->na, d->b, d->nb);
      break;
    case ESP_DEC_STRIP:
      strip(d, s, n, &out->data);
      break;
    case ESP_DEC_METASPACE:
      replace_all(&out->data, s, n, d->a, d->na, " ", i == 0 && d->flag ? 0 : 1);
      break;
    case ESP_DEC_WORDPIECE:
      ESP_TRY(wordpiece(d, s, n, i, &out->data));
      break;
    default: /* ESP_DEC_BPE */
      replace_all(&out->data, s, n, d->a, d->na, " ", i + 1 == in->n ? 0 : 1);
      break;
    }
    ESP_TRY(end_string(out));
  }
  return ESP_OK;
}

esp_status esp_tokenizer_decode(const esp_tokenizer *t, const int32_t *ids, int64_t n, bool skip_special, char **text,
                                size_t *len) {
  esp_status st = ESP_OK;
  strings a = {0}, b = {0};
  esp_strbuf joined;
  esp_strbuf_init(&joined);
  for (int64_t i = 0; i < n; i++) {
    const char *s = esp_tokenizer_token(t, ids[i]);
    if (!s || (skip_special && esp_tokenizer_is_special(t, ids[i]))) continue;
    esp_strbuf_puts(&a.data, s);
    ESP_GOTO(end_string(&a));
  }
  for (int k = 0; k < t->n_decs; k++) {
    esp_strbuf_clear(&b.data);
    b.n = 0;
    ESP_GOTO(apply(&t->decs[k], &a, &b));
    strings swap = a;
    a = b;
    b = swap;
  }
  for (int64_t i = 0; i < a.n; i++) {
    if (i && !t->has_decoder) esp_strbuf_putc(&joined, ' ');
    if (a.at[i + 1] > a.at[i]) esp_strbuf_add(&joined, a.data.data + a.at[i], a.at[i + 1] - a.at[i]);
  }
  esp_strbuf_add(&joined, "", 0);
  *len = joined.len;
  *text = esp_strbuf_take(&joined);
  if (!*text) st = esp_fail_oom("decoded text", (unsigned long long)n);
out:
  strings_deinit(&a);
  strings_deinit(&b);
  esp_strbuf_deinit(&joined);
  return st;
}
