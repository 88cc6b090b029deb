/* refactor.c: weight refactorisation with momentum reset (Glentis et al. 2025, "Scalable Parameter and Memory Efficient
 * Pretraining for LLM"). B A = U S V^T is made again as B = U sqrt(S), A = sqrt(S) V^T: the same change of the weight
 * from factors of equal size, so that both get gradients of equal size; the optimizer's moments, which belong to the
 * old factors, become zero. When a task begins, and every `interval` steps.
 *
 * From thin QR of B = Qb Rb and A^T = Qa Ra: the SVD is that of Rb Ra^T [r, r], and B A is never formed. Where B A has
 * less than rank r the formula gives pairs that are zero on both sides, which no gradient would ever move: they start
 * again as LoRA starts, with B zero and a row of A of the length that its initialisation has, along what is left of A's
 * rows. A B that is all zero is left alone. */
#include <math.h>
#include <string.h>

#include "core/linalg.h"
#include "tasks/internal.h"
#include "tasks/projection.h"

static void transpose(const float *x, int64_t rows, int64_t cols, float *out) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < cols; j++) out[j * rows + i] = x[i * cols + j];
}

esp_status esp_refactor(int64_t out, int64_t in, int64_t r, float *a, float *b) {
  esp_status st = ESP_OK;
  size_t n = (size_t)(out * r + 2 * in * r + 6 * r * r + r);
  float *qb = esp_mem_alloc(ESP_MEM_HOST, n * sizeof *qb), *qa = qb + out * r, *turned = qa + in * r;
  float *rb = turned + in * r, *ra = rb + r * r, *m = ra + r * r, *u = m + r * r, *vt = u + r * r, *s = vt + r * r;
  if (!qb) return ESP_ERR_MEMORY;
  memcpy(qb, b, (size_t)(out * r) * sizeof *b);
  transpose(a, r, in, qa);
  ESP_GOTO(esp_linalg_qr(out, r, qb, rb));
  ESP_GOTO(esp_linalg_qr(in, r, qa, ra));
  esp_linalg_gemm(false, true, r, r, r, 1.0f, rb, r, ra, r, 0.0f, m, r);
  ESP_GOTO(esp_linalg_svd(r, r, m, u, s, vt));
  if (!(s[0] > 0)) goto out;
  for (int64_t i = 0; i < r; i++) {
    bool none = s[i] <= 1e-7f * s[0];
    float left = none ? 0.0f : sqrtf(s[i]), right = none ? sqrtf(1.0f / 3.0f) : left;
    for (int64_t k = 0; k < r; k++) u[k * r + i] *= left, vt[i * r + k] *= right;
  }
  esp_linalg_gemm(false, false, out, r, r, 1.0f, qb, r, u, r, 0.0f, b, r);
  esp_linalg_gemm(false, true, r, in, r, 1.0f, vt, r, qa, r, 0.0f, a, in);
out:
  esp_mem_free(qb);
  return st;
}

static esp_status one(const esp_sequence *q, const esp_trained *t) {
  esp_params *ps = q->adapter->params;
  const esp_param *pa = &ps->list[t->a], *pb = &ps->list[t->b];
  float *a = esp_mem_alloc(ESP_MEM_HOST, (size_t)(pa->numel + pb->numel) * sizeof *a), *b = a + pa->numel;
  if (!a) return ESP_ERR_MEMORY;
  esp_params_get(ps, t->a, a);
  esp_params_get(ps, t->b, b);
  esp_status st = esp_backend_counts(q->be) ? ESP_OK : esp_refactor(t->site->out, t->site->in, pa->shape[0], a, b);
  if (st == ESP_OK) {
    esp_params_set(ps, t->a, a);
    esp_params_set(ps, t->b, b);
  }
  esp_mem_free(a);
  return st;
}

static esp_status refactor(esp_strategy *s, const esp_sequence *q) {
  esp_status st = ESP_OK;
  esp_trained *list;
  int n;
  ESP_TRY(esp_trained_list(s, q, &list, &n));
  for (int i = 0; i < n; i++)
    if (list[i].a >= 0) ESP_GOTO(one(q, &list[i]));
  esp_optim_reset(q->optim);
  st = esp_backend_sync(q->be);
out:
  esp_mem_free(list);
  return st;
}

static esp_status open(esp_strategy *s, const esp_sequence *q) {
  esp_status st = ESP_OK;
  esp_trained *list;
  int n, factors = 0;
  ESP_TRY(esp_trained_list(s, q, &list, &n));
  for (int i = 0; i < n; i++) {
    if (list[i].a < 0) continue;
    int64_t r = q->adapter->params->list[list[i].a].shape[0];
    if (r > list[i].site->in || r > list[i].site->out)
      ESP_GOTO(esp_fail(ESP_ERR_RECIPE, "continual.strategy: refactor of rank %lld, %s has [%lld, %lld]", (long long)r,
                        list[i].site->path, (long long)list[i].site->out, (long long)list[i].site->in));
    factors++;
  }
  if (factors == 0)
    st = esp_fail(ESP_ERR_RECIPE, "continual.strategy: refactor is for lora and o-lora, %s has no factors",
                  q->adapter->kind->name);
out:
  esp_mem_free(list);
  return st;
}

static esp_status task_begin(esp_strategy *s, const esp_sequence *q) {
  return refactor(s, q);
}

static esp_status after_step(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  int64_t every = s->cfg->refactor.interval;
  return every > 0 && (t->task_step + 1) % every == 0 ? refactor(s, q) : ESP_OK;
}

const esp_strategy_kind esp_strategy_refactor = {
    .name = "refactor",
    .summary = "B A is made again from balanced factors, and the optimizer's moments are reset (Glentis et al. 2025)",
    .open = open,
    .task_begin = task_begin,
    .after_step = after_step,
};
