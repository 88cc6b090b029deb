/* Losses against a teacher: KL of two rows of logits and the distances of hidden states, against fp64 definitions and
 * their finite differences; equal rows give exactly nothing.
 * Mutation seen caught: the slope of the cap left out in distill_row (k_distill.h). */
#include "ops_check.h"

typedef struct kl_test {
  buf s, t, d;
  bool over; /* d lies over the teacher */
  float weight[8], temperature, cap;
  double sums[2];
} kl_test;

static double kl_value(const kl_test *k, const buf *b, int64_t i) {
  double c = (double)k->cap;
  return (c > 0 ? c * tanh(b->v[i] / c) : b->v[i]) / (double)k->temperature;
}
static double kl_lse(const kl_test *k, const buf *b, int64_t r) {
  int64_t n = b->t.shape[1];
  double top = -1e300, sum = 0;
  for (int64_t j = 0; j < n; j++) top = fmax(top, kl_value(k, b, r * n + j));
  for (int64_t j = 0; j < n; j++) sum += exp(kl_value(k, b, r * n + j) - top);
  return top + log(sum);
}
static double kl_loss(void *ctx) {
  const kl_test *k = ctx;
  int64_t n = k->s.t.shape[1];
  double sum = 0;
  for (int64_t r = 0; r < k->s.t.shape[0]; r++) {
    double ls = kl_lse(k, &k->s, r), lt = kl_lse(k, &k->t, r), kl = 0;
    for (int64_t j = 0; j < n; j++) {
      double lp = kl_value(k, &k->t, r * n + j) - lt, lq = kl_value(k, &k->s, r * n + j) - ls;
      kl += exp(lp) * (lp - lq);
    }
    sum += (double)k->weight[r] * 3 * kl;
  }
  return 0.125 * sum;
}
static void kl_run(void *ctx) {
  kl_test *k = ctx;
  k->sums[0] = 0.5, k->sums[1] = 3; /* added to */
  if (k->over)
    for (int64_t i = 0; i < buf_n(&k->t); i++) buf_store(&k->d, i, k->t.v[i]);
  esp_distill_args a = {.student = k->s.t,
                        .teacher = k->over ? k->d.t : k->t.t,
                        .d = k->d.t,
                        .weights = k->weight,
                        .temperature = k->temperature,
                        .factor = 3,
                        .scale = 0.125f,
                        .softcap = k->cap,
                        .sums = k->sums};
  check_be->ops->distill(check_be, &a);
}
static kl_test kl_open(int64_t n, int64_t vocab, int c) {
  kl_test k = {.temperature = c % 2 ? 2 : 1, .cap = c % 3 == 2 ? 5.0f : 0, .over = c % 2};
  k.s = buf_new(ESP_F32, n, vocab, 3, 2), k.t = buf_new(ESP_F32, n, vocab, 5, 2),
  k.d = buf_new(ESP_F32, n, vocab, 1, 1);
  for (int64_t r = 0; r < n; r++) k.weight[r] = r == 1 ? 0 : (float)r + 0.5f;
  return k;
}
static void kl_close(kl_test *k) {
  buf_free(&k->s), buf_free(&k->t), buf_free(&k->d);
}

static void test_distill(void **state) {
  (void)state;
  static const int64_t vocab[] = {1, 2, 7, 16, 50, 1023, 1025, 9001};
  EACH_ISA for (int c = 0; c < 8; c++) {
    kl_test k = kl_open(c % 4 + 1, vocab[c], c);
    out_ref outs[] = {{k.d.t.data, k.d.bytes}, {k.sums, sizeof k.sums}};
    check_threads(kl_run, &k, outs, 2);
    check_close("distillation", (k.sums[0] - 0.5) * 0.125, kl_loss(&k), 2e-6, 0.1);
    assert_true(k.sums[1] == 3);
    check_grad("dstudent", kl_loss, &k, &k.s, &k.d, 12, 1e-5, 1e-2);
    kl_close(&k);
  }
}

static void test_equal_rows_teach_nothing(void **state) {
  (void)state;
  EACH_ISA for (int c = 0; c < 6; c++) {
    kl_test k = kl_open(3, c % 2 ? 100 : 9001, c);
    for (int64_t i = 0; i < buf_n(&k.t); i++) buf_store(&k.t, i, k.s.v[i]);
    kl_run(&k);
    assert_int_equal(esp_backend_sync(check_be), ESP_OK);
    assert_true(k.sums[0] == 0.5);
    for (int64_t i = 0; i < buf_n(&k.d); i++) assert_true(buf_load(&k.d, i) == 0);
    kl_close(&k);
  }
}

typedef struct hidden_test {
  esp_hidden_loss kind;
  buf x, h, d;
  double *before;
  float low[100], high[100], weight[8];
  double sums[2];
} hidden_test;

static double hidden_value(void *ctx) {
  const hidden_test *t = ctx;
  int64_t n = t->x.t.shape[1];
  double all = 0;
  for (int64_t r = 0; r < t->x.t.shape[0]; r++) {
    double sum = 0, count = 0;
    for (int64_t j = 0; j < n; j++) {
      double x = t->x.v[r * n + j], h = t->h.v[r * n + j], low = (double)t->low[j], high = (double)t->high[j], e = 0;
      if (t->kind == ESP_HIDDEN_L2) e = (x - h) * (x - h);
      if (t->kind == ESP_HIDDEN_L1) e = fabs(x - h);
      if (t->kind == ESP_HIDDEN_BELOW) e = x < h ? (x - h) * (x - h) : 0;
      if (t->kind == ESP_HIDDEN_MARGIN)
        e = h < low ? fmax(0, x - low) : h > high ? fmax(0, high - x) : fmax(0, x - high) + fmax(0, low - x);
      sum += e;
      count += t->kind != ESP_HIDDEN_MARGIN || e > 0;
    }
    if (count > 0) all += (double)t->weight[r] * sum / count;
  }
  return 0.25 * 2 * all;
}
static void hidden_run(void *ctx) {
  hidden_test *t = ctx;
  t->sums[0] = 0.5, t->sums[1] = 3;
  for (int64_t i = 0; i < buf_n(&t->d); i++) buf_store(&t->d, i, t->before[i]);
  esp_hidden_args a = {.kind = t->kind,
                       .x = t->x.t,
                       .teacher = t->h.t,
                       .d = t->d.t,
                       .low = t->kind == ESP_HIDDEN_MARGIN ? t->low : NULL,
                       .high = t->kind == ESP_HIDDEN_MARGIN ? t->high : NULL,
                       .weights = t->weight,
                       .factor = 2,
                       .scale = 0.25f,
                       .sums = t->sums};
  check_be->ops->hidden_loss(check_be, &a);
}

static void test_hidden_losses(void **state) {
  (void)state;
  static const int64_t width[] = {1, 7, 16, 33, 100};
  EACH_TYPE(tx)
  EACH_TYPE(td) EACH_ISA for (int kind = ESP_HIDDEN_L2; kind <= ESP_HIDDEN_MARGIN; kind++) for (int c = 0; c < 5; c++) {
    int64_t rows = c + 1, n = width[c];
    hidden_test t = {.kind = (esp_hidden_loss)kind};
    t.x = buf_new(tx, rows, n, 3, 1), t.h = buf_new(c % 2 ? tx : ESP_F32, rows, n, 0, 1);
    t.d = buf_new(td, rows, n, 2, 1);
    t.before = malloc((size_t)(rows * n) * sizeof *t.before);
    memcpy(t.before, t.d.v, (size_t)(rows * n) * sizeof *t.before);
    for (int64_t r = 0; r < rows; r++) t.weight[r] = r == 1 ? 0 : (float)r + 0.5f;
    for (int64_t j = 0; j < n; j++) t.low[j] = -0.5f + 0.01f * (float)j, t.high[j] = t.low[j] + 0.75f;
    out_ref outs[] = {{t.d.t.data, t.d.bytes}, {t.sums, sizeof t.sums}};
    check_threads(hidden_run, &t, outs, 2);
    check_close("hidden loss", (t.sums[0] - 0.5) * 0.25, hidden_value(&t), 2e-6, 0.1);
    assert_true(t.sums[1] == 3);
    for (int64_t i = 0; i < rows * n; i++) {
      double up, down, keep = t.x.v[i], h = 1e-5;
      t.x.v[i] = keep + h, up = hidden_value(&t);
      t.x.v[i] = keep - h, down = hidden_value(&t);
      t.x.v[i] = keep;
      double j = (double)t.low[i % n], k = (double)t.high[i % n];
      if (fabs(keep - j) < 1e-4 || fabs(keep - k) < 1e-4 || fabs(keep - t.h.v[i]) < 1e-4) continue; /* a corner */
      check_close("dx", buf_load(&t.d, i), t.before[i] + (up - down) / (2 * h), type_tol(td, 1e-5), 1e-1);
    }
    buf_guard(&t.d);
    for (int64_t i = 0; i < rows * n; i++) buf_store(&t.x, i, t.h.v[i]); /* x = h */
    if (tx == t.h.t.dtype) {
      hidden_run(&t);
      assert_int_equal(esp_backend_sync(check_be), ESP_OK);
      assert_true(t.sums[0] == 0.5);
      for (int64_t i = 0; i < rows * n; i++) assert_true(buf_load(&t.d, i) == t.d.v[i]);
    }
    free(t.before);
    buf_free(&t.x), buf_free(&t.h), buf_free(&t.d);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_distill), cmocka_unit_test(test_equal_rows_teach_nothing),
                                     cmocka_unit_test(test_hidden_losses)};
  return cmocka_run_group_tests(tests, check_setup, check_teardown);
}
