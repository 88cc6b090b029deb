/* linalg.c: LAPACK is column-major. A row-major [m,n] buffer is the column-major [n,m] transpose, so each routine is
 * called for the transpose and no copy is made: QR becomes LQ, and U and V^T of the SVD change places. */
#include "core/linalg.h"

#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <string.h>

#include "core/mem.h"
#include "core/rng.h"
#include "core/threads.h"

/* The symbols of libopenblas that are used; its headers are not asked for (LAPACK's are in another package). */
enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };
extern void cblas_sgemm(int layout, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                        const float *b, int ldb, float beta, float *c, int ldc);
extern void sgelqf_(const int *m, const int *n, float *a, const int *lda, float *tau, float *work, const int *lwork,
                    int *info);
extern void sorglq_(const int *m, const int *n, const int *k, float *a, const int *lda, const float *tau, float *work,
                    const int *lwork, int *info);
extern void sgesdd_(const char *jobz, const int *m, const int *n, float *a, const int *lda, float *s, float *u,
                    const int *ldu, float *vt, const int *ldvt, float *work, const int *lwork, int *iwork, int *info,
                    size_t jobz_len);
extern void sgesvd_(const char *jobu, const char *jobvt, const int *m, const int *n, float *a, const int *lda, float *s,
                    float *u, const int *ldu, float *vt, const int *ldvt, float *work, const int *lwork, int *info,
                    size_t jobu_len, size_t jobvt_len);
extern void sgetrf_(const int *m, const int *n, float *a, const int *lda, int *pivots, int *info);
extern void sgetri_(const int *n, float *a, const int *lda, const int *pivots, float *work, const int *lwork,
                    int *info);
extern void openblas_set_num_threads(int n);

static void one_blas_thread(void) {
  openblas_set_num_threads(1);
}

static void init(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, one_blas_thread);
}

typedef struct gemm_job {
  bool ta, tb;
  int64_t m, n, k, lda, ldb, ldc, panel;
  float alpha, beta;
  const float *a, *b;
  float *c;
} gemm_job;

static void gemm_panel(void *ctx, int64_t chunk, int thread) {
  const gemm_job *j = ctx;
  int64_t i0 = chunk * j->panel, rows = j->m - i0 < j->panel ? j->m - i0 : j->panel;
  const float *a = j->ta ? j->a + i0 : j->a + i0 * j->lda;
  cblas_sgemm(ROW_MAJOR, j->ta ? TRANS : NO_TRANS, j->tb ? TRANS : NO_TRANS, (int)rows, (int)j->n, (int)j->k, j->alpha,
              a, (int)j->lda, j->b, (int)j->ldb, j->beta, j->c + i0 * j->ldc, (int)j->ldc);
}

void esp_linalg_gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
                     int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
  init();
  if (m <= 0 || n <= 0) return;
  gemm_job j = {trans_a, trans_b, m, n, k, lda, ldb, ldc, 256, alpha, beta, a, b, c};
  esp_parallel((m + j.panel - 1) / j.panel, gemm_panel, &j);
}

static esp_status check(const char *what, int64_t m, int64_t n, const float *a) {
  if (m < 1 || n < 1 || m > INT_MAX / 4 || n > INT_MAX / 4)
    return esp_fail(ESP_ERR_INTERNAL, "%s of a [%lld, %lld] matrix is not possible", what, (long long)m, (long long)n);
  for (int64_t i = 0; i < m * n; i++) /* LAPACK may loop for ever on NaN */
    if (!isfinite(a[i]))
      return esp_fail(ESP_ERR_DIVERGED, "%s of a [%lld, %lld] matrix with a non-finite value at [%lld, %lld]", what,
                      (long long)m, (long long)n, (long long)(i / n), (long long)(i % n));
  return ESP_OK;
}

esp_status esp_linalg_qr(int64_t m, int64_t n, float *a, float *r) {
  init();
  ESP_TRY(check("QR", m, n, a));
  if (m < n)
    return esp_fail(ESP_ERR_INTERNAL, "QR of [%lld, %lld]: fewer rows than columns", (long long)m, (long long)n);
  /* A^T (column-major [n,m]) = L Q', so A = Q'^T L^T: Q'^T in row-major is Q' in column-major, L^T likewise. */
  esp_status st = ESP_OK;
  int rows = (int)n, cols = (int)m, info = 0, query = -1, lwork;
  float want1 = 0, want2 = 0, *tau = NULL, *work = NULL;
  sgelqf_(&rows, &cols, a, &rows, &want1, &want1, &query, &info);
  sorglq_(&rows, &cols, &rows, a, &rows, &want2, &want2, &query, &info);
  lwork = (int)fmaxf(fmaxf(want1, want2), (float)n) + 1;
  tau = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)n * sizeof *tau);
  work = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)lwork * sizeof *work);
  if (!tau || !work) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  sgelqf_(&rows, &cols, a, &rows, tau, work, &lwork, &info);
  if (r)
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < n; j++) r[i * n + j] = j < i ? 0.0f : a[i * n + j];
  if (info == 0) sorglq_(&rows, &cols, &rows, a, &rows, tau, work, &lwork, &info);
  if (info != 0) st = esp_fail(ESP_ERR_INTERNAL, "QR: LAPACK reports %d", info);
out:
  esp_mem_free(tau);
  esp_mem_free(work);
  return st;
}

esp_status esp_linalg_svd(int64_t m, int64_t n, float *a, float *u, float *s, float *vt) {
  init();
  if (a) ESP_TRY(check("SVD", m, n, a));
  /* A^T = V S U^T: LAPACK's "u" is our vt read row-major, its "vt" our u. */
  esp_status st = ESP_OK;
  int64_t least = m < n ? m : n;
  int rows = (int)n, cols = (int)m, k = (int)least, info = 0, query = -1, lwork;
  float want = 0, want2 = 0, *work = NULL, *copy = NULL;
  int *iwork = esp_mem_alloc(ESP_MEM_WORKSPACE, 8 * (size_t)k * sizeof *iwork);
  sgesdd_("S", &rows, &cols, a, &rows, s, vt, &rows, u, &k, &want, &query, iwork, &info, 1);
  sgesvd_("S", "S", &rows, &cols, a, &rows, s, vt, &rows, u, &k, &want2, &query, &info, 1, 1);
  /* The size comes back as a float, which cannot hold every integer: one part in 2^20 on top. */
  lwork = (int)(fmaxf(want, want2) * (1.0f + 0x1p-20f)) + 64;
  work = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)lwork * sizeof *work);
  copy = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(m * n) * sizeof *copy);
  if (!iwork || !work || !copy) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  if (!a) goto out;
  memcpy(copy, a, (size_t)(m * n) * sizeof *copy);
  sgesdd_("S", &rows, &cols, a, &rows, s, vt, &rows, u, &k, work, &lwork, iwork, &info, 1);
  if (info > 0) /* divide and conquer did not converge (rare): the QR iteration is slower and surer */
    sgesvd_("S", "S", &rows, &cols, copy, &rows, s, vt, &rows, u, &k, work, &lwork, &info, 1, 1);
  if (info != 0) st = esp_fail(ESP_ERR_INTERNAL, "SVD: LAPACK reports %d", info);
out:
  esp_mem_free(iwork);
  esp_mem_free(work);
  esp_mem_free(copy);
  return st;
}

/* Through the exact SVD. */
static esp_status svd_exact_truncated(int64_t m, int64_t n, const float *a, int64_t rank, float *u, float *s,
                                      float *vt) {
  esp_status st = ESP_OK;
  int64_t k = m < n ? m : n;
  float *buf = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(m * n + m * k + k + k * n) * sizeof *buf);
  if (!buf) return ESP_ERR_MEMORY;
  float *copy = buf, *uk = copy + m * n, *sk = uk + m * k, *vk = sk + k;
  if (a) memcpy(copy, a, (size_t)(m * n) * sizeof *a);
  ESP_GOTO(esp_linalg_svd(m, n, a ? copy : NULL, uk, sk, vk));
  if (!a) goto out;
  for (int64_t i = 0; i < m; i++) memcpy(u + i * rank, uk + i * k, (size_t)rank * sizeof *u);
  memcpy(s, sk, (size_t)rank * sizeof *s);
  memcpy(vt, vk, (size_t)(rank * n) * sizeof *vt);
out:
  esp_mem_free(buf);
  return st;
}

esp_status esp_linalg_svd_truncated(int64_t m, int64_t n, const float *a, int64_t rank, int64_t oversample,
                                    int power_iters, uint64_t seed, float *u, float *s, float *vt) {
  init();
  if (a) ESP_TRY(check("SVD", m, n, a));
  int64_t k = m < n ? m : n;
  if (rank < 1 || rank > k)
    return esp_fail(ESP_ERR_INTERNAL, "rank %lld of a [%lld, %lld] matrix", (long long)rank, (long long)m,
                    (long long)n);
  int64_t l = rank + (oversample > 0 ? oversample : 0);
  if (l >= k) return svd_exact_truncated(m, n, a, rank, u, s, vt);
  esp_status st = ESP_OK;
  /* q [m,l], z [n,l], b [l,n], ub [l,l], sb [l], vb [l,n] */
  float *buf = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(m * l + 3 * n * l + l * l + l) * sizeof *buf);
  if (!a || !buf) {
    esp_mem_free(buf);
    return buf ? ESP_OK : ESP_ERR_MEMORY;
  }
  float *q = buf, *z = q + m * l, *b = z + n * l, *vb = b + l * n, *ub = vb + l * n, *sb = ub + l * l;
  uint64_t stream = esp_rng_stream(ESP_RNG_INIT, (uint64_t)m, (uint64_t)n, (uint64_t)l);
  for (int64_t i = 0; i < n * l; i++) z[i] = esp_rng_normal(seed, stream, (uint64_t)i);
  esp_linalg_gemm(false, false, m, l, n, 1, a, n, z, l, 0, q, l);
  ESP_GOTO(esp_linalg_qr(m, l, q, NULL));
  for (int i = 0; i < power_iters; i++) { /* orthonormalised at each half step: small directions would drown */
    esp_linalg_gemm(true, false, n, l, m, 1, a, n, q, l, 0, z, l);
    ESP_GOTO(esp_linalg_qr(n, l, z, NULL));
    esp_linalg_gemm(false, false, m, l, n, 1, a, n, z, l, 0, q, l);
    ESP_GOTO(esp_linalg_qr(m, l, q, NULL));
  }
  esp_linalg_gemm(true, false, l, n, m, 1, q, l, a, n, 0, b, n);
  ESP_GOTO(esp_linalg_svd(l, n, b, ub, sb, vb));
  esp_linalg_gemm(false, false, m, rank, l, 1, q, l, ub, l, 0, u, rank);
  memcpy(s, sb, (size_t)rank * sizeof *s);
  memcpy(vt, vb, (size_t)(rank * n) * sizeof *vt);
out:
  esp_mem_free(buf);
  return st;
}

esp_status esp_linalg_inverse(int64_t n, float *a) {
  init();
  ESP_TRY(check("inverse", n, n, a));
  int order = (int)n, info = 0; /* the transpose of the inverse is the inverse of the transpose: no copy */
  int *pivots = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)n * sizeof *pivots);
  float *work = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)n * sizeof *work);
  esp_status st = pivots && work ? ESP_OK : ESP_ERR_MEMORY;
  if (st == ESP_OK) {
    sgetrf_(&order, &order, a, &order, pivots, &info);
    if (info == 0) sgetri_(&order, a, &order, pivots, work, &order, &info);
    if (info != 0)
      st = esp_fail(ESP_ERR_DIVERGED, "inverse of a [%lld, %lld] matrix: it is singular", (long long)n, (long long)n);
  }
  esp_mem_free(pivots);
  esp_mem_free(work);
  return st;
}
