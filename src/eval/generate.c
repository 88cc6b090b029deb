#include "eval/generate.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/rng.h"

static esp_status append(esp_ids *ids, int32_t id) {
  if (ids->n == ids->cap) {
    int64_t cap = ids->cap ? 2 * ids->cap : 32;
    int32_t *data = esp_mem_realloc(ESP_MEM_DATA, ids->data, (size_t)cap * sizeof *data);
    if (!data) return ESP_ERR_MEMORY;
    ids->data = data;
    ids->cap = cap;
  }
  ids->data[ids->n++] = id;
  return ESP_OK;
}

typedef struct candidate {
  float logit;
  int32_t id;
} candidate;

static int by_logit(const void *a, const void *b) {
  const candidate *x = a, *y = b;
  if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
  return x->id < y->id ? -1 : 1;
}

static int32_t argmax(const float *logits, int64_t vocab) {
  int64_t best = 0;
  for (int64_t i = 1; i < vocab; i++)
    if (logits[i] > logits[best]) best = i;
  return (int32_t)best;
}

/* Temperature, then top-k, then top-p (the nucleus keeps the token that crosses p), as in transformers. */
static int32_t sample(const float *logits, int64_t vocab, const esp_gen_cfg *cfg, candidate *work, uint64_t row,
                      uint64_t position) {
  for (int64_t i = 0; i < vocab; i++) work[i] = (candidate){(float)(logits[i] / cfg->temperature), (int32_t)i};
  qsort(work, (size_t)vocab, sizeof *work, by_logit);
  int64_t n = cfg->top_k > 0 && cfg->top_k < vocab ? cfg->top_k : vocab;
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += exp((double)work[i].logit - work[0].logit);
  if (cfg->top_p > 0 && cfg->top_p < 1) {
    double kept = 0;
    int64_t i = 0;
    for (; i < n && kept < cfg->top_p * sum; i++) kept += exp((double)work[i].logit - work[0].logit);
    n = i > 0 ? i : 1;
    sum = kept;
  }
  double u = esp_rng_uniform(cfg->seed, esp_rng_stream(ESP_RNG_SAMPLE, row, 0, 0), position) * sum, at = 0;
  for (int64_t i = 0; i < n; i++) {
    at += exp((double)work[i].logit - work[0].logit);
    if (u < at) return work[i].id;
  }
  return work[n - 1].id;
}

typedef struct state { /* of one call */
  int32_t *ids, *positions, *targets, *cu, *next;
  float *weights, *logits, *second; /* second: of the other expert */
  candidate *work;
  bool *done;
} state;

static esp_status state_init(state *s, int64_t tokens, int n, int64_t vocab, bool sampled, bool two) {
  memset(s, 0, sizeof *s);
  s->ids = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)tokens * 4);
  s->positions = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)tokens * 4);
  s->targets = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)tokens * 4);
  s->weights = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)tokens * 4);
  s->cu = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(n + 1) * 4);
  s->next = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)n * 4);
  s->done = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)n);
  s->logits = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)n * (size_t)vocab * 4);
  s->second = two ? esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)n * (size_t)vocab * 4) : NULL;
  s->work = sampled ? esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)vocab * sizeof *s->work) : NULL;
  if (!s->ids || !s->positions || !s->targets || !s->weights || !s->cu || !s->next || !s->done || !s->logits ||
      (sampled && !s->work) || (two && !s->second))
    return ESP_ERR_MEMORY;
  return ESP_OK;
}

static void state_deinit(state *s) {
  void *all[] = {s->ids, s->positions, s->targets, s->weights, s->cu, s->next, s->done, s->logits, s->second, s->work};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) esp_mem_free(all[i]);
}

static bool is_stop(const esp_gen_cfg *cfg, int32_t id) {
  for (int i = 0; i < cfg->n_stop; i++)
    if (cfg->stop[i] == id) return true;
  return false;
}

/* The next logits: of the prompts, or of what came last. With two experts each has its own cache, and both get the
 * token that they chose together. */
static esp_status next(esp_model *m, esp_stack *stack, esp_kv *const kv[2], const esp_batch *prompts,
                       const esp_gen_cfg *cfg, state *s, int n) {
  int64_t vocab = esp_model_describe(m)->vocab;
  for (int e = 0; e < 2 && kv[e]; e++) {
    float *logits = e ? s->second : s->logits;
    if (e) ESP_TRY(cfg->experts->use(cfg->experts->ctx, e));
    ESP_TRY(prompts ? esp_model_prefill(m, stack, kv[e], prompts, logits)
                    : esp_model_decode(m, stack, kv[e], s->next, logits));
  }
  if (!kv[1]) return ESP_OK;
  for (int i = 0; i < n && !esp_backend_counts(esp_model_backend(m)); i++)
    esp_join_logits(s->logits + i * vocab, s->second + i * vocab, vocab);
  return cfg->experts->use(cfg->experts->ctx, 0);
}

esp_status esp_generate(esp_model *m, esp_stack *stack, const esp_ids *prompts, int n, const esp_gen_cfg *cfg,
                        esp_ids *out) {
  esp_status st = ESP_OK;
  esp_kv *kv[2] = {NULL, NULL};
  state s = {0};
  const esp_model_desc *d = esp_model_describe(m);
  bool counting = esp_backend_counts(esp_model_backend(m)), two = cfg->experts && cfg->experts->n > 1;
  int64_t tokens = 0, longest = 0, front = esp_model_virtual_tokens(m);
  for (int i = 0; i < n; i++) {
    if (prompts[i].n == 0) return esp_fail(ESP_ERR_DATA, "prompt %d is empty", i + 1);
    if (prompts[i].n + front + cfg->max_new_tokens > d->max_positions)
      return esp_fail(ESP_ERR_DATA, "prompt %d: %lld tokens and %lld new ones exceed the model's %lld positions", i + 1,
                      (long long)(prompts[i].n + front), (long long)cfg->max_new_tokens, (long long)d->max_positions);
    tokens += prompts[i].n;
    longest = prompts[i].n > longest ? prompts[i].n : longest;
  }
  if (n == 0 || cfg->max_new_tokens <= 0) return ESP_OK;
  ESP_GOTO(state_init(&s, tokens, n, d->vocab, cfg->temperature > 0, two));
  for (int e = 0; e < 1 + two; e++) ESP_GOTO(esp_kv_create(m, n, longest + cfg->max_new_tokens, &kv[e]));
  int64_t at = 0;
  for (int i = 0; i < n; i++) {
    s.cu[i] = (int32_t)at;
    for (int64_t k = 0; k < prompts[i].n; k++, at++) {
      s.ids[at] = prompts[i].data[k];
      s.positions[at] = (int32_t)k;
    }
  }
  s.cu[n] = (int32_t)at;
  esp_batch batch = {.tokens = tokens,
                     .ids = s.ids,
                     .targets = s.targets,
                     .positions = s.positions,
                     .weights = s.weights,
                     .cu_seqlens = s.cu,
                     .n_seqs = n,
                     .adapters = cfg->adapters,
                     .shares = cfg->shares,
                     .n_shares = cfg->n_shares};
  ESP_GOTO(next(m, stack, kv, &batch, cfg, &s, n));
  int open = n;
  for (int64_t k = 0; k < cfg->max_new_tokens && open > 0; k++) {
    for (int i = 0; i < n; i++) {
      if (s.done[i]) continue;
      const float *logits = s.logits + (int64_t)i * d->vocab;
      int32_t id = cfg->temperature > 0
                       ? sample(logits, d->vocab, cfg, s.work, (uint64_t)(cfg->first_row + i), (uint64_t)k)
                       : argmax(logits, d->vocab);
      s.next[i] = id;
      bool stop = is_stop(cfg, id);
      if (!stop || cfg->keep_stop) ESP_GOTO(append(&out[i], id));
      if (stop) s.done[i] = true, open--;
    }
    if (counting && k == 1) break; /* the next ones need what this one did */
    if (open > 0 && k + 1 < cfg->max_new_tokens) ESP_GOTO(next(m, stack, kv, NULL, cfg, &s, n));
  }
out:
  esp_kv_destroy(kv[0]);
  esp_kv_destroy(kv[1]);
  state_deinit(&s);
  return st;
}
