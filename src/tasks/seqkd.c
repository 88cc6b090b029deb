/* seqkd.c: sequence-level distillation: Kim and Rush, "Sequence-Level Knowledge Distillation" (2016), with the adapter
 * at the end of the task before as the teacher. Before a task it answers prompts of the task's own data, and in each
 * step some of these rows are trained beside the step's: what it used to say stays likely. */
#include "core/rng.h"
#include "tasks/extra.h"
#include "tasks/internal.h"

enum { CHOICE = 40, ORDER, ANSWERS }; /* streams of ESP_RNG_DATA */

/* Of the answered rows: tokens and weights one behind the other, and where each ends. */
static void sample(const void *ctx, int64_t i, const int32_t **ids, const float **weights, int64_t *n) {
  const esp_strategy *s = ctx;
  const int64_t *ends = esp_strategy_get(s, "ends", NULL);
  int64_t begin = i ? ends[i - 1] : 0;
  *ids = (const int32_t *)esp_strategy_get(s, "tokens", NULL) + begin;
  *weights = (const float *)esp_strategy_get(s, "weights", NULL) + begin;
  *n = ends[i] - begin;
}

static esp_status check(const esp_strategy_cfg *c, int n_tasks) {
  (void)c;
  if (n_tasks < 2) return esp_fail(ESP_ERR_RECIPE, "continual.strategy: seqkd has nothing to do with one task");
  return ESP_OK;
}

static esp_status open(esp_strategy *s, const esp_sequence *q) {
  if (!q->generate) return esp_fail(ESP_ERR_RECIPE, "continual.strategy: seqkd needs generation, which is not here");
  esp_extra *e = s->impl = esp_mem_alloc(ESP_MEM_HOST, sizeof *e);
  if (!e) return ESP_ERR_MEMORY;
  e->sample = sample;
  e->ctx = s;
  return ESP_OK;
}

static void close(esp_strategy *s) {
  if (s->impl) esp_extra_deinit(s->impl);
  esp_mem_free(s->impl);
}

/* The rows of the task that have a prompt with room for an answer, in list; how many. */
static int64_t candidates(const esp_strategy *s, const esp_sequence *q, int64_t *list) {
  const esp_dataset *d = q->data[q->task];
  int64_t room = esp_model_describe(q->model)->max_positions - esp_model_virtual_tokens(q->model), n = 0;
  if (q->data_cfg[q->task]->sequence_len < room) room = q->data_cfg[q->task]->sequence_len;
  for (int64_t i = 0; i < esp_dataset_count(d); i++) {
    int64_t prompt = esp_dataset_prompt_len(d, i);
    if (prompt > 0 && prompt + s->cfg->seqkd.max_new_tokens <= room) list[n++] = i;
  }
  return n;
}

static esp_status keep(esp_strategy *s, const esp_ids *prompts, const esp_ids *answers, int64_t n) {
  int64_t total = 0, at = 0;
  for (int64_t i = 0; i < n; i++) total += prompts[i].n + answers[i].n;
  esp_strategy_drop(s, "ends");
  esp_strategy_drop(s, "tokens");
  esp_strategy_drop(s, "weights");
  int64_t *ends = esp_strategy_array(s, "ends", ESP_I64, n, true);
  int32_t *tokens = esp_strategy_array(s, "tokens", ESP_I32, total, true);
  float *weights = esp_strategy_array(s, "weights", ESP_F32, total, true);
  if (!ends || !tokens || !weights) return ESP_ERR_MEMORY;
  for (int64_t i = 0; i < n; i++) {
    for (int64_t k = 0; k < prompts[i].n; k++) tokens[at++] = prompts[i].data[k];
    for (int64_t k = 0; k < answers[i].n; k++, at++) tokens[at] = answers[i].data[k], weights[at] = 1;
    ends[i] = at;
  }
  return ESP_OK;
}

static esp_status task_begin(esp_strategy *s, const esp_sequence *q) {
  const esp_dataset *d = q->data[q->task];
  esp_status st = ESP_OK;
  if (q->task == 0) return ESP_OK;
  int64_t all = esp_dataset_count(d), n;
  int64_t *list = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * all) * sizeof *list), *chosen = list + all;
  esp_ids *prompts = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * all) * sizeof *prompts), *answers = prompts + all;
  if (!list || !prompts) ESP_GOTO(ESP_ERR_MEMORY);
  int64_t able = candidates(s, q, list);
  if (able == 0)
    ESP_GOTO(esp_fail(ESP_ERR_DATA, "task '%s': no row has a prompt that leaves room for an answer of %lld tokens",
                      q->task_name[q->task], (long long)s->cfg->seqkd.max_new_tokens));
  n = s->cfg->seqkd.samples < able ? s->cfg->seqkd.samples : able;
  ESP_GOTO(esp_sequence_choose(q->seed, esp_rng_stream(ESP_RNG_DATA, CHOICE, (uint64_t)q->task, 0), able, n, chosen));
  for (int64_t i = 0; i < n; i++) {
    const int32_t *ids;
    const float *w;
    int64_t len;
    esp_dataset_sample(d, list[chosen[i]], &ids, &w, &len);
    prompts[i] = (esp_ids){(int32_t *)ids, esp_dataset_prompt_len(d, list[chosen[i]]), 0};
  }
  ESP_GOTO(q->generate(q, prompts, (int)n, s->cfg->seqkd.max_new_tokens, s->cfg->seqkd.temperature,
                       esp_rng_stream(ESP_RNG_DATA, ANSWERS, q->seed, (uint64_t)q->task), answers));
  ESP_GOTO(keep(s, prompts, answers, n));
out:
  for (int64_t i = 0; prompts && i < all; i++) esp_ids_deinit(&answers[i]);
  esp_mem_free(prompts);
  esp_mem_free(list);
  return st;
}

static esp_status draw(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t, double *weight) {
  esp_extra *e = s->impl;
  double own = 0;
  (void)esp_strategy_get(s, "ends", &e->count);
  ESP_TRY(esp_extra_draw(e, q, ORDER, t->task_step, s->cfg->seqkd.batch, &own));
  *weight += s->cfg->seqkd.weight * own;
  return ESP_OK;
}

static esp_status pass(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  esp_extra *e = s->impl;
  int64_t first, mine, size = q->micro_batch;
  esp_sequence_share(q, e->n, &first, &mine);
  for (int64_t i = 0; i < mine; i += size) {
    ESP_TRY(esp_extra_rows(e, q, e->list + first + i, mine - i < size ? mine - i : size));
    ESP_TRY(esp_sequence_pass(q, &e->rows, NULL, true, t->scale * s->cfg->seqkd.weight,
                              (t->step << 20) + (3 << 18) + first + i, NULL));
  }
  return ESP_OK;
}

const esp_strategy_kind esp_strategy_seqkd = {
    .name = "seqkd",
    .summary = "rows that the adapter of the task before answered itself are trained beside the new task's",
    .check = check,
    .open = open,
    .close = close,
    .task_begin = task_begin,
    .draw = draw,
    .pass = pass,
};
