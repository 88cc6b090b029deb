/* data_priv.h: the stages of a dataset. source.c finds the rows of a file, rows.c turns a JSON row into runs of text
 * with a loss flag, tokenise.c runs into samples, cache.c keeps a source's samples in a file, dataset.c holds the
 * whole. */
#ifndef ESP_TEXT_DATA_PRIV_H
#define ESP_TEXT_DATA_PRIV_H

#include <jansson.h>

#include "core/arena.h"
#include "core/mem.h"
#include "core/strbuf.h"
#include "io/file.h"
#include "text/dataset.h"

/* A stretch of a sample. Adjacent runs with equal `train` are tokenised together; where it changes, the boundary is a
 * token boundary, as it is when a model is asked to continue a prompt. */
typedef struct esp_run {
  const char *text;
  size_t n;
  bool train;
  bool eos;    /* the tokenizer's EOS instead of text */
  bool prompt; /* belongs to the prompt of the last answer: prompt_len counts these */
} esp_run;
typedef struct esp_row {
  esp_arena *arena; /* of this chunk */
  esp_run *runs;
  int n_runs, cap_runs;
  bool bos; /* begin with BOS if the tokenizer has one and the text does not */
  const char *answer;
  const char *label; /* classification, NULL */
  int turns, terminated;
} esp_row;

typedef struct esp_sample {
  int64_t at; /* first token in the shard */
  int32_t n, prompt, label, unused;
  int64_t line;
  int64_t answer; /* offset into the shard's text */
} esp_sample;

/* The samples of one source: owned memory, or a mapped cache file. */
typedef struct esp_shard {
  const esp_sample *samples;
  const int32_t *ids;
  const float *weights;
  const char *text;
  int64_t n_samples, n_tokens, n_text;
  esp_dataset_stats stats;
  const char *path;
  esp_data_format format;
  esp_map_file map;
  void *owned[4];
} esp_shard;
void esp_shard_deinit(esp_shard *s);

typedef struct esp_source_ctx { /* what a row needs */
  const esp_data_source *src;
  const esp_data_cfg *cfg;
  const esp_tokenizer *tok;
  esp_data_format format;
  const char *chat; /* built-in template, NULL: none chosen */
  int eos_mode;     /* 0 none, 1 last, 2 turn */
  const char *labels_text;
  const char *text_key, *label_key; /* of classification rows */
  const char *definition;           /* natural_instructions, NULL: none */
  bool published;                   /* rows of a benchmark */
} esp_source_ctx;

typedef struct esp_row_ref { /* a row of a file, and the line it begins on */
  const char *text;
  size_t n;
  int64_t line;
} esp_row_ref;
typedef struct esp_source_file {
  esp_map_file map;
  esp_row_ref *rows; /* the first `limit` */
  int64_t n_rows;
} esp_source_file;
/* Finds the file of c->src and the rows in it, and settles format, labels and prompt: c->src becomes a copy, of the
 * arena's, that says all of it. */
esp_status esp_source_open(esp_source_ctx *c, esp_arena *arena, esp_source_file *out);
void esp_source_close(esp_source_file *f);

esp_data_format esp_format_detect(const json_t *row);
const char *esp_format_name(esp_data_format f);
/* where: "path:line" for messages. */
esp_status esp_row_build(const esp_source_ctx *c, const json_t *j, const char *where, esp_row *row);
/* Checks that the template's control tokens are tokens of this tokenizer. */
esp_status esp_row_check_template(const esp_source_ctx *c, const char *where);
/* Prompt of a classification text; arena-owned. */
char *esp_classification_prompt(const esp_source_ctx *c, const char *text, esp_arena *a);

/* Appends ids and weights of a row; *prompt: leading tokens before the (last) answer. */
esp_status esp_row_tokenise(const esp_source_ctx *c, const esp_row *row, const char *where, esp_ids *ids,
                            float **weights, int64_t *cap_weights, int64_t *prompt);
esp_status esp_shard_tokenise(const esp_source_ctx *c, const esp_source_file *file, esp_shard *out);

void esp_cache_key(const esp_source_ctx *c, const char *file_hash, char key[33]);
/* A missing, foreign or damaged file is a miss, never an error. */
bool esp_cache_load(const char *path, const char *key, int64_t vocab, esp_shard *out);
esp_status esp_cache_store(const char *path, const char *key, const esp_shard *s);

struct esp_dataset {
  esp_arena *arena;
  esp_shard *shards;
  int64_t *first; /* first sample of each shard; [n_shards] = count */
  double *share;  /* sampling share */
  int n_shards;
  esp_dataset_stats stats;
  const char **labels;
  esp_ids *label_ids;
  int n_labels;
};
const esp_sample *esp_dataset_at(const esp_dataset *d, int64_t i, const esp_shard **shard);

#endif
