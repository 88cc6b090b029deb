/* The model against itself: finite differences through the whole of it, checkpointing on and off, cached decoding and
 * plain forward, packed and unpacked weights, accumulation, bf16, and the counting backend's stack.
 * Mutation seen to fail: dropping `need_dx` in attention.c's norm backward (dr is left without its share) fails the
 * finite differences of the embedding. */
#include "golden/model_fixture.h"

#include "core/rng.h"
#include "core/threads.h"

static double step(fx *f, esp_ckpt_mode ckpt, bool train, double *wsum) {
  esp_loss_out out;
  double w = fx_weight_sum(f);
  FX_OK(esp_model_step(f->m, &f->stack, &f->b, ckpt, train, (float)(1.0 / w), 1, 1, &out, NULL));
  if (wsum) *wsum = w;
  return out.loss_sum / w;
}

/* d loss along a random direction of one parameter at a time, against <gradient, direction>. */
static void finite_differences(const char *family) {
  fx f;
  fx_open(&f, family, test_backend_name(), ESP_F32);
  fx_train_all(&f);
  FX_OK(esp_model_load_weights(f.m));
  esp_params_zero_grad(f.ps);
  step(&f, ESP_CKPT_OFF, true, NULL);
  int bad = 0;
  for (int p = 0; p < f.ps->count; p++) {
    int64_t n = f.ps->list[p].numel;
    float *w = calloc((size_t)n * 3, sizeof *w), *dir = w + n, *moved = dir + n;
    esp_params_get(f.ps, p, w);
    float *g = fx_grad(&f, p);
    double dot = 0;
    for (int64_t i = 0; i < n; i++) {
      dir[i] = esp_rng_uniform(7, (uint64_t)p, (uint64_t)i) < 0.5f ? -1.0f : 1.0f;
      dot += (double)g[i] * (double)dir[i];
    }
    double h = 4e-3 / sqrt((double)n), loss[2];
    for (int k = 0; k < 2; k++) {
      for (int64_t i = 0; i < n; i++) moved[i] = w[i] + (float)(k ? -h : h) * dir[i];
      esp_params_set(f.ps, p, moved);
      loss[k] = step(&f, ESP_CKPT_OFF, false, NULL);
    }
    esp_params_set(f.ps, p, w);
    double numeric = (loss[0] - loss[1]) / (2 * h);
    /* fp32 logits carry about 1e-6 of the loss, divided by h */
    double tol = 2e-2 * fabs(dot) + 4e-6 / h;
    if (fabs(numeric - dot) > tol) {
      print_message("%s %s: %g against %g\n", family, f.ps->list[p].name, dot, numeric);
      bad++;
    }
    free(w);
    free(g);
  }
  assert_int_equal(bad, 0);
  fx_close(&f);
}
static void test_finite_differences(void **state) {
  for (int i = 0; i < FX_FAMILIES; i++) finite_differences(fx_families[i]);
}

static float *gradients(const char *family, esp_dtype compute, esp_ckpt_mode ckpt, int repeat, int64_t *n) {
  fx f;
  fx_open(&f, family, test_backend_name(), compute);
  fx_train_all(&f);
  FX_OK(esp_model_load_weights(f.m));
  for (int i = 0; i < repeat; i++) step(&f, ckpt, true, NULL);
  float *g = fx_grads(&f);
  *n = f.ps->total;
  fx_close(&f);
  return g;
}

static void test_checkpointing_is_bitwise(void **state) {
  for (int i = 0; i < FX_FAMILIES; i++)
    for (int k = 0; k < 2; k++) {
      int64_t n, n2;
      esp_dtype t = k ? ESP_BF16 : ESP_F32;
      float *off = gradients(fx_families[i], t, ESP_CKPT_OFF, 1, &n);
      float *on = gradients(fx_families[i], t, ESP_CKPT_FULL, 1, &n2);
      assert_int_equal(n, n2);
      assert_memory_equal(off, on, (size_t)n * sizeof *on);
      free(off);
      free(on);
    }
}

static void test_threads_change_nothing(void **state) {
  int64_t n, n2;
  FX_OK(esp_threads_init(1));
  float *one = gradients("qwen3", ESP_BF16, ESP_CKPT_OFF, 1, &n);
  FX_OK(esp_threads_init(3));
  float *three = gradients("qwen3", ESP_BF16, ESP_CKPT_OFF, 1, &n2);
  FX_OK(esp_threads_init(0));
  assert_memory_equal(one, three, (size_t)n * sizeof *one);
  free(one);
  free(three);
}

static void test_gradients_accumulate(void **state) {
  int64_t n;
  float *one = gradients("llama", ESP_F32, ESP_CKPT_OFF, 1, &n),
        *two = gradients("llama", ESP_F32, ESP_CKPT_OFF, 2, &n);
  for (int64_t i = 0; i < n; i++) one[i] *= 2.0f;
  assert_true(fx_rel(two, one, n) < 1e-6);
  free(one);
  free(two);
}

/* bf16 follows fp32 to what 8 bits of mantissa allow. */
static void test_bf16_is_near(void **state) {
  for (int i = 0; i < FX_FAMILIES; i++) {
    int64_t n, n2;
    float *a = gradients(fx_families[i], ESP_F32, ESP_CKPT_OFF, 1, &n);
    float *b = gradients(fx_families[i], ESP_BF16, ESP_CKPT_OFF, 1, &n2);
    double e = fx_rel(b, a, n);
    print_message("%-10s bf16 gradients %.2e\n", fx_families[i], e);
    assert_true(e > 0 && e < 0.05);
    free(a);
    free(b);
  }
}

static void all_logits(fx *f, const esp_batch *b, float *out) {
  int32_t rows[256];
  for (int i = 0; i < b->tokens; i++) rows[i] = i;
  FX_OK(esp_model_logits(f->m, &f->stack, b, rows, (int)b->tokens, out));
}

/* Each sequence of a packed row equals the same sequence alone. */
static void test_packed_is_unpacked(void **state) {
  for (int i = 0; i < FX_FAMILIES; i++) {
    fx f;
    fx_open(&f, fx_families[i], test_backend_name(), ESP_F32);
    FX_OK(esp_model_load_weights(f.m));
    int64_t v = esp_model_describe(f.m)->vocab;
    float *all = calloc((size_t)(f.b.tokens * v) * 2, sizeof *all), *one = all + f.b.tokens * v;
    all_logits(&f, &f.b, all);
    for (int s = 0; s < f.b.n_seqs; s++) {
      int32_t a = f.b.cu_seqlens[s], n = f.b.cu_seqlens[s + 1] - a, cu[2] = {0, n};
      esp_batch b = {.tokens = n, .ids = f.b.ids + a, .positions = f.b.positions + a, .cu_seqlens = cu, .n_seqs = 1};
      all_logits(&f, &b, one);
      assert_true(fx_rel(one, all + a * v, n * v) < 1e-5);
    }
    free(all);
    fx_close(&f);
  }
}

/* A group with one trained site next to frozen ones gives the loss of the frozen model, and so does a store of all. */
static void test_split_and_stacked_equal_packed(void **state) {
  for (int i = 0; i < FX_FAMILIES; i++) {
    fx a, b, c;
    fx_open(&a, fx_families[i], test_backend_name(), ESP_F32);
    fx_open(&b, fx_families[i], test_backend_name(), ESP_F32);
    fx_open(&c, fx_families[i], test_backend_name(), ESP_F32);
    fx_train_all(&b);
    fx_train_all(&c);
    esp_site **sites;
    int n = esp_model_sites(c.m, &sites);
    for (int s = 0; s < n; s++)
      if (s % 2 && !sites[s]->is_head) sites[s]->trained = NULL;
    double packed = step(&a, ESP_CKPT_OFF, false, NULL);
    assert_true(fabs(packed - step(&b, ESP_CKPT_OFF, false, NULL)) < 1e-5);
    assert_true(fabs(packed - step(&c, ESP_CKPT_OFF, true, NULL)) < 1e-5);
    /* the gradients of what is still trained are those of the full training */
    step(&b, ESP_CKPT_OFF, true, NULL);
    for (int s = 0; s < n; s++)
      if (sites[s]->trained && sites[s]->kind == ESP_SITE_LINEAR &&
          !(sites[s]->is_head && esp_model_describe(c.m)->tied)) {
        int p = sites[s]->trained_weight;
        float *gc = fx_grad(&c, p), *gb = fx_grad(&b, p);
        assert_true(fx_rel(gc, gb, c.ps->list[p].numel) < 1e-5);
        free(gc);
        free(gb);
      }
    /* switched off again: the base comes back */
    for (int s = 0; s < n; s++) sites[s]->trained = NULL;
    assert_true(fabs(packed - step(&c, ESP_CKPT_OFF, false, NULL)) < 1e-6);
    fx_close(&a);
    fx_close(&b);
    fx_close(&c);
  }
}

/* Prefill of a prefix and one token at a time against the plain forward of the whole; then with a cache of as many
 * bytes, which may lie where the first one lay, and another shape. */
static void decode_equals_forward(const char *family, esp_dtype compute, double tol) {
  fx f;
  fx_open(&f, family, test_backend_name(), compute);
  FX_OK(esp_model_load_weights(f.m));
  int64_t v = esp_model_describe(f.m)->vocab;
  float *all = calloc((size_t)((f.b.tokens + 2) * v), sizeof *all), *got = all + f.b.tokens * v;
  all_logits(&f, &f.b, all);
  int32_t ids[256], pos[256], cu[3] = {0, 4, 4 + 9};
  for (int s = 0; s < 2; s++)
    for (int i = cu[s]; i < cu[s + 1]; i++) pos[i] = i - cu[s];
  esp_batch prompt = {.tokens = 13, .ids = ids, .positions = pos, .cu_seqlens = cu, .n_seqs = 2};
  for (int shape = 0; shape < 2; shape++) {
    esp_kv *kv;
    FX_OK(esp_kv_create(f.m, shape ? 3 : 2, shape ? 20 : 30, &kv));
    for (int s = 0; s < 2; s++)
      for (int i = cu[s]; i < cu[s + 1]; i++) ids[i] = f.b.ids[f.b.cu_seqlens[s] + pos[i]];
    FX_OK(esp_model_prefill(f.m, &f.stack, kv, &prompt, got));
    int at[2] = {3, 8};
    for (int k = 0;; k++) {
      for (int s = 0; s < 2; s++) {
        double e = fx_rel(got + s * v, all + (f.b.cu_seqlens[s] + at[s]) * v, v);
        if (e >= tol) print_message("%s cache %d, token %d of sequence %d: %g\n", family, shape, at[s], s, e);
        assert_true(e < tol);
      }
      if (k == 7) break; /* sequence 0 has 11 tokens */
      for (int s = 0; s < 2; s++) ids[s] = f.b.ids[f.b.cu_seqlens[s] + ++at[s]];
      FX_OK(esp_model_decode(f.m, &f.stack, kv, ids, got));
    }
    esp_kv_destroy(kv);
  }
  free(all);
  fx_close(&f);
}
static void test_decode_equals_forward(void **state) {
  for (int i = 0; i < FX_FAMILIES; i++) {
    decode_equals_forward(fx_families[i], ESP_F32, 1e-5);
    decode_equals_forward(fx_families[i], ESP_BF16, 3e-2);
  }
}

/* The counting backend runs the same code: the same high-water mark, without a weight. */
static void test_count_measures_the_stack(void **state) {
  for (int i = 0; i < FX_FAMILIES; i++)
    for (int ckpt = 0; ckpt < 2; ckpt++) {
      fx a, c;
      fx_open(&a, fx_families[i], test_backend_name(), ESP_BF16);
      fx_open(&c, fx_families[i], test_count_name(), ESP_BF16);
      fx_train_all(&a);
      step(&a, (esp_ckpt_mode)ckpt, true, NULL);
      esp_loss_out out;
      FX_OK(esp_model_load_weights(c.m));
      FX_OK(esp_model_step(c.m, &c.stack, &c.b, (esp_ckpt_mode)ckpt, true, 1.0f, 1, 1, &out, NULL));
      assert_int_equal(a.stack.high, c.stack.high);
      assert_true(c.be->stats.flops > 0);
      fx_close(&a);
      fx_close(&c);
    }
}

/* Too small a stack is the step's error, not a crash. */
static void test_stack_overflow_is_an_error(void **state) {
  fx f;
  fx_open(&f, "llama", test_backend_name(), ESP_F32);
  esp_stack small;
  FX_OK(esp_stack_init(&small, f.be, 8192));
  esp_loss_out out;
  assert_int_equal(esp_model_step(f.m, &small, &f.b, ESP_CKPT_OFF, true, 1.0f, 1, 1, &out, NULL), ESP_ERR_MEMORY);
  esp_stack_deinit(&small);
  fx_close(&f);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_finite_differences),
      cmocka_unit_test(test_checkpointing_is_bitwise),
      cmocka_unit_test(test_threads_change_nothing),
      cmocka_unit_test(test_gradients_accumulate),
      cmocka_unit_test(test_bf16_is_near),
      cmocka_unit_test(test_packed_is_unpacked),
      cmocka_unit_test(test_split_and_stacked_equal_packed),
      cmocka_unit_test(test_decode_equals_forward),
      cmocka_unit_test(test_count_measures_the_stack),
      cmocka_unit_test(test_stack_overflow_is_an_error),
  };
  test_backend_or_exit();
  return cmocka_run_group_tests(tests, NULL, NULL);
}
