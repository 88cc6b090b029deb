/* hooks.c: evaluation, generation and merging, handed to the loop, which may not include their rooms. */
#include <math.h>
#include <string.h>

#include "api/api.h"
#include "eval/generate.h"
#include "eval/score.h"
#include "merge/merge.h"

static esp_status use(void *ctx, int i) {
  const esp_score_request *q = ctx;
  esp_adapter *one = q->experts ? q->experts[i] : NULL;
  return one ? esp_adapters_activate(q->model, &one, 1) : esp_strategies_expert(q->strategies, q->sequence, i);
}

static esp_score_cfg config(const esp_score_request *q) {
  return (esp_score_cfg){.metric = q->set->metric,
                         .limit = q->set->limit,
                         .max_new_tokens = q->set->max_new_tokens,
                         .batch_tokens = q->batch_tokens,
                         .rank = q->comm->rank,
                         .size = q->comm->size,
                         .strategies = q->strategies,
                         .sequence = q->sequence,
                         .owner = q->owner,
                         .experts = {q->experts ? 2 : esp_strategies_experts(q->strategies), use, (void *)q}};
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

enum { GENERATE_PROMPTS = 32, GENERATE_TOKENS = 4096 }; /* of one batch; a single prompt may have more */

static esp_status generate_batch(const esp_sequence *q, const esp_ids *prompts, int n, const esp_gen_cfg *cfg,
                                 esp_ids *out) {
  for (int i = 0; i < n; i++) out[i].n = 0;
  ESP_TRY(esp_generate(q->model, q->stack, prompts, n, cfg, out));
  for (int i = 0; esp_backend_counts(q->be) && i < n; i++) { /* a plan holds the longest answers */
    size_t bytes = (size_t)cfg->max_new_tokens * sizeof *out[i].data;
    int32_t *grown = esp_mem_realloc(ESP_MEM_DATA, out[i].data, bytes);
    if (!grown) return ESP_ERR_MEMORY;
    memset(grown, 0, bytes);
    out[i] = (esp_ids){grown, cfg->max_new_tokens, cfg->max_new_tokens};
  }
  return ESP_OK;
}

static esp_status generate(const esp_sequence *q, const esp_ids *prompts, int n, int64_t max_new, double temperature,
                           uint64_t seed, esp_ids *out) {
  const esp_model_desc *d = esp_model_describe(q->model);
  int32_t stop[9];
  int n_stop = 0;
  for (int i = 0; i < d->n_eos; i++) stop[n_stop++] = d->eos[i];
  if (esp_tokenizer_eos(q->tok) >= 0) stop[n_stop++] = esp_tokenizer_eos(q->tok);
  bool counting = esp_backend_counts(q->be); /* nothing is computed: an answer of zeros ends nowhere */
  esp_gen_cfg cfg = {.max_new_tokens = max_new,
                     .temperature = counting ? 0 : temperature,
                     .seed = seed,
                     .stop = stop,
                     .n_stop = counting ? 0 : n_stop,
                     .keep_stop = true};
  for (int first = 0, k; first < n; first += k) {
    int64_t tokens = 0;
    for (k = 0; first + k < n && k < GENERATE_PROMPTS; k++) {
      tokens += prompts[first + k].n + max_new;
      if (k > 0 && tokens > GENERATE_TOKENS) break;
    }
    cfg.first_row = first;
    esp_status st = generate_batch(q, prompts + first, k, &cfg, out + first);
    if (st != ESP_OK) return esp_fail_context(st, "task '%s', prompts from %d on", q->task_name[q->task], first + 1);
  }
  return ESP_OK;
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
                                       .generate = generate,
                                       .merge = merge,
                                       .merge_before = esp_api_merge_before};
