/* The masks of fish and spu against the definition: gradients of every sequence alone, made by training the base in
 * full, squared and summed (fish) or summed and taken absolute (spu), sorted by brute force. And what a file must not
 * hold. Mutation seen to be caught: adding g instead of g * g to the score in see_site fails "fisher". */
#include <math.h>

#include "adapter_fixture.h"

enum { SIZE = 32 * 48 };
static const char *const names[] = {"layers.0.mlp.up_proj", "layers.1.mlp.up_proj"};

/* Scores of one matrix [out, in]. */
static void brute(const char *path, bool fisher, float *score) {
  fx_batch f;
  fx_fill(&f);
  fx_run r;
  fx_open(&r, fx_path("qwen"), ESP_F32, false);
  esp_adapter *a;
  OK(esp_adapter_create(r.m, &(esp_adapter_cfg){.type = "full"}, "default", true, &a));
  OK(esp_adapters_activate(r.m, &a, 1));
  char name[128];
  snprintf(name, sizeof name, "model.%s.weight", path);
  int p = esp_params_find(a->params, name);
  assert_true(p >= 0);
  memset(score, 0, SIZE * sizeof *score);
  for (int s = 0; s < 2; s++) {
    int32_t first = f.cu[s], n = f.cu[s + 1] - first, cu[2] = {0, n};
    esp_batch b = f.b;
    b.tokens = n, b.n_seqs = 1, b.cu_seqlens = cu;
    b.ids += first, b.targets += first, b.positions += first, b.weights += first;
    esp_params_zero_grad(a->params);
    fx_loss(&r, &b, true, ESP_CKPT_OFF, 0);
    float *g = fx_grads(a);
    const float *gp = g + a->params->list[p].offset;
    for (int k = 0; k < SIZE; k++) score[k] += fisher ? gp[k] * gp[k] : gp[k];
    free(g);
  }
  for (int k = 0; k < SIZE; k++) score[k] = fabsf(score[k]);
  esp_adapter_destroy(a);
  fx_close(&r);
}

static int descending(const void *x, const void *y) {
  float a = *(const float *)x, b = *(const float *)y;
  return (a < b) - (a > b);
}

static esp_adapter_cfg config(const char *kind) {
  return (esp_adapter_cfg){.type = kind, .r = 1, .sparse_density = 0.05, .target = names, .n_target = 2};
}

static esp_adapter *calibrated(fx_run *r, const char *kind) {
  fx_batch f;
  fx_fill(&f);
  esp_adapter_cfg cfg = config(kind);
  esp_adapter *a;
  OK(esp_adapter_create(r->m, &cfg, "default", true, &a));
  OK(esp_adapters_activate(r->m, &a, 1));
  assert_int_not_equal(esp_adapter_save(a, fx_path("early")), ESP_OK); /* there is no mask yet */
  OK(esp_model_load_weights(r->m));
  OK(esp_adapter_calibrate(a, &r->stack, &f.b, ESP_CKPT_FULL));
  OK(a->kind->seen(a));
  return a;
}

/* The entries that the adapter changes: shaken values show through materialise. */
static void changed(esp_adapter *a, fx_run *r, const char *path, bool *out) {
  char full[128];
  snprintf(full, sizeof full, "model.%s", path);
  esp_site *s = esp_model_find_site(r->m, full);
  assert_int_equal(s->out * s->in, SIZE);
  float w[SIZE] = {0};
  OK(esp_adapter_effective_rows(a, s, 0, s->out, w));
  for (int k = 0; k < SIZE; k++) out[k] = w[k] != 0.0f;
}

static void check_mask(const char *kind, bool fisher) {
  static float score[2][SIZE], sorted[2 * SIZE];
  static bool mask[2][SIZE];
  fx_run r;
  for (int i = 0; i < 2; i++) brute(names[i], fisher, score[i]);
  fx_open(&r, fx_path("qwen"), ESP_F32, false);
  esp_adapter *a = calibrated(&r, kind);
  fx_shake(a, 1.0f, 3);
  int64_t each = (int64_t)floor(0.05 * SIZE);
  for (int i = 0; i < 2; i++) changed(a, &r, names[i], mask[i]);
  for (int range = 0; range < (fisher ? 1 : 2); range++) { /* all together, or each matrix by itself */
    int first = fisher ? 0 : range, last = fisher ? 2 : range + 1, n = (last - first) * SIZE, on = 0;
    memcpy(sorted, score[first], (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, descending);
    float limit = sorted[(last - first) * each - 1];
    for (int i = first; i < last; i++)
      for (int k = 0; k < SIZE; k++) {
        on += mask[i][k];
        /* the two ways round differently: entries at the very limit may go either way */
        if (mask[i][k] != (score[i][k] >= limit) && fabsf(score[i][k] - limit) > 1e-4f * limit)
          fail_msg("%s: entry %d of %s has score %g, limit %g: %s", kind, k, names[i], (double)score[i][k],
                   (double)limit, mask[i][k] ? "chosen" : "left out");
      }
    assert_int_equal(on, (last - first) * each);
  }
  esp_adapter_destroy(a);
  fx_close(&r);
}

static void fisher(void **state) {
  check_mask("fish", true);
}

static void gradient(void **state) {
  check_mask("spu", false);
}

/* Optimizer state, gradients and the file have the size of the mask. */
static void compact(void **state) {
  fx_run r;
  fx_open(&r, fx_path("qwen"), ESP_F32, false);
  esp_adapter *a = calibrated(&r, "fish");
  int64_t entries = 2 * (int64_t)floor(0.05 * SIZE);
  assert_int_equal(a->params->count, 1);
  assert_int_equal(a->params->list[0].numel, entries);
  assert_true(a->params->total < entries + 16);
  esp_adapter_destroy(a);
  fx_close(&r);
}

static void patched(const char *tensor, int at, int32_t value, const char *message) {
  fx_run r;
  fx_open(&r, fx_path("qwen"), ESP_F32, false);
  esp_adapter *a = calibrated(&r, "fish"), *b;
  fx_shake(a, 1.0f, 3);
  OK(esp_adapter_save(a, fx_path("saved")));
  esp_adapter_destroy(a);
  char path[300];
  snprintf(path, sizeof path, "%s/adapter_model.safetensors", fx_path("saved"));
  esp_st *f;
  OK(esp_st_open(path, &f));
  const esp_st_entry *e = esp_st_find(f, tensor);
  assert_non_null(e);
  char *bytes;
  size_t n;
  OK(esp_file_read(path, &bytes, &n));
  const esp_st_entry *last = esp_st_at(f, 0); /* the mapping ends where the last tensor does */
  for (int i = 0; i < esp_st_count(f); i++)
    if ((const char *)esp_st_at(f, i)->data > (const char *)last->data) last = esp_st_at(f, i);
  size_t from_end = (size_t)((const char *)last->data + last->bytes - (const char *)e->data);
  memcpy(bytes + n - from_end + (size_t)at * 4, &value, 4);
  OK(esp_file_write_atomic(path, bytes, n));
  esp_mem_free(bytes);
  esp_st_close(f);
  assert_int_equal(esp_adapter_load(r.m, fx_path("saved"), "other", false, &b), ESP_ERR_DATA);
  if (!strstr(esp_error_message(), message)) fail_msg("'%s' does not say '%s'", esp_error_message(), message);
  fx_close(&r);
  OK(esp_remove_tree(fx_path("saved")));
}

static void damaged(void **state) {
  patched("base_model.model.sparse_columns", 3, 32, "column 32 in row");
  patched("base_model.model.sparse_columns", 0, -1, "column -1 in row");
  patched("base_model.model.sparse_rows", 5, 1 << 30, "entries in row 5");
  patched("base_model.model.sparse_rows", 2, -4, "-4 entries in row 2");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(fisher),
      cmocka_unit_test(gradient),
      cmocka_unit_test(compact),
      cmocka_unit_test(damaged),
  };
  fx_setup();
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
