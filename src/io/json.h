/* json.h: jansson with errors that carry file, line and column, and checked getters. */
#ifndef ESP_IO_JSON_H
#define ESP_IO_JSON_H

#include <jansson.h>
#include <stdint.h>

#include "core/error.h"

/* Duplicate keys are errors. `path` is for messages only. */
esp_status esp_json_parse(const char *text, size_t n, const char *path, json_t **out);
esp_status esp_json_load(const char *path, json_t **out);
/* Writes atomically, indent 2; sort: sorted keys. */
esp_status esp_json_save(const char *path, json_t *j, int sort);

/* Getters of object members. A wrong type is ESP_ERR_DATA "path: key 'x' must be an integer". `required` 0: *out keeps
 * its value when the key is absent or null. */
esp_status esp_json_i64(const json_t *o, const char *key, const char *path, int required, int64_t *out);
esp_status esp_json_f64(const json_t *o, const char *key, const char *path, int required, double *out);
esp_status esp_json_bool(const json_t *o, const char *key, const char *path, int required, int *out);
esp_status esp_json_str(const json_t *o, const char *key, const char *path, int required, const char **out);

#endif
