/* evaluate.c: scores at task ends and in the middle of tasks. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "io/file.h"
#include "train/loop.h"

esp_status esp_loop_score(esp_loop *l, int i, double *value) {
  const esp_eval_set *set = &l->r->eval.sets[i];
  esp_score_request q = {l->engine.model,         l->data.tok, l->data.eval[i], &l->engine.stack, set,
                         l->r->eval.batch_tokens, l->comm};
  int64_t samples = 0;
  ESP_TRY(l->hooks->score(l->hooks->ctx, &q, value, &samples));
  esp_event e = esp_loop_event(l, ESP_EVENT_EVAL);
  e.set = set->name;
  e.metric = l->hooks->metric_name(set->metric);
  e.score = *value;
  if (l->comm->rank == 0 && l->pending == ESP_OK) l->pending = esp_metrics_eval(&l->metrics, &e);
  esp_loop_emit(l, &e);
  return ESP_OK;
}

esp_status esp_loop_matrix_row(esp_loop *l, int row) {
  if (!l->matrix) return ESP_OK;
  esp_loop_phase(l, "eval");
  for (int i = 0; i < l->r->eval.n_sets; i++) ESP_TRY(esp_loop_score(l, i, esp_matrix_cell(l->matrix, row, i)));
  char path[ESP_PATH];
  esp_path_join(path, sizeof path, l->r->checkpoint.output_dir, "matrix.json");
  esp_status st = l->pending;
  if (st == ESP_OK && l->comm->rank == 0) st = esp_matrix_save(l->matrix, path);
  return esp_comm_agree(l->comm, st);
}

esp_status esp_loop_save_adapter(esp_loop *l, const char *folder, const char *name, char path[ESP_PATH]) {
  char dir[ESP_PATH];
  esp_path_join(dir, sizeof dir, l->r->checkpoint.output_dir, folder);
  esp_path_join(path, ESP_PATH, dir, name);
  esp_status st = ESP_OK;
  if (l->comm->rank == 0) {
    st = esp_mkdirs(dir);
    if (st == ESP_OK) st = esp_adapter_save(l->engine.adapter, path);
  }
  return esp_comm_agree(l->comm, st);
}

static esp_status keep_best(esp_loop *l, double value, bool larger_better) {
  esp_run_state *s = &l->state;
  if (isnan(value) || (s->has_best && (larger_better ? value <= s->best : value >= s->best))) return ESP_OK;
  char path[ESP_PATH];
  s->has_best = 1;
  s->best = value;
  ESP_TRY(esp_loop_save_adapter(l, "best", "adapter", path));
  esp_loop_note(l, "step %lld is the best so far: %s %.6g", (long long)s->at.step, l->r->checkpoint.keep_best_metric,
                value);
  return ESP_OK;
}

esp_status esp_loop_best_of_row(esp_loop *l, int row) {
  const char *best = l->r->checkpoint.keep_best_metric;
  if (!best) return ESP_OK;
  if (!strcmp(best, "loss")) return keep_best(l, l->state.last_loss, false);
  for (int i = 0; l->matrix && i < l->r->eval.n_sets; i++)
    if (!strcmp(best, l->r->eval.sets[i].name))
      return keep_best(l, *esp_matrix_cell(l->matrix, row, i), l->r->checkpoint.keep_best_max);
  return ESP_OK;
}

esp_status esp_loop_midway(esp_loop *l, const esp_recipe_task *t) {
  const char *best = l->r->checkpoint.keep_best_metric;
  if (best && !strcmp(best, "loss")) ESP_TRY(keep_best(l, l->state.last_loss, false));
  if (!l->matrix || t->n_eval == 0) return ESP_OK;
  esp_loop_phase(l, "eval");
  for (int k = 0; k < t->n_eval; k++) {
    double value = NAN;
    ESP_TRY(esp_loop_score(l, t->eval[k], &value));
    if (best && !strcmp(best, l->r->eval.sets[t->eval[k]].name))
      ESP_TRY(keep_best(l, value, l->r->checkpoint.keep_best_max));
  }
  esp_loop_phase(l, "train");
  return ESP_OK;
}
