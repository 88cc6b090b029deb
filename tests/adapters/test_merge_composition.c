/* Several adapters on one base: every pair of kinds is its merge or is refused by name; sequences of one batch that
 * choose their adapter are computed, trained and continued as if theirs were the only one.
 * Mutation seen to be caught: without the limit to own rows in on_tails_bwd, "training_per_row" fails for lora. */
#include <math.h>

#include "eval/generate.h"
#include "kinds.h"
#include "merge/merge.h"

static float y[FX_T * FX_VOCAB], z[FX_T * FX_VOCAB], base_y[FX_T * FX_VOCAB];

static void save_fresh(const char *type, const char *more, const char *dir, uint64_t seed) {
  fx_run r;
  fx_open(&r, fx_path("qwen"), ESP_F32, false);
  esp_adapter *a = kinds_adapter(&r, type, more, "default", false, seed);
  if (esp_dir_exists(dir)) OK(esp_remove_tree(dir));
  OK(esp_adapter_save(a, dir));
  esp_adapter_destroy(a);
  fx_close(&r);
}

static void pairs(void **state) {
  (void)state;
  int n, allowed = 0, refused = 0;
  const char *const *names = esp_adapter_names(&n);
  fx_batch f;
  fx_fill(&f);
  char base[256], first[256], second[256], out[256];
  snprintf(base, sizeof base, "%s", fx_path("qwen"));
  snprintf(first, sizeof first, "%s", fx_path("first"));
  snprintf(second, sizeof second, "%s", fx_path("second"));
  snprintf(out, sizeof out, "%s", fx_path("pair"));
  for (int i = 0; i < n; i++) {
    if (strcmp(names[i], "none") == 0 || strcmp(names[i], "full") == 0) continue; /* nothing, or a whole model */
    save_fresh(names[i], "", first, 3);
    for (int k = 0; k < n; k++) {
      if (strcmp(names[k], "none") == 0 || strcmp(names[k], "full") == 0) continue;
      if (!esp_adapter_find(names[i])->mergeable || !esp_adapter_find(names[k])->mergeable) continue;
      save_fresh(names[k], "", second, 4);
      fx_run r;
      esp_adapter *list[2];
      fx_open(&r, base, ESP_F32, false);
      OK(esp_adapter_load(r.m, first, "one", false, &list[0]));
      OK(esp_adapter_load(r.m, second, "two", false, &list[1]));
      esp_status st = esp_adapters_activate(r.m, list, 2);
      if (st == ESP_OK) {
        const char *const dirs[] = {first, second};
        fx_logits(&r, &f.b, y);
        if (esp_dir_exists(out)) OK(esp_remove_tree(out));
        OK(esp_merge_write(&(esp_merge_spec){.base = base, .adapters = dirs, .n_adapters = 2, .out = out}, NULL));
      } else {
        assert_int_equal(st, ESP_ERR_RECIPE);
        if (!strstr(esp_error_message(), "one") && !strstr(esp_error_message(), "two"))
          fail_msg("%s and %s: no adapter is named: %s", names[i], names[k], esp_error_message());
        refused++;
      }
      for (int j = 0; j < 2; j++) esp_adapter_destroy(list[j]);
      fx_close(&r);
      if (st != ESP_OK) continue;
      fx_open(&r, out, ESP_F32, false);
      fx_logits(&r, &f.b, z);
      fx_close(&r);
      double d = fx_rel(y, z, FX_T * FX_VOCAB);
      if (!(d < 1e-5)) fail_msg("%s and %s: forward and merge differ by %g", names[i], names[k], d);
      allowed++;
    }
  }
  assert_true(allowed > 0 && refused > 0);
}

/* The same batch with one adapter (or none, NULL) on all rows. */
static void alone(fx_run *r, esp_adapter *a, const esp_batch *b, float *out) {
  OK(esp_adapters_activate(r->m, &a, a ? 1 : 0));
  fx_logits(r, b, out);
}

static void expect_rows(const char *kind, const char *what, const float *got, const float *want, int from, int to) {
  const float *g = got + from * FX_VOCAB, *w = want + from * FX_VOCAB;
  int64_t n = (to - from) * FX_VOCAB;
  /* Products run in another order where a group with tails beside others is one with fewer. */
  double d = fx_rel(g, w, n);
  bool exact = strcmp(kind, "lora") == 0;
  if (!(d <= (exact ? 0.0 : 2e-6))) fail_msg("%s: %s: rows %d to %d are %g away", kind, what, from, to, d);
}

static void rows_are_their_adapters(void **state) {
  (void)state;
  static float with_a[FX_T * FX_VOCAB], with_b[FX_T * FX_VOCAB];
  int n, chosen = 0, refused = 0;
  const char *const *names = esp_adapter_names(&n);
  fx_batch f;
  fx_fill(&f);
  for (int i = 0; i < n; i++) {
    fx_run r;
    if (strcmp(names[i], "none") == 0) continue;
    fx_open(&r, fx_path("qwen"), ESP_F32, false);
    bool single = esp_adapter_find(names[i])->alone; /* beside an adapter of other modules */
    esp_adapter *a = kinds_adapter(&r, names[i], "", "a", true, 5);
    bool embeds = single && esp_adapter_find(names[i])->site_kinds == 1u << ESP_SITE_EMBED;
    esp_adapter *b = kinds_adapter(&r, "lora", single && !embeds ? ", target: [embed_tokens]" : "", "b", true, 6),
                *list[] = {a, b};
    esp_batch batch = f.b;
    const int32_t ab[] = {0, 1}, ba[] = {1, 0}, none_a[] = {-1, 0};
    OK(esp_adapters_activate(r.m, list, 2));
    OK(esp_model_load_weights(r.m));
    batch.adapters = ab;
    int32_t row = 0;
    esp_status st = esp_model_logits(r.m, &r.stack, &batch, &row, 1, y);
    if (st != ESP_OK) {
      assert_int_equal(st, ESP_ERR_RECIPE);
      if (!strstr(esp_error_message(), "adapter 'a'") || !strstr(esp_error_message(), "per row"))
        fail_msg("%s: %s", names[i], esp_error_message());
      refused++;
    } else {
      chosen++;
      alone(&r, a, &f.b, with_a);
      alone(&r, b, &f.b, with_b);
      alone(&r, NULL, &f.b, base_y);
      if (!(fx_rel(with_a, base_y, FX_T * FX_VOCAB) > 1e-4)) fail_msg("%s has no effect", names[i]);
      OK(esp_adapters_activate(r.m, list, 2));
      fx_logits(&r, &batch, y);
      expect_rows(names[i], "a b", y, with_a, 0, 9);
      expect_rows(names[i], "a b", y, with_b, 9, FX_T);
      batch.adapters = ba;
      fx_logits(&r, &batch, y);
      expect_rows(names[i], "b a", y, with_b, 0, 9);
      expect_rows(names[i], "b a", y, with_a, 9, FX_T);
      batch.adapters = none_a;
      fx_logits(&r, &batch, y);
      expect_rows(names[i], "none a", y, base_y, 0, 9);
      expect_rows(names[i], "none a", y, with_a, 9, FX_T);
    }
    esp_adapter_destroy(a);
    esp_adapter_destroy(b);
    fx_close(&r);
  }
  assert_true(chosen > 0 && refused > 0);
}

static double worst(const float *a, const float *b, int64_t n) {
  return fx_max_abs(b, n) > 0 ? fx_rel(a, b, n) : fx_max_abs(a, n);
}

/* The gradient of each adapter is that of its own sequences, whatever stands beside them, recomputed or not. */
static void training_per_row(void **state) {
  (void)state;
  int n, trained = 0;
  const char *const *names = esp_adapter_names(&n);
  for (int i = 0; i < n; i++) {
    fx_run r;
    fx_batch f;
    const esp_adapter_kind *kind = esp_adapter_find(names[i]);
    if (kind->alone || !kind->targets || kind->product != ESP_PRODUCT_BASE) continue;
    for (int ckpt = 0; ckpt < 2; ckpt++) {
      esp_ckpt_mode mode = ckpt ? ESP_CKPT_FULL : ESP_CKPT_OFF;
      fx_fill(&f);
      fx_open(&r, fx_path("qwen"), ESP_F32, false);
      esp_adapter *a = kinds_adapter(&r, names[i], "", "a", true, 5);
      esp_adapter *b = kinds_adapter(&r, "lora", ", target: [embed_tokens, q_proj, down_proj]", "b", true, 6);
      esp_adapter *list[] = {a, b};
      const int32_t choice[] = {1, 0};
      esp_batch mixed = f.b;
      mixed.adapters = choice;
      OK(esp_adapters_activate(r.m, list, 2));
      double loss = fx_loss(&r, &mixed, true, mode, 0);
      float *ga = fx_grads(a), *gb = fx_grads(b), weights[FX_T];
      memcpy(weights, f.weights, sizeof weights);
      double apart = 0;
      for (int who = 0; who < 2; who++) { /* alone, with the labels of its own sequence only */
        int from = who ? 0 : 9, to = who ? 9 : FX_T;
        for (int t = 0; t < FX_T; t++) f.weights[t] = t >= from && t < to ? weights[t] : 0.0f;
        esp_params_zero_grad(list[who]->params);
        OK(esp_adapters_activate(r.m, &list[who], 1));
        apart += fx_loss(&r, &f.b, true, mode, 0);
        float *g = fx_grads(list[who]);
        double d = worst(who ? gb : ga, g, list[who]->params->total);
        if (!(d < 2e-5)) fail_msg("%s: the gradient of %s is %g away", names[i], list[who]->name, d);
        assert_true(fx_max_abs(g, list[who]->params->total) > 0);
        free(g);
      }
      if (!(fabs(loss - apart) < 1e-4)) fail_msg("%s: losses %g and %g", names[i], loss, apart);
      free(ga);
      free(gb);
      esp_adapter_destroy(a);
      esp_adapter_destroy(b);
      fx_close(&r);
    }
    trained++;
  }
  assert_true(trained > 0);
}

static void generation_per_row(void **state) {
  (void)state;
  fx_run r;
  int32_t prompt[3][4] = {{3, 9, 1, 22}, {7, 7, 30, 2}, {5, 40, 11, 6}}, choice[] = {1, -1, 0};
  esp_ids prompts[3], mixed[3] = {{0}}, one[3] = {{0}};
  for (int i = 0; i < 3; i++) prompts[i] = (esp_ids){.data = prompt[i], .n = 4, .cap = 4};
  fx_open(&r, fx_path("qwen"), ESP_F32, false);
  esp_adapter *list[] = {kinds_adapter(&r, "lora", "", "a", false, 5), kinds_adapter(&r, "lora", "", "b", false, 6)};
  for (int k = 0; k < 2; k++) fx_shake(list[k], 0.3f, 9 + (uint64_t)k); /* so that each continues in its own way */
  esp_gen_cfg cfg = {.max_new_tokens = 8, .adapters = choice};
  OK(esp_adapters_activate(r.m, list, 2));
  OK(esp_model_load_weights(r.m));
  OK(esp_generate(r.m, &r.stack, prompts, 3, &cfg, mixed));
  cfg.adapters = NULL;
  int differ = 0;
  for (int i = 0; i < 3; i++) {
    OK(esp_adapters_activate(r.m, choice[i] < 0 ? NULL : &list[choice[i]], choice[i] >= 0));
    for (int k = 0; k < 3; k++) one[k].n = 0;
    OK(esp_generate(r.m, &r.stack, prompts, 3, &cfg, one));
    assert_int_equal(mixed[i].n, 8);
    assert_memory_equal(mixed[i].data, one[i].data, 8 * sizeof(int32_t));
    for (int k = 0; k < 3; k++) differ += k != i && memcmp(mixed[k].data, one[k].data, 8 * sizeof(int32_t)) != 0;
  }
  assert_true(differ > 0);
  for (int i = 0; i < 3; i++) {
    esp_mem_free(mixed[i].data);
    esp_mem_free(one[i].data);
  }
  for (int k = 0; k < 2; k++) esp_adapter_destroy(list[k]);
  fx_close(&r);
}

static void refusals(void **state) {
  (void)state;
  static const struct {
    const char *more, *says;
  } cases[] = {
      {", modules_to_save: [model.norm]", "adapter 'a' (lora) trains model.norm in full"},
      {", bias: all", "in full"},
      {", target: [lm_head, q_proj]", "adapter 'a' (lora) is on lm_head"},
      {", trainable_tokens: [3, 5]", "adapter 'a' trains token rows"},
  };
  fx_batch f;
  fx_fill(&f);
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    fx_run r;
    fx_open(&r, fx_path("qwen"), ESP_F32, false);
    esp_adapter *a = kinds_adapter(&r, "lora", cases[i].more, "a", false, 5);
    int32_t choice[] = {0, -1}, row = 0;
    esp_batch b = f.b;
    b.adapters = choice;
    OK(esp_model_load_weights(r.m));
    assert_int_equal(esp_model_logits(r.m, &r.stack, &b, &row, 1, y), ESP_ERR_RECIPE); /* nothing is active */
    OK(esp_adapters_activate(r.m, &a, 1));
    assert_int_equal(esp_model_logits(r.m, &r.stack, &b, &row, 1, y), ESP_ERR_RECIPE);
    if (!strstr(esp_error_message(), cases[i].says)) fail_msg("%s: %s", cases[i].more, esp_error_message());
    choice[1] = 1;
    assert_int_equal(esp_model_logits(r.m, &r.stack, &b, &row, 1, y), ESP_ERR_RECIPE);
    assert_non_null(strstr(esp_error_message(), "sequence 2 chooses adapter 1 of 1"));
    esp_adapter_destroy(a);
    fx_close(&r);
  }
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
      cmocka_unit_test(pairs),
      cmocka_unit_test(rows_are_their_adapters),
      cmocka_unit_test(training_per_row),
      cmocka_unit_test(generation_per_row),
      cmocka_unit_test(refusals),
  };
  return cmocka_run_group_tests_name("composition", tests, setup, teardown);
}
