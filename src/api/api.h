/* api.h: what the files of this room share. */
#ifndef ESP_API_API_H
#define ESP_API_API_H

#include "espalier/espalier.h"
#include "io/json.h"
#include "train/train.h"

struct esp_job {
  esp_recipe *recipe;
};

/* hooks.c: evaluation and merging for the loop. */
extern const esp_train_hooks esp_api_hooks;
/* after.c: the `after` steps of a finished run. Rank 0 only. */
esp_status esp_api_after(const esp_recipe *r, const esp_run_options *opt);
/* after_tasks.c: the merge_tasks steps, of before and after: their options, at the start; one of after, when the run
 * has finished; see esp_train_hooks.merge_before. */
esp_status esp_api_after_check(const esp_recipe *r);
esp_status esp_api_merge_tasks(const esp_recipe *r, int step);
esp_status esp_api_merge_before(void *ctx, const esp_recipe *r, int task, const char *out, const esp_adapter *into,
                                char *note, size_t size);
/* facts.c: an object of facts as JSON or as lines of key and value; the text is the caller's. */
esp_status esp_api_facts_text(json_t *facts, int json, char **text);

#endif
