/* ogd.c: gradients leave alone the directions in which the outputs on samples of earlier tasks change. OGD, Farajtabar
 * et al. 2020, "Orthogonal Gradient Descent for Continual Learning"; PCA-OGD, Doan et al. 2021, keeps the leading
 * principal directions of the gradients in the place of the gradients of a few samples.
 *
 * When a task ends G [samples, P] holds the gradients of its samples' mean log-probabilities (OGD-GTL: of what should
 * be answered), less their part in the directions U that are there already. Its leading `directions` right singular
 * vectors join U, from the eigenvectors of G G^T. A later step's gradient becomes g - U^T U g, and after the step so
 * does what all parameters have changed by since the task began (projection.h says why). */
#include <math.h>
#include <stdio.h>

#include "core/linalg.h"
#include "tasks/internal.h"
#include "tasks/projection.h"

static const char *name_of(int task, char out[32]) {
  snprintf(out, 32, "directions.%d", task);
  return out;
}

/* x [1, P] (or rows of it) minus its part in the directions of tasks before `task`. */
static void leave(esp_strategy *s, const esp_sequence *q, esp_tensor x, int task) {
  char name[32];
  for (int t = 0; t < task; t++) esp_project_rows(q, x, esp_basis(s, name_of(t, name), esp_tensor_cols(&x)));
}

static esp_tensor row(esp_tensor g, int64_t i) {
  int64_t n = esp_tensor_cols(&g);
  return esp_flat((float *)g.data + i * n, n);
}

static esp_status check(const esp_strategy_cfg *c, int n_tasks) {
  if (n_tasks < 2) return esp_fail(ESP_ERR_RECIPE, "continual.strategy: ogd has nothing to do with one task");
  if (c->ogd.directions > c->ogd.samples)
    return esp_fail(ESP_ERR_RECIPE, "continual.ogd.directions: %lld, of %lld samples", (long long)c->ogd.directions,
                    (long long)c->ogd.samples);
  return ESP_OK;
}

static esp_status task_begin(esp_strategy *s, const esp_sequence *q) {
  return q->task > 0 ? esp_anchor(s, q) : ESP_OK;
}

static esp_status project(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  leave(s, q, esp_sequence_gradient(q), q->task);
  return ESP_OK;
}

static esp_status after_step(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  if (q->task == 0) return ESP_OK;
  const esp_backend_ops *op = q->be->ops;
  int64_t mark = esp_stack_mark(q->stack), n = q->adapter->params->total;
  esp_tensor now = esp_sequence_masters(q), was = esp_strategy_flat(s, "anchor", q);
  esp_tensor d = esp_stack_tensor(q->stack, ESP_F32, 1, n);
  op->axpby(q->be, d, 1.0f, now, 0.0f);
  op->axpby(q->be, d, -1.0f, was, 1.0f);
  leave(s, q, d, q->task);
  op->axpby(q->be, now, 1.0f, was, 0.0f);
  op->axpby(q->be, now, 1.0f, d, 1.0f);
  esp_params_refresh_shadow(q->adapter->params);
  esp_stack_release(q->stack, mark);
  return ESP_OK;
}

/* Rows of u become orthonormal, in order, also to the directions of earlier tasks: twice is enough. */
static void orthonormal(esp_strategy *s, const esp_sequence *q, esp_tensor u) {
  for (int64_t i = 0; i < esp_tensor_rows(&u); i++)
    for (int pass = 0; pass < 2; pass++) {
      leave(s, q, row(u, i), q->task);
      if (i > 0) esp_project_rows(q, row(u, i), esp_tensor_rows_view(&u, 0, i));
      double size = esp_sequence_dot(q, row(u, i), row(u, i));
      if (size > 0) q->be->ops->axpby(q->be, row(u, i), 0.0f, row(u, i), (float)(1 / sqrt(size)));
    }
}

/* The leading directions of g's rows into the array of this task; nothing where they are all zero. */
static esp_status principal(esp_strategy *s, const esp_sequence *q, esp_tensor g) {
  int64_t n = esp_tensor_rows(&g), width = esp_tensor_cols(&g), k = 0, most = s->cfg->ogd.directions;
  if (most > n) most = n;
  char name[32];
  esp_status st = ESP_OK;
  float *gram = esp_mem_alloc(ESP_MEM_HOST, (size_t)(3 * n * n + n) * sizeof *gram), *u = gram + n * n, *vt = u + n * n;
  float *sv = vt + n * n;
  if (!gram) return ESP_ERR_MEMORY;
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j <= i; j++)
      gram[i * n + j] = gram[j * n + i] = (float)esp_sequence_dot(q, row(g, i), row(g, j));
  bool counts = esp_backend_counts(q->be);
  ESP_GOTO(esp_linalg_svd(n, n, counts ? NULL : gram, u, sv, vt));
  /* eigenvalues are squares: below the rounding of fp32 they say nothing */
  while (k < most && (counts || (double)sv[k] > 1e-6 * (double)sv[0])) k++;
  if (k == 0) goto out;
  for (int64_t i = 0; i < k; i++)
    for (int64_t j = 0; j < n; j++) vt[i * n + j] /= sv[i] > 0 ? sqrtf(sv[i]) : 1;
  float *data = esp_strategy_array(s, name_of(q->task, name), ESP_F32, k * width, false);
  if (!data) ESP_GOTO(ESP_ERR_MEMORY);
  esp_tensor c = esp_stack_tensor(q->stack, ESP_F32, k, n), out = esp_tensor_2d(data, ESP_F32, k, width);
  q->be->ops->upload(q->be, c.data, vt, k * n * (int64_t)sizeof *vt);
  q->be->ops->matmul(q->be, out, c, false, g, false, 1.0f, 0.0f);
  orthonormal(s, q, out);
  st = esp_backend_sync(q->be);
out:
  esp_mem_free(gram);
  return st;
}

static esp_status hand_over(esp_strategy *s, const esp_sequence *q) {
  esp_status st = ESP_OK;
  esp_sample *some = NULL;
  int64_t n, mark = esp_stack_mark(q->stack);
  ESP_GOTO(esp_sequence_some(q, s->cfg->ogd.samples, &some, &n));
  esp_tensor g = esp_stack_tensor(q->stack, ESP_F32, n, q->adapter->params->total);
  for (int64_t i = 0; i < n; i++) ESP_GOTO(esp_sequence_gradient_of(q, &some[i], 1, row(g, i), NULL));
  for (int pass = 0; pass < 2; pass++) leave(s, q, g, q->task);
  ESP_GOTO(principal(s, q, g));
out:
  esp_stack_release(q->stack, mark);
  esp_mem_free(some);
  return st;
}

const esp_strategy_kind esp_strategy_ogd = {
    .name = "ogd",
    .summary =
        "steps are orthogonal to the gradients of earlier tasks' samples (Farajtabar et al. 2020; PCA: Doan 2021)",
    .flags = ESP_STRATEGY_BY_PARAMETER,
    .check = check,
    .task_begin = task_begin,
    .hand_over = hand_over,
    .project = project,
    .after_step = after_step,
};
