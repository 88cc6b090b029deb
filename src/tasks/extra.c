#include "tasks/extra.h"

#include "core/rng.h"

void esp_extra_deinit(esp_extra *e) {
  esp_mem_free(e->list);
  esp_rows_deinit(&e->rows);
  *e = (esp_extra){0};
}

esp_status esp_extra_draw(esp_extra *e, const esp_sequence *q, uint64_t stream, int64_t task_step, int64_t n,
                          double *weight) {
  e->n = 0;
  if (e->count == 0) return ESP_OK;
  if (n > e->cap) {
    int64_t *grown = esp_mem_realloc(ESP_MEM_HOST, e->list, (size_t)n * sizeof *grown);
    if (!grown) return ESP_ERR_MEMORY;
    e->list = grown;
    e->cap = n;
  }
  int64_t round = -1, *perm = esp_mem_alloc(ESP_MEM_HOST, (size_t)e->count * sizeof *perm);
  if (!perm) return ESP_ERR_MEMORY;
  for (int64_t i = 0; i < n; i++) {
    int64_t at = task_step * n + i, len;
    const int32_t *ids;
    const float *w;
    if (at / e->count != round) {
      round = at / e->count;
      esp_rng_permutation(q->seed, esp_rng_stream(ESP_RNG_DATA, stream, (uint64_t)q->task, (uint64_t)round), e->count,
                          perm);
    }
    e->list[i] = perm[at % e->count];
    e->sample(e->ctx, e->list[i], &ids, &w, &len);
    for (int64_t t = 1; t < len; t++) *weight += (double)w[t];
  }
  e->n = n;
  esp_mem_free(perm);
  return ESP_OK;
}

static int64_t longest(const esp_extra *e) {
  int64_t best = 0, most = -1, n;
  const int32_t *ids;
  const float *w;
  for (int64_t i = 0; i < e->count; i++) {
    e->sample(e->ctx, i, &ids, &w, &n);
    if (n > most) most = n, best = i;
  }
  return best;
}

esp_status esp_extra_rows(esp_extra *e, const esp_sequence *q, const int64_t *list, int64_t n) {
  bool counting = esp_backend_counts(q->be);
  int64_t most = counting ? longest(e) : 0, len;
  const int32_t *ids;
  const float *w;
  esp_rows_clear(&e->rows);
  for (int64_t i = 0; i < n; i++) {
    e->sample(e->ctx, counting ? most : list[i], &ids, &w, &len);
    ESP_TRY(esp_rows_add(&e->rows, ids, w, len));
  }
  return esp_rows_pad(&e->rows, esp_sequence_pad(q->be, e->rows.tokens, q->max_tokens));
}
