/* utf8.h: code points in and out of UTF-8, and the character classes of the pre-tokenisers. */
#ifndef ESP_TEXT_UTF8_H
#define ESP_TEXT_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Writes cp (not a surrogate) to o, returns 1..4. */
static inline int esp_utf8_put(char *o, uint32_t cp) {
  if (cp < 0x80) {
    o[0] = (char)cp;
    return 1;
  }
  if (cp < 0x800) {
    o[0] = (char)(0xC0 | cp >> 6);
    o[1] = (char)(0x80 | (cp & 63));
    return 2;
  }
  if (cp < 0x10000) {
    o[0] = (char)(0xE0 | cp >> 12);
    o[1] = (char)(0x80 | (cp >> 6 & 63));
    o[2] = (char)(0x80 | (cp & 63));
    return 3;
  }
  o[0] = (char)(0xF0 | cp >> 18);
  o[1] = (char)(0x80 | (cp >> 12 & 63));
  o[2] = (char)(0x80 | (cp >> 6 & 63));
  o[3] = (char)(0x80 | (cp & 63));
  return 4;
}

/* The code point at p of *valid* UTF-8; *len gets its bytes. */
static inline uint32_t esp_utf8_get(const char *p, int *len) {
  const unsigned char *u = (const unsigned char *)p;
  if (u[0] < 0x80) {
    *len = 1;
    return u[0];
  }
  if (u[0] < 0xE0) {
    *len = 2;
    return (uint32_t)(u[0] & 31) << 6 | (u[1] & 63);
  }
  if (u[0] < 0xF0) {
    *len = 3;
    return (uint32_t)(u[0] & 15) << 12 | (uint32_t)(u[1] & 63) << 6 | (u[2] & 63);
  }
  *len = 4;
  return (uint32_t)(u[0] & 7) << 18 | (uint32_t)(u[1] & 63) << 12 | (uint32_t)(u[2] & 63) << 6 | (u[3] & 63);
}

/* Bytes of the character that ends just before p (p > start, valid UTF-8). */
static inline int esp_utf8_back(const char *p) {
  int n = 1;
  while (((unsigned char)p[-n] & 0xC0) == 0x80) n++;
  return n;
}

static inline bool esp_is_ascii(const char *s, size_t n) {
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t w;
    memcpy(&w, s + i, 8);
    if (w & 0x8080808080808080ull) return false;
  }
  for (; i < n; i++)
    if ((unsigned char)s[i] & 0x80) return false;
  return true;
}

/* Length of the valid prefix of s (n when all of it is UTF-8: no surrogates, no overlong forms). */
size_t esp_utf8_valid(const char *s, size_t n);
/* For invalid bytes at s: how many of them one U+FFFD stands for (the maximal subpart rule of Unicode 3.9, which
 * Python's errors="replace" and Rust's from_utf8_lossy share). */
size_t esp_utf8_bad(const char *s, size_t n);

/* White_Space of Unicode (Rust's char::is_whitespace, Oniguruma's \s): not U+180E, unlike PCRE2's \s. */
bool esp_cp_space(uint32_t cp);
/* The classes below need esp_classes_init (each loader calls it); they are those of the `tokenizers` package. */
void esp_classes_init(void);
bool esp_cp_letter(uint32_t cp);     /* \p{L} */
bool esp_cp_number(uint32_t cp);     /* \p{N} */
bool esp_cp_numeric(uint32_t cp);    /* Digits */
bool esp_cp_punct(uint32_t cp);      /* BertPreTokenizer, Punctuation */
bool esp_cp_mark(uint32_t cp);       /* StripAccents */
bool esp_cp_nonspacing(uint32_t cp); /* BertNormalizer strip_accents */
bool esp_cp_control(uint32_t cp);    /* BertNormalizer clean_text */
bool esp_cp_word(uint32_t cp);       /* \w of Whitespace and single_word */
/* For a character that PCRE2's tables do not know yet: an older one of its category and length; else the character. */
uint32_t esp_cp_stand_in(uint32_t cp);
bool esp_cp_cjk(uint32_t cp); /* the ideograph ranges of BERT */

#endif
