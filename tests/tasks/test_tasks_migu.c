/* Masks of rows: by magnitude against the rows' own outputs, at random against counts, chance and the steps at which
 * they are drawn; a resumed run keeps the mask that was drawn before. Mutation seen caught: random masks drawn from the
 * step alone, alike for all matrices of one height. */
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
static const char *const names[] = {"migu"};

static void begin(sf *f, int task) {
  if (f->a->kind->task_begin) OK(f->a->kind->task_begin(f->a, task));
  sf_task(f, task);
}

static void check_rows(sf *f, const float *g, int p, const float *h, int64_t tokens, int64_t ld, double threshold) {
  const esp_param *q = &f->a->params->list[p];
  int64_t rows = q->shape[0], zero = 0;
  double *size = calloc((size_t)rows, sizeof *size), kept = INFINITY, held = 0;
  for (int64_t t = 0; t < tokens; t++) {
    double sum = 0;
    for (int64_t j = 0; j < rows; j++) sum += fabs((double)h[t * ld + j]);
    for (int64_t j = 0; j < rows; j++) size[j] += fabs((double)h[t * ld + j]) / sum;
  }
  for (int64_t j = 0; j < rows; j++) {
    bool any = fx_max_abs(g + q->offset + j * q->shape[1], q->shape[1]) > 0;
    zero += !any;
    if (any) kept = fmin(kept, size[j]);
    if (!any) held = fmax(held, size[j]);
  }
  assert_int_equal(zero, (int64_t)(threshold * (double)rows + 1e-9));
  assert_true(held <= kept);
  free(size);
}

/* Rows of the smallest outputs have no gradient, the others keep theirs to the bit. */
static void magnitude(void **state) {
  for (int kind = 0; kind < N_KINDS; kind++) {
    esp_strategy_cfg cfg = {.names = names,
                            .n = 1,
                            .migu = {.threshold = 0.5, .interval = 4, .samples = 3, .tokens = 16, .mask = "magnitude"}};
    sf f;
    esp_trained *list;
    esp_observed o;
    esp_sample *some;
    int64_t count;
    int n;
    sf_open(&f, &kinds[kind], &cfg);
    begin(&f, 0);
    if (kind < 2) fx_shake(f.a, 0.1f, 4);
    sf_gradient(&f, 0, 6);
    float *before = fx_grads(f.a);
    esp_strategy_step t = {0};
    OK(esp_strategies_project(&f.set, &f.q, &t));
    float *g = fx_grads(f.a);
    for (int64_t i = 0; i < f.a->params->total; i++) assert_true(g[i] == 0 || g[i] == before[i]);
    OK(esp_trained_list(&f.set.list[0], &f.q, &list, &n));
    OK(esp_sequence_some(&f.q, 3, &some, &count));
    OK(esp_observe(&f.q, list, n, some, count, 16, true, &o));
    for (int i = 0; i < n; i++) {
      const esp_group *group = list[i].site->group;
      int64_t rows = o.rows[group->index], in = group->in;
      bool whole = list[i].weight >= 0;
      check_rows(&f, g, whole ? list[i].weight : list[i].b, o.y[group->index] + list[i].site->col0, rows, group->out,
                 0.5);
      if (whole) continue;
      float h[16 * 8], *now = fx_masters(f.a);
      const esp_param *a = &f.a->params->list[list[i].a];
      for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < a->shape[0]; j++) {
          double sum = 0;
          for (int64_t c = 0; c < in; c++)
            sum += (double)o.x[group->index][r * in + c] * (double)now[a->offset + j * in + c];
          h[r * a->shape[0] + j] = (float)sum;
        }
      check_rows(&f, g, list[i].a, h, rows, a->shape[0], 0.5);
      free(now);
    }
    free(before);
    free(g);
    esp_observed_deinit(&o);
    esp_mem_free(some);
    esp_mem_free(list);
    sf_close(&f);
  }
}

/* 1 for each parameter that gets a gradient at this step of the run. */
static float *mask_at(sf *f, int64_t step, int64_t task_step) {
  int64_t total = f->a->params->total;
  float *ones = malloc((size_t)total * sizeof *ones);
  for (int64_t i = 0; i < total; i++) ones[i] = 1;
  f->r.be->ops->upload(f->r.be, f->a->params->grad, ones, total * 4);
  esp_strategy_step t = {.step = step, .task_step = task_step};
  OK(esp_strategies_project(&f->set, &f->q, &t));
  free(ones);
  return fx_grads(f->a);
}

static void open_random(sf *f, const esp_adapter_cfg *kind, double threshold) {
  esp_strategy_cfg cfg = {.names = names, .n = 1};
  cfg.migu.threshold = threshold, cfg.migu.interval = 4, cfg.migu.mask = "random";
  sf_open(f, kind, &cfg);
  begin(f, 0);
}

/* Whole rows, of each matrix as many as by magnitude; what else is trained keeps its gradient. */
static void random_density(void **state) {
  for (int kind = 0; kind < N_KINDS; kind++) {
    sf f;
    esp_trained *list;
    int n;
    open_random(&f, &kinds[kind], 0.7);
    float *m = mask_at(&f, 0, 0);
    OK(esp_trained_list(&f.set.list[0], &f.q, &list, &n));
    assert_true(n > 0);
    int64_t held = 0, expected = 0;
    for (int i = 0; i < 3 * n; i++) {
      int p = i % 3 == 0 ? list[i / 3].weight : i % 3 == 1 ? list[i / 3].a : list[i / 3].b;
      if (p < 0) continue;
      const esp_param *q = &f.a->params->list[p];
      int64_t zero = 0;
      for (int64_t j = 0; j < q->shape[0]; j++) {
        const float *row = m + q->offset + j * q->shape[1];
        for (int64_t c = 0; c < q->shape[1]; c++) assert_true(row[c] == row[0] && (row[0] == 0 || row[0] == 1));
        zero += row[0] == 0;
      }
      assert_int_equal(zero, (int64_t)(0.7 * (double)q->shape[0] + 1e-9));
      expected += zero * q->shape[1];
    }
    for (int64_t i = 0; i < f.a->params->total; i++) held += m[i] == 0;
    assert_int_equal(held, expected);
    free(m);
    esp_mem_free(list);
    sf_close(&f);
  }
}

/* The first matrix of each of two heights, over many draws: every row is held as often as chance says, and two matrices
 * of one height are not held alike. */
static void random_chance(void **state) {
  enum { DRAWS = 600 };
  sf f;
  esp_trained *list;
  int n;
  open_random(&f, NULL, 0.5);
  OK(esp_trained_list(&f.set.list[0], &f.q, &list, &n));
  const esp_param *x = &f.a->params->list[list[0].b], *y = &f.a->params->list[list[n - 1].b];
  const esp_param *of[] = {x, &f.a->params->list[list[0].a]};
  int64_t often[2][64] = {{0}}, alike = 0, common = x->shape[0] < y->shape[0] ? x->shape[0] : y->shape[0];
  for (int64_t d = 0; d < DRAWS; d++) {
    float *m = mask_at(&f, d, 0);
    for (int k = 0; k < 2; k++)
      for (int64_t j = 0; j < of[k]->shape[0]; j++) often[k][j] += m[of[k]->offset + j * of[k]->shape[1]] == 0;
    for (int64_t j = 0; j < common; j++) alike += m[x->offset + j * x->shape[1]] == m[y->offset + j * y->shape[1]];
    free(m);
  }
  double spread = sqrt(DRAWS * 0.25);
  for (int k = 0; k < 2; k++)
    for (int64_t j = 0; j < of[k]->shape[0]; j++) assert_true(fabs((double)often[k][j] - DRAWS * 0.5) < 5 * spread);
  double same = (double)alike / (double)(DRAWS * common);
  assert_true(fabs(same - 0.5) < 0.05);
  esp_mem_free(list);
  sf_close(&f);
}

/* A mask holds until the next interval, is a function of (seed, step) alone, and is there again after a resume. */
static void random_resumed(void **state) {
  sf f, g, other;
  size_t size[2];
  char *file[2], path[2][512];
  snprintf(path[0], sizeof path[0], "%s", fx_path("migu.safetensors"));
  snprintf(path[1], sizeof path[1], "%s", fx_path("migu.json"));
  open_random(&f, NULL, 0.5);
  size_t bytes = (size_t)f.a->params->total * 4;
  float *at8 = mask_at(&f, 8, 0), *at9 = mask_at(&f, 9, 1), *at11 = mask_at(&f, 11, 3);
  assert_memory_equal(at8, at9, bytes);
  assert_memory_equal(at8, at11, bytes);
  OK(esp_strategies_save(&f.set, path[0], path[1]));
  float *at12 = mask_at(&f, 12, 4);
  assert_true(memcmp(at8, at12, bytes) != 0);

  open_random(&g, NULL, 0.5);
  for (int i = 0; i < 2; i++) OK(esp_file_read(path[i], &file[i], &size[i]));
  OK(esp_strategies_load(&g.set, file[0], size[0], file[1], size[1], "checkpoint"));
  float *again11 = mask_at(&g, 11, 3), *again12 = mask_at(&g, 12, 4);
  assert_memory_equal(again11, at11, bytes);
  assert_memory_equal(again12, at12, bytes);

  open_random(&other, NULL, 0.5);
  other.q.seed++;
  float *seeded = mask_at(&other, 8, 0);
  assert_true(memcmp(seeded, at8, bytes) != 0);
  free(at8), free(at9), free(at11), free(at12), free(again11), free(again12), free(seeded);
  for (int i = 0; i < 2; i++) esp_mem_free(file[i]);
  sf_close(&f), sf_close(&g), sf_close(&other);
}

int main(void) {
  fx_setup();
  sf_setup();
  const struct CMUnitTest tests[] = {cmocka_unit_test(magnitude), cmocka_unit_test(random_density),
                                     cmocka_unit_test(random_chance), cmocka_unit_test(random_resumed)};
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
