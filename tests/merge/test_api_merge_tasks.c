/* before: merge_tasks: what a task starts from is the merge, in what is trained, with ranks to spare that can be
 * trained; what cannot be is refused in one line. after: merge_tasks in a run of two tasks: what it writes is, byte for
 * byte, what `merge` makes of the run's adapters (of its models, with merge_then_new), mwa weighs by the run's scores,
 * resuming a finished run makes the same again, options that cannot work are refused before anything is trained, and
 * the names in the recipe are the names there are. Mutation seen to be caught: the row before the task in place of the
 * one after it (score_of) fails "scores_are_weights"; the scale of a start in one factor only (lora_start_from) fails
 * "starts_there".
 */
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
#include "tasks/matrix.h"
#include "tiny.h"

static char root[4096], model[4200];

static const char recipe[] = "name: tiny\n"
                             "seed: 3\n"
                             "model: {base_model: model, dtype: fp32}\n"
                             "adapter: {type: lora, r: 4, alpha: 8, target: all-linear}\n"
                             "data: {sequence_len: 64}\n"
                             "optim: {lr: 1e-2}\n"
                             "train: {max_steps: 5, micro_batch_size: 2}\n"
                             "eval:\n"
                             "  sets:\n"
                             "    - {name: a, path: a.test.jsonl, metric: perplexity}\n"
                             "    - {name: b, path: b.test.jsonl, metric: perplexity}\n"
                             "    - {name: c, path: b.test.jsonl, metric: exact_match, max_new_tokens: 2}\n"
                             "tasks:\n"
                             "  - {name: a, data: [{path: a.jsonl}], eval: a}\n"
                             "  - {name: b, data: [{path: b.jsonl}], eval: b}\n";

static const char *at(const char *out, const char *name) {
  static char path[8][4400];
  static int next;
  next = (next + 1) % 8;
  snprintf(path[next], sizeof path[next], "%s/%s%s%s", root, out, *name ? "/" : "", name);
  return path[next];
}

static esp_status open_job(const char *out, const char *after, const char *more, esp_job **job) {
  char place[4400], steps[1024], file[4200];
  snprintf(place, sizeof place, "checkpoint.output_dir=%s", at(out, ""));
  snprintf(steps, sizeof steps, "after=%s", after);
  snprintf(file, sizeof file, "%s/recipe.yaml", root);
  const char *list[] = {place, steps, more};
  return esp_job_open_text(recipe, sizeof recipe - 1, file, list, more ? 3 : 2, job);
}

static void run(const char *out, const char *after, const char *more) {
  esp_job *job;
  esp_run_result result;
  esp_run_options opt = {0};
  if (open_job(out, after, more, &job) != ESP_OK || esp_job_run(job, &opt, &result) != ESP_OK)
    fail_msg("%s", esp_error_message());
  esp_job_close(job);
}

static void same(const char *a, const char *b) {
  char *x, *y;
  size_t n, k;
  assert_int_equal(esp_file_read(a, &x, &n), ESP_OK);
  assert_int_equal(esp_file_read(b, &y, &k), ESP_OK);
  if (n != k || memcmp(x, y, n) != 0) fail_msg("%s and %s differ", a, b);
  esp_mem_free(x);
  esp_mem_free(y);
}

static void merge(const esp_merge_method *m, const char *first, const char *second, int as_adapter, const char *out) {
  const char *const inputs[] = {first, second};
  esp_merge_options o = {
      .base = model, .inputs = inputs, .n_inputs = 2, .out = out, .method = m, .as_adapter = as_adapter};
  if (esp_merge(&o, NULL) != ESP_OK) fail_msg("%s", esp_error_message());
}

static void equals_merge(void **state) {
  (void)state;
  run("run",
      "[merge_tasks: {method: ties, density: [0.3, 0.6], lambda: 0.5, out: ties},"
      " merge_tasks: {method: opcm, as: adapter, out: opcm}]",
      NULL);
  static const double density[] = {0.3, 0.6};
  esp_merge_method m = ESP_MERGE_METHOD;
  m.name = "ties";
  m.density = density;
  m.n_density = 2;
  m.lambda = 0.5;
  merge(&m, at("run", "adapters/a"), at("run", "adapters/b"), 0, at("ties", ""));
  same(at("ties", "model.safetensors"), at("run", "ties/model.safetensors"));
  m = (esp_merge_method)ESP_MERGE_METHOD;
  m.name = "opcm";
  merge(&m, at("run", "adapters/a"), at("run", "adapters/b"), 1, at("opcm", ""));
  same(at("opcm", "adapter_model.safetensors"), at("run", "opcm/adapter_model.safetensors"));
}

/* The recipe that the run wrote says the same, and its last steps can be done again. */
static void resumed(void **state) {
  (void)state;
  esp_job *job;
  esp_run_result result;
  assert_int_equal(esp_remove_tree(at("run", "ties")), ESP_OK);
  if (esp_job_open_run(at("run", ""), NULL, &job) != ESP_OK ||
      esp_job_resume(job, &(esp_run_options){0}, &result) != ESP_OK)
    fail_msg("%s", esp_error_message());
  esp_job_close(job);
  same(at("ties", "model.safetensors"), at("run", "ties/model.safetensors"));
}

static void scores_are_weights(void **state) {
  (void)state;
  static const char *const steps[] = {"[merge_tasks: {method: mwa, power: 2, metric: b, out: mwa}]",
                                      "[merge_tasks: {method: mwa, power: 2, out: mwa}]"};
  for (int mean = 0; mean < 2; mean++) {
    char out[16];
    esp_matrix *x;
    snprintf(out, sizeof out, "scores%d", mean);
    run(out, steps[mean], NULL);
    if (esp_matrix_load(at(out, "matrix.json"), &x) != ESP_OK) fail_msg("%s", esp_error_message());
    double metrics[2];
    for (int t = 0; t < 2; t++)
      metrics[t] =
          mean ? (*esp_matrix_cell(x, t + 1, 0) + *esp_matrix_cell(x, t + 1, 1)) / 2 : *esp_matrix_cell(x, t + 1, 1);
    assert_true(fabs(metrics[0] / metrics[1] - 1) > 0.01);
    esp_matrix_destroy(x);
    esp_merge_method m = ESP_MERGE_METHOD;
    m.name = "mwa";
    m.metrics = metrics;
    m.n_metrics = 2;
    m.better = "lower"; /* perplexity */
    m.power = 2;
    merge(&m, at(out, "adapters/a"), at(out, "adapters/b"), 0, at("mwa", ""));
    same(at("mwa", "model.safetensors"), at(out, "mwa/model.safetensors"));
  }
}

static void models_of_a_chain(void **state) {
  (void)state;
  run("chain", "[merge_tasks: {method: magmax, out: magmax}]", "continual.policy=merge_then_new");
  const char *const last[] = {at("chain", "adapters/b")};
  esp_merge_options o = {.base = at("chain", "bases/a"), .inputs = last, .n_inputs = 1, .out = at("second", "")};
  if (esp_merge(&o, NULL) != ESP_OK) fail_msg("%s", esp_error_message());
  esp_merge_method m = ESP_MERGE_METHOD;
  m.name = "magmax";
  merge(&m, at("chain", "bases/a"), at("second", ""), 0, at("magmax", ""));
  same(at("magmax", "model.safetensors"), at("chain", "magmax/model.safetensors"));
}

/* ---- before ---- */

static const char *third = "{name: c, data: [{path: a.jsonl}], eval: a, optim: {lr: 1e-30}}";

static esp_status open_before(const char *out, const char *before, const char *more, esp_job **job) {
  char place[4400], steps[1024], file[4200], text[sizeof recipe + 200];
  snprintf(place, sizeof place, "checkpoint.output_dir=%s", at(out, ""));
  snprintf(steps, sizeof steps, "before=%s", before);
  snprintf(file, sizeof file, "%s/recipe.yaml", root);
  const char *list[] = {place, steps, more};
  snprintf(text, sizeof text, "%s  - %s\ncontinual: {policy: new_per_task}\n", recipe, third);
  return esp_job_open_text(text, strlen(text), file, list, more ? 3 : 2, job);
}

static esp_st *model_of(const char *out, const char *adapter, const char *name) {
  char path[4400];
  esp_st *f;
  const char *const inputs[] = {at(out, adapter)};
  esp_merge_options o = {.base = model, .inputs = inputs, .n_inputs = 1, .out = at(name, ""), .dtype = "fp32"};
  if (esp_merge(&o, NULL) != ESP_OK) fail_msg("%s", esp_error_message());
  snprintf(path, sizeof path, "%s", at(name, "model.safetensors"));
  assert_int_equal(esp_st_open(path, &f), ESP_OK);
  return f;
}

/* What the last task starts from: at a rate of nothing its adapter is still there in the end. */
static void starts_there(void **state) {
  (void)state;
  static const struct {
    const char *before, *policy;
    int filled;
  } cases[] = {{"[merge_tasks: {method: magmax}]", "continual.policy=continue", 4},
               {"[merge_tasks: {method: linear, rank: 2}]", "continual.policy=new_per_task", 2}};
  for (int i = 0; i < 2; i++) {
    esp_job *job;
    esp_run_result result;
    if (open_before("before", cases[i].before, cases[i].policy, &job) != ESP_OK ||
        esp_job_run(job, &(esp_run_options){0}, &result) != ESP_OK)
      fail_msg("%s", esp_error_message());
    esp_job_close(job);
    esp_st *base, *start = model_of("before", "starts/c", "from"), *end = model_of("before", "adapters/c", "to"), *c;
    assert_int_equal(esp_st_open(at("model", "model.safetensors"), &base), ESP_OK);
    double moved = 0, apart = 0;
    for (int t = 0; t < esp_st_count(start); t++) {
      const esp_st_entry *x = esp_st_at(start, t), *y = esp_st_find(end, x->name), *w = esp_st_find(base, x->name);
      assert_true(x->dtype == ESP_F32 && y && y->bytes == x->bytes && w && w->dtype == ESP_BF16);
      for (int64_t k = 0; k < x->bytes / 4; k++) {
        double s = ((const float *)x->data)[k], e = ((const float *)y->data)[k];
        double b = esp_bf16_to_f32(((const uint16_t *)w->data)[k]);
        moved = fmax(moved, fabs(s - b));
        apart = fmax(apart, fabs(s - e));
      }
    }
    if (!(moved > 1e-3 && apart < 1e-6 * fmax(1, moved)))
      fail_msg("the merge moves by %g, the start is %g off", moved, apart);
    /* ranks without a share in the merge can be trained: a row of A, and B = 0 */
    assert_int_equal(esp_st_open(at("before", "adapters/c/adapter_model.safetensors"), &c), ESP_OK);
    for (int t = 0; t < esp_st_count(c); t++) {
      const esp_st_entry *x = esp_st_at(c, t);
      bool is_a = strstr(x->name, "lora_A") != NULL;
      for (int k = 0; k < 4; k++) {
        double most = 0;
        for (int64_t j = 0; j < x->shape[is_a]; j++)
          most = fmax(most, fabs(((const float *)x->data)[is_a ? k * x->shape[1] + j : j * 4 + k]));
        if (is_a || k < cases[i].filled)
          assert_true(most > 1e-6);
        else
          assert_true(most < 1e-20);
      }
    }
    esp_st_close(base);
    esp_st_close(start);
    esp_st_close(end);
    esp_st_close(c);
    assert_int_equal(esp_remove_tree(at("before", "")), ESP_OK);
  }
}

static void before_refusals(void **state) {
  (void)state;
  static const struct {
    const char *before, *more, *says;
  } cases[] = {
      {"[merge_tasks: {method: ties}]", NULL, "before[0].merge_tasks, for task 'b': merge: ties needs a density"},
      {"[merge_tasks: {method: linear, weight: [1, 2, 3]}]", NULL, "3 weights for 2 tasks"},
      {"[merge_tasks: {method: linear, rank: 5}]", NULL, "before[0].merge_tasks: rank: 5, the adapter has 4"},
      {"[merge_tasks: {method: linear, out: here}]", NULL, "out: it is always starts/<task>"},
      {"[merge_tasks: {method: linear, dtype: bf16}]", NULL, "dtype: is for continual.policy merge_then_new"},
      {"[merge_tasks: {method: linear, as: adapter}]", "continual.policy=merge_then_new", "starts from a model"},
      {"[merge_tasks: {method: linear}]", "continual.policy=stack", "the earlier adapters stay active"},
      {"[merge_tasks: {method: linear}]", "continual.policy=joint", "there is one task"},
      {"[merge_tasks: {method: linear}]", "adapter.type=vera", "an adapter of type vera cannot start from a merge"},
      {"[merge_tasks: {method: linear}]", "tasks[0]={name: x, data: [{path: a.jsonl}], adapter: {type: oft}}",
       "linear works on factors, which an adapter of type oft has not"},
      {"[merge_tasks: {method: ties, density: 0.5}]", "tasks[0]={name: x, data: [{path: a.jsonl}], adapter: {r: 2}}",
       "ties needs one rank, task 'x' has 2 and task 'b' 4"},
      {"[merge_tasks: {method: linear}]", "adapter.init=eva", "adapter.init eva gives the adapter of each task other"},
      {"[merge_tasks: {method: linear}]", "adapter.init=pissa", "adapter.init pissa changes the base"},
      {"[merge_tasks: {method: linear}]", "adapter.lora_fa=true", "A would not be the one that is frozen"},
      {"[merge_tasks: {method: linear}]", "continual.strategy=l2", "which a merge before a task does not keep"},
      {"[report: {out: x}]", NULL, "unknown key 'report' in before[0]"},
      {"merge_tasks", NULL, "before: expected a list of merge_tasks"},
      {"[merge_tasks: {method: linear}, merge_tasks: {method: ties, density: 1}]", NULL, "2 steps"},
      {"[]", "tasks[1].before=[merge_tasks: {method: linear}]", "tasks[1].before: one task has been learned by then"},
      {"[]", "tasks[0].before=[merge_tasks: {method: linear}]", "tasks[0].before: no task has been learned by then"},
      {"[merge_tasks: {method: linear}]", "tasks=[{name: a, data: [{path: a.jsonl}]}]", "before: there is one task"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    esp_job *job = NULL;
    if (open_before("never", cases[i].before, cases[i].more, &job) != ESP_ERR_RECIPE)
      fail_msg("not refused: %s %s", cases[i].before, cases[i].more ? cases[i].more : "");
    assert_null(job);
    if (!strstr(esp_error_message(), cases[i].says)) fail_msg("%s, not: %s", esp_error_message(), cases[i].says);
    if (strchr(esp_error_message(), '\n')) fail_msg("more than one line: %s", esp_error_message());
  }
  /* what only the model shows: found before the first step */
  static const struct {
    const char *more, *says;
  } late[] = {{"adapter.modules_to_save=[norm]", "in full"},
              {"continual.policy=new_per_task", "task 'c' does not train 'model.layers.0.self_attn.k_proj'"}};
  for (size_t i = 0; i < 2; i++) {
    esp_job *job = NULL;
    esp_run_result result;
    if (i == 1) third = "{name: c, data: [{path: a.jsonl}], adapter: {target: [q_proj]}}";
    if (open_before("never", "[merge_tasks: {method: linear}]", late[i].more, &job) != ESP_OK)
      fail_msg("%s", esp_error_message());
    assert_int_equal(esp_job_run(job, &(esp_run_options){0}, &result), ESP_ERR_RECIPE);
    if (!strstr(esp_error_message(), late[i].says)) fail_msg("%s, not: %s", esp_error_message(), late[i].says);
    assert_false(esp_dir_exists(at("never", "")));
    esp_job_close(job);
  }
}

static void refusals(void **state) {
  (void)state;
  static const struct {
    const char *after, *more, *says;
  } cases[] = {
      {"[merge_tasks: {method: tie}]", NULL, "did you mean 'ties'"},
      {"[merge_tasks: {method: ties}]", NULL, "after[0].merge_tasks: merge: ties needs a density"},
      {"[report: , merge_tasks: {method: magmax, density: 0.5}]", NULL, "after[1].merge_tasks: merge: magmax takes no"},
      {"[merge_tasks: {method: linear, weight: [1, 2, 3]}]", NULL, "3 weights for 2 tasks"},
      {"[merge_tasks: {method: ties, density: [0.1, 0.2, 0.3]}]", NULL, "3 densities for 2 inputs"},
      {"[merge_tasks: {method: lines, lines: [1, 2, 3]}]", NULL, "lines: expected alpha"},
      {"[merge_tasks: {method: svd}]", NULL, "'svd' is no method"},
      {"[merge_tasks: {method: linear, metric: a}]", NULL, "metric: is for mwa"},
      {"[merge_tasks: {method: mwa, metric: d}]", NULL, "no evaluation set is named 'd'"},
      {"[merge_tasks: {method: linear, rank: 4}]", NULL, "rank: is for an adapter"},
      {"[merge_tasks: {method: linear, as: adapter, dtype: bf16}]", NULL, "dtype: is for a model"},
      {"[merge_tasks: {method: linear, as: adapter}]", "continual.policy=merge_then_new", "stand on different models"},
      {"[merge_tasks: {method: opcm}]", "continual.policy=joint", "at least 2 inputs, not 1"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    esp_job *job = NULL;
    assert_int_equal(open_job("never", cases[i].after, cases[i].more, &job), ESP_ERR_RECIPE);
    assert_null(job);
    if (!strstr(esp_error_message(), cases[i].says)) fail_msg("%s, not: %s", esp_error_message(), cases[i].says);
  }
}

static void names_of_the_recipe(void **state) {
  (void)state;
  for (int combine = 0; combine < 2; combine++) {
    int n;
    const char *const *names = esp_merge_methods(combine, &n);
    for (int i = 0; i < n; i++) {
      char after[128];
      esp_job *job = NULL;
      snprintf(after, sizeof after, "[merge_tasks: {method: %s, as: %s}]", names[i], combine ? "adapter" : "model");
      if (open_job("never", after, NULL, &job) != ESP_OK && strstr(esp_error_message(), "is not one of"))
        fail_msg("%s", esp_error_message());
      if (job) esp_job_close(job);
    }
  }
}

static int setup(void **state) {
  char name[] = "api-merge-tasks-XXXXXX";
  if (!mkdtemp(name) || !realpath(name, root)) return 1;
  snprintf(model, sizeof model, "%s/model", root);
  return tiny_make(root) == ESP_OK ? 0 : 1;
}
static int teardown(void **state) {
  return esp_remove_tree(root) == ESP_OK ? 0 : 1;
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(equals_merge),      cmocka_unit_test(resumed),         cmocka_unit_test(scores_are_weights),
      cmocka_unit_test(models_of_a_chain), cmocka_unit_test(refusals),        cmocka_unit_test(names_of_the_recipe),
      cmocka_unit_test(starts_there),      cmocka_unit_test(before_refusals),
  };
  return cmocka_run_group_tests(tests, setup, teardown);
}
