/* gemm_added.c: a packed weight with sparse matrices added to it, made anew for each product: each block of 32 x 32 is
 * copied (or exchanged, for the product with the transpose) and the entries of its panel are added while it is in the
 * first-level cache. Sums are fp32, rounded to bf16 as a merge would. Against a product of its own on dense tiles this
 * spares all of the arithmetic. */
#include <string.h>

#include "backend/cpu/gemm.h"
#include "backend/cpu/gemm_impl.h"
#include "backend/cpu/gemm_tiles.h"
#include "backend/cpu/work.h"

enum { ELEMENTS = ESP_GEMM_BLOCK / 2, TILE = ELEMENTS / 2 };

bool esp_cpu_linear_adds(esp_backend *be, esp_tensor x, const esp_wview *w, const esp_csr *m) {
  return w->packed && ((const esp_packed *)w->packed)->vnni && esp_cpu_adds(&x, w, m);
}

int64_t esp_gemm_added_chunks(const esp_wview *w) {
  return esp_ceil_div(w->out, 32);
}

/* Where entry (i, k) of a block lies, i being the column and k the contraction: tiles [i / 16][k / 2][i % 16][k % 2].
 */
static inline uint32_t of_column(uint32_t i) {
  return i / 16 * TILE + i % 16 * 2;
}
static inline uint32_t of_depth(uint32_t k) {
  return k / 2 * 32 + k % 2;
}

static inline __attribute__((always_inline)) void add_row(uint16_t *row, const esp_csr *m, int64_t r, uint32_t next,
                                                          const bool exchanged) {
  const float *values = m->values;
  for (int32_t e = m->start[r], end = m->start[r + 1]; e < end; e++) {
    uint32_t c = (uint32_t)m->index[e];
    uint16_t *at = row + c / 32 * next + (exchanged ? of_column(c % 32) : of_depth(c % 32));
    *at = esp_f32_to_bf16(esp_bf16_to_f32(*at) + values[m->order ? m->order[e] : e]);
  }
}

/* Outputs [32 chunk, 32 chunk + 32): one panel, or one step of the contraction of every panel of the transpose. */
void esp_gemm_added_fill(void *panels, const esp_wview *w, bool exchanged, int64_t chunk) {
  const esp_packed *p = w->packed;
  const uint16_t *from = (const uint16_t *)p->data + chunk * p->blocks * ELEMENTS;
  int64_t next = exchanged ? esp_ceil_div(p->out, 32) * ELEMENTS : (int64_t)ELEMENTS; /* block to block along `in` */
  uint16_t *to = (uint16_t *)panels + chunk * (exchanged ? (int64_t)ELEMENTS : p->blocks * ELEMENTS);
  if (!exchanged)
    memcpy(to, from, (size_t)(p->blocks * ESP_GEMM_BLOCK));
  else
    for (int64_t b = 0; b < p->blocks; b++) esp_amx_b_exchange(to + b * next, from + b * ELEMENTS);
  for (int n = 0; n < w->n_added; n++) {
    const esp_csr *m = &w->added[n].m;
    int64_t row0 = w->added[n].row0, first = esp_max64(row0, 32 * chunk);
    int64_t end = esp_min64(row0 + m->rows, 32 * (chunk + 1));
    for (int64_t r = first; r < end; r++)
      if (exchanged)
        add_row(to + of_depth(r % 32), m, r - row0, (uint32_t)next, true);
      else
        add_row(to + of_column(r % 32), m, r - row0, (uint32_t)next, false);
  }
}
