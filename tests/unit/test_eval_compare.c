/* Runs side by side: mean, sample standard deviation and paired differences against numbers worked out by hand, runs
 * that are missing, the median step.
 * Mutation it caught: pairs that ignore the seed (the difference of every run to every run of the base). */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "eval/compare.h"
#include "eval/run_data.h"
#include "io/file.h"

#define NEAR(a, b) assert_true(fabs((a) - (b)) < 1e-12)

static esp_compared run_of(const char *variant, const char *order, int seed, bool finished, double acc) {
  esp_compared r = {.dir = "d", .variant = variant, .order = order, .seed = seed, .finished = finished};
  for (int m = 0; m < ESP_MEASURES; m++) r.value[m] = NAN;
  r.value[ESP_MEASURE_ACC] = acc;
  return r;
}

static void spread_and_pairs_by_hand(void **state) {
  (void)state;
  const esp_compared runs[] = {run_of("naive", "ab", 1, true, .50),  run_of("naive", "ab", 2, true, .60),
                               run_of("naive", "ba", 1, true, .40),  run_of("replay", "ab", 1, true, .70),
                               run_of("replay", "ab", 2, true, .90), run_of("replay", "ba", 1, false, .10),
                               run_of("other", "ab", 9, true, .30)};
  const int n = 7;
  esp_spread s = esp_compare_spread(runs, n, "naive", NULL, ESP_MEASURE_ACC);
  assert_int_equal(s.n, 3);
  NEAR(s.mean, .50);
  NEAR(s.sd, sqrt((.0 + .01 + .01) / 2));
  s = esp_compare_spread(runs, n, "naive", "ba", ESP_MEASURE_ACC);
  assert_int_equal(s.n, 1);
  assert_true(isnan(s.sd));
  s = esp_compare_spread(runs, n, "replay", NULL, ESP_MEASURE_ACC); /* the unfinished one does not count */
  assert_int_equal(s.n, 2);
  NEAR(s.mean, .80);
  s = esp_compare_pairs(runs, n, "replay", "naive", ESP_MEASURE_ACC);
  assert_int_equal(s.n, 2);
  NEAR(s.mean, (.20 + .30) / 2);
  NEAR(s.sd, sqrt(2 * .05 * .05 / 1));
  s = esp_compare_pairs(runs, n, "other", "naive", ESP_MEASURE_ACC); /* no run of that seed */
  assert_int_equal(s.n, 0);
  assert_true(isnan(s.mean));
  s = esp_compare_spread(runs, n, "naive", NULL, ESP_MEASURE_BWT);
  assert_int_equal(s.n, 0);

  json_t *j = esp_compare_json(runs, n);
  json_t *v = json_array_get(json_object_get(j, "variants"), 1);
  assert_string_equal(json_string_value(json_object_get(v, "name")), "replay");
  NEAR(json_number_value(json_object_get(json_object_get(json_object_get(v, "paired"), "acc"), "mean")), .25);
  assert_int_equal(json_array_size(json_object_get(j, "runs")), 7);
  json_decref(j);

  esp_strbuf b;
  esp_strbuf_init(&b);
  esp_compare_table(runs, n, true, &b);
  assert_non_null(strstr(b.data, "| replay  | 2 of 3 | 0.800 ±0.141 | +0.250 ±0.071 |"));
  assert_non_null(strstr(b.data, "| ba    | naive   |"));
  esp_strbuf_deinit(&b);
}

static void write_file(const char *dir, const char *name, const char *text) {
  char path[256];
  assert_int_equal(esp_file_write_atomic(esp_path_join(path, sizeof path, dir, name), text, strlen(text)), ESP_OK);
}

static void a_run_directory(void **state) {
  (void)state;
  char dir[] = "compare-XXXXXX";
  assert_non_null(mkdtemp(dir));
  esp_compared r = {.dir = dir, .variant = "v", .order = "", .seed = 1};
  assert_int_equal(esp_compared_read(&r), ESP_OK);
  assert_false(r.finished);
  write_file(
      dir, "metrics.jsonl",
      "{\"eval\":\"s\",\"metric\":\"choice\",\"score\":0.25,\"step\":0,\"task\":\"a\"}\n"
      "{\"step\":1,\"task\":\"a\",\"loss\":2,\"seconds\":9}\n{\"step\":2,\"task\":\"a\",\"loss\":2,\"seconds\":0.5}\n"
      "{\"step\":3,\"task\":\"b\",\"loss\":2,\"seconds\":0.3}\n"
      "{\"eval\":\"s\",\"metric\":\"choice\",\"score\":0.75,\"step\":3,\"task\":\"b\"}\n");
  write_file(dir, "matrix.json",
             "{\"tasks\": [{\"name\": \"a\", \"column\": 0}], \"sets\": [{\"name\": \"s\", \"metric\": \"choice\", "
             "\"smaller_better\": false}], \"rows\": [[0.25], [0.75]]}");
  write_file(dir, "result.json", "{\"memory_peak\": 1048576, \"trainable\": 12, \"seconds\": 9.5, \"a\": {\"b\": 3}}");
  assert_int_equal(esp_compared_read(&r), ESP_OK);
  assert_true(r.finished);
  NEAR(r.value[ESP_MEASURE_ACC], .75);
  NEAR(r.value[ESP_MEASURE_STEP], .5); /* the median, not the mean */
  NEAR(r.value[ESP_MEASURE_MEMORY], 1048576);
  NEAR(r.value[ESP_MEASURE_TRAINED], 12);
  esp_run_data d;
  assert_int_equal(esp_run_data_read(dir, &d), ESP_OK);
  assert_int_equal(d.n, 3);
  assert_int_equal(d.n_switches, 2);
  NEAR(d.switches[1].step, 3);
  assert_int_equal(d.n_curves, 1);
  assert_int_equal(d.curves[0].n, 2);
  NEAR(d.curves[0].score[1], .75);
  NEAR(esp_run_data_result(&d, "a.b"), 3);
  assert_true(isnan(esp_run_data_result(&d, "a.c")));
  assert_true(isnan(esp_run_data_result(&d, "x.c")));
  esp_run_data_deinit(&d);
  write_file(dir, "metrics.jsonl", "{\"step\":1,\n");
  assert_int_equal(esp_compared_read(&r), ESP_ERR_DATA);
  assert_non_null(strstr(esp_error_message(), "metrics.jsonl:1"));
  assert_int_equal(esp_remove_tree(dir), ESP_OK);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(spread_and_pairs_by_hand), cmocka_unit_test(a_run_directory)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
