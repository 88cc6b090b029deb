/* projection.h: what the strategies share that keep changes out of subspaces: the matrices that are trained, rows of
 * what the layers read and make, bases that grow, and the projection itself.
 *
 * A projected gradient is not yet a projected update (Adam scales each entry, decay pulls, momentum remembers). So
 * gradients are projected for the sake of clipping and of the optimizer's state, and after the step what the matrix has
 * changed by since its task began is projected again: theta <- anchor + P(theta - anchor). Measured from the task's
 * start rounding does not add up over steps. It is exact for the fp32 values that are trained and saved. */
#ifndef ESP_TASKS_PROJECTION_H
#define ESP_TASKS_PROJECTION_H

#include "tasks/strategy.h"

typedef struct esp_trained { /* a matrix of the base that changes: all of it, or by B A */
  esp_site *site;
  int weight; /* parameter [out, in], -1 */
  int a, b;   /* parameters A [r, in], B [out, r], -1 */
} esp_trained;
/* Those of the present adapter, in model order; esp_mem_free. ESP_ERR_RECIPE, naming the strategy, where there is none
 * or what the kind makes of them is no sum W + B A. */
esp_status esp_trained_list(const esp_strategy *s, const esp_sequence *q, esp_trained **list, int *n);
/* B A of the present task is all that changes: the adapter is new, or gives each task factors of its own. */
bool esp_trained_fresh(const esp_sequence *q, const esp_trained *t);
/* For `open`: ESP_ERR_RECIPE, naming the strategy, where a later task would go on with the factors of the one before
 * it, or, without `whole`, where a weight is trained in full. */
esp_status esp_trained_own(const esp_strategy *s, const esp_sequence *q, bool whole);

/* Rows of inputs and outputs of groups, in host memory: some of the tokens of each sample, spread evenly. */
typedef struct esp_observed {
  const esp_sequence *q;
  int n;          /* groups of the model */
  int64_t most;   /* rows kept of each */
  float **x, **y; /* per group index: [rows, in], [rows, out]; NULL: not wanted */
  int64_t *rows;
  int64_t batch, tokens; /* of a batch: rows wanted; tokens that are not padding */
} esp_observed;
/* n samples of the present task (all of them where it has fewer), a function of (seed, task); esp_mem_free. */
esp_status esp_sequence_some(const esp_sequence *q, int64_t n, esp_sample **list, int64_t *count);
/* Forward of the samples with the adapter as it stands, the same on every rank. Wanted: the groups of `list`. */
esp_status esp_observe(const esp_sequence *q, const esp_trained *list, int n, const esp_sample *s, int64_t samples,
                       int64_t most, bool outputs, esp_observed *out);
void esp_observed_deinit(esp_observed *o);

/* A basis in the array `name`: orthonormal rows [k, width], backend memory. grow: adds the leading right singular
 * vectors of what `x` ([rows, width]) has outside of it until the share `energy` of its squared length lies inside. */
esp_tensor esp_basis(const esp_strategy *s, const char *name, int64_t width); /* data NULL: none */
esp_status esp_basis_grow(esp_strategy *s, const char *name, int64_t width, const float *x, int64_t rows,
                          double energy);

/* m <- m (I - M^T M), and m <- (I - U^T U) m, for bases M [k, cols], U [k, rows]; products are never tf32. */
void esp_project_rows(const esp_sequence *q, esp_tensor m, esp_tensor basis);
void esp_project_cols(const esp_sequence *q, esp_tensor m, esp_tensor basis);
/* The same with what parameter `p` has changed by since `anchor` (a flat array); a basis without data: not projected.
 */
void esp_project_change(const esp_sequence *q, int p, esp_tensor anchor, esp_tensor rows, esp_tensor cols);
/* The array "anchor" becomes the present values. */
esp_status esp_anchor(esp_strategy *s, const esp_sequence *q);

#endif
