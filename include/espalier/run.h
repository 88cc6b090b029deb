/* run.h: what a run tells its caller (events), how it is stopped, and what a plan says. */
#ifndef ESPALIER_RUN_H
#define ESPALIER_RUN_H

#include <stdint.h>

#include "espalier/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- stopping: safe to call from a signal handler. A run finishes its step, writes a complete checkpoint and returns
 * ESP_ERR_INTERRUPTED; `resume` then continues with the same bits. ---- */
ESP_API void esp_request_stop(void);
ESP_API void esp_clear_stop(void);
ESP_API int esp_stop_requested(void);

/* ---- events ---- */
typedef enum esp_event_kind {
  ESP_EVENT_PHASE,      /* phase changed: "plan", "data", "load", "train", "eval", "after" */
  ESP_EVENT_TASK_BEGIN, /* task, task_index, task_steps */
  ESP_EVENT_STEP,       /* one optimizer step is done: all numbers below */
  ESP_EVENT_EVAL,       /* one evaluation set is done: set, metric, score */
  ESP_EVENT_CHECKPOINT, /* path of a complete checkpoint */
  ESP_EVENT_TASK_END,   /* path of the task's adapter directory */
  ESP_EVENT_RUN_END,    /* path of the run directory */
  ESP_EVENT_NOTE        /* text: a counted fact (samples dropped, resumed from, ...) */
} esp_event_kind;

typedef struct esp_event {
  esp_event_kind kind;
  const char *phase;         /* of this moment; never NULL */
  const char *task;          /* "" outside a task */
  int task_index, n_tasks;   /* 0-based */
  int64_t step, total_steps; /* of the whole run, 1-based after a step */
  int64_t task_step, task_steps;
  double epoch;          /* share of passes over the task's data */
  double loss, accuracy; /* per trained token, before the update */
  double lr, grad_norm;  /* norm before clipping */
  int64_t tokens;        /* tokens of this step, all ranks, padding excluded */
  double trained_tokens; /* their loss weight */
  double tokens_per_second, step_seconds, eta_seconds;
  int64_t memory_now, memory_peak; /* bytes of the process's own allocations on this rank */
  const char *set, *metric;        /* EVAL */
  double score;                    /* EVAL */
  int has_malformed;               /* EVAL: the answers of this set are labels */
  double malformed;                /* EVAL: share of them that are none of the labels */
  const char *path;                /* CHECKPOINT, TASK_END, RUN_END */
  const char *text;                /* NOTE */
  double penalty;                  /* of the adapter kind, beside the loss */
  int64_t ranks_kept, rank_budget; /* kinds that move ranks: in force, and allowed by the schedule; 0: others */
} esp_event;
/* Called on the thread that called the run, on rank 0 only. Strings live until it returns. */
typedef void (*esp_event_fn)(void *ctx, const esp_event *event);

/* ---- a run ---- */
typedef struct esp_run_options { /* all zero: the defaults */
  esp_event_fn on_event;
  void *ctx;
  int overwrite;        /* a finished or unfinished run in the output directory is removed first, else it is an error */
  int64_t stop_after;   /* > 0: as if stopped by a signal after this many steps of the whole run */
  const char *ensemble; /* evaluation: a second adapter directory; both answer, by the larger of their probabilities */
} esp_run_options;

typedef struct esp_run_result {
  int64_t steps;       /* of the whole run, earlier parts included */
  double seconds;      /* of this call */
  double last_loss;    /* of the last step */
  int64_t tokens;      /* seen by this call */
  int64_t memory_peak; /* bytes of the process's own allocations in host memory */
  int64_t device_peak; /* the same on the device; 0: none is used */
  char device[64];     /* "cpu", "cuda:0 NVIDIA H200" */
  int64_t trainable, parameters;
  int n_tasks; /* matrix: filled when evaluation sets exist, else has_matrix 0 */
  int has_matrix;
  double acc, bwt, fwt, forgetting, lowest;
} esp_run_result;

/* ---- a plan: found by running the same code on the backend that only counts ---- */
typedef struct esp_plan_task {
  char name[64];
  int64_t samples, rows, steps; /* rows of one epoch; optimizer steps of the task */
  int64_t tokens;               /* of the whole task, padding included */
  double trained_tokens;        /* loss weight of one epoch */
  double flops;                 /* of the whole task */
} esp_plan_task;

typedef struct esp_plan {
  int64_t peak_bytes;         /* of the process's own allocations in host memory on one rank, at their highest */
  int64_t category_bytes[16]; /* at that moment's categories' own peaks, host and device together */
  const char *category_name[16];
  int n_categories;
  int64_t limit_bytes;                           /* memory.limit, resolved */
  char device[64];                               /* "cpu" or "cuda" */
  int64_t device_peak_bytes, device_limit_bytes; /* on the device; limit 0: there is none here to ask */
  int64_t device_overhead_bytes;                 /* of the limit, what context and libraries take */
  int fits;
  int64_t steps, tokens;
  double flops, flops_per_step;
  int64_t trainable, parameters;
  int64_t micro_batch_tokens; /* the largest micro-batch, padded */
  int ranks;
  int n_tasks;
  esp_plan_task *tasks;
} esp_plan;
ESP_API void esp_plan_free(esp_plan *plan); /* NULL is allowed */

#ifdef __cplusplus
}
#endif
#endif
