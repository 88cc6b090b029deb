/* memory.h: samples of finished tasks that a strategy keeps, in its arrays "memory.task" and "memory.index".
 *
 * Which are kept when there is not room for all (sampler):
 *   reservoir  each sample seen so far with the same probability (Vitter 1985): those of the smallest random keys
 *   balanced   as many of each task, and within a task as many of each label, at random
 *   loss       as many of each task, those of the largest mean loss at the end of their task
 *   herding    as many of each task, chosen one by one so that the mean of their features on the frozen base
 *              (features.h) stays nearest to the mean over the task (iCaRL, Rebuffi et al. 2017, its algorithm 4, with
 *              the task in the place of the class)
 * Of a task that has to make room the last chosen go first. */
#ifndef ESP_TASKS_MEMORY_H
#define ESP_TASKS_MEMORY_H

#include "tasks/strategy.h"

typedef struct esp_memory_cfg {
  double buffer;       /* from 1: samples in all; below: share of each finished task's samples */
  int64_t bytes;       /* most bytes of tokens and weights, 0: any */
  const char *sampler; /* reservoir | balanced | loss | herding */
} esp_memory_cfg;

/* At a task's end, after training. */
esp_status esp_memory_add(esp_strategy *s, const esp_sequence *q, const esp_memory_cfg *c);
int64_t esp_memory_count(const esp_strategy *s);
esp_sample esp_memory_at(const esp_strategy *s, int64_t i);
/* What the kept tokens and weights take. */
int64_t esp_memory_bytes(const esp_strategy *s, const esp_sequence *q);
/* n drawn for step `step`: the memory is gone through in random order, again and again. The same on all ranks. */
esp_status esp_memory_draw(const esp_strategy *s, const esp_sequence *q, int64_t first, int64_t n, esp_sample *out);

#endif
