/* Every registered kind as a plain LoRA: exact where it has a low-rank form, else by SVD with the error that is told;
 * what vLLM is given; extraction from the merged model; what cannot be carried is refused in one line that says what to
 * do instead. Mutation seen to be caught: W' - W taken without W in esp_site_delta fails "as_lora". */
#include <math.h>

#include "io/json.h"
#include "kinds.h"
#include "merge/merge.h"

static char base[256], dir[256], out[256], model[256];
static float y[FX_T * FX_VOCAB], z[FX_T * FX_VOCAB];

static void logits_of(const char *from, const char *adapter, float *logits) {
  fx_run r;
  fx_batch f;
  esp_adapter *a = NULL;
  fx_fill(&f);
  fx_open(&r, from, ESP_F32, false);
  if (adapter) {
    OK(esp_adapter_load(r.m, adapter, "default", false, &a));
    OK(esp_adapters_activate(r.m, &a, 1));
  }
  fx_logits(&r, &f.b, logits);
  esp_adapter_destroy(a);
  fx_close(&r);
}

static void save(const char *type, const char *more) {
  fx_run r;
  fx_open(&r, base, ESP_F32, false);
  esp_adapter *a = kinds_adapter(&r, type, more, "default", false, 3);
  if (esp_dir_exists(dir)) OK(esp_remove_tree(dir));
  OK(esp_adapter_save(a, dir));
  esp_adapter_destroy(a);
  fx_close(&r);
}

static esp_status export_to(int64_t rank, bool vllm, esp_svd_stats *stats) {
  if (esp_dir_exists(out)) OK(esp_remove_tree(out));
  return esp_export_write(base, dir, out, true, vllm, rank, stats);
}

static void one_line(const char *type, esp_status st, const char *says) {
  const char *text = esp_error_message();
  if (st != ESP_ERR_RECIPE || strchr(text, '\n') || !strstr(text, says)) fail_msg("%s: %d: %s", type, (int)st, text);
  if (esp_dir_exists(out)) fail_msg("%s: something was written", type);
}

static void same(const char *type, const char *what, const char *from, const char *adapter) {
  logits_of(from, adapter, z);
  double d = fx_rel(z, y, FX_T * FX_VOCAB);
  if (!(d < 2e-5)) fail_msg("%s: %s: %g away", type, what, d);
}

/* Whether the plain LoRA could be written with all the ranks there are. */
static bool carried(const char *type, int64_t *rank, esp_svd_stats *stats) {
  *rank = 0;
  esp_status st = export_to(0, false, stats);
  if (st == ESP_OK) return true;
  if (strstr(esp_error_message(), "use merge")) {
    one_line(type, st, "a plain LoRA cannot carry it");
    return false;
  }
  one_line(type, st, "give a rank");
  *rank = 32; /* the least width of any module here */
  OK(export_to(*rank, false, stats));
  return true;
}

static void as_lora(void **state) {
  (void)state;
  int n, exact = 0, by_svd = 0, refused = 0;
  const char *const *names = esp_adapter_names(&n);
  for (int i = 0; i < n; i++) {
    const esp_adapter_kind *kind = esp_adapter_find(names[i]);
    esp_svd_stats stats;
    esp_merge_spec merge = {.base = base, .adapters = (const char *const[]){dir}, .n_adapters = 1, .out = model};
    int64_t rank;
    if (strcmp(names[i], "none") == 0) continue;
    if (strcmp(names[i], "full") == 0) continue; /* a model: below */
    save(names[i], "");
    if (!kind->mergeable) {
      if (esp_dir_exists(out)) OK(esp_remove_tree(out));
      one_line(names[i], export_to(8, false, &stats), names[i]);
      one_line(names[i], export_to(8, true, &stats), names[i]);
      one_line(names[i], esp_merge_write(&merge, NULL), names[i]);
      refused++;
      continue;
    }
    if (!carried(names[i], &rank, &stats)) {
      refused++;
      continue;
    }
    if (!(stats.sites > 0 && stats.max_error < 1e-5)) fail_msg("%s: error %g", names[i], stats.max_error);
    exact += rank == 0;
    by_svd += rank != 0;
    logits_of(base, dir, y);
    same(names[i], "as lora", base, out);
    OK(export_to(rank, true, &stats));
    same(names[i], "for vllm", base, out);
    if (esp_dir_exists(model)) OK(esp_remove_tree(model));
    OK(esp_merge_write(&merge, NULL));
    OK(esp_remove_tree(out));
    OK(esp_extract_write(base, model, out, 32, NULL, &stats));
    same(names[i], "extracted", base, out);
    OK(export_to(1, false, &stats)); /* too few: the error is there and is told */
    if (!(stats.rank == 1 && stats.max_error > 1e-3 && stats.max_error < 1 && stats.mean_error <= stats.max_error))
      if (stats.max_error > 0) fail_msg("%s: rank 1: %g", names[i], stats.max_error);
  }
  assert_true(exact > 0 && by_svd > 0 && refused > 0);
}

/* The error that is told is that of the file. */
static void told_error_is_the_error(void **state) {
  (void)state;
  esp_svd_stats stats;
  double worst = 0, sum = 0;
  int count = 0;
  save("lora", "");
  OK(export_to(2, false, &stats));
  fx_run r;
  esp_adapter *whole, *cut;
  fx_open(&r, base, ESP_F32, false);
  OK(esp_adapter_load(r.m, dir, "whole", false, &whole));
  OK(esp_adapter_load(r.m, out, "cut", false, &cut));
  esp_site **sites;
  int n = esp_model_sites(r.m, &sites);
  for (int i = 0; i < n; i++) {
    if (!esp_adapter_changes(whole, sites[i])) continue;
    int64_t size = sites[i]->out * sites[i]->in;
    float *a = calloc((size_t)(2 * size), sizeof *a), *b = a + size;
    OK(whole->kind->materialise(whole, sites[i], 0, sites[i]->out, a));
    OK(cut->kind->materialise(cut, sites[i], 0, sites[i]->out, b));
    double lost = 0, total = 0;
    for (int64_t k = 0; k < size; k++) {
      lost += ((double)a[k] - b[k]) * ((double)a[k] - b[k]);
      total += (double)a[k] * a[k];
    }
    double e = sqrt(lost / total);
    worst = e > worst ? e : worst;
    sum += e;
    count++;
    free(a);
  }
  assert_int_equal(count, stats.sites);
  assert_true(fabs(worst - stats.max_error) < 1e-5 && fabs(sum / count - stats.mean_error) < 1e-5);
  assert_true(worst > 0.1);
  esp_adapter_destroy(whole);
  esp_adapter_destroy(cut);
  fx_close(&r);
}

/* What vLLM reads: one rank and alpha, and none of the keys and tensors that it refuses. */
static void vllm_loads_it(void **state) {
  (void)state;
  esp_svd_stats stats;
  save("lora", ", rslora: true, rank_pattern: {q_proj: 5}, alpha_pattern: {v_proj: 3}");
  logits_of(base, dir, y);
  OK(export_to(0, true, &stats));
  same("lora", "for vllm", base, out);
  json_t *j;
  char path[300];
  OK(esp_json_load(esp_path_join(path, sizeof path, out, "adapter_config.json"), &j));
  assert_int_equal(json_integer_value(json_object_get(j, "r")), 8);
  assert_true(json_number_value(json_object_get(j, "lora_alpha")) == 8);
  assert_string_equal(json_string_value(json_object_get(j, "peft_type")), "LORA");
  assert_string_equal(json_string_value(json_object_get(j, "bias")), "none");
  assert_true(json_array_size(json_object_get(j, "target_modules")) > 0);
  static const char *const off[] = {"use_dora", "use_rslora", "lora_bias"};
  for (int i = 0; i < 3; i++) assert_true(json_is_false(json_object_get(j, off[i])));
  static const char *const absent[] = {"modules_to_save", "trainable_token_indices", "target_parameters"};
  for (int i = 0; i < 3; i++) {
    const json_t *v = json_object_get(j, absent[i]);
    assert_true(!v || json_is_null(v));
  }
  assert_int_equal(json_object_size(json_object_get(j, "rank_pattern")), 0);
  assert_int_equal(json_object_size(json_object_get(j, "alpha_pattern")), 0);
  json_decref(j);
  esp_st *s;
  OK(esp_st_open(esp_path_join(path, sizeof path, out, "adapter_model.safetensors"), &s));
  for (int i = 0; i < esp_st_count(s); i++) {
    const esp_st_entry *e = esp_st_at(s, i);
    bool a = strstr(e->name, ".lora_A.weight") != NULL;
    if (!a && !strstr(e->name, ".lora_B.weight")) fail_msg("%s", e->name);
    assert_int_equal(e->shape[a ? 0 : 1], 8);
  }
  esp_st_close(s);
  static const struct {
    const char *more, *says;
  } cases[] = {
      {", modules_to_save: [model.norm]", "module 'model.norm' is trained in full"},
      {", bias: all", "the bias of"},
      {", trainable_tokens: [3]", "module 'model.embed_tokens'"},
      {", target: [embed_tokens, q_proj]", "module 'model.embed_tokens'"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    save("lora", cases[i].more);
    one_line("lora", export_to(0, true, &stats), cases[i].says);
    assert_non_null(strstr(esp_error_message(), "use merge"));
  }
}

static int setup(void **state) {
  (void)state;
  fx_setup();
  snprintf(base, sizeof base, "%s/qwen", fx_root);
  snprintf(dir, sizeof dir, "%s/adapter", fx_root);
  snprintf(out, sizeof out, "%s/exported", fx_root);
  snprintf(model, sizeof model, "%s/model", fx_root);
  return 0;
}
static int teardown(void **state) {
  (void)state;
  fx_teardown();
  return 0;
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(as_lora),
      cmocka_unit_test(told_error_is_the_error),
      cmocka_unit_test(vllm_loads_it),
  };
  return cmocka_run_group_tests_name("kinds as lora", tests, setup, teardown);
}
