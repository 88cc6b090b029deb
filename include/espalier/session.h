/* session.h: stepping by hand: load a model, attach an adapter, train on the caller's own batches, save, generate. */
#ifndef ESPALIER_SESSION_H
#define ESPALIER_SESSION_H

#include <stddef.h>
#include <stdint.h>

#include "espalier/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct esp_session esp_session;

/* Opens a Hugging Face model directory; reads headers only. Settings are "key=value" of the recipe's sections model,
 * adapter, optim, data, memory and parallel, and seed: "model.dtype=fp32", "adapter.r=8", "optim.lr=1e-3". */
ESP_API esp_status esp_session_open(const char *model_dir, const char *const *settings, int n_settings,
                                    esp_session **out);
ESP_API void esp_session_close(esp_session *s); /* NULL is allowed */

/* A new adapter as the settings say (adapter_dir NULL), or one from a PEFT directory. At most once, before anything
 * below that computes; without it the base model is used. */
ESP_API esp_status esp_session_attach(esp_session *s, const char *adapter_dir);

/* One more adapter from a PEFT directory, with the weight of its effect: it is active beside the attached one and those
 * added before, and is not trained. After attach (or without), before anything below that computes. */
ESP_API esp_status esp_session_add(esp_session *s, const char *adapter_dir, double weight);

typedef struct esp_example { /* one sample: weights[i] is the loss weight of predicting ids[i]; weights[0] is not used
                              */
  const int32_t *ids;
  const float *weights; /* NULL: 1 for every token */
  int64_t n;
} esp_example;
typedef struct esp_step_result {
  int64_t step; /* 1-based */
  double loss, accuracy, grad_norm, lr, trained_tokens, seconds;
  double penalty; /* of the adapter kind, beside the loss */
} esp_step_result;

/* Text to ids (esp_free) and back. `special`: add what the tokenizer's post-processor adds (BOS and the like). */
ESP_API esp_status esp_session_encode(esp_session *s, const char *text, int special, int32_t **ids, int64_t *n);
ESP_API esp_status esp_session_decode(esp_session *s, const int32_t *ids, int64_t n, char **text);
ESP_API int32_t esp_session_eos(esp_session *s); /* -1: none */

/* The pass over data that adapter.init eva, corda and lora_ga, and the types fish and spu, start from: the examples in
 * batches of `size`, as many of them as adapter.init_batches says. Before the first step; nothing to do for others.
 * Without it whatever computes with such an adapter refuses. Not beside added adapters. */
ESP_API esp_status esp_session_calibrate(esp_session *s, const esp_example *list, int n, int size);

/* One optimizer step over a batch: forward, loss, backward, clipping, update. Loss is per trained token. */
ESP_API esp_status esp_session_step(esp_session *s, const esp_example *batch, int n, esp_step_result *out);
/* Prompt and completion as text: the completion and the end-of-text token behind it are trained. */
ESP_API esp_status esp_session_step_text(esp_session *s, const char *const *prompts, const char *const *completions,
                                         int n, esp_step_result *out);
/* Forward only. */
ESP_API esp_status esp_session_loss(esp_session *s, const esp_example *batch, int n, esp_step_result *out);
/* For schedules: multiplies optim.lr from the next step on. */
ESP_API void esp_session_set_lr_factor(esp_session *s, double factor);
ESP_API void esp_session_parameters(const esp_session *s, int64_t *trainable, int64_t *total);

/* A PEFT adapter directory. */
ESP_API esp_status esp_session_save(esp_session *s, const char *dir);

typedef struct esp_generate_options { /* all zero: greedy, 64 tokens, stop at the end-of-text token */
  int64_t max_new_tokens;
  double temperature; /* 0: greedy */
  double top_p;       /* 0: off */
  int top_k;          /* 0: off */
  uint64_t seed;
  int raw; /* the prompt is taken as it is: no BOS */
  /* Per prompt the one adapter it uses: 0 is the first that was attached or added, -1 the base. NULL: all of them. */
  const int32_t *adapters;
} esp_generate_options;
/* One completion per prompt, in one batch; each text is the caller's (esp_free). */
ESP_API esp_status esp_session_generate(esp_session *s, const char *const *prompts, int n,
                                        const esp_generate_options *options, char **texts);

#ifdef __cplusplus
}
#endif
#endif
