/* factors.h: what the kinds made of several small factor matrices share (loha, lokr, lotr, hut, pmss): adding and
 * filling parameters, memory for matrices that a step computes from the factors, and the configuration that LyCORIS
 * kinds have in PEFT. */
#ifndef ESP_ADAPTERS_FACTORS_H
#define ESP_ADAPTERS_FACTORS_H

#include "adapters/internal.h"

/* A parameter named <module path>.<suffix>, its own alignment; -1: no memory, error set. */
int esp_factor_add(esp_adapter *a, const esp_site *s, const char *suffix, int64_t rows, int64_t cols);
/* The same right behind its predecessor (first: aligned), so that several stack. */
int esp_factor_stack(esp_adapter *a, const esp_site *s, const char *suffix, int64_t rows, int64_t cols, bool first);
int esp_factor_vector(esp_adapter *a, const esp_site *s, const char *suffix, int64_t n); /* of one dimension */
/* torch's kaiming_uniform_(a = sqrt 5): U(-1/sqrt(fan_in), 1/sqrt(fan_in)); drawn from (seed, parameter name). */
esp_status esp_factor_uniform(esp_adapter *a, int index, int64_t fan_in);
esp_status esp_factor_constant(esp_adapter *a, int index, float value);

/* Backend memory for what a group computes anew in each pass (products of factors). One block serves all groups in
 * turn; it grows while groups are declared, never in a step. */
typedef struct esp_factor_scratch {
  void *data;
  int64_t bytes;
} esp_factor_scratch;
esp_status esp_factor_reserve(esp_adapter *a, esp_factor_scratch *s, int64_t bytes);
void esp_factor_release(esp_adapter *a, esp_factor_scratch *s);
static inline int64_t esp_factor_round(int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

/* Refuses the keys of lora that a kind has not: dropout, rslora, lora_bias, init. */
esp_status esp_factor_check(const esp_adapter_cfg *c);
double esp_factor_scale(const esp_adapter *a, const esp_site *s, int64_t r); /* alpha / r, alpha_pattern applied */
int64_t esp_factor_rank(const esp_adapter *a, const esp_site *s);            /* rank_pattern applied */

/* r, alpha and their patterns. */
void esp_factor_config_write(const esp_adapter *a, struct json_t *j);
esp_status esp_factor_config_read(const struct json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c);
/* The keys of PEFT's LycorisConfig: these and those of convolutions and dropout. */
void esp_lycoris_config_write(const esp_adapter *a, struct json_t *j);
esp_status esp_lycoris_config_read(const struct json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c);

#endif
