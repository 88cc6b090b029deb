/* loop.c: the run: tasks in sequence, from nothing or from a checkpoint.
 *
 * Resume takes the same path as a run: the state is read instead of being zero, and everything else (data, packing,
 * initial values, schedules, dropout) is a function of the recipe and the cursor. What happens between two tasks
 * (evaluation, a new adapter, a reset optimizer) is done before the checkpoint between them is written, so that a
 * checkpoint always holds what the next step starts from.
 */
#include "train/loop.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/log.h"
#include "core/threads.h"
#include "io/file.h"

static esp_status refuse_memory(const esp_plan *p) {
  if (p->fits) return ESP_OK;
  if (p->peak_bytes <= p->limit_bytes || p->limit_bytes == 0)
    return esp_fail(
        ESP_ERR_MEMORY,
        "the run needs %.1f MiB of the device (%.1f MiB of them for CUDA itself), the limit is %.1f MiB (see "
        "`plan`; memory.offload_base and memory.activation_checkpointing make it smaller)",
        (double)(p->device_peak_bytes + p->device_overhead_bytes) / 1048576, (double)p->device_overhead_bytes / 1048576,
        (double)p->device_limit_bytes / 1048576);
  int most = 0;
  for (int k = 1; k < p->n_categories; k++)
    if (p->category_bytes[k] > p->category_bytes[most]) most = k;
  return esp_fail(ESP_ERR_MEMORY,
                  "the run needs %.1f MiB, memory.limit is %.1f MiB (largest part: %s, %.1f MiB; see `plan`)",
                  (double)p->peak_bytes / 1048576, (double)p->limit_bytes / 1048576, p->category_name[most],
                  (double)p->category_bytes[most] / 1048576);
}

static esp_status make_matrix(esp_loop *l) {
  const esp_recipe *r = l->r;
  if (r->eval.n_sets == 0 || !l->hooks || !l->hooks->score) return ESP_OK;
  const esp_recipe *all = r->whole ? r->whole : r; /* a joint run fills the last row, for all */
  ESP_TRY(esp_matrix_create(all->n_tasks, r->eval.n_sets, &l->matrix));
  l->matrix->joint = r->whole != NULL;
  for (int i = 0; i < all->n_tasks; i++) {
    snprintf(l->matrix->task_name[i], ESP_MATRIX_NAME, "%s", all->tasks[i].name);
    if (all->tasks[i].n_eval > 0) l->matrix->column[i] = all->tasks[i].eval[0];
  }
  for (int i = 0; i < r->eval.n_sets; i++) {
    snprintf(l->matrix->set_name[i], ESP_MATRIX_NAME, "%s", r->eval.sets[i].name);
    snprintf(l->matrix->set_metric[i], ESP_MATRIX_NAME, "%s", l->hooks->metric_name(r->eval.sets[i].metric));
    l->matrix->smaller_better[i] = l->hooks->smaller_better(r->eval.sets[i].metric);
  }
  return ESP_OK;
}

/* Model, adapter and optimizer for task `i`. */
static esp_status begin_task(esp_loop *l, int i, bool first) {
  const esp_recipe_task *t = &l->r->tasks[i];
  bool fresh = first || l->r->continual.policy != ESP_POLICY_CONTINUE;
  if (fresh) {
    char base[ESP_PATH];
    esp_adapter_cfg cfg = t->adapter;
    cfg.seed += (uint64_t)i * 1000003u; /* another start for each new adapter */
    if (l->r->continual.policy == ESP_POLICY_CONTINUE) cfg = l->r->tasks[0].adapter;
    ESP_TRY(esp_rundir_base(l, base));
    l->engine.n_earlier = esp_engine_keeps(l->r, i);
    ESP_TRY(esp_comm_agree(l->comm, esp_engine_load(&l->engine, base, &cfg, NULL, true)));
  }
  esp_adapter *a = l->engine.adapter;
  if (a->kind->task_begin) ESP_TRY(esp_comm_agree(l->comm, a->kind->task_begin(a, i)));
  /* resumed: the values come from the checkpoint */
  bool merged = !first && t->start && l->r->continual.policy != ESP_POLICY_MERGE_THEN_NEW;
  bool keep = !fresh && !merged && !l->r->continual.reset_optimizer;
  esp_status st = esp_engine_optim(&l->engine, &t->optim, keep);
  if (st == ESP_OK && !l->engine.stack_ready) {
    esp_backend *be = l->engine.be;
    st = esp_engine_stack(&l->engine, l->plan.stack_bytes);
    if (st == ESP_OK && be->ops->scratch) be->ops->scratch(be, l->plan.scratch_bytes);
    if (st == ESP_OK) st = be->sticky;
  }
  if (st == ESP_OK && fresh)
    st = esp_calibrate(&l->engine, l->r, &l->data, l->r->continual.policy == ESP_POLICY_CONTINUE ? 0 : i);
  ESP_TRY(esp_comm_agree(l->comm, st));
  if (merged) ESP_TRY(esp_loop_start(l, i));
  return esp_comm_agree(l->comm, esp_engine_task(&l->engine, i, &l->plan.task[i]));
}

/* Rank 0: a checkpoint is complete at `path`. */
static esp_status written(esp_loop *l, const char *path) {
  ESP_TRY(esp_checkpoint_prune(l->r, l->r->checkpoint.keep));
  snprintf(l->checkpoint, sizeof l->checkpoint, "%s", path);
  esp_event e = esp_loop_event(l, ESP_EVENT_CHECKPOINT);
  e.path = path;
  esp_loop_emit(l, &e);
  return ESP_OK;
}

/* Rank 0: the one that is being written, if any. */
static esp_status finish_background(esp_loop *l) {
  char path[ESP_PATH];
  ESP_TRY(esp_background_join(l->background, path));
  return path[0] ? written(l, path) : ESP_OK;
}

/* between_steps: training goes on at once, so that the files may be written beside it. */
static esp_status checkpoint(esp_loop *l, bool between_steps) {
  esp_run_state *s = &l->state;
  esp_status st = l->pending;
  if (l->comm->rank == 0 && st == ESP_OK) {
    char path[ESP_PATH];
    st = finish_background(l);
    esp_recipe_hash(l->r, s->recipe_hash);
    snprintf(s->fingerprint, sizeof s->fingerprint, "%s", esp_model_fingerprint(l->engine.model));
    s->ranks = l->comm->size;
    s->optim_step = l->engine.optim->step;
    s->backwards = l->engine.adapter->backwards;
    if (st == ESP_OK) st = esp_metrics_sync(&l->metrics, &s->jsonl_bytes, &s->events_bytes);
    if (st == ESP_OK && between_steps && esp_background_bytes(&l->engine) > 0) {
      st = esp_background_start(&l->background, &l->engine, s, l->plan.task, l->matrix);
    } else if (st == ESP_OK) {
      st = esp_checkpoint_write(&l->engine, s, l->plan.task, l->matrix, NULL, path);
      if (st == ESP_OK) st = written(l, path);
    }
  }
  return esp_comm_agree(l->comm, st);
}

/* ---- resume ---- */

static esp_status find_checkpoint(esp_loop *l) {
  esp_status st = ESP_OK;
  int damaged = 0;
  if (l->comm->rank == 0)
    st = esp_checkpoint_find(l->r, l->comm->size, l->plan.task, &l->state, l->matrix, l->checkpoint, &damaged);
  ESP_TRY(esp_comm_agree(l->comm, st));
  const esp_comm_ops *ops = l->comm->ops;
  ESP_TRY(ops->broadcast(l->comm, &l->state, sizeof l->state, 0));
  ESP_TRY(ops->broadcast(l->comm, l->checkpoint, sizeof l->checkpoint, 0));
  if (l->matrix)
    ESP_TRY(ops->broadcast(l->comm, l->matrix->score,
                           (size_t)((l->matrix->tasks + 1) * l->matrix->sets) * sizeof(double), 0));
  if (damaged > 0) esp_loop_note(l, "%d damaged checkpoint(s) passed over", damaged);
  if (l->checkpoint[0])
    esp_loop_note(l, "resuming from %s", l->checkpoint);
  else
    esp_loop_note(l, "no checkpoint yet: starting at step 0");
  return ESP_OK;
}

static esp_status restore(esp_loop *l) {
  esp_status st = ESP_OK;
  if (strcmp(esp_model_fingerprint(l->engine.model), l->state.fingerprint))
    st = esp_fail(ESP_ERR_DATA, "%s: is not the base model the checkpoint was made on", l->r->model.base_model);
  ESP_TRY(esp_comm_agree(l->comm, st));
  /* kinds that make room for all tasks of a run from the start */
  const esp_adapter *a = l->engine.adapter;
  if (l->state.appended && a->cfg.tasks > l->state.appended && a->kind->task_begin && !a->kind->resized)
    return esp_fail(ESP_ERR_RECIPE, "%s: its adapter (%s) was made for %d tasks and has no room for more",
                    l->r->checkpoint.output_dir, a->kind->name, l->state.appended);
  ESP_TRY(esp_checkpoint_load(&l->engine, l->checkpoint));
  l->engine.optim->step = l->state.optim_step;
  l->engine.adapter->backwards = l->state.backwards;
  return ESP_OK;
}

/* ---- steps ---- */

static double learning_rate(const esp_loop *l, const esp_recipe_task *t, int64_t task_steps) {
  const esp_cursor *at = &l->state.at;
  double f = l->r->schedule_restart
                 ? esp_schedule_factor(&t->schedule, at->task_step, task_steps)
                 : esp_schedule_run_factor(&l->r->schedule, at->step, l->total_steps, at->task_step, task_steps);
  return t->optim.lr * f;
}

static esp_status after_step(esp_loop *l, const esp_recipe_task *t, int64_t task_steps, const esp_step_out *out,
                             double lr, double seconds, double epoch_share) {
  esp_cursor *at = &l->state.at;
  l->state.last_loss = out->loss;
  l->tokens += out->tokens;
  l->step_seconds = l->step_seconds > 0 ? 0.9 * l->step_seconds + 0.1 * seconds : seconds;
  esp_event e = esp_loop_event(l, ESP_EVENT_STEP);
  e.epoch = epoch_share;
  e.loss = out->loss, e.accuracy = out->accuracy, e.lr = lr, e.grad_norm = out->grad_norm;
  e.tokens = out->tokens, e.trained_tokens = out->weight;
  e.penalty = out->penalty;
  e.ranks_kept = l->engine.adapter->ranks, e.rank_budget = l->engine.adapter->budget;
  e.step_seconds = seconds;
  e.tokens_per_second = seconds > 0 ? (double)out->tokens / seconds : 0;
  e.eta_seconds = l->step_seconds * (double)(l->total_steps - at->step);
  if (l->comm->rank == 0 && l->pending == ESP_OK) l->pending = esp_metrics_step(&l->metrics, &e);
  esp_loop_emit(l, &e);
  if (l->comm->size == 1) ESP_TRY(l->pending);
  return esp_watch_step(&l->state.watch, &l->r->log.watchdog, at->step, out->loss, out->grad_norm);
}

static esp_status with_checkpoint(const esp_loop *l, esp_status st) {
  if (st != ESP_ERR_DIVERGED) return st;
  char why[1024];
  snprintf(why, sizeof why, "%s", esp_error_message());
  return esp_fail(st, "%s; last checkpoint: %s", why, l->checkpoint[0] ? l->checkpoint : "none");
}

/* One step at the cursor; moves it. *stop: some rank was asked to. */
static esp_status one_step(esp_loop *l, const esp_recipe_task *t, const esp_packs *packs, int64_t epoch_steps,
                           int64_t task_steps, bool *stop) {
  esp_cursor *at = &l->state.at;
  double began = esp_now(), lr = learning_rate(l, t, task_steps);
  esp_step_in in = {.packs = packs,
                    .most = l->plan.task[at->task].max_tokens,
                    .task_step = at->task_step,
                    .task_steps = task_steps,
                    .epoch_step = at->epoch_step,
                    .micro_batch = t->train.micro_batch_size,
                    .accumulate = t->train.gradient_accumulation_steps,
                    .step = at->step,
                    .lr = lr,
                    .ckpt = l->r->memory.activation_checkpointing,
                    .seed = l->r->seed,
                    .failed = l->pending};
  esp_step_out out;
  ESP_TRY(with_checkpoint(l, esp_train_step(&l->engine, &in, &l->rows, &out)));
  at->step++, at->task_step++, at->epoch_step++;
  esp_adapter *a = l->engine.adapter;
  if (a->kind->after_step) ESP_TRY(esp_comm_agree(l->comm, a->kind->after_step(a, at->task_step, task_steps)));
  double share = (double)at->epoch + (double)at->epoch_step / (double)epoch_steps;
  ESP_TRY(with_checkpoint(l, after_step(l, t, task_steps, &out, lr, esp_now() - began, share)));
  *stop = out.stop || (l->comm->size == 1 && esp_stop_requested()) ||
          (l->opt && l->opt->stop_after > 0 && at->step >= l->opt->stop_after);
  return ESP_OK;
}

static esp_status stopped(esp_loop *l) {
  return esp_fail(ESP_ERR_INTERRUPTED, "stopped after step %lld of %lld; complete checkpoint: %s",
                  (long long)l->state.at.step, (long long)l->total_steps,
                  l->comm->rank == 0 ? l->checkpoint : "written by rank 0");
}

static esp_status interrupted(esp_loop *l) {
  ESP_TRY(checkpoint(l, false));
  return stopped(l);
}

static esp_status task_steps_loop(esp_loop *l, int task) {
  const esp_recipe_task *t = &l->r->tasks[task];
  esp_cursor *at = &l->state.at;
  esp_status st = ESP_OK;
  esp_packs *packs = NULL;
  int64_t steps = l->plan.task[task].steps, epoch_steps = 0;
  int64_t span = t->train.micro_batch_size * t->train.gradient_accumulation_steps * l->comm->size;
  while (at->task_step < steps) {
    if (packs && at->epoch_step >= epoch_steps) {
      esp_packs_destroy(packs);
      packs = NULL;
      at->epoch++;
      at->epoch_step = 0;
    }
    if (!packs) {
      st = esp_packs_create(l->data.task[task], &t->data_cfg, l->r->seed, task, at->epoch, &packs);
      ESP_GOTO(esp_comm_agree(l->comm, st));
      epoch_steps = (esp_packs_count(packs) + span - 1) / span;
      if (at->epoch_step >= epoch_steps) continue; /* resumed exactly at an epoch's end */
    }
    bool stop = false;
    ESP_GOTO(one_step(l, t, packs, epoch_steps, steps, &stop));
    bool ends = at->task_step >= steps;
    if (!ends && esp_loop_midway_due(l)) {
      ESP_GOTO(esp_strategies_deploy(&l->engine.strategies, &l->engine.sequence, true));
      ESP_GOTO(esp_loop_midway(l, t));
      ESP_GOTO(esp_strategies_deploy(&l->engine.strategies, &l->engine.sequence, false));
    }
    /* told as soon as it is there, on one rank: with more, agreeing would cost each step a message */
    if (l->comm->size == 1 && esp_background_done(l->background)) ESP_GOTO(finish_background(l));
    if (stop)
      ESP_GOTO(interrupted(l));
    else if (!ends && l->r->checkpoint.every > 0 && at->step % l->r->checkpoint.every == 0)
      ESP_GOTO(checkpoint(l, true));
  }
out:
  esp_packs_destroy(packs);
  return st;
}

/* From a task that has ended to the one behind it: the base and the adapter of that, and the checkpoint between them.
 */
static esp_status next_task(esp_loop *l, int task) {
  char path[ESP_PATH], folder[ESP_PATH], base[ESP_PATH], rel[ESP_PATH], merged[ESP_PATH];
  const char *dir = l->r->checkpoint.output_dir;
  ESP_TRY(esp_comm_agree(l->comm, esp_strategies_hand_over(&l->engine.strategies, &l->engine.sequence)));
  if (l->r->continual.policy == ESP_POLICY_MERGE_THEN_NEW) {
    ESP_TRY(esp_rundir_base(l, base));
    esp_train_adapter(l->r, task, path);
    snprintf(rel, sizeof rel, "bases/%s", l->r->tasks[task].name);
    esp_path_join(merged, sizeof merged, dir, rel);
    esp_status st = ESP_OK;
    esp_engine_unload(&l->engine); /* a merge holds an adapter of its own, and the next task makes all of this anew */
    if (l->comm->rank == 0) {
      st = esp_mkdirs(esp_path_join(folder, sizeof folder, dir, "bases"));
      if (st == ESP_OK) st = l->hooks->merge(l->hooks->ctx, base, path, merged);
    }
    ESP_TRY(esp_comm_agree(l->comm, st));
    snprintf(l->state.base, sizeof l->state.base, "%s", rel);
    if (l->r->tasks[task + 1].start) ESP_TRY(esp_loop_start(l, task + 1));
  }
  l->state.at = (esp_cursor){.task = task + 1, .step = l->state.at.step};
  l->state.watch = (esp_watch){0};
  ESP_TRY(begin_task(l, task + 1, false));
  return checkpoint(l, false);
}

/* The other of two experts, beside the one that is deployed. */
static esp_status save_second(esp_loop *l, const char *task) {
  char path[ESP_PATH];
  esp_strategies *s = &l->engine.strategies;
  if (esp_strategies_experts(s) < 2) return ESP_OK;
  ESP_TRY(esp_strategies_expert(s, &l->engine.sequence, 1));
  ESP_TRY(esp_loop_save_adapter(l, "fast", task, path));
  return esp_strategies_expert(s, &l->engine.sequence, 0);
}

/* Adapter, scores, and what comes then. */
static esp_status end_task(esp_loop *l, int task) {
  const esp_recipe_task *t = &l->r->tasks[task];
  char path[ESP_PATH];
  esp_adapter *a = l->engine.adapter;
  esp_strategies *s = &l->engine.strategies;
  if (a->kind->task_end) ESP_TRY(esp_comm_agree(l->comm, a->kind->task_end(a, task)));
  ESP_TRY(esp_comm_agree(l->comm, esp_strategies_task_end(s, &l->engine.sequence)));
  ESP_TRY(esp_strategies_deploy(s, &l->engine.sequence, true));
  ESP_TRY(esp_comm_agree(l->comm, l->comm->rank == 0 ? finish_background(l) : ESP_OK));
  ESP_TRY(esp_loop_save_adapter(l, "adapters", t->name, path));
  ESP_TRY(save_second(l, t->name));
  bool last = task + 1 == l->r->n_tasks;
  int row = last && l->matrix ? l->matrix->tasks : task + 1;
  ESP_TRY(esp_loop_matrix_row(l, row));
  ESP_TRY(esp_loop_best_of_row(l, row));
  ESP_TRY(esp_strategies_deploy(s, &l->engine.sequence, false));
  esp_event e = esp_loop_event(l, ESP_EVENT_TASK_END);
  e.path = path;
  esp_loop_emit(l, &e);
  if (!last) return next_task(l, task);
  l->state.at = (esp_cursor){.task = task + 1, .step = l->state.at.step};
  l->state.watch = (esp_watch){0};
  return checkpoint(l, false);
}

/* Steps ask whether to stop. Where there are none, it is asked behind the checkpoint between two tasks. */
static esp_status stop_between(esp_loop *l) {
  double stop = esp_stop_requested();
  if (l->comm->size > 1) ESP_TRY(l->comm->ops->all_reduce_f64(l->comm, &stop, 1));
  return stop > 0 ? stopped(l) : ESP_OK;
}

static esp_status tasks_loop(esp_loop *l) {
  esp_cursor *at = &l->state.at;
  while (at->task < l->r->n_tasks) {
    int task = (int)at->task;
    esp_loop_phase(l, "train");
    esp_event e = esp_loop_event(l, ESP_EVENT_TASK_BEGIN);
    esp_loop_emit(l, &e);
    ESP_TRY(task_steps_loop(l, task));
    ESP_TRY(end_task(l, task));
    if (l->plan.task[task].steps == 0 && at->task < l->r->n_tasks) ESP_TRY(stop_between(l));
  }
  return ESP_OK;
}

/* Nothing is silent: rows that did not fit. */
static void note_overlong(esp_loop *l) {
  for (int i = 0; i < l->r->n_tasks; i++) {
    const esp_dataset_stats *s = esp_dataset_statistics(l->data.task[i]);
    long long dropped = s->dropped_overlong, truncated = s->truncated, split = s->split;
    if (dropped + truncated + split > 0)
      esp_loop_note(l,
                    "task %s: of %lld rows, %lld too long for data.sequence_len %lld were dropped, %lld truncated, "
                    "%lld split",
                    l->r->tasks[i].name, (long long)s->rows, dropped, (long long)l->r->tasks[i].data_cfg.sequence_len,
                    truncated, split);
  }
}

/* Everything that can refuse the run before a weight is read. */
static esp_status prepare(esp_loop *l, bool resume) {
  const esp_recipe *r = l->r;
  if (r->continual.policy == ESP_POLICY_MERGE_THEN_NEW && r->n_tasks > 1 && (!l->hooks || !l->hooks->merge))
    return esp_fail(ESP_ERR_RECIPE, "continual.policy: merge_then_new is not available here");
  for (int i = 0; i < r->n_tasks; i++)
    if (r->tasks[i].start && (!l->hooks || !l->hooks->merge_before))
      return esp_fail(ESP_ERR_RECIPE, "before: is not available here");
  esp_loop_phase(l, "data");
  ESP_TRY(esp_comm_agree(l->comm, esp_train_data_load(r, true, l->hooks && l->hooks->score, &l->data)));
  esp_loop_phase(l, "plan");
  ESP_TRY(esp_comm_agree(l->comm, esp_train_plan(r, &l->data, l->comm, l->hooks, &l->plan)));
  ESP_TRY(esp_comm_agree(l->comm, refuse_memory(l->plan.plan)));
  l->total_steps = l->plan.plan->steps;
  note_overlong(l);
  ESP_TRY(make_matrix(l));
  if (!resume) return esp_rundir_check(r, l->comm, l->opt && l->opt->overwrite);
  ESP_TRY(esp_rundir_prepare(r, l->comm, true, false));
  esp_loop_log_open(l);
  return find_checkpoint(l);
}

static esp_status run(esp_loop *l, bool resume) {
  ESP_TRY(prepare(l, resume));
  esp_cursor *at = &l->state.at;
  esp_status st = ESP_OK;
  bool resumed = l->checkpoint[0] != '\0';
  if (resumed && at->task >= l->r->n_tasks) {
    esp_loop_note(l, "the run was already finished");
    return ESP_OK;
  }
  esp_loop_phase(l, "load");
  esp_mem_trim();             /* what reading text and tokenizer left free */
  esp_mem_stats_reset_peak(); /* the plan's books are closed: from here the peak is the run's own */
  ESP_TRY(esp_comm_agree(l->comm, esp_engine_init(&l->engine, l->r, l->comm, false)));
  ESP_TRY(esp_comm_agree(l->comm, esp_engine_strategies(&l->engine, &l->data, l->hooks)));
  bool appended = l->state.appended > 0; /* the checkpoint is the end of the run as it was */
  ESP_TRY(begin_task(l, (int)at->task - appended, true));
  /* Only now does anything appear on disk: weights that cannot be read leave no half of a run, and no run is replaced.
   */
  if (!resume) ESP_TRY(esp_rundir_prepare(l->r, l->comm, false, l->opt && l->opt->overwrite));
  if (!resume) esp_loop_log_open(l);
  if (l->comm->rank == 0) st = esp_metrics_open(&l->metrics, l->r, l->state.jsonl_bytes, l->state.events_bytes);
  ESP_TRY(esp_comm_agree(l->comm, st));
  if (resumed) ESP_TRY(restore(l));
  if (appended) {
    esp_loop_note(l, "%d tasks are added to the %d of the run", l->r->n_tasks - l->state.appended, l->state.appended);
    ESP_TRY(esp_rundir_recipe(l->r, l->comm));
    l->state.appended = 0;
    ESP_TRY(next_task(l, (int)at->task - 1));
  }
  if (!resumed && l->matrix) {
    /* A new adapter changes nothing yet: row 0 is the untouched base. */
    if (l->r->continual.baseline) ESP_TRY(esp_loop_matrix_row(l, 0));
    ESP_TRY(checkpoint(l, false));
  }
  return tasks_loop(l);
}

esp_status esp_train_run(const esp_recipe *r, esp_comm *comm, const esp_train_hooks *hooks, bool resume,
                         const esp_run_options *opt, esp_run_result *result) {
  esp_loop loop = {.r = r, .comm = comm, .hooks = hooks, .opt = opt, .phase = "data"}, *l = &loop;
  l->started = esp_now();
  l->state.last_loss = l->state.best = NAN;
  esp_status st = ESP_OK;
  if (r->parallel.threads > 0) st = esp_threads_init(r->parallel.threads);
  if (st == ESP_OK) st = run(l, resume);
  esp_run_result own;
  if (!result) result = &own;
  if (st == ESP_OK || st == ESP_ERR_INTERRUPTED) esp_loop_result(l, result);
  if (st == ESP_OK && l->engine.model)
    st = esp_comm_agree(comm, comm->rank == 0 ? esp_loop_save_result(l, result) : ESP_OK);
  if (st == ESP_OK) {
    esp_event e = esp_loop_event(l, ESP_EVENT_RUN_END);
    e.path = r->checkpoint.output_dir;
    esp_loop_emit(l, &e);
  }
  esp_metrics_close(&l->metrics);
  if (l->log) fclose(l->log);
  esp_background_destroy(l->background);
  esp_rows_deinit(&l->rows);
  esp_engine_deinit(&l->engine);
  esp_matrix_destroy(l->matrix);
  esp_plan_detail_deinit(&l->plan);
  esp_train_data_deinit(&l->data);
  return st;
}
