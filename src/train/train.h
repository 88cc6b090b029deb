/* train.h: the run of a recipe: setup, plan, loop over tasks, checkpoints, resume.
 *
 * Evaluation and merging are rooms beside this one; the loop reaches them through esp_train_hooks, filled in by the
 * room above (src/api), so that no include points sideways.
 */
#ifndef ESP_TRAIN_TRAIN_H
#define ESP_TRAIN_TRAIN_H

#include "dist/comm.h"
#include "espalier/run.h"
#include "recipe/recipe.h"
#include "tasks/matrix.h"
#include "tasks/strategy.h"

#define ESP_PATH 4096

typedef struct esp_score_request {
  esp_model *model;
  const esp_tokenizer *tok;
  const esp_dataset *data;
  esp_stack *stack;
  const esp_eval_set *set;
  int64_t batch_tokens;
  esp_comm *comm;
  esp_strategies *strategies; /* which may choose an adapter for each row; NULL: none */
  const esp_sequence *sequence;
  int owner; /* the task whose set it is, -1: none */
  /* Two adapters that answer together, the first of them active; NULL: what the strategies say. */
  esp_adapter *const *experts;
} esp_score_request;

typedef struct esp_score_result {
  double value;
  double malformed; /* share of answers that are none of the labels; NaN: not asked of this set */
  int64_t samples;
} esp_score_result;

typedef struct esp_train_hooks {
  void *ctx;
  /* Collective over the ranks of the request's communicator. NULL: no evaluation. */
  esp_status (*score)(void *ctx, const esp_score_request *q, esp_score_result *out);
  /* Greedy completions of the first n rows of a set as JSON objects with commas between them; nothing for a set whose
   * rows are no prompts. On this rank alone. */
  esp_status (*samples)(void *ctx, const esp_score_request *q, int64_t n, esp_strbuf *out);
  const char *(*metric_name)(esp_metric metric);
  bool (*smaller_better)(esp_metric metric);
  /* See esp_sequence.generate. NULL: strategies that need it are refused. */
  esp_status (*generate)(const esp_sequence *q, const esp_ids *prompts, int n, int64_t max_new, double temperature,
                         uint64_t seed, esp_ids *out);
  /* Writes base + adapter as a model directory. NULL: merge_then_new is refused. */
  esp_status (*merge)(void *ctx, const char *base, const char *adapter, const char *out);
  /* What the tasks before this one learned as one, by its recipe's `before`: with merge_then_new a model, else an
   * adapter whose ranks fit `into`; note: a line about it. Rank 0 alone. NULL: before is refused. */
  esp_status (*merge_before)(void *ctx, const esp_recipe *r, int task, const char *out, const esp_adapter *into,
                             char *note, size_t size);
} esp_train_hooks;

/* ---- data of a run: everything that is read before a weight is ---- */
typedef struct esp_train_data {
  esp_tokenizer *tok;
  esp_dataset **task; /* [r->n_tasks] */
  esp_dataset **eval; /* [r->eval.n_sets] */
  int n_tasks, n_sets;
} esp_train_data;
esp_status esp_train_data_load(const esp_recipe *r, bool with_tasks, bool with_eval, esp_train_data *out);
void esp_train_data_deinit(esp_train_data *d);

/* Steps of each task, exactly: packing differs from epoch to epoch, so each epoch is packed. */
typedef struct esp_task_steps {
  int64_t samples, rows, steps; /* rows of epoch 0 */
  int64_t max_tokens;           /* largest micro-batch, padded */
  int64_t max_trained;          /* most rows with a loss in one micro-batch */
  int64_t max_labelled;         /* most sequences with such rows in one */
  int64_t max_length;           /* longest sequence */
  int64_t max_blocks;           /* most blocks of 32 tokens in one, padded, where a sequence begins another */
  int64_t min_tokens;           /* smallest micro-batch, padded */
  int64_t min_trained;          /* fewest rows with a loss in one, of those that have any */
  int64_t tokens;               /* of the task, padding included, all ranks */
  double weight;                /* of epoch 0 */
} esp_task_steps;

/* ---- engine: model, adapter, optimizer and activation stack on one backend ---- */
typedef struct esp_engine {
  const esp_recipe *r;
  esp_comm *comm;
  esp_comm *device_comm; /* on top of comm, where gradients lie on devices; NULL: through comm */
  esp_backend *be;
  esp_model *model;
  esp_adapter *adapter;
  /* Adapters of earlier tasks, frozen, and `adapter` behind them: see esp_engine_load. */
  esp_adapter **bank;
  int n_earlier;
  const char *second_dir; /* of an adapter that answers together with `adapter`: experts [2]; NULL: none */
  esp_adapter *experts[2];
  esp_optim *optim;
  esp_stack stack;
  bool stack_ready;
  esp_strategies strategies; /* empty outside a run of tasks */
  esp_sequence sequence;     /* the run as they see it; valid after esp_engine_task */
  void *sequence_lists;      /* what it points to */
  bool opened;               /* they have seen the model */
} esp_engine;
/* What the recipe's device means on this machine: "cpu", "cuda", "cuda:N". */
const char *esp_engine_device(const esp_recipe *r);
/* counting: on the backend that counts for that device. */
esp_status esp_engine_init(esp_engine *e, const esp_recipe *r, esp_comm *comm, bool counting);
void esp_engine_deinit(esp_engine *e);
/* Opens `base`, attaches the adapter of the configuration (adapter_dir NULL: new; else loaded and trainable as said),
 * loads the weights. The stack, if there is one, stays. cfg NULL and adapter_dir NULL: the bare base. The adapters of
 * the first e->n_earlier tasks are read from the run's folder beside it, active only where the policy stacks them. */
esp_status esp_engine_load(esp_engine *e, const char *base, const esp_adapter_cfg *cfg, const char *adapter_dir,
                           bool trainable);
void esp_engine_unload(esp_engine *e);
/* The optimizer for a task: new, or the present one with another configuration when `keep` and the kind is the same. */
esp_status esp_engine_optim(esp_engine *e, const esp_optim_cfg *cfg, bool keep);
esp_status esp_engine_stack(esp_engine *e, int64_t capacity);
/* For evaluation set i, with model and strategies as they stand. */
esp_score_request esp_engine_request(esp_engine *e, const esp_train_data *d, int i);
/* How many adapters of earlier tasks stay beside that of `task`: for e->n_earlier, before its adapter is loaded. */
int esp_engine_keeps(const esp_recipe *r, int task);
/* The strategies of the recipe. data must outlive the engine. */
esp_status esp_engine_strategies(esp_engine *e, const esp_train_data *data, const esp_train_hooks *hooks);
/* Model, adapter and optimizer stand for this task: its strategies begin (the first time they open before). */
esp_status esp_engine_task(esp_engine *e, int task, const esp_task_steps *steps);
/* The pass over data that the adapter's kind needs before it is trained, over the first rows of a task. */
/* The same over n batches of the caller's. */
esp_status esp_calibrate_with(esp_engine *e, const esp_optim_cfg *optim, esp_ckpt_mode ckpt, int64_t n,
                              esp_status (*batch)(void *ctx, int64_t i, esp_batch *out), void *ctx);
bool esp_engine_wants_data(const esp_engine *e); /* it has not been done yet */
esp_status esp_calibrate(esp_engine *e, const esp_recipe *r, const esp_train_data *d, int task);
/* Values trained, and values of the base. */
void esp_engine_parameters(const esp_engine *e, int64_t *trainable, int64_t *total);

/* ---- one optimizer step ---- */
typedef struct esp_step_out {
  double loss, accuracy, grad_norm, weight;
  double penalty; /* of the adapter kind and of strategies, beside the loss */
  int64_t tokens; /* all ranks, padding excluded */
  bool stop;      /* some rank was asked to stop */
} esp_step_out;
typedef struct esp_step_in {
  const esp_packs *packs;
  int64_t epoch_step; /* step within the epoch */
  int64_t micro_batch, accumulate;
  int64_t most; /* tokens of the task's largest micro-batch, padded (esp_task_steps.max_tokens) */
  int64_t step; /* of the run, 0-based: keys dropout */
  int64_t task_step, task_steps;
  double lr; /* scheduled */
  esp_ckpt_mode ckpt;
  uint64_t seed;
  esp_status failed; /* this rank cannot go on (its message is set): the step carries that to the others */
} esp_step_in;
/* Collective. A non-finite loss or gradient is ESP_ERR_DIVERGED and leaves the parameters as they were. */
esp_status esp_train_step(esp_engine *e, const esp_step_in *in, esp_rows *rows, esp_step_out *out);

/* ---- where a run stands ---- */
typedef struct esp_cursor {
  int64_t task;      /* r->n_tasks: finished */
  int64_t task_step; /* steps done in the task */
  int64_t epoch, epoch_step;
  int64_t step; /* of the whole run */
} esp_cursor;

esp_status esp_task_count(const esp_recipe *r, int task, const esp_dataset *d, int ranks, esp_rows *rows,
                          esp_task_steps *out);

/* start.c, for a plan. With the adapter of task i in its place, what cannot be merged or start from a merge is refused;
 * learned: for each site, whether an earlier task changes it; made by the first call, esp_mem. */
esp_status esp_plan_start(esp_engine *e, int i, bool **learned);
/* With the engine as the task before leaves it: what making the start of task i holds beside that. */
esp_status esp_plan_merge(esp_engine *e, int i);

/* ---- plan ---- */
typedef struct esp_plan_detail {
  esp_plan *plan;        /* owned; NULL when not wanted */
  int64_t stack_bytes;   /* what the activation stack needs */
  int64_t scratch_bytes; /* and the operations of a device */
  esp_task_steps *task;  /* [n_tasks], esp_mem */
} esp_plan_detail;
esp_status esp_train_plan(const esp_recipe *r, const esp_train_data *d, esp_comm *comm, const esp_train_hooks *hooks,
                          esp_plan_detail *out);
void esp_plan_detail_deinit(esp_plan_detail *p);
/* memory.limit in bytes for this process. */
int64_t esp_memory_limit(const esp_recipe *r);

/* ---- run and resume (collective over the ranks) ---- */
esp_status esp_train_run(const esp_recipe *r, esp_comm *comm, const esp_train_hooks *hooks, bool resume,
                         const esp_run_options *opt, esp_run_result *result);
/* base model directory that the last task was trained on, and the last adapter directory (for `after`). */
/* The directory of task i's adapter, and of the merge that it starts from, if any; both answer path. */
char *esp_train_adapter(const esp_recipe *r, int i, char path[ESP_PATH]);
char *esp_train_start(const esp_recipe *r, int i, char path[ESP_PATH]);
esp_status esp_train_last(const esp_recipe *r, char base[ESP_PATH], char adapter[ESP_PATH]);

#endif
