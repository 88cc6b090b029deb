/* checkpoint.h: the complete state of a run as a directory, written atomically and hashed.
 *
 *   checkpoints/checkpoint-00000120/            after step 120, inside a task
 *   checkpoints/checkpoint-00000160-task2/      between tasks: two are done, the third has not begun
 *     params.safetensors   fp32 masters, by parameter name
 *     optim.safetensors    "<state>.<parameter>"
 *     state.json           cursor, recipe hash, ranks, watchdog, lengths of the metric files, data counts
 *     adapter.json, adapter.safetensors   ranks and statistics of kinds whose ranks move in a run
 *     strategy.json, strategy.safetensors what strategies against forgetting remember
 *     matrix.json          the score matrix so far (when there are evaluation sets)
 *     manifest.json        bytes and xxh3-128 of the others; checked before anything is believed
 */
#ifndef ESP_TRAIN_CHECKPOINT_H
#define ESP_TRAIN_CHECKPOINT_H

#include "train/train.h"
#include "train/watchdog.h"

typedef struct esp_run_state { /* plain bytes: broadcast as it is */
  esp_cursor at;
  esp_watch watch;
  int64_t optim_step, backwards;
  int64_t jsonl_bytes, events_bytes;
  double last_loss, best;
  int32_t has_best, ranks;
  int32_t appended; /* the checkpoint is the end of a run of so many tasks, to which others were added; 0: not */
  char recipe_hash[33], fingerprint[33];
  char base[ESP_PATH]; /* model directory of the present task when it is not the recipe's, relative to the run */
} esp_run_state;

/* Rank 0 only. tasks: what esp_task_count said, to notice changed data on resume. values: the masters and then each
 * state of the optimizer, copied to the host before (params->total floats each); NULL: read from the backend. path
 * receives the directory. */
esp_status esp_checkpoint_write(const esp_engine *e, const esp_run_state *s, const esp_task_steps *tasks,
                                const esp_matrix *matrix, const float *values, char path[ESP_PATH]);
/* What writing one, or the adapter, holds for its time. */
int64_t esp_checkpoint_bytes(const esp_engine *e);
/* Newest complete checkpoint. Damaged ones are passed over and counted. path "" when there is none. matrix may be
 * NULL. Checks the recipe hash and the rank count: ESP_ERR_RECIPE. */
esp_status esp_checkpoint_find(const esp_recipe *r, int ranks, const esp_task_steps *tasks, esp_run_state *s,
                               esp_matrix *matrix, char path[ESP_PATH], int *damaged);
/* Parameters and optimizer state, on every rank: rank 0 reads, the others receive. */
esp_status esp_checkpoint_load(esp_engine *e, const char *path);
/* Removes all but the newest `keep` (0: all are kept) and whatever an interrupted write left behind. */
esp_status esp_checkpoint_prune(const esp_recipe *r, int keep);
/* Every file is as the manifest says. */
esp_status esp_checkpoint_verify(const char *path);

#endif
