/* A method over inputs of every kind: adapters equal the models they merge into, a LoRA that a method makes of adapters
 * merges into the model that it makes of them, shards stay shards and their bytes where nothing changed, one type is
 * rounded to once, nothing is left after a failure, and the memory stays below that of one model.
 * Mutation seen to be caught: the transposition left out of esp_adapters_stored_rows (sites.c) fails
 * "one_lora_equals_one_model". */
#include <dirent.h>

#include "core/mem.h"
#include "io/json.h"
#include "merge/method.h"
#include "naive.h"

enum { N = 3 };
static const char *const bases[] = {"qwen", "llama", "gpt2"};
static char base[256], adapter[N][256], model[N][256], out[256], other[256];
static const char *adapters[N], *models[N];

static void paths(const char *name) {
  snprintf(base, sizeof base, "%s", fx_path(name));
  snprintf(out, sizeof out, "%s", fx_path("out"));
  snprintf(other, sizeof other, "%s", fx_path("other"));
  for (int i = 0; i < N; i++) {
    snprintf(adapter[i], sizeof adapter[i], "%s/adapter%d", fx_root, i);
    snprintf(model[i], sizeof model[i], "%s/model%d", fx_root, i);
    adapters[i] = adapter[i];
    models[i] = model[i];
  }
}

static void make_adapters(const char *name) {
  paths(name);
  for (int i = 0; i < N; i++) {
    fx_run r;
    esp_adapter *a;
    fx_open(&r, base, ESP_F32, false);
    OK(esp_adapter_create(
        r.m, &(esp_adapter_cfg){.type = "lora", .r = 2 + i, .alpha = 8, .target_regex = "all-linear", .bias = "none"},
        "default", true, &a));
    fx_shake(a, 0.06f, 30 + (uint64_t)i);
    OK(esp_adapter_save(a, adapter[i]));
    esp_adapter_destroy(a);
    fx_close(&r);
    esp_merge_spec spec = {.base = base, .adapters = &adapters[i], .n_adapters = 1, .out = model[i]};
    OK(esp_merge_write(&spec, NULL));
  }
}

static double density[] = {0.5};
static esp_merge_method method(const char *name) {
  esp_merge_method m = ESP_MERGE_METHOD;
  static const double metrics[N] = {3, 1, 2};
  m.name = name;
  m.density = density;
  m.n_density = strstr(name, "ties") || strstr(name, "dare") || strstr(name, "crumbs") || strstr(name, "prune");
  m.metrics = metrics;
  if (strcmp(name, "mwa") == 0) m.n_metrics = N;
  if (strcmp(name, "slerp") == 0 || strcmp(name, "nuslerp") == 0) m.t = 0.4;
  return m;
}

static int inputs_of(const char *name) {
  return strstr(name, "slerp") ? 2 : N;
}

static void blend(const char *name, const char *const *inputs, const char *to) {
  esp_merge_method m = method(name);
  esp_blend_spec spec = {.base = base, .inputs = inputs, .n = inputs_of(name), .out = to, .method = &m};
  OK(esp_blend_write(&spec, NULL));
}

static double apart(const char *a, const char *b) {
  nv_model x, y;
  double most = 0;
  nv_load(a, &x);
  nv_load(b, &y);
  assert_int_equal(x.count, y.count);
  for (int i = 0; i < x.count; i++) {
    nv_tensor *t = nv_find(&y, x.t[i].name);
    for (int64_t k = 0; k < t->n; k++) most = fmax(most, fabs(t->x[k] - x.t[i].x[k]));
  }
  nv_free(&x);
  nv_free(&y);
  return most;
}

/* The sums of a method that cuts or elects may fall on either side for two roundings of one change: those that only
 * add, choose or turn vectors cannot. */
static void adapters_equal_their_models(void **state) {
  (void)state;
  static const char *const smooth[] = {"linear", "task_arithmetic", "dare_linear", "lines",  "magmax",
                                       "mwa",    "model_stock",     "slerp",       "nuslerp"};
  for (int b = 0; b < 3; b++) {
    make_adapters(bases[b]);
    for (size_t i = 0; i < sizeof smooth / sizeof smooth[0]; i++) {
      blend(smooth[i], adapters, out);
      blend(smooth[i], models, other);
      double d = apart(out, other);
      if (!(d < 2e-6)) fail_msg("%s on %s: %g", smooth[i], bases[b], d);
      const char *const mixed[] = {models[0], adapters[1], models[2]};
      blend(smooth[i], mixed, other);
      assert_true(apart(out, other) < 2e-6);
    }
  }
}

/* `--combine M` and `--method M` are one formula. rank 48: no site has more. */
static void one_lora_equals_one_model(void **state) {
  (void)state;
  static const char *const names[] = {"task_arithmetic", "breadcrumbs", "breadcrumbs_ties", "magmax", "lines", "opcm",
                                      "model_stock",     "mwa",         "nuslerp"};
  for (int b = 0; b < 3; b++) {
    make_adapters(bases[b]);
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
      char lora[256];
      snprintf(lora, sizeof lora, "%s", fx_path("lora"));
      const char *const one[] = {lora};
      esp_merge_method m = method(names[i]);
      bool exact = m.n_density == 0 && strcmp(names[i], "magmax") != 0; /* whatever rank it takes, by itself */
      esp_svd_stats stats;
      esp_combine_spec c = {.base = base,
                            .adapters = adapters,
                            .n_adapters = inputs_of(names[i]),
                            .out = lora,
                            .method = &m,
                            .rank = exact ? 0 : 64};
      OK(esp_combine_write(&c, &stats));
      if (!(stats.max_error < 1e-5)) fail_msg("%s: %g", names[i], stats.max_error);
      assert_true(!exact || stats.rank <= 2 + 3 + 4);
      esp_merge_spec into = {.base = base, .adapters = one, .n_adapters = 1, .out = other};
      OK(esp_merge_write(&into, NULL));
      blend(names[i], adapters, out);
      nv_model x, y;
      nv_load(out, &x);
      nv_load(other, &y);
      double far = 0, size = 0;
      for (int t = 0; t < x.count; t++) {
        nv_tensor *o = nv_find(&y, x.t[t].name);
        for (int64_t k = 0; k < o->n; k++) far += pow(o->x[k] - x.t[t].x[k], 2), size += pow(o->x[k], 2);
      }
      if (!(sqrt(far / size) < 2e-5)) fail_msg("%s on %s: %g", names[i], bases[b], sqrt(far / size));
      nv_free(&x);
      nv_free(&y);
    }
  }
}

static void write_half(const char *from, const char *dir, const char *file, int half, json_t *map) {
  char path[300];
  esp_st *f;
  esp_st_writer *w;
  OK(esp_st_open(from, &f));
  OK(esp_st_writer_create(esp_path_join(path, sizeof path, dir, file), &w));
  for (int pass = 0; pass < 2; pass++)
    for (int i = 0; i < esp_st_count(f); i++) {
      const esp_st_entry *e = esp_st_at(f, i);
      if (i % 2 != half) continue;
      if (pass == 0) OK(esp_st_writer_declare(w, e->name, e->dtype, e->ndim, e->shape));
      if (pass == 1) OK(esp_st_writer_put(w, e->name, e->data, e->bytes));
      if (pass == 1) json_object_set_new(map, e->name, json_string(file));
    }
  OK(esp_st_writer_commit(w));
  esp_st_close(f);
}

static void split(const char *from, const char *to) {
  char a[300], b[300];
  json_t *index = json_object(), *map = json_object();
  OK(esp_mkdirs(to));
  OK(esp_copy_file(esp_path_join(a, sizeof a, from, "config.json"), esp_path_join(b, sizeof b, to, "config.json")));
  OK(esp_file_write_atomic(esp_path_join(a, sizeof a, to, "tokenizer_config.json"), "{}", 2));
  write_half(from, to, "model-00001-of-00002.safetensors", 0, map);
  write_half(from, to, "model-00002-of-00002.safetensors", 1, map);
  json_object_set_new(index, "weight_map", map);
  OK(esp_json_save(esp_path_join(a, sizeof a, to, "model.safetensors.index.json"), index, 0));
  json_decref(index);
}

static void shards_stay_shards(void **state) {
  (void)state;
  make_adapters("qwen");
  char whole[256], first[300];
  snprintf(whole, sizeof whole, "%s", base);
  blend("model_stock", models, other);
  split(whole, fx_path("sharded"));
  snprintf(base, sizeof base, "%s", fx_path("sharded"));
  blend("model_stock", models, out);
  assert_true(apart(out, other) == 0);
  assert_true(esp_file_exists(esp_path_join(first, sizeof first, out, "model-00001-of-00002.safetensors")));
  assert_true(esp_file_exists(esp_path_join(first, sizeof first, out, "model.safetensors.index.json")));
  assert_true(esp_file_exists(esp_path_join(first, sizeof first, out, "tokenizer_config.json")));
  nv_model x, y; /* norms and embeddings: no input changed them */
  nv_load(out, &x);
  nv_load(whole, &y);
  nv_tensor *a = nv_find(&x, "model.embed_tokens.weight"), *b = nv_find(&y, "model.embed_tokens.weight");
  assert_memory_equal(a->x, b->x, (size_t)a->n * sizeof *a->x);
  nv_free(&x);
  nv_free(&y);
}

static void rounded_once(void **state) {
  (void)state;
  make_adapters("llama");
  blend("opcm", models, out);
  esp_merge_method m = method("opcm");
  esp_merge_stats stats;
  esp_blend_spec spec = {.base = base, .inputs = models, .n = N, .out = other, .dtype = "bf16", .method = &m};
  OK(esp_blend_write(&spec, &stats));
  assert_true(stats.changed > 0 && stats.max_delta > 0 && stats.lost_share > 0 && stats.lost_share < 0.5);
  nv_model x, y;
  nv_load(out, &x);
  nv_load(other, &y);
  for (int i = 0; i < x.count; i++) {
    nv_tensor *t = nv_find(&y, x.t[i].name);
    for (int64_t k = 0; k < t->n; k++) assert_true(t->x[k] == esp_bf16_to_f32(esp_f32_to_bf16((float)x.t[i].x[k])));
  }
  nv_free(&x);
  nv_free(&y);
}

/* ---- memory: a model of about 27 MB of which the embedding is the most, so that whole tensors would not do ---- */

static int64_t rss(const char *what) {
  char line[256];
  int64_t kib = -1;
  FILE *f = fopen("/proc/self/status", "r");
  while (f && fgets(line, sizeof line, f))
    if (strncmp(line, what, strlen(what)) == 0) kib = atoll(line + strlen(what) + 1);
  if (f) fclose(f);
  return kib * 1024;
}

static bool forget_peak(void) {
  FILE *f = fopen("/proc/self/clear_refs", "w");
  bool ok = f && fputs("5", f) >= 0;
  if (f) ok &= fclose(f) == 0;
  return ok;
}

static void below_one_model(void **state) {
  (void)state;
  char config[1024], *vocab;
  snprintf(config, sizeof config, "%s", fx_llama_tied);
  vocab = strstr(config, "\"vocab_size\":48");
  memmove(vocab + 19, vocab + 15, strlen(vocab + 15) + 1);
  memcpy(vocab, "\"vocab_size\":200000", 19);
  fx_make_base("wide", config);
  paths("wide");
  for (int i = 0; i < N; i++) {
    fx_run r;
    esp_adapter *full;
    fx_open(&r, base, ESP_F32, false);
    OK(esp_adapter_create(r.m, &(esp_adapter_cfg){.type = "full"}, "default", false, &full));
    fx_shake(full, 0.02f, 80 + (uint64_t)i);
    OK(esp_adapter_save(full, model[i]));
    esp_adapter_destroy(full);
    fx_close(&r);
  }
  static const char *const names[] = {"ties", "breadcrumbs", "dare_ties", "model_stock", "slerp", "opcm", "magmax"};
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
    esp_st *f;
    int64_t bytes = 0;
    OK(esp_st_open(base, &f));
    for (int k = 0; k < esp_st_count(f); k++) bytes += esp_st_at(f, k)->bytes;
    esp_st_close(f);
    esp_mem_stats before, after;
    esp_mem_trim();
    esp_mem_stats_reset_peak();
    esp_mem_stats_get(&before);
    bool known = forget_peak();
    int64_t had = rss("VmRSS");
    blend(names[i], models, out);
    esp_mem_stats_get(&after);
    int64_t own = after.peak_total - before.now_total, all = rss("VmHWM") - had;
    print_message("%s: model %.1f MB, allocated %.1f MB, resident %.1f MB more\n", names[i], (double)bytes / 1e6,
                  (double)own / 1e6, known ? (double)all / 1e6 : -1);
    assert_true(own < bytes / 2);
#ifndef __SANITIZE_ADDRESS__ /* which keeps what is freed */
    if (known && had > 0) assert_true(all < bytes);
#endif
  }
}

static int litter(void) { /* hidden siblings of an output */
  int n = 0;
  DIR *d = opendir(fx_root);
  for (struct dirent *e; d && (e = readdir(d));) n += e->d_name[0] == '.' && strlen(e->d_name) > 2;
  if (d) closedir(d);
  return n;
}

static void a_failure_leaves_nothing(void **state) {
  (void)state;
  static const char *const names[] = {"linear", "opcm", "ties"};
  make_adapters("qwen");
  if (esp_dir_exists(out)) OK(esp_remove_tree(out));
  char path[300], broken[256]; /* a value that is not finite in the last tensor */
  snprintf(broken, sizeof broken, "%s", fx_path("broken"));
  OK(esp_mkdirs(broken));
  OK(esp_copy_file(esp_path_join(path, sizeof path, model[1], "config.json"), fx_path("broken/config.json")));
  char *data;
  size_t n;
  OK(esp_file_read(esp_path_join(path, sizeof path, model[1], "model.safetensors"), &data, &n));
  uint32_t nan = 0x7fc00000u;
  memcpy(data + n - 4, &nan, 4);
  OK(esp_file_write_atomic(fx_path("broken/model.safetensors"), data, n));
  esp_mem_free(data);
  const char *const inputs[] = {models[0], broken, models[2]};
  for (int i = 0; i < 3; i++) {
    esp_merge_method m = method(names[i]);
    esp_blend_spec spec = {.base = base, .inputs = inputs, .n = N, .out = out, .method = &m};
    assert_int_equal(esp_blend_write(&spec, NULL), ESP_ERR_DATA);
    if (!strstr(esp_error_message(), "broken: tensor 'model.") || !strstr(esp_error_message(), "not finite"))
      fail_msg("%s", esp_error_message());
    assert_false(esp_dir_exists(out));
    assert_int_equal(litter(), 0);
  }
}

static void kinds_that_cannot(void **state) {
  (void)state;
  paths("llama");
  fx_run r;
  esp_adapter *a;
  static const char *const head[] = {"lm_head"};
  fx_open(&r, base, ESP_F32, false);
  OK(esp_adapter_create(
      r.m, &(esp_adapter_cfg){.type = "lora", .r = 2, .alpha = 2, .target = head, .n_target = 1, .bias = "none"},
      "default", true, &a));
  OK(esp_adapter_save(a, adapter[0]));
  esp_adapter_destroy(a);
  fx_close(&r);
  esp_merge_method m = method("linear");
  esp_blend_spec spec = {.base = base, .inputs = adapters, .n = 1, .out = fx_path("never"), .method = &m};
  assert_int_equal(esp_blend_write(&spec, NULL), ESP_ERR_RECIPE);
  assert_non_null(strstr(esp_error_message(), "makes 'lm_head' differ from the embedding"));
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
      cmocka_unit_test(adapters_equal_their_models),
      cmocka_unit_test(one_lora_equals_one_model),
      cmocka_unit_test(shards_stay_shards),
      cmocka_unit_test(rounded_once),
      cmocka_unit_test(below_one_model),
      cmocka_unit_test(a_failure_leaves_nothing),
      cmocka_unit_test(kinds_that_cannot),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
