/* generate.h: batched generation with a KV cache, greedy or sampled. */
#ifndef ESP_EVAL_GENERATE_H
#define ESP_EVAL_GENERATE_H

#include "eval/experts.h"
#include "model/model.h"
#include "text/tokenizer.h"

typedef struct esp_gen_cfg {
  int64_t max_new_tokens;
  double temperature; /* 0: greedy (first maximum) */
  double top_p;       /* 0 or 1: off */
  int top_k;          /* 0: off */
  uint64_t seed;
  const int32_t *stop; /* ids that end a sequence; not part of the output unless keep_stop */
  int n_stop;
  bool keep_stop;          /* it is part of the output */
  int64_t first_row;       /* row of the first prompt in the draws: calls in turn draw like one */
  const int32_t *adapters; /* per prompt, as in esp_batch; NULL: every active adapter on all */
  const float *shares;     /* the same */
  int n_shares;
  const esp_experts *experts; /* NULL: one */
} esp_gen_cfg;

/* Completes n prompts in one batch; out[i] must be empty and receives the new ids. A draw is a function of (seed, row,
 * position): it does not depend on what else is in the batch. A prompt longer than the model's positions less
 * max_new_tokens is ESP_ERR_DATA naming its index. */
esp_status esp_generate(esp_model *m, esp_stack *stack, const esp_ids *prompts, int n, const esp_gen_cfg *cfg,
                        esp_ids *out);

#endif
