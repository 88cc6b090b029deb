/* mirror_rows.h: the part of mirror.c for the operations on rows and elements: activations, losses, sums, the
 * optimizers. */
#ifndef TESTS_OPS_MIRROR_ROWS_H
#define TESTS_OPS_MIRROR_ROWS_H

/* ---- activations, loss ---- */
static void glu(esp_backend *be, esp_tensor h, esp_tensor gu, esp_act kind) {
  call c = call_of(be, "glu");
  writes(&c, h);
  reads(&c, gu);
  begin(&c);
  c.real->ops->glu(c.real, there_t(&c, h), there_t(&c, gu), kind);
  end(&c);
}
static void glu_bwd(esp_backend *be, esp_tensor dgu, esp_tensor dh, esp_tensor gu, esp_act kind) {
  call c = call_of(be, "glu_bwd");
  writes(&c, dgu);
  reads(&c, dh);
  reads(&c, gu);
  begin(&c);
  c.real->ops->glu_bwd(c.real, there_t(&c, dgu), there_t(&c, dh), there_t(&c, gu), kind);
  end(&c);
}
static void act(esp_backend *be, esp_tensor y, esp_tensor x, esp_act kind) {
  call c = call_of(be, "act");
  writes(&c, y);
  reads(&c, x);
  begin(&c);
  c.real->ops->act(c.real, there_t(&c, y), there_t(&c, x), kind);
  end(&c);
}
static void act_bwd(esp_backend *be, esp_tensor dx, esp_tensor dy, esp_tensor x, esp_act kind) {
  call c = call_of(be, "act_bwd");
  writes(&c, dx);
  reads(&c, dy);
  reads(&c, x);
  begin(&c);
  c.real->ops->act_bwd(c.real, there_t(&c, dx), there_t(&c, dy), there_t(&c, x), kind);
  end(&c);
}
static void cross_entropy(esp_backend *be, const esp_ce_args *args) {
  call c = call_of(be, "cross_entropy");
  esp_ce_args a = *args;
  int64_t rows = esp_tensor_rows(&a.logits);
  reads(&c, a.logits);
  writes(&c, a.d);
  use(&c, a.targets, rows * 4, false);
  use(&c, a.weights, rows * 4, false);
  use(&c, a.sums, 16, true);
  use(&c, a.logprob, rows * 4, true);
  begin(&c);
  a.logits = there_t(&c, a.logits);
  a.d = there_t(&c, a.d);
  a.targets = there(&c, a.targets);
  a.weights = there(&c, a.weights);
  a.sums = there(&c, a.sums);
  a.logprob = there(&c, a.logprob);
  c.real->ops->cross_entropy(c.real, &a);
  end(&c);
}

static void distill(esp_backend *be, const esp_distill_args *args) {
  call c = call_of(be, "distill");
  esp_distill_args a = *args;
  reads(&c, a.student);
  reads(&c, a.teacher);
  writes(&c, a.d);
  use(&c, a.weights, esp_tensor_rows(&a.student) * 4, false);
  use(&c, a.sums, 16, true);
  begin(&c);
  a.student = there_t(&c, a.student);
  a.teacher = there_t(&c, a.teacher);
  a.d = there_t(&c, a.d);
  a.weights = there(&c, a.weights);
  a.sums = there(&c, a.sums);
  c.real->ops->distill(c.real, &a);
  end(&c);
}
static void hidden_loss(esp_backend *be, const esp_hidden_args *args) {
  call c = call_of(be, "hidden_loss");
  esp_hidden_args a = *args;
  int64_t cols = esp_tensor_cols(&a.x);
  reads(&c, a.x);
  reads(&c, a.teacher);
  writes(&c, a.d);
  use(&c, a.low, cols * 4, false);
  use(&c, a.high, cols * 4, false);
  use(&c, a.weights, esp_tensor_rows(&a.x) * 4, false);
  use(&c, a.sums, 16, true);
  begin(&c);
  a.x = there_t(&c, a.x);
  a.teacher = there_t(&c, a.teacher);
  a.d = there_t(&c, a.d);
  a.low = there(&c, a.low);
  a.high = there(&c, a.high);
  a.weights = there(&c, a.weights);
  a.sums = there(&c, a.sums);
  c.real->ops->hidden_loss(c.real, &a);
  end(&c);
}

/* ---- elementwise, reductions, optimizers ---- */
static void axpby(esp_backend *be, esp_tensor y, float a, esp_tensor x, float b) {
  call c = call_of(be, "axpby");
  writes(&c, y);
  reads(&c, x);
  begin(&c);
  c.real->ops->axpby(c.real, there_t(&c, y), a, there_t(&c, x), b);
  end(&c);
}
static void mul_cols(esp_backend *be, esp_tensor y, esp_tensor x, esp_tensor v) {
  call c = call_of(be, "mul_cols");
  writes(&c, y);
  reads(&c, x);
  reads(&c, v);
  begin(&c);
  c.real->ops->mul_cols(c.real, there_t(&c, y), there_t(&c, x), there_t(&c, v));
  end(&c);
}
static void dropout(esp_backend *be, esp_tensor y, esp_tensor x, float p, uint64_t seed, const uint64_t *draw,
                    uint64_t stream, float beta) {
  call c = call_of(be, "dropout");
  writes(&c, y);
  reads(&c, x);
  use(&c, draw, 8, false);
  begin(&c);
  c.real->ops->dropout(c.real, there_t(&c, y), there_t(&c, x), p, seed, there(&c, draw), stream, beta);
  end(&c);
}
static void col_sum(esp_backend *be, float *out, esp_tensor x) {
  call c = call_of(be, "col_sum");
  use(&c, out, esp_tensor_cols(&x) * 4, true);
  reads(&c, x);
  begin(&c);
  c.real->ops->col_sum(c.real, there(&c, out), there_t(&c, x));
  end(&c);
}
/* The sum is wanted by the host at once: `out` is host memory on every backend. */
static void dot(esp_backend *be, double *out, const float *a, const float *b, int64_t n) {
  call c = call_of(be, "dot");
  use(&c, a, n * 4, false);
  use(&c, b, n * 4, false);
  begin(&c);
  c.real->ops->dot(c.real, out, there(&c, a), there(&c, b), n);
  end(&c);
}
static void update(esp_backend *be, const esp_update_args *args) {
  call c = call_of(be, "update");
  esp_update_args a = *args;
  use(&c, a.master, a.n * 4, true);
  use(&c, a.grad, a.n * 4, false);
  use(&c, a.shadow, a.n * (int64_t)esp_dtype_size(a.shadow_dtype), true);
  for (int i = 0; i < 4; i++) use(&c, a.state[i], a.n * 4, true);
  begin(&c);
  a.master = there(&c, a.master);
  a.grad = there(&c, a.grad);
  a.shadow = there(&c, a.shadow);
  for (int i = 0; i < 4; i++) a.state[i] = there(&c, a.state[i]);
  c.real->ops->update(c.real, &a);
  end(&c);
}

#endif
