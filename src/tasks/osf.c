/* osf.c: orthogonal subspace fine-tuning (adaptive SVD), Nayak et al. 2025, "Sculpting Subspaces: Constrained Full
 * Fine-Tuning in LLMs for Continual Learning". When a task begins W = U S V^T of each trained matrix, what earlier
 * tasks have added included; the leading k triples stay, and what the task adds to W lies outside of them on both
 * sides: U_high^T dW = 0,   dW V_high = 0. The authors train U_low, S_low and V_low with dU orthogonal to U_high and dV
 * to V_high. What these can make of W is U_high S_high V_high^T + any X with U_high^T X = 0 and X V_high = 0: the same
 * set as here, where W itself is trained and its change projected, so that no factors are held in its place. Of a
 * low-rank change B A that is the task's own (o-lora, a new LoRA per task) it is U_high^T B = 0 and A V_high = 0.
 *
 * k = retain * min(out, in), or, with retain_min, (retain_min + I (retain - retain_min)) * min(out, in) where I is the
 * layer's importance: the mean cosine of x and W x over tokens of the task, divided by its mean over layers. Only
 * square matrices have one; the others of a layer take the mean of theirs. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/linalg.h"
#include "tasks/internal.h"
#include "tasks/projection.h"

enum { SAMPLES = 16, TOKENS = 128 }; /* that importance is measured on */

static const char *name_of(const char *side, const esp_trained *t, char out[32]) {
  snprintf(out, 32, "%s.%d", side, t->site->index);
  return out;
}
static esp_tensor basis_of(const esp_strategy *s, const char *side, const esp_trained *t) {
  char name[32];
  return esp_basis(s, name_of(side, t, name), side[0] == 'u' ? t->site->out : t->site->in);
}

static esp_status check(const esp_strategy_cfg *c, int n_tasks) {
  if (c->osf.retain_min > c->osf.retain)
    return esp_fail(ESP_ERR_RECIPE, "continual.osf.retain_min: %g is above retain (%g)", c->osf.retain_min,
                    c->osf.retain);
  return ESP_OK;
}

static esp_status open(esp_strategy *s, const esp_sequence *q) {
  return esp_trained_own(s, q, true);
}

/* W as the product sees it, [out, in]. */
static esp_status weight_of(const esp_sequence *q, const esp_trained *t, float *w) {
  ESP_TRY(esp_site_read_weight_rows(q->model, t->site, 0, t->site->out, w));
  return esp_adapter_effective_rows(q->adapter, t->site, 0, t->site->out, w);
}

/* ---- importance ---- */

static esp_status cosine(const esp_sequence *q, const esp_trained *t, const float *x, int64_t rows, double *out) {
  int64_t n = t->site->in;
  float *w = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n * n + rows * n) * sizeof *w), *y = w + n * n;
  if (!w) return ESP_ERR_MEMORY;
  esp_status st = weight_of(q, t, w);
  if (st == ESP_OK) esp_linalg_gemm(false, true, rows, n, n, 1.0f, x, n, w, n, 0.0f, y, n);
  *out = 0;
  for (int64_t i = 0; st == ESP_OK && i < rows; i++) {
    double xy = 0, xx = 0, yy = 0;
    for (int64_t k = i * n; k < (i + 1) * n; k++) {
      xy += (double)x[k] * (double)y[k];
      xx += (double)x[k] * (double)x[k];
      yy += (double)y[k] * (double)y[k];
    }
    if (xx > 0 && yy > 0) *out += xy / sqrt(xx * yy) / (double)rows;
  }
  esp_mem_free(w);
  return st;
}

/* Per layer (the last entry: outside of layers), mean 1. */
static esp_status importance(const esp_sequence *q, const esp_trained *list, int n, double *out) {
  esp_status st = ESP_OK;
  int layers = esp_model_describe(q->model)->layers, measured = 0;
  int *squares = esp_mem_alloc(ESP_MEM_HOST, (size_t)(layers + 1) * sizeof *squares);
  esp_observed seen = {0};
  esp_sample *some = NULL;
  int64_t count;
  double mean = 0;
  if (!squares) return ESP_ERR_MEMORY;
  ESP_GOTO(esp_sequence_some(q, SAMPLES, &some, &count));
  ESP_GOTO(esp_observe(q, list, n, some, count, TOKENS, false, &seen));
  for (int i = 0; i < n && !esp_backend_counts(q->be); i++) {
    const esp_site *s = list[i].site;
    double c;
    if (s->in != s->out || s->layer < 0) continue;
    ESP_GOTO(cosine(q, &list[i], seen.x[s->group->index], seen.rows[s->group->index], &c));
    out[s->layer] += c;
    squares[s->layer]++;
  }
  for (int l = 0; l < layers; l++)
    if (squares[l]) out[l] /= squares[l], mean += out[l], measured++;
  mean = measured ? mean / measured : 0;
  for (int l = 0; l <= layers; l++) out[l] = squares[l] && mean > 0 ? out[l] / mean : 1;
out:
  esp_observed_deinit(&seen);
  esp_mem_free(some);
  esp_mem_free(squares);
  return st;
}

/* ---- the subspaces ---- */

static esp_status store(esp_strategy *s, const char *side, const esp_trained *t, const float *rows, int64_t k) {
  char name[32];
  int64_t n = k * (side[0] == 'u' ? t->site->out : t->site->in);
  float *data = esp_strategy_array(s, name_of(side, t, name), ESP_F32, n, false);
  if (!data) return ESP_ERR_MEMORY;
  s->be->ops->upload(s->be, data, rows, n * (int64_t)sizeof *rows);
  return ESP_OK;
}

static esp_status decompose(esp_strategy *s, const esp_sequence *q, const esp_trained *t, int64_t k) {
  esp_status st = ESP_OK;
  int64_t out = t->site->out, in = t->site->in, least = out < in ? out : in;
  size_t size = (size_t)(out * in + out * least + least + least * in + k * out);
  float *w = esp_mem_alloc(ESP_MEM_HOST, size * sizeof *w);
  if (!w) return ESP_ERR_MEMORY;
  float *u = w + out * in, *sv = u + out * least, *vt = sv + least, *ut = vt + least * in;
  bool counts = esp_backend_counts(q->be);
  if (!counts) ESP_GOTO(weight_of(q, t, w));
  ESP_GOTO(esp_linalg_svd(out, in, counts ? NULL : w, u, sv, vt));
  for (int64_t i = 0; i < k; i++)
    for (int64_t o = 0; o < out; o++) ut[i * out + o] = u[o * least + i];
  ESP_GOTO(store(s, "u", t, ut, k));
  ESP_GOTO(store(s, "v", t, vt, k));
  st = esp_backend_sync(q->be);
out:
  esp_mem_free(w);
  return st;
}

static int64_t retained(const esp_strategy *s, const esp_sequence *q, const esp_trained *t, const double *weight) {
  const esp_site *site = t->site;
  double least = (double)(site->out < site->in ? site->out : site->in), share = s->cfg->osf.retain;
  int layers = esp_model_describe(q->model)->layers;
  if (weight) {
    double low = s->cfg->osf.retain_min;
    share = low + weight[site->layer < 0 ? layers : site->layer] * (share - low);
    if (esp_backend_counts(q->be)) share = 1; /* the most there can be */
    share = share < low ? low : share > 1 ? 1 : share;
  }
  int64_t k = llround(share * least);
  return k < 1 ? 1 : k;
}

static esp_status task_begin(esp_strategy *s, const esp_sequence *q) {
  esp_status st = ESP_OK;
  esp_trained *list;
  double *weight = NULL;
  int n;
  ESP_TRY(esp_trained_list(s, q, &list, &n));
  if (s->cfg->osf.retain_min > 0) {
    size_t layers = (size_t)esp_model_describe(q->model)->layers + 1;
    weight = esp_mem_alloc(ESP_MEM_HOST, layers * sizeof *weight);
    if (!weight) ESP_GOTO(ESP_ERR_MEMORY);
    ESP_GOTO(importance(q, list, n, weight));
  }
  for (int i = 0; i < n; i++) {
    ESP_GOTO(decompose(s, q, &list[i], retained(s, q, &list[i], weight)));
    if (list[i].a < 0) continue;
    esp_project_rows(q, esp_param_master(q->adapter->params, list[i].a), basis_of(s, "v", &list[i]));
  }
  esp_params_refresh_shadow(q->adapter->params);
  st = esp_anchor(s, q);
out:
  esp_mem_free(weight);
  esp_mem_free(list);
  return st;
}

/* ---- the step ---- */

static esp_status project(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  const esp_params *ps = q->adapter->params;
  esp_trained *list;
  int n;
  ESP_TRY(esp_trained_list(s, q, &list, &n));
  for (int i = 0; i < n; i++) {
    bool whole = list[i].weight >= 0;
    esp_project_rows(q, esp_param_grad(ps, whole ? list[i].weight : list[i].a), basis_of(s, "v", &list[i]));
    esp_project_cols(q, esp_param_grad(ps, whole ? list[i].weight : list[i].b), basis_of(s, "u", &list[i]));
  }
  esp_mem_free(list);
  return ESP_OK;
}

static esp_status after_step(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  esp_tensor none = {0}, anchor = esp_strategy_flat(s, "anchor", q);
  esp_trained *list;
  int n;
  ESP_TRY(esp_trained_list(s, q, &list, &n));
  for (int i = 0; i < n; i++) {
    esp_tensor u = basis_of(s, "u", &list[i]), v = basis_of(s, "v", &list[i]);
    if (list[i].weight >= 0) {
      esp_project_change(q, list[i].weight, anchor, v, u);
    } else {
      esp_project_change(q, list[i].a, anchor, v, none);
      esp_project_change(q, list[i].b, anchor, none, u);
    }
  }
  esp_params_refresh_shadow(q->adapter->params);
  esp_mem_free(list);
  return ESP_OK;
}

const esp_strategy_kind esp_strategy_osf = {
    .name = "osf",
    .summary = "what a task adds to a weight is orthogonal to its leading singular directions (Nayak et al. 2025)",
    .check = check,
    .open = open,
    .task_begin = task_begin,
    .project = project,
    .after_step = after_step,
};
