/* matmul_blocks.c: block_matmul and block_grad of the op table: as one product, as a batch of cuBLASLt, or by the own
 * kernels (blocks.cu); need_kinds.h says when. In a batch the blocks' columns may lie beside each other within the rows
 * of one tensor: the distance from one matrix to the next is p or q, below that of their rows. */
#include <assert.h>
#include <nvtx3/nvToolsExt.h>
#include <string.h>

#include "backend/cuda/matmul_impl.h"
#include "backend/cuda/need_kinds.h"

static uint8_t alignment(const void *p) {
  uint8_t bytes = 16;
  while ((uintptr_t)p % bytes) bytes /= 2;
  return bytes;
}

/* `batch` products: the first operands of each at c, a, b, the next ones `to_*` elements further. */
typedef struct batch_product {
  esp_tensor c, a, b; /* of the first block */
  int64_t to_c, to_a, to_b;
  bool trans_a, trans_b;
  float alpha, beta;
} batch_product;

static void run_batch(esp_backend *be, const char *name, int batch, const batch_product *p) {
  esp_cuda *cuda = esp_cuda_of(be);
  esp_mm_data data = {p->a.data, p->b.data, NULL, p->c.data};
  esp_mm_key key;
  memset(&key, 0, sizeof key);
  key.m = esp_tensor_rows(&p->c);
  key.n = esp_tensor_cols(&p->c);
  key.k = p->trans_a ? esp_tensor_rows(&p->a) : esp_tensor_cols(&p->a);
  key.lda = p->a.ld;
  key.ldb = p->b.ld;
  key.ldc = p->c.ld;
  key.batch = batch;
  key.to_a = p->to_a;
  key.to_b = p->to_b;
  key.to_c = p->to_c;
  key.in = (uint8_t)p->a.dtype;
  key.out = (uint8_t)p->c.dtype;
  key.trans_a = p->trans_a;
  key.trans_b = p->trans_b;
  key.adds = p->beta != 0;
  key.tf32 = be->tf32 && p->a.dtype == ESP_F32;
  const void *at[3] = {data.a, data.b, data.c};
  for (int i = 0; i < 3; i++) key.align[i] = alignment(at[i]);
  key.align[3] = 16;
  nvtxRangePushA(name);
  esp_mm_entry *e = esp_mm_find(be, &key, &data);
  if (e) esp_mm_ok(be, esp_mm_run(cuda, e, &e->algo, &data, p->alpha, p->beta), name);
  nvtxRangePop();
}

void esp_cuda_block_matmul(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor m, int blocks, bool shared,
                           bool trans, float alpha, float beta) {
  int64_t p = esp_block_width(&x, blocks), q = esp_block_width(&y, blocks), rows = trans ? q : p;
  assert(esp_tensor_rows(&m) == (shared ? rows : rows * blocks) && esp_tensor_cols(&m) == (trans ? p : q));
  assert(esp_block_tokens(&y) == esp_block_tokens(&x));
  if (be->sticky != ESP_OK || esp_tensor_numel(&y) == 0) return;
  switch (esp_cuda_blocks_way_of(&x, &y, m.dtype, y.dtype, blocks, shared)) {
  case ESP_BLOCKS_AS_ONE:
    esp_cuda_matmul_op(be, esp_cuda_blocks_as_rows(y, blocks), esp_cuda_blocks_as_rows(x, blocks), false, m, trans,
                       alpha, beta);
    break;
  case ESP_BLOCKS_BATCH: {
    batch_product b = {.c = esp_block_of(&y, blocks, 0), .a = esp_block_of(&x, blocks, 0), .trans_b = trans};
    b.b = esp_tensor_rows_view(&m, 0, rows);
    b.to_c = esp_block_step(&y, blocks), b.to_a = esp_block_step(&x, blocks), b.to_b = rows * m.ld;
    b.alpha = alpha, b.beta = beta;
    run_batch(be, "block_matmul", blocks, &b);
    break;
  }
  default:
    esp_cuda_blocks_own(be, y, x, m, blocks, shared, trans, alpha, beta);
  }
}

void esp_cuda_block_grad(esp_backend *be, esp_tensor dm, esp_tensor x, esp_tensor dy, int blocks, bool shared,
                         float alpha) {
  int64_t p = esp_block_width(&x, blocks);
  assert(dm.dtype == ESP_F32 && esp_tensor_rows(&dm) == (shared ? p : p * blocks) &&
         esp_tensor_cols(&dm) == esp_block_width(&dy, blocks));
  if (be->sticky != ESP_OK || esp_tensor_numel(&dm) == 0 || esp_block_tokens(&x) == 0) return;
  switch (esp_cuda_blocks_way_of(&x, &dy, dy.dtype, dm.dtype, blocks, shared)) {
  case ESP_BLOCKS_AS_ONE:
    esp_cuda_matmul_op(be, dm, esp_cuda_blocks_as_rows(x, blocks), true, esp_cuda_blocks_as_rows(dy, blocks), false,
                       alpha, 1.0f);
    break;
  case ESP_BLOCKS_BATCH: {
    batch_product b = {.c = esp_tensor_rows_view(&dm, 0, p), .a = esp_block_of(&x, blocks, 0), .trans_a = true};
    b.b = esp_block_of(&dy, blocks, 0);
    b.to_c = p * dm.ld, b.to_a = esp_block_step(&x, blocks), b.to_b = esp_block_step(&dy, blocks);
    b.alpha = alpha, b.beta = 1.0f;
    run_batch(be, "block_grad", blocks, &b);
    break;
  }
  default:
    esp_cuda_block_grad_own(be, dm, x, dy, blocks, shared, alpha);
  }
}
