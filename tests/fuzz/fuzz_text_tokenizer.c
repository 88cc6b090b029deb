/* fuzz_text_tokenizer.c: any bytes as tokenizer.json: an error or a tokenizer that encodes and decodes. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "core/mem.h"
#include "text/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static const char text[] =
      "Hello, it's <s> a\xCC\x81 \xE4\xB8\x96\xE7\x95\x8C  12345 \xFF\xF0\x9F\x99\x82\n\n[MASK] x";
  esp_tokenizer *t = NULL;
  if (esp_tokenizer_parse((const char *)data, size, "fuzz", &t) != ESP_OK) {
    if (!esp_error_message()[0] || strchr(esp_error_message(), '\n')) __builtin_trap(); /* one line, always */
    return 0;
  }
  esp_ids ids = {0};
  char *back = NULL;
  size_t n;
  if (esp_tokenizer_encode(t, text, sizeof text - 1, true, &ids) == ESP_OK) {
    for (int64_t i = 0; i < ids.n; i++) (void)esp_tokenizer_token(t, ids.data[i]);
    if (esp_tokenizer_encode_more(t, text, 5, &ids) == ESP_OK &&
        esp_tokenizer_decode(t, ids.data, ids.n, true, &back, &n) == ESP_OK && strlen(back) > n)
      __builtin_trap();
  }
  esp_mem_free(back);
  esp_ids_deinit(&ids);
  esp_tokenizer_destroy(t);
  return 0;
}
