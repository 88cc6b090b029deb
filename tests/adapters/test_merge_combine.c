/* The eleven combinations: each against its formula worked out on dense matrices in double precision, with unequal
 * weights (one negative), unequal scales (one rslora) and a module that only one adapter has; and what PEFT gets wrong.
 * Mutation seen to be caught: a weight that enters both factors in combine_sum fails "sums". */
#include <math.h>

#include "kinds.h"
#include "merge/merge.h"

enum { N = 3, R = 4 };
static const double weights[N] = {0.7, -0.4, 1.3};
static const char *const more[N] = {", target: [q_proj, down_proj]", ", rslora: true, target: [q_proj, down_proj]",
                                    ", target: [q_proj, v_proj, down_proj]"};
static char base[256], dir[N][256], out[256], other[256];
static const char *dirs[N];

static void save(int i, const char *type, const char *keys, float scale) {
  fx_run r;
  fx_open(&r, base, ESP_F32, false);
  esp_adapter *a = kinds_adapter(&r, type, keys, "default", false, 40 + (uint64_t)i);
  fx_shake(a, scale, 50 + (uint64_t)i);
  if (esp_dir_exists(dir[i])) OK(esp_remove_tree(dir[i]));
  OK(esp_adapter_save(a, dir[i]));
  esp_adapter_destroy(a);
  fx_close(&r);
}

static void clean(void) {
  if (esp_dir_exists(out)) OK(esp_remove_tree(out));
  if (esp_dir_exists(other)) OK(esp_remove_tree(other));
}

static esp_merge_method how;
static double density;

static esp_combine_spec spec_of(const char *type) {
  clean();
  bool thin = strstr(type, "ties") || strstr(type, "dare") || strstr(type, "prune");
  density = 0.6;
  how = (esp_merge_method)ESP_MERGE_METHOD;
  how.name = type;
  how.density = &density;
  how.n_density = thin;
  how.seed = 11;
  return (esp_combine_spec){.base = base,
                            .adapters = dirs,
                            .weights = weights,
                            .n_adapters = N,
                            .out = out,
                            .method = &how,
                            .rank = strstr(type, "svd") ? 32 : 0};
}

typedef struct loaded { /* what a directory adds to one module */
  int64_t rows, cols, r;
  float *A, *B; /* scale in B; NULL where the kind has none */
  double *delta;
} loaded;

static loaded load(const char *from, const char *path) {
  fx_run r;
  esp_adapter *a;
  loaded l = {0};
  fx_open(&r, base, ESP_F32, false);
  OK(esp_adapter_load(r.m, from, "default", false, &a));
  esp_site *s = esp_model_find_site(r.m, path);
  l.rows = s->out;
  l.cols = s->in;
  l.delta = calloc((size_t)(s->out * s->in), sizeof *l.delta);
  if (esp_adapter_changes(a, s)) {
    l.r = a->kind->low_rank(a, s, NULL, NULL);
    l.A = malloc((size_t)(l.r * s->in) * 4);
    l.B = malloc((size_t)(l.r * s->out) * 4);
    a->kind->low_rank(a, s, l.A, l.B);
    for (int64_t o = 0; o < s->out; o++)
      for (int64_t k = 0; k < l.r; k++)
        for (int64_t c = 0; c < s->in; c++) l.delta[o * s->in + c] += (double)l.B[o * l.r + k] * l.A[k * s->in + c];
  }
  esp_adapter_destroy(a);
  fx_close(&r);
  return l;
}

static void unload(loaded *l) {
  free(l->A);
  free(l->B);
  free(l->delta);
}

/* ---- the operations again, plainly ---- */

static void thin(const char *type, double *x, int64_t n, int adapter, int part, const char *path) {
  if (strstr(type, "dare")) {
    uint64_t stream =
        esp_rng_stream(ESP_RNG_DATA, (uint64_t)adapter, (uint64_t)part, esp_rng_stream_name(ESP_RNG_DATA, path));
    for (int64_t i = 0; i < n; i++) x[i] = esp_rng_uniform(11, stream, (uint64_t)i) < 0.6f ? x[i] / 0.6 : 0;
  } else if (strstr(type, "ties") || strstr(type, "prune")) {
    double *y = malloc((size_t)n * sizeof *y);
    memcpy(y, x, (size_t)n * sizeof *y);
    for (int64_t i = 0; i < n; i++) { /* among the int(0.6 n) largest: fewer than that are larger or earlier equals */
      int64_t before = 0;
      for (int64_t k = 0; k < n; k++) before += fabs(y[k]) > fabs(y[i]) || (fabs(y[k]) == fabs(y[i]) && k < i);
      if (before >= (int64_t)(0.6 * (double)n)) x[i] = 0;
    }
    free(y);
  }
}

static double side(double x) {
  return x > 0 ? 1 : x < 0 ? -1 : 0;
}

/* w_i x_i over those that agree with the sign that the plain sum (or the number of signs) has, over their number. */
static double merged(const double *x, const double *w, const bool *has, bool frequency) {
  double votes = 0, sum = 0, count = 0;
  for (int i = 0; i < N; i++)
    if (has[i]) votes += frequency ? side(x[i]) : x[i];
  for (int i = 0; i < N; i++)
    if (has[i] && side(x[i]) == (votes >= 0 ? 1 : -1)) {
      sum += w[i] * x[i];
      count++;
    }
  return count > 1 ? sum / count : sum;
}

static double *widen(const float *x, int64_t n) {
  double *y = malloc((size_t)n * sizeof *y);
  for (int64_t i = 0; i < n; i++) y[i] = x[i];
  return y;
}

static void expected(const char *type, bool frequency, const loaded *in, const char *path, double *want) {
  int64_t rows = in[0].rows, cols = in[0].cols;
  bool ties = strstr(type, "ties") != NULL, has[N];
  double *a[N], *b[N], *d[N];
  memset(want, 0, (size_t)(rows * cols) * sizeof *want);
  for (int i = 0; i < N; i++) {
    has[i] = in[i].A != NULL;
    a[i] = has[i] ? widen(in[i].A, in[i].r * cols) : NULL;
    b[i] = has[i] ? widen(in[i].B, in[i].r * rows) : NULL;
    d[i] = malloc((size_t)(rows * cols) * sizeof **d);
    memcpy(d[i], in[i].delta, (size_t)(rows * cols) * sizeof **d);
    if (!has[i]) continue;
    if (strstr(type, "svd")) {
      thin(type, d[i], rows * cols, i, 2, path);
      continue;
    }
    thin(type, a[i], in[i].r * cols, i, 0, path);
    thin(type, b[i], in[i].r * rows, i, 1, path);
  }
  if (strstr(type, "svd") && ties) {
    for (int64_t k = 0; k < rows * cols; k++)
      want[k] = merged((double[]){d[0][k], d[1][k], d[2][k]}, weights, has, frequency);
  } else if (strstr(type, "svd")) {
    for (int i = 0; i < N; i++)
      for (int64_t k = 0; has[i] && k < rows * cols; k++) want[k] += weights[i] * d[i][k];
  } else if (ties) {
    double wa[N], wb[N], *A = calloc((size_t)(R * cols), sizeof *A), *B = calloc((size_t)(R * rows), sizeof *B);
    for (int i = 0; i < N; i++) {
      wb[i] = sqrt(fabs(weights[i]));
      wa[i] = weights[i] < 0 ? -wb[i] : wb[i];
    }
    double x[N];
    for (int64_t k = 0; k < R * cols; k++) {
      for (int i = 0; i < N; i++) x[i] = has[i] ? a[i][k] : 0;
      A[k] = merged(x, wa, has, frequency);
    }
    for (int64_t k = 0; k < R * rows; k++) {
      for (int i = 0; i < N; i++) x[i] = has[i] ? b[i][k] : 0;
      B[k] = merged(x, wb, has, frequency);
    }
    for (int64_t o = 0; o < rows; o++)
      for (int64_t q = 0; q < R; q++)
        for (int64_t c = 0; c < cols; c++) want[o * cols + c] += B[o * R + q] * A[q * cols + c];
    free(A);
    free(B);
  } else {
    for (int i = 0; i < N; i++)
      for (int64_t o = 0; has[i] && o < rows; o++)
        for (int64_t q = 0; q < R; q++)
          for (int64_t c = 0; c < cols; c++) want[o * cols + c] += weights[i] * b[i][o * R + q] * a[i][q * cols + c];
  }
  for (int i = 0; i < N; i++) {
    free(a[i]);
    free(b[i]);
    free(d[i]);
  }
}

static double distance(const double *got, const double *want, int64_t n) {
  double e = 0, s = 0;
  for (int64_t i = 0; i < n; i++) {
    e += (got[i] - want[i]) * (got[i] - want[i]);
    s += want[i] * want[i];
  }
  return sqrt(e / s);
}

static void check(const char *type, bool frequency) {
  static const char *const paths[] = {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj",
                                      "model.layers.1.mlp.down_proj"};
  esp_combine_spec spec = spec_of(type);
  esp_svd_stats stats;
  how.majority = frequency ? "frequency" : NULL;
  OK(esp_combine_write(&spec, &stats));
  if (!(stats.sites == 6 && stats.max_error < 1e-5)) fail_msg("%s: %d sites, %g", type, stats.sites, stats.max_error);
  for (int p = 0; p < 3; p++) {
    loaded in[N], got = load(out, paths[p]);
    for (int i = 0; i < N; i++) in[i] = load(dir[i], paths[p]);
    double *want = malloc((size_t)(got.rows * got.cols) * sizeof *want);
    expected(type, frequency, in, paths[p], want);
    double d = distance(got.delta, want, got.rows * got.cols);
    if (!(d < 1e-5)) fail_msg("%s on %s: %g away from the formula", type, paths[p], d);
    for (int i = 0; i < N; i++) unload(&in[i]);
    unload(&got);
    free(want);
  }
}

static void sums(void **state) {
  (void)state;
  for (int i = 0; i < N; i++) save(i, "lora", more[i], 0.1f);
  check("linear", false);
  check("svd", false);
  check("cat", false);
}

static void thinned(void **state) {
  (void)state;
  check("dare_linear", false);
  check("dare_linear_svd", false);
  check("magnitude_prune", false);
  check("magnitude_prune_svd", false);
}

static void elections(void **state) {
  (void)state;
  for (int frequency = 0; frequency < 2; frequency++) {
    check("ties", frequency);
    check("dare_ties", frequency);
    check("ties_svd", frequency);
    check("dare_ties_svd", frequency);
  }
}

static void names_are_unique(void **state) {
  (void)state;
  int n;
  const char *const *names = esp_combine_names(&n);
  assert_true(n > 11);
  for (int i = 0; i < n; i++)
    for (int k = 0; k < i; k++) assert_string_not_equal(names[i], names[k]);
}

/* Two halves of one adapter are that adapter, in its own rank (a sum of factors would double it). */
static void halves(void **state) {
  (void)state;
  const char *const twice[] = {dirs[1], dirs[1]};
  for (int t = 0; t < 2; t++) {
    esp_combine_spec spec = spec_of(t ? "svd" : "linear");
    spec.adapters = twice;
    spec.n_adapters = 2;
    spec.weights = (const double[]){0.5, 0.5};
    spec.rank = 0;
    esp_svd_stats stats;
    OK(esp_combine_write(&spec, &stats));
    assert_int_equal(stats.rank, R);
    loaded a = load(dirs[1], "model.layers.0.self_attn.q_proj"), b = load(out, "model.layers.0.self_attn.q_proj");
    assert_true(distance(b.delta, a.delta, a.rows * a.cols) < 1e-5);
    unload(&a);
    unload(&b);
  }
}

/* A rank that is too small: the best approximation, and its error is the one that is told. */
static void rank_and_its_error(void **state) {
  (void)state;
  esp_combine_spec spec = spec_of("linear");
  esp_svd_stats stats;
  spec.rank = 6;
  OK(esp_combine_write(&spec, &stats));
  assert_int_equal(stats.rank, 6);
  loaded in[N], got = load(out, "model.layers.0.self_attn.q_proj");
  for (int i = 0; i < N; i++) in[i] = load(dir[i], "model.layers.0.self_attn.q_proj");
  double *want = malloc((size_t)(got.rows * got.cols) * sizeof *want);
  expected("linear", false, in, "model.layers.0.self_attn.q_proj", want);
  double d = distance(got.delta, want, got.rows * got.cols);
  assert_true(d > 1e-3 && d < stats.max_error + 1e-6 && stats.mean_error <= stats.max_error);
  for (int i = 0; i < N; i++) unload(&in[i]);
  unload(&got);
  free(want);
}

static void same_file(bool same) {
  char *x, *y, a[300], b[300];
  size_t n, k;
  OK(esp_file_read(esp_path_join(a, sizeof a, out, "adapter_model.safetensors"), &x, &n));
  OK(esp_file_read(esp_path_join(b, sizeof b, other, "adapter_model.safetensors"), &y, &k));
  assert_true((n == k && memcmp(x, y, n) == 0) == same);
  esp_mem_free(x);
  esp_mem_free(y);
}

static void masks_follow_the_seed(void **state) {
  (void)state;
  esp_svd_stats stats;
  esp_combine_spec spec = spec_of("dare_linear"), again = spec;
  again.out = other;
  OK(esp_combine_write(&spec, &stats));
  OK(esp_combine_write(&again, &stats));
  same_file(true);
  OK(esp_remove_tree(other));
  how.seed = 12;
  OK(esp_combine_write(&again, &stats));
  same_file(false);
}

static void refusals(void **state) {
  (void)state;
  static const struct {
    const char *type, *says;
    double density;
    bool frequency;
    int64_t rank;
  } cases[] = {
      {"sum", "'sum' is no method (linear, svd, cat", 0, false, 0},
      {"tie_svd", "did you mean 'ties_svd'", 0, false, 0},
      {"ties", "ties needs a density", 0, false, 0},
      {"dare_linear", "dare_linear needs a density", 1.5, false, 0},
      {"linear", "linear takes no density", 0.5, false, 0},
      {"magnitude_prune", "takes no majority sign", 0.5, true, 0},
      {"cat", "rank must be", 0, false, -1},
  };
  esp_svd_stats stats;
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    esp_combine_spec spec = spec_of(cases[i].type);
    density = cases[i].density;
    how.n_density = density != 0;
    how.majority = cases[i].frequency ? "frequency" : NULL;
    spec.rank = cases[i].rank;
    assert_int_equal(esp_combine_write(&spec, &stats), ESP_ERR_RECIPE);
    if (!strstr(esp_error_message(), cases[i].says)) fail_msg("%s", esp_error_message());
    assert_false(esp_dir_exists(out));
  }
  static const struct {
    const char *type, *kind, *keys, *says;
  } adapters[] = {
      {"linear", "mora", ", mora_type: rotation", "type mora has no low-rank factors"},
      {"ties", "lora", ", rank_pattern: {q_proj: 3}", "combine with ties_svd"},
      {"linear", "lora", ", modules_to_save: [model.norm]", "module 'model.norm' is trained in full"},
      {"svd", "lora", ", bias: lora_only", "the bias of"},
  };
  for (size_t i = 0; i < sizeof adapters / sizeof adapters[0]; i++) {
    esp_combine_spec spec = spec_of(adapters[i].type);
    save(1, adapters[i].kind, adapters[i].keys, 0.1f);
    assert_int_equal(esp_combine_write(&spec, &stats), ESP_ERR_RECIPE);
    if (!strstr(esp_error_message(), adapters[i].says)) fail_msg("%s", esp_error_message());
    assert_false(esp_dir_exists(out));
  }
  save(1, "mora", ", mora_type: rotation, target: [q_proj]", 0.1f); /* the svd types take what any kind adds */
  esp_combine_spec spec = spec_of("svd");
  OK(esp_combine_write(&spec, &stats));
  assert_true(stats.max_error < 1e-5);
}

static int setup(void **state) {
  (void)state;
  fx_setup();
  snprintf(base, sizeof base, "%s", fx_path("qwen"));
  snprintf(out, sizeof out, "%s", fx_path("combined"));
  snprintf(other, sizeof other, "%s", fx_path("combined_again"));
  for (int i = 0; i < N; i++) {
    snprintf(dir[i], sizeof dir[i], "%s/in%d", fx_root, i);
    dirs[i] = dir[i];
  }
  return 0;
}
static int teardown(void **state) {
  (void)state;
  fx_teardown();
  return 0;
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(names_are_unique),
      cmocka_unit_test(sums),
      cmocka_unit_test(thinned),
      cmocka_unit_test(elections),
      cmocka_unit_test(halves),
      cmocka_unit_test(rank_and_its_error),
      cmocka_unit_test(masks_follow_the_seed),
      cmocka_unit_test(refusals),
  };
  return cmocka_run_group_tests_name("combine", tests, setup, teardown);
}
