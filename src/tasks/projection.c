/* projection.c: see projection.h. */
#include "tasks/projection.h"

#include <string.h>

#include "core/linalg.h"
#include "core/rng.h"

enum { SOME = 30 }; /* stream of ESP_RNG_DATA */

/* ---- trained matrices ---- */

static bool trained_site(const esp_sequence *q, esp_site *s, esp_trained *t) {
  const esp_adapter *a = q->adapter;
  *t = (esp_trained){s, -1, -1, -1};
  if (s->kind != ESP_SITE_LINEAR) return false;
  if (s->trained == a->params && s->trained_weight >= 0)
    t->weight = s->trained_weight;
  else if (!a->kind->factors || !a->kind->factors(a, s, &t->a, &t->b))
    return false;
  /* a head that is tied is the embedding, which is no matrix of a product alone */
  return !(s->is_head && esp_model_describe(q->model)->tied);
}

esp_status esp_trained_list(const esp_strategy *s, const esp_sequence *q, esp_trained **list, int *n) {
  esp_site **sites;
  int all = esp_model_sites(q->model, &sites);
  *n = 0;
  *list = esp_mem_alloc(ESP_MEM_HOST, (size_t)(all + 1) * sizeof **list);
  if (!*list) return ESP_ERR_MEMORY;
  for (int i = 0; i < all; i++) *n += trained_site(q, sites[i], &(*list)[*n]);
  if (*n > 0) return ESP_OK;
  esp_mem_free(*list);
  *list = NULL;
  return esp_fail(ESP_ERR_RECIPE, "continual.strategy: %s is for lora, o-lora, layers and full, not for %s",
                  s->kind->name, q->adapter->kind->name);
}

bool esp_trained_fresh(const esp_sequence *q, const esp_trained *t) {
  return t->a >= 0 && (!q->one_adapter || q->task == 0 || q->adapter->kind->task_begin);
}

esp_status esp_trained_own(const esp_strategy *s, const esp_sequence *q, bool whole) {
  esp_trained *list;
  int n;
  ESP_TRY(esp_trained_list(s, q, &list, &n));
  esp_sequence second = *q;
  second.task = 1;
  bool own = true;
  for (int i = 0; i < n && q->n_tasks > 1; i++) own &= esp_trained_fresh(&second, &list[i]) || (whole && list[i].a < 0);
  esp_mem_free(list);
  if (own) return ESP_OK;
  return esp_fail(ESP_ERR_RECIPE,
                  "continual.strategy: %s wants factors of its own for each task: o-lora, or lora with "
                  "continual.policy merge_then_new or new_per_task%s",
                  s->kind->name, whole ? "; or full or layers" : "");
}

/* ---- rows of activations ---- */

void esp_observed_deinit(esp_observed *o) {
  for (int i = 0; i < o->n; i++) {
    if (o->x) esp_mem_free(o->x[i]);
    if (o->y) esp_mem_free(o->y[i]);
  }
  esp_mem_free(o->x);
  esp_mem_free(o->y);
  esp_mem_free(o->rows);
  *o = (esp_observed){0};
}

esp_status esp_sequence_some(const esp_sequence *q, int64_t n, esp_sample **list, int64_t *count) {
  int64_t all = esp_dataset_count(q->data[q->task]);
  *count = n < all ? n : all;
  *list = esp_mem_alloc(ESP_MEM_HOST, (size_t)*count * sizeof **list);
  int64_t *index = esp_mem_alloc(ESP_MEM_HOST, (size_t)*count * sizeof *index);
  esp_status st = *list && index ? ESP_OK : ESP_ERR_MEMORY;
  uint64_t stream = esp_rng_stream(ESP_RNG_DATA, SOME, (uint64_t)q->task, 0);
  if (st == ESP_OK) st = esp_sequence_choose(q->seed, stream, all, *count, index);
  for (int64_t i = 0; st == ESP_OK && i < *count; i++) (*list)[i] = (esp_sample){q->task, index[i]};
  esp_mem_free(index);
  return st;
}

static void take(esp_run *run, esp_tensor from, const int32_t *rows, int64_t n, float *to) {
  int64_t mark = esp_stack_mark(run->stack), cols = esp_tensor_cols(&from);
  esp_tensor some = esp_stack_tensor(run->stack, ESP_F32, n, cols);
  run->be->ops->gather_rows(run->be, some, from, rows);
  run->be->ops->download(run->be, to, some.data, n * cols * (int64_t)sizeof *to);
  esp_stack_release(run->stack, mark);
}

static void look(void *ctx, esp_run *run, const esp_group *g, esp_tensor x, esp_tensor y) {
  esp_observed *o = ctx;
  if (!o->x[g->index]) return;
  int64_t all = esp_tensor_rows(&x), n = o->most - o->rows[g->index];
  if (g->layer >= 0 && all > o->tokens) all = o->tokens;
  if (n > o->batch) n = o->batch;
  if (n > all) n = all;
  if (n <= 0) return;
  int32_t *rows = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *rows);
  if (!rows) {
    run->be->sticky = ESP_ERR_MEMORY;
    return;
  }
  for (int64_t i = 0; i < n; i++) rows[i] = (int32_t)((2 * i + 1) * all / (2 * n));
  int64_t mark = esp_stack_mark(run->stack);
  int32_t *d_rows = esp_stack_push(run->stack, n * (int64_t)sizeof *rows);
  run->be->ops->upload(run->be, d_rows, rows, n * (int64_t)sizeof *rows);
  take(run, x, d_rows, n, o->x[g->index] + o->rows[g->index] * g->in);
  if (o->y) take(run, y, d_rows, n, o->y[g->index] + o->rows[g->index] * g->out);
  o->rows[g->index] += n;
  esp_stack_release(run->stack, mark);
  esp_mem_free(rows);
}

static esp_status make_room(esp_observed *o, const esp_trained *list, int n, bool outputs) {
  size_t groups = (size_t)o->n;
  o->x = esp_mem_alloc(ESP_MEM_STRATEGY, groups * sizeof *o->x);
  o->y = outputs ? esp_mem_alloc(ESP_MEM_STRATEGY, groups * sizeof *o->y) : NULL;
  o->rows = esp_mem_alloc(ESP_MEM_STRATEGY, groups * sizeof *o->rows);
  if (!o->x || !o->rows || (outputs && !o->y)) return ESP_ERR_MEMORY;
  for (int i = 0; i < n; i++) {
    const esp_group *g = list[i].site->group;
    if (o->x[g->index]) continue;
    o->x[g->index] = esp_mem_alloc(ESP_MEM_STRATEGY, (size_t)(o->most * g->in) * sizeof(float));
    if (!o->x[g->index]) return ESP_ERR_MEMORY;
    if (!outputs) continue;
    o->y[g->index] = esp_mem_alloc(ESP_MEM_STRATEGY, (size_t)(o->most * g->out) * sizeof(float));
    if (!o->y[g->index]) return ESP_ERR_MEMORY;
  }
  return ESP_OK;
}

esp_status esp_observe(const esp_sequence *q, const esp_trained *list, int n, const esp_sample *s, int64_t samples,
                       int64_t most, bool outputs, esp_observed *out) {
  esp_status st = ESP_OK;
  esp_group **groups;
  esp_rows rows = {0};
  int64_t size = q->micro_batch, batches = (samples + size - 1) / size;
  *out = (esp_observed){.q = q, .n = esp_model_groups(q->model, &groups), .most = most};
  out->batch = (most + batches - 1) / batches;
  ESP_GOTO(make_room(out, list, n, outputs));
  esp_model_set_look(q->model, look, out);
  for (int64_t i = 0; i < samples; i += size) {
    int64_t some = samples - i < size ? samples - i : size;
    ESP_GOTO(esp_sequence_rows(q, s + i, some, &rows));
    out->tokens = rows.cu_seqlens[some];
    ESP_GOTO(esp_sequence_pass(q, &rows, NULL, false, 1.0, 0, NULL));
  }
out:
  esp_model_set_look(q->model, NULL, NULL);
  esp_rows_deinit(&rows);
  return st;
}

/* ---- bases ---- */

esp_tensor esp_basis(const esp_strategy *s, const char *name, int64_t width) {
  int64_t n;
  float *data = esp_strategy_get(s, name, &n);
  return esp_tensor_2d(data, ESP_F32, n / width, width);
}

/* x [rows, width] minus its part in the span of m [k, width]. Twice is enough. */
static void leave_span(float *x, int64_t rows, const float *m, int64_t k, int64_t width, float *t) {
  for (int pass = 0; pass < 2 && k > 0; pass++) {
    esp_linalg_gemm(false, true, rows, k, width, 1.0f, x, width, m, width, 0.0f, t, k);
    esp_linalg_gemm(false, false, rows, width, k, -1.0f, t, k, m, width, 1.0f, x, width);
  }
}

static double square(const float *x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
  return sum;
}

/* How many of the singular values are wanted. Below the rounding of x nothing is a direction. */
static int64_t wanted(const float *sv, int64_t n, double total, double inside, double energy) {
  int64_t add = 0;
  while (add < n && inside < energy * total && (double)sv[add] * (double)sv[add] > 1e-12 * total) {
    inside += (double)sv[add] * (double)sv[add];
    add++;
  }
  return add;
}

/* Rows of m [k, width] become orthonormal to rounding, with the same span. */
static esp_status orthonormal(float *m, int64_t k, int64_t width) {
  float *t = esp_mem_alloc(ESP_MEM_HOST, (size_t)(k * width) * sizeof *t);
  if (!t) return ESP_ERR_MEMORY;
  for (int64_t i = 0; i < k; i++)
    for (int64_t j = 0; j < width; j++) t[j * k + i] = m[i * width + j];
  esp_status st = esp_linalg_qr(width, k, t, NULL);
  for (int64_t i = 0; i < k; i++)
    for (int64_t j = 0; j < width; j++) m[i * width + j] = t[j * k + i];
  esp_mem_free(t);
  return st;
}

static esp_status store(esp_strategy *s, const char *name, const float *m, int64_t n) {
  float *data = esp_strategy_array(s, name, ESP_F32, n, false);
  if (!data) return ESP_ERR_MEMORY;
  s->be->ops->upload(s->be, data, m, n * (int64_t)sizeof *m);
  return esp_backend_sync(s->be);
}

esp_status esp_basis_grow(esp_strategy *s, const char *name, int64_t width, const float *x, int64_t rows,
                          double energy) {
  esp_status st = ESP_OK;
  esp_tensor old = esp_basis(s, name, width);
  int64_t k = old.data ? esp_tensor_rows(&old) : 0, short_side = rows < width ? rows : width;
  size_t n = (size_t)((k + short_side + 2 * rows) * width + rows * (k + short_side) + short_side * (width + 1));
  float *m = esp_mem_alloc(ESP_MEM_HOST, n * sizeof *m);
  if (!m) return ESP_ERR_MEMORY;
  float *rest = m + (k + short_side) * width, *copy = rest + rows * width, *t = copy + rows * width;
  float *u = t + rows * k, *sv = u + rows * short_side, *vt = sv + short_side;
  if (esp_backend_counts(s->be)) { /* the most there can be */
    ESP_GOTO(esp_linalg_svd(rows, width, NULL, u, sv, vt));
    ESP_GOTO(store(s, name, m, (k + short_side < width ? k + short_side : width) * width));
    goto out;
  }
  if (k > 0) s->be->ops->download(s->be, m, old.data, k * width * (int64_t)sizeof *m);
  memcpy(rest, x, (size_t)(rows * width) * sizeof *x);
  leave_span(rest, rows, m, k, width, t);
  double total = square(x, rows * width), outside = square(rest, rows * width);
  memcpy(copy, rest, (size_t)(rows * width) * sizeof *x);
  ESP_GOTO(esp_linalg_svd(rows, width, copy, u, sv, vt));
  int64_t add = wanted(sv, short_side, total, total - outside, energy);
  if (add > width - k) add = width - k;
  memcpy(m + k * width, vt, (size_t)(add * width) * sizeof *m);
  if (k + add == 0) goto out;
  ESP_GOTO(orthonormal(m, k + add, width));
  ESP_GOTO(store(s, name, m, (k + add) * width));
out:
  esp_mem_free(m);
  return st;
}

/* ---- projections ---- */

static void project(const esp_sequence *q, esp_tensor m, esp_tensor basis, bool rows) {
  const esp_backend_ops *op = q->be->ops;
  int64_t mark = esp_stack_mark(q->stack), k = esp_tensor_rows(&basis);
  bool tf32 = q->be->tf32;
  if (!basis.data || k == 0) return;
  q->be->tf32 = false;
  if (rows) {
    esp_tensor t = esp_stack_tensor(q->stack, ESP_F32, esp_tensor_rows(&m), k);
    op->matmul(q->be, t, m, false, basis, true, 1.0f, 0.0f);
    op->matmul(q->be, m, t, false, basis, false, -1.0f, 1.0f);
  } else {
    esp_tensor t = esp_stack_tensor(q->stack, ESP_F32, k, esp_tensor_cols(&m));
    op->matmul(q->be, t, basis, false, m, false, 1.0f, 0.0f);
    op->matmul(q->be, m, basis, true, t, false, -1.0f, 1.0f);
  }
  q->be->tf32 = tf32;
  esp_stack_release(q->stack, mark);
}

void esp_project_rows(const esp_sequence *q, esp_tensor m, esp_tensor basis) {
  project(q, m, basis, true);
}

void esp_project_cols(const esp_sequence *q, esp_tensor m, esp_tensor basis) {
  project(q, m, basis, false);
}

void esp_project_change(const esp_sequence *q, int p, esp_tensor anchor, esp_tensor rows, esp_tensor cols) {
  const esp_backend_ops *op = q->be->ops;
  esp_tensor now = esp_param_master(q->adapter->params, p), was = now;
  int64_t mark = esp_stack_mark(q->stack);
  was.data = (float *)anchor.data + q->adapter->params->list[p].offset;
  esp_tensor d = esp_stack_tensor(q->stack, ESP_F32, esp_tensor_rows(&now), esp_tensor_cols(&now));
  op->axpby(q->be, d, 1.0f, now, 0.0f);
  op->axpby(q->be, d, -1.0f, was, 1.0f);
  project(q, d, rows, true);
  project(q, d, cols, false);
  op->axpby(q->be, now, 1.0f, was, 0.0f);
  op->axpby(q->be, now, 1.0f, d, 1.0f);
  esp_stack_release(q->stack, mark);
}

esp_status esp_anchor(esp_strategy *s, const esp_sequence *q) {
  esp_tensor anchor = esp_strategy_flat(s, "anchor", q);
  if (!anchor.data) return ESP_ERR_MEMORY;
  q->be->ops->axpby(q->be, anchor, 1.0f, esp_sequence_masters(q), 0.0f);
  return ESP_OK;
}
