/* write.h: a model directory made from another one, tensor by tensor in blocks of rows, each rounded once; files that
 * hold no weights are copied. The directory appears complete or not at all. */
#ifndef ESP_MERGE_WRITE_H
#define ESP_MERGE_WRITE_H

#include "io/safetensors.h"
#include "merge/merge.h"

enum { ESP_MERGE_BLOCK = 1 << 18 }; /* elements that are worked on at a time, 1 MiB of fp32 */

typedef struct esp_out_tensor {
  const char *name, *shard; /* file name inside the directory */
  esp_dtype dtype;
  int ndim;
  int64_t shape[8];
  const esp_st_entry *stored; /* of the base; NULL: it has none */
  bool changed;               /* else its bytes are copied */
  bool whole;                 /* its rows can only be made together */
  void *site;                 /* the maker's */
} esp_out_tensor;

typedef struct esp_out_model {
  const char *base, *out;
  int dtype;            /* -1: each tensor as stored */
  bool untied;          /* tie_word_embeddings becomes false */
  esp_out_tensor *list; /* those of one shard together */
  int n;
  /* Around one changed tensor; either may be NULL. `end` is called whenever `begin` was. */
  esp_status (*begin)(void *ctx, const esp_out_tensor *t);
  void (*end)(void *ctx, const esp_out_tensor *t);
  /* Rows r0.. [n, cols] as stored: what the base has and what is to be written. Called in order. */
  esp_status (*rows)(void *ctx, const esp_out_tensor *t, int64_t r0, int64_t n, float *base, float *made);
  void *ctx;
} esp_out_model;

/* -1 for NULL; else fp32, bf16 or fp16, or an error. */
esp_status esp_out_dtype(const char *name, int *dtype);
/* The type a stored tensor is written in. */
esp_dtype esp_out_dtype_of(int dtype, esp_dtype stored);
int64_t esp_out_rows(const esp_out_tensor *t);
int64_t esp_out_cols(const esp_out_tensor *t);
int64_t esp_out_step(const esp_out_tensor *t); /* rows of one block */
/* Rows of a stored tensor, as fp32. */
void esp_stored_rows(const esp_st_entry *e, int64_t r0, int64_t n, int64_t cols, float *out);
/* A pass goes through a file once: rows that were read need not stay in memory. */
void esp_stored_drop(const esp_st_entry *e, int64_t r0, int64_t n, int64_t cols);
/* All tensors of a safetensors model, shard by shard, unchanged; free with esp_mem_free. room: for so many more. */
esp_status esp_out_list(const esp_st *file, int dtype, int room, esp_out_tensor **list, int *n);
esp_status esp_out_write(const esp_out_model *m, esp_merge_stats *stats);

#endif
