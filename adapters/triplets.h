/* triplets.h: the operator that the kinds with movable ranks share (adalora, increlora, elalora, dyrank):
 *   y = W x + b + c P diag(e) Q drop(x),   P = lora_B [out, r], e = lora_E [r, 1], Q = lora_A [r, in]
 * One triplet (p_i, e_i, q_i) is one rank, with an importance of its own; kinds differ in how they start, which ranks
 * they keep, and when they add some. */
#ifndef ESP_ADAPTERS_TRIPLETS_H
#define ESP_ADAPTERS_TRIPLETS_H

#include "adapters/internal.h"

typedef struct esp_triplet_site {
  esp_lora_site l; /* first: what every low-rank site has; l.s is c, l.a is Q, l.b is P */
  int e;
  int64_t start;  /* ranks it started with */
  uint8_t *keep;  /* [start], arena: which of them are left; NULL: all */
  int64_t serial; /* ranks ever added: names the random numbers of the next one */
} esp_triplet_site;

typedef struct esp_triplet_group {
  int n;
  esp_site *sites[3];
  int first_a, first_e;
  int64_t width; /* sum of ranks */
  esp_tensor t, u, ec, dt;
  bool late_fwd, late_bwd;
} esp_triplet_group;

typedef struct esp_triplets { /* a->impl */
  esp_site **sites;           /* targeted, in model order */
  int n_sites;
  int64_t ranks; /* in all of them */
  int64_t spare; /* ranks that may still be added: only the counting backend makes room for them */
  /* backend memory for what runs over all ranks or all matrices */
  float *scores, *grams, *eyes, *norms;
  int64_t cap_scores, cap_grams;
  uint64_t built; /* revision that eyes was made for, plus one */
  int64_t total;  /* steps of the task, as the trainer said; 0: not yet */
  bool done;      /* the ranks are final */
  int64_t extra;  /* ranks per module beyond target_r that may be there for a while */
  bool trades;    /* ranks go from one module to another: all could meet in one block */
  bool grows;     /* ranks are added: files list their numbers, not which of the first are left */
} esp_triplets;

/* kind->declare, _tails, ... of all these kinds; the kind says what else it needs in `open`. scale is c of a site with
 * `start` ranks. */
esp_status esp_triplets_open(esp_adapter *a);
esp_status esp_triplets_declare(esp_adapter *a, esp_group *g, const bool *hit);
int esp_triplets_tails(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max, void **slot);
void esp_triplets_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot);
int esp_triplets_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                           int max, void **slot);
void esp_triplets_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot);
bool esp_triplets_wants_output(const esp_adapter *a);
void esp_triplets_destroy(esp_adapter *a);
void esp_triplets_resized(esp_adapter *a);
esp_status esp_triplets_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w);
int64_t esp_triplets_low_rank(esp_adapter *a, esp_site *s, float *A, float *B);

/* triplets_rank.c: importances and ranks. */
/* One step of the running statistics (a->state[0], [1]) over the gradients that the optimizer has just used. */
void esp_triplets_sense(esp_adapter *a);
/* Importance of every rank, host, [ranks] in the order of sites: s(e_i) + mean_j s(q_ij) + mean_j s(p_ji). */
esp_status esp_triplets_scores(esp_adapter *a, float *out);
/* e of every rank: to the host, from the host, and times a mask. */
esp_status esp_triplets_get_e(esp_adapter *a, float *out);
void esp_triplets_set_e(esp_adapter *a, const float *e);
esp_status esp_triplets_mask(esp_adapter *a, const float *mask);
/* Leaves the ranks with keep[k] != 0 and appends more[i] new ones to site i (NULL: none): q, p ~ N(0, 0.02^2), e = e0.
 */
esp_status esp_triplets_move(esp_adapter *a, const uint8_t *keep, const int64_t *more, float e0);
/* Adds the gradients of weight * mean over Q, P of ||Q Q^T - I||_F, ||P^T P - I||_F; its value. */
double esp_triplets_orthogonal(esp_adapter *a, double weight);
/* A step count of the configuration: below 1 a share of the task's steps. */
int64_t esp_triplets_steps(double x, int64_t total);
/* Importances are not decayed: their size is what ranks are judged by. */
void esp_triplets_no_decay(esp_adapter *a);
esp_status esp_triplets_init_normal(esp_adapter *a, esp_site *s);
void esp_triplets_state_write(const esp_adapter *a, struct json_t *j);
esp_status esp_triplets_state_read(esp_adapter *a, const struct json_t *j, const char *path);

/* triplets_config.c */
struct json_t *esp_triplets_pattern_write(const esp_adapter *a);
esp_status esp_triplets_pattern_read(const struct json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c);
struct json_t *esp_triplets_ranks_write(const esp_adapter *a);
void esp_triplets_config_write(const esp_adapter *a, struct json_t *j);
esp_status esp_triplets_config_read(const struct json_t *j, const char *path, esp_adapter_cfg *c);
esp_status esp_triplets_check(const esp_adapter_cfg *c);
esp_status esp_triplets_span(esp_adapter *a, int64_t total, int64_t *begin, int64_t *end);

/* Designated initializers of what all these kinds have. */
#define ESP_TRIPLETS                                                                                                   \
  .site_kinds = 1u << ESP_SITE_LINEAR, .mergeable = true, .targets = true, .declare = esp_triplets_declare,            \
  .tails = esp_triplets_tails, .output = esp_triplets_output, .tails_bwd = esp_triplets_tails_bwd,                     \
  .input_bwd = esp_triplets_input_bwd, .wants_output = esp_triplets_wants_output, .destroy = esp_triplets_destroy,     \
  .resized = esp_triplets_resized, .materialise = esp_triplets_materialise, .low_rank = esp_triplets_low_rank
#define ESP_TRIPLETS_STATE .state_write = esp_triplets_state_write, .state_read = esp_triplets_state_read
#define ESP_TRIPLETS_STATISTICS .n_states = 2, .state_names = {"sensitivity", "uncertainty"}

#endif
