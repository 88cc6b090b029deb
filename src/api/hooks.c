/* hooks.c: evaluation and merging, handed to the loop, which may not include their rooms. */
#include <math.h>

#include "api/api.h"
#include "eval/score.h"
#include "merge/merge.h"

static esp_score_cfg config(const esp_score_request *q) {
  return (esp_score_cfg){.metric = q->set->metric,
                         .limit = q->set->limit,
                         .max_new_tokens = q->set->max_new_tokens,
                         .batch_tokens = q->batch_tokens,
                         .rank = q->comm->rank,
                         .size = q->comm->size};
}

static esp_status score(void *ctx, const esp_score_request *q, esp_score_result *out) {
  esp_score_cfg cfg = config(q);
  esp_score_sums sums = {0};
  esp_status st = esp_score_run(q->model, q->tok, q->data, q->stack, &cfg, &sums);
  if (st != ESP_OK) esp_fail_context(st, "evaluation set '%s'", q->set->name);
  ESP_TRY(esp_comm_agree(q->comm, st));
  double all[5] = {sums.num, sums.den, sums.samples, sums.labelled, sums.malformed};
  ESP_TRY(q->comm->ops->all_reduce_f64(q->comm, all, 5));
  sums = (esp_score_sums){all[0], all[1], all[2], all[3], all[4]};
  out->value = esp_score_value(q->set->metric, &sums);
  out->malformed = sums.labelled > 0 ? sums.malformed / sums.labelled : NAN;
  out->samples = (int64_t)sums.samples;
  return ESP_OK;
}

static esp_status samples(void *ctx, const esp_score_request *q, int64_t n, esp_strbuf *out) {
  esp_score_cfg cfg = config(q);
  cfg.rank = 0;
  cfg.size = 1;
  if (cfg.limit == 0 || cfg.limit > n) cfg.limit = n;
  esp_status st = esp_score_samples(q->model, q->tok, q->data, q->stack, &cfg, q->set->name, out);
  if (st != ESP_OK) esp_fail_context(st, "evaluation set '%s'", q->set->name);
  return st;
}

static esp_status merge(void *ctx, const char *base, const char *adapter, const char *out) {
  const char *adapters[] = {adapter};
  esp_merge_spec spec = {.base = base, .adapters = adapters, .n_adapters = 1, .out = out};
  esp_merge_stats stats;
  return esp_merge_write(&spec, &stats);
}

const esp_train_hooks esp_api_hooks = {.score = score,
                                       .samples = samples,
                                       .metric_name = esp_metric_name,
                                       .smaller_better = esp_metric_smaller_better,
                                       .merge = merge};
