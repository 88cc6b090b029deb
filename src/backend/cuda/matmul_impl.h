/* matmul_impl.h: shared by the files of the products (matmul*.c).
 *
 * A shape is asked about once. Its entry in an open-addressing table holds the descriptors and the algorithm, so that a
 * later product of the same shape is one look-up and one launch, without allocation. */
#ifndef ESP_BACKEND_CUDA_MATMUL_IMPL_H
#define ESP_BACKEND_CUDA_MATMUL_IMPL_H

#include <cublasLt.h>

#include "backend/cuda/cuda.h"

/* Everything the choice of an algorithm depends on, for row-major c[m, n] = op(a)[m, k] op(b)[k, n]. Zeroed before it
 * is filled: compared, hashed and stored as bytes. */
typedef struct esp_mm_key {
  int64_t m, n, k, lda, ldb, ldc;
  int64_t batch, to_a, to_b, to_c; /* 0: one product; else so many, and the distances to the next operands */
  uint8_t in, out;                 /* esp_dtype of the operands and of the result */
  uint8_t trans_a, trans_b;
  uint8_t bias; /* added by the product itself */
  uint8_t adds; /* beta != 0 */
  uint8_t tf32;
  uint8_t align[4]; /* bytes, at most 16, that a, b, c and the bias begin at a multiple of */
  uint8_t zero[5];
} esp_mm_key;

typedef struct esp_mm_entry {
  esp_mm_key key;
  bool used;
  bool apart; /* no algorithm adds the bias: it is added afterwards */
  cublasLtMatmulDescOpaque_t desc;
  cublasLtMatrixLayoutOpaque_t a, b, c;
  cublasLtMatmulAlgo_t algo;
} esp_mm_entry;

typedef struct esp_mm_data { /* the memory of one product */
  const void *a, *b, *bias;
  void *c;
} esp_mm_data;

typedef struct esp_mm_tuned { /* one measured choice; the file holds these */
  esp_mm_key key;
  cublasLtMatmulAlgo_t algo;
} esp_mm_tuned;

struct esp_cuda_matmul {
  cublasLtHandle_t lt;
  cublasLtMatmulPreferenceOpaque_t pref;
  void *workspace;
  size_t workspace_bytes;
  esp_mm_entry *table;
  int count, cap; /* cap is a power of two */
  /* measured choices (matmul_tune.c); tune is false unless the environment asks for it */
  bool tune, tuned_new;
  char path[512]; /* of the file; empty: nowhere to keep them */
  esp_mm_tuned *tuned;
  int n_tuned, cap_tuned;
};

/* True on success; else the sticky error is set. */
bool esp_mm_ok(esp_backend *be, cublasStatus_t st, const char *what);

/* matmul_plan.c: the entry of this shape, chosen at its first use; it adds the bias of
 * `data`, if there is one, unless it says `apart`. NULL: error set. Valid until the next call. */
esp_mm_entry *esp_mm_find(esp_backend *be, const esp_mm_key *key, const esp_mm_data *data);

/* The product as its entry describes it. Row-major matrices are column-major transposes, and c^T = op(b)^T op(a)^T:
 * cuBLASLt's A is b, its B is a. */
static inline cublasStatus_t esp_mm_run(esp_cuda *cuda, esp_mm_entry *e, const cublasLtMatmulAlgo_t *algo,
                                        const esp_mm_data *d, float alpha, float beta) {
  return cublasLtMatmul(cuda->mm->lt, &e->desc, &alpha, d->b, &e->b, d->a, &e->a, &beta, d->c, &e->c, d->c, &e->c, algo,
                        cuda->mm->workspace, cuda->mm->workspace_bytes, cuda->stream);
}

/* matmul_tune.c */
enum { ESP_MM_CANDIDATES = 8 };
void esp_mm_tune_open(esp_backend *be);
void esp_mm_tune_close(esp_backend *be); /* writes the file if there is anything new */
/* A choice kept from before; false: none that fits. */
bool esp_mm_tuned_find(esp_cuda_matmul *mm, esp_mm_entry *e);
/* The fastest of the candidates by measurement on these operands, remembered. 0, the library's own first choice, when
 * it cannot measure. Only while nothing is recorded. */
int esp_mm_measure(esp_backend *be, esp_mm_entry *e, const esp_mm_data *data,
                   const cublasLtMatmulHeuristicResult_t *found, int n);

#endif
