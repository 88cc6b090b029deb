/* Stored differences: signs and scales are the ones of the formula and what comes back is base + scale x sign; ranks
 * are shared out as an exhaustive search would; all of the energy at 32 bits gives the model back; errors told are the
 * errors there are; a stored difference merges like the model it stands for; files that do not fit are refused.
 * Mutation seen to be caught: the rows left out of the cost of a triple (share_ranks) fails "ranks_are_shared".
 */
#include "io/json.h"
#include "merge/residual.h"
#include "naive.h"

static char base[256], tuned[256], kept[256], out[256];

static void paths(const char *name) {
  snprintf(base, sizeof base, "%s", fx_path(name));
  snprintf(tuned, sizeof tuned, "%s", fx_path("tuned"));
  snprintf(kept, sizeof kept, "%s", fx_path("kept"));
  snprintf(out, sizeof out, "%s", fx_path("out"));
}

static void tune(const char *name) {
  fx_run r;
  esp_adapter *full;
  paths(name);
  fx_open(&r, base, ESP_F32, false);
  OK(esp_adapter_create(r.m, &(esp_adapter_cfg){.type = "full"}, "default", false, &full));
  fx_shake(full, 0.02f, 60);
  OK(esp_adapter_save(full, tuned));
  esp_adapter_destroy(full);
  fx_close(&r);
}

static esp_residual_stats store(const char *form, bool per_matrix, double energy, int bits) {
  esp_residual_spec spec = {.base = base,
                            .tuned = tuned,
                            .out = kept,
                            .form = form,
                            .per_matrix = per_matrix,
                            .energy = energy,
                            .bits = bits};
  esp_residual_stats stats;
  OK(esp_residual_write(&spec, &stats));
  return stats;
}

static void restore(nv_model *got) {
  esp_merge_method m = ESP_MERGE_METHOD;
  m.name = "task_arithmetic";
  const char *const one[] = {kept};
  esp_blend_spec spec = {.base = base, .inputs = one, .n = 1, .out = out, .method = &m};
  OK(esp_blend_write(&spec, NULL));
  nv_load(out, got);
}

/* The relative error of each matrix, and of the others none at all; their mean and largest are what was told. */
static void check_errors(const esp_residual_stats *stats) {
  nv_model b, t, g;
  nv_load(base, &b);
  nv_load(tuned, &t);
  restore(&g);
  double mean = 0, most = 0;
  int matrices = 0;
  for (int i = 0; i < b.count; i++) {
    nv_tensor *x = nv_find(&t, b.t[i].name), *y = nv_find(&g, b.t[i].name);
    double total = 0, lost = 0;
    for (int64_t k = 0; k < x->n; k++) {
      total += pow(x->x[k] - b.t[i].x[k], 2);
      lost += pow(x->x[k] - y->x[k], 2);
    }
    double e = sqrt(lost / total);
    if (b.t[i].ndim != 2) {
      assert_true(e < 1e-5);
      continue;
    }
    mean += e;
    most = fmax(most, e);
    matrices++;
  }
  assert_int_equal(matrices, stats->matrices);
  if (!(fabs(mean / matrices - stats->mean_error) < 1e-5 && fabs(most - stats->max_error) < 1e-5))
    fail_msg("errors %g and %g, told %g and %g", mean / matrices, most, stats->mean_error, stats->max_error);
  nv_free(&b);
  nv_free(&t);
  nv_free(&g);
}

static void one_bit(void **state) {
  (void)state;
  for (int per_matrix = 0; per_matrix < 2; per_matrix++) {
    tune("qwen");
    esp_residual_stats stats = store("1bit", per_matrix, 0, 0);
    nv_model b, t, g;
    nv_load(base, &b);
    nv_load(tuned, &t);
    restore(&g);
    for (int i = 0; i < b.count; i++) {
      nv_tensor *x = nv_find(&t, b.t[i].name), *y = nv_find(&g, b.t[i].name);
      int64_t scales = per_matrix ? 1 : x->rows, each = x->n / scales;
      for (int64_t s = 0; s < scales && x->ndim == 2; s++) {
        double scale = 0;
        for (int64_t k = s * each; k < (s + 1) * each; k++) scale += fabs(x->x[k] - b.t[i].x[k]) / (double)each;
        for (int64_t k = s * each; k < (s + 1) * each; k++) {
          double want = b.t[i].x[k] + (x->x[k] >= b.t[i].x[k] ? scale : -scale);
          assert_true(fabs(y->x[k] - want) < 1e-6);
        }
      }
    }
    nv_free(&b);
    nv_free(&t);
    nv_free(&g);
    check_errors(&stats);
    assert_true(stats.bytes * 8 < stats.full_bytes);                /* of fp32; small rows, each with its scale */
    assert_true(stats.mean_error > 0.5 && stats.mean_error < 0.65); /* of a Gaussian: sqrt(1 - 2/pi) = 0.603 */
  }
}

static void low_rank(void **state) {
  (void)state;
  static const char *const names[] = {"qwen", "gpt2"};
  for (int b = 0; b < 2; b++) {
    tune(names[b]);
    esp_residual_stats all = store("lowrank", false, 1, 32);
    assert_true(all.max_error < 1e-5);
    check_errors(&all);
    double last = 0;
    for (int bits = 32; bits >= 8; bits /= 2) {
      esp_residual_stats some = store("lowrank", false, 0.8, bits);
      check_errors(&some);
      assert_true(some.mean_error >= last - 1e-9 && some.mean_error < 0.6);
      assert_true(some.bytes < all.bytes * bits / 32);
      last = some.mean_error;
    }
  }
}

/* No other choice of leading triples of the same or a smaller cost holds more: greedy by value per parameter is optimal
 * up to the last triple, so exchanging any kept one for a left one must not gain. */
static void ranks_are_shared(void **state) {
  (void)state;
  tune("qwen");
  store("lowrank", false, 0.7, 32);
  nv_model b, t;
  nv_load(base, &b);
  nv_load(tuned, &t);
  esp_st *f;
  OK(esp_st_open(fx_path("kept/residual.safetensors"), &f));
  double worst_kept = INFINITY, best_left = 0, total = 0, held = 0, last = 0;
  for (int i = 0; i < b.count; i++) {
    nv_tensor *x = &b.t[i], *y = nv_find(&t, x->name);
    if (x->ndim != 2) continue;
    char name[128];
    snprintf(name, sizeof name, "%s.A", x->name);
    const esp_st_entry *a = esp_st_find(f, name);
    int64_t r = a ? a->shape[0] : 0, small = x->rows < x->cols ? x->rows : x->cols, big = x->rows + x->cols - small;
    double *d = malloc((size_t)x->n * 8), *v = malloc((size_t)(small * small) * 8), *s = malloc((size_t)small * 8);
    for (int64_t k = 0; k < x->n; k++) d[k] = y->x[k] - x->x[k];
    double *tall = x->rows >= x->cols ? d : nv_transposed(d, x->rows, x->cols);
    nv_svd(tall, big, small, v, s);
    for (int64_t k = 0; k < small; k++) {
      double value = s[k] * s[k] / (double)(x->rows + x->cols);
      total += s[k] * s[k];
      if (k < r) held += s[k] * s[k];
      if (k < r && value < worst_kept) worst_kept = value, last = s[k] * s[k];
      if (k >= r) best_left = fmax(best_left, value);
    }
    if (tall != d) free(tall);
    free(d), free(v), free(s);
  }
  assert_true(worst_kept >= best_left * (1 - 1e-5));
  assert_true(held >= 0.7 * total * (1 - 1e-6) && held - last < 0.7 * total);
  esp_st_close(f);
  nv_free(&b);
  nv_free(&t);
}

/* An adapter of rank 3 is stored in 3 ranks and nothing else, and comes back; with others it merges like itself. */
static void an_adapter_is_stored(void **state) {
  (void)state;
  paths("llama");
  fx_run r;
  esp_adapter *a;
  fx_open(&r, base, ESP_F32, false);
  OK(esp_adapter_create(
      r.m, &(esp_adapter_cfg){.type = "lora", .r = 3, .alpha = 6, .target_regex = ".*(q|down)_proj", .bias = "none"},
      "default", true, &a));
  fx_shake(a, 0.06f, 5);
  snprintf(tuned, sizeof tuned, "%s", fx_path("lora"));
  OK(esp_adapter_save(a, tuned));
  esp_adapter_destroy(a);
  fx_close(&r);
  esp_residual_stats stats = store("lowrank", false, 1 - 1e-9, 32);
  assert_true(stats.matrices == 4 && stats.exact == 0 && stats.max_error < 1e-4);
  const char *const pairs[2][2] = {{tuned, kept}, {tuned, tuned}};
  nv_model m[2];
  for (int i = 0; i < 2; i++) {
    esp_merge_method how = ESP_MERGE_METHOD;
    how.name = "linear";
    esp_blend_spec spec = {.base = base, .inputs = pairs[i], .n = 2, .out = out, .method = &how};
    OK(esp_blend_write(&spec, NULL));
    nv_load(out, &m[i]);
  }
  for (int i = 0; i < m[0].count; i++)
    for (int64_t k = 0; k < m[0].t[i].n; k++) assert_true(fabs(m[0].t[i].x[k] - m[1].t[i].x[k]) < 1e-5);
  nv_free(&m[0]);
  nv_free(&m[1]);
}

static void spoil(const char *what) { /* of the stored difference */
  char from[300], to[300];
  snprintf(from, sizeof from, "%s/residual.safetensors", kept);
  snprintf(to, sizeof to, "%s/new.safetensors", kept);
  esp_st *f;
  esp_st_writer *w;
  OK(esp_st_open(from, &f));
  OK(esp_st_writer_create(to, &w));
  for (int pass = 0; pass < 2; pass++)
    for (int i = 0; i < esp_st_count(f); i++) {
      const esp_st_entry *e = esp_st_at(f, i);
      char name[128];
      int64_t shape[2] = {e->shape[0], e->ndim > 1 ? e->shape[1] : 0};
      bool first = strcmp(e->name, "model.layers.0.mlp.up_proj.weight.sign") == 0;
      snprintf(name, sizeof name, "%s", e->name);
      if (first && strcmp(what, "shape") == 0) shape[0] = e->shape[1], shape[1] = e->shape[0];
      if (first && strcmp(what, "name") == 0) snprintf(name, sizeof name, "elsewhere.sign");
      if (pass == 0) OK(esp_st_writer_declare(w, name, e->dtype, e->ndim, shape));
      if (pass == 1) OK(esp_st_writer_put(w, name, e->data, e->bytes));
    }
  OK(esp_st_writer_commit(w));
  esp_st_close(f);
  assert_int_equal(rename(to, from), 0);
}

static void refusals(void **state) {
  (void)state;
  static const char *const cases[][2] = {
      {"shape", "what is stored for 'model.layers.0.mlp.up_proj.weight' does not fit"},
      {"name", "belong to none of the base"},
      {"format", "is not espalier-residual-1"},
      {"base", "made on another base"}};
  for (int i = 0; i < 4; i++) {
    tune("qwen");
    store("1bit", false, 0, 0);
    if (i < 2) {
      spoil(cases[i][0]);
    } else {
      json_t *j;
      char path[300];
      OK(esp_json_load(esp_path_join(path, sizeof path, kept, "residual.json"), &j));
      json_object_set_new(j, cases[i][0], json_string("00"));
      OK(esp_json_save(path, j, 0));
      json_decref(j);
    }
    esp_merge_method m = ESP_MERGE_METHOD;
    m.name = "linear";
    const char *const one[] = {kept};
    esp_blend_spec spec = {.base = base, .inputs = one, .n = 1, .out = fx_path("never"), .method = &m};
    assert_int_equal(esp_blend_write(&spec, NULL), ESP_ERR_DATA);
    if (!strstr(esp_error_message(), cases[i][1])) fail_msg("%s", esp_error_message());
    assert_false(esp_dir_exists(spec.out));
  }
}

static int setup(void **state) {
  (void)state;
  fx_setup();
  return 0;
}
static int teardown(void **state) {
  (void)state;
  return esp_remove_tree(fx_root) == ESP_OK ? 0 : 1;
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(one_bit),          cmocka_unit_test(low_rank),
      cmocka_unit_test(ranks_are_shared), cmocka_unit_test(an_adapter_is_stored),
      cmocka_unit_test(refusals),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
