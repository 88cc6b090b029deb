/* Gradients that may not point against those of earlier tasks: GEM's quadratic programme and its projection against a
 * search over all active sets in fp64, A-GEM against its definition, agreeing gradients left alone.
 * Mutation seen caught: A-GEM (gem.c) that also takes away the part along an agreeing gradient. */
#include "strategy_fixture.h"
#include "tasks/internal.h"

enum { MOST = 6 };

/* ---- the programme ---- */

/* Gauss with pivoting on the m chosen variables: P_SS z = -d_S. False: singular. */
static bool gauss(int n, const double *p, const double *d, const int *set, int m, double *z) {
  double a[MOST][MOST + 1];
  for (int i = 0; i < m; i++) {
    for (int k = 0; k < m; k++) a[i][k] = p[set[i] * n + set[k]];
    a[i][m] = -d[set[i]];
  }
  for (int c = 0; c < m; c++) {
    int best = c;
    for (int i = c; i < m; i++)
      if (fabs(a[i][c]) > fabs(a[best][c])) best = i;
    if (fabs(a[best][c]) < 1e-9) return false;
    for (int k = 0; k <= m; k++) {
      double t = a[c][k];
      a[c][k] = a[best][k], a[best][k] = t;
    }
    for (int i = 0; i < m; i++) {
      double f = i == c ? 0 : a[i][c] / a[c][c];
      for (int k = c; k <= m; k++) a[i][k] -= f * a[c][k];
    }
  }
  for (int i = 0; i < m; i++) z[i] = a[i][m] / a[i][i];
  return true;
}

static double objective(int n, const double *p, const double *c, const double *v) {
  double f = 0;
  for (int i = 0; i < n; i++) {
    f += c[i] * v[i];
    for (int k = 0; k < n; k++) f += 0.5 * v[i] * p[i * n + k] * v[k];
  }
  return f;
}

/* Every set of variables that are above the margin, the best feasible point of them. */
static double brute(int n, const double *p, const double *c, double margin, double *best) {
  double least = INFINITY, d[MOST];
  for (int i = 0; i < n; i++) {
    d[i] = c[i];
    for (int k = 0; k < n; k++) d[i] += margin * p[i * n + k];
  }
  for (int bits = 0; bits < 1 << n; bits++) {
    int set[MOST], m = 0;
    double z[MOST] = {0}, v[MOST];
    bool feasible = true;
    for (int i = 0; i < n; i++)
      if (bits >> i & 1) set[m++] = i;
    if (!gauss(n, p, d, set, m, z)) continue;
    for (int i = 0; i < n; i++) v[i] = margin;
    for (int i = 0; i < m; i++) v[set[i]] += z[i], feasible &= z[i] >= 0;
    double f = feasible ? objective(n, p, c, v) : INFINITY;
    if (f < least) {
      least = f;
      if (best) memcpy(best, v, (size_t)n * sizeof *v);
    }
  }
  return least;
}

/* G with rows of different lengths; of `dependent` ones the last is a sum of others, or a copy. */
static void programme(void **state) {
  for (int trial = 0; trial < 300; trial++) {
    int n = 1 + trial % MOST, width = 9;
    double g[MOST][9], step[9], p[MOST * MOST], c[MOST], v[MOST], want[MOST], margin = trial % 3 ? 0 : 0.5;
    for (int i = 0; i < n; i++)
      for (int k = 0; k < width; k++)
        g[i][k] = (1 + 10 * (i == 2)) * (double)esp_rng_normal(7, (uint64_t)trial, (uint64_t)(i * width + k));
    for (int k = 0; k < width; k++) step[k] = (double)esp_rng_normal(8, (uint64_t)trial, (uint64_t)k);
    bool dependent = trial % 5 == 4 && n >= 3;
    for (int k = 0; dependent && k < width; k++) g[n - 1][k] = trial % 2 ? g[0][k] : g[0][k] + g[1][k];
    for (int i = 0; i < n; i++) {
      c[i] = 0;
      for (int k = 0; k < width; k++) c[i] += g[i][k] * step[k];
      for (int j = 0; j < n; j++) {
        p[i * n + j] = 0;
        for (int k = 0; k < width; k++) p[i * n + j] += g[i][k] * g[j][k];
      }
    }
    OK(esp_gem_solve(n, p, c, margin, v));
    double least = brute(n, p, c, margin, want), got = objective(n, p, c, v);
    assert_true(fabs(got - least) <= 1e-9 * (1 + fabs(least)));
    for (int i = 0; i < n; i++) {
      assert_true(v[i] >= margin);
      if (!dependent) assert_true(fabs(v[i] - want[i]) <= 1e-8 * (1 + want[i]));
    }
  }
}

/* ---- the strategies ---- */

static double dot(const float *a, const float *b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
  return sum;
}

/* All samples of a task are remembered, so that their mean gradient is known here. */
static void gem_projects(void **state) {
  static const char *const names[] = {"gem"};
  for (int margin = 0; margin < 2; margin++) {
    esp_strategy_cfg cfg = {
        .names = names, .n = 1, .gem = {.buffer = 100, .sampler = "balanced", .margin = margin * 0.5}};
    sf f;
    sf_open(&f, NULL, &cfg);
    fx_shake(f.a, 0.05f, 4);
    int64_t n = f.a->params->total;
    float *old[2], *g, *z;
    for (int t = 0; t < 2; t++) {
      sf_gradient(&f, t, SF_SAMPLES);
      old[t] = fx_grads(f.a);
    }
    for (int t = 0; t < 2; t++) {
      sf_task(&f, t);
      sf_end(&f);
    }
    /* a step against both: minus their sum, and something of its own */
    sf_task(&f, 2);
    sf_gradient(&f, 2, 5);
    g = fx_grads(f.a);
    for (int64_t i = 0; i < n; i++) g[i] -= 1.5f * old[0][i] + 0.7f * old[1][i];
    f.r.be->ops->upload(f.r.be, f.a->params->grad, g, n * 4);
    double p[4], c[2], v[2];
    for (int i = 0; i < 2; i++) {
      c[i] = dot(old[i], g, n);
      for (int k = 0; k < 2; k++) p[i * 2 + k] = dot(old[i], old[k], n);
    }
    assert_true(c[0] < 0 && c[1] < 0);
    brute(2, p, c, margin * 0.5, v);
    esp_strategy_step step = {0};
    OK(esp_strategies_project(&f.set, &f.q, &step));
    z = fx_grads(f.a);
    double worst = 0, size = sqrt(dot(g, g, n));
    for (int64_t i = 0; i < n; i++) {
      double want = (double)g[i] + v[0] * (double)old[0][i] + v[1] * (double)old[1][i];
      worst = fmax(worst, fabs((double)z[i] - want));
    }
    assert_true(worst <= 1e-6 * size);
    for (int t = 0; t < 2; t++) assert_true(dot(z, old[t], n) >= -1e-5 * size * sqrt(dot(old[t], old[t], n)));
    /* what agrees with both is left alone, bit by bit */
    for (int64_t i = 0; i < n; i++) g[i] = 2.0f * old[0][i] + old[1][i];
    assert_true(dot(g, old[0], n) > 0 && dot(g, old[1], n) > 0);
    f.r.be->ops->upload(f.r.be, f.a->params->grad, g, n * 4);
    OK(esp_strategies_project(&f.set, &f.q, &step));
    free(z);
    z = fx_grads(f.a);
    assert_memory_equal(z, g, (size_t)n * 4);
    assert_true(esp_strategies_bytes(&f.set, 0, &f.q) > 0);
    free(z);
    free(g);
    free(old[0]);
    free(old[1]);
    sf_close(&f);
  }
}

static void agem_projects(void **state) {
  static const char *const names[] = {"agem"};
  esp_strategy_cfg cfg = {.names = names, .n = 1, .agem = {.buffer = 100, .sampler = "balanced", .batch = 100}};
  sf f;
  sf_open(&f, NULL, &cfg);
  fx_shake(f.a, 0.05f, 4);
  int64_t n = f.a->params->total;
  esp_sample s[2 * SF_SAMPLES];
  for (int i = 0; i < 2 * SF_SAMPLES; i++) s[i] = (esp_sample){i / SF_SAMPLES, i % SF_SAMPLES};
  esp_tensor mean = esp_flat(f.r.be->ops->alloc(f.r.be, ESP_MEM_HOST, n * 4), n);
  OK(esp_sequence_gradient_of(&f.q, s, 2 * SF_SAMPLES, mean, NULL));
  /* the order of the samples is another one in the strategy: sums differ by rounding */
  float *r = test_read(f.r.be, mean.data, n * 4), *g = malloc((size_t)n * 4), *z;
  f.r.be->ops->free(f.r.be, mean.data);
  for (int t = 0; t < 2; t++) {
    sf_task(&f, t);
    sf_end(&f);
  }
  sf_task(&f, 2);
  esp_strategy_step step = {0};
  for (int sign = -1; sign <= 1; sign += 2) {
    for (int64_t i = 0; i < n; i++)
      g[i] = (float)sign * r[i] + 0.01f * esp_rng_normal(5, 1, (uint64_t)i) * (float)(i < n / 2);
    f.r.be->ops->upload(f.r.be, f.a->params->grad, g, n * 4);
    double along = dot(g, r, n), size = dot(r, r, n);
    assert_true(along * sign > 0);
    OK(esp_strategies_project(&f.set, &f.q, &step));
    z = fx_grads(f.a);
    if (sign > 0) {
      assert_memory_equal(z, g, (size_t)n * 4);
    } else {
      for (int64_t i = 0; i < n; i++)
        assert_true(fabs((double)z[i] - ((double)g[i] - along / size * (double)r[i])) <= 2e-5 * sqrt(size));
      assert_true(fabs(dot(z, r, n)) <= 1e-4 * size);
    }
    free(z);
  }
  /* batches: a function of the step */
  f.cfg.agem.batch = 3;
  float *first = NULL;
  for (int i = 0; i < 3; i++) {
    for (int64_t k = 0; k < n; k++) g[k] = -r[k];
    f.r.be->ops->upload(f.r.be, f.a->params->grad, g, n * 4);
    step.task_step = i == 2;
    OK(esp_strategies_project(&f.set, &f.q, &step));
    z = fx_grads(f.a);
    if (i == 0) first = z;
    if (i > 0) assert_true((memcmp(first, z, (size_t)n * 4) == 0) == (i == 1));
    if (i > 0) free(z);
  }
  free(first);
  free(g);
  free(r);
  sf_close(&f);
}

/* The first task has nothing before it. */
static void first_task(void **state) {
  static const char *const names[] = {"gem", "agem"};
  esp_strategy_cfg cfg = {.names = names,
                          .n = 2,
                          .gem = {.buffer = 4, .sampler = "balanced"},
                          .agem = {.buffer = 4, .sampler = "loss", .batch = 2}};
  sf f;
  sf_open(&f, NULL, &cfg);
  sf_task(&f, 0);
  fx_shake(f.a, 0.05f, 4);
  sf_gradient(&f, 0, 4);
  float *g = fx_grads(f.a), *z;
  esp_strategy_step step = {0};
  OK(esp_strategies_project(&f.set, &f.q, &step));
  z = fx_grads(f.a);
  assert_memory_equal(z, g, (size_t)f.a->params->total * 4);
  free(z);
  free(g);
  sf_close(&f);
}

int main(void) {
  fx_setup();
  sf_setup();
  const struct CMUnitTest tests[] = {cmocka_unit_test(programme), cmocka_unit_test(gem_projects),
                                     cmocka_unit_test(agem_projects), cmocka_unit_test(first_task)};
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
