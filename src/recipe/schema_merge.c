/* schema_merge.c: the keys of after[].merge_tasks. */
#include "recipe/schema_rows.h"

#define STEP(field) .offset = offsetof(esp_after_step, field)
#define STEP_LIST(field, counter)                                                                                      \
  .offset = offsetof(esp_after_step, field), .count_offset = offsetof(esp_after_step, counter)
#define OWN .def = "default", .word = "default", .word_value = ESP_AFTER_OWN

static const esp_key merge_tasks_keys[] = {
    {"method", ESP_T_WORD, STEP(method.name), .flags = ESP_K_REQUIRED,
     WORDS("linear", "task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties", "breadcrumbs",
           "breadcrumbs_ties", "magmax", "lines", "opcm", "model_stock", "mwa", "slerp", "nuslerp", "svd", "cat",
           "ties_svd", "dare_ties_svd", "dare_linear_svd", "magnitude_prune_svd"),
     .help = "docs/merging.md; svd, cat and those that end in _svd make an adapter only"},
    {"out", ESP_T_RUN_PATH, STEP(out), .def = "merged_tasks", .help = "folder, relative to checkpoint.output_dir"},
    {"as", ESP_T_SWITCH, STEP(method.as_adapter), .def = "model", WORDS("model", "adapter"),
     .help = "a model folder, or one LoRA of the tasks' adapters"},
    {"dtype", ESP_T_WORD, STEP(dtype), WORDS("bf16", "fp16", "fp32"), .help = "of a model; null: as stored"},
    {"weight", ESP_T_NUMBERS, STEP_LIST(method.weight, method.n_weight), .def = "[]", RANGE(-1e6, 1e6),
     .help = "one weight for all tasks or one each; []: the method's own"},
    {"density", ESP_T_NUMBERS, STEP_LIST(method.density, method.n_density), .def = "[]", .flags = ESP_K_ABOVE_MIN,
     RANGE(0, 1), .help = "share of the entries that stay, one for all tasks or one each"},
    {"lambda", ESP_T_NUMBER, STEP(method.lambda), OWN, RANGE(-1e6, 1e6), .help = "factor of the merged change"},
    {"gamma", ESP_T_NUMBER, STEP(method.gamma), OWN, .flags = ESP_K_BELOW_MAX, RANGE(0, 1),
     .help = "breadcrumbs: share of the largest entries that leave"},
    {"t", ESP_T_NUMBER, STEP(method.t), OWN, RANGE(0, 1), .help = "slerp, nuslerp: 0 is the first task, 1 the second"},
    {"alpha", ESP_T_NUMBER, STEP(method.alpha), OWN, RANGE(0, 1),
     .help = "opcm: share of the spectrum that is closed to later tasks"},
    {"lines", ESP_T_NUMBERS, STEP_LIST(method.lines, method.n_lines), .def = "[]", RANGE(-1e6, 1e6),
     .help = "alpha, or [alpha, beta]: block l of L is multiplied by alpha + beta l/(L-1)"},
    {"metric", ESP_T_STRING, STEP(method.metric),
     .help = "mwa: the evaluation set whose scores are the metrics; null: the mean over the tasks' own sets"},
    {"power", ESP_T_NUMBER, STEP(method.power), OWN, RANGE(0, 1e6), .help = "mwa: weights are metrics to this power"},
    {"rescale", ESP_T_WORD, STEP(method.rescale), WORDS("inverse", "l1", "none"),
     .help = "dare: how what stays makes up for what leaves; null: inverse"},
    {"normalize", ESP_T_WORD, STEP(method.normalize), WORDS("yes", "no"),
     .help = "divide by the weights; null: as the method does"},
    {"majority_sign", ESP_T_WORD, STEP(method.majority), WORDS("total", "frequency"),
     .help = "ties: what elects a sign; null: total"},
    {"seed", ESP_T_SEED, STEP(method.seed), .def = "0", .help = "dare: of the masks"},
    {"rank", ESP_T_INT, STEP(method.rank), .def = "auto", .word = "auto", RANGE(1, 65536),
     .help = "of an adapter at most; auto: what carries the merge, where it is cut the tasks' largest"},
};
const esp_object esp_schema_merge_tasks = {"merge_tasks",
                                           "Merges what each task of the run learned, in order: the adapters of all "
                                           "tasks against the first base, or, with the "
                                           "policy merge_then_new, the models after each task.",
                                           merge_tasks_keys, COUNT(merge_tasks_keys), 0};
