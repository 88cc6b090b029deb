/* calibrate.c: one micro-batch of the pass over data that some kinds need before they are trained (a mask from
 * gradients, first values from activations): the frozen base alone, with hooks that only look. */
#include <limits.h>

#include "adapters/internal.h"

static void look_forward(void *ctx, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  esp_adapter *a = ctx;
  a->kind->see(a, run, g, x, (esp_tensor){0});
}

static void look_backward(void *ctx, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, void **slot) {
  esp_adapter *a = ctx;
  a->kind->see(a, run, g, x, dy);
}

static int lowest_seen(void *ctx) {
  const esp_adapter *a = ctx;
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites), layers = esp_model_describe(a->model)->layers, low = INT_MAX;
  for (int i = 0; i < n; i++) {
    if (!a->targeted[i]) continue;
    int at = sites[i]->layer < 0 ? layers : sites[i]->layer;
    if (at < low) low = at;
  }
  return low;
}

esp_status esp_adapter_calibrate(esp_adapter *a, esp_stack *stack, const esp_batch *b, esp_ckpt_mode ckpt) {
  bool gradients = false;
  if (!a->kind->wants_data || a->kind->wants_data(a, &gradients) <= 0) return ESP_OK;
  esp_adapter_hooks look = {.ctx = a, .lowest_layer = lowest_seen};
  if (gradients)
    look.output_bwd = look_backward;
  else
    look.output = look_forward;
  const esp_adapter_hooks *before = esp_model_hooks(a->model);
  esp_model_set_hooks(a->model, &look);
  /* scale 1: the gradient of each sequence's own sum of log-probabilities */
  esp_status st = esp_model_step(a->model, stack, b, ckpt, gradients, 1.0f, 0, 0, NULL, NULL);
  if (st == ESP_OK) st = esp_backend_sync(a->params->be);
  esp_model_set_hooks(a->model, before);
  return st;
}
