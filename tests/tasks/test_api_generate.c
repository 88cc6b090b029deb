/* Generation as strategies get it: the argmax of full forwards, whatever lies in the batch, terminator included; and
 * sequence-level distillation, which trains on it.
 * Mutation seen caught: `keep` (seqkd.c) giving the prompt's tokens the weight of the answer's, and `generate`
 * (hooks.c) leaving first_row at 0. */
#include "api/api.h"
#include "strategy_fixture.h"

enum { PROMPTS = 40, NEW = 7 }; /* two batches of the hook */

static void prompts_of(const sf *f, esp_ids *out) {
  for (int i = 0; i < PROMPTS; i++) {
    const int32_t *ids;
    const float *w;
    int64_t n;
    esp_dataset_sample(f->data[i % SF_TASKS], i % SF_SAMPLES, &ids, &w, &n);
    out[i] = (esp_ids){(int32_t *)ids, esp_dataset_prompt_len(f->data[i % SF_TASKS], i % SF_SAMPLES), 0};
  }
}

static int32_t brute(sf *f, const int32_t *ids, int64_t n) {
  int32_t best = 0;
  int64_t vocab = esp_model_describe(f->r.m)->vocab;
  float *all = malloc((size_t)(n * vocab) * sizeof *all), *logits = all + (n - 1) * vocab;
  OK(esp_model_sequence_logits(f->r.m, &f->r.stack, ids, n, all));
  for (int32_t i = 1; i < vocab; i++)
    if (logits[i] > logits[best]) best = i;
  free(all);
  return best;
}

static void greedy(void **state) {
  static const esp_strategy_cfg none = {0};
  sf f;
  esp_ids prompts[PROMPTS], out[PROMPTS] = {0};
  sf_open(&f, NULL, &none);
  fx_shake(f.a, 0.05f, 4);
  prompts_of(&f, prompts);
  int32_t eos = esp_tokenizer_eos(f.tok);
  OK(esp_api_hooks.generate(&f.q, prompts, PROMPTS, NEW, 0, 1, out));
  for (int i = 0; i < PROMPTS; i++) {
    int32_t ids[64];
    int64_t n = prompts[i].n;
    memcpy(ids, prompts[i].data, (size_t)n * sizeof *ids);
    assert_true(out[i].n > 0 && (out[i].n == NEW || out[i].data[out[i].n - 1] == eos));
    for (int64_t k = 0; k < out[i].n; k++) {
      assert_int_equal(out[i].data[k], brute(&f, ids, n));
      assert_true(k + 1 == out[i].n || out[i].data[k] != eos);
      ids[n++] = out[i].data[k];
    }
  }
  /* drawn: not the same everywhere, the same again, and what is there before is cleared */
  esp_ids again[PROMPTS] = {0};
  int other = 0, apart = 0;
  OK(esp_api_hooks.generate(&f.q, prompts, PROMPTS, NEW, 2, 9, again));
  for (int i = 0; i < PROMPTS; i++)
    other += again[i].n != out[i].n || memcmp(again[i].data, out[i].data, (size_t)out[i].n * 4);
  OK(esp_api_hooks.generate(&f.q, prompts, PROMPTS, NEW, 2, 9, out));
  for (int i = 0; i < PROMPTS; i++) {
    assert_int_equal(again[i].n, out[i].n);
    assert_memory_equal(again[i].data, out[i].data, (size_t)out[i].n * 4);
  }
  assert_true(other > PROMPTS / 2);
  for (int i = 0; i < PROMPTS; i++) prompts[i] = prompts[0]; /* each row draws for itself, in every batch */
  OK(esp_api_hooks.generate(&f.q, prompts, PROMPTS, NEW, 2, 9, out));
  for (int i = 0; i + 32 < PROMPTS; i++)
    apart += out[i].n != out[i + 32].n || memcmp(out[i].data, out[i + 32].data, (size_t)out[i].n * 4);
  assert_true(apart > 4);
  for (int i = 0; i < PROMPTS; i++) esp_ids_deinit(&out[i]), esp_ids_deinit(&again[i]);
  sf_close(&f);
}

static void open_seqkd(sf *f, const esp_strategy_cfg *c) {
  static const esp_strategy_cfg none = {0};
  sf_open(f, NULL, &none);
  f->cfg = *c;
  f->q.generate = esp_api_hooks.generate;
  OK(esp_strategies_create(&f->cfg, f->r.be, &f->set));
  OK(esp_strategies_open(&f->set, &f->q));
}

/* The gradient of a step is that of the teacher's own answers; they do not change with the student. */
static void own_answers(void **state) {
  static const char *const only[] = {"seqkd"};
  esp_strategy_cfg c = {.names = only, .n = 1};
  c.seqkd.samples = 8, c.seqkd.max_new_tokens = NEW, c.seqkd.batch = 8, c.seqkd.weight = 0.5;
  sf f;
  open_seqkd(&f, &c);
  sf_task(&f, 0);
  fx_shake(f.a, 0.05f, 4);
  esp_strategy *s = &f.set.list[0];
  assert_null(esp_strategy_get(s, "ends", NULL));
  sf_task(&f, 1);
  int64_t n, total;
  const int64_t *ends = esp_strategy_get(s, "ends", &n);
  const int32_t *tokens = esp_strategy_get(s, "tokens", &total);
  const float *weights = esp_strategy_get(s, "weights", NULL);
  assert_true(n == 8 && ends[7] == total);
  esp_rows rows = {0};
  for (int64_t i = 0; i < n; i++) {
    int64_t begin = i ? ends[i - 1] : 0, at = begin;
    while (weights[at] == 0) at++;
    assert_true(at > begin + 1);
    for (; at < ends[i]; at++) {
      assert_true(weights[at] == 1);
      assert_int_equal(tokens[at], brute(&f, tokens + begin, at - begin));
    }
    OK(esp_rows_add(&rows, tokens + begin, weights + begin, ends[i] - begin));
  }
  fx_shake(f.a, 0.05f, 5);
  double weight = 0;
  esp_strategy_step t = {.scale = 0.25};
  esp_params_zero_grad(f.a->params);
  OK(esp_model_sums_reset(f.r.m));
  OK(esp_strategies_draw(&f.set, &f.q, &t, &weight));
  OK(esp_strategies_pass(&f.set, &f.q, &t));
  float *got = fx_grads(f.a);
  esp_params_zero_grad(f.a->params);
  esp_batch b = esp_sequence_batch(&rows);
  esp_loss_out out;
  OK(esp_model_step(f.r.m, &f.r.stack, &b, ESP_CKPT_OFF, true, 0.125f, 0, 0, &out, NULL));
  float *want = fx_grads(f.a);
  assert_true(fabs(weight - 0.5 * out.weight_sum) <= 1e-9 * weight);
  assert_true(fx_max_abs(want, f.a->params->total) > 0 && fx_rel(got, want, f.a->params->total) < 1e-4);
  free(got), free(want);
  esp_rows_deinit(&rows);
  sf_close(&f);
}

static void refusals(void **state) {
  static const char *const only[] = {"seqkd"};
  esp_strategy_cfg c = {.names = only, .n = 1};
  c.seqkd.samples = 8, c.seqkd.max_new_tokens = 64, c.seqkd.batch = 8, c.seqkd.weight = 1;
  sf f;
  open_seqkd(&f, &c);
  f.q.task = 1;
  assert_int_equal(esp_strategies_task_begin(&f.set, &f.q), ESP_ERR_DATA);
  assert_non_null(strstr(esp_error_message(), "task 'second': no row has a prompt that leaves room"));
  f.q.generate = NULL;
  esp_strategies again;
  OK(esp_strategies_create(&f.cfg, f.r.be, &again));
  assert_int_equal(esp_strategies_open(&again, &f.q), ESP_ERR_RECIPE);
  assert_int_equal(esp_strategies_check(&c, &(esp_strategy_facts){.n_tasks = 1, .one_adapter = true}), ESP_ERR_RECIPE);
  esp_strategies_destroy(&again);
  sf_close(&f);
}

int main(void) {
  fx_setup();
  sf_setup();
  const struct CMUnitTest tests[] = {cmocka_unit_test(greedy), cmocka_unit_test(own_answers),
                                     cmocka_unit_test(refusals)};
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
