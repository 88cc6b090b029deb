/* Recipes: errors with their place, all in one pass; overrides; origins; the resolved form; the hash.
 * Mutation seen to be caught: leaving out the memcpy of sections into tasks (bind_list) fails test_tasks; hashing paths
 * whole instead of by their last part fails test_hash; an order that keeps the file's fails test_order. */
#include <glob.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "core/mem.h"
#include "recipe/recipe.h"

static const char minimal[] = "model: {base_model: base}\n"
                              "tasks: [{name: t, data: [{path: t.jsonl}]}]\n";

static esp_recipe *parse(const char *yaml, const char *const *overrides, int n) {
  esp_recipe *r = NULL;
  esp_status st = esp_recipe_parse(yaml, strlen(yaml), "dir/r.yaml", overrides, n, &r);
  if (st != ESP_OK) print_error("%s\n", esp_error_message());
  assert_int_equal(st, ESP_OK);
  return r;
}

static void expect_message(const char *yaml, const char *override, const char *message) {
  esp_recipe *r = NULL;
  esp_status st = esp_recipe_parse(yaml, strlen(yaml), "r.yaml", &override, override ? 1 : 0, &r);
  if (st == ESP_OK) print_error("accepted: %s %s\n", yaml, override ? override : "");
  assert_int_equal(st, ESP_ERR_RECIPE);
  assert_null(r);
  assert_string_equal(esp_error_message(), message);
}

/* One line appended to the minimal recipe (line 3), and the one error that it makes. */
static const struct {
  const char *line, *message;
} bad[] = {
    {"adapter: {lora_rnak: 8}", "r.yaml:3:11: unknown key 'lora_rnak' in adapter (did you mean 'rank'?)"},
    {"adapter: {rr: 8}", "r.yaml:3:11: unknown key 'rr' in adapter"},
    {"adaptor: {r: 8}", "r.yaml:3:1: unknown key 'adaptor' in the recipe (did you mean 'adapter'?)"},
    {"lr: 1e-3", "r.yaml:3:1: unknown key 'lr' in the recipe (did you mean 'optim.lr'?)"},
    {"train: {seed: 3}", "r.yaml:3:9: unknown key 'seed' in train (it stands at the top of a recipe)"},
    {"adapter: {r: eight}", "r.yaml:3:14: adapter.r: expected an integer, got 'eight'"},
    {"adapter: {r: 8.5}", "r.yaml:3:14: adapter.r: expected an integer, got '8.5'"},
    {"adapter: {r: \"8\"}", "r.yaml:3:14: adapter.r: expected an integer, got '8' in quotes"},
    {"adapter: {r: [8]}", "r.yaml:3:14: adapter.r: expected an integer, got a list"},
    {"adapter: {r: 0}", "r.yaml:3:14: adapter.r: 0 is out of range (at least 1, at most 65536)"},
    {"adapter: {r: 99999999999999999999}", "r.yaml:3:14: adapter.r: 99999999999999999999 does not fit in 64 bits"},
    {"adapter: {dropout: 1}", "r.yaml:3:20: adapter.dropout: 1 is out of range (at least 0, below 1)"},
    {"adapter: {rslora: yes}", "r.yaml:3:19: adapter.rslora: expected true or false, got 'yes'"},
    {"adapter: 8", "r.yaml:3:10: adapter: expected a mapping, got '8'"},
    {"adapter: {bias: lora-only}",
     "r.yaml:3:17: adapter.bias: 'lora-only' is not one of none, all, lora_only (did you mean 'lora_only'?)"},
    {"adapter: {target: q_proj}",
     "r.yaml:3:19: adapter.target: expected all-linear, a list of names or regex:EXPRESSION, got 'q_proj'"},
    {"adapter: {target: []}", "r.yaml:3:19: adapter.target: an empty list matches nothing"},
    {"adapter: {target: 'regex:(q'}",
     "r.yaml:3:19: adapter.target: 'regex:(q' is not a regular expression: missing closing parenthesis at character 3"},
    {"adapter: {rank_pattern: {q_proj: 0}}",
     "r.yaml:3:34: adapter.rank_pattern: 0 is out of range (at least 1, at most 65536)"},
    {"adapter: {r: 8, lora_r: 9}", "r.yaml:3:17: adapter.lora_r says again what 'r' says at line 3"},
    {"adapter: {layers_pattern: h}", "r.yaml:3:27: adapter.layers_pattern: needs adapter.layers"},
    {"optim: {lr: 1e-4, lr: 1e-5}", "r.yaml:3:19: duplicate key 'lr' (first at line 3)"},
    {"optim: {lr: .nan}", "r.yaml:3:13: optim.lr: expected a number, got '.nan'"},
    {"optim: {lr: 0}", "r.yaml:3:13: optim.lr: 0 is out of range (above 0, at most 100)"},
    {"optim: {lr: 1e999}", "r.yaml:3:13: optim.lr: 1e999 is too large"},
    {"optim: {betas: [0.9]}", "r.yaml:3:16: optim.betas: expected a list of two numbers, got a list"},
    {"optim: {nesterov: true}", "r.yaml:3:19: optim.nesterov: needs momentum above 0"},
    {"schedule: {warmup: 100%}", "r.yaml:3:20: schedule.warmup: 100% is out of range (at least 0%, below 100%)"},
    {"schedule: {warmup: some}", "r.yaml:3:20: schedule.warmup: expected steps or a percentage, got 'some'"},
    {"train: {epochs: 2, max_steps: 5}",
     "r.yaml:3:31: train.max_steps: train.epochs is given as well, only one of them can hold"},
    {"data: {chat_template: builtin:llama4}",
     "r.yaml:3:23: data.chat_template: 'builtin:llama4' is not one of auto, builtin:chatml, builtin:llama3, "
     "builtin:mistral, builtin:gemma, builtin:alpaca (did you mean 'llama3'?)"},
    {"memory: {limit: 2 lightyears}",
     "r.yaml:3:17: memory.limit: expected a percentage or a size such as 12GiB, got '2 lightyears'"},
    {"log: {to: [stdut]}",
     "r.yaml:3:12: log.to: 'stdut' is not one of stdout, jsonl, tensorboard (did you mean 'stdout'?)"},
    {"checkpoint: {output_dir: '${nam}'}",
     "r.yaml:3:26: checkpoint.output_dir: unknown variable in '${nam}' (there are ${name}, ${seed} and ${env:NAME})"},
    {"checkpoint: {output_dir: '${env:ESP_NOT_SET}'}",
     "r.yaml:3:26: checkpoint.output_dir: the environment variable ESP_NOT_SET is not set"},
    {"checkpoint: {output_dir: '${env:A:B}'}",
     "r.yaml:3:26: checkpoint.output_dir: expected ${env:NAME} or ${env:NAME:-text}"},
    {"checkpoint: {keep_best: {metric: los}}",
     "r.yaml:3:34: checkpoint.keep_best.metric: 'los' is neither loss nor an evaluation set (did you mean 'loss'?)"},
    {"eval: {sets: [{name: a, path: p, metric: choice}, {name: a, path: p, metric: choice}]}",
     "r.yaml:3:58: eval.sets[1].name: 'a' is already the name of eval.sets[0]"},
    {"eval: {sets: [{name: a, path: p}]}",
     "r.yaml:3:15: missing key 'eval.sets[0].metric' (choice: the most likely "
     "label; exact_match, rouge_l: of generated text; base_xent, base_kl: against the base)"},
    {"after: [{merg: {}}]", "r.yaml:3:10: unknown key 'merg' in after[0] (did you mean 'merge'?)"},
    {"continual: {method: replay}", "r.yaml:3:13: unknown key 'method' in continual"},
    {"parallel: {shard: 3}", "r.yaml:3:12: unknown key 'shard' in parallel"},
    {"train: {loss: token_mean}", "r.yaml:3:9: unknown key 'loss' in train"},
    {"name: a/b", "r.yaml:3:7: name: expected a name of up to 63 letters, digits, '.', '_' and '-', got 'a/b'"},
    {"seed: -1", "r.yaml:3:7: seed: expected an integer from 0, got '-1'"},
    {"version: 2", "r.yaml:3:10: version: expected 1, got '2'"},
    {"log: {every: *x}", "r.yaml:3:14: unknown anchor '*x'"},
    {"log: !!map {}", "r.yaml:3:6: tags are not supported (tag:yaml.org,2002:map)"},
    {"? [a]\n: b", "r.yaml:3:3: a key must be a single word, not a list or mapping"},
};

static void test_errors(void **state) {
  (void)state;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    char yaml[1024];
    snprintf(yaml, sizeof yaml, "%s%s\n", minimal, bad[i].line);
    expect_message(yaml, NULL, bad[i].message);
  }
}

static void test_structure_errors(void **state) {
  (void)state;
  expect_message("", NULL,
                 "r.yaml:1:1: missing key 'model.base_model' (directory of a Hugging Face model: config.json, "
                 "*.safetensors, tokenizer.json)\nr.yaml:1:1: missing key 'tasks' (what is trained, in this order)");
  expect_message("model: {base_model: b}\ntasks: []\n", NULL, "r.yaml:2:8: tasks: the list is empty");
  expect_message("model: {base_model: b}\ntasks: [{name: t, data: []}]\n", NULL,
                 "r.yaml:2:25: tasks[0].data: the list is empty");
  expect_message("model: {base_model: b}\ntasks: [{name: t, data: {path: p}}]\n", NULL,
                 "r.yaml:2:25: tasks[0].data: expected a list of sources, or a mapping with sources and keys of data");
  expect_message("model: {base_model: b}\ntasks:\n  - {name: t, data: [{path: p}], eval: x}\n", NULL,
                 "r.yaml:3:40: tasks[0].eval: no evaluation set is named 'x' in eval.sets");
  expect_message("model: {base_model: b}\ntasks:\n  - {name: t, data: [{path: p}], schedule: {restart: per_task}}\n",
                 NULL, "r.yaml:3:54: tasks[0].schedule.restart: holds for the whole run, a task cannot set it");
  expect_message("model: [\n", NULL,
                 "r.yaml:2:1: YAML syntax: did not find expected node content (while parsing a flow node that began on "
                 "line 2)");
  expect_message("a: 1\n---\nb: 2\n", NULL, "r.yaml:2:1: a second YAML document");
  char deep[128] = "model: ";
  for (int i = 0; i < 40; i++) strcat(deep, "[");
  expect_message(deep, NULL, "r.yaml:1:31: nested deeper than 24 levels");
  char bomb[1024] = "a: &a [x,x,x,x,x,x,x,x,x,x]\n";
  for (char c = 'b'; c < 'h'; c++) {
    char line[128];
    snprintf(line, sizeof line, "%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n", c, c, c - 1, c - 1, c - 1, c - 1, c - 1,
             c - 1, c - 1, c - 1);
    strcat(bomb, line);
  }
  esp_recipe *r;
  assert_int_equal(esp_recipe_parse(bomb, strlen(bomb), "r.yaml", NULL, 0, &r), ESP_ERR_RECIPE);
  assert_non_null(strstr(esp_error_message(), "more than 100000 values once aliases are expanded"));
}

static void test_all_in_one_pass(void **state) {
  (void)state;
  static const char yaml[] = "model: {base_model: b, dtype: int3}\n"
                             "adapter:\n"
                             "  lora_rnak: 8\n"
                             "  alpha: -1\n"
                             "tasks: [{name: t, data: [{path: p}], eval: nowhere}]\n";
  esp_recipe *r;
  const char *override = "optim.lr=fast";
  assert_int_equal(esp_recipe_parse(yaml, strlen(yaml), "r.yaml", &override, 1, &r), ESP_ERR_RECIPE);
  assert_string_equal(esp_error_message(),
                      "r.yaml:1:31: model.dtype: 'int3' is not one of bf16, fp32\n"
                      "r.yaml:3:3: unknown key 'lora_rnak' in adapter (did you mean 'rank'?)\n"
                      "r.yaml:4:10: adapter.alpha: -1 is out of range (above 0, at most 1000000)\n"
                      "r.yaml:5:44: tasks[0].eval: no evaluation set is named 'nowhere' in eval.sets\n"
                      "override 'optim.lr=fast': optim.lr: expected a number, got 'fast'");
}

static void test_values(void **state) {
  (void)state;
  esp_recipe *r = parse("name: x\nseed: 7\nmodel: {base_model: /abs/base, dtype: fp32}\n"
                        "adapter: {lora_rank: 4, lora_alpha: 1e1, target_modules: [q_proj, v_proj], layers: [0, 2],\n"
                        "          rank_pattern: {'layers\\.0.*': 8}, exclude: 'regex:.*up.*'}\n"
                        "optim: {learning_rate: 1e-3, betas: [0.5, 0.75], max_grad_norm: off}\n"
                        "schedule: {name: wsd, warmup: 5%, restart: continuous}\n"
                        "train: {max_steps: 12}\n"
                        "memory: {limit: 2GiB, activation_checkpointing: full}\n"
                        "log: {to: [jsonl, tensorboard]}\n"
                        "eval: {sets: [{name: e, path: e.jsonl, metric: exact_match, limit: 10}]}\n"
                        "checkpoint: {output_dir: 'out/${name}-${seed}', keep_best: {metric: e}}\n"
                        "after: [{merge: {dtype: fp16}}, {report: }]\n"
                        "tasks: [{name: t, data: [{path: d/t.jsonl, weight: 0.5}], eval: e}]\n",
                        NULL, 0);
  assert_string_equal(r->name, "x");
  assert_int_equal(r->seed, 7);
  assert_string_equal(r->model.base_model, "/abs/base");
  assert_string_equal(r->model.tokenizer, "/abs/base");
  assert_int_equal(r->model.dtype, ESP_F32);
  assert_int_equal(r->adapter.r, 4);
  assert_true(r->adapter.alpha == 10);
  assert_int_equal(r->adapter.n_target, 2);
  assert_string_equal(r->adapter.target[1], "v_proj");
  assert_null(r->adapter.target_regex);
  assert_string_equal(r->adapter.exclude_regex, ".*up.*");
  assert_int_equal(r->adapter.layers[1], 2);
  assert_true(r->adapter.rank_pattern[0].value == 8);
  assert_int_equal(r->adapter.seed, 7);
  assert_true(r->optim.lr == 1e-3 && r->optim.beta1 == 0.5 && r->optim.beta2 == 0.75 && r->optim.max_grad_norm == 0);
  assert_int_equal(r->schedule.name, ESP_SCHED_WSD);
  assert_true(fabs(r->schedule.warmup_steps - 0.05) < 1e-15);
  assert_false(r->schedule_restart);
  assert_int_equal(r->train.max_steps, 12);
  assert_int_equal(r->memory.limit_bytes, INT64_C(2) << 30);
  assert_int_equal(r->memory.activation_checkpointing, ESP_CKPT_FULL);
  assert_false(r->log.stdout_on);
  assert_true(r->log.jsonl && r->log.tensorboard);
  assert_int_equal(r->eval.sets[0].metric, ESP_METRIC_EXACT_MATCH);
  assert_string_equal(r->eval.sets[0].source.path, "dir/e.jsonl");
  assert_string_equal(r->checkpoint.output_dir, "dir/out/x-7");
  assert_true(r->checkpoint.keep_best_max);
  assert_int_equal(r->n_after, 2);
  assert_string_equal(r->after[0].out, "dir/out/x-7/merged");
  assert_string_equal(r->after[0].dtype, "fp16");
  assert_int_equal(r->after[1].kind, ESP_AFTER_REPORT);
  assert_string_equal(r->tasks[0].data[0].path, "dir/d/t.jsonl");
  assert_true(r->tasks[0].data[0].weight == 0.5);
  assert_int_equal(r->tasks[0].n_eval, 1);
  esp_recipe_destroy(r);

  r = parse(minimal, NULL, 0);
  assert_string_equal(r->name, "r");
  assert_string_equal(r->checkpoint.output_dir, "runs/r");
  assert_int_equal(r->adapter.n_target, 1);
  assert_string_equal(r->adapter.target[0], "all-linear");
  assert_true(r->memory.limit_share == 0.95 && r->memory.limit_bytes == 0);
  assert_int_equal(r->checkpoint.every, 200);
  esp_recipe_destroy(r);
}

static void test_tasks(void **state) {
  (void)state;
  static const char *const overrides[] = {"tasks[1].optim.lr=5e-5", "tasks[first].train.num_epochs=3",
                                          "data.cutoff_len=77", "adapter.lora_r=2"};
  esp_recipe *r = parse("model: {base_model: b}\n"
                        "adapter: {r: 8, target: [q_proj]}\n"
                        "train: {max_steps: 9, micro_batch_size: 5}\n"
                        "tasks:\n"
                        "  - {name: first, data: [{path: a}]}\n"
                        "  - name: second\n"
                        "    data: {sources: [{path: b}, {path: c}], sequence_len: 33}\n"
                        "    adapter: {target: 'regex:.*v_proj', dropout: 0.1}\n",
                        overrides, 4);
  assert_int_equal(r->adapter.r, 2);
  assert_int_equal(r->tasks[0].adapter.r, 2);
  assert_int_equal(r->tasks[0].data_cfg.sequence_len, 77);
  assert_int_equal(r->tasks[1].data_cfg.sequence_len, 33);
  assert_int_equal(r->tasks[1].n_data, 2);
  assert_true(r->tasks[0].optim.lr == 2e-4 && r->tasks[1].optim.lr == 5e-5);
  assert_true(r->tasks[0].train.epochs == 3);
  assert_int_equal(r->tasks[0].train.max_steps, 0); /* the task's own epochs count before the recipe's steps */
  assert_int_equal(r->tasks[1].train.max_steps, 9);
  assert_int_equal(r->tasks[1].train.micro_batch_size, 5);
  assert_int_equal(r->tasks[0].adapter.n_target, 1);
  assert_int_equal(r->tasks[1].adapter.n_target, 0);
  assert_string_equal(r->tasks[1].adapter.target_regex, ".*v_proj");
  char *text = esp_recipe_resolved(r);
  assert_non_null(text);
  assert_non_null(strstr(text, "\n  r: 2 # override adapter.lora_r=2\n"));
  assert_non_null(strstr(text, "\n  micro_batch_size: 5 # line 3\n"));
  assert_non_null(strstr(text, "\n  alpha: 32 # default\n"));
  assert_non_null(strstr(text, "\n      lr: 5e-05 # override tasks[1].optim.lr=5e-5\n"));
  esp_mem_free(text);
  esp_recipe_destroy(r);
}

static void test_overrides(void **state) {
  (void)state;
  expect_message(minimal, "optim.lr", "override 'optim.lr': expected key=value");
  expect_message(minimal, "tasks[4].name=x", "override 'tasks[4].name=x': 'tasks' has 1 entries, there is no [4]");
  expect_message(minimal, "optim[0].lr=1",
                 "override 'optim[0].lr=1': 'optim' has 0 entries, there is no [0]\n"
                 "override 'optim[0].lr=1': optim: expected a mapping, got a list");
  expect_message(minimal, "optim.lrr=1", "override 'optim.lrr=1': unknown key 'lrr' in optim (did you mean 'lr'?)");
  expect_message(minimal, "seed.x=1", "override 'seed.x=1': seed: expected an integer from 0, got a mapping");
  expect_message(minimal, "adapter.target=[a",
                 "override 'adapter.target=[a': YAML syntax: did not find expected ',' "
                 "or ']' (while parsing a flow sequence that began on line 1)");
  static const char *const relative[] = {"model.base_model=other"};
  esp_recipe *r = parse(minimal, relative, 1);
  assert_string_equal(r->model.base_model, "other"); /* from the command line: the working directory's */
  esp_recipe_destroy(r);
}

static void hash_of(const char *yaml, const char *path, const char *override, char out[33]) {
  esp_recipe *r;
  assert_int_equal(esp_recipe_parse(yaml, strlen(yaml), path, &override, override ? 1 : 0, &r), ESP_OK);
  esp_recipe_hash(r, out);
  esp_recipe_destroy(r);
}

static void test_hash(void **state) {
  (void)state;
  static const char *const same[] = {
      "log.every=7",   "checkpoint.output_dir=/x", "checkpoint.every=3",     "name=z",
      "optim.lr=2e-4", "parallel.threads=2",       "tasks[0].optim.lr=2e-4", "model.base_model=else/where/base/"};
  static const char *const different[] = {"optim.lr=2.1e-4",
                                          "seed=43",
                                          "tasks[0].name=u",
                                          "adapter.target=[q_proj]",
                                          "adapter.target=regex:q",
                                          "train.max_steps=4",
                                          "schedule.restart=continuous",
                                          "tasks[0].optim.weight_decay=0.1",
                                          "data.sequence_len=64",
                                          "tasks[0].data=[{path: u.jsonl}]",
                                          "model.dtype=fp32"};
  char base[33], other[33];
  hash_of(minimal, "a/r.yaml", NULL, base);
  assert_int_equal(strlen(base), 32);
  hash_of(minimal, "/another/place/r.yaml", NULL, other);
  assert_string_equal(base, other);
  for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
    hash_of(minimal, "a/r.yaml", same[i], other);
    assert_string_equal(base, other);
  }
  for (size_t i = 0; i < sizeof different / sizeof *different; i++) {
    hash_of(minimal, "a/r.yaml", different[i], other);
    assert_string_not_equal(base, other);
  }
}

/* continual.order: the tasks stand in that order (or only some of them), each with what the file says of it; the hash
 * is that of the recipe that lists them so; the resolved form can be read again. */
static void test_order(void **state) {
  (void)state;
  static const char three[] = "model: {base_model: base}\n"
                              "tasks:\n"
                              "  - {name: a, data: [{path: a.jsonl}]}\n"
                              "  - {name: b, data: [{path: b.jsonl}], train: {epochs: 2}}\n"
                              "  - {name: c, data: [{path: c.jsonl}]}\n";
  static const char turned[] = "model: {base_model: base}\n"
                               "tasks:\n"
                               "  - {name: c, data: [{path: c.jsonl}]}\n"
                               "  - {name: b, data: [{path: b.jsonl}], train: {epochs: 2}}\n";
  static const char *const order[] = {"tasks[b].train.epochs=3", "continual.order=[c, b]", "tasks[b].train.epochs=2"};
  char one[33], other[33];
  esp_recipe *r = parse(three, order, 3), *again = NULL;
  assert_int_equal(r->n_tasks, 2);
  assert_string_equal(r->tasks[0].name, "c");
  assert_string_equal(r->tasks[1].name, "b");
  assert_true(r->tasks[1].train.epochs == 2);
  assert_true(r->tasks[0].train.epochs == 1);
  esp_recipe_hash(r, one);
  hash_of(turned, "r.yaml", NULL, other);
  assert_string_equal(one, other);
  char *text = esp_recipe_resolved(r);
  assert_int_equal(esp_recipe_parse(text, strlen(text), "/elsewhere/recipe.yaml", NULL, 0, &again), ESP_OK);
  esp_recipe_hash(again, other);
  assert_string_equal(one, other);
  esp_mem_free(text);
  esp_recipe_destroy(r);
  esp_recipe_destroy(again);
  expect_message(three, "continual.order=[a, bb]",
                 "override 'continual.order=[a, bb]': continual.order: no task is named 'bb'");
  expect_message(three, "continual.order=[a, b, a]",
                 "override 'continual.order=[a, b, a]': continual.order: 'a' stands twice");
}

static void test_schema(void **state) {
  (void)state;
  static const char *const formats[] = {"text", "json", "markdown"};
  for (int i = 0; i < 3; i++) {
    char *text = esp_schema_render(formats[i]);
    assert_non_null(text);
    assert_non_null(strstr(text, "gradient_accumulation_steps"));
    assert_non_null(strstr(text, "lora_rank"));
    esp_mem_free(text);
  }
  assert_null(esp_schema_render("xml"));
  char *text = esp_recipe_template("my base: here");
  assert_non_null(text);
  esp_recipe *r = parse(text, NULL, 0);
  assert_string_equal(r->model.base_model, "dir/my base: here");
  assert_string_equal(r->checkpoint.output_dir, "dir/runs/my-run");
  /* a template says what would hold without it */
  char defaults[33], template[33];
  esp_recipe_hash(r, template);
  hash_of("model: {base_model: 'my base: here'}\ntasks: [{name: first, data: [{path: first.jsonl}]}]\n", "r.yaml", NULL,
          defaults);
  assert_string_equal(template, defaults);
  esp_recipe_destroy(r);
  esp_mem_free(text);
}

/* Every recipe of the repository is one, and survives its own resolved form. */
static void test_examples(void **state) {
  (void)state;
  static const char *const patterns[] = {ESP_SOURCE_DIR "/recipes/*.yaml", ESP_SOURCE_DIR "/recipes/demo/*.yaml",
                                         ESP_SOURCE_DIR "/recipes/continual/*.yaml"};
  int seen = 0;
  for (size_t k = 0; k < sizeof patterns / sizeof *patterns; k++) {
    glob_t g;
    assert_int_equal(glob(patterns[k], 0, NULL, &g), 0);
    for (size_t i = 0; i < g.gl_pathc; i++, seen++) {
      esp_recipe *r = NULL, *again = NULL;
      char first[33], second[33];
      if (esp_recipe_load(g.gl_pathv[i], NULL, 0, &r) != ESP_OK) fail_msg("%s", esp_error_message());
      esp_recipe_hash(r, first);
      char *text = esp_recipe_resolved(r);
      if (esp_recipe_parse(text, strlen(text), "/elsewhere/recipe.yaml", NULL, 0, &again) != ESP_OK)
        fail_msg("%s", esp_error_message());
      esp_recipe_hash(again, second);
      assert_string_equal(first, second);
      assert_string_equal(r->model.base_model, again->model.base_model);
      if (r->checkpoint.output_dir[0] == '/') /* else the default, below the working directory */
        assert_string_equal(r->checkpoint.output_dir, again->checkpoint.output_dir);
      esp_mem_free(text);
      esp_recipe_destroy(r);
      esp_recipe_destroy(again);
    }
    globfree(&g);
  }
  assert_true(seen >= 6);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_errors),
      cmocka_unit_test(test_structure_errors),
      cmocka_unit_test(test_all_in_one_pass),
      cmocka_unit_test(test_values),
      cmocka_unit_test(test_tasks),
      cmocka_unit_test(test_overrides),
      cmocka_unit_test(test_hash),
      cmocka_unit_test(test_order),
      cmocka_unit_test(test_schema),
      cmocka_unit_test(test_examples),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
