/* gpm.c: later tasks leave the directions alone in which the layers' inputs of earlier tasks lie.
 *
 * gpm: Saha, Garg and Roy, "Gradient Projection Memory for Continual Learning" (2021). At a task's end rows of each
 * layer's inputs give a basis M [k, in] by SVD, extended from task to task until the share `energy` of their squared
 * length lies in it. Gradients of what multiplies the input, W or LoRA's A, become G (I - M^T M); of LoRA the B is
 * free, so that with one LoRA through all tasks old outputs still move with B.
 *
 * nullspace: AlphaEdit's projector (Fang et al. 2025) as a constraint on what a task adds to a weight: dW K0 = 0 for
 * the inputs K0 of earlier tasks (their basis), exactly. Here P is I - M^T M with M the eigenvectors of K0 K0^T up to
 * `energy`, where the authors take those above a threshold. Of W the change is projected. Of factors that are the
 * task's own (a new adapter, o-lora) A itself is, from its first value on, and B is free. Of one LoRA that goes through
 * all tasks A's change is projected and B keeps its values from the second task on: else B A0 would move. */
#include <stdio.h>

#include "tasks/internal.h"
#include "tasks/projection.h"

static bool exact(const esp_strategy *s) {
  return s->kind == &esp_strategy_nullspace;
}

static double energy(const esp_strategy *s) {
  return exact(s) ? s->cfg->nullspace.energy : s->cfg->gpm.energy;
}
static int64_t samples(const esp_strategy *s) {
  return exact(s) ? s->cfg->nullspace.samples : s->cfg->gpm.samples;
}
static int64_t tokens(const esp_strategy *s) {
  return exact(s) ? s->cfg->nullspace.tokens : s->cfg->gpm.tokens;
}

static const char *name_of(const esp_group *g, char out[32]) {
  snprintf(out, 32, "inputs.%d", g->index);
  return out;
}

static esp_tensor basis_of(const esp_strategy *s, const esp_trained *t) {
  char name[32];
  return esp_basis(s, name_of(t->site->group, name), t->site->in);
}

static int reads_input(const esp_trained *t) {
  return t->weight >= 0 ? t->weight : t->a;
}
/* B stands still: see the head of this file. */
static bool holds_b(const esp_strategy *s, const esp_sequence *q, const esp_trained *t) {
  return exact(s) && t->a >= 0 && !esp_trained_fresh(q, t);
}

static esp_status check_tasks(const char *name, int n_tasks) {
  if (n_tasks < 2) return esp_fail(ESP_ERR_RECIPE, "continual.strategy: %s has nothing to do with one task", name);
  return ESP_OK;
}
static esp_status gpm_check(const esp_strategy_cfg *c, int n_tasks) {
  return check_tasks("gpm", n_tasks);
}
static esp_status nullspace_check(const esp_strategy_cfg *c, int n_tasks) {
  return check_tasks("nullspace", n_tasks);
}

static esp_status open(esp_strategy *s, const esp_sequence *q) {
  esp_trained *list;
  int n;
  ESP_TRY(esp_trained_list(s, q, &list, &n));
  esp_mem_free(list);
  return ESP_OK;
}

static esp_status task_begin(esp_strategy *s, const esp_sequence *q) {
  esp_trained *list;
  int n;
  if (q->task == 0) return ESP_OK;
  ESP_TRY(esp_trained_list(s, q, &list, &n));
  for (int i = 0; i < n; i++)
    if (exact(s) && esp_trained_fresh(q, &list[i]))
      esp_project_rows(q, esp_param_master(q->adapter->params, list[i].a), basis_of(s, &list[i]));
  esp_params_refresh_shadow(q->adapter->params);
  esp_mem_free(list);
  return esp_anchor(s, q);
}

static esp_status project(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  const esp_params *ps = q->adapter->params;
  esp_trained *list;
  int n;
  if (q->task == 0) return ESP_OK;
  ESP_TRY(esp_trained_list(s, q, &list, &n));
  for (int i = 0; i < n; i++) {
    esp_project_rows(q, esp_param_grad(ps, reads_input(&list[i])), basis_of(s, &list[i]));
    esp_tensor b = holds_b(s, q, &list[i]) ? esp_param_grad(ps, list[i].b) : (esp_tensor){0};
    if (b.data) q->be->ops->zero(q->be, b.data, esp_tensor_bytes(&b));
  }
  esp_mem_free(list);
  return ESP_OK;
}

static esp_status after_step(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  esp_tensor none = {0}, anchor;
  esp_trained *list;
  int n;
  if (q->task == 0) return ESP_OK;
  ESP_TRY(esp_trained_list(s, q, &list, &n));
  anchor = esp_strategy_flat(s, "anchor", q);
  for (int i = 0; i < n; i++) {
    esp_project_change(q, reads_input(&list[i]), anchor, basis_of(s, &list[i]), none);
    if (!holds_b(s, q, &list[i])) continue;
    esp_tensor b = esp_param_master(q->adapter->params, list[i].b), was = b;
    was.data = (float *)anchor.data + q->adapter->params->list[list[i].b].offset;
    q->be->ops->axpby(q->be, b, 1.0f, was, 0.0f);
  }
  esp_params_refresh_shadow(q->adapter->params);
  esp_mem_free(list);
  return ESP_OK;
}

static esp_status hand_over(esp_strategy *s, const esp_sequence *q) {
  esp_status st = ESP_OK;
  esp_trained *list;
  esp_observed seen = {0};
  esp_sample *chosen = NULL;
  int n;
  char name[32];
  ESP_TRY(esp_trained_list(s, q, &list, &n));
  int64_t count;
  ESP_GOTO(esp_sequence_some(q, samples(s), &chosen, &count));
  ESP_GOTO(esp_observe(q, list, n, chosen, count, tokens(s), false, &seen));
  for (int i = 0; i < n; i++) {
    const esp_group *g = list[i].site->group;
    if (!seen.x[g->index]) continue;
    ESP_GOTO(esp_basis_grow(s, name_of(g, name), g->in, seen.x[g->index], seen.rows[g->index], energy(s)));
    esp_mem_free(seen.x[g->index]); /* of the group: its other sites have the same */
    seen.x[g->index] = NULL;
  }
out:
  esp_observed_deinit(&seen);
  esp_mem_free(chosen);
  esp_mem_free(list);
  return st;
}

const esp_strategy_kind esp_strategy_gpm = {
    .name = "gpm",
    .summary = "gradients leave the span of earlier tasks' layer inputs alone (Saha et al. 2021)",
    .check = gpm_check,
    .open = open,
    .task_begin = task_begin,
    .hand_over = hand_over,
    .project = project,
    .after_step = after_step,
};

const esp_strategy_kind esp_strategy_nullspace = {
    .name = "nullspace",
    .summary = "what a task adds to a weight is zero on earlier tasks' layer inputs, exactly (AlphaEdit's projector)",
    .check = nullspace_check,
    .open = open,
    .task_begin = task_begin,
    .hand_over = hand_over,
    .project = project,
    .after_step = after_step,
};
