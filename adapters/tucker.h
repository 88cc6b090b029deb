/* tucker.h: the step of kinds with a trained core between two factors, delta W = s B G A, A [r, in], G [r, r], B [out,
 * r]: lotr (A and B trained, shared over layers) and pmss (A and B frozen pieces of W). A factor is a parameter or
 * frozen backend memory; everything else is the same. */
#ifndef ESP_ADAPTERS_TUCKER_H
#define ESP_ADAPTERS_TUCKER_H

#include "adapters/internal.h"

typedef struct esp_tucker_site {
  int64_t r;
  float s;
  int core;                      /* parameter G */
  int a, b;                      /* parameters; -1: the frozen tensors below */
  esp_tensor frozen_a, frozen_b; /* compute type */
  float *host_a, *host_b;        /* fp32 copies of the frozen factors, for merge and export */
  int64_t t0;                    /* first column in the group's T1, T2 */
} esp_tucker_site;

typedef struct esp_tucker_group {
  int n;
  esp_site *sites[3];
  int64_t width;     /* sum of ranks */
  int first_a;       /* the A of the sites lie back to back from this parameter; -1: they do not */
  esp_tensor frozen; /* or frozen ones do, [width, in]; data NULL: they do not */
  esp_tensor t1, t2; /* x A^T and s T1 G^T, kept for backward */
  esp_tensor dt1;
  bool late_fwd, late_bwd; /* the base product had no room for the tails */
} esp_tucker_group;

int esp_tucker_tails(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max, void **slot);
void esp_tucker_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot);
int esp_tucker_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                         int max, void **slot);
void esp_tucker_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot);
bool esp_tucker_wants_output(const esp_adapter *a);
esp_status esp_tucker_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w);
int64_t esp_tucker_low_rank(esp_adapter *a, esp_site *s, float *A, float *B);

#endif
