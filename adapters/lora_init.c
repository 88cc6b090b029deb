/* lora_init.c: starting values of LoRA, as PEFT's lora/layer.py defines them (the random numbers are our own):
 *   default      A ~ U(-1/sqrt(in), 1/sqrt(in)) (kaiming_uniform with a = sqrt 5), B = 0
 *   gaussian     A ~ N(0, 1/r), B = 0
 *   orthogonal   Q = QR(randn(r, r)); A = (randn(in, r/2) Q_odd)^T / 10, B = randn(out, r/2) Q_even / 10: B A = 0
 *   pissa        W = U S V^T; A = sqrt(S_r/s) V_r^T, B = U_r sqrt(S_r/s), base W - s B A (arXiv:2404.02948)
 *   pissa_niter_k  the same from a randomised SVD with k subspace iterations
 *   olora        W = Q R; A = R[:r], B = Q[:, :r], base W - s B A (arXiv:2406.01775)
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

bool esp_lora_rewrites_base(const char *init) {
  return strcmp(init, "pissa") == 0 || strcmp(init, "olora") == 0 || pissa_iterations(init) >= 0;
}

bool esp_lora_init_known(const char *init) {
  return strcmp(init, "default") == 0 || strcmp(init, "gaussian") == 0 || strcmp(init, "orthogonal") == 0 ||
         esp_lora_rewrites_base(init);
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

/* PiSSA and OLoRA: A, B from the weight itself, and the base becomes W - s B A. */
static esp_status init_from_weight(esp_adapter *a, esp_site *s, esp_lora_site *ls, float *A, float *B) {
  int64_t r = ls->r, m = s->out, n = s->in, k = m < n ? m : n;
  if (r > k)
    return esp_fail(ESP_ERR_RECIPE, "adapter.init: %s needs a rank of at most %lld for %s, it is %lld", a->cfg.init,
                    (long long)k, s->path, (long long)r);
  float *w = esp_mem_alloc(ESP_MEM_HOST, (size_t)(m * n) * sizeof *w);
  float *tmp = NULL, *u = NULL, *sv = NULL, *vt = NULL;
  esp_status st = w ? ESP_OK : ESP_ERR_MEMORY;
  if (st) goto out;
  ESP_GOTO(esp_site_read_weight(a->model, s, w));
  if (strcmp(a->cfg.init, "olora") == 0) {
    /* The first r columns of Q span the first r columns of W, so a panel QR and R[:r] = Q_r^T W are enough. */
    for (int64_t i = 0; i < m; i++) memcpy(B + i * r, w + i * n, (size_t)r * sizeof *B);
    ESP_GOTO(esp_linalg_qr(m, r, B, NULL));
    esp_linalg_gemm(true, false, r, n, m, 1.0f, B, r, w, n, 0.0f, A, n);
  } else {
    int niter = pissa_iterations(a->cfg.init);
    int64_t q = niter < 0 ? k : r;
    u = esp_mem_alloc(ESP_MEM_HOST, (size_t)(m * q) * sizeof *u);
    sv = esp_mem_alloc(ESP_MEM_HOST, (size_t)q * sizeof *sv);
    vt = esp_mem_alloc(ESP_MEM_HOST, (size_t)(q * n) * sizeof *vt);
    st = u && sv && vt ? ESP_OK : ESP_ERR_MEMORY;
    if (st) goto out;
    if (niter < 0) {
      tmp = w; /* destroyed by the factorisation */
      w = NULL;
      ESP_GOTO(esp_linalg_svd(m, n, tmp, u, sv, vt));
    } else
      ESP_GOTO(esp_linalg_svd_truncated(m, n, w, r, 0, niter, a->cfg.seed, u, sv, vt));
    for (int64_t j = 0; j < r; j++) {
      float root = sqrtf(sv[j] / ls->s);
      if (!isfinite(root)) {
        st = esp_fail(ESP_ERR_RECIPE, "adapter.alpha: must be positive for init %s", a->cfg.init);
        goto out;
      }
      for (int64_t c = 0; c < n; c++) A[j * n + c] = root * vt[j * n + c];
      for (int64_t i = 0; i < m; i++) B[i * r + j] = root * u[i * q + j];
    }
  }
  ls->A0 = esp_mem_alloc(ESP_MEM_PARAMS, (size_t)(r * n) * sizeof *A);
  ls->B0 = esp_mem_alloc(ESP_MEM_PARAMS, (size_t)(m * r) * sizeof *B);
  if (!w) w = esp_mem_alloc(ESP_MEM_HOST, (size_t)(m * n) * sizeof *w);
  st = ls->A0 && ls->B0 && w ? ESP_OK : ESP_ERR_MEMORY;
  if (st) goto out;
  memcpy(ls->A0, A, (size_t)(r * n) * sizeof *A);
  memcpy(ls->B0, B, (size_t)(m * r) * sizeof *B);
  memset(w, 0, (size_t)(m * n) * sizeof *w);
  esp_lowrank_add(w, m, n, A, B, r, -ls->s);
  st = esp_site_add_delta(a->model, s, w);
out:
  esp_mem_free(w);
  esp_mem_free(tmp);
  esp_mem_free(u);
  esp_mem_free(sv);
  esp_mem_free(vt);
  return st;
}

esp_status esp_lora_init(esp_adapter *a, esp_site *s) {
  esp_lora_site *ls = a->site_state[s->index];
  const esp_param *pa = &a->params->list[ls->a], *pb = &a->params->list[ls->b];
  uint64_t seed = a->cfg.seed, stream = esp_rng_stream_name(ESP_RNG_INIT, pa->name);
  float *A = esp_mem_alloc(ESP_MEM_HOST, (size_t)pa->numel * sizeof *A); /* zeroed */
  float *B = esp_mem_alloc(ESP_MEM_HOST, (size_t)pb->numel * sizeof *B);
  esp_status st = A && B ? ESP_OK : ESP_ERR_MEMORY;
  if (st) goto out;
  if (s->kind == ESP_SITE_EMBED)
    fill_normal(B, pb->numel, 1.0f, seed, stream);
  else if (strcmp(a->cfg.init, "gaussian") == 0)
    fill_normal(A, pa->numel, 1.0f / (float)ls->r, seed, stream);
  else if (strcmp(a->cfg.init, "orthogonal") == 0)
    ESP_GOTO(init_orthogonal(a, s, ls, A, B, stream));
  else if (esp_lora_rewrites_base(a->cfg.init))
    ESP_GOTO(init_from_weight(a, s, ls, A, B));
  else {
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
