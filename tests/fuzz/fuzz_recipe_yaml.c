/* Recipe text and overrides: no crash, no leak, no message of more than its lines; and what parses must survive its own
 * resolved form: that parses too, to the same hash. Input: YAML, then overrides, separated by zero bytes. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "recipe/recipe.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  char *text = malloc(size + 1);
  if (!text) return 0;
  memcpy(text, data, size);
  text[size] = 0;
  const char *overrides[4];
  int n = 0;
  size_t yaml = strlen(text);
  for (size_t i = yaml + 1; i < size && n < 4; i += strlen(text + i) + 1) overrides[n++] = text + i;

  esp_recipe *r = NULL;
  esp_status st = esp_recipe_parse(text, yaml, "dir/fuzz.yaml", overrides, n, &r);
  if (st != ESP_OK) {
    if (!esp_error_message()[0]) abort();
  } else {
    char first[33], second[33];
    esp_recipe_hash(r, first);
    char *resolved = esp_recipe_resolved(r);
    if (!resolved) abort();
    esp_recipe *again = NULL;
    if (esp_recipe_parse(resolved, strlen(resolved), "/other/resolved.yaml", NULL, 0, &again) != ESP_OK) {
      if (strlen(resolved) > (1 << 20)) goto out; /* absolute paths may grow it beyond the limit */
      fprintf(stderr, "resolved recipe refused: %s\n%s", esp_error_message(), resolved);
      abort();
    }
    esp_recipe_hash(again, second);
    if (strcmp(first, second)) {
      fprintf(stderr, "hash differs after resolving\n%s", resolved);
      abort();
    }
  out:
    esp_recipe_destroy(again);
    esp_mem_free(resolved);
    esp_recipe_destroy(r);
  }
  free(text);
  return 0;
}
