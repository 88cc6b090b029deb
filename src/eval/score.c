#include "eval/score.h"

#include <math.h>

#include "eval/score_priv.h"

static const char *const names[] = {"perplexity", "choice", "exact_match", "rouge_l", "base_xent", "base_kl"};

const char *esp_metric_name(esp_metric metric) {
  return names[metric];
}

bool esp_metric_smaller_better(esp_metric metric) {
  return esp_metric_lower(metric);
}

double esp_score_value(esp_metric metric, const esp_score_sums *s) {
  if (s->den <= 0) return NAN;
  double mean = s->num / s->den;
  return metric == ESP_METRIC_PERPLEXITY ? exp(mean) : mean;
}

int64_t esp_score_samples_of(const esp_dataset *d, const esp_score_cfg *cfg) {
  int64_t n = esp_dataset_count(d);
  return cfg->limit > 0 && cfg->limit < n ? cfg->limit : n;
}

static esp_status perplexity(esp_model *m, const esp_dataset *d, esp_stack *stack, const esp_score_cfg *cfg,
                             esp_score_sums *out) {
  esp_status st = ESP_OK;
  esp_batcher b = {0};
  int64_t n = esp_score_samples_of(d, cfg);
  for (int64_t i = cfg->rank; i < n + cfg->size; i += cfg->size) {
    const int32_t *ids = NULL;
    const float *weights = NULL;
    int64_t len = 0;
    if (i < n) esp_dataset_sample(d, i, &ids, &weights, &len);
    if (b.tokens > 0 && (i >= n || b.tokens + len > cfg->batch_tokens)) {
      esp_loss_out loss;
      ESP_GOTO(esp_batcher_flush(&b, m, stack, cfg, &loss));
      out->num += loss.loss_sum;
      out->den += loss.weight_sum;
      esp_batcher_clear(&b);
    }
    if (i >= n) break;
    ESP_GOTO(esp_batcher_add(&b, ids, weights, len, NULL, 0));
    out->samples++;
  }
out:
  esp_batcher_deinit(&b);
  return st;
}

/* Sequence k of the batch holds sample pending[k / labels] with label k % labels. */
static void count_choices(const esp_batcher *b, const esp_dataset *d, const int64_t *pending, int labels,
                          esp_score_sums *out) {
  for (int k = 0; k < b->seqs; k += labels) {
    int best = 0;
    double best_sum = -INFINITY;
    for (int label = 0; label < labels; label++) {
      double sum = 0;
      for (int32_t t = b->cu[k + label]; t < b->cu[k + label + 1]; t++)
        if (b->weights[t] != 0) sum += b->logprob[t];
      if (sum > best_sum) {
        best_sum = sum;
        best = label;
      }
    }
    out->num += best == esp_dataset_label(d, pending[k / labels]);
    out->den++;
    out->samples++;
  }
}

static esp_status choice(esp_model *m, const esp_dataset *d, esp_stack *stack, const esp_score_cfg *cfg,
                         esp_score_sums *out) {
  esp_status st = ESP_OK;
  esp_batcher b = {0};
  const char *const *label_names;
  const esp_ids *label_ids;
  int labels = esp_dataset_labels(d, &label_names, &label_ids);
  if (labels < 2)
    return esp_fail(ESP_ERR_DATA, "metric choice needs a classification set with two or more labels, this has %d",
                    labels);
  if (esp_score_answered(d, cfg)) return esp_score_answered_choice(d, cfg, out);
  int64_t n = esp_score_samples_of(d, cfg), pending_n = 0, label_tokens = 0;
  for (int k = 0; k < labels; k++) label_tokens += label_ids[k].n;
  int64_t *pending = esp_mem_alloc(ESP_MEM_DATA, (size_t)(cfg->batch_tokens + 1) * sizeof *pending);
  if (!pending) return ESP_ERR_MEMORY;
  for (int64_t i = cfg->rank; i < n + cfg->size; i += cfg->size) {
    const int32_t *ids = NULL;
    const float *weights = NULL;
    int64_t len = 0, prompt = 0;
    if (i < n) {
      esp_dataset_sample(d, i, &ids, &weights, &len);
      prompt = esp_dataset_prompt_len(d, i);
    }
    if (b.tokens > 0 && (i >= n || b.tokens + labels * prompt + label_tokens > cfg->batch_tokens)) {
      esp_loss_out loss;
      ESP_GOTO(esp_batcher_flush(&b, m, stack, cfg, &loss));
      count_choices(&b, d, pending, labels, out);
      esp_batcher_clear(&b);
      pending_n = 0;
    }
    if (i >= n) break;
    for (int k = 0; k < labels; k++)
      ESP_GOTO(esp_batcher_add(&b, ids, NULL, prompt, label_ids[k].data, label_ids[k].n));
    pending[pending_n++] = i;
  }
out:
  esp_mem_free(pending);
  esp_batcher_deinit(&b);
  return st;
}

esp_status esp_score_run(esp_model *m, const esp_tokenizer *tok, const esp_dataset *d, esp_stack *stack,
                         const esp_score_cfg *cfg, esp_score_sums *out) {
  *out = (esp_score_sums){0};
  switch (cfg->metric) {
  case ESP_METRIC_PERPLEXITY:
    return perplexity(m, d, stack, cfg, out);
  case ESP_METRIC_CHOICE:
    return choice(m, d, stack, cfg, out);
  case ESP_METRIC_BASE_XENT:
  case ESP_METRIC_BASE_KL:
    return esp_score_base(m, d, stack, cfg, out);
  default:
    return esp_score_generated(m, tok, d, stack, cfg, out);
  }
}
