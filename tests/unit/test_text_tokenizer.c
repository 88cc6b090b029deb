/* test_text_tokenizer.c: ids and text against the published pairs in ../shared/data/tokenizers/golden and against
 * fixtures written by the `tokenizers` package (tests/golden/make_tokens.py).
 * Mutation seen to be caught: taking the rightmost instead of the leftmost pair among equal ranks in merge_small. */
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

#define TOKENIZERS ESP_SHARED_DIR "/data/tokenizers/"

static int wrong;

static void print_ids(const char *what, const int32_t *ids, int64_t n) {
  fprintf(stderr, "  %s:", what);
  for (int64_t i = 0; i < n; i++) fprintf(stderr, " %d", ids[i]);
  fprintf(stderr, "\n");
}

static void check_ids(const esp_tokenizer *t, const char *name, const json_t *text, const json_t *want, bool special) {
  esp_ids got = {0};
  esp_status st = esp_tokenizer_encode(t, json_string_value(text), json_string_length(text), special, &got);
  bool same = st == ESP_OK && got.n == (int64_t)json_array_size(want);
  for (int64_t i = 0; same && i < got.n; i++) same = got.data[i] == json_integer_value(json_array_get(want, (size_t)i));
  if (!same && wrong++ < 8) {
    fprintf(stderr, "%s: special %d: %s: %s\n", name, special, json_dumps(text, JSON_ENCODE_ANY),
            st == ESP_OK ? "" : esp_error_message());
    print_ids("got", got.data, got.n);
    fprintf(stderr, "  want: %s\n", json_dumps(want, 0));
  }
  esp_ids_deinit(&got);
}

static void check_text(const esp_tokenizer *t, const char *name, const json_t *ids, const json_t *want, bool skip) {
  if (json_is_null(want)) return;
  esp_ids in = {0};
  in.data = esp_mem_alloc(ESP_MEM_DATA, json_array_size(ids) * sizeof(int32_t) + 4);
  for (size_t i = 0; i < json_array_size(ids); i++)
    in.data[in.n++] = (int32_t)json_integer_value(json_array_get(ids, i));
  char *text = NULL;
  size_t n = 0;
  esp_status st = esp_tokenizer_decode(t, in.data, in.n, skip, &text, &n);
  if ((st != ESP_OK || n != json_string_length(want) || memcmp(text, json_string_value(want), n)) && wrong++ < 8)
    fprintf(stderr, "%s: decode: got '%s' want '%s'\n", name, text ? text : esp_error_message(),
            json_string_value(want));
  esp_mem_free(text);
  esp_ids_deinit(&in);
}

static esp_tokenizer *load(const char *dir) {
  esp_tokenizer *t = NULL;
  if (esp_tokenizer_load(dir, &t) != ESP_OK) fail_msg("%s", esp_error_message());
  return t;
}

static json_t *load_json(const char *path) {
  json_t *j = json_load_file(path, JSON_ALLOW_NUL, NULL);
  if (!j) fail_msg("cannot read %s", path);
  return j;
}

static void published_pairs(void **state) {
  static const struct {
    const char *file, *dir, *key; /* key: member of a transformers.js file */
  } sets[] = {{"llamacpp-gpt-2", "gpt2", NULL},
              {"llamacpp-qwen2", "qwen2", NULL},
              {"llamacpp-llama-spm", "llama-spm", NULL},
              {"llamacpp-bert-bge", "bert-base-uncased", NULL},
              {"transformersjs-gpt2", "gpt2", "Xenova/gpt2"},
              {"transformersjs-bert", "bert-base-uncased", "Xenova/bert-base-uncased"},
              {"transformersjs-llama", "llama-spm", "Xenova/llama-tokenizer"},
              {"transformersjs-qwen2", "qwen2", "Xenova/Qwen1.5-0.5B-Chat"},
              {"transformersjs-roberta", "roberta-base", "Xenova/all-distilroberta-v1"}};
  if (!esp_dir_exists(TOKENIZERS)) {
    print_message("skipped: %s is absent\n", TOKENIZERS);
    skip();
  }
  int pairs = 0;
  for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
    char path[1024];
    snprintf(path, sizeof path, TOKENIZERS "%s", sets[i].dir);
    esp_tokenizer *t = load(path);
    snprintf(path, sizeof path, TOKENIZERS "golden/%s.json", sets[i].file);
    json_t *j = load_json(path), *cases = sets[i].key ? json_object_get(j, sets[i].key) : j;
    assert_non_null(cases);
    size_t at;
    const char *name;
    json_t *c;
    if (sets[i].key) {
      json_object_foreach(cases, name, c) {
        if (json_object_get(c, "text_pair")) continue; /* two texts at once: not what this engine encodes */
        check_ids(t, sets[i].file, json_object_get(c, "text"), json_object_get(c, "ids"), true);
        pairs++;
      }
    } else {
      json_array_foreach(cases, at, c) {
        check_ids(t, sets[i].file, json_object_get(c, "text"), json_object_get(c, "ids"), false);
        pairs++;
      }
    }
    json_decref(j);
    esp_tokenizer_destroy(t);
  }
  print_message("%d pairs\n", pairs);
  assert_int_equal(wrong, 0);
  assert_true(pairs > 250);
}

/* Each fixture: {"tokenizer": object or name of a shared one, "cases": [[text, ids, ids with special tokens, decoded,
 * decoded without special tokens], ...]} */
static void peer_pairs(void **state) {
  const char *path = getenv("ESP_TOKENS_FIXTURE");
  if (!path) path = ESP_SOURCE_DIR "/tests/golden/tokens.json";
  json_t *j = load_json(path), *set;
  size_t i, k;
  int pairs = 0, skipped = 0;
  json_array_foreach(j, i, set) {
    json_t *tok = json_object_get(set, "tokenizer"), *cases = json_object_get(set, "cases"), *c;
    const char *name = json_string_value(json_object_get(set, "name"));
    esp_tokenizer *t = NULL;
    if (json_is_string(tok)) {
      char dir[1024];
      snprintf(dir, sizeof dir, ESP_SHARED_DIR "/data/%s", json_string_value(tok));
      if (!esp_dir_exists(dir)) {
        skipped++;
        continue;
      }
      t = load(dir);
    } else {
      char *text = json_dumps(tok, JSON_COMPACT);
      if (esp_tokenizer_parse(text, strlen(text), name, &t) != ESP_OK) fail_msg("%s", esp_error_message());
      free(text);
    }
    int before = wrong;
    json_array_foreach(cases, k, c) {
      check_ids(t, name, json_array_get(c, 0), json_array_get(c, 1), false);
      check_ids(t, name, json_array_get(c, 0), json_array_get(c, 2), true);
      check_text(t, name, json_array_get(c, 2), json_array_get(c, 3), false);
      check_text(t, name, json_array_get(c, 2), json_array_get(c, 4), true);
      pairs++;
    }
    if (wrong != before) fprintf(stderr, "%s: %d wrong\n", name, wrong - before);
    esp_tokenizer_destroy(t);
  }
  if (skipped) print_message("skipped %d fixtures: shared tokenizers are absent\n", skipped);
  print_message("%d peer pairs, %d wrong\n", pairs, wrong);
  json_decref(j);
  assert_int_equal(wrong, 0);
  assert_true(pairs > 0);
}

static const char vocab[] = "\"vocab\":{\"<unk>\":0,\"a\":1,\"b\":2,\"ab\":3,\"\u2581\":4,\"\u2581a\":5,\"\\ufffd\":6}";

/* What is not understood is an error that names the component. */
static void refused(void **state) {
  static const struct {
    const char *json, *says;
  } cases[] = {
      {"", "tokenizer.json:1:1: "},
      {"{}", "no key 'model'"},
      {"{\"model\":{\"type\":\"BPE\",%s,\"merges\":[]}} x", "after the end"},
      {"{\"model\":{\"type\":\"BPE\",%s}}", "no merges"},
      {"{\"model\":{\"type\":\"Unigram\",\"vocab\":[[\"a\",0.5]]}}", "Unigram"},
      {"{\"model\":{\"type\":\"WordLevel\",%s}}", "model of type WordLevel"},
      {"{\"model\":{\"type\":\"BPE\",%s,\"merges\":[],\"dropout\":0.1}}", "dropout"},
      {"{\"model\":{\"type\":\"BPE\",%s,\"merges\":[],\"novel\":1}}", "'novel'"},
      {"{\"model\":{\"type\":\"BPE\",%s,\"merges\":[\"a z\"]}}", "the second is not in the vocabulary"},
      {"{\"model\":{\"type\":\"BPE\",%s,\"merges\":[\"a b c\"]}}", "two tokens"},
      {"{\"model\":{\"type\":\"BPE\",%s,\"merges\":[],\"unk_token\":\"[UNK]\"}}", "'[UNK]'"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":0},\"merges\":[]}}", "share id 0"},
      {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":-1},\"merges\":[]}}", "out of range"},
      {"{\"model\":{\"type\":\"BPE\",%s,\"merges\":[]},\"normalizer\":{\"type\":\"Nmt\"}}", "normalizer of type Nmt"},
      {"{\"model\":{\"type\":\"BPE\",%s,\"merges\":[]},\"pre_tokenizer\":{\"type\":\"UnicodeScripts\"}}",
       "pre_tokenizer of type UnicodeScripts"},
      {"{\"model\":{\"type\":\"BPE\",%s,\"merges\":[]},\"decoder\":{\"type\":\"CTC\"}}", "decoder of type CTC"},
      {"{\"model\":{\"type\":\"BPE\",%s,\"merges\":[]},\"post_processor\":{\"type\":\"Odd\"}}",
       "post_processor of type Odd"},
      {"{\"model\":{\"type\":\"BPE\",%s,\"merges\":[]},\"added_tokens\":[{\"content\":\"x\",\"id\":99}]}", "id 99"},
      {"{\"model\":{\"type\":\"BPE\",%s,\"merges\":[]},\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Odd\","
       "\"pattern\":{\"String\":\"x\"}}}",
       "behavior 'Odd'"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    char json[2048];
    const char *mark = strstr(cases[i].json, "%s");
    snprintf(json, sizeof json, "%.*s%s%s", mark ? (int)(mark - cases[i].json) : (int)strlen(cases[i].json),
             cases[i].json, mark ? vocab : "", mark ? mark + 2 : "");
    esp_tokenizer *t = NULL;
    assert_int_equal(esp_tokenizer_parse(json, strlen(json), "tokenizer.json", &t), ESP_ERR_DATA);
    assert_null(t);
    if (strncmp(esp_error_message(), "tokenizer.json:", 15) || !strstr(esp_error_message(), cases[i].says))
      fail_msg("'%s' lacks '%s'", esp_error_message(), cases[i].says);
  }
}

static void expect_ids(const esp_ids *ids, const char *want) {
  char got[256] = "";
  for (int64_t i = 0; i < ids->n; i++)
    snprintf(got + strlen(got), sizeof got - strlen(got), "%s%d", i ? " " : "", ids->data[i]);
  assert_string_equal(got, want);
}

/* A continued text gets no second mark in front, unless it follows an added token. Invalid bytes become U+FFFD. */
static void continued(void **state) {
  char json[2048];
  snprintf(
      json, sizeof json,
      "{\"added_tokens\":[{\"id\":7,\"content\":\"<s>\",\"special\":true}],\"normalizer\":{\"type\":\"Sequence\","
      "\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"\u2581\"},{\"type\":\"Replace\",\"pattern\":{\"String\":"
      "\" \"},\"content\":\"\u2581\"}]},\"model\":{\"type\":\"BPE\",\"unk_token\":\"<unk>\",%s,\"merges\":[[\"a\","
      "\"b\"],[\"\u2581\",\"a\"]]}}",
      vocab);
  esp_tokenizer *t = NULL;
  if (esp_tokenizer_parse(json, strlen(json), "tokenizer.json", &t) != ESP_OK) fail_msg("%s", esp_error_message());
  esp_ids ids = {0};
  assert_int_equal(esp_tokenizer_encode(t, "a", 1, false, &ids), ESP_OK);
  expect_ids(&ids, "5");
  assert_int_equal(esp_tokenizer_encode_more(t, "ab", 2, &ids), ESP_OK);
  expect_ids(&ids, "5 3");
  assert_int_equal(esp_tokenizer_encode_more(t, " a<s>a", 6, &ids), ESP_OK);
  expect_ids(&ids, "5 3 5 7 5");
  assert_int_equal(esp_tokenizer_encode_more(t, "<s>", 3, &ids), ESP_OK);
  assert_int_equal(esp_tokenizer_encode_more(t, "a", 1, &ids), ESP_OK);
  expect_ids(&ids, "5 3 5 7 5 7 5");
  ids.n = 0;
  assert_int_equal(esp_tokenizer_encode(t, "a\xFF\xE2\x82", 4, false, &ids), ESP_OK);
  expect_ids(&ids, "5 6 6");
  assert_int_equal(esp_tokenizer_vocab(t), 8);
  assert_int_equal(esp_tokenizer_id(t, "<s>"), 7);
  assert_int_equal(esp_tokenizer_id(t, "zz"), -1);
  assert_true(esp_tokenizer_is_special(t, 7) && !esp_tokenizer_is_special(t, 1));
  assert_null(esp_tokenizer_token(t, 8));
  assert_string_equal(esp_tokenizer_token(t, 3), "ab");
  esp_ids_deinit(&ids);
  esp_tokenizer_destroy(t);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(published_pairs), cmocka_unit_test(peer_pairs),
                                     cmocka_unit_test(refused), cmocka_unit_test(continued)};
  return cmocka_run_group_tests_name("text tokenizer", tests, NULL, NULL);
}
