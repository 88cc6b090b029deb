/* migu.c: only rows of large output magnitude are updated. MIGU, Du et al. 2024, "Unlocking Continual Learning
 * Abilities in Language Models". With h the output of a matrix, [tokens, rows], n_j = mean over tokens of |h_j| / sum_k
 * |h_k|, and the gradients of the rows with the smallest n_j, the share `threshold` of them, are zero. Of a whole
 * weight h is the layer's output; of LoRA's B also, and of its A it is A x.
 *
 * The authors read n in every forward pass. It describes the task more than the step, so here it is read from a pass of
 * its own over a few samples, when a task begins and every `interval` steps: a step costs one product of vectors. An
 * optimizer with momentum moves a row on for a few steps after its gradient has become zero.
 *
 * mask random holds as many rows of each matrix as magnitude does, drawn at the same steps: what is gained beyond it is
 * owed to the choice of the rows. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/linalg.h"
#include "core/rng.h"
#include "tasks/internal.h"
#include "tasks/projection.h"

enum { HELD = 60 }; /* stream of ESP_RNG_DATA */

typedef struct ranked {
  double size;
  int64_t row;
} ranked;

static int by_size(const void *a, const void *b) {
  const ranked *x = a, *y = b;
  if (x->size != y->size) return x->size < y->size ? -1 : 1;
  return x->row < y->row ? -1 : 1;
}

/* Zeroes the rows of mask [n, width] of the smallest r[n], which is sorted and freed. */
static void hold(ranked *r, int64_t n, double threshold, float *mask, int64_t width) {
  qsort(r, (size_t)n, sizeof *r, by_size);
  int64_t held = (int64_t)floor(threshold * (double)n + 1e-9);
  for (int64_t j = 0; j < held; j++) memset(mask + r[j].row * width, 0, (size_t)width * sizeof *mask);
  esp_mem_free(r);
}

/* Of the columns of h (n of them, ld apart). */
static esp_status mask_rows(const float *h, int64_t tokens, int64_t ld, int64_t n, double threshold, float *mask,
                            int64_t width) {
  ranked *r = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *r);
  if (!r) return ESP_ERR_MEMORY;
  for (int64_t j = 0; j < n; j++) r[j].row = j;
  for (int64_t t = 0; t < tokens; t++) {
    double sum = 0;
    for (int64_t j = 0; j < n; j++) sum += fabs((double)h[t * ld + j]);
    for (int64_t j = 0; sum > 0 && j < n; j++) r[j].size += fabs((double)h[t * ld + j]) / sum;
  }
  hold(r, n, threshold, mask, width);
  return ESP_OK;
}

/* Of what is drawn for each row of parameter `p` at this step of the run. */
static esp_status mask_drawn(const esp_sequence *q, int p, int64_t step, double threshold, float *mask) {
  const esp_param *w = &q->adapter->params->list[p];
  ranked *r = esp_mem_alloc(ESP_MEM_HOST, (size_t)w->shape[0] * sizeof *r);
  if (!r) return ESP_ERR_MEMORY;
  uint64_t stream = esp_rng_stream(ESP_RNG_DATA, HELD, (uint64_t)step, (uint64_t)p);
  for (int64_t j = 0; j < w->shape[0]; j++) r[j] = (ranked){(double)esp_rng_u32(q->seed, stream, (uint64_t)j), j};
  hold(r, w->shape[0], threshold, mask + w->offset, w->shape[1]);
  return ESP_OK;
}

static esp_status mask_factors(const esp_sequence *q, const esp_trained *t, const float *x, int64_t tokens,
                               double threshold, float *mask) {
  const esp_params *ps = q->adapter->params;
  const esp_param *a = &ps->list[t->a];
  int64_t r = a->shape[0], in = a->shape[1];
  float *A = esp_mem_alloc(ESP_MEM_HOST, (size_t)(r * in + tokens * r) * sizeof *A), *h = A + r * in;
  if (!A) return ESP_ERR_MEMORY;
  esp_params_get(ps, t->a, A);
  esp_linalg_gemm(false, true, tokens, r, in, 1.0f, x, in, A, in, 0.0f, h, r);
  esp_status st = mask_rows(h, tokens, r, r, threshold, mask + a->offset, in);
  esp_mem_free(A);
  return st;
}

static esp_status measure(esp_strategy *s, const esp_sequence *q, int64_t step) {
  esp_status st = ESP_OK;
  esp_observed seen = {0};
  esp_sample *some = NULL;
  int64_t total = q->adapter->params->total, count;
  double threshold = s->cfg->migu.threshold;
  float *mask = NULL;
  esp_trained *list;
  int n;
  esp_tensor device = esp_strategy_flat(s, "mask", q);
  if (!device.data) return ESP_ERR_MEMORY;
  ESP_TRY(esp_trained_list(s, q, &list, &n));
  bool drawn = !strcmp(s->cfg->migu.mask, "random");
  esp_sequence other = *q; /* other samples each time */
  other.seed = q->seed + (uint64_t)step;
  if (!drawn) {
    ESP_GOTO(esp_sequence_some(&other, s->cfg->migu.samples, &some, &count));
    ESP_GOTO(esp_observe(q, list, n, some, count, s->cfg->migu.tokens, true, &seen));
  }
  mask = esp_mem_alloc(ESP_MEM_HOST, (size_t)total * sizeof *mask);
  if (!mask) ESP_GOTO(ESP_ERR_MEMORY);
  for (int64_t i = 0; i < total; i++) mask[i] = 1.0f;
  for (int i = 0; i < n && !esp_backend_counts(q->be); i++) {
    const esp_site *site = list[i].site;
    const esp_group *g = site->group;
    int out = list[i].weight >= 0 ? list[i].weight : list[i].b;
    const esp_param *p = &q->adapter->params->list[out];
    if (drawn) {
      ESP_GOTO(mask_drawn(q, out, step, threshold, mask));
      if (list[i].a >= 0) ESP_GOTO(mask_drawn(q, list[i].a, step, threshold, mask));
      continue;
    }
    ESP_GOTO(mask_rows(seen.y[g->index] + site->col0, seen.rows[g->index], g->out, site->out, threshold,
                       mask + p->offset, p->shape[1]));
    if (list[i].a >= 0) ESP_GOTO(mask_factors(q, &list[i], seen.x[g->index], seen.rows[g->index], threshold, mask));
  }
  q->be->ops->upload(q->be, device.data, mask, total * (int64_t)sizeof *mask);
out:
  esp_observed_deinit(&seen);
  esp_mem_free(some);
  esp_mem_free(mask);
  esp_mem_free(list);
  return st;
}

static esp_status open(esp_strategy *s, const esp_sequence *q) {
  esp_trained *list;
  int n;
  ESP_TRY(esp_trained_list(s, q, &list, &n));
  esp_mem_free(list);
  return ESP_OK;
}

static esp_status project(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  if (t->task_step % s->cfg->migu.interval == 0) ESP_TRY(measure(s, q, t->step));
  esp_tensor g = esp_sequence_gradient(q);
  q->be->ops->mul(q->be, g, g, esp_strategy_flat(s, "mask", q), 0.0f);
  return ESP_OK;
}

const esp_strategy_kind esp_strategy_migu = {
    .name = "migu",
    .summary = "only rows of large output magnitude get a gradient (Du et al. 2024)",
    .open = open,
    .project = project,
};
