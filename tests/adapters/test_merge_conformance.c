/* Conformance of adapter kinds (conformance.h has all statements): merging, for every row whose kind merges.
 * Mutation seen to be caught: site_scale in lora_materialise without s fails "types". */
#include "conformance.h"

#include "merge/merge.h"

static char base[256], first[256], second[256], merged[256], again[256];

static void saved(const row *w, const char *dir, uint64_t seed) {
  fx_run r;
  fx_open(&r, fx_path(w->base), ESP_F32, false);
  esp_adapter *a = attach(&r, w, "default", true);
  fx_shake(a, 0.1f, seed);
  OK(esp_adapter_save(a, dir));
  esp_adapter_destroy(a);
  fx_close(&r);
}

static void paths(const row *w) {
  snprintf(base, sizeof base, "%s", fx_path(w->base));
  snprintf(first, sizeof first, "%s", fx_path("first"));
  snprintf(second, sizeof second, "%s", fx_path("second"));
  snprintf(merged, sizeof merged, "%s", fx_path("merged"));
  snprintf(again, sizeof again, "%s", fx_path("again"));
}

static void clean(void) {
  const char *const dirs[] = {first, second, merged, again};
  for (int i = 0; i < 4; i++)
    if (esp_dir_exists(dirs[i])) OK(esp_remove_tree(dirs[i]));
}

static esp_status merge(const char *onto, const char *a, const char *b, const char *out, const char *dtype) {
  const char *list[] = {a, b};
  esp_merge_spec spec = {.base = onto, .adapters = list, .n_adapters = b ? 2 : 1, .out = out, .dtype = dtype};
  return esp_merge_write(&spec, NULL);
}

static const char *weights(const char *dir) {
  static char path[2][300];
  static int at;
  at = !at;
  snprintf(path[at], sizeof path[at], "%s/model.safetensors", dir);
  return path[at];
}

static bool skipped(const row *w) { /* a whole model is not merged into one */
  return !merges(w) || whole(w) || left_out((int)(w - rows));
}

/* Merged twice: the same bytes. The base is as it was, to the bit: what was merged is taken out by taking it again. */
static void twice(void **state) {
  for (int i = 0; i < N_ROWS; i++) {
    char *before, *after;
    size_t n, m;
    if (skipped(&rows[i])) continue;
    paths(&rows[i]);
    OK(esp_file_read(weights(base), &before, &n));
    saved(&rows[i], first, 41);
    OK(merge(base, first, NULL, merged, NULL));
    OK(merge(base, first, NULL, again, NULL));
    same_file(weights(merged), weights(again), rows[i].name);
    OK(esp_file_read(weights(base), &after, &m));
    if (n != m || memcmp(before, after, n) != 0) fail_msg("%s: merging changed the base", rows[i].name);
    esp_mem_free(before);
    esp_mem_free(after);
    clean();
  }
}

static float *tensor(esp_st *st, const esp_st_entry *like, int64_t *n) {
  const esp_st_entry *e = esp_st_find(st, like->name);
  if (!e) fail_msg("no '%s'", like->name);
  *n = e->bytes / (int64_t)esp_dtype_size(e->dtype);
  float *x = malloc((size_t)*n * sizeof *x);
  esp_convert(x, ESP_F32, e->data, e->dtype, *n);
  return x;
}

/* Into a base of 16 bits: each tensor keeps its type and is the exact sum, which merging in fp32 gives, rounded once,
 * to the bit. A base with its adapter and the merged one differ by what rounding makes of it. */
static void halves(const char *type) {
  static float y[N_LOGITS], z[N_LOGITS];
  esp_dtype dtype = strcmp(type, "bf16") == 0 ? ESP_BF16 : ESP_F16;
  fx_batch f;
  fx_fill(&f);
  for (int i = 0; i < N_ROWS; i++) {
    bool first_of_kind = i == 0 || strcmp(rows[i - 1].cfg.type, rows[i].cfg.type) != 0;
    if (skipped(&rows[i]) || (dtype == ESP_F16 && !first_of_kind)) continue;
    paths(&rows[i]);
    char half[256], plain[256];
    snprintf(half, sizeof half, "%s", fx_path("half"));
    snprintf(plain, sizeof plain, "%s", fx_path("plain"));
    const char *zero = fx_path("zero");
    if (esp_dir_exists(half)) OK(esp_remove_tree(half));
    if (esp_dir_exists(plain)) OK(esp_remove_tree(plain));
    fx_run r;
    esp_adapter *a;
    fx_open(&r, base, ESP_F32, false); /* a LoRA that does nothing: the base in another type */
    const char *const any[] = {strcmp(rows[i].base, "gpt2") == 0 ? "c_attn" : "q_proj"};
    OK(esp_adapter_create(r.m, &(esp_adapter_cfg){.type = "lora", .r = 1, .alpha = 1, .target = any, .n_target = 1},
                          "default", false, &a));
    OK(esp_adapter_save(a, zero));
    esp_adapter_destroy(a);
    fx_close(&r);
    OK(merge(base, zero, NULL, half, type));
    OK(esp_remove_tree(zero));
    row on = rows[i];
    fx_open(&r, half, ESP_F32, false);
    a = attach(&r, &on, "default", true);
    fx_shake(a, 0.1f, 42);
    fx_logits(&r, &f.b, y);
    OK(esp_adapter_save(a, first));
    esp_adapter_destroy(a);
    fx_close(&r);
    OK(merge(half, first, NULL, merged, NULL));
    OK(merge(half, first, NULL, again, "fp32"));
    esp_st *sm, *sf;
    OK(esp_st_open(weights(merged), &sm));
    OK(esp_st_open(weights(again), &sf));
    for (int k = 0; k < esp_st_count(sm); k++) {
      const esp_st_entry *e = esp_st_at(sm, k);
      int64_t n, m;
      float *x = tensor(sm, e, &n), *exact = tensor(sf, e, &m);
      if (e->dtype != dtype) fail_msg("%s: %s is not %s any more", rows[i].name, e->name, type);
      assert_int_equal(n, m);
      for (int64_t q = 0; q < n; q++) {
        uint16_t rounded;
        float back;
        esp_convert(&rounded, dtype, &exact[q], ESP_F32, 1);
        esp_convert(&back, ESP_F32, &rounded, dtype, 1);
        if (x[q] != back) fail_msg("%s: %s: %.9g became %.9g", rows[i].name, e->name, (double)exact[q], (double)x[q]);
      }
      free(x);
      free(exact);
    }
    esp_st_close(sm);
    esp_st_close(sf);
    base_logits(again, &f.b, z);
    double d = fx_rel(z, y, N_LOGITS);
    if (!(d < 4e-6)) fail_msg("%s: merged in fp32 into a base of %s: %g away", rows[i].name, type, d);
    base_logits(merged, &f.b, z);
    d = fx_rel(z, y, N_LOGITS);
    if (!(d < 0.03)) fail_msg("%s: merged into a base of %s: %g away", rows[i].name, type, d);
    OK(esp_remove_tree(half));
    clean();
  }
}

static void types(void **state) {
  halves("bf16");
  halves("fp16");
}

/* An adapter with a value that is not finite: nothing is written, no part of it. */
static void not_finite(void **state) {
  for (int i = 0; i < N_ROWS; i++) {
    if (skipped(&rows[i])) continue;
    paths(&rows[i]);
    saved(&rows[i], first, 43);
    char path[300];
    char *bytes;
    size_t n;
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", first);
    esp_st *st;
    OK(esp_st_open(path, &st));
    const esp_st_entry *e = NULL, *last = esp_st_at(st, 0);
    for (int k = 0; k < esp_st_count(st); k++) {
      const esp_st_entry *t = esp_st_at(st, k);
      if ((const char *)t->data > (const char *)last->data) last = t;
      if (t->dtype == ESP_F32 && t->bytes > 0) e = t;
    }
    assert_non_null(e);
    size_t from_end = (size_t)((const char *)last->data + last->bytes - (const char *)e->data);
    OK(esp_file_read(path, &bytes, &n));
    memcpy(bytes + n - from_end, &(float){INFINITY}, sizeof(float));
    esp_st_close(st);
    OK(esp_file_write_atomic(path, bytes, n));
    esp_mem_free(bytes);
    esp_status status = merge(base, first, NULL, merged, NULL);
    if (status != ESP_ERR_DATA || !strstr(esp_error_message(), "finite"))
      fail_msg("%s: status %d: %s", rows[i].name, (int)status, esp_error_message());
    assert_false(esp_dir_exists(merged));
    clean();
  }
}

/* The adapter's file without the fingerprint of its base, as PEFT writes it: it may be loaded on another one. */
static void without_base(const char *dir) {
  char path[300], copy[300];
  esp_st *f;
  esp_st_writer *w;
  snprintf(path, sizeof path, "%s/adapter_model.safetensors", dir);
  snprintf(copy, sizeof copy, "%s/copy.safetensors", dir);
  OK(esp_st_open(path, &f));
  OK(esp_st_writer_create(copy, &w));
  for (int pass = 0; pass < 2; pass++)
    for (int i = 0; i < esp_st_count(f); i++) {
      const esp_st_entry *e = esp_st_at(f, i);
      if (pass)
        OK(esp_st_writer_put(w, e->name, e->data, e->bytes));
      else
        OK(esp_st_writer_declare(w, e->name, e->dtype, e->ndim, e->shape));
    }
  OK(esp_st_writer_commit(w));
  esp_st_close(f);
  assert_int_equal(rename(copy, path), 0);
}

/* One after the other, onto what the first gave, is both at once, where both may be active at once. What reads the base
 * at its start (a skeleton of it, lengths of its rows) is another adapter on another base, and is merged first. */
static void one_by_one(void **state) {
  static float y[N_LOGITS], z[N_LOGITS];
  fx_batch f;
  fx_fill(&f);
  int checked = 0;
  for (int i = 0; i < N_ROWS; i++) {
    const row *lora = lora_of(&rows[i]);
    if (skipped(&rows[i])) continue;
    paths(&rows[i]);
    saved(&rows[i], first, 44);
    saved(lora, second, 45);
    if (merge(base, first, second, again, NULL) == ESP_OK) {
      base_logits(again, &f.b, y);
      OK(merge(base, first, NULL, merged, NULL));
      OK(esp_remove_tree(again));
      without_base(second);
      OK(merge(merged, second, NULL, again, NULL));
      base_logits(again, &f.b, z);
      double d = fx_rel(z, y, N_LOGITS);
      if (!(d < 2e-6)) fail_msg("%s and %s one by one: %g away", rows[i].name, lora->name, d);
      checked++;
    } else if (!strstr(esp_error_message(), "both") && !strstr(esp_error_message(), "in full")) {
      fail_msg("%s and %s: %s", rows[i].name, lora->name, esp_error_message());
    }
    clean();
  }
  assert_true(checked > (test_quick() ? 5 : 30));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(twice),
      cmocka_unit_test(types),
      cmocka_unit_test(not_finite),
      cmocka_unit_test(one_by_one),
  };
  fx_setup();
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
