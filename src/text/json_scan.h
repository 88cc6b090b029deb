/* json_scan.h: a strict forward reader for the two large members of tokenizer.json (vocab and merges, several MB). The
 * rest of the file goes through jansson: this reader exists because building a hash table per member there takes longer
 * than everything else the loader does. */
#ifndef ESP_TEXT_JSON_SCAN_H
#define ESP_TEXT_JSON_SCAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/error.h"

typedef struct esp_scan {
  const char *text, *p, *end;
  const char *path; /* for messages */
} esp_scan;

/* Message "path:line:column: what". */
esp_status esp_scan_fail(const esp_scan *s, const char *what);
void esp_scan_space(esp_scan *s);
/* Consumes `c` after white space; false (nothing consumed) if something else is there. */
bool esp_scan_take(esp_scan *s, char c);
esp_status esp_scan_expect(esp_scan *s, char c);
/* A string literal, decoded into buf (which must have room for the rest of the text); *n without the final zero. */
esp_status esp_scan_string(esp_scan *s, char *buf, size_t *n);
esp_status esp_scan_int(esp_scan *s, int64_t *out);
/* Skips one value of any type; *from..*to is its text (not validated beyond its nesting: jansson does that). */
esp_status esp_scan_skip(esp_scan *s, const char **from, const char **to);

#endif
