/* json_scan.c: see json_scan.h. */
#include "text/json_scan.h"

#include <string.h>

#include "text/utf8.h"

esp_status esp_scan_fail(const esp_scan *s, const char *what) {
  int line = 1, column = 1;
  for (const char *p = s->text; p < s->p; p++) {
    column++;
    if (*p == '\n') line++, column = 1;
  }
  return esp_fail(ESP_ERR_DATA, "%s:%d:%d: %s", s->path, line, column, what);
}

void esp_scan_space(esp_scan *s) {
  while (s->p < s->end && (*s->p == ' ' || *s->p == '\n' || *s->p == '\t' || *s->p == '\r')) s->p++;
}

bool esp_scan_take(esp_scan *s, char c) {
  esp_scan_space(s);
  if (s->p >= s->end || *s->p != c) return false;
  s->p++;
  return true;
}

esp_status esp_scan_expect(esp_scan *s, char c) {
  if (esp_scan_take(s, c)) return ESP_OK;
  char what[32] = "expected ' '";
  what[10] = c;
  return esp_scan_fail(s, what);
}

static int hex4(const char *p) {
  int v = 0;
  for (int i = 0; i < 4; i++) {
    char c = p[i];
    int d = c >= '0' && c <= '9'   ? c - '0'
            : c >= 'a' && c <= 'f' ? c - 'a' + 10
            : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                   : -1;
    if (d < 0) return -1;
    v = v * 16 + d;
  }
  return v;
}

/* After "\u": one code point, surrogate pairs joined. */
static esp_status scan_unicode(esp_scan *s, uint32_t *cp) {
  if (s->end - s->p < 4) return esp_scan_fail(s, "truncated \\u escape");
  int hi = hex4(s->p);
  if (hi < 0) return esp_scan_fail(s, "bad \\u escape");
  s->p += 4;
  *cp = (uint32_t)hi;
  if (hi < 0xD800 || hi > 0xDFFF) return ESP_OK;
  if (hi > 0xDBFF || s->end - s->p < 6 || s->p[0] != '\\' || s->p[1] != 'u')
    return esp_scan_fail(s, "unpaired surrogate in \\u escape");
  int lo = hex4(s->p + 2);
  if (lo < 0xDC00 || lo > 0xDFFF) return esp_scan_fail(s, "unpaired surrogate in \\u escape");
  s->p += 6;
  *cp = 0x10000u + (((uint32_t)hi - 0xD800u) << 10) + ((uint32_t)lo - 0xDC00u);
  return ESP_OK;
}

esp_status esp_scan_string(esp_scan *s, char *buf, size_t *n) {
  ESP_TRY(esp_scan_expect(s, '"'));
  char *o = buf;
  for (;;) {
    if (s->p >= s->end) return esp_scan_fail(s, "unterminated string");
    unsigned char c = (unsigned char)*s->p;
    if (c == '"') break;
    if (c < 0x20) return esp_scan_fail(s, "control character in a string");
    if (c != '\\') {
      *o++ = (char)c;
      s->p++;
      continue;
    }
    if (s->end - s->p < 2) return esp_scan_fail(s, "unterminated string");
    char e = s->p[1];
    s->p += 2;
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const char *at = e ? strchr(from, e) : NULL;
    if (at) {
      *o++ = to[at - from];
    } else if (e == 'u') {
      uint32_t cp = 0;
      ESP_TRY(scan_unicode(s, &cp));
      o += esp_utf8_put(o, cp);
    } else {
      return esp_scan_fail(s, "unknown escape in a string");
    }
  }
  s->p++;
  *o = 0;
  *n = (size_t)(o - buf);
  return ESP_OK;
}

esp_status esp_scan_int(esp_scan *s, int64_t *out) {
  esp_scan_space(s);
  bool negative = s->p < s->end && *s->p == '-';
  if (negative) s->p++;
  if (s->p >= s->end || *s->p < '0' || *s->p > '9') return esp_scan_fail(s, "expected an integer");
  int64_t v = 0;
  while (s->p < s->end && *s->p >= '0' && *s->p <= '9') {
    v = v * 10 + (*s->p++ - '0');
    if (v > INT32_MAX) return esp_scan_fail(s, "integer out of range");
  }
  if (s->p < s->end && (*s->p == '.' || *s->p == 'e' || *s->p == 'E')) return esp_scan_fail(s, "expected an integer");
  *out = negative ? -v : v;
  return ESP_OK;
}

esp_status esp_scan_skip(esp_scan *s, const char **from, const char **to) {
  esp_scan_space(s);
  *from = s->p;
  int64_t depth = 0;
  bool any = false;
  while (s->p < s->end) {
    char c = *s->p;
    if (depth == 0 && any && (c == ',' || c == '}' || c == ']' || c == ' ' || c == '\n' || c == '\r' || c == '\t'))
      break;
    any = true;
    if (c == '"') {
      s->p++;
      while (s->p < s->end && *s->p != '"') s->p += *s->p == '\\' && s->p + 1 < s->end ? 2 : 1;
      if (s->p >= s->end) return esp_scan_fail(s, "unterminated string");
      s->p++;
    } else {
      if (c == '{' || c == '[') depth++;
      if (c == '}' || c == ']') {
        if (depth == 0) return esp_scan_fail(s, "expected a value");
        depth--;
      }
      s->p++;
    }
    if (depth == 0 && (c == '"' || c == '}' || c == ']')) break;
  }
  if (!any || depth) return esp_scan_fail(s, "unexpected end of the file");
  *to = s->p;
  return ESP_OK;
}
