/* merge.h: adapters into a model, a model difference into an adapter, an adapter into another form.
 *
 * merge:   W' = round(effective(W)), in fp32 from the stored weight, rounded once, tensor by tensor into shards that
 *          mirror the base's; the base is never modified, so unmerging is using the base again. A head that an adapter
 *          changed away from a tied embedding is written on its own and tie_word_embeddings becomes false.
 * extract: A, B from the truncated SVD of W_tuned - W_base: B = U sqrt(S), A = sqrt(S) V^T, alpha = r.
 * blend:   several models, adapters or stored differences as one model, by a method.
 * combine: several adapters as one LoRA.
 * export:  any adapter as a plain LoRA, exactly where its kind has a low-rank form, else by truncated SVD with the
 * error.
 */
#ifndef ESP_MERGE_MERGE_H
#define ESP_MERGE_MERGE_H

#include "adapters/adapter.h"
#include "espalier/tools.h"

typedef struct esp_merge_spec {
  const char *base; /* model directory */
  const char *const *adapters;
  const double *weights; /* NULL: 1 each */
  int n_adapters;
  const char *out;
  const char *dtype; /* NULL: each tensor as stored */
} esp_merge_spec;
typedef struct esp_merge_stats {
  int64_t tensors, changed;     /* written; of them changed by an adapter */
  double max_delta, lost_share; /* largest |W' - W| before rounding; share of changed elements that rounding undid */
} esp_merge_stats;
esp_status esp_merge_write(const esp_merge_spec *spec, esp_merge_stats *out);

typedef struct esp_verify_stats {
  double max_abs, max_rel; /* over fp32 logits; max_rel = max |difference| / max |logit| */
  double top1_agreement;
  int64_t rows;
} esp_verify_stats;
/* fp32 logits of base + adapters against those of the merged model over `samples` drawn sequences of 32 tokens. */
esp_status esp_merge_verify(const esp_merge_spec *spec, int64_t samples, esp_verify_stats *out);

typedef struct esp_svd_stats {
  int sites;
  int64_t rank;                 /* of the LoRA that was written */
  double max_error, mean_error; /* ||delta - BA||_F / ||delta||_F */
} esp_svd_stats;
esp_status esp_extract_write(const char *base, const char *tuned, const char *out, int64_t rank, const char *target,
                             esp_svd_stats *stats);

/* Models, adapters and stored differences (residual.h) as one model, by a method (method.h). */
typedef struct esp_blend_spec {
  const char *base;
  const char *const *inputs;
  const double *weights; /* NULL: not given */
  int n;
  const char *out;   /* model directory */
  const char *dtype; /* NULL: each tensor as stored */
  const esp_merge_method *method;
} esp_blend_spec;
esp_status esp_blend_write(const esp_blend_spec *spec, esp_merge_stats *stats);
esp_status esp_blend_check(const esp_blend_spec *spec); /* the options alone, no file is opened */

/* Several adapters as one LoRA (combine.c has the types and their formulas). */
typedef struct esp_combine_spec {
  const char *base;
  const char *const *adapters;
  const double *weights; /* NULL: not given, 1 each */
  int n_adapters;
  const char *out; /* adapter directory */
  const esp_merge_method *method;
  int64_t rank; /* 0: what the type gives */
  /* Optional: at most so many at a site; 0: the site may not be changed. */
  int64_t (*rank_at)(void *ctx, const char *site);
  void *ctx;
} esp_combine_spec;
esp_status esp_combine_write(const esp_combine_spec *spec, esp_svd_stats *stats);
esp_status esp_combine_check(const esp_combine_spec *spec); /* the options alone, no file is opened */
const char *const *esp_combine_names(int *n);
/* Whether the type works on factors, which the adapters' kinds must have; of one rank: *same_rank. */
bool esp_combine_by_factors(const char *name, bool *same_rank);

/* as_lora: rewrite as a plain LoRA (rank 0: the exact rank). for_vllm: implies as_lora, one rank for all sites (padded
 * with zeros), alpha = r, no rank or alpha pattern; what vLLM cannot load (modules_to_save, bias, token rows, embedding
 * sites) is ESP_ERR_RECIPE naming it. */
esp_status esp_export_write(const char *base, const char *adapter, const char *out, bool as_lora, bool for_vllm,
                            int64_t rank, esp_svd_stats *stats);

#endif
