/* config.json: a refusal has a message of one line that names the file; what is accepted is a description that the rest
 * of the program can compute with: sizes in range, heads that divide, finite numbers, tokens inside the vocabulary. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "model/desc.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void need(int ok) {
  if (!ok) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  esp_model_desc d;
  char *exact = malloc(size ? size : 1); /* exactly the bytes, so that reading past them is seen */
  if (!exact) return 0;
  memcpy(exact, data, size);
  esp_status st = esp_model_desc_parse(exact, size, "fuzz.json", &d);
  free(exact);
  if (st != ESP_OK) {
    const char *m = esp_error_message();
    need(st == ESP_ERR_DATA && !strncmp(m, "fuzz.json:", 10) && !strchr(m, '\n'));
    return 0;
  }
  need(d.layers >= 1 && d.layers <= ESP_MAX_LAYERS && d.hidden >= 1 && d.ffn >= 1 && d.vocab >= 1);
  need(d.heads >= 1 && d.kv_heads >= 1 && d.heads % d.kv_heads == 0 && d.head_dim >= 1 && d.max_positions >= 1);
  need(d.pos != ESP_POS_ROPE || d.head_dim % 2 == 0);
  need(isfinite(d.norm_eps) && isfinite(d.attn_scale) && d.attn_scale > 0);
  need(d.pos != ESP_POS_ROPE || (isfinite(d.rope_theta) && d.rope_theta >= 1.0f));
  need(d.rope_scaling == ESP_ROPE_NONE || d.rope_factor > 0);
  need(d.bos < d.vocab && d.pad < d.vocab && d.n_eos >= 0 && d.n_eos <= 8);
  for (int i = 0; i < d.n_eos; i++) need(d.eos[i] >= 0 && d.eos[i] < d.vocab);
  for (int i = 0; i < d.layers; i++) need(d.window[i] >= 0);
  return 0;
}
