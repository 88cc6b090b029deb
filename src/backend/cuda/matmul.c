/* matmul.c: linear, linear_dx and matmul of the op table on cuBLASLt.
 *
 * Operands that cuBLASLt does not take as they are (one bf16 beside one fp32, a bf16 result of fp32 operands, a bias of
 * another type than the result) pass through scratch; need_matmul.h says when. The training step of a bf16 model meets
 * only the last: an fp32 bias rounded to bf16, one launch over one row, for which the product adds it while the sums
 * are still in registers.
 *
 * Low-rank tails are products of their own with beta = 1 into columns of y: y is read and written once more, about 8%
 * of the product they follow at a hidden size of 4096 and rank 16. */
#include <assert.h>
#include <nvtx3/nvToolsExt.h>
#include <string.h>

#include "backend/cuda/matmul_impl.h"
#include "backend/cuda/need_matmul.h"

/* c = alpha op(a) op(b) + bias + beta c */
typedef struct product {
  esp_tensor c, a, b, bias;
  bool trans_a, trans_b;
  float alpha, beta;
} product;

static uint8_t alignment(const void *p) {
  uint8_t bytes = 16;
  while ((uintptr_t)p % bytes) bytes /= 2;
  return bytes;
}

/* A single row may say anything about the distance to the next one. */
static int64_t ld_of(const esp_tensor *t) {
  int64_t cols = esp_tensor_cols(t);
  return t->ndim == 2 && t->ld > cols ? t->ld : cols;
}

/* Operands of types that go together, none of them empty. */
static void run(esp_backend *be, const product *p) {
  esp_cuda *cuda = esp_cuda_of(be);
  esp_mm_key key;
  esp_mm_data data = {p->a.data, p->b.data, p->bias.data, p->c.data};
  memset(&key, 0, sizeof key);
  key.m = esp_tensor_rows(&p->c);
  key.n = esp_tensor_cols(&p->c);
  key.k = p->trans_a ? esp_tensor_rows(&p->a) : esp_tensor_cols(&p->a);
  key.lda = ld_of(&p->a);
  key.ldb = ld_of(&p->b);
  key.ldc = ld_of(&p->c);
  key.in = (uint8_t)p->a.dtype;
  key.out = (uint8_t)p->c.dtype;
  key.trans_a = p->trans_a;
  key.trans_b = p->trans_b;
  key.bias = data.bias != NULL;
  key.adds = p->beta != 0;
  key.tf32 = be->tf32 && p->a.dtype == ESP_F32;
  const void *at[4] = {data.a, data.b, data.c, data.bias};
  for (int i = 0; i < 4; i++) key.align[i] = alignment(at[i]);
  esp_mm_entry *e = esp_mm_find(be, &key, &data);
  if (!e) return;
  if (!esp_mm_ok(be, esp_mm_run(cuda, e, &e->algo, &data, p->alpha, p->beta), "a product")) return;
  if (data.bias && e->apart) esp_cuda_add_bias(be, p->c, p->bias);
}

/* A dense tensor of the same shape at *at, which moves on by `bytes`. */
static esp_tensor piece(char **at, int64_t bytes, const esp_tensor *shape, esp_dtype dtype) {
  esp_tensor t = *shape;
  t.data = *at;
  t.dtype = dtype;
  t.ld = esp_tensor_cols(shape);
  *at += bytes;
  return t;
}

static esp_tensor converted(esp_backend *be, char **at, int64_t bytes, esp_tensor t, esp_dtype dtype) {
  if (!bytes) return t;
  esp_tensor copy = piece(at, bytes, &t, dtype);
  esp_cuda_axpby(be, copy, 1.0f, t, 0.0f);
  return copy;
}

/* The sum over nothing: c = beta c + bias. No training step has one, so its rows may be cleared one by one. */
static void empty_sum(esp_backend *be, const product *p) {
  int64_t row = ld_of(&p->c) * (int64_t)esp_dtype_size(p->c.dtype);
  int64_t width = esp_tensor_cols(&p->c) * (int64_t)esp_dtype_size(p->c.dtype);
  if (p->beta == 0)
    for (int64_t r = 0; r < esp_tensor_rows(&p->c); r++) esp_cuda_zero(be, (char *)p->c.data + r * row, width);
  else if (p->beta != 1)
    esp_cuda_axpby(be, p->c, p->beta, p->c, 0.0f);
  if (p->bias.data) esp_cuda_add_bias(be, p->c, p->bias);
}

static void multiply(esp_backend *be, const char *name, product p) {
  assert(p.a.dtype == ESP_F32 || p.a.dtype == ESP_BF16);
  assert(p.b.dtype == ESP_F32 || p.b.dtype == ESP_BF16);
  int64_t k = p.trans_a ? esp_tensor_rows(&p.a) : esp_tensor_cols(&p.a);
  assert(k == (p.trans_b ? esp_tensor_cols(&p.b) : esp_tensor_rows(&p.b)));
  assert(esp_tensor_rows(&p.c) == (p.trans_a ? esp_tensor_cols(&p.a) : esp_tensor_rows(&p.a)));
  assert(esp_tensor_cols(&p.c) == (p.trans_b ? esp_tensor_rows(&p.b) : esp_tensor_cols(&p.b)));
  if (be->sticky != ESP_OK || esp_tensor_numel(&p.c) == 0) return;
  nvtxRangePushA(name);
  if (k == 0) {
    empty_sum(be, &p);
    goto done;
  }
  esp_cuda_matmul_scratch need = esp_cuda_matmul_scratch_of(&p.c, &p.a, &p.b, &p.bias);
  int64_t bytes = need.a + need.b + need.c + need.bias;
  char *at = bytes ? esp_cuda_scratch(be, bytes) : NULL;
  if (bytes && !at) goto done;
  esp_tensor c = p.c;
  float beta = p.beta;
  p.a = converted(be, &at, need.a, p.a, ESP_F32);
  p.b = converted(be, &at, need.b, p.b, ESP_F32);
  if (need.c) {
    p.c = piece(&at, need.c, &c, ESP_F32);
    p.beta = 0;
  }
  p.bias = converted(be, &at, need.bias, p.bias, p.c.dtype);
  run(be, &p);
  if (need.c) esp_cuda_axpby(be, c, 1.0f, p.c, beta); /* rounded once */
done:
  nvtxRangePop();
}

void esp_cuda_linear(esp_backend *be, esp_tensor y, esp_tensor x, const esp_wview *w, esp_tensor bias,
                     const esp_tail *tails, int n_tails, float beta) {
  product p = {.c = y, .a = x, .b = esp_cuda_weight_matrix(w, x.dtype), .bias = bias, .trans_b = true, .alpha = 1.0f};
  p.beta = beta;
  multiply(be, "linear", p);
  for (int i = 0; i < n_tails; i++) {
    product tail = {.c = esp_cuda_tail_target(&y, &tails[i]), .a = tails[i].x, .b = tails[i].w, .trans_b = true};
    tail.alpha = tail.beta = 1.0f;
    multiply(be, "linear tail", tail);
  }
}

void esp_cuda_linear_dx(esp_backend *be, esp_tensor dx, esp_tensor dy, const esp_wview *w, const esp_tail *tails,
                        int n_tails, float beta) {
  product p = {.c = dx, .a = dy, .b = esp_cuda_weight_matrix(w, dy.dtype), .alpha = 1.0f, .beta = beta};
  multiply(be, "linear_dx", p);
  for (int i = 0; i < n_tails; i++) {
    product tail = {.c = dx, .a = tails[i].x, .b = tails[i].w, .alpha = 1.0f, .beta = 1.0f};
    multiply(be, "linear_dx tail", tail);
  }
}

void esp_cuda_matmul_op(esp_backend *be, esp_tensor c, esp_tensor a, bool trans_a, esp_tensor b, bool trans_b,
                        float alpha, float beta) {
  product p = {.c = c, .a = a, .b = b, .trans_a = trans_a, .trans_b = trans_b, .alpha = alpha, .beta = beta};
  multiply(be, "matmul", p);
}
