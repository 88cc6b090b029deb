/* Merge, verification, extraction and export on tiny bases: merged logits equal base + adapter, shards stay shards, a
 * changed tied head is untied, a stored type is rounded once, extraction gives the adapter back, exports are uniform.
 * Mutation it caught: the Conv1D transposition left out of write_weight. */
#include <math.h>

#include "adapters/adapter_fixture.h"
#include "io/json.h"
#include "merge/merge.h"

static char base[256], lora[256], merged[256], other[256];

static void paths(const char *family) {
  snprintf(base, sizeof base, "%s", fx_path(family));
  snprintf(lora, sizeof lora, "%s", fx_path("lora"));
  snprintf(merged, sizeof merged, "%s", fx_path("merged"));
  snprintf(other, sizeof other, "%s", fx_path("other"));
  if (esp_dir_exists(lora)) OK(esp_remove_tree(lora));
  if (esp_dir_exists(merged)) OK(esp_remove_tree(merged));
  if (esp_dir_exists(other)) OK(esp_remove_tree(other));
}

/* A LoRA with every factor shaken, saved; its logits on the fixture batch when wanted. */
static void make_lora(const esp_adapter_cfg *cfg, float *logits) {
  fx_run r;
  fx_batch f;
  esp_adapter *a;
  fx_fill(&f);
  fx_open(&r, base, ESP_F32, false);
  OK(esp_adapter_create(r.m, cfg, "default", true, &a));
  fx_shake(a, 0.05f, 5);
  OK(esp_adapter_save(a, lora));
  OK(esp_adapters_activate(r.m, &a, 1));
  if (logits) fx_logits(&r, &f.b, logits);
  OK(esp_adapters_activate(r.m, NULL, 0));
  esp_adapter_destroy(a);
  fx_close(&r);
}

static void logits_of(const char *dir, const char *adapter, float *out) {
  fx_run r;
  fx_batch f;
  esp_adapter *a = NULL;
  fx_fill(&f);
  fx_open(&r, dir, ESP_F32, false);
  if (adapter) {
    OK(esp_adapter_load(r.m, adapter, "default", false, &a));
    OK(esp_adapters_activate(r.m, &a, 1));
  }
  fx_logits(&r, &f.b, out);
  OK(esp_adapters_activate(r.m, NULL, 0));
  esp_adapter_destroy(a);
  fx_close(&r);
}

static float with_adapter[FX_T * FX_VOCAB], after[FX_T * FX_VOCAB];

static void merged_equals_unmerged(void **state) {
  (void)state;
  static const char *const families[] = {"qwen", "llama", "gpt2"};
  for (int i = 0; i < 3; i++) {
    paths(families[i]);
    make_lora(&(esp_adapter_cfg){.type = "lora", .r = 4, .alpha = 8, .target_regex = "all-linear", .bias = "none"},
              with_adapter);
    const char *list[] = {lora};
    esp_merge_spec spec = {.base = base, .adapters = list, .n_adapters = 1, .out = merged};
    esp_merge_stats stats;
    OK(esp_merge_write(&spec, &stats));
    assert_true(stats.changed >= 8 && stats.tensors > stats.changed && stats.max_delta > 0);
    logits_of(merged, NULL, after);
    assert_true(fx_rel(after, with_adapter, FX_T * FX_VOCAB) < 2e-6);
    esp_verify_stats v;
    OK(esp_merge_verify(&spec, 3, &v));
    assert_true(v.max_rel < 2e-6 && v.top1_agreement == 1.0 && v.rows == 96);
  }
}

static void weights_scale_and_unmerge_is_the_base(void **state) {
  (void)state;
  paths("qwen");
  make_lora(&(esp_adapter_cfg){.type = "lora", .r = 2, .alpha = 2, .target_regex = "all-linear", .bias = "none"}, NULL);
  const char *list[] = {lora, lora};
  double weights[] = {1.0, -1.0};
  esp_merge_spec spec = {.base = base, .adapters = list, .weights = weights, .n_adapters = 2, .out = merged};
  OK(esp_merge_write(&spec, NULL));
  logits_of(merged, NULL, after);
  logits_of(base, NULL, with_adapter);
  assert_true(fx_rel(after, with_adapter, FX_T * FX_VOCAB) < 2e-6);
}

static void tied_head_is_untied(void **state) {
  (void)state;
  static const char *const target[] = {"lm_head", "q_proj"};
  paths("llama");
  make_lora(&(esp_adapter_cfg){.type = "lora", .r = 4, .alpha = 8, .target = target, .n_target = 2, .bias = "none"},
            with_adapter);
  const char *list[] = {lora};
  esp_merge_spec spec = {.base = base, .adapters = list, .n_adapters = 1, .out = merged};
  OK(esp_merge_write(&spec, NULL));
  logits_of(merged, NULL, after);
  assert_true(fx_rel(after, with_adapter, FX_T * FX_VOCAB) < 2e-6);
  json_t *j;
  char config[300];
  OK(esp_json_load(esp_path_join(config, sizeof config, merged, "config.json"), &j));
  assert_true(json_is_false(json_object_get(j, "tie_word_embeddings")));
  json_decref(j);
}

/* An embedding that changes alone: the head stays the base's. Also of a file that holds the shared tensor once, under
 * the head's name, as the Python package leaves it. */
static void embedding_is_untied(void **state) {
  (void)state;
  static const char *const target[] = {"embed_tokens", "q_proj", "lm_head"};
  for (int k = 0; k < 4; k++) {
    int renamed = k / 2, n_target = 2 + k % 2; /* alone, and both in ways of their own */
    paths("llama");
    if (renamed) {
      char from[300], to[300];
      esp_st *f;
      esp_st_writer *w;
      OK(esp_mkdirs(other));
      OK(esp_copy_file(esp_path_join(from, sizeof from, base, "config.json"),
                       esp_path_join(to, sizeof to, other, "config.json")));
      OK(esp_st_open(base, &f));
      OK(esp_st_writer_create(esp_path_join(to, sizeof to, other, "model.safetensors"), &w));
      OK(esp_st_writer_metadata(w, "model.embed_tokens.weight", "lm_head.weight"));
      for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < esp_st_count(f); i++) {
          const esp_st_entry *e = esp_st_at(f, i);
          const char *name = strcmp(e->name, "model.embed_tokens.weight") == 0 ? "lm_head.weight" : e->name;
          if (pass == 0) OK(esp_st_writer_declare(w, name, e->dtype, e->ndim, e->shape));
          if (pass == 1) OK(esp_st_writer_put(w, name, e->data, e->bytes));
        }
      OK(esp_st_writer_commit(w));
      esp_st_close(f);
      snprintf(base, sizeof base, "%s", other);
    }
    make_lora(
        &(esp_adapter_cfg){.type = "lora", .r = 4, .alpha = 8, .target = target, .n_target = n_target, .bias = "none"},
        with_adapter);
    const char *list[] = {lora};
    esp_merge_spec spec = {.base = base, .adapters = list, .n_adapters = 1, .out = merged};
    OK(esp_merge_write(&spec, NULL));
    logits_of(merged, NULL, after);
    assert_true(fx_rel(after, with_adapter, FX_T * FX_VOCAB) < 2e-6);
  }
}

static void rounded_once(void **state) {
  (void)state;
  paths("qwen");
  make_lora(&(esp_adapter_cfg){.type = "lora", .r = 4, .alpha = 8, .target_regex = ".*q_proj", .bias = "none"}, NULL);
  const char *list[] = {lora};
  esp_merge_spec spec = {.base = base, .adapters = list, .n_adapters = 1, .out = merged};
  OK(esp_merge_write(&spec, NULL));
  esp_merge_spec half = spec;
  half.out = other;
  half.dtype = "bf16";
  OK(esp_merge_write(&half, NULL));
  esp_st *exact, *rounded;
  OK(esp_st_open(merged, &exact));
  OK(esp_st_open(other, &rounded));
  assert_int_equal(esp_st_count(exact), esp_st_count(rounded));
  for (int i = 0; i < esp_st_count(exact); i++) {
    const esp_st_entry *e = esp_st_at(exact, i), *h = esp_st_find(rounded, e->name);
    assert_true(h && h->dtype == ESP_BF16 && e->dtype == ESP_F32);
    for (int64_t k = 0; k < e->bytes / 4; k++) {
      float x;
      uint16_t y;
      memcpy(&x, (const char *)e->data + 4 * k, 4);
      memcpy(&y, (const char *)h->data + 2 * k, 2);
      assert_int_equal(y, esp_f32_to_bf16(x));
    }
  }
  esp_st_close(exact);
  esp_st_close(rounded);
}

/* Splits the base's file in two shards with an index. */
static void shard_base(const char *dir) {
  esp_st *s;
  OK(esp_st_open(base, &s));
  OK(esp_mkdirs(dir));
  char path[300];
  json_t *map = json_object();
  for (int shard = 0; shard < 2; shard++) {
    char name[64];
    snprintf(name, sizeof name, "model-%05d-of-00002.safetensors", shard + 1);
    esp_st_writer *w;
    OK(esp_st_writer_create(esp_path_join(path, sizeof path, dir, name), &w));
    for (int pass = 0; pass < 2; pass++)
      for (int i = shard; i < esp_st_count(s); i += 2) {
        const esp_st_entry *e = esp_st_at(s, i);
        if (pass == 0)
          OK(esp_st_writer_declare(w, e->name, e->dtype, e->ndim, e->shape));
        else
          OK(esp_st_writer_put(w, e->name, e->data, e->bytes));
        json_object_set_new(map, e->name, json_string(name));
      }
    OK(esp_st_writer_commit(w));
  }
  json_t *index = json_pack("{s:{},s:o}", "metadata", "weight_map", map);
  OK(esp_json_save(esp_path_join(path, sizeof path, dir, "model.safetensors.index.json"), index, 1));
  json_decref(index);
  char src[300];
  OK(esp_copy_file(esp_path_join(src, sizeof src, base, "config.json"),
                   esp_path_join(path, sizeof path, dir, "config.json")));
  esp_st_close(s);
}

static void shards_stay_shards(void **state) {
  (void)state;
  paths("qwen");
  char sharded[256], path[300];
  snprintf(sharded, sizeof sharded, "%s", fx_path("sharded"));
  shard_base(sharded);
  snprintf(base, sizeof base, "%s", sharded);
  make_lora(&(esp_adapter_cfg){.type = "lora", .r = 4, .alpha = 8, .target_regex = "all-linear", .bias = "none"},
            with_adapter);
  const char *list[] = {lora};
  esp_merge_spec spec = {.base = base, .adapters = list, .n_adapters = 1, .out = merged};
  OK(esp_merge_write(&spec, NULL));
  assert_true(esp_file_exists(esp_path_join(path, sizeof path, merged, "model-00002-of-00002.safetensors")));
  assert_true(esp_file_exists(esp_path_join(path, sizeof path, merged, "model.safetensors.index.json")));
  logits_of(merged, NULL, after);
  assert_true(fx_rel(after, with_adapter, FX_T * FX_VOCAB) < 2e-6);
}

static void extraction_gives_the_adapter_back(void **state) {
  (void)state;
  static const char *const families[] = {"qwen", "gpt2"};
  for (int i = 0; i < 2; i++) {
    paths(families[i]);
    make_lora(&(esp_adapter_cfg){.type = "lora", .r = 3, .alpha = 6, .target_regex = "all-linear", .bias = "none"},
              with_adapter);
    const char *list[] = {lora};
    esp_merge_spec spec = {.base = base, .adapters = list, .n_adapters = 1, .out = merged};
    OK(esp_merge_write(&spec, NULL));
    esp_svd_stats stats;
    OK(esp_extract_write(base, merged, other, 3, NULL, &stats));
    assert_true(stats.sites >= 8 && stats.max_error < 1e-3);
    logits_of(base, other, after);
    assert_true(fx_rel(after, with_adapter, FX_T * FX_VOCAB) < 1e-4);
    OK(esp_remove_tree(other));
    OK(esp_extract_write(base, merged, other, 1, NULL, &stats));
    assert_true(stats.max_error > 0.1 && stats.max_error < 1); /* a rank too small shows in the error */
  }
}

static void vllm_export_is_uniform(void **state) {
  (void)state;
  static const esp_pattern ranks[] = {{"q_proj", 5}}, alphas[] = {{"v_proj", 3}};
  paths("qwen");
  make_lora(&(esp_adapter_cfg){.type = "lora",
                               .r = 4,
                               .alpha = 8,
                               .rslora = true,
                               .target_regex = "all-linear",
                               .bias = "none",
                               .rank_pattern = ranks,
                               .n_rank_pattern = 1,
                               .alpha_pattern = alphas,
                               .n_alpha_pattern = 1},
            with_adapter);
  esp_svd_stats stats;
  OK(esp_export_write(base, lora, other, false, true, 0, &stats));
  esp_arena *arena = esp_arena_create(ESP_MEM_HOST);
  esp_adapter_cfg cfg;
  OK(esp_adapter_cfg_load(other, arena, &cfg));
  assert_int_equal(cfg.r, 8);
  assert_true(cfg.alpha == 8 && !cfg.rslora && cfg.n_rank_pattern == 0 && cfg.n_alpha_pattern == 0);
  esp_arena_destroy(arena);
  logits_of(base, other, after);
  assert_true(fx_rel(after, with_adapter, FX_T * FX_VOCAB) < 2e-6);
}

static void refusals(void **state) {
  (void)state;
  static const char *const save[] = {"lm_head"};
  paths("qwen");
  make_lora(&(esp_adapter_cfg){.type = "lora",
                               .r = 2,
                               .alpha = 2,
                               .target_regex = ".*q_proj",
                               .bias = "none",
                               .modules_to_save = save,
                               .n_modules_to_save = 1},
            NULL);
  esp_svd_stats stats;
  assert_int_equal(esp_export_write(base, lora, other, false, true, 0, &stats), ESP_ERR_RECIPE);
  assert_non_null(strstr(esp_error_message(), "lm_head"));
  assert_false(esp_dir_exists(other));
  assert_int_equal(esp_extract_write(base, base, other, 2, "nothing", &stats), ESP_ERR_RECIPE);
  assert_non_null(strstr(esp_error_message(), "nothing"));
  const char *list[] = {lora};
  esp_merge_spec spec = {.base = base, .adapters = list, .n_adapters = 1, .out = merged, .dtype = "int8"};
  assert_int_equal(esp_merge_write(&spec, NULL), ESP_ERR_RECIPE);
  assert_false(esp_dir_exists(merged));
  spec.dtype = NULL;
  spec.base = fx_path("absent");
  assert_int_equal(esp_merge_write(&spec, NULL), ESP_ERR_DATA);
}

static int setup(void **state) {
  (void)state;
  fx_setup();
  return 0;
}
static int teardown(void **state) {
  (void)state;
  fx_teardown();
  return 0;
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(merged_equals_unmerged),
      cmocka_unit_test(weights_scale_and_unmerge_is_the_base),
      cmocka_unit_test(tied_head_is_untied),
      cmocka_unit_test(embedding_is_untied),
      cmocka_unit_test(rounded_once),
      cmocka_unit_test(shards_stay_shards),
      cmocka_unit_test(extraction_gives_the_adapter_back),
      cmocka_unit_test(vllm_export_is_uniform),
      cmocka_unit_test(refusals),
  };
  return cmocka_run_group_tests_name("merge", tests, setup, teardown);
}
