/* Two experts that answer together: choice, loss of tokens and greedy text of lae's slow and fast values against the
 * element-wise maximum of their probabilities, from full logits of one sequence at a time in fp64; and the values that
 * are in force before and after.
 * Mutation seen caught: `weigh` (score.c) without the softmax over labels; `next` (generate.c) giving the second expert
 * the first one's cache; `esp_joined_loss` without the sum. */
#include "eval/generate.h"
#include "eval/score.h"
#include "strategy_fixture.h"

static const char *const lae[] = {"lae"};
enum { ROWS = 40, LABELS = 3, VOCAB = 300, NEW = 5, PROMPTS = 8 };

static esp_dataset *colours;

static void write_colours(sf *f) {
  static const char *const label[LABELS] = {"red", "green and blue", "grey"};
  char rows[8192];
  size_t n = 0;
  for (int i = 0; i < ROWS; i++)
    n += (size_t)snprintf(rows + n, sizeof rows - n, "{\"text\":\"say %s %d\",\"label\":\"%s\"}\n",
                          i % 3 ? "one two" : "cat", i * 37 % 100, label[i * 7 / 3 % LABELS]);
  OK(esp_file_write_atomic(fx_path("colours.jsonl"), rows, n));
  esp_data_source src = {.path = fx_path("colours.jsonl"), .weight = 1};
  OK(esp_dataset_build(&src, 1, &f->data_cfg, f->tok, &colours));
}

static void open_both(sf *f, bool ensemble) {
  sf_open(f, NULL, &(esp_strategy_cfg){.names = lae, .n = 1, .lae = {.decay = 0.9, .ensemble = ensemble}});
  write_colours(f);
  sf_task(f, 0);
  fx_shake(f->a, 0.2f, 8);
  assert_int_equal(esp_strategies_experts(&f->set), 1);
  sf_end(f);
  sf_task(f, 1);
  fx_shake(f->a, 0.2f, 9); /* the fast values go on */
  OK(esp_strategies_deploy(&f->set, &f->q, true));
}

static void close_both(sf *f) {
  esp_dataset_destroy(colours);
  sf_close(f);
}

static esp_status use(void *ctx, int i) {
  sf *f = ctx;
  return esp_strategies_expert(&f->set, &f->q, i);
}

/* log p of every token behind each position, under one expert. */
static void log_probs(sf *f, int expert, const int32_t *ids, int64_t n, double *out) {
  static float logits[64 * VOCAB];
  OK(use(f, expert));
  OK(esp_model_sequence_logits(f->r.m, &f->r.stack, ids, n, logits));
  OK(use(f, 0));
  for (int64_t i = 0; i < n; i++) {
    double z = 0;
    for (int v = 0; v < VOCAB; v++) z += exp((double)logits[i * VOCAB + v]);
    for (int v = 0; v < VOCAB; v++) out[i * VOCAB + v] = (double)logits[i * VOCAB + v] - log(z);
  }
}

static esp_score_sums score(sf *f, const esp_dataset *d, esp_metric metric, int64_t batch, int ranks) {
  esp_score_sums all = {0};
  for (int r = 0; r < ranks; r++) {
    esp_score_sums part;
    esp_score_cfg cfg = {.metric = metric,
                         .max_new_tokens = NEW,
                         .batch_tokens = batch,
                         .rank = r,
                         .size = ranks,
                         .strategies = &f->set,
                         .sequence = &f->q,
                         .experts = {esp_strategies_experts(&f->set), use, f}};
    OK(esp_score_run(f->r.m, f->tok, d, &f->r.stack, &cfg, &part));
    all.num += part.num, all.den += part.den;
  }
  return all;
}

static int best_of(const double *x, int n) {
  int best = 0;
  for (int k = 1; k < n; k++)
    if (x[k] > x[best]) best = k;
  return best;
}

static void choices(void **state) {
  sf f;
  static double lp[64 * VOCAB];
  const esp_ids *labels;
  int differs[2] = {0}, right = 0;
  open_both(&f, true);
  assert_int_equal(esp_strategies_experts(&f.set), 2);
  assert_int_equal(esp_dataset_labels(colours, NULL, &labels), LABELS);
  for (int64_t i = 0; i < ROWS; i++) {
    double share[2][LABELS], joined[LABELS];
    const int32_t *ids;
    const float *w;
    int64_t n, prompt = esp_dataset_prompt_len(colours, i);
    esp_dataset_sample(colours, i, &ids, &w, &n);
    for (int e = 0; e < 2; e++) {
      double z = 0;
      for (int k = 0; k < LABELS; k++) {
        int32_t all[64];
        memcpy(all, ids, (size_t)prompt * 4);
        memcpy(all + prompt, labels[k].data, (size_t)labels[k].n * 4);
        log_probs(&f, e, all, prompt + labels[k].n, lp);
        share[e][k] = 0;
        for (int64_t t = prompt; t < prompt + labels[k].n; t++) share[e][k] += lp[(t - 1) * VOCAB + all[t]];
        z += exp(share[e][k]);
      }
      for (int k = 0; k < LABELS; k++) share[e][k] = exp(share[e][k]) / z;
    }
    for (int k = 0; k < LABELS; k++) joined[k] = fmax(share[0][k], share[1][k]);
    int got = best_of(joined, LABELS);
    right += got == esp_dataset_label(colours, i);
    for (int e = 0; e < 2; e++) differs[e] += got != best_of(share[e], LABELS);
  }
  assert_true(differs[0] > 0 && differs[1] > 0); /* else either alone would do */
  assert_int_equal((int)score(&f, colours, ESP_METRIC_CHOICE, 1, 1).num, right);
  assert_int_equal((int)score(&f, colours, ESP_METRIC_CHOICE, 150, 2).num, right);
  assert_int_equal((int)score(&f, colours, ESP_METRIC_CHOICE, 4096, 1).num, right);
  close_both(&f);
}

static void losses(void **state) {
  sf f;
  static double lp[2][64 * VOCAB];
  double sum = 0, alone = 0;
  int64_t tokens = 0;
  open_both(&f, true);
  for (int64_t i = 0; i < SF_SAMPLES; i++) {
    const int32_t *ids;
    const float *w;
    int64_t n;
    esp_dataset_sample(f.data[1], i, &ids, &w, &n);
    for (int e = 0; e < 2; e++) log_probs(&f, e, ids, n, lp[e]);
    for (int64_t t = esp_dataset_prompt_len(f.data[1], i); t < n; t++, tokens++) {
      double z = 0, *p = lp[0] + (t - 1) * VOCAB, *q = lp[1] + (t - 1) * VOCAB;
      for (int v = 0; v < VOCAB; v++) z += fmax(exp(p[v]), exp(q[v]));
      sum -= log(fmax(exp(p[ids[t]]), exp(q[ids[t]])) / z);
      alone -= p[ids[t]];
    }
  }
  for (int k = 0; k < 2; k++) {
    esp_score_sums got = score(&f, f.data[1], ESP_METRIC_PERPLEXITY, k ? 60 : 4096, 1 + k);
    assert_int_equal((int)got.den, (int)tokens);
    if (!(fabs(got.num - sum) <= 1e-4 * sum)) fail_msg("%g, not %g", got.num, sum);
  }
  assert_true(fabs(alone - sum) > 1e-3 * sum);
  close_both(&f);
}

static void texts(void **state) {
  sf f;
  static double lp[2][64 * VOCAB];
  esp_ids prompts[PROMPTS], out[PROMPTS] = {0}, one[PROMPTS] = {0};
  int different = 0;
  open_both(&f, true);
  const int64_t bytes = f.a->params->total * 4;
  float *before = fx_masters(f.a);
  for (int i = 0; i < PROMPTS; i++) {
    const int32_t *ids;
    const float *w;
    int64_t n;
    esp_dataset_sample(f.data[i % 2], i, &ids, &w, &n);
    prompts[i] = (esp_ids){(int32_t *)ids, esp_dataset_prompt_len(f.data[i % 2], i), 0};
  }
  esp_experts both = {2, use, &f};
  esp_gen_cfg cfg = {.max_new_tokens = NEW};
  OK(esp_generate(f.r.m, &f.r.stack, prompts, PROMPTS, &cfg, one));
  cfg.experts = &both;
  OK(esp_generate(f.r.m, &f.r.stack, prompts, PROMPTS, &cfg, out));
  for (int i = 0; i < PROMPTS; i++) {
    int32_t all[64];
    int64_t n = prompts[i].n;
    memcpy(all, prompts[i].data, (size_t)n * 4);
    for (int k = 0; k < NEW; k++) {
      double joined[VOCAB];
      for (int e = 0; e < 2; e++) log_probs(&f, e, all, n, lp[e]);
      for (int v = 0; v < VOCAB; v++) joined[v] = fmax(lp[0][(n - 1) * VOCAB + v], lp[1][(n - 1) * VOCAB + v]);
      all[n++] = best_of(joined, VOCAB);
    }
    assert_int_equal(out[i].n, NEW);
    assert_memory_equal(out[i].data, all + prompts[i].n, NEW * 4);
    different += memcmp(out[i].data, one[i].data, NEW * 4) != 0;
    esp_ids_deinit(&out[i]);
    esp_ids_deinit(&one[i]);
  }
  assert_true(different > 0);
  float *after = fx_masters(f.a); /* the slow ones are in force again; then the trained */
  assert_memory_equal(before, after, (size_t)bytes);
  free(after);
  OK(use(&f, 1));
  float *fast = fx_masters(f.a);
  OK(use(&f, 0));
  OK(esp_strategies_deploy(&f.set, &f.q, false));
  after = fx_masters(f.a);
  assert_memory_equal(fast, after, (size_t)bytes);
  assert_true(memcmp(fast, before, (size_t)bytes) != 0);
  assert_int_equal(esp_strategies_experts(&f.set), 1);
  free(before), free(after), free(fast);
  close_both(&f);
}

/* Without the key one answers, as before. */
static void alone(void **state) {
  sf f;
  open_both(&f, false);
  assert_int_equal(esp_strategies_experts(&f.set), 1);
  double one = score(&f, f.data[1], ESP_METRIC_PERPLEXITY, 4096, 1).num;
  close_both(&f);
  open_both(&f, true);
  double two = score(&f, f.data[1], ESP_METRIC_PERPLEXITY, 4096, 1).num;
  assert_true(fabs(one - two) > 1e-3 * one);
  close_both(&f);
}

int main(void) {
  fx_setup();
  sf_setup();
  const struct CMUnitTest tests[] = {cmocka_unit_test(choices), cmocka_unit_test(losses), cmocka_unit_test(texts),
                                     cmocka_unit_test(alone)};
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
