/* combine.c: several adapters as one LoRA, site by site: one site's weights at a time are in memory beside the factors.
 * D_i = s_i B_i A_i is what adapter i adds to a weight, w_i its weight here. Eleven combinations are those of PEFT's
 * add_weighted_adapter, by name:
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
 * DARE: Yu et al. 2023, arXiv:2311.03099.
 *
 * Beside them every method of method.h whose name PEFT does not use, on the D_i: those that only weigh the vectors
 * exactly, through their factors; the others by a truncated SVD of the result. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "merge/blend.h"
#include "merge/factors.h"
#include "merge/write.h"

typedef enum form { SUM, CAT, TIES, DENSE } form; /* on factors, or on the D_i */

typedef struct combination {
  esp_method_kind kind;
  form form;
} combination;

static const combination combinations[] = {
    {{"linear", ESP_THIN_NONE, ESP_JOIN_SUM, "weight", 1, 0, false}, SUM},
    {{"svd", ESP_THIN_NONE, ESP_JOIN_SUM, "weight", 1, 0, false}, DENSE},
    {{"cat", ESP_THIN_NONE, ESP_JOIN_SUM, "weight", 1, 0, false}, CAT},
    {{"ties", ESP_THIN_LARGEST, ESP_JOIN_ELECT, "weight density majority", 1, 0, true}, TIES},
    {{"ties_svd", ESP_THIN_LARGEST, ESP_JOIN_ELECT, "weight density majority", 1, 0, true}, DENSE},
    {{"dare_ties", ESP_THIN_DRAW, ESP_JOIN_ELECT, "weight density majority", 1, 0, true}, TIES},
    {{"dare_linear", ESP_THIN_DRAW, ESP_JOIN_SUM, "weight density", 1, 0, false}, SUM},
    {{"dare_ties_svd", ESP_THIN_DRAW, ESP_JOIN_ELECT, "weight density majority", 1, 0, true}, DENSE},
    {{"dare_linear_svd", ESP_THIN_DRAW, ESP_JOIN_SUM, "weight density", 1, 0, false}, DENSE},
    {{"magnitude_prune", ESP_THIN_LARGEST, ESP_JOIN_SUM, "weight density", 1, 0, false}, SUM},
    {{"magnitude_prune_svd", ESP_THIN_LARGEST, ESP_JOIN_SUM, "weight density", 1, 0, false}, DENSE},
};
enum { N_COMBINATIONS = sizeof combinations / sizeof combinations[0], MOST_NAMES = 64 };
enum { PART_A, PART_B, PART_DELTA }; /* what a mask is drawn for */

typedef struct combiner {
  const esp_combine_spec *spec;
  form form;
  esp_method m;
  esp_merge_inputs in;
  esp_svd_stats *stats;
  int64_t rank;                                /* at most, at the present site; 0: what the type gives */
  esp_site *site;                              /* that is read */
  double own_squares, squares[ESP_MERGE_MOST]; /* of OPCM */
} combiner;

static const combination *find(const char *name) {
  for (int i = 0; i < N_COMBINATIONS; i++)
    if (strcmp(combinations[i].kind.name, name) == 0) return &combinations[i];
  return NULL;
}

const char *const *esp_combine_names(int *n) {
  static const char *names[MOST_NAMES];
  int methods;
  const char *const *list = esp_method_names(&methods);
  *n = 0;
  for (int i = 0; i < N_COMBINATIONS; i++) names[(*n)++] = combinations[i].kind.name;
  for (int i = 0; i < methods && *n < MOST_NAMES; i++)
    if (!find(list[i])) names[(*n)++] = list[i];
  return names;
}

bool esp_combine_by_factors(const char *name, bool *same_rank) {
  const combination *c = find(name);
  *same_rank = c && c->form == TIES;
  return c && c->form != DENSE;
}

/* The entries of one factor that stay. */
static esp_status thin(const combiner *c, float *x, int64_t n, int i, int part, const char *path) {
  double density = c->m.density[i];
  if (c->m.kind->thin == ESP_THIN_LARGEST) return esp_keep_largest(x, n, density);
  if (c->m.kind->thin != ESP_THIN_DRAW || density >= 1) return ESP_OK;
  esp_draw d = esp_draw_of(c->m.seed, i, part, path, density);
  esp_draw_keep(&d, x, 0, n, 1 / density);
  return ESP_OK;
}

/* ---- on the changes themselves ---- */

static esp_status read_delta(void *ctx, int i, int64_t r0, int64_t n, float *out) {
  combiner *c = ctx;
  if (esp_adapter_changes(c->in.adapters[i], c->site)) return esp_site_delta(&c->in, i, c->site, r0, n, out);
  memset(out, 0, (size_t)(n * c->site->in) * 4);
  return ESP_OK;
}

static esp_status open_blend(combiner *c, esp_site *s, esp_blend *b) {
  int64_t step = ESP_MERGE_BLOCK / s->in;
  esp_vectors v = {.name = s->path,
                   .part = PART_DELTA,
                   .rows = s->out,
                   .cols = s->in,
                   .step = step < 1        ? 1
                           : step > s->out ? s->out
                                           : step,
                   .layer = s->layer,
                   .linear = !s->is_head,
                   .read = read_delta,
                   .ctx = c};
  c->site = s;
  return esp_blend_open(&c->m, &v, b);
}

static esp_status combine_dense(combiner *c, esp_site *s, int64_t rank, esp_factors *f) {
  esp_status st;
  esp_blend b = {0};
  float *sum = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(s->out * s->in) * 4);
  if (!sum) return ESP_ERR_MEMORY;
  ESP_GOTO(open_blend(c, s, &b));
  for (int64_t r = 0; r < s->out; r += b.v.step)
    ESP_GOTO(esp_blend_rows(&b, r, r + b.v.step <= s->out ? b.v.step : s->out - r, sum + r * s->in));
  c->own_squares += b.own_squares;
  for (int i = 0; i < c->m.n; i++) c->squares[i] += b.each_squares[i];
  esp_blend_close(&b); /* its memory is not needed beside the decomposition */
  st = esp_factors_truncate(f, s, sum, rank, c->stats);
out:
  esp_blend_close(&b);
  esp_mem_free(sum);
  return st;
}

/* ---- on the factors ---- */

static int64_t rank_of(esp_adapter *a, esp_site *s) {
  return a->kind->low_rank ? a->kind->low_rank(a, s, NULL, NULL) : 0;
}

/* The factors of one adapter after the operation, its scale in B. */
static esp_status factors_of(combiner *c, int i, esp_site *s, esp_factors *f) {
  esp_adapter *a = c->in.adapters[i];
  int64_t r = rank_of(a, s);
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

/* What each vector is multiplied by; a method may find it in the angles between them. */
static esp_status find_weights(combiner *c, esp_site *s, double *w) {
  esp_blend b;
  memcpy(w, c->m.weight, sizeof c->m.weight);
  if (c->m.kind->join != ESP_JOIN_SUM) {
    ESP_TRY(open_blend(c, s, &b));
    memcpy(w, b.factor, (size_t)c->m.n * sizeof *w);
    esp_blend_close(&b);
  }
  for (int i = 0; i < c->m.n; i++) w[i] *= esp_method_scale(&c->m, s->layer);
  return ESP_OK;
}

/* Side by side: [w_1 A_1; w_2 A_2; ..], [B_1, B_2, ..]. */
static esp_status combine_sum(combiner *c, esp_site *s, int64_t ranks, esp_factors *f) {
  esp_status st;
  esp_factors one = {0};
  int64_t at = 0;
  double w[ESP_MERGE_MOST];
  ESP_GOTO(find_weights(c, s, w));
  ESP_GOTO(esp_factors_init(f, s, ranks));
  for (int i = 0; i < c->m.n; i++) {
    if (!esp_adapter_changes(c->in.adapters[i], s)) continue;
    ESP_GOTO(factors_of(c, i, s, &one));
    for (int64_t k = 0; k < one.rank * s->in; k++) f->a[at * s->in + k] = (float)(w[i] * one.a[k]);
    for (int64_t o = 0; o < s->out; o++) memcpy(f->b + o * ranks + at, one.b + o * one.rank, (size_t)one.rank * 4);
    at += one.rank;
    drop(&one);
  }
  if (c->form == CAT && c->rank == 0)
    esp_factors_count(c->stats, 0);
  else
    st = esp_factors_reduce(f, c->rank, c->stats);
out:
  drop(&one);
  return st;
}

/* The square root of a weight on each side, its sign on A's. */
static esp_status combine_ties(combiner *c, esp_site *s, esp_factors *f) {
  esp_status st = ESP_OK;
  esp_factors all[ESP_MERGE_MOST] = {0};
  const float *a[ESP_MERGE_MOST], *b[ESP_MERGE_MOST];
  double wa[ESP_MERGE_MOST], wb[ESP_MERGE_MOST];
  int n = 0;
  for (int i = 0; i < c->m.n; i++) {
    if (!esp_adapter_changes(c->in.adapters[i], s)) continue;
    wb[n] = sqrt(fabs(c->m.weight[i]));
    wa[n] = c->m.weight[i] < 0 ? -wb[n] : wb[n];
    n++;
    ESP_GOTO(factors_of(c, i, s, &all[n - 1]));
    a[n - 1] = all[n - 1].a;
    b[n - 1] = all[n - 1].b;
    if (all[n - 1].rank == all[0].rank) continue;
    st = esp_fail(ESP_ERR_RECIPE, "%s: rank %lld on '%s' where another adapter has %lld: combine with %s_svd",
                  c->spec->adapters[i], (long long)all[n - 1].rank, s->path, (long long)all[0].rank, c->m.kind->name);
    goto out;
  }
  ESP_GOTO(esp_factors_init(f, s, all[0].rank));
  esp_elect(&c->m.election, a, wa, n, f->rank * s->in, f->a);
  esp_elect(&c->m.election, b, wb, n, f->rank * s->out, f->b);
  if (c->rank > 0)
    st = esp_factors_reduce(f, c->rank, c->stats);
  else
    esp_factors_count(c->stats, 0);
out:
  for (int i = 0; i < n; i++) drop(&all[i]);
  return st;
}

static esp_status limit_rank(combiner *c, const esp_site *s) {
  c->rank = c->spec->rank;
  if (!c->spec->rank_at) return ESP_OK;
  int64_t most = c->spec->rank_at(c->spec->ctx, s->path);
  if (most <= 0) return esp_fail(ESP_ERR_RECIPE, "'%s' was trained, and is not in what the merge is for", s->path);
  if (c->rank == 0 || c->rank > most) c->rank = most;
  return ESP_OK;
}

static esp_status combine_site(combiner *c, esp_site *s, esp_factors *f, bool *changed) {
  int64_t sum = 0, most = 0;
  bool factors = true;
  *changed = false;
  for (int i = 0; i < c->m.n; i++) {
    if (!esp_adapter_changes(c->in.adapters[i], s)) continue;
    int64_t r = rank_of(c->in.adapters[i], s);
    sum += r;
    most = r > most ? r : most;
    factors &= r > 0;
    *changed = true;
  }
  if (!*changed) return ESP_OK;
  ESP_TRY(limit_rank(c, s));
  bool weighs = c->m.kind->thin == ESP_THIN_NONE && c->m.kind->join != ESP_JOIN_MAX && c->m.kind->join != ESP_JOIN_OPCM;
  if (c->form == TIES) return combine_ties(c, s, f);
  if (c->form != DENSE || (weighs && factors && !find(c->m.kind->name))) return combine_sum(c, s, sum > 0 ? sum : 1, f);
  int64_t rank = c->m.kind->join == ESP_JOIN_OPCM && factors ? sum : most; /* of projections: nothing is lost at all */
  if (c->rank > 0) rank = c->rank;
  if (rank == 0) return esp_fail(ESP_ERR_RECIPE, "combine: no adapter has a rank on '%s'; give one", s->path);
  return combine_dense(c, s, rank, f);
}

static esp_status settle(combiner *c) {
  const esp_combine_spec *spec = c->spec;
  const combination *peft = find(spec->method->name);
  const esp_method_kind *kind = peft ? &peft->kind : esp_method_find(spec->method->name);
  if (!kind) return esp_method_unknown(spec->method->name, esp_combine_names);
  if (spec->n_adapters < 1) return esp_fail(ESP_ERR_RECIPE, "combine: names no adapter");
  if (spec->rank < 0) return esp_fail(ESP_ERR_RECIPE, "combine: rank must be at least 1");
  ESP_TRY(esp_method_settle(spec->method, kind, spec->weights, spec->n_adapters, 0, &c->m));
  c->form = peft ? peft->form : DENSE;
  if (peft) c->m.election.weighted = false;
  return ESP_OK;
}

esp_status esp_combine_check(const esp_combine_spec *spec) {
  combiner c = {.spec = spec};
  return settle(&c);
}

/* The one factor of a whole model that OPCM has (opcm.c). */
static void scale_model(const combiner *c, esp_factors *f, int n) {
  double mean = 0;
  for (int i = 0; i < c->m.n; i++) mean += sqrt(c->squares[i]) / c->m.n;
  double scale = c->own_squares > 0 ? mean / sqrt(c->own_squares) : 1;
  for (int i = 0; i < n; i++)
    for (int64_t k = 0; k < f[i].site->out * f[i].rank; k++) f[i].b[k] = (float)(f[i].b[k] * scale);
}

esp_status esp_combine_write(const esp_combine_spec *spec, esp_svd_stats *stats) {
  esp_status st;
  combiner c = {.spec = spec, .stats = stats};
  esp_factors *f = NULL;
  int n = 0, sites = 0;
  int64_t widest = 0;
  *stats = (esp_svd_stats){0};
  ESP_TRY(settle(&c)); /* before anything is opened */
  /* weights are applied here, not by the adapters */
  esp_merge_spec open = {.base = spec->base, .adapters = spec->adapters, .n_adapters = spec->n_adapters};
  ESP_GOTO(esp_merge_open(&open, ESP_F32, false, &c.in));
  c.m.layers = esp_model_describe(c.in.model)->layers;
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
  if (c.m.kind->join == ESP_JOIN_OPCM) scale_model(&c, f, n);
  stats->mean_error /= n;
  stats->rank = widest;
  st = esp_factors_write(spec->base, f, n, widest, spec->out);
out:
  esp_factors_deinit(f, sites);
  esp_merge_close(&c.in);
  return st;
}
