/* gemm.h: every matrix product of the cpu backend, by its own AMX kernels (bf16), by single-threaded OpenBLAS calls
 * over fixed blocks (fp32, and bf16 widened in blocks), or by a portable loop. The level is esp_cpu_isa() at the time
 * of the call, except for a packed operand, which keeps the layout it was packed in.
 *
 * Contracts are those of the op table (backend.h). Work is cut by shape alone, never by thread count.
 */
#ifndef ESP_BACKEND_CPU_GEMM_H
#define ESP_BACKEND_CPU_GEMM_H

#include "backend/backend.h"

void *esp_cpu_pack(esp_backend *be, const esp_tensor *w, int n, bool transposed, esp_dtype compute);
void esp_cpu_pack_free(esp_backend *be, void *packed);
void esp_cpu_linear(esp_backend *be, esp_tensor y, esp_tensor x, const esp_wview *w, esp_tensor bias,
                    const esp_tail *tails, int n_tails, float beta);
void esp_cpu_linear_dx(esp_backend *be, esp_tensor dx, esp_tensor dy, const esp_wview *w, const esp_tail *tails,
                       int n_tails, float beta);
bool esp_cpu_linear_adds(esp_backend *be, esp_tensor x, const esp_wview *w, const esp_csr *m); /* gemm_added.c */
void esp_cpu_matmul(esp_backend *be, esp_tensor c, esp_tensor a, bool trans_a, esp_tensor b, bool trans_b, float alpha,
                    float beta);
/* a^T b in pieces of at most 32 rows as they are made: rows [m, m + rows), columns [n, n + cols) at sum, row stride ld.
 * Each element comes once; pieces come from several threads. bf16 through tiles only. */
typedef void (*esp_gemm_take)(void *ctx, int64_t m, int64_t rows, int64_t n, int64_t cols, const float *sum,
                              int64_t ld);
void esp_cpu_matmul_taken(esp_backend *be, esp_tensor a, esp_tensor b, esp_gemm_take take, void *ctx);

/* Bytes a packed operand of [out, in] takes in `compute` type at the current level (for planning and the count
 * backend). */
int64_t esp_cpu_pack_bytes(int64_t out, int64_t in, esp_dtype compute);
/* Scratch that products hold, each the largest so far. Between esp_cpu_gemm_dry(need) and esp_cpu_gemm_dry(NULL) the
 * products above compute nothing and only raise `need`: this is how the counting backend knows. One caller at a time.
 */
typedef struct esp_gemm_need {
  size_t scratch, partial, panels, tiles; /* scratch: of all threads */
} esp_gemm_need;
static inline int64_t esp_gemm_need_bytes(const esp_gemm_need *n) {
  return (int64_t)(n->scratch + n->partial + n->panels + n->tiles);
}
void esp_cpu_gemm_dry(esp_gemm_need *need);
/* Releases the per-thread scratch of the products (backend destruction). */
void esp_cpu_gemm_shutdown(void);

#endif
