/* Real models that nobody of this project made (../shared/data/models): recorded logits, greedy tokens through the
 * cache, GPT-2 activations of the original program, and the loss per token over stories through the tokenizer.
 * Mutation seen to fail: transposing GPT-2's Conv1D weights no more (sites.c) breaks the sorter's logits. */
#include "golden/model_fixture.h"

#include "core/mem.h"
#include "io/json.h"
#include "text/tokenizer.h"

#define DATA ESP_SHARED_DIR "/data/"
static const char *const decoders[] = {"stories260K", "babyllama105", "tinystories-656k"};

static bool absent(void) {
  if (esp_dir_exists(DATA "models")) return false;
  print_message("skipped: %smodels is not here\n", DATA);
  return true;
}

static void open_real(fx *f, const char *name, esp_dtype compute) {
  char dir[512];
  snprintf(dir, sizeof dir, DATA "models/%s", name);
  fx_open_dir(f, dir, test_backend_name(), compute);
  FX_OK(esp_model_load_weights(f->m));
}

static int positions_to(int32_t *pos, int n) {
  for (int i = 0; i < n; i++) pos[i] = i;
  return n;
}

/* The ids of golden/greedy.json and the float32 rows of greedy_logits_f32.npy. */
static int load_greedy(const char *name, int32_t *ids, int *n_prompt, float **logits, int64_t *rows, int64_t vocab) {
  char path[512], *text;
  size_t n;
  json_t *j;
  snprintf(path, sizeof path, DATA "models/%s/golden/greedy.json", name);
  FX_OK(esp_json_load(path, &j));
  const json_t *a = json_object_get(j, "ids");
  int count = (int)json_array_size(a);
  for (int i = 0; i < count; i++) ids[i] = (int32_t)json_integer_value(json_array_get(a, (size_t)i));
  *n_prompt = (int)json_array_size(json_object_get(j, "prompt_ids"));
  json_decref(j);
  snprintf(path, sizeof path, DATA "models/%s/golden/greedy_logits_f32.npy", name);
  FX_OK(esp_file_read(path, &text, &n));
  size_t header = 10 + (size_t)(unsigned char)text[8] + 256 * (size_t)(unsigned char)text[9];
  *rows = (int64_t)((n - header) / 4) / vocab;
  *logits = malloc(n - header);
  memcpy(*logits, text + header, n - header);
  esp_mem_free(text);
  return count;
}

static void test_recorded_logits_and_greedy(void **state) {
  if (absent()) skip();
  for (size_t k = 0; k < sizeof decoders / sizeof *decoders; k++) {
    fx f;
    int32_t ids[512], pos[512], rows[512];
    int n_prompt;
    int64_t n_rows;
    float *want;
    open_real(&f, decoders[k], ESP_F32);
    int64_t v = esp_model_describe(f.m)->vocab;
    int count = load_greedy(decoders[k], ids, &n_prompt, &want, &n_rows, v);
    int32_t cu[2] = {0, positions_to(pos, (int)n_rows)};
    positions_to(rows, (int)n_rows);
    esp_batch b = {.tokens = n_rows, .ids = ids, .positions = pos, .cu_seqlens = cu, .n_seqs = 1};
    float *got = calloc((size_t)(n_rows * v), sizeof *got);
    FX_OK(esp_model_logits(f.m, &f.stack, &b, rows, (int)n_rows, got));
    double e = fx_rel(got, want, n_rows * v);
    print_message("%-16s logits %.2e\n", decoders[k], e);
    assert_true(e < 1e-4);

    esp_kv *kv;
    FX_OK(esp_kv_create(f.m, 1, count, &kv));
    cu[1] = n_prompt;
    b.tokens = n_prompt;
    FX_OK(esp_model_prefill(f.m, &f.stack, kv, &b, got));
    for (int t = n_prompt; t < count; t++) {
      int32_t best = 0;
      for (int32_t i = 1; i < v; i++)
        if (got[i] > got[best]) best = i;
      assert_int_equal(best, ids[t]);
      if (t + 1 < count) FX_OK(esp_model_decode(f.m, &f.stack, kv, &best, got));
    }
    print_message("%-16s %d greedy tokens equal\n", decoders[k], count - n_prompt);
    esp_kv_destroy(kv);
    free(got);
    free(want);
    fx_close(&f);
  }
}

static void test_gpt2_activations(void **state) {
  if (absent()) skip();
  fx f;
  open_real(&f, "gpt-nano-sort", ESP_F32);
  FX_OK(esp_st_open(DATA "models/gpt-nano-sort/golden/activations.safetensors", &f.expect));
  const float *idx = fx_data(&f, "idx");
  int32_t ids[33], pos[33], rows[33], cu[4] = {0, 11, 22, 33};
  float got[33 * 3];
  for (int i = 0; i < 33; i++) {
    ids[i] = (int32_t)idx[i];
    pos[i] = i % 11;
    rows[i] = i;
  }
  esp_batch b = {.tokens = 33, .ids = ids, .positions = pos, .cu_seqlens = cu, .n_seqs = 3};
  FX_OK(esp_model_logits(f.m, &f.stack, &b, rows, 33, got));
  double e = fx_rel(got, fx_data(&f, "lm_head"), 99);
  print_message("gpt-nano-sort    logits %.2e\n", e);
  assert_true(e < 1e-5);
  fx_close(&f);
}

/* Mean loss of the first 40 stories: BOS + encoding, cut to max_tokens (golden/tinystories_nll.json). */
static double stories_nll(const char *name, int64_t max_tokens, int n_stories, int64_t *predicted) {
  fx f;
  esp_tokenizer *tok;
  char dir[512], line[1 << 16];
  snprintf(dir, sizeof dir, DATA "models/%s", name);
  FX_OK(esp_tokenizer_load(dir, &tok));
  open_real(&f, name, ESP_F32);
  FILE *in = fopen(DATA "datasets/tinystories/stories.jsonl", "r");
  assert_non_null(in);
  double nll = 0;
  *predicted = 0;
  for (int s = 0; s < n_stories && fgets(line, sizeof line, in); s++) {
    json_t *j;
    FX_OK(esp_json_parse(line, strlen(line), "stories.jsonl", &j));
    const char *text = json_string_value(json_object_get(j, "text"));
    esp_ids ids = {0};
    FX_OK(esp_tokenizer_encode(tok, text, strlen(text), true, &ids));
    int n = (int)(ids.n < max_tokens ? ids.n : max_tokens);
    int32_t pos[512], cu[2] = {0, n};
    float weights[512];
    positions_to(pos, n);
    for (int i = 0; i < n; i++) weights[i] = i + 1 < n ? 1.0f : 0.0f;
    esp_batch b = {.tokens = n,
                   .ids = ids.data,
                   .targets = ids.data + 1,
                   .positions = pos,
                   .weights = weights,
                   .cu_seqlens = cu,
                   .n_seqs = 1};
    esp_loss_out out;
    FX_OK(esp_model_step(f.m, &f.stack, &b, ESP_CKPT_OFF, false, 1.0f, 1, 1, &out, NULL));
    nll += out.loss_sum;
    *predicted += n - 1;
    esp_ids_deinit(&ids);
    json_decref(j);
  }
  fclose(in);
  fx_close(&f);
  esp_tokenizer_destroy(tok);
  return nll / (double)*predicted;
}

static void test_stories_nll(void **state) {
  if (absent()) skip();
  json_t *j;
  FX_OK(esp_json_load(DATA "golden/tinystories_nll.json", &j));
  for (size_t k = 0; k < sizeof decoders / sizeof *decoders; k++) {
    const json_t *g = json_object_get(j, decoders[k]);
    if (test_quick() && k > 0) break; /* a mean over 40 stories: a minute of the simulation for each model */
    int64_t predicted;
    double want = json_number_value(json_object_get(g, "nll_per_token"));
    double got = stories_nll(decoders[k], json_integer_value(json_object_get(g, "max_tokens_per_story")),
                             (int)json_integer_value(json_object_get(g, "stories")), &predicted);
    print_message("%-16s %.6f per token over %lld, recorded %.6f\n", decoders[k], got, (long long)predicted, want);
    assert_int_equal(predicted, json_integer_value(json_object_get(g, "predicted_tokens")));
    assert_true(fabs(got - want) < 2e-6);
  }
  json_decref(j);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_recorded_logits_and_greedy),
      cmocka_unit_test(test_gpt2_activations),
      cmocka_unit_test(test_stories_nll),
  };
  test_backend_or_exit();
  return cmocka_run_group_tests(tests, NULL, NULL);
}
