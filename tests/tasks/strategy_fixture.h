/* strategy_fixture.h: a tiny base, an adapter on it and a few tasks with their data, as a strategy sees them: hooks are
 * called by hand here, in the order of a run. Everything runs on the backend that backend_env.h names. */
#ifndef TESTS_STRATEGY_FIXTURE_H
#define TESTS_STRATEGY_FIXTURE_H

#include <math.h>

#include "../adapters/adapter_fixture.h"
#include "core/mem.h"
#include "tasks/strategy.h"

static const char *const sf_config =
    "{\"model_type\":\"llama\",\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":32,\"intermediate_size\":48,"
    "\"num_hidden_layers\":2,\"num_attention_heads\":4,\"num_key_value_heads\":2,\"vocab_size\":300,"
    "\"max_position_embeddings\":64,\"rms_norm_eps\":1e-05,\"rope_theta\":10000.0,\"hidden_act\":\"silu\","
    "\"tie_word_embeddings\":true,\"torch_dtype\":\"float32\"}";

enum { SF_TASKS = 3, SF_SAMPLES = 12 };

typedef struct sf { /* one run in the making */
  fx_run r;
  esp_comm *comm;
  esp_tokenizer *tok;
  esp_adapter *a;
  esp_optim *optim;
  esp_dataset *data[SF_TASKS];
  esp_data_cfg data_cfg;
  const esp_data_cfg *cfgs[SF_TASKS];
  const char *names[SF_TASKS];
  esp_strategy_cfg cfg;
  esp_strategies set;
  esp_sequence q;
} sf;

/* Once per program, after fx_setup. The third task is a classification with 9 rows of one label and 3 of another. */
static inline void sf_setup(void) {
  static const char *const word[SF_TASKS][4] = {
      {"red", "green", "blue", "grey"}, {"one", "two", "three", "four"}, {"cat", "dog", "owl", "bee"}};
  char text[65536];
  size_t n = 0;
  for (int t = 0; t < SF_TASKS; t++) {
    char rows[8192], name[32];
    size_t m = 0;
    for (int i = 0; i < SF_SAMPLES; i++)
      m += t == 2
               ? (size_t)snprintf(rows + m, sizeof rows - m, "{\"text\":\"a %s, %d\",\"label\":\"%s\"}\n",
                                  word[t][i % 4], i, i % 4 ? "often" : "rare")
               : (size_t)snprintf(rows + m, sizeof rows - m, "{\"prompt\":\"say %s %d\",\"completion\":\" %s %s\"}\n",
                                  word[t][i % 4], i, word[t][(i + 1) % 4], i % 3 ? "now" : "then, please");
    snprintf(name, sizeof name, "task%d.jsonl", t);
    OK(esp_file_write_atomic(fx_path(name), rows, m));
    n += (size_t)snprintf(text + n, sizeof text - n, "%s", rows);
  }
  fx_make_base("sequence", sf_config);
  static const char *const special[] = {"<s>", "</s>"};
  OK(esp_bpe_train(text, n, 300, special, 2, fx_path("sequence")));
}

/* cfg.names: the strategies, or none. */
static inline void sf_open(sf *f, const esp_adapter_cfg *adapter, const esp_strategy_cfg *cfg) {
  static const char *const target[] = {"all-linear"};
  static const esp_adapter_cfg lora = {.type = "lora", .r = 4, .alpha = 8, .seed = 5, .target = target, .n_target = 1};
  memset(f, 0, sizeof *f);
  f->cfg = *cfg;
  OK(esp_comm_create("self", &f->comm));
  fx_open(&f->r, fx_path("sequence"), ESP_F32, false);
  OK(esp_adapter_create(f->r.m, adapter ? adapter : &lora, "default", true, &f->a));
  OK(esp_adapters_activate(f->r.m, &f->a, 1));
  OK(esp_model_load_weights(f->r.m));
  OK(esp_tokenizer_load(fx_path("sequence"), &f->tok));
  f->data_cfg = (esp_data_cfg){.sequence_len = 64, .train_on_eos = "turn", .chat_template = "auto", .shuffle = true};
  for (int t = 0; t < SF_TASKS; t++) {
    char name[32];
    snprintf(name, sizeof name, "task%d.jsonl", t);
    esp_data_source src = {.path = fx_path(name), .weight = 1};
    OK(esp_dataset_build(&src, 1, &f->data_cfg, f->tok, &f->data[t]));
    f->cfgs[t] = &f->data_cfg;
    f->names[t] = t == 0 ? "first" : t == 1 ? "second" : "third";
  }
  esp_optim_cfg oc = {.name = "adamw", .lr = 1e-2, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8};
  OK(esp_optim_create(&oc, f->a->params, &f->optim));
  OK(esp_strategies_create(&f->cfg, f->r.be, &f->set));
  f->q = (esp_sequence){.be = f->r.be,
                        .model = f->r.m,
                        .adapter = f->a,
                        .optim = f->optim,
                        .stack = &f->r.stack,
                        .comm = f->comm,
                        .tok = f->tok,
                        .data = f->data,
                        .data_cfg = f->cfgs,
                        .task_name = f->names,
                        .n_tasks = SF_TASKS,
                        .one_adapter = true,
                        .micro_batch = 4,
                        .max_tokens = 256,
                        .epoch_steps = 3,
                        .seed = 11};
  OK(esp_strategies_open(&f->set, &f->q));
}

static inline void sf_close(sf *f) {
  esp_strategies_destroy(&f->set);
  esp_optim_destroy(f->optim);
  for (int t = 0; t < SF_TASKS; t++) esp_dataset_destroy(f->data[t]);
  esp_tokenizer_destroy(f->tok);
  esp_adapter_destroy(f->a);
  fx_close(&f->r);
  esp_comm_destroy(f->comm);
}

/* The gradient of the mean loss of task `t`'s first n samples, as the loop would leave it; its loss. */
static inline double sf_gradient(sf *f, int t, int n) {
  esp_sample s[SF_SAMPLES];
  double loss;
  for (int i = 0; i < n; i++) s[i] = (esp_sample){t, i};
  esp_tensor g = esp_flat(f->r.be->ops->alloc(f->r.be, ESP_MEM_HOST, f->a->params->total * 4), f->a->params->total);
  OK(esp_sequence_gradient_of(&f->q, s, n, g, &loss));
  f->r.be->ops->axpby(f->r.be, esp_sequence_gradient(&f->q), 1.0f, g, 0.0f);
  OK(esp_backend_sync(f->r.be));
  f->r.be->ops->free(f->r.be, g.data);
  return loss;
}

/* One optimizer step of the present task on its first n samples with all hooks but `teach`, as train/step.c has them;
 * the penalty. */
static inline double sf_step(sf *f, int64_t step, int64_t of, int n) {
  double weight = 0, penalty;
  for (int i = 0; i < n; i++) weight += esp_sequence_weight(&f->q, (esp_sample){f->q.task, i});
  esp_strategy_step t = {step, step, of, 1e-2, weight, 0};
  OK(esp_strategies_draw(&f->set, &f->q, &t, &weight));
  t.scale = 1.0 / weight;
  OK(esp_model_sums_reset(f->r.m));
  (void)sf_gradient(f, f->q.task, n);
  esp_tensor g = esp_sequence_gradient(&f->q);
  f->r.be->ops->axpby(f->r.be, g, 0.0f, g, (float)(t.weight * t.scale));
  OK(esp_strategies_pass(&f->set, &f->q, &t));
  penalty = esp_strategies_penalty(&f->set, &f->q, &t);
  OK(esp_strategies_project(&f->set, &f->q, &t));
  esp_optim_step(f->optim, 1e-2, 1.0f);
  OK(esp_strategies_after_step(&f->set, &f->q, &t));
  OK(esp_backend_sync(f->r.be));
  return penalty;
}

static inline void sf_task(sf *f, int task) {
  f->q.task = task;
  OK(esp_strategies_task_begin(&f->set, &f->q));
}

/* The end of the present task, with another to come. */
static inline void sf_end(sf *f) {
  OK(esp_strategies_task_end(&f->set, &f->q));
  OK(esp_strategies_hand_over(&f->set, &f->q));
}

#endif
