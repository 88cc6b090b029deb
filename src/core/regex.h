/* regex.h: regular expressions with Python's meaning (PCRE2 in the place of `re`), as recipes and adapter files use
 * them. A pattern that does not compile never matches: it is refused earlier by esp_regex_check. */
#ifndef ESP_CORE_REGEX_H
#define ESP_CORE_REGEX_H

#include <stdbool.h>
#include <stddef.h>

#include "core/error.h"

typedef struct esp_pattern { /* a mapping of regular expression to number; what is matched how, its reader says */
  const char *key;
  double value;
} esp_pattern;

esp_status esp_regex_check(const char *key, const char *pattern);
bool esp_regex_full(const char *pattern, const char *text);
/* re.match; group (optional) receives the text of the capture group named idx. */
bool esp_regex_match(const char *pattern, const char *text, char *group, size_t group_size);
bool esp_regex_search(const char *pattern, const char *text);

#endif
