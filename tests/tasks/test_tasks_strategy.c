/* What every strategy stands on: the rules between them, named arrays, their way through a checkpoint, the penalty
 * against fp64, gradients of chosen samples, values exchanged.
 * Mutation seen caught: `load_one` (state.c) keeping the arrays that were there before. */
#include "strategy_fixture.h"

static const char *const l2_only[] = {"l2"};
static const esp_strategy_cfg with_l2 = {.names = l2_only, .n = 1, .l2 = {.weight = 3}};

static void rules(void **state) {
  static const char *const twice[] = {"l2", "l2"};
  esp_strategy_cfg c = {.names = twice, .n = 2};
  esp_strategy_facts f = {.n_tasks = 3, .one_adapter = true};
  assert_int_equal(esp_strategies_check(&c, &f), ESP_ERR_RECIPE);
  assert_non_null(strstr(esp_error_message(), "l2 is named twice"));
  c.n = 1;
  assert_int_equal(esp_strategies_check(&c, &f), ESP_OK);
  f.adapter_moves = true;
  assert_int_equal(esp_strategies_check(&c, &f), ESP_ERR_RECIPE);
  assert_non_null(strstr(esp_error_message(), "ranks move"));
  f.adapter_moves = f.one_adapter = false;
  assert_int_equal(esp_strategies_check(&c, &f), ESP_ERR_RECIPE);
  assert_non_null(strstr(esp_error_message(), "continual.policy: continue"));
}

static void arrays(void **state) {
  sf f, g;
  sf_open(&f, NULL, &with_l2);
  sf_open(&g, NULL, &with_l2);
  esp_strategy *s = &f.set.list[0], *t = &g.set.list[0];
  int32_t *ids = esp_strategy_array(s, "ids", ESP_I32, 3, true);
  assert_int_equal(ids[1], 0);
  ids[1] = 7;
  assert_ptr_equal(esp_strategy_array(s, "ids", ESP_I32, 3, true), ids);
  float *flat = esp_strategy_flat(s, "flat", &f.q).data, value[2] = {2.5f, -1};
  f.r.be->ops->upload(f.r.be, flat + 4, value, sizeof value);
  assert_non_null(esp_strategy_array(t, "left over", ESP_F32, 5, true));
  int64_t total = f.a->params->total;
  assert_int_equal(esp_strategies_bytes(&f.set, 0, &f.q), 12 + 4 * total);
  OK(esp_strategies_save(&f.set, fx_path("s.safetensors"), fx_path("s.json")));
  char *text[2];
  size_t n[2];
  OK(esp_file_read(fx_path("s.safetensors"), &text[0], &n[0]));
  OK(esp_file_read(fx_path("s.json"), &text[1], &n[1]));
  OK(esp_strategies_load(&g.set, text[0], n[0], text[1], n[1], "s.json"));
  assert_null(esp_strategy_get(t, "left over", NULL));
  assert_int_equal(((int32_t *)esp_strategy_get(t, "ids", NULL))[1], 7);
  float *back = test_read(g.r.be, esp_strategy_get(t, "flat", NULL), total * 4);
  assert_true(back[3] == 0 && back[4] == 2.5f && back[5] == -1);
  free(back);
  text[1][0] = '[';
  assert_int_equal(esp_strategies_load(&g.set, text[0], n[0], text[1], n[1], "s.json"), ESP_ERR_DATA);
  esp_mem_free(text[0]);
  esp_mem_free(text[1]);
  esp_strategy_drop(s, "ids");
  assert_null(esp_strategy_get(s, "ids", NULL));
  sf_close(&f);
  sf_close(&g);
}

/* The gradient of lambda/2 |theta - anchor|^2 and its value, and none of it in the first task. */
static void l2_penalty(void **state) {
  sf f;
  sf_open(&f, NULL, &with_l2);
  sf_task(&f, 0);
  assert_true(sf_step(&f, 0, 2, 4) == 0);
  sf_task(&f, 1);
  float *anchor = fx_masters(f.a);
  fx_shake(f.a, 0.1f, 4);
  float *now = fx_masters(f.a);
  esp_params_zero_grad(f.a->params);
  esp_strategy_step t = {0};
  double value = esp_strategies_penalty(&f.set, &f.q, &t), want = 0;
  float *grad = fx_grads(f.a);
  for (int64_t i = 0; i < f.a->params->total; i++) {
    double d = (double)now[i] - (double)anchor[i];
    want += 1.5 * d * d;
    assert_true(fabs(grad[i] - 3 * d) <= 1e-6 * (1 + fabs(3 * d)));
  }
  assert_true(want > 0 && fabs(value - want) <= 1e-6 * want);
  free(anchor);
  free(now);
  free(grad);
  sf_close(&f);
}

static void gradients_of_samples(void **state) {
  sf f;
  esp_strategy_cfg none = {0};
  sf_open(&f, NULL, &none);
  fx_shake(f.a, 0.05f, 4);
  int64_t n = f.a->params->total;
  esp_sample s[6];
  esp_tensor one = esp_flat(f.r.be->ops->alloc(f.r.be, ESP_MEM_HOST, n * 4), n);
  double *sum = calloc((size_t)n, sizeof *sum), total = 0, loss, mean = 0;
  for (int i = 0; i < 6; i++) s[i] = (esp_sample){i % 2, i};
  double all = sf_gradient(&f, 0, 3); /* what was there before */
  float *before = fx_grads(f.a);
  for (int i = 0; i < 6; i++) {
    double w = esp_sequence_weight(&f.q, s[i]);
    OK(esp_sequence_gradient_of(&f.q, &s[i], 1, one, &loss));
    float *g = test_read(f.r.be, one.data, n * 4);
    for (int64_t k = 0; k < n; k++) sum[k] += w * (double)g[k];
    mean += w * loss;
    total += w;
    free(g);
  }
  OK(esp_sequence_gradient_of(&f.q, s, 6, one, &loss));
  float *g = test_read(f.r.be, one.data, n * 4), *after = fx_grads(f.a);
  double most = 0;
  for (int64_t k = 0; k < n; k++) {
    assert_true(fabs(sum[k] / total - (double)g[k]) <= 1e-6);
    if (fabs((double)g[k]) > most) most = fabs((double)g[k]);
  }
  assert_true(most > 1e-4 && all > 0 && fabs(loss - mean / total) <= 1e-6 * loss);
  assert_memory_equal(before, after, (size_t)n * 4);
  free(g);
  free(before);
  free(after);
  free(sum);
  f.r.be->ops->free(f.r.be, one.data);
  sf_close(&f);
}

static void exchange(void **state) {
  sf f;
  sf_open(&f, NULL, &with_l2);
  fx_shake(f.a, 0.05f, 4);
  esp_tensor other = esp_strategy_flat(&f.set.list[0], "other", &f.q);
  float *before = fx_masters(f.a);
  esp_sequence_exchange(&f.q, other);
  float *zero = fx_masters(f.a);
  for (int64_t i = 0; i < f.a->params->total; i++) assert_true(zero[i] == 0);
  double base = sf_gradient(&f, 0, 4);
  esp_sequence_exchange(&f.q, other);
  float *after = fx_masters(f.a);
  assert_memory_equal(before, after, (size_t)f.a->params->total * 4);
  assert_true(base != sf_gradient(&f, 0, 4));
  free(before);
  free(zero);
  free(after);
  sf_close(&f);
}

/* branch: what a decay did to parameters and optimizer is in force while it is measured, and gone afterwards; an
 * evaluation in the middle of the task undoes nothing. */
static void branch(void **state) {
  (void)state;
  static const char *const names[] = {"branch"};
  esp_schedule course[SF_TASKS];
  for (int i = 0; i < SF_TASKS; i++)
    course[i] = (esp_schedule){.name = ESP_SCHED_INFINITE, .anneal_steps = 2, .constant_ratio = 1, .min_lr_ratio = 0.1};
  esp_strategy_cfg cfg = {.names = names, .n = 1, .branch = {course}};
  sf f;
  sf_open(&f, NULL, &cfg);
  int64_t n = f.a->params->total;
  size_t bytes = (size_t)n * sizeof(float);
  float *kept = NULL, *kept_state[2] = {0};
  sf_task(&f, 0);
  for (int step = 0; step < 6; step++) {
    sf_step(&f, step, 6, 4);
    OK(esp_strategies_deploy(&f.set, &f.q, true));
    OK(esp_strategies_deploy(&f.set, &f.q, false));
    assert_int_equal(f.optim->step, step + 1);
    if (step != 3) continue;
    kept = fx_masters(f.a);
    for (int i = 0; i < 2; i++) {
      kept_state[i] = malloc(bytes);
      f.r.be->ops->download(f.r.be, kept_state[i], f.optim->state[i], (int64_t)bytes);
    }
    OK(esp_backend_sync(f.r.be));
  }
  float *end = fx_masters(f.a);
  assert_memory_not_equal(end, kept, bytes);
  sf_end(&f);
  OK(esp_strategies_deploy(&f.set, &f.q, true));
  float *measured = fx_masters(f.a);
  assert_memory_equal(measured, end, bytes);
  OK(esp_strategies_deploy(&f.set, &f.q, false));
  float *back = fx_masters(f.a), *got = malloc(bytes);
  assert_memory_equal(back, kept, bytes);
  for (int i = 0; i < 2; i++) {
    f.r.be->ops->download(f.r.be, got, f.optim->state[i], (int64_t)bytes);
    OK(esp_backend_sync(f.r.be));
    assert_memory_equal(got, kept_state[i], bytes);
    free(kept_state[i]);
  }
  assert_int_equal(f.optim->step, 4);
  free(kept);
  free(end);
  free(measured);
  free(back);
  free(got);
  sf_close(&f);
}

int main(void) {
  fx_setup();
  sf_setup();
  const struct CMUnitTest tests[] = {cmocka_unit_test(branch),
                                     cmocka_unit_test(rules),
                                     cmocka_unit_test(arrays),
                                     cmocka_unit_test(l2_penalty),
                                     cmocka_unit_test(gradients_of_samples),
                                     cmocka_unit_test(exchange)};
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
