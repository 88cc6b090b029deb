/* The score matrix: every summary against numbers worked out by hand, missing cells, perplexity columns, round trip.
 * One matrix is made up, and so are the curves inside tasks; two are published ones, with the numbers of their authors.
 * Mutations it caught: BWT summed over t <= T instead of t < T; min-ACC over steps from e_t on, e_t itself included. */
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
  NEAR(x.lowest, .60);
  NEAR(x.learning_acc, (.90 + .80 + .85) / 3);
  NEAR(x.bwt_trace, ((.60 - .90) + (.75 - .80)) / 3);
  NEAR(x.bwt_rows, ((.70 - .90) + (.60 - .90) + (.75 - .80)) / 3);
  NEAR(x.fwt_unseen, (.35 + .25 + .30) / 3);
  NEAR(x.anytime_acc, (.90 + (.70 + .80) / 2 + (.60 + .75 + .85) / 3) / 3);
  NEAR(x.forgetting_all, x.forgetting);
  esp_matrix_destroy(m);
}

/* Dice scores of four prostate data sets, trained in a sequence without and with replay, and what the authors' own
 * function prints of them: github.com/ummadiviany/prostate-replay, sequential/clmetrics.py. Their FWT is the mean above
 * the diagonal; their forgetting looks from row t on, ours at all rows, which differs in the third column. */
static void published_matrices(void **state) {
  (void)state;
  static const double scores[2][4][4] = {
      {{78.4, 58.7, 62.4, 36.7}, {86.1, 88.9, 79.4, 65.2}, {82.6, 45.3, 76.9, 44.3}, {73.3, 31.9, 69.7, 83.1}},
      {{78.4, 58.7, 62.4, 36.7}, {86.1, 88.9, 77.6, 62.6}, {82.1, 79.7, 77.2, 50.4}, {84.2, 88.2, 82.3, 84.6}}};
  static const double acc[] = {64.50, 84.82}, bwt[] = {-23.10, 3.40}, fwt[] = {57.78, 58.07},
                      forgetting[] = {25.67 + (79.4 - 76.9) / 3, -0.83 + (77.6 - 77.2) / 3};
  for (int k = 0; k < 2; k++) {
    esp_matrix *m;
    assert_int_equal(esp_matrix_create(4, 4, &m), ESP_OK);
    for (int t = 0; t < 4; t++) {
      snprintf(m->task_name[t], ESP_MATRIX_NAME, "task%d", t);
      snprintf(m->set_name[t], ESP_MATRIX_NAME, "s%d", t);
      m->column[t] = t;
      for (int s = 0; s < 4; s++) *esp_matrix_cell(m, t + 1, s) = scores[k][t][s];
    }
    esp_matrix_summary x;
    esp_matrix_summarise(m, &x);
    assert_true(fabs(x.acc - acc[k]) < 0.006); /* theirs have two decimals */
    assert_true(fabs(x.bwt - bwt[k]) < 0.006);
    assert_true(fabs(x.fwt_unseen - fwt[k]) < 0.006);
    assert_true(fabs(x.forgetting - forgetting[k]) < 0.006);
    assert_true(isnan(x.fwt)); /* the untrained network was not measured */
    esp_matrix_destroy(m);
  }
}

static void forgetting_takes_the_best_earlier_row(void **state) {
  (void)state;
  esp_matrix *m = example();
  *esp_matrix_cell(m, 2, 0) = .95; /* better on s0 after task 2 than after task 1 */
  esp_matrix_summary x;
  esp_matrix_summarise(m, &x);
  NEAR(x.forgetting, ((.95 - .60) + (.80 - .75)) / 2);
  NEAR(x.bwt, ((.60 - .90) + (.75 - .80)) / 2);
  *esp_matrix_cell(m, 3, 1) = .90; /* better at the end than ever: only the form over all rows has no gain */
  esp_matrix_summarise(m, &x);
  NEAR(x.forgetting, ((.95 - .60) + (.80 - .90)) / 2);
  NEAR(x.forgetting_all, (.95 - .60) / 2);
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

/* Scores inside the tasks of example(), each task 10 steps: {task, step, score}. */
static esp_score_point on_s0[] = {{0, 0, .40},  {0, 5, .60},  {0, 10, .90}, {1, 12, .50},
                                  {1, 20, .70}, {2, 22, .65}, {2, 30, .60}};
static esp_score_point on_s1[] = {{0, 0, .30}, {0, 10, .35}, {1, 12, .45}, {1, 20, .80}, {2, 22, .40}, {2, 30, .75}};
static esp_score_point on_s2[] = {{0, 0, .20}, {0, 10, .25}, {1, 20, .30}, {2, 22, .60}, {2, 30, .85}};

static void curves_by_hand(void **state) {
  (void)state;
  esp_matrix *m = example();
  const esp_score_points curves[] = {{on_s0, 7}, {on_s1, 6}, {on_s2, 5}};
  esp_curve_summary x;
  esp_curve_summarise(m, curves, 10, &x);
  NEAR(x.min_acc, (.50 + .40) / 2);
  NEAR(x.wc_acc, .85 / 3 + 2.0 / 3 * (.50 + .40) / 2);
  NEAR(x.wf, ((.90 - .50) + (.80 - .40) + 0) / 3);
  NEAR(x.wp, ((.90 - .40) + (.80 - .35) + (.85 - .30)) / 3);
  NEAR(x.gap, ((.70 - .50) + 0 + (.75 - .40)) / 3);
  assert_int_equal(x.inside, 6);
  esp_curve_summarise(m, curves, 5, &x); /* pairs further apart do not count */
  NEAR(x.wf, ((.90 - .50) + (.80 - .40) + 0) / 3);
  NEAR(x.wp, ((.90 - .60) + (.45 - .35) + (.60 - .30)) / 3);
  NEAR(x.min_acc, (.50 + .40) / 2);
  esp_curve_summarise(m, curves, 1, &x);
  assert_true(isnan(x.wf) && isnan(x.wp));
  m->smaller_better[0] = true; /* the same numbers as a perplexity: task 0 was never worse than at .70 */
  esp_curve_summarise(m, curves, 10, &x);
  NEAR(x.min_acc, (-.70 + .40) / 2);
  esp_matrix_destroy(m);
}

/* A run that measured at task ends only: the rows are its curve, the gap is invisible, windows are not defined. */
static void ends_alone_hide_the_gap(void **state) {
  (void)state;
  esp_matrix *m = example();
  esp_score_point at[3][4];
  esp_score_points curves[3];
  for (int t = 0; t < 3; t++) curves[t] = (esp_score_points){at[t], esp_matrix_points(m, t, at[t])};
  assert_int_equal(curves[0].n, 4);
  esp_curve_summary x;
  esp_curve_summarise(m, curves, 0, &x);
  NEAR(x.min_acc, (.60 + .75) / 2);
  NEAR(x.gap, 0);
  assert_true(isnan(x.wf));
  assert_int_equal(x.inside, 0);
  *esp_matrix_cell(m, 2, 1) = NAN;
  esp_curve_summarise(m, curves, 0, &x);
  assert_true(isnan(x.gap));
  esp_matrix_destroy(m);
}

static void against_other_runs(void **state) {
  (void)state;
  esp_matrix *m = example(), *first = example(), *joint = example();
  for (int t = 1; t < 3; t++) first->column[t] = -1; /* trained task0 alone: its word counts for s0 */
  *esp_matrix_cell(first, 3, 0) = .95;
  *esp_matrix_cell(first, 3, 1) = .10;
  *esp_matrix_cell(first, 3, 2) = .10;
  for (int t = 0; t < 3; t++) joint->column[t] = t ? t : -1; /* has s0 as a probe only */
  *esp_matrix_cell(joint, 3, 0) = .01;
  *esp_matrix_cell(joint, 3, 1) = .85;
  *esp_matrix_cell(joint, 3, 2) = .90;
  const esp_matrix *others[] = {first, joint};
  esp_reference_summary x;
  esp_reference_summarise(m, others, 2, &x);
  NEAR(x.learning_gap, ((.90 - .95) + (.80 - .85) + (.85 - .90)) / 3);
  NEAR(x.final_gap, ((.60 - .95) + (.75 - .85) + (.85 - .90)) / 3);
  esp_reference_summarise(m, others, 1, &x); /* s1 and s2: as that run measured them */
  NEAR(x.learning_gap, ((.90 - .95) + (.80 - .10) + (.85 - .10)) / 3);
  esp_reference_summarise(m, NULL, 0, &x);
  assert_true(isnan(x.learning_gap));
  esp_matrix_destroy(m);
  esp_matrix_destroy(first);
  esp_matrix_destroy(joint);
}

static void shown_as_asked(void **state) {
  (void)state;
  esp_matrix *m = example();
  const esp_score_points curves[] = {{on_s0, 7}, {on_s1, 6}, {on_s2, 5}};
  esp_curve_summary c;
  esp_reference_summary r;
  esp_strbuf b;
  *esp_matrix_malformed(m, 2, 1) = .125;
  esp_curve_summarise(m, curves, 10, &c);
  esp_reference_summarise(m, (const esp_matrix *const[]){m}, 1, &r);
  esp_matrix_view v = {.formulas = true, .bwt_trace = true, .curve = &c, .window = 10, .reference = &r};
  esp_strbuf_init(&b);
  esp_matrix_render_text(m, &v, &b);
  assert_non_null(strstr(b.data, "\nACC 0.733   BWT (trace) -0.117   FWT +0.075"));
  assert_non_null(strstr(b.data, "min-ACC 0.450   WC-ACC 0.583   WF 0.267   WP 0.500   stability gap 0.183"));
  assert_non_null(strstr(b.data, "none of the labels"));
  assert_non_null(strstr(b.data, "2 task1           -    0.125"));
  assert_non_null(strstr(b.data, "learning gap +0.117   final gap +0.000"));
  assert_non_null(strstr(b.data, "probe probe 0.500 (-0.100 against the base)"));
  for (int i = 0; i < esp_n_measure_rows; i++) assert_non_null(strstr(b.data, esp_measure_rows[i].formula));
  esp_strbuf_deinit(&b);
  esp_strbuf_init(&b);
  esp_matrix_render_json(m, &v, &b);
  for (int i = 0; i < esp_n_measure_rows; i++) assert_non_null(strstr(b.data, esp_measure_rows[i].key));
  esp_strbuf_deinit(&b);
  esp_matrix_destroy(m);
}

static void missing_cells_are_no_numbers(void **state) {
  (void)state;
  esp_matrix *m = example();
  *esp_matrix_cell(m, 0, 1) = NAN;
  *esp_matrix_cell(m, 3, 2) = NAN;
  esp_matrix_summary x;
  esp_matrix_summarise(m, &x);
  assert_true(isnan(x.acc) && isnan(x.fwt) && isnan(x.lowest));
  NEAR(x.bwt, ((.60 - .90) + (.75 - .80)) / 2);
  esp_strbuf text;
  esp_strbuf_init(&text);
  esp_matrix_render_text(m, &(esp_matrix_view){.formulas = true}, &text);
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
  *esp_matrix_malformed(m, 1, 2) = .25;
  assert_int_equal(esp_matrix_save(m, path), ESP_OK);
  assert_int_equal(esp_matrix_load(path, &back), ESP_OK);
  for (int i = 0; i < 16; i++)
    assert_true(m->score[i] == back->score[i] || (isnan(m->score[i]) && isnan(back->score[i])));
  assert_true(*esp_matrix_malformed(back, 1, 2) == .25 && isnan(*esp_matrix_malformed(back, 1, 1)));
  assert_int_equal(back->column[2], 2);
  assert_true(back->smaller_better[3]);
  assert_string_equal(back->task_name[1], "task1");
  esp_matrix_destroy(m);
  esp_matrix_destroy(back);
  unlink(path);
}

/* All tasks as one: the last row has that name, in text and read back, and belongs to every task. */
static void joint_row(void **state) {
  (void)state;
  char path[] = "matrix_XXXXXX";
  int fd = mkstemp(path);
  assert_true(fd >= 0);
  close(fd);
  esp_matrix *m = example(), *back, *copy;
  assert_string_equal(esp_matrix_row_name(m, 3), "task2");
  assert_int_equal(esp_matrix_row_of(m, 1), 2);
  m->joint = true;
  for (int k = 4; k < 12; k++) m->score[k] = NAN; /* rows 1 and 2 */
  assert_int_equal(esp_matrix_like(m, &copy), ESP_OK);
  assert_int_equal(esp_matrix_save(m, path), ESP_OK);
  assert_int_equal(esp_matrix_load(path, &back), ESP_OK);
  const esp_matrix *all[] = {m, copy, back};
  for (int i = 0; i < 3; i++) {
    assert_string_equal(esp_matrix_row_name(all[i], 0), "base");
    assert_string_equal(esp_matrix_row_name(all[i], 1), "task0");
    assert_string_equal(esp_matrix_row_name(all[i], 3), "joint");
    assert_int_equal(esp_matrix_row_of(all[i], 1), 3);
  }
  esp_strbuf text;
  esp_strbuf_init(&text);
  esp_matrix_render_text(back, NULL, &text);
  assert_non_null(strstr(text.data, "\njoint "));
  assert_null(strstr(text.data, "task"));
  assert_non_null(strstr(text.data, "ACC 0.733"));
  esp_strbuf_deinit(&text);
  esp_matrix_destroy(m);
  esp_matrix_destroy(copy);
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
      cmocka_unit_test(published_matrices),
      cmocka_unit_test(forgetting_takes_the_best_earlier_row),
      cmocka_unit_test(perplexity_turns_its_sign),
      cmocka_unit_test(curves_by_hand),
      cmocka_unit_test(ends_alone_hide_the_gap),
      cmocka_unit_test(against_other_runs),
      cmocka_unit_test(shown_as_asked),
      cmocka_unit_test(missing_cells_are_no_numbers),
      cmocka_unit_test(round_trip),
      cmocka_unit_test(joint_row),
      cmocka_unit_test(bad_files),
  };
  return cmocka_run_group_tests_name("score matrix", tests, NULL, NULL);
}
