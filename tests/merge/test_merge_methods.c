/* Every method on three models with a base, over all tensors, against its formula in double precision; and what is
 * known without one: a single task comes back, ends of a slerp, equal inputs. Mutation seen to be caught: '>' in place
 * of '>=' in magmax (blend.c) fails "magmax_keeps_the_later". */
#include "naive.h"

enum { N = 3 };
static nv_model base, models[N];
static char base_dir[256], dir[N][256], out[256];
static const char *dirs[N];
static const double weights[N] = {0.7, -0.4, 1.3};

static void make_model(const char *from, int i, float scale) {
  fx_run r;
  esp_adapter *full;
  fx_open(&r, from, ESP_F32, false);
  OK(esp_adapter_create(r.m, &(esp_adapter_cfg){.type = "full"}, "default", false, &full));
  fx_shake(full, scale, 70 + (uint64_t)i);
  OK(esp_adapter_save(full, dir[i]));
  esp_adapter_destroy(full);
  fx_close(&r);
}

static int setup(void **state) {
  (void)state;
  fx_setup();
  snprintf(base_dir, sizeof base_dir, "%s", fx_path("qwen"));
  snprintf(out, sizeof out, "%s", fx_path("out"));
  nv_load(base_dir, &base);
  for (int i = 0; i < N; i++) {
    dirs[i] = dir[i];
    snprintf(dir[i], sizeof dir[i], "%s/model%d", fx_root, i);
    make_model(base_dir, i, 0.02f * (float)(i + 1));
    nv_load(dir[i], &models[i]);
  }
  return 0;
}

static int teardown(void **state) {
  (void)state;
  nv_free(&base);
  for (int i = 0; i < N; i++) nv_free(&models[i]);
  return esp_remove_tree(fx_root) == ESP_OK ? 0 : 1;
}

static void blend(const esp_merge_method *m, const double *w, int n, nv_model *got) {
  if (esp_dir_exists(out)) OK(esp_remove_tree(out));
  esp_blend_spec spec = {.base = base_dir, .inputs = dirs, .weights = w, .n = n, .out = out, .method = m};
  esp_merge_stats stats;
  OK(esp_blend_write(&spec, &stats));
  assert_int_equal(stats.tensors, base.count);
  assert_int_equal(stats.changed, base.count);
  nv_load(out, got);
}

/* What a tensor's merged change should be: fills `want` from d. */
typedef void (*formula)(const nv_tensor *t, double **d, double *want, const esp_merge_method *m);

static void against(const char *what, const esp_merge_method *m, const double *w, int n, formula f) {
  nv_model got;
  blend(m, w, n, &got);
  for (int i = 0; i < base.count; i++) {
    const nv_tensor *b = &base.t[i], *g = nv_find(&got, b->name);
    double *d[N], *want = calloc((size_t)b->n, sizeof *want), most = 0;
    nv_deltas(&base, models, n, b->name, d);
    f(b, d, want, m);
    for (int64_t k = 0; k < b->n; k++) most = fmax(most, fabs(g->x[k] - b->x[k] - want[k]));
    if (!(most < 3e-7)) fail_msg("%s: %s is %g away from the formula", what, b->name, most);
    for (int k = 0; k < n; k++) free(d[k]);
    free(want);
  }
  nv_free(&got);
}

static inline esp_merge_method method(const char *name) {
  esp_merge_method m = ESP_MERGE_METHOD;
  m.name = name;
  return m;
}

/* ---- sums ---- */

static double lambda, sum_weights[N];
static void weighted_sum(const nv_tensor *t, double **d, double *want, const esp_merge_method *m) {
  for (int64_t k = 0; k < t->n; k++)
    for (int i = 0; i < N; i++) want[k] += lambda * sum_weights[i] * d[i][k];
}

static void linear_and_task_arithmetic(void **state) {
  (void)state;
  esp_merge_method m = method("linear");
  for (int i = 0; i < N; i++) sum_weights[i] = weights[i] / 1.6;
  lambda = 1;
  against("linear", &m, weights, N, weighted_sum);
  for (int i = 0; i < N; i++) sum_weights[i] = 1.0 / 3;
  against("linear, equal", &m, NULL, N, weighted_sum);
  m = method("task_arithmetic");
  m.lambda = lambda = 0.4;
  memcpy(sum_weights, weights, sizeof weights);
  against("task_arithmetic", &m, weights, N, weighted_sum);
  m.lambda = lambda = -1; /* a task is taken away */
  against("negation", &m, weights, N, weighted_sum);
}

static void mwa(void **state) {
  (void)state;
  static const double metrics[N] = {0.5, 2, 1.25};
  esp_merge_method m = method("mwa");
  m.metrics = metrics;
  m.n_metrics = N;
  m.power = 2;
  lambda = 1;
  double higher = 0.25 + 4 + 1.5625, lower = 4 + 0.25 + 0.64;
  for (int i = 0; i < N; i++) sum_weights[i] = metrics[i] * metrics[i] / higher;
  against("mwa", &m, NULL, N, weighted_sum);
  m.better = "lower";
  for (int i = 0; i < N; i++) sum_weights[i] = 1 / (metrics[i] * metrics[i]) / lower;
  against("mwa, lower", &m, NULL, N, weighted_sum);
}

static void layers_sum(const nv_tensor *t, double **d, double *want, const esp_merge_method *m) {
  double factor = t->layer < 0 ? 0.25 : 0.25 + 0.5 * t->layer / (2 - 1);
  for (int64_t k = 0; k < t->n; k++)
    for (int i = 0; i < N; i++) want[k] += factor * d[i][k];
}

static void default_layers(const nv_tensor *t, double **d, double *want, const esp_merge_method *m) {
  double factor = t->layer == 1 ? 1 : 1.0 / 3; /* alpha = 1/N, beta = 1 - alpha, two layers */
  for (int64_t k = 0; k < t->n; k++)
    for (int i = 0; i < N; i++) want[k] += factor * d[i][k];
}

static void lines(void **state) {
  (void)state;
  esp_merge_method m = method("lines");
  against("lines, by itself", &m, NULL, N, default_layers);
  m.lines_alpha = 0.25;
  m.lines_beta = 0.5;
  against("lines", &m, NULL, N, layers_sum);
  m = method("task_arithmetic"); /* the same scaling on another method */
  m.lines_alpha = 0.25;
  m.lines_beta = 0.5;
  against("scaled task_arithmetic", &m, NULL, N, layers_sum);
}

/* ---- entries that stay ---- */

static double densities[N];
static void elected(int64_t n, double **d, const double *w, bool frequency, bool normalize, double *want) {
  for (int64_t k = 0; k < n; k++) {
    double votes = 0, sum = 0, divisor = 0;
    for (int i = 0; i < N; i++) {
      double y = w[i] * d[i][k];
      votes += frequency ? (y > 0) - (y < 0) : y;
    }
    for (int i = 0; i < N; i++)
      if (w[i] * d[i][k] != 0 && (w[i] * d[i][k] > 0) == (votes >= 0)) {
        sum += w[i] * d[i][k];
        divisor += w[i];
      }
    want[k] = normalize && fabs(divisor) > 1e-8 ? sum / divisor : sum;
  }
}

static bool by_frequency, normalized = true;
static void ties_of(const nv_tensor *t, double **d, double *want, const esp_merge_method *m) {
  for (int i = 0; i < N; i++) nv_window(d[i], t->n, 0, (int64_t)(densities[i] * (double)t->n));
  elected(t->n, d, weights, by_frequency, normalized, want);
}

static void ties(void **state) {
  (void)state;
  esp_merge_method m = method("ties");
  memcpy(densities, (double[]){0.2, 0.5, 0.8}, sizeof densities);
  m.density = densities;
  m.n_density = N;
  against("ties", &m, weights, N, ties_of);
  m.majority = "frequency";
  by_frequency = true;
  against("ties by number", &m, weights, N, ties_of);
  m.normalize = normalized = false;
  against("ties, not normalised", &m, weights, N, ties_of);
  by_frequency = false;
  normalized = true;
}

static void pruned(const nv_tensor *t, double **d, double *want, const esp_merge_method *m) {
  for (int i = 0; i < N; i++) {
    nv_window(d[i], t->n, 0, (int64_t)(densities[i] * (double)t->n));
    for (int64_t k = 0; k < t->n; k++) want[k] += weights[i] * d[i][k];
  }
}

static double gamma_share;
static void crumbs(const nv_tensor *t, double **d, double *want, const esp_merge_method *m) {
  bool elect = strcmp(m->name, "breadcrumbs_ties") == 0;
  for (int i = 0; i < N; i++) {
    int64_t keep = (int64_t)(densities[i] * (double)t->n), top = (int64_t)(gamma_share * (double)t->n);
    nv_window(d[i], t->n, top < t->n - keep ? top : t->n - keep, keep);
    for (int64_t k = 0; !elect && k < t->n; k++) want[k] += weights[i] * d[i][k];
  }
  if (elect) elected(t->n, d, weights, false, false, want);
}

static void largest_and_middle(void **state) {
  (void)state;
  static const double gammas[] = {0.1, 0, 0.7}; /* none leaves; more than the kept leave room for */
  esp_merge_method m = method("magnitude_prune");
  memcpy(densities, (double[]){0.4, 0.4, 0.4}, sizeof densities);
  m.density = densities;
  m.n_density = 1;
  against("magnitude_prune", &m, weights, N, pruned);
  for (int g = 0; g < 3; g++)
    for (int elect = 0; elect < 2; elect++) {
      esp_merge_method c = method(elect ? "breadcrumbs_ties" : "breadcrumbs");
      c.density = densities;
      c.n_density = 1;
      c.gamma = gamma_share = gammas[g];
      against(c.name, &c, weights, N, crumbs);
    }
}

static void drawn(const nv_tensor *t, double **d, double *want, const esp_merge_method *m) {
  bool elect = strcmp(m->name, "dare_ties") == 0;
  for (int i = 0; i < N; i++) {
    uint64_t stream = esp_rng_stream(ESP_RNG_DATA, (uint64_t)i, 2, esp_rng_stream_name(ESP_RNG_DATA, t->name));
    double all = 0, kept = 0, scale = 1 / densities[i];
    for (int64_t k = 0; k < t->n; k++) {
      all += fabs(d[i][k]);
      if (!(esp_rng_uniform(m->seed, stream, (uint64_t)k) < (float)densities[i])) d[i][k] = 0;
      kept += fabs(d[i][k]);
    }
    if (m->rescale && strcmp(m->rescale, "l1") == 0) scale = kept > 0 ? all / kept : 1;
    if (m->rescale && strcmp(m->rescale, "none") == 0) scale = 1;
    for (int64_t k = 0; k < t->n; k++) {
      d[i][k] = (float)((float)d[i][k] * scale);
      if (!elect) want[k] += weights[i] * d[i][k];
    }
  }
  if (elect) elected(t->n, d, weights, false, false, want);
}

static void dare(void **state) {
  (void)state;
  static const char *const rescales[] = {NULL, "l1", "none"};
  memcpy(densities, (double[]){0.3, 0.6, 0.9}, sizeof densities);
  for (int r = 0; r < 3; r++)
    for (int elect = 0; elect < 2; elect++) {
      esp_merge_method m = method(elect ? "dare_ties" : "dare_linear");
      m.density = densities;
      m.n_density = N;
      m.seed = 5;
      m.rescale = rescales[r];
      against(m.name, &m, weights, N, drawn);
    }
}

/* ---- of the largest, of angles ---- */

static void magmax_of(const nv_tensor *t, double **d, double *want, const esp_merge_method *m) {
  for (int64_t k = 0; k < t->n; k++) {
    double best = 0;
    for (int i = 0; i < N; i++)
      if (fabs(d[i][k]) >= fabs(best)) best = d[i][k];
    want[k] = lambda * best;
  }
}

static void magmax(void **state) {
  (void)state;
  esp_merge_method m = method("magmax");
  m.lambda = lambda = 0.8;
  against("magmax", &m, NULL, N, magmax_of);
}

/* Changes +x and -x: equal in magnitude, so that the order decides. The base is the middle of two models of dyadic
 * values, so that both differences are exact. */
static void magmax_keeps_the_later(void **state) {
  (void)state;
  char plain[256], up[256], down[256];
  snprintf(plain, sizeof plain, "%s", fx_path("plain"));
  snprintf(up, sizeof up, "%s", fx_path("up"));
  snprintf(down, sizeof down, "%s", fx_path("down"));
  const char *const three[] = {plain, up, down};
  for (int i = 0; i < 3; i++) {
    char path[300], from[300];
    esp_st *f;
    esp_st_writer *w;
    OK(esp_mkdirs(three[i]));
    OK(esp_copy_file(esp_path_join(from, sizeof from, base_dir, "config.json"),
                     esp_path_join(path, sizeof path, three[i], "config.json")));
    OK(esp_st_open(base_dir, &f));
    OK(esp_st_writer_create(esp_path_join(path, sizeof path, three[i], "model.safetensors"), &w));
    for (int k = 0; k < esp_st_count(f); k++) {
      const esp_st_entry *e = esp_st_at(f, k);
      OK(esp_st_writer_declare(w, e->name, ESP_F32, e->ndim, e->shape));
    }
    for (int k = 0; k < esp_st_count(f); k++) {
      const esp_st_entry *e = esp_st_at(f, k);
      float *x = malloc((size_t)e->bytes);
      for (int64_t j = 0; j < e->bytes / 4; j++) x[j] = 1.0f + (i == 0 ? 0 : i == 1 ? 1 : -1) * (float)(j % 7) / 64;
      OK(esp_st_writer_put(w, e->name, x, e->bytes));
      free(x);
    }
    OK(esp_st_writer_commit(w));
    esp_st_close(f);
  }
  for (int swap = 0; swap < 2; swap++) {
    const char *const order[] = {three[1 + swap], three[2 - swap]};
    esp_merge_method m = method("magmax");
    esp_blend_spec spec = {.base = plain, .inputs = order, .n = 2, .out = out, .method = &m};
    OK(esp_blend_write(&spec, NULL));
    nv_model got;
    nv_load(out, &got);
    for (int i = 0; i < got.count; i++)
      for (int64_t k = 0; k < got.t[i].n; k++) assert_true(got.t[i].x[k] == 1 + (swap ? 1 : -1) * (double)(k % 7) / 64);
    nv_free(&got);
  }
}

static void stock_of(const nv_tensor *t, double **d, double *want, const esp_merge_method *m) {
  double c = 0;
  for (int i = 0; i < N; i++)
    for (int j = 0; j < i; j++)
      c += nv_dot(d[i], d[j], t->n) / sqrt(nv_dot(d[i], d[i], t->n) * nv_dot(d[j], d[j], t->n)) / 3;
  double share = c > 0 ? N * c / (1 + (N - 1) * c) : 0;
  for (int64_t k = 0; k < t->n; k++)
    for (int i = 0; i < N; i++) want[k] += share / N * d[i][k];
}

static void model_stock(void **state) {
  (void)state;
  esp_merge_method m = method("model_stock");
  against("model_stock", &m, NULL, N, stock_of);
}

static double at;
static void nuslerp_of(const nv_tensor *t, double **d, double *want, const esp_merge_method *m) {
  double c = nv_dot(d[0], d[1], t->n) / sqrt(nv_dot(d[0], d[0], t->n) * nv_dot(d[1], d[1], t->n)), o = acos(c);
  for (int64_t k = 0; k < t->n; k++)
    want[k] = fabs(c) > 0.9995 ? (1 - at) * d[0][k] + at * d[1][k]
                               : (sin((1 - at) * o) * d[0][k] + sin(at * o) * d[1][k]) / sin(o);
}

static void slerp_of(const nv_tensor *t, double **d, double *want, const esp_merge_method *m) {
  for (int i = 0; i < 2; i++)
    for (int64_t k = 0; k < t->n; k++) d[i][k] += t->x[k];
  nuslerp_of(t, d, want, m);
  for (int64_t k = 0; k < t->n; k++) want[k] -= t->x[k];
}

static void slerps(void **state) {
  (void)state;
  static const double ts[] = {0.3, 0.75, 0, 1};
  for (int i = 0; i < 4; i++) {
    esp_merge_method m = method("slerp"), nu = method("nuslerp");
    m.t = nu.t = at = ts[i];
    against("slerp", &m, NULL, 2, slerp_of);
    against("nuslerp", &nu, NULL, 2, nuslerp_of);
  }
  esp_merge_method nu = method("nuslerp");
  at = 3.0 / 4;
  against("nuslerp by weights", &nu, (const double[]){1, 3}, 2, nuslerp_of);
}

static void slerp_ends_are_the_models(void **state) {
  (void)state;
  for (int end = 0; end < 2; end++) {
    esp_merge_method m = method("slerp");
    nv_model got;
    m.t = end;
    blend(&m, NULL, 2, &got);
    for (int i = 0; i < base.count; i++) {
      nv_tensor *a = nv_find(&got, base.t[i].name), *b = nv_find(&models[end], base.t[i].name);
      for (int64_t k = 0; k < a->n; k++) assert_true(fabs(a->x[k] - b->x[k]) <= 0x1p-24 * fmax(1, fabs(b->x[k])));
    }
    nv_free(&got);
  }
}

/* ---- OPCM over a whole model ---- */

static void opcm(void **state) {
  (void)state;
  double own = 0, each[N] = {0}, *sums[NV_TENSORS], mean = 0;
  for (int i = 0; i < base.count; i++) {
    const nv_tensor *t = &base.t[i];
    double *d[N];
    int64_t closed;
    nv_deltas(&base, models, N, t->name, d);
    sums[i] = calloc((size_t)t->n, sizeof *sums[i]);
    for (int k = 0; k < N; k++) {
      each[k] += nv_dot(d[k], d[k], t->n);
      if (t->linear && k > 0) nv_project(sums[i], t->rows, t->cols, 0.4, d[k], &closed);
      for (int64_t j = 0; j < t->n; j++) sums[i][j] += d[k][j];
      free(d[k]);
    }
    own += nv_dot(sums[i], sums[i], t->n);
  }
  for (int k = 0; k < N; k++) mean += sqrt(each[k]) / N;
  esp_merge_method m = method("opcm");
  nv_model got;
  m.alpha = 0.4;
  blend(&m, NULL, N, &got);
  double length = 0;
  for (int i = 0; i < base.count; i++) {
    const nv_tensor *b = &base.t[i], *g = nv_find(&got, b->name);
    for (int64_t k = 0; k < b->n; k++) {
      double change = g->x[k] - b->x[k], want = sums[i][k] * mean / sqrt(own);
      if (!(fabs(change - want) < 5e-6)) fail_msg("%s: %g, not %g", b->name, change, want);
      length += change * change;
    }
    free(sums[i]);
  }
  assert_true(fabs(sqrt(length) / mean - 1) < 1e-5); /* its distance to the base is the mean one */
  nv_free(&got);
}

/* ---- one task ---- */

static void one_task_comes_back(void **state) {
  (void)state;
  static const char *const names[] = {"linear", "task_arithmetic", "ties", "dare_linear", "breadcrumbs", "lines"};
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
    esp_merge_method m = method(names[i]);
    static const double all[] = {1};
    nv_model got;
    m.density = all;
    m.n_density = strcmp(names[i], "ties") == 0 || strncmp(names[i], "dare", 4) == 0 || names[i][0] == 'b';
    if (names[i][0] == 'b') m.gamma = 0;
    if (strcmp(names[i], "lines") == 0) {
      m.lines_alpha = 1;
      m.lines_beta = 0;
    }
    blend(&m, NULL, 1, &got);
    for (int t = 0; t < base.count; t++) {
      nv_tensor *a = nv_find(&got, base.t[t].name), *b = nv_find(&models[0], base.t[t].name);
      for (int64_t k = 0; k < a->n; k++) assert_true(fabs(a->x[k] - b->x[k]) <= 0x1p-23 * fmax(1, fabs(b->x[k])));
    }
    nv_free(&got);
  }
}

static void refusals(void **state) {
  (void)state;
  static const double two[] = {0.5, 0.5}, big[] = {1.5};
  const struct {
    esp_merge_method m;
    const double *w;
    int n;
    const char *says;
  } cases[] = {
      {method("tie"), NULL, 2, "'tie' is no method (did you mean 'ties'?)"},
      {method("average"), NULL, 2, "'average' is no method (linear, "},
      {method("ties"), NULL, 2, "ties needs a density"},
      {method("opcm"), NULL, 1, "opcm takes at least 2 inputs, not 1"},
      {method("model_stock"), NULL, 1, "at least 2 inputs"},
      {method("slerp"), NULL, 3, "slerp takes 2 inputs, not 3"},
      {method("slerp"), NULL, 2, "slerp needs a t"},
      {method("magmax"), weights, 3, "magmax takes no weight"},
      {method("mwa"), NULL, 3, "a metric for each input: 0 for 3"},
      {method("lines"), NULL, 1, "needs its alpha"},
      {method("linear"), (const double[]){1, -1}, 2, "cannot be normalised"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0] + 3; i++) {
    size_t c = i < sizeof cases / sizeof cases[0] ? i : 2;
    esp_merge_method m = cases[c].m;
    const char *says = cases[c].says;
    if (c != i) {
      m.density = i % 2 ? two : big;
      m.n_density = i % 2 ? 2 : 1;
      says = i % 2 ? "2 densities for 3 inputs" : "above 0 and at most 1";
    }
    esp_blend_spec spec = {.base = base_dir,
                           .inputs = dirs,
                           .n = c != i ? 3 : cases[c].n,
                           .weights = cases[c].w,
                           .out = fx_path("never"),
                           .method = &m};
    assert_int_equal(esp_blend_write(&spec, NULL), ESP_ERR_RECIPE);
    if (!strstr(esp_error_message(), says)) fail_msg("%s, not: %s", esp_error_message(), says);
    assert_false(esp_dir_exists(spec.out));
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(linear_and_task_arithmetic),
      cmocka_unit_test(mwa),
      cmocka_unit_test(lines),
      cmocka_unit_test(ties),
      cmocka_unit_test(largest_and_middle),
      cmocka_unit_test(dare),
      cmocka_unit_test(magmax),
      cmocka_unit_test(magmax_keeps_the_later),
      cmocka_unit_test(model_stock),
      cmocka_unit_test(slerps),
      cmocka_unit_test(slerp_ends_are_the_models),
      cmocka_unit_test(opcm),
      cmocka_unit_test(one_task_comes_back),
      cmocka_unit_test(refusals),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
