/* lora_init.c: starting values of LoRA, as PEFT's lora/layer.py defines them (the random numbers are our own):
 *   default      A ~ U(-1/sqrt(in), 1/sqrt(in)) (kaiming_uniform with a = sqrt 5), B = 0
 *   gaussian     A ~ N(0, 1/r), B = 0
 *   orthogonal   Q = QR(randn(r, r)); A = (randn(in, r/2) Q_odd)^T / 10, B = randn(out, r/2) Q_even / 10: B A = 0
 *   pissa        W = U S V^T; A = sqrt(S_r/s) V_r^T, B = U_r sqrt(S_r/s), base W - s B A (arXiv:2404.02948)
 *   pissa_niter_k  the same from a randomised SVD with k subspace iterations
 *   olora        W = Q R; A = R[:r], B = Q[:, :r], base W - s B A (arXiv:2406.01775)
 *   loftq        lora_loftq.c; eva, corda, lora_ga: lora_data.c (until their pass over data is done: as default)
 *   (embedding)  A = 0, B ~ N(0, 1)
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/internal.h"
#include "core/linalg.h"
#include "core/rng.h"

static int pissa_iterations(const char *init) { /* -1: not pissa_niter_k */
  int k = 0;
  char rest = 0;
  return sscanf(init, "pissa_niter_%d%c", &k, &rest) == 1 && k >= 0 ? k : -1;
}

static bool one_of(const char *init, const char *const *list, size_t n) {
  for (size_t i = 0; i < n; i++)
    if (strcmp(init, list[i]) == 0) return true;
  return false;
}

bool esp_lora_rewrites_base(const char *init) {
  static const char *const list[] = {"pissa", "olora", "corda", "lora_ga", "loftq"};
  return init && (one_of(init, list, sizeof list / sizeof list[0]) || pissa_iterations(init) >= 0);
}

bool esp_lora_init_from_data(const char *init) {
  static const char *const list[] = {"eva", "corda", "lora_ga"};
  return one_of(init, list, sizeof list / sizeof list[0]);
}

bool esp_lora_init_known(const char *init) {
  static const char *const list[] = {"default", "gaussian", "orthogonal", "eva"};
  return one_of(init, list, sizeof list / sizeof list[0]) || esp_lora_rewrites_base(init);
}

bool esp_lora_gives_way(const esp_adapter *a) {
  const char *init = a->cfg.init;
  return esp_lora_rewrites_base(init) && strcmp(init, "loftq") && (!esp_lora_init_from_data(init) || a->cfg.n_start);
}

static void fill_normal(float *x, int64_t n, float sd, uint64_t seed, uint64_t stream) {
  for (int64_t i = 0; i < n; i++) x[i] = sd * esp_rng_normal(seed, stream, (uint64_t)i);
}

/* x[i] ~ U(-bound, bound) from draw i, all four draws of a block of the generator taken at once. */
static void fill_uniform(float *x, int64_t n, float bound, uint64_t seed, uint64_t stream) {
  uint32_t w[4];
  for (int64_t i = 0; i < n; i++) {
    if (i % 4 == 0) esp_rng_block(seed, stream, (uint64_t)i / 4, w);
    x[i] = bound * (2.0f * ((float)(w[i % 4] >> 8) * 0x1p-24f) - 1.0f);
  }
}

static esp_status init_orthogonal(const esp_adapter *a, const esp_site *s, const esp_lora_site *ls, float *A, float *B,
                                  uint64_t stream) {
  int64_t r = ls->r, h = r / 2;
  if (r % 2)
    return esp_fail(ESP_ERR_RECIPE, "adapter.init: orthogonal needs an even rank, %s has %lld", s->path, (long long)r);
  float *q = esp_mem_alloc(ESP_MEM_HOST, (size_t)(r * r) * sizeof *q);
  float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)((s->in + s->out) * h) * sizeof *x);
  esp_status st = q && x ? ESP_OK : ESP_ERR_MEMORY;
  if (st == ESP_OK) {
    fill_normal(q, r * r, 1.0f, a->cfg.seed, stream + 1);
    st = esp_linalg_qr(r, r, q, NULL);
  }
  if (st == ESP_OK) {
    /* "odd" rows are 0, 2, ... as PEFT counts them; rows h x r are taken with a leading dimension of 2r */
    fill_normal(x, (s->in + s->out) * h, 1.0f, a->cfg.seed, stream + 2);
    esp_linalg_gemm(true, true, r, s->in, h, 0.1f, q, 2 * r, x, h, 0.0f, A, s->in);
    esp_linalg_gemm(false, false, s->out, r, h, 0.1f, x + s->in * h, h, q + r, 2 * r, 0.0f, B, r);
  }
  esp_mem_free(q);
  esp_mem_free(x);
  return st;
}

esp_status esp_lora_keep(esp_lora_site *ls, const esp_site *s, const float *A, const float *B) {
  ls->A0 = esp_mem_alloc(ESP_MEM_PARAMS, (size_t)(ls->r * s->in) * sizeof *A);
  ls->B0 = esp_mem_alloc(ESP_MEM_PARAMS, (size_t)(s->out * ls->r) * sizeof *B);
  if (!ls->A0 || !ls->B0) return ESP_ERR_MEMORY;
  memcpy(ls->A0, A, (size_t)(ls->r * s->in) * sizeof *A);
  memcpy(ls->B0, B, (size_t)(s->out * ls->r) * sizeof *B);
  return ESP_OK;
}

/* The base becomes W - s B A. w: [out, in], overwritten. */
static esp_status give_way(esp_adapter *a, esp_site *s, esp_lora_site *ls, const float *A, const float *B, float *w) {
  ESP_TRY(esp_lora_keep(ls, s, A, B));
  if (!esp_backend_counts(a->params->be)) {
    memset(w, 0, (size_t)(s->out * s->in) * sizeof *w);
    esp_lowrank_add(w, s->out, s->in, A, B, ls->r, -ls->s);
  }
  return esp_site_add_delta(a->model, s, w);
}

static esp_status olora(const esp_site *s, int64_t r, const float *w, float *A, float *B) {
  /* The first r columns of Q span the first r columns of W, so a panel QR and R[:r] = Q_r^T W are enough. */
  for (int64_t i = 0; i < s->out; i++) memcpy(B + i * r, w + i * s->in, (size_t)r * sizeof *B);
  ESP_TRY(esp_linalg_qr(s->out, r, B, NULL));
  esp_linalg_gemm(true, false, r, s->in, s->out, 1.0f, B, r, w, s->in, 0.0f, A, s->in);
  return ESP_OK;
}

/* w is lost. Under the counting backend only the memory is taken. */
static esp_status pissa(const esp_adapter *a, const esp_site *s, const esp_lora_site *ls, float *w, float *A,
                        float *B) {
  int64_t r = ls->r, m = s->out, n = s->in, k = m < n ? m : n;
  int niter = pissa_iterations(a->cfg.init);
  bool counts = esp_backend_counts(a->params->be);
  int64_t q = niter < 0 ? k : r;
  float *u = esp_mem_alloc(ESP_MEM_HOST, (size_t)(m * q) * sizeof *u);
  float *sv = esp_mem_alloc(ESP_MEM_HOST, (size_t)q * sizeof *sv);
  float *vt = esp_mem_alloc(ESP_MEM_HOST, (size_t)(q * n) * sizeof *vt);
  esp_status st = u && sv && vt ? ESP_OK : ESP_ERR_MEMORY;
  if (st) goto out;
  if (niter < 0)
    ESP_GOTO(esp_linalg_svd(m, n, counts ? NULL : w, u, sv, vt));
  else
    ESP_GOTO(esp_linalg_svd_truncated(m, n, counts ? NULL : w, r, 0, niter, a->cfg.seed, u, sv, vt));
  for (int64_t j = 0; j < r && !counts; j++) {
    float root = sqrtf(sv[j] / ls->s);
    for (int64_t c = 0; c < n; c++) A[j * n + c] = root * vt[j * n + c];
    for (int64_t i = 0; i < m; i++) B[i * r + j] = root * u[i * q + j];
  }
out:
  esp_mem_free(u);
  esp_mem_free(sv);
  esp_mem_free(vt);
  return st;
}

/* Inits whose adapter is a piece of the weight (or of a gradient), which the base gives up for it. */
static esp_status init_from_weight(esp_adapter *a, esp_site *s, esp_lora_site *ls, bool started, float *A, float *B) {
  int64_t k = s->out < s->in ? s->out : s->in;
  if (ls->r > k)
    return esp_fail(ESP_ERR_RECIPE, "adapter.init: %s needs a rank of at most %lld for %s, it is %lld", a->cfg.init,
                    (long long)k, s->path, (long long)ls->r);
  if (!(ls->s > 0)) return esp_fail(ESP_ERR_RECIPE, "adapter.alpha: must be positive for init %s", a->cfg.init);
  if (strcmp(a->cfg.init, "loftq") == 0) return esp_loftq_init(a, s, ls, A, B);
  bool counts = esp_backend_counts(a->params->be);
  float *w = esp_mem_alloc(ESP_MEM_HOST, (size_t)(s->out * s->in) * sizeof *w);
  esp_status st = w ? ESP_OK : ESP_ERR_MEMORY;
  if (st == ESP_OK && !counts && !started) st = esp_site_read_weight(a->model, s, w);
  if (st == ESP_OK && !started && strcmp(a->cfg.init, "olora") == 0)
    st = counts ? ESP_OK : olora(s, ls->r, w, A, B);
  else if (st == ESP_OK && !started)
    st = pissa(a, s, ls, w, A, B);
  if (st == ESP_OK) st = give_way(a, s, ls, A, B, w);
  esp_mem_free(w);
  return st;
}

static const esp_lora_start *start_of(const esp_adapter *a, const esp_site *s) {
  for (int i = 0; i < a->cfg.n_start; i++)
    if (strcmp(a->cfg.start[i].path, s->path) == 0) return &a->cfg.start[i];
  return NULL;
}

esp_status esp_lora_init(esp_adapter *a, esp_site *s) {
  esp_lora_site *ls = a->site_state[s->index];
  const esp_param *pa = &a->params->list[ls->a], *pb = &a->params->list[ls->b];
  uint64_t seed = a->cfg.seed, stream = esp_rng_stream_name(ESP_RNG_INIT, pa->name);
  float *A = esp_mem_alloc(ESP_MEM_HOST, (size_t)pa->numel * sizeof *A); /* zeroed */
  float *B = esp_mem_alloc(ESP_MEM_HOST, (size_t)pb->numel * sizeof *B);
  const esp_lora_start *start = start_of(a, s);
  bool from_data = esp_lora_init_from_data(a->cfg.init);
  esp_status st = A && B ? ESP_OK : ESP_ERR_MEMORY;
  if (st) goto out;
  if (start) {
    memcpy(A, start->A, (size_t)pa->numel * sizeof *A);
    memcpy(B, start->B, (size_t)pb->numel * sizeof *B);
  }
  if (s->kind == ESP_SITE_EMBED)
    fill_normal(B, pb->numel, 1.0f, seed, stream);
  else if (strcmp(a->cfg.init, "gaussian") == 0)
    fill_normal(A, pa->numel, 1.0f / (float)ls->r, seed, stream);
  else if (strcmp(a->cfg.init, "orthogonal") == 0)
    ESP_GOTO(init_orthogonal(a, s, ls, A, B, stream));
  else if (esp_lora_rewrites_base(a->cfg.init) && (start || !from_data))
    ESP_GOTO(init_from_weight(a, s, ls, start, A, B));
  else if (!start) {
    float bound = 1.0f / sqrtf((float)s->in);
    fill_uniform(A, pa->numel, bound, seed, stream);
  }
  esp_params_set(a->params, ls->a, A);
  esp_params_set(a->params, ls->b, B);
out:
  esp_mem_free(A);
  esp_mem_free(B);
  return st;
}
