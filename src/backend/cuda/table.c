/* table.c: the op table of the CUDA backend, its birth and its end. */
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/cuda.h"
#include "backend/cuda/need.h"

static int64_t pack_bytes(esp_backend *be, int64_t out, int64_t in, esp_dtype compute) {
  (void)be;
  return esp_cuda_pack_bytes(out, in, compute);
}

/* The sum comes to the host: clipping reads it at once. */
static void dot(esp_backend *be, double *out, const float *a, const float *b, int64_t n) {
  double *sum = esp_cuda_of(be)->sum;
  *out = 0;
  esp_cuda_dot_device(be, sum, a, b, n);
  esp_cuda_download(be, out, sum, sizeof *sum);
}

static void destroy(esp_backend *be) {
  if (!be) return;
  if (be->impl) {
    cudaStreamSynchronize(esp_cuda_of(be)->stream);
    esp_cuda_pieces_destroy(be);
    esp_cuda_attn_destroy(be);
    esp_cuda_matmul_destroy(be);
    esp_cuda_device_close(be);
  }
  free(be);
}

static const esp_backend_ops ops = {
    .name = "cuda",
    .alloc = esp_cuda_alloc,
    .free = esp_cuda_free,
    .upload = esp_cuda_upload,
    .download = esp_cuda_download,
    .zero = esp_cuda_zero,
    .sync = esp_cuda_sync,
    .destroy = destroy,
    .host_alloc = esp_cuda_host_alloc,
    .host_free = esp_cuda_host_free,
    .download_later = esp_cuda_download_later,
    .scratch = esp_cuda_scratch_reserve,
    .stage = esp_cuda_stage,
    .stage_wait = esp_cuda_stage_wait,
    .piece_begin = esp_cuda_piece_begin,
    .piece_end = esp_cuda_piece_end,
    .pack = esp_cuda_pack,
    .pack_free = esp_cuda_pack_free,
    .pack_bytes = pack_bytes,
    .pack_host = esp_cuda_pack_host,
    .linear = esp_cuda_linear,
    .linear_dx = esp_cuda_linear_dx,
    .matmul = esp_cuda_matmul_op,
    .embed = esp_cuda_embed,
    .embed_bwd = esp_cuda_embed_bwd,
    .norm = esp_cuda_norm,
    .norm_bwd = esp_cuda_norm_bwd,
    .rope = esp_cuda_rope,
    .attn_begin = esp_cuda_attn_begin,
    .attn = esp_cuda_attn_op,
    .attn_bwd = esp_cuda_attn_bwd_op,
    .attn_decode = esp_cuda_attn_decode,
    .glu = esp_cuda_glu,
    .glu_bwd = esp_cuda_glu_bwd,
    .act = esp_cuda_act,
    .act_bwd = esp_cuda_act_bwd,
    .cross_entropy = esp_cuda_cross_entropy,
    .distill = esp_cuda_distill,
    .hidden_loss = esp_cuda_hidden_loss,
    .axpby = esp_cuda_axpby,
    .mul = esp_cuda_mul,
    .mul_rows = esp_cuda_mul_rows,
    .col_dot = esp_cuda_col_dot,
    .row_dot = esp_cuda_row_dot,
    .block_matmul = esp_cuda_block_matmul,
    .block_grad = esp_cuda_block_grad,
    .block_inverse = esp_cuda_block_inverse,
    .transpose_rows = esp_cuda_transpose_rows,
    .khatri_rao = esp_cuda_khatri_rao,
    .khatri_rao_bwd = esp_cuda_khatri_rao_bwd,
    .rank_gate = esp_cuda_rank_gate,
    .rank_gate_bwd = esp_cuda_rank_gate_bwd,
    .sparse_matmul = esp_cuda_sparse_matmul,
    .sparse_grad = esp_cuda_sparse_grad,
    .mul_cols = esp_cuda_mul_cols,
    .gather_rows = esp_cuda_gather_rows,
    .scatter_rows = esp_cuda_scatter_rows,
    .dropout = esp_cuda_dropout,
    .col_sum = esp_cuda_col_sum,
    .dot = dot,
    .update = esp_cuda_update,
};

esp_status esp_cuda_create(int device, esp_backend **out);
esp_status esp_cuda_create(int device, esp_backend **out) {
  *out = NULL;
  esp_backend *be = calloc(1, sizeof *be);
  if (!be) return esp_fail(ESP_ERR_MEMORY, "cuda: out of host memory");
  be->ops = &ops;
  esp_status st = esp_cuda_device_open(be, device);
  if (st == ESP_OK) st = esp_cuda_matmul_create(be);
  if (st == ESP_OK) st = esp_cuda_attn_create(be);
  if (st != ESP_OK) {
    destroy(be);
    return st;
  }
  *out = be;
  return ESP_OK;
}
