/* background.h: a checkpoint that is written while training goes on, for backends whose memory is not the host's. The
 * values are copied into page-locked memory in one go, which takes milliseconds; hashing, writing and syncing the
 * files, which takes seconds, is a thread's work. */
#ifndef ESP_TRAIN_BACKGROUND_H
#define ESP_TRAIN_BACKGROUND_H

#include "train/checkpoint.h"

typedef struct esp_background esp_background;

/* Bytes of page-locked memory that a snapshot of this engine takes, 0: checkpoints of it are written at once. */
int64_t esp_background_bytes(const esp_engine *e);
/* Copies and starts. *b is created at first use. There is at most one at a time: join first. Rank 0. */
esp_status esp_background_start(esp_background **b, const esp_engine *e, const esp_run_state *s,
                                const esp_task_steps *tasks, const esp_matrix *matrix);
/* Waits for the one under way: how it went, and where it is ("" when there was none). b may be NULL. */
esp_status esp_background_join(esp_background *b, char path[ESP_PATH]);
bool esp_background_done(const esp_background *b); /* one was started and needs no more waiting */
void esp_background_destroy(esp_background *b);    /* joins; NULL is allowed */

#endif
