/* cpu.c: the cpu backend's table, its memory, and the choice of kernels by instruction set. */
#include <string.h>

#include "backend/cpu/gemm.h"
#include "backend/cpu/ops.h"
#include "backend/cpu/work.h"
#include "core/cpu.h"

typedef struct cpu_impl {
  void *work;
  int64_t work_bytes;
} cpu_impl;

const esp_kernels *esp_cpu_kernels(void) {
  switch (esp_cpu_isa()) {
  case ESP_ISA_AMX:
    return &esp_kernels_amx;
  case ESP_ISA_AVX512:
    return &esp_kernels_avx512;
  case ESP_ISA_AVX2:
    return &esp_kernels_avx2;
  default:
    return &esp_kernels_plain;
  }
}

void *esp_cpu_work(esp_backend *be, int64_t bytes) {
  cpu_impl *impl = be->impl;
  if (bytes <= impl->work_bytes) return impl->work;
  esp_mem_free(impl->work); /* first: the peak is the larger one, not the sum */
  impl->work = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)bytes);
  impl->work_bytes = impl->work ? bytes : 0;
  if (!impl->work && be->sticky == ESP_OK) be->sticky = ESP_ERR_MEMORY;
  return impl->work;
}

static void *cpu_alloc(esp_backend *be, esp_mem_kind kind, int64_t bytes) {
  (void)be;
  return esp_mem_alloc(kind, (size_t)bytes);
}
static void cpu_free(esp_backend *be, void *ptr) {
  (void)be;
  esp_mem_free(ptr);
}
static void cpu_copy(esp_backend *be, void *dst, const void *src, int64_t bytes) {
  (void)be;
  memcpy(dst, src, (size_t)bytes);
}
static void cpu_zero(esp_backend *be, void *dst, int64_t bytes) {
  (void)be;
  memset(dst, 0, (size_t)bytes);
}
static void *cpu_host_alloc(esp_backend *be, int64_t bytes) {
  (void)be;
  return esp_mem_alloc(ESP_MEM_HOST, (size_t)bytes);
}
/* The kernels read the sequences from the arguments. */
static uint64_t cpu_attn_begin(esp_backend *be, const int32_t *cu_seqlens, int n_seqs) {
  (void)be, (void)cu_seqlens, (void)n_seqs;
  return 0;
}
static esp_status cpu_sync(esp_backend *be) {
  return be->sticky;
}
static void cpu_destroy(esp_backend *be) {
  cpu_impl *impl = be->impl;
  esp_cpu_gemm_shutdown();
  if (impl) esp_mem_free(impl->work);
  esp_mem_free(impl);
  esp_mem_free(be);
}

static const esp_backend_ops ops = {
    .name = "cpu",
    .alloc = cpu_alloc,
    .free = cpu_free,
    .upload = cpu_copy,
    .download = cpu_copy,
    .zero = cpu_zero,
    .sync = cpu_sync,
    .destroy = cpu_destroy,
    .host_alloc = cpu_host_alloc,
    .host_free = cpu_free,
    .download_later = cpu_copy,
    .pack = esp_cpu_pack,
    .pack_free = esp_cpu_pack_free,
    .linear = esp_cpu_linear,
    .linear_dx = esp_cpu_linear_dx,
    .linear_adds = esp_cpu_linear_adds,
    .matmul = esp_cpu_matmul,
    .embed = esp_cpu_embed,
    .embed_bwd = esp_cpu_embed_bwd,
    .norm = esp_cpu_norm,
    .norm_bwd = esp_cpu_norm_bwd,
    .rope = esp_cpu_rope,
    .attn_begin = cpu_attn_begin,
    .attn = esp_cpu_attn,
    .attn_bwd = esp_cpu_attn_bwd,
    .attn_decode = esp_cpu_attn_decode,
    .glu = esp_cpu_glu,
    .glu_bwd = esp_cpu_glu_bwd,
    .act = esp_cpu_act,
    .act_bwd = esp_cpu_act_bwd,
    .cross_entropy = esp_cpu_cross_entropy,
    .distill = esp_cpu_distill,
    .hidden_loss = esp_cpu_hidden_loss,
    .axpby = esp_cpu_axpby,
    .mul = esp_cpu_mul,
    .mul_rows = esp_cpu_mul_rows,
    .col_dot = esp_cpu_col_dot,
    .row_dot = esp_cpu_row_dot,
    .block_matmul = esp_cpu_block_matmul,
    .block_grad = esp_cpu_block_grad,
    .block_inverse = esp_cpu_block_inverse,
    .transpose_rows = esp_cpu_transpose_rows,
    .khatri_rao = esp_cpu_khatri_rao,
    .khatri_rao_bwd = esp_cpu_khatri_rao_bwd,
    .rank_gate = esp_cpu_rank_gate,
    .rank_gate_bwd = esp_cpu_rank_gate_bwd,
    .sparse_matmul = esp_cpu_sparse_matmul,
    .sparse_grad = esp_cpu_sparse_grad,
    .mul_cols = esp_cpu_mul_cols,
    .gather_rows = esp_cpu_gather_rows,
    .scatter_rows = esp_cpu_scatter_rows,
    .dropout = esp_cpu_dropout,
    .col_sum = esp_cpu_col_sum,
    .dot = esp_cpu_dot,
    .update = esp_cpu_update,
};

esp_status esp_cpu_backend_create(esp_backend **out) {
  *out = NULL;
  const char *value;
  if (esp_cpu_isa_forced_invalid(&value))
    return esp_fail(ESP_ERR_DEVICE, "ESPALIER_ISA=%s: unknown, or above what this processor has (%s)", value,
                    esp_isa_name(esp_cpu_isa_available()));
  esp_backend *be = esp_mem_alloc(ESP_MEM_HOST, sizeof *be);
  if (!be) return ESP_ERR_MEMORY;
  be->ops = &ops;
  be->on_host = true;
  strcpy(be->device, "cpu");
  be->impl = esp_mem_alloc(ESP_MEM_HOST, sizeof(cpu_impl));
  if (!be->impl) {
    esp_mem_free(be);
    return ESP_ERR_MEMORY;
  }
  esp_threads_ftz(); /* this thread; the pool's own set it themselves */
  *out = be;
  return ESP_OK;
}
