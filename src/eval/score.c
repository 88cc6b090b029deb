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

int esp_score_rows(const esp_dataset *d, const esp_score_cfg *cfg, int64_t more, int most, int64_t *at,
                   int64_t *index) {
  int64_t samples = esp_score_samples_of(d, cfg), tokens = 0;
  int n = 0;
  for (; *at < samples && n < most; *at += cfg->size) {
    tokens += esp_dataset_prompt_len(d, *at) + more;
    if (n > 0 && tokens > cfg->batch_tokens) break;
    index[n++] = *at;
  }
  return n;
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

/* How much each sequence of the batch speaks for its label: sum of log p, or, of two experts, the larger of the
 * logarithms of its share among the `labels` sequences of its sample. */
static esp_status weigh(esp_batcher *b, esp_model *m, esp_stack *stack, const esp_score_cfg *cfg, int labels,
                        double *like) {
  const esp_experts *x = &cfg->experts;
  double *one = like + b->seqs;
  esp_loss_out loss;
  for (int e = 0; e < (x->n > 1 ? 2 : 1); e++) {
    if (e) ESP_TRY(x->use(x->ctx, e));
    ESP_TRY(esp_batcher_flush(b, m, stack, cfg, &loss));
    for (int k = 0; k < b->seqs; k++) {
      one[k] = 0;
      for (int32_t t = b->cu[k]; t < b->cu[k + 1]; t++)
        if (b->weights[t] != 0) one[k] += b->logprob[t];
    }
    for (int k = 0; x->n > 1 && k < b->seqs; k += labels) esp_log_softmax(one + k, labels);
    for (int k = 0; k < b->seqs; k++) like[k] = e ? fmax(like[k], one[k]) : one[k];
  }
  return x->n > 1 ? x->use(x->ctx, 0) : ESP_OK;
}

/* Sequence k of the batch holds sample pending[k / labels] with label k % labels. */
static esp_status count_choices(esp_batcher *b, esp_model *m, esp_stack *stack, const esp_score_cfg *cfg,
                                const esp_dataset *d, const int64_t *pending, int labels, esp_score_sums *out) {
  double *like = esp_mem_alloc(ESP_MEM_DATA, (size_t)(2 * b->seqs) * sizeof *like);
  esp_status st = like ? weigh(b, m, stack, cfg, labels, like) : ESP_ERR_MEMORY;
  for (int k = 0; st == ESP_OK && k < b->seqs; k += labels) {
    int best = 0;
    for (int label = 1; label < labels; label++)
      if (like[k + label] > like[k + best]) best = label;
    out->num += best == esp_dataset_label(d, pending[k / labels]);
    out->den++;
    out->samples++;
  }
  esp_mem_free(like);
  return st;
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
      ESP_GOTO(count_choices(&b, m, stack, cfg, d, pending, labels, out));
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
    return cfg->experts.n > 1 ? esp_score_base(m, d, stack, cfg, out) : perplexity(m, d, stack, cfg, out);
  case ESP_METRIC_CHOICE:
    return choice(m, d, stack, cfg, out);
  case ESP_METRIC_BASE_XENT:
  case ESP_METRIC_BASE_KL:
    return esp_score_base(m, d, stack, cfg, out);
  default:
    return esp_score_generated(m, tok, d, stack, cfg, out);
  }
}
