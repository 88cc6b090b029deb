/* cublaslt_impl.h: what the semi-opaque structures of cuBLASLt hold in this stand-in. */
#ifndef SIMCUDA_CUBLASLT_IMPL_H
#define SIMCUDA_CUBLASLT_IMPL_H

#include <cublasLt.h>
#include <stdbool.h>
#include <stdint.h>

/* Put into each structure when it is created; anything else is a descriptor that was never initialised, or was freed.
 */
enum {
  LT_HANDLE = 0x4c544831,
  LT_DESC = 0x4c544432,
  LT_LAYOUT = 0x4c544c33,
  LT_PREF = 0x4c545034,
  LT_ALGO = 0x4c544135
};

typedef struct lt_desc {
  uint32_t magic;
  int32_t compute, scale, pointer_mode, trans_a, trans_b, trans_c, fill, sm_target;
  uint32_t epilogue;
  int32_t bias_type, aux_type;
  void *bias, *aux;
  int64_t bias_stride, aux_ld, aux_stride, alpha_stride;
  void *scale_ptr[8]; /* A, B, C, D, amax D, aux scale, aux amax, D out: for 8-bit formats, which are refused */
  int8_t fast_accum;
} lt_desc;

typedef struct lt_layout {
  uint32_t magic, type;
  int32_t order, batch;
  uint64_t rows, cols;
  int64_t ld, stride, plane;
  uint32_t batch_mode;
} lt_layout;

typedef struct lt_pref {
  uint32_t magic, search, reduction;
  uint32_t align[4]; /* A, B, C, D */
  float waves;
  uint64_t workspace, impl;
} lt_pref;

typedef struct lt_algo {
  uint32_t magic, reduction;
  int32_t id, split_k;
  uint32_t tile, stages;
  uint64_t key;      /* types, operations and epilogue that it was made for */
  uint16_t align[6]; /* bytes that A, B, C, D, bias and aux must be aligned to */
} lt_algo;

_Static_assert(sizeof(lt_desc) <= sizeof(cublasLtMatmulDescOpaque_t), "descriptor fits");
_Static_assert(sizeof(lt_layout) <= sizeof(cublasLtMatrixLayoutOpaque_t), "layout fits");
_Static_assert(sizeof(lt_pref) <= sizeof(cublasLtMatmulPreferenceOpaque_t), "preference fits");
_Static_assert(sizeof(lt_algo) <= sizeof(cublasLtMatmulAlgo_t), "algorithm fits");

#endif
