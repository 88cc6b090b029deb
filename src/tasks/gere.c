/* gere.c: general samples replayed with four losses: Zhang et al., "GeRe: Towards Efficient Anti-Forgetting in
 * Continual Learning of LLM via General Samples Replay" (2025). A small fixed set of general texts stands for what the
 * base knows. Its rows are trained beside every step's, and the loss of their trained tokens gets, from the base
 * itself: with `label` nothing; with `kl` weight T^2 KL(base || model); with `l1` and `l2` weight mean_j |h_j - h*_j|
 * and weight mean_j (h_j - h*_j)^2 of the final normed hidden states; with `margin` the threshold margin: m_j and s_j
 * are mean and deviation of h*_j over the general tokens, what the base has below m - s stays below it, above m + s
 * above it, between them between them; weight times the mean over the elements of a state that do not. Means are over
 * the tokens of a step, so that they do not depend on how it is cut.
 *
 * weight dynamic, as in the authors' code (w_strategy "dy"): with CE the cross-entropies and D what holds to the base,
 * both as they stand in the step's loss, the weight is CE / (D + 1e-8), a number to the gradient. The authors take it
 * of each micro-batch of each rank; here it is of the whole step, so that it does not depend on how that is cut either.
 * It must be known before the backward pass of the general rows, which go through two passes without gradients first.
 * The ratio of the step before would not do: D is 0 at the first step and grows by orders of magnitude in the next. */
#include <math.h>
#include <string.h>

#include "tasks/extra.h"
#include "tasks/internal.h"
#include "tasks/teacher.h"

enum { ORDER = 50 }; /* stream of ESP_RNG_DATA */

typedef struct gere {
  esp_dataset *data;
  esp_extra extra;
  esp_teacher teacher;
  bool taught, dynamic;
  double labels, held; /* dynamic: cross-entropy and D of this rank's share of the step's general rows, summed */
} gere;

static void sample(const void *ctx, int64_t i, const int32_t **ids, const float **weights, int64_t *n) {
  esp_dataset_sample(ctx, i, ids, weights, n);
}

static esp_status check(const esp_strategy_cfg *c, int n_tasks) {
  (void)n_tasks;
  if (!c->gere.data.path) return esp_fail(ESP_ERR_RECIPE, "continual.gere.data.path: the general samples are missing");
  if (c->gere.weight == 0 && !strcmp(c->gere.loss, "label"))
    return esp_fail(ESP_ERR_RECIPE, "continual.gere.weight: dynamic is the weight of what loss 'label' does not have");
  return ESP_OK;
}

static void weigh(gere *g, double weight) {
  esp_teach *t = &g->teacher.teach;
  *(t->hidden ? &t->hidden_weight : &t->kl) = g->taught ? (float)weight : 0.0f;
}

static esp_status open(esp_strategy *s, const esp_sequence *q) {
  const char *loss = s->cfg->gere.loss;
  esp_data_source source = s->cfg->gere.data;
  gere *g = s->impl = esp_mem_alloc(ESP_MEM_HOST, sizeof *g);
  if (!g) return ESP_ERR_MEMORY;
  if (!strcmp(loss, "kl")) ESP_TRY(esp_sequence_frozen_head(s, q));
  source.weight = 1;
  esp_status st = esp_dataset_build(&source, 1, q->data_cfg[0], q->tok, &g->data);
  if (st != ESP_OK) return esp_fail_context(st, "continual.gere.data");
  g->extra.sample = sample;
  g->extra.ctx = g->data;
  g->extra.count = esp_dataset_count(g->data);
  g->taught = strcmp(loss, "label") != 0;
  g->dynamic = s->cfg->gere.weight == 0;
  g->teacher.teach.temperature = (float)s->cfg->gere.temperature;
  if (!strcmp(loss, "l1")) g->teacher.teach.hidden = ESP_HIDDEN_L1;
  if (!strcmp(loss, "l2")) g->teacher.teach.hidden = ESP_HIDDEN_L2;
  if (!strcmp(loss, "margin")) g->teacher.teach.hidden = ESP_HIDDEN_MARGIN;
  weigh(g, s->cfg->gere.weight);
  return ESP_OK;
}

static void close(esp_strategy *s) {
  gere *g = s->impl;
  if (!g) return;
  esp_extra_deinit(&g->extra);
  esp_teacher_deinit(&g->teacher);
  esp_dataset_destroy(g->data);
  esp_mem_free(g);
}

/* Adds the sums of h and h^2 over the labelled rows of one micro-batch; sums[2 * hidden] counts them. */
static esp_status add_states(gere *g, const esp_sequence *q, const int64_t *list, int64_t n, double *sums) {
  ESP_TRY(esp_extra_rows(&g->extra, q, list, n));
  ESP_TRY(esp_teacher_reserve(&g->teacher, q, g->extra.rows.tokens));
  esp_batch b = esp_sequence_batch(&g->extra.rows);
  ESP_TRY(esp_model_features(q->model, q->stack, &b, g->teacher.features));
  int64_t hidden = esp_tensor_cols(&g->teacher.features), rows = 0;
  esp_dtype type = g->teacher.features.dtype;
  size_t size = esp_dtype_size(type);
  for (int64_t t = 0; t < b.tokens; t++) rows += b.weights[t] != 0.0f;
  char *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)(rows * hidden) * size);
  if (!host) return ESP_ERR_MEMORY;
  q->be->ops->download(q->be, host, g->teacher.features.data, rows * hidden * (int64_t)size);
  esp_status st = esp_backend_sync(q->be);
  for (int64_t i = 0; st == ESP_OK && i < rows * hidden; i++) {
    double h = type == ESP_BF16 ? (double)esp_bf16_to_f32(((const uint16_t *)(void *)host)[i])
                                : (double)((const float *)(void *)host)[i];
    sums[i % hidden] += h;
    sums[hidden + i % hidden] += h * h;
  }
  sums[2 * hidden] += (double)rows;
  esp_mem_free(host);
  return st;
}

/* Mean minus and plus one deviation of each element of the base's states over all general tokens. */
static esp_status thresholds(esp_strategy *s, const esp_sequence *q) {
  gere *g = s->impl;
  esp_status st = ESP_OK;
  int64_t hidden = esp_model_describe(q->model)->hidden, count = g->extra.count, size = q->micro_batch;
  if (esp_backend_counts(q->be) && count > size) count = size; /* each is as long as the longest */
  int64_t *list = esp_mem_alloc(ESP_MEM_HOST, (size_t)size * sizeof *list);
  double *sums = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * hidden + 1) * sizeof *sums);
  float *bounds = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * hidden) * sizeof *bounds);
  float *held = esp_strategy_array(s, "thresholds", ESP_F32, 2 * hidden, false);
  if (!list || !sums || !bounds || !held) ESP_GOTO(ESP_ERR_MEMORY);
  for (int64_t at = 0; at < count; at += size) {
    int64_t n = count - at < size ? count - at : size;
    for (int64_t i = 0; i < n; i++) list[i] = at + i;
    ESP_GOTO(add_states(g, q, list, n, sums));
  }
  double rows = sums[2 * hidden];
  for (int64_t j = 0; j < hidden; j++) {
    double mean = sums[j] / rows, spread = sums[hidden + j] / rows - mean * mean;
    if (rows > 1) spread *= rows / (rows - 1);
    spread = spread > 0 ? sqrt(spread) : 0;
    bounds[j] = (float)(mean - spread);
    bounds[hidden + j] = (float)(mean + spread);
  }
  q->be->ops->upload(q->be, held, bounds, 2 * hidden * (int64_t)sizeof *bounds);
  ESP_GOTO(esp_backend_sync(q->be));
out:
  esp_mem_free(list);
  esp_mem_free(sums);
  esp_mem_free(bounds);
  return st;
}

/* An adapter that has not been trained changes nothing: its first values are the base. */
static esp_status task_begin(esp_strategy *s, const esp_sequence *q) {
  gere *g = s->impl;
  if (!g->taught || esp_strategy_get(s, "teacher", NULL)) return ESP_OK;
  esp_tensor teacher = esp_strategy_flat(s, "teacher", q);
  if (!teacher.data) return ESP_ERR_MEMORY;
  q->be->ops->axpby(q->be, teacher, 1.0f, esp_sequence_masters(q), 0.0f);
  return g->teacher.teach.hidden == ESP_HIDDEN_MARGIN ? thresholds(s, q) : ESP_OK;
}

/* n of the step's general rows as a batch, taught. */
static esp_status batch(esp_strategy *s, const esp_sequence *q, int64_t first, int64_t n, esp_batch *b) {
  gere *g = s->impl;
  ESP_TRY(esp_extra_rows(&g->extra, q, g->extra.list + first, n));
  *b = esp_sequence_batch(&g->extra.rows);
  if (!g->taught) return ESP_OK;
  if (g->teacher.teach.hidden == ESP_HIDDEN_MARGIN) {
    g->teacher.teach.low = esp_strategy_get(s, "thresholds", NULL);
    g->teacher.teach.high = g->teacher.teach.low + esp_model_describe(q->model)->hidden;
  }
  ESP_TRY(esp_teacher_reserve(&g->teacher, q, b->tokens));
  return esp_teacher_ask(&g->teacher, q, esp_strategy_flat(s, "teacher", q), b);
}

static esp_status measure(esp_strategy *s, const esp_sequence *q) {
  gere *g = s->impl;
  int64_t first, mine, size = q->micro_batch;
  g->labels = g->held = 0;
  weigh(g, 1);
  esp_sequence_share(q, g->extra.n, &first, &mine);
  for (int64_t i = 0; i < mine; i += size) {
    esp_batch b;
    esp_loss_out both, labels;
    ESP_TRY(batch(s, q, first + i, mine - i < size ? mine - i : size, &b));
    ESP_TRY(esp_sequence_pass(q, &g->extra.rows, b.teach, false, 1, 0, &both));
    ESP_TRY(esp_sequence_pass(q, &g->extra.rows, NULL, false, 1, 0, &labels));
    g->labels += labels.loss_sum;
    g->held += both.loss_sum - labels.loss_sum;
  }
  return ESP_OK;
}

/* The sums of the step so far are those of its own rows, and of what strategies before this one have added. */
static esp_status balance(gere *g, const esp_sequence *q, const esp_strategy_step *t) {
  esp_loss_out own;
  esp_status st = esp_comm_agree(q->comm, esp_model_sums(q->model, &own));
  if (st != ESP_OK) return st;
  double sums[] = {own.loss_sum + g->labels, g->held};
  if (q->comm->size > 1) ESP_TRY(q->comm->ops->all_reduce_f64(q->comm, sums, 2));
  weigh(g, esp_backend_counts(q->be) ? 1 : sums[0] * t->scale / (sums[1] * t->scale + 1e-8));
  return ESP_OK;
}

static esp_status draw(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t, double *weight) {
  gere *g = s->impl;
  ESP_TRY(esp_extra_draw(&g->extra, q, ORDER, t->task_step, s->cfg->gere.batch, weight));
  return g->dynamic ? measure(s, q) : ESP_OK;
}

static esp_status pass(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  gere *g = s->impl;
  int64_t first, mine, size = q->micro_batch;
  if (g->dynamic) ESP_TRY(balance(g, q, t));
  esp_sequence_share(q, g->extra.n, &first, &mine);
  for (int64_t i = 0; i < mine; i += size) {
    esp_batch b;
    ESP_TRY(batch(s, q, first + i, mine - i < size ? mine - i : size, &b));
    ESP_TRY(
        esp_sequence_pass(q, &g->extra.rows, b.teach, true, t->scale, (t->step << 20) + (7 << 17) + first + i, NULL));
  }
  return ESP_OK;
}

static int64_t held(const esp_strategy *s, const esp_sequence *q) {
  const gere *g = s->impl;
  (void)q;
  if (!g || !g->data) return 0;
  return esp_teacher_bytes(&g->teacher) + 8 * esp_dataset_statistics(g->data)->tokens;
}

const esp_strategy_kind esp_strategy_gere = {
    .name = "gere",
    .summary = "general texts are trained beside every step, held to the base by labels, KL, states or a margin",
    .flags = ESP_STRATEGY_BY_PARAMETER | ESP_STRATEGY_MEETS,
    .check = check,
    .open = open,
    .close = close,
    .task_begin = task_begin,
    .draw = draw,
    .pass = pass,
    .held = held,
};
