#include "io/json.h"

#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "io/file.h"

static const char *type_name(const json_t *j) {
  static const char *const names[] = {"an object", "an array", "a string", "an integer",
                                      "a number",  "true",     "false",    "null"};
  return (unsigned)json_typeof(j) < sizeof names / sizeof *names ? names[json_typeof(j)] : "something else";
}

esp_status esp_json_parse(const char *text, size_t n, const char *path, json_t **out) {
  json_error_t e;
  *out = NULL;
  /* A raw zero byte is never legal, and the parser loses one that it pushes back (after a number, say). */
  const char *zero = n ? memchr(text, 0, n) : NULL;
  if (zero) {
    int line = 1, column = 1;
    for (const char *p = text; p < zero; p++) {
      column = *p == '\n' ? 1 : column + 1;
      line += *p == '\n';
    }
    return esp_fail(ESP_ERR_DATA, "%s:%d:%d: not valid JSON: a zero byte", path, line, column);
  }
  /* Any value at the top (the caller asks for the type it wants); strings may hold \u0000 (tokenizer vocabularies). */
  json_t *j = json_loadb(text ? text : "", n, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY | JSON_ALLOW_NUL, &e);
  *out = j;
  if (j) return ESP_OK;
  if (json_error_code(&e) == json_error_out_of_memory) return esp_fail_oom(path, n);
  for (char *p = e.text; *p; p++) /* a control character of the input must not break the line */
    if ((unsigned char)*p < 0x20 || *p == 0x7f) *p = '?';
  return esp_fail(ESP_ERR_DATA, "%s:%d:%d: not valid JSON: %s", path, e.line > 0 ? e.line : 1,
                  e.column > 0 ? e.column : 1, e.text);
}

esp_status esp_json_load(const char *path, json_t **out) {
  char *text = NULL;
  size_t n = 0;
  *out = NULL;
  ESP_TRY(esp_file_read(path, &text, &n));
  esp_status st = esp_json_parse(text, n, path, out);
  esp_mem_free(text);
  return st;
}

esp_status esp_json_save(const char *path, json_t *j, int sort) {
  char *text = json_dumps(j, JSON_INDENT(2) | JSON_ENCODE_ANY | (sort ? JSON_SORT_KEYS : 0));
  if (!text) return esp_fail(ESP_ERR_INTERNAL, "%s: the value cannot be written as JSON", path);
  size_t n = strlen(text);
  text[n] = '\n'; /* in place of the zero: a text file ends with a newline */
  esp_status st = esp_file_write_atomic(path, text, n + 1);
  free(text);
  return st;
}

/* *value is NULL, with ESP_OK, when the key is absent or null and not required. */
static esp_status member(const json_t *o, const char *key, const char *path, int required, const json_t **value) {
  *value = NULL;
  if (!json_is_object(o))
    return esp_fail(ESP_ERR_DATA, "%s: must be an object, not %s", path, o ? type_name(o) : "empty");
  const json_t *v = json_object_get(o, key);
  if (v && !json_is_null(v))
    *value = v;
  else if (required)
    return esp_fail(ESP_ERR_DATA, "%s: key '%s' is missing", path, key);
  return ESP_OK;
}

static esp_status wrong(const json_t *v, const char *key, const char *path, const char *want) {
  return esp_fail(ESP_ERR_DATA, "%s: key '%s' must be %s, not %s", path, key, want, type_name(v));
}

esp_status esp_json_i64(const json_t *o, const char *key, const char *path, int required, int64_t *out) {
  const json_t *v;
  ESP_TRY(member(o, key, path, required, &v));
  if (!v) return ESP_OK;
  if (!json_is_integer(v)) return wrong(v, key, path, "an integer");
  *out = json_integer_value(v);
  return ESP_OK;
}

esp_status esp_json_f64(const json_t *o, const char *key, const char *path, int required, double *out) {
  const json_t *v;
  ESP_TRY(member(o, key, path, required, &v));
  if (!v) return ESP_OK;
  if (!json_is_number(v)) return wrong(v, key, path, "a number");
  *out = json_number_value(v);
  return ESP_OK;
}

esp_status esp_json_bool(const json_t *o, const char *key, const char *path, int required, int *out) {
  const json_t *v;
  ESP_TRY(member(o, key, path, required, &v));
  if (!v) return ESP_OK;
  if (!json_is_boolean(v)) return wrong(v, key, path, "true or false");
  *out = json_is_true(v);
  return ESP_OK;
}

esp_status esp_json_str(const json_t *o, const char *key, const char *path, int required, const char **out) {
  const json_t *v;
  ESP_TRY(member(o, key, path, required, &v));
  if (!v) return ESP_OK;
  if (!json_is_string(v)) return wrong(v, key, path, "a string");
  const char *s = json_string_value(v);
  if (strlen(s) != json_string_length(v)) return esp_fail(ESP_ERR_DATA, "%s: key '%s' holds a zero byte", path, key);
  *out = s;
  return ESP_OK;
}
