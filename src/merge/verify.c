#include <math.h>
#include <string.h>

#include "core/rng.h"
#include "merge/open.h"

enum { LENGTH = 32 };

static esp_status logits_of(const esp_merge_inputs *in, const int32_t *ids, float *logits) {
  esp_stack stack;
  /* generous: every activation of 32 tokens of any layer is small beside the weights */
  const esp_model_desc *d = esp_model_describe(in->model);
  int64_t width = 16 * d->hidden + 8 * d->ffn + 8 * (int64_t)d->heads * d->head_dim + 2 * d->vocab;
  ESP_TRY(esp_stack_init(&stack, in->be, LENGTH * width * 4 * (d->layers + 4) + (64 << 20)));
  esp_status st = esp_model_sequence_logits(in->model, &stack, ids, LENGTH, logits);
  esp_stack_deinit(&stack);
  return st;
}

static int64_t argmax(const float *x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; i++)
    if (x[i] > x[best]) best = i;
  return best;
}

esp_status esp_merge_verify(const esp_merge_spec *spec, int64_t samples, esp_verify_stats *out) {
  esp_status st;
  esp_merge_inputs before = {0}, after = {0};
  float *a = NULL, *b = NULL;
  *out = (esp_verify_stats){0};
  ESP_GOTO(esp_merge_open(spec, ESP_F32, true, &before));
  esp_merge_spec merged = {.base = spec->out};
  ESP_GOTO(esp_merge_open(&merged, ESP_F32, true, &after));
  int64_t vocab = esp_model_describe(before.model)->vocab;
  a = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(LENGTH * vocab) * 4);
  b = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(LENGTH * vocab) * 4);
  if (!a || !b) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  double largest = 0, agree = 0;
  for (int64_t k = 0; k < samples; k++) {
    int32_t ids[LENGTH];
    for (int i = 0; i < LENGTH; i++)
      ids[i] =
          (int32_t)esp_rng_below(0, esp_rng_stream(ESP_RNG_DATA, 7, 0, 0), (uint64_t)(k * LENGTH + i), (uint64_t)vocab);
    ESP_GOTO(logits_of(&before, ids, a));
    ESP_GOTO(logits_of(&after, ids, b));
    for (int64_t i = 0; i < LENGTH * vocab; i++) {
      double d = fabs((double)a[i] - b[i]);
      if (!(d <= out->max_abs)) out->max_abs = d;
      if (fabs((double)a[i]) > largest) largest = fabs((double)a[i]);
    }
    for (int i = 0; i < LENGTH; i++) agree += argmax(a + i * vocab, vocab) == argmax(b + i * vocab, vocab);
    out->rows += LENGTH;
  }
  out->max_rel = largest > 0 ? out->max_abs / largest : 0;
  out->top1_agreement = out->rows ? agree / (double)out->rows : 1;
out:
  esp_mem_free(a);
  esp_mem_free(b);
  esp_merge_close(&before);
  esp_merge_close(&after);
  return st;
}
