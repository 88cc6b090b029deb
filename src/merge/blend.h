/* blend.h: the task vectors of one tensor become one by a method (method.h), block of rows by block of rows: a pass for
 * what the method must know of whole vectors (limits of magnitude, norms, angles), then a pass that makes the result.
 * Beside a block of each vector nothing is in memory, but for OPCM, which decomposes whole matrices. */
#ifndef ESP_MERGE_BLEND_H
#define ESP_MERGE_BLEND_H

#include "merge/method.h"

typedef struct esp_vectors {
  const char *name; /* masks are drawn by it */
  int part;
  int64_t rows, cols, step; /* step: rows of one read */
  int layer;                /* -1: of no block */
  bool linear;              /* a projection inside a block: what OPCM projects */
  /* Rows r0.. of vector i, fp32 [n, cols]; i == esp_method.n: of the base's weight (slerp on weights only). */
  esp_status (*read)(void *ctx, int i, int64_t r0, int64_t n, float *out);
  void *ctx;
  bool has_base;
} esp_vectors;

typedef struct esp_blend {
  const esp_method *m;
  esp_vectors v;
  double factor[ESP_MERGE_MOST + 1];                     /* of sums; the last one the base's */
  double rescale[ESP_MERGE_MOST];                        /* of what a draw keeps */
  esp_cut above[ESP_MERGE_MOST], inside[ESP_MERGE_MOST]; /* thin: what leaves at the top, where the kept end */
  float *x[ESP_MERGE_MOST + 1];                          /* a block of each */
  float *whole;                                          /* OPCM: the result */
  double scale;                                          /* lambda and the layer's factor */
  double own_squares, each_squares[ESP_MERGE_MOST];      /* of OPCM, complete after the last row */
} esp_blend;

esp_status esp_blend_open(const esp_method *m, const esp_vectors *v, esp_blend *b);
/* Rows r0.., n at most v->step, in order: the merged task vector. */
esp_status esp_blend_rows(esp_blend *b, int64_t r0, int64_t n, float *out);
void esp_blend_close(esp_blend *b);

/* OPCM (Tang et al. 2025, arXiv:2501.09522), one step: in the singular basis of the sum [rows, cols] of the earlier
 * projected task vectors, tau loses its diagonal and the leading block of as many directions as hold `alpha` of the sum
 * of singular values. Afterwards <tau, sum> = 0. */
esp_status esp_opcm_project(const float *sum, int64_t rows, int64_t cols, double alpha, float *tau);
/* The projected task vectors added up, into b->whole. */
esp_status esp_opcm_accumulate(esp_blend *b);

#endif
