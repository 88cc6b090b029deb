/* gemm_blas.c: the engine for fp32 operands, and for bf16 where there are no tiles: fixed blocks of single-threaded
 * sgemm (OpenBLAS; at the plain level a portable loop), bf16 widened block by block into fp32 scratch. */
#include <cblas.h>
#include <pthread.h>
#include <string.h>

#include "backend/cpu/gemm_impl.h"
#include "core/cpu.h"

static void init_once(void) {
  openblas_set_num_threads(1);
}

void esp_gemm_blas_init(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, init_once);
}

typedef struct block {
  const float *p;
  int64_t ld;
  bool cols; /* element (i,k) at p[k*ld + i], else p[i*ld + k] */
} block;

/* Elements [i0, i0+ni) x [k0, k0+nk) of an operand as fp32: in place, or widened into buf. */
static block view(const esp_goper *o, int64_t i0, int64_t ni, int64_t k0, int64_t nk, float *buf) {
  bool cols = o->kind == ESP_GOPER_COLS;
  int64_t off = cols ? k0 * o->ld + i0 : i0 * o->ld + k0;
  if (o->dtype == ESP_F32) return (block){(const float *)o->data + off, o->ld, cols};
  int64_t nr = cols ? nk : ni, nc = cols ? ni : nk;
  for (int64_t r = 0; r < nr; r++) {
    const uint16_t *s = (const uint16_t *)o->data + off + r * o->ld;
    float *d = buf + r * nc;
    for (int64_t c = 0; c < nc; c++) d[c] = esp_bf16_to_f32(s[c]);
  }
  return (block){buf, nc, cols};
}

/* c[m,n] (+)= a b^T with fp32 sums in order of k; four rows at a time share the loads of b. */
static void sgemm_plain(float *c, int64_t ldc, block a, block b, int64_t m, int64_t n, int64_t k, bool add) {
  for (int64_t i = 0; i < m; i++) {
    float *ci = c + i * ldc;
    if (!add) memset(ci, 0, (size_t)n * sizeof *ci);
    if (b.cols) {
      for (int64_t q = 0; q < k; q++) {
        float x = a.cols ? a.p[q * a.ld + i] : a.p[i * a.ld + q];
        const float *bq = b.p + q * b.ld;
        for (int64_t e = 0; e < n; e++) ci[e] += x * bq[e];
      }
    } else {
      for (int64_t e = 0; e < n; e++) {
        const float *be = b.p + e * b.ld;
        float s[8] = {0};
        int64_t q = 0;
        if (!a.cols)
          for (const float *ai = a.p + i * a.ld; q + 8 <= k; q += 8)
            for (int u = 0; u < 8; u++) s[u] += ai[q + u] * be[q + u];
        for (; q < k; q++) s[0] += (a.cols ? a.p[q * a.ld + i] : a.p[i * a.ld + q]) * be[q];
        ci[e] += ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
      }
    }
  }
}

static void sgemm(float *c, int64_t ldc, block a, block b, int64_t m, int64_t n, int64_t k, bool add) {
  if (esp_cpu_isa() == ESP_ISA_PLAIN) {
    sgemm_plain(c, ldc, a, b, m, n, k, add);
    return;
  }
  cblas_sgemm(CblasRowMajor, a.cols ? CblasTrans : CblasNoTrans, b.cols ? CblasNoTrans : CblasTrans, (int)m, (int)n,
              (int)k, 1.0f, a.p, (int)a.ld, b.p, (int)b.ld, add ? 1.0f : 0.0f, c, (int)ldc);
}

esp_gsizes esp_gemm_blas_sizes(const esp_gjob *j) {
  esp_gsizes z = {0};
  int64_t mb = esp_min64((j->m + 31) & ~(int64_t)31, ESP_GEMM_BLAS_ROWS);
  if (j->a.dtype != ESP_F32) z.a = (size_t)(mb * j->kb) * 4;
  if (j->b.dtype != ESP_F32) z.b = (size_t)(j->nb * j->kb) * 4;
  z.c = (size_t)(mb * j->nb) * 4;
  for (int i = 0; i < j->n_tails; i++) { /* a tail's two operands side by side */
    size_t t = (size_t)((mb + j->nb) * j->tails[i].k) * 4;
    if (t > z.t) z.t = t;
  }
  return z;
}

void esp_gemm_blas_chunk(const esp_gjob *j, esp_gscratch *s, int64_t kc, int64_t mb, int64_t nb) {
  int64_t m0 = mb * j->mb, m = esp_min64(j->mb, j->m - m0), n0 = nb * j->nb, n = esp_min64(j->nb, j->n - n0);
  int64_t k0 = kc * j->kc, k1 = esp_min64(k0 + j->kc, j->k);
  float *c = (float *)s->c;
  int64_t ldc = j->nb;
  if (j->nkc > 1) {
    ldc = (j->n + 31) & ~(int64_t)31;
    c = j->partial + (kc * j->m + m0) * ldc + n0;
  }
  bool add = false;
  for (int64_t k = k0; k < k1; k += j->kb) {
    int64_t nk = esp_min64(j->kb, k1 - k);
    block a = view(&j->a, m0, m, k, nk, (float *)s->a);
    block b = view(&j->b, n0, n, k, nk, (float *)s->b);
    sgemm(c, ldc, a, b, m, n, nk, add);
    add = true;
  }
  if (!add)
    for (int64_t r = 0; r < m; r++) memset(c + r * ldc, 0, (size_t)n * sizeof *c);
  if (kc == j->nkc - 1) {
    for (int i = 0; i < j->n_tails; i++) {
      const esp_gtail *t = &j->tails[i];
      int64_t c0 = esp_max64(n0, t->n0), c1 = esp_min64(n0 + n, t->n1);
      if (c0 >= c1 || t->k <= 0) continue;
      block a = view(&t->a, m0, m, 0, t->k, (float *)s->t);
      block b = view(&t->b, c0 - t->n0, c1 - c0, 0, t->k, (float *)s->t + j->mb * t->k);
      sgemm(c + (c0 - n0), ldc, a, b, m, c1 - c0, t->k, true);
    }
  }
  if (j->nkc == 1) esp_gemm_epilogue(j, m0, n0, m, n, c, ldc);
}
