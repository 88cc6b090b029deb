/* mirror_kinds.h: the part of mirror.c for the operations of adapter kinds, which a backend may not have (yet): the
 * mirror has those that the backend behind it has. */
#ifndef TESTS_OPS_MIRROR_KINDS_H
#define TESTS_OPS_MIRROR_KINDS_H

static void mul(esp_backend *be, esp_tensor y, esp_tensor a, esp_tensor b, float beta) {
  call c = call_of(be, "mul");
  writes(&c, y);
  reads(&c, a);
  reads(&c, b);
  begin(&c);
  c.real->ops->mul(c.real, there_t(&c, y), there_t(&c, a), there_t(&c, b), beta);
  end(&c);
}
static void mul_rows(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor v, float beta) {
  call c = call_of(be, "mul_rows");
  writes(&c, y);
  reads(&c, x);
  reads(&c, v);
  begin(&c);
  c.real->ops->mul_rows(c.real, there_t(&c, y), there_t(&c, x), there_t(&c, v), beta);
  end(&c);
}
static void col_dot(esp_backend *be, float *out, esp_tensor a, esp_tensor b) {
  call c = call_of(be, "col_dot");
  use(&c, out, esp_tensor_cols(&a) * 4, true);
  reads(&c, a);
  reads(&c, b);
  begin(&c);
  c.real->ops->col_dot(c.real, there(&c, out), there_t(&c, a), there_t(&c, b));
  end(&c);
}
static void row_dot(esp_backend *be, float *out, esp_tensor a, esp_tensor b, float beta) {
  call c = call_of(be, "row_dot");
  use(&c, out, esp_tensor_rows(&a) * 4, true);
  reads(&c, a);
  reads(&c, b);
  begin(&c);
  c.real->ops->row_dot(c.real, there(&c, out), there_t(&c, a), there_t(&c, b), beta);
  end(&c);
}
static void block_matmul(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor m, int blocks, bool shared, bool trans,
                         float alpha, float beta) {
  call c = call_of(be, "block_matmul");
  writes(&c, y);
  reads(&c, x);
  reads(&c, m);
  begin(&c);
  c.real->ops->block_matmul(c.real, there_t(&c, y), there_t(&c, x), there_t(&c, m), blocks, shared, trans, alpha, beta);
  end(&c);
}
static void block_grad(esp_backend *be, esp_tensor dm, esp_tensor x, esp_tensor dy, int blocks, bool shared,
                       float alpha) {
  call c = call_of(be, "block_grad");
  writes(&c, dm);
  reads(&c, x);
  reads(&c, dy);
  begin(&c);
  c.real->ops->block_grad(c.real, there_t(&c, dm), there_t(&c, x), there_t(&c, dy), blocks, shared, alpha);
  end(&c);
}
static void block_inverse(esp_backend *be, esp_tensor inv, esp_tensor m, int blocks) {
  call c = call_of(be, "block_inverse");
  writes(&c, inv);
  reads(&c, m);
  begin(&c);
  c.real->ops->block_inverse(c.real, there_t(&c, inv), there_t(&c, m), blocks);
  end(&c);
}
static void transpose_rows(esp_backend *be, esp_tensor y, esp_tensor x, int64_t a, int64_t b) {
  call c = call_of(be, "transpose_rows");
  writes(&c, y);
  reads(&c, x);
  begin(&c);
  c.real->ops->transpose_rows(c.real, there_t(&c, y), there_t(&c, x), a, b);
  end(&c);
}
static void khatri_rao(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor z) {
  call c = call_of(be, "khatri_rao");
  writes(&c, y);
  reads(&c, x);
  reads(&c, z);
  begin(&c);
  c.real->ops->khatri_rao(c.real, there_t(&c, y), there_t(&c, x), there_t(&c, z));
  end(&c);
}
static void khatri_rao_bwd(esp_backend *be, esp_tensor dx, esp_tensor dz, esp_tensor dy, esp_tensor x, esp_tensor z) {
  call c = call_of(be, "khatri_rao_bwd");
  writes(&c, dx);
  writes(&c, dz);
  reads(&c, dy);
  reads(&c, x);
  reads(&c, z);
  begin(&c);
  c.real->ops->khatri_rao_bwd(c.real, there_t(&c, dx), there_t(&c, dz), there_t(&c, dy), there_t(&c, x),
                              there_t(&c, z));
  end(&c);
}

static void rank_gate(esp_backend *be, esp_tensor y, esp_tensor x, const esp_gate *g) {
  call c = call_of(be, "rank_gate");
  writes(&c, y);
  reads(&c, x);
  begin(&c);
  c.real->ops->rank_gate(c.real, there_t(&c, y), there_t(&c, x), g);
  end(&c);
}
static void rank_gate_bwd(esp_backend *be, esp_tensor dx, esp_tensor dy, esp_tensor x, const esp_gate *g) {
  call c = call_of(be, "rank_gate_bwd");
  writes(&c, dx);
  reads(&c, dy);
  reads(&c, x);
  begin(&c);
  c.real->ops->rank_gate_bwd(c.real, there_t(&c, dx), there_t(&c, dy), there_t(&c, x), g);
  end(&c);
}

static void use_sparse(call *c, const esp_csr *s) {
  use(c, s->start, (s->rows + 1) * 4, false);
  use(c, s->index, s->entries * 4, false);
  use(c, s->order, s->entries * 4, false);
  use(c, s->values, s->entries * 4, false);
}
static esp_csr there_sparse(const call *c, const esp_csr *s) {
  return (esp_csr){.rows = s->rows,
                   .entries = s->entries,
                   .start = there(c, s->start),
                   .index = there(c, s->index),
                   .order = there(c, s->order),
                   .values = there(c, s->values)};
}
static void sparse_matmul(esp_backend *be, esp_tensor y, esp_tensor x, const esp_csr *s) {
  call c = call_of(be, "sparse_matmul");
  writes(&c, y);
  reads(&c, x);
  use_sparse(&c, s);
  begin(&c);
  esp_csr t = there_sparse(&c, s);
  c.real->ops->sparse_matmul(c.real, there_t(&c, y), there_t(&c, x), &t);
  end(&c);
}
static void sparse_grad(esp_backend *be, float *dvalues, esp_tensor dy, esp_tensor x, const esp_csr *s) {
  call c = call_of(be, "sparse_grad");
  use(&c, dvalues, s->entries * 4, true);
  reads(&c, dy);
  reads(&c, x);
  use_sparse(&c, s);
  begin(&c);
  esp_csr t = there_sparse(&c, s);
  c.real->ops->sparse_grad(c.real, there(&c, dvalues), there_t(&c, dy), there_t(&c, x), &t);
  end(&c);
}

static void add_kinds(esp_backend_ops *ops, const esp_backend_ops *real) {
  if (real->mul) ops->mul = mul;
  if (real->mul_rows) ops->mul_rows = mul_rows;
  if (real->col_dot) ops->col_dot = col_dot;
  if (real->row_dot) ops->row_dot = row_dot;
  if (real->block_matmul) ops->block_matmul = block_matmul;
  if (real->block_grad) ops->block_grad = block_grad;
  if (real->block_inverse) ops->block_inverse = block_inverse;
  if (real->transpose_rows) ops->transpose_rows = transpose_rows;
  if (real->khatri_rao) ops->khatri_rao = khatri_rao;
  if (real->khatri_rao_bwd) ops->khatri_rao_bwd = khatri_rao_bwd;
  if (real->rank_gate) ops->rank_gate = rank_gate;
  if (real->rank_gate_bwd) ops->rank_gate_bwd = rank_gate_bwd;
  if (real->sparse_matmul) ops->sparse_matmul = sparse_matmul;
  if (real->sparse_grad) ops->sparse_grad = sparse_grad;
}

#endif
