/* naive.h: models as arrays of doubles, and every merging method again, plainly: sorted copies, dense loops, a Jacobi
 * SVD. Slow, and written from the formulas of docs/merging.md. */
#ifndef TESTS_NAIVE_H
#define TESTS_NAIVE_H

#include <math.h>

#include "adapters/adapter_fixture.h"
#include "merge/merge.h"

enum { NV_TENSORS = 64, NV_MODELS = 4 };

typedef struct nv_tensor {
  char name[96];
  int64_t rows, cols, n;
  int ndim, layer; /* -1: of no block */
  bool linear;
  double *x;
} nv_tensor;
typedef struct nv_model {
  nv_tensor t[NV_TENSORS];
  int count;
} nv_model;

static inline void nv_load(const char *dir, nv_model *m) {
  esp_st *f;
  OK(esp_st_open(dir, &f));
  m->count = esp_st_count(f);
  assert_true(m->count <= NV_TENSORS);
  for (int i = 0; i < m->count; i++) {
    const esp_st_entry *e = esp_st_at(f, i);
    nv_tensor *t = &m->t[i];
    *t = (nv_tensor){.ndim = e->ndim, .n = 1, .layer = -1};
    snprintf(t->name, sizeof t->name, "%s", e->name);
    for (int k = 0; k < e->ndim; k++) t->n *= e->shape[k];
    t->rows = e->ndim > 1 ? e->shape[0] : 1;
    t->cols = t->n / t->rows;
    const char *block = strstr(e->name, "layers.");
    if (!block) block = strstr(e->name, "h.");
    if (block) t->layer = atoi(strchr(block, '.') + 1);
    t->linear = e->ndim == 2 && block;
    t->x = malloc((size_t)t->n * sizeof *t->x);
    esp_convert(t->x, ESP_F64, e->data, e->dtype, t->n);
  }
  esp_st_close(f);
}

static inline void nv_free(nv_model *m) {
  for (int i = 0; i < m->count; i++) free(m->t[i].x);
}

static inline nv_tensor *nv_find(nv_model *m, const char *name) {
  for (int i = 0; i < m->count; i++)
    if (strcmp(m->t[i].name, name) == 0) return &m->t[i];
  fail_msg("no tensor %s", name);
  return NULL;
}

/* d [n models][n]: of one tensor, as the fp32 difference that a merge sees. */
static inline void nv_deltas(nv_model *base, nv_model *models, int n, const char *name, double **d) {
  nv_tensor *b = nv_find(base, name);
  for (int i = 0; i < n; i++) {
    nv_tensor *t = nv_find(&models[i], name);
    d[i] = malloc((size_t)b->n * sizeof **d);
    for (int64_t k = 0; k < b->n; k++) d[i][k] = (float)(t->x[k] - b->x[k]);
  }
}

/* Ranks from..from+keep by magnitude stay, equals in order. */
static inline void nv_window(double *x, int64_t n, int64_t from, int64_t keep) {
  double *y = malloc((size_t)n * sizeof *y);
  memcpy(y, x, (size_t)n * sizeof *y);
  for (int64_t i = 0; i < n; i++) {
    int64_t rank = 0;
    for (int64_t k = 0; k < n; k++) rank += fabs(y[k]) > fabs(y[i]) || (fabs(y[k]) == fabs(y[i]) && k < i);
    if (rank < from || rank >= from + keep) x[i] = 0;
  }
  free(y);
}

static inline double nv_dot(const double *a, const double *b, int64_t n) {
  double s = 0;
  for (int64_t i = 0; i < n; i++) s += a[i] * b[i];
  return s;
}

/* One-sided Jacobi: a [m, n], m >= n, becomes U S; v [n, n]. */
static inline void nv_svd(double *a, int64_t m, int64_t n, double *v, double *s) {
  for (int64_t i = 0; i < n * n; i++) v[i] = i % (n + 1) == 0;
  for (int sweep = 0; sweep < 60; sweep++) {
    double most = 0;
    for (int64_t p = 0; p < n; p++)
      for (int64_t q = p + 1; q < n; q++) {
        double pp = 0, qq = 0, pq = 0;
        for (int64_t i = 0; i < m; i++) {
          pp += a[i * n + p] * a[i * n + p];
          qq += a[i * n + q] * a[i * n + q];
          pq += a[i * n + p] * a[i * n + q];
        }
        if (fabs(pq) <= 1e-15 * sqrt(pp * qq)) continue;
        most = fmax(most, fabs(pq) / sqrt(pp * qq));
        double z = (qq - pp) / (2 * pq), t = (z >= 0 ? 1 : -1) / (fabs(z) + sqrt(1 + z * z)), c = 1 / sqrt(1 + t * t);
        for (int64_t i = 0; i < m + n; i++) {
          double *row = i < m ? a + i * n : v + (i - m) * n, x = row[p], y = row[q];
          row[p] = c * x - c * t * y;
          row[q] = c * t * x + c * y;
        }
      }
    if (most < 1e-14) break;
  }
  for (int64_t p = 0; p < n; p++) { /* descending */
    int64_t best = p;
    for (int64_t q = p; q < n; q++) {
      s[q] = 0;
      for (int64_t i = 0; i < m; i++) s[q] += a[i * n + q] * a[i * n + q];
      s[q] = sqrt(s[q]);
      if (s[q] > s[best]) best = q;
    }
    for (int64_t i = 0; i < m + n && best != p; i++) {
      double *row = i < m ? a + i * n : v + (i - m) * n, x = row[p];
      row[p] = row[best];
      row[best] = x;
    }
    double x = s[p];
    s[p] = s[best];
    s[best] = x;
  }
  for (int64_t p = 0; p < n; p++)
    for (int64_t i = 0; i < m; i++) a[i * n + p] /= s[p] > 0 ? s[p] : 1;
}

static inline double *nv_transposed(const double *x, int64_t rows, int64_t cols) {
  double *y = calloc((size_t)(rows * cols), sizeof *y);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < cols; j++) y[j * rows + i] = x[i * cols + j];
  return y;
}

/* OPCM's projection in doubles; of a sum that has every rank. closed: the block's size, out. */
static inline void nv_project(const double *sum, int64_t rows, int64_t cols, double alpha, double *tau,
                              int64_t *closed) {
  if (rows < cols) {
    double *a = nv_transposed(sum, rows, cols), *b = nv_transposed(tau, rows, cols);
    nv_project(a, cols, rows, alpha, b, closed);
    double *back = nv_transposed(b, cols, rows);
    memcpy(tau, back, (size_t)(rows * cols) * sizeof *tau);
    free(a), free(b), free(back);
    return;
  }
  int64_t n = cols;
  double *u = malloc((size_t)(rows * n) * 8), *v = malloc((size_t)(n * n) * 8), *s = malloc((size_t)n * 8), total = 0;
  memcpy(u, sum, (size_t)(rows * n) * 8);
  nv_svd(u, rows, n, v, s);
  for (int64_t i = 0; i < n; i++) total += s[i];
  *closed = 0;
  double running = 0;
  for (int64_t i = 0; i < n; i++) {
    running += s[i];
    if (running > alpha * total) {
      *closed = i;
      break;
    }
  }
  double *taken = calloc((size_t)(rows * n), 8);
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < n; j++) {
      if (i != j && !(i < *closed && j < *closed)) continue;
      double m = 0;
      for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) m += u[r * n + i] * tau[r * cols + c] * v[c * n + j];
      for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) taken[r * cols + c] += m * u[r * n + i] * v[c * n + j];
    }
  for (int64_t k = 0; k < rows * cols; k++) tau[k] -= taken[k];
  free(u), free(v), free(s), free(taken);
}

#endif
