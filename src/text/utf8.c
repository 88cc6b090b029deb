/* utf8.c: validation and character classes. */
#include "text/utf8.h"

#include <pthread.h>

#include "text/unicode_ranges.h"

size_t esp_utf8_bad(const char *s, size_t n) {
  const unsigned char *u = (const unsigned char *)s;
  unsigned char lo = 0x80, hi = 0xBF;
  size_t want;
  if (u[0] >= 0xC2 && u[0] <= 0xDF) {
    want = 2;
  } else if (u[0] >= 0xE0 && u[0] <= 0xEF) {
    want = 3;
    if (u[0] == 0xE0) lo = 0xA0;
    if (u[0] == 0xED) hi = 0x9F;
  } else if (u[0] >= 0xF0 && u[0] <= 0xF4) {
    want = 4;
    if (u[0] == 0xF0) lo = 0x90;
    if (u[0] == 0xF4) hi = 0x8F;
  } else {
    return 1;
  }
  size_t i = 1;
  while (i < want && i < n && u[i] >= lo && u[i] <= hi) {
    i++;
    lo = 0x80;
    hi = 0xBF;
  }
  return i;
}

size_t esp_utf8_valid(const char *s, size_t n) {
  const unsigned char *u = (const unsigned char *)s;
  size_t i = 0;
  while (i < n) {
    if (i + 8 <= n) {
      uint64_t w;
      memcpy(&w, s + i, 8);
      if (!(w & 0x8080808080808080ull)) {
        i += 8;
        continue;
      }
    }
    if (u[i] < 0x80) {
      i++;
      continue;
    }
    size_t want = u[i] < 0xE0 ? 2 : u[i] < 0xF0 ? 3 : 4;
    if (u[i] < 0xC2 || u[i] > 0xF4 || i + want > n || esp_utf8_bad(s + i, n - i) != want) return i;
    i += want;
  }
  return n;
}

bool esp_cp_space(uint32_t c) {
  if (c < 0x80) return c == ' ' || (c >= 9 && c <= 13);
  return c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 ||
         c == 0x202F || c == 0x205F || c == 0x3000;
}

enum {
  LETTER = 1,
  NUMBER = 2,
  NUMERIC = 4,
  PUNCT = 8,
  MARK = 16,
  NONSPACING = 32,
  CONTROL = 64,
  WORD = 128,
  NEWER = 256
};

static uint16_t classes[0x110000];
static pthread_once_t classes_once = PTHREAD_ONCE_INIT;

static void fill(const uint32_t *ranges, size_t n, uint16_t bit) {
  for (size_t i = 0; i < n; i += 2)
    for (uint32_t c = ranges[i]; c <= ranges[i + 1]; c++) classes[c] |= bit;
}
#define FILL(name, bit) fill(range_##name, sizeof range_##name / sizeof *range_##name, bit)

static void classes_build(void) {
  FILL(letter, LETTER);
  FILL(number, NUMBER);
  FILL(numeric, NUMERIC);
  FILL(punct, PUNCT);
  FILL(mark, MARK);
  FILL(nonspacing, NONSPACING);
  FILL(control, CONTROL);
  FILL(word, WORD);
  for (size_t i = 0; i < sizeof range_newer / sizeof *range_newer; i += 3)
    for (uint32_t c = range_newer[i]; c <= range_newer[i + 1]; c++) classes[c] |= NEWER;
}

uint32_t esp_cp_stand_in(uint32_t c) {
  if (!(classes[c] & NEWER)) return c;
  for (size_t i = 0; i < sizeof range_newer / sizeof *range_newer; i += 3)
    if (c >= range_newer[i] && c <= range_newer[i + 1]) return range_newer[i + 2];
  return c;
}

void esp_classes_init(void) {
  pthread_once(&classes_once, classes_build);
}

bool esp_cp_letter(uint32_t c) {
  return classes[c] & LETTER;
}
bool esp_cp_number(uint32_t c) {
  return classes[c] & NUMBER;
}
bool esp_cp_numeric(uint32_t c) {
  return classes[c] & NUMERIC;
}
bool esp_cp_punct(uint32_t c) {
  return classes[c] & PUNCT;
}
bool esp_cp_mark(uint32_t c) {
  return classes[c] & MARK;
}
bool esp_cp_nonspacing(uint32_t c) {
  return classes[c] & NONSPACING;
}
bool esp_cp_control(uint32_t c) {
  return classes[c] & CONTROL;
}
bool esp_cp_word(uint32_t c) {
  return classes[c] & WORD;
}

bool esp_cp_cjk(uint32_t c) {
  return (c >= 0x4E00 && c <= 0x9FFF) || (c >= 0x3400 && c <= 0x4DBF) || (c >= 0x20000 && c <= 0x2A6DF) ||
         (c >= 0x2A700 && c <= 0x2B73F) || (c >= 0x2B740 && c <= 0x2B81F) || (c >= 0x2B920 && c <= 0x2CEAF) ||
         (c >= 0xF900 && c <= 0xFAFF) || (c >= 0x2F800 && c <= 0x2FA1F);
}
