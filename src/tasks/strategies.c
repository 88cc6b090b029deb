/* strategies.c: all strategies of a run as one: their hooks in the order of the recipe, their arrays, the rules between
 * them. */
#include <stdio.h>
#include <string.h>

#include "tasks/internal.h"

/* ---- rules ---- */

static esp_status at_most_one(const esp_strategy_cfg *c, unsigned flag, const char *what) {
  const char *first = NULL;
  for (int i = 0; i < c->n; i++) {
    const esp_strategy_kind *k = esp_strategy_find(c->names[i]);
    if (!(k->flags & flag)) continue;
    if (first) return esp_fail(ESP_ERR_RECIPE, "continual.strategy: %s and %s %s", first, k->name, what);
    first = k->name;
  }
  return ESP_OK;
}

bool esp_strategies_have(const esp_strategy_cfg *c, unsigned flag) {
  for (int i = 0; i < c->n; i++) {
    const esp_strategy_kind *k = esp_strategy_find(c->names[i]);
    if (k && (k->flags & flag)) return true;
  }
  return false;
}

esp_status esp_strategies_check(const esp_strategy_cfg *c, const esp_strategy_facts *f) {
  for (int i = 0; i < c->n; i++) {
    const esp_strategy_kind *k = esp_strategy_find(c->names[i]);
    if (!k) return esp_fail(ESP_ERR_RECIPE, "continual.strategy: there is no '%.60s'", c->names[i]);
    for (int j = 0; j < i; j++)
      if (!strcmp(c->names[j], c->names[i]))
        return esp_fail(ESP_ERR_RECIPE, "continual.strategy: %s is named twice", k->name);
    if ((k->flags & ESP_STRATEGY_BY_PARAMETER) && f->adapter_moves)
      return esp_fail(ESP_ERR_RECIPE,
                      "continual.strategy: %s holds a value for each parameter, which an adapter whose "
                      "ranks move does not keep",
                      k->name);
    if ((k->flags & ESP_STRATEGY_BY_PARAMETER) && f->merges_before)
      return esp_fail(ESP_ERR_RECIPE,
                      "continual.strategy: %s holds a value for each parameter, which a merge before a task does not "
                      "keep",
                      k->name);
    if ((k->flags & ESP_STRATEGY_BY_PARAMETER) && !f->one_adapter)
      return esp_fail(ESP_ERR_RECIPE,
                      "continual.strategy: %s needs one adapter through all tasks (continual.policy: "
                      "continue)",
                      k->name);
    if ((k->flags & ESP_STRATEGY_BANK) && !f->new_per_task)
      return esp_fail(ESP_ERR_RECIPE,
                      "continual.strategy: %s chooses among the adapters of tasks, which "
                      "continual.policy: new_per_task makes",
                      k->name);
    if ((k->flags & ESP_STRATEGY_FROZEN) && !f->frozen)
      return esp_fail(ESP_ERR_RECIPE,
                      "continual.strategy: %s is for a base on which nothing is trained (adapter.type: none)", k->name);
    if (!(k->flags & ESP_STRATEGY_FROZEN) && f->frozen)
      return esp_fail(ESP_ERR_RECIPE,
                      "continual.strategy: %s has nothing to do where nothing is trained (adapter.type: none)",
                      k->name);
    if (k->check) ESP_TRY(k->check(c, f->n_tasks));
  }
  ESP_TRY(at_most_one(c, ESP_STRATEGY_TEACHES, "both need a teacher's pass"));
  return at_most_one(c, ESP_STRATEGY_DEPLOYS, "both decide which values are measured and saved");
}

/* ---- arrays ---- */

static void release(esp_strategy *s, esp_strategy_value *v) {
  if (v->host)
    esp_mem_free(v->data);
  else
    s->be->ops->free(s->be, v->data);
}

static esp_strategy_value *find(const esp_strategy *s, const char *name) {
  for (int i = 0; i < s->n_values; i++)
    if (!strcmp(s->values[i].name, name)) return &s->values[i];
  return NULL;
}

void *esp_strategy_get(const esp_strategy *s, const char *name, int64_t *n) {
  const esp_strategy_value *v = find(s, name);
  if (n) *n = v ? v->n : 0;
  return v ? v->data : NULL;
}

void esp_strategy_drop(esp_strategy *s, const char *name) {
  esp_strategy_value *v = find(s, name);
  if (!v) return;
  release(s, v);
  *v = s->values[--s->n_values];
}

void *esp_strategy_array(esp_strategy *s, const char *name, esp_dtype dtype, int64_t n, bool host) {
  esp_strategy_value *v = find(s, name);
  if (v && v->dtype == dtype && v->n == n && v->host == host) return v->data;
  if (v) esp_strategy_drop(s, name);
  size_t bytes = (size_t)n * esp_dtype_size(dtype);
  esp_strategy_value *grown = esp_mem_realloc(ESP_MEM_HOST, s->values, (size_t)(s->n_values + 1) * sizeof *s->values);
  if (!grown) return NULL;
  s->values = grown;
  v = &grown[s->n_values];
  *v = (esp_strategy_value){.dtype = dtype, .n = n, .host = host};
  if (snprintf(v->name, sizeof v->name, "%s", name) >= (int)sizeof v->name) {
    esp_fail(ESP_ERR_INTERNAL, "%s: '%s' is too long a name", s->kind->name, name);
    return NULL;
  }
  v->data = host ? esp_mem_alloc(ESP_MEM_STRATEGY, bytes) : s->be->ops->alloc(s->be, ESP_MEM_STRATEGY, (int64_t)bytes);
  if (v->data) s->n_values++;
  return v->data;
}

esp_tensor esp_strategy_flat(esp_strategy *s, const char *name, const esp_sequence *q) {
  int64_t n = q->adapter->params->total;
  return esp_flat(esp_strategy_array(s, name, ESP_F32, n, false), n);
}

/* ---- the set ---- */

esp_status esp_strategies_create(const esp_strategy_cfg *cfg, esp_backend *be, esp_strategies *out) {
  *out = (esp_strategies){0};
  if (cfg->n == 0) return ESP_OK;
  out->list = esp_mem_alloc(ESP_MEM_HOST, (size_t)cfg->n * sizeof *out->list);
  if (!out->list) return ESP_ERR_MEMORY;
  for (int i = 0; i < cfg->n; i++)
    out->list[i] = (esp_strategy){.kind = esp_strategy_find(cfg->names[i]), .cfg = cfg, .be = be};
  out->n = cfg->n;
  return ESP_OK;
}

void esp_strategies_destroy(esp_strategies *set) {
  for (int i = 0; i < set->n; i++) {
    esp_strategy *s = &set->list[i];
    if (s->kind->close) s->kind->close(s);
    for (int k = 0; k < s->n_values; k++) release(s, &s->values[k]);
    esp_mem_free(s->values);
  }
  esp_mem_free(set->list);
  *set = (esp_strategies){0};
}

#define EACH(set, hook, ...)                                                                                           \
  for (int i = 0; i < (set)->n; i++)                                                                                   \
    if ((set)->list[i].kind->hook) ESP_TRY((set)->list[i].kind->hook(&(set)->list[i], __VA_ARGS__));                   \
  return ESP_OK

esp_status esp_strategies_open(esp_strategies *set, const esp_sequence *q) {
  for (int i = 0; i < set->n; i++)
    if ((set->list[i].kind->flags & ESP_STRATEGY_ONE_RANK) && q->comm->size > 1)
      return esp_fail(ESP_ERR_RECIPE, "continual.strategy: %s runs on one rank", set->list[i].kind->name);
  EACH(set, open, q);
}
esp_status esp_strategies_task_begin(esp_strategies *set, const esp_sequence *q) {
  EACH(set, task_begin, q);
}
esp_status esp_strategies_task_end(esp_strategies *set, const esp_sequence *q) {
  EACH(set, task_end, q);
}
esp_status esp_strategies_hand_over(esp_strategies *set, const esp_sequence *q) {
  EACH(set, hand_over, q);
}
esp_status esp_strategies_draw(esp_strategies *set, const esp_sequence *q, const esp_strategy_step *t, double *weight) {
  EACH(set, draw, q, t, weight);
}
esp_status esp_strategies_teach(esp_strategies *set, const esp_sequence *q, const esp_strategy_step *t, esp_batch *b) {
  EACH(set, teach, q, t, b);
}
bool esp_strategies_meet(const esp_strategies *set) {
  for (int i = 0; i < set->n; i++)
    if (set->list[i].kind->flags & ESP_STRATEGY_MEETS) return true;
  return false;
}
esp_status esp_strategies_pass(esp_strategies *set, const esp_sequence *q, const esp_strategy_step *t) {
  EACH(set, pass, q, t);
}
esp_status esp_strategies_project(esp_strategies *set, const esp_sequence *q, const esp_strategy_step *t) {
  EACH(set, project, q, t);
}
esp_status esp_strategies_after_step(esp_strategies *set, const esp_sequence *q, const esp_strategy_step *t) {
  EACH(set, after_step, q, t);
}

double esp_strategies_penalty(esp_strategies *set, const esp_sequence *q, const esp_strategy_step *t) {
  double sum = 0;
  for (int i = 0; i < set->n; i++)
    if (set->list[i].kind->penalty) sum += set->list[i].kind->penalty(&set->list[i], q, t);
  return sum;
}

esp_status esp_strategies_deploy(esp_strategies *set, const esp_sequence *q, bool on) {
  if (set->deployed == on) return ESP_OK;
  set->deployed = on;
  EACH(set, deploy, q, on);
}

esp_status esp_strategies_choose(esp_strategies *set, const esp_sequence *q, int owner, const int32_t *prompt,
                                 esp_batch *b) {
  if (!set || !set->deployed) return ESP_OK;
  EACH(set, choose, q, owner, prompt, b);
}

int esp_strategies_experts(const esp_strategies *set) {
  for (int i = 0; set && set->deployed && i < set->n; i++)
    if (set->list[i].kind->experts) return set->list[i].kind->experts(&set->list[i]);
  return 1;
}

esp_status esp_strategies_expert(esp_strategies *set, const esp_sequence *q, int number) {
  if (set->expert == number) return ESP_OK;
  set->expert = number;
  EACH(set, expert, q, number);
}

static esp_strategy *answering(const esp_strategies *set, const char *const *labels, int n) {
  for (int i = 0; set && set->deployed && i < set->n; i++) {
    esp_strategy *s = &set->list[i];
    if (s->kind->answers && s->kind->answers(s, labels, n)) return s;
  }
  return NULL;
}

bool esp_strategies_answers(const esp_strategies *set, const char *const *labels, int n) {
  return answering(set, labels, n) != NULL;
}

esp_status esp_strategies_answer(esp_strategies *set, const esp_sequence *q, const char *const *labels, int n,
                                 const int32_t *prompt, const esp_batch *b, const char **out) {
  esp_strategy *s = answering(set, labels, n);
  if (!s) return esp_fail(ESP_ERR_INTERNAL, "no strategy answers these labels");
  return s->kind->answer(s, q, labels, n, prompt, b, out);
}

int64_t esp_strategies_bytes(const esp_strategies *set, int i, const esp_sequence *q) {
  const esp_strategy *s = &set->list[i];
  int64_t bytes = s->kind->held ? s->kind->held(s, q) : 0;
  for (int k = 0; k < s->n_values; k++) bytes += s->values[k].n * (int64_t)esp_dtype_size(s->values[k].dtype);
  return bytes;
}
