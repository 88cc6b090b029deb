#include "eval/score.h"

#include <ctype.h>
#include <math.h>
#include <string.h>

#include "eval/generate.h"

static const char *const names[] = {"perplexity", "choice", "exact_match", "rouge_l"};

const char *esp_metric_name(esp_metric metric) {
  return names[metric];
}

bool esp_metric_smaller_better(esp_metric metric) {
  return metric == ESP_METRIC_PERPLEXITY;
}

double esp_score_value(esp_metric metric, const esp_score_sums *s) {
  if (s->den <= 0) return NAN;
  double mean = s->num / s->den;
  return metric == ESP_METRIC_PERPLEXITY ? exp(mean) : mean;
}

/* ---- a batch of whole sequences, scored by log-likelihood ---- */

typedef struct batcher {
  int64_t cap_tokens, tokens, limit;
  int cap_seqs, seqs;
  int32_t *ids, *targets, *positions, *cu;
  float *weights, *logprob;
} batcher;

static esp_status batcher_reserve(batcher *b, int64_t tokens, int seqs) {
  if (tokens > b->cap_tokens) {
    int64_t cap = tokens + tokens / 2;
    void **arrays[] = {(void **)&b->ids, (void **)&b->targets, (void **)&b->positions, (void **)&b->weights,
                       (void **)&b->logprob};
    for (int i = 0; i < 5; i++) {
      void *p = esp_mem_realloc(ESP_MEM_DATA, *arrays[i], (size_t)cap * 4);
      if (!p) return ESP_ERR_MEMORY;
      *arrays[i] = p;
    }
    b->cap_tokens = cap;
  }
  if (seqs + 1 > b->cap_seqs) {
    int cap = 2 * seqs + 16;
    int32_t *p = esp_mem_realloc(ESP_MEM_DATA, b->cu, (size_t)cap * 4);
    if (!p) return ESP_ERR_MEMORY;
    b->cu = p;
    b->cap_seqs = cap;
  }
  return ESP_OK;
}

/* Adds ids0[0..n0) followed by ids1[0..n1); weights0 (of predicting ids0[i]) may be NULL: untrained; ids1 has weight 1.
 */
static esp_status batcher_add(batcher *b, const int32_t *ids0, const float *weights0, int64_t n0, const int32_t *ids1,
                              int64_t n1) {
  int64_t n = n0 + n1, at = b->tokens;
  ESP_TRY(batcher_reserve(b, at + n, b->seqs + 1));
  for (int64_t i = 0; i < n; i++) {
    b->ids[at + i] = i < n0 ? ids0[i] : ids1[i - n0];
    b->positions[at + i] = (int32_t)i;
  }
  for (int64_t i = 0; i < n; i++) {
    bool last = i + 1 == n;
    b->targets[at + i] = last ? 0 : b->ids[at + i + 1];
    b->weights[at + i] = last ? 0.0f : i + 1 >= n0 ? 1.0f : weights0 ? weights0[i + 1] : 0.0f;
  }
  b->cu[0] = 0;
  b->tokens += n;
  b->cu[++b->seqs] = (int32_t)b->tokens;
  return ESP_OK;
}

static esp_status batcher_flush(batcher *b, esp_model *m, esp_stack *stack, esp_loss_out *loss) {
  if (b->tokens == 0) return ESP_OK;
  esp_batch batch = {.tokens = b->tokens,
                     .ids = b->ids,
                     .targets = b->targets,
                     .positions = b->positions,
                     .weights = b->weights,
                     .cu_seqlens = b->cu,
                     .n_seqs = b->seqs};
  return esp_model_step(m, stack, &batch, ESP_CKPT_OFF, false, 1.0f, 0, 0, loss, b->logprob);
}

static void batcher_clear(batcher *b) {
  b->tokens = 0;
  b->seqs = 0;
}

static void batcher_deinit(batcher *b) {
  esp_mem_free(b->ids);
  esp_mem_free(b->targets);
  esp_mem_free(b->positions);
  esp_mem_free(b->cu);
  esp_mem_free(b->weights);
  esp_mem_free(b->logprob);
}

static int64_t samples_of(const esp_dataset *d, const esp_score_cfg *cfg) {
  int64_t n = esp_dataset_count(d);
  return cfg->limit > 0 && cfg->limit < n ? cfg->limit : n;
}

static esp_status perplexity(esp_model *m, const esp_dataset *d, esp_stack *stack, const esp_score_cfg *cfg,
                             esp_score_sums *out) {
  esp_status st = ESP_OK;
  batcher b = {0};
  int64_t n = samples_of(d, cfg);
  for (int64_t i = cfg->rank; i < n + cfg->size; i += cfg->size) {
    const int32_t *ids = NULL;
    const float *weights = NULL;
    int64_t len = 0;
    if (i < n) esp_dataset_sample(d, i, &ids, &weights, &len);
    if (b.tokens > 0 && (i >= n || b.tokens + len > cfg->batch_tokens)) {
      esp_loss_out loss;
      ESP_GOTO(batcher_flush(&b, m, stack, &loss));
      out->num += loss.loss_sum;
      out->den += loss.weight_sum;
      batcher_clear(&b);
    }
    if (i >= n) break;
    ESP_GOTO(batcher_add(&b, ids, weights, len, NULL, 0));
    out->samples++;
  }
out:
  batcher_deinit(&b);
  return st;
}

/* Sequence k of the batch holds sample pending[k / labels] with label k % labels. */
static void count_choices(const batcher *b, const esp_dataset *d, const int64_t *pending, int labels,
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
  batcher b = {0};
  const char *const *label_names;
  const esp_ids *label_ids;
  int labels = esp_dataset_labels(d, &label_names, &label_ids);
  if (labels < 2)
    return esp_fail(ESP_ERR_DATA, "metric choice needs a classification set with two or more labels, this has %d",
                    labels);
  int64_t n = samples_of(d, cfg), pending_n = 0, label_tokens = 0;
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
      ESP_GOTO(batcher_flush(&b, m, stack, &loss));
      count_choices(&b, d, pending, labels, out);
      batcher_clear(&b);
      pending_n = 0;
    }
    if (i >= n) break;
    for (int k = 0; k < labels; k++) ESP_GOTO(batcher_add(&b, ids, NULL, prompt, label_ids[k].data, label_ids[k].n));
    pending[pending_n++] = i;
  }
out:
  esp_mem_free(pending);
  batcher_deinit(&b);
  return st;
}

/* ---- generated text ---- */

static void trimmed(const char **s, size_t *n) {
  while (*n && isspace((unsigned char)**s)) (*s)++, (*n)--;
  while (*n && isspace((unsigned char)(*s)[*n - 1])) (*n)--;
}

bool esp_exact_match(const char *answer, const char *reference) {
  size_t a = strlen(answer), r = strlen(reference);
  trimmed(&answer, &a);
  trimmed(&reference, &r);
  return a == r && memcmp(answer, reference, a) == 0;
}

typedef struct span {
  const char *s;
  size_t n;
} span;

static int words(const char *s, span *out, int max) {
  int n = 0;
  while (*s && n < max) {
    while (*s && !isalnum((unsigned char)*s) && (unsigned char)*s < 0x80) s++;
    const char *begin = s;
    while (*s && (isalnum((unsigned char)*s) || (unsigned char)*s >= 0x80)) s++;
    if (s > begin) out[n++] = (span){begin, (size_t)(s - begin)};
  }
  return n;
}

static bool same_word(span a, span b) {
  if (a.n != b.n) return false;
  for (size_t i = 0; i < a.n; i++)
    if (tolower((unsigned char)a.s[i]) != tolower((unsigned char)b.s[i])) return false;
  return true;
}

double esp_rouge_l(const char *answer, const char *reference) {
  enum { MAX = 1024 };
  static _Thread_local span a[MAX], r[MAX];
  int na = words(answer, a, MAX), nr = words(reference, r, MAX);
  if (na == 0 || nr == 0) return na == nr ? 1.0 : 0.0;
  int row[MAX + 1] = {0};
  for (int i = 0; i < na; i++) {
    int diagonal = 0;
    for (int j = 1; j <= nr; j++) {
      int above = row[j];
      row[j] = same_word(a[i], r[j - 1]) ? diagonal + 1 : row[j] > row[j - 1] ? row[j] : row[j - 1];
      diagonal = above;
    }
  }
  double lcs = row[nr];
  return 2 * lcs / (na + nr); /* F1 of lcs/na and lcs/nr */
}

static esp_status generated_batch(esp_model *m, const esp_tokenizer *tok, const esp_dataset *d, esp_stack *stack,
                                  const esp_score_cfg *cfg, const int64_t *index, int n, esp_score_sums *out) {
  enum { MAX_BATCH = 64 };
  esp_status st = ESP_OK;
  esp_ids prompts[MAX_BATCH], answers[MAX_BATCH];
  memset(answers, 0, sizeof answers);
  for (int k = 0; k < n; k++) {
    const int32_t *ids;
    const float *weights;
    int64_t len;
    esp_dataset_sample(d, index[k], &ids, &weights, &len);
    prompts[k] = (esp_ids){(int32_t *)ids, esp_dataset_prompt_len(d, index[k]), 0};
  }
  const esp_model_desc *desc = esp_model_describe(m);
  int32_t stop[9];
  int n_stop = 0;
  for (int i = 0; i < desc->n_eos; i++) stop[n_stop++] = desc->eos[i];
  if (esp_tokenizer_eos(tok) >= 0) stop[n_stop++] = esp_tokenizer_eos(tok);
  esp_gen_cfg gen = {.max_new_tokens = cfg->max_new_tokens, .stop = stop, .n_stop = n_stop};
  ESP_GOTO(esp_generate(m, stack, prompts, n, &gen, answers));
  for (int k = 0; k < n; k++) {
    char *text = NULL;
    size_t len;
    ESP_GOTO(esp_tokenizer_decode(tok, answers[k].data, answers[k].n, true, &text, &len));
    const char *reference = esp_dataset_answer(d, index[k]);
    out->num += cfg->metric == ESP_METRIC_EXACT_MATCH ? esp_exact_match(text, reference) : esp_rouge_l(text, reference);
    out->den++;
    out->samples++;
    esp_mem_free(text);
  }
out:
  for (int k = 0; k < n; k++) esp_ids_deinit(&answers[k]);
  return st;
}

static esp_status generated(esp_model *m, const esp_tokenizer *tok, const esp_dataset *d, esp_stack *stack,
                            const esp_score_cfg *cfg, esp_score_sums *out) {
  int64_t n = samples_of(d, cfg), index[64], tokens = 0;
  int pending = 0;
  for (int64_t i = cfg->rank; i < n + cfg->size; i += cfg->size) {
    int64_t need = i < n ? esp_dataset_prompt_len(d, i) + cfg->max_new_tokens : 0;
    if (pending > 0 && (i >= n || pending == 64 || tokens + need > cfg->batch_tokens)) {
      ESP_TRY(generated_batch(m, tok, d, stack, cfg, index, pending, out));
      pending = 0;
      tokens = 0;
    }
    if (i >= n) break;
    index[pending++] = i;
    tokens += need;
  }
  return ESP_OK;
}

esp_status esp_score_run(esp_model *m, const esp_tokenizer *tok, const esp_dataset *d, esp_stack *stack,
                         const esp_score_cfg *cfg, esp_score_sums *out) {
  *out = (esp_score_sums){0};
  switch (cfg->metric) {
  case ESP_METRIC_PERPLEXITY:
    return perplexity(m, d, stack, cfg, out);
  case ESP_METRIC_CHOICE:
    return choice(m, d, stack, cfg, out);
  default:
    return generated(m, tok, d, stack, cfg, out);
  }
}
