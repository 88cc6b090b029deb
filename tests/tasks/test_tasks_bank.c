/* The bank of adapters: features of the frozen base whatever is trained; k-means against every possible assignment;
 * each selector's choice; a batch whose rows have different adapters, and weighted ones, against each alone.
 * Mutation seen caught: `pass` (features.c) without switching the adapters off. */
#include "strategy_fixture.h"
#include "tasks/features.h"

static const char *const bank[] = {"bank"};

static void features(void **state) {
  sf f;
  esp_strategy_cfg none = {0};
  sf_open(&f, NULL, &none);
  int64_t d = esp_features_width(&f.q), index[5] = {3, 0, 7, 9, 3};
  float *before = malloc((size_t)(5 * d) * 4), *after = malloc((size_t)(5 * d) * 4), *one = malloc((size_t)d * 4);
  OK(esp_features_of_samples(&f.q, index, 5, before));
  fx_shake(f.a, 0.3f, 4);
  OK(esp_features_of_samples(&f.q, index, 5, after));
  assert_memory_equal(before, after, (size_t)(5 * d) * 4);
  for (int i = 0; i < 5; i++) { /* one by one, and as the prompts of a batch */
    const int32_t *ids;
    const float *w;
    int64_t n;
    esp_dataset_sample(f.data[0], index[i], &ids, &w, &n);
    int32_t cu[3] = {0, (int32_t)n, (int32_t)(2 * n)}, *twice = malloc((size_t)(2 * n) * 4);
    memcpy(twice, ids, (size_t)n * 4);
    memcpy(twice + n, ids, (size_t)n * 4);
    int32_t head = (int32_t)esp_dataset_prompt_len(f.data[0], index[i]), prompt[2] = {head, head};
    assert_true(head > 0 && head < n);
    float *both = malloc((size_t)(2 * d) * 4);
    esp_batch b = {.tokens = 2 * n, .ids = twice, .cu_seqlens = cu, .n_seqs = 2};
    OK(esp_features_of_batch(&f.q, &b, prompt, both));
    for (int64_t k = 0; k < 2 * d; k++) assert_true(fabsf(both[k] - before[i * d + k % d]) <= 1e-5f);
    free(both);
    free(twice);
  }
  free(before);
  free(after);
  free(one);
  sf_close(&f);
}

/* Eight points on a line in two clusters of unequal size: the least sum of squares over all 2^8 assignments. */
static void kmeans(void **state) {
  const float x[8] = {0.0f, 0.2f, 0.1f, 5.0f, 5.5f, 5.2f, 5.1f, 0.3f};
  double least = 1e9, found = 0;
  float c[2];
  for (int mask = 1; mask < 255; mask++) {
    double sum[2] = {0}, square = 0;
    int n[2] = {0};
    for (int i = 0; i < 8; i++) sum[mask >> i & 1] += (double)x[i], n[mask >> i & 1]++;
    for (int i = 0; i < 8; i++) square += pow((double)x[i] - sum[mask >> i & 1] / n[mask >> i & 1], 2);
    least = fmin(least, square);
  }
  OK(esp_kmeans(x, 8, 1, 2, 3, 4, c));
  for (int i = 0; i < 8; i++) found += fmin(pow((double)(x[i] - c[0]), 2), pow((double)(x[i] - c[1]), 2));
  assert_true(fabs(found - least) < 1e-6);
  OK(esp_kmeans(x, 2, 1, 2, 3, 4, c)); /* as many as points */
  assert_true(fabsf(c[0] - c[1]) > 0.19f);
}

/* Three adapters on the fixture's model, of which each task's data chooses. */
static void open_bank(sf *f, esp_adapter *list[3], const char *selector, int64_t top_k) {
  static const char *const target[] = {"q_proj", "down_proj"};
  const esp_adapter_cfg lora = {.type = "lora", .r = 4, .alpha = 8, .seed = 5, .target = target, .n_target = 2};
  esp_strategy_cfg cfg = {
      .names = bank,
      .n = 1,
      .bank = {.selector = selector, .centroids = 2, .samples = 12, .top_k = top_k, .temperature = 0.1}};
  sf_open(f, &lora, &cfg);
  for (int i = 0; i < 3; i++) {
    if (i < 2)
      OK(esp_adapter_create(f->r.m, &lora, "earlier", false, &list[i]));
    else
      list[i] = f->a;
    fx_shake(list[i], 0.2f, (uint64_t)i + 20);
  }
  f->q.bank = list;
  for (int t = 0; t < 3; t++) {
    f->q.n_bank = t + 1;
    sf_task(f, t);
  }
}

static void close_bank(sf *f, esp_adapter *list[3]) {
  OK(esp_strategies_deploy(&f->set, &f->q, false));
  esp_adapter_destroy(list[0]);
  esp_adapter_destroy(list[1]);
  sf_close(f);
}

static void chosen(void **state) {
  static const char *const selectors[] = {"nearest", "keys", "trained", "oracle"};
  for (int k = 0; k < 4; k++) {
    sf f;
    esp_adapter *list[3];
    esp_rows rows = {0};
    int right = 0;
    open_bank(&f, list, selectors[k], 1);
    esp_batch b = {0};
    int32_t prompt[SF_SAMPLES];
    OK(esp_strategies_choose(&f.set, &f.q, 0, prompt, &b));
    assert_null(b.adapters); /* not deployed */
    OK(esp_strategies_deploy(&f.set, &f.q, true));
    for (int t = 0; t < 3; t++) {
      esp_sample s[SF_SAMPLES];
      for (int i = 0; i < SF_SAMPLES; i++) s[i] = (esp_sample){t, i};
      OK(esp_sequence_rows(&f.q, s, SF_SAMPLES, &rows));
      b = esp_sequence_batch(&rows);
      b.n_seqs = SF_SAMPLES;
      for (int i = 0; i < SF_SAMPLES; i++) prompt[i] = (int32_t)esp_dataset_prompt_len(f.data[t], i);
      OK(esp_strategies_choose(&f.set, &f.q, t, prompt, &b));
      for (int i = 0; i < SF_SAMPLES; i++) right += b.adapters[i] == t;
    }
    if (k == 3) { /* tasks that are not there yet, and sets of no task: the base */
      OK(esp_strategies_choose(&f.set, &f.q, -1, prompt, &b));
      assert_int_equal(b.adapters[0], -1);
    }
    if (right < 30) fail_msg("%s: %d of 36 prompts found their task", selectors[k], right);
    esp_rows_deinit(&rows);
    close_bank(&f, list);
  }
}

static void logits(sf *f, const esp_batch *b, int32_t row, float *out) {
  OK(esp_model_logits(f->r.m, &f->r.stack, b, &row, 1, out));
}

static void weighted(void **state) {
  sf f;
  esp_adapter *list[3];
  open_bank(&f, list, "keys", 2);
  OK(esp_strategies_deploy(&f.set, &f.q, true));
  const int32_t *ids;
  const float *w;
  int64_t n;
  esp_dataset_sample(f.data[1], 4, &ids, &w, &n);
  int32_t cu[3] = {0, (int32_t)n, (int32_t)(2 * n)}, *twice = malloc((size_t)(4 * n) * 4), *positions = twice + 2 * n;
  for (int64_t i = 0; i < 2 * n; i++) twice[i] = ids[i % n], positions[i] = (int32_t)(i % n);
  esp_batch b = {.tokens = 2 * n, .ids = twice, .positions = positions, .cu_seqlens = cu, .n_seqs = 2};
  int32_t prompt[2] = {(int32_t)n, (int32_t)n};
  OK(esp_strategies_choose(&f.set, &f.q, 1, prompt, &b));
  assert_non_null(b.shares);
  float sum = 0;
  int some = 0;
  for (int k = 0; k < 3; k++) sum += b.shares[k], some += b.shares[k] > 0;
  assert_true(fabsf(sum - 1) < 1e-6f && some == 2);
  /* the first sequence with shares, the second with the second adapter alone: each as with `weight` and by itself */
  float shares[6] = {0.7f, 0, 0.3f, 0, 1, 0}, y[300], z[300];
  b.shares = shares;
  for (int seq = 0; seq < 2; seq++) {
    logits(&f, &b, (int32_t)((seq + 1) * n - 1), y);
    esp_batch alone = {.tokens = n, .ids = ids, .positions = positions, .cu_seqlens = cu, .n_seqs = 1};
    list[0]->weight = 0.7, list[2]->weight = 0.3;
    esp_adapter *mixed[2] = {list[0], list[2]};
    OK(seq == 0 ? esp_adapters_activate(f.r.m, mixed, 2) : esp_adapters_activate(f.r.m, &list[1], 1));
    logits(&f, &alone, (int32_t)n - 1, z);
    list[0]->weight = list[2]->weight = 1;
    OK(esp_adapters_activate(f.r.m, list, 3));
    float most = 0, off = 0;
    for (int k = 0; k < 300; k++) most = fmaxf(most, fabsf(z[k])), off = fmaxf(off, fabsf(y[k] - z[k]));
    assert_true(most > 0 && off <= 1e-5f * most);
  }
  b.n_shares = 2;
  float *out = y;
  int32_t row = 0;
  assert_int_equal(esp_model_logits(f.r.m, &f.r.stack, &b, &row, 1, out), ESP_ERR_RECIPE);
  free(twice);
  close_bank(&f, list);
}

int main(void) {
  fx_setup();
  sf_setup();
  const struct CMUnitTest tests[] = {cmocka_unit_test(features), cmocka_unit_test(kmeans), cmocka_unit_test(chosen),
                                     cmocka_unit_test(weighted)};
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
