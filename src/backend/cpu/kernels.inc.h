/* kernels.inc.h: the body of kernels_{plain,avx2,avx512}.c. */
#include "backend/cpu/kernels.h"
#include "backend/cpu/vec.h"

/* clang-format off */
#include "backend/cpu/k_elementwise.h"
#include "backend/cpu/k_glu.h"
#include "backend/cpu/k_kinds.h"
#include "backend/cpu/k_blocks.h"
#include "backend/cpu/k_gate.h"
#include "backend/cpu/k_sparse.h"
#include "backend/cpu/k_norm.h"
#include "backend/cpu/k_loss.h"
#include "backend/cpu/k_distill.h"
#include "backend/cpu/k_update.h"
#include "backend/cpu/k_attention.h"
/* clang-format on */

const esp_kernels ESP_K_TABLE = {
    .axpby = k_axpby,
    .mul_cols = k_mul_cols,
    .copy_rows = k_copy_rows,
    .dropout = k_dropout,
    .act = k_act,
    .act_bwd = k_act_bwd,
    .glu = k_glu,
    .glu_bwd = k_glu_bwd,
    .norm = k_norm,
    .norm_bwd = k_norm_bwd,
    .rope = k_rope,
    .norm_bwd_cols = k_norm_bwd_cols,
    .col_sum = k_col_sum,
    .embed_bwd = k_embed_bwd,
    .dot = k_dot,
    .update = k_update,
    .cross_entropy = k_cross_entropy,
    .distill = k_distill,
    .hidden_loss = k_hidden_loss,
    .mul = k_mul,
    .mul_rows = k_mul_rows,
    .col_dot = k_col_dot,
    .row_dot = k_row_dot,
    .by_column = k_by_column,
    .sparse_rows = k_sparse_rows,
    .sparse_dots = k_sparse_dots,
    .khatri_rao = k_khatri_rao,
    .khatri_rao_bwd = k_khatri_rao_bwd,
    .rank_gate = k_rank_gate,
    .rank_gate_bwd = k_rank_gate_bwd,
    .block_matmul = k_block_matmul,
    .block_grad = k_block_grad,
    .invert = k_invert,
    .attn = k_attn,
    .attn_bwd = k_attn_bwd,
    .attn_decode = k_attn_decode,
};
