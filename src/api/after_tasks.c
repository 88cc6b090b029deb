/* after_tasks.c: merge_tasks: what each task of a run learned becomes one model, or one LoRA, by a method. The adapters
 * of all tasks stand on the first base; with merge_then_new each stands on the model of those before, and what is
 * merged are the models after each task. `after` merges all tasks of the run, `before` those before a task, for that to
 * start from; there a merge of one is that one, whatever the method. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "api/api.h"
#include "io/file.h"
#include "merge/merge.h"

enum { MOST = 64 };

typedef struct merging {
  const esp_recipe *r;
  const esp_after_step *step;
  int n;       /* the first n tasks are merged */
  int listed;  /* so many values a list has that has one for each */
  bool before; /* else after the run */
  const char *out;
  const esp_adapter *into; /* what a merge of adapters must fit; NULL: nothing */
  esp_merge_method method;
  double weights[MOST], metrics[MOST];
  const double *given_weights;
  char path[MOST][ESP_PATH];
  const char *inputs[MOST];
  char last[ESP_PATH]; /* merge_then_new: the model after the last task, made for as long as it is needed */
} merging;

static double own(double v) {
  return v == ESP_AFTER_OWN ? NAN : v;
}

static bool chained(const esp_recipe *r) {
  return r->continual.policy == ESP_POLICY_MERGE_THEN_NEW && r->n_tasks > 1;
}

static esp_status settle(merging *g) {
  const esp_after_method *a = &g->step->method;
  esp_merge_method *m = &g->method;
  int n = g->n;
  if (n > MOST) return esp_fail(ESP_ERR_RECIPE, "%d tasks, at most %d can be merged", n, MOST);
  *m = (esp_merge_method)ESP_MERGE_METHOD;
  m->name = a->name;
  m->density = a->density;
  m->n_density = a->n_density == g->listed && n < g->listed ? n : a->n_density;
  m->lambda = own(a->lambda);
  m->gamma = own(a->gamma);
  m->t = own(a->t);
  m->alpha = own(a->alpha);
  m->power = own(a->power);
  if (a->n_lines > 2) return esp_fail(ESP_ERR_RECIPE, "lines: expected alpha, or alpha and beta");
  if (a->n_lines > 0) m->lines_alpha = a->lines[0];
  if (a->n_lines > 1) m->lines_beta = a->lines[1];
  m->rescale = a->rescale;
  m->majority = a->majority;
  if (a->normalize) m->normalize = strcmp(a->normalize, "yes") == 0;
  m->seed = a->seed;
  if (a->n_weight > 1 && a->n_weight != g->listed)
    return esp_fail(ESP_ERR_RECIPE, "%d weights for %d tasks: give one, or one each", a->n_weight, g->listed);
  for (int i = 0; a->n_weight > 0 && i < n; i++) g->weights[i] = a->weight[a->n_weight == 1 ? 0 : i];
  g->given_weights = a->n_weight > 0 ? g->weights : NULL;
  if (g->before) return ESP_OK;
  if (a->as_adapter && chained(g->r))
    return esp_fail(ESP_ERR_RECIPE, "as: adapter: with merge_then_new the adapters stand on different models");
  if (a->as_adapter && g->step->dtype) return esp_fail(ESP_ERR_RECIPE, "dtype: is for a model");
  if (!a->as_adapter && a->rank) return esp_fail(ESP_ERR_RECIPE, "rank: is for an adapter");
  return ESP_OK;
}

/* ---- metrics of mwa, from the score matrix ---- */

static bool weighs_metrics(const merging *g) {
  return strcmp(g->method.name, "mwa") == 0;
}

static esp_status check_metrics(merging *g) {
  const esp_recipe *r = g->r;
  const char *metric = g->step->method.metric;
  bool known = !metric;
  if (!weighs_metrics(g)) return metric ? esp_fail(ESP_ERR_RECIPE, "metric: is for mwa") : ESP_OK;
  for (int i = 0; metric && i < r->eval.n_sets; i++) known |= strcmp(r->eval.sets[i].name, metric) == 0;
  if (!known) return esp_fail(ESP_ERR_RECIPE, "metric: no evaluation set is named '%s'", metric);
  for (int t = 0; t < g->n; t++) {
    if (!metric && r->tasks[t].n_eval == 0)
      return esp_fail(ESP_ERR_RECIPE, "mwa weighs tasks by scores, and task '%s' has no evaluation set",
                      r->tasks[t].name);
    g->metrics[t] = 1;
  }
  g->method.metrics = g->metrics;
  g->method.n_metrics = g->n;
  return ESP_OK;
}

static esp_status score_of(const esp_matrix *m, int task, const char *metric, double *out, bool *lower) {
  double sum = 0;
  int n = 0;
  for (int s = 0; s < m->sets; s++) {
    bool counts = metric && strcmp(m->set_name[s], metric) == 0;
    for (int t = 0; !metric && t < m->tasks; t++) counts |= m->column[t] == s;
    if (!counts) continue;
    if (n++ > 0 && *lower != m->smaller_better[s])
      return esp_fail(ESP_ERR_RECIPE, "metric: the tasks' sets have scores of both directions: name one set");
    *lower = m->smaller_better[s];
    sum += *esp_matrix_cell(m, esp_matrix_row_of(m, task), s);
  }
  if (n == 0 || !isfinite(sum))
    return esp_fail(ESP_ERR_DATA, "metric: no score was measured after task '%s'", m->task_name[task]);
  *out = sum / n;
  return ESP_OK;
}

static esp_status read_metrics(merging *g) {
  esp_status st = ESP_OK;
  char path[ESP_PATH];
  esp_matrix *m = NULL;
  bool lower = false;
  if (!weighs_metrics(g)) return ESP_OK;
  ESP_GOTO(esp_matrix_load(esp_path_join(path, sizeof path, g->r->checkpoint.output_dir, "matrix.json"), &m));
  if (m->tasks < g->n) {
    st = esp_fail(ESP_ERR_DATA, "%s: has %d tasks, the run has %d", path, m->tasks, g->n);
    goto out;
  }
  for (int t = 0; t < g->n; t++) ESP_GOTO(score_of(m, t, g->step->method.metric, &g->metrics[t], &lower));
  g->method.better = lower ? "lower" : "higher";
out:
  esp_matrix_destroy(m);
  return st;
}

/* ---- inputs ---- */

/* Of `before`: what would be found out once the tasks are trained. */
static esp_status check_factors(const merging *g) {
  const esp_recipe_task *t = g->r->tasks;
  const char *name = g->step->method.name;
  bool same_rank;
  if (!g->before || chained(g->r) || !esp_combine_by_factors(name, &same_rank)) return ESP_OK;
  for (int i = 0; i < g->n; i++) {
    const esp_adapter_kind *kind = esp_adapter_find(t[i].adapter.type);
    if (!kind->low_rank)
      return esp_fail(ESP_ERR_RECIPE, "%s works on factors, which an adapter of type %s has not (svd and _svd do not)",
                      name, kind->name);
    if (same_rank && g->r->continual.policy != ESP_POLICY_CONTINUE && t[i].adapter.r != t[0].adapter.r)
      return esp_fail(ESP_ERR_RECIPE, "%s needs one rank, task '%s' has %lld and task '%s' %lld (%s_svd does not)",
                      name, t[0].name, (long long)t[0].adapter.r, t[i].name, (long long)t[i].adapter.r, name);
  }
  return ESP_OK;
}

static esp_status find_inputs(merging *g) {
  const esp_recipe *r = g->r;
  char rel[ESP_PATH], base[ESP_PATH], adapter[ESP_PATH];
  for (int t = 0; t < g->n; t++) {
    snprintf(rel, sizeof rel, "%s/%s", chained(r) ? "bases" : "adapters", r->tasks[t].name);
    g->inputs[t] = esp_path_join(g->path[t], ESP_PATH, r->checkpoint.output_dir, rel);
    if (!esp_dir_exists(g->path[t]) && !(chained(r) && t + 1 == r->n_tasks))
      return esp_fail(ESP_ERR_DATA, "%s: what task '%s' learned is not there", g->path[t], r->tasks[t].name);
  }
  if (!chained(r) || g->before) return ESP_OK;
  ESP_TRY(esp_train_last(r, base, adapter));
  if (snprintf(rel, sizeof rel, "%s.last", g->step->out) >= (int)sizeof rel)
    return esp_fail(ESP_ERR_RECIPE, "out: the path is too long");
  ESP_TRY(esp_dir_stage(rel, g->last, sizeof g->last));
  const char *const one = adapter;
  esp_merge_spec spec = {.base = base, .adapters = &one, .n_adapters = 1, .out = g->last};
  g->inputs[r->n_tasks - 1] = g->last;
  return esp_merge_write(&spec, NULL);
}

static int64_t rank_at(void *ctx, const char *path) {
  const merging *g = ctx;
  esp_site **sites;
  int n = esp_model_sites(g->into->model, &sites);
  for (int i = 0; i < n; i++)
    if (strcmp(sites[i]->path, path) == 0 && g->into->targeted[i])
      return g->into->kind->low_rank((esp_adapter *)(uintptr_t)g->into, sites[i], NULL, NULL);
  return 0;
}

static esp_status merge(merging *g, bool only_check, esp_svd_stats *svd) {
  const esp_recipe *r = g->r;
  const esp_after_step *a = g->step;
  if (g->before ? !chained(r) : a->method.as_adapter) {
    esp_combine_spec spec = {.base = r->model.base_model,
                             .adapters = g->inputs,
                             .weights = g->given_weights,
                             .n_adapters = g->n,
                             .out = g->out,
                             .method = &g->method,
                             .rank = a->method.rank,
                             .rank_at = g->into ? rank_at : NULL,
                             .ctx = g};
    return only_check ? esp_combine_check(&spec) : esp_combine_write(&spec, svd);
  }
  esp_blend_spec spec = {.base = r->model.base_model,
                         .inputs = g->inputs,
                         .weights = g->given_weights,
                         .n = g->n,
                         .out = g->out,
                         .dtype = a->dtype,
                         .method = &g->method};
  return only_check ? esp_blend_check(&spec) : esp_blend_write(&spec, NULL);
}

static esp_status run(merging *g, bool only_check, esp_svd_stats *svd) {
  esp_status st;
  ESP_GOTO(settle(g));
  ESP_GOTO(check_metrics(g));
  ESP_GOTO(check_factors(g));
  if (g->n == 1 && g->before && !only_check) { /* that one, as it is */
    g->method = (esp_merge_method)ESP_MERGE_METHOD;
    g->method.name = "task_arithmetic";
    g->given_weights = NULL;
  } else if (!only_check) {
    ESP_GOTO(read_metrics(g));
  }
  if (!only_check) ESP_GOTO(find_inputs(g));
  st = merge(g, only_check, svd);
out:
  if (g->last[0] && esp_dir_exists(g->last)) esp_remove_tree(g->last);
  return st;
}

static esp_status after(const esp_recipe *r, int step, bool only_check) {
  esp_svd_stats svd;
  merging *g = esp_mem_alloc(ESP_MEM_HOST, sizeof *g);
  if (!g) return ESP_ERR_MEMORY;
  g->r = r;
  g->step = &r->after[step];
  g->n = g->listed = r->n_tasks;
  g->out = g->step->out;
  esp_status st = run(g, only_check, &svd);
  esp_mem_free(g);
  return st == ESP_OK ? ESP_OK : esp_fail_context(st, "after[%d].merge_tasks", step);
}

static esp_status before(const esp_recipe *r, int task, const char *out, const esp_adapter *into, bool only_check,
                         esp_svd_stats *svd) {
  const esp_recipe_task *t = &r->tasks[task];
  merging *g = esp_mem_alloc(ESP_MEM_HOST, sizeof *g);
  if (!g) return ESP_ERR_MEMORY;
  g->r = r;
  g->step = t->start;
  g->before = true;
  g->n = only_check && task == 1 ? 2 : task;
  g->listed = t->before ? task : r->n_tasks - 1;
  g->out = out;
  g->into = into;
  esp_status st = run(g, only_check, svd);
  esp_mem_free(g);
  return st == ESP_OK ? ESP_OK : esp_fail_context(st, "before[0].merge_tasks, for task '%s'", t->name);
}

esp_status esp_api_merge_tasks(const esp_recipe *r, int step) {
  return after(r, step, false);
}

esp_status esp_api_merge_before(void *ctx, const esp_recipe *r, int task, const char *out, const esp_adapter *into,
                                char *note, size_t size) {
  esp_svd_stats svd = {0};
  (void)ctx;
  ESP_TRY(before(r, task, out, into, false, &svd));
  int n = snprintf(note, size, "task %s starts from the %d before it, merged by %s", r->tasks[task].name, task,
                   r->tasks[task].start->method.name);
  if (task == 1) n = snprintf(note, size, "task %s starts from the one before it", r->tasks[task].name);
  if (into && n > 0 && (size_t)n < size)
    snprintf(note + n, size - (size_t)n, ", rank %lld, relative error: mean %.3g, largest %.3g", (long long)svd.rank,
             svd.mean_error, svd.max_error);
  return ESP_OK;
}

esp_status esp_api_after_check(const esp_recipe *r) {
  bool bank = esp_strategies_have(&r->continual.strategy, ESP_STRATEGY_BANK);
  bool stack = r->continual.policy == ESP_POLICY_STACK;
  for (int i = 0; i < r->n_after; i++)
    if (r->n_tasks > 1 &&
        ((r->after[i].kind == ESP_AFTER_MERGE && bank) || (r->after[i].kind == ESP_AFTER_EXPORT && (bank || stack))))
      return esp_fail(ESP_ERR_RECIPE,
                      "%s: after[%d]: the run ends with an adapter for each task, not with one (merge_tasks "
                      "makes one of them)",
                      r->path ? r->path : "recipe", i);
  esp_status st = ESP_OK;
  for (int i = 0; i < r->n_after && st == ESP_OK; i++)
    if (r->after[i].kind == ESP_AFTER_MERGE_TASKS) st = after(r, i, true);
  for (int i = 1; i < r->n_tasks && st == ESP_OK; i++)
    if (r->tasks[i].start) st = before(r, i, NULL, NULL, true, NULL);
  return st == ESP_OK ? ESP_OK : esp_fail_context(st, "%s", r->path ? r->path : "recipe");
}
