/* Conformance of adapter kinds (conformance.h has all statements): how an adapter begins, lives beside others and ends.
 * Mutation seen to be caught: esp_adapter_destroy that does not give modules back to the base (no attach_modules in
 * `leave`) ends "base_mode" with a read of freed memory. */
#include "conformance.h"

static void same_bits(const float *got, const float *want, const row *w, const char *what) {
  if (memcmp(got, want, N_LOGITS * sizeof *got) != 0)
    fail_msg("%s: %s: %g away, not a bit was to differ", w->name, what, fx_rel(got, want, N_LOGITS));
}

/* A trained adapter switched off, on again, destroyed. A base that was rewritten for it stays so while it is open. */
static void base_mode(void **state) {
  static float base[N_LOGITS], y[N_LOGITS], z[N_LOGITS];
  fx_batch f;
  fx_fill(&f);
  for (int i = 0; i < N_ROWS; i++)
    for (int bf16 = 0; bf16 < 2 && !left_out(i); bf16++) {
      fx_run r;
      fx_open(&r, fx_path(rows[i].base), bf16 ? ESP_BF16 : ESP_F32, false);
      if (!rows[i].rewrites) fx_logits(&r, &f.b, base);
      esp_adapter *a = attach(&r, &rows[i], "default", true);
      fx_shake(a, 0.1f, 31);
      fx_logits(&r, &f.b, y);
      OK(esp_adapters_activate(r.m, NULL, 0));
      fx_logits(&r, &f.b, z);
      if (rows[i].rewrites) memcpy(base, z, sizeof z);
      same_bits(z, base, &rows[i], "switched off");
      OK(esp_adapters_activate(r.m, &a, 1));
      fx_logits(&r, &f.b, z);
      same_bits(z, y, &rows[i], "switched on again");
      fx_loss(&r, &f.b, true, ESP_CKPT_OFF, 0);
      esp_adapter_destroy(a);
      fx_logits(&r, &f.b, z);
      same_bits(z, base, &rows[i], "destroyed");
      fx_close(&r);
    }
}

static int64_t one_life(fx_run *r, const row *w, const esp_batch *b) {
  static float y[N_LOGITS];
  esp_mem_stats s;
  esp_adapter *a = attach(r, w, "default", true);
  fx_shake(a, 0.1f, 32);
  fx_loss(r, b, true, ESP_CKPT_OFF, 0);
  if (a->kind->before_step) a->kind->before_step(a, 0, 4);
  esp_adapter_destroy(a);
  fx_logits(r, b, y);
  OK(esp_backend_sync(r->be));
  esp_mem_stats_get(&s);
  return s.now_total + s.now_device;
}

/* What an adapter held is free, to the byte: the second life ends where the first did, by which time the base has
 * everything that it keeps. One of two that are active is destroyed: the other is as if it had been alone. */
static void destroyed(void **state) {
  static float y[N_LOGITS], z[N_LOGITS];
  fx_batch f;
  fx_fill(&f);
  for (int i = 0; i < N_ROWS; i++) {
    if (left_out(i)) continue;
    fx_run r;
    fx_open(&r, fx_path(rows[i].base), ESP_F32, false);
    esp_adapter *list[2];
    if (!rows[i].rewrites) {
      int64_t first = one_life(&r, &rows[i], &f.b), second = one_life(&r, &rows[i], &f.b);
      if (first != second) fail_msg("%s: %lld bytes are left", rows[i].name, (long long)(second - first));
    }
    fx_close(&r);
    fx_open(&r, fx_path(rows[i].base), ESP_F32, false);
    list[0] = attach(&r, &rows[i], "first", true);
    const row *lora = lora_of(&rows[i]);
    OK(esp_adapter_create(r.m, &lora->cfg, "second", true, &list[1]));
    if (esp_adapters_check(r.m, list, 2) != ESP_OK) {
      esp_adapter_destroy(list[1]);
      esp_adapter_destroy(list[0]);
      fx_close(&r);
      continue;
    }
    fx_shake(list[0], 0.1f, 33);
    fx_shake(list[1], 0.1f, 34);
    OK(esp_adapters_activate(r.m, &list[1], 1));
    fx_logits(&r, &f.b, y);
    OK(esp_adapters_activate(r.m, list, 2));
    fx_logits(&r, &f.b, z);
    assert_true(memcmp(y, z, sizeof y) != 0);
    esp_adapter_destroy(list[0]);
    fx_logits(&r, &f.b, z);
    same_bits(z, y, &rows[i], "the other one was destroyed");
    esp_adapter_destroy(list[1]);
    fx_close(&r);
  }
}

/* Of two that are active only the trainable one has gradients; one for inference has not even room for them; it
 * computes the same. */
static void gradients_of_whom(void **state) {
  static float y[N_LOGITS], z[N_LOGITS];
  fx_batch f;
  fx_fill(&f);
  for (int i = 0; i < N_ROWS; i++) {
    if (left_out(i)) continue;
    fx_run r;
    fx_open(&r, fx_path(rows[i].base), ESP_F32, false);
    esp_adapter *a = attach(&r, &rows[i], "default", true);
    fx_shake(a, 0.1f, 35);
    fx_logits(&r, &f.b, y);
    fx_loss(&r, &f.b, true, ESP_CKPT_OFF, 0);
    float *g = fx_grads(a);
    bool moved = fx_max_abs(g, a->params->total) > 0;
    free(g);
    if (!moved) fail_msg("%s: no gradient", rows[i].name);
    esp_adapter_destroy(a);
    fx_close(&r);
    fx_open(&r, fx_path(rows[i].base), ESP_F32, false);
    a = attach(&r, &rows[i], "default", false);
    fx_shake(a, 0.1f, 35);
    fx_logits(&r, &f.b, z);
    same_bits(z, y, &rows[i], "for inference");
    if (a->params->grad) fail_msg("%s: gradients of an adapter for inference", rows[i].name);
    esp_adapter *list[2] = {a, NULL};
    OK(esp_adapter_create(r.m, &lora_of(&rows[i])->cfg, "trained", true, &list[1]));
    if (esp_adapters_check(r.m, list, 2) == ESP_OK) {
      fx_shake(list[1], 0.1f, 36);
      OK(esp_adapters_activate(r.m, list, 2));
      fx_loss(&r, &f.b, true, ESP_CKPT_OFF, 0);
      g = fx_grads(list[1]);
      assert_true(fx_max_abs(g, list[1]->params->total) > 0);
      free(g);
    }
    esp_adapter_destroy(list[1]);
    esp_adapter_destroy(a);
    fx_close(&r);
  }
}

/* Adapters of one kind whose names contain each other, or a part of a parameter's name, do not touch each other. */
static void names_apart(void **state) {
  static const char *const names[] = {"default", "default2", "efaul", "lora"};
  static float y[4][N_LOGITS], z[N_LOGITS];
  fx_batch f;
  fx_fill(&f);
  for (int i = 0; i < N_ROWS; i++) {
    if (left_out(i)) continue;
    if (rows[i].rewrites) continue; /* each has a base of its own */
    fx_run r;
    esp_adapter *list[4];
    fx_open(&r, fx_path(rows[i].base), ESP_F32, false);
    for (int k = 0; k < 4; k++) {
      row w = rows[i];
      w.cfg.seed += (uint64_t)k; /* what a file does not hold is not shaken */
      list[k] = attach(&r, &w, names[k], k % 2 == 0);
      fx_shake(list[k], 0.1f, 40 + (uint64_t)k);
      fx_logits(&r, &f.b, y[k]);
    }
    for (int k = 3; k >= 0; k--) {
      OK(esp_adapters_activate(r.m, &list[k], 1));
      fx_logits(&r, &f.b, z);
      same_bits(z, y[k], &rows[i], names[k]);
      for (int o = 0; o < k; o++)
        if (memcmp(y[k], y[o], sizeof z) == 0)
          fail_msg("%s: '%s' and '%s' are the same", rows[i].name, names[k], names[o]);
      if (k == 2) esp_adapter_destroy(list[3]); /* and go away alone */
    }
    for (int k = 0; k < 3; k++) esp_adapter_destroy(list[k]);
    esp_adapter *bad;
    assert_int_equal(esp_adapter_create(r.m, &rows[i].cfg, "a.b", false, &bad), ESP_ERR_RECIPE);
    assert_non_null(strstr(esp_error_message(), "dots"));
    fx_close(&r);
  }
}

/* ---- the starts ---- */

static int by_value(const void *x, const void *y) {
  float a = *(const float *)x, b = *(const float *)y;
  return (a > b) - (a < b);
}

/* Kolmogorov and Smirnov's distance to a distribution; at most 1.36 / sqrt(n) in 95 of 100 draws. */
static double distance(float *x, int64_t n, double (*cdf)(double, double), double scale) {
  double worst = 0;
  qsort(x, (size_t)n, sizeof *x, by_value);
  for (int64_t k = 0; k < n; k++) {
    double p = cdf(x[k], scale);
    worst = fmax(worst, fmax(fabs(p - (double)k / (double)n), fabs(p - (double)(k + 1) / (double)n)));
  }
  return worst;
}

static double uniform_cdf(double x, double bound) {
  return fmin(1, fmax(0, (x + bound) / (2 * bound)));
}
static double normal_cdf(double x, double sd) {
  return 0.5 * erfc(-x / (sd * sqrt(2.0)));
}

static const struct {
  esp_adapter_cfg cfg;
  const char *leaf;
  double (*cdf)(double, double);
  double scale;
} starts[] = {
    {{LORA, NAMES("up_proj", "q_proj")}, "lora_A", uniform_cdf, 0.17677669529663687}, /* 1 / sqrt(32) */
    {{LORA, .init = "gaussian", NAMES("up_proj", "q_proj")}, "lora_A", normal_cdf, 0.25},
    {{.type = "lora", .r = 16, .alpha = 6, .seed = 5, NAMES("embed_tokens")}, "lora_embedding_B", normal_cdf, 1.0},
    {{DORA, NAMES("up_proj", "q_proj")}, "lora_A", uniform_cdf, 0.17677669529663687},
    {{ADALORA, NAMES("up_proj", "q_proj")}, "lora_A", normal_cdf, 0.02},
    {{ADALORA, NAMES("up_proj", "q_proj")}, "lora_B", normal_cdf, 0.02},
    {{LOHA, NAMES("up_proj", "q_proj")}, "hada_w1_b", uniform_cdf, 0.17677669529663687},
    {{LOHA, NAMES("up_proj", "q_proj")}, "hada_w1_a", uniform_cdf, 0.5773502691896258}};

/* Of the random starts, with a fixed seed. */
static void distributions(void **state) {
  for (size_t i = 0; i < sizeof starts / sizeof starts[0]; i++) {
    fx_run r;
    esp_adapter *a;
    int64_t n = 0;
    fx_open(&r, fx_path("qwen"), ESP_F32, false);
    OK(esp_adapter_create(r.m, &starts[i].cfg, "default", false, &a));
    float *all = fx_masters(a), *x = malloc((size_t)a->params->total * sizeof *x);
    for (int p = 0; p < a->params->count; p++) {
      const esp_param *q = &a->params->list[p];
      if (!strstr(q->name, starts[i].leaf)) continue;
      memcpy(x + n, all + q->offset, (size_t)q->numel * sizeof *x);
      n += q->numel;
    }
    double d = n ? distance(x, n, starts[i].cdf, starts[i].scale) : 1;
    if (!(d * sqrt((double)n) < 1.36))
      fail_msg("%s of %s: %g away from its distribution (%lld draws)", starts[i].leaf, starts[i].cfg.type, d,
               (long long)n);
    free(x);
    free(all);
    esp_adapter_destroy(a);
    fx_close(&r);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(base_mode),   cmocka_unit_test(destroyed),     cmocka_unit_test(gradients_of_whom),
      cmocka_unit_test(names_apart), cmocka_unit_test(distributions),
  };
  fx_setup();
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
