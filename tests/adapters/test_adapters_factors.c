/* What the kinds made of factor matrices promise beyond conformance: lokr cuts widths as PEFT does and its change is
 * the Kronecker product; loha reaches rank r^2; lotr's layers share one pair of factors; pmss moves only within the
 * rows and columns it took, keeps them through a file, and reaches the whole matrix at full rank; hut is
 * multiplicative. Mutation seen to be caught: swapping the indices of w1_b and w2_b in loha_low_rank fails "loha_rank".
 */
#include <math.h>

#include "adapter_fixture.h"
#include "core/linalg.h"

#define ONE(leaf_) .target = (const char *const[]){leaf_}, .n_target = 1

static esp_adapter *make(fx_run *r, const esp_adapter_cfg *cfg, uint64_t shake) {
  esp_adapter *a;
  fx_open(r, fx_path("qwen"), ESP_F32, false);
  OK(esp_adapter_create(r->m, cfg, "default", true, &a));
  if (shake) fx_shake(a, 0.3f, shake);
  return a;
}

static void end(fx_run *r, esp_adapter *a) {
  esp_adapter_destroy(a);
  fx_close(r);
}

static float *param(const esp_adapter *a, const char *name) {
  int i = esp_params_find(a->params, name);
  if (i < 0) fail_msg("no parameter %s", name);
  float *x = malloc((size_t)a->params->list[i].numel * sizeof *x);
  esp_params_get(a->params, i, x);
  return x;
}

static const int64_t *shape(const esp_adapter *a, const char *name) {
  int i = esp_params_find(a->params, name);
  if (i < 0) fail_msg("no parameter %s", name);
  return a->params->list[i].shape;
}

/* delta W of a site, [out, in]; free() it. base: what it is added to (NULL: zeros). */
static float *change(esp_adapter *a, esp_site *s, const float *base) {
  float *w = calloc((size_t)(s->out * s->in), sizeof *w);
  if (base) memcpy(w, base, (size_t)(s->out * s->in) * sizeof *w);
  OK(esp_adapter_effective_rows(a, s, 0, s->out, w));
  return w;
}

static int rank_of(const float *w, int64_t m, int64_t n) {
  int64_t k = m < n ? m : n;
  float *x = malloc((size_t)(m * n + m * k + k + k * n) * sizeof *x), *u = x + m * n, *s = u + m * k, *vt = s + k;
  memcpy(x, w, (size_t)(m * n) * sizeof *x);
  OK(esp_linalg_svd(m, n, x, u, s, vt));
  int rank = 0;
  for (int64_t i = 0; i < k; i++) rank += s[i] > 1e-5f * s[0];
  free(x);
  return rank;
}

#define Q0 "model.layers.0.self_attn.q_proj"
#define DOWN0 "model.layers.0.mlp.down_proj"
#define KEY(path, suffix) "base_model.model." path "." suffix

/* The shapes that PEFT's factorization(32, f) and (48, f) give: [48 -> 32] is down_proj. */
static void lokr_cuts(void **state) {
  static const struct {
    int64_t factor, l, k, m, n;
  } cases[] = {{0, 4, 8, 6, 8},   {4, 4, 8, 4, 12},  {5, 4, 8, 4, 12},
               {12, 4, 8, 12, 4}, {3, 2, 16, 3, 16}, {1, 1, 32, 1, 48}};
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    fx_run r;
    esp_adapter_cfg cfg = {.type = "lokr", .r = 24, .alpha = 24, .decompose_factor = cases[i].factor, ONE("down_proj")};
    esp_adapter *a = make(&r, &cfg, 41);
    const int64_t *w1 = shape(a, KEY(DOWN0, "lokr_w1")), *w2 = shape(a, KEY(DOWN0, "lokr_w2"));
    if (w1[0] != cases[i].l || w1[1] != cases[i].m || w2[0] != cases[i].k || w2[1] != cases[i].n)
      fail_msg("factor %d: [%d, %d] x [%d, %d]", (int)cases[i].factor, (int)w1[0], (int)w1[1], (int)w2[0], (int)w2[1]);
    esp_site *s = esp_model_find_site(r.m, DOWN0);
    float *x = param(a, KEY(DOWN0, "lokr_w1")), *y = param(a, KEY(DOWN0, "lokr_w2")), *d = change(a, s, NULL);
    for (int64_t o = 0; o < s->out; o++)
      for (int64_t c = 0; c < s->in; c++) {
        float want = x[o / w2[0] * w1[1] + c / w2[1]] * y[o % w2[0] * w2[1] + c % w2[1]];
        if (fabsf(d[o * s->in + c] - want) > 1e-6f) fail_msg("factor %d: no Kronecker product", (int)cases[i].factor);
      }
    free(x);
    free(y);
    free(d);
    end(&r, a);
  }
}

static void loha_rank(void **state) {
  for (int64_t q = 1; q <= 3; q++) {
    fx_run r;
    esp_adapter_cfg cfg = {.type = "loha", .r = q, .alpha = 2.0 * (double)q, ONE("q_proj")};
    esp_adapter *a = make(&r, &cfg, 42);
    esp_site *s = esp_model_find_site(r.m, Q0);
    float *d = change(a, s, NULL), *w1a = param(a, KEY(Q0, "hada_w1_a")), *w2a = param(a, KEY(Q0, "hada_w2_a"));
    float *w1b = param(a, KEY(Q0, "hada_w1_b")), *w2b = param(a, KEY(Q0, "hada_w2_b")); /* [in, r] in the store */
    for (int64_t o = 0; o < s->out; o++)
      for (int64_t c = 0; c < s->in; c++) {
        double one = 0, two = 0;
        for (int64_t k = 0; k < q; k++) {
          one += (double)w1a[o * q + k] * w1b[c * q + k];
          two += (double)w2a[o * q + k] * w2b[c * q + k];
        }
        if (fabs(d[o * s->in + c] - 2 * one * two) > 1e-5) fail_msg("rank %d: not the Hadamard product", (int)q);
      }
    assert_int_equal(rank_of(d, s->out, s->in), (int)(q * q));
    free(d);
    free(w1a);
    free(w2a);
    free(w1b);
    free(w2b);
    end(&r, a);
  }
}

/* (in + out) r once and r^2 per layer; the gradient of a shared factor is the sum of what each layer alone gives. */
static void lotr_shares(void **state) {
  fx_batch f;
  fx_fill(&f);
  float *grad[3];
  int64_t n = 0;
  for (int k = 0; k < 3; k++) { /* both layers, then each core alone, the other switched off */
    fx_run r;
    esp_adapter_cfg cfg = {.type = "lotr", .r = 3, .alpha = 3, .seed = 5, ONE("q_proj")};
    esp_adapter *a = make(&r, &cfg, 0);
    int64_t total = 0;
    for (int i = 0; i < a->params->count; i++) total += a->params->list[i].numel;
    assert_int_equal(total, (32 + 32) * 3 + 2 * 9);
    float zero[9] = {0};
    if (k)
      esp_params_set(
          a->params,
          esp_params_find(a->params, k == 1 ? KEY(Q0, "lotr_G") : KEY("model.layers.1.self_attn.q_proj", "lotr_G")),
          zero);
    OK(esp_adapters_activate(r.m, &a, 1));
    fx_loss(&r, &f.b, true, ESP_CKPT_OFF, 0);
    int b = esp_params_find(a->params, KEY("model.layers.shared.self_attn.q_proj", "lotr_B"));
    n = a->params->list[b].numel;
    float *all = fx_grads(a);
    grad[k] = malloc((size_t)n * sizeof(float));
    memcpy(grad[k], all + a->params->list[b].offset, (size_t)n * sizeof(float));
    free(all);
    end(&r, a);
  }
  /* B = 0: the forward pass is that of the base in all three, so the parts add up exactly */
  for (int64_t i = 0; i < n; i++) grad[1][i] += grad[2][i];
  assert_true(fx_max_abs(grad[0], n) > 1e-4);
  assert_true(fx_rel(grad[1], grad[0], n) < 1e-5);
  for (int k = 0; k < 3; k++) free(grad[k]);
}

static void pmss_skeleton(void **state) {
  static const char *const rules[] = {"pivot", "norm", "uniform"};
  for (int k = 0; k < 3; k++) {
    fx_run r;
    esp_adapter_cfg cfg = {.type = "pmss", .r = 4, .alpha = 40, .seed = 9, .pmss_select = rules[k], ONE("q_proj")};
    esp_adapter *a = make(&r, &cfg, 43);
    esp_site *s = esp_model_find_site(r.m, Q0);
    float *w = malloc((size_t)(s->out * s->in) * sizeof *w), *d = change(a, s, NULL);
    int64_t last = -1;
    OK(esp_site_read_weight(r.m, s, w));
    assert_int_equal(rank_of(d, s->out, s->in), 4);
    float *R = malloc((size_t)(4 * (s->in + s->out)) * sizeof *R), *cu = R + 4 * s->in;
    assert_int_equal(a->kind->low_rank(a, s, R, cu), 4);
    for (int i = 0; i < 4; i++) { /* every row of R is a row of W, in their order */
      int64_t at = 0;
      while (at < s->out && memcmp(R + i * s->in, w + at * s->in, (size_t)s->in * sizeof *w)) at++;
      assert_true(at < s->out && (i == 0 || at > last));
      last = at;
    }
    free(R);
    OK(esp_adapter_save(a, fx_path("skeleton")));
    end(&r, a);
    fx_open(&r, fx_path("qwen"), ESP_F32, false);
    OK(esp_adapter_load(r.m, fx_path("skeleton"), "again", false, &a));
    s = esp_model_find_site(r.m, Q0);
    float *e = change(a, s, NULL);
    assert_memory_equal(d, e, (size_t)(s->out * s->in) * sizeof *d);
    OK(esp_remove_tree(fx_path("skeleton")));
    free(w);
    free(d);
    free(e);
    end(&r, a);
  }
  /* every row and column: C = R = W, and U = W^-1 gives delta W = W */
  fx_run r;
  esp_adapter_cfg cfg = {.type = "pmss", .r = 32, .alpha = 32, ONE("q_proj")};
  esp_adapter *a = make(&r, &cfg, 0);
  esp_site *s = esp_model_find_site(r.m, Q0);
  int64_t n = s->in;
  float *w = malloc((size_t)(5 * n * n + n) * sizeof *w), *u = w + n * n, *vt = u + n * n, *inv = vt + n * n;
  float *copy = inv + n * n, *sv = copy + n * n;
  OK(esp_site_read_weight(r.m, s, w));
  memcpy(copy, w, (size_t)(n * n) * sizeof *w);
  OK(esp_linalg_svd(n, n, copy, u, sv, vt));
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < n; j++) {
      double sum = 0;
      for (int64_t p = 0; p < n; p++) sum += (double)vt[p * n + i] / sv[p] * u[j * n + p];
      inv[i * n + j] = (float)sum;
    }
  esp_params_set(a->params, esp_params_find(a->params, KEY(Q0, "pmss_U")), inv);
  float *d = change(a, s, NULL);
  assert_true(fx_rel(d, w, n * n) < 1e-3);
  free(d);
  free(w);
  end(&r, a);
}

/* Without U2: W'/W has rank one, zeros stay zeros, and (c u, v / c) is the same weight. */
static void hut_multiplies(void **state) {
  fx_run r;
  esp_adapter_cfg cfg = {.type = "hut", .r = 2, .alpha = 2, ONE("q_proj")};
  esp_adapter *a = make(&r, &cfg, 44);
  esp_site *s = esp_model_find_site(r.m, Q0);
  int64_t size = s->out * s->in;
  int ib = esp_params_find(a->params, KEY(Q0, "hut_B")), iu = esp_params_find(a->params, KEY(Q0, "hut_u"));
  int iv = esp_params_find(a->params, KEY(Q0, "hut_v"));
  float *b = calloc((size_t)a->params->list[ib].numel, sizeof *b), *ones = malloc((size_t)size * sizeof *ones);
  esp_params_set(a->params, ib, b);
  for (int64_t i = 0; i < size; i++) ones[i] = i % 7 == 3 ? 0.0f : 1.0f;
  float *d = change(a, s, ones), *u = param(a, KEY(Q0, "hut_u")), *v = param(a, KEY(Q0, "hut_v"));
  for (int64_t i = 0; i < size; i++)
    if (i % 7 == 3) assert_true(d[i] == 0.0f);
  for (int64_t i = 0; i < size; i++) ones[i] = 1.0f;
  float *ratio = change(a, s, ones);
  assert_int_equal(rank_of(ratio, s->out, s->in), 1);
  assert_true(rank_of(d, s->out, s->in) > 5); /* that of the old weight, a mask of period 7, not of U1 */
  for (int64_t i = 0; i < s->out; i++) u[i] *= 4.0f;
  for (int64_t i = 0; i < s->in; i++) v[i] *= 0.25f;
  esp_params_set(a->params, iu, u);
  esp_params_set(a->params, iv, v);
  float *same = change(a, s, ones);
  assert_memory_equal(same, ratio, (size_t)size * sizeof *same);
  free(b);
  free(ones);
  free(d);
  free(u);
  free(v);
  free(ratio);
  free(same);
  end(&r, a);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(lokr_cuts),     cmocka_unit_test(loha_rank),      cmocka_unit_test(lotr_shares),
      cmocka_unit_test(pmss_skeleton), cmocka_unit_test(hut_multiplies),
  };
  fx_setup();
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  fx_teardown();
  return failed;
}
