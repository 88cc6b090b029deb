/* score_base.c: two predictions of the same tokens, on one model in two forward passes per batch. How far the adapted
 * predictions are from the base's (adapters off, no reference answers), after the general-ability measurements by
 * divergence from the base that continual fine-tuning work uses where old data is not there; and the perplexity of two
 * experts that answer together. */
#include <math.h>

#include "core/threads.h"
#include "eval/score_priv.h"

/* Logits of so many values at once, for each of the two: 16 MiB. */
enum { MAX_LOGITS = 4 << 20 };

typedef struct rows {          /* positions of one batch whose next token is trained, as many as have room */
  const float *adapted, *base; /* [n, vocab]; of experts: the two */
  const int32_t *target;       /* [n]; NULL: distances from the base are wanted */
  int64_t vocab;
  double *xent, *entropy; /* [n] */
} rows;

static void one_row(void *ctx, int64_t i, int thread) {
  const rows *r = ctx;
  const float *q = r->adapted + i * r->vocab, *p = r->base + i * r->vocab;
  if (r->target) {
    r->xent[i] = esp_joined_loss(q, p, r->vocab, r->target[i]);
    return;
  }
  double lp = esp_log_sum(p, r->vocab), lq = esp_log_sum(q, r->vocab), xent = 0, entropy = 0;
  for (int64_t v = 0; v < r->vocab; v++) {
    double share = exp(p[v] - lp);
    xent += share * (lq - q[v]);
    entropy += share * (lp - p[v]);
  }
  r->xent[i] = xent;
  r->entropy[i] = entropy;
}

typedef struct scratch {
  float *logits[2];
  double *sums;
  int32_t *index, *off, *target;
  int64_t cap;
} scratch;

static esp_status score_batch(esp_model *m, esp_stack *stack, const esp_batcher *b, const scratch *s,
                              const esp_score_cfg *cfg, esp_score_sums *out) {
  bool kl = cfg->metric == ESP_METRIC_BASE_KL, joined = cfg->metric == ESP_METRIC_PERPLEXITY;
  const esp_experts *x = &cfg->experts;
  bool counting = esp_backend_counts(esp_model_backend(m));
  esp_batch batch = {.tokens = b->tokens,
                     .ids = b->ids,
                     .targets = b->targets,
                     .positions = b->positions,
                     .weights = b->weights,
                     .cu_seqlens = b->cu,
                     .n_seqs = b->seqs};
  ESP_TRY(esp_strategies_choose(cfg->strategies, cfg->sequence, cfg->owner, b->prompt, &batch));
  esp_batch base = batch;
  if (!joined) {
    base.adapters = s->off;
    base.shares = NULL;
    base.n_shares = 0;
  }
  rows r = {s->logits[0], s->logits[1],    joined ? s->target : NULL, esp_model_describe(m)->vocab,
            s->sums,      s->sums + s->cap};
  for (int64_t t = 0; t < b->tokens;) {
    int n = 0;
    for (; t < b->tokens && n < s->cap; t++)
      if (b->weights[t] != 0) s->target[n] = b->targets[t], s->index[n++] = (int32_t)t;
    if (n == 0) break;
    ESP_TRY(esp_model_logits(m, stack, &batch, s->index, n, s->logits[0]));
    if (joined) ESP_TRY(x->use(x->ctx, 1));
    ESP_TRY(esp_model_logits(m, stack, &base, s->index, n, s->logits[1]));
    if (joined) ESP_TRY(x->use(x->ctx, 0));
    if (counting) continue;
    esp_parallel(n, one_row, &r);
    for (int i = 0; i < n; i++) { /* in the order of the rows, whoever computed them */
      double w = b->weights[s->index[i]];
      out->num += w * (kl ? r.xent[i] - r.entropy[i] : r.xent[i]);
      out->den += w;
    }
  }
  return ESP_OK;
}

esp_status esp_score_base(esp_model *m, const esp_dataset *d, esp_stack *stack, const esp_score_cfg *cfg,
                          esp_score_sums *out) {
  esp_status st = ESP_OK;
  esp_batcher b = {0};
  int64_t n = esp_score_samples_of(d, cfg), vocab = esp_model_describe(m)->vocab;
  scratch s = {.cap = MAX_LOGITS / vocab > 16 ? MAX_LOGITS / vocab : 16};
  /* a pass is made for every `cap` rows of a batch: no more tokens than that, unless one sample has them */
  int64_t most = cfg->batch_tokens < s.cap ? cfg->batch_tokens : s.cap;
  s.logits[0] = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(s.cap * vocab) * 4);
  s.logits[1] = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(s.cap * vocab) * 4);
  s.sums = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)s.cap * 2 * sizeof *s.sums);
  s.index = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)s.cap * sizeof *s.index);
  s.off = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(most + 1) * sizeof *s.off);
  s.target = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)s.cap * sizeof *s.target);
  if (!s.logits[0] || !s.logits[1] || !s.sums || !s.index || !s.off || !s.target) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  for (int64_t i = 0; i <= most; i++) s.off[i] = -1;
  for (int64_t i = cfg->rank; i < n + cfg->size; i += cfg->size) {
    const int32_t *ids = NULL;
    const float *weights = NULL;
    int64_t len = 0;
    if (i < n) esp_dataset_sample(d, i, &ids, &weights, &len);
    if (b.tokens > 0 && (i >= n || b.tokens + len > most)) {
      ESP_GOTO(score_batch(m, stack, &b, &s, cfg, out));
      esp_batcher_clear(&b);
    }
    if (i >= n) break;
    ESP_GOTO(esp_batcher_add(&b, ids, weights, len, NULL, 0));
    out->samples++;
  }
out:
  esp_mem_free(s.logits[0]);
  esp_mem_free(s.logits[1]);
  esp_mem_free(s.sums);
  esp_mem_free(s.index);
  esp_mem_free(s.off);
  esp_mem_free(s.target);
  esp_batcher_deinit(&b);
  return st;
}
