/* score_batch.c: whole sequences as one batch, scored by log-likelihood. */
#include "eval/score_priv.h"

static esp_status reserve(esp_batcher *b, int64_t tokens, int seqs) {
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
    p = esp_mem_realloc(ESP_MEM_DATA, b->prompt, (size_t)cap * 4);
    if (!p) return ESP_ERR_MEMORY;
    b->prompt = p;
    b->cap_seqs = cap;
  }
  return ESP_OK;
}

esp_status esp_batcher_add(esp_batcher *b, const int32_t *ids0, const float *weights0, int64_t n0, const int32_t *ids1,
                           int64_t n1) {
  int64_t n = n0 + n1, at = b->tokens;
  ESP_TRY(reserve(b, at + n, b->seqs + 1));
  for (int64_t i = 0; i < n; i++) {
    b->ids[at + i] = i < n0 ? ids0[i] : ids1[i - n0];
    b->positions[at + i] = (int32_t)i;
  }
  for (int64_t i = 0; i < n; i++) {
    bool last = i + 1 == n;
    b->targets[at + i] = last ? 0 : b->ids[at + i + 1];
    b->weights[at + i] = last ? 0.0f : i + 1 >= n0 ? 1.0f : weights0 ? weights0[i + 1] : 0.0f;
  }
  int64_t prompt =
      n1 > 0 ? n0 : 0; /* of a row without a completion apart: what is not trained in front, or all of it */
  while (n1 == 0 && prompt < n0 && (!weights0 || weights0[prompt] == 0)) prompt++;
  b->prompt[b->seqs] = (int32_t)(prompt > 1 ? prompt : n);
  b->cu[0] = 0;
  b->tokens += n;
  b->cu[++b->seqs] = (int32_t)b->tokens;
  return ESP_OK;
}

esp_status esp_batcher_flush(esp_batcher *b, esp_model *m, esp_stack *stack, const esp_score_cfg *cfg,
                             esp_loss_out *loss) {
  if (b->tokens == 0) return ESP_OK;
  esp_batch batch = {.tokens = b->tokens,
                     .ids = b->ids,
                     .targets = b->targets,
                     .positions = b->positions,
                     .weights = b->weights,
                     .cu_seqlens = b->cu,
                     .n_seqs = b->seqs};
  ESP_TRY(esp_strategies_choose(cfg->strategies, cfg->sequence, cfg->owner, b->prompt, &batch));
  return esp_model_step(m, stack, &batch, ESP_CKPT_OFF, false, 1.0f, 0, 0, loss, b->logprob);
}

void esp_batcher_clear(esp_batcher *b) {
  b->tokens = 0;
  b->seqs = 0;
}

void esp_batcher_deinit(esp_batcher *b) {
  esp_mem_free(b->ids);
  esp_mem_free(b->targets);
  esp_mem_free(b->positions);
  esp_mem_free(b->cu);
  esp_mem_free(b->prompt);
  esp_mem_free(b->weights);
  esp_mem_free(b->logprob);
}
