/* What is kept of finished tasks and how it is replayed: sizes, fairness of the reservoir, labels in balance, largest
 * losses, herding against brute force in fp64, the bound in bytes, nothing given up comes back; and a step with replay
 * has the gradient of the mean over own and replayed tokens. Mutation seen caught: `draw` (replay.c) without adding the
 * replayed weight. */
#include "strategy_fixture.h"
#include "tasks/features.h"
#include "tasks/memory.h"

static const char *const replay[] = {"replay"};

static esp_strategy_cfg config(double buffer, const char *sampler) {
  return (esp_strategy_cfg){.names = replay, .n = 1, .replay = {.buffer = buffer, .sampler = sampler, .weight = 1}};
}

static int count_of(const esp_strategy *s, int task) {
  int n = 0;
  for (int64_t i = 0; i < esp_memory_count(s); i++) n += esp_memory_at(s, i).task == task;
  return n;
}

/* Memory after `tasks` tasks; kept[task][index]. */
static void fill(sf *f, const esp_memory_cfg *c, int tasks, bool kept[SF_TASKS][SF_SAMPLES]) {
  esp_strategy *s = &f->set.list[0];
  esp_strategy_drop(s, "memory.task");
  esp_strategy_drop(s, "memory.index");
  for (int t = 0; t < tasks; t++) {
    f->q.task = t;
    OK(esp_memory_add(s, &f->q, c));
  }
  memset(kept, 0, SF_TASKS * SF_SAMPLES);
  for (int64_t i = 0; i < esp_memory_count(s); i++) {
    esp_sample at = esp_memory_at(s, i);
    assert_false(kept[at.task][at.index]); /* once each */
    kept[at.task][at.index] = true;
  }
}

static void sizes(void **state) {
  sf f;
  esp_strategy_cfg cfg = config(7, "reservoir");
  sf_open(&f, NULL, &cfg);
  bool one[SF_TASKS][SF_SAMPLES], two[SF_TASKS][SF_SAMPLES];
  static const char *const samplers[] = {"reservoir", "balanced", "loss", "herding"};
  for (int k = 0; k < 4; k++) {
    esp_memory_cfg share = {0.25, 0, samplers[k]}, all = {7, 0, samplers[k]};
    fill(&f, &share, 3, two);
    for (int t = 0; t < 3; t++) assert_int_equal(count_of(&f.set.list[0], t), 3);
    fill(&f, &all, 1, one);
    assert_int_equal(esp_memory_count(&f.set.list[0]), 7);
    fill(&f, &all, 2, two);
    assert_int_equal(esp_memory_count(&f.set.list[0]), 7);
    for (int i = 0; i < SF_SAMPLES; i++) assert_true(one[0][i] || !two[0][i]); /* what was given up is gone */
    if (k) assert_int_equal(count_of(&f.set.list[0], 0), 4);
    int64_t bytes = esp_memory_bytes(&f.set.list[0], &f.q);
    all.bytes = bytes / 2;
    fill(&f, &all, 2, two);
    assert_in_range(esp_memory_bytes(&f.set.list[0], &f.q), bytes / 4, bytes / 2);
  }
  sf_close(&f);
}

/* Over many seeds every sample of every task is kept equally often. */
static void reservoir_is_fair(void **state) {
  sf f;
  esp_strategy_cfg cfg = config(9, "reservoir");
  sf_open(&f, NULL, &cfg);
  int often[SF_TASKS][SF_SAMPLES] = {{0}};
  bool kept[SF_TASKS][SF_SAMPLES];
  esp_memory_cfg c = {9, 0, "reservoir"};
  enum { ROUNDS = 1600 };
  for (int k = 0; k < ROUNDS; k++) {
    f.q.seed = (uint64_t)k;
    fill(&f, &c, 3, kept);
    for (int t = 0; t < SF_TASKS; t++)
      for (int i = 0; i < SF_SAMPLES; i++) often[t][i] += kept[t][i];
  }
  double chi2 = 0, want = ROUNDS * 9.0 / (SF_TASKS * SF_SAMPLES);
  for (int t = 0; t < SF_TASKS; t++)
    for (int i = 0; i < SF_SAMPLES; i++) chi2 += (often[t][i] - want) * (often[t][i] - want) / (want * 0.75);
  assert_true(chi2 < 80); /* 35 degrees of freedom: above 80 with probability 2e-5 */
  sf_close(&f);
}

static void chosen_ones(void **state) {
  sf f;
  esp_strategy_cfg cfg = config(6, "balanced");
  sf_open(&f, NULL, &cfg);
  fx_shake(f.a, 0.3f, 4);
  bool kept[SF_TASKS][SF_SAMPLES];
  esp_memory_cfg balanced = {0.5, 0, "balanced"}, loss = {0.25, 0, "loss"};
  fill(&f, &balanced, 3, kept);
  assert_int_equal(kept[2][0] + kept[2][4] + kept[2][8], 3); /* all three rare ones among six */
  fill(&f, &loss, 1, kept);
  double smallest = 1e9, largest = -1;
  for (int i = 0; i < SF_SAMPLES; i++) {
    esp_sample s = {0, i};
    double l;
    esp_tensor out = esp_strategy_flat(&f.set.list[0], "scratch", &f.q);
    OK(esp_sequence_gradient_of(&f.q, &s, 1, out, &l));
    if (kept[0][i] && l < smallest) smallest = l;
    if (!kept[0][i] && l > largest) largest = l;
  }
  assert_true(smallest >= largest - 1e-6);
  sf_close(&f);
}

/* |mean(x of chosen and i) - mean(x)|, written as it is defined. */
static double herding_gap(const float *x, int64_t d, const int *chosen, int n, int i) {
  double sum = 0;
  for (int64_t j = 0; j < d; j++) {
    double mean = 0, own = (double)x[i * d + j];
    for (int k = 0; k < SF_SAMPLES; k++) mean += (double)x[k * d + j] / SF_SAMPLES;
    for (int k = 0; k < n; k++) own += (double)x[chosen[k] * d + j];
    sum += (own / (n + 1) - mean) * (own / (n + 1) - mean);
  }
  return sqrt(sum);
}

/* Order and choice of the greedy rule; an adapter that is not zero has no part in it; with room for fewer its first. */
static void herding(void **state) {
  sf f;
  esp_strategy_cfg cfg = config(6, "herding");
  sf_open(&f, NULL, &cfg);
  fx_shake(f.a, 0.3f, 4);
  bool kept[SF_TASKS][SF_SAMPLES];
  esp_memory_cfg c = {6, 0, "herding"};
  fill(&f, &c, 1, kept);
  int64_t index[SF_SAMPLES], d = esp_features_width(&f.q);
  for (int i = 0; i < SF_SAMPLES; i++) index[i] = i;
  float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)(SF_SAMPLES * d) * sizeof *x);
  OK(esp_features_of_samples(&f.q, index, SF_SAMPLES, x));
  int chosen[6];
  for (int n = 0; n < 6; n++) {
    double least = INFINITY;
    for (int i = 0; i < SF_SAMPLES; i++) {
      bool again = false;
      for (int k = 0; k < n; k++) again |= chosen[k] == i;
      double gap = herding_gap(x, d, chosen, n, i);
      if (!again && gap < least) least = gap, chosen[n] = i;
    }
    int got = (int)esp_memory_at(&f.set.list[0], n).index;
    assert_true(herding_gap(x, d, chosen, n, got) <= least * (1 + 1e-9));
    chosen[n] = got;
  }
  esp_mem_free(x);
  fill(&f, &c, 3, kept);
  for (int n = 0; n < 2; n++) assert_true(kept[0][chosen[n]]);
  assert_int_equal(count_of(&f.set.list[0], 0), 2);
  sf_close(&f);
}

/* The whole memory once per pass over the task, and another order each time. */
static void draws(void **state) {
  sf f;
  esp_strategy_cfg cfg = config(7, "reservoir");
  sf_open(&f, NULL, &cfg);
  bool kept[SF_TASKS][SF_SAMPLES];
  esp_memory_cfg c = {7, 0, "reservoir"};
  fill(&f, &c, 2, kept);
  esp_sample list[14];
  OK(esp_memory_draw(&f.set.list[0], &f.q, 0, 14, list));
  bool differ = false;
  for (int round = 0; round < 2; round++) {
    bool left[SF_TASKS][SF_SAMPLES];
    memcpy(left, kept, sizeof left);
    for (int i = 0; i < 7; i++) {
      esp_sample s = list[7 * round + i];
      assert_true(left[s.task][s.index]);
      left[s.task][s.index] = false;
      differ |= s.task != list[i].task || s.index != list[i].index;
    }
  }
  assert_true(differ);
  esp_sample part[3]; /* a part of it is a part of it */
  OK(esp_memory_draw(&f.set.list[0], &f.q, 6, 3, part));
  for (int i = 0; i < 3; i++) assert_true(part[i].task == list[6 + i].task && part[i].index == list[6 + i].index);
  sf_close(&f);
}

static void gradient(void **state) {
  sf f;
  esp_strategy_cfg cfg = config(0.25, "reservoir");
  cfg.replay.weight = 0.5;
  sf_open(&f, NULL, &cfg);
  fx_shake(f.a, 0.05f, 4);
  sf_task(&f, 0);
  sf_end(&f);
  sf_task(&f, 1);
  esp_strategy_step t = {.step = 9, .task_step = 1, .task_steps = 6, .weight = 0};
  int64_t n = f.a->params->total;
  double own = 0, extra = 0, l;
  for (int i = 0; i < 4; i++) own += esp_sequence_weight(&f.q, (esp_sample){1, i});
  double weight = t.weight = own;
  OK(esp_strategies_draw(&f.set, &f.q, &t, &weight));
  t.scale = 1 / weight;
  (void)sf_gradient(&f, 1, 4);
  esp_tensor g = esp_sequence_gradient(&f.q);
  float *mine = fx_grads(f.a);
  f.r.be->ops->axpby(f.r.be, g, 0.0f, g, (float)(own * t.scale));
  OK(esp_model_sums_reset(f.r.m));
  OK(esp_strategies_pass(&f.set, &f.q, &t));
  OK(esp_backend_sync(f.r.be));
  float *both = fx_grads(f.a);
  esp_sample drawn[1]; /* three kept, three steps to an epoch */
  OK(esp_memory_draw(&f.set.list[0], &f.q, 1, 1, drawn));
  assert_int_equal(drawn[0].task, 0);
  extra = esp_sequence_weight(&f.q, drawn[0]);
  assert_true(fabs(weight - (own + 0.5 * extra)) < 1e-9);
  esp_tensor out = esp_strategy_flat(&f.set.list[0], "scratch", &f.q);
  OK(esp_sequence_gradient_of(&f.q, drawn, 1, out, &l));
  float *theirs = test_read(f.r.be, out.data, n * 4);
  double most = 0;
  for (int64_t i = 0; i < n; i++) {
    double want = (own * (double)mine[i] + 0.5 * extra * (double)theirs[i]) / weight;
    assert_true(fabs(want - (double)both[i]) <= 1e-6);
    most = fmax(most, fabs((double)theirs[i]));
  }
  assert_true(most > 1e-3);
  free(mine);
  free(both);
  free(theirs);
  sf_close(&f);
}

int main(void) {
  fx_setup();
  sf_setup();
  const struct CMUnitTest tests[] = {cmocka_unit_test(sizes),       cmocka_unit_test(reservoir_is_fair),
                                     cmocka_unit_test(chosen_ones), cmocka_unit_test(herding),
                                     cmocka_unit_test(draws),       cmocka_unit_test(gradient)};
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
