/* tok_split.c: the three pre-tokenizer patterns that nearly all byte-level models use, matched by hand. Equal to the
 * regular expressions character by character (tests/unit/test_text_split.c compares them on random text). */
#include "text/tok_priv.h"
#include "text/utf8.h"

const char *const esp_gpt2_pattern =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
#define CL100K(number)                                                                                                 \
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" number                                                 \
  "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

esp_split_kind esp_split_known(const char *pattern, size_t n) {
  const char *const known[] = {esp_gpt2_pattern, CL100K("\\p{N}{1,3}"), CL100K("\\p{N}")};
  for (int i = 0; i < 3; i++)
    if (strlen(known[i]) == n && !memcmp(known[i], pattern, n)) return (esp_split_kind)(ESP_SPLIT_GPT2 + i);
  return ESP_SPLIT_NONE;
}

enum { OTHER, LETTER, NUMBER, SPACE };

static const unsigned char ascii[128] = {
    [9] = SPACE,    [10] = SPACE,   [11] = SPACE,   [12] = SPACE,   [13] = SPACE,   [' '] = SPACE,  ['0'] = NUMBER,
    ['1'] = NUMBER, ['2'] = NUMBER, ['3'] = NUMBER, ['4'] = NUMBER, ['5'] = NUMBER, ['6'] = NUMBER, ['7'] = NUMBER,
    ['8'] = NUMBER, ['9'] = NUMBER, ['A'] = LETTER, ['B'] = LETTER, ['C'] = LETTER, ['D'] = LETTER, ['E'] = LETTER,
    ['F'] = LETTER, ['G'] = LETTER, ['H'] = LETTER, ['I'] = LETTER, ['J'] = LETTER, ['K'] = LETTER, ['L'] = LETTER,
    ['M'] = LETTER, ['N'] = LETTER, ['O'] = LETTER, ['P'] = LETTER, ['Q'] = LETTER, ['R'] = LETTER, ['S'] = LETTER,
    ['T'] = LETTER, ['U'] = LETTER, ['V'] = LETTER, ['W'] = LETTER, ['X'] = LETTER, ['Y'] = LETTER, ['Z'] = LETTER,
    ['a'] = LETTER, ['b'] = LETTER, ['c'] = LETTER, ['d'] = LETTER, ['e'] = LETTER, ['f'] = LETTER, ['g'] = LETTER,
    ['h'] = LETTER, ['i'] = LETTER, ['j'] = LETTER, ['k'] = LETTER, ['l'] = LETTER, ['m'] = LETTER, ['n'] = LETTER,
    ['o'] = LETTER, ['p'] = LETTER, ['q'] = LETTER, ['r'] = LETTER, ['s'] = LETTER, ['t'] = LETTER, ['u'] = LETTER,
    ['v'] = LETTER, ['w'] = LETTER, ['x'] = LETTER, ['y'] = LETTER, ['z'] = LETTER};

static int wide_class(const char *p, int *len) {
  uint32_t cp = esp_utf8_get(p, len);
  if (esp_cp_letter(cp)) return LETTER;
  if (esp_cp_number(cp)) return NUMBER;
  return esp_cp_space(cp) ? SPACE : OTHER;
}

static inline int class_at(const char *p, int *len) {
  unsigned char c = (unsigned char)*p;
  if (c < 128) {
    *len = 1;
    return ascii[c];
  }
  return wide_class(p, len);
}

static inline size_t run(const char *s, size_t n, size_t at, int want) {
  int len;
  while (at < n && class_at(s + at, &len) == want) at += (size_t)len;
  return at;
}

/* After the apostrophe at `at`: end of 's 't 're 've 'm 'll 'd, 0 if none. fold: (?i), where U+017F is an s. */
static size_t contraction(const char *s, size_t n, size_t at, bool fold) {
  if (at + 1 >= n) return 0;
  unsigned char a = (unsigned char)s[at + 1], b = at + 2 < n ? (unsigned char)s[at + 2] : 0;
  if (fold) {
    if (a == 0xC5 && b == 0xBF) return at + 3;
    if (a >= 'A' && a <= 'Z') a += 32;
    if (b >= 'A' && b <= 'Z') b += 32;
  }
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return at + 2;
  if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return at + 3;
  return 0;
}

/* \s*[\r\n]+ (newlines only) | \s+(?!\S) | \s+ at a white space character. */
static size_t space_run(const char *s, size_t n, size_t at, bool newlines) {
  size_t end = at, last = at, newline = 0;
  int len;
  while (end < n && class_at(s + end, &len) == SPACE) {
    last = end;
    if (s[end] == '\r' || s[end] == '\n') newline = end + 1;
    end += (size_t)len;
  }
  if (newlines && newline) return newline;
  if (end == n || last == at) return end;
  return last;
}

static size_t next_gpt2(const char *s, size_t n, size_t at) {
  if (s[at] == '\'') {
    size_t end = contraction(s, n, at, false);
    if (end) return end;
  }
  int len, first = class_at(s + at, &len);
  size_t from = at;
  if (s[at] == ' ' && at + 1 < n) {
    int next_len, next = class_at(s + at + 1, &next_len);
    if (next != SPACE) {
      first = next;
      from = at + 1;
      len = next_len;
    }
  }
  if (first == SPACE) return space_run(s, n, at, false);
  return run(s, n, from + (size_t)len, first);
}

static size_t next_cl100k(const char *s, size_t n, size_t at, int digits) {
  if (s[at] == '\'') {
    size_t end = contraction(s, n, at, true);
    if (end) return end;
  }
  int len, first = class_at(s + at, &len), next_len = 0, next = -1;
  if (first == LETTER) return run(s, n, at + (size_t)len, LETTER);
  if (first == NUMBER) {
    at += (size_t)len;
    for (int i = 1; i < digits && at < n && class_at(s + at, &len) == NUMBER; i++) at += (size_t)len;
    return at;
  }
  if (at + (size_t)len < n) next = class_at(s + at + len, &next_len);
  if (next == LETTER && s[at] != '\r' && s[at] != '\n') return run(s, n, at + (size_t)(len + next_len), LETTER);
  size_t from = at + (size_t)len;
  if (s[at] == ' ' && next == OTHER) {
    first = OTHER;
    from += (size_t)next_len;
  }
  if (first == SPACE) return space_run(s, n, at, true);
  from = run(s, n, from, OTHER);
  while (from < n && (s[from] == '\r' || s[from] == '\n')) from++;
  return from;
}

size_t esp_split_next(esp_split_kind kind, const char *text, size_t n, size_t at) {
  if (kind == ESP_SPLIT_GPT2) return next_gpt2(text, n, at);
  return next_cl100k(text, n, at, kind == ESP_SPLIT_LLAMA3 ? 3 : 1);
}
