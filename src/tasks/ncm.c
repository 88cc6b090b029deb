/* ncm.c: the reference of frozen features: nothing is trained, and the nearest class mean answers. When a task ends,
 * the features of its rows' prompts (features.h) are added to the sums of its classes; an answer is the class whose
 * mean is nearest to the feature of the prompt, by cosine similarity or by Euclidean distance. The nearest class mean
 * of iCaRL (Rebuffi et al. 2017) on a frozen pre-trained base: Janson et al., "A Simple Baseline that Questions the Use
 * of Pretrained-Models in Continual Learning" (2022); SimpleCIL of Zhou et al. (2023).
 *
 * A class is a label of a task: where two tasks use one word they may mean different things by it, and the nearer of
 * its means speaks for it. What the means are in the end does not depend on the order of the tasks, and none is changed
 * by a later one. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "io/json.h"
#include "tasks/features.h"
#include "tasks/internal.h"

enum { CHUNK = 256 }; /* rows whose features are held at once */

typedef struct classes { /* beside the array "sums" [n, width], fp64 */
  char **name;
  int64_t *rows;
  int64_t n, bytes;
  float *features; /* of the last batch */
  int64_t cap;
} classes;

static esp_status open(esp_strategy *s, const esp_sequence *q) {
  s->impl = esp_mem_alloc(ESP_MEM_HOST, sizeof(classes));
  return s->impl ? ESP_OK : ESP_ERR_MEMORY;
}

static void forget(classes *c) {
  for (int64_t i = 0; i < c->n; i++) esp_mem_free(c->name[i]);
  c->n = c->bytes = 0;
}

static void close(esp_strategy *s) {
  classes *c = s->impl;
  if (!c) return;
  forget(c);
  esp_mem_free(c->name);
  esp_mem_free(c->rows);
  esp_mem_free(c->features);
  esp_mem_free(c);
}

static esp_status add(classes *c, const char *name, int64_t rows) {
  size_t n = (size_t)c->n + 1;
  char **names = esp_mem_realloc(ESP_MEM_HOST, c->name, n * sizeof *names);
  if (!names) return ESP_ERR_MEMORY;
  c->name = names;
  int64_t *counts = esp_mem_realloc(ESP_MEM_HOST, c->rows, n * sizeof *counts);
  if (!counts) return ESP_ERR_MEMORY;
  c->rows = counts;
  names[c->n] = esp_mem_strdup(ESP_MEM_HOST, name);
  if (!names[c->n]) return ESP_ERR_MEMORY;
  counts[c->n++] = rows;
  c->bytes += (int64_t)(strlen(name) + 1 + sizeof *counts);
  return ESP_OK;
}

/* Before anything is trained, and in a plan before anything is written. */
static esp_status task_begin(esp_strategy *s, const esp_sequence *q) {
  const esp_dataset *d = q->data[q->task];
  for (int64_t i = 0; i < esp_dataset_count(d); i++) {
    char place[4096];
    if (esp_dataset_label(d, i) >= 0) continue;
    esp_dataset_origin(d, i, place, sizeof place);
    return esp_fail(ESP_ERR_DATA, "%s: the row has no label (format classification), of which ncm makes a class",
                    place);
  }
  return ESP_OK;
}

/* ---- what a task adds ---- */

/* Room for its classes behind those that are there. */
static esp_status enter(esp_strategy *s, const esp_sequence *q) {
  classes *c = s->impl;
  int64_t d = esp_features_width(q), before = c->n;
  const char *const *names;
  int labels = esp_dataset_labels(q->data[q->task], &names, NULL);
  for (int k = 0; k < labels; k++) ESP_TRY(add(c, names[k], 0));
  size_t bytes = (size_t)(before * d) * sizeof(double);
  double *kept = esp_mem_alloc(ESP_MEM_HOST, bytes + 1);
  if (!kept) return ESP_ERR_MEMORY;
  if (before > 0) memcpy(kept, esp_strategy_get(s, "sums", NULL), bytes);
  double *sums = esp_strategy_array(s, "sums", ESP_F64, c->n * d, true);
  if (sums) memcpy(sums, kept, bytes);
  esp_mem_free(kept);
  return sums ? ESP_OK : ESP_ERR_MEMORY;
}

/* For a plan: as many of the longest prompt as a pass has. */
static void longest(const esp_sequence *q, int64_t *index, int64_t n) {
  const esp_dataset *d = q->data[q->task];
  int64_t best = 0;
  for (int64_t i = 1; i < esp_dataset_count(d); i++)
    if (esp_dataset_prompt_len(d, i) > esp_dataset_prompt_len(d, best)) best = i;
  for (int64_t k = 0; k < n; k++) index[k] = best;
}

static esp_status task_end(esp_strategy *s, const esp_sequence *q) {
  classes *c = s->impl;
  const esp_dataset *data = q->data[q->task];
  int64_t n = esp_dataset_count(data), d = esp_features_width(q), size = q->micro_batch;
  int64_t most = (CHUNK + size - 1) / size * size; /* whole passes */
  int64_t before = c->n;
  esp_status st = ESP_OK;
  int64_t *index = esp_mem_alloc(ESP_MEM_HOST, (size_t)most * sizeof *index);
  float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)(most * d) * sizeof *x);
  if (!index || !x) ESP_GOTO(ESP_ERR_MEMORY);
  ESP_GOTO(enter(s, q));
  double *sums = esp_strategy_get(s, "sums", NULL);
  if (esp_backend_counts(q->be)) { /* the same memory, not the same time */
    longest(q, index, size);
    ESP_GOTO(esp_features_of_samples(q, index, n < size ? n : size, x));
    goto out;
  }
  for (int64_t first = 0; first < n; first += most) {
    int64_t some = n - first < most ? n - first : most;
    for (int64_t k = 0; k < some; k++) index[k] = first + k;
    ESP_GOTO(esp_features_of_samples(q, index, some, x));
    for (int64_t k = 0; k < some; k++) {
      int64_t to = before + esp_dataset_label(data, first + k);
      for (int64_t j = 0; j < d; j++) sums[to * d + j] += (double)x[k * d + j];
      c->rows[to]++;
    }
  }
out:
  esp_mem_free(index);
  esp_mem_free(x);
  return st;
}

/* ---- answers ---- */

static bool of_set(const char *name, const char *const *labels, int n) {
  for (int i = 0; i < n; i++)
    if (!strcmp(name, labels[i])) return true;
  return false;
}

static bool seen(const esp_strategy *s) {
  return !strcmp(s->cfg->ncm.choices, "seen");
}

/* Whether class i is compared with: a label without a row has no mean. */
static bool candidate(const esp_strategy *s, int64_t i, const char *const *labels, int n) {
  const classes *c = s->impl;
  return (c->rows[i] > 0 || esp_backend_counts(s->be)) && (seen(s) || of_set(c->name[i], labels, n));
}

static bool answers(const esp_strategy *s, const char *const *labels, int n) {
  const classes *c = s->impl;
  for (int64_t i = 0; c && i < c->n; i++)
    if (candidate(s, i, labels, n)) return true;
  return false;
}

/* The larger, the nearer. The cosine with a sum is that with the mean. */
static double likeness(const esp_strategy *s, const float *f, const double *sum, int64_t rows, int64_t d) {
  double dot = 0, length = 0, own = 0, far = 0;
  if (!strcmp(s->cfg->ncm.metric, "cosine")) {
    for (int64_t j = 0; j < d; j++) {
      dot += (double)f[j] * sum[j];
      length += sum[j] * sum[j];
      own += (double)f[j] * (double)f[j];
    }
    return length > 0 && own > 0 ? dot / sqrt(length * own) : 0;
  }
  for (int64_t j = 0; j < d; j++) {
    double gap = (double)f[j] - sum[j] / (double)rows;
    far += gap * gap;
  }
  return -far;
}

static esp_status answer(esp_strategy *s, const esp_sequence *q, const char *const *labels, int n,
                         const int32_t *prompt, const esp_batch *b, const char **out) {
  classes *c = s->impl;
  int64_t d = esp_features_width(q), need = b->n_seqs * d;
  const double *sums = esp_strategy_get(s, "sums", NULL);
  if (need > c->cap) {
    float *grown = esp_mem_realloc(ESP_MEM_HOST, c->features, (size_t)need * sizeof *grown);
    if (!grown) return ESP_ERR_MEMORY;
    c->features = grown;
    c->cap = need;
  }
  ESP_TRY(esp_features_of_batch(q, b, prompt, c->features));
  bool *among = esp_mem_alloc(ESP_MEM_HOST, (size_t)c->n * sizeof *among);
  if (!among) return ESP_ERR_MEMORY;
  for (int64_t i = 0; i < c->n; i++) among[i] = candidate(s, i, labels, n);
  for (int k = 0; k < b->n_seqs; k++) {
    double most = -DBL_MAX;
    for (int64_t i = 0; i < c->n; i++) {
      if (!among[i]) continue;
      double like = likeness(s, c->features + k * d, sums + i * d, c->rows[i], d);
      if (like > most || most == -DBL_MAX) most = like, out[k] = c->name[i];
    }
  }
  esp_mem_free(among);
  return ESP_OK;
}

/* ---- checkpoints ---- */

static void state_write(const esp_strategy *s, json_t *j) {
  const classes *c = s->impl;
  json_t *list = json_array();
  for (int64_t i = 0; i < c->n; i++)
    json_array_append_new(list, json_pack("{s:s,s:I}", "name", c->name[i], "rows", (json_int_t)c->rows[i]));
  json_object_set_new(j, "classes", list);
}

static esp_status state_read(esp_strategy *s, const json_t *j, const char *path) {
  classes *c = s->impl;
  const json_t *list = json_object_get(j, "classes");
  int64_t n;
  (void)esp_strategy_get(s, "sums", &n);
  forget(c);
  for (size_t i = 0; i < json_array_size(list); i++) {
    const char *name;
    int64_t rows = 0;
    ESP_TRY(esp_json_str(json_array_get(list, i), "name", path, 1, &name));
    ESP_TRY(esp_json_i64(json_array_get(list, i), "rows", path, 1, &rows));
    ESP_TRY(add(c, name, rows));
  }
  if (!json_is_array(list) || (c->n ? n == 0 || n % c->n != 0 : n != 0))
    return esp_fail(ESP_ERR_DATA, "%s: the classes of ncm and their sums do not belong together", path);
  return ESP_OK;
}

static int64_t held(const esp_strategy *s, const esp_sequence *q) {
  const classes *c = s->impl;
  return c ? c->bytes : 0;
}

const esp_strategy_kind esp_strategy_ncm = {
    .name = "ncm",
    .summary =
        "a reference: nothing is trained, the nearest class mean of the base's features answers (adapter.type none)",
    .flags = ESP_STRATEGY_FROZEN,
    .open = open,
    .close = close,
    .task_begin = task_begin,
    .task_end = task_end,
    .answers = answers,
    .answer = answer,
    .state_write = state_write,
    .state_read = state_read,
    .held = held,
};
