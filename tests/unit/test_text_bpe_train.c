/* test_text_bpe_train.c: the trainer's files load, round-trip, and hold the merges that the `tokenizers` trainer makes.
 * Mutation seen to be caught: ties broken towards the largest pair in `before`. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "core/mem.h"
#include "io/file.h"
#include "io/json.h"
#include "text/tokenizer.h"

static const char *const special[] = {"<|bos|>", "<|eos|>", "<|pad|>"};

/* The corpus of tests/golden/bpe_train.json; its merges were made by make_bpe_train.py. */
static void as_the_peer(void **state) {
  char dir[] = "/tmp/esp_bpe_XXXXXX", path[128];
  assert_non_null(mkdtemp(dir));
  json_t *fixture, *made;
  assert_int_equal(esp_json_load(ESP_SOURCE_DIR "/tests/golden/bpe_train.json", &fixture), ESP_OK);
  const char *text = json_string_value(json_object_get(fixture, "text"));
  const json_t *want = json_object_get(fixture, "merges");
  int vocab = (int)json_integer_value(json_object_get(fixture, "vocab"));
  if (esp_bpe_train(text, strlen(text), vocab, special, 3, dir) != ESP_OK) fail_msg("%s", esp_error_message());
  snprintf(path, sizeof path, "%s/tokenizer.json", dir);
  assert_int_equal(esp_json_load(path, &made), ESP_OK);
  const json_t *got = json_object_get(json_object_get(made, "model"), "merges");
  assert_int_equal(json_array_size(got), json_array_size(want));
  for (size_t i = 0; i < json_array_size(want); i++)
    assert_string_equal(json_string_value(json_array_get(got, i)), json_string_value(json_array_get(want, i)));
  assert_true(json_equal(json_object_get(json_object_get(made, "model"), "vocab"), json_object_get(fixture, "ids")));

  esp_tokenizer *t;
  if (esp_tokenizer_load(dir, &t) != ESP_OK) fail_msg("%s", esp_error_message());
  assert_int_equal(esp_tokenizer_bos(t), 0);
  assert_int_equal(esp_tokenizer_eos(t), 1);
  assert_int_equal(esp_tokenizer_pad(t), 2);
  esp_ids ids = {0};
  assert_int_equal(esp_tokenizer_encode(t, text, strlen(text), true, &ids), ESP_OK);
  assert_int_equal(ids.data[0], 0);
  assert_true(ids.n < (int64_t)strlen(text) / 2);
  char *back;
  size_t n;
  assert_int_equal(esp_tokenizer_decode(t, ids.data, ids.n, true, &back, &n), ESP_OK);
  assert_string_equal(back, text);
  esp_mem_free(back);
  esp_ids_deinit(&ids);
  esp_tokenizer_destroy(t);
  json_decref(made);
  json_decref(fixture);
  assert_int_equal(esp_remove_tree(dir), ESP_OK);
}

static void too_small(void **state) {
  assert_int_equal(esp_bpe_train("abc", 3, 258, special, 3, "/tmp/never"), ESP_ERR_RECIPE);
  assert_non_null(strstr(esp_error_message(), "259"));
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(as_the_peer), cmocka_unit_test(too_small)};
  return cmocka_run_group_tests_name("text bpe train", tests, NULL, NULL);
}
