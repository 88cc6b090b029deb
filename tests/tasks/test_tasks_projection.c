/* Changes that stay out of subspaces: observed rows against the model's own, bases against their definition, dW K0 = 0
 * for every kind of adapter with an optimizer that does not keep to gradients (AdamW with decay).
 * Mutation seen caught: `after_step` (gpm.c) left out, so that the gradient alone is projected. */
#include "strategy_fixture.h"
#include "tasks/internal.h"
#include "tasks/projection.h"

static const char *const target[] = {"all-linear"};
static const esp_adapter_cfg kinds[] = {
    {.type = "lora", .r = 4, .alpha = 8, .seed = 5, .target = target, .n_target = 1},
    {.type = "olora_cl", .r = 4, .alpha = 8, .seed = 5, .target = target, .n_target = 1, .tasks = SF_TASKS},
    {.type = "full"},
    {.type = "layers", .top_layers = 1},
};
enum { N_KINDS = sizeof kinds / sizeof kinds[0] };

/* fp32 weights as the product sees them. */
static float *effective(sf *f, esp_site *s) {
  float *w = malloc((size_t)(s->out * s->in) * sizeof *w);
  OK(esp_site_read_weight_rows(f->r.m, s, 0, s->out, w));
  OK(esp_adapter_effective_rows(f->a, s, 0, s->out, w));
  return w;
}

static void begin(sf *f, int task) {
  if (f->a->kind->task_begin) OK(f->a->kind->task_begin(f->a, task));
  sf_task(f, task);
}

static void train(sf *f, int steps) {
  for (int i = 0; i < steps; i++) sf_step(f, i, steps, 6);
}

static double largest(const float *x, int64_t n) {
  return fx_max_abs(x, n);
}

/* Inputs of the second task's end, of all matrices, before the last one begins; rows with the adapter as it stood. */
typedef struct kept {
  esp_trained *list;
  int n;
  esp_observed seen[2];
  float **w;
} kept;

static void look_at(sf *f, kept *k, int task, int64_t samples, int64_t tokens) {
  esp_sample *some;
  int64_t count;
  f->q.task = task;
  OK(esp_sequence_some(&f->q, samples, &some, &count));
  OK(esp_observe(&f->q, k->list, k->n, some, count, tokens, false, &k->seen[task]));
  esp_mem_free(some);
}

/* |(W_now - W_begin) x| for the rows x that the strategy itself took, in fp64; the largest over them. */
static double moved(sf *f, const kept *k, int i, int seen) {
  esp_site *s = k->list[i].site;
  float *now = effective(f, s);
  const float *x = k->seen[seen].x[s->group->index];
  double most = 0;
  for (int64_t row = 0; row < k->seen[seen].rows[s->group->index]; row++)
    for (int64_t o = 0; o < s->out; o++) {
      double d = 0;
      for (int64_t c = 0; c < s->in; c++)
        d += ((double)now[o * s->in + c] - (double)k->w[i][o * s->in + c]) * (double)x[row * s->in + c];
      most = fmax(most, fabs(d));
    }
  free(now);
  return most;
}

static void nullspace(void **state) {
  static const char *const names[] = {"nullspace"};
  const int64_t samples = 3, tokens = 9; /* few rows: room is left in 32 dimensions after two tasks */
  esp_strategy_cfg cfg = {.names = names, .n = 1, .nullspace = {.energy = 1, .samples = samples, .tokens = tokens}};
  for (int kind = 0; kind < N_KINDS; kind++) {
    sf f;
    kept k = {0};
    sf_open(&f, &kinds[kind], &cfg);
    f.optim->cfg.weight_decay = 0.1;
    for (int t = 0; t < 2; t++) {
      begin(&f, t);
      train(&f, 3);
      if (t == 0) OK(esp_trained_list(&f.set.list[0], &f.q, &k.list, &k.n));
      look_at(&f, &k, t, samples, tokens);
      OK(esp_strategies_task_end(&f.set, &f.q));
    }
    esp_mem_free(k.list);
    begin(&f, 2);
    OK(esp_trained_list(&f.set.list[0], &f.q, &k.list, &k.n));
    assert_true(k.n == (kinds[kind].top_layers ? 7 : 14));
    k.w = malloc((size_t)k.n * sizeof *k.w);
    for (int i = 0; i < k.n; i++) k.w[i] = effective(&f, k.list[i].site);
    train(&f, 5);
    double worst = 0, change = 1;
    for (int i = 0; i < k.n; i++) {
      esp_site *s = k.list[i].site;
      for (int t = 0; t < 2; t++)
        worst = fmax(worst, moved(&f, &k, i, t) / largest(k.seen[t].x[s->group->index], tokens * s->in));
      float *now = effective(&f, s);
      for (int64_t c = 0; c < s->out * s->in; c++) now[c] -= k.w[i][c];
      change = fmin(change, largest(now, s->out * s->in));
      free(now);
    }
    if (!(worst <= 1e-6 && change > 1e-4)) fail_msg("%s: %g moved, weights by %g", kinds[kind].type, worst, change);
    for (int i = 0; i < k.n; i++) free(k.w[i]);
    free(k.w);
    esp_mem_free(k.list);
    for (int t = 0; t < 2; t++) esp_observed_deinit(&k.seen[t]);
    sf_close(&f);
  }
}

/* The basis is orthonormal, holds the energy it should and not a direction more; what it held stays in it. */
static void bases(void **state) {
  enum { WIDTH = 24, ROWS = 10 };
  static const char *const names[] = {"gpm"};
  esp_strategy_cfg cfg = {.names = names, .n = 1, .gpm = {.energy = 0.9, .samples = 3, .tokens = 9}};
  sf f;
  sf_open(&f, NULL, &cfg);
  esp_strategy *s = &f.set.list[0];
  float *before = NULL;
  int64_t k_before = 0;
  for (int round = 0; round < 3; round++) {
    float x[ROWS * WIDTH];
    double total = 0, inside = 0, without = 0;
    for (int64_t i = 0; i < ROWS * WIDTH; i++) {
      x[i] = esp_rng_normal(3, (uint64_t)round, (uint64_t)i) * expf(-0.5f * (float)(i / WIDTH));
      total += (double)x[i] * (double)x[i];
    }
    OK(esp_basis_grow(s, "inputs.0", WIDTH, x, ROWS, 0.9));
    esp_tensor basis = esp_basis(s, "inputs.0", WIDTH);
    int64_t k = esp_tensor_rows(&basis);
    assert_true(k > k_before && k - k_before < ROWS && esp_tensor_cols(&basis) == WIDTH);
    float *m = test_read(f.r.be, basis.data, k * WIDTH * 4);
    for (int64_t i = 0; i < k; i++)
      for (int64_t j = 0; j < k; j++) {
        double d = 0;
        for (int c = 0; c < WIDTH; c++) d += (double)m[i * WIDTH + c] * (double)m[j * WIDTH + c];
        assert_true(fabs(d - (i == j)) <= 1e-6);
        if (i < k_before) { /* what was inside is inside */
          double in = 0;
          for (int64_t b = 0; b < k; b++) {
            d = 0;
            for (int c = 0; c < WIDTH; c++) d += (double)m[b * WIDTH + c] * (double)before[i * WIDTH + c];
            in += d * d;
          }
          assert_true(fabs(in - 1) <= 1e-5);
        }
      }
    for (int64_t i = 0; i < k; i++) /* the last direction was needed */
      for (int r = 0; r < ROWS; r++) {
        double d = 0;
        for (int c = 0; c < WIDTH; c++) d += (double)m[i * WIDTH + c] * (double)x[r * WIDTH + c];
        inside += d * d;
        if (i + 1 < k) without += d * d;
      }
    assert_true(inside >= 0.9 * total * (1 - 1e-6) && without < 0.9 * total);
    free(before);
    before = m;
    k_before = k;
  }
  free(before);
  sf_close(&f);
}

/* What is observed: the first group's input is the normed embedding of the tokens, seen here through a base with its
 * own norm weights; the outputs are W x + b of the rows. */
static void observed(void **state) {
  esp_strategy_cfg none = {0};
  sf f;
  esp_trained *list;
  esp_observed o;
  int n;
  sf_open(&f, NULL, &none);
  fx_shake(f.a, 0.05f, 4);
  esp_strategy who = {.kind = &esp_strategy_gpm};
  OK(esp_trained_list(&who, &f.q, &list, &n));
  assert_int_equal(n, 14);
  esp_sample s[5];
  for (int i = 0; i < 5; i++) s[i] = (esp_sample){1, i};
  OK(esp_observe(&f.q, list, n, s, 5, 12, true, &o));
  for (int i = 0; i < n; i++) {
    esp_site *site = list[i].site;
    esp_group *g = site->group;
    assert_int_equal(o.rows[g->index], 12);
    float *w = effective(&f, site);
    double worst = 0;
    for (int r = 0; r < 12; r++)
      for (int64_t j = 0; j < site->out; j++) {
        double y = 0;
        for (int64_t c = 0; c < site->in; c++)
          y += (double)w[j * site->in + c] * (double)o.x[g->index][r * site->in + c];
        worst = fmax(worst, fabs(y - (double)o.y[g->index][r * g->out + site->col0 + j]));
      }
    assert_true(worst <= 1e-4);
    free(w);
  }
  esp_observed_deinit(&o);
  esp_mem_free(list);
  sf_close(&f);
}

/* GPM on one LoRA: A moves only outside of the span, B is free, the first task is as without. */
static void gpm(void **state) {
  static const char *const names[] = {"gpm"};
  esp_strategy_cfg cfg = {.names = names, .n = 1, .gpm = {.energy = 0.95, .samples = 3, .tokens = 9}};
  sf f;
  sf_open(&f, NULL, &cfg);
  for (int t = 0; t < 2; t++) {
    begin(&f, t);
    if (t == 0) {
      train(&f, 3);
      OK(esp_strategies_task_end(&f.set, &f.q));
    }
  }
  float *was = fx_masters(f.a), *now;
  train(&f, 4);
  now = fx_masters(f.a);
  esp_trained *list;
  int n;
  OK(esp_trained_list(&f.set.list[0], &f.q, &list, &n));
  for (int i = 0; i < n; i++) {
    const esp_param *a = &f.a->params->list[list[i].a], *b = &f.a->params->list[list[i].b];
    char name[32];
    snprintf(name, sizeof name, "inputs.%d", list[i].site->group->index);
    int64_t in = list[i].site->in;
    esp_tensor basis = esp_basis(&f.set.list[0], name, in);
    int64_t k = esp_tensor_rows(&basis);
    assert_true(k > 0 && k < 9);
    float *m = test_read(f.r.be, basis.data, k * in * 4);
    double size = 0, b_moved = 0;
    for (int64_t c = 0; c < b->numel; c++)
      b_moved = fmax(b_moved, fabs((double)now[b->offset + c] - (double)was[b->offset + c]));
    for (int64_t row = 0; row < a->shape[0]; row++) {
      for (int64_t j = 0; j < k; j++) {
        double d = 0;
        for (int64_t c = 0; c < in; c++) {
          double e = (double)now[a->offset + row * in + c] - (double)was[a->offset + row * in + c];
          d += e * (double)m[j * in + c];
          size = fmax(size, fabs(e));
        }
        assert_true(fabs(d) <= 1e-6);
      }
    }
    assert_true(size > 1e-3 && b_moved > 1e-3);
    free(m);
  }
  free(was);
  free(now);
  esp_mem_free(list);
  sf_close(&f);
}

static void refused(void **state) {
  static const char *const names[] = {"gpm"};
  esp_strategy_cfg cfg = {.names = names, .n = 1, .gpm = {.energy = 0.95, .samples = 3, .tokens = 9}};
  assert_int_equal(esp_strategies_check(&cfg, 1, false, true), ESP_ERR_RECIPE);
  esp_adapter_cfg ia3 = {.type = "ia3", .r = 1, .alpha = 1, .target = target, .n_target = 1};
  sf f;
  esp_strategy_cfg none = {0};
  sf_open(&f, &ia3, &none);
  f.cfg = cfg;
  OK(esp_strategies_create(&f.cfg, f.r.be, &f.set));
  assert_int_equal(esp_strategies_open(&f.set, &f.q), ESP_ERR_RECIPE);
  assert_non_null(strstr(esp_error_message(), "gpm is for lora"));
  sf_close(&f);
}

int main(void) {
  fx_setup();
  sf_setup();
  const struct CMUnitTest tests[] = {cmocka_unit_test(observed), cmocka_unit_test(bases), cmocka_unit_test(nullspace),
                                     cmocka_unit_test(gpm), cmocka_unit_test(refused)};
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
