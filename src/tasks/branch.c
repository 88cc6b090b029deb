/* branch.c: the decay at the end of a task is a branch off the run. Its result is what is measured and saved; then
 * parameters and optimizer stand again where the decay began, and the next task goes on from there at the rate of the
 * constant phase. So a run without a budget gives a model to deploy after every task (infinite schedule, arXiv
 * 2503.02844; checkpoints of WSD, arXiv 2405.18392). */
#include <stdio.h>

#include "tasks/internal.h"

static esp_status check(const esp_strategy_cfg *c, int n_tasks) {
  (void)n_tasks;
  if (c->branch.schedule) return ESP_OK;
  return esp_fail(ESP_ERR_RECIPE, "continual.strategy: branch needs a schedule that decays at the end of each task "
                                  "(infinite with anneal, or wsd with restart: per_task)");
}

static const char *name_of(const esp_sequence *q, int state, char buf[64]) {
  snprintf(buf, 64, "kept.%s", state < 0 ? "parameters" : q->optim->kind->state_names[state]);
  return buf;
}

static esp_tensor state_of(const esp_sequence *q, int state) {
  return esp_flat(q->optim->state[state], q->adapter->params->total);
}

static int64_t decay_steps(const esp_strategy *s, const esp_sequence *q, int64_t task_steps) {
  return esp_schedule_decay_steps(&s->cfg->branch.schedule[q->task], task_steps);
}

static esp_status keep(esp_strategy *s, const esp_sequence *q) {
  char buf[64];
  int64_t *at = esp_strategy_array(s, "kept.step", ESP_I64, 2, true);
  if (!at) return ESP_ERR_MEMORY;
  for (int i = -1; i < q->optim->kind->n_states; i++) {
    esp_tensor kept = esp_strategy_flat(s, name_of(q, i, buf), q);
    if (!kept.data) return ESP_ERR_MEMORY;
    q->be->ops->axpby(q->be, kept, 1.0f, i < 0 ? esp_sequence_masters(q) : state_of(q, i), 0.0f);
  }
  at[0] = q->optim->step;
  at[1] = 0; /* 1: the task has ended */
  return ESP_OK;
}

/* Also what a decay from the first step on returns to. */
static esp_status task_begin(esp_strategy *s, const esp_sequence *q) {
  return keep(s, q);
}

static esp_status after_step(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  return t->task_step + 1 == t->task_steps - decay_steps(s, q, t->task_steps) ? keep(s, q) : ESP_OK;
}

static esp_status task_end(esp_strategy *s, const esp_sequence *q) {
  (void)q;
  int64_t *at = esp_strategy_get(s, "kept.step", NULL);
  if (at) at[1] = 1;
  return ESP_OK;
}

static esp_status deploy(esp_strategy *s, const esp_sequence *q, bool on) {
  char buf[64];
  int64_t *at = esp_strategy_get(s, "kept.step", NULL);
  if (on || !at || !at[1]) return ESP_OK;
  esp_sequence_exchange(q, esp_strategy_flat(s, name_of(q, -1, buf), q));
  for (int i = 0; i < q->optim->kind->n_states; i++)
    q->be->ops->axpby(q->be, state_of(q, i), 1.0f, esp_strategy_flat(s, name_of(q, i, buf), q), 0.0f);
  q->optim->step = at[0];
  at[1] = 0;
  return ESP_OK;
}

const esp_strategy_kind esp_strategy_branch = {
    .name = "branch",
    .summary = "the schedule's decay at a task's end is measured and saved, then undone (arXiv 2503.02844)",
    .flags = ESP_STRATEGY_BY_PARAMETER | ESP_STRATEGY_DEPLOYS,
    .check = check,
    .task_begin = task_begin,
    .after_step = after_step,
    .task_end = task_end,
    .deploy = deploy,
};
