/* test_backend_attention.c: flash attention forward, backward and decoding against an fp64 softmax over the full
 * score matrix, on every instruction set, packed sequences, GQA, sliding window, soft-cap, odd sizes.
 * Seen to catch: the window's bound off by one (`i - a->window <= j` in mask_block). */
#include "ops/ops_check.h"

typedef struct attn_case {
  int heads, kv_heads, d;
  int lens[4]; /* 0 ends */
  bool causal;
  int window;
  float softcap;
  int gap;
} attn_case;

static const attn_case cases[] = {
    {1, 1, 1, {1}, true, 0, 0, 0},
    {2, 1, 8, {5, 1, 9}, true, 0, 0, 3},
    {3, 3, 7, {17}, false, 0, 0, 0},
    {4, 2, 16, {70, 3}, true, 0, 0, 5},
    {3, 1, 64, {130, 64}, true, 0, 0, 0},
    {9, 3, 64, {33, 64, 65}, true, 0, 0, 32},
    {2, 2, 64, {129}, false, 0, 0, 0},
    {2, 1, 32, {150}, true, 1, 0, 0},
    {2, 1, 64, {200}, true, 70, 0, 0},
    {2, 1, 24, {100}, true, 13, 0, 1},
    {2, 1, 64, {90, 40}, true, 0, 5.0f, 0},
    {1, 1, 80, {67}, true, 20, 2.0f, 0},
    {2, 1, 128, {97}, true, 0, 0, 0},
    {1, 1, 32, {1030}, true, 0, 0, 0}, /* several runs of queries */
    {1, 1, 32, {600}, true, 100, 0, 0},
    {1, 1, 32, {530}, false, 0, 0, 0},
    {1, 1, 33, {66, 1, 1}, false, 0, 3.0f, 0},
    /* rows that begin at multiples of 16 bytes: cuDNN takes these; the second in two groups of length */
    {6, 2, 16, {33, 9, 1, 20}, true, 0, 0, 8},
    {2, 1, 16, {130, 3, 5, 2}, true, 9, 0, 16},
    {3, 3, 32, {40, 17}, false, 0, 0, 0},
};

typedef struct attn_test {
  const attn_case *c;
  int64_t tokens;
  int32_t cu[5];
  int n_seqs;
  float scale;
  buf q, k, v, o, go, dq, dk, dv;
  float *lse;
  double *out, *out_lse, *ref_dq, *ref_dk, *ref_dv; /* of the reference */
} attn_test;

static double score(const attn_test *t, int64_t i, int64_t j, int h) {
  const attn_case *c = t->c;
  int g = h / (c->heads / c->kv_heads);
  double s = 0;
  for (int e = 0; e < c->d; e++)
    s += t->q.v[i * c->heads * c->d + h * c->d + e] * t->k.v[j * c->kv_heads * c->d + g * c->d + e];
  s *= t->scale;
  return c->softcap > 0 ? c->softcap * tanh(s / c->softcap) : s;
}

static void reference(attn_test *t) {
  const attn_case *c = t->c;
  double p[2048];
  for (int s = 0; s < t->n_seqs; s++)
    for (int64_t i = t->cu[s]; i < t->cu[s + 1]; i++)
      for (int h = 0; h < c->heads; h++) {
        int g = h / (c->heads / c->kv_heads);
        int64_t lo = t->cu[s], hi = c->causal ? i + 1 : t->cu[s + 1];
        if (c->window > 0 && i - c->window + 1 > lo) lo = i - c->window + 1;
        double top = -1e300, sum = 0;
        for (int64_t j = lo; j < hi; j++) {
          p[j - lo] = score(t, i, j, h);
          if (p[j - lo] > top) top = p[j - lo];
        }
        for (int64_t j = lo; j < hi; j++) sum += p[j - lo] = exp(p[j - lo] - top);
        t->out_lse[h * t->tokens + i] = top + log(sum);
        for (int e = 0; e < c->d; e++) {
          double o = 0;
          for (int64_t j = lo; j < hi; j++) o += p[j - lo] * t->v.v[j * c->kv_heads * c->d + g * c->d + e];
          t->out[i * c->heads * c->d + h * c->d + e] = o / sum;
        }
      }
}
static double loss(void *ctx) {
  attn_test *t = ctx;
  reference(t);
  double l = 0;
  for (int64_t i = 0; i < buf_n(&t->o); i++) l += t->out[i] * t->go.v[i];
  return l;
}
/* The gradients of `loss`, written out in fp64; the small cases hold this itself to finite differences. */
static void reference_bwd(attn_test *t) {
  const attn_case *c = t->c;
  int64_t w = c->heads * c->d, kw = c->kv_heads * c->d;
  memset(t->ref_dq, 0, (size_t)(t->tokens * w) * 8);
  memset(t->ref_dk, 0, (size_t)(t->tokens * kw) * 8);
  memset(t->ref_dv, 0, (size_t)(t->tokens * kw) * 8);
  for (int s = 0; s < t->n_seqs; s++)
    for (int64_t i = t->cu[s]; i < t->cu[s + 1]; i++)
      for (int h = 0; h < c->heads; h++) {
        int64_t g = h / (c->heads / c->kv_heads) * c->d, qi = i * w + h * c->d;
        int64_t lo = t->cu[s], hi = c->causal ? i + 1 : t->cu[s + 1];
        if (c->window > 0 && i - c->window + 1 > lo) lo = i - c->window + 1;
        double delta = 0;
        for (int e = 0; e < c->d; e++) delta += t->out[qi + e] * t->go.v[qi + e];
        for (int64_t j = lo; j < hi; j++) {
          double sc = score(t, i, j, h), p = exp(sc - t->out_lse[h * t->tokens + i]), dp = 0;
          for (int e = 0; e < c->d; e++) dp += t->go.v[qi + e] * t->v.v[j * kw + g + e];
          double ds = p * (dp - delta) * t->scale;
          if (c->softcap > 0) ds *= 1 - sc / c->softcap * (sc / c->softcap);
          for (int e = 0; e < c->d; e++) {
            t->ref_dv[j * kw + g + e] += p * t->go.v[qi + e];
            t->ref_dk[j * kw + g + e] += ds * t->q.v[qi + e];
            t->ref_dq[qi + e] += ds * t->k.v[j * kw + g + e];
          }
        }
      }
}
static void check_reference(attn_test *t) {
  struct {
    buf *x;
    double *g;
  } all[] = {{&t->q, t->ref_dq}, {&t->k, t->ref_dk}, {&t->v, t->ref_dv}};
  for (int b = 0; b < 3; b++)
    for (int s = 0; s < 12; s++) {
      int64_t i = check_below(buf_n(all[b].x));
      check_close("reference gradient", all[b].g[i], check_slope(loss, t, &all[b].x->v[i]), 1e-6, 1);
    }
}
static esp_attn_args args(attn_test *t) {
  return (esp_attn_args){.q = t->q.t,
                         .k = t->k.t,
                         .v = t->v.t,
                         .o = t->o.t,
                         .lse = t->lse,
                         .cu_seqlens = t->cu,
                         .n_seqs = t->n_seqs,
                         .heads = t->c->heads,
                         .kv_heads = t->c->kv_heads,
                         .head_dim = t->c->d,
                         .scale = t->scale,
                         .softcap = t->c->softcap,
                         .window = t->c->window,
                         .causal = t->c->causal,
                         .d_o = t->go.t,
                         .d_q = t->dq.t,
                         .d_k = t->dk.t,
                         .d_v = t->dv.t};
}
static void run_fwd(void *ctx) {
  esp_attn_args a = args(ctx);
  check_be->ops->attn_begin(check_be, a.cu_seqlens, a.n_seqs);
  check_be->ops->attn(check_be, &a);
}
static void run_bwd(void *ctx) {
  esp_attn_args a = args(ctx);
  check_be->ops->attn_begin(check_be, a.cu_seqlens, a.n_seqs);
  check_be->ops->attn_bwd(check_be, &a);
}

static void setup(attn_test *t, const attn_case *c, esp_dtype type) {
  *t = (attn_test){.c = c, .scale = 1.0f / sqrtf((float)c->d)};
  for (int s = 0; s < 4 && c->lens[s]; s++) {
    t->tokens += c->lens[s];
    t->cu[++t->n_seqs] = (int32_t)t->tokens;
  }
  int64_t T = t->tokens, w = c->heads * c->d, kw = c->kv_heads * c->d;
  t->q = buf_new(type, T, w, c->gap, 1.2);
  t->k = buf_new(type, T, kw, c->gap, 1.2);
  t->v = buf_new(type, T, kw, 2 * c->gap, 1);
  t->o = buf_new(type, T, w, 0, 1);
  t->go = buf_new(type, T, w, 0, 1);
  t->dq = buf_new(type, T, w, c->gap, 1);
  t->dk = buf_new(type, T, kw, c->gap, 1);
  t->dv = buf_new(type, T, kw, c->gap, 1);
  t->lse = malloc((size_t)(T * c->heads) * sizeof *t->lse);
  t->out = malloc((size_t)(T * w) * sizeof *t->out);
  t->ref_dq = malloc((size_t)(T * w) * sizeof *t->ref_dq);
  t->ref_dk = malloc((size_t)(T * kw) * sizeof *t->ref_dk);
  t->ref_dv = malloc((size_t)(T * kw) * sizeof *t->ref_dv);
  t->out_lse = malloc((size_t)(T * c->heads) * sizeof *t->out_lse);
}
static void cleanup(attn_test *t) {
  buf *all[] = {&t->q, &t->k, &t->v, &t->o, &t->go, &t->dq, &t->dk, &t->dv};
  for (size_t i = 0; i < 8; i++) buf_free(all[i]);
  free(t->lse);
  double *refs[] = {t->out, t->out_lse, t->ref_dq, t->ref_dk, t->ref_dv};
  for (size_t i = 0; i < 5; i++) free(refs[i]);
}

static double cost(const attn_case *c) {
  double pairs = 0;
  for (int s = 0; s < 4; s++) pairs += (double)c->lens[s] * c->lens[s];
  return pairs * c->heads * c->d;
}

static void test_attention(void **state) {
  (void)state;
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) EACH_TYPE(type) {
      attn_test t;
      /* fibres: the cost of a pass is heads * sum of squared lengths * head size; a second or less below this bound */
      if (test_quick() && cost(&cases[i]) > 12e6) continue;
      esp_cpu_isa_set(ESP_ISA_PLAIN);
      setup(&t, &cases[i], type);
      reference(&t);
      reference_bwd(&t);
      if (t.tokens < 40) check_reference(&t);
      reference(&t); /* the differences moved its output */
      EACH_ISA {
        out_ref fwd[] = {{t.o.t.data, t.o.bytes}, {t.lse, (size_t)(t.tokens * t.c->heads) * 4}};
        check_threads(run_fwd, &t, fwd, 2);
        buf_close("attention", &t.o, t.out, type_tol(type, 2e-6), 1);
        /* a backend's order of log-sum-exps is its own; elsewhere the backward shows whether they are right */
        for (int64_t r = 0; r < t.tokens * t.c->heads && test_on_cpu(); r++)
          check_close("lse", t.lse[r], t.out_lse[r], 2e-6, 1);
        out_ref bwd[] = {{t.dq.t.data, t.dq.bytes}, {t.dk.t.data, t.dk.bytes}, {t.dv.t.data, t.dv.bytes}};
        check_threads(run_bwd, &t, bwd, 3);
        double tol = type_tol(type, 1e-5) * (type == ESP_BF16 ? 3 : 1); /* delta comes from the rounded output */
        buf_close("dq", &t.dq, t.ref_dq, tol, 1);
        buf_close("dk", &t.dk, t.ref_dk, tol, 1);
        buf_close("dv", &t.dv, t.ref_dv, tol, 1);
      }
      cleanup(&t);
    }
}

static void test_decode_equals_last_row(void **state) {
  (void)state;
  static const struct {
    int heads, kv_heads, d, window;
    float softcap;
    int lens[3];
  } rows[] = {{4, 2, 16, 0, 0, {1, 7, 30}}, {3, 1, 64, 5, 0, {30, 2, 5}}, {2, 2, 7, 0, 4.0f, {9, 16, 17}}};
  for (size_t c = 0; c < sizeof rows / sizeof *rows; c++) EACH_TYPE(type) EACH_ISA {
      const int B = 3, max_len = 31, H = rows[c].heads, K = rows[c].kv_heads, d = rows[c].d;
      buf q = buf_new(type, B, H * d, 2, 1), o = buf_new(type, B, H * d, 1, 1);
      buf k = buf_new(type, B * max_len, K * d, 0, 1), v = buf_new(type, B * max_len, K * d, 0, 1);
      int32_t lens[3], positions[3];
      for (int b = 0; b < B; b++) {
        lens[b] = rows[c].lens[b];
        positions[b] = lens[b] - 1;
      }
      esp_decode_args a = {.q = q.t,
                           .o = o.t,
                           .k_cache = k.t,
                           .v_cache = v.t,
                           .positions = positions,
                           .max_len = max_len,
                           .heads = H,
                           .kv_heads = K,
                           .head_dim = d,
                           .scale = 0.3f,
                           .softcap = rows[c].softcap,
                           .window = rows[c].window};
      check_be->ops->attn_decode(check_be, &a);
      for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++) {
          int g = h / (H / K), lo = rows[c].window && lens[b] > rows[c].window ? lens[b] - rows[c].window : 0;
          double sum = 0, out[64] = {0};
          for (int j = lo; j < lens[b]; j++) {
            double s = 0;
            for (int e = 0; e < d; e++) s += q.v[b * H * d + h * d + e] * k.v[(b * max_len + j) * K * d + g * d + e];
            s *= 0.3f;
            if (rows[c].softcap > 0) s = rows[c].softcap * tanh(s / rows[c].softcap);
            double p = exp(s);
            sum += p;
            for (int e = 0; e < d; e++) out[e] += p * v.v[(b * max_len + j) * K * d + g * d + e];
          }
          for (int e = 0; e < d; e++)
            check_close("decode", buf_load(&o, b * H * d + h * d + e), out[e] / sum, type_tol(type, 2e-6), 1);
        }
      buf_guard(&o);
      buf_free(&q), buf_free(&o), buf_free(&k), buf_free(&v);
    }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_attention), cmocka_unit_test(test_decode_equals_last_row)};
  return cmocka_run_group_tests_name("attention", tests, check_setup, check_teardown);
}
