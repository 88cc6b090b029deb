/* dataset.h: rows of JSONL become token samples with a loss weight per token; samples are packed into rows.
 *
 * Sample: ids[n], weight[n] where weight[i] is the weight of *predicting* ids[i] (weight[0] is always 0). The packer
 * shifts: in a packed row, targets[t] = ids[t+1] of the same sample and weights[t] = weight[t+1]; 0 at its last token.
 */
#ifndef ESP_TEXT_DATASET_H
#define ESP_TEXT_DATASET_H

#include "text/tokenizer.h"

typedef enum esp_data_format {
  ESP_FMT_AUTO,
  ESP_FMT_PROMPT_COMPLETION,
  ESP_FMT_ALPACA,
  ESP_FMT_TEXT,
  ESP_FMT_MESSAGES,
  ESP_FMT_SHAREGPT,
  ESP_FMT_CLASSIFICATION,
  ESP_FMT_CL_BENCHMARK,        /* O-LoRA's: becomes classification */
  ESP_FMT_NATURAL_INSTRUCTIONS /* becomes classification where its labels are known */
} esp_data_format;
typedef enum esp_overlong {
  ESP_OVER_DROP,
  ESP_OVER_TRUNCATE_END,
  ESP_OVER_TRUNCATE_START,
  ESP_OVER_SPLIT,
  ESP_OVER_ERROR
} esp_overlong;
typedef enum esp_packing { ESP_PACK_OFF, ESP_PACK_BFD } esp_packing;
typedef enum esp_train_on { ESP_TRAIN_ASSISTANT /* = completion */, ESP_TRAIN_ALL } esp_train_on;

typedef struct esp_data_source {
  const char *path;  /* a file, or a folder that holds one per split */
  const char *split; /* of a folder: train, dev, eval, test; NULL: train */
  esp_data_format format;
  double weight; /* sampling share; 1 */
  int64_t limit; /* 0: all */
  /* classification: text and label become prompt and completion */
  const char *prompt_template; /* "{text}" is replaced; NULL: "{text}\n" + instruction-free default, documented */
  const char *const *labels;   /* allowed labels; empty: taken from the data */
  int n_labels;
} esp_data_source;

typedef struct esp_data_cfg {
  int64_t sequence_len;
  esp_packing packing;
  esp_overlong overlong;
  esp_train_on train_on;
  bool mask_history;        /* only the last assistant turn */
  const char *train_on_eos; /* turn | last | none */
  const char
      *chat_template;    /* auto | builtin:chatml | builtin:llama3 | builtin:mistral | builtin:gemma | builtin:alpaca */
  const char *cache_dir; /* NULL: no cache */
  bool shuffle;
  bool add_bos; /* text, prompt/completion, classification: BOS first when the tokenizer has one (auto) */
} esp_data_cfg;

typedef struct esp_dataset_stats {
  int64_t rows, kept, dropped_overlong, truncated, split, tokens, trained_tokens, turns_trained, turns_terminated,
      cached;
} esp_dataset_stats;

typedef struct esp_dataset esp_dataset;
/* Tokenises all sources (cached by content). Errors name file and line: "data/x.jsonl:17: ...". An empty dataset, a row
 * with no trained token, a trained turn without trained terminator, a label not in `labels`: ESP_ERR_DATA. */
esp_status esp_dataset_build(const esp_data_source *src, int n_src, const esp_data_cfg *cfg, const esp_tokenizer *tok,
                             esp_dataset **out);
void esp_dataset_destroy(esp_dataset *d);
int64_t esp_dataset_count(const esp_dataset *d);
const esp_dataset_stats *esp_dataset_statistics(const esp_dataset *d);
void esp_dataset_sample(const esp_dataset *d, int64_t i, const int32_t **ids, const float **weights, int64_t *n);
/* "path:line" the sample came from. */
void esp_dataset_origin(const esp_dataset *d, int64_t i, char *buf, size_t n);
/* prompt/answer view for evaluation: number of leading untrained tokens, and the label index (-1). */
int64_t esp_dataset_prompt_len(const esp_dataset *d, int64_t i);
int esp_dataset_label(const esp_dataset *d, int64_t i);
/* Token ids of each label as a continuation of a classification prompt (terminator included). */
int esp_dataset_labels(const esp_dataset *d, const char *const **names, const esp_ids **ids);
/* Reference completion as text (exact match, ROUGE-L). */
const char *esp_dataset_answer(const esp_dataset *d, int64_t i);

/* ---- packing: rows of at most sequence_len tokens ---- */
typedef struct esp_packs esp_packs; /* the plan of one epoch: a function of (dataset, seed, epoch) alone */
esp_status esp_packs_create(const esp_dataset *d, const esp_data_cfg *cfg, uint64_t seed, int64_t task, int64_t epoch,
                            esp_packs **out);
void esp_packs_destroy(esp_packs *p);
int64_t esp_packs_count(const esp_packs *p); /* rows */
double esp_packs_fill(const esp_packs *p);   /* share of slots holding tokens */

typedef struct esp_rows { /* n rows concatenated as one micro-batch; arrays owned here, capacity grows */
  int64_t tokens;
  int32_t *ids, *targets, *positions, *cu_seqlens;
  float *weights;
  int n_seqs;
  double weight_sum;
  int64_t cap_tokens, cap_seqs;
} esp_rows;
/* Rows first..first+n-1 (beyond the end: zero-weight rows, so that all ranks run equal steps). pad_to > 0: the token
 * count is padded up to it with one-token zero-weight sequences' tail segment so that shapes repeat. */
esp_status esp_packs_fetch(const esp_packs *p, int64_t first, int64_t n, int64_t pad_to, esp_rows *out);
/* The same by hand: samples one behind the other, each a sequence of its own, then one-token padding. */
void esp_rows_clear(esp_rows *r);
esp_status esp_rows_add(esp_rows *r, const int32_t *ids, const float *weights, int64_t n);
esp_status esp_rows_pad(esp_rows *r, int64_t tokens);
void esp_rows_deinit(esp_rows *r);
/* Weight of the trained tokens of row i, without fetching it. */
double esp_packs_row_weight(const esp_packs *p, int64_t i);

#endif
