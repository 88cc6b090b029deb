/* sparse.h: what the kinds fish and spu share: a fixed mask over the targeted matrices and its values. */
#ifndef ESP_ADAPTERS_SPARSE_H
#define ESP_ADAPTERS_SPARSE_H

#include "adapters/internal.h"

typedef struct sparse_site {
  int64_t k0, n;      /* entries: the first in the list of all, and how many */
  int64_t row0, col0; /* its place in the lists of rows and columns */
  float *score;       /* backend memory [out, in] during calibration, else NULL */
} sparse_site;

typedef struct sparse_mask {
  int n_sites;
  esp_site **sites;   /* targeted, in model order */
  int64_t total;      /* entries, fixed by the density */
  int64_t rows, cols; /* sums of out and of in */
  int param;          /* the values [1, total], site by site, row by row */
  bool chosen;
  int32_t *row_count; /* host [rows]: entries of each row */
  int32_t *column;    /* host [total] */
  /* backend memory: both directions of every site, see esp_csr */
  int32_t *start, *index, *t_start, *t_index, *t_order;
  float *square; /* backend memory, the largest site: one sequence's gradient */
} sparse_mask;

/* Entries of each matrix for this configuration, in sites[].n; answers their sum. */
int64_t esp_sparse_counts(const esp_adapter *a, sparse_mask *m);
/* Chooses the entries of largest score: over all matrices together (fish), or in each its own share (spu). Scores of a
 * site are asked for several times, one site at a time. */
typedef esp_status (*sparse_score)(esp_adapter *a, esp_site *s, float *out);
esp_status esp_sparse_choose(esp_adapter *a, sparse_mask *m, sparse_score score);
/* From row_count and column: places of the sites, both directions on the backend. */
esp_status esp_sparse_build(esp_adapter *a, sparse_mask *m);

#endif
