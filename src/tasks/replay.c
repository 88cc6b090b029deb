/* replay.c: rows of earlier tasks beside the step's own. The loss is one mean over all of a step's trained tokens, own
 * and replayed: experience replay (Rolnick et al. 2019; for language models de Masson d'Autume et al. 2019). */
#include <math.h>
#include <string.h>

#include "tasks/internal.h"
#include "tasks/memory.h"

typedef struct drawn { /* between `draw` and `pass` of one step */
  esp_sample *list;
  int64_t n, cap;
  esp_rows rows;
} drawn;

static esp_status check(const esp_strategy_cfg *c, int n_tasks) {
  double b = c->replay.buffer;
  if (b > 1 && b != floor(b))
    return esp_fail(ESP_ERR_RECIPE, "continual.replay.buffer: must be a whole number of samples or a share, is %g", b);
  if (n_tasks < 2) return esp_fail(ESP_ERR_RECIPE, "continual.strategy: replay has nothing to replay with one task");
  return ESP_OK;
}

static esp_status open(esp_strategy *s, const esp_sequence *q) {
  s->impl = esp_mem_alloc(ESP_MEM_HOST, sizeof(drawn));
  return s->impl ? ESP_OK : ESP_ERR_MEMORY;
}

static void close(esp_strategy *s) {
  drawn *d = s->impl;
  if (!d) return;
  esp_mem_free(d->list);
  esp_rows_deinit(&d->rows);
  esp_mem_free(d);
}

/* Replayed samples of the steps before `step` of a task: a sum over steps is exact though a step's part is none. */
static int64_t before(const esp_strategy *s, const esp_sequence *q, int64_t step) {
  double ratio = s->cfg->replay.ratio, own = (double)esp_dataset_count(q->data[q->task]);
  double each = ratio > 0 ? ratio / (1 - ratio) * own : (double)esp_memory_count(s);
  return (int64_t)floor(each * (double)step / (double)q->epoch_steps + 1e-9);
}

static esp_status draw(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t, double *weight) {
  drawn *d = s->impl;
  d->n = 0;
  if (esp_memory_count(s) == 0) return ESP_OK;
  int64_t first = before(s, q, t->task_step);
  int64_t n = before(s, q, t->task_step + 1) - first;
  if (esp_backend_counts(q->be)) n++; /* the largest there is */
  if (n > d->cap) {
    esp_sample *grown = esp_mem_realloc(ESP_MEM_HOST, d->list, (size_t)n * sizeof *grown);
    if (!grown) return ESP_ERR_MEMORY;
    d->list = grown;
    d->cap = n;
  }
  ESP_TRY(esp_memory_draw(s, q, first, n, d->list));
  d->n = n;
  for (int64_t i = 0; i < n; i++) *weight += s->cfg->replay.weight * esp_sequence_weight(q, d->list[i]);
  return ESP_OK;
}

static esp_status pass(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  drawn *d = s->impl;
  int64_t first, mine, size = q->micro_batch;
  esp_sequence_share(q, d->n, &first, &mine);
  for (int64_t i = 0; i < mine; i += size) {
    ESP_TRY(esp_sequence_rows(q, d->list + first + i, mine - i < size ? mine - i : size, &d->rows));
    /* a draw of dropout that no micro-batch of the step has: they count from below */
    ESP_TRY(esp_sequence_pass(q, &d->rows, NULL, true, t->scale * s->cfg->replay.weight,
                              (t->step << 20) + (1 << 19) + first + i, NULL));
  }
  return ESP_OK;
}

static esp_status hand_over(esp_strategy *s, const esp_sequence *q) {
  esp_memory_cfg c = {s->cfg->replay.buffer, s->cfg->replay.bytes, s->cfg->replay.sampler};
  return esp_memory_add(s, q, &c);
}

const esp_strategy_kind esp_strategy_replay = {
    .name = "replay",
    .summary = "rows of earlier tasks are trained beside those of the present one",
    .check = check,
    .open = open,
    .close = close,
    .hand_over = hand_over,
    .draw = draw,
    .pass = pass,
    .held = esp_memory_bytes,
};
