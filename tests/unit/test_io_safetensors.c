/* The safetensors reader: the format's own edge files, every rule of the header, shards, real models.
 * Mutation seen to fail: not comparing the end of the last tensor with the file (bytes after the last tensor). */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "core/mem.h"
#include "io/file.h"
#include "io/json.h"
#include "io/safetensors.h"

#define EDGE ESP_SHARED_DIR "/data/golden/safetensors-edge"

static char root[] = "/tmp/espalier-test-XXXXXX";

static int setup(void **state) {
  return mkdtemp(root) ? 0 : -1;
}

static int teardown(void **state) {
  return esp_remove_tree(root) == ESP_OK ? 0 : -1;
}

static void test_edge_files(void **state) {
  json_t *table, *row;
  const char *name;
  if (!esp_file_exists(EDGE "/expectations.json")) {
    print_message("skipped: no safetensors-edge in the shared data\n");
    skip();
  }
  assert_int_equal(esp_json_load(EDGE "/expectations.json", &table), ESP_OK);
  int seen = 0;
  json_object_foreach(table, name, row) {
    char path[1024];
    esp_st *s;
    esp_status st = esp_st_open(esp_path_join(path, sizeof path, EDGE, name), &s);
    int want = strcmp(json_string_value(json_object_get(row, "expect")), "ok") == 0;
    if ((st == ESP_OK) != want)
      fail_msg("%s: expected %s, got '%s'", name, want ? "ok" : "an error", esp_error_message());
    if (st != ESP_OK) assert_non_null(strstr(esp_error_message(), name)); /* the message names the file */
    esp_st_close(s);
    seen++;
  }
  json_decref(table);
  assert_int_equal(seen, 17);
}

/* A file in memory: header text and so many data bytes. */
static esp_status parse(const char *header, size_t data, esp_st **s) {
  static char file[8192];
  size_t n = strlen(header);
  assert_true(8 + n + data <= sizeof file);
  for (int i = 0; i < 8; i++) file[i] = (char)(n >> (8 * i));
  memcpy(file + 8, header, n);
  for (size_t i = 0; i < data; i++) file[8 + n + i] = (char)i;
  return esp_st_parse(file, 8 + n + data, "f.safetensors", s);
}

#define T(name, dtype, shape, from, to)                                                                                \
  "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #from "," #to "]}"

static void test_rules(void **state) {
  static const struct {
    const char *header;
    size_t data;
    const char *message; /* NULL: accepted */
  } rows[] = {
      {"{}", 0, NULL},
      {"{" T("a", "F32", "[2]", 0, 8) "}", 8, NULL},
      {"{" T("a", "F32", "[2]", 0, 8) "}   ", 8, NULL},
      {" \n{" T("a", "F32", "[]", 0, 4) "}", 4, NULL},
      {"{" T("b", "F32", "[1]", 4, 8) "," T("a", "F32", "[1]", 0, 4) "}", 8, NULL},
      {"{" T("a", "F8_E4M3", "[3]", 0, 3) "}", 3, NULL},
      {"{" T("a", "F4", "[4]", 0, 2) "}", 2, NULL},
      {"{\"__metadata__\":{\"format\":\"pt\"}," T("a", "U8", "[1]", 0, 1) "}", 1, NULL},
      {"{\"__metadata__\":null}", 0, NULL},
      {"{" T("a", "F32", "[0]", 0, 0) "," T("b", "F32", "[1]", 0, 4) "}", 4, NULL},
      {"", 0, "does not start with '{'"},
      {"[]", 0, "does not start with '{'"},
      {"{}", 4, "4 bytes after the last tensor"},
      {"{" T("a", "F32", "[2]", 0, 8) "}", 7, "truncated: tensor 'a'"},
      {"{" T("a", "F32", "[2]", 0, 8) "}", 9, "1 bytes after"},
      {"{" T("a", "F32", "[1]", 4, 8) "}", 8, "after a hole"},
      {"{" T("a", "F32", "[2]", 0, 8) "," T("b", "F32", "[2]", 4, 12) "}", 12, "inside another tensor"},
      {"{" T("a", "F32", "[2]", 0, 8) "," T("a", "F32", "[2]", 8, 16) "}", 16, "duplicate"},
      {"{" T("a", "F33", "[2]", 0, 8) "}", 8, "unknown dtype 'F33'"},
      {"{" T("a", "F32", "[3]", 0, 8) "}", 8, "need 12 bytes"},
      {"{" T("a", "F4", "[3]", 0, 1) "}", 1, "shape and dtype"},
      {"{" T("a", "F32", "[2]", 8, 0) "}", 8, "begin <= end"},
      {"{" T("a", "F32", "[2]", -8, 0) "}", 8, "begin <= end"},
      {"{" T("a", "F32", "[2]", 0.0, 8.0) "}", 8, "data_offsets"},
      {"{" T("a", "F32", "[-2]", 0, 8) "}", 8, "dimension 0"},
      {"{" T("a", "F32", "[2.0]", 0, 8) "}", 8, "dimension 0"},
      {"{" T("a", "F32", "[4611686018427387904,4]", 0, 0) "}", 0, "overflows"},
      {"{" T("a", "F32", "[1,1,1,1,1,1,1,1,1]", 0, 4) "}", 4, "more than 8"},
      {"{" T("a", "F32", "2", 0, 8) "}", 8, "no shape"},
      {"{\"a\":{\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "no dtype"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, "data_offsets"},
      {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,9]}}", 8, "data_offsets"},
      {"{\"a\":{\"dtype\":\"F32\\u0000\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "unknown dtype"},
      {"{\"a\":7}", 0, "must be an object"},
      {"{\"__metadata__\":{\"x\":1}}", 0, "__metadata__ 'x' must be a string"},
      {"{\"__metadata__\":[]}", 0, "__metadata__ must be an object"},
      {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "duplicate"},
      {"{\"a\": x}", 0, "f.safetensors:1:"},
      {"{} {}", 0, "not valid JSON"},
  };
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
    esp_st *s;
    esp_status st = parse(rows[i].header, rows[i].data, &s);
    if ((st == ESP_OK) != !rows[i].message) fail_msg("%s: '%s'", rows[i].header, esp_error_message());
    if (rows[i].message && (st != ESP_ERR_DATA || !strstr(esp_error_message(), rows[i].message)))
      fail_msg("%s: wanted '%s', got '%s'", rows[i].header, rows[i].message, esp_error_message());
    if (rows[i].message) assert_int_equal(strncmp(esp_error_message(), "f.safetensors:", 14), 0);
    esp_st_close(s);
  }
}

static void test_entries(void **state) {
  esp_st *s;
  assert_int_equal(
      parse("{\"__metadata__\":{\"format\":\"pt\",\"tied\":\"b\",\"lost\":\"nowhere\"}," T(
                "b", "BF16", "[2,3]", 4, 16) "," T("a", "F32", "[]", 0, 4) "," T("c", "F8_E5M2", "[1]", 16, 17) "}",
            17, &s),
      ESP_OK);
  assert_int_equal(esp_st_count(s), 3);
  const esp_st_entry *b = esp_st_find(s, "b"), *c = esp_st_find(s, "c");
  assert_string_equal(esp_st_at(s, 0)->name, "a"); /* file order */
  assert_ptr_equal(esp_st_at(s, 1), b);
  assert_null(esp_st_at(s, 3));
  assert_null(esp_st_at(s, -1));
  assert_true(b->dtype == ESP_BF16 && b->raw_dtype_known && b->ndim == 2 && b->shape[0] == 2 && b->shape[1] == 3);
  assert_int_equal(b->bytes, 12);
  assert_int_equal(((const unsigned char *)b->data)[0], 4);
  assert_int_equal(c->raw_dtype_known, 0);
  assert_string_equal(esp_st_metadata(s, "format"), "pt");
  assert_null(esp_st_metadata(s, "x"));
  assert_ptr_equal(esp_st_find(s, "tied"), b); /* stored once under another name */
  assert_null(esp_st_find(s, "lost"));
  assert_null(esp_st_find(s, "format"));
  char h1[33], h2[33];
  esp_st_header_hash(s, h1);
  esp_st_close(s);
  assert_int_equal(parse("{" T("a", "F32", "[1]", 0, 4) "}", 4, &s), ESP_OK);
  esp_st_header_hash(s, h2);
  assert_string_not_equal(h1, h2);
  esp_st_close(s);
  esp_st_close(NULL);
}

static void write_text(const char *name, const char *text) {
  char path[512];
  assert_int_equal(esp_file_write_atomic(esp_path_join(path, sizeof path, root, name), text, strlen(text)), ESP_OK);
}

static void write_shard(const char *file, const char *tensor, float value) {
  char path[512];
  esp_st_writer *w;
  const int64_t one = 1;
  assert_int_equal(esp_st_writer_create(esp_path_join(path, sizeof path, root, file), &w), ESP_OK);
  assert_int_equal(esp_st_writer_declare(w, tensor, ESP_F32, 1, &one), ESP_OK);
  assert_int_equal(esp_st_writer_put(w, tensor, &value, 4), ESP_OK);
  assert_int_equal(esp_st_writer_commit(w), ESP_OK);
}

static esp_status open_index(const char *weight_map, esp_st **s) {
  char text[1024];
  snprintf(text, sizeof text, "{\"metadata\":{\"total_size\":8},\"weight_map\":%s}", weight_map);
  write_text("model.safetensors.index.json", text);
  return esp_st_open(root, s);
}

static void test_shards(void **state) {
  esp_st *s;
  const char *const *paths;
  assert_int_equal(esp_st_open(root, &s), ESP_ERR_DATA);
  assert_non_null(strstr(esp_error_message(), "no model.safetensors"));
  write_text("pytorch_model.bin", "x");
  assert_int_equal(esp_st_open(root, &s), ESP_ERR_DATA);
  assert_non_null(strstr(esp_error_message(), "pytorch_model.bin must be converted"));
  write_shard("s1.safetensors", "a", 1);
  write_shard("s2.safetensors", "b", 2);
  write_shard("twice.safetensors", "a", 3);
  assert_int_equal(open_index("{\"a\":\"s1.safetensors\",\"b\":\"s2.safetensors\"}", &s), ESP_OK);
  assert_int_equal(esp_st_shards(s, &paths), 2);
  assert_non_null(strstr(paths[1], "s2.safetensors"));
  assert_int_equal(esp_st_count(s), 2);
  float v;
  memcpy(&v, esp_st_find(s, "b")->data, 4);
  assert_true(v == 2);
  assert_string_equal(esp_st_find(s, "b")->file, paths[1]);
  esp_st_close(s);
  char path[512];
  assert_int_equal(esp_st_open(esp_path_join(path, sizeof path, root, "model.safetensors.index.json"), &s), ESP_OK);
  assert_int_equal(esp_st_count(s), 2);
  esp_st_close(s);
  static const struct {
    const char *map, *message;
  } bad[] = {
      {"{\"a\":\"../s1.safetensors\"}", "in the same directory"},
      {"{\"a\":\"/etc/passwd\"}", "in the same directory"},
      {"{\"a\":\"sub/s1.safetensors\"}", "in the same directory"},
      {"{\"a\":\"..\"}", "in the same directory"},
      {"{\"a\":\"\"}", "in the same directory"},
      {"{\"a\":5}", "in the same directory"},
      {"{\"a\":\"s1.safetensors\\u0000\"}", "in the same directory"},
      {"{\"a\":\"s3.safetensors\"}", "s3.safetensors: cannot open"},
      {"{\"a\":\"s2.safetensors\"}", "tensor 'a' is not in s2.safetensors"},
      {"{\"a\":\"s2.safetensors\",\"b\":\"s1.safetensors\"}", "is not in"},
      {"{\"a\":\"s1.safetensors\",\"c\":\"s2.safetensors\"}", "tensor 'c' is not in s2.safetensors"},
      {"{\"a\":\"s1.safetensors\",\"b\":\"twice.safetensors\"}", "tensor 'a' is also in"},
      {"{}", "no weight_map"},
      {"[]", "no weight_map"},
  };
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    assert_int_equal(open_index(bad[i].map, &s), ESP_ERR_DATA);
    if (!strstr(esp_error_message(), bad[i].message)) fail_msg("%s: got '%s'", bad[i].map, esp_error_message());
  }
}

static void test_real_models(void **state) {
  static const struct {
    const char *name, *tensor;
    int64_t parameters;
  } rows[] = {{"stories260K", "model.embed_tokens.weight", 260032},
              {"babyllama105", "model.embed_tokens.weight", 936448},
              {"tinystories-656k", "model.embed_tokens.weight", 656000},
              {"gpt-nano-sort", NULL, 0}};
  int seen = 0;
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
    char path[1024];
    snprintf(path, sizeof path, "%s/data/models/%s", ESP_SHARED_DIR, rows[i].name);
    if (!esp_dir_exists(path)) continue;
    esp_st *s;
    int64_t total = 0;
    assert_int_equal(esp_st_open(path, &s), ESP_OK);
    for (int k = 0; k < esp_st_count(s); k++) {
      const esp_st_entry *e = esp_st_at(s, k);
      total += e->bytes / (int64_t)esp_dtype_size(e->dtype);
      esp_st_drop(e); /* dropped pages come back from the file */
      volatile unsigned char first = *(const unsigned char *)e->data;
      (void)first;
    }
    if (rows[i].parameters) assert_int_equal(total, rows[i].parameters);
    if (rows[i].tensor) assert_non_null(esp_st_find(s, rows[i].tensor));
    esp_st_close(s);
    seen++;
  }
  if (!seen) {
    print_message("skipped: no models in the shared data\n");
    skip();
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_edge_files), cmocka_unit_test(test_rules),       cmocka_unit_test(test_entries),
      cmocka_unit_test(test_shards),     cmocka_unit_test(test_real_models),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
