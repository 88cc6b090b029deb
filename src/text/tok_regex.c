/* tok_regex.c: the `tokenizers` package matches with Oniguruma (Ruby syntax); this is PCRE2 with the differences that
 * concern tokenizer files taken care of: ^ and $ work per line, \s is White_Space without U+180E, and constructs that
 * the two read differently (\h, class intersection, nested classes) are errors. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "text/tok_priv.h"
#include "text/utf8.h"

struct esp_regex {
  pcre2_code *code;
  bool jit;
};
struct esp_regex_state {
  pcre2_match_data *data;
  pcre2_match_context *context;
  pcre2_jit_stack *stack;
};

#define SPACE_IN_CLASS "\\t-\\r \\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define NOT_SPACE_IN_CLASS                                                                                             \
  "\\x{0}-\\x{8}\\x{e}-\\x{1f}!-\\x{84}\\x{86}-\\x{9f}\\x{a1}-\\x{167f}\\x{1681}-\\x{1fff}\\x{200b}-\\x{2027}"         \
  "\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}\\x{3001}-\\x{10ffff}"

/* Oniguruma's \w: Alphabetic, marks, decimal digits, connectors; outside a class the
 * Latin-1 superscripts and fractions too (as the package behaves). PCRE2's lacks marks. */
#define WORD_IN_CLASS                                                                                                  \
  "\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{24b6}-\\x{24e9}\\x{1f130}-\\x{1f149}"                                          \
  "\\x{1f150}-\\x{1f169}\\x{1f170}-\\x{1f189}"

#define LATIN_NUMBERS "\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}"

static esp_status not_understood(const char *path, const char *pattern, const char *what) {
  return esp_fail(ESP_ERR_DATA, "%s: regular expression '%.80s': %s is not understood", path, pattern, what);
}

static esp_status translate(const char *p, size_t n, const char *path, esp_strbuf *out) {
  bool in_class = false;
  size_t class_at = 0;
  for (size_t i = 0; i < n; i++) {
    char c = p[i];
    if (c == '\\' && i + 1 < n) {
      char d = p[++i];
      if (d == 's') {
        esp_strbuf_puts(out, in_class ? SPACE_IN_CLASS : "[" SPACE_IN_CLASS "]");
      } else if (d == 'S') {
        esp_strbuf_puts(out, in_class ? NOT_SPACE_IN_CLASS : "[^" SPACE_IN_CLASS "]");
      } else if (d == 'w') {
        esp_strbuf_puts(out, in_class ? WORD_IN_CLASS : "[" WORD_IN_CLASS LATIN_NUMBERS "]");
      } else if (d == 'W' && !in_class) {
        esp_strbuf_puts(out, "[^" WORD_IN_CLASS LATIN_NUMBERS "]");
      } else if (strchr("hHRXGKQECWbB", d)) {
        return not_understood(path, p, "this escape");
      } else {
        esp_strbuf_putc(out, c);
        esp_strbuf_putc(out, d);
      }
    } else if (in_class && c == '[') {
      if (i + 1 >= n || p[i + 1] != ':') return not_understood(path, p, "a nested character class");
      esp_strbuf_putc(out, c);
    } else if (in_class && c == '&' && i + 1 < n && p[i + 1] == '&') {
      return not_understood(path, p, "class intersection");
    } else {
      if (!in_class && c == '[') {
        in_class = true;
        class_at = i + 1;
        if (class_at < n && p[class_at] == '^') class_at++;
      } else if (in_class && c == ']' && i > class_at && !(p[i - 1] == ':' && p[i - 2] != '[')) {
        in_class = false;
      }
      esp_strbuf_putc(out, c);
    }
  }
  return out->failed ? ESP_ERR_MEMORY : ESP_OK;
}

esp_status esp_regex_create(const char *pattern, size_t n, const char *path, esp_regex **out) {
  esp_status st = ESP_OK;
  esp_strbuf text;
  esp_strbuf_init(&text);
  pcre2_compile_context *cc = NULL;
  esp_regex *r = esp_mem_alloc(ESP_MEM_DATA, sizeof *r);
  if (!r) return ESP_ERR_MEMORY;
  ESP_GOTO(translate(pattern, n, path, &text));
  cc = pcre2_compile_context_create(NULL);
  if (!cc) {
    st = esp_fail_oom("a regular expression", n);
    goto out;
  }
  pcre2_set_newline(cc, PCRE2_NEWLINE_LF);
  int error;
  PCRE2_SIZE at;
  r->code = pcre2_compile((PCRE2_SPTR)(text.data ? text.data : ""), text.len,
                          PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NO_UTF_CHECK, &error, &at, cc);
  if (!r->code) {
    char why[160];
    pcre2_get_error_message(error, (PCRE2_UCHAR *)why, sizeof why);
    st = esp_fail(ESP_ERR_DATA, "%s: regular expression '%.80s': %s", path, pattern, why);
    goto out;
  }
  r->jit = pcre2_jit_compile(r->code, PCRE2_JIT_COMPLETE) == 0;
  *out = r;
  r = NULL;
out:
  esp_regex_destroy(r);
  pcre2_compile_context_free(cc);
  esp_strbuf_deinit(&text);
  return st;
}

void esp_regex_destroy(esp_regex *r) {
  if (!r) return;
  pcre2_code_free(r->code);
  esp_mem_free(r);
}

esp_status esp_regex_state_create(esp_regex_state **out) {
  esp_regex_state *s = esp_mem_alloc(ESP_MEM_DATA, sizeof *s);
  if (!s) return ESP_ERR_MEMORY;
  s->data = pcre2_match_data_create(32, NULL);
  s->context = pcre2_match_context_create(NULL);
  s->stack = pcre2_jit_stack_create(32 * 1024, 16 * 1024 * 1024, NULL);
  if (!s->data || !s->context || !s->stack) {
    esp_regex_state_destroy(s);
    return esp_fail_oom("regular expression state", 32 * 1024);
  }
  pcre2_jit_stack_assign(s->context, NULL, s->stack);
  *out = s;
  return ESP_OK;
}

void esp_regex_state_destroy(esp_regex_state *s) {
  if (!s) return;
  pcre2_jit_stack_free(s->stack);
  pcre2_match_context_free(s->context);
  pcre2_match_data_free(s->data);
  esp_mem_free(s);
}

const char *esp_regex_text(const char *text, size_t n, esp_strbuf *spare) {
  bool copied = false;
  if (esp_is_ascii(text, n)) return text;
  for (size_t i = 0; i < n;) {
    int len;
    uint32_t c = esp_utf8_get(text + i, &len), to = esp_cp_stand_in(c);
    if (to != c) {
      if (!copied) {
        esp_strbuf_clear(spare);
        esp_strbuf_add(spare, text, n);
        if (spare->failed) return NULL;
        copied = true;
      }
      esp_utf8_put(spare->data + i, to);
    }
    i += (size_t)len;
  }
  return copied ? spare->data : text;
}

int esp_regex_find(const esp_regex *r, esp_regex_state *s, const char *text, size_t n, size_t from, size_t *start,
                   size_t *stop) {
  int rc = r->jit ? pcre2_jit_match(r->code, (PCRE2_SPTR)text, n, from, 0, s->data, s->context)
                  : pcre2_match(r->code, (PCRE2_SPTR)text, n, from, PCRE2_NO_UTF_CHECK, s->data, s->context);
  if (rc == PCRE2_ERROR_NOMATCH) return 0;
  if (rc < 0) {
    char why[160];
    pcre2_get_error_message(rc, (PCRE2_UCHAR *)why, sizeof why);
    esp_fail(ESP_ERR_DATA, "regular expression of the tokenizer failed on a text of %zu bytes: %s", n, why);
    return -1;
  }
  const PCRE2_SIZE *o = pcre2_get_ovector_pointer(s->data);
  *start = o[0];
  *stop = o[1];
  return 1;
}
