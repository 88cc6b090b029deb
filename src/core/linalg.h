/* linalg.h: dense factorisations on the host, fp32, row-major and contiguous. Used by adapter initialisation (PiSSA,
 * OLoRA), extraction and export, never in a training step. Results are functions of the inputs alone: OpenBLAS runs
 * with one thread and products are cut into fixed panels over our own pool. */
#ifndef ESP_CORE_LINALG_H
#define ESP_CORE_LINALG_H

#include <stdbool.h>
#include <stdint.h>

#include "core/error.h"

/* C[m,n] = alpha op(A) op(B) + beta C; lda, ldb, ldc: elements from one stored row to the next. */
void esp_linalg_gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float *a,
                     int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc);

/* Thin QR of A [m,n], m >= n: `a` becomes Q [m,n] with orthonormal columns, r [n,n] is upper triangular (NULL: not
 * wanted). Signs as LAPACK's (numpy and torch give the same). */
esp_status esp_linalg_qr(int64_t m, int64_t n, float *a, float *r);

/* Thin SVD of A [m,n], k = min(m,n): u [m,k], s [k] descending, vt [k,n]. `a` is destroyed; NULL (here and below):
 * nothing is computed, only the memory for it is taken and given back, for the books of a plan. */
esp_status esp_linalg_svd(int64_t m, int64_t n, float *a, float *u, float *s, float *vt);

/* The first `rank` singular triplets: u [m,rank], s [rank], vt [rank,n]; `a` is kept. Randomised range finder with
 * subspace iteration (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1), the start drawn from Philox by `seed`.
 * oversample about 10, power_iters about 4 (16 gives a spectrum with slow decay to fp32 accuracy). When rank +
 * oversample reaches min(m,n) the exact SVD is taken. */
esp_status esp_linalg_svd_truncated(int64_t m, int64_t n, const float *a, int64_t rank, int64_t oversample,
                                    int power_iters, uint64_t seed, float *u, float *s, float *vt);

/* Inverse of A [n,n] in place, by LU with pivoting. ESP_ERR_DIVERGED: A is singular. */
esp_status esp_linalg_inverse(int64_t n, float *a);

#endif
