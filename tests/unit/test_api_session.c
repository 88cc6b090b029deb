/* Stepping by hand, and the doors to files: sessions, inspect, matrix, report, merge, doctor, on a tiny model.
 * Mutations seen caught: the learning-rate factor ignored in esp_session_step: test_step fails; esp_session_calibrate
 * that only counts: test_calibrate fails. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "espalier/espalier.h"
#include "tiny.h"

static char root[4096], model[4200];
static const char *const settings[] = {"model.dtype=fp32", "adapter.r=4", "adapter.alpha=8", "optim.lr=1e-2"};

static void ok(esp_status st) {
  if (st != ESP_OK) fail_msg("%s", esp_error_message());
}

static esp_session *open_session(const char *adapter) {
  esp_session *s = NULL;
  ok(esp_session_open(model, settings, 4, &s));
  ok(esp_session_attach(s, adapter));
  return s;
}

static void test_text(void **state) {
  esp_session *s = open_session(NULL);
  int32_t *ids;
  int64_t n;
  char *text;
  ok(esp_session_encode(s, "caf\xc3\xa9 !", 0, &ids, &n));
  assert_int_equal(n, 7);
  ok(esp_session_decode(s, ids, n, &text));
  assert_string_equal(text, "caf\xc3\xa9 !");
  assert_int_equal(esp_session_eos(s), 256);
  esp_free(ids);
  esp_free(text);
  esp_session_close(s);
}

static void test_step(void **state) {
  static const int32_t a[] = {10, 20, 30, 40, 50}, b[] = {7, 8, 9};
  static const float wb[] = {0, 0, 1};
  esp_example batch[2] = {{a, NULL, 5}, {b, wb, 3}};
  esp_session *s = open_session(NULL);
  esp_step_result before, step, after;
  ok(esp_session_loss(s, batch, 2, &before));
  assert_true(before.trained_tokens == 5); /* four of the first, one of the second */
  ok(esp_session_step(s, batch, 2, &step));
  assert_true(step.loss == before.loss);
  assert_int_equal(step.step, 1);
  assert_true(step.grad_norm > 0 && step.lr == 1e-2);
  for (int i = 0; i < 15; i++) ok(esp_session_step(s, batch, 2, &step));
  ok(esp_session_loss(s, batch, 2, &after));
  assert_true(after.loss < 0.7 * before.loss);
  esp_session_set_lr_factor(s, 0);
  ok(esp_session_step(s, batch, 2, &step));
  assert_true(step.lr == 0);
  esp_step_result still;
  ok(esp_session_loss(s, batch, 2, &still));
  assert_true(still.loss == after.loss);
  /* saved and loaded: the same loss */
  char dir[4300];
  snprintf(dir, sizeof dir, "%s/adapter", root);
  ok(esp_session_save(s, dir));
  esp_session_close(s);
  s = open_session(dir);
  ok(esp_session_loss(s, batch, 2, &still));
  assert_true(still.loss == after.loss);
  /* a larger batch than any before */
  enum { LONG = 400 };
  static int32_t many[LONG];
  for (int i = 0; i < LONG; i++) many[i] = i % 250;
  esp_example large = {many, NULL, LONG};
  ok(esp_session_step(s, &large, 1, &step));
  assert_true(isfinite(step.loss));
  esp_session_close(s);
}

static void compare(const char *a, const char *b, const char *what) {
  char path[4600];
  esp_st *x, *y;
  snprintf(path, sizeof path, "%s/adapter_model.safetensors", a);
  ok(esp_st_open(path, &x));
  snprintf(path, sizeof path, "%s/adapter_model.safetensors", b);
  ok(esp_st_open(path, &y));
  assert_int_equal(esp_st_count(x), esp_st_count(y));
  for (int i = 0; i < esp_st_count(x); i++) {
    const esp_st_entry *p = esp_st_at(x, i), *q = esp_st_find(y, p->name);
    if (!q || p->bytes != q->bytes || p->dtype != q->dtype)
      fail_msg("%s: %s has %lld bytes, the run %lld", what, p->name, (long long)p->bytes,
               (long long)(q ? q->bytes : -1));
    if (p->dtype != ESP_F32) assert_memory_equal(p->data, q->data, (size_t)p->bytes);
    for (int64_t k = 0; p->dtype == ESP_F32 && k < p->bytes / 4; k++) {
      double u = ((const float *)p->data)[k], v = ((const float *)q->data)[k];
      if (!(fabs(u - v) <= 1e-5)) fail_msg("%s: %s[%lld] is %g, the run has %g", what, p->name, (long long)k, u, v);
    }
  }
  esp_st_close(x);
  esp_st_close(y);
}

/* What starts from data refuses to compute before it has seen some, by name; afterwards it stands where a run on the
 * same sample does, after a step of each. */
static void test_calibrate(void **state) {
  static const char *const starts[][2] = {{"adapter.init=eva", "adapter.init eva"},
                                          {"adapter.init=corda", "adapter.init corda"},
                                          {"adapter.init=lora_ga", "adapter.init lora_ga"},
                                          {"adapter.type=fish", "an adapter of type fish"}};
  static const char prompt[] = "item 7 is ", answer[] = "red and green";
  char run[4300], stepped[4300], out[4400], yaml[600], path[4300];
  snprintf(run, sizeof run, "%s/shown", root);
  snprintf(stepped, sizeof stepped, "%s/stepped", root);
  snprintf(path, sizeof path, "%s/r.yaml", root);
  ok(tiny_write(root, "one.jsonl", "{\"prompt\": \"item 7 is \", \"completion\": \"red and green\"}\n"));
  for (size_t i = 0; i < sizeof starts / sizeof *starts; i++) {
    const char *own[] = {"model.dtype=fp32", "adapter.r=4", "adapter.alpha=8",
                         "optim.lr=1e-2",    starts[i][0],  "optim.max_grad_norm=1"};
    const char *prompts[] = {prompt}, *answers[] = {answer};
    esp_session *s = NULL;
    esp_job *job = NULL;
    esp_step_result r;
    esp_run_result result;
    char *text;
    ok(esp_session_open(model, own, 6, &s));
    ok(esp_session_attach(s, NULL));
    assert_int_equal(esp_session_step_text(s, prompts, answers, 1, &r), ESP_ERR_RECIPE);
    assert_non_null(strstr(esp_error_message(), starts[i][1]));
    assert_non_null(strstr(esp_error_message(), "esp_session_calibrate"));
    assert_null(strchr(esp_error_message(), '\n'));
    assert_int_equal(esp_session_generate(s, prompts, 1, NULL, &text), ESP_ERR_RECIPE);
    assert_int_equal(esp_session_save(s, stepped), ESP_ERR_RECIPE);
    int32_t *a, *b, ids[64];
    int64_t n, m;
    float weights[64] = {0};
    ok(esp_session_encode(s, prompt, 0, &a, &n));
    ok(esp_session_encode(s, answer, 0, &b, &m));
    memcpy(ids, a, (size_t)n * 4);
    memcpy(ids + n, b, (size_t)m * 4);
    ids[n + m] = esp_session_eos(s);
    for (int64_t k = n; k <= n + m; k++) weights[k] = 1;
    esp_example sample = {ids, weights, n + m + 1};
    ids[0] += 1000; /* a mistake leaves the session usable */
    assert_int_equal(esp_session_calibrate(s, &sample, 1, 1), ESP_ERR_DATA);
    ids[0] -= 1000;
    assert_int_equal(esp_session_calibrate(s, &sample, 1, 0), ESP_ERR_DATA);
    ok(esp_session_calibrate(s, &sample, 1, 1));
    ok(esp_session_calibrate(s, &sample, 1, 1)); /* it has its start: nothing to do */
    ok(esp_session_step(s, &sample, 1, &r));
    ok(esp_session_save(s, stepped));
    esp_session_close(s);
    snprintf(yaml, sizeof yaml,
             "model: {base_model: model, dtype: fp32}\nadapter: {r: 4, alpha: 8}\noptim: {lr: 1e-2, max_grad_norm: "
             "1}\nschedule: {name: constant, warmup: 0}\ntrain: {max_steps: 1, micro_batch_size: 1}\ntasks: [{name: t, "
             "data: [{path: one.jsonl}]}]\n");
    snprintf(out, sizeof out, "checkpoint.output_dir=%s", run);
    const char *more[] = {out, starts[i][0]};
    ok(esp_job_open_text(yaml, strlen(yaml), path, more, 2, &job));
    ok(esp_job_run(job, &(esp_run_options){0}, &result));
    esp_job_close(job);
    snprintf(out, sizeof out, "%s/adapters/t", run);
    compare(stepped, out, starts[i][1]);
    ok(esp_session_open(model, own, 6, &s));
    ok(esp_session_attach(s, stepped)); /* the file has its start */
    ok(esp_session_step_text(s, prompts, answers, 1, &r));
    esp_session_close(s);
    esp_free(a);
    esp_free(b);
    ok(esp_remove_tree(run));
    ok(esp_remove_tree(stepped));
  }
}

static void test_mistakes(void **state) {
  static const int32_t ids[] = {1, 2, 999}, good[] = {1, 2, 3};
  static const float none[] = {1, 0, 0}; /* the first token is never predicted */
  esp_example bad = {ids, NULL, 3}, one = {good, NULL, 1}, untrained = {good, none, 3}, fine = {good, NULL, 3};
  esp_step_result r;
  esp_session *s = NULL;
  assert_int_equal(esp_session_open(root, settings, 4, &s), ESP_ERR_DATA);
  assert_null(s);
  const char *wrong[] = {"adapter.rnak=4"};
  assert_int_equal(esp_session_open(model, wrong, 1, &s), ESP_ERR_RECIPE);
  assert_non_null(strstr(esp_error_message(), "rnak"));
  ok(esp_session_open(model, settings, 4, &s));
  assert_int_equal(esp_session_step(s, &fine, 1, &r), ESP_ERR_RECIPE); /* nothing to train */
  ok(esp_session_attach(s, NULL));
  assert_int_equal(esp_session_attach(s, NULL), ESP_ERR_RECIPE);
  assert_int_equal(esp_session_step(s, &bad, 1, &r), ESP_ERR_DATA);
  assert_non_null(strstr(esp_error_message(), "999"));
  assert_int_equal(esp_session_step(s, &one, 1, &r), ESP_ERR_DATA);
  assert_int_equal(esp_session_step(s, &untrained, 1, &r), ESP_ERR_DATA);
  assert_int_equal(esp_session_step(s, NULL, 0, &r), ESP_ERR_DATA);
  ok(esp_session_step(s, &fine, 1, &r)); /* a mistake leaves the session usable */
  esp_session_close(s);
}

static void test_generate(void **state) {
  esp_session *s = open_session(NULL);
  const char *prompts[2] = {"item 1 is", "x"};
  char *a[2], *b[2], *alone[1];
  esp_generate_options o = {.max_new_tokens = 9, .temperature = 1, .top_p = 0.9, .seed = 5};
  ok(esp_session_generate(s, prompts, 2, &o, a));
  ok(esp_session_generate(s, prompts, 2, &o, b));
  ok(esp_session_generate(s, prompts, 1, &o, alone));
  assert_string_equal(a[0], b[0]);
  assert_string_equal(a[1], b[1]);
  assert_string_equal(a[0], alone[0]); /* what else is in the batch does not matter */
  for (int i = 0; i < 2; i++) esp_free(a[i]), esp_free(b[i]);
  esp_free(alone[0]);
  esp_session_close(s);
}

static void composed(const char *const *dirs, const double *weights, int n, const int32_t *use, char **texts) {
  static const char *const prompts[3] = {"x", "x", "x"};
  esp_generate_options o = {.max_new_tokens = 6, .adapters = use};
  esp_session *s = NULL;
  ok(esp_session_open(model, settings, 4, &s));
  for (int i = 0; i < n; i++) ok(esp_session_add(s, dirs[i], weights[i]));
  ok(esp_session_generate(s, prompts, 3, &o, texts));
  if (n) assert_int_equal(esp_session_add(s, dirs[0], 1), ESP_ERR_RECIPE); /* too late */
  esp_session_close(s);
}

static void free3(char **texts) {
  for (int i = 0; i < 3; i++) esp_free(texts[i]);
}

/* Two adapters that learned to say different things, one per row, and added up. */
static void test_several_adapters(void **state) {
  static const char *const prompt[] = {"x"}, *const says[] = {"aaaa", "bbbb"};
  static const int32_t use[] = {1, 0, -1};
  char dir[2][4300], *mixed[3], *one[3], *two[3], *base[3], *both[3];
  const char *dirs[2] = {dir[0], dir[1]};
  for (int k = 0; k < 2; k++) {
    esp_session *s = open_session(NULL);
    esp_step_result r;
    for (int i = 0; i < 25; i++) ok(esp_session_step_text(s, prompt, &says[k], 1, &r));
    snprintf(dir[k], sizeof dir[k], "%s/says%d", root, k);
    ok(esp_session_save(s, dir[k]));
    esp_session_close(s);
  }
  const double weights[] = {1, 1}, cancel[] = {1, -1};
  composed(dirs, weights, 2, use, mixed);
  composed(&dirs[0], weights, 1, NULL, one);
  composed(&dirs[1], weights, 1, NULL, two);
  composed(NULL, NULL, 0, NULL, base);
  assert_string_equal(mixed[0], two[0]);
  assert_string_equal(mixed[1], one[0]);
  assert_string_equal(mixed[2], base[0]);
  assert_string_equal(one[0], "aaaa");
  assert_string_equal(two[0], "bbbb");
  assert_true(strcmp(base[0], one[0]) != 0 && strcmp(base[0], two[0]) != 0);
  const char *twice[2] = {dir[0], dir[0]};
  composed(twice, cancel, 2, NULL, both); /* its effect less its effect */
  assert_string_equal(both[0], base[0]);
  char **all[] = {mixed, one, two, base, both};
  for (int i = 0; i < 5; i++) free3(all[i]);
  esp_session *s = open_session(NULL);
  const int32_t wrong[] = {1};
  esp_generate_options o = {.adapters = wrong};
  assert_int_equal(esp_session_generate(s, prompt, 1, &o, mixed), ESP_ERR_RECIPE);
  assert_non_null(strstr(esp_error_message(), "chooses adapter 1 of 1"));
  esp_session_close(s);
}

static void has(char *text, const char *words) {
  if (!text || !strstr(text, words)) fail_msg("'%s' is not in: %s", words, text ? text : "(null)");
}

static void test_files(void **state) {
  static const char recipe[] =
      "name: t\nmodel: {base_model: model, dtype: fp32}\nadapter: {type: lora, r: 2, alpha: 4}\n"
      "data: {sequence_len: 64}\ntrain: {max_steps: 3}\n"
      "eval: {sets: [{name: a, path: a.test.jsonl, metric: perplexity}]}\n"
      "tasks: [{name: a, data: [{path: a.jsonl}], eval: a}]\n"
      "after: [{merge: {out: merged, verify: 2}}, {report: {}}]\ncheckpoint: {output_dir: run}\n";
  char path[4500], run[4300], *text = NULL;
  esp_job *job = NULL;
  esp_run_result r;
  snprintf(path, sizeof path, "%s/r.yaml", root);
  snprintf(run, sizeof run, "%s/run", root);
  ok(esp_job_open_text(recipe, sizeof recipe - 1, path, NULL, 0, &job));
  ok(esp_job_run(job, NULL, &r));
  esp_job_close(job);
  assert_int_equal(r.steps, 3);
  snprintf(path, sizeof path, "%s/report.html", run);
  assert_true(esp_file_exists(path));
  ok(esp_run_matrix(run, NULL, &text));
  has(text, "ACC");
  esp_free(text);
  static const char *const places[] = {"", "/adapters/a", "/checkpoints/checkpoint-00000003-task1", "/merged",
                                       "/merged/model.safetensors"};
  static const char *const kinds[] = {"\"run\"", "\"adapter\"", "\"checkpoint\"", "\"model\"", "\"safetensors\""};
  for (int i = 0; i < 5; i++) {
    snprintf(path, sizeof path, "%s%s", run, places[i]);
    ok(esp_inspect(path, 1, &text));
    has(text, kinds[i]);
    esp_free(text);
    ok(esp_inspect(path, 0, &text));
    esp_free(text);
  }
  assert_int_equal(esp_inspect(root, 0, &text), ESP_ERR_DATA);
  const char *adapters[1];
  char adapter[4400], out[4300];
  snprintf(adapter, sizeof adapter, "%s/adapters/a", run);
  snprintf(out, sizeof out, "%s/merged2", root);
  adapters[0] = adapter;
  esp_merge_options m = {.base = model, .inputs = adapters, .n_inputs = 1, .out = out, .dtype = "fp32", .verify = 2};
  esp_merge_result mr;
  ok(esp_merge(&m, &mr));
  assert_true(mr.changed > 0 && mr.rows > 0 && mr.max_rel < 1e-4);
  esp_extract_options x = {.base = model, .tuned = out, .rank = 2};
  esp_extract_result xr;
  snprintf(path, sizeof path, "%s/extracted", root);
  x.out = path;
  ok(esp_extract(&x, &xr));
  assert_true(xr.sites > 0 && xr.max_error < 1e-2); /* the change has rank 2 */
  ok(esp_doctor(0, 0, &text));
  has(text, "instructions_used");
  esp_free(text);
}

static int setup(void **state) {
  char name[] = "api-session-XXXXXX";
  if (!mkdtemp(name) || !realpath(name, root)) return 1;
  snprintf(model, sizeof model, "%s/model", root);
  return tiny_make(root) == ESP_OK ? 0 : 1;
}
static int teardown(void **state) {
  return esp_remove_tree(root) == ESP_OK ? 0 : 1;
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_text),      cmocka_unit_test(test_step),     cmocka_unit_test(test_mistakes),
      cmocka_unit_test(test_calibrate), cmocka_unit_test(test_generate), cmocka_unit_test(test_several_adapters),
      cmocka_unit_test(test_files),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
