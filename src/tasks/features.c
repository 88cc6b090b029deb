#include "tasks/features.h"

#include <float.h>
#include <string.h>

#include "core/dtype.h"
#include "core/rng.h"

int64_t esp_features_width(const esp_sequence *q) {
  return esp_model_describe(q->model)->hidden;
}

/* ---- one pass of the base ---- */

typedef struct prompts { /* sequences made of prompts alone, every token labelled */
  esp_rows rows;
  float *ones;
  int64_t cap;
} prompts;

static esp_status add(prompts *p, const int32_t *ids, int64_t n) {
  if (n > p->cap) {
    float *grown = esp_mem_realloc(ESP_MEM_HOST, p->ones, (size_t)n * sizeof *grown);
    if (!grown) return ESP_ERR_MEMORY;
    for (int64_t i = p->cap; i < n; i++) grown[i] = 1.0f;
    p->ones = grown;
    p->cap = n;
  }
  ESP_TRY(esp_rows_add(&p->rows, ids, p->ones, n));
  p->rows.weights[p->rows.tokens - 1] = 1.0f; /* the last token's state too: it predicts nothing here */
  return ESP_OK;
}

/* Means over the tokens of each sequence; out [n_seqs, width]. */
static esp_status pass(const esp_sequence *q, prompts *p, float *out) {
  int64_t width = esp_features_width(q), tokens = p->rows.tokens, mark = esp_stack_mark(q->stack);
  int n = p->rows.n_seqs;
  esp_dtype type = esp_model_compute(q->model);
  esp_status st = ESP_OK;
  ESP_TRY(esp_rows_pad(&p->rows, esp_sequence_pad(q->be, tokens, q->max_tokens)));
  esp_batch b = esp_sequence_batch(&p->rows);
  int32_t *off = esp_mem_alloc(ESP_MEM_HOST, (size_t)b.n_seqs * sizeof *off);
  void *raw = esp_mem_alloc(ESP_MEM_HOST, (size_t)(tokens * width) * esp_dtype_size(type));
  float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)(tokens * width) * sizeof *x);
  if (!off || !raw || !x) ESP_GOTO(ESP_ERR_MEMORY);
  for (int i = 0; i < b.n_seqs; i++) off[i] = -1;
  b.adapters = off;
  esp_tensor states = esp_stack_tensor(q->stack, type, tokens, width);
  ESP_GOTO(esp_model_features(q->model, q->stack, &b, states));
  q->be->ops->download(q->be, raw, states.data, esp_tensor_bytes(&states));
  ESP_GOTO(esp_backend_sync(q->be));
  esp_convert(x, ESP_F32, raw, type, tokens * width);
  for (int i = 0; i < n; i++) {
    int32_t from = p->rows.cu_seqlens[i], to = p->rows.cu_seqlens[i + 1];
    for (int64_t k = 0; k < width; k++) {
      double sum = 0;
      for (int32_t t = from; t < to; t++) sum += (double)x[t * width + k];
      out[i * width + k] = (float)(sum / (to - from));
    }
  }
out:
  esp_stack_release(q->stack, mark);
  esp_mem_free(off);
  esp_mem_free(raw);
  esp_mem_free(x);
  return st;
}

static void discard(prompts *p) {
  esp_rows_deinit(&p->rows);
  esp_mem_free(p->ones);
}

static bool same_prompt(const esp_batch *b, const int32_t *prompt, int i) {
  return i > 0 && prompt[i] == prompt[i - 1] &&
         !memcmp(b->ids + b->cu_seqlens[i], b->ids + b->cu_seqlens[i - 1], (size_t)prompt[i] * sizeof *b->ids);
}

esp_status esp_features_of_batch(const esp_sequence *q, const esp_batch *b, const int32_t *prompt, float *out) {
  prompts p = {0};
  int64_t width = esp_features_width(q);
  esp_status st = ESP_OK;
  float *means = esp_mem_alloc(ESP_MEM_HOST, (size_t)b->n_seqs * (size_t)width * sizeof *means);
  if (!means) return ESP_ERR_MEMORY;
  for (int i = 0; i < b->n_seqs; i++)
    if (!same_prompt(b, prompt, i)) ESP_GOTO(add(&p, b->ids + b->cu_seqlens[i], prompt[i]));
  ESP_GOTO(pass(q, &p, means));
  for (int i = 0, at = -1; i < b->n_seqs; i++) {
    at += !same_prompt(b, prompt, i);
    memcpy(out + i * width, means + at * width, (size_t)width * sizeof *out);
  }
out:
  discard(&p);
  esp_mem_free(means);
  return st;
}

static esp_status share_of_samples(const esp_sequence *q, const int64_t *index, int64_t n, float *out) {
  prompts p = {0};
  esp_status st = ESP_OK;
  const esp_dataset *d = q->data[q->task];
  int64_t width = esp_features_width(q), size = q->micro_batch;
  for (int64_t i = 0; i < n; i += size) {
    int64_t some = n - i < size ? n - i : size;
    esp_rows_clear(&p.rows);
    for (int64_t k = i; k < i + some; k++) {
      const int32_t *ids;
      const float *w;
      int64_t len, head = esp_dataset_prompt_len(d, index[k]);
      esp_dataset_sample(d, index[k], &ids, &w, &len);
      ESP_GOTO(add(&p, ids, head > 0 ? head : len));
    }
    ESP_GOTO(pass(q, &p, out + i * width));
  }
out:
  discard(&p);
  return st;
}

esp_status esp_features_of_samples(const esp_sequence *q, const int64_t *index, int64_t n, float *out) {
  int64_t first, mine, width = esp_features_width(q);
  esp_sequence_share(q, n, &first, &mine);
  memset(out, 0, (size_t)(n * width) * sizeof *out);
  ESP_TRY(esp_comm_agree(q->comm, share_of_samples(q, index + first, mine, out + first * width)));
  return q->comm->size > 1 ? q->comm->ops->all_reduce_f32(q->comm, out, n * width) : ESP_OK;
}

/* ---- k-means ---- */

static double distance(const float *a, const double *c, int64_t d) {
  double sum = 0;
  for (int64_t k = 0; k < d; k++) sum += ((double)a[k] - c[k]) * ((double)a[k] - c[k]);
  return sum;
}

static void seeding(const float *x, int64_t n, int64_t d, int64_t k, uint64_t seed, uint64_t stream, double *c,
                    double *nearest) {
  int64_t pick = (int64_t)esp_rng_below(seed, stream, 0, (uint64_t)n);
  for (int64_t i = 0; i < n; i++) nearest[i] = DBL_MAX;
  for (int64_t j = 0; j < k; j++) {
    double sum = 0, at;
    for (int64_t e = 0; e < d; e++) c[j * d + e] = (double)x[pick * d + e];
    for (int64_t i = 0; i < n; i++) {
      double far = distance(x + i * d, c + j * d, d);
      if (far < nearest[i]) nearest[i] = far;
      sum += nearest[i];
    }
    at = sum * (double)esp_rng_uniform(seed, stream, (uint64_t)(1024 + j));
    for (pick = 0; pick + 1 < n && at >= nearest[pick]; pick++) at -= nearest[pick];
  }
}

esp_status esp_kmeans(const float *x, int64_t n, int64_t d, int64_t k, uint64_t seed, uint64_t stream,
                      float *centroids) {
  double *c = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * k * d + n) * sizeof *c), *sum = c + k * d;
  int64_t *own = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n + k) * sizeof *own), *count = own + n;
  if (!c || !own) {
    esp_mem_free(c);
    esp_mem_free(own);
    return ESP_ERR_MEMORY;
  }
  seeding(x, n, d, k, seed, stream, c, c + 2 * k * d);
  bool moved = true;
  for (int round = 0; round < 100 && moved; round++) {
    moved = round == 0;
    memset(sum, 0, (size_t)(k * d) * sizeof *sum);
    memset(count, 0, (size_t)k * sizeof *count);
    for (int64_t i = 0; i < n; i++) {
      int64_t best = 0;
      double least = DBL_MAX;
      for (int64_t j = 0; j < k; j++) {
        double far = distance(x + i * d, c + j * d, d);
        if (far < least) least = far, best = j;
      }
      moved |= own[i] != best;
      own[i] = best;
      count[best]++;
      for (int64_t e = 0; e < d; e++) sum[best * d + e] += (double)x[i * d + e];
    }
    for (int64_t j = 0; j < k; j++)
      for (int64_t e = 0; e < d && count[j]; e++) c[j * d + e] = sum[j * d + e] / (double)count[j];
  }
  for (int64_t i = 0; i < k * d; i++) centroids[i] = (float)c[i];
  esp_mem_free(c);
  esp_mem_free(own);
  return ESP_OK;
}
