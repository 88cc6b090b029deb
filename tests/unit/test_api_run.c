/* A run of two tasks through the public interface on a tiny model: exact resume, thread counts, plan against measured
 * memory, refusals, policies.
 * Mutation seen caught: the optimizer's step not restored (`l->engine.optim->step = ...` removed from loop.c):
 * test_resume fails. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "core/mem.h"
#include "espalier/espalier.h"
#include "job.h"
#include "tiny.h"

static char root[4096];

static const char recipe[] = "name: tiny\n"
                             "seed: 3\n"
                             "model: {base_model: model, dtype: fp32}\n"
                             "adapter: {type: lora, r: 4, alpha: 8, dropout: 0.1, target: all-linear}\n"
                             "data: {sequence_len: 64}\n"
                             "optim: {lr: 1e-2}\n"
                             "train: {epochs: 2, micro_batch_size: 2, gradient_accumulation_steps: 2}\n"
                             "eval:\n"
                             "  batch_tokens: 128\n"
                             "  every: 4\n"
                             "  sets:\n"
                             "    - {name: a, path: a.test.jsonl, metric: perplexity}\n"
                             "    - {name: b, path: b.test.jsonl, metric: exact_match, max_new_tokens: 6}\n"
                             "tasks:\n"
                             "  - {name: a, data: [{path: a.jsonl}], eval: a}\n"
                             "  - {name: b, data: [{path: b.jsonl}], eval: b, optim: {lr: 5e-3}}\n"
                             "log: {to: [jsonl, tensorboard]}\n"
                             "checkpoint: {every: 3, keep: 2}\n";

static esp_job *open_job(const char *out, const char *const *more, int n) {
  return job_open(root, recipe, out, more, n);
}

static esp_status run_job(const char *out, bool resume, const esp_run_options *opt, esp_run_result *res,
                          const char *const *more, int n) {
  esp_job *job = open_job(out, more, n);
  esp_status st = resume ? esp_job_resume(job, opt, res) : esp_job_run(job, opt, res);
  esp_job_close(job);
  return st;
}
#define RUN(want, ...)                                                                                                 \
  do {                                                                                                                 \
    esp_status st_ = run_job(__VA_ARGS__);                                                                             \
    if (st_ != (want)) print_error("%s\n", esp_error_message());                                                       \
    assert_int_equal(st_, want);                                                                                       \
  } while (0)

static char *slurp(const char *out, const char *name, size_t *n) {
  char path[5000], *data;
  snprintf(path, sizeof path, "%s/%s/%s", root, out, name);
  if (esp_file_read(path, &data, n) != ESP_OK) fail_msg("%s", esp_error_message());
  return data;
}
static void same_file(const char *a, const char *b, const char *name) {
  size_t na, nb;
  char *x = slurp(a, name, &na), *y = slurp(b, name, &nb);
  if (na != nb || memcmp(x, y, na)) fail_msg("%s differs between %s and %s", name, a, b);
  esp_mem_free(x);
  esp_mem_free(y);
}
static void same_run(const char *a, const char *b) {
  same_file(a, b, "adapters/a/adapter_model.safetensors");
  same_file(a, b, "adapters/b/adapter_model.safetensors");
  same_file(a, b, "matrix.json");
}

typedef struct seen {
  int64_t steps, evals, checkpoints, stop_at;
  double first_loss, last_loss;
} seen;
static void on_event(void *ctx, const esp_event *e) {
  seen *s = ctx;
  if (e->kind == ESP_EVENT_CHECKPOINT) s->checkpoints++;
  if (e->kind == ESP_EVENT_EVAL) s->evals++;
  if (e->kind != ESP_EVENT_STEP) return;
  if (s->steps++ == 0) s->first_loss = e->loss;
  s->last_loss = e->loss;
  if (e->step == s->stop_at) esp_request_stop();
}

static esp_run_result straight;

static void test_straight(void **state) {
  seen s = {0};
  esp_run_options opt = {.on_event = on_event, .ctx = &s};
  esp_job *job = open_job("straight", NULL, 0);
  esp_plan *plan = NULL;
  esp_status st = esp_job_plan(job, &plan);
  if (st != ESP_OK) fail_msg("%s", esp_error_message());
  esp_job_close(job);
  RUN(ESP_OK, "straight", false, &opt, &straight, NULL, 0);
  assert_true(plan->steps > 8);
  assert_int_equal(straight.steps, plan->steps);
  assert_int_equal(s.steps, plan->steps);
  print_message("loss %.4f -> %.4f in %lld steps\n", s.first_loss, s.last_loss, (long long)s.steps);
  assert_true(s.last_loss < 0.8 * s.first_loss);
  assert_true(straight.has_matrix);
  double ratio = (double)straight.memory_peak / (double)plan->peak_bytes;
  print_message("plan %lld, measured %lld, ratio %.4f\n", (long long)plan->peak_bytes, (long long)straight.memory_peak,
                ratio);
  esp_mem_stats books;
  esp_mem_stats_get(&books);
  for (int k = 0; k < plan->n_categories; k++)
    print_message("  %-12s plan %9lld measured %9lld\n", plan->category_name[k], (long long)plan->category_bytes[k],
                  (long long)books.peak[k]);
  assert_true(ratio > 0.97 && ratio < 1.03);
  assert_true(plan->fits && plan->flops > 0 && plan->trainable > 0);
  esp_plan_free(plan);
  /* every step once, in order */
  size_t n;
  char *text = slurp("straight", "metrics.jsonl", &n), want[64];
  const char *at = text;
  for (int64_t k = 1; k <= straight.steps; k++) {
    snprintf(want, sizeof want, "{\"step\":%lld,\"task\":\"%s\"", (long long)k, "");
    want[strlen(want) - 1] = '\0';
    at = strstr(at, want);
    assert_non_null(at);
    at++;
  }
  esp_mem_free(text);
}

static void test_resume(void **state) {
  int64_t steps = straight.steps;
  assert_true(steps > 0);
  const int64_t stops[] = {1, 4, steps / 2, steps - 1};
  for (size_t i = 0; i < sizeof stops / sizeof *stops; i++) {
    esp_run_options opt = {.stop_after = stops[i], .overwrite = 1};
    esp_run_result r;
    RUN(ESP_ERR_INTERRUPTED, "resumed", false, &opt, NULL, NULL, 0);
    RUN(ESP_OK, "resumed", true, NULL, &r, NULL, 0);
    assert_int_equal(r.steps, steps);
    same_run("straight", "resumed");
  }
  /* a finished run has nothing to resume and says so by doing nothing */
  seen s = {0};
  esp_run_options opt = {.on_event = on_event, .ctx = &s};
  RUN(ESP_OK, "resumed", true, &opt, NULL, NULL, 0);
  assert_int_equal(s.steps, 0);
}

/* Stopped at every step in turn. */
static void test_resume_often(void **state) {
  esp_run_options opt = {.stop_after = 1};
  esp_status st = run_job("often", false, &opt, NULL, NULL, 0);
  while (st == ESP_ERR_INTERRUPTED && opt.stop_after < 1000) {
    opt.stop_after++;
    st = run_job("often", true, &opt, NULL, NULL, 0);
  }
  assert_int_equal(st, ESP_OK);
  same_run("straight", "often");
}

static void test_threads(void **state) {
  const char *one[] = {"parallel.threads=1"}, *three[] = {"parallel.threads=3"};
  RUN(ESP_OK, "one", false, NULL, NULL, one, 1);
  RUN(ESP_OK, "three", false, NULL, NULL, three, 1);
  same_run("one", "three");
  same_run("one", "straight");
}

static void test_signal(void **state) {
  seen s = {.stop_at = 5};
  esp_run_options opt = {.on_event = on_event, .ctx = &s};
  RUN(ESP_ERR_INTERRUPTED, "signal", false, &opt, NULL, NULL, 0);
  assert_int_equal(s.steps, 5);
  assert_non_null(strstr(esp_error_message(), "step 5"));
  esp_clear_stop();
  RUN(ESP_OK, "signal", true, NULL, NULL, NULL, 0);
  same_run("straight", "signal");
}

static void test_accumulation(void **state) {
  const char *two[] = {"adapter.dropout=0"};
  const char *four[] = {"adapter.dropout=0", "train.micro_batch_size=4", "train.gradient_accumulation_steps=1"};
  esp_run_result a, b;
  RUN(ESP_OK, "acc2", false, NULL, &a, two, 1);
  RUN(ESP_OK, "acc4", false, NULL, &b, four, 3);
  assert_int_equal(a.steps, b.steps);
  assert_true(fabs(a.last_loss - b.last_loss) < 1e-3 * fabs(a.last_loss));
}

static void test_policies(void **state) {
  static const char *const policies[] = {"continual.policy=new_per_task", "continual.policy=merge_then_new",
                                         "continual.reset_optimizer=false"};
  for (int i = 0; i < 3; i++) {
    const char *more[] = {policies[i]};
    esp_run_options opt = {.overwrite = 1};
    RUN(ESP_OK, "policy", false, &opt, NULL, more, 1);
    opt.stop_after = straight.steps - 2;
    RUN(ESP_ERR_INTERRUPTED, "policy2", false, &opt, NULL, more, 1);
    RUN(ESP_OK, "policy2", true, NULL, NULL, more, 1);
    same_run("policy", "policy2");
  }
}

static void test_best(void **state) {
  const char *more[] = {"checkpoint.keep_best={metric: a, mode: min}"};
  char path[5000];
  RUN(ESP_OK, "best", false, NULL, NULL, more, 1);
  same_run("straight", "best");
  snprintf(path, sizeof path, "%s/best/best/adapter/adapter_config.json", root);
  assert_true(esp_file_exists(path));
  size_t n;
  char *log = slurp("best", "run.log", &n), *result = slurp("best", "result.json", &n);
  assert_non_null(strstr(log, "is the best so far: a"));
  assert_non_null(strstr(log, "finished"));
  assert_non_null(strstr(result, "planned_memory_peak"));
  esp_mem_free(log);
  esp_mem_free(result);
}

static void test_refusals(void **state) {
  const char *small[] = {"memory.limit=200KiB"}, *other[] = {"optim.lr=3e-2"};
  char path[5000];
  RUN(ESP_ERR_MEMORY, "refused", false, NULL, NULL, small, 1);
  assert_non_null(strstr(esp_error_message(), "memory.limit"));
  snprintf(path, sizeof path, "%s/refused", root);
  assert_false(esp_dir_exists(path)); /* refused before anything is written */
  RUN(ESP_ERR_DATA, "nowhere", true, NULL, NULL, NULL, 0);
  RUN(ESP_ERR_RECIPE, "straight", false, NULL, NULL, NULL, 0); /* already holds a run */
  RUN(ESP_ERR_RECIPE, "straight", true, NULL, NULL, other, 1);
  assert_non_null(strstr(esp_error_message(), "another recipe"));
}

static void test_damage(void **state) {
  char path[5000];
  esp_run_options opt = {.stop_after = 7};
  RUN(ESP_ERR_INTERRUPTED, "damaged", false, &opt, NULL, NULL, 0);
  snprintf(path, sizeof path, "%s/damaged/checkpoints/checkpoint-00000007/params.safetensors", root);
  FILE *f = fopen(path, "r+b");
  assert_non_null(f);
  fseek(f, -5, SEEK_END);
  int byte = fgetc(f);
  fseek(f, -5, SEEK_END);
  fputc(byte ^ 1, f); /* one bit */
  fclose(f);
  snprintf(path, sizeof path, "%s/damaged/checkpoints/checkpoint-00000099.half", root);
  assert_int_equal(esp_mkdirs(path), ESP_OK); /* what a kill leaves behind */
  RUN(ESP_OK, "damaged", true, NULL, NULL, NULL, 0);
  assert_false(esp_dir_exists(path));
  same_run("straight", "damaged");
}

static void test_changed_data(void **state) {
  esp_run_options opt = {.stop_after = 4};
  RUN(ESP_ERR_INTERRUPTED, "changed", false, &opt, NULL, NULL, 0);
  assert_int_equal(tiny_data(root, "a.jsonl", 0, 0, 61), ESP_OK);
  RUN(ESP_ERR_DATA, "changed", true, NULL, NULL, NULL, 0);
  assert_non_null(strstr(esp_error_message(), "has changed"));
  assert_int_equal(tiny_data(root, "a.jsonl", 0, 0, 60), ESP_OK);
  RUN(ESP_OK, "changed", true, NULL, NULL, NULL, 0);
}

static void test_check_and_data(void **state) {
  esp_job *job = open_job("check", NULL, 0);
  char *facts = NULL;
  assert_int_equal(esp_job_check(job, &facts), ESP_OK);
  assert_non_null(strstr(facts, "task a: 60 rows"));
  esp_free(facts);
  esp_score scores[4];
  int n;
  esp_status st = esp_job_eval(job, NULL, NULL, scores, 4, &n);
  if (st != ESP_OK) fail_msg("%s", esp_error_message());
  assert_int_equal(n, 2);
  assert_int_equal(scores[0].samples, 12);
  assert_true(scores[0].value > 1);
  esp_job_close(job);
}

static int setup(void **state) {
  char name[] = "api-run-XXXXXX";
  if (!mkdtemp(name) || !realpath(name, root)) return 1;
  return tiny_make(root) == ESP_OK ? 0 : 1;
}
static int teardown(void **state) {
  return esp_remove_tree(root) == ESP_OK ? 0 : 1;
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_straight), cmocka_unit_test(test_resume),       cmocka_unit_test(test_resume_often),
      cmocka_unit_test(test_threads),  cmocka_unit_test(test_signal),       cmocka_unit_test(test_accumulation),
      cmocka_unit_test(test_policies), cmocka_unit_test(test_best),         cmocka_unit_test(test_refusals),
      cmocka_unit_test(test_damage),   cmocka_unit_test(test_changed_data), cmocka_unit_test(test_check_and_data),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
