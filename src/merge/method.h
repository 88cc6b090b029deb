/* method.h: how n task vectors become one. A method is a row: which entries of each vector stay (thin), how the vectors
 * are joined, and which options it reads. The same rows serve full models against a base (blend.c) and the dense
 * changes of adapters (combine.c).
 *
 * With task vectors d_i = w_i - w_0, weights a_i, and all sums in fp64 over fp32 values, per tensor:
 *   linear           sum a_i d_i / sum a_i                                                     (model soups,
 * 2203.05482) task_arithmetic  sum a_i d_i                                                               (2212.04089)
 *   magnitude_prune  sum a_i d'_i, d' the int(density n) largest
 *   ties             d' as above; s = sign(sum a_i d'_i); mean of the a_i d'_i whose sign is s  (2306.01708)
 *   dare_linear,     d' = Bernoulli(density) d / density; their sum, or joined as in ties       (2311.03099)
 *   dare_ties
 *   breadcrumbs,     d' without the int(gamma n) largest, of the rest the int(density n) largest (2312.06795)
 *   breadcrumbs_ties
 *   magmax           in each entry the d_i of largest magnitude, of equals the later           (2407.06322)
 *   lines            sum a_i d_i, block l of L times alpha + beta l/(L-1), the rest times alpha  (2410.17146)
 *   opcm             opcm.c                                                                     (2501.09522)
 *   model_stock      t/N sum d_i, t = N c/(1 + (N-1) c), c the mean cosine of the pairs         (2403.19522)
 *   mwa              sum m_i^p d_i / sum m_i^p, or with -p where lower is better                (2504.18580)
 *   slerp            on the weights: (sin((1-t)O) w_1 + sin(tO) w_2) / sin O, O their angle; above a cosine of 0.9995
 *                    straight;  nuslerp: the same on the d_i, t = a_2/(a_1+a_2)
 * and the result is multiplied by lambda. */
#ifndef ESP_MERGE_METHOD_H
#define ESP_MERGE_METHOD_H

#include "espalier/tools.h"
#include "merge/parts.h"

enum { ESP_MERGE_MOST = 64 }; /* vectors of one merge */

typedef enum esp_thin { ESP_THIN_NONE, ESP_THIN_LARGEST, ESP_THIN_DRAW, ESP_THIN_MIDDLE } esp_thin;
typedef enum esp_join {
  ESP_JOIN_SUM,
  ESP_JOIN_ELECT,
  ESP_JOIN_MAX,
  ESP_JOIN_STOCK, /* a sum whose factors come from the angles */
  ESP_JOIN_SLERP,
  ESP_JOIN_OPCM
} esp_join;

typedef struct esp_method_kind {
  const char *name;
  esp_thin thin;
  esp_join join;
  const char *reads; /* options, separated by blanks */
  int least, most;   /* how many vectors; most 0: any */
  bool normalize;    /* by default */
} esp_method_kind;

typedef struct esp_method { /* a row with every option settled */
  const esp_method_kind *kind;
  int n;
  double weight[ESP_MERGE_MOST], density[ESP_MERGE_MOST];
  double lambda, gamma, t, alpha;
  bool layered; /* LiNeS */
  double lines_alpha, lines_beta;
  int layers; /* of the model */
  esp_election election;
  enum { ESP_RESCALE_INVERSE, ESP_RESCALE_L1, ESP_RESCALE_NONE } rescale;
  uint64_t seed;
} esp_method;

const esp_method_kind *esp_method_find(const char *name);
const char *const *esp_method_names(int *n);
esp_status esp_method_unknown(const char *name, const char *const *(*names)(int *n)); /* with the nearest */
/* weights NULL: not given. ESP_ERR_RECIPE names what is wrong. */
esp_status esp_method_settle(const esp_merge_method *given, const esp_method_kind *kind, const double *weights, int n,
                             int layers, esp_method *out);
/* The factor of a tensor of block `layer` (-1: of none). */
double esp_method_scale(const esp_method *m, int layer);

#endif
