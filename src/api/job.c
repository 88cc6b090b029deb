/* job.c: a recipe and what can be done with it. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/api.h"
#include "core/strbuf.h"
#include "core/threads.h"
#include "eval/score.h"
#include "io/file.h"

static esp_status wrap(esp_status st, esp_recipe *r, esp_job **out) {
  *out = NULL;
  if (st != ESP_OK) return st;
  ESP_GOTO(esp_api_after_check(r)); /* what else would be found out after the last step */
  *out = esp_mem_alloc(ESP_MEM_HOST, sizeof **out);
  if (!*out) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  (*out)->recipe = r;
  return ESP_OK;
out:
  esp_recipe_destroy(r);
  return st;
}

esp_status esp_job_open(const char *path, const char *const *overrides, int n, esp_job **out) {
  esp_recipe *r = NULL;
  *out = NULL;
  esp_status st = esp_recipe_load(path, overrides, n, &r);
  return wrap(st, r, out);
}

esp_status esp_job_open_text(const char *yaml, size_t len, const char *path, const char *const *overrides, int n,
                             esp_job **out) {
  esp_recipe *r = NULL;
  *out = NULL;
  esp_status st = esp_recipe_parse(yaml, len, path, overrides, n, &r);
  return wrap(st, r, out);
}

esp_status esp_job_open_more(const char *run_dir, const char *append, const char *device, esp_job **out) {
  char path[ESP_PATH], place[2 * ESP_PATH + 32], *full = realpath(run_dir, NULL);
  *out = NULL;
  char *w = place + snprintf(place, sizeof place, "checkpoint.output_dir=\""); /* it may have been moved */
  for (const char *p = full ? full : run_dir; *p && w < place + sizeof place - 4; p++) {
    if (*p == '"' || *p == '\\') *w++ = '\\';
    *w++ = *p;
  }
  memcpy(w, "\"", 2);
  free(full);
  char where[64];
  snprintf(where, sizeof where, "parallel.device=%.40s", device ? device : "");
  const char *overrides[] = {place, where};
  esp_path_join(path, sizeof path, run_dir, "recipe.yaml");
  if (!esp_file_exists(path)) return esp_fail(ESP_ERR_DATA, "%s: holds no run (no recipe.yaml)", run_dir);
  esp_recipe *r = NULL;
  esp_status st = esp_recipe_load_more(path, overrides, device ? 2 : 1, append, &r);
  return wrap(st, r, out);
}

esp_status esp_job_open_run(const char *run_dir, const char *device, esp_job **out) {
  return esp_job_open_more(run_dir, NULL, device, out);
}

void esp_job_close(esp_job *job) {
  if (!job) return;
  esp_recipe_destroy(job->recipe);
  esp_mem_free(job);
}

const char *esp_job_name(const esp_job *job) {
  return job->recipe->name;
}
const char *esp_job_output_dir(const esp_job *job) {
  return job->recipe->checkpoint.output_dir;
}
int esp_job_prints(const esp_job *job, int64_t *every) {
  if (every) *every = job->recipe->log.every;
  return job->recipe->log.stdout_on;
}
char *esp_job_resolved(const esp_job *job) {
  return esp_recipe_resolved(job->recipe);
}

/* ---- plan ---- */

esp_status esp_job_plan(esp_job *job, esp_plan **out) {
  esp_status st = ESP_OK;
  esp_train_data d = {0};
  esp_plan_detail detail = {0};
  esp_comm *comm = NULL;
  *out = NULL;
  if (job->recipe->parallel.threads > 0) ESP_TRY(esp_threads_init(job->recipe->parallel.threads));
  ESP_GOTO(esp_comm_create(job->recipe->parallel.comm, &comm));
  ESP_GOTO(esp_train_data_load(job->recipe, true, true, &d));
  ESP_GOTO(esp_train_plan(job->recipe, &d, comm, &esp_api_hooks, &detail));
  *out = detail.plan;
  detail.plan = NULL;
out:
  esp_plan_detail_deinit(&detail);
  esp_train_data_deinit(&d);
  esp_comm_destroy(comm);
  return st;
}

/* ---- run ---- */

static esp_status run(esp_job *job, bool resume, const esp_run_options *opt, esp_run_result *result) {
  esp_status st = ESP_OK;
  esp_comm *comm = NULL;
  ESP_TRY(esp_comm_create(job->recipe->parallel.comm, &comm));
  st = esp_train_run(job->recipe, comm, &esp_api_hooks, resume, opt, result);
  if (st == ESP_OK && job->recipe->n_after > 0)
    st = esp_comm_agree(comm, comm->rank == 0 ? esp_api_after(job->recipe, opt) : ESP_OK);
  esp_comm_destroy(comm);
  return st;
}

esp_status esp_job_run(esp_job *job, const esp_run_options *opt, esp_run_result *result) {
  return run(job, false, opt, result);
}
esp_status esp_job_resume(esp_job *job, const esp_run_options *opt, esp_run_result *result) {
  return run(job, true, opt, result);
}

/* ---- evaluation alone ---- */

static esp_status eval_sets(esp_engine *e, const esp_train_data *d, const esp_run_options *opt, esp_score *scores,
                            int max) {
  const esp_recipe *r = e->r;
  for (int i = 0; i < r->eval.n_sets; i++) {
    const esp_eval_set *set = &r->eval.sets[i];
    esp_score_request q = esp_engine_request(e, d, i);
    esp_score s = {0};
    esp_score_result result;
    ESP_TRY(esp_api_hooks.score(NULL, &q, &result));
    s.value = result.value;
    s.samples = result.samples;
    s.malformed = result.malformed;
    snprintf(s.set, sizeof s.set, "%s", set->name);
    snprintf(s.metric, sizeof s.metric, "%s", esp_metric_name(set->metric));
    if (i < max) scores[i] = s;
    esp_event ev = {.kind = ESP_EVENT_EVAL,
                    .phase = "eval",
                    .task = "",
                    .set = s.set,
                    .metric = s.metric,
                    .score = s.value,
                    .has_malformed = !isnan(s.malformed),
                    .malformed = s.malformed,
                    .path = "",
                    .text = ""};
    if (opt && opt->on_event && e->comm->rank == 0) opt->on_event(opt->ctx, &ev);
  }
  return ESP_OK;
}

/* The stack's size comes from a pass on the counting backend, as in a run. */
static esp_status eval_pass(const esp_recipe *r, esp_comm *comm, bool counting, const char *adapter, const char *second,
                            const esp_train_data *d, const esp_run_options *opt, esp_score *scores, int max,
                            int64_t *stack) {
  esp_engine e = {0};
  esp_status st = esp_engine_init(&e, r, comm, counting);
  e.second_dir = second;
  if (st == ESP_OK) st = esp_engine_load(&e, r->model.base_model, NULL, adapter, false);
  if (st == ESP_OK) st = esp_engine_stack(&e, *stack);
  if (st == ESP_OK) st = eval_sets(&e, d, opt, scores, max);
  if (st == ESP_OK) *stack = e.stack.high;
  esp_engine_deinit(&e);
  return st;
}

esp_status esp_job_eval(esp_job *job, const char *adapter, const esp_run_options *opt, esp_score *scores, int max,
                        int *n) {
  const esp_recipe *r = job->recipe;
  esp_status st = ESP_OK;
  esp_train_data d = {0};
  esp_comm *comm = NULL, *self = NULL;
  const char *second = opt ? opt->ensemble : NULL;
  int64_t stack = 0;
  *n = r->eval.n_sets;
  if (second && !adapter) return esp_fail(ESP_ERR_RECIPE, "an ensemble is of two adapters: %s, and which?", second);
  if (r->eval.n_sets == 0) return esp_fail(ESP_ERR_RECIPE, "%s: has no evaluation sets (eval.sets)", r->path);
  if (r->parallel.threads > 0) ESP_TRY(esp_threads_init(r->parallel.threads));
  ESP_GOTO(esp_comm_create(r->parallel.comm, &comm));
  ESP_GOTO(esp_comm_create("self", &self));
  ESP_GOTO(esp_comm_agree(comm, esp_train_data_load(r, false, true, &d)));
  ESP_GOTO(esp_comm_agree(comm, eval_pass(r, self, true, adapter, second, &d, NULL, scores, 0, &stack)));
  if (stack == 0) stack = 64;
  ESP_GOTO(eval_pass(r, comm, false, adapter, second, &d, opt, scores, max, &stack));
out:
  esp_train_data_deinit(&d);
  esp_comm_destroy(self);
  esp_comm_destroy(comm);
  return st;
}

/* ---- data ---- */

/* What a token adds to the text of the one before it: alone, a leading blank would be lost (sentencepiece). */
static esp_status token_text(const esp_tokenizer *tok, const int32_t *ids, int64_t k, char **text) {
  size_t len, before_len;
  char *before = NULL, *both = NULL;
  esp_status st = ESP_OK;
  *text = NULL;
  if (k > 0) {
    ESP_GOTO(esp_tokenizer_decode(tok, ids + k - 1, 1, false, &before, &before_len));
    ESP_GOTO(esp_tokenizer_decode(tok, ids + k - 1, 2, false, &both, &len));
    if (len >= before_len && !memcmp(both, before, before_len)) {
      *text = esp_mem_strdup(ESP_MEM_HOST, both + before_len);
      if (!*text) st = ESP_ERR_MEMORY;
      goto out;
    }
  }
  ESP_GOTO(esp_tokenizer_decode(tok, ids + k, 1, false, text, &len));
out:
  esp_mem_free(before);
  esp_mem_free(both);
  return st;
}

static esp_status show_sample(const esp_train_data *d, const char *task, const esp_dataset *set, int64_t i,
                              esp_data_fn fn, void *ctx) {
  const int32_t *ids;
  const float *weights;
  int64_t n;
  char origin[ESP_PATH];
  esp_status st = ESP_OK;
  esp_dataset_sample(set, i, &ids, &weights, &n);
  esp_dataset_origin(set, i, origin, sizeof origin);
  esp_data_token *tokens = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *tokens);
  if (!tokens) return ESP_ERR_MEMORY;
  for (int64_t k = 0; k < n; k++) {
    char *text = NULL;
    ESP_GOTO(token_text(d->tok, ids, k, &text));
    tokens[k] = (esp_data_token){ids[k], k == 0 ? 0.0f : weights[k], text};
  }
  esp_data_sample s = {task, origin, i, esp_dataset_count(set), tokens, n};
  fn(ctx, &s);
out:
  for (int64_t k = 0; k < n; k++) esp_mem_free((void *)tokens[k].text);
  esp_mem_free(tokens);
  return st;
}

esp_status esp_job_data(esp_job *job, const char *task, int64_t count, esp_data_fn fn, void *ctx) {
  const esp_recipe *r = job->recipe;
  esp_status st = ESP_OK;
  esp_train_data d = {0};
  bool found = false;
  ESP_TRY(esp_train_data_load(r, true, false, &d));
  for (int t = 0; t < r->n_tasks; t++) {
    if (task && strcmp(task, r->tasks[t].name)) continue;
    found = true;
    int64_t n = esp_dataset_count(d.task[t]);
    for (int64_t i = 0; i < n && i < count; i++) ESP_GOTO(show_sample(&d, r->tasks[t].name, d.task[t], i, fn, ctx));
  }
  if (!found) st = esp_fail(ESP_ERR_RECIPE, "%s: has no task '%s'", r->path, task);
out:
  esp_train_data_deinit(&d);
  return st;
}
