/* data.c: the tokenizer and the datasets of a recipe. */
#include "core/log.h"
#include "train/train.h"

esp_status esp_train_data_load(const esp_recipe *r, bool with_tasks, bool with_eval, esp_train_data *d) {
  esp_status st = ESP_OK;
  *d = (esp_train_data){0};
  ESP_GOTO(esp_tokenizer_load(r->model.tokenizer ? r->model.tokenizer : r->model.base_model, &d->tok));
  d->task = esp_mem_alloc(ESP_MEM_DATA, sizeof *d->task * (size_t)(r->n_tasks + 1));
  d->eval = esp_mem_alloc(ESP_MEM_DATA, sizeof *d->eval * (size_t)(r->eval.n_sets + 1));
  if (!d->task || !d->eval) ESP_GOTO(ESP_ERR_MEMORY);
  d->n_tasks = r->n_tasks;
  d->n_sets = r->eval.n_sets;
  for (int i = 0; with_tasks && i < r->n_tasks; i++) {
    const esp_recipe_task *t = &r->tasks[i];
    st = esp_dataset_build(t->data, t->n_data, &t->data_cfg, d->tok, &d->task[i]);
    if (st != ESP_OK) {
      esp_fail_context(st, "task '%s'", t->name);
      goto out;
    }
    const esp_dataset_stats *s = esp_dataset_statistics(d->task[i]);
    esp_log(ESP_LOG_INFO,
            "task %s: %lld rows, %lld kept, %lld dropped (too long), %lld truncated, %lld split, %lld tokens, %lld "
            "trained",
            t->name, (long long)s->rows, (long long)s->kept, (long long)s->dropped_overlong, (long long)s->truncated,
            (long long)s->split, (long long)s->tokens, (long long)s->trained_tokens);
  }
  for (int i = 0; with_eval && i < r->eval.n_sets; i++) {
    st = esp_dataset_build(&r->eval.sets[i].source, 1, &r->data, d->tok, &d->eval[i]);
    if (st != ESP_OK) {
      esp_fail_context(st, "evaluation set '%s'", r->eval.sets[i].name);
      goto out;
    }
  }
  esp_tokenizer_trim(d->tok);
out:
  if (st != ESP_OK) esp_train_data_deinit(d);
  return st;
}

void esp_train_data_deinit(esp_train_data *d) {
  for (int i = 0; d->task && i < d->n_tasks; i++) esp_dataset_destroy(d->task[i]);
  for (int i = 0; d->eval && i < d->n_sets; i++) esp_dataset_destroy(d->eval[i]);
  esp_mem_free(d->task);
  esp_mem_free(d->eval);
  esp_tokenizer_destroy(d->tok);
  *d = (esp_train_data){0};
}
