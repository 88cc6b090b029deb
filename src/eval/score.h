/* score.h: a number for an evaluation set: perplexity, classification by label likelihood, exact match and ROUGE-L over
 * generated text, distance of the predictions from the base's. Scores are kept as sums so that ranks can add theirs. */
#ifndef ESP_EVAL_SCORE_H
#define ESP_EVAL_SCORE_H

#include "core/strbuf.h"
#include "eval/experts.h"
#include "model/model.h"
#include "recipe/recipe.h"
#include "text/dataset.h"

typedef struct esp_score_cfg {
  esp_metric metric;
  int64_t limit; /* first samples only; 0: all */
  int64_t max_new_tokens;
  int64_t batch_tokens;       /* tokens per forward pass; at least one sample */
  int rank, size;             /* this rank scores samples i with i % size == rank */
  esp_strategies *strategies; /* esp_strategies_choose is asked for each batch; NULL: nobody */
  const esp_sequence *sequence;
  int owner;
  esp_experts experts; /* of choice, perplexity and what is generated */
} esp_score_cfg;

typedef struct esp_score_sums { /* add element by element over ranks */
  double num, den, samples;
  double labelled, malformed; /* generated answers to rows that have a label; of them none of the labels */
} esp_score_sums;

/* perplexity: exp(num/den), num = sum of weight * nll, den = sum of weights, over trained tokens.
 * choice: share of samples whose own label has the largest sum of log p(label tokens | prompt), terminator included.
 * exact_match: share of greedy completions equal to the reference after trimming white space.
 * Two experts: choice takes the larger of their shares softmax_label(sum of log p), perplexity and generation the
 * larger probability of each token (esp_joined_loss); the distances from the base are those of the first. Where the set
 * is one of labels, generated answers that are none of them (white space aside) are counted as malformed: a wrong
 * answer says what a model does not know, a malformed one only that it no longer answers in this form (SEFE calls that
 * superficial forgetting). base_xent, base_kl: mean over trained tokens, in nats, of H(p_base, p) = -sum_v p_base(v)
 * log p(v) and of H(p_base, p) - H(p_base): what the adapter does to predictions on text that need not have a
 * reference. rouge_l: mean F1 of the longest common subsequence of lower-cased words (Lin 2004, beta = 1). */
esp_status esp_score_run(esp_model *m, const esp_tokenizer *tok, const esp_dataset *d, esp_stack *stack,
                         const esp_score_cfg *cfg, esp_score_sums *out);
/* Greedy completions of the set's rows (cfg->limit of them) as JSON objects {"set", "index", "prompt", "answer",
 * "reference"}, commas between; nothing for rows without a prompt. out NULL: only computed (plan). */
esp_status esp_score_samples(esp_model *m, const esp_tokenizer *tok, const esp_dataset *d, esp_stack *stack,
                             const esp_score_cfg *cfg, const char *set, esp_strbuf *out);
double esp_score_value(esp_metric metric, const esp_score_sums *s);
const char *esp_metric_name(esp_metric metric);
bool esp_metric_smaller_better(esp_metric metric);

/* Exposed for tests. */
bool esp_exact_match(const char *answer, const char *reference);
double esp_rouge_l(const char *answer, const char *reference);

#endif
