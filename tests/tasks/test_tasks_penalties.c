/* Penalties with an importance per parameter against their definitions in fp64: EWC's Fisher against gradients of
 * single samples, its one parabola against the sum over tasks, the online form; SI's path integral against one recorded
 * step by step; the group lasso against its formula and finite differences. Mutation seen caught: `join` (ewc.c) around
 * the latest optimum without `decay`. */
#include "strategy_fixture.h"

static double *zeros(int64_t n) {
  return calloc((size_t)n, sizeof(double));
}

/* Mean over the task's samples of the squared gradient of each one's summed loss. */
static void fisher_of(sf *f, int task, double *out) {
  int64_t n = f->a->params->total;
  esp_tensor g = esp_flat(f->r.be->ops->alloc(f->r.be, ESP_MEM_HOST, n * 4), n);
  for (int64_t k = 0; k < n; k++) out[k] = 0;
  for (int i = 0; i < SF_SAMPLES; i++) {
    esp_sample s = {task, i};
    OK(esp_sequence_gradient_of(&f->q, &s, 1, g, NULL));
    double w = esp_sequence_weight(&f->q, s);
    float *x = test_read(f->r.be, g.data, n * 4);
    for (int64_t k = 0; k < n; k++) out[k] += w * w * (double)x[k] * (double)x[k] / SF_SAMPLES;
    free(x);
  }
  f->r.be->ops->free(f->r.be, g.data);
}

/* gradient: what the penalties add to an empty one; the value. */
static double penalty(sf *f, float **gradient) {
  esp_strategy_step t = {0};
  esp_params_zero_grad(f->a->params);
  double value = esp_strategies_penalty(&f->set, &f->q, &t);
  *gradient = fx_grads(f->a);
  return value;
}

static void near(const double *want, const float *got, int64_t n, double tolerance) {
  double most = 0, off = 0;
  for (int64_t k = 0; k < n; k++) {
    most = fmax(most, fabs(want[k]));
    off = fmax(off, fabs(want[k] - (double)got[k]));
  }
  if (!(most > 0 && off <= tolerance * most)) fail_msg("off by %g of %g", off, most);
}

static void ewc(double decay) {
  static const char *const names[] = {"ewc"};
  esp_strategy_cfg cfg = {.names = names, .n = 1, .ewc = {.weight = 4, .samples = 256, .decay = decay}};
  sf f;
  float *grad;
  sf_open(&f, NULL, &cfg);
  int64_t n = f.a->params->total;
  double *fk = zeros(n), *sum = zeros(n), *want = zeros(n), value = 0;
  float *theta[2];
  fx_shake(f.a, 0.05f, 4);
  for (int task = 0; task < 2; task++) {
    sf_task(&f, task);
    theta[task] = fx_masters(f.a);
    fisher_of(&f, task, fk);
    sf_end(&f);
    for (int64_t k = 0; k < n; k++) {
      sum[k] = (decay > 0 ? decay : 1) * sum[k] + fk[k];
      want[k] -= 4 * fk[k] * (double)theta[task][k]; /* the sum over tasks, expanded */
    }
    fx_shake(f.a, 0.1f, (uint64_t)task + 8);
    float *now = fx_masters(f.a);
    double got = penalty(&f, &grad);
    double *g = zeros(n);
    for (int64_t k = 0; k < n; k++) {
      double d = (double)now[k] - (double)theta[task][k];
      g[k] = decay > 0 ? 4 * sum[k] * d : want[k] + 4 * sum[k] * (double)now[k];
      if (task == 0) value += 2 * fk[k] * d * d;
    }
    near(g, grad, n, 2e-5);
    if (task == 0) assert_true(fabs(got - value) <= 1e-5 * value);
    free(g);
    free(grad);
    free(now);
  }
  float *saved = test_read(f.r.be, esp_strategy_get(&f.set.list[0], "fisher", NULL), n * 4);
  near(sum, saved, n, 1e-5);
  free(saved);
  free(theta[0]);
  free(theta[1]);
  free(fk);
  free(sum);
  free(want);
  sf_close(&f);
}
static void ewc_of_all_tasks(void **state) {
  ewc(0);
}
static void ewc_online(void **state) {
  ewc(0.7);
}

static void si(void **state) {
  static const char *const names[] = {"si"};
  esp_strategy_cfg cfg = {.names = names, .n = 1, .si = {.weight = 3, .damping = 1e-3}};
  sf f;
  float *grad;
  sf_open(&f, NULL, &cfg);
  int64_t n = f.a->params->total;
  double *omega = zeros(n), *want = zeros(n);
  fx_shake(f.a, 0.05f, 4);
  sf_task(&f, 0);
  float *begin = fx_masters(f.a);
  for (int step = 0; step < 5; step++) {
    float *before = fx_masters(f.a);
    (void)sf_gradient(&f, 0, 4); /* what sf_step computes again */
    float *g = fx_grads(f.a);
    sf_step(&f, step, 5, 4);
    float *after = fx_masters(f.a);
    for (int64_t k = 0; k < n; k++) omega[k] -= (double)g[k] * ((double)after[k] - (double)before[k]);
    free(before);
    free(g);
    free(after);
  }
  sf_end(&f);
  float *end = fx_masters(f.a);
  sf_task(&f, 1);
  fx_shake(f.a, 0.1f, 8);
  float *now = fx_masters(f.a);
  double value = penalty(&f, &grad), sum = 0;
  for (int64_t k = 0; k < n; k++) {
    double d = (double)end[k] - (double)begin[k], m = omega[k] > 0 ? omega[k] / (d * d + 1e-3) : 0;
    double off = (double)now[k] - (double)end[k];
    want[k] = 6 * m * off;
    sum += 3 * m * off * off;
  }
  near(want, grad, n, 1e-3); /* steps of 1e-2 times gradients, both in fp32 */
  assert_true(fabs(value - sum) <= 1e-3 * sum);
  free(begin);
  free(end);
  free(now);
  free(grad);
  free(omega);
  free(want);
  sf_close(&f);
}

static void group_lasso(void **state) {
  static const char *const names[] = {"group_lasso"};
  esp_strategy_cfg cfg = {.names = names, .n = 1, .group_lasso = {.weight = 0.5}};
  sf f;
  float *grad, *other;
  sf_open(&f, NULL, &cfg);
  fx_shake(f.a, 0.05f, 4);
  esp_params *ps = f.a->params;
  ps->list[0].frozen = ps->list[ps->count - 1].frozen = true; /* as those of an earlier task: not drawn */
  double value = penalty(&f, &grad), squares[2] = {0};
  float *now = fx_masters(f.a);
  for (int i = 0; i < ps->count; i++)
    for (int64_t k = 0; k < ps->list[i].numel && !ps->list[i].frozen; k++) {
      double x = (double)now[ps->list[i].offset + k];
      squares[strstr(ps->list[i].name, ".layers.1.") != NULL] += x * x;
    }
  assert_true(fabs(value - 0.5 * (sqrt(squares[0]) + sqrt(squares[1]))) <= 1e-6 * value);
  for (int i = 0; i < ps->count; i += 3) { /* finite differences at one element of each third parameter */
    int64_t n = ps->list[i].numel;
    float *x = malloc((size_t)n * sizeof *x);
    double side[2];
    for (int sign = 0; sign < 2; sign++) {
      esp_params_get(ps, i, x);
      x[n / 2] = now[ps->list[i].offset + n / 2] + (sign ? -0.01f : 0.01f);
      esp_params_set(ps, i, x);
      side[sign] = penalty(&f, &other);
      free(other);
    }
    x[n / 2] = now[ps->list[i].offset + n / 2];
    esp_params_set(ps, i, x);
    assert_true(fabs((side[0] - side[1]) / 0.02 - (double)grad[ps->list[i].offset + n / 2]) <= 1e-4);
    free(x);
  }
  free(grad);
  free(now);
  sf_close(&f);
}

int main(void) {
  fx_setup();
  sf_setup();
  const struct CMUnitTest tests[] = {cmocka_unit_test(ewc_of_all_tasks), cmocka_unit_test(ewc_online),
                                     cmocka_unit_test(si), cmocka_unit_test(group_lasso)};
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
