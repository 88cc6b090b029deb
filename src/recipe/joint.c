/* joint.c: policy joint, the upper bound that sequences are compared with: all tasks as one, trained on the rows of all
 * of them. The recipe as it was written stays behind it for what is rendered, hashed and measured. */
#include "recipe/bind.h"

/* Evaluation sets of all tasks, each once, in the order of the tasks. */
static bool join_eval(const esp_recipe *r, esp_recipe_task *t) {
  int most = 0;
  for (int i = 0; i < r->n_tasks; i++) most += r->tasks[i].n_eval;
  t->eval = esp_arena_alloc(r->arena, (size_t)(most + 1) * sizeof *t->eval);
  t->n_eval = 0;
  for (int i = 0; t->eval && i < r->n_tasks; i++)
    for (int k = 0; k < r->tasks[i].n_eval; k++) {
      bool there = false;
      for (int e = 0; e < t->n_eval; e++) there |= t->eval[e] == r->tasks[i].eval[k];
      if (!there) t->eval[t->n_eval++] = r->tasks[i].eval[k];
    }
  return t->eval != NULL;
}

static bool join_data(const esp_recipe *r, esp_recipe_task *t) {
  t->n_data = 0;
  for (int i = 0; i < r->n_tasks; i++) t->n_data += r->tasks[i].n_data;
  t->data = esp_arena_alloc(r->arena, (size_t)t->n_data * sizeof *t->data);
  for (int i = 0, n = 0; t->data && i < r->n_tasks; i++)
    for (int k = 0; k < r->tasks[i].n_data; k++) t->data[n++] = r->tasks[i].data[k];
  return t->data != NULL;
}

esp_status esp_recipe_join(esp_recipe *r, esp_recipe **out) {
  esp_recipe *j = esp_arena_alloc(r->arena, sizeof *j);
  esp_recipe_task *t = esp_arena_alloc(r->arena, sizeof *t);
  if (!j || !t) return ESP_ERR_MEMORY;
  *j = *r;
  *t = r->tasks[0];
  t->name = "joint";
  t->adapter = r->adapter, t->data_cfg = r->data, t->optim = r->optim, t->schedule = r->schedule, t->train = r->train;
  t->adapter.tasks = 1;
  if (!join_eval(r, t) || !join_data(r, t)) return ESP_ERR_MEMORY;
  int64_t steps = 0;
  bool all = true; /* as many steps as the tasks have, where that is how they are counted */
  for (int i = 0; i < r->n_tasks; i++) {
    steps += r->tasks[i].train.max_steps;
    all &= r->tasks[i].train.max_steps > 0;
  }
  if (all) t->train.max_steps = steps;
  j->tasks = t;
  j->n_tasks = 1;
  j->whole = r;
  *out = j;
  return ESP_OK;
}
