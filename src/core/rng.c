#include "core/rng.h"

#include <math.h>
#include <string.h>
#include <xxhash.h>

float esp_rng_normal(uint64_t seed, uint64_t stream, uint64_t index) {
  /* Words 2i and 2i+1 are in one block: one Philox call. */
  uint32_t w[4];
  esp_rng_block(seed, stream, index >> 1, w);
  uint32_t a = w[(index & 1) * 2], b = w[(index & 1) * 2 + 1];
  /* (0, 1]: the logarithm stays finite. In double, rounded once at the end. */
  double u = ((double)a + 1.0) * 0x1p-32, v = (double)b * 0x1p-32;
  return (float)(sqrt(-2.0 * log(u)) * cos(2.0 * M_PI * v));
}

uint64_t esp_rng_below(uint64_t seed, uint64_t stream, uint64_t index, uint64_t n) {
  /* Lemire 2019, with rejection: the retries of one draw take further words by re-keying with the attempt, so draws of
   * other indices are not shifted. */
  for (uint64_t attempt = 0;; attempt++) {
    uint32_t w[4];
    esp_rng_block(seed, attempt ? esp_rng_stream(0x72656a65u, stream, attempt, 0) : stream, index, w);
    uint64_t x = (uint64_t)w[1] << 32 | w[0];
    unsigned __int128 m = (unsigned __int128)x * n;
    if ((uint64_t)m >= n || (uint64_t)m >= (0 - n) % n) return (uint64_t)(m >> 64);
  }
}

uint64_t esp_rng_stream(uint32_t purpose, uint64_t a, uint64_t b, uint64_t c) {
  uint64_t v[4] = {purpose, a, b, c};
  return XXH3_64bits(v, sizeof v);
}

uint64_t esp_rng_stream_name(uint32_t purpose, const char *name) {
  return esp_rng_stream(purpose, XXH3_64bits(name, strlen(name)), 0, 0);
}

void esp_rng_permutation(uint64_t seed, uint64_t stream, int64_t n, int64_t *perm) {
  for (int64_t i = 0; i < n; i++) perm[i] = i;
  for (int64_t i = n - 1; i > 0; i--) {
    int64_t j = (int64_t)esp_rng_below(seed, stream, (uint64_t)i, (uint64_t)i + 1);
    int64_t t = perm[i];
    perm[i] = perm[j];
    perm[j] = t;
  }
}
