/* step.c: one optimizer step: micro-batches, the global normalisation of the loss, clipping, the update.
 *
 * The order of rows is a function of (seed, epoch) alone; micro-batch m of rank k in step s takes rows
 *   ((s * accumulate + m) * ranks + k) * micro_batch ...
 * so that ranks x accumulation can be traded against each other without changing what a step sees. Every rank has the
 * whole packing plan, hence the weight of all trained tokens of the step is known before the first forward.
 */
#include <math.h>

#include "train/train.h"

static esp_status fetch(const esp_backend *be, const esp_step_in *in, int64_t first, esp_rows *rows, int64_t *real) {
  int64_t left = esp_packs_count(in->packs) - first, n = left < in->micro_batch ? left : in->micro_batch;
  ESP_TRY(esp_packs_fetch(in->packs, first, n, 0, rows));
  *real = rows->tokens;
  int64_t padded = esp_sequence_pad(be, rows->tokens, in->most);
  if (padded != rows->tokens) ESP_TRY(esp_packs_fetch(in->packs, first, n, padded, rows));
  return ESP_OK;
}

typedef struct sums { /* added over ranks as one message */
  double loss, correct, trained, tokens, stop, failed;
} sums;

static esp_status micro_batches(esp_engine *e, const esp_step_in *in, const esp_strategy_step *t, esp_rows *rows,
                                sums *s) {
  float scale = (float)t->scale;
  ESP_TRY(esp_model_sums_reset(e->model));
  for (int64_t m = 0; m < in->accumulate; m++) {
    int64_t slot = m * e->comm->size + e->comm->rank;
    int64_t first = (in->epoch_step * in->accumulate * e->comm->size + slot) * in->micro_batch, real = 0;
    if (first >= esp_packs_count(in->packs)) break; /* the tail of an epoch: nothing is left for this rank */
    ESP_TRY(fetch(e->be, in, first, rows, &real));
    esp_batch b = esp_sequence_batch(rows);
    ESP_TRY(esp_strategies_teach(&e->strategies, &e->sequence, t, &b));
    ESP_TRY(
        esp_model_step(e->model, &e->stack, &b, in->ckpt, true, scale, in->seed, (in->step << 20) + slot, NULL, NULL));
    s->tokens += (double)real;
    for (int64_t t = 0; t < rows->tokens; t++) s->trained += rows->weights[t] != 0.0f;
  }
  return ESP_OK;
}

static esp_status passes(esp_engine *e, const esp_strategy_step *t, sums *s) {
  ESP_TRY(esp_strategies_pass(&e->strategies, &e->sequence, t));
  esp_loss_out loss;
  ESP_TRY(esp_model_sums(e->model, &loss)); /* the one wait of the step's computation */
  s->loss = loss.loss_sum;
  s->correct = (double)loss.correct;
  return ESP_OK;
}

static double step_weight(const esp_step_in *in, int ranks) {
  int64_t span = in->accumulate * ranks * in->micro_batch, first = in->epoch_step * span;
  int64_t last = first + span < esp_packs_count(in->packs) ? first + span : esp_packs_count(in->packs);
  double w = 0;
  for (int64_t i = first; i < last; i++) w += esp_packs_row_weight(in->packs, i);
  return w;
}

esp_status esp_train_step(esp_engine *e, const esp_step_in *in, esp_rows *rows, esp_step_out *out) {
  *out = (esp_step_out){0};
  esp_params *ps = e->adapter->params;
  out->weight = step_weight(in, e->comm->size);
  if (!(out->weight > 0)) return esp_fail(ESP_ERR_DATA, "step %lld has no trained token", (long long)in->step + 1);

  esp_params_zero_grad(ps);
  sums s = {0};
  esp_strategy_step t = {in->step, in->task_step, in->task_steps, in->lr, out->weight, 0};
  double weight = out->weight; /* of the step's own rows and those that strategies add */
  esp_status st = in->failed;
  if (st == ESP_OK) st = esp_strategies_draw(&e->strategies, &e->sequence, &t, &weight);
  t.scale = 1.0 / weight;
  if (st == ESP_OK) st = micro_batches(e, in, &t, rows, &s);
  /* A pass that talks to other ranks is for all of them or for none. */
  if (esp_strategies_meet(&e->strategies)) st = esp_comm_agree(e->comm, st);
  if (st == ESP_OK) st = passes(e, &t, &s);
  if (st == ESP_OK) st = esp_backend_sync(e->be);
  s.failed = st != ESP_OK;
  s.stop = esp_stop_requested();
  const esp_adapter_kind *kind = e->adapter->kind;
  if (e->comm->size > 1) {
    ESP_TRY(e->comm->ops->all_reduce_f64(e->comm, (double *)&s, sizeof s / sizeof(double)));
    if (s.failed > 0) return esp_comm_agree(e->comm, st);
    esp_comm *c = e->device_comm ? e->device_comm : e->comm;
    int64_t from, to;
    esp_params_span(ps, &from, &to);
    ESP_TRY(esp_comm_reduce(c, e->be, ps->grad + from, to - from));
    esp_tensor own = kind->step_sums ? kind->step_sums(e->adapter) : (esp_tensor){0};
    if (own.data) ESP_TRY(esp_comm_reduce(c, e->be, own.data, own.shape[0]));
  }
  if (st != ESP_OK) return st;

  out->loss = s.loss / weight;
  out->accuracy = s.trained > 0 ? s.correct / s.trained : 0;
  out->tokens = (int64_t)s.tokens;
  out->stop = s.stop > 0;
  bool counting = esp_backend_counts(e->be);
  if (!counting && !isfinite(out->loss))
    return esp_fail(ESP_ERR_DIVERGED, "step %lld: the loss is %s", (long long)in->step + 1,
                    isnan(out->loss) ? "not a number" : "infinite");
  if (kind->before_step) out->penalty = kind->before_step(e->adapter, in->task_step, in->task_steps);
  out->penalty += esp_strategies_penalty(&e->strategies, &e->sequence, &t);
  ESP_TRY(esp_strategies_project(&e->strategies, &e->sequence, &t));
  out->grad_norm = esp_optim_grad_norm(e->optim);
  ESP_TRY(esp_backend_sync(e->be));
  if (!counting && !isfinite(out->grad_norm))
    return esp_fail(ESP_ERR_DIVERGED, "step %lld: the gradient is not finite (loss %.6g)", (long long)in->step + 1,
                    out->loss);
  double most = e->optim->cfg.max_grad_norm;
  float clip = most > 0 && out->grad_norm > most ? (float)(most / out->grad_norm) : 1.0f;
  e->adapter->grad_scale = clip;
  e->adapter->lr = in->lr;
  esp_optim_step(e->optim, in->lr, clip);
  ESP_TRY(esp_strategies_after_step(&e->strategies, &e->sequence, &t));
  return esp_backend_sync(e->be);
}
