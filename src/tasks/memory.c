/* memory.c: see memory.h. A task's samples get an order once, when the task ends; from then on only the end of that
 * order is cut off, so that nothing that was given up is ever needed again. */
#include "tasks/memory.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/rng.h"
#include "tasks/features.h"

enum { KEYS = 20, LABELS, ORDER }; /* streams of ESP_RNG_DATA */

typedef struct kept { /* one sample in the making of the next memory */
  esp_sample s;
  double key;    /* smaller is kept longer */
  int64_t order; /* where it stood */
} kept;

int64_t esp_memory_count(const esp_strategy *s) {
  int64_t n;
  (void)esp_strategy_get(s, "memory.index", &n);
  return n;
}

esp_sample esp_memory_at(const esp_strategy *s, int64_t i) {
  const int32_t *task = esp_strategy_get(s, "memory.task", NULL);
  const int64_t *index = esp_strategy_get(s, "memory.index", NULL);
  return (esp_sample){task[i], index[i]};
}

static int64_t sample_bytes(const esp_sequence *q, esp_sample s) {
  const int32_t *ids;
  const float *w;
  int64_t n;
  esp_dataset_sample(q->data[s.task], s.index, &ids, &w, &n);
  return n * (int64_t)(sizeof *ids + sizeof *w);
}

int64_t esp_memory_bytes(const esp_strategy *s, const esp_sequence *q) {
  int64_t n = esp_memory_count(s), bytes = 0;
  for (int64_t i = 0; i < n; i++) bytes += sample_bytes(q, esp_memory_at(s, i));
  return bytes;
}

/* ---- the order of a task that has just ended ---- */

static double random_key(const esp_sequence *q, int task, int64_t i) {
  return (double)esp_rng_u32(q->seed, esp_rng_stream(ESP_RNG_DATA, KEYS, (uint64_t)task, 0), (uint64_t)i);
}

static int by_key(const void *a, const void *b) {
  const kept *x = a, *y = b;
  if (x->key != y->key) return x->key < y->key ? -1 : 1;
  return x->s.task != y->s.task ? (x->s.task < y->s.task ? -1 : 1) : x->s.index < y->s.index ? -1 : 1;
}

/* Labels in turn, each in random order: the key becomes the sample's rank among those of its label. */
static void keys_by_label(const esp_sequence *q, kept *list, int64_t n) {
  qsort(list, (size_t)n, sizeof *list, by_key);
  int64_t seen[256] = {0};
  for (int64_t i = 0; i < n; i++) {
    int label = esp_dataset_label(q->data[list[i].s.task], list[i].s.index) & 255;
    list[i].key = (double)(seen[label]++ * 256 + label);
  }
}

/* Minus the mean loss of each sample: one pass over the task, no gradients. */
static esp_status keys_by_loss(const esp_sequence *q, kept *list, int64_t n) {
  esp_status st = ESP_OK;
  esp_rows rows = {0};
  float *logprob = NULL;
  int64_t some, most = q->micro_batch < 64 ? q->micro_batch : 64;
  for (int64_t i = 0; i < n; i += some) {
    esp_sample s[64];
    some = n - i < most ? n - i : most;
    for (int64_t k = 0; k < some; k++) s[k] = list[i + k].s;
    ESP_GOTO(esp_sequence_rows(q, s, some, &rows));
    esp_mem_free(logprob);
    logprob = esp_mem_alloc(ESP_MEM_HOST, (size_t)rows.tokens * sizeof *logprob);
    if (!logprob) ESP_GOTO(ESP_ERR_MEMORY);
    esp_batch b = esp_sequence_batch(&rows);
    esp_loss_out out;
    ESP_GOTO(esp_model_step(q->model, q->stack, &b, q->ckpt, false, 1.0f, q->seed, 0, &out, logprob));
    for (int64_t k = 0; k < some; k++) {
      double sum = 0, weight = 0;
      for (int32_t t = rows.cu_seqlens[k]; t < rows.cu_seqlens[k + 1]; t++)
        if (rows.weights[t] != 0)
          sum += (double)rows.weights[t] * (double)logprob[t], weight += (double)rows.weights[t];
      list[i + k].key = weight > 0 ? sum / weight : 0;
    }
  }
out:
  esp_rows_deinit(&rows);
  esp_mem_free(logprob);
  return st;
}

static int64_t share_of(const esp_memory_cfg *c, int64_t count) {
  int64_t n = llround(c->buffer * (double)count);
  return n < 1 ? 1 : n;
}

/* Greedy: the k-th is the x for which (x + sum of those chosen) / k is nearest to the mean m, that is the least
 * |x|^2 - 2 x (k m - sum). Only as many as there is room for now are worth an order; there is never more later. */
static esp_status keys_by_herding(const esp_sequence *q, const esp_memory_cfg *c, kept *list, int64_t n) {
  int64_t d = esp_features_width(q), most = c->buffer >= 1 ? (int64_t)c->buffer / (q->task + 1) + 1 : share_of(c, n);
  bool counts = esp_backend_counts(q->be);
  esp_status st = ESP_OK;
  int64_t *index = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *index);
  float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n * d) * sizeof *x);
  double *mean = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * d + n) * sizeof *mean);
  if (!index || !x || !mean) ESP_GOTO(ESP_ERR_MEMORY);
  double *gap = mean + d, *square = gap + d; /* gap: k m - sum */
  for (int64_t i = 0; i < n; i++) index[i] = list[i].s.index;
  ESP_GOTO(esp_features_of_samples(q, index, counts && n > q->micro_batch ? q->micro_batch : n, x));
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < d; j++) {
      double v = (double)x[i * d + j];
      mean[j] += v / (double)n;
      square[i] += v * v;
    }
  for (int64_t k = 0; k < most && k < n && !counts; k++) {
    int64_t best = -1;
    double least = INFINITY;
    for (int64_t j = 0; j < d; j++) gap[j] += mean[j];
    for (int64_t i = 0; i < n; i++) {
      double far = square[i];
      if (index[i] < 0) continue; /* chosen */
      for (int64_t j = 0; j < d; j++) far -= 2 * (double)x[i * d + j] * gap[j];
      if (best < 0 || far < least) least = far, best = i;
    }
    for (int64_t j = 0; j < d; j++) gap[j] -= (double)x[best * d + j];
    index[best] = -1;
    list[best].key = (double)(k - most); /* before all keys that are random */
  }
out:
  esp_mem_free(index);
  esp_mem_free(x);
  esp_mem_free(mean);
  return st;
}

static esp_status order_task(const esp_sequence *q, const esp_memory_cfg *c, kept *list, int64_t n) {
  for (int64_t i = 0; i < n; i++) list[i] = (kept){{q->task, i}, random_key(q, q->task, i), 0};
  if (!strcmp(c->sampler, "balanced")) keys_by_label(q, list, n);
  if (!strcmp(c->sampler, "loss") && !esp_backend_counts(q->be)) ESP_TRY(keys_by_loss(q, list, n));
  if (!strcmp(c->sampler, "herding")) ESP_TRY(keys_by_herding(q, c, list, n));
  qsort(list, (size_t)n, sizeof *list, by_key);
  return ESP_OK;
}

/* ---- room ---- */

/* Cuts every task's list to its part; list: by task, each in its order. */
static int64_t cut(const esp_sequence *q, const esp_memory_cfg *c, kept *list, int64_t n) {
  int64_t out = 0, quota[2] = {0};
  int tasks = q->task + 1;
  if (c->buffer >= 1) { /* the first tasks get what does not divide */
    quota[0] = (int64_t)c->buffer / tasks;
    quota[1] = (int64_t)c->buffer % tasks;
  }
  for (int64_t i = 0, at = 0; i < n; i++) {
    at = i && list[i].s.task == list[i - 1].s.task ? at + 1 : 0;
    int task = list[i].s.task;
    int64_t room = c->buffer >= 1 ? quota[0] + (task < quota[1]) : share_of(c, esp_dataset_count(q->data[task]));
    if (at < room) list[out++] = list[i];
  }
  return out;
}

/* Over all tasks: the smallest keys. */
static int64_t cut_reservoir(const esp_memory_cfg *c, kept *list, int64_t n) {
  qsort(list, (size_t)n, sizeof *list, by_key);
  return n < (int64_t)c->buffer ? n : (int64_t)c->buffer;
}

static int64_t cut_bytes(const esp_sequence *q, const esp_memory_cfg *c, kept *list, int64_t n) {
  int64_t *bytes = c->bytes > 0 ? esp_mem_alloc(ESP_MEM_HOST, (size_t)(q->task + 1) * sizeof *bytes) : NULL;
  if (!bytes) return n;
  int64_t all = 0;
  for (int64_t i = 0; i < n; i++) {
    int64_t b = sample_bytes(q, list[i].s);
    bytes[list[i].s.task] += b, all += b;
  }
  while (all > c->bytes && n > 0) { /* the last of the task that holds most */
    int most = 0;
    for (int t = 1; t <= q->task; t++)
      if (bytes[t] > bytes[most]) most = t;
    int64_t last = n - 1;
    while (list[last].s.task != most) last--;
    int64_t b = sample_bytes(q, list[last].s);
    bytes[most] -= b, all -= b;
    memmove(&list[last], &list[last + 1], (size_t)(n - 1 - last) * sizeof *list);
    n--;
  }
  esp_mem_free(bytes);
  return n;
}

esp_status esp_memory_add(esp_strategy *s, const esp_sequence *q, const esp_memory_cfg *c) {
  int64_t old = esp_memory_count(s), fresh = esp_dataset_count(q->data[q->task]), n = old + fresh;
  kept *list = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *list);
  esp_status st = ESP_OK;
  if (!list) return ESP_ERR_MEMORY;
  bool reservoir = !strcmp(c->sampler, "reservoir") && c->buffer >= 1;
  for (int64_t i = 0; i < old; i++) {
    esp_sample at = esp_memory_at(s, i);
    list[i] = (kept){at, random_key(q, at.task, at.index), i};
  }
  ESP_GOTO(order_task(q, c, list + old, fresh));
  n = reservoir ? cut_reservoir(c, list, n) : cut(q, c, list, n);
  n = cut_bytes(q, c, list, n);
  esp_strategy_drop(s, "memory.task");
  esp_strategy_drop(s, "memory.index");
  int32_t *task = esp_strategy_array(s, "memory.task", ESP_I32, n, true);
  int64_t *index = esp_strategy_array(s, "memory.index", ESP_I64, n, true);
  if (!task || !index) ESP_GOTO(ESP_ERR_MEMORY);
  for (int64_t i = 0; i < n; i++) task[i] = list[i].s.task, index[i] = list[i].s.index;
out:
  esp_mem_free(list);
  return st;
}

esp_status esp_memory_draw(const esp_strategy *s, const esp_sequence *q, int64_t first, int64_t n, esp_sample *out) {
  int64_t count = esp_memory_count(s), round = -1;
  int64_t *perm = esp_mem_alloc(ESP_MEM_HOST, (size_t)count * sizeof *perm);
  if (!perm) return ESP_ERR_MEMORY;
  for (int64_t i = 0; i < n; i++) {
    int64_t at = first + i;
    if (at / count != round) {
      round = at / count;
      esp_rng_permutation(q->seed, esp_rng_stream(ESP_RNG_DATA, ORDER, (uint64_t)q->task, (uint64_t)round), count,
                          perm);
    }
    out[i] = esp_memory_at(s, perm[at % count]);
  }
  esp_mem_free(perm);
  return ESP_OK;
}
