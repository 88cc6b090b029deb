/* The JSON loader against JSONTestSuite, the places in its messages, and the getters.
 * Mutation seen to fail: leaving out JSON_REJECT_DUPLICATES. */
#include <dirent.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "core/mem.h"
#include "io/file.h"
#include "io/json.h"

#define SUITE ESP_SHARED_DIR "/data/golden/json-test-suite/test_parsing"

static void test_suite(void **state) {
  DIR *d = opendir(SUITE);
  if (!d) {
    print_message("skipped: no json-test-suite in the shared data\n");
    skip();
  }
  int yes = 0, no = 0, either = 0, wrong = 0;
  for (struct dirent *e; (e = readdir(d));) {
    const char *name = e->d_name;
    if (name[0] == '.') continue;
    char path[1024];
    json_t *j = NULL;
    esp_path_join(path, sizeof path, SUITE, name);
    esp_status st = esp_json_load(path, &j);
    assert_true((st == ESP_OK) == (j != NULL));
    json_decref(j);
    /* Legal JSON, refused here on purpose: a key given twice is a mistake of whoever wrote the file. */
    int refused = strncmp(name, "y_object_duplicated_key", 23) == 0 ||
                  strcmp(name, "y_object_escaped_null_in_key.json") == 0; /* keys are C strings */
    int bad = name[0] == 'y' ? (st == ESP_OK) == refused : name[0] == 'n' ? st == ESP_OK : 0;
    if (bad) print_message("%s: %s\n", name, st == ESP_OK ? "accepted" : esp_error_message());
    wrong += bad;
    *(name[0] == 'y' ? &yes : name[0] == 'n' ? &no : &either) += 1;
  }
  closedir(d);
  assert_int_equal(wrong, 0);
  assert_int_equal(yes, 95);
  assert_int_equal(no, 188);
  assert_int_equal(either, 35);
}

static esp_status parse(const char *text) {
  json_t *j;
  esp_status st = esp_json_parse(text, strlen(text), "c.json", &j);
  json_decref(j);
  return st;
}

static void test_places(void **state) {
  assert_int_equal(parse("{\n  \"a\": 1,\n  \"b\": x\n}"), ESP_ERR_DATA);
  assert_non_null(strstr(esp_error_message(), "c.json:3:"));
  assert_int_equal(parse("{\"a\": 1, \"a\": 2}"), ESP_ERR_DATA);
  assert_non_null(strstr(esp_error_message(), "duplicate"));
  assert_int_equal(parse(""), ESP_ERR_DATA);
  assert_int_equal(parse("{} x"), ESP_ERR_DATA);
  json_t *j;
  assert_int_equal(esp_json_parse("[1,\n 2\0]", 9, "c.json", &j), ESP_ERR_DATA);
  assert_string_equal(esp_error_message(), "c.json:2:3: not valid JSON: a zero byte");
  assert_int_equal(parse("{\"a\x01\": 1}"), ESP_ERR_DATA);
  for (const char *p = esp_error_message(); *p; p++) assert_true((unsigned char)*p >= 0x20); /* one clean line */
}

static void test_getters(void **state) {
  static const char text[] = "{\"i\": 5, \"f\": 0.5, \"b\": true, \"s\": \"x\", \"n\": null, \"z\": \"a\\u0000b\"}";
  json_t *j;
  int64_t i = -1;
  double f = -1;
  int b = -1;
  const char *s = "default";
  assert_int_equal(esp_json_parse(text, sizeof text - 1, "c.json", &j), ESP_OK);
  assert_int_equal(esp_json_i64(j, "i", "c.json", 1, &i), ESP_OK);
  assert_int_equal(esp_json_f64(j, "i", "c.json", 1, &f), ESP_OK); /* an integer is a number */
  assert_true(i == 5 && f == 5);
  assert_int_equal(esp_json_f64(j, "f", "c.json", 1, &f), ESP_OK);
  assert_int_equal(esp_json_bool(j, "b", "c.json", 1, &b), ESP_OK);
  assert_true(f == 0.5 && b == 1);
  assert_int_equal(esp_json_str(j, "n", "c.json", 0, &s), ESP_OK); /* null and absent keep the value */
  assert_int_equal(esp_json_str(j, "absent", "c.json", 0, &s), ESP_OK);
  assert_string_equal(s, "default");
  assert_int_equal(esp_json_str(j, "s", "c.json", 0, &s), ESP_OK);
  assert_string_equal(s, "x");
  assert_int_equal(esp_json_str(j, "n", "c.json", 1, &s), ESP_ERR_DATA);
  assert_string_equal(esp_error_message(), "c.json: key 'n' is missing");
  assert_int_equal(esp_json_i64(j, "f", "c.json", 0, &i), ESP_ERR_DATA);
  assert_string_equal(esp_error_message(), "c.json: key 'f' must be an integer, not a number");
  assert_int_equal(esp_json_bool(j, "i", "c.json", 0, &b), ESP_ERR_DATA);
  assert_int_equal(esp_json_f64(j, "s", "c.json", 0, &f), ESP_ERR_DATA);
  assert_int_equal(esp_json_str(j, "z", "c.json", 0, &s), ESP_ERR_DATA); /* a C string would end early */
  json_t *array = json_array();
  assert_int_equal(esp_json_i64(array, "i", "c.json", 0, &i), ESP_ERR_DATA);
  json_decref(array);
  json_decref(j);
}

static void test_save(void **state) {
  char path[] = "/tmp/espalier-json-XXXXXX";
  close(mkstemp(path));
  json_t *j = json_pack("{s:i, s:[f,s]}", "b", 1, "a", 0.1, "x"), *back;
  char *text;
  assert_int_equal(esp_json_save(path, j, 1), ESP_OK);
  assert_int_equal(esp_json_load(path, &back), ESP_OK);
  assert_true(json_equal(j, back));
  assert_int_equal(esp_file_read(path, &text, NULL), ESP_OK);
  assert_true(strstr(text, "\"a\"") < strstr(text, "\"b\""));
  assert_int_equal(text[strlen(text) - 1], '\n');
  esp_mem_free(text);
  json_decref(j);
  json_decref(back);
  unlink(path);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_suite),
      cmocka_unit_test(test_places),
      cmocka_unit_test(test_getters),
      cmocka_unit_test(test_save),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
