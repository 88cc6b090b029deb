/* task_ranks.h: what the kinds share that give each task of a sequence low-rank factors of its own and keep those of
 * earlier tasks, frozen (olora_cl, incremental_rank, mora_rank).
 *
 * Site: y = W x + b + s sum_{t <= current} B_t (S_t * A_t drop(x)), with s = alpha/r or alpha/sqrt(r); S_t: selectors,
 * where the kind has them, else 1. mora_rank: gates that are functions of A x in the place of s and S (mora_rank.c).
 * The capacity for all tasks of the recipe is there from the start, because nothing then changes its address between
 * tasks; what is not used yet is frozen, takes part in no product and is in no file.
 *
 * The store is in the order of the tasks, so that what is trained is one stretch of it, and within a task the A of a
 * group lie back to back, so that its gradient is one product. Forward and backward see the factors of all tasks so far
 * as one LoRA of rank r * count: from the second task on they read a copy in which those of a site lie side by side,
 * A [count * r, in], B [out, count * r], and the sites of a group one behind the other (esp_task_ranks_pass). T and dT
 * have the same order: by site, then by task.
 */
#ifndef ESP_ADAPTERS_TASK_RANKS_H
#define ESP_ADAPTERS_TASK_RANKS_H

#include "adapters/internal.h"

typedef struct esp_task_site {
  int64_t rank; /* over all tasks so far (esp_adapter_rank reads it) */
  int64_t r;    /* of one task */
  float s;
  int64_t t0;       /* first column of T, with one task */
  void *b_all;      /* [out, count * r], in the copy */
  int *a, *b, *sel; /* per task; sel NULL: no selectors. sel[t]: [(t + 1) * r], over the factors of tasks 0..t */
} esp_task_site;

typedef struct esp_task_group {
  int n;
  esp_site *sites[3];
  int *first_a;  /* per task */
  int64_t width; /* columns of T of one task: the sum of the sites' r */
  bool uniform;  /* one s for all */
  void *a_all;   /* [count * width, in], in the copy */
  esp_tensor t, ts, dt;
  bool late_fwd, late_bwd; /* the base product had no room for the tails: added after it */
} esp_task_group;

typedef struct esp_task_ranks { /* a->impl */
  int tasks, current, furthest;
  void *copy;  /* backend memory, of the shadow's type; NULL: one task */
  bool copied; /* in this task, when these were params->writes and ->steps */
  uint64_t writes, steps;
  /* olora_cl: A_all A_now^T of all groups, [count * width, width] each, in fp32 */
  float *overlap, *overlap_host;
  int64_t overlap_size;
} esp_task_ranks;

esp_task_ranks *esp_task_ranks_of(const esp_adapter *a);
bool esp_task_ranks_select(const esp_adapter *a); /* the kind has selectors */
bool esp_task_ranks_gates(const esp_adapter *a);  /* its ranks gate themselves */

esp_status esp_task_ranks_open(esp_adapter *a);
esp_status esp_task_ranks_declare(esp_adapter *a, esp_group *g, const bool *hit);
esp_status esp_task_ranks_declare_last(esp_adapter *a);
esp_status esp_task_ranks_init(esp_adapter *a, esp_site *s);
void esp_task_ranks_destroy(esp_adapter *a);
esp_status esp_task_ranks_pass(esp_adapter *a);
/* A of all `count` tasks so far, of all sites of the group, as forward reads it after a pass has begun. */
esp_tensor esp_task_ranks_all_a(const esp_adapter *a, const esp_task_group *tg, int count);
int esp_task_ranks_tails(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max,
                         void **slot);
void esp_task_ranks_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot);
bool esp_task_ranks_wants_output(const esp_adapter *a);
int esp_task_ranks_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                             int max, void **slot);
void esp_task_ranks_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot);
/* The factors of tasks 0..task take part, those of `task` are trained. A task that was begun before is returned to
 * exactly: everything it had is frozen since. */
esp_status esp_task_ranks_begin(esp_adapter *a, int task);
bool esp_task_ranks_in_file(const esp_adapter *a, int index);
esp_status esp_task_ranks_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w);
int64_t esp_task_ranks_low_rank(esp_adapter *a, esp_site *s, float *A, float *B);

void esp_task_ranks_config_write(const esp_adapter *a, struct json_t *j);
esp_status esp_task_ranks_config_read(const struct json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c);
esp_status esp_task_ranks_config_check(const esp_adapter_cfg *c);

#endif
