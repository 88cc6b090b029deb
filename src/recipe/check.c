/* check.c: rules between keys, once every value is in its place. */
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "core/strbuf.h"
#include "recipe/bind.h"
#include "text/template.h"

/* The node of a value, for the place in a message; NULL when it is a default. */
static const esp_node *node_at(const esp_node *map, const char *section, const char *key) {
  const esp_node *s = section ? esp_node_get(map, section, NULL) : map;
  const esp_node *n = s ? esp_node_get(s, key, NULL) : NULL;
  return n ? n : s;
}

static const esp_node *item(const esp_node *root, const char *list, const char *inner, int i) {
  const esp_node *l = esp_node_get(root, list, NULL);
  if (inner) l = esp_node_get(l, inner, NULL);
  return l && l->kind == ESP_NODE_LIST && i < l->n ? l->items[i] : NULL;
}

static void check_names(esp_binder *b, const esp_node *root) {
  esp_recipe *r = b->recipe;
  for (int i = 0; i < r->n_tasks; i++)
    for (int j = 0; j < i; j++)
      if (r->tasks[i].name && r->tasks[j].name && !strcmp(r->tasks[i].name, r->tasks[j].name)) {
        esp_bind_error(b, node_at(item(root, "tasks", NULL, i), NULL, "name"),
                       "tasks[%d].name: '%s' is already the name of tasks[%d]", i, r->tasks[i].name, j);
        break;
      }
  for (int i = 0; i < r->eval.n_sets; i++)
    for (int j = 0; j < i; j++)
      if (r->eval.sets[i].name && r->eval.sets[j].name && !strcmp(r->eval.sets[i].name, r->eval.sets[j].name)) {
        esp_bind_error(b, node_at(item(root, "eval", "sets", i), NULL, "name"),
                       "eval.sets[%d].name: '%s' is already the name of eval.sets[%d]", i, r->eval.sets[i].name, j);
        break;
      }
}

static void check_template(esp_binder *b, const esp_node *at, const char *path, const char *name) {
  int n;
  const char *const *names = esp_template_names(&n);
  char list[256] = "", hint[100];
  if (!name || !strcmp(name, "auto")) return;
  bool builtin = !strncmp(name, "builtin:", 8);
  for (int i = 0; builtin && i < n; i++)
    if (!strcmp(names[i], name + 8)) return;
  size_t w = 0;
  for (int i = 0; i < n && w < sizeof list; i++)
    w += (size_t)snprintf(list + w, sizeof list - w, ", builtin:%s", names[i]);
  esp_bind_error(b, at, "%s.chat_template: '%.40s' is not one of auto%s%s", path, name, list,
                 esp_suggest(builtin ? name + 8 : name, names, n, hint, sizeof hint));
}

static void check_device(esp_binder *b, const esp_node *root) {
  const char *d = b->recipe->parallel.device;
  if (!d || !strcmp(d, "auto") || !strcmp(d, "cpu") || !strcmp(d, "cuda")) return;
  const char *n = !strncmp(d, "cuda:", 5) ? d + 5 : "";
  if (*n && strspn(n, "0123456789") == strlen(n) && strlen(n) < 4) return;
  esp_bind_error(b, node_at(root, "parallel", "device"),
                 "parallel.device: '%.40s' is not one of auto, cpu, cuda, cuda:N (N a number)", d);
}

static bool has_word(const char *words, const char *w) {
  size_t n = strlen(w);
  for (const char *p = words; (p = strstr(p, w)) != NULL; p += n)
    if ((p == words || p[-1] == ' ') && (p[n] == ' ' || !p[n])) return true;
  return false;
}

static bool reads(const char *type, const char *of) {
  const esp_adapter_kind *kind = type ? esp_adapter_find(type) : NULL;
  return !kind || has_word(of, kind->name);
}

/* A key that the kind would not read is refused where it says anything but the default: a resolved recipe, which names
 * every key, can be read again. In the recipe's own section it may be meant for a task of another kind. */
static void check_foreign(esp_binder *b, const esp_node *map, const char *prefix, const esp_adapter_cfg *adapter) {
  const esp_object *o = esp_schema_find(&esp_schema_root, "adapter")->object;
  const esp_node *section = esp_node_get(map, "adapter", NULL);
  const esp_recipe *r = b->recipe;
  for (int i = 0; section && section->kind == ESP_NODE_MAP && i < section->n; i++) {
    const esp_key *k = section->keys[i]->text ? esp_schema_find(o, section->keys[i]->text) : NULL;
    bool read = !k || !k->of || reads(adapter->type, k->of);
    for (int t = 0; t < r->n_tasks && !read && !*prefix; t++) read = reads(r->tasks[t].adapter.type, k->of);
    if (read) continue;
    esp_recipe *plain = esp_bind_alloc(b, sizeof *plain);
    esp_strbuf given, usual;
    esp_strbuf_init(&given);
    esp_strbuf_init(&usual);
    if (plain && esp_value_default(b, k, plain)) {
      esp_value_render(r, k, (const char *)adapter - offsetof(esp_recipe, adapter), true, &given);
      esp_value_render(plain, k, plain, true, &usual);
      if (!given.failed && !usual.failed && strcmp(given.data, usual.data))
        esp_bind_error(b, section->keys[i], "%sadapter.%s: is read by %s, not by %s", prefix, k->name, k->of,
                       adapter->type);
    }
    esp_strbuf_deinit(&given);
    esp_strbuf_deinit(&usual);
  }
}

/* The decay of `infinite` is a power of min_lr_ratio. */
static void check_schedule(esp_binder *b, const esp_node *map, const char *prefix, const esp_schedule *s) {
  if (s->name != ESP_SCHED_INFINITE) return;
  if (s->anneal_steps > 0 && s->min_lr_ratio <= 0)
    esp_bind_error(b, node_at(map, "schedule", "min_lr_ratio"),
                   "%sschedule.min_lr_ratio: must be above 0 for the decay of infinite (anneal: 0 has none)", prefix);
  if (s->min_lr_ratio > s->constant_ratio)
    esp_bind_error(b, node_at(map, "schedule", "constant_ratio"), "%sschedule.constant_ratio: is below min_lr_ratio",
                   prefix);
}

static void check_sections(esp_binder *b, const esp_node *map, const char *prefix, const esp_data_cfg *data,
                           const esp_optim_cfg *optim, const esp_adapter_cfg *adapter) {
  char path[64];
  snprintf(path, sizeof path, "%sdata", prefix);
  check_template(b, node_at(map, "data", "chat_template"), path, data->chat_template);
  check_foreign(b, map, prefix, adapter);
  if (optim->nesterov && optim->momentum == 0)
    esp_bind_error(b, node_at(map, "optim", "nesterov"), "%soptim.nesterov: needs momentum above 0", prefix);
  if (adapter->layers_pattern && !adapter->n_layers)
    esp_bind_error(b, node_at(map, "adapter", "layers_pattern"), "%sadapter.layers_pattern: needs adapter.layers",
                   prefix);
}

/* Epochs and steps exclude each other; where only one comes from the nearer place (task before recipe, command line
 * before file), that one counts. */
static int nearness(const esp_recipe *r, const void *field) {
  const esp_origin *o = esp_origin_get(r, field);
  return !o ? 0 : o->override ? 2 : 1;
}

static void check_length(esp_binder *b, const esp_node *map, const char *prefix, esp_recipe_train *t) {
  int epochs = nearness(b->recipe, &t->epochs), steps = nearness(b->recipe, &t->max_steps);
  if (epochs && steps && epochs == steps && t->max_steps)
    esp_bind_error(b, node_at(map, "train", "max_steps"),
                   "%strain.max_steps: train.epochs is given as well, only one of them can hold", prefix);
  else if (epochs > steps)
    t->max_steps = 0;
  if (t->max_steps) t->epochs = 1; /* of no effect: one canonical value for the hash */
}

static void check_keep_best(esp_binder *b, const esp_node *root) {
  esp_recipe *r = b->recipe;
  const char *metric = r->checkpoint.keep_best_metric;
  if (!metric) return;
  const esp_node *at = node_at(root, "checkpoint", "keep_best");
  const esp_node *mode = at ? esp_node_get(at, "mode", NULL) : NULL;
  const char *names[65] = {"loss"};
  char hint[100];
  int n = 1;
  bool max = false, known = !strcmp(metric, "loss");
  for (int i = 0; i < r->eval.n_sets; i++) {
    if (!r->eval.sets[i].name) continue;
    if (n < 65) names[n++] = r->eval.sets[i].name;
    if (strcmp(metric, r->eval.sets[i].name)) continue;
    known = true;
    max = !esp_metric_lower(r->eval.sets[i].metric);
  }
  if (!known) {
    const esp_node *m = at ? esp_node_get(at, "metric", NULL) : NULL;
    esp_bind_error(b, m ? m : at, "checkpoint.keep_best.metric: '%.40s' is neither loss nor an evaluation set%s",
                   metric, esp_suggest(metric, names, n, hint, sizeof hint));
  }
  if (!mode || esp_node_is_null(mode)) r->checkpoint.keep_best_max = max;
}

/* Where the predictions of the base are asked for, the base must still be there when adapters are off. */
static void check_against_base(esp_binder *b, const esp_node *root) {
  const esp_recipe *r = b->recipe;
  for (int i = 0; i < r->eval.n_sets; i++) {
    esp_metric metric = r->eval.sets[i].metric;
    if (metric != ESP_METRIC_BASE_XENT && metric != ESP_METRIC_BASE_KL) continue;
    const esp_node *at = node_at(item(root, "eval", "sets", i), NULL, "metric");
    if (r->continual.policy == ESP_POLICY_MERGE_THEN_NEW && r->n_tasks > 1) {
      esp_bind_error(b, at,
                     "eval.sets[%d].metric: compares with the base, which continual.policy merge_then_new changes", i);
      continue;
    }
    for (int t = 0; t < r->n_tasks; t++) {
      const char *init = r->tasks[t].adapter.init;
      if (!esp_lora_rewrites_base(init)) continue;
      esp_bind_error(b, at, "eval.sets[%d].metric: compares with the base, which adapter.init %s changes", i, init);
      break;
    }
  }
}

/* What is made after the run lives in the run's folder, unless it says otherwise. */
static void place_outputs(esp_binder *b) {
  esp_recipe *r = b->recipe;
  for (int i = 0; i < r->n_after; i++) {
    const char *out = r->after[i].out;
    if (!out || out[0] == '/') continue;
    r->after[i].out = esp_arena_printf(b->arena, "%s/%s", r->checkpoint.output_dir, out);
    if (!r->after[i].out) b->oom = true;
  }
}

/* For `branch`: the schedule of each task, where each ends with a decay. */
static void task_schedules(esp_binder *b) {
  esp_recipe *r = b->recipe;
  esp_schedule *list = esp_bind_alloc(b, sizeof *list * (size_t)(r->n_tasks + 1));
  bool all = list != NULL;
  for (int i = 0; i < r->n_tasks && all; i++) {
    list[i] = r->schedule_restart ? r->tasks[i].schedule : r->schedule;
    all = esp_schedule_decay_steps(&list[i], INT32_MAX) > 0 && (r->schedule_restart || list[i].name != ESP_SCHED_WSD);
  }
  r->continual.strategy.branch.schedule = all ? list : NULL;
}

/* Strategies against forgetting: their own rules, and those with the adapter and the policy. */
static void check_strategies(esp_binder *b, const esp_node *root) {
  const esp_recipe *r = b->recipe;
  const esp_strategy_cfg *c = &r->continual.strategy;
  if (r->continual.policy == ESP_POLICY_JOINT && c->n > 0)
    esp_bind_error(b, node_at(root, "continual", "strategy"),
                   "continual.strategy: with policy joint there is nothing to forget");
  esp_adapter_policy policy = r->continual.policy;
  esp_strategy_facts facts = {.n_tasks = r->n_tasks,
                              .one_adapter = policy == ESP_POLICY_CONTINUE || r->n_tasks == 1,
                              .new_per_task = policy == ESP_POLICY_NEW_PER_TASK};
  task_schedules(b);
  facts.frozen = r->n_tasks > 0;
  for (int i = 0; i < r->n_tasks; i++) {
    facts.merges_before |= r->tasks[i].start && policy != ESP_POLICY_MERGE_THEN_NEW;
    const esp_adapter_kind *kind = r->tasks[i].adapter.type ? esp_adapter_find(r->tasks[i].adapter.type) : NULL;
    facts.frozen &= esp_adapter_trains_nothing(&r->tasks[i].adapter);
    facts.adapter_moves |= kind && kind->resized;
  }
  if (esp_strategies_check(c, &facts) != ESP_OK)
    esp_bind_error(b, node_at(root, "continual", "strategy"), "%s", esp_error_message());
  esp_error_clear();
}

static bool merges(const esp_recipe_task *t) {
  const esp_adapter_kind *kind = t->adapter.type ? esp_adapter_find(t->adapter.type) : NULL;
  return !kind || kind->mergeable;
}

/* What one step of `before` cannot be; NULL: it can. */
static const char *bad_start(const esp_recipe *r, int i, const esp_after_step *s, char *text, size_t size) {
  const esp_adapter_cfg *a = &r->tasks[r->continual.policy == ESP_POLICY_CONTINUE ? 0 : i].adapter;
  const esp_adapter_kind *kind = a->type ? esp_adapter_find(a->type) : NULL;
  bool chain = r->continual.policy == ESP_POLICY_MERGE_THEN_NEW;
  text[0] = 0;
  if (s->out && strcmp(s->out, "merged_tasks")) return "out: it is always starts/<task> in the run's folder";
  if (chain && s->method.as_adapter) return "as: with continual.policy merge_then_new a task starts from a model";
  if (chain && s->method.rank) return "rank: with continual.policy merge_then_new a task starts from a model";
  if (r->continual.policy == ESP_POLICY_STACK) return "with continual.policy stack the earlier adapters stay active";
  if (r->continual.policy == ESP_POLICY_JOINT) return "with continual.policy joint there is one task";
  for (int t = 0; t < i; t++)
    if (!merges(&r->tasks[t])) snprintf(text, size, "an adapter of type %s cannot be merged", r->tasks[t].adapter.type);
  if (text[0] || chain || !kind) return text[0] ? text : NULL;
  if (s->dtype) return "dtype: is for continual.policy merge_then_new, where a task starts from a model";
  if (!kind->start_from)
    snprintf(text, size, "an adapter of type %s cannot start from a merge (continual.policy: merge_then_new can)",
             a->type);
  else if (a->lora_fa)
    return "adapter.lora_fa: A would not be the one that is frozen";
  else if (esp_lora_rewrites_base(a->init))
    snprintf(text, size, "adapter.init %s changes the base that the merge is for", a->init);
  else if (a->init && !strcmp(a->init, "eva") && r->continual.policy == ESP_POLICY_NEW_PER_TASK)
    return "adapter.init eva gives the adapter of each task other ranks, which a merge need not fit";
  else if (s->method.rank > a->r)
    snprintf(text, size, "rank: %lld, the adapter has %lld", (long long)s->method.rank, (long long)a->r);
  return text[0] ? text : NULL;
}

/* What each task starts from. A merge of one is that one: with one adapter through all tasks, or merged into the base,
 * the second task starts there anyhow. */
static void settle_starts(esp_binder *b, const esp_node *root) {
  esp_recipe *r = b->recipe;
  char text[256];
  const esp_node *all = node_at(root, NULL, "before");
  if (r->n_before > 0 && r->n_tasks == 1) esp_bind_error(b, all, "before: there is one task, and none before it");
  if (r->n_before > 1) esp_bind_error(b, all, "before: %d steps, a task starts from one merge", r->n_before);
  bool sums = esp_strategies_have(&r->continual.strategy, ESP_STRATEGY_BANK) && r->continual.strategy.bank.selector &&
              !strcmp(r->continual.strategy.bank.selector, "sum");
  const char *said = NULL;
  for (int i = 0; i < r->n_tasks; i++) {
    esp_recipe_task *t = &r->tasks[i];
    const esp_node *at = t->before ? node_at(item(root, "tasks", NULL, i), NULL, "before") : all;
    const esp_after_step *s = t->before ? t->before : r->before;
    int n = t->before ? t->n_before : r->n_before;
    if (n == 0 || !s[0].method.name || (!t->before && (i == 0 || r->n_tasks == 1))) continue;
    char where[48] = "before";
    if (t->before) snprintf(where, sizeof where, "tasks[%d].before", i);
    if (t->before && i < 2)
      esp_bind_error(b, at, "%s: %s task has been learned by then, a merge needs two", where, i ? "one" : "no");
    else if (t->before && n > 1)
      esp_bind_error(b, at, "%s: %d steps, a task starts from one merge", where, n);
    else if (sums)
      esp_bind_error(b, at, "%s: with continual.bank.selector sum what is merged would be added again", where);
    const char *why = bad_start(r, i, s, text, sizeof text);
    if (why && (t->before || !said)) esp_bind_error(b, at, "%s[0].merge_tasks: %s", where, why);
    if (!t->before) said = why ? why : said;
    if (i > 1 || r->continual.policy == ESP_POLICY_NEW_PER_TASK) t->start = &s[0];
  }
  for (int i = -1; i < r->n_tasks; i++) { /* the place of what it makes is no value of the recipe */
    esp_after_step *s = i < 0 ? r->before : r->tasks[i].before;
    for (int k = 0; k < (i < 0 ? r->n_before : r->tasks[i].n_before); k++) s[k].out = NULL;
  }
}

/* Found after the last step of a run otherwise. */
static void check_merges(esp_binder *b, const esp_node *root) {
  const esp_recipe *r = b->recipe;
  if (r->continual.policy == ESP_POLICY_MERGE_THEN_NEW)
    for (int i = 0; i + 1 < r->n_tasks; i++)
      if (!merges(&r->tasks[i])) {
        esp_bind_error(b, node_at(root, "continual", "policy"),
                       "continual.policy: merge_then_new: an adapter of type %s cannot be merged",
                       r->tasks[i].adapter.type);
        break;
      }
  for (int i = 0; i < r->n_after; i++)
    for (int t = 0; r->after[i].kind == ESP_AFTER_MERGE_TASKS && t < r->n_tasks; t++)
      if (!merges(&r->tasks[t])) {
        esp_bind_error(b, item(root, "after", NULL, i), "after[%d].merge_tasks: an adapter of type %s cannot be merged",
                       i, r->tasks[t].adapter.type);
        break;
      }
  for (int i = 0; i < r->n_after && r->n_tasks > 0; i++)
    if (r->after[i].kind == ESP_AFTER_MERGE && !merges(&r->tasks[r->n_tasks - 1]))
      esp_bind_error(b, item(root, "after", NULL, i), "after[%d].merge: an adapter of type %s cannot be merged", i,
                     r->tasks[r->n_tasks - 1].adapter.type);
}

void esp_check_recipe(esp_binder *b, const esp_node *root) {
  esp_recipe *r = b->recipe;
  check_names(b, root);
  settle_starts(b, root);
  check_strategies(b, root);
  check_device(b, root);
  check_keep_best(b, root);
  check_against_base(b, root);
  check_sections(b, root, "", &r->data, &r->optim, &r->adapter);
  check_schedule(b, root, "", &r->schedule);
  check_length(b, root, "", &r->train);
  for (int i = 0; i < r->n_tasks; i++) {
    esp_recipe_task *t = &r->tasks[i];
    const esp_node *node = item(root, "tasks", NULL, i);
    char prefix[32];
    snprintf(prefix, sizeof prefix, "tasks[%d].", i);
    bool own_epochs = nearness(r, &t->train.epochs), own_steps = nearness(r, &t->train.max_steps);
    if (own_epochs || own_steps)
      check_length(b, node, prefix, &t->train);
    else
      t->train.max_steps = r->train.max_steps, t->train.epochs = r->train.epochs;
    bool again = node && (esp_node_get(node, "data", NULL) || esp_node_get(node, "optim", NULL) ||
                          esp_node_get(node, "adapter", NULL));
    /* A fault of the recipe's own section was said above: say only what the task brought in. */
    esp_data_cfg data = t->data_cfg;
    if (data.chat_template == r->data.chat_template) data.chat_template = NULL;
    esp_optim_cfg optim = t->optim;
    if (r->optim.nesterov && r->optim.momentum == 0) optim.nesterov = false;
    esp_adapter_cfg adapter = t->adapter;
    if (adapter.layers_pattern == r->adapter.layers_pattern && !r->adapter.n_layers) adapter.layers_pattern = NULL;
    if (again) check_sections(b, node, prefix, &data, &optim, &adapter);
    if (node && esp_node_get(node, "schedule", NULL)) check_schedule(b, node, prefix, &t->schedule);
    t->adapter.seed = r->seed;
    t->adapter.tasks = r->continual.policy == ESP_POLICY_CONTINUE ? r->n_tasks : 1;
  }
  r->adapter.seed = r->seed;
  if (!r->model.tokenizer) r->model.tokenizer = r->model.base_model;
  if (!r->checkpoint.output_dir) {
    r->checkpoint.output_dir = esp_arena_printf(b->arena, "runs/%s", r->name);
    if (!r->checkpoint.output_dir) b->oom = true;
  }
  check_merges(b, root);
  place_outputs(b);
}
