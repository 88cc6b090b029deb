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
  int64_t index[MOST], at = cfg->rank;
  (void)esp_dataset_labels(d, &names, NULL);
  for (int n; (n = esp_score_rows(d, cfg, 0, MOST, &at, index)) > 0;) {
    ESP_TRY(esp_score_answer(d, cfg, index, n, answers));
    for (int k = 0; k < n; k++) out->num += !strcmp(answers[k], names[esp_dataset_label(d, index[k])]);
    out->den += n;
    out->samples += n;
  }
  return ESP_OK;
}
