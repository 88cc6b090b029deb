/* engine.c: what a step runs on. The same code builds it on `cpu` for a run and on `count` for a plan. */
#include <string.h>

#include "backend/plugin.h"
#include "io/file.h"
#include "train/train.h"

const char *esp_engine_device(const esp_recipe *r) {
  return strcmp(r->parallel.device, "auto") ? r->parallel.device : esp_device_auto(NULL, 0);
}

esp_status esp_engine_init(esp_engine *e, const esp_recipe *r, esp_comm *comm, bool counting) {
  const char *device = esp_engine_device(r);
  memset(e, 0, sizeof *e);
  e->r = r;
  e->comm = comm;
  if (counting) device = strcmp(device, "cpu") ? "count:cuda" : "count";
  ESP_TRY(esp_backend_create(device, &e->be));
  e->be->tf32 = r->parallel.tf32;
  return ESP_OK;
}

/* Gradients on devices are reduced there. */
static esp_status device_comm(esp_engine *e) {
  const esp_plugin *plugin;
  if (e->comm->size == 1 || e->be->on_host || esp_backend_counts(e->be) || !e->adapter) return ESP_OK;
  esp_comm_destroy(e->device_comm);
  e->device_comm = NULL;
  ESP_TRY(esp_plugin_load(&plugin));
  return plugin->comm(e->be, e->comm, e->adapter->params->total + e->adapter->params->reserve, esp_comm_agree,
                      &e->device_comm);
}

void esp_engine_unload(esp_engine *e) {
  esp_comm_destroy(e->device_comm);
  e->device_comm = NULL;
  esp_optim_destroy(e->optim);
  for (int i = 0; e->bank && e->bank[i] && e->bank[i] != e->adapter; i++) esp_adapter_destroy(e->bank[i]);
  esp_mem_free(e->bank);
  esp_adapter_destroy(e->adapter);
  esp_adapter_destroy(e->experts[1]);
  esp_model_close(e->model);
  e->optim = NULL;
  e->adapter = NULL;
  e->experts[0] = e->experts[1] = NULL;
  e->model = NULL;
  e->bank = NULL;
}

void esp_engine_deinit(esp_engine *e) {
  if (!e->be) return;
  esp_strategies_destroy(&e->strategies);
  esp_mem_free(e->sequence_lists);
  esp_engine_unload(e);
  if (e->stack_ready) esp_stack_deinit(&e->stack);
  esp_backend_destroy(e->be);
  memset(e, 0, sizeof *e);
}

/* The tokens of the text that a prompt starts as. */
static esp_status prompt_tokens(const esp_engine *e, const char *base, esp_adapter_cfg *cfg, esp_ids *ids) {
  esp_tokenizer *tok = NULL;
  esp_status st = esp_tokenizer_load(e->r->model.tokenizer ? e->r->model.tokenizer : base, &tok);
  if (st == ESP_OK) st = esp_tokenizer_encode(tok, cfg->prompt_text, strlen(cfg->prompt_text), true, ids);
  esp_tokenizer_destroy(tok);
  cfg->prompt_ids = ids->data;
  cfg->n_prompt_ids = (int)ids->n;
  return st;
}

static esp_status adapter_create(esp_engine *e, const char *base, const esp_adapter_cfg *cfg, bool trainable) {
  esp_status st = ESP_OK;
  esp_adapter_cfg own = *cfg;
  esp_ids ids = {0};
  if (cfg->prompt_text && cfg->prompt_text[0]) ESP_GOTO(prompt_tokens(e, base, &own, &ids));
  st = esp_adapter_create(e->model, &own, "default", trainable, &e->adapter);
out:
  esp_ids_deinit(&ids);
  return st;
}

/* For a plan there are no files: adapters of the same shapes. */
static esp_status load_earlier(esp_engine *e) {
  char dir[ESP_PATH];
  for (int i = 0; i < e->n_earlier; i++) {
    const esp_recipe_task *t = &e->r->tasks[i];
    if (esp_backend_counts(e->be))
      ESP_TRY(esp_adapter_create(e->model, &t->adapter, t->name, false, &e->bank[i]));
    else
      ESP_TRY(esp_adapter_load(e->model, esp_train_adapter(e->r, i, dir), t->name, false, &e->bank[i]));
  }
  return ESP_OK;
}

static esp_status activate(esp_engine *e) {
  if (!e->adapter) return ESP_OK;
  e->bank[e->n_earlier] = e->adapter;
  bool stack = e->r->continual.policy == ESP_POLICY_STACK;
  return stack ? esp_adapters_activate(e->model, e->bank, e->n_earlier + 1)
               : esp_adapters_activate(e->model, &e->adapter, 1);
}

esp_status esp_engine_load(esp_engine *e, const char *base, const esp_adapter_cfg *cfg, const char *adapter_dir,
                           bool trainable) {
  esp_engine_unload(e);
  esp_model_options o = {e->r->model.dtype, e->r->model.random_init, e->r->seed, e->r->memory.offload_base};
  ESP_TRY(esp_model_open(base, e->be, &o, &e->model));
  e->bank = esp_mem_alloc(ESP_MEM_HOST, (size_t)(e->n_earlier + 2) * sizeof *e->bank);
  if (!e->bank) return ESP_ERR_MEMORY;
  ESP_TRY(load_earlier(e));
  if (adapter_dir)
    ESP_TRY(esp_adapter_load(e->model, adapter_dir, "default", trainable, &e->adapter));
  else if (cfg)
    ESP_TRY(adapter_create(e, base, cfg, trainable));
  if (e->second_dir) ESP_TRY(esp_adapter_load(e->model, e->second_dir, "second", false, &e->experts[1]));
  e->experts[0] = e->adapter;
  ESP_TRY(activate(e));
  ESP_TRY(esp_model_load_weights(e->model));
  ESP_TRY(esp_backend_sync(e->be));
  return device_comm(e);
}

esp_status esp_engine_optim(esp_engine *e, const esp_optim_cfg *cfg, bool keep) {
  if (keep && e->optim && !strcmp(e->optim->cfg.name, cfg->name)) return esp_optim_configure(e->optim, cfg);
  esp_optim_destroy(e->optim);
  e->optim = NULL;
  return esp_optim_create(cfg, e->adapter->params, &e->optim);
}

esp_status esp_engine_stack(esp_engine *e, int64_t capacity) {
  if (e->stack_ready) esp_stack_deinit(&e->stack);
  e->stack_ready = false;
  ESP_TRY(esp_stack_init(&e->stack, e->be, capacity));
  e->stack_ready = true;
  return ESP_OK;
}

esp_status esp_engine_strategies(esp_engine *e, const esp_train_data *data, const esp_train_hooks *hooks) {
  const esp_recipe *r = e->r;
  size_t n = (size_t)r->n_tasks;
  ESP_TRY(esp_strategies_create(&r->continual.strategy, e->be, &e->strategies));
  const void **lists = e->sequence_lists = esp_mem_alloc(ESP_MEM_HOST, 2 * n * sizeof *lists);
  if (!lists) return ESP_ERR_MEMORY;
  for (size_t i = 0; i < n; i++) {
    lists[i] = &r->tasks[i].data_cfg;
    lists[n + i] = r->tasks[i].name;
  }
  e->sequence = (esp_sequence){.be = e->be,
                               .comm = e->comm,
                               .tok = data->tok,
                               .data = data->task,
                               .data_cfg = (const esp_data_cfg *const *)lists,
                               .task_name = (const char *const *)(lists + n),
                               .n_tasks = r->n_tasks,
                               .one_adapter = r->continual.policy == ESP_POLICY_CONTINUE,
                               .ckpt = r->memory.activation_checkpointing,
                               .seed = r->seed,
                               .ctx = hooks ? hooks->ctx : NULL,
                               .generate = hooks ? hooks->generate : NULL};
  return ESP_OK;
}

esp_status esp_engine_task(esp_engine *e, int task, const esp_task_steps *steps) {
  esp_sequence *q = &e->sequence;
  q->model = e->model, q->adapter = e->adapter, q->optim = e->optim;
  q->bank = e->bank, q->n_bank = e->n_earlier + 1;
  q->stack = &e->stack, q->device_comm = e->device_comm;
  q->task = task;
  q->micro_batch = e->r->tasks[task].train.micro_batch_size;
  q->max_tokens = steps->max_tokens;
  int64_t span = q->micro_batch * e->r->tasks[task].train.gradient_accumulation_steps * e->comm->size;
  q->epoch_steps = (steps->rows + span - 1) / span;
  if (!e->opened) ESP_TRY(esp_strategies_open(&e->strategies, q));
  e->opened = true;
  return esp_strategies_task_begin(&e->strategies, q);
}

esp_score_request esp_engine_request(esp_engine *e, const esp_train_data *d, int i) {
  const esp_recipe *r = e->r;
  esp_score_request q = {.model = e->model,
                         .tok = d->tok,
                         .data = d->eval[i],
                         .stack = &e->stack,
                         .set = &r->eval.sets[i],
                         .batch_tokens = r->eval.batch_tokens,
                         .comm = e->comm,
                         .strategies = &e->strategies,
                         .sequence = &e->sequence,
                         .owner = -1,
                         .experts = e->experts[1] ? e->experts : NULL};
  for (int t = r->n_tasks - 1; t >= 0; t--)
    for (int k = 0; k < r->tasks[t].n_eval; k++)
      if (r->tasks[t].eval[k] == i) q.owner = t;
  return q;
}

int esp_engine_keeps(const esp_recipe *r, int task) {
  bool keeps =
      r->continual.policy == ESP_POLICY_STACK || esp_strategies_have(&r->continual.strategy, ESP_STRATEGY_BANK);
  return keeps ? task : 0;
}

void esp_engine_parameters(const esp_engine *e, int64_t *trainable, int64_t *total) {
  esp_site **sites;
  int n = esp_model_sites(e->model, &sites);
  bool tied = esp_model_describe(e->model)->tied;
  *trainable = *total = 0;
  for (int i = 0; i < n; i++) {
    if (sites[i]->is_head && tied) continue; /* the embedding's storage */
    *total += sites[i]->out * sites[i]->in + (sites[i]->bias_tensor ? sites[i]->out : 0);
  }
  for (int i = 0; e->adapter && i < e->adapter->params->count; i++)
    if (!e->adapter->params->list[i].frozen) *trainable += e->adapter->params->list[i].numel;
}
