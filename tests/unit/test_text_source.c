/* test_text_source.c: the layouts in which data for continual learning is published: TRACE's folders of {prompt,
 * answer}, O-LoRA's CL_Benchmark with labels.json beside it, natural instructions; their prompts, labels, splits, and
 * the places that errors name. Mutation seen to be caught: labels.json read although the recipe names labels. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "core/mem.h"
#include "core/strbuf.h"
#include "io/file.h"
#include "text/dataset.h"

static char dir[] = "/tmp/esp_source_XXXXXX";
static esp_tokenizer *tok;
static const esp_data_cfg plain = {.sequence_len = 512, .add_bos = true};

static int setup(void **state) {
  (void)state;
  if (!mkdtemp(dir)) return 1;
  return esp_tokenizer_load(ESP_SOURCE_DIR "/recipes/demo/base", &tok) != ESP_OK;
}

static int teardown(void **state) {
  (void)state;
  esp_tokenizer_destroy(tok);
  return esp_remove_tree(dir) != ESP_OK;
}

static void put(const char *name, const char *text) {
  char path[256], folder[256];
  snprintf(path, sizeof path, "%s/%s", dir, name);
  snprintf(folder, sizeof folder, "%s", path);
  *strrchr(folder, '/') = 0;
  assert_int_equal(esp_mkdirs(folder), ESP_OK);
  assert_int_equal(esp_file_write_atomic(path, text, strlen(text)), ESP_OK);
}

static esp_status open_set(const char *name, esp_data_source src, esp_dataset **out) {
  static char path[256];
  snprintf(path, sizeof path, "%s/%s", dir, name);
  src.path = path;
  *out = NULL;
  return esp_dataset_build(&src, 1, &plain, tok, out);
}

static void decode(const int32_t *ids, int64_t n, esp_strbuf *b) {
  char *text;
  size_t len;
  assert_int_equal(esp_tokenizer_decode(tok, ids, n, false, &text, &len), ESP_OK);
  esp_strbuf_add(b, text, len);
  esp_mem_free(text);
}

/* Sample i is "<s>" prompt | answer "</s>", and only the answer is trained. */
static void sample_is(const esp_dataset *d, int64_t i, const char *prompt, const char *answer) {
  const int32_t *ids;
  const float *w;
  int64_t n, p = esp_dataset_prompt_len(d, i);
  char want[1024];
  esp_strbuf b;
  esp_strbuf_init(&b);
  esp_dataset_sample(d, i, &ids, &w, &n);
  snprintf(want, sizeof want, "<s>%s", prompt);
  decode(ids, p, &b);
  assert_string_equal(b.data, want);
  esp_strbuf_clear(&b);
  snprintf(want, sizeof want, "%s</s>", answer);
  decode(ids + p, n - p, &b);
  assert_string_equal(b.data, want);
  for (int64_t k = 0; k < n; k++) assert_true((w[k] > 0) == (k >= p));
  assert_string_equal(esp_dataset_answer(d, i), answer);
  esp_strbuf_deinit(&b);
}

static void fails(const char *name, esp_data_source src, const char *has) {
  esp_dataset *d;
  if (open_set(name, src, &d) == ESP_OK) fail_msg("%s: no error", name);
  if (!strstr(esp_error_message(), has)) fail_msg("'%s' lacks '%s'", esp_error_message(), has);
  esp_error_clear();
}

static void origin_is(const esp_dataset *d, int64_t i, const char *end) {
  char where[512];
  esp_dataset_origin(d, i, where, sizeof where);
  size_t n = strlen(where), k = strlen(end);
  if (n < k || strcmp(where + n - k, end)) fail_msg("'%s' does not end with '%s'", where, end);
}

static void trace(void **state) {
  (void)state;
  put("TRACE/FOMC/train.json", "[\n    {\n        \"prompt\": \"Text: rates rise.\\nAnswer: \",\n        \"answer\": "
                               "\"A\"\n    },\n    {\n        \"prompt\": \"Text: rates fall, [so] {it} goes.\","
                               "\n        \"answer\": \"B\\\"]\"\n    }\n]\n");
  put("TRACE/FOMC/eval.json", "[{\"prompt\": \"q\", \"answer\": \"e\"}]");
  put("TRACE/FOMC/test.json", "[{\"prompt\": \"q\", \"answer\": \"t\"}]");
  esp_dataset *d;
  assert_int_equal(open_set("TRACE/FOMC", (esp_data_source){0}, &d), ESP_OK);
  assert_int_equal(esp_dataset_count(d), 2);
  sample_is(d, 0, "Text: rates rise.\nAnswer: ", "A");
  sample_is(d, 1, "Text: rates fall, [so] {it} goes.", "B\"]");
  origin_is(d, 0, "FOMC/train.json:2");
  origin_is(d, 1, "FOMC/train.json:6");
  assert_int_equal(esp_dataset_label(d, 0), -1);
  esp_dataset_destroy(d);
  static const char *const split[][2] = {{"eval", "e"}, {"dev", "e"}, {"test", "t"}, {"train", "A"}};
  for (int i = 0; i < 4; i++) {
    assert_int_equal(open_set("TRACE/FOMC/", (esp_data_source){.split = split[i][0], .limit = 1}, &d), ESP_OK);
    assert_int_equal(esp_dataset_count(d), 1);
    assert_string_equal(esp_dataset_answer(d, 0), split[i][1]);
    esp_dataset_destroy(d);
  }
  assert_int_equal(open_set("TRACE/FOMC/test.json", (esp_data_source){0}, &d), ESP_OK); /* the file itself */
  assert_string_equal(esp_dataset_answer(d, 0), "t");
  esp_dataset_destroy(d);
  put("TRACE/Py150/train.jsonl", "{\"prompt\": \"q\", \"answer\": \"lines\"}\n");
  assert_int_equal(open_set("TRACE/Py150", (esp_data_source){0}, &d), ESP_OK);
  assert_string_equal(esp_dataset_answer(d, 0), "lines");
  esp_dataset_destroy(d);
}

static void cl_benchmark(void **state) {
  (void)state;
  put("CL_Benchmark/TC/news/labels.json", "[\"World\", \"Science or Technology\"]");
  put("CL_Benchmark/TC/news/train.json", "[{\"label\": \"Science or Technology\", \"sentence\": \"Title: Comet\\nText: "
                                         "It flew.\\n\"}, {\"sentence\": \"x\", "
                                         "\"label\": \"World\"}]");
  put("CL_Benchmark/COPA/COPA/labels.json", "[\"A\", \"B\"]");
  put("CL_Benchmark/COPA/COPA/test.json", "[{\"label\": \"B\", \"sentence\": \"Which?\\nA: a\\nB: b\"}]");
  esp_dataset *d;
  assert_int_equal(open_set("CL_Benchmark/TC/news", (esp_data_source){0}, &d), ESP_OK);
  sample_is(d, 0,
            "Task:TC\nDataset:news\nWhat is the topic of the following paragraph? Choose one from the option.\nOption: "
            "World, Science or Technology \nTitle: Comet\nText: It flew.\n\nAnswer:",
            "Science or Technology");
  const char *const *names;
  assert_int_equal(esp_dataset_labels(d, &names, NULL), 2); /* in the file's order, not sorted */
  assert_string_equal(names[0], "World");
  assert_int_equal(esp_dataset_label(d, 0), 1);
  assert_int_equal(esp_dataset_label(d, 1), 0);
  esp_dataset_destroy(d);
  assert_int_equal(open_set("CL_Benchmark/COPA/COPA", (esp_data_source){.split = "test"}, &d), ESP_OK);
  sample_is(d, 0, "Task:COPA\nDataset:COPA\nWhich?\nA: a\nB: b\nAnswer:", "B");
  esp_dataset_destroy(d);
  /* What the recipe says comes first. */
  static const char *const mine[] = {"Science or Technology", "World"};
  assert_int_equal(open_set("CL_Benchmark/TC/news",
                            (esp_data_source){.prompt_template = "{text}|{labels}|", .labels = mine, .n_labels = 2},
                            &d),
                   ESP_OK);
  sample_is(d, 1, "x|Science or Technology, World|", "World");
  assert_int_equal(esp_dataset_label(d, 1), 1);
  esp_dataset_destroy(d);
  put("CL_Benchmark/NLI/pairs/labels.json", "[\"yes\", \"no\"]");
  put("CL_Benchmark/NLI/pairs/train.json", "[{\"label\": \"-\", \"sentence\": \"x\"}, {\"label\": \"no\", "
                                           "\"sentence\": \"y\"}]");
  assert_int_equal(open_set("CL_Benchmark/NLI/pairs", (esp_data_source){0}, &d), ESP_OK);
  assert_int_equal(esp_dataset_labels(d, &names, NULL), 2);
  assert_int_equal(esp_dataset_label(d, 0), -1); /* none is right */
  assert_int_equal(esp_dataset_label(d, 1), 1);
  esp_dataset_destroy(d);
  put("elsewhere/news/train.json", "[{\"label\": \"a\", \"sentence\": \"x\"}]");
  fails("elsewhere/news", (esp_data_source){0}, "prompt_template must say it");
  assert_int_equal(open_set("elsewhere/news", (esp_data_source){.prompt_template = "{text}: "}, &d), ESP_OK);
  sample_is(d, 0, "x: ", "a");
  esp_dataset_destroy(d);
}

static void natural_instructions(void **state) {
  (void)state;
  const char *task =
      "{\n  \"Contributors\": [\"nobody\"],\n  \"Definition\": [\n    \" Say the \\\"topic\\\".\\n\"\n  ],\n"
      "  \"Positive Examples\": [{\"input\": \"no\", \"output\": \"row\"}],\n  \"Instances\": [\n    {\n"
      "      \"id\": \"t-1\",\n      \"input\": \"It flew.\",\n      \"output\": [\"Space\", \"Sky\"]\n"
      "    },\n    {\"input\": \"It sank.\", \"output\": \"Sea\"}\n  ],\n  \"URL\": []\n}\n";
  put("SuperNI/task1/train.json", task);
  put("Long_Sequence/news/train.json", task);
  put("Long_Sequence/news/labels.json", "[\"Sea\", \"Space\"]");
  esp_dataset *d;
  assert_int_equal(open_set("SuperNI/task1", (esp_data_source){0}, &d), ESP_OK);
  assert_int_equal(esp_dataset_count(d), 2);
  sample_is(d, 0, "Definition: Say the \"topic\".\n\nNow complete the following example -\nInput: It flew.\nOutput: ",
            "Space");
  sample_is(d, 1,
            "Definition: Say the \"topic\".\n\nNow complete the following example -\nInput: It sank.\nOutput: ", "Sea");
  assert_int_equal(esp_dataset_label(d, 0), -1); /* free text */
  origin_is(d, 0, "train.json:8");
  origin_is(d, 1, "train.json:13");
  esp_dataset_destroy(d);
  assert_int_equal(open_set("Long_Sequence/news", (esp_data_source){0}, &d), ESP_OK);
  sample_is(d, 0, "Say the \"topic\".\nIt flew.\nOutput: ", "Space");
  assert_int_equal(esp_dataset_label(d, 0), 1); /* its labels are known */
  esp_dataset_destroy(d);
  put("SuperNI/task2/train.json", "{\"Definition\": 3, \"Instances\": [{\"input\": \"a\", \"output\": \"b\"}]}");
  fails("SuperNI/task2", (esp_data_source){.format = ESP_FMT_NATURAL_INSTRUCTIONS}, "Definition is no text");
  put("SuperNI/task2/train.json", "{\"Definition\": [], \"Instances\": [{\"input\": \"a\", \"output\": \"b\"]}");
  fails("SuperNI/task2", (esp_data_source){0}, "train.json:1:");
  put("SuperNI/task3/train.json", "{\"Definition\": \"d\"}");
  fails("SuperNI/task3", (esp_data_source){.format = ESP_FMT_NATURAL_INSTRUCTIONS}, "has no Instances");
}

static void bad_files(void **state) {
  (void)state;
  put("bad/none/test.json", "[{\"prompt\": \"q\", \"answer\": \"a\"}]");
  fails("bad/none", (esp_data_source){0}, "bad/none: this folder holds no train.json and no train.jsonl");
  put("bad/empty/train.json", " [ ] ");
  fails("bad/empty", (esp_data_source){0}, "train.json: the dataset is empty");
  put("bad/open/train.json", "[\n{\"prompt\": \"q\", \"answer\": \"a\"},\n{\"prompt\": \"q\"");
  fails("bad/open", (esp_data_source){0}, "train.json:3:15: unexpected end of the file");
  put("bad/comma/train.json", "[{\"prompt\": \"q\", \"answer\": \"a\"},\n]");
  fails("bad/comma", (esp_data_source){0}, "train.json:2:1: expected a value");
  put("bad/more/train.json", "[{\"prompt\": \"q\", \"answer\": \"a\"}]\n{\"prompt\": \"q\", \"answer\": \"a\"}");
  fails("bad/more", (esp_data_source){0}, "train.json:2:1: there is more behind the array of rows");
  put("bad/row/train.json", "[{\"prompt\": \"q\", \"answer\": \"a\"},\n\n {\"prompt\": \"q\", \"anwser\": \"a\"}]");
  fails("bad/row", (esp_data_source){0}, "train.json:3: missing key 'completion'");
  put("bad/json/train.json", "[{\"prompt\": \"q\", \"answer\": \"a\"},\n {\"prompt\" \"q\"}]");
  fails("bad/json", (esp_data_source){0}, "train.json:2: column 13: not valid JSON");
  put("TC/bad/labels.json", "{\"a\": 1}");
  put("TC/bad/train.json", "[{\"sentence\": \"q\", \"label\": \"a\"}]");
  fails("TC/bad", (esp_data_source){0}, "labels.json: must be a list of labels");
  put("TC/bad/labels.json", "[\"b\", 1]");
  fails("TC/bad", (esp_data_source){0}, "labels.json: label 2 is no text");
  put("TC/bad/labels.json", "[\"b\", \"c\"]");
  fails("TC/bad", (esp_data_source){0}, "train.json:1: label 'a' is not one of: b, c");
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(trace), cmocka_unit_test(cl_benchmark),
                                     cmocka_unit_test(natural_instructions), cmocka_unit_test(bad_files)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
