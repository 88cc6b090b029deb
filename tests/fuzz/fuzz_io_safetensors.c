/* A safetensors file in memory: no crash, no leak, and what is accepted keeps the promises of the header: entries
 * inside the file, back to back, as large as shape and dtype say. The bytes are tried as they are, and once more with a
 * header length that fits, or nearly every mutation would die at the first check. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "io/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(const uint8_t *bytes, size_t n) {
  esp_st *s = NULL;
  if (esp_st_parse(bytes, n, "fuzz.safetensors", &s) != ESP_OK) {
    if (s || strncmp(esp_error_message(), "fuzz.safetensors:", 17) != 0) abort();
    return;
  }
  uint64_t header = 0;
  for (int i = 7; i >= 0; i--) header = header << 8 | bytes[i];
  const uint8_t *at = bytes + 8 + header;
  unsigned sum = 0;
  for (int i = 0; i < esp_st_count(s); i++) {
    const esp_st_entry *e = esp_st_at(s, i);
    if (e->data != at || e->bytes < 0 || esp_st_find(s, e->name) != e) abort();
    for (int64_t k = 0; k < e->bytes; k++) sum += at[k];
    if (e->raw_dtype_known) {
      int64_t want = (int64_t)esp_dtype_size(e->dtype);
      for (int d = 0; d < e->ndim; d++) want *= e->shape[d];
      if (want != e->bytes) abort();
    }
    at += e->bytes;
  }
  if (at != bytes + n) abort();
  char hash[33];
  esp_st_header_hash(s, hash);
  if (strlen(hash) != 32 || sum > 255u * n) abort();
  esp_st_metadata(s, "format");
  esp_st_close(s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  uint8_t *exact = malloc(size ? size : 1);
  if (!exact) return 0;
  memcpy(exact, data, size);
  check(exact, size);
  if (size >= 8) {
    uint64_t len = 0;
    for (int i = 7; i >= 0; i--) len = len << 8 | exact[i];
    len %= size - 8 + 1;
    for (int i = 0; i < 8; i++) exact[i] = (uint8_t)(len >> (8 * i));
    check(exact, size);
  }
  free(exact);
  return 0;
}
