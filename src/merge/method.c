#include "merge/method.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/map.h"

#define ELECTS "weight density lambda normalize majority lines"

static const esp_method_kind kinds[] = {
    {"linear", ESP_THIN_NONE, ESP_JOIN_SUM, "weight normalize", 1, 0, true},
    {"task_arithmetic", ESP_THIN_NONE, ESP_JOIN_SUM, "weight lambda normalize lines", 1, 0, false},
    {"magnitude_prune", ESP_THIN_LARGEST, ESP_JOIN_SUM, "weight density lambda normalize lines", 1, 0, false},
    {"ties", ESP_THIN_LARGEST, ESP_JOIN_ELECT, ELECTS, 1, 0, true},
    {"dare_linear", ESP_THIN_DRAW, ESP_JOIN_SUM, "weight density lambda normalize lines rescale", 1, 0, false},
    {"dare_ties", ESP_THIN_DRAW, ESP_JOIN_ELECT, ELECTS " rescale", 1, 0, false},
    {"breadcrumbs", ESP_THIN_MIDDLE, ESP_JOIN_SUM, "weight density gamma lambda normalize lines", 1, 0, false},
    {"breadcrumbs_ties", ESP_THIN_MIDDLE, ESP_JOIN_ELECT, ELECTS " gamma", 1, 0, false},
    {"magmax", ESP_THIN_NONE, ESP_JOIN_MAX, "lambda lines", 2, 0, false},
    {"lines", ESP_THIN_NONE, ESP_JOIN_SUM, "weight lambda normalize lines", 1, 0, false},
    {"opcm", ESP_THIN_NONE, ESP_JOIN_OPCM, "alpha lambda", 2, 0, false},
    {"model_stock", ESP_THIN_NONE, ESP_JOIN_STOCK, "lambda lines", 2, 0, false},
    {"mwa", ESP_THIN_NONE, ESP_JOIN_SUM, "metrics lambda", 2, 0, true},
    {"slerp", ESP_THIN_NONE, ESP_JOIN_SLERP, "t", 2, 2, false},
    {"nuslerp", ESP_THIN_NONE, ESP_JOIN_SLERP, "weight t lambda", 2, 2, false},
};
enum { N_KINDS = sizeof kinds / sizeof kinds[0] };

const esp_method_kind *esp_method_find(const char *name) {
  for (int i = 0; name && i < N_KINDS; i++)
    if (strcmp(kinds[i].name, name) == 0) return &kinds[i];
  return NULL;
}

const char *const *esp_method_names(int *n) {
  static const char *names[N_KINDS + 1];
  for (int i = 0; i < N_KINDS; i++) names[i] = kinds[i].name;
  *n = N_KINDS;
  return names;
}

esp_status esp_method_unknown(const char *name, const char *const *(*names)(int *n)) {
  int n, at = 0;
  const char *const *list = names(&n), *near = esp_closest(name, list, n);
  char all[1024] = "";
  for (int i = 0; i < n && at < (int)sizeof all; i++)
    at += snprintf(all + at, sizeof all - (size_t)at, "%s%s", i ? ", " : "", list[i]);
  if (near) return esp_fail(ESP_ERR_RECIPE, "merge: '%s' is no method (did you mean '%s'?)", name, near);
  return esp_fail(ESP_ERR_RECIPE, "merge: '%s' is no method (%s)", name, all);
}

static bool reads(const esp_method_kind *k, const char *option) {
  size_t n = strlen(option);
  for (const char *p = k->reads; *p; p += strcspn(p, " "), p += *p == ' ')
    if (strcspn(p, " ") == n && strncmp(p, option, n) == 0) return true;
  return false;
}

static esp_status refuse_unread(const esp_merge_method *g, const esp_method_kind *k, const double *weights) {
  const struct {
    const char *option, *shown;
    bool given;
  } all[] = {
      {"weight", "weight", weights != NULL},
      {"density", "density", g->n_density > 0},
      {"lambda", "lambda", !isnan(g->lambda)},
      {"gamma", "gamma", !isnan(g->gamma)},
      {"t", "t", !isnan(g->t)},
      {"alpha", "alpha", !isnan(g->alpha)},
      {"lines", "lines", !isnan(g->lines_alpha) || !isnan(g->lines_beta)},
      {"metrics", "metrics", g->n_metrics > 0 || g->better || !isnan(g->power)},
      {"rescale", "rescale", g->rescale != NULL},
      {"majority", "majority sign", g->majority != NULL},
      {"normalize", "normalize", g->normalize >= 0},
  };
  for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
    if (all[i].given && !reads(k, all[i].option))
      return esp_fail(ESP_ERR_RECIPE, "merge: %s takes no %s", k->name, all[i].shown);
  return ESP_OK;
}

static esp_status one_of(const char *what, const char *value, const char *const *words, int n, int *index) {
  *index = 0;
  for (int i = 0; value && i < n; i++)
    if (strcmp(value, words[i]) == 0) return *index = i, ESP_OK;
  if (!value) return ESP_OK;
  return n == 3 ? esp_fail(ESP_ERR_RECIPE, "merge: %s '%s' is none of %s, %s, %s", what, value, words[0], words[1],
                           words[2])
                : esp_fail(ESP_ERR_RECIPE, "merge: %s '%s' is none of %s, %s", what, value, words[0], words[1]);
}

static esp_status settle_metrics(const esp_merge_method *g, const esp_method_kind *k, esp_method *m) {
  static const char *const words[] = {"higher", "lower"};
  int lower;
  double power = isnan(g->power) ? 1 : g->power;
  ESP_TRY(one_of("better", g->better, words, 2, &lower));
  if (!reads(k, "metrics")) return ESP_OK;
  if (g->n_metrics != m->n)
    return esp_fail(ESP_ERR_RECIPE, "merge: mwa needs a metric for each input: %d for %d", g->n_metrics, m->n);
  if (!(power >= 0)) return esp_fail(ESP_ERR_RECIPE, "merge: power must be at least 0");
  for (int i = 0; i < m->n; i++) {
    double x = g->metrics[i];
    if (!isfinite(x) || x < 0 || (lower && x == 0))
      return esp_fail(ESP_ERR_RECIPE, "merge: metric %g is no weight: mwa takes values %s 0", x,
                      lower ? "above" : "of at least");
    m->weight[i] = pow(x, lower ? -power : power);
  }
  return ESP_OK;
}

static esp_status settle_weights(const esp_merge_method *g, const esp_method_kind *k, const double *weights,
                                 esp_method *m) {
  double sum = 0;
  for (int i = 0; i < m->n; i++) {
    m->weight[i] = weights ? weights[i] : 1;
    if (!isfinite(m->weight[i])) return esp_fail(ESP_ERR_RECIPE, "merge: a weight is not finite");
  }
  ESP_TRY(settle_metrics(g, k, m));
  for (int i = 0; i < m->n; i++) sum += m->weight[i];
  bool normalize = g->normalize >= 0 ? g->normalize > 0 : k->normalize;
  m->election.normalize = normalize;
  if (k->join == ESP_JOIN_SUM && normalize) {
    if (!(fabs(sum) > 1e-12) || !isfinite(sum))
      return esp_fail(ESP_ERR_RECIPE, "merge: the weights add up to %g and cannot be normalised", sum);
    for (int i = 0; i < m->n; i++) m->weight[i] /= sum;
  }
  m->t = g->t;
  if (k->join != ESP_JOIN_SLERP) return ESP_OK;
  if (isnan(m->t) && !reads(k, "weight")) return esp_fail(ESP_ERR_RECIPE, "merge: %s needs a t from 0 to 1", k->name);
  if (isnan(m->t))
    m->t = m->weight[1] / sum;
  else if (weights)
    return esp_fail(ESP_ERR_RECIPE, "merge: %s takes either t or weights", k->name);
  if (!(m->t >= 0 && m->t <= 1)) return esp_fail(ESP_ERR_RECIPE, "merge: t must lie from 0 to 1, it is %g", m->t);
  return ESP_OK;
}

static esp_status settle_density(const esp_merge_method *g, const esp_method_kind *k, esp_method *m) {
  m->gamma = isnan(g->gamma) ? 0.01 : g->gamma;
  if (!reads(k, "density")) return ESP_OK;
  if (g->n_density == 0) return esp_fail(ESP_ERR_RECIPE, "merge: %s needs a density above 0 and at most 1", k->name);
  if (g->n_density != 1 && g->n_density != m->n)
    return esp_fail(ESP_ERR_RECIPE, "merge: %d densities for %d inputs: give one, or one each", g->n_density, m->n);
  for (int i = 0; i < m->n; i++) {
    m->density[i] = g->density[g->n_density == 1 ? 0 : i];
    if (!(m->density[i] > 0 && m->density[i] <= 1))
      return esp_fail(ESP_ERR_RECIPE, "merge: %s needs a density above 0 and at most 1", k->name);
  }
  if (!(m->gamma >= 0 && m->gamma < 1))
    return esp_fail(ESP_ERR_RECIPE, "merge: gamma must be at least 0 and below 1, it is %g", m->gamma);
  return ESP_OK;
}

static esp_status settle_layers(const esp_merge_method *g, const esp_method_kind *k, esp_method *m) {
  bool own = strcmp(k->name, "lines") == 0, a = !isnan(g->lines_alpha), b = !isnan(g->lines_beta);
  m->layered = own || a || b;
  if (!m->layered) return ESP_OK;
  if (!a && (b || m->n == 1))
    return esp_fail(ESP_ERR_RECIPE, "merge: the scaling of layers needs its alpha (and beta, else 1 - alpha)");
  m->lines_alpha = a ? g->lines_alpha : 1.0 / m->n; /* the norms of a sum of n: alpha = |sum d_i| / |sum d_i| / n */
  m->lines_beta = b ? g->lines_beta : 1 - m->lines_alpha;
  if (!isfinite(m->lines_alpha) || !isfinite(m->lines_beta))
    return esp_fail(ESP_ERR_RECIPE, "merge: the scaling of layers is not finite");
  return ESP_OK;
}

esp_status esp_method_settle(const esp_merge_method *g, const esp_method_kind *k, const double *weights, int n,
                             int layers, esp_method *m) {
  static const char *const rescales[] = {"inverse", "l1", "none"}, *const majorities[] = {"total", "frequency"};
  int rescale, frequency;
  *m = (esp_method){.kind = k, .n = n, .layers = layers, .seed = g->seed, .election = {.weighted = true}};
  if (n > ESP_MERGE_MOST) return esp_fail(ESP_ERR_RECIPE, "merge: %d inputs, at most %d", n, ESP_MERGE_MOST);
  if (n < k->least || (k->most && n > k->most))
    return esp_fail(ESP_ERR_RECIPE, "merge: %s takes %s%d inputs, not %d", k->name, k->most ? "" : "at least ",
                    k->least, n);
  ESP_TRY(one_of("rescale", g->rescale, rescales, 3, &rescale));
  ESP_TRY(one_of("majority sign", g->majority, majorities, 2, &frequency));
  ESP_TRY(refuse_unread(g, k, weights));
  ESP_TRY(settle_weights(g, k, weights, m));
  ESP_TRY(settle_density(g, k, m));
  ESP_TRY(settle_layers(g, k, m));
  m->rescale = rescale;
  m->election.frequency = frequency == 1;
  m->lambda = isnan(g->lambda) ? 1 : g->lambda;
  m->alpha = isnan(g->alpha) ? 0.5 : g->alpha;
  if (!isfinite(m->lambda)) return esp_fail(ESP_ERR_RECIPE, "merge: lambda is not finite");
  if (!(m->alpha >= 0 && m->alpha <= 1))
    return esp_fail(ESP_ERR_RECIPE, "merge: alpha must lie from 0 to 1, it is %g", m->alpha);
  return ESP_OK;
}

double esp_method_scale(const esp_method *m, int layer) {
  if (!m->layered) return m->lambda;
  double depth = layer >= 0 && m->layers > 1 ? (double)layer / (m->layers - 1) : 0;
  return m->lambda * (m->lines_alpha + m->lines_beta * depth);
}
