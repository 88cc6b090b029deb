/* The score matrix: every summary against numbers worked out by hand, missing cells, perplexity columns, round trip.
 * Mutation it caught: BWT summed over t <= T instead of t < T. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/file.h"
#include "tasks/matrix.h"

#define NEAR(a, b) assert_true(fabs((a) - (b)) < 1e-12)

/* three tasks on three sets and one probe:
 *            s0    s1    s2   probe
 *   base    .40   .30   .20   .60
 *   1       .90   .35   .25   .58
 *   2       .70   .80   .30   .55
 *   3       .60   .75   .85   .50   */
static esp_matrix *example(void) {
  static const double r[4][4] = {
      {.40, .30, .20, .60}, {.90, .35, .25, .58}, {.70, .80, .30, .55}, {.60, .75, .85, .50}};
  esp_matrix *m;
  assert_int_equal(esp_matrix_create(3, 4, &m), ESP_OK);
  for (int t = 0; t < 3; t++) {
    snprintf(m->task_name[t], ESP_MATRIX_NAME, "task%d", t);
    m->column[t] = t;
  }
  for (int s = 0; s < 4; s++) {
    snprintf(m->set_name[s], ESP_MATRIX_NAME, s < 3 ? "s%d" : "probe", s);
    snprintf(m->set_metric[s], ESP_MATRIX_NAME, "choice");
  }
  for (int i = 0; i < 4; i++)
    for (int s = 0; s < 4; s++) *esp_matrix_cell(m, i, s) = r[i][s];
  return m;
}

static void summary_by_hand(void **state) {
  (void)state;
  esp_matrix *m = example();
  esp_matrix_summary x;
  esp_matrix_summarise(m, &x);
  NEAR(x.acc, (.60 + .75 + .85) / 3);
  NEAR(x.bwt, ((.60 - .90) + (.75 - .80)) / 2);
  NEAR(x.forgetting, ((.90 - .60) + (.80 - .75)) / 2);
  NEAR(x.fwt, ((.35 - .30) + (.30 - .20)) / 2);
  NEAR(x.min_acc, .60);
  NEAR(x.learning_acc, (.90 + .80 + .85) / 3);
  esp_matrix_destroy(m);
}

static void forgetting_takes_the_best_earlier_row(void **state) {
  (void)state;
  esp_matrix *m = example();
  *esp_matrix_cell(m, 2, 0) = .95; /* better on s0 after task 2 than after task 1 */
  esp_matrix_summary x;
  esp_matrix_summarise(m, &x);
  NEAR(x.forgetting, ((.95 - .60) + (.80 - .75)) / 2);
  NEAR(x.bwt, ((.60 - .90) + (.75 - .80)) / 2);
  esp_matrix_destroy(m);
}

static void perplexity_turns_its_sign(void **state) {
  (void)state;
  esp_matrix *m = example();
  m->smaller_better[0] = true;
  *esp_matrix_cell(m, 1, 0) = 3.0;
  *esp_matrix_cell(m, 2, 0) = 4.0;
  *esp_matrix_cell(m, 3, 0) = 5.0;
  esp_matrix_summary x;
  esp_matrix_summarise(m, &x);
  NEAR(x.bwt, ((-5.0 + 3.0) + (.75 - .80)) / 2);
  NEAR(x.forgetting, ((5.0 - 3.0) + (.80 - .75)) / 2);
  esp_matrix_destroy(m);
}

static void missing_cells_are_no_numbers(void **state) {
  (void)state;
  esp_matrix *m = example();
  *esp_matrix_cell(m, 0, 1) = NAN;
  *esp_matrix_cell(m, 3, 2) = NAN;
  esp_matrix_summary x;
  esp_matrix_summarise(m, &x);
  assert_true(isnan(x.acc) && isnan(x.fwt) && isnan(x.min_acc));
  NEAR(x.bwt, ((.60 - .90) + (.75 - .80)) / 2);
  esp_strbuf text;
  esp_strbuf_init(&text);
  esp_matrix_render_text(m, true, &text);
  assert_non_null(strstr(text.data, "ACC -"));
  assert_non_null(strstr(text.data, "probe: choice (probe: in no formula)"));
  esp_strbuf_deinit(&text);
  esp_matrix_destroy(m);
}

static void round_trip(void **state) {
  (void)state;
  char path[] = "matrix_XXXXXX";
  int fd = mkstemp(path);
  assert_true(fd >= 0);
  close(fd);
  esp_matrix *m = example(), *back;
  m->smaller_better[3] = true;
  *esp_matrix_cell(m, 2, 3) = NAN;
  assert_int_equal(esp_matrix_save(m, path), ESP_OK);
  assert_int_equal(esp_matrix_load(path, &back), ESP_OK);
  for (int i = 0; i < 16; i++)
    assert_true(m->score[i] == back->score[i] || (isnan(m->score[i]) && isnan(back->score[i])));
  assert_int_equal(back->column[2], 2);
  assert_true(back->smaller_better[3]);
  assert_string_equal(back->task_name[1], "task1");
  esp_matrix_destroy(m);
  esp_matrix_destroy(back);
  unlink(path);
}

static void bad_files(void **state) {
  (void)state;
  static const char *const bad[] = {"{}", "{\"tasks\":[],\"sets\":[],\"rows\":[]}",
                                    "{\"tasks\":[{\"name\":\"a\",\"column\":1}],\"sets\":[{\"name\":\"s\",\"metric\":"
                                    "\"choice\",\"smaller_better\":false}],\"rows\":[[1],[2]]}",
                                    "{\"tasks\":[],\"sets\":[],\"rows\":[[1]]}"};
  char path[] = "matrix_XXXXXX";
  int fd = mkstemp(path);
  assert_true(fd >= 0);
  close(fd);
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    esp_matrix *m;
    assert_int_equal(esp_file_write_atomic(path, bad[i], strlen(bad[i])), ESP_OK);
    assert_int_equal(esp_matrix_load(path, &m), ESP_ERR_DATA);
    assert_non_null(strstr(esp_error_message(), path));
  }
  unlink(path);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(summary_by_hand),
      cmocka_unit_test(forgetting_takes_the_best_earlier_row),
      cmocka_unit_test(perplexity_turns_its_sign),
      cmocka_unit_test(missing_cells_are_no_numbers),
      cmocka_unit_test(round_trip),
      cmocka_unit_test(bad_files),
  };
  return cmocka_run_group_tests_name("score matrix", tests, NULL, NULL);
}
