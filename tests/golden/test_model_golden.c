/* Golden parity of every decoder family with transformers (fixtures: make_models.py), and of the real models with their
 * recorded logits and losses.
 * Mutation seen to fail: RoPE's llama3 blending without the division by factor (rope.c) breaks the llama logits. */
#include "golden/model_fixture.h"

#include "io/json.h"

#define TOL 1e-4

static void logits_of(fx *f, float *out) {
  int32_t rows[256];
  for (int i = 0; i < f->b.tokens; i++) rows[i] = i;
  FX_OK(esp_model_load_weights(f->m));
  FX_OK(esp_model_logits(f->m, &f->stack, &f->b, rows, (int)f->b.tokens, out));
}

static void check_logits(const char *family, esp_dtype compute, double tol) {
  fx f;
  fx_open(&f, family, test_backend_name(), compute);
  int64_t n = f.b.tokens * esp_model_describe(f.m)->vocab;
  float *out = calloc((size_t)n, sizeof *out);
  logits_of(&f, out);
  double e = fx_rel(out, fx_data(&f, "logits"), n);
  print_message("%-10s %s logits %.2e\n", family, esp_dtype_name(compute), e);
  assert_true(e < tol);
  free(out);
  fx_close(&f);
}

/* The fixture's projections of dW, see make_models.py. The store holds [out, in]; Conv1D fixtures are [in, out]. */
static void check_matrix(fx *f, const char *name, const float *g, int64_t rows, int64_t cols, bool transposed,
                         double *worst) {
  char key[300];
  double *u = calloc((size_t)(rows + cols), sizeof *u), *v = u;
  int64_t out_r = transposed ? cols : rows, out_c = transposed ? rows : cols;
  float *left = calloc((size_t)(out_r + out_c), sizeof *left), *right = left + out_c;
  for (int64_t i = 0; i < out_r; i++) {
    double acc = 0;
    for (int64_t j = 0; j < out_c; j++) {
      double x = (double)(transposed ? g[j * cols + i] : g[i * cols + j]);
      v[j] += x * (double)(i * 7 % 11 - 5) / 8;
      acc += x * (double)(j * 5 % 13 - 6) / 8;
    }
    right[i] = (float)acc;
  }
  for (int64_t j = 0; j < out_c; j++) left[j] = (float)v[j];
  snprintf(key, sizeof key, "grad.%s.u", name);
  double e = fx_rel(left, fx_data(f, key), out_c);
  snprintf(key, sizeof key, "grad.%s.v", name);
  double e2 = fx_rel(right, fx_data(f, key), out_r);
  if (e >= TOL || e2 >= TOL) print_message("%s: %.2e %.2e\n", name, e, e2);
  *worst = fmax(*worst, fmax(e, e2));
  free(u);
  free(left);
}

static void check_gradients(const char *family) {
  fx f;
  fx_open(&f, family, test_backend_name(), ESP_F32);
  fx_train_all(&f);
  FX_OK(esp_model_load_weights(f.m));
  double wsum = fx_weight_sum(&f), worst = 0;
  float logprob[256] = {0};
  esp_loss_out out;
  FX_OK(esp_model_step(f.m, &f.stack, &f.b, ESP_CKPT_OFF, true, (float)(1.0 / wsum), 1, 1, &out, logprob));
  assert_true(fabs(out.weight_sum - wsum) < 1e-9);
  float loss = *(const float *)fx_data(&f, "loss");
  assert_true(fabs(out.loss_sum / wsum - (double)loss) < TOL * (double)loss);
  const float *nll = fx_data(&f, "nll");
  for (int64_t t = 0; t < f.b.tokens; t++)
    if (f.b.weights[t] != 0.0f) assert_true(fabsf(logprob[t] + nll[t]) < 1e-3f);

  esp_site **sites;
  int n = esp_model_sites(f.m, &sites), checked = 0;
  for (int i = 0; i < n; i++) {
    esp_site *s = sites[i];
    if (s->is_head && esp_model_describe(f.m)->tied) continue;
    char name[256];
    float *g = fx_grad(&f, s->trained_weight);
    snprintf(name, sizeof name, "%s.weight", s->path);
    if (s->kind == ESP_SITE_NORM) {
      char key[300];
      snprintf(key, sizeof key, "grad.%s", name);
      worst = fmax(worst, fx_rel(g, fx_data(&f, key), s->out));
    } else {
      bool e = s->kind == ESP_SITE_EMBED;
      check_matrix(&f, name, g, e ? s->in : s->out, e ? s->out : s->in, s->transposed, &worst);
    }
    free(g);
    checked++;
    if (!s->bias_tensor) continue;
    /* a key's bias moves all scores of a query alike: its gradient is zero, and only rounding is compared */
    char key[300];
    snprintf(key, sizeof key, "grad.%s.bias", s->path);
    const float *eb = fx_data(&f, key);
    float *gb = fx_grad(&f, s->trained_bias);
    double e = fx_rel(gb, eb, s->out), big = 0;
    for (int64_t j = 0; j < s->out; j++) big = fmax(big, (double)fabsf(eb[j]));
    if (big > 1e-5) worst = fmax(worst, e);
    free(gb);
    checked++;
  }
  print_message("%-10s %d gradients, worst %.2e\n", family, checked, worst);
  assert_true(worst < TOL);
  fx_close(&f);
}

static void test_logits(void **state) {
  for (int i = 0; i < FX_FAMILIES; i++) {
    check_logits(fx_families[i], ESP_F32, TOL);
    check_logits(fx_families[i], ESP_BF16, 2e-2); /* packed operands of the bf16 path; 8 bits of mantissa */
  }
}
static void test_gradients(void **state) {
  for (int i = 0; i < FX_FAMILIES; i++) check_gradients(fx_families[i]);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_logits),
      cmocka_unit_test(test_gradients),
  };
  test_backend_or_exit();
  return cmocka_run_group_tests(tests, NULL, NULL);
}
