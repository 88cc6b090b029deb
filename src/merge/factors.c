/* factors.c: low-rank changes of sites: made from dense ones, shortened, written as a LoRA. */
#include "merge/factors.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/linalg.h"

void esp_factors_count(esp_svd_stats *stats, double error) {
  stats->mean_error += error;
  if (error > stats->max_error) stats->max_error = error;
  stats->sites++;
}

void esp_factors_deinit(esp_factors *f, int n) {
  for (int i = 0; f && i < n; i++) {
    esp_mem_free(f[i].a);
    esp_mem_free(f[i].b);
  }
  esp_mem_free(f);
}

esp_status esp_factors_init(esp_factors *f, esp_site *s, int64_t rank) {
  f->site = s;
  f->rank = rank;
  f->a = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(rank * s->in) * 4);
  f->b = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(s->out * rank) * 4);
  return f->a && f->b ? ESP_OK : ESP_ERR_MEMORY;
}

/* What is measured is the difference itself: total less kept squares loses half of the digits. */
static esp_status residual(const esp_factors *f, const float *delta, esp_svd_stats *stats) {
  int64_t out = f->site->out, in = f->site->in, step = out < 256 ? out : 256;
  float *ba = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(step * in) * 4);
  double total = 0, lost = 0;
  if (!ba) return ESP_ERR_MEMORY;
  for (int64_t r = 0; r < out; r += step) {
    int64_t n = out - r < step ? out - r : step;
    const float *d = delta + r * in;
    esp_linalg_gemm(false, false, n, in, f->rank, 1.0f, f->b + r * f->rank, f->rank, f->a, in, 0.0f, ba, in);
    for (int64_t i = 0; i < n * in; i++) {
      total += (double)d[i] * d[i];
      lost += ((double)d[i] - ba[i]) * ((double)d[i] - ba[i]);
    }
  }
  esp_mem_free(ba);
  esp_factors_count(stats, total > 0 ? sqrt(lost / total) : 0);
  return ESP_OK;
}

esp_status esp_factors_truncate(esp_factors *f, esp_site *s, const float *delta, int64_t rank, esp_svd_stats *stats) {
  esp_status st;
  int64_t most = s->out < s->in ? s->out : s->in, r = rank < most ? rank : most;
  float *sv = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)r * 4);
  if (!sv) return ESP_ERR_MEMORY;
  ESP_GOTO(esp_factors_init(f, s, rank));
  float *u = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(s->out * r) * 4);
  if (!u) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  st = esp_linalg_svd_truncated(s->out, s->in, delta, r, 16, 8, 0, u, sv, f->a);
  if (st == ESP_OK) {
    for (int64_t k = 0; k < r; k++) {
      float root = sqrtf(sv[k]);
      for (int64_t j = 0; j < s->in; j++) f->a[k * s->in + j] *= root;
      for (int64_t i = 0; i < s->out; i++) f->b[i * rank + k] = u[i * r + k] * root;
    }
    st = residual(f, delta, stats);
  }
  esp_mem_free(u);
out:
  esp_mem_free(sv);
  return st;
}

/* Singular values and both sides of b a: through the dense product where it is the smaller, else through the triangular
 * factors of thin QRs, so that nothing of size [out, in] is made. u [out, k], v [k, in]. */
static esp_status svd_of(const esp_factors *f, int64_t *k, float **u, float **sv, float **v) {
  esp_status st;
  int64_t out = f->site->out, in = f->site->in, r = f->rank, least = out < in ? out : in;
  bool dense = r > least;
  int64_t n = *k = dense ? least : r;
  float *p = NULL, *q = NULL;
  *u = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(out * n) * 4);
  *sv = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)n * 4);
  *v = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(n * in) * 4);
  p = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(dense ? out * in : (out + in + 5 * r) * r) * 4);
  if (!*u || !*sv || !*v || !p) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  if (dense) {
    esp_linalg_gemm(false, false, out, in, r, 1.0f, f->b, r, f->a, in, 0.0f, p, in);
    st = esp_linalg_svd(out, in, p, *u, *sv, *v);
    goto out;
  }
  q = p + out * r; /* p [out, r], q [in, r], then square matrices */
  float *rb = q + in * r, *ra = rb + r * r, *core = ra + r * r, *cu = core + r * r, *cv = cu + r * r;
  memcpy(p, f->b, (size_t)(out * r) * 4);
  for (int64_t j = 0; j < r; j++)
    for (int64_t i = 0; i < in; i++) q[i * r + j] = f->a[j * in + i];
  ESP_GOTO(esp_linalg_qr(out, r, p, rb));
  ESP_GOTO(esp_linalg_qr(in, r, q, ra));
  esp_linalg_gemm(false, true, r, r, r, 1.0f, rb, r, ra, r, 0.0f, core, r);
  ESP_GOTO(esp_linalg_svd(r, r, core, cu, *sv, cv));
  esp_linalg_gemm(false, false, out, r, r, 1.0f, p, r, cu, r, 0.0f, *u, r);
  esp_linalg_gemm(false, true, r, in, r, 1.0f, cv, r, q, r, 0.0f, *v, in);
out:
  esp_mem_free(p);
  return st;
}

esp_status esp_factors_reduce(esp_factors *f, int64_t rank, esp_svd_stats *stats) {
  esp_status st;
  esp_factors small = {0};
  int64_t n, r = 1, out = f->site->out, in = f->site->in;
  float *u = NULL, *sv = NULL, *v = NULL;
  ESP_GOTO(svd_of(f, &n, &u, &sv, &v));
  while (r < n && sv[r] > 1e-6f * sv[0]) r++; /* the rest is the rounding of fp32 */
  if (rank > 0 && rank < r) r = rank;
  ESP_GOTO(esp_factors_init(&small, f->site, r));
  double total = 0, lost = 0;
  for (int64_t k = 0; k < n; k++) {
    total += (double)sv[k] * sv[k];
    if (k >= r) lost += (double)sv[k] * sv[k];
  }
  for (int64_t k = 0; k < r; k++) {
    float root = sqrtf(sv[k]);
    for (int64_t j = 0; j < in; j++) small.a[k * in + j] = v[k * in + j] * root;
    for (int64_t i = 0; i < out; i++) small.b[i * r + k] = u[i * n + k] * root;
  }
  esp_factors_count(stats, total > 0 ? sqrt(lost / total) : 0);
  esp_mem_free(f->a);
  esp_mem_free(f->b);
  *f = small;
  small = (esp_factors){0};
out:
  esp_mem_free(small.a);
  esp_mem_free(small.b);
  esp_mem_free(u);
  esp_mem_free(sv);
  esp_mem_free(v);
  return st;
}

static void key_of(char *buf, size_t n, const esp_site *s, const char *which) {
  snprintf(buf, n, "base_model.model.%s.%s.weight", s->path, which);
}

esp_status esp_factors_write(const char *base, const esp_factors *f, int n, int64_t rank, const char *out) {
  esp_status st;
  esp_merge_inputs in = {0};
  esp_adapter *lora = NULL;
  const char **paths = NULL;
  float *buf = NULL;
  esp_merge_spec spec = {.base = base};
  int64_t widest = 0;
  ESP_GOTO(esp_merge_open(&spec, ESP_F32, false, &in));
  paths = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n + 1) * sizeof *paths);
  for (int i = 0; paths && i < n; i++) {
    paths[i] = f[i].site->path;
    int64_t w = f[i].site->out > f[i].site->in ? f[i].site->out : f[i].site->in;
    widest = w > widest ? w : widest;
  }
  buf = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(widest * rank + 1) * 4);
  if (!paths || !buf) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  esp_adapter_cfg cfg = {.type = "lora",
                         .r = rank,
                         .alpha = (double)rank,
                         .init = "default",
                         .bias = "none",
                         .target = paths,
                         .n_target = n};
  ESP_GOTO(esp_adapter_create(in.model, &cfg, "default", false, &lora));
  for (int i = 0; i < n; i++) {
    const esp_site *s = f[i].site;
    char key[512];
    key_of(key, sizeof key, s, "lora_A");
    int a = esp_params_find(lora->params, key);
    key_of(key, sizeof key, s, "lora_B");
    int b = esp_params_find(lora->params, key);
    if (a < 0 || b < 0) {
      st = esp_fail(ESP_ERR_INTERNAL, "%s: no LoRA parameter was declared for this site", s->path);
      goto out;
    }
    memset(buf, 0, (size_t)(rank * s->in) * 4);
    memcpy(buf, f[i].a, (size_t)(f[i].rank * s->in) * 4);
    esp_params_set(lora->params, a, buf);
    for (int64_t o = 0; o < s->out; o++)
      for (int64_t k = 0; k < rank; k++) buf[o * rank + k] = k < f[i].rank ? f[i].b[o * f[i].rank + k] : 0;
    esp_params_set(lora->params, b, buf);
  }
  st = esp_adapter_save(lora, out);
out:
  esp_adapter_destroy(lora);
  esp_mem_free(paths);
  esp_mem_free(buf);
  esp_merge_close(&in);
  return st;
}

esp_status esp_lora_carries(const esp_merge_inputs *in, int which, const char *path, bool near) {
  esp_site **list;
  int n = esp_model_sites(in->model, &list);
  const esp_adapter *a = in->adapters[which];
  if (!a->kind->mergeable && !(near && a->kind->near_low_rank))
    return esp_fail(ESP_ERR_RECIPE, "%s: an adapter of type %s has no matrix form that a plain LoRA could carry", path,
                    a->kind->name);
  for (int i = 0; i < n; i++) {
    const esp_site *s = list[i];
    bool linear_target = s->kind == ESP_SITE_LINEAR && a->targeted[s->index];
    if (esp_adapter_changes(a, s) && !linear_target)
      return esp_fail(ESP_ERR_RECIPE,
                      "%s: module '%s' is trained in full or is no linear: a plain LoRA cannot carry it; use merge",
                      path, s->path);
    if (esp_adapter_changes_bias(a, s))
      return esp_fail(ESP_ERR_RECIPE, "%s: the bias of '%s' is trained: a plain LoRA cannot carry it; use merge", path,
                      s->path);
  }
  return ESP_OK;
}

esp_status esp_site_delta(esp_merge_inputs *in, int which, esp_site *s, int64_t r0, int64_t n, float *delta) {
  esp_status st;
  esp_adapter *a = in->adapters[which];
  esp_factors f = {0};
  float *w = NULL;
  int64_t r = a->kind->low_rank ? a->kind->low_rank(a, s, NULL, NULL) : 0;
  if (r > 0) { /* not through W + BA - W, which would round twice */
    ESP_GOTO(esp_factors_init(&f, s, r));
    a->kind->low_rank(a, s, f.a, f.b);
    esp_linalg_gemm(false, false, n, s->in, r, 1.0f, f.b + r0 * r, r, f.a, s->in, 0.0f, delta, s->in);
    goto out;
  }
  w = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(n * s->in) * 4);
  if (!w) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  ESP_GOTO(esp_site_read_weight_rows(in->model, s, r0, n, w));
  memcpy(delta, w, (size_t)(n * s->in) * 4);
  ESP_GOTO(esp_adapter_effective_rows(a, s, r0, n, delta));
  for (int64_t i = 0; i < n * s->in; i++) delta[i] -= w[i];
out:
  esp_mem_free(w);
  esp_mem_free(f.a);
  esp_mem_free(f.b);
  return st;
}
