/* check.c: everything that is wrong with a recipe's files, in one pass: tokenizer, every data source, model headers,
 * every target. */
#include <string.h>

#include "api/api.h"
#include "core/strbuf.h"

typedef struct checker {
  const esp_recipe *r;
  esp_strbuf facts, errors;
  esp_status first; /* of the failures: the status of the whole */
} checker;

static bool failed(checker *c, esp_status st, const char *what, const char *name) {
  if (st == ESP_OK) return false;
  if (c->first == ESP_OK) c->first = st;
  if (c->errors.len) esp_strbuf_putc(&c->errors, '\n');
  if (what) esp_strbuf_printf(&c->errors, "%s '%s': ", what, name);
  esp_strbuf_puts(&c->errors, esp_error_message());
  return true;
}

static void dataset_fact(esp_strbuf *b, const char *what, const char *name, const esp_dataset *d) {
  const esp_dataset_stats *s = esp_dataset_statistics(d);
  esp_strbuf_printf(b,
                    "%s %s: %lld rows, %lld samples kept, %lld dropped as too long, %lld truncated, %lld split; %lld "
                    "tokens, %lld trained; %lld of %lld trained turns end with a trained terminator\n",
                    what, name, (long long)s->rows, (long long)s->kept, (long long)s->dropped_overlong,
                    (long long)s->truncated, (long long)s->split, (long long)s->tokens, (long long)s->trained_tokens,
                    (long long)s->turns_terminated, (long long)s->turns_trained);
}

static void engine_facts(esp_strbuf *b, const char *task, const esp_engine *e) {
  int64_t numel = 0;
  int sites = 0, n = esp_model_sites(e->model, &(esp_site **){NULL});
  for (int i = 0; i < n; i++) sites += e->adapter->targeted[i];
  for (int i = 0; i < e->adapter->params->count; i++) numel += e->adapter->params->list[i].numel;
  esp_strbuf_printf(b, "task %s: adapter %s on %d of %d modules, %lld trained values\n", task, e->adapter->kind->name,
                    sites, n, (long long)numel);
}

static void check_source(checker *c, const esp_tokenizer *tok, const char *what, const char *name,
                         const esp_data_source *source, int n, const esp_data_cfg *cfg) {
  esp_dataset *set = NULL;
  if (!failed(c, esp_dataset_build(source, n, cfg, tok, &set), what, name)) dataset_fact(&c->facts, what, name, set);
  esp_dataset_destroy(set);
}

static void check_data(checker *c) {
  const esp_recipe *r = c->r;
  esp_tokenizer *tok = NULL;
  if (failed(c, esp_tokenizer_load(r->model.tokenizer, &tok), NULL, NULL)) return;
  for (int i = 0; i < r->n_tasks; i++)
    check_source(c, tok, "task", r->tasks[i].name, r->tasks[i].data, r->tasks[i].n_data, &r->tasks[i].data_cfg);
  for (int i = 0; i < r->eval.n_sets; i++)
    check_source(c, tok, "evaluation set", r->eval.sets[i].name, &r->eval.sets[i].source, 1, &r->data);
  esp_tokenizer_destroy(tok);
}

static void check_model(checker *c) {
  const esp_recipe *r = c->r;
  esp_comm *self = NULL;
  esp_engine e = {0};
  esp_status st = esp_comm_create("self", &self);
  if (st == ESP_OK) st = esp_engine_init(&e, r, self, true);
  for (int i = 0; st == ESP_OK && i < r->n_tasks; i++) {
    if (i > 0 && r->continual.policy == ESP_POLICY_CONTINUE) break;
    st = esp_engine_load(&e, r->model.base_model, &r->tasks[i].adapter, NULL, true);
    if (st == ESP_OK) engine_facts(&c->facts, r->tasks[i].name, &e);
  }
  failed(c, st, NULL, NULL);
  esp_engine_deinit(&e);
  esp_comm_destroy(self);
}

esp_status esp_job_check(esp_job *job, char **facts) {
  checker c = {.r = job->recipe, .first = ESP_OK};
  esp_strbuf_init(&c.facts);
  esp_strbuf_init(&c.errors);
  if (facts) *facts = NULL;
  check_data(&c);
  check_model(&c);
  if (c.first != ESP_OK) {
    c.first = esp_fail(c.first, "%s", c.errors.failed ? "out of memory" : c.errors.data);
  } else if (facts) {
    *facts = esp_strbuf_take(&c.facts);
    if (!*facts) c.first = ESP_ERR_MEMORY;
  }
  esp_strbuf_deinit(&c.facts);
  esp_strbuf_deinit(&c.errors);
  return c.first;
}
