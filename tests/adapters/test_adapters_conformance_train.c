/* Conformance of adapter kinds (conformance.h has all statements): training.
 * Mutation seen to be caught: scaling dT by 1 instead of s in lora_tails_bwd fails "gradients" for every lora row. */
#include "conformance.h"

/* DoRA's gradients of A and B take the norm as a constant, which the loss does not: compared with PEFT's instead
 * (test_optim_peft_parity.c). */
static bool detached(const row *w, const char *name) {
  return strcmp(w->cfg.type, "dora") == 0 && !strstr(name, "magnitude") && !strstr(name, "bias");
}

/* Directional derivative along each parameter's own gradient: (L(p + h u) - L(p - h u)) / 2h against |g|. */
static void gradients(void **state) {
  fx_batch f;
  fx_fill(&f);
  for (int i = 0; i < N_ROWS; i++) {
    fx_run r;
    fx_open(&r, fx_path(rows[i].base), ESP_F32, false);
    esp_adapter *a = attach(&r, &rows[i], "default", true);
    fx_shake(a, 0.1f, 19);
    fx_loss(&r, &f.b, true, ESP_CKPT_OFF, 3);
    float *grad = fx_grads(a);
    int count = a->params->count, each = test_quick() && count > 2 ? count / 2 : 1;
    for (int p = i % each; p < count; p += each) {
      const esp_param *q = &a->params->list[p];
      const float *g = grad + q->offset;
      if (q->frozen || q->numel == 0) continue;
      double norm = 0;
      for (int64_t k = 0; k < q->numel; k++) norm += (double)g[k] * g[k];
      norm = sqrt(norm);
      /* softmax does not see a constant added to all keys: the gradient of k's bias is zero up to rounding */
      bool invariant = strstr(q->name, "k_proj") && strstr(q->name, "bias");
      if (norm < 1e-3 && invariant) continue;
      if (!(norm > 1e-5)) fail_msg("%s: no gradient for %s (%g)", rows[i].name, q->name, norm);
      if (detached(&rows[i], q->name)) continue;
      float *x = malloc((size_t)(2 * q->numel) * sizeof *x), *v = x + q->numel;
      esp_params_get(a->params, p, x);
      double h = norm > 1 ? 1e-2 / sqrt(norm) : 1e-2, l[4], fd, off;
      int tries = rows[i].cfg.gate_top_k ? 3 : 1; /* which ranks take part may change on the way: a shorter one then */
      do {                                        /* at -2h, -h, h, 2h: the error is of fourth order */
        for (int at = 0; at < 4; at++) {
          double step = h * (at < 2 ? at - 2 : at - 1);
          for (int64_t k = 0; k < q->numel; k++) v[k] = x[k] + (float)(step * g[k] / norm);
          esp_params_set(a->params, p, v);
          l[at] = fx_loss(&r, &f.b, true, ESP_CKPT_OFF, 3);
        }
        fd = (8 * (l[2] - l[1]) - (l[3] - l[0])) / (12 * h);
        off = fabs(fd - norm) - (rows[i].cfg.gate_top_k ? 5e-3 : 1e-3) * norm - 2e-4;
        h /= 4;
      } while (off > 0 && --tries > 0);
      esp_params_set(a->params, p, x);
      if (!(off <= 0)) fail_msg("%s: %s: finite difference %g, gradient %g", rows[i].name, q->name, fd, norm);
      free(x);
    }
    free(grad);
    esp_adapter_destroy(a);
    fx_close(&r);
  }
}

/* Recomputation draws the same dropout and gives the same bits; another draw gives another loss only with dropout. */
static void recomputed(void **state) {
  fx_batch f;
  fx_fill(&f);
  for (int i = 0; i < N_ROWS; i++) {
    fx_run r;
    fx_open(&r, fx_path(rows[i].base), ESP_F32, false);
    esp_adapter *a = attach(&r, &rows[i], "default", true);
    fx_shake(a, 0.1f, 20);
    double off = fx_loss(&r, &f.b, true, ESP_CKPT_OFF, 4);
    size_t bytes = (size_t)a->params->total * sizeof(float);
    float *grad = fx_grads(a);
    esp_params_zero_grad(a->params);
    double full = fx_loss(&r, &f.b, true, ESP_CKPT_FULL, 4);
    if (off != full) fail_msg("%s: the loss depends on recomputation (%.9g, %.9g)", rows[i].name, off, full);
    float *again = fx_grads(a);
    if (memcmp(grad, again, bytes)) fail_msg("%s: gradients depend on recomputation", rows[i].name);
    double other = fx_loss(&r, &f.b, true, ESP_CKPT_OFF, 5), eval = fx_loss(&r, &f.b, false, ESP_CKPT_OFF, 4);
    bool drops = rows[i].cfg.dropout > 0;
    if ((other != off) != drops || (eval != off) != drops)
      fail_msg("%s: dropout draws: %.9g %.9g eval %.9g", rows[i].name, off, other, eval);
    free(grad);
    free(again);
    esp_adapter_destroy(a);
    fx_close(&r);
  }
}

static void only_adapter_moves(void **state) {
  static float before[FX_T * FX_VOCAB], after[FX_T * FX_VOCAB], with[FX_T * FX_VOCAB];
  fx_batch f;
  fx_fill(&f);
  for (int i = 0; i < N_ROWS; i++) {
    fx_run r;
    fx_open(&r, fx_path(rows[i].base), ESP_F32, false);
    esp_adapter *a = attach(&r, &rows[i], "default", true);
    OK(esp_adapters_activate(r.m, NULL, 0));
    fx_logits(&r, &f.b, before);
    OK(esp_adapters_activate(r.m, &a, 1));
    for (int step = 0; step < 3; step++) { /* plain SGD on the masters */
      esp_params_zero_grad(a->params);
      fx_loss(&r, &f.b, true, ESP_CKPT_OFF, step);
      int64_t n = a->params->total;
      r.be->ops->axpby(r.be, esp_tensor_1d(a->params->master, ESP_F32, n), -0.01f,
                       esp_tensor_1d(a->params->grad, ESP_F32, n), 1.0f);
      esp_params_refresh_shadow(a->params);
    }
    fx_logits(&r, &f.b, with);
    OK(esp_adapters_activate(r.m, NULL, 0));
    fx_logits(&r, &f.b, after);
    if (memcmp(before, after, sizeof before)) fail_msg("%s: training changed the base", rows[i].name);
    if (!(fx_rel(with, before, FX_T * FX_VOCAB) > 1e-4)) fail_msg("%s: training changed nothing", rows[i].name);
    esp_adapter_destroy(a);
    fx_close(&r);
  }
}

/* bf16 compute: gradients stay within the rounding of bf16 of those in fp32. */
static void types(void **state) {
  fx_batch f;
  fx_fill(&f);
  for (int i = 0; i < N_ROWS; i++) {
    if (rows[i].cfg.dropout > 0 || whole(&rows[i])) continue;
    float *grad[2];
    int64_t total = 0;
    for (int k = 0; k < 2; k++) {
      fx_run r;
      fx_open(&r, fx_path(rows[i].base), k ? ESP_BF16 : ESP_F32, false);
      esp_adapter *a = attach(&r, &rows[i], "default", true);
      fx_shake(a, 0.1f, 23);
      fx_loss(&r, &f.b, true, ESP_CKPT_OFF, 1);
      total = a->params->total;
      grad[k] = fx_grads(a);
      esp_adapter_destroy(a);
      fx_close(&r);
    }
    double dot = 0, n0 = 0, n1 = 0;
    for (int64_t k = 0; k < total; k++) {
      dot += (double)grad[0][k] * grad[1][k];
      n0 += (double)grad[0][k] * grad[0][k];
      n1 += (double)grad[1][k] * grad[1][k];
    }
    double cosine = dot / sqrt(n0 * n1);
    if (!(cosine > 0.999)) fail_msg("%s: bf16 gradient is off (cosine %g)", rows[i].name, cosine);
    free(grad[0]);
    free(grad[1]);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(gradients),
      cmocka_unit_test(recomputed),
      cmocka_unit_test(only_adapter_moves),
      cmocka_unit_test(types),
  };
  fx_setup();
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
