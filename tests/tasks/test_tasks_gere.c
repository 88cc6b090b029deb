/* General samples: the thresholds against the base's own states in fp64, each of the four losses against its definition
 * on states that were asked for one by one, nothing but the labels while the adapter is new; the dynamic weight against
 * the ratio of losses that were measured one by one, and its gradient against that of the same number.
 * Mutation seen caught: the deviation left out of the upper threshold, `task_begin` asking the trained adapter, the
 * step's own rows left out of the dynamic weight. */
#include "strategy_fixture.h"

enum { GENERAL = 6, HIDDEN = 32 };
static const char *const only[] = {"gere"};

static void open_weighed(sf *f, const char *loss, double weight) {
  static char path[256];
  snprintf(path, sizeof path, "%s", fx_path("general.jsonl"));
  esp_strategy_cfg c = {.names = only, .n = 1};
  c.gere.data = (esp_data_source){.path = path, .format = ESP_FMT_TEXT};
  c.gere.loss = loss, c.gere.weight = weight, c.gere.temperature = 2, c.gere.batch = GENERAL;
  sf_open(f, NULL, &c);
}

static void open_gere(sf *f, const char *loss) {
  open_weighed(f, loss, 3);
}

/* Loss of a step's general rows with nothing else; the gradient is left in the store. */
static double general(sf *f, double *weight) {
  esp_strategy_step t = {.scale = 1};
  esp_loss_out out;
  *weight = 0;
  esp_params_zero_grad(f->a->params);
  OK(esp_strategies_draw(&f->set, &f->q, &t, weight));
  OK(esp_model_sums_reset(f->r.m));
  OK(esp_strategies_pass(&f->set, &f->q, &t));
  OK(esp_model_sums(f->r.m, &out));
  return out.loss_sum;
}

typedef struct states { /* of the labelled rows of all general samples */
  float *h;
  int64_t n;
} states;

static states ask(sf *f) {
  esp_data_source src = {.path = fx_path("general.jsonl"), .format = ESP_FMT_TEXT, .weight = 1};
  esp_dataset *d;
  esp_rows rows = {0};
  OK(esp_dataset_build(&src, 1, &f->data_cfg, f->tok, &d));
  assert_int_equal(esp_dataset_count(d), GENERAL);
  for (int i = 0; i < GENERAL; i++) {
    const int32_t *ids;
    const float *w;
    int64_t n;
    esp_dataset_sample(d, i, &ids, &w, &n);
    OK(esp_rows_add(&rows, ids, w, n));
  }
  esp_batch b = esp_sequence_batch(&rows);
  esp_tensor x =
      esp_tensor_2d(f->r.be->ops->alloc(f->r.be, ESP_MEM_HOST, rows.tokens * HIDDEN * 4), ESP_F32, rows.tokens, HIDDEN);
  OK(esp_model_features(f->r.m, &f->r.stack, &b, x));
  states s = {test_read(f->r.be, x.data, rows.tokens * HIDDEN * 4), 0};
  for (int64_t t = 0; t < rows.tokens; t++) {
    if (rows.weights[t] == 0) continue;
    assert_true(rows.weights[t] == 1);
    s.n++;
  }
  f->r.be->ops->free(f->r.be, x.data);
  esp_rows_deinit(&rows);
  esp_dataset_destroy(d);
  return s;
}

static double bound(const states *base, int64_t j, double sign) {
  double mean = 0, spread = 0;
  for (int64_t i = 0; i < base->n; i++) mean += (double)base->h[i * HIDDEN + j] / (double)base->n;
  for (int64_t i = 0; i < base->n; i++) {
    double d = (double)base->h[i * HIDDEN + j] - mean;
    spread += d * d / (double)(base->n - 1);
  }
  return mean + sign * sqrt(spread);
}

static double defined(const char *loss, const states *base, const states *now) {
  double all = 0, low[HIDDEN], high[HIDDEN];
  for (int64_t j = 0; j < HIDDEN; j++) low[j] = bound(base, j, -1), high[j] = bound(base, j, 1);
  for (int64_t i = 0; i < now->n; i++) {
    double sum = 0, count = 0;
    for (int64_t j = 0; j < HIDDEN; j++) {
      double x = (double)now->h[i * HIDDEN + j], h = (double)base->h[i * HIDDEN + j], e = 0;
      if (!strcmp(loss, "l1")) e = fabs(x - h);
      if (!strcmp(loss, "l2")) e = (x - h) * (x - h);
      if (!strcmp(loss, "margin"))
        e = h < low[j]    ? fmax(0, x - low[j])
            : h > high[j] ? fmax(0, high[j] - x)
                          : fmax(0, x - high[j]) + fmax(0, low[j] - x);
      sum += e;
      count += strcmp(loss, "margin") || e > 0;
    }
    all += count > 0 ? sum / count : 0;
  }
  return all;
}

/* At step 0 the adapter is the base: every loss is that of the labels, and so is its gradient, to the bit. */
static void nothing_at_first(void **state) {
  static const char *const losses[] = {"label", "kl", "l1", "l2", "margin"};
  float *labels = NULL;
  double first = 0, weight;
  for (int k = 0; k < 9; k++) {
    sf f;
    open_weighed(&f, losses[k < 5 ? k : k - 4], k < 5 ? 3 : 0);
    sf_task(&f, 0);
    double loss = general(&f, &weight);
    float *g = fx_grads(f.a);
    if (k == 0)
      labels = g, first = loss;
    else {
      assert_true(loss == first);
      assert_memory_equal(g, labels, (size_t)f.a->params->total * 4);
      free(g);
    }
    sf_close(&f);
  }
  free(labels);
}

static void four_losses(void **state) {
  static const char *const losses[] = {"label", "l1", "l2", "margin", "kl"};
  double label = 0, weight;
  for (int k = 0; k < 5; k++) {
    sf f;
    open_gere(&f, losses[k]);
    states base = ask(&f);
    sf_task(&f, 0);
    fx_shake(f.a, 0.02f, 4);
    sf_task(&f, 1); /* the base stays the teacher */
    states now = ask(&f);
    double loss = general(&f, &weight);
    assert_true(weight == (double)now.n);
    if (k == 0) label = loss;
    if (k >= 1 && k <= 3) {
      double want = 3 * defined(losses[k], &base, &now);
      assert_true(want > 1e-2);
      if (!(fabs(loss - label - want) <= 2e-5 * loss)) fail_msg("%s: %g, not %g", losses[k], loss - label, want);
    }
    if (k == 4) assert_true(loss > label + 1e-3);
    free(base.h), free(now.h);
    sf_close(&f);
  }
}

/* A step of three own rows and all general ones, as train/step.c has it, away from the base: the loss of all of them;
 * gradient (malloc) and the weight of the trained tokens. In micro-batches of `micro`. */
static double whole_step(const char *loss, double weight, int64_t micro, float **grad, double *trained, double *own) {
  sf f;
  esp_rows rows = {0};
  esp_loss_out out;
  esp_strategy_step t = {0};
  open_weighed(&f, loss, weight);
  f.q.micro_batch = micro;
  sf_task(&f, 0);
  fx_shake(f.a, 0.02f, 4);
  sf_task(&f, 1);
  *trained = 0;
  for (int i = 0; i < 3; i++) {
    const esp_sample s = {1, i};
    *trained += esp_sequence_weight(&f.q, s);
    OK(esp_sequence_rows(&f.q, &s, 1, &rows));
    OK(esp_sequence_pass(&f.q, &rows, NULL, false, 1, 0, &out));
    *own = (i ? *own : 0) + out.loss_sum;
  }
  esp_params_zero_grad(f.a->params);
  OK(esp_strategies_draw(&f.set, &f.q, &t, trained));
  t.scale = 1 / *trained;
  OK(esp_model_sums_reset(f.r.m));
  for (int i = 0; i < 3; i++) {
    OK(esp_sequence_rows(&f.q, &(esp_sample){1, i}, 1, &rows));
    OK(esp_sequence_pass(&f.q, &rows, NULL, true, t.scale, 0, NULL));
  }
  OK(esp_strategies_pass(&f.set, &f.q, &t));
  OK(esp_model_sums(f.r.m, &out));
  *grad = fx_grads(f.a);
  esp_rows_deinit(&rows);
  sf_close(&f);
  return out.loss_sum;
}

static void dynamic_weight(void **state) {
  static const char *const losses[] = {"l1", "l2", "margin", "kl"};
  double trained, own, label;
  float *g;
  label = whole_step("label", 1, GENERAL, &g, &trained, &own);
  free(g);
  for (int k = 0; k < 4; k++) {
    double held = whole_step(losses[k], 1, GENERAL, &g, &trained, &own) - label;
    free(g);
    if (k < 3) { /* by definition as well */
      sf f;
      open_gere(&f, losses[k]);
      states base = ask(&f);
      sf_task(&f, 0);
      fx_shake(f.a, 0.02f, 4);
      states now = ask(&f);
      double want = defined(losses[k], &base, &now);
      assert_true(fabs(held - want) <= 2e-5 * want + 1e-6 * label);
      held = want;
      free(base.h), free(now.h);
      sf_close(&f);
    }
    double w = label / trained / (held / trained + 1e-8);
    assert_true(own > 1 && held > 1e-4 && w > 0.5);
    float *same, *dynamic[2];
    int64_t n = 0;
    double fixed = whole_step(losses[k], w, GENERAL, &same, &trained, &own);
    sf f;
    open_gere(&f, "label");
    n = f.a->params->total;
    sf_close(&f);
    for (int cut = 0; cut < 2; cut++) {
      double loss = whole_step(losses[k], 0, cut ? 2 : GENERAL, &dynamic[cut], &trained, &own);
      if (!(fabs(loss - 2 * label) <= 1e-5 * label && fabs(loss - fixed) <= 1e-4 * label))
        fail_msg("%s: %g, fixed %g, labels %g", losses[k], loss, fixed, label);
      double worst = 0;
      for (int64_t i = 0; i < n; i++) worst = fmax(worst, fabs((double)dynamic[cut][i] - (double)same[i]));
      double most = fx_max_abs(same, n);
      if (!(worst <= 1e-4 * most)) fail_msg("%s: gradient differs by %g of %g", losses[k], worst, most);
      free(dynamic[cut]);
    }
    free(same);
  }
}

static void thresholds(void **state) {
  sf f;
  open_gere(&f, "margin");
  states base = ask(&f);
  sf_task(&f, 0);
  float *held = test_read(f.r.be, esp_strategy_get(&f.set.list[0], "thresholds", NULL), 2 * HIDDEN * 4);
  for (int64_t j = 0; j < HIDDEN; j++) {
    assert_true(fabs((double)held[j] - bound(&base, j, -1)) < 1e-5);
    assert_true(fabs((double)held[HIDDEN + j] - bound(&base, j, 1)) < 1e-5);
  }
  assert_true(esp_strategies_bytes(&f.set, 0, &f.q) > 4 * f.a->params->total + 2 * HIDDEN * 4);
  free(held), free(base.h);
  sf_close(&f);
}

static void refusals(void **state) {
  esp_strategy_cfg c = {.names = only, .n = 1};
  assert_int_equal(esp_strategies_check(&c, &(esp_strategy_facts){.n_tasks = 2, .one_adapter = true}), ESP_ERR_RECIPE);
  assert_non_null(strstr(esp_error_message(), "continual.gere.data.path"));
  c.gere.data.path = "some", c.gere.loss = "label", c.gere.weight = 0;
  assert_int_equal(esp_strategies_check(&c, &(esp_strategy_facts){.n_tasks = 2, .one_adapter = true}), ESP_ERR_RECIPE);
  assert_non_null(strstr(esp_error_message(), "continual.gere.weight: dynamic"));
}

int main(void) {
  char rows[2048];
  size_t n = 0;
  fx_setup();
  sf_setup();
  for (int i = 0; i < GENERAL; i++)
    n += (size_t)snprintf(rows + n, sizeof rows - n, "{\"text\":\"the %s number %d is here now\"}\n",
                          i % 2 ? "red" : "blue", i);
  OK(esp_file_write_atomic(fx_path("general.jsonl"), rows, n));
  const struct CMUnitTest tests[] = {cmocka_unit_test(nothing_at_first), cmocka_unit_test(four_losses),
                                     cmocka_unit_test(dynamic_weight), cmocka_unit_test(thresholds),
                                     cmocka_unit_test(refusals)};
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
