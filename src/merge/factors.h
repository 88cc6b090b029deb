/* factors.h: low-rank changes of linear sites. */
#ifndef ESP_MERGE_FACTORS_H
#define ESP_MERGE_FACTORS_H

#include "merge/open.h"

typedef struct esp_factors { /* of one site; delta = b a */
  esp_site *site;
  int64_t rank;
  float *a, *b; /* [rank, in], [out, rank] */
} esp_factors;

esp_status esp_factors_init(esp_factors *f, esp_site *s, int64_t rank);
void esp_factors_deinit(esp_factors *f, int n); /* and the list itself */
/* B = U sqrt(S), A = sqrt(S) V^T of delta [out, in]; the error of the truncation goes into stats. */
esp_status esp_factors_truncate(esp_factors *f, esp_site *s, const float *delta, int64_t rank, esp_svd_stats *stats);
/* The same change in the fewest ranks, at most `rank` of them (0: as many as it has). */
esp_status esp_factors_reduce(esp_factors *f, int64_t rank, esp_svd_stats *stats);
void esp_factors_count(esp_svd_stats *stats, double error);
/* A LoRA of one rank over the given sites, alpha = r, so that delta = B A. Smaller ranks are padded with zeros. */
esp_status esp_factors_write(const char *base, const esp_factors *f, int n, int64_t rank, const char *out);
/* ESP_ERR_RECIPE naming what of the adapter a plain LoRA on linear modules cannot carry. path: in the message. near: a
 * kind that only has a LoRA near it will do. */
esp_status esp_lora_carries(const esp_merge_inputs *in, int which, const char *path, bool near);
/* What an adapter adds to rows r0.. of the weight of a site, [n, in] fp32, its scale included. */
esp_status esp_site_delta(esp_merge_inputs *in, int which, esp_site *s, int64_t r0, int64_t n, float *delta);

#endif
