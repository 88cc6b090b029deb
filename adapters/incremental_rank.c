/* incremental_rank.c: incremental rank updates (Hyder et al. 2022, arXiv:2207.09074): the weight is a sum of rank-1
 * matrices, of which each task adds a few and weighs all that are there with a selector of its own,
 *   y = W x + b + s sum_{t <= now} B_t (S_now,t * A_t drop(x)).
 * Task `now` trains A_now, B_now and S_now (one weight for each factor of the tasks 0..now); the factors and selectors
 * of earlier tasks are frozen. Task k is therefore recalled exactly by its own selector over the factors of 0..k,
 * whatever was learned since: esp_task_ranks_begin, or the key `task` of the saved configuration.
 *
 * The paper trains its networks from the factors alone, W = U diag(s) V^T; here they are added to the frozen base, as
 * in the other kinds. Where a selector starts is not in the source at hand: here at the last task's for the old factors
 * and at 1 for the new ones, so that, the new B being zero, a task begins exactly where the one before it ended.
 */
#include "adapters/task_ranks.h"

const esp_adapter_kind esp_kind_incremental_rank = {
    .name = "incremental_rank",
    .peft_type = "INCREMENTAL_RANK",
    .summary = "rank-1 factors added by each task, old ones frozen, a selector per task (arXiv:2207.09074)",
    .site_kinds = 1u << ESP_SITE_LINEAR,
    .mergeable = true,
    .targets = true,
    .open = esp_task_ranks_open,
    .declare = esp_task_ranks_declare,
    .declare_last = esp_task_ranks_declare_last,
    .init = esp_task_ranks_init,
    .pass = esp_task_ranks_pass,
    .tails = esp_task_ranks_tails,
    .output = esp_task_ranks_output,
    .tails_bwd = esp_task_ranks_tails_bwd,
    .input_bwd = esp_task_ranks_input_bwd,
    .wants_output = esp_task_ranks_wants_output,
    .destroy = esp_task_ranks_destroy,
    .task_begin = esp_task_ranks_begin,
    .in_file = esp_task_ranks_in_file,
    .materialise = esp_task_ranks_materialise,
    .low_rank = esp_task_ranks_low_rank,
    .config_write = esp_task_ranks_config_write,
    .config_read = esp_task_ranks_config_read,
    .config_check = esp_task_ranks_config_check,
};
