/* regex.c: implements regex.h */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "core/regex.h"

#include <pcre2.h>
#include <string.h>

enum { SEARCH = 0, MATCH = PCRE2_ANCHORED, FULL = PCRE2_ANCHORED | PCRE2_ENDANCHORED };

static pcre2_code *compile(const char *pattern, uint32_t how, int *error, PCRE2_SIZE *where) {
  uint32_t options = PCRE2_UTF | PCRE2_UCP | how;
  return pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, options, error, where, NULL);
}

esp_status esp_regex_check(const char *key, const char *pattern) {
  int error = 0;
  PCRE2_SIZE where = 0;
  pcre2_code *code = compile(pattern, FULL, &error, &where);
  if (code) {
    pcre2_code_free(code);
    return ESP_OK;
  }
  char text[160] = "";
  pcre2_get_error_message(error, (PCRE2_UCHAR *)text, sizeof text);
  return esp_fail(ESP_ERR_RECIPE, "%s: regular expression '%s': %s at character %d", key, pattern, text,
                  (int)where + 1);
}

static bool run_regex(const char *pattern, const char *text, uint32_t how, char *group, size_t group_size) {
  int error = 0;
  PCRE2_SIZE where = 0;
  pcre2_code *code = compile(pattern, how, &error, &where);
  if (!code) return false;
  pcre2_match_data *match = pcre2_match_data_create_from_pattern(code, NULL);
  int rc = match ? pcre2_match(code, (PCRE2_SPTR)text, strlen(text), 0, 0, match, NULL) : -1;
  if (rc >= 2 && group) {
    PCRE2_SIZE n = group_size;
    if (pcre2_substring_copy_byname(match, (PCRE2_SPTR) "idx", (PCRE2_UCHAR *)group, &n) != 0) group[0] = 0;
  }
  pcre2_match_data_free(match);
  pcre2_code_free(code);
  return rc >= 0;
}

bool esp_regex_full(const char *pattern, const char *text) {
  return run_regex(pattern, text, FULL, NULL, 0);
}

bool esp_regex_match(const char *pattern, const char *text, char *group, size_t group_size) {
  return run_regex(pattern, text, MATCH, group, group_size);
}

bool esp_regex_search(const char *pattern, const char *text) {
  return run_regex(pattern, text, SEARCH, NULL, 0);
}
