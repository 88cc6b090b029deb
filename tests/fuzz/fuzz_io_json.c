/* JSON text: no crash, no leak; a refusal has a message of one line; what parses survives its own dump. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "io/json.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  json_t *j = NULL, *again = NULL;
  char *exact = malloc(size ? size : 1); /* exactly the bytes, so that reading past them is seen */
  if (!exact) return 0;
  memcpy(exact, data, size);
  esp_status st = esp_json_parse(exact, size, "fuzz.json", &j);
  free(exact);
  if (st != ESP_OK) {
    const char *m = esp_error_message();
    if (j || strncmp(m, "fuzz.json:", 10) != 0 || strchr(m, '\n')) abort();
    return 0;
  }
  char *text = json_dumps(j, JSON_ENCODE_ANY);
  if (!text || esp_json_parse(text, strlen(text), "again", &again) != ESP_OK || !json_equal(j, again)) abort();
  int64_t i = 1;
  double f = 1;
  int b = 1;
  const char *s = "";
  const int fine = (esp_json_i64(j, "a", "f", 0, &i) == ESP_OK) + (esp_json_f64(j, "a", "f", 0, &f) == ESP_OK) +
                   (esp_json_bool(j, "a", "f", 1, &b) == ESP_OK) + (esp_json_str(j, "a", "f", 1, &s) == ESP_OK);
  if (fine && !json_is_object(j)) abort();
  free(text);
  json_decref(j);
  json_decref(again);
  return 0;
}
