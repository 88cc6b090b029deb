/* lora_data.c: first values of LoRA from a pass over data, as PEFT's lora/{eva,corda,loraga}.py define them:
 *   eva      A = the first principal components of the module's inputs (of tokens whose prediction is trained), B = 0;
 *            the ranks of all modules are dealt out again by explained variance, up to rho r for one
 *            (Paischer et al. 2024, arXiv:2410.07170)
 *   corda    W C = U S V^T with C the second moment of the inputs; A = sqrt(S/s) V^T C^-1, B = U sqrt(S/s) of the first
 *            (ipm) or last (kpm) r, base W - s B A (Yang et al. 2024, arXiv:2406.05223)
 *   lora_ga  G = U S V^T, the gradient of the weight; A and B from 2r of its singular directions, base W - s B A
 *            (Wang et al. 2024, arXiv:2407.05000)
 * The pass runs on the base as it is. What it gave goes into a configuration from which the adapter is made anew, on
 * the base read again: a rewritten base has to be known before it is packed.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/internal.h"
#include "adapters/lora_data.h"
#include "core/linalg.h"
#include "core/rng.h"

static bool is(const esp_adapter *a, const char *init) {
  return strcmp(a->cfg.init, init) == 0;
}

int64_t esp_lora_rank_most(const esp_adapter *a, const esp_site *s, int64_t r) {
  if (!is(a, "eva") || a->cfg.n_start) return r;
  double rho = a->cfg.eva_rho > 0 ? a->cfg.eva_rho : 2.0;
  int64_t most = (int64_t)nearbyint((double)r * rho); /* Python's round */
  return most < s->in ? most : s->in;
}

esp_status esp_lora_data_check(const esp_adapter *a, const esp_site *s, int64_t r) {
  int64_t k = s->out < s->in ? s->out : s->in, most = is(a, "lora_ga") ? k / 2 : is(a, "eva") ? s->in : k;
  if (r > most && esp_lora_init_from_data(a->cfg.init))
    return esp_fail(ESP_ERR_RECIPE, "adapter.init: %s needs a rank of at most %lld for %s, it is %lld", a->cfg.init,
                    (long long)most, s->path, (long long)r);
  return ESP_OK;
}

static lora_pass *pass_of(esp_adapter *a) {
  if (a->impl) return a->impl;
  esp_site **sites;
  esp_group **groups;
  int n_sites = esp_model_sites(a->model, &sites), n_groups = esp_model_groups(a->model, &groups);
  lora_pass *p = esp_arena_alloc(a->arena, sizeof *p);
  if (p) p->groups = esp_arena_alloc(a->arena, (size_t)(n_groups + 1) * sizeof *p->groups);
  if (p) p->grad = esp_arena_alloc(a->arena, (size_t)(n_sites + 1) * sizeof *p->grad);
  if (p) p->ranks = esp_arena_alloc(a->arena, (size_t)(n_sites + 1) * sizeof *p->ranks);
  return p && p->groups && p->grad && p->ranks ? (a->impl = p) : NULL;
}

void esp_lora_data_free(esp_adapter *a) {
  lora_pass *p = a->impl;
  if (!p) return;
  esp_site **sites;
  esp_group **groups;
  esp_backend *be = a->params->be;
  int n_sites = esp_model_sites(a->model, &sites), n_groups = esp_model_groups(a->model, &groups);
  for (int i = 0; i < n_groups; i++) {
    if (p->groups[i].gram) be->ops->free(be, p->groups[i].gram);
    esp_eva_free(&p->groups[i].eva);
  }
  for (int i = 0; i < n_sites; i++)
    if (p->grad[i]) be->ops->free(be, p->grad[i]);
  a->impl = NULL;
}

int64_t esp_lora_wants_data(const esp_adapter *a, bool *gradients) {
  *gradients = is(a, "lora_ga");
  if (!esp_lora_init_from_data(a->cfg.init) || a->cfg.n_start) return 0;
  const lora_pass *p = a->impl;
  if (p && is(a, "eva") && esp_eva_done(a, p, NULL)) return 0;
  return a->cfg.init_batches ? a->cfg.init_batches : 32;
}

esp_status esp_lora_savable(const esp_adapter *a) {
  if (!esp_lora_init_from_data(a->cfg.init) || a->cfg.n_start) return ESP_OK;
  return esp_fail(ESP_ERR_RECIPE, "adapter.init: %s has seen no data: a run takes it from the first micro-batches",
                  a->cfg.init);
}

/* ---- what is seen ---- */

static void *scratch(esp_adapter *a, int64_t elements) {
  esp_backend *be = a->params->be;
  void *p = be->ops->alloc(be, ESP_MEM_WORKSPACE, elements * (int64_t)sizeof(float));
  if (!p) be->sticky = esp_backend_why_null(be);
  return p;
}

/* Rows before the padding at the end of a batch, whose sequences train nothing. The head sees trained rows only. */
static int64_t real_rows(const esp_batch *b, int64_t rows) {
  if (rows != b->tokens) return rows;
  int64_t end = 0;
  for (int i = 0; i < b->n_seqs; i++)
    for (int32_t t = b->cu_seqlens[i]; t < b->cu_seqlens[i + 1]; t++)
      if (b->weights[t] != 0.0f) end = b->cu_seqlens[i + 1];
  return end;
}

/* The rows on the host, fp32; esp_mem_free. */
static float *host_rows(esp_adapter *a, esp_run *run, esp_tensor x) {
  int64_t rows = esp_tensor_rows(&x), in = esp_tensor_cols(&x), mark = esp_stack_mark(run->stack);
  float *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)(rows * in) * sizeof *host);
  if (!host) {
    a->params->be->sticky = ESP_ERR_MEMORY;
    return NULL;
  }
  esp_tensor flat = esp_stack_tensor(run->stack, ESP_F32, rows, in);
  run->be->ops->axpby(run->be, flat, 1.0f, x, 0.0f);
  run->be->ops->download(run->be, host, flat.data, rows * in * (int64_t)sizeof *host);
  esp_stack_release(run->stack, mark);
  return host;
}

static void see_gram(esp_adapter *a, esp_run *run, lora_group_pass *gp, esp_tensor x) {
  int64_t rows = real_rows(run->batch, esp_tensor_rows(&x)), in = esp_tensor_cols(&x);
  if (rows < 1 || (!gp->gram && !(gp->gram = scratch(a, in * in)))) return;
  x = esp_tensor_rows_view(&x, 0, rows);
  float *host = host_rows(a, run, x), most = -INFINITY;
  for (int64_t i = 0; host && i < rows * in; i++) most = fmaxf(most, host[i]);
  esp_mem_free(host);
  float scale = most != 0.0f && isfinite(most) ? 1.0f / (most * most) : 1.0f; /* PEFT: each input over |max x| */
  run->be->ops->matmul(run->be, esp_tensor_2d(gp->gram, ESP_F32, in, in), x, true, x, false, scale, 1.0f);
  gp->calls += run->part == 0;
}

/* The gradient of the mean loss of the batch. */
static void see_gradient(esp_adapter *a, esp_run *run, esp_group *g, lora_group_pass *gp, esp_tensor x, esp_tensor dy) {
  lora_pass *p = a->impl;
  double weight = 0;
  for (int64_t t = 0; t < run->batch->tokens; t++) weight += run->batch->weights[t];
  if (!(weight > 0)) return;
  for (int i = 0; i < g->n_sites; i++) {
    const esp_site *s = g->sites[i];
    if (!a->targeted[s->index]) continue;
    if (!p->grad[s->index] && !(p->grad[s->index] = scratch(a, s->out * s->in))) return;
    run->be->ops->matmul(run->be, esp_tensor_2d(p->grad[s->index], ESP_F32, s->out, s->in),
                         esp_tensor_cols_view(&dy, s->col0, s->out), true, x, false, (float)(1.0 / weight), 1.0f);
  }
  gp->calls += run->part == 0;
}

/* Inputs of the tokens whose prediction is trained. */
static void see_inputs(esp_adapter *a, esp_run *run, esp_group *g, lora_pass *p, esp_tensor x) {
  int64_t rows = esp_tensor_rows(&x), in = esp_tensor_cols(&x), n = 0, *calls = &p->groups[g->index].calls;
  if (run->part == 0 && *calls == p->batch) { /* the first group of a batch */
    esp_status st = esp_eva_begin(a, p);
    if (st != ESP_OK) a->params->be->sticky = st;
  }
  *calls = p->batch;
  if (p->dealt && esp_eva_done(a, p, g)) return;
  float *host = host_rows(a, run, x);
  for (int64_t t = 0; host && t < rows; t++) {
    if (rows == run->batch->tokens && run->batch->weights[t] == 0.0f) continue;
    if (n < t) memcpy(host + n * in, host + t * in, (size_t)in * sizeof *host);
    n++;
  }
  if (host && a->params->be->sticky == ESP_OK) {
    esp_status st = esp_eva_fit(a, p, g, n, host);
    if (st != ESP_OK) a->params->be->sticky = st;
  }
  esp_mem_free(host);
}

void esp_lora_see(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy) {
  bool targeted = false;
  for (int i = 0; i < g->n_sites; i++) targeted |= a->targeted[g->sites[i]->index];
  lora_pass *p = targeted ? pass_of(a) : NULL;
  if (!p) return;
  if (is(a, "eva"))
    see_inputs(a, run, g, p, x);
  else if (is(a, "corda"))
    see_gram(a, run, &p->groups[g->index], x);
  else
    see_gradient(a, run, g, &p->groups[g->index], x, dy);
}

/* ---- what it gives ---- */

static esp_status corda(esp_adapter *a, esp_site *s, const lora_group_pass *gp, esp_lora_start *out, float *A,
                        float *B) {
  bool counts = esp_backend_counts(a->params->be), last = a->cfg.corda_method && !strcmp(a->cfg.corda_method, "kpm");
  int64_t m = s->out, n = s->in, k = m < n ? m : n, r = out->r, first = last ? k - r : 0;
  float scale = ((const esp_lora_site *)a->site_state[s->index])->s;
  esp_status st = ESP_OK;
  float *buf = esp_mem_alloc(ESP_MEM_HOST, (size_t)(4 * n * n + 2 * m * n + m * k + k + k * n) * sizeof *buf);
  if (!buf) return ESP_ERR_MEMORY;
  float *c = buf, *fixed = c + n * n, *inv = fixed + n * n, *check = inv + n * n, *w = check + n * n, *wc = w + m * n;
  float *u = wc + m * n, *sv = u + m * k, *vt = sv + k;
  ESP_GOTO(esp_linalg_svd(m, n, NULL, u, sv, vt));
  if (counts) goto out;
  if (!gp->gram) ESP_GOTO(esp_fail(ESP_ERR_DATA, "adapter.init: corda saw no token for %s", s->path));
  a->params->be->ops->download(a->params->be, c, gp->gram, n * n * (int64_t)sizeof *c);
  ESP_GOTO(esp_backend_sync(a->params->be));
  double mean = 0;
  for (int64_t i = 0; i < n * n; i++) c[i] /= (float)gp->calls;
  for (int64_t i = 0; i < n; i++) mean += (double)c[i * n + i] / (double)n;
  if (!(mean > 0)) ESP_GOTO(esp_fail(ESP_ERR_DATA, "adapter.init: corda: the inputs of %s are zero", s->path));
  for (double damp = 0.01;; damp *= 2) {
    double error = 0;
    memcpy(fixed, c, (size_t)(n * n) * sizeof *c);
    for (int64_t i = 0; i < n; i++) fixed[i * n + i] += (float)(damp * mean);
    memcpy(inv, fixed, (size_t)(n * n) * sizeof *c);
    ESP_GOTO(esp_linalg_inverse(n, inv));
    esp_linalg_gemm(false, false, n, n, n, 1.0f, fixed, n, inv, n, 0.0f, check, n);
    for (int64_t i = 0; i < n * n; i++) {
      double e = (double)check[i] - (i % (n + 1) == 0);
      error += e * e;
    }
    if (sqrt(error) < 0.05) break;
  }
  ESP_GOTO(esp_site_read_weight(a->model, s, w));
  esp_linalg_gemm(false, false, m, n, n, 1.0f, w, n, fixed, n, 0.0f, wc, n);
  ESP_GOTO(esp_linalg_svd(m, n, wc, u, sv, vt));
  esp_linalg_gemm(false, false, r, n, n, 1.0f, vt + first * n, n, inv, n, 0.0f, A, n);
  for (int64_t j = 0; j < r; j++) {
    float root = sqrtf(sv[first + j] / scale);
    for (int64_t i = 0; i < n; i++) A[j * n + i] *= root;
    for (int64_t o = 0; o < m; o++) B[o * r + j] = root * u[o * k + first + j];
  }
out:
  esp_mem_free(buf);
  return st;
}

/* Which of the 2r directions A and B take. */
static void directions(const esp_adapter *a, const esp_site *s, int64_t r, int64_t *of_a, int64_t *of_b) {
  const char *d = a->cfg.ga_direction ? a->cfg.ga_direction : "ArB2r";
  for (int64_t j = 0; j < r; j++) {
    of_a[j] = strcmp(d, "ArBr") == 0 ? 2 * j + 1 : strcmp(d, "A2rBr") == 0 ? r + j : j;
    of_b[j] = strcmp(d, "ArBr") == 0 ? 2 * j : strcmp(d, "A2rBr") == 0 ? j : r + j;
  }
  if (strcmp(d, "random") != 0) return;
  /* the first r of 2r in any order, the same for both; of_a and of_b lie back to back */
  esp_rng_permutation(a->cfg.seed, esp_rng_stream_name(ESP_RNG_INIT, s->path), 2 * r, of_a);
  memcpy(of_b, of_a, (size_t)r * sizeof *of_a);
}

static esp_status lora_ga(esp_adapter *a, esp_site *s, const lora_group_pass *gp, esp_lora_start *out, float *A,
                          float *B) {
  bool counts = esp_backend_counts(a->params->be);
  int64_t m = s->out, n = s->in, k = m < n ? m : n, r = out->r, q = 4 * r < k ? 4 * r : k;
  const char *how = a->cfg.ga_scale ? a->cfg.ga_scale : "stable";
  float scale = ((const esp_lora_site *)a->site_state[s->index])->s, fa = 1, fb = 1;
  const float *seen = ((lora_pass *)a->impl)->grad[s->index];
  esp_status st = ESP_OK;
  float *buf = esp_mem_alloc(ESP_MEM_HOST, (size_t)(m * n + 2 * r * (m + n + 1)) * sizeof *buf);
  int64_t *index = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * r) * sizeof *index);
  if (!buf || !index) ESP_GOTO(ESP_ERR_MEMORY);
  float *grad = buf, *u = grad + m * n, *sv = u + 2 * r * m, *vt = sv + 2 * r;
  if (!counts) {
    if (!seen) ESP_GOTO(esp_fail(ESP_ERR_DATA, "adapter.init: lora_ga saw no gradient for %s", s->path));
    a->params->be->ops->download(a->params->be, grad, seen, m * n * (int64_t)sizeof *grad);
    ESP_GOTO(esp_backend_sync(a->params->be));
    for (int64_t i = 0; i < m * n; i++) grad[i] /= (float)gp->calls;
  }
  ESP_GOTO(esp_linalg_svd_truncated(m, n, counts ? NULL : grad, 2 * r, q - 2 * r, 4, a->cfg.seed, u, sv, vt));
  directions(a, s, r, index, index + r);
  if (strcmp(how, "stable") == 0) {
    double gamma = a->cfg.ga_gamma > 0 ? a->cfg.ga_gamma : 16.0;
    fb = (float)(sqrt(sqrt((double)m)) / sqrt(gamma));
  } else if (strcmp(how, "weight_svd") == 0 && !counts) {
    float first, us[1], *w = grad;
    float *ignored = esp_mem_alloc(ESP_MEM_HOST, (size_t)(m + n) * sizeof *ignored);
    st = ignored ? esp_site_read_weight(a->model, s, w) : ESP_ERR_MEMORY;
    if (st == ESP_OK) st = esp_linalg_svd_truncated(m, n, w, 1, r - 1 + 8, 8, a->cfg.seed, ignored, us, ignored + m);
    first = us[0];
    esp_mem_free(ignored);
    if (st == ESP_OK && sv[index[r]] > 0) fb = first / sv[index[r]];
  } else if (strcmp(how, "gd_scale") == 0) {
    fa = fb = 1.0f / scale;
  }
  for (int64_t j = 0; j < r && !counts && st == ESP_OK; j++) {
    int64_t ia = index[j], ib = index[r + j];
    for (int64_t c = 0; c < n; c++) A[j * n + c] = fa * vt[ia * n + c];
    for (int64_t o = 0; o < m; o++) B[o * r + j] = fb * sv[ib] * u[o * 2 * r + ib];
  }
out:
  esp_mem_free(buf);
  esp_mem_free(index);
  return st;
}

static esp_status start_site(esp_adapter *a, esp_arena *arena, esp_site *s, int64_t r, esp_lora_start *out) {
  const lora_pass *p = a->impl;
  /* nothing of this model: it is closed before the adapter is made again */
  *out = (esp_lora_start){.path = esp_arena_strdup(arena, s->path), .in = s->in, .out = s->out, .r = r};
  float *A = esp_arena_alloc(arena, (size_t)(r * s->in) * sizeof *A);
  float *B = esp_arena_alloc(arena, (size_t)(s->out * r) * sizeof *B);
  if (!A || !B || !out->path) return ESP_ERR_MEMORY;
  out->A = A;
  out->B = B;
  const lora_group_pass *gp = &p->groups[s->group->index];
  if (is(a, "corda")) return corda(a, s, gp, out, A, B);
  if (is(a, "lora_ga")) return lora_ga(a, s, gp, out, A, B);
  if (!esp_backend_counts(a->params->be)) esp_eva_components(a, &gp->eva, r, A);
  return ESP_OK;
}

esp_status esp_lora_restart(esp_adapter *a, esp_arena *arena, esp_adapter_cfg *out) {
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites), used = 0;
  if (!pass_of(a)) return ESP_ERR_MEMORY;
  ESP_TRY(esp_cfg_copy(arena, &a->cfg, out));
  int64_t *ranks = esp_arena_alloc(arena, (size_t)(n + 1) * sizeof *ranks);
  esp_lora_start *start = esp_arena_alloc(arena, (size_t)(n + 1) * sizeof *start);
  if (!ranks || !start) return ESP_ERR_MEMORY;
  for (int i = 0; i < n; i++)
    if (a->targeted[i] && sites[i]->kind == ESP_SITE_LINEAR) ranks[i] = ((const esp_lora_site *)a->site_state[i])->r;
  if (is(a, "eva") && !esp_backend_counts(a->params->be)) {
    ESP_TRY(esp_eva_ranks(a, a->impl, ranks));
    ESP_TRY(esp_eva_patterns(a, arena, ranks, out));
  }
  for (int i = 0; i < n; i++)
    if (ranks[i] > 0) ESP_TRY(start_site(a, arena, sites[i], ranks[i], &start[used++]));
  if (!used) out->init = "default"; /* embeddings alone, which start as always */
  out->start = start;
  out->n_start = used;
  return ESP_OK;
}
