/* lora_data.h: what the pass over data for LoRA's first values holds while it runs. */
#ifndef ESP_ADAPTERS_LORA_DATA_H
#define ESP_ADAPTERS_LORA_DATA_H

#include "adapters/internal.h"

typedef struct esp_eva { /* principal components of the inputs of a group, host */
  int64_t k, seen;       /* components; samples */
  float *components;     /* [k, in] */
  float *values;         /* [k] singular values */
  double *ratio;         /* [k] of the variance explained */
  double *mean, *var;    /* [in] */
  bool *converged;       /* [k] */
} esp_eva;

typedef struct lora_group_pass {
  int64_t calls;
  float *gram; /* corda: backend memory [in, in] */
  esp_eva eva;
} lora_group_pass;

typedef struct lora_pass {
  lora_group_pass *groups; /* by index */
  float **grad;            /* lora_ga: by site, backend memory [out, in] */
  int64_t batch;           /* eva: batches begun, and the deal of ranks (by site) when the last of them began */
  int64_t *ranks;
  bool dealt;
} lora_pass;

/* lora_eva.c. fit: one batch of inputs x [n, in] (destroyed); fewer than k are passed by. begin: another batch begins.
 * done: the components that the deal of ranks takes of this group (NULL: of all) stand still. ranks: of each site, as
 * dealt out. patterns: rank_pattern, alpha_pattern and exclude that say so. */
esp_status esp_eva_fit(esp_adapter *a, lora_pass *p, const esp_group *g, int64_t n, float *x);
esp_status esp_eva_begin(const esp_adapter *a, lora_pass *p);
bool esp_eva_done(const esp_adapter *a, const lora_pass *p, const esp_group *g);
esp_status esp_eva_ranks(const esp_adapter *a, const lora_pass *p, int64_t *ranks);
esp_status esp_eva_patterns(const esp_adapter *a, esp_arena *arena, const int64_t *ranks, esp_adapter_cfg *out);
void esp_eva_components(const esp_adapter *a, const esp_eva *e, int64_t r, float *A);
void esp_eva_free(esp_eva *e);

#endif
