/* plan.c: the run, done on the backend that only counts.
 *
 * The same setup and the same step as in a run are executed over the counting backend, with the largest micro-batch
 * there is; the books of core/mem.h then hold what the run will hold. Datasets and tokenizer are real in both.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend/plugin.h"
#include "io/file.h"
#include "train/background.h"
#include "train/checkpoint.h"

static int64_t cgroup_limit(void) {
  static const char *const files[] = {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"};
  for (int i = 0; i < 2; i++) {
    char *text = NULL;
    size_t n;
    if (!esp_file_exists(files[i])) continue;
    if (esp_file_read(files[i], &text, &n) != ESP_OK) continue;
    long long v = atoll(text); /* "max" gives 0 */
    esp_mem_free(text);
    if (v > 0) return v;
  }
  return 0;
}

int64_t esp_memory_limit(const esp_recipe *r) {
  if (r->memory.limit_bytes > 0) return r->memory.limit_bytes;
  int64_t machine = (int64_t)sysconf(_SC_PHYS_PAGES) * (int64_t)sysconf(_SC_PAGESIZE), group = cgroup_limit();
  if (group > 0 && group < machine) machine = group;
  /* Ranks on one machine share its memory. */
  const char *local = getenv("OMPI_COMM_WORLD_LOCAL_SIZE");
  int ranks = local && atoi(local) > 0 ? atoi(local) : 1;
  return (int64_t)((double)(machine / ranks) * r->memory.limit_share);
}

/* A micro-batch by its sizes alone: nothing is computed. */
typedef struct shape {
  int64_t tokens, trained, sequences, labelled; /* labelled: sequences with a loss */
  int64_t longest;                              /* sequence; the others share what is left */
} shape;

/* cu [sequences + 1], weights [tokens] */
static void cut(const shape *s, int32_t *cu, float *weights) {
  int64_t left = s->trained - s->labelled;
  for (int64_t i = 1; i < s->sequences; i++)
    cu[i] = (int32_t)(s->longest + (s->tokens - s->longest) * (i - 1) / (s->sequences - 1));
  cu[s->sequences] = (int32_t)s->tokens;
  for (int64_t i = 0; i < s->labelled; i++) weights[cu[i]] = 1.0f;
  for (int64_t t = 0; t < s->tokens && left > 0; t++)
    if (weights[t] == 0.0f) weights[t] = 1.0f, left--;
}

/* taught: as strategies teach it. */
static esp_status pass(esp_engine *e, const esp_task_steps *c, const shape *s, bool taught) {
  size_t n = (size_t)s->tokens;
  esp_status st = ESP_OK;
  int32_t *ids = calloc(4 * n + 1, sizeof *ids), *cu = ids + 3 * n;
  float *weights = calloc(n, sizeof *weights);
  if (!ids || !weights) ESP_GOTO(esp_fail_oom("a plan's batch", 16 * n));
  cut(s, cu, weights);
  esp_batch b = {.tokens = s->tokens,
                 .ids = ids,
                 .targets = ids + n,
                 .positions = ids + 2 * n,
                 .weights = weights,
                 .cu_seqlens = cu,
                 .n_seqs = (int)s->sequences};
  esp_strategy_step t = {.task_steps = c->steps, .weight = 1, .scale = 1};
  esp_loss_out loss;
  if (taught) ESP_GOTO(esp_strategies_teach(&e->strategies, &e->sequence, &t, &b));
  ESP_GOTO(
      esp_model_step(e->model, &e->stack, &b, e->r->memory.activation_checkpointing, true, 1.0f, 0, 0, &loss, NULL));
  ESP_GOTO(esp_backend_sync(e->be));
out:
  free(ids);
  free(weights);
  return st;
}

static shape make_shape(int64_t tokens, int64_t trained, int64_t sequences, int64_t labelled, int64_t longest) {
  if (sequences < labelled) sequences = labelled;
  if (sequences * longest < tokens) sequences = (tokens + longest - 1) / longest;
  if (longest > tokens - sequences + 1) longest = tokens - sequences + 1;
  return (shape){tokens, trained, sequences, labelled, longest};
}

/* The largest micro-batch and the smallest: a product of few rows may hold more than one of many, whose operands are
 * shared. */
static esp_status passes(esp_engine *e, const esp_task_steps *c, bool taught) {
  int64_t sequences = c->max_blocks - c->max_tokens / 32;
  shape large = make_shape(c->max_tokens, c->max_trained, sequences, c->max_labelled, c->max_length);
  shape small = make_shape(c->min_tokens, c->min_trained, 1, 1, c->max_length);
  ESP_TRY(pass(e, c, &large, taught));
  return pass(e, c, &small, taught);
}

static esp_status evaluations(esp_engine *e, const esp_train_data *d, const esp_train_hooks *hooks) {
  const esp_recipe *r = e->r;
  for (int i = 0; hooks && hooks->score && i < r->eval.n_sets; i++) {
    /* One rank's share is what one rank needs: the counting engine is alone, so it counts the whole set. */
    esp_score_request q = esp_engine_request(e, d, i);
    esp_score_result result;
    ESP_TRY(hooks->score(hooks->ctx, &q, &result));
    if (r->eval.samples > 0) ESP_TRY(hooks->samples(hooks->ctx, &q, r->eval.samples, NULL));
  }
  return ESP_OK;
}

/* The step again, now as a whole over the first rows: this is also what is counted. */
static esp_status plan_step(esp_engine *e, const esp_train_data *d, int task, const esp_task_steps *c, esp_rows *rows,
                            double *flops) {
  const esp_recipe *r = e->r;
  const esp_recipe_task *t = &r->tasks[task];
  esp_status st = ESP_OK;
  esp_packs *packs = NULL;
  ESP_GOTO(passes(e, c, true));
  ESP_GOTO(esp_packs_create(d->task[task], &t->data_cfg, r->seed, task, 0, &packs));
  double before = e->be->stats.flops;
  esp_step_in in = {.packs = packs,
                    .most = c->max_tokens,
                    .task_steps = c->steps,
                    .micro_batch = t->train.micro_batch_size,
                    .accumulate = t->train.gradient_accumulation_steps,
                    .lr = t->optim.lr,
                    .ckpt = r->memory.activation_checkpointing,
                    .seed = r->seed};
  esp_step_out out;
  ESP_GOTO(esp_train_step(e, &in, rows, &out));
  *flops = (e->be->stats.flops - before) / (double)(out.tokens > 0 ? out.tokens : 1); /* per token */
out:
  esp_packs_destroy(packs);
  return st;
}

static esp_status plan_task(esp_engine *e, const esp_train_data *d, const esp_train_hooks *hooks, int task, bool fresh,
                            const esp_task_steps *c, bool **learned, esp_rows *rows, double *flops) {
  const esp_recipe *r = e->r;
  const esp_recipe_task *t = &r->tasks[task];
  e->n_earlier = esp_engine_keeps(r, task);
  if (fresh) ESP_TRY(esp_engine_load(e, r->model.base_model, &t->adapter, NULL, true));
  ESP_TRY(esp_engine_optim(e, &t->optim, task > 0));
  if (!e->stack_ready) ESP_TRY(esp_engine_stack(e, 0));
  const esp_adapter_kind *kind = e->adapter->kind;
  if (kind->task_begin) ESP_TRY(kind->task_begin(e->adapter, task));
  ESP_TRY(esp_plan_start(e, task, learned));
  if (c->steps > 0) ESP_TRY(passes(e, c, false));
  if (fresh) ESP_TRY(esp_calibrate(e, r, d, task));
  ESP_TRY(esp_engine_task(e, task, c));
  ESP_TRY(esp_strategies_deploy(&e->strategies, &e->sequence, true));
  if (fresh || kind->task_begin) ESP_TRY(evaluations(e, d, hooks)); /* what an evaluation holds may grow with tasks */
  ESP_TRY(esp_strategies_deploy(&e->strategies, &e->sequence, false));
  if (c->steps > 0) ESP_TRY(plan_step(e, d, task, c, rows, flops));
  ESP_TRY(esp_strategies_task_end(&e->strategies, &e->sequence));
  if (task + 1 < r->n_tasks) ESP_TRY(esp_strategies_hand_over(&e->strategies, &e->sequence));
  if (task + 1 < r->n_tasks) ESP_TRY(esp_plan_merge(e, task + 1));
  int64_t writing = esp_checkpoint_bytes(e);
  esp_mem_account(ESP_MEM_HOST, writing);
  esp_mem_account(ESP_MEM_HOST, -writing);
  /* again over what strategies have come to hold */
  if (e->strategies.n == 0 || task + 1 < r->n_tasks) return ESP_OK;
  ESP_TRY(esp_strategies_deploy(&e->strategies, &e->sequence, true));
  ESP_TRY(evaluations(e, d, hooks));
  return esp_strategies_deploy(&e->strategies, &e->sequence, false);
}

/* With a device, memory.limit is of its memory; the host's is bounded by what the machine has. */
static void device_fit(const esp_recipe *r, const esp_mem_stats *s, esp_plan *p) {
  const esp_plugin *plugin;
  esp_plugin_probe probe = {0};
  const char *name = esp_engine_device(r);
  int n = strlen(name) > 5 ? atoi(name + 5) : 0;
  esp_recipe machine = {0};
  machine.memory.limit_share = 0.95;
  p->limit_bytes = esp_memory_limit(&machine);
  p->device_peak_bytes = s->peak_device;
  p->device_overhead_bytes = ESP_CUDA_OVERHEAD;
  if (esp_plugin_load(&plugin) == ESP_OK) plugin->probe(&probe);
  if (n < probe.n_devices) {
    /* the probe's own context is among what is not free */
    p->device_limit_bytes = (int64_t)((double)probe.device[n].memory_bytes * r->memory.limit_share);
  }
  if (r->memory.limit_bytes > 0) p->device_limit_bytes = r->memory.limit_bytes;
  p->fits = p->peak_bytes <= p->limit_bytes &&
            (!p->device_limit_bytes || p->device_peak_bytes + p->device_overhead_bytes <= p->device_limit_bytes);
}

esp_status esp_train_plan(const esp_recipe *r, const esp_train_data *d, esp_comm *comm, const esp_train_hooks *hooks,
                          esp_plan_detail *out) {
  esp_status st = ESP_OK;
  esp_engine e = {0};
  esp_rows rows = {0}; /* as large as the largest micro-batch, all the time */
  bool *learned = NULL;
  esp_comm *alone = NULL; /* the plan talks to nobody; the run's ranks only enter the counts */
  *out = (esp_plan_detail){0};
  esp_plan *p = out->plan = calloc(1, sizeof *p);
  out->task = esp_mem_alloc(ESP_MEM_DATA, (size_t)r->n_tasks * sizeof *out->task);
  if (p) p->tasks = calloc((size_t)r->n_tasks, sizeof *p->tasks);
  if (!p || !p->tasks || !out->task) ESP_GOTO(esp_fail_oom("a plan", sizeof *p));
  p->n_tasks = r->n_tasks;
  p->ranks = comm->size;
  for (int i = 0; i < r->n_tasks; i++) ESP_GOTO(esp_task_count(r, i, d->task[i], comm->size, &rows, &out->task[i]));
  esp_mem_stats_reset_peak();
  ESP_GOTO(esp_comm_create("self", &alone));
  ESP_GOTO(esp_engine_init(&e, r, alone, true));
  ESP_GOTO(esp_engine_strategies(&e, d, hooks));
  for (int i = 0; i < r->n_tasks; i++) {
    const esp_task_steps *c = &out->task[i];
    double flops = 0;
    ESP_GOTO(
        plan_task(&e, d, hooks, i, i == 0 || r->continual.policy != ESP_POLICY_CONTINUE, c, &learned, &rows, &flops));
    esp_plan_task *t = &p->tasks[i];
    strncpy(t->name, r->tasks[i].name, sizeof t->name - 1);
    t->samples = c->samples, t->rows = c->rows, t->steps = c->steps, t->tokens = c->tokens;
    t->trained_tokens = c->weight, t->flops = flops * (double)c->tokens;
    p->steps += c->steps, p->tokens += c->tokens, p->flops += t->flops;
    if (c->max_tokens > p->micro_batch_tokens) p->micro_batch_tokens = c->max_tokens;
    if (i == 0) esp_engine_parameters(&e, &p->trainable, &p->parameters);
  }
  /* What an evaluation holds for its own time (caches of generation, logits) lies beside all that tasks have left. */
  ESP_GOTO(evaluations(&e, d, hooks));
  p->flops_per_step = p->steps ? p->flops / (double)p->steps : 0;
  out->stack_bytes = e.stack.high;
  out->scratch_bytes = e.be->ops->scratch ? e.be->ops->scratch(e.be, 0) : 0;
  snprintf(p->device, sizeof p->device, "%s", e.be->on_host ? "cpu" : "cuda");
  esp_mem_stats s;
  esp_mem_stats_get(&s);
  /* The run has its stack from the start, at its final height: it is in no book of a plan. */
  s.peak[ESP_MEM_ACTIVATIONS] += e.stack.high;
  *(e.be->on_host ? &s.peak_total : &s.peak_device) += e.stack.high;
  bool nccl = comm->size > 1 && !e.be->on_host; /* the plug-in's own segment buffer */
  int64_t reduce = comm->size > 1 && !nccl ? esp_comm_workspace(comm->size, e.adapter->params->total) : 0;
  int64_t snapshot = r->checkpoint.every > 0 ? esp_background_bytes(&e) : 0;
  p->peak_bytes = s.peak_total + reduce + snapshot;
  int64_t segments = nccl ? esp_comm_device_workspace(comm->size, e.adapter->params->total) : 0;
  s.peak_device += segments;
  p->n_categories = ESP_MEM_KINDS;
  for (int k = 0; k < ESP_MEM_KINDS; k++) {
    p->category_name[k] = esp_mem_kind_name((esp_mem_kind)k);
    p->category_bytes[k] =
        s.peak[k] + (k == ESP_MEM_WORKSPACE ? reduce + segments : 0) + (k == ESP_MEM_HOST ? snapshot : 0);
  }
  p->limit_bytes = esp_memory_limit(r);
  p->fits = p->peak_bytes <= p->limit_bytes;
  if (!e.be->on_host) device_fit(r, &s, p);
out:
  esp_mem_free(learned);
  esp_rows_deinit(&rows);
  esp_engine_deinit(&e);
  esp_comm_destroy(alone);
  if (st != ESP_OK) esp_plan_detail_deinit(out);
  return st;
}

void esp_plan_free(esp_plan *p) {
  if (!p) return;
  free(p->tasks);
  free(p);
}

void esp_plan_detail_deinit(esp_plan_detail *d) {
  esp_plan_free(d->plan);
  esp_mem_free(d->task);
  *d = (esp_plan_detail){0};
}
