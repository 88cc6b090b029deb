/* test_backend_golden.c: operations against published cases of the ONNX standard's backend tests (node cases whose
 * definition is ours): norms, rotary positions, attention, activations, cross-entropy.
 * Seen to catch: RoPE with the sign of the second product flipped (`v * c - u * s` in rope_head). */
#include "io/safetensors.h"
#include "ops/ops_check.h"

static esp_st *st;
static const char *case_name;

static const esp_st_entry *entry(const char *name) {
  const esp_st_entry *e = esp_st_find(st, name);
  if (!e) fail_msg("%s has no tensor %s", case_name, name);
  return e;
}
static float *values(const char *name) { /* fp32 copy, aligned */
  const esp_st_entry *e = entry(name);
  float *v = malloc((size_t)e->bytes + 4);
  memcpy(v, e->data, (size_t)e->bytes);
  return v;
}
static bool open_case(const char *name) {
  char path[512];
  case_name = name;
  snprintf(path, sizeof path, "%s/data/golden/onnx-node/%s.safetensors", ESP_SHARED_DIR, name);
  if (esp_st_open(path, &st) == ESP_OK) return true;
  print_message("skipped: %s\n", esp_error_message());
  return false;
}
static void expect(const float *got, const char *name, double tol) {
  const esp_st_entry *e = entry(name);
  for (int64_t i = 0; i < e->bytes / 4; i++) {
    float want;
    memcpy(&want, (const char *)e->data + 4 * i, 4);
    if (!(fabs(got[i] - want) <= tol * (1 + fabs(want))))
      fail_msg("%s, %s[%ld]: got %.8g, want %.8g (%s)", case_name, name, (long)i, got[i], want, check_where());
  }
}

static void test_norm_cases(void **state) {
  (void)state;
  static const struct {
    const char *name;
    esp_norm_kind kind;
    float eps;
  } rows[] = {{"rms_normalization_2d_axis1", ESP_NORM_RMS, 1e-5f},
              {"rms_normalization_3d_axis2_epsilon", ESP_NORM_RMS, 0.1f},
              {"rms_normalization_4d_axis3", ESP_NORM_RMS, 1e-5f},
              {"layer_normalization_2d_axis1", ESP_NORM_LAYER, 1e-5f},
              {"layer_normalization_3d_axis2_epsilon", ESP_NORM_LAYER, 0.1f},
              {"layer_normalization_4d_axis3", ESP_NORM_LAYER, 1e-5f}};
  for (size_t c = 0; c < sizeof rows / sizeof *rows; c++) {
    if (!open_case(rows[c].name)) skip();
    int64_t n = entry("in.1.W")->bytes / 4, total = entry("in.0.X")->bytes / 4;
    float *x = values("in.0.X"), *w = values("in.1.W"), *y = calloc((size_t)total, 4);
    float *b = rows[c].kind == ESP_NORM_LAYER ? values("in.2.B") : NULL;
    EACH_ISA {
      esp_norm_args a = {.kind = rows[c].kind,
                         .x = esp_tensor_2d(x, ESP_F32, total / n, n),
                         .y = esp_tensor_2d(y, ESP_F32, total / n, n),
                         .w = esp_tensor_1d(w, ESP_F32, n),
                         .b = esp_tensor_1d(b, ESP_F32, n),
                         .eps = rows[c].eps};
      check_be->ops->norm(check_be, &a);
      expect(y, "out.0.Y", 2e-6);
    }
    free(x), free(w), free(y), free(b);
    esp_st_close(st);
  }
}

static void test_rope_cases(void **state) {
  (void)state;
  static const struct {
    const char *name;
    bool by_head; /* [B, H, S, d] rather than [B, S, H*d] */
  } rows[] = {
      {"rotary_embedding", true}, {"rotary_embedding_3d_input", false}, {"rotary_embedding_with_rotary_dim", true}};
  for (size_t c = 0; c < sizeof rows / sizeof *rows; c++) {
    if (!open_case(rows[c].name)) skip();
    enum { B = 2, H = 4, S = 3, D = 8 };
    int half = (int)entry("in.1.cos_cache")->shape[1];
    float *in = values("in.0.input"), *cs = values("in.1.cos_cache"), *sn = values("in.2.sin_cache");
    int64_t pos64[B * S];
    int32_t pos[B * S];
    memcpy(pos64, entry("in.3.position_ids")->data, sizeof pos64);
    for (int i = 0; i < B * S; i++) pos[i] = (int32_t)pos64[i];
    EACH_ISA {
      float x[B * S * H * D], y[B * S * H * D];
      for (int i = 0; i < B * S * H * D; i++) { /* i runs over [b, s, h, d] */
        int d = i % D, h = i / D % H, s = i / D / H % S, b = i / D / H / S;
        x[i] = rows[c].by_head ? in[((b * H + h) * S + s) * D + d] : in[i];
      }
      esp_rope_args a = {.x = esp_tensor_2d(x, ESP_F32, B * S, H * D),
                         .cos_t = cs,
                         .sin_t = sn,
                         .positions = pos,
                         .heads = H,
                         .head_dim = D,
                         .rot = 2 * half};
      check_be->ops->rope(check_be, &a);
      for (int i = 0; i < B * S * H * D; i++) {
        int d = i % D, h = i / D % H, s = i / D / H % S, b = i / D / H / S;
        y[rows[c].by_head ? ((b * H + h) * S + s) * D + d : i] = x[i];
      }
      expect(y, "out.0.output", 2e-6);
    }
    free(in), free(cs), free(sn);
    esp_st_close(st);
  }
}

/* The cases have fewer queries than keys: causal ones (aligned at the first key) are self-attention over the first
 * keys; the others are decoding steps, one per query. */
static void test_attention_cases(void **state) {
  (void)state;
  static const struct {
    const char *name;
    bool by_head, causal;
    int heads, kv_heads;
    float softcap, scale;
  } rows[] = {
      {"attention_4d_causal", true, true, 3, 3, 0, 0},        {"attention_4d_gqa_causal", true, true, 9, 3, 0, 0},
      {"attention_3d_gqa_causal", false, true, 9, 3, 0, 0},   {"attention_4d", true, false, 3, 3, 0, 0},
      {"attention_4d_gqa", true, false, 9, 3, 0, 0},          {"attention_4d_softcap", true, false, 3, 3, 2, 0},
      {"attention_3d_gqa_softcap", false, false, 9, 3, 3, 0}, {"attention_4d_scaled", true, false, 3, 3, 0, 0.01f}};
  for (size_t c = 0; c < sizeof rows / sizeof *rows; c++) {
    if (!open_case(rows[c].name)) skip();
    enum { B = 2, LQ = 4, LK = 6, D = 8 };
    int H = rows[c].heads, K = rows[c].kv_heads;
    float *fq = values("in.0.Q"), *fk = values("in.1.K"), *fv = values("in.2.V");
    float q[B * LQ * 9 * D], k[B * LK * 9 * D], v[B * LK * 9 * D], o[B * LQ * 9 * D], y[B * LQ * 9 * D],
        lse[B * LQ * 9];
#define AT(b, t, h, d, L, N)                                                                                           \
  (rows[c].by_head ? (((b) * (N) + (h)) * (L) + (t)) * D + (d) : (((b) * (L) + (t)) * (N) + (h)) * D + (d))
    int keys = rows[c].causal ? LQ : LK;
    for (int b = 0; b < B; b++)
      for (int d = 0; d < D; d++) {
        for (int t = 0; t < LQ; t++)
          for (int h = 0; h < H; h++) q[((b * LQ + t) * H + h) * D + d] = fq[AT(b, t, h, d, LQ, H)];
        for (int t = 0; t < keys; t++)
          for (int h = 0; h < K; h++) {
            k[((b * keys + t) * K + h) * D + d] = fk[AT(b, t, h, d, LK, K)];
            v[((b * keys + t) * K + h) * D + d] = fv[AT(b, t, h, d, LK, K)];
          }
      }
    float scale = rows[c].scale > 0 ? rows[c].scale : 1 / sqrtf(D);
    EACH_ISA {
      if (rows[c].causal) {
        static const int32_t cu[] = {0, LQ, 2 * LQ};
        esp_attn_args a = {.q = esp_tensor_2d(q, ESP_F32, B * LQ, H * D),
                           .k = esp_tensor_2d(k, ESP_F32, B * LQ, K * D),
                           .v = esp_tensor_2d(v, ESP_F32, B * LQ, K * D),
                           .o = esp_tensor_2d(o, ESP_F32, B * LQ, H * D),
                           .lse = lse,
                           .cu_seqlens = cu,
                           .n_seqs = B,
                           .heads = H,
                           .kv_heads = K,
                           .head_dim = D,
                           .scale = scale,
                           .softcap = rows[c].softcap,
                           .causal = true};
        check_be->ops->attn_begin(check_be, cu, B);
        check_be->ops->attn(check_be, &a);
      } else {
        for (int t = 0; t < LQ; t++) {
          static const int32_t last[] = {LK - 1, LK - 1};
          esp_decode_args a = {.k_cache = esp_tensor_2d(k, ESP_F32, B * LK, K * D),
                               .v_cache = esp_tensor_2d(v, ESP_F32, B * LK, K * D),
                               .positions = last,
                               .max_len = LK,
                               .heads = H,
                               .kv_heads = K,
                               .head_dim = D,
                               .scale = scale,
                               .softcap = rows[c].softcap};
          a.q = a.o = esp_tensor_2d(q + t * H * D, ESP_F32, B, H * D);
          a.o.data = o + t * H * D;
          a.q.ld = a.o.ld = LQ * H * D;
          check_be->ops->attn_decode(check_be, &a);
        }
      }
      for (int i = 0; i < B * LQ * H * D; i++) {
        int d = i % D, h = i / D % H, t = i / D / H % LQ, b = i / D / H / LQ;
        y[AT(b, t, h, d, LQ, H)] = o[i];
      }
      expect(y, "out.0.Y", 3e-6);
    }
    free(fq), free(fk), free(fv);
    esp_st_close(st);
  }
}

static void test_activation_cases(void **state) {
  (void)state;
  static const struct {
    const char *name;
    esp_act act;
  } rows[] = {{"gelu_tanh_1", ESP_ACT_GELU_TANH},
              {"gelu_tanh_2", ESP_ACT_GELU_TANH},
              {"gelu_default_1", ESP_ACT_GELU_ERF},
              {"gelu_default_2", ESP_ACT_GELU_ERF},
              {"swish", ESP_ACT_SILU}};
  for (size_t c = 0; c < sizeof rows / sizeof *rows; c++) {
    if (!open_case(rows[c].name)) skip();
    int64_t n = entry("in.0.x")->bytes / 4;
    float *x = values("in.0.x"), *y = calloc((size_t)n, 4);
    EACH_ISA {
      check_be->ops->act(check_be, esp_tensor_2d(y, ESP_F32, 1, n), esp_tensor_2d(x, ESP_F32, 1, n), rows[c].act);
      expect(y, "out.0.y", 2e-6);
    }
    free(x), free(y);
    esp_st_close(st);
  }
}

static void test_cross_entropy_cases(void **state) {
  (void)state;
  static const struct {
    const char *name;
    bool weights, none, mean;
  } rows[] = {{"sce_none", false, true, false},
              {"sce_none_weights", true, true, false},
              {"sce_sum", false, false, false},
              {"sce_mean", false, false, true},
              {"sce_mean_weight", true, false, true}};
  for (size_t c = 0; c < sizeof rows / sizeof *rows; c++) {
    if (!open_case(rows[c].name)) skip();
    enum { N = 3, V = 5 };
    float *x = values("in.0.x"), *cw = rows[c].weights ? values("in.2.w") : NULL;
    int64_t y64[N];
    memcpy(y64, entry("in.1.y")->data, sizeof y64);
    EACH_ISA {
      int32_t y[N];
      float w[N], logprob[N], z[N];
      double sums[2] = {0, 0}, total = 0;
      for (int i = 0; i < N; i++) {
        y[i] = (int32_t)y64[i];
        w[i] = cw ? cw[y[i]] : 1;
        total += w[i];
      }
      esp_ce_args a = {.logits = esp_tensor_2d(x, ESP_F32, N, V),
                       .targets = y,
                       .weights = w,
                       .scale = 1,
                       .sums = sums,
                       .logprob = logprob};
      check_be->ops->cross_entropy(check_be, &a);
      for (int i = 0; i < N; i++) z[i] = -logprob[i] * w[i];
      if (!rows[c].none) z[0] = (float)(rows[c].mean ? sums[0] / total : sums[0]);
      expect(z, "out.0.z", 2e-6);
    }
    free(x), free(cw);
    esp_st_close(st);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_norm_cases), cmocka_unit_test(test_rope_cases),
                                     cmocka_unit_test(test_attention_cases), cmocka_unit_test(test_activation_cases),
                                     cmocka_unit_test(test_cross_entropy_cases)};
  return cmocka_run_group_tests_name("published cases", tests, check_setup, check_teardown);
}
