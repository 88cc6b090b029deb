#include "merge/blend.h"

#include <math.h>
#include <string.h>

#include "core/mem.h"

/* ---- what a method must know of whole vectors ---- */

typedef esp_status (*each_block)(esp_blend *b, int i, const float *x, int64_t at, int64_t n, void *ctx);

static esp_status over_rows(esp_blend *b, int i, each_block f, void *ctx) {
  const esp_vectors *v = &b->v;
  for (int64_t r = 0; r < v->rows; r += v->step) {
    int64_t n = r + v->step <= v->rows ? v->step : v->rows - r;
    ESP_TRY(v->read(v->ctx, i, r, n, b->x[i]));
    ESP_TRY(f(b, i, b->x[i], r * v->cols, n * v->cols, ctx));
  }
  return ESP_OK;
}

static esp_status feed(esp_blend *b, int i, const float *x, int64_t at, int64_t n, void *ctx) {
  esp_cutter_feed(ctx, x, n);
  return ESP_OK;
}

/* Ranks from..from+keep stay: the cuts at both ends. Never more leave at the top than keep leaves room for. */
static esp_status find_cuts(esp_blend *b, int i) {
  int64_t n = b->v.rows * b->v.cols, keep = esp_share_of(b->m->density[i], n);
  int64_t top = b->m->kind->thin == ESP_THIN_MIDDLE ? esp_share_of(b->m->gamma, n) : 0;
  if (top > n - keep) top = n - keep;
  b->above[i] = (esp_cut){.k = top, .limit = INFINITY};
  b->inside[i] = (esp_cut){.k = top + keep};
  esp_cut *cuts[] = {&b->inside[i], &b->above[i]};
  esp_cutter c;
  if (top == 0 && keep == n) return ESP_OK; /* the limit 0 and passing 0 of 0 would lose zeros only */
  ESP_TRY(esp_cutter_init(&c, cuts, top > 0 ? 2 : 1));
  esp_status st = over_rows(b, i, feed, &c);
  esp_cutter_turn(&c);
  if (st == ESP_OK) st = over_rows(b, i, feed, &c);
  esp_cutter_end(&c);
  return st;
}

static esp_draw draw_of(const esp_blend *b, int i) {
  return esp_draw_of(b->m->seed, i, b->v.part, b->v.name, b->m->density[i]);
}

static esp_status add_sizes(esp_blend *b, int i, const float *x, int64_t at, int64_t n, void *ctx) {
  double *sum = ctx; /* of all, of the drawn */
  for (int64_t k = 0; k < n; k++) sum[0] += fabs((double)x[k]);
  esp_draw d = draw_of(b, i);
  esp_draw_keep(&d, b->x[i], at, n, 1);
  for (int64_t k = 0; k < n; k++) sum[1] += fabs((double)b->x[i][k]);
  return ESP_OK;
}

static esp_status find_rescale(esp_blend *b, int i) {
  double sum[2] = {0, 0};
  b->rescale[i] = b->m->rescale == ESP_RESCALE_NONE ? 1 : 1 / b->m->density[i];
  if (b->m->rescale != ESP_RESCALE_L1) return ESP_OK;
  ESP_TRY(over_rows(b, i, add_sizes, sum));
  b->rescale[i] = sum[1] > 0 ? sum[0] / sum[1] : 1;
  return ESP_OK;
}

/* Inner products of all pairs, gram [n, n]; on_weights: of w_0 + d_i. */
static esp_status find_gram(esp_blend *b, bool on_weights, double *gram) {
  const esp_vectors *v = &b->v;
  int n = b->m->n;
  for (int64_t r = 0; r < v->rows; r += v->step) {
    int64_t some = r + v->step <= v->rows ? v->step : v->rows - r;
    for (int i = 0; i < n + on_weights; i++) ESP_TRY(v->read(v->ctx, i, r, some, b->x[i]));
    for (int i = 0; i < n; i++)
      for (int j = 0; j <= i; j++) {
        double s = 0;
        for (int64_t k = 0; k < some * v->cols; k++) {
          double w = on_weights ? b->x[n][k] : 0;
          s += (w + b->x[i][k]) * (w + b->x[j][k]);
        }
        gram[i * n + j] += s;
      }
  }
  return ESP_OK;
}

static double cosine(const double *gram, int n, int i, int j) {
  double norms = sqrt(gram[i * n + i]) * sqrt(gram[j * n + j]);
  return norms > 0 ? gram[i * n + j] / norms : 0;
}

/* Jang et al. 2024: between the base and the mean, at the foot of the perpendicular. A negative mean cosine (the base
 * is the best of all points) gives the base, as does a vector of nothing. */
static esp_status find_stock(esp_blend *b) {
  int n = b->m->n;
  double gram[ESP_MERGE_MOST * ESP_MERGE_MOST] = {0}, c = 0;
  ESP_TRY(find_gram(b, false, gram));
  for (int i = 0; i < n; i++)
    for (int j = 0; j < i; j++) c += cosine(gram, n, i, j);
  c /= n * (n - 1) / 2.0;
  double t = c > 0 ? n * c / (1 + (n - 1) * c) : 0;
  for (int i = 0; i < n; i++) b->factor[i] = t / n;
  return ESP_OK;
}

static esp_status find_slerp(esp_blend *b) {
  bool on_weights = b->v.has_base && strcmp(b->m->kind->name, "slerp") == 0;
  double gram[4] = {0}, t = b->m->t;
  ESP_TRY(find_gram(b, on_weights, gram));
  double c = cosine(gram, 2, 1, 0);
  b->factor[0] = 1 - t;
  b->factor[1] = t;
  if (fabs(c) <= 0.9995 && gram[0] > 0 && gram[3] > 0) {
    double angle = acos(c);
    b->factor[0] = sin((1 - t) * angle) / sin(angle);
    b->factor[1] = sin(t * angle) / sin(angle);
  }
  if (on_weights) b->factor[2] = b->factor[0] + b->factor[1] - 1; /* of w_0, which the result is added to */
  return ESP_OK;
}

static esp_status prepare(esp_blend *b) {
  const esp_method *m = b->m;
  for (int i = 0; i < m->n; i++) {
    b->factor[i] = m->weight[i];
    if (m->kind->thin == ESP_THIN_LARGEST || m->kind->thin == ESP_THIN_MIDDLE) ESP_TRY(find_cuts(b, i));
    if (m->kind->thin == ESP_THIN_DRAW) ESP_TRY(find_rescale(b, i));
  }
  if (m->kind->join == ESP_JOIN_STOCK) return find_stock(b);
  if (m->kind->join == ESP_JOIN_SLERP) return find_slerp(b);
  if (m->kind->join == ESP_JOIN_OPCM && b->v.linear) return esp_opcm_accumulate(b);
  return ESP_OK;
}

esp_status esp_blend_open(const esp_method *m, const esp_vectors *v, esp_blend *b) {
  esp_status st = ESP_OK;
  *b = (esp_blend){.m = m, .v = *v, .scale = esp_method_scale(m, v->layer)};
  for (int i = 0; i < m->n + v->has_base; i++) {
    b->x[i] = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(v->step * v->cols) * 4);
    if (!b->x[i]) st = ESP_ERR_MEMORY;
  }
  if (st == ESP_OK) st = prepare(b);
  if (st != ESP_OK) esp_blend_close(b);
  return st;
}

void esp_blend_close(esp_blend *b) {
  for (int i = 0; i <= ESP_MERGE_MOST; i++) esp_mem_free(b->x[i]);
  esp_mem_free(b->whole);
  *b = (esp_blend){0};
}

/* ---- the result ---- */

static void thin(esp_blend *b, int i, int64_t at, int64_t n) {
  float *x = b->x[i];
  if (b->m->kind->thin == ESP_THIN_NONE) return;
  if (b->m->kind->thin == ESP_THIN_DRAW) {
    esp_draw d = draw_of(b, i);
    esp_draw_keep(&d, x, at, n, b->rescale[i]);
    return;
  }
  for (int64_t k = 0; k < n; k++) {
    bool leaves = esp_cut_inside(&b->above[i], x[k]), inside = esp_cut_inside(&b->inside[i], x[k]);
    if (leaves || !inside) x[k] = 0;
  }
}

static void sum(const esp_blend *b, int n, int64_t len, float *out) {
  for (int64_t k = 0; k < len; k++) {
    double s = 0;
    for (int i = 0; i < n; i++) s += b->factor[i] * b->x[i][k];
    out[k] = (float)(b->scale * s);
  }
}

/* A tensor that OPCM does not project: its part of the norms. */
static void add_squares(esp_blend *b, int64_t len) {
  for (int64_t k = 0; k < len; k++) {
    double s = 0;
    for (int i = 0; i < b->m->n; i++) {
      s += b->x[i][k];
      b->each_squares[i] += (double)b->x[i][k] * b->x[i][k];
    }
    b->own_squares += s * s;
  }
}

static void largest(const esp_blend *b, int64_t len, float *out) {
  for (int64_t k = 0; k < len; k++) {
    float best = b->x[0][k];
    for (int i = 1; i < b->m->n; i++)
      if (fabsf(b->x[i][k]) >= fabsf(best)) best = b->x[i][k];
    out[k] = (float)(b->scale * best);
  }
}

esp_status esp_blend_rows(esp_blend *b, int64_t r0, int64_t n, float *out) {
  const esp_method *m = b->m;
  int64_t at = r0 * b->v.cols, len = n * b->v.cols;
  int vectors = m->n + (m->kind->join == ESP_JOIN_SLERP && b->v.has_base);
  if (b->whole) {
    for (int64_t k = 0; k < len; k++) out[k] = (float)(b->scale * b->whole[at + k]);
    return ESP_OK;
  }
  for (int i = 0; i < vectors; i++) {
    ESP_TRY(b->v.read(b->v.ctx, i, r0, n, b->x[i]));
    if (i < m->n) thin(b, i, at, len);
  }
  if (m->kind->join == ESP_JOIN_MAX) {
    largest(b, len, out);
  } else if (m->kind->join == ESP_JOIN_ELECT) {
    esp_elect(&m->election, (const float *const *)b->x, m->weight, m->n, len, out);
    for (int64_t k = 0; k < len; k++) out[k] = (float)(b->scale * out[k]);
  } else {
    sum(b, vectors, len, out);
    if (m->kind->join == ESP_JOIN_OPCM) add_squares(b, len);
  }
  return ESP_OK;
}
