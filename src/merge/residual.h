/* residual.h: what training changed, stored small beside a base: residual.json and residual.safetensors.
 *
 *   1bit      (BitDelta, Liu et al. 2024, arXiv:2402.10193; 1bit-Merging, arXiv:2502.10743) each matrix is scale x
 * sign, the scale the mean magnitude of the row (or of the matrix), which is the best one in squares:
 *             "<tensor>.sign" U8 [rows, ceil(cols/8)], bit j%8 of byte j/8 set: +; "<tensor>.scale" F32 [rows] or [1]
 *   lowrank   (ERE, "Efficient Storage of Fine-Tuned Models via Low-Rank Approximation of Weight Residuals") each
 * matrix is B A of its own rank, by truncated SVD; the ranks are shared out over all matrices so that the squares that
 * are lost are the least for the parameters that are kept: the triple with the largest s^2 / (rows + cols) next, until
 * `energy` of the squares is held.
 *             "<tensor>.A" [r, cols], "<tensor>.B" [r, rows] (transposed), F32 or BF16; at 8 bits I8 with one F32 scale
 *             per row, "<tensor>.A.scale" [r], "<tensor>.B.scale" [r]
 *   anything that is no matrix: "<tensor>.exact" F32, the difference itself. Tensors that did not change are not there.
 *
 * esp_sources reads it like a model, so that `merge --models DIR` gives the model back. */
#ifndef ESP_MERGE_RESIDUAL_H
#define ESP_MERGE_RESIDUAL_H

#include "io/safetensors.h"
#include "model/model.h"

#define ESP_RESIDUAL_CONFIG "residual.json"

typedef struct esp_residual esp_residual;
/* Held to the base: its fingerprint, and every tensor's shape. */
esp_status esp_residual_open(const char *dir, const esp_model *model, const esp_st *base, esp_residual **out);
void esp_residual_close(esp_residual *r); /* NULL allowed */
bool esp_residual_holds(const esp_residual *r, const char *tensor);
/* Rows r0.. of the difference [n, cols]; zeros where there is none. */
void esp_residual_rows(const esp_residual *r, const char *tensor, int64_t r0, int64_t n, int64_t cols, float *out);

typedef struct esp_residual_spec {
  const char *base, *tuned, *out; /* tuned: whatever sources.h reads */
  const char *form;               /* "1bit" or "lowrank" */
  bool per_matrix;                /* 1bit: one scale of a matrix */
  double energy;                  /* lowrank: share of the squares of all matrices, 0 < energy <= 1 */
  int bits;                       /* lowrank: 32, 16 or 8 */
} esp_residual_spec;
typedef struct esp_residual_stats {
  int matrices, exact;          /* tensors in either form */
  int64_t rank, bytes;          /* largest rank; of the file's tensors */
  int64_t full_bytes;           /* of the tuned model's tensors, in the base's types */
  double max_error, mean_error; /* relative, Frobenius, over the matrices */
} esp_residual_stats;
esp_status esp_residual_write(const esp_residual_spec *spec, esp_residual_stats *stats);

#endif
