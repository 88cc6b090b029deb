/* Target matching, patterns and the errors of a configuration.
 * Mutation seen to be caught: suffix_match without the dot before the name fails "suffixes" and the PEFT case table. */
#include "../adapters/adapter_fixture.h"
#include "adapters/internal.h"
#include "io/json.h"

static bool matches(const esp_adapter_cfg *cfg, const char *path) {
  esp_site s = {.kind = ESP_SITE_LINEAR, .path = path, .is_head = strcmp(path, "lm_head") == 0};
  return esp_adapter_matches(cfg, &s);
}

static void suffixes(void **state) {
  const char *const names[] = {"q_proj", "mlp.up_proj"};
  esp_adapter_cfg c = {.target = names, .n_target = 2};
  assert_true(matches(&c, "model.layers.3.self_attn.q_proj"));
  assert_true(matches(&c, "q_proj"));
  assert_false(matches(&c, "model.layers.3.self_attn.xq_proj"));
  assert_true(matches(&c, "model.layers.3.mlp.up_proj"));
  assert_false(matches(&c, "model.layers.3.other.up_proj"));
}

static void all_linear(void **state) {
  const char *const names[] = {"All-Linear"}, *const skip[] = {"o_proj"};
  const int layers[] = {1};
  esp_adapter_cfg c = {.target = names, .n_target = 1, .exclude = skip, .n_exclude = 1};
  assert_true(matches(&c, "model.layers.0.mlp.up_proj"));
  assert_false(matches(&c, "model.layers.0.self_attn.o_proj"));
  assert_false(matches(&c, "lm_head"));
  c.layers = layers;
  c.n_layers = 1;
  assert_false(matches(&c, "model.layers.0.mlp.up_proj"));
  assert_true(matches(&c, "model.layers.1.mlp.up_proj"));
  esp_adapter_cfg regex = {.target_regex = "all-linear"};
  assert_true(matches(&regex, "model.layers.0.mlp.up_proj"));
}

/* get_pattern_key as PEFT answers it (tests/golden/make_peft.py). */
static void pattern_keys(void **state) {
  json_t *j, *c, *found;
  size_t i, k;
  OK(esp_json_load(ESP_SOURCE_DIR "/tests/golden/peft/targets.json", &j));
  const json_t *paths = json_object_get(j, "paths");
  int checked = 0;
  json_array_foreach(json_object_get(j, "patterns"), i, c) {
    const json_t *keys = json_object_get(c, "keys");
    esp_pattern list[8];
    for (k = 0; k < json_array_size(keys); k++)
      list[k] = (esp_pattern){json_string_value(json_array_get(keys, k)), (double)k};
    json_array_foreach(json_object_get(c, "found"), k, found) {
      const char *path = json_string_value(json_array_get(paths, k));
      double have = esp_pattern_value(list, (int)json_array_size(keys), path, -1);
      if (have != (double)json_integer_value(found))
        fail_msg("patterns %zu on %s: %g, PEFT %lld", i, path, have, (long long)json_integer_value(found));
      checked++;
    }
  }
  assert_true(checked > 100);
  json_decref(j);
}

static void refused(fx_run *r, esp_adapter_cfg cfg, const char *text) {
  esp_adapter *a = (esp_adapter *)r;
  if (!cfg.type) cfg.type = "lora";
  if (!cfg.r) cfg.r = 4;
  esp_status st = esp_adapter_create(r->m, &cfg, "default", true, &a);
  if (st != ESP_ERR_RECIPE || a || !strstr(esp_error_message(), text))
    fail_msg("wanted '%s', got status %d: %s", text, (int)st, esp_error_message());
}

#define T(...)                                                                                                         \
  .target = (const char *const[]){__VA_ARGS__}, .n_target = sizeof((const char *[]){__VA_ARGS__}) / sizeof(char *)
#define SAVE(...) .modules_to_save = (const char *const[]){__VA_ARGS__}, .n_modules_to_save = 1

static void errors(void **state) {
  fx_run r;
  fx_open(&r, fx_path("qwen"), ESP_F32, false);
  refused(&r, (esp_adapter_cfg){.type = "lroa", T("q_proj")}, "unknown kind 'lroa'");
  refused(&r, (esp_adapter_cfg){T("q_porj")}, "did you mean 'q_proj'");
  refused(&r, (esp_adapter_cfg){T("q_proj", "zzz")}, "'zzz' matches no module");
  refused(&r, (esp_adapter_cfg){.target_regex = "nothing"}, "matches no module");
  refused(&r, (esp_adapter_cfg){.target_regex = "(q_proj"}, "regular expression");
  refused(&r, (esp_adapter_cfg){.n_target = 0}, "names no module");
  refused(&r, (esp_adapter_cfg){T("norm")}, "norm");
  refused(&r, (esp_adapter_cfg){T("q_proj"), .dropout = 1.0}, "adapter.dropout");
  refused(&r, (esp_adapter_cfg){T("q_proj"), .r = -1}, "adapter.rank");
  refused(&r, (esp_adapter_cfg){T("q_proj"), .init = "pisa"}, "adapter.init: 'pisa'");
  refused(&r, (esp_adapter_cfg){T("q_proj"), .r = 3, .init = "orthogonal"}, "even rank");
  refused(&r, (esp_adapter_cfg){T("q_proj"), .r = 33, .alpha = 1, .init = "pissa"}, "rank of at most 32");
  refused(&r, (esp_adapter_cfg){T("embed_tokens"), .alpha = 1, .init = "pissa"}, "is an embedding");
  refused(&r, (esp_adapter_cfg){T("q_proj"), .bias = "some"}, "adapter.bias");
  refused(&r, (esp_adapter_cfg){T("o_proj"), .lora_bias = true}, "has no bias");
  refused(&r, (esp_adapter_cfg){T("q_proj"), SAVE("lm_haed")}, "'lm_haed' matches no module");
  refused(&r, (esp_adapter_cfg){T("q_proj"), SAVE("q_proj")}, "also in modules_to_save");
  refused(&r, (esp_adapter_cfg){T("q_proj"), .rank_pattern = (const esp_pattern[]){{"zz", 2}}, .n_rank_pattern = 1},
          "rank_pattern: 'zz'");
  refused(&r,
          (esp_adapter_cfg){T("q_proj"), .rank_pattern = (const esp_pattern[]){{"q_proj", 1.5}}, .n_rank_pattern = 1},
          "whole number");
  refused(&r, (esp_adapter_cfg){T("q_proj"), .trainable_tokens = (const int32_t[]){48}, .n_trainable_tokens = 1},
          "not in the vocabulary");
  refused(&r, (esp_adapter_cfg){T("q_proj"), .trainable_tokens = (const int32_t[]){4, 4}, .n_trainable_tokens = 2},
          "named twice");
  refused(&r, (esp_adapter_cfg){T("embed_tokens"), .trainable_tokens = (const int32_t[]){4}, .n_trainable_tokens = 1},
          "already targeted");
  refused(&r, (esp_adapter_cfg){.target_regex = ".*q_proj", .layers = (const int[]){1}, .n_layers = 1},
          "adapter.layers");
  refused(&r, (esp_adapter_cfg){T("q_proj"), .layers_pattern = "layers"}, "without layers");
  esp_adapter *a;
  assert_int_equal(esp_adapter_create(r.m, &(esp_adapter_cfg){.type = "none"}, "a.b", true, &a), ESP_ERR_RECIPE);
  OK(esp_adapter_create(r.m, &(esp_adapter_cfg){.type = "none"}, NULL, true, &a));
  assert_string_equal(a->name, "default");
  esp_adapter_destroy(a);
  fx_close(&r);
}

/* Moments and range of the starting values; equal seeds give equal values, other seeds others. */
static void starting_values(void **state) {
  fx_run r;
  fx_open(&r, fx_path("qwen"), ESP_F32, false);
  static const struct {
    const char *init;
    double var, max; /* of A [16, 32] */
  } want[] = {{"default", 1.0 / 96, 0.17677670}, {"gaussian", 1.0 / 256, 0.35}};
  for (int i = 0; i < 2; i++) {
    esp_adapter_cfg c = {
        .type = "lora", .r = 16, .alpha = 1, .init = want[i].init, .seed = 9, T("q_proj", "o_proj", "gate_proj")};
    esp_adapter *a, *b, *other;
    OK(esp_adapter_create(r.m, &c, "a", false, &a));
    OK(esp_adapter_create(r.m, &c, "b", false, &b));
    c.seed = 10;
    OK(esp_adapter_create(r.m, &c, "c", false, &other));
    size_t bytes = (size_t)a->params->total * sizeof(float);
    float *va = fx_masters(a), *vb = fx_masters(b), *vo = fx_masters(other);
    assert_memory_equal(va, vb, bytes);
    assert_true(memcmp(va, vo, bytes) != 0);
    double sum = 0, sq = 0, max = 0, up = 0;
    int64_t n = 0;
    for (int p = 0; p < a->params->count; p++) {
      const esp_param *q = &a->params->list[p];
      const float *x = va + q->offset;
      if (strstr(q->name, "lora_B")) {
        assert_int_equal(q->group, 1);
        up += fx_max_abs(x, q->numel);
        continue;
      }
      assert_int_equal(q->group, 0);
      for (int64_t k = 0; k < q->numel; k++, n++) {
        sum += x[k];
        sq += (double)x[k] * x[k];
      }
      double m = fx_max_abs(x, q->numel);
      max = m > max ? m : max;
    }
    assert_true(up == 0);
    double mean = sum / (double)n, var = sq / (double)n - mean * mean;
    if (!(mean * mean < 9 * want[i].var / (double)n) || !(var > 0.9 * want[i].var && var < 1.1 * want[i].var) ||
        !(max <= want[i].max))
      fail_msg("%s: mean %g, variance %g, largest %g", want[i].init, mean, var, max);
    free(va);
    free(vb);
    free(vo);
    esp_adapter_destroy(other);
    esp_adapter_destroy(b);
    esp_adapter_destroy(a);
  }
  fx_close(&r);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(suffixes), cmocka_unit_test(all_linear),
                                     cmocka_unit_test(pattern_keys), cmocka_unit_test(errors),
                                     cmocka_unit_test(starting_values)};
  fx_setup();
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
