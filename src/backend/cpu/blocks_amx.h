/* blocks_amx.h: the tile path of products with small blocks. */
#ifndef ESP_BACKEND_CPU_BLOCKS_AMX_H
#define ESP_BACKEND_CPU_BLOCKS_AMX_H

#include "backend/cpu/kernels.h"

typedef struct esp_amx_blocks {
  esp_tensor x, y, dm; /* x bf16; y: dy of a gradient, bf16 there; dm fp32 */
  const uint16_t *m;   /* packed blocks, `to_next` elements apart */
  int64_t to_next, p, q;
  int64_t x_step, y_step; /* elements from a group of x and of y to the next */
  float alpha, beta;
} esp_amx_blocks;

/* x: of the product, or of the gradient; other: the blocks, or dy. */
static inline bool esp_amx_blocks_fit(const esp_tensor *x, const esp_tensor *other, int64_t p, int64_t q) {
  return esp_is_b(x) && esp_is_b(other) && p % 2 == 0 && p <= ESP_BLOCK_SMALL && q <= ESP_BLOCK_SMALL;
}
void esp_amx_block_pack(uint16_t *to, esp_tensor m, int64_t g, int64_t p, int64_t q, bool trans);
/* Rows and groups of y; groups of dm. */
void esp_amx_block_matmul(const esp_amx_blocks *o, int64_t r0, int64_t r1, int64_t g0, int64_t g1);
void esp_amx_block_grad(const esp_amx_blocks *o, int64_t g0, int64_t g1);
/* The sum over all groups of tokens [t0, t1), as block `part` of dm. */
void esp_amx_block_grad_shared(const esp_amx_blocks *o, int blocks, int64_t t0, int64_t t1, int64_t part);

#endif
