/* need_matmul.h: what the products hold on the device beside their operands; see need.h. */
#ifndef ESP_BACKEND_CUDA_NEED_MATMUL_H
#define ESP_BACKEND_CUDA_NEED_MATMUL_H

#include "backend/backend.h"

/* The workspace that cuBLASLt's algorithms may use, held from the beginning. The sizes are those its manual advises. */
static inline int64_t esp_cuda_matmul_workspace(int cc) {
  return cc >= 90 ? 32 << 20 : 4 << 20;
}

/* A packed operand is the dense matrix [out, in] in the compute type. */
static inline int64_t esp_cuda_pack_bytes(int64_t out, int64_t in, esp_dtype compute) {
  return out * in * (int64_t)esp_dtype_size(compute);
}

/* Scratch of one product, cut into pieces in this order. cuBLASLt takes operands of one type, and stores bf16 only from
 * bf16 operands: a bf16 operand beside an fp32 one is widened (which loses nothing), and a bf16 result of fp32 operands
 * is made in fp32 first. A bias has the type that is stored. */
typedef struct esp_cuda_matmul_scratch {
  int64_t a, b, c, bias; /* bytes, 0: used where it lies */
} esp_cuda_matmul_scratch;

static inline int64_t esp_cuda_matmul_piece(const esp_tensor *t, esp_dtype as) {
  int64_t bytes = esp_tensor_numel(t) * (int64_t)esp_dtype_size(as);
  return (bytes + 255) / 256 * 256;
}
static inline esp_cuda_matmul_scratch esp_cuda_matmul_scratch_of(const esp_tensor *c, const esp_tensor *a,
                                                                 const esp_tensor *b, const esp_tensor *bias) {
  esp_cuda_matmul_scratch s = {0, 0, 0, 0};
  bool wide = a->dtype == ESP_F32 || b->dtype == ESP_F32;
  esp_dtype stored = wide ? ESP_F32 : c->dtype;
  if (wide && a->dtype != ESP_F32) s.a = esp_cuda_matmul_piece(a, ESP_F32);
  if (wide && b->dtype != ESP_F32) s.b = esp_cuda_matmul_piece(b, ESP_F32);
  if (stored != c->dtype) s.c = esp_cuda_matmul_piece(c, stored);
  if (bias->data && bias->dtype != stored) s.bias = esp_cuda_matmul_piece(bias, stored);
  return s;
}
static inline int64_t esp_cuda_matmul_scratch_bytes(const esp_tensor *c, const esp_tensor *a, const esp_tensor *b,
                                                    const esp_tensor *bias) {
  esp_cuda_matmul_scratch s = esp_cuda_matmul_scratch_of(c, a, b, bias);
  return s.a + s.b + s.c + s.bias;
}

/* The weight of a linear layer as a matrix. Packing was in the type of the activations. */
static inline esp_tensor esp_cuda_weight_matrix(const esp_wview *w, esp_dtype compute) {
  return w->packed ? esp_tensor_2d((void *)(uintptr_t)w->packed, compute, w->out, w->in) : w->dense;
}
/* The columns of y that a tail adds to. */
static inline esp_tensor esp_cuda_tail_target(const esp_tensor *y, const esp_tail *tail) {
  return esp_tensor_cols_view(y, tail->col0, esp_tensor_rows(&tail->w));
}

static inline int64_t esp_cuda_need_matmul(esp_tensor c, esp_tensor a, bool trans_a, esp_tensor b, bool trans_b) {
  esp_tensor none = esp_tensor_1d(NULL, ESP_F32, 0);
  (void)trans_a, (void)trans_b; /* a copy keeps the order of its original */
  return esp_cuda_matmul_scratch_bytes(&c, &a, &b, &none);
}

/* The products of one call run one after the other: the largest of their needs. */
static inline int64_t esp_cuda_need_linear(esp_tensor y, esp_tensor x, const esp_wview *w, esp_tensor bias,
                                           const esp_tail *tails, int n_tails) {
  esp_tensor matrix = esp_cuda_weight_matrix(w, x.dtype);
  int64_t most = esp_cuda_matmul_scratch_bytes(&y, &x, &matrix, &bias);
  for (int i = 0; i < n_tails; i++) {
    int64_t need = esp_cuda_need_matmul(esp_cuda_tail_target(&y, &tails[i]), tails[i].x, false, tails[i].w, true);
    if (need > most) most = need;
  }
  return most;
}
static inline int64_t esp_cuda_need_linear_dx(esp_tensor dx, esp_tensor dy, const esp_wview *w, const esp_tail *tails,
                                              int n_tails) {
  int64_t most = esp_cuda_need_matmul(dx, dy, false, esp_cuda_weight_matrix(w, dy.dtype), false);
  for (int i = 0; i < n_tails; i++) {
    int64_t need = esp_cuda_need_matmul(dx, tails[i].x, false, tails[i].w, false);
    if (need > most) most = need;
  }
  return most;
}

#endif
