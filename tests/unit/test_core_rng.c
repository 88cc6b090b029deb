/* Random numbers: known answers of Random123, and what the streams promise.
 * Mutation seen to fail: nine rounds in place of ten in esp_philox4x32_10. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "core/rng.h"

static void check(const uint32_t v[10]) {
  uint32_t out[4];
  esp_philox4x32_10(v, v + 4, out);
  for (int i = 0; i < 4; i++) assert_int_equal(out[i], v[6 + i]);
}

static void test_known_answers(void **state) {
  static const uint32_t table[3][10] = {{0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
                                        {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
                                        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0,
                                         0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}};
  for (int i = 0; i < 3; i++) check(table[i]);
}

static void test_known_answer_file(void **state) {
  FILE *f = fopen(ESP_SHARED_DIR "/data/golden/random123/kat_vectors", "r");
  if (!f) {
    print_message("skipped: no random123/kat_vectors in the shared data\n");
    skip();
  }
  char line[512];
  int seen = 0;
  while (fgets(line, sizeof line, f)) {
    uint32_t v[10];
    if (sscanf(line, "philox4x32 10 %x %x %x %x %x %x %x %x %x %x", &v[0], &v[1], &v[2], &v[3], &v[4], &v[5], &v[6],
               &v[7], &v[8], &v[9]) != 10)
      continue;
    check(v);
    seen++;
  }
  fclose(f);
  assert_int_equal(seen, 3);
}

static void test_words_and_blocks(void **state) {
  uint32_t w[4];
  for (uint64_t i = 0; i < 64; i++) {
    esp_rng_block(7, 9, i / 4, w);
    assert_int_equal(esp_rng_u32(7, 9, i), w[i % 4]);
    float u = esp_rng_uniform(7, 9, i);
    assert_true(u >= 0 && u < 1 && u == (float)(w[i % 4] >> 8) / 16777216.0f);
  }
}

static void test_normal(void **state) {
  enum { N = 200000 };
  double s1 = 0, s2 = 0, s3 = 0, s4 = 0, lag = 0, last = 0;
  for (int i = 0; i < N; i++) {
    double x = esp_rng_normal(1, esp_rng_stream(ESP_RNG_INIT, 2, 3, 4), (uint64_t)i);
    assert_true(isfinite(x));
    s1 += x;
    s2 += x * x;
    s3 += x * x * x;
    s4 += x * x * x * x;
    lag += x * last;
    last = x;
  }
  /* bounds at five standard errors: 1, sqrt(2), sqrt(15), sqrt(96) over sqrt(N) */
  double e = 5 / sqrt(N);
  assert_true(fabs(s1 / N) < e);
  assert_true(fabs(s2 / N - 1) < 1.42 * e);
  assert_true(fabs(s3 / N) < 3.88 * e);
  assert_true(fabs(s4 / N - 3) < 9.8 * e);
  assert_true(fabs(lag / N) < e);
}

static void test_below(void **state) {
  int count[7] = {0};
  for (uint64_t i = 0; i < 70000; i++) {
    uint64_t x = esp_rng_below(3, 5, i, 7);
    assert_true(x < 7);
    count[x]++;
    assert_true(esp_rng_below(3, 5, i, 1) == 0);
    /* the worst case for rejection: half of all words are refused */
    assert_true(esp_rng_below(3, 5, i, (1ull << 63) + 1) <= 1ull << 63);
  }
  double chi = 0;
  for (int k = 0; k < 7; k++) chi += (count[k] - 10000.0) * (count[k] - 10000.0) / 10000.0;
  assert_true(chi < 30); /* 6 degrees of freedom: p = 4e-5 */
}

static void test_permutation(void **state) {
  enum { N = 1000 };
  int64_t a[N], b[N];
  char seen[N] = {0};
  esp_rng_permutation(11, 13, N, a);
  for (int i = 0; i < N; i++) {
    assert_true(a[i] >= 0 && a[i] < N && !seen[a[i]]);
    seen[a[i]] = 1;
  }
  esp_rng_permutation(11, 13, N, b);
  assert_memory_equal(a, b, sizeof a);
  esp_rng_permutation(12, 13, N, b);
  assert_memory_not_equal(a, b, sizeof a);
  /* every order of three comes equally often */
  int orders[27] = {0};
  for (uint64_t s = 0; s < 6000; s++) {
    esp_rng_permutation(s, 1, 3, a);
    orders[a[0] * 9 + a[1] * 3 + a[2]]++;
  }
  for (int i = 0; i < 27; i++) assert_true(orders[i] == 0 || (orders[i] > 850 && orders[i] < 1150));
}

static void test_streams_differ(void **state) {
  uint64_t s[] = {esp_rng_stream(1, 0, 0, 0),   esp_rng_stream(2, 0, 0, 0),         esp_rng_stream(1, 1, 0, 0),
                  esp_rng_stream(1, 0, 1, 0),   esp_rng_stream(1, 0, 0, 1),         esp_rng_stream_name(1, "a"),
                  esp_rng_stream_name(1, "b"),  esp_rng_stream_name(2, "a"),        esp_rng_stream(1, 256, 0, 0),
                  esp_rng_stream(1, 0, 256, 0), esp_rng_stream_name(1, "a.lora_A.")};
  for (size_t i = 0; i < sizeof s / sizeof *s; i++)
    for (size_t j = 0; j < i; j++) assert_true(s[i] != s[j]);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_known_answers),
      cmocka_unit_test(test_known_answer_file),
      cmocka_unit_test(test_words_and_blocks),
      cmocka_unit_test(test_normal),
      cmocka_unit_test(test_below),
      cmocka_unit_test(test_permutation),
      cmocka_unit_test(test_streams_differ),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
