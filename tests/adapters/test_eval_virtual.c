/* Virtual tokens from outside: what callers ask for is that of their own rows, generation with a cache is greedy
 * decoding without one, sequences that choose no such adapter or have no label are as they were, what is counted is
 * what is used, and what cannot be together is refused by name. Mutation seen to be caught: a cache without room for
 * the virtual tokens (esp_kv_create) fails "generation". */
#include <math.h>

#include "adapter_fixture.h"
#include "eval/generate.h"

#define TARGET(...)                                                                                                    \
  .target = (const char *const[]){__VA_ARGS__}, .n_target = sizeof((const char *[]){__VA_ARGS__}) / sizeof(char *)

static const struct {
  const char *name, *base;
  esp_adapter_cfg cfg;
} cases[] = {
    {"prompt", "qwen", {.type = "prompt", .virtual_tokens = 5, .seed = 3}},
    {"prompt, learned positions", "gpt2", {.type = "prompt", .virtual_tokens = 4, .seed = 3}},
    {"prefix", "qwen", {.type = "prefix", .virtual_tokens = 5, .seed = 3}},
    {"prefix, learned positions", "gpt2", {.type = "prefix", .virtual_tokens = 4, .seed = 3}},
    {"prefix through a network", "qwen", {.type = "prefix", .virtual_tokens = 5, .seed = 3, .prefix_projection = true}},
};
enum { N_CASES = sizeof cases / sizeof cases[0] };

static esp_adapter *add(fx_run *r, const esp_adapter_cfg *cfg, const char *name, float sd) {
  esp_adapter *a;
  OK(esp_adapter_create(r->m, cfg, name, true, &a));
  fx_shake(a, sd, 3);
  return a;
}

static void start(fx_run *r, int i, esp_adapter **a) {
  fx_open(r, fx_path(cases[i].base), ESP_F32, false);
  *a = add(r, &cases[i].cfg, "a", 0.5f);
  OK(esp_adapters_activate(r->m, a, 1));
  OK(esp_model_load_weights(r->m));
}

/* The likeliest next token of a sequence, computed without a cache. */
static int32_t next(fx_run *r, const int32_t *ids, int n, const int32_t *choice) {
  static float y[FX_VOCAB];
  int32_t positions[64], cu[2] = {0, n}, row = n - 1;
  for (int i = 0; i < n; i++) positions[i] = i;
  esp_batch b = {.tokens = n, .ids = ids, .positions = positions, .cu_seqlens = cu, .n_seqs = 1, .adapters = choice};
  OK(esp_model_logits(r->m, &r->stack, &b, &row, 1, y));
  int32_t best = 0;
  for (int32_t k = 1; k < FX_VOCAB; k++) best = y[k] > y[best] ? k : best;
  return best;
}

static void generation(void **state) {
  enum { N = 3, NEW = 9 };
  int32_t prompt[N][6] = {{3, 9, 1, 22}, {7, 7}, {5, 40, 11, 6, 30, 2}}, lens[N] = {4, 2, 6};
  for (int i = 0; i < N_CASES; i++)
    for (int chosen = 0; chosen < 2; chosen++) { /* by the second sequence only */
      fx_run r;
      esp_adapter *a;
      int32_t choice[N] = {-1, 0, -1};
      esp_ids prompts[N], out[N] = {{0}};
      int differ = 0;
      start(&r, i, &a);
      for (int s = 0; s < N; s++) prompts[s] = (esp_ids){.data = prompt[s], .n = lens[s], .cap = lens[s]};
      esp_gen_cfg cfg = {.max_new_tokens = NEW, .adapters = chosen ? choice : NULL};
      OK(esp_generate(r.m, &r.stack, prompts, N, &cfg, out));
      for (int s = 0; s < N; s++) {
        int32_t ids[32];
        memcpy(ids, prompt[s], (size_t)lens[s] * sizeof *ids);
        assert_int_equal(out[s].n, NEW);
        for (int k = 0; k < NEW; k++) {
          ids[lens[s] + k] = next(&r, ids, lens[s] + k, chosen ? &choice[s] : NULL);
          if (ids[lens[s] + k] != out[s].data[k])
            fail_msg("%s: sequence %d: token %d is %d, without a cache %d", cases[i].name, s, k, out[s].data[k],
                     ids[lens[s] + k]);
        }
        OK(esp_adapters_activate(r.m, NULL, 0));
        for (int k = 0; k < NEW; k++) differ += next(&r, ids, lens[s] + k, NULL) != ids[lens[s] + k];
        OK(esp_adapters_activate(r.m, &a, 1));
        esp_mem_free(out[s].data);
      }
      assert_true(differ > 0); /* from the base */
      esp_adapter_destroy(a);
      fx_close(&r);
    }
}

/* log p of the step against the logits of the same rows; a sequence without labels has no part in it. */
static void log_probabilities(void **state) {
  static float y[FX_T * FX_VOCAB], with[FX_T], base[FX_T];
  for (int i = 0; i < N_CASES; i++) {
    fx_run r;
    fx_batch f;
    esp_adapter *a;
    esp_loss_out out, again;
    fx_fill(&f);
    start(&r, i, &a);
    for (int t = 0; t < FX_T; t++) with[t] = base[t] = 77.0f;
    OK(esp_model_step(r.m, &r.stack, &f.b, ESP_CKPT_OFF, false, 1.0f, 1, 1, &out, with));
    fx_logits(&r, &f.b, y);
    double sum = 0;
    for (int t = 0; t < FX_T; t++) {
      double z = 0;
      for (int k = 0; k < FX_VOCAB; k++) z += exp((double)y[t * FX_VOCAB + k]);
      double want = y[t * FX_VOCAB + f.targets[t]] - log(z);
      if (f.weights[t] == 0.0f) assert_true(with[t] == 77.0f);
      if (f.weights[t] == 0.0f) continue;
      if (!(fabs(with[t] - want) < 1e-4)) fail_msg("%s: row %d: %g, from logits %g", cases[i].name, t, with[t], want);
      sum -= want;
    }
    assert_true(fabs(sum - out.loss_sum) < 1e-3);
    /* a sequence whose labels are gone stays out of the step, and nothing else changes */
    for (int t = 0; t < 9; t++) f.weights[t] = 0.0f;
    OK(esp_model_step(r.m, &r.stack, &f.b, ESP_CKPT_OFF, false, 1.0f, 1, 1, &again, base));
    for (int t = 9; t < FX_T; t++)
      if (f.weights[t] != 0.0f) assert_true(fabs((double)base[t] - with[t]) < 1e-5);
    esp_adapter_destroy(a);
    fx_close(&r);
  }
}

/* The gradient of two packed sequences is the sum of the gradients of each alone. */
static void packed(void **state) {
  for (int i = 0; i < N_CASES; i++)
    for (int ckpt = 0; ckpt < 2; ckpt++) {
      fx_run r;
      fx_batch f;
      esp_adapter *a;
      fx_fill(&f);
      start(&r, i, &a);
      fx_loss(&r, &f.b, true, ckpt ? ESP_CKPT_FULL : ESP_CKPT_OFF, 1);
      float *both = fx_grads(a);
      esp_params_zero_grad(a->params);
      for (int s = 0; s < 2; s++) {
        int32_t first = f.cu[s], cu[2] = {0, f.cu[s + 1] - first};
        esp_batch one = {.tokens = cu[1],
                         .ids = f.ids + first,
                         .targets = f.targets + first,
                         .positions = f.positions + first,
                         .weights = f.weights + first,
                         .cu_seqlens = cu,
                         .n_seqs = 1};
        fx_loss(&r, &one, true, ESP_CKPT_OFF, 1);
      }
      float *alone = fx_grads(a);
      double d = fx_rel(both, alone, a->params->total);
      if (!(d < 1e-5)) fail_msg("%s: the gradient of a packed row is %g away", cases[i].name, d);
      free(both);
      free(alone);
      esp_adapter_destroy(a);
      fx_close(&r);
    }
}

static void counted(void **state) {
  for (int i = 0; i < N_CASES; i++)
    for (int ckpt = 0; ckpt < 2; ckpt++) {
      fx_run r;
      fx_batch f;
      esp_adapter *a, *b;
      esp_backend *count;
      esp_model *m;
      esp_stack stack;
      esp_loss_out out;
      esp_ckpt_mode mode = ckpt ? ESP_CKPT_FULL : ESP_CKPT_OFF;
      fx_fill(&f);
      start(&r, i, &a);
      fx_loss(&r, &f.b, true, mode, 1);
      OK(esp_backend_create("count", &count));
      OK(esp_model_open(fx_path(cases[i].base), count, &(esp_model_options){.compute = ESP_F32}, &m));
      OK(esp_stack_init(&stack, count, 0));
      OK(esp_adapter_create(m, &cases[i].cfg, "a", true, &b));
      OK(esp_adapters_activate(m, &b, 1));
      OK(esp_model_load_weights(m));
      OK(esp_model_step(m, &stack, &f.b, mode, true, 1.0f, 1, 1, &out, NULL));
      assert_int_equal(a->params->total, b->params->total);
      assert_int_equal(r.stack.high, stack.high);
      esp_adapter_destroy(b);
      esp_stack_deinit(&stack);
      esp_model_close(m);
      esp_backend_destroy(count);
      esp_adapter_destroy(a);
      fx_close(&r);
    }
}

static void refuse(esp_status st, esp_status want, const char *says) {
  if (st != want || !strstr(esp_error_message(), says))
    fail_msg("wanted '%s', got status %d: %s", says, (int)st, esp_error_message());
}

static void refusals(void **state) {
  fx_run r;
  fx_batch f;
  fx_fill(&f);
  fx_open(&r, fx_path("qwen"), ESP_F32, false);
  const esp_adapter_cfg dora = {.type = "dora", .r = 2, .alpha = 2, TARGET("q_proj")};
  const esp_adapter_cfg tokens = {.type = "lora", .r = 2, .alpha = 2, TARGET("embed_tokens")};
  const esp_adapter_cfg lora = {.type = "lora", .r = 2, .alpha = 2, TARGET("q_proj", "v_proj")};
  esp_adapter *a = add(&r, &cases[0].cfg, "one", 0.1f);
  const esp_adapter_cfg *others[] = {&cases[0].cfg, &dora, &tokens, &cases[2].cfg};
  for (int k = 0; k < 4; k++) {
    esp_adapter *b = add(&r, others[k], "two", 0.1f), *list[] = {a, b};
    refuse(esp_adapters_activate(r.m, list, 2), ESP_ERR_RECIPE, "'one' (prompt)");
    refuse(esp_adapters_activate(r.m, list, 2), ESP_ERR_RECIPE, "cannot both be active");
    esp_adapter_destroy(b);
  }
  /* sums are fine beside it: both have an effect, and each trains */
  static float y[FX_T * FX_VOCAB], z[FX_T * FX_VOCAB];
  esp_adapter *b = add(&r, &lora, "two", 0.3f), *list[] = {a, b};
  OK(esp_adapters_activate(r.m, list, 2));
  fx_logits(&r, &f.b, y);
  fx_loss(&r, &f.b, true, ESP_CKPT_OFF, 1);
  for (int k = 0; k < 2; k++) {
    float *g = fx_grads(list[k]);
    assert_true(fx_max_abs(g, list[k]->params->total) > 1e-4);
    free(g);
    OK(esp_adapters_activate(r.m, &list[k], 1));
    fx_logits(&r, &f.b, z);
    assert_true(fx_rel(y, z, FX_T * FX_VOCAB) > 1e-3);
  }
  a->weight = 0.5;
  refuse(esp_adapters_activate(r.m, &a, 1), ESP_ERR_RECIPE, "adapter 'one': prompt has no weight other than 1");
  esp_adapter_destroy(a);
  esp_adapter_destroy(b);
  fx_close(&r);
  /* positions that the base does not have */
  fx_open(&r, fx_path("gpt2"), ESP_F32, false);
  esp_adapter_cfg wide = {.type = "prompt", .virtual_tokens = 64};
  refuse(esp_adapter_create(r.m, &wide, "a", true, &a), ESP_ERR_RECIPE,
         "adapter.virtual_tokens: 64 leave no room in the base's 64 positions");
  wide.virtual_tokens = 52;
  OK(esp_adapter_create(r.m, &wide, "a", true, &a));
  OK(esp_adapters_activate(r.m, &a, 1));
  OK(esp_model_load_weights(r.m));
  esp_loss_out out;
  refuse(esp_model_step(r.m, &r.stack, &f.b, ESP_CKPT_OFF, true, 1.0f, 1, 1, &out, NULL), ESP_ERR_DATA,
         "position 64 is outside the model's 64 learned positions");
  int32_t ids[4] = {1, 2, 3, 4};
  esp_ids prompt = {.data = ids, .n = 4, .cap = 4}, more = {0};
  esp_gen_cfg cfg = {.max_new_tokens = 9};
  refuse(esp_generate(r.m, &r.stack, &prompt, 1, &cfg, &more), ESP_ERR_DATA, "56 tokens and 9 new ones exceed");
  esp_adapter_destroy(a);
  fx_close(&r);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(generation), cmocka_unit_test(log_probabilities), cmocka_unit_test(packed),
      cmocka_unit_test(counted),    cmocka_unit_test(refusals),
  };
  fx_setup();
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
