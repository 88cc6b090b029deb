/* bank.c: an adapter of its own for each task, and a selector that gives every sequence one of them at test time:
 *   last     the newest, whatever the text: what new_per_task means without a bank
 *   sum      all of them, added
 *   oracle   that of the task which the text belongs to: the upper bound
 *   nearest  that of the nearest of `centroids` k-means centroids per task (CoLoR, Wistuba et al. 2023)
 *   keys     each task has a key; by cosine similarity the best one, or the top_k with softmax(similarity /
 * temperature) as weights (L2P, Wang et al. 2022; retrieval in SLM, Peng et al. 2024). A key is trained to lie along
 * its task's features, sum_i (1 - cos(f_i, k)) -> min, whose minimum is the direction of sum_i f_i / |f_i|. trained  a
 * linear classifier of tasks on the features of all tasks so far, as ConPET's selector (Song et al. 2023) on features
 * of the frozen base (features.h), which are made when a task begins. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/linalg.h"
#include "core/rng.h"
#include "tasks/features.h"
#include "tasks/internal.h"

enum { STREAM = 40 };

typedef struct choice { /* of the last batch */
  int32_t *adapters;
  float *shares, *features;
  int64_t cap;
} choice;

static bool is(const esp_strategy *s, const char *selector) {
  return !strcmp(s->cfg->bank.selector, selector);
}

static esp_status check(const esp_strategy_cfg *c, int n_tasks) {
  if (c->bank.top_k > 1 && strcmp(c->bank.selector, "keys"))
    return esp_fail(ESP_ERR_RECIPE, "continual.bank.top_k: only the selector keys weights several adapters");
  return ESP_OK;
}

static esp_status open(esp_strategy *s, const esp_sequence *q) {
  s->impl = esp_mem_alloc(ESP_MEM_HOST, sizeof(choice));
  return s->impl ? ESP_OK : ESP_ERR_MEMORY;
}

static void close(esp_strategy *s) {
  choice *c = s->impl;
  if (!c) return;
  esp_mem_free(c->adapters);
  esp_mem_free(c->shares);
  esp_mem_free(c->features);
  esp_mem_free(c);
}

static float *of_task(esp_strategy *s, const char *what, int task, int64_t n) {
  char name[64];
  snprintf(name, sizeof name, "%s.%d", what, task);
  return n ? esp_strategy_array(s, name, ESP_F32, n, true) : esp_strategy_get(s, name, NULL);
}

static double norm(const float *x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
  return sqrt(sum);
}

static void direction(const float *x, int64_t n, int64_t d, float *key) {
  double *sum = esp_mem_alloc(ESP_MEM_HOST, (size_t)d * sizeof *sum);
  if (!sum) return; /* the key stays zero and the error is set */
  for (int64_t i = 0; i < n; i++) {
    double length = norm(x + i * d, d);
    for (int64_t k = 0; k < d && length > 0; k++) sum[k] += (double)x[i * d + k] / length;
  }
  for (int64_t k = 0; k < d; k++) key[k] = (float)sum[k];
  esp_mem_free(sum);
}

/* Softmax regression of tasks on x/|x|, by gradient descent on all features so far: weights [tasks, d + 1]. The loss is
 * convex with curvature below 1/2, so that steps of 2 over |x| = 1 converge. */
static esp_status train_classifier(esp_strategy *s, const esp_sequence *q, int64_t d) {
  int tasks = q->task + 1;
  int64_t n = 0, each = 0, at = 0;
  for (int t = 0; t < tasks; t++) {
    char name[64];
    snprintf(name, sizeof name, "features.%d", t);
    (void)esp_strategy_get(s, name, &each);
    n += each / d;
  }
  float *w = esp_strategy_array(s, "classifier", ESP_F32, tasks * (d + 1), true);
  float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n * (d + 1)) * sizeof *x);
  float *p = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n * tasks) * sizeof *p);
  int32_t *label = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *label);
  esp_status st = w && x && p && label ? ESP_OK : ESP_ERR_MEMORY;
  for (int t = 0; st == ESP_OK && t < tasks; t++) {
    char name[64];
    snprintf(name, sizeof name, "features.%d", t);
    const float *f = esp_strategy_get(s, name, &each);
    for (int64_t i = 0; i < each / d; i++, at++) {
      double length = norm(f + i * d, d);
      for (int64_t k = 0; k < d; k++) x[at * (d + 1) + k] = length > 0 ? (float)((double)f[i * d + k] / length) : 0;
      x[at * (d + 1) + d] = 1;
      label[at] = t;
    }
  }
  int rounds = esp_backend_counts(q->be) ? 0 : 500;
  if (st == ESP_OK) memset(w, 0, (size_t)(tasks * (d + 1)) * sizeof *w);
  for (int round = 0; st == ESP_OK && round < rounds; round++) {
    esp_linalg_gemm(false, true, n, tasks, d + 1, 1.0f, x, d + 1, w, d + 1, 0.0f, p, tasks);
    for (int64_t i = 0; i < n; i++) {
      double most = -INFINITY, sum = 0;
      for (int t = 0; t < tasks; t++) most = fmax(most, (double)p[i * tasks + t]);
      for (int t = 0; t < tasks; t++) sum += exp((double)p[i * tasks + t] - most);
      for (int t = 0; t < tasks; t++)
        p[i * tasks + t] = (float)(exp((double)p[i * tasks + t] - most) / sum - (label[i] == t));
    }
    esp_linalg_gemm(true, false, tasks, d + 1, n, -2.0f / (float)n, p, tasks, x, d + 1, 1.0f, w, d + 1);
  }
  esp_mem_free(x);
  esp_mem_free(p);
  esp_mem_free(label);
  return st;
}

static esp_status task_begin(esp_strategy *s, const esp_sequence *q) {
  if (is(s, "last") || is(s, "sum") || is(s, "oracle")) return ESP_OK;
  int64_t count = esp_dataset_count(q->data[q->task]), d = esp_features_width(q), k = s->cfg->bank.centroids;
  int64_t n = s->cfg->bank.samples < count ? s->cfg->bank.samples : count;
  uint64_t stream = esp_rng_stream(ESP_RNG_DATA, STREAM, (uint64_t)q->task, 0);
  int64_t *index = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *index);
  float *x = is(s, "trained") ? of_task(s, "features", q->task, n * d)
                              : esp_mem_alloc(ESP_MEM_HOST, (size_t)(n * d) * sizeof *x);
  esp_status st = index && x ? ESP_OK : ESP_ERR_MEMORY;
  if (st == ESP_OK) st = esp_sequence_choose(q->seed, stream, count, n, index);
  if (st == ESP_OK) st = esp_features_of_samples(q, index, n, x);
  if (st == ESP_OK && is(s, "trained")) st = train_classifier(s, q, d);
  if (st == ESP_OK && is(s, "nearest")) {
    float *c = of_task(s, "centroids", q->task, k * d);
    st = c ? esp_kmeans(x, n, d, k, q->seed, stream + 1, c) : ESP_ERR_MEMORY;
  }
  if (st == ESP_OK && is(s, "keys")) {
    float *key = of_task(s, "key", q->task, d);
    if (key)
      direction(x, n, d, key);
    else
      st = ESP_ERR_MEMORY;
  }
  if (!is(s, "trained")) esp_mem_free(x);
  esp_mem_free(index);
  return st;
}

static esp_status deploy(esp_strategy *s, const esp_sequence *q, bool on) {
  esp_adapter *present = q->adapter;
  if (is(s, "last")) return ESP_OK;
  return on ? esp_adapters_activate(q->model, (esp_adapter **)q->bank, q->n_bank)
            : esp_adapters_activate(q->model, &present, 1);
}

/* ---- which one ---- */

/* The larger, the nearer. */
static double likeness(esp_strategy *s, const float *f, int64_t d, int task, int tasks) {
  double best = -INFINITY;
  if (is(s, "nearest")) {
    const float *c = of_task(s, "centroids", task, 0);
    for (int64_t j = 0; j < s->cfg->bank.centroids; j++) {
      double sum = 0;
      for (int64_t k = 0; k < d; k++)
        sum -= ((double)f[k] - (double)c[j * d + k]) * ((double)f[k] - (double)c[j * d + k]);
      best = fmax(best, sum);
    }
    return best;
  }
  const float *w =
      is(s, "keys") ? of_task(s, "key", task, 0) : (float *)esp_strategy_get(s, "classifier", NULL) + task * (d + 1);
  double dot = 0, length = norm(f, d) * (is(s, "keys") ? norm(w, d) : 1);
  for (int64_t k = 0; k < d; k++) dot += (double)f[k] * (double)w[k];
  return (length > 0 ? dot / length : 0) + (is(s, "keys") ? 0 : (double)w[d]);
}

/* Softmax over the top_k of n. */
static void weights(const double *like, int n, int64_t top_k, double temperature, float *share) {
  double sum = 0;
  for (int i = 0; i < n; i++) {
    int ahead = 0;
    for (int j = 0; j < n; j++) ahead += like[j] > like[i] || (like[j] == like[i] && j < i);
    share[i] = ahead < top_k ? 1 : 0;
  }
  double most = -INFINITY;
  for (int i = 0; i < n; i++) most = fmax(most, like[i]);
  for (int i = 0; i < n; i++) sum += share[i] > 0 ? exp((like[i] - most) / temperature) : 0;
  for (int i = 0; i < n; i++) share[i] = share[i] > 0 ? (float)(exp((like[i] - most) / temperature) / sum) : 0;
}

static esp_status reserve(choice *c, int64_t n, int64_t tasks, int64_t d) {
  if (n <= c->cap) return ESP_OK;
  esp_mem_free(c->adapters);
  esp_mem_free(c->shares);
  esp_mem_free(c->features);
  c->cap = 0;
  c->adapters = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *c->adapters);
  c->shares = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n * tasks) * sizeof *c->shares);
  c->features = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n * d) * sizeof *c->features);
  if (!c->adapters || !c->shares || !c->features) return ESP_ERR_MEMORY;
  c->cap = n;
  return ESP_OK;
}

static esp_status choose(esp_strategy *s, const esp_sequence *q, int owner, const int32_t *prompt, esp_batch *b) {
  choice *c = s->impl;
  int64_t d = esp_features_width(q);
  double like[256];
  int n = q->n_bank;
  if (is(s, "last") || is(s, "sum")) return ESP_OK;
  if (n > 256)
    return esp_fail(ESP_ERR_RECIPE, "continual.strategy: a bank of %d adapters, at most 256 are chosen among", n);
  ESP_TRY(reserve(c, b->n_seqs, q->n_tasks, d));
  bool oracle = is(s, "oracle");
  if (!oracle) ESP_TRY(esp_features_of_batch(q, b, prompt, c->features));
  for (int i = 0; i < b->n_seqs; i++) {
    c->adapters[i] = oracle ? (owner < n ? owner : -1) : 0;
    for (int t = 0; t < n && !oracle; t++) {
      like[t] = likeness(s, c->features + i * d, d, t, n);
      if (like[t] > like[c->adapters[i]]) c->adapters[i] = t;
    }
    if (s->cfg->bank.top_k > 1) weights(like, n, s->cfg->bank.top_k, s->cfg->bank.temperature, c->shares + i * n);
  }
  if (s->cfg->bank.top_k > 1)
    b->shares = c->shares, b->n_shares = n;
  else
    b->adapters = c->adapters;
  return ESP_OK;
}

const esp_strategy_kind esp_strategy_bank = {
    .name = "bank",
    .summary = "an adapter for each task, and a selector that gives every sequence its own at test time",
    .flags = ESP_STRATEGY_BANK | ESP_STRATEGY_DEPLOYS,
    .check = check,
    .open = open,
    .close = close,
    .task_begin = task_begin,
    .deploy = deploy,
    .choose = choose,
};
