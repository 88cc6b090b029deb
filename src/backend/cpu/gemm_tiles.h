/* gemm_tiles.h: making AMX operands. Every block is 32 x 32 bf16 = two tiles of 16 rows x 64 bytes.
 *  b block: two tiles side by side, each [16 k pairs][16 columns][2]   (the VNNI form TDPBF16PS wants)
 *  a block: two tiles one above the other, each [16 rows][32 k]
 * lo and hi bound the rows or columns that exist, k the contraction elements that exist; the rest is zero. */
#ifndef ESP_BACKEND_CPU_GEMM_TILES_H
#define ESP_BACKEND_CPU_GEMM_TILES_H

#include <stdint.h>

void esp_amx_b_from_rows(uint16_t *dst, const uint16_t *src, int64_t ld, int64_t lo, int64_t hi, int64_t k);
void esp_amx_b_from_cols(uint16_t *dst, const uint16_t *src, int64_t ld, int64_t lo, int64_t hi, int64_t k);
/* b blocks of a whole run of columns, a pair of rows after the other so that memory is read in long streams: block
 * (column / 32, k / 32) at dst + (column / 32) * panel + (k / 32) * 1024. */
void esp_amx_b_from_long_rows(uint16_t *dst, int64_t panel, const uint16_t *src, int64_t ld, int64_t cols, int64_t k);
void esp_amx_b_exchange(uint16_t *dst, const uint16_t *block); /* the block of the transposed matrix */
void esp_amx_a_from_cols(uint16_t *dst, const uint16_t *src, int64_t ld, int64_t lo, int64_t hi, int64_t k);
/* rows x cols (cols < 32) copied into a zeroed 32 x 32 tile pair, row after row. */
void esp_amx_a_pad(uint16_t *dst, const uint16_t *src, int64_t ld, int64_t rows, int64_t cols);

#endif
