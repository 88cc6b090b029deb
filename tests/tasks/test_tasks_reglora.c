/* RegLoRA: the sets of indices against sorting |B A| in fp64, their union over tasks, the loss and its gradient against
 * their formula in fp64 and finite differences, nothing at B = 0, and a set that went through a file.
 * Mutation seen caught: `build` (reglora.c) without the order of the transpose (order[to] = to). */
#include "strategy_fixture.h"
#include "tasks/projection.h"

static const char *const names[] = {"reglora"};
static const char *const target[] = {"all-linear"};
static const esp_adapter_cfg olora = {
    .type = "olora_cl", .r = 4, .alpha = 8, .seed = 5, .target = target, .n_target = 1, .tasks = SF_TASKS};
static const esp_strategy_cfg cfg = {.names = names, .n = 1, .reglora = {.weight = 25, .share = 0.02}};

static void begin(sf *f, int task) {
  OK(f->a->kind->task_begin(f->a, task));
  sf_task(f, task);
}

/* The present task's factors, in fp32, and their product in fp64; free each. */
typedef struct product {
  float *a, *b;
  double *ba;
  int64_t r;
} product;

static product product_of(sf *f, const esp_trained *t) {
  const esp_params *ps = f->a->params;
  int64_t out = t->site->out, in = t->site->in;
  product p = {malloc((size_t)ps->list[t->a].numel * 4), malloc((size_t)ps->list[t->b].numel * 4),
               calloc((size_t)(out * in), sizeof(double)), ps->list[t->a].shape[0]};
  esp_params_get(ps, t->a, p.a);
  esp_params_get(ps, t->b, p.b);
  for (int64_t o = 0; o < out; o++)
    for (int64_t i = 0; i < in; i++)
      for (int64_t k = 0; k < p.r; k++) p.ba[o * in + i] += (double)p.b[o * p.r + k] * (double)p.a[k * in + i];
  return p;
}

static void drop(product *p) {
  free(p->a);
  free(p->b);
  free(p->ba);
}

static int downwards(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return x < y ? 1 : x > y ? -1 : 0;
}

/* Adds to set[out*in] what a task's end adds. */
static void largest(sf *f, const esp_trained *t, bool *set) {
  int64_t all = t->site->out * t->site->in, add = (int64_t)(0.02 * (double)all);
  product p = product_of(f, t);
  double *sorted = malloc((size_t)all * sizeof *sorted);
  for (int64_t i = 0; i < all; i++) sorted[i] = fabs(p.ba[i]);
  qsort(sorted, (size_t)all, sizeof *sorted, downwards);
  double least = (sorted[add - 1] + sorted[add]) / 2;
  for (int64_t i = 0; i < all; i++) set[i] |= fabs(p.ba[i]) > least;
  free(sorted);
  drop(&p);
}

/* The loss by its formula; with `grad` [total] its gradient too. */
static double by_hand(sf *f, const esp_trained *list, int n, bool *const *sets, double *grad) {
  const esp_params *ps = f->a->params;
  double value = 0;
  for (int l = 0; l < n; l++) {
    int64_t out = list[l].site->out, in = list[l].site->in, entries = 0;
    for (int64_t i = 0; i < out * in; i++) entries += sets[l][i];
    double each = 25.0 / n / (double)entries;
    product p = product_of(f, &list[l]);
    double *ga = grad ? grad + ps->list[list[l].a].offset : NULL, *gb = grad ? grad + ps->list[list[l].b].offset : NULL;
    for (int64_t e = 0; e < out * in; e++) {
      if (!sets[l][e]) continue;
      double sign = p.ba[e] > 0 ? each : p.ba[e] < 0 ? -each : 0;
      value += each * fabs(p.ba[e]);
      for (int64_t k = 0; grad && k < p.r; k++) {
        ga[k * in + e % in] += sign * (double)p.b[e / in * p.r + k];
        gb[e / in * p.r + k] += sign * (double)p.a[k * in + e % in];
      }
    }
    drop(&p);
  }
  return value;
}

/* gradient: what the strategy adds to an empty one; the value. */
static double penalty(sf *f, float **gradient) {
  esp_strategy_step t = {0};
  esp_params_zero_grad(f->a->params);
  double value = esp_strategies_penalty(&f->set, &f->q, &t);
  *gradient = fx_grads(f->a);
  return value;
}

static void compare(sf *f, const esp_trained *list, int n, bool *const *sets) {
  const esp_params *ps = f->a->params;
  double *want = calloc((size_t)ps->total, sizeof *want), most = 0, off = 0;
  float *grad;
  double value = by_hand(f, list, n, sets, want), got = penalty(f, &grad);
  assert_true(value > 0 && fabs(got - value) <= 1e-5 * value);
  for (int64_t k = 0; k < ps->total; k++) {
    most = fmax(most, fabs(want[k]));
    off = fmax(off, fabs(want[k] - (double)grad[k]));
  }
  if (!(most > 0 && off <= 1e-5 * most)) fail_msg("gradient off by %g of %g", off, most);
  for (int l = 0; l < n; l += 3) /* finite differences of the strategy's own value, along its gradient */
    for (int which = 0; which < 2; which++) {
      int p = which ? list[l].b : list[l].a;
      const esp_param *at = &ps->list[p];
      float *x = malloc((size_t)at->numel * 4), *moved = malloc((size_t)at->numel * 4), *other;
      double squares = 0, side[2], h = 1e-3;
      esp_params_get(ps, p, x);
      for (int64_t k = 0; k < at->numel; k++) squares += (double)grad[at->offset + k] * (double)grad[at->offset + k];
      for (int s = 0; s < 2; s++) {
        for (int64_t k = 0; k < at->numel; k++)
          moved[k] = x[k] + (float)((s ? -h : h) * (double)grad[at->offset + k] / sqrt(squares));
        esp_params_set(f->a->params, p, moved);
        side[s] = penalty(f, &other);
        free(other);
      }
      esp_params_set(f->a->params, p, x);
      double slope = (side[0] - side[1]) / (2 * h);
      if (fabs(slope - sqrt(squares)) > 1e-2 * sqrt(squares)) fail_msg("slope %g, gradient %g", slope, sqrt(squares));
      free(x);
      free(moved);
    }
  free(want);
  free(grad);
}

static void formula(void **state) {
  sf f;
  esp_trained *list;
  float *grad;
  int n;
  sf_open(&f, &olora, &cfg);
  begin(&f, 0);
  OK(esp_trained_list(&f.set.list[0], &f.q, &list, &n));
  bool **sets = calloc((size_t)n, sizeof *sets);
  for (int l = 0; l < n; l++) sets[l] = calloc((size_t)(list[l].site->out * list[l].site->in), sizeof **sets);
  for (int task = 0; task < SF_TASKS; task++) {
    if (task > 0) {
      begin(&f, task);
      esp_mem_free(list);
      OK(esp_trained_list(&f.set.list[0], &f.q, &list, &n)); /* other factors, the same matrices */
    }
    for (int l = 0; l < n; l++) {
      float *zero = calloc((size_t)f.a->params->list[list[l].b].numel, sizeof *zero);
      esp_params_set(f.a->params, list[l].b, zero);
      free(zero);
    }
    double fresh = penalty(&f, &grad); /* B = 0 */
    assert_true(fresh == 0 && fx_max_abs(grad, f.a->params->total) == 0);
    free(grad);
    fx_shake(f.a, 0.3f, (uint64_t)task + 4);
    if (task > 0) compare(&f, list, n, sets);
    for (int l = 0; l < n; l++) largest(&f, &list[l], sets[l]);
    sf_end(&f);
    for (int l = 0; l < n; l++) { /* the array is as long as the union asks for */
      int64_t size, entries = 0, all = list[l].site->out * list[l].site->in;
      for (int64_t i = 0; i < all; i++) entries += sets[l][i];
      assert_non_null(esp_strategy_get(&f.set.list[0], list[l].site->path, &size));
      assert_int_equal(size, list[l].site->out + list[l].site->in + 2 + 3 * entries);
      assert_true(task == 0 ? entries == (int64_t)(0.02 * (double)all) : entries > (int64_t)(0.02 * (double)all));
    }
  }
  for (int l = 0; l < n; l++) free(sets[l]);
  free(sets);
  esp_mem_free(list);
  sf_close(&f);
}

/* Sets out of a checkpoint give the same loss, bit for bit. */
static void resumed(void **state) {
  sf f;
  float *grad[2] = {0};
  char *tensors, *json;
  size_t n_tensors, n_json;
  sf_open(&f, &olora, &cfg);
  begin(&f, 0);
  fx_shake(f.a, 0.3f, 4);
  sf_end(&f);
  begin(&f, 1);
  fx_shake(f.a, 0.3f, 5);
  double value = penalty(&f, &grad[0]);
  char path[2][512];
  snprintf(path[0], sizeof path[0], "%s", fx_path("reglora.safetensors"));
  snprintf(path[1], sizeof path[1], "%s", fx_path("reglora.json"));
  OK(esp_strategies_save(&f.set, path[0], path[1]));
  OK(esp_file_read(path[0], &tensors, &n_tensors));
  OK(esp_file_read(path[1], &json, &n_json));
  esp_strategies_destroy(&f.set);
  OK(esp_strategies_create(&f.cfg, f.r.be, &f.set));
  OK(esp_strategies_open(&f.set, &f.q));
  OK(esp_strategies_load(&f.set, tensors, n_tensors, json, n_json, "reglora"));
  assert_true(value > 0 && penalty(&f, &grad[1]) == value);
  assert_memory_equal(grad[0], grad[1], (size_t)f.a->params->total * 4);
  for (int i = 0; i < 2; i++) free(grad[i]);
  esp_mem_free(tensors);
  esp_mem_free(json);
  sf_close(&f);
}

int main(void) {
  fx_setup();
  sf_setup();
  const struct CMUnitTest tests[] = {cmocka_unit_test(formula), cmocka_unit_test(resumed)};
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
