/* cuda.h: what the files of the CUDA plug-in share: the backend's own state, error handling, scratch memory, and the
 * entries of the op table that live in other files. Included from C and, through device.cuh, from .cu files. */
#ifndef ESP_BACKEND_CUDA_CUDA_H
#define ESP_BACKEND_CUDA_CUDA_H

#include <cuda_runtime_api.h>

#include "backend/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct esp_cuda_matmul esp_cuda_matmul; /* matmul.c: cuBLASLt handle, workspace, chosen algorithms */
typedef struct esp_cuda_attn esp_cuda_attn;     /* attention.c: sequences of the pass, cuDNN plans */
typedef struct esp_cuda_pieces esp_cuda_pieces; /* graph.c: recorded pieces */

enum { ESP_CUDA_CHANNELS = 2, ESP_CUDA_RING = 4, ESP_CUDA_RING_BYTES = 4 << 20 };

typedef struct esp_cuda_chunk { /* page-locked memory that uploads pass through */
  char *host;
  size_t used;
  cudaEvent_t done; /* the last copy out of it, once it is full */
  bool busy;
} esp_cuda_chunk;

typedef struct esp_cuda {
  int device, cc; /* ordinal; compute capability as 90 */
  int sms, smem_block_optin;
  int64_t l2_bytes;
  cudaStream_t stream; /* every operation */
  cudaStream_t copy[ESP_CUDA_CHANNELS];
  cudaEvent_t issued[ESP_CUDA_CHANNELS], staged[ESP_CUDA_CHANNELS];
  esp_cuda_chunk ring[ESP_CUDA_RING];
  int ring_at;
  void *scratch; /* one block, shared by the operations: they run one after the other */
  int64_t scratch_bytes;
  double *sum;                   /* device: where `dot` leaves its result */
  struct esp_cuda_block *blocks; /* what alloc gave, for the books */
  int n_blocks, cap_blocks;
  bool capturing;
  bool no_pieces; /* ESPALIER_CUDA_GRAPHS=0: everything is issued directly, for comparison */
  esp_cuda_matmul *mm;
  esp_cuda_attn *attn;
  esp_cuda_pieces *pieces;
} esp_cuda;

static inline esp_cuda *esp_cuda_of(esp_backend *be) {
  return (esp_cuda *)be->impl;
}

/* device.c. True when e is cudaSuccess and nothing failed before; else the backend's sticky error and the thread's
 * message are set ("cuda: <what>: <name of the error>: <text>"): ESP_ERR_MEMORY for an exhausted device, ESP_ERR_DEVICE
 * for everything else. */
bool esp_cuda_ok(esp_backend *be, cudaError_t e, const char *what);
/* The same for a failure of a library: sets ESP_ERR_DEVICE with "cuda: <library>: <what>: <text>". Returns false. */
bool esp_cuda_fail(esp_backend *be, const char *library, const char *what, const char *text);
/* At least `bytes` of device memory (256-byte aligned), valid until the operation's last launch; contents undefined.
 * Grows only while nothing is recorded: the first, direct issue of a piece has sized it. NULL: sticky error set.
 * The size of each operation's scratch comes from need.h, so that `plan` counts it. */
void *esp_cuda_scratch(esp_backend *be, int64_t bytes);
int64_t esp_cuda_scratch_reserve(esp_backend *be, int64_t at_least); /* the table's entry */

esp_status esp_cuda_device_open(esp_backend *be, int device);
void esp_cuda_device_close(esp_backend *be);
void *esp_cuda_alloc(esp_backend *be, esp_mem_kind kind, int64_t bytes);
void esp_cuda_free(esp_backend *be, void *ptr);
void esp_cuda_upload(esp_backend *be, void *dst, const void *host, int64_t bytes);
void esp_cuda_download(esp_backend *be, void *host, const void *src, int64_t bytes);
void esp_cuda_zero(esp_backend *be, void *dst, int64_t bytes);
esp_status esp_cuda_sync(esp_backend *be);
void *esp_cuda_host_alloc(esp_backend *be, int64_t bytes);
void esp_cuda_host_free(esp_backend *be, void *ptr);
void esp_cuda_download_later(esp_backend *be, void *host, const void *src, int64_t bytes);
void esp_cuda_stage(esp_backend *be, int channel, void *dst, const void *host, int64_t bytes);
void esp_cuda_stage_wait(esp_backend *be, int channel);

/* graph.c */
bool esp_cuda_piece_begin(esp_backend *be, uint64_t key, uint64_t pair);
void esp_cuda_piece_end(esp_backend *be);
void esp_cuda_pieces_destroy(esp_backend *be);

/* matmul.c. create: after the device is open; destroy(NULL) is allowed. */
esp_status esp_cuda_matmul_create(esp_backend *be);
void esp_cuda_matmul_destroy(esp_backend *be);
void *esp_cuda_pack(esp_backend *be, const esp_tensor *w, int n, bool transposed, esp_dtype compute);
void *esp_cuda_pack_host(esp_backend *be, const esp_tensor *w, int n, bool transposed, esp_dtype compute);
void esp_cuda_pack_free(esp_backend *be, void *packed);
void esp_cuda_linear(esp_backend *be, esp_tensor y, esp_tensor x, const esp_wview *w, esp_tensor bias,
                     const esp_tail *tails, int n_tails, float beta);
void esp_cuda_linear_dx(esp_backend *be, esp_tensor dx, esp_tensor dy, const esp_wview *w, const esp_tail *tails,
                        int n_tails, float beta);
void esp_cuda_matmul_op(esp_backend *be, esp_tensor c, esp_tensor a, bool trans_a, esp_tensor b, bool trans_b,
                        float alpha, float beta);

/* attention.c chooses: cuDNN (sdpa_graph.c, sdpa_plan.c) where it takes the shape, else the own kernels (flash.cu). */
esp_status esp_cuda_attn_create(esp_backend *be);
void esp_cuda_attn_destroy(esp_backend *be);
uint64_t esp_cuda_attn_begin(esp_backend *be, const int32_t *cu_seqlens, int n_seqs);
void esp_cuda_attn_op(esp_backend *be, const esp_attn_args *a);
void esp_cuda_attn_bwd_op(esp_backend *be, const esp_attn_args *a);

/* The sequences of the pass on the device, padded to a bucket with empty ones; filled by esp_cuda_attn_begin. */
typedef struct esp_cuda_seqs {
  const int32_t *cu;    /* [n+1] first row of each sequence, cu[n] == T */
  const int32_t *tiles; /* [n+1] prefix sums of the sequences' tiles of ESP_FLASH_TILE rows */
  int n;                /* the bucket */
  int longest;          /* bucket of the longest length */
  int n_tiles;          /* bound on tiles[n] that depends on T and n alone */
} esp_cuda_seqs;
enum { ESP_FLASH_TILE = 64 };
/* flash.cu: exact attention for every shape the op allows, forward and a deterministic backward in two kernels. lse is
 * [T, heads]. */
void esp_cuda_flash(esp_backend *be, const esp_attn_args *a, const esp_cuda_seqs *s);
void esp_cuda_flash_bwd(esp_backend *be, const esp_attn_args *a, const esp_cuda_seqs *s);
/* decode.cu */
void esp_cuda_attn_decode(esp_backend *be, const esp_decode_args *a);

/* matmul_blocks.c chooses: cuBLASLt, or the own kernels (blocks.cu), which take every shape and mix of types. */
void esp_cuda_block_matmul(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor m, int blocks, bool shared,
                           bool trans, float alpha, float beta);
void esp_cuda_block_grad(esp_backend *be, esp_tensor dm, esp_tensor x, esp_tensor dy, int blocks, bool shared,
                         float alpha);
void esp_cuda_blocks_own(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor m, int blocks, bool shared, bool trans,
                         float alpha, float beta);
void esp_cuda_block_grad_own(esp_backend *be, esp_tensor dm, esp_tensor x, esp_tensor dy, int blocks, bool shared,
                             float alpha);
void esp_cuda_block_inverse(esp_backend *be, esp_tensor inv, esp_tensor m, int blocks);
/* kinds.cu, sparse.cu */
void esp_cuda_mul(esp_backend *be, esp_tensor y, esp_tensor a, esp_tensor b, float beta);
void esp_cuda_mul_rows(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor v, float beta);
void esp_cuda_col_dot(esp_backend *be, float *out, esp_tensor a, esp_tensor b);
void esp_cuda_row_dot(esp_backend *be, float *out, esp_tensor a, esp_tensor b, float beta);
void esp_cuda_transpose_rows(esp_backend *be, esp_tensor y, esp_tensor x, int64_t a, int64_t b);
void esp_cuda_khatri_rao(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor z);
void esp_cuda_rank_gate(esp_backend *be, esp_tensor y, esp_tensor x, const esp_gate *g);
void esp_cuda_rank_gate_bwd(esp_backend *be, esp_tensor dx, esp_tensor dy, esp_tensor x, const esp_gate *g);
void esp_cuda_khatri_rao_bwd(esp_backend *be, esp_tensor dx, esp_tensor dz, esp_tensor dy, esp_tensor x, esp_tensor z);
void esp_cuda_sparse_matmul(esp_backend *be, esp_tensor y, esp_tensor x, const esp_csr *s);
void esp_cuda_sparse_grad(esp_backend *be, float *dvalues, esp_tensor dy, esp_tensor x, const esp_csr *s);

/* norm.cu, rope.cu, act.cu, rows.cu, elementwise.cu, reduce.cu, loss.cu, update.cu: the entry of the op table itself */
void esp_cuda_norm(esp_backend *be, const esp_norm_args *a);
void esp_cuda_norm_bwd(esp_backend *be, const esp_norm_bwd_args *a);
void esp_cuda_rope(esp_backend *be, const esp_rope_args *a);
void esp_cuda_glu(esp_backend *be, esp_tensor h, esp_tensor gu, esp_act act);
void esp_cuda_glu_bwd(esp_backend *be, esp_tensor dgu, esp_tensor dh, esp_tensor gu, esp_act act);
void esp_cuda_act(esp_backend *be, esp_tensor y, esp_tensor x, esp_act act);
void esp_cuda_act_bwd(esp_backend *be, esp_tensor dx, esp_tensor dy, esp_tensor x, esp_act act);
void esp_cuda_embed(esp_backend *be, esp_tensor y, esp_tensor table, const int32_t *ids, float scale);
void esp_cuda_embed_bwd(esp_backend *be, float *dtable, esp_tensor dy, const int32_t *ids, float scale);
void esp_cuda_gather_rows(esp_backend *be, esp_tensor y, esp_tensor x, const int32_t *rows);
void esp_cuda_scatter_rows(esp_backend *be, esp_tensor y, esp_tensor x, const int32_t *rows);
void esp_cuda_axpby(esp_backend *be, esp_tensor y, float a, esp_tensor x, float b);
void esp_cuda_mul_cols(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor v);
void esp_cuda_dropout(esp_backend *be, esp_tensor y, esp_tensor x, float p, uint64_t seed, const uint64_t *draw,
                      uint64_t stream, float beta);
void esp_cuda_col_sum(esp_backend *be, float *out, esp_tensor x);
/* The sum into device memory; the table's `dot` downloads it. */
void esp_cuda_dot_device(esp_backend *be, double *device_out, const float *a, const float *b, int64_t n);
void esp_cuda_cross_entropy(esp_backend *be, const esp_ce_args *a);
/* sums[0] += the losses of n rows [n, 2], sums[1] += their hits, in a fixed order (loss.cu). */
void esp_cuda_sum_losses(esp_backend *be, const double *rows, int64_t n, double *sums);
void esp_cuda_distill(esp_backend *be, const esp_distill_args *a);
void esp_cuda_hidden_loss(esp_backend *be, const esp_hidden_args *a);
void esp_cuda_update(esp_backend *be, const esp_update_args *a);
/* matmul.c's bias: y[t, j] += bias[j] where no epilogue takes it; and a conversion with row strides. */
void esp_cuda_add_bias(esp_backend *be, esp_tensor y, esp_tensor bias);

#ifdef __cplusplus
}
#endif
#endif
