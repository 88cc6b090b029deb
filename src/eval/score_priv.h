/* score_priv.h: what the files of scoring share. */
#ifndef ESP_EVAL_SCORE_PRIV_H
#define ESP_EVAL_SCORE_PRIV_H

#include "eval/score.h"

typedef struct esp_batcher {
  int64_t cap_tokens, tokens, limit;
  int cap_seqs, seqs;
  int32_t *ids, *targets, *positions, *cu;
  int32_t *prompt; /* [seqs] tokens of ids0 */
  float *weights, *logprob;
} esp_batcher;
/* Adds ids0[0..n0) followed by ids1[0..n1); weights0 (of predicting ids0[i]) may be NULL: untrained; ids1 has weight 1.
 */
esp_status esp_batcher_add(esp_batcher *b, const int32_t *ids0, const float *weights0, int64_t n0, const int32_t *ids1,
                           int64_t n1);
esp_status esp_batcher_flush(esp_batcher *b, esp_model *m, esp_stack *stack, const esp_score_cfg *cfg,
                             esp_loss_out *loss);
void esp_batcher_clear(esp_batcher *b);
void esp_batcher_deinit(esp_batcher *b);

/* How many samples of the set count. */
int64_t esp_score_samples_of(const esp_dataset *d, const esp_score_cfg *cfg);
/* This rank's next rows, from *at (cfg->rank at first) on: at least one, and as many up to `most` as batch_tokens has
 * room for with their prompts and `more` tokens behind each. Returns how many; 0: there are no more. */
int esp_score_rows(const esp_dataset *d, const esp_score_cfg *cfg, int64_t more, int most, int64_t *at, int64_t *index);
esp_status esp_score_generated(esp_model *m, const esp_tokenizer *tok, const esp_dataset *d, esp_stack *stack,
                               const esp_score_cfg *cfg, esp_score_sums *out);
/* Whether a strategy answers the rows of the set itself, its answers as texts of labels, and the share of them that are
 * right. */
bool esp_score_answered(const esp_dataset *d, const esp_score_cfg *cfg);
esp_status esp_score_answer(const esp_dataset *d, const esp_score_cfg *cfg, const int64_t *index, int n,
                            const char **out);
esp_status esp_score_answered_choice(const esp_dataset *d, const esp_score_cfg *cfg, esp_score_sums *out);
esp_status esp_score_base(esp_model *m, const esp_dataset *d, esp_stack *stack, const esp_score_cfg *cfg,
                          esp_score_sums *out);

#endif
