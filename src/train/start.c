/* start.c: `before`: what a task starts from is the merge of what the tasks before it learned.
 *
 * Rank 0 merges the run's files into starts/<task>; with merge_then_new that is the task's base, else an adapter, which
 * every rank reads and takes over: its change B A becomes that of the adapter that is trained. It happens between two
 * tasks, before the checkpoint that the next one begins with, and is a function of the files of finished tasks: a run
 * that is resumed before it does it again, one that is resumed behind it has the values in its checkpoint.
 */
#include <stdio.h>
#include <string.h>

#include "io/file.h"
#include "train/loop.h"

static bool chained(const esp_recipe *r) {
  return r->continual.policy == ESP_POLICY_MERGE_THEN_NEW;
}

static esp_status take_site(esp_adapter *to, esp_adapter *from, esp_site *s) {
  esp_status st = ESP_OK;
  int64_t rank = from->targeted[s->index] ? from->kind->low_rank(from, s, NULL, NULL) : 0;
  int64_t most = to->kind->low_rank(to, s, NULL, NULL), r = rank < most ? rank : most;
  float *a = esp_mem_alloc(ESP_MEM_HOST, (size_t)(rank * s->in + 1) * sizeof *a);
  float *b = esp_mem_alloc(ESP_MEM_HOST, (size_t)(rank * s->out + 1) * sizeof *b);
  if (!a || !b) ESP_GOTO(ESP_ERR_MEMORY);
  if (rank > 0 && from->kind->low_rank(from, s, a, b) < 0) ESP_GOTO(ESP_ERR_MEMORY);
  /* the file has one rank for all sites: what is more than this one's is zero */
  for (int64_t o = 0; r < rank && o < s->out; o++) memmove(b + o * r, b + o * rank, (size_t)r * sizeof *b);
  st = to->kind->start_from(to, s, r, a, b);
out:
  esp_mem_free(a);
  esp_mem_free(b);
  return st;
}

/* Sites that no earlier task changed begin as a start without a change does. */
static esp_status take_over(esp_engine *e, const char *dir) {
  esp_adapter *from = NULL;
  esp_site **sites;
  int n = esp_model_sites(e->model, &sites);
  esp_status st = esp_adapter_load(e->model, dir, "start", false, &from);
  for (int i = 0; i < n && st == ESP_OK; i++)
    if (e->adapter->targeted[i]) st = take_site(e->adapter, from, sites[i]);
  if (st == ESP_OK) st = esp_backend_sync(e->be);
  esp_adapter_destroy(from);
  return st;
}

esp_status esp_loop_start(esp_loop *l, int i) {
  char dir[ESP_PATH], note[512] = "";
  esp_status st = ESP_OK;
  esp_train_start(l->r, i, dir);
  if (l->comm->rank == 0)
    st = l->hooks->merge_before(l->hooks->ctx, l->r, i, dir, chained(l->r) ? NULL : l->engine.adapter, note,
                                sizeof note);
  ESP_TRY(esp_comm_agree(l->comm, st));
  if (l->comm->rank == 0) esp_loop_note(l, "%s", note);
  if (!chained(l->r)) return esp_comm_agree(l->comm, take_over(&l->engine, dir));
  if (snprintf(l->state.base, sizeof l->state.base, "starts/%s", l->r->tasks[i].name) >= (int)sizeof l->state.base)
    return esp_fail(ESP_ERR_RECIPE, "tasks[%d].name: is too long", i);
  return ESP_OK;
}

/* ---- plan ---- */

static esp_status check_site(const esp_engine *e, int i, const esp_site *s, const bool *learned) {
  const esp_adapter *a = e->adapter;
  bool linear = s->kind == ESP_SITE_LINEAR && a->targeted[s->index];
  const char *name = e->r->tasks[i].name;
  if ((esp_adapter_changes(a, s) && !linear) || esp_adapter_changes_bias(a, s))
    return esp_fail(ESP_ERR_RECIPE,
                    "before: task '%s' trains '%s' in full, its bias, or as no linear: a plain LoRA cannot carry it "
                    "(continual.policy: merge_then_new can)",
                    name, s->path);
  if (e->r->tasks[i].start && learned[s->index] && !linear)
    return esp_fail(ESP_ERR_RECIPE, "before: task '%s' does not train '%s', which an earlier task changes", name,
                    s->path);
  return ESP_OK;
}

esp_status esp_plan_merge(esp_engine *e, int i) {
  esp_site **sites;
  esp_adapter *read = NULL;
  int n_sites = esp_model_sites(e->model, &sites);
  int64_t largest = 0, values = 0;
  if (!e->r->tasks[i].start) return ESP_OK;
  for (int k = 0; k < e->adapter->params->count; k++) values += e->adapter->params->list[k].numel;
  for (int s = 0; s < n_sites; s++)
    if (sites[s]->kind == ESP_SITE_LINEAR && !sites[s]->is_head && sites[s]->out * sites[s]->in > largest)
      largest = sites[s]->out * sites[s]->in;
  /* the adapters, their factors, what is written and read again; of one site its change, a decomposition of it, and a
   * block of each; what opening models takes, and histograms of magnitudes */
  int64_t block = largest < (1 << 18) ? largest : 1 << 18;
  int64_t bytes = 4 * ((chained(e->r) ? 0 : i + 3) * values + 6 * largest + (i + 2) * block) + (3 << 17);
  if (e->r->tasks[i].start->method.n_density > 0) bytes += 1 << 20;
  esp_mem_account(ESP_MEM_WORKSPACE, bytes);
  esp_mem_account(ESP_MEM_WORKSPACE, -bytes);
  if (chained(e->r)) return ESP_OK;
  esp_status st = esp_adapter_create(e->model, &e->adapter->cfg, "start", false, &read);
  esp_adapter_destroy(read);
  return st;
}

esp_status esp_plan_start(esp_engine *e, int i, bool **learned) {
  const esp_recipe *r = e->r;
  esp_site **sites;
  int n = esp_model_sites(e->model, &sites), last = -1;
  for (int t = 0; t < r->n_tasks; t++)
    if (r->tasks[t].start) last = t;
  if (i > last || chained(r)) return ESP_OK;
  if (!*learned && !(*learned = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof **learned))) return ESP_ERR_MEMORY;
  for (int s = 0; s < n; s++) ESP_TRY(check_site(e, i, sites[s], *learned));
  for (int s = 0; s < n; s++) (*learned)[s] |= esp_adapter_changes(e->adapter, sites[s]);
  return ESP_OK;
}
