/* score_answer.c: rows of a set of labels that a strategy answers itself, without a word from the head of the model. */
#include <string.h>

#include "eval/score_priv.h"

bool esp_score_answered(const esp_dataset *d, const esp_score_cfg *cfg) {
  const char *const *names;
  int labels = esp_dataset_labels(d, &names, NULL);
  return labels > 0 && esp_strategies_answers(cfg->strategies, names, labels);
}

esp_status esp_score_answer(const esp_dataset *d, const esp_score_cfg *cfg, const int64_t *index, int n,
                            const char **out) {
  esp_status st = ESP_OK;
  esp_batcher b = {0};
  const char *const *names;
  int labels = esp_dataset_labels(d, &names, NULL);
  for (int k = 0; k < n; k++) {
    const int32_t *ids;
    const float *weights;
    int64_t len;
    esp_dataset_sample(d, index[k], &ids, &weights, &len);
    ESP_GOTO(esp_batcher_add(&b, ids, NULL, esp_dataset_prompt_len(d, index[k]), NULL, 0));
  }
  esp_batch batch = {.tokens = b.tokens, .ids = b.ids, .cu_seqlens = b.cu, .n_seqs = b.seqs};
  st = esp_strategies_answer(cfg->strategies, cfg->sequence, names, labels, b.prompt, &batch, out);
out:
  esp_batcher_deinit(&b);
  return st;
}

/* As many rows at once as batch_tokens has room for. */
esp_status esp_score_answered_choice(const esp_dataset *d, const esp_score_cfg *cfg, esp_score_sums *out) {
  enum { MOST = 256 };
  const char *const *names, *answers[MOST];
  int64_t index[MOST], n = esp_score_samples_of(d, cfg), tokens = 0;
  int pending = 0;
  (void)esp_dataset_labels(d, &names, NULL);
  for (int64_t i = cfg->rank; i < n + cfg->size; i += cfg->size) {
    int64_t need = i < n ? esp_dataset_prompt_len(d, i) : 0;
    if (pending > 0 && (i >= n || pending == MOST || tokens + need > cfg->batch_tokens)) {
      ESP_TRY(esp_score_answer(d, cfg, index, pending, answers));
      for (int k = 0; k < pending; k++) out->num += !strcmp(answers[k], names[esp_dataset_label(d, index[k])]);
      out->den += pending;
      out->samples += pending;
      pending = 0;
      tokens = 0;
    }
    if (i >= n) break;
    index[pending++] = i;
    tokens += need;
  }
  return ESP_OK;
}
