/* Two speeds against their formulas in fp64, step by step, and who is deployed.
 * Mutation seen caught: `follow` (speeds.c) with the shares exchanged, `coin_step` comparing the gradient with zero in
 * the place of the one before. */
#include "strategy_fixture.h"

static const char *name[1];

static void open_with(sf *f, const esp_strategy_cfg *c, const char *strategy) {
  esp_strategy_cfg cfg = *c;
  name[0] = strategy;
  cfg.names = name, cfg.n = 1;
  sf_open(f, NULL, &cfg);
}

static float *slow_of(sf *f) {
  return test_read(f->r.be, esp_strategy_get(&f->set.list[0], "slow", NULL), f->a->params->total * 4);
}

static void close_to(const float *got, const double *want, int64_t n, const char *what) {
  for (int64_t i = 0; i < n; i++)
    if (!(fabs((double)got[i] - want[i]) <= 1e-6 * (1 + fabs(want[i]))))
      fail_msg("%s[%ld]: %.9g, not %.9g", what, (long)i, (double)got[i], want[i]);
}

static double *exact(float *x, int64_t n) {
  double *d = malloc((size_t)n * sizeof *d);
  for (int64_t i = 0; i < n; i++) d[i] = (double)x[i];
  free(x);
  return d;
}

/* deploy(true) measures the slow values, deploy(false) trains on with the fast ones, to the bit. */
static void deployed_is_slow(sf *f) {
  int64_t bytes = f->a->params->total * 4;
  float *fast = fx_masters(f->a), *slow = slow_of(f);
  assert_true(memcmp(fast, slow, (size_t)bytes) != 0);
  OK(esp_strategies_deploy(&f->set, &f->q, true));
  float *now = fx_masters(f->a);
  assert_memory_equal(now, slow, (size_t)bytes);
  free(now);
  OK(esp_strategies_deploy(&f->set, &f->q, false));
  now = fx_masters(f->a);
  assert_memory_equal(now, fast, (size_t)bytes);
  free(now), free(fast), free(slow);
}

static void lae(void **state) {
  sf f;
  open_with(&f, &(esp_strategy_cfg){.lae = {.decay = 0.9}}, "lae");
  int64_t n = f.a->params->total;
  sf_task(&f, 0);
  for (int k = 0; k < 2; k++) (void)sf_step(&f, k, 2, 4);
  assert_null(esp_strategy_get(&f.set.list[0], "slow", NULL)); /* one expert in the first task */
  sf_end(&f);
  double *want = exact(fx_masters(f.a), n);
  sf_task(&f, 1);
  for (int k = 0; k < 4; k++) {
    (void)sf_step(&f, 2 + k, 4, 4);
    double *fast = exact(fx_masters(f.a), n);
    for (int64_t i = 0; i < n; i++) want[i] = 0.9 * want[i] + 0.1 * fast[i];
    free(fast);
  }
  float *slow = slow_of(&f);
  close_to(slow, want, n, "lae");
  free(slow), free(want);
  deployed_is_slow(&f);
  sf_close(&f);
}

static void ilora(void **state) {
  sf f;
  open_with(&f, &(esp_strategy_cfg){.ilora = {.decay = 0.6, .gamma = 2, .buffer = 6, .batch = 3}}, "ilora");
  int64_t n = f.a->params->total, step = 0;
  sf_task(&f, 0);
  double *want = exact(fx_masters(f.a), n);
  for (int task = 0; task < 2; task++) {
    if (task) sf_task(&f, 1);
    for (int k = 0; k < 4; k++, step++) {
      (void)sf_step(&f, step, 4, 4);
      double a = fmin(0.6, 1 - 1 / (double)(step + 1)), *fast = exact(fx_masters(f.a), n);
      for (int64_t i = 0; i < n; i++) want[i] = a * want[i] + (1 - a) * fast[i];
      free(fast);
    }
    sf_end(&f);
  }
  float *slow = slow_of(&f);
  close_to(slow, want, n, "ilora");
  free(slow), free(want);
  deployed_is_slow(&f);
  sf_close(&f);
}

/* On replayed rows the loss has the distance of the states from the slow values', where they are below. */
static void ilora_holds_states(void **state) {
  double loss[2], own;
  for (int k = 0; k < 2; k++) {
    sf f;
    open_with(&f, &(esp_strategy_cfg){.ilora = {.decay = 0.6, .gamma = k ? 3 : 0, .buffer = 6, .batch = 6}}, "ilora");
    sf_task(&f, 0);
    sf_end(&f);
    sf_task(&f, 1);
    fx_shake(f.a, 0.05f, 4);
    double weight = 0;
    esp_loss_out out;
    esp_strategy_step t = {.scale = 1};
    OK(esp_model_sums_reset(f.r.m));
    esp_params_zero_grad(f.a->params);
    OK(esp_strategies_draw(&f.set, &f.q, &t, &weight));
    OK(esp_strategies_pass(&f.set, &f.q, &t));
    OK(esp_model_sums(f.r.m, &out));
    loss[k] = out.loss_sum;
    assert_true(weight > 0);
    if (k) { /* the definition, from the states themselves */
      esp_strategy *s = &f.set.list[0];
      esp_rows rows = {0};
      esp_sample list[6];
      int32_t *task = esp_strategy_get(s, "memory.task", NULL);
      int64_t *index = esp_strategy_get(s, "memory.index", NULL);
      for (int i = 0; i < 6; i++) list[i] = (esp_sample){task[i], index[i]};
      OK(esp_sequence_rows(&f.q, list, 6, &rows));
      esp_batch b = esp_sequence_batch(&rows);
      int64_t hidden = 32, bytes = rows.tokens * hidden * 4, at = 0;
      esp_tensor x = esp_tensor_2d(f.r.be->ops->alloc(f.r.be, ESP_MEM_HOST, bytes), ESP_F32, rows.tokens, hidden);
      OK(esp_model_features(f.r.m, &f.r.stack, &b, x));
      float *h = test_read(f.r.be, x.data, bytes);
      OK(esp_sequence_features(&f.q, esp_strategy_flat(s, "slow", &f.q), &b, x));
      float *held = test_read(f.r.be, x.data, bytes);
      own = 0;
      for (int64_t r = 0; r < rows.tokens; r++) {
        if (rows.weights[r] == 0) continue;
        double sum = 0;
        for (int64_t j = 0; j < hidden; j++) {
          double d = (double)held[at * hidden + j] - (double)h[at * hidden + j];
          if (d > 0) sum += d * d;
        }
        own += 3 * (double)rows.weights[r] * sum / (double)hidden;
        at++;
      }
      assert_true(own > 1e-3 && fabs(loss[1] - loss[0] - own) <= 1e-5 * loss[1]);
      free(h), free(held);
      f.r.be->ops->free(f.r.be, x.data);
      esp_rows_deinit(&rows);
    }
    sf_close(&f);
  }
}

static void coin_ema(void **state) {
  sf f;
  open_with(&f, &(esp_strategy_cfg){0}, "coin_ema");
  const esp_params *ps = f.a->params;
  int64_t n = ps->total;
  int dynamic = 0, fixed = 0;
  sf_task(&f, 0);
  double *want = exact(fx_masters(f.a), n), *before = calloc((size_t)n, sizeof *before);
  for (int k = 0; k < 5; k++) {
    (void)sf_step(&f, k, 5, 4);
    double *fast = exact(fx_masters(f.a), n), *g = exact(fx_grads(f.a), n);
    for (int i = 0; i < ps->count; i++) {
      double a = 0, b = 0, c = 0;
      for (int64_t j = ps->list[i].offset; j < ps->list[i].offset + ps->list[i].numel; j++)
        a += fabs(fast[j] - want[j]), b += fabs(g[j]), c += fabs(g[j] - before[j]);
      double alpha = 2 * (1 + b) / (a * c);
      if (alpha > 0 && alpha < 1)
        dynamic++;
      else
        alpha = 0.01, fixed++;
      for (int64_t j = ps->list[i].offset; j < ps->list[i].offset + ps->list[i].numel; j++)
        want[j] = (1 - alpha) * want[j] + alpha * fast[j];
    }
    memcpy(before, g, (size_t)n * sizeof *g);
    free(fast), free(g);
  }
  assert_true(dynamic > 0 && fixed > 0); /* both branches were gone through */
  float *slow = slow_of(&f);
  close_to(slow, want, n, "coin_ema");
  free(slow);
  deployed_is_slow(&f);
  sf_end(&f);
  float *fast = fx_masters(f.a);
  close_to(fast, want, n, "the values a task ends with");
  free(fast), free(want), free(before);
  sf_close(&f);
}

static void mos(void **state) {
  sf f;
  open_with(&f, &(esp_strategy_cfg){.mos = {.momentum = 0.2}}, "mos");
  int64_t n = f.a->params->total;
  double *mean = calloc((size_t)n, sizeof *mean);
  for (int task = 0; task < 3; task++) {
    sf_task(&f, task);
    fx_shake(f.a, 0.05f, (uint64_t)task);
    double *want = exact(fx_masters(f.a), n);
    esp_strategy_step t = {0};
    OK(esp_strategies_after_step(&f.set, &f.q, &t));
    for (int64_t i = 0; i < n && task; i++) want[i] = 0.8 * want[i] + 0.2 * mean[i] / task;
    float *got = fx_masters(f.a);
    close_to(got, want, n, "mos");
    free(want);
    sf_end(&f);
    for (int64_t i = 0; i < n; i++) mean[i] += (double)got[i];
    free(got);
  }
  free(mean);
  sf_close(&f);
}

int main(void) {
  fx_setup();
  sf_setup();
  const struct CMUnitTest tests[] = {cmocka_unit_test(lae), cmocka_unit_test(ilora),
                                     cmocka_unit_test(ilora_holds_states), cmocka_unit_test(coin_ema),
                                     cmocka_unit_test(mos)};
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
