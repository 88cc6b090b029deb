/* Scores and generation of a tiny model against brute force: every number from one sequence at a time and full logits.
 * Perplexity and choice do not depend on the batch or on how samples are dealt to ranks; greedy text equals the argmax
 * of full forwards; a sampled draw does not depend on its neighbours; top-k 1 is greedy. Mutation it caught: the weight
 * of the first label token taken from i >= n0 instead of i + 1 >= n0 in batcher_add; the entropy left out of base_kl.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

#include <cmocka.h>

#include "adapters/adapter.h"
#include "backend_env.h"
#include "eval/generate.h"
#include "eval/score.h"
#include "io/json.h"
#include "tiny.h"

#define OK(expr)                                                                                                       \
  do {                                                                                                                 \
    esp_status ok_ = (expr);                                                                                           \
    if (ok_ != ESP_OK) fail_msg("%s: status %d: %s", #expr, (int)ok_, esp_error_message());                            \
  } while (0)

static char root[] = "/tmp/esp-score-XXXXXX";
static esp_backend *be;
static esp_model *model;
static esp_stack stack;
static esp_tokenizer *tok;

static const char *path_of(const char *name) {
  static char path[4][256];
  static int at;
  at = (at + 1) % 4;
  return esp_path_join(path[at], sizeof path[at], root, name);
}

static int setup(void **state) {
  (void)state;
  if (!mkdtemp(root) || tiny_make(root) != ESP_OK) return -1;
  esp_strbuf b;
  esp_strbuf_init(&b);
  static const char *const labels[] = {"red", "tan", "sky"};
  for (int i = 0; i < 30; i++)
    esp_strbuf_printf(&b, "{\"text\": \"thing %d\", \"label\": \"%s\"}\n", i * 37 % 100, labels[i * 7 / 3 % 3]);
  if (tiny_write(root, "class.jsonl", b.data) != ESP_OK) return -1;
  esp_strbuf_deinit(&b);
  esp_model_options opt = {.compute = ESP_F32};
  if (esp_backend_create(test_backend_name(), &be) || esp_model_open(path_of("model"), be, &opt, &model) ||
      esp_model_load_weights(model) || esp_stack_init(&stack, be, 64 << 20) ||
      esp_tokenizer_load(path_of("model"), &tok)) {
    fprintf(stderr, "%s\n", esp_error_message());
    return -1;
  }
  return 0;
}

static int teardown(void **state) {
  (void)state;
  esp_tokenizer_destroy(tok);
  esp_stack_deinit(&stack);
  esp_model_close(model);
  esp_backend_destroy(be);
  return esp_remove_tree(root) == ESP_OK ? 0 : -1;
}

static esp_dataset *data_of(const char *name, esp_data_format format) {
  static char path[256];
  snprintf(path, sizeof path, "%s", path_of(name));
  esp_data_source src = {.path = path, .format = format, .weight = 1};
  esp_data_cfg cfg = {.sequence_len = 256, .train_on_eos = "turn", .chat_template = "auto", .add_bos = true};
  esp_dataset *d;
  OK(esp_dataset_build(&src, 1, &cfg, tok, &d));
  return d;
}

/* log p(ids[i] | ids[0..i)) for i in [from, n), summed in fp64 from full logits. */
static double brute(const int32_t *ids, int64_t n, int64_t from) {
  static float logits[256 * TINY_VOCAB];
  OK(esp_model_sequence_logits(model, &stack, ids, n, logits));
  double sum = 0;
  for (int64_t i = from; i < n; i++) {
    const float *l = logits + (i - 1) * TINY_VOCAB;
    double z = 0;
    for (int k = 0; k < TINY_VOCAB; k++) z += exp((double)l[k]);
    sum += l[ids[i]] - log(z);
  }
  return sum;
}

static double labelled, malformed; /* of the last run */

static double run(const esp_dataset *d, esp_metric metric, int64_t batch, int64_t limit, int ranks, double *samples) {
  esp_score_sums all = {0}, part;
  for (int r = 0; r < ranks; r++) {
    esp_score_cfg cfg = {
        .metric = metric, .limit = limit, .max_new_tokens = 6, .batch_tokens = batch, .rank = r, .size = ranks};
    OK(esp_score_run(model, tok, d, &stack, &cfg, &part));
    all.num += part.num;
    all.den += part.den;
    all.samples += part.samples;
    all.labelled += part.labelled;
    all.malformed += part.malformed;
  }
  if (samples) *samples = all.samples;
  labelled = all.labelled;
  malformed = all.malformed;
  return esp_score_value(metric, &all);
}

static void perplexity_is_brute_force(void **state) {
  (void)state;
  esp_dataset *d = data_of("a.test.jsonl", ESP_FMT_PROMPT_COMPLETION);
  double nll = 0, weight = 0, samples;
  for (int64_t i = 0; i < esp_dataset_count(d); i++) {
    const int32_t *ids;
    const float *w;
    int64_t n, prompt = esp_dataset_prompt_len(d, i);
    esp_dataset_sample(d, i, &ids, &w, &n);
    nll -= brute(ids, n, prompt);
    weight += (double)(n - prompt);
  }
  double want = exp(nll / weight);
  assert_true(fabs(run(d, ESP_METRIC_PERPLEXITY, 1, 0, 1, &samples) / want - 1) < 1e-5);
  assert_true(samples == 12);
  assert_true(fabs(run(d, ESP_METRIC_PERPLEXITY, 100, 0, 1, NULL) / want - 1) < 1e-5);
  assert_true(fabs(run(d, ESP_METRIC_PERPLEXITY, 4096, 0, 5, &samples) / want - 1) < 1e-5);
  assert_true(samples == 12);
  esp_dataset_destroy(d);
}

static void choice_is_brute_force(void **state) {
  (void)state;
  esp_dataset *d = data_of("class.jsonl", ESP_FMT_CLASSIFICATION);
  const char *const *names;
  const esp_ids *labels;
  int n_labels = esp_dataset_labels(d, &names, &labels);
  assert_int_equal(n_labels, 3);
  double right = 0;
  for (int64_t i = 0; i < esp_dataset_count(d); i++) {
    const int32_t *ids;
    const float *w;
    int64_t n, prompt = esp_dataset_prompt_len(d, i);
    esp_dataset_sample(d, i, &ids, &w, &n);
    int best = 0;
    double best_sum = -INFINITY;
    for (int k = 0; k < n_labels; k++) {
      int32_t all[256];
      memcpy(all, ids, (size_t)prompt * 4);
      memcpy(all + prompt, labels[k].data, (size_t)labels[k].n * 4);
      double sum = brute(all, prompt + labels[k].n, prompt);
      if (sum > best_sum) best_sum = sum, best = k;
    }
    right += best == esp_dataset_label(d, i);
  }
  double want = right / 30, samples;
  assert_true(want > 0 && want < 1); /* else the test could not tell */
  assert_true(run(d, ESP_METRIC_CHOICE, 1, 0, 1, NULL) == want);
  assert_true(run(d, ESP_METRIC_CHOICE, 200, 0, 1, NULL) == want);
  assert_true(run(d, ESP_METRIC_CHOICE, 4096, 0, 4, &samples) == want);
  assert_true(samples == 30);
  run(d, ESP_METRIC_CHOICE, 4096, 7, 2, &samples);
  assert_true(samples == 7);
  esp_dataset_destroy(d);
}

static void choice_needs_labels(void **state) {
  (void)state;
  esp_dataset *d = data_of("a.test.jsonl", ESP_FMT_PROMPT_COMPLETION);
  esp_score_sums sums;
  esp_score_cfg cfg = {.metric = ESP_METRIC_CHOICE, .batch_tokens = 100, .size = 1};
  assert_int_equal(esp_score_run(model, tok, d, &stack, &cfg, &sums), ESP_ERR_DATA);
  assert_non_null(strstr(esp_error_message(), "labels"));
  esp_dataset_destroy(d);
}

static void generated_scores_do_not_depend_on_the_batch(void **state) {
  (void)state;
  esp_dataset *d = data_of("a.test.jsonl", ESP_FMT_PROMPT_COMPLETION);
  double alone = run(d, ESP_METRIC_ROUGE_L, 1, 0, 1, NULL), samples;
  assert_true(run(d, ESP_METRIC_ROUGE_L, 4096, 0, 3, &samples) == alone && samples == 12);
  assert_true(run(d, ESP_METRIC_EXACT_MATCH, 4096, 0, 1, NULL) == run(d, ESP_METRIC_EXACT_MATCH, 1, 0, 1, NULL));
  esp_dataset_destroy(d);
}

/* An answer that is wrong is told from one that is no label at all. What the tiny model says is no colour; then its own
 * answers are made the labels, some of other rows. */
static void malformed_is_apart_from_wrong(void **state) {
  (void)state;
  esp_dataset *d = data_of("class.jsonl", ESP_FMT_CLASSIFICATION);
  double right = run(d, ESP_METRIC_EXACT_MATCH, 4096, 0, 2, NULL);
  assert_true(labelled == 30 && malformed == 30 && right == 0);
  esp_dataset_destroy(d);
  d = data_of("a.test.jsonl", ESP_FMT_PROMPT_COMPLETION);
  run(d, ESP_METRIC_EXACT_MATCH, 4096, 0, 1, NULL);
  assert_true(labelled == 0);
  esp_dataset_destroy(d);
  /* The model's own answers become labels: row i is labelled with the answer to row (i + i % 2) % n. */
  esp_strbuf samples, b;
  esp_strbuf_init(&samples);
  esp_strbuf_init(&b);
  d = data_of("class.jsonl", ESP_FMT_CLASSIFICATION);
  esp_score_cfg cfg = {
      .metric = ESP_METRIC_EXACT_MATCH, .limit = 12, .max_new_tokens = 6, .batch_tokens = 100, .size = 1};
  OK(esp_score_samples(model, tok, d, &stack, &cfg, "set", &samples));
  esp_dataset_destroy(d);
  json_t *all;
  esp_strbuf_printf(&b, "[%s]", samples.data);
  OK(esp_json_parse(b.data, b.len, "samples", &all));
  int n = (int)json_array_size(all), apart = 0, none = 0;
  assert_int_equal(n, 12);
  b.len = 0;
  for (int i = 0; i < n; i++) {
    const char *mine = json_string_value(json_object_get(json_array_get(all, (size_t)i), "answer"));
    const char *given = json_string_value(json_object_get(json_array_get(all, (size_t)((i + i % 2) % n)), "answer"));
    char want[32];
    snprintf(want, sizeof want, "thing %d", i * 37 % 100);
    assert_non_null(strstr(json_string_value(json_object_get(json_array_get(all, (size_t)i), "prompt")), want));
    apart += !esp_exact_match(mine, given);
    bool label = false; /* of some row, all of which are even */
    for (int k = 0; k < n; k += 2)
      label |= esp_exact_match(mine, json_string_value(json_object_get(json_array_get(all, (size_t)k), "answer")));
    none += !label;
    json_t *row = json_pack("{s:s,s:s}", "text", want, "label", given);
    char *line = json_dumps(row, 0);
    esp_strbuf_printf(&b, "%s\n", line);
    free(line);
    json_decref(row);
  }
  OK(tiny_write(root, "own.jsonl", b.data));
  json_decref(all);
  esp_strbuf_deinit(&samples);
  esp_strbuf_deinit(&b);
  d = data_of("own.jsonl", ESP_FMT_CLASSIFICATION);
  right = run(d, ESP_METRIC_EXACT_MATCH, 4096, 0, 1, NULL);
  assert_true(labelled == 12 && malformed == none && none > 0 && none < apart);
  assert_true(fabs(right - (12.0 - apart) / 12) < 1e-12 && apart > 0 && apart < 12);
  esp_dataset_destroy(d);
}

/* Logits of a sequence, fp64 log-softmax. */
static void log_probs(const int32_t *ids, int64_t n, double *out) {
  static float logits[256 * TINY_VOCAB];
  OK(esp_model_sequence_logits(model, &stack, ids, n, logits));
  for (int64_t i = 0; i < n; i++) {
    double z = 0;
    for (int v = 0; v < TINY_VOCAB; v++) z += exp((double)logits[i * TINY_VOCAB + v]);
    for (int v = 0; v < TINY_VOCAB; v++) out[i * TINY_VOCAB + v] = logits[i * TINY_VOCAB + v] - log(z);
  }
}

static void divergence_is_brute_force(void **state) {
  (void)state;
  enum { MOST = 64 };
  esp_dataset *d = data_of("a.test.jsonl", ESP_FMT_PROMPT_COMPLETION);
  static double base[12][MOST * TINY_VOCAB], adapted[MOST * TINY_VOCAB];
  const int32_t *ids;
  const float *w;
  int64_t n;
  double entropy = run(d, ESP_METRIC_BASE_XENT, 100, 0, 1, NULL); /* no adapter: H(p, p) = H(p) */
  assert_true(entropy > 0 && fabs(run(d, ESP_METRIC_BASE_KL, 100, 0, 1, NULL)) < 1e-12);
  for (int64_t i = 0; i < 12; i++) {
    esp_dataset_sample(d, i, &ids, &w, &n);
    assert_true(n <= MOST);
    log_probs(ids, n, base[i]);
  }
  esp_adapter *a;
  esp_adapter_cfg cfg = {.type = "lora",
                         .r = 4,
                         .alpha = 8,
                         .init = "default",
                         .bias = "none",
                         .target = (const char *const[]){"q_proj", "up_proj"},
                         .n_target = 2,
                         .seed = 5};
  OK(esp_adapter_create(model, &cfg, "default", true, &a));
  for (int i = 0; i < a->params->count; i++) { /* B is zero at first */
    esp_param *p = &a->params->list[i];
    float values[4096];
    int64_t count = p->numel;
    assert_true(count <= 4096);
    for (int64_t k = 0; k < count; k++) values[k] = 0.3f * sinf((float)(k * 7 + i));
    esp_params_set(a->params, i, values);
  }
  OK(esp_adapters_activate(model, &a, 1));
  double xent = 0, kl = 0, den = 0;
  for (int64_t i = 0; i < 12; i++) {
    esp_dataset_sample(d, i, &ids, &w, &n);
    log_probs(ids, n, adapted);
    for (int64_t t = esp_dataset_prompt_len(d, i); t < n; t++, den++)
      for (int v = 0; v < TINY_VOCAB; v++) {
        double p = base[i][(t - 1) * TINY_VOCAB + v], q = adapted[(t - 1) * TINY_VOCAB + v];
        xent -= exp(p) * q;
        kl += exp(p) * (p - q);
      }
  }
  assert_true(kl / den > 1e-3);
  assert_true(fabs(run(d, ESP_METRIC_BASE_XENT, 1, 0, 1, NULL) - xent / den) < 1e-5);
  assert_true(fabs(run(d, ESP_METRIC_BASE_KL, 4096, 0, 3, NULL) - kl / den) < 1e-5);
  assert_true(fabs(xent / den - kl / den - entropy) < 1e-5);
  OK(esp_adapters_activate(model, NULL, 0));
  esp_adapter_destroy(a);
  esp_dataset_destroy(d);
}

static void prompt_ids(const char *text, esp_ids *out) {
  memset(out, 0, sizeof *out);
  OK(esp_tokenizer_encode(tok, text, strlen(text), true, out));
}

static void greedy_is_the_argmax_of_full_forwards(void **state) {
  (void)state;
  enum { NEW = 12 };
  esp_ids prompts[3], out[3] = {0};
  prompt_ids("item 5 is ", &prompts[0]);
  prompt_ids("x", &prompts[1]);
  prompt_ids("a much longer prompt than the others, item 77 is ", &prompts[2]);
  esp_gen_cfg cfg = {.max_new_tokens = NEW};
  OK(esp_generate(model, &stack, prompts, 3, &cfg, out));
  for (int i = 0; i < 3; i++) {
    assert_int_equal(out[i].n, NEW);
    static float all[256 * TINY_VOCAB];
    int32_t ids[256];
    int64_t n = prompts[i].n;
    memcpy(ids, prompts[i].data, (size_t)n * 4);
    for (int k = 0; k < NEW; k++, n++) {
      OK(esp_model_sequence_logits(model, &stack, ids, n, all));
      const float *logits = all + (n - 1) * TINY_VOCAB;
      int best = 0;
      for (int v = 1; v < TINY_VOCAB; v++) best = logits[v] > logits[best] ? v : best;
      assert_int_equal(out[i].data[k], best);
      ids[n] = best;
    }
  }
  /* a stop id ends its sequence and is not part of the output; the others go on */
  int32_t stop[] = {out[0].data[4]};
  int64_t first = 0;
  while (out[0].data[first] != stop[0]) first++;
  esp_ids cut[3] = {0};
  cfg.stop = stop;
  cfg.n_stop = 1;
  OK(esp_generate(model, &stack, prompts, 3, &cfg, cut));
  assert_int_equal(cut[0].n, first);
  for (int i = 0; i < 3; i++) {
    for (int64_t k = 0; k < cut[i].n; k++) assert_int_equal(cut[i].data[k], out[i].data[k]);
    esp_ids_deinit(&prompts[i]);
    esp_ids_deinit(&out[i]);
    esp_ids_deinit(&cut[i]);
  }
}

static void draws_are_their_rows_own(void **state) {
  (void)state;
  esp_ids prompts[2], both[2] = {0}, alone[2] = {0}, greedy[2] = {0}, one[2] = {0}, other[2] = {0};
  prompt_ids("item 5 is ", &prompts[0]);
  prompt_ids("something else", &prompts[1]);
  esp_gen_cfg cfg = {.max_new_tokens = 20, .temperature = 1.5, .top_p = 0.95, .seed = 3};
  OK(esp_generate(model, &stack, prompts, 2, &cfg, both));
  OK(esp_generate(model, &stack, prompts, 1, &cfg, alone));
  assert_memory_equal(both[0].data, alone[0].data, 80);
  cfg.seed = 4;
  OK(esp_generate(model, &stack, prompts, 1, &cfg, other));
  assert_memory_not_equal(both[0].data, other[0].data, 80);
  cfg.top_k = 1;
  OK(esp_generate(model, &stack, prompts, 2, &cfg, one));
  cfg = (esp_gen_cfg){.max_new_tokens = 20};
  OK(esp_generate(model, &stack, prompts, 2, &cfg, greedy));
  for (int i = 0; i < 2; i++) {
    assert_memory_equal(one[i].data, greedy[i].data, 80);
    esp_ids *all[] = {&prompts[i], &both[i], &alone[i], &greedy[i], &one[i], &other[i]};
    for (int k = 0; k < 6; k++) esp_ids_deinit(all[k]);
  }
}

static void too_long_is_refused(void **state) {
  (void)state;
  esp_ids prompt, out = {0};
  prompt_ids("x", &prompt);
  esp_gen_cfg cfg = {.max_new_tokens = 512};
  assert_int_equal(esp_generate(model, &stack, &prompt, 1, &cfg, &out), ESP_ERR_DATA);
  assert_non_null(strstr(esp_error_message(), "512 positions"));
  esp_ids_deinit(&prompt);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(perplexity_is_brute_force),
      cmocka_unit_test(choice_is_brute_force),
      cmocka_unit_test(choice_needs_labels),
      cmocka_unit_test(generated_scores_do_not_depend_on_the_batch),
      cmocka_unit_test(malformed_is_apart_from_wrong),
      cmocka_unit_test(divergence_is_brute_force),
      cmocka_unit_test(greedy_is_the_argmax_of_full_forwards),
      cmocka_unit_test(draws_are_their_rows_own),
      cmocka_unit_test(too_long_is_refused),
  };
  test_backend_or_exit();
  return cmocka_run_group_tests_name("scores and generation", tests, setup, teardown);
}
