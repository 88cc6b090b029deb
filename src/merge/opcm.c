/* opcm.c: sequential merging by projection. With A_t the running sum, A_1 = d_1, A_t = A_{t-1} + P(d_t; A_{t-1}):
 *
 *   A_{t-1} = U S V^T,  M = U^T d_t V,  P(d_t) = U (M without its diagonal and without its leading k x k block) V^T +
 * what of d_t lies outside of U and V;  k: the first index at which the running sum of S exceeds alpha of the whole.
 *
 * The model is w_0 + A_T / l with l such that its distance to w_0, over all tensors, is the mean norm of the d_t. The
 * published code rescales after every task and multiplies the old scale in again before the next; since U, V and k do
 * not depend on the scale of A, one division at the end is the same. Only directions that A has (singular values above
 * rounding) count for the diagonal: those of an arbitrary basis of its null space, which a low-rank A leaves open,
 * would take arbitrary parts of d_t. Tensors that are no projection inside a block are added up as they are. */
#include <math.h>
#include <string.h>

#include "core/linalg.h"
#include "core/mem.h"
#include "merge/blend.h"

static double dot(const float *a, const float *b, int64_t n) {
  double s = 0;
  for (int64_t i = 0; i < n; i++) s += (double)a[i] * b[i];
  return s;
}

/* m [k, k]: only the diagonal and the leading block stay, that is what is taken off. */
static void keep_closed(float *m, const float *s, int64_t k, double alpha) {
  double total = 0, running = 0;
  int64_t rank = 0, closed = 0;
  for (int64_t i = 0; i < k; i++) total += s[i];
  while (rank < k && s[rank] > 1e-6f * s[0]) rank++;
  for (int64_t i = 0; i < k; i++) {
    running += s[i];
    if (running > alpha * total) {
      closed = i;
      break;
    }
  }
  for (int64_t i = 0; i < k; i++)
    for (int64_t j = 0; j < k; j++)
      if (!(i == j && i < rank) && !(i < closed && j < closed)) m[i * k + j] = 0;
}

esp_status esp_opcm_project(const float *sum, int64_t rows, int64_t cols, double alpha, float *tau) {
  esp_status st;
  int64_t n = rows * cols, k = rows < cols ? rows : cols;
  double squares = dot(sum, sum, n);
  float *a = NULL, *u = NULL, *s = NULL, *vt = NULL, *m = NULL;
  if (!(squares > 0)) return ESP_OK;
  a = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)n * 4);
  u = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(rows * k) * 4);
  s = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)k * 4);
  vt = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(k * cols) * 4);
  m = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(k * k) * 4);
  if (!a || !u || !s || !vt || !m) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  memcpy(a, sum, (size_t)n * 4);
  ESP_GOTO(esp_linalg_svd(rows, cols, a, u, s, vt));
  esp_linalg_gemm(true, false, k, cols, rows, 1.0f, u, k, tau, cols, 0.0f, a, cols); /* U^T tau */
  esp_linalg_gemm(false, true, k, k, cols, 1.0f, a, cols, vt, cols, 0.0f, m, k);
  keep_closed(m, s, k, alpha);
  esp_linalg_gemm(false, false, k, cols, k, 1.0f, m, k, vt, cols, 0.0f, a, cols);
  esp_linalg_gemm(false, false, rows, cols, k, -1.0f, u, k, a, cols, 1.0f, tau, cols);
  double rest = dot(tau, sum, n) / squares; /* the rounding of the products */
  for (int64_t i = 0; i < n; i++) tau[i] = (float)(tau[i] - rest * sum[i]);
out:
  esp_mem_free(a);
  esp_mem_free(u);
  esp_mem_free(s);
  esp_mem_free(vt);
  esp_mem_free(m);
  return st;
}

esp_status esp_opcm_accumulate(esp_blend *b) {
  const esp_vectors *v = &b->v;
  esp_status st = ESP_OK;
  int64_t n = v->rows * v->cols;
  float *tau = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)n * 4);
  b->whole = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)n * 4);
  if (!tau || !b->whole) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  for (int i = 0; i < b->m->n; i++) {
    for (int64_t r = 0; r < v->rows; r += v->step) {
      int64_t some = r + v->step <= v->rows ? v->step : v->rows - r;
      ESP_GOTO(v->read(v->ctx, i, r, some, tau + r * v->cols));
    }
    b->each_squares[i] = dot(tau, tau, n);
    if (v->linear) ESP_GOTO(esp_opcm_project(b->whole, v->rows, v->cols, b->m->alpha, tau));
    for (int64_t k = 0; k < n; k++) b->whole[k] += tau[k];
  }
  b->own_squares = dot(b->whole, b->whole, n);
out:
  esp_mem_free(tau);
  return st;
}
