/* test_text_split.c: the hand-written splitters cut exactly as PCRE2 cuts with the same patterns, on random text.
 * Mutation seen to be caught: `last == at` dropped from space_run (a single blank before a word would vanish). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "core/rng.h"
#include "text/tok_priv.h"
#include "text/utf8.h"

#define CL100K(number)                                                                                                 \
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" number                                                 \
  "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

/* Characters chosen so that every alternative and its neighbours come up; all are older than PCRE2's Unicode 14. */
static const char *const parts[] = {" ",
                                    " ",
                                    " ",
                                    "\n",
                                    "\r",
                                    "\t",
                                    "\xC2\xA0",
                                    "\xE2\x80\x83",
                                    "\xE1\xA0\x8E",
                                    "\xE3\x80\x80",
                                    "'",
                                    "'s",
                                    "'S",
                                    "'t",
                                    "'re",
                                    "'VE",
                                    "'Ll",
                                    "'l",
                                    "'d",
                                    "'\xC5\xBF",
                                    "a",
                                    "b",
                                    "Z",
                                    "re",
                                    "\xC3\xA9",
                                    "e\xCC\x81",
                                    "\xD0\x96",
                                    "\xE4\xB8\x96",
                                    "\xF0\x9D\x90\x80",
                                    "1",
                                    "2",
                                    "34",
                                    "\xC2\xBD",
                                    "\xD9\xA1",
                                    "\xE2\x85\xA7",
                                    ".",
                                    ",",
                                    "!",
                                    "-",
                                    "_",
                                    "\xE2\x80\xA6",
                                    "\xF0\x9F\x99\x82",
                                    "\xE2\x80\x8D",
                                    "\xCC\x81",
                                    "\x0B",
                                    "\x0C",
                                    "\xC2\x85",
                                    "\xE2\x80\xA8",
                                    "\x01"};

static void compare(esp_split_kind kind, const char *pattern, uint64_t seed) {
  esp_regex *re;
  esp_regex_state *s;
  esp_strbuf b;
  esp_strbuf_init(&b);
  assert_int_equal(esp_split_known(pattern, strlen(pattern)), kind);
  if (esp_regex_create(pattern, strlen(pattern), "test", &re) != ESP_OK) fail_msg("%s", esp_error_message());
  assert_int_equal(esp_regex_state_create(&s), ESP_OK);
  uint64_t draw = 0;
  for (int round = 0; round < 30000; round++) {
    esp_strbuf_clear(&b);
    uint64_t n = 1 + esp_rng_below(seed, 1, draw++, 14);
    for (uint64_t i = 0; i < n; i++)
      esp_strbuf_puts(&b, parts[esp_rng_below(seed, 1, draw++, sizeof parts / sizeof *parts)]);
    for (size_t at = 0; at < b.len;) {
      size_t start, stop, mine = esp_split_next(kind, b.data, b.len, at);
      int rc = esp_regex_find(re, s, b.data, b.len, at, &start, &stop);
      if (rc != 1 || start != at || stop != mine)
        fail_msg("kind %d, text '%s' at %zu: mine ends at %zu, PCRE2 [%zu, %zu)", kind, b.data, at, mine, start, stop);
      at = mine;
    }
  }
  esp_regex_state_destroy(s);
  esp_regex_destroy(re);
  esp_strbuf_deinit(&b);
}

static void as_pcre2(void **state) {
  esp_classes_init();
  compare(ESP_SPLIT_GPT2, esp_gpt2_pattern, 1);
  compare(ESP_SPLIT_LLAMA3, CL100K("\\p{N}{1,3}"), 2);
  compare(ESP_SPLIT_QWEN2, CL100K("\\p{N}"), 3);
}

static void other_dialects(void **state) {
  static const char *const bad[] = {"\\h+", "[a-z&&[^b]]", "[a[bc]]", "(unclosed"};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    esp_regex *re = NULL;
    assert_int_equal(esp_regex_create(bad[i], strlen(bad[i]), "tokenizer.json", &re), ESP_ERR_DATA);
    assert_non_null(strstr(esp_error_message(), "tokenizer.json"));
    assert_null(re);
  }
}

static void invalid_utf8(void **state) {
  static const struct {
    const char *bytes;
    size_t n, valid, bad;
  } cases[] = {{"a\xFF", 2, 1, 1},           {"\xC3\xA9", 2, 2, 0},     {"\xC3", 1, 0, 1},
               {"\xE2\x82", 2, 0, 2},        {"\xE2\x82z", 3, 0, 2},    {"\xED\xA0\x80", 3, 0, 1},
               {"\xC0\x80", 2, 0, 1},        {"\xF0\x9F\x99", 3, 0, 3}, {"\xF4\x90\x80\x80", 4, 0, 1},
               {"\xF0\x80\x80\x80", 4, 0, 1}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    assert_int_equal(esp_utf8_valid(cases[i].bytes, cases[i].n), cases[i].valid);
    if (cases[i].bad)
      assert_int_equal(esp_utf8_bad(cases[i].bytes + cases[i].valid, cases[i].n - cases[i].valid), cases[i].bad);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(as_pcre2), cmocka_unit_test(other_dialects),
                                     cmocka_unit_test(invalid_utf8)};
  return cmocka_run_group_tests_name("text split", tests, NULL, NULL);
}
