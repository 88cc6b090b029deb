/* ops.h: the operations of the cpu backend that are not matrix products: each cuts its work by shape alone and runs the
 * kernels of the level in use. Contracts: backend.h. */
#ifndef ESP_BACKEND_CPU_OPS_H
#define ESP_BACKEND_CPU_OPS_H

#include "backend/backend.h"

void esp_cpu_embed(esp_backend *be, esp_tensor y, esp_tensor table, const int32_t *ids, float scale);
void esp_cpu_embed_bwd(esp_backend *be, float *dtable, esp_tensor dy, const int32_t *ids, float scale);
void esp_cpu_norm(esp_backend *be, const esp_norm_args *a);
void esp_cpu_norm_bwd(esp_backend *be, const esp_norm_bwd_args *a);
void esp_cpu_rope(esp_backend *be, const esp_rope_args *a);
void esp_cpu_attn(esp_backend *be, const esp_attn_args *a);
void esp_cpu_attn_bwd(esp_backend *be, const esp_attn_args *a);
void esp_cpu_attn_decode(esp_backend *be, const esp_decode_args *a);
void esp_cpu_glu(esp_backend *be, esp_tensor h, esp_tensor gu, esp_act act);
void esp_cpu_glu_bwd(esp_backend *be, esp_tensor dgu, esp_tensor dh, esp_tensor gu, esp_act act);
void esp_cpu_act(esp_backend *be, esp_tensor y, esp_tensor x, esp_act act);
void esp_cpu_act_bwd(esp_backend *be, esp_tensor dx, esp_tensor dy, esp_tensor x, esp_act act);
void esp_cpu_cross_entropy(esp_backend *be, const esp_ce_args *a);
void esp_cpu_distill(esp_backend *be, const esp_distill_args *a);
void esp_cpu_hidden_loss(esp_backend *be, const esp_hidden_args *a);
void esp_cpu_axpby(esp_backend *be, esp_tensor y, float a, esp_tensor x, float b);
void esp_cpu_mul_cols(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor v);
void esp_cpu_gather_rows(esp_backend *be, esp_tensor y, esp_tensor x, const int32_t *rows);
void esp_cpu_scatter_rows(esp_backend *be, esp_tensor y, esp_tensor x, const int32_t *rows);
void esp_cpu_dropout(esp_backend *be, esp_tensor y, esp_tensor x, float p, uint64_t seed, const uint64_t *draw,
                     uint64_t stream, float beta);
void esp_cpu_col_sum(esp_backend *be, float *out, esp_tensor x);
void esp_cpu_dot(esp_backend *be, double *out, const float *a, const float *b, int64_t n);
void esp_cpu_update(esp_backend *be, const esp_update_args *a);

/* ops_kinds.c */
void esp_cpu_mul(esp_backend *be, esp_tensor y, esp_tensor a, esp_tensor b, float beta);
void esp_cpu_mul_rows(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor v, float beta);
void esp_cpu_col_dot(esp_backend *be, float *out, esp_tensor a, esp_tensor b);
void esp_cpu_row_dot(esp_backend *be, float *out, esp_tensor a, esp_tensor b, float beta);
void esp_cpu_block_matmul(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor m, int blocks, bool shared,
                          bool trans, float alpha, float beta);
void esp_cpu_block_grad(esp_backend *be, esp_tensor dm, esp_tensor x, esp_tensor dy, int blocks, bool shared,
                        float alpha);
void esp_cpu_block_inverse(esp_backend *be, esp_tensor inv, esp_tensor m, int blocks);
void esp_cpu_transpose_rows(esp_backend *be, esp_tensor y, esp_tensor x, int64_t a, int64_t b);
void esp_cpu_khatri_rao(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor z);
void esp_cpu_rank_gate(esp_backend *be, esp_tensor y, esp_tensor x, const esp_gate *g);
void esp_cpu_rank_gate_bwd(esp_backend *be, esp_tensor dx, esp_tensor dy, esp_tensor x, const esp_gate *g);
void esp_cpu_khatri_rao_bwd(esp_backend *be, esp_tensor dx, esp_tensor dz, esp_tensor dy, esp_tensor x, esp_tensor z);
void esp_cpu_sparse_matmul(esp_backend *be, esp_tensor y, esp_tensor x, const esp_csr *s);
/* The products of a matrix that is taken as dense (work.h), of a gradient where grad is not NULL. dry: they alone, for
 * what they need (gemm.h). */
void esp_cpu_sparse_products(esp_backend *be, esp_tensor y, esp_tensor x, const esp_csr *s, float *grad, void *scratch,
                             bool dry);
void esp_cpu_sparse_grad(esp_backend *be, float *dvalues, esp_tensor dy, esp_tensor x, const esp_csr *s);

#endif
