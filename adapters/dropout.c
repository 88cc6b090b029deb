/* dropout.c: dropout of an adapter's input, the same for every kind: one mask per (group, adapter), drawn by counters,
 * so that backward and a recomputed block draw it again. */
#include "adapters/internal.h"
#include "core/rng.h"

bool esp_drops(const esp_adapter *a, const esp_run *run) {
  return run->train && a->trainable && a->cfg.dropout > 0;
}

void esp_dropout(esp_adapter *a, esp_run *run, const esp_group *g, esp_tensor y, esp_tensor x, float beta) {
  uint64_t stream = esp_rng_stream(ESP_RNG_DROPOUT, (uint64_t)run->part, (uint64_t)g->index,
                                   esp_rng_stream_name(ESP_RNG_DROPOUT, a->name));
  run->be->ops->dropout(run->be, y, x, (float)a->cfg.dropout, run->seed, run->draw, stream, beta);
}

esp_tensor esp_dropped(esp_adapter *a, esp_run *run, const esp_group *g, esp_tensor x) {
  if (!esp_drops(a, run)) return x;
  esp_tensor y = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), esp_tensor_cols(&x));
  esp_dropout(a, run, g, y, x, 0.0f);
  return y;
}
