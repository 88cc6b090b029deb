/* lora_eva.c: the principal components of EVA, batch by batch (incremental PCA after Ross et al. 2008, as
 * peft/utils/incremental_pca.py, with the randomised SVD of core/linalg.h), and the deal of ranks
 * (_get_eva_state_dict): all components of all modules, sorted by the share of variance that they explain in their own
 * module; the first sum-of-ranks of them stay. Modules of one group have one input and share its components.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/lora_data.h"
#include "core/linalg.h"

static int64_t rank_of(const esp_adapter *a, const esp_site *s) {
  bool linear = a->targeted[s->index] && s->kind == ESP_SITE_LINEAR;
  return linear ? ((const esp_lora_site *)a->site_state[s->index])->r : 0;
}

/* The most ranks that a module of the group may get: PEFT takes the largest for all that share an input. */
static int64_t components_of(const esp_adapter *a, const esp_group *g) {
  int64_t k = 0;
  for (int i = 0; i < g->n_sites; i++) {
    int64_t r = rank_of(a, g->sites[i]), most = r ? esp_lora_rank_most(a, g->sites[i], r) : 0;
    k = most > k ? most : k;
  }
  return k;
}

void esp_eva_free(esp_eva *e) {
  esp_mem_free(e->components);
  esp_mem_free(e->values);
  esp_mem_free(e->ratio);
  esp_mem_free(e->mean);
  esp_mem_free(e->var);
  esp_mem_free(e->converged);
  *e = (esp_eva){0};
}

static esp_status begin(esp_eva *e, int64_t k, int64_t in) {
  e->k = k;
  e->components = esp_mem_alloc(ESP_MEM_HOST, (size_t)(k * in) * sizeof *e->components);
  e->values = esp_mem_alloc(ESP_MEM_HOST, (size_t)k * sizeof *e->values);
  e->ratio = esp_mem_alloc(ESP_MEM_HOST, (size_t)k * sizeof *e->ratio);
  e->mean = esp_mem_alloc(ESP_MEM_HOST, (size_t)in * sizeof *e->mean);
  e->var = esp_mem_alloc(ESP_MEM_HOST, (size_t)in * sizeof *e->var);
  e->converged = esp_mem_alloc(ESP_MEM_HOST, (size_t)k * sizeof *e->converged);
  bool ok = e->components && e->values && e->ratio && e->mean && e->var && e->converged;
  return ok ? ESP_OK : ESP_ERR_MEMORY;
}

/* Mean and variance with the batch (Chan et al.), and the batch less its own mean. Answers the sum of all variances. */
static double merge_moments(esp_eva *e, int64_t n, int64_t in, float *x, double *batch_mean) {
  double n0 = (double)e->seen, n1 = (double)n, total = 0;
  for (int64_t c = 0; c < in; c++) {
    double sum = 0, square = 0;
    for (int64_t t = 0; t < n; t++) sum += x[t * in + c];
    batch_mean[c] = sum / n1;
    for (int64_t t = 0; t < n; t++) {
      double d = x[t * in + c] - batch_mean[c];
      square += d * d;
      x[t * in + c] = (float)d;
    }
    double d = batch_mean[c] - e->mean[c];
    e->var[c] = (e->var[c] * n0 + square + d * d * n0 * n1 / (n0 + n1)) / (n0 + n1);
    total += e->var[c];
  }
  return total;
}

static void flip(float *v, int64_t in) { /* the largest entry is positive, so that steps can be compared */
  int64_t at = 0;
  for (int64_t c = 1; c < in; c++)
    if (fabsf(v[c]) > fabsf(v[at])) at = c;
  float sign = v[at] < 0 ? -1.0f : 1.0f;
  for (int64_t c = 0; c < in; c++) v[c] *= sign;
}

static double cosine(const float *x, const float *y, int64_t n) {
  double xy = 0, xx = 0, yy = 0;
  for (int64_t c = 0; c < n; c++) {
    xy += (double)x[c] * y[c];
    xx += (double)x[c] * x[c];
    yy += (double)y[c] * y[c];
  }
  return xx > 0 && yy > 0 ? xy / sqrt(xx * yy) : 0;
}

esp_status esp_eva_fit(esp_adapter *a, lora_pass *p, const esp_group *g, int64_t n, float *x) {
  int64_t in = g->in, k = components_of(a, g), more = k > 32 ? k : 32; /* beyond those that are wanted */
  esp_eva *e = &p->groups[g->index].eva;
  bool counts = esp_backend_counts(a->params->be), first = e->seen == 0;
  esp_status st = ESP_OK;
  if (n < k && !counts) return ESP_OK;
  if (!e->k) ESP_TRY(begin(e, k, in));
  int64_t rows = first && !counts ? n : k + n + 1; /* what was found, the batch, the shift of the mean */
  double *batch_mean = esp_mem_alloc(ESP_MEM_HOST, (size_t)in * sizeof *batch_mean);
  float *stack = esp_mem_alloc(ESP_MEM_HOST, (size_t)(rows * in + rows * k + k + k * in) * sizeof *stack);
  if (!batch_mean || !stack) ESP_GOTO(ESP_ERR_MEMORY);
  float *u = stack + rows * in, *sv = u + rows * k, *vt = sv + k;
  if (!counts) {
    double variance = merge_moments(e, n, in, x, batch_mean), n0 = (double)e->seen, n1 = (double)n;
    for (int64_t j = 0; j < k && !first; j++)
      for (int64_t c = 0; c < in; c++) stack[j * in + c] = e->values[j] * e->components[j * in + c];
    memcpy(stack + (first ? 0 : k * in), x, (size_t)(n * in) * sizeof *x);
    for (int64_t c = 0; c < in; c++) {
      if (!first) stack[(k + n) * in + c] = (float)(sqrt(n0 / (n0 + n1) * n1) * (e->mean[c] - batch_mean[c]));
      e->mean[c] = (e->mean[c] * n0 + batch_mean[c] * n1) / (n0 + n1);
    }
    ESP_GOTO(esp_linalg_svd_truncated(rows, in, stack, k, more, 4, 42, u, sv, vt));
    for (int64_t j = 0; j < k; j++) {
      flip(vt + j * in, in);
      double tau = a->cfg.eva_tau > 0 ? a->cfg.eva_tau : 0.99;
      e->converged[j] = !first && cosine(vt + j * in, e->components + j * in, in) >= tau;
      e->ratio[j] = (double)sv[j] * sv[j] / (variance * (n0 + n1));
    }
    memcpy(e->components, vt, (size_t)(k * in) * sizeof *vt);
    memcpy(e->values, sv, (size_t)k * sizeof *sv);
    e->seen += n;
  } else {
    st = esp_linalg_svd_truncated(rows, in, NULL, k, more, 4, 42, u, sv, vt);
  }
out:
  esp_mem_free(batch_mean);
  esp_mem_free(stack);
  return st;
}

typedef struct component {
  double ratio;
  int site, order;
} component;

static int by_ratio(const void *x, const void *y) {
  const component *a = x, *b = y;
  if (a->ratio != b->ratio) return a->ratio < b->ratio ? 1 : -1;
  return (a->order > b->order) - (a->order < b->order);
}

/* False: some group has no components yet. */
static bool deal(const esp_adapter *a, const lora_pass *p, int64_t *ranks, esp_status *st) {
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites), count = 0, at = 0;
  int64_t budget = 0;
  for (int i = 0; i < n; i++) {
    int64_t r = rank_of(a, sites[i]);
    const esp_eva *e = r ? &p->groups[sites[i]->group->index].eva : NULL;
    if (e && !e->seen) return false;
    budget += r;
    count += e ? (int)e->k : 0;
    ranks[i] = 0;
  }
  component *list = esp_mem_alloc(ESP_MEM_HOST, (size_t)(count + 1) * sizeof *list);
  *st = list ? ESP_OK : ESP_ERR_MEMORY;
  if (!list) return false;
  for (int i = 0; i < n; i++) {
    if (!rank_of(a, sites[i])) continue;
    const esp_eva *e = &p->groups[sites[i]->group->index].eva;
    for (int64_t j = 0; j < e->k; j++, at++) list[at] = (component){e->ratio[j], i, at};
  }
  qsort(list, (size_t)count, sizeof *list, by_ratio);
  for (int64_t j = 0; j < budget && j < count; j++) ranks[list[j].site]++;
  esp_mem_free(list);
  return true;
}

static bool stands_still(const lora_pass *p, const esp_group *g, const int64_t *ranks) {
  for (int i = 0; i < g->n_sites; i++)
    for (int64_t j = 0; j < ranks[g->sites[i]->index]; j++)
      if (!p->groups[g->index].eva.converged[j]) return false;
  return true;
}

esp_status esp_eva_begin(const esp_adapter *a, lora_pass *p) {
  esp_status st = ESP_OK;
  p->batch++;
  p->dealt = !esp_backend_counts(a->params->be) && deal(a, p, p->ranks, &st);
  return st;
}

bool esp_eva_done(const esp_adapter *a, const lora_pass *p, const esp_group *g) {
  if (g) return stands_still(p, g, p->ranks);
  esp_group **groups;
  esp_site **sites;
  esp_status st = ESP_OK;
  int n = esp_model_groups(a->model, &groups), n_sites = esp_model_sites(a->model, &sites);
  int64_t *ranks = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n_sites + 1) * sizeof *ranks);
  bool done = ranks && !esp_backend_counts(a->params->be) && deal(a, p, ranks, &st);
  for (int i = 0; i < n && done; i++) done = stands_still(p, groups[i], ranks);
  esp_mem_free(ranks);
  return done;
}

esp_status esp_eva_ranks(const esp_adapter *a, const lora_pass *p, int64_t *ranks) {
  esp_status st = ESP_OK;
  if (deal(a, p, ranks, &st)) return ESP_OK;
  ESP_TRY(st);
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites);
  for (int i = 0; i < n; i++)
    if (rank_of(a, sites[i]) && !p->groups[sites[i]->group->index].eva.seen)
      return esp_fail(ESP_ERR_DATA,
                      "adapter.init: eva needs micro-batches of at least %lld trained tokens for %s and saw none",
                      (long long)components_of(a, sites[i]->group), sites[i]->path);
  return ESP_ERR_MEMORY;
}

static void add_pattern(esp_pattern *list, int *n, const char *path, double value, double usual) {
  if (value != usual) list[(*n)++] = (esp_pattern){path, value};
}

/* Exact paths, as PEFT writes them; a module without a rank is left out of the targets. */
esp_status esp_eva_patterns(const esp_adapter *a, esp_arena *arena, const int64_t *ranks, esp_adapter_cfg *out) {
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites), n_rank = 0, n_alpha = 0, n_out = 0;
  size_t room = (size_t)(n + 1), regex = a->cfg.exclude_regex ? strlen(a->cfg.exclude_regex) + 8 : 0;
  esp_pattern *rank = esp_arena_alloc(arena, room * sizeof *rank),
              *alpha = esp_arena_alloc(arena, room * sizeof *alpha);
  const char **exclude = esp_arena_alloc(arena, (room + (size_t)a->cfg.n_exclude) * sizeof *exclude);
  if (!rank || !alpha || !exclude) return ESP_ERR_MEMORY;
  for (int i = 0; i < a->cfg.n_exclude; i++) exclude[n_out++] = out->exclude[i];
  for (int i = 0; i < n; i++) {
    int64_t r = rank_of(a, sites[i]);
    if (!r) continue;
    double al = esp_pattern_value(a->cfg.alpha_pattern, a->cfg.n_alpha_pattern, sites[i]->path, a->cfg.alpha);
    const char *path = esp_arena_strdup(arena, sites[i]->path);
    if (!path) return ESP_ERR_MEMORY;
    if (a->cfg.eva_adjust_alpha) al *= (double)ranks[i] / (double)r;
    if (ranks[i] == 0) {
      exclude[n_out++] = path;
      regex += strlen(path) + 1;
      continue;
    }
    add_pattern(rank, &n_rank, path, (double)ranks[i], (double)a->cfg.r);
    add_pattern(alpha, &n_alpha, path, al, a->cfg.alpha);
  }
  out->rank_pattern = rank;
  out->n_rank_pattern = n_rank;
  out->alpha_pattern = alpha;
  out->n_alpha_pattern = n_alpha;
  if (!a->cfg.exclude_regex) {
    out->exclude = exclude;
    out->n_exclude = n_out;
    return ESP_OK;
  }
  char *joined = esp_arena_alloc(arena, regex + 1); /* a regular expression takes no list beside it */
  if (!joined) return ESP_ERR_MEMORY;
  size_t at = (size_t)sprintf(joined, "(%s)", a->cfg.exclude_regex);
  for (int i = 0; i < n_out; i++) at += (size_t)sprintf(joined + at, "|%s", exclude[i]);
  out->exclude_regex = joined;
  return ESP_OK;
}

void esp_eva_components(const esp_adapter *a, const esp_eva *e, int64_t r, float *A) {
  int64_t in = 0;
  esp_group **groups;
  int n = esp_model_groups(a->model, &groups);
  for (int i = 0; i < n; i++)
    if (&((lora_pass *)a->impl)->groups[i].eva == e) in = groups[i]->in;
  for (int64_t j = 0; j < r; j++) {
    float scale = a->cfg.eva_whiten && e->values[j] > 0 ? 1.0f / sqrtf(e->values[j]) : 1.0f;
    for (int64_t c = 0; c < in; c++) A[j * in + c] = scale * e->components[j * in + c];
  }
}
