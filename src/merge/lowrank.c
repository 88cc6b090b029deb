/* lowrank.c: weight differences as LoRA factors: extract and export. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/linalg.h"
#include "merge/open.h"

typedef struct factors { /* of one site; delta = b a */
  esp_site *site;
  int64_t rank;
  float *a, *b; /* [rank, in], [out, rank] */
} factors;

static void factors_deinit(factors *f, int n) {
  for (int i = 0; f && i < n; i++) {
    esp_mem_free(f[i].a);
    esp_mem_free(f[i].b);
  }
  esp_mem_free(f);
}

static esp_status factors_init(factors *f, esp_site *s, int64_t rank) {
  f->site = s;
  f->rank = rank;
  f->a = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(rank * s->in) * 4);
  f->b = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(s->out * rank) * 4);
  return f->a && f->b ? ESP_OK : ESP_ERR_MEMORY;
}

/* B = U sqrt(S), A = sqrt(S) V^T of delta [out, in]; the error of the truncation goes into stats. */
static esp_status truncate_to(factors *f, esp_site *s, const float *delta, int64_t rank, esp_svd_stats *stats) {
  esp_status st;
  int64_t most = s->out < s->in ? s->out : s->in, r = rank < most ? rank : most;
  float *sv = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)r * 4);
  if (!sv) return ESP_ERR_MEMORY;
  ESP_GOTO(factors_init(f, s, rank));
  float *u = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(s->out * r) * 4);
  if (!u) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  st = esp_linalg_svd_truncated(s->out, s->in, delta, r, 16, 8, 0, u, sv, f->a);
  if (st == ESP_OK) {
    double total = 0, kept = 0;
    for (int64_t i = 0; i < s->out * s->in; i++) total += (double)delta[i] * delta[i];
    for (int64_t k = 0; k < r; k++) {
      float root = sqrtf(sv[k]);
      kept += (double)sv[k] * sv[k];
      for (int64_t j = 0; j < s->in; j++) f->a[k * s->in + j] *= root;
      for (int64_t i = 0; i < s->out; i++) f->b[i * rank + k] = u[i * r + k] * root;
    }
    double error = total > 0 ? sqrt(fmax(0, total - kept) / total) : 0;
    stats->mean_error += error;
    if (error > stats->max_error) stats->max_error = error;
    stats->sites++;
  }
  esp_mem_free(u);
out:
  esp_mem_free(sv);
  return st;
}

static void key_of(char *buf, size_t n, const esp_site *s, const char *which) {
  snprintf(buf, n, "base_model.model.%s.%s.weight", s->path, which);
}

/* A LoRA of one rank over the given sites, alpha = r, so that delta = B A. Smaller ranks are padded with zeros. */
static esp_status write_lora(const char *base, const factors *f, int n, int64_t rank, const char *out) {
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

static esp_status difference(const esp_model *a, const esp_model *b, const esp_site *sa, const esp_site *sb,
                             float *delta, float *scratch) {
  ESP_TRY(esp_site_read_weight(b, sb, delta));
  ESP_TRY(esp_site_read_weight(a, sa, scratch));
  for (int64_t i = 0; i < sa->out * sa->in; i++) delta[i] -= scratch[i];
  return ESP_OK;
}

esp_status esp_extract_write(const char *base, const char *tuned, const char *out, int64_t rank, const char *target,
                             esp_svd_stats *stats) {
  esp_status st;
  esp_merge_inputs x = {0}, y = {0};
  factors *f = NULL;
  float *delta = NULL, *scratch = NULL;
  int n = 0, sites = 0;
  *stats = (esp_svd_stats){0};
  if (rank < 1) return esp_fail(ESP_ERR_RECIPE, "extract: rank must be at least 1");
  esp_merge_spec a = {.base = base}, b = {.base = tuned};
  ESP_GOTO(esp_merge_open(&a, ESP_F32, false, &x));
  ESP_GOTO(esp_merge_open(&b, ESP_F32, false, &y));
  esp_adapter_cfg match = {.target_regex = target ? target : "all-linear"};
  esp_site **list;
  sites = esp_model_sites(x.model, &list);
  f = esp_mem_alloc(ESP_MEM_HOST, (size_t)(sites + 1) * sizeof *f);
  int64_t largest = 0;
  for (int i = 0; i < sites; i++)
    if (list[i]->out * list[i]->in > largest) largest = list[i]->out * list[i]->in;
  delta = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)largest * 4);
  scratch = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)largest * 4);
  if (!f || !delta || !scratch) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  for (int i = 0; i < sites; i++) {
    esp_site *s = list[i], *t = esp_model_find_site(y.model, s->path);
    if (s->kind != ESP_SITE_LINEAR || !esp_adapter_matches(&match, s)) continue;
    if (!t || t->out != s->out || t->in != s->in) {
      st = esp_fail(ESP_ERR_DATA, "%s: module '%s' [%lld, %lld] of %s is missing here or has another shape", tuned,
                    s->path, (long long)s->out, (long long)s->in, base);
      goto out;
    }
    ESP_GOTO(difference(x.model, y.model, s, t, delta, scratch));
    ESP_GOTO(truncate_to(&f[n++], s, delta, rank, stats));
  }
  if (n == 0) {
    st = esp_fail(ESP_ERR_RECIPE, "extract: target '%s' matches no linear module of %s", match.target_regex, base);
    goto out;
  }
  stats->mean_error /= n;
  st = write_lora(base, f, n, rank, out);
out:
  factors_deinit(f, n);
  esp_mem_free(delta);
  esp_mem_free(scratch);
  esp_merge_close(&x);
  esp_merge_close(&y);
  return st;
}

/* The site's change as factors: exact where the kind has a low-rank form that fits `rank`, else truncated. */
static esp_status export_site(esp_merge_inputs *in, esp_site *s, int64_t rank, factors *f, esp_svd_stats *stats) {
  esp_adapter *a = in->adapters[0];
  int64_t exact = a->kind->low_rank ? a->kind->low_rank(a, s, NULL, NULL) : 0;
  if (exact > 0 && (rank == 0 || exact <= rank)) {
    ESP_TRY(factors_init(f, s, exact));
    a->kind->low_rank(a, s, f->a, f->b);
    stats->sites++;
    return ESP_OK;
  }
  if (rank == 0)
    return esp_fail(ESP_ERR_RECIPE, "export: type %s has no exact low-rank form on '%s'; give a rank", a->kind->name,
                    s->path);
  esp_status st;
  size_t n = (size_t)(s->out * s->in);
  float *w = esp_mem_alloc(ESP_MEM_WORKSPACE, n * 4), *delta = esp_mem_alloc(ESP_MEM_WORKSPACE, n * 4);
  if (!w || !delta) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  ESP_GOTO(esp_site_read_weight(in->model, s, w));
  memcpy(delta, w, n * 4);
  ESP_GOTO(esp_adapter_effective_rows(a, s, 0, s->out, delta));
  for (size_t i = 0; i < n; i++) delta[i] -= w[i];
  st = truncate_to(f, s, delta, rank, stats);
out:
  esp_mem_free(w);
  esp_mem_free(delta);
  return st;
}

/* What a plain LoRA on linear modules cannot carry. */
static esp_status refuse_beyond_linear(const esp_merge_inputs *in, const char *path) {
  esp_site **list;
  int n = esp_model_sites(in->model, &list);
  const esp_adapter *a = in->adapters[0];
  for (int i = 0; i < n; i++) {
    const esp_site *s = list[i];
    bool linear_target = s->kind == ESP_SITE_LINEAR && a->targeted[s->index];
    if (esp_adapter_changes(a, s) && !linear_target)
      return esp_fail(ESP_ERR_DATA, "%s: module '%s' is trained in full or is no linear: a plain LoRA cannot carry it",
                      path, s->path);
    if (esp_adapter_changes_bias(a, s))
      return esp_fail(ESP_ERR_DATA, "%s: the bias of '%s' is trained: a plain LoRA cannot carry it", path, s->path);
  }
  return ESP_OK;
}

esp_status esp_export_write(const char *base, const char *adapter, const char *out, bool as_lora, bool for_vllm,
                            int64_t rank, esp_svd_stats *stats) {
  esp_status st;
  esp_merge_inputs in = {0};
  factors *f = NULL;
  int n = 0;
  *stats = (esp_svd_stats){0};
  esp_merge_spec spec = {.base = base, .adapters = &adapter, .n_adapters = 1};
  ESP_GOTO(esp_merge_open(&spec, ESP_F32, false, &in));
  if (!as_lora && !for_vllm) {
    st = esp_adapter_save(in.adapters[0], out);
    goto out;
  }
  ESP_GOTO(refuse_beyond_linear(&in, adapter));
  esp_site **list;
  int sites = esp_model_sites(in.model, &list);
  f = esp_mem_alloc(ESP_MEM_HOST, (size_t)(sites + 1) * sizeof *f);
  if (!f) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  int64_t widest = 0;
  for (int i = 0; i < sites; i++) {
    if (!esp_adapter_changes(in.adapters[0], list[i])) continue;
    ESP_GOTO(export_site(&in, list[i], rank, &f[n], stats));
    widest = f[n].rank > widest ? f[n].rank : widest;
    n++;
  }
  if (n == 0) {
    st = esp_fail(ESP_ERR_DATA, "%s: the adapter changes no module", adapter);
    goto out;
  }
  stats->mean_error /= n;
  if (for_vllm) { /* the ranks that vLLM accepts as max_lora_rank */
    int64_t r = 8;
    while (r < widest) r *= 2;
    widest = r;
  }
  st = write_lora(base, f, n, widest, out);
out:
  factors_deinit(f, n);
  esp_merge_close(&in);
  return st;
}
