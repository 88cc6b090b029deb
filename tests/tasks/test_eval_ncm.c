/* The nearest class mean: means and answers against features, sums and distances computed here in fp64; what it answers
 * and what it leaves to the base; scoring through it, also in shares of ranks; a resumed set of classes.
 * Mutation seen caught: `likeness` (ncm.c) with the euclidean distance to the sum in the place of the mean; `task_end`
 * counting every class from 0 (`before`). */
#include "eval/score.h"
#include "strategy_fixture.h"

static const char *const ncm[] = {"ncm"};
enum { WIDTH = 32, CLASSES = 7, TASKS = 3, ROWS = 24 };
static const char *const label_of[TASKS][3] = {
    {"cold", "warm", NULL}, {"loud", "soft", "warm"}, {"often", "rare", NULL}};
static const int labels_of[TASKS] = {2, 3, 2}, first_of[TASKS] = {0, 2, 5};

/* The first two tasks become classifications that share a word; rows of one label are alike. */
static void write_tasks(void) {
  static const char *const about[2][3] = {{"ice and snow", "sand in the sun"},
                                          {"a drum, a horn", "a cat", "wool, tea"}};
  for (int t = 0; t < 2; t++) {
    char rows[8192], name[32];
    size_t n = 0;
    for (int i = 0; i < ROWS; i++) {
      int k = i % labels_of[t];
      n += (size_t)snprintf(rows + n, sizeof rows - n, "{\"text\":\"%s %d, %s\",\"label\":\"%s\"}\n", about[t][k],
                            i * 7 % 50, i % 5 ? "green" : "two grey",
                            label_of[t][i % 11 == 4 ? (k + 1) % labels_of[t] : k]);
    }
    snprintf(name, sizeof name, "labels%d.jsonl", t);
    OK(esp_file_write_atomic(fx_path(name), rows, n));
  }
}

static void open_ncm(sf *f, const char *metric, const char *choices) {
  sf_open(f, NULL, &(esp_strategy_cfg){.names = ncm, .n = 1, .ncm = {metric, choices}});
  for (int t = 0; t < 2; t++) {
    char name[32];
    snprintf(name, sizeof name, "labels%d.jsonl", t);
    esp_data_source src = {.path = fx_path(name), .weight = 1};
    esp_dataset_destroy(f->data[t]);
    OK(esp_dataset_build(&src, 1, &f->data_cfg, f->tok, &f->data[t]));
  }
  fx_shake(f->a, 0.3f, 4); /* an adapter that would be noticed */
}

static const char *const *labels(const sf *f, int t, int *n) {
  const char *const *names;
  *n = esp_dataset_labels(f->data[t], &names, NULL);
  return names;
}

/* The mean final state of a row's prompt alone, the adapter off: computed once. */
static void feature(sf *f, int t, int64_t i, double out[WIDTH]) {
  static double known[TASKS][ROWS][WIDTH];
  static bool there[TASKS][ROWS];
  const int32_t *ids;
  const float *w;
  int64_t n;
  memcpy(out, known[t][i], sizeof known[t][i]);
  if (there[t][i]) return;
  esp_dataset_sample(f->data[t], i, &ids, &w, &n);
  n = esp_dataset_prompt_len(f->data[t], i);
  int32_t cu[2] = {0, (int32_t)n}, off = -1, positions[64], zeros[64] = {0};
  float ones[64];
  for (int k = 0; k < n; k++) positions[k] = k, ones[k] = 1;
  esp_batch b = {.tokens = n,
                 .ids = ids,
                 .targets = zeros,
                 .positions = positions,
                 .weights = ones,
                 .cu_seqlens = cu,
                 .n_seqs = 1,
                 .adapters = &off};
  esp_tensor x = esp_tensor_2d(f->r.be->ops->alloc(f->r.be, ESP_MEM_HOST, n * WIDTH * 4), ESP_F32, n, WIDTH);
  OK(esp_model_features(f->r.m, &f->r.stack, &b, x));
  float *host = test_read(f->r.be, x.data, n * WIDTH * 4);
  for (int j = 0; j < WIDTH; j++) {
    out[j] = 0;
    for (int64_t k = 0; k < n; k++) out[j] += (double)host[k * WIDTH + j] / (double)n;
  }
  memcpy(known[t][i], out, sizeof known[t][i]);
  there[t][i] = true;
  free(host);
  f->r.be->ops->free(f->r.be, x.data);
}

typedef struct reference {
  double mean[CLASSES][WIDTH];
  int rows[CLASSES];
} reference;

static void means(sf *f, reference *r) {
  memset(r, 0, sizeof *r);
  for (int t = 0; t < TASKS; t++)
    for (int64_t i = 0; i < esp_dataset_count(f->data[t]); i++) {
      double x[WIDTH];
      int c = first_of[t] + esp_dataset_label(f->data[t], i);
      feature(f, t, i, x);
      for (int j = 0; j < WIDTH; j++) r->mean[c][j] += x[j];
      r->rows[c]++;
    }
  for (int c = 0; c < CLASSES; c++)
    for (int j = 0; j < WIDTH; j++) r->mean[c][j] /= r->rows[c];
}

/* How far the nearest class is ahead of the nearest one of another word, and its word. */
static double nearest(const reference *r, const double x[WIDTH], bool cosine, int from, int to, const char **word) {
  double best = -INFINITY, second = -INFINITY;
  const char *name[CLASSES];
  double like[CLASSES];
  for (int t = 0, c = 0; t < TASKS; t++)
    for (int k = 0; k < labels_of[t]; k++) name[c++] = label_of[t][k];
  for (int c = 0; c < CLASSES; c++) {
    double dot = 0, a = 0, b = 0, far = 0;
    for (int j = 0; j < WIDTH; j++) {
      dot += x[j] * r->mean[c][j], a += x[j] * x[j], b += r->mean[c][j] * r->mean[c][j];
      far += (x[j] - r->mean[c][j]) * (x[j] - r->mean[c][j]);
    }
    like[c] = cosine ? dot / sqrt(a * b) : -sqrt(far);
    bool among = false;
    for (int k = from; k < to; k++) among |= !strcmp(name[c], name[k]);
    if (!among) like[c] = -INFINITY;
    if (like[c] > best) best = like[c], *word = name[c];
  }
  for (int c = 0; c < CLASSES; c++)
    if (strcmp(name[c], *word) != 0 && like[c] > second) second = like[c];
  return best - second;
}

/* Every row of every task as a batch, answered. */
static void ask(sf *f, int t, int of, const char **out) {
  esp_rows rows = {0};
  esp_sample s[ROWS];
  int32_t prompt[ROWS];
  int n = (int)esp_dataset_count(f->data[t]), words;
  const char *const *names = labels(f, of, &words);
  for (int i = 0; i < n; i++) s[i] = (esp_sample){t, i}, prompt[i] = (int32_t)esp_dataset_prompt_len(f->data[t], i);
  OK(esp_sequence_rows(&f->q, s, n, &rows));
  esp_batch b = esp_sequence_batch(&rows);
  b.n_seqs = n;
  OK(esp_strategies_answer(&f->set, &f->q, names, words, prompt, &b, out));
  esp_rows_deinit(&rows);
}

static void exact(void **state) {
  for (int k = 0; k < 4; k++) {
    bool cosine = k % 2, seen = k / 2;
    if (test_quick() && (k == 1 || k == 2)) continue;
    sf f;
    reference r;
    int close = 0, different = 0;
    open_ncm(&f, cosine ? "cosine" : "euclidean", seen ? "seen" : "set");
    means(&f, &r);
    for (int t = 0; t < TASKS; t++) sf_task(&f, t), sf_end(&f);
    OK(esp_strategies_deploy(&f.set, &f.q, true));
    for (int t = 0; t < TASKS; t++) {
      const char *got[ROWS], *want = NULL;
      ask(&f, t, t, got);
      for (int64_t i = 0; i < esp_dataset_count(f.data[t]); i++) {
        double x[WIDTH];
        feature(&f, t, i, x);
        double ahead =
            nearest(&r, x, cosine, seen ? 0 : first_of[t], seen ? CLASSES : first_of[t] + labels_of[t], &want);
        close += ahead < 1e-5;
        if (ahead >= 1e-5) assert_string_equal(got[i], want);
        different += strcmp(want, label_of[t][esp_dataset_label(f.data[t], i)]) != 0;
      }
    }
    assert_true(close <= 2 && different > 0 &&
                different < 60); /* some are wrong: the reference decides, not the label */
    double *sums = esp_strategy_get(&f.set.list[0], "sums", NULL);
    for (int c = 0; c < CLASSES; c++)
      for (int j = 0; j < WIDTH; j++)
        assert_true(fabs(sums[c * WIDTH + j] / r.rows[c] - r.mean[c][j]) <= 1e-5 * (1 + fabs(r.mean[c][j])));
    sf_close(&f);
  }
}

/* What is not its own: before it has seen anything, where it is not deployed, sets none of whose words it knows. */
static void leaves(void **state) {
  for (int seen = 0; seen < 2; seen++) {
    sf f;
    int n;
    open_ncm(&f, "cosine", seen ? "seen" : "set");
    OK(esp_strategies_deploy(&f.set, &f.q, true));
    assert_false(esp_strategies_answers(&f.set, labels(&f, 0, &n), labels_of[0]));
    OK(esp_strategies_deploy(&f.set, &f.q, false));
    sf_task(&f, 0);
    sf_end(&f);
    assert_false(esp_strategies_answers(&f.set, labels(&f, 0, &n), labels_of[0]));
    OK(esp_strategies_deploy(&f.set, &f.q, true));
    assert_true(esp_strategies_answers(&f.set, labels(&f, 0, &n), labels_of[0]));
    assert_true(esp_strategies_answers(&f.set, labels(&f, 1, &n), labels_of[1])); /* "warm" */
    assert_int_equal(esp_strategies_answers(&f.set, labels(&f, 2, &n), labels_of[2]), seen);
    assert_false(esp_strategies_answers(NULL, labels(&f, 0, &n), labels_of[0]));
    const char *got[ROWS];
    ask(&f, 1, 1, got);
    for (int i = 0; i < ROWS; i++) assert_true(seen || !strcmp(got[i], "warm"));
    sf_close(&f);
  }
}

/* Scores are shares of right answers, the same in shares of ranks, and for answers as text. */
static void scored(void **state) {
  sf f;
  open_ncm(&f, "cosine", "set");
  for (int t = 0; t < TASKS; t++) sf_task(&f, t), sf_end(&f);
  OK(esp_strategies_deploy(&f.set, &f.q, true));
  for (int t = 0; t < TASKS; t++) {
    const char *got[ROWS];
    int n = (int)esp_dataset_count(f.data[t]), right = 0;
    ask(&f, t, t, got);
    for (int i = 0; i < n; i++) right += !strcmp(got[i], label_of[t][esp_dataset_label(f.data[t], i)]);
    for (int k = 0; k < 3; k++) {
      double num = 0, den = 0;
      for (int rank = 0; rank < (k == 1 ? 2 : 1); rank++) {
        esp_score_cfg cfg = {.metric = k == 2 ? ESP_METRIC_EXACT_MATCH : ESP_METRIC_CHOICE,
                             .max_new_tokens = 2,
                             .batch_tokens = k == 1 ? 60 : 4096,
                             .rank = rank,
                             .size = k == 1 ? 2 : 1,
                             .strategies = &f.set,
                             .sequence = &f.q};
        esp_score_sums sums;
        OK(esp_score_run(f.r.m, f.tok, f.data[t], &f.r.stack, &cfg, &sums));
        num += sums.num, den += sums.den;
        assert_true(sums.malformed == 0);
      }
      assert_int_equal((int)num, right);
      assert_int_equal((int)den, n);
    }
    esp_score_cfg cfg = {.max_new_tokens = 2, .limit = 1, .size = 1, .strategies = &f.set, .sequence = &f.q};
    esp_strbuf text;
    char want[64];
    esp_strbuf_init(&text);
    OK(esp_score_samples(f.r.m, f.tok, f.data[t], &f.r.stack, &cfg, "set", &text));
    snprintf(want, sizeof want, "\"answer\": \"%s\"", got[0]);
    assert_non_null(strstr(text.data, want));
    esp_strbuf_deinit(&text);
  }
  sf_close(&f);
}

static void resumed(void **state) {
  sf f, g;
  size_t n_tensors, n_json;
  open_ncm(&f, "euclidean", "seen");
  sf_task(&f, 0), sf_end(&f);
  sf_task(&f, 1), sf_end(&f);
  OK(esp_strategies_save(&f.set, fx_path("s.safetensors"), fx_path("s.json")));
  char *tensors = NULL, *json = NULL;
  OK(esp_file_read(fx_path("s.safetensors"), &tensors, &n_tensors));
  OK(esp_file_read(fx_path("s.json"), &json, &n_json));
  open_ncm(&g, "euclidean", "seen");
  g.q.task = 2;
  OK(esp_strategies_task_begin(&g.set, &g.q)); /* as the loop does before it reads the state */
  OK(esp_strategies_load(&g.set, tensors, n_tensors, json, n_json, "s.json"));
  assert_true(esp_strategies_bytes(&f.set, 0, &f.q) > 5 * WIDTH * 8 &&
              esp_strategies_bytes(&f.set, 0, &f.q) == esp_strategies_bytes(&g.set, 0, &g.q));
  sf *both[2] = {&f, &g};
  const char *got[2][ROWS];
  for (int k = 0; k < 2; k++) {
    sf_task(both[k], 2), sf_end(both[k]);
    OK(esp_strategies_deploy(&both[k]->set, &both[k]->q, true));
  }
  assert_memory_equal(esp_strategy_get(&f.set.list[0], "sums", NULL), esp_strategy_get(&g.set.list[0], "sums", NULL),
                      CLASSES * WIDTH * 8);
  for (int t = 0; t < TASKS; t++) {
    for (int k = 0; k < 2; k++) ask(both[k], t, t, got[k]);
    for (int64_t i = 0; i < esp_dataset_count(f.data[t]); i++) assert_string_equal(got[0][i], got[1][i]);
  }
  char *cold = strstr(json, "\"cold\""); /* a state that is not this one's */
  assert_non_null(cold);
  cold[-3] = 'm';
  assert_int_equal(esp_strategies_load(&g.set, tensors, n_tensors, json, n_json, "s.json"), ESP_ERR_DATA);
  esp_mem_free(tensors);
  esp_mem_free(json);
  sf_close(&f);
  sf_close(&g);
}

static void without_labels(void **state) {
  sf f;
  sf_open(&f, NULL, &(esp_strategy_cfg){.names = ncm, .n = 1, .ncm = {"cosine", "set"}});
  f.q.task = 0;
  assert_int_equal(esp_strategies_task_begin(&f.set, &f.q), ESP_ERR_DATA);
  assert_non_null(strstr(esp_error_message(), "task0.jsonl:1: the row has no label"));
  sf_close(&f);
}

int main(void) {
  fx_setup();
  sf_setup();
  write_tasks();
  const struct CMUnitTest tests[] = {cmocka_unit_test(exact), cmocka_unit_test(leaves), cmocka_unit_test(scored),
                                     cmocka_unit_test(resumed), cmocka_unit_test(without_labels)};
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
