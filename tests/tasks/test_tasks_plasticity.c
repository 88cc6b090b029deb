/* Perturbed parameters: the noise against its draws and its moments, the formulas of perturb and upgd in fp64 over the
 * steps of the same run without them, frozen parameters left alone.
 * Mutation seen caught: `gate_of` (plasticity.c) scaling utilities by half of the largest. */
#include "strategy_fixture.h"
#include "tasks/internal.h"

static const char *const target[] = {"all-linear"};
static const esp_adapter_cfg olora = {
    .type = "olora_cl", .r = 4, .alpha = 8, .seed = 5, .target = target, .n_target = 1, .tasks = SF_TASKS};
static const char *const perturb_only[] = {"perturb"}, *const upgd_only[] = {"upgd"};

static float *noise(sf *f, int64_t step, int64_t n) {
  esp_tensor x = esp_flat(f->r.be->ops->alloc(f->r.be, ESP_MEM_HOST, n * 4), n);
  esp_strategy s = {.kind = &esp_strategy_perturb, .cfg = &f->cfg, .be = f->r.be};
  OK(esp_noise(&s, &f->q, step, x));
  float *host = test_read(f->r.be, x.data, n * 4);
  f->r.be->ops->free(f->r.be, x.data);
  esp_strategy_drop(&s, "ones");
  esp_mem_free(s.values);
  return host;
}

static void noise_is_its_draws(void **state) {
  enum { N = 300001 };
  esp_strategy_cfg none = {0};
  sf f;
  sf_open(&f, NULL, &none);
  float *x = noise(&f, 7, N), *again = noise(&f, 7, N), *other = noise(&f, 8, N);
  assert_memory_equal(x, again, N * 4);
  double mean = 0, square = 0, fourth = 0, cross = 0, next = 0;
  for (int64_t i = 0; i < N; i++) {
    double v = (double)x[i];
    mean += v / N, square += v * v / N, fourth += v * v * v * v / N, cross += v * (double)other[i] / N;
    next += v * (double)x[(i + 1) % N] / N;
  }
  assert_true(fabs(mean) < 0.01 && fabs(square - 1) < 0.01 && fabs(fourth - 2.75) < 0.05);
  assert_true(fabs(cross) < 0.01 && fabs(next) < 0.01);
  for (int64_t i = 0; i < N; i += 997) { /* signs, drawn here */
    int64_t at = i < 1 << 18 ? 0 : i < N / 1024 * 1024 ? 1 << 18 : N / 1024 * 1024;
    double sum = 0;
    for (uint64_t k = 0; k < 8; k++)
      sum += esp_rng_uniform(esp_draw_seed(f.q.seed, 7), esp_rng_stream(ESP_RNG_DATA, 31, (uint64_t)at, k),
                             (uint64_t)(i - at)) >= 0.5f
                 ? 1
                 : -1;
    assert_true(fabs((double)x[i] - sum / sqrt(8)) <= 1e-6);
  }
  free(x);
  free(again);
  free(other);
  sf_close(&f);
}

/* Masters after each of `steps` steps of task 0, with or without a strategy. */
static void run(const esp_strategy_cfg *cfg, sf *f, bool second) {
  sf_open(f, second ? &olora : NULL, cfg);
  fx_shake(f->a, 0.05f, 4);
  if (second) OK(f->a->kind->task_begin(f->a, 1));
  sf_task(f, second);
}

static void perturbed(void **state) {
  for (int second = 0; second < 2; second++) {
    esp_strategy_cfg none = {0}, cfg = {.names = perturb_only, .n = 1, .perturb = {"step", 0.3, 0.2}};
    sf plain, f;
    run(&none, &plain, second);
    run(&cfg, &f, second);
    int64_t n = f.a->params->total;
    float *start = fx_masters(f.a);
    sf_step(&plain, 3, 9, 6);
    sf_step(&f, 3, 9, 6);
    float *a = fx_masters(plain.a), *b = fx_masters(f.a), *xi = noise(&f, 3, n);
    int64_t frozen = 0;
    for (int i = 0; i < f.a->params->count; i++) {
      const esp_param *p = &f.a->params->list[i];
      frozen += p->frozen;
      for (int64_t k = p->offset; k < p->offset + p->numel; k++) {
        double want = (double)a[k] - 1e-2 * (0.3 * (double)a[k] + 0.2 * (double)xi[k]);
        if (p->frozen) want = (double)start[k];
        assert_true(fabs((double)b[k] - want) <= (p->frozen ? 0 : 1e-7));
      }
    }
    assert_true((frozen > 0) == second);
    free(start);
    free(a);
    free(b);
    free(xi);
    sf_close(&plain);
    sf_close(&f);
  }
}

static void shrunk_at_tasks(void **state) {
  esp_strategy_cfg cfg = {.names = perturb_only, .n = 1, .perturb = {"task", 0.4, 0.01}};
  sf f;
  run(&cfg, &f, false);
  float *a = fx_masters(f.a);
  sf_task(&f, 0);
  float *same = fx_masters(f.a);
  assert_memory_equal(a, same, (size_t)f.a->params->total * 4);
  sf_task(&f, 1);
  float *b = fx_masters(f.a), *xi = noise(&f, -2, f.a->params->total);
  for (int i = 0; i < f.a->params->count; i++) {
    const esp_param *p = &f.a->params->list[i];
    for (int64_t k = p->offset; k < p->offset + p->numel; k++)
      assert_true(fabs((double)b[k] - 0.6 * (double)a[k] - 0.01 * (double)xi[k]) <= 1e-7);
  }
  free(a);
  free(b);
  free(xi);
  free(same);
  sf_close(&f);
}

/* Two steps, so that utilities are a running mean; the optimizer's own update comes from a run without. */
static void upgd(void **state) {
  for (int second = 0; second < 2; second++) {
    esp_strategy_cfg none = {0}, cfg = {.names = upgd_only, .n = 1, .upgd = {0.9, 0.5}};
    sf plain, f;
    run(&none, &plain, second);
    run(&cfg, &f, second);
    int64_t n = f.a->params->total;
    double *u = calloc((size_t)n, sizeof *u), moved = 0;
    for (int step = 0; step < 2; step++) {
      /* both from the same values */
      float *before = fx_masters(f.a);
      f.r.be->ops->upload(plain.r.be, plain.a->params->master, before, n * 4);
      esp_params_refresh_shadow(plain.a->params);
      sf_step(&plain, step, 9, 6);
      sf_step(&f, step, 9, 6);
      float *a = fx_masters(plain.a), *b = fx_masters(f.a), *g = fx_grads(f.a), *xi = noise(&f, step, n);
      double most = 0;
      for (int64_t k = 0; k < n; k++) {
        u[k] = 0.9 * u[k] - 0.1 * (double)g[k] * (double)before[k];
        most = fmax(most, u[k]);
      }
      assert_true(most > 0);
      for (int i = 0; i < f.a->params->count; i++) {
        const esp_param *p = &f.a->params->list[i];
        for (int64_t k = p->offset; k < p->offset + p->numel; k++) {
          double gate = 1 / (1 + exp(u[k] / most)), d = (double)a[k] - (double)before[k] - 1e-2 * 0.5 * (double)xi[k];
          if (p->frozen) gate = 0;
          assert_true(fabs((double)b[k] - (double)before[k] - gate * d) <= (p->frozen ? 0 : 1e-6));
          moved = fmax(moved, fabs(gate * d));
        }
      }
      free(before);
      free(a);
      free(b);
      free(g);
      free(xi);
    }
    assert_true(moved > 1e-3);
    free(u);
    sf_close(&plain);
    sf_close(&f);
  }
}

int main(void) {
  fx_setup();
  sf_setup();
  const struct CMUnitTest tests[] = {cmocka_unit_test(noise_is_its_draws), cmocka_unit_test(perturbed),
                                     cmocka_unit_test(shrunk_at_tasks), cmocka_unit_test(upgd)};
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
