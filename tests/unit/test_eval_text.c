/* Metrics over text: exact match and ROUGE-L against values worked out by hand, perplexity and shares from their sums.
 * Mutation it caught: lcs / na instead of 2 lcs / (na + nr). */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "eval/score.h"

#define NEAR(a, b) assert_true(fabs((a) - (b)) < 1e-12)

static void exact_match(void **state) {
  (void)state;
  assert_true(esp_exact_match("yes", "yes"));
  assert_true(esp_exact_match("  yes\n", "yes"));
  assert_true(esp_exact_match("", "  "));
  assert_false(esp_exact_match("Yes", "yes"));
  assert_false(esp_exact_match("yes no", "yes"));
}

static void rouge_l(void **state) {
  (void)state;
  NEAR(esp_rouge_l("the cat sat", "the cat sat"), 1.0);
  NEAR(esp_rouge_l("The cat, sat!", "the CAT sat"), 1.0);
  /* Lin 2004: reference "police killed the gunman", "police kill the gunman": lcs 3 of 4 and 4 */
  NEAR(esp_rouge_l("police kill the gunman", "police killed the gunman"), 0.75);
  NEAR(esp_rouge_l("the gunman kill police", "police killed the gunman"), 0.5);
  NEAR(esp_rouge_l("a b c d e f", "a c e"), 2.0 * 3 / 9);
  NEAR(esp_rouge_l("", "something"), 0.0);
  NEAR(esp_rouge_l("", ""), 1.0);
}

static void values_from_sums(void **state) {
  (void)state;
  esp_score_sums s = {.num = 3 * log(7.0), .den = 3, .samples = 2};
  NEAR(esp_score_value(ESP_METRIC_PERPLEXITY, &s), 7.0);
  s = (esp_score_sums){.num = 3, .den = 4, .samples = 4};
  NEAR(esp_score_value(ESP_METRIC_CHOICE, &s), 0.75);
  s.den = 0;
  assert_true(isnan(esp_score_value(ESP_METRIC_CHOICE, &s)));
  assert_true(esp_metric_smaller_better(ESP_METRIC_PERPLEXITY));
  assert_false(esp_metric_smaller_better(ESP_METRIC_ROUGE_L));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(exact_match),
      cmocka_unit_test(rouge_l),
      cmocka_unit_test(values_from_sums),
  };
  return cmocka_run_group_tests_name("text metrics", tests, NULL, NULL);
}
