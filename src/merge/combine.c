/* combine.c: several adapters as one LoRA, site by site: one site's weights at a time are in memory beside the factors.
 * The eleven combinations are those of PEFT's add_weighted_adapter, by name; D_i = s_i B_i A_i is what adapter i adds
 * to a weight, w_i its weight here.
 *
 *   linear, dare_linear, magnitude_prune   sum w_i s_i B~_i A~_i, A~ and B~ the factors after the operation, in as few
 *                                          ranks as carry it exactly, or the best `rank` of them with the error told
 *   cat                                    sum w_i D_i, the factors side by side
 *   ties, dare_ties                        TIES (Yadav et al. 2023, arXiv:2306.01708) on the A's and on the B's
 *   svd and *_svd                          the same operations on the D_i themselves, then a truncated SVD
 *
 * Where PEFT (0.21 and before) computes something else than its names say, this file does not follow it:
 *   - its svd types apply the scaling s_i twice: here D_i holds it once;
 *   - adapters with rslora enter sqrt(r) too large: here s_i is whatever the kind itself uses;
 *   - its linear adds A's and B's, so that (A1+A2)(B1+B2) has cross terms and two halves of one adapter make double of
 *     it: here products are added, never factors. (Averaging factors is what TIES means: entry by entry they are one
 *     parameter vector, and equal adapters give that adapter.)
 *   - magnitudes of DoRA are dropped in silence: here a kind whose change is not low-rank is taken through its
 *     effective weight (svd types) or refused by name (the others);
 *   - a single adapter turns every combination into linear: here it is pruned like any other;
 *   - its masks are drawn without a seed: here they are a function of (seed, adapter, site, element).
 * DARE: Yu et al. 2023, arXiv:2311.03099. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/linalg.h"
#include "core/rng.h"
#include "merge/factors.h"

typedef enum operation { SUM, CAT, PRUNE, DARE, TIES, DARE_TIES } operation;

typedef struct combination {
  const char *name;
  operation op;
  bool dense; /* on the D_i */
} combination;

static const combination combinations[] = {
    {"linear", SUM, false},
    {"svd", SUM, true},
    {"cat", CAT, false},
    {"ties", TIES, false},
    {"ties_svd", TIES, true},
    {"dare_ties", DARE_TIES, false},
    {"dare_linear", DARE, false},
    {"dare_ties_svd", DARE_TIES, true},
    {"dare_linear_svd", DARE, true},
    {"magnitude_prune", PRUNE, false},
    {"magnitude_prune_svd", PRUNE, true},
};
enum { N_COMBINATIONS = sizeof combinations / sizeof combinations[0] };
enum { PART_A, PART_B, PART_DELTA }; /* what a mask is drawn for */

typedef struct combiner {
  const esp_combine_spec *spec;
  const combination *how;
  esp_merge_inputs in;
  esp_svd_stats *stats;
} combiner;

const char *const *esp_combine_names(int *n) {
  static const char *names[N_COMBINATIONS + 1];
  for (int i = 0; i < N_COMBINATIONS; i++) names[i] = combinations[i].name;
  *n = N_COMBINATIONS;
  return names;
}

static bool thins(operation op) {
  return op != SUM && op != CAT;
}
static bool elects(operation op) {
  return op == TIES || op == DARE_TIES;
}

static int by_size(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return x < y ? 1 : x > y ? -1 : 0;
}

/* Only the int(density * n) largest entries stay; of equals the first. */
static esp_status prune(float *x, int64_t n, double density) {
  int64_t keep = (int64_t)(density * (double)n);
  if (keep >= n) return ESP_OK;
  float *size = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)n * sizeof *size);
  if (!size) return ESP_ERR_MEMORY;
  for (int64_t i = 0; i < n; i++) size[i] = fabsf(x[i]);
  qsort(size, (size_t)n, sizeof *size, by_size);
  float limit = keep > 0 ? size[keep - 1] : INFINITY;
  int64_t equal = 0;
  for (int64_t i = 0; i < keep; i++) equal += size[i] == limit;
  esp_mem_free(size);
  for (int64_t i = 0; i < n; i++) {
    float a = fabsf(x[i]);
    if (a > limit || (a == limit && equal-- > 0)) continue;
    x[i] = 0;
  }
  return ESP_OK;
}

/* Each entry stays with probability density, and is then divided by it. */
static void dare(float *x, int64_t n, double density, uint64_t seed, int adapter, int part, const char *path) {
  uint64_t stream =
      esp_rng_stream(ESP_RNG_DATA, (uint64_t)adapter, (uint64_t)part, esp_rng_stream_name(ESP_RNG_DATA, path));
  if (density >= 1) return;
  for (int64_t i = 0; i < n; i++)
    x[i] = esp_rng_uniform(seed, stream, (uint64_t)i) < (float)density ? (float)(x[i] / density) : 0;
}

static esp_status thin(const combiner *c, float *x, int64_t n, int adapter, int part, const char *path) {
  if (c->how->op == PRUNE || c->how->op == TIES) return prune(x, n, c->spec->density);
  if (c->how->op == DARE || c->how->op == DARE_TIES) dare(x, n, c->spec->density, c->spec->seed, adapter, part, path);
  return ESP_OK;
}

static float sign(float x) {
  return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f;
}

/* ---- TIES over n tensors that are made one at a time: first the votes, then the mean of those who agree ---- */

typedef struct election {
  float *votes, *sum, *count;
  int64_t n;
} election;

static esp_status election_init(election *e, int64_t n) {
  e->n = n;
  e->votes = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)n * 4);
  e->sum = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)n * 4);
  e->count = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)n * 4);
  return e->votes && e->sum && e->count ? ESP_OK : ESP_ERR_MEMORY;
}

static void election_deinit(election *e) {
  esp_mem_free(e->votes);
  esp_mem_free(e->sum);
  esp_mem_free(e->count);
}

static void vote(election *e, const float *x, bool frequency) { /* unweighted, as in PEFT */
  for (int64_t i = 0; i < e->n; i++) e->votes[i] += frequency ? sign(x[i]) : x[i];
}

static void count_in(election *e, const float *x, float weight) {
  for (int64_t i = 0; i < e->n; i++) {
    if (sign(x[i]) != (e->votes[i] >= 0 ? 1.0f : -1.0f)) continue; /* a zero agrees with nobody */
    e->sum[i] += weight * x[i];
    e->count[i] += 1;
  }
}

static void elected(const election *e, float *out) {
  for (int64_t i = 0; i < e->n; i++) out[i] = e->count[i] > 1 ? e->sum[i] / e->count[i] : e->sum[i];
}

/* ---- on the changes themselves ---- */

static esp_status combine_dense(combiner *c, esp_site *s, int64_t rank, esp_factors *f) {
  esp_status st;
  int64_t n = s->out * s->in;
  election e = {0};
  bool ties = elects(c->how->op);
  float *delta = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)n * 4);
  float *sum = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)n * 4);
  if (!delta || !sum) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  if (ties) ESP_GOTO(election_init(&e, n));
  for (int pass = ties ? 0 : 1; pass < 2; pass++)
    for (int i = 0; i < c->spec->n_adapters; i++) {
      float w = c->spec->weights ? (float)c->spec->weights[i] : 1.0f;
      if (!esp_adapter_changes(c->in.adapters[i], s)) continue;
      ESP_GOTO(esp_site_delta(&c->in, i, s, delta));
      ESP_GOTO(thin(c, delta, n, i, PART_DELTA, s->path));
      if (ties && pass == 0)
        vote(&e, delta, c->spec->frequency);
      else if (ties)
        count_in(&e, delta, w);
      else
        for (int64_t k = 0; k < n; k++) sum[k] += w * delta[k];
    }
  if (ties) elected(&e, sum);
  st = esp_factors_truncate(f, s, sum, rank, c->stats);
out:
  election_deinit(&e);
  esp_mem_free(delta);
  esp_mem_free(sum);
  return st;
}

/* ---- on the factors ---- */

/* The factors of one adapter after the operation, its scale in B. */
static esp_status factors_of(combiner *c, int i, esp_site *s, esp_factors *f) {
  esp_adapter *a = c->in.adapters[i];
  int64_t r = a->kind->low_rank ? a->kind->low_rank(a, s, NULL, NULL) : 0;
  if (r <= 0)
    return esp_fail(ESP_ERR_RECIPE,
                    "%s: type %s has no low-rank factors on '%s': combine with svd, or another _svd type",
                    c->spec->adapters[i], a->kind->name, s->path);
  ESP_TRY(esp_factors_init(f, s, r));
  a->kind->low_rank(a, s, f->a, f->b);
  ESP_TRY(thin(c, f->a, r * s->in, i, PART_A, s->path));
  return thin(c, f->b, s->out * r, i, PART_B, s->path);
}

static void drop(esp_factors *f) {
  esp_mem_free(f->a);
  esp_mem_free(f->b);
  *f = (esp_factors){0};
}

/* Side by side: [w_1 A_1; w_2 A_2; ..], [B_1, B_2, ..]. */
static esp_status combine_sum(combiner *c, esp_site *s, int64_t ranks, esp_factors *f) {
  esp_status st;
  esp_factors one = {0};
  int64_t at = 0;
  ESP_GOTO(esp_factors_init(f, s, ranks));
  for (int i = 0; i < c->spec->n_adapters; i++) {
    float w = c->spec->weights ? (float)c->spec->weights[i] : 1.0f;
    if (!esp_adapter_changes(c->in.adapters[i], s)) continue;
    ESP_GOTO(factors_of(c, i, s, &one));
    for (int64_t k = 0; k < one.rank * s->in; k++) f->a[at * s->in + k] = w * one.a[k];
    for (int64_t o = 0; o < s->out; o++) memcpy(f->b + o * ranks + at, one.b + o * one.rank, (size_t)one.rank * 4);
    at += one.rank;
    drop(&one);
  }
  if (c->how->op == CAT && c->spec->rank == 0)
    esp_factors_count(c->stats, 0);
  else
    st = esp_factors_reduce(f, c->spec->rank, c->stats);
out:
  drop(&one);
  return st;
}

/* The square root of a weight on each side, its sign on A's. */
static esp_status combine_ties(combiner *c, esp_site *s, esp_factors *f) {
  esp_status st = ESP_OK;
  esp_factors one = {0};
  election a = {0}, b = {0};
  for (int pass = 0; pass < 2; pass++)
    for (int i = 0; i < c->spec->n_adapters; i++) {
      float w = c->spec->weights ? (float)c->spec->weights[i] : 1.0f, root = sqrtf(fabsf(w));
      if (!esp_adapter_changes(c->in.adapters[i], s)) continue;
      ESP_GOTO(factors_of(c, i, s, &one));
      if (!f->a) {
        ESP_GOTO(esp_factors_init(f, s, one.rank));
        ESP_GOTO(election_init(&a, one.rank * s->in));
        ESP_GOTO(election_init(&b, s->out * one.rank));
      } else if (one.rank != f->rank) {
        st = esp_fail(ESP_ERR_RECIPE, "%s: rank %lld on '%s' where another adapter has %lld: combine with %s_svd",
                      c->spec->adapters[i], (long long)one.rank, s->path, (long long)f->rank, c->how->name);
        goto out;
      }
      if (pass == 0) {
        vote(&a, one.a, c->spec->frequency);
        vote(&b, one.b, c->spec->frequency);
      } else {
        count_in(&a, one.a, w < 0 ? -root : root);
        count_in(&b, one.b, root);
      }
      drop(&one);
    }
  elected(&a, f->a);
  elected(&b, f->b);
  if (c->spec->rank > 0)
    st = esp_factors_reduce(f, c->spec->rank, c->stats);
  else
    esp_factors_count(c->stats, 0);
out:
  drop(&one);
  election_deinit(&a);
  election_deinit(&b);
  return st;
}

static esp_status combine_site(combiner *c, esp_site *s, esp_factors *f, bool *changed) {
  int64_t sum = 0, most = 0;
  *changed = false;
  for (int i = 0; i < c->spec->n_adapters; i++) {
    esp_adapter *a = c->in.adapters[i];
    if (!esp_adapter_changes(a, s)) continue;
    int64_t r = a->kind->low_rank ? a->kind->low_rank(a, s, NULL, NULL) : 0;
    sum += r;
    most = r > most ? r : most;
    *changed = true;
  }
  if (!*changed) return ESP_OK;
  if (c->how->dense) {
    int64_t rank = c->spec->rank > 0 ? c->spec->rank : most;
    if (rank == 0) return esp_fail(ESP_ERR_RECIPE, "combine: no adapter has a rank on '%s'; give one", s->path);
    return combine_dense(c, s, rank, f);
  }
  if (elects(c->how->op)) return combine_ties(c, s, f);
  return combine_sum(c, s, sum > 0 ? sum : 1, f);
}

static esp_status check(const esp_combine_spec *spec, const combination **how) {
  for (int i = 0; i < N_COMBINATIONS; i++)
    if (strcmp(combinations[i].name, spec->type) == 0) *how = &combinations[i];
  if (!*how)
    return esp_fail(ESP_ERR_RECIPE,
                    "combine: '%s' is none of linear, svd, cat, ties, ties_svd, dare_ties, dare_linear, dare_ties_svd, "
                    "dare_linear_svd, magnitude_prune, magnitude_prune_svd",
                    spec->type);
  if (spec->n_adapters < 1) return esp_fail(ESP_ERR_RECIPE, "combine: names no adapter");
  if (spec->rank < 0) return esp_fail(ESP_ERR_RECIPE, "combine: rank must be at least 1");
  if (thins((*how)->op) && !(spec->density > 0 && spec->density <= 1))
    return esp_fail(ESP_ERR_RECIPE, "combine: %s needs a density above 0 and at most 1", spec->type);
  if (!thins((*how)->op) && spec->density != 0)
    return esp_fail(ESP_ERR_RECIPE, "combine: %s takes no density", spec->type);
  if (spec->frequency && !elects((*how)->op)) return esp_fail(ESP_ERR_RECIPE, "combine: %s elects no sign", spec->type);
  for (int i = 0; spec->weights && i < spec->n_adapters; i++)
    if (!isfinite(spec->weights[i])) return esp_fail(ESP_ERR_RECIPE, "combine: a weight is not finite");
  return ESP_OK;
}

esp_status esp_combine_write(const esp_combine_spec *spec, esp_svd_stats *stats) {
  esp_status st;
  combiner c = {.spec = spec, .stats = stats};
  esp_factors *f = NULL;
  int n = 0, sites = 0;
  int64_t widest = 0;
  *stats = (esp_svd_stats){0};
  ESP_TRY(check(spec, &c.how));
  /* weights are applied here, not by the adapters */
  esp_merge_spec open = {.base = spec->base, .adapters = spec->adapters, .n_adapters = spec->n_adapters};
  ESP_GOTO(esp_merge_open(&open, ESP_F32, false, &c.in));
  for (int i = 0; i < spec->n_adapters; i++) ESP_GOTO(esp_lora_carries(&c.in, i, spec->adapters[i], false));
  esp_site **list;
  sites = esp_model_sites(c.in.model, &list);
  f = esp_mem_alloc(ESP_MEM_HOST, (size_t)(sites + 1) * sizeof *f);
  if (!f) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  for (int i = 0; i < sites; i++) {
    bool changed;
    ESP_GOTO(combine_site(&c, list[i], &f[n], &changed));
    if (changed && f[n].rank > widest) widest = f[n].rank;
    n += changed;
  }
  if (n == 0) {
    st = esp_fail(ESP_ERR_DATA, "combine: the adapters change no module");
    goto out;
  }
  stats->mean_error /= n;
  stats->rank = widest;
  st = esp_factors_write(spec->base, f, n, widest, spec->out);
out:
  esp_factors_deinit(f, sites);
  esp_merge_close(&c.in);
  return st;
}
