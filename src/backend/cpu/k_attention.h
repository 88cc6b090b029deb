/* k_attention.h: flash-style attention in fp32 registers for every storage type and level (kernel bodies; after
 * FlashAttention-2, arXiv 2307.08691).
 *
 * Scores are held transposed, S[keys, queries]: a register holds one key against VL queries, so maxima, sums and
 * rescaling run along lanes without any horizontal reduction, K and V are read in place as broadcast operands, and the
 * output is accumulated as O^T [head_dim, queries] and transposed once per block of queries. */

#define BQ ESP_ATTN_BQ
#define BK ESP_ATTN_BK
#if VL == 16
enum { MM_MR = 6, MM_NV = 4 };
#elif VL == 8
enum { MM_MR = 6, MM_NV = 2 };
#else
enum { MM_MR = 4, MM_NV = 2 };
#endif

INLINE void mm_tile(const int mr, int64_t kk, const float *a, int64_t rs, int64_t cs, const float *b, int64_t ldb,
                    float *c, int64_t ldc, const bool add) {
  vf acc[MM_MR][MM_NV];
  for (int i = 0; i < mr; i++)
    for (int j = 0; j < MM_NV; j++) acc[i][j] = add ? ld(c + i * ldc + j * VL) : vset(0);
  for (int64_t k = 0; k < kk; k++) {
    vf bv[MM_NV];
    for (int j = 0; j < MM_NV; j++) bv[j] = ld(b + k * ldb + j * VL);
    for (int i = 0; i < mr; i++) {
      vf av = vset(a[i * rs + k * cs]);
      for (int j = 0; j < MM_NV; j++) acc[i][j] = vfma(av, bv[j], acc[i][j]);
    }
  }
  for (int i = 0; i < mr; i++)
    for (int j = 0; j < MM_NV; j++) st(c + i * ldc + j * VL, acc[i][j]);
}

/* c[m, n] (+)= a[m, k] b[k, n]; a by strides (rs, cs); n a multiple of 64. */
INLINE void mm_body(int64_t m, int64_t n, int64_t kk, const float *a, int64_t rs, int64_t cs, const float *b,
                    int64_t ldb, float *c, int64_t ldc, const bool add) {
  for (int64_t j = 0; j < n; j += MM_NV * VL) {
    int64_t i = 0;
    for (; i + MM_MR <= m; i += MM_MR) mm_tile(MM_MR, kk, a + i * rs, rs, cs, b + j, ldb, c + i * ldc + j, ldc, add);
    for (; i + 2 <= m; i += 2) mm_tile(2, kk, a + i * rs, rs, cs, b + j, ldb, c + i * ldc + j, ldc, add);
    if (i < m) mm_tile(1, kk, a + i * rs, rs, cs, b + j, ldb, c + i * ldc + j, ldc, add);
  }
}
static void mm_set(int64_t m, int64_t n, int64_t kk, const float *a, int64_t rs, int64_t cs, const float *b,
                   int64_t ldb, float *c, int64_t ldc) {
  mm_body(m, n, kk, a, rs, cs, b, ldb, c, ldc, false);
}
static void mm_add(int64_t m, int64_t n, int64_t kk, const float *a, int64_t rs, int64_t cs, const float *b,
                   int64_t ldb, float *c, int64_t ldc) {
  mm_body(m, n, kk, a, rs, cs, b, ldb, c, ldc, true);
}

/* One head's rows [t, t+n) as fp32 [n, d] with row stride dp, columns past d zero. */
static void load_head(float *out, int64_t dp, const esp_tensor *x, int64_t t, int64_t n, int64_t col, int64_t d) {
  bool b = esp_is_b(x);
  for (int64_t r = 0; r < n; r++) {
    const char *src = (const char *)esp_row(x, t + r) + (size_t)col * (b ? 2 : 4);
    float *o = out + r * dp;
    VEC_LOOP(i, d) st(o + i, ldt(src, i, b, left)); /* masked loads give the zeros up to the next register */
    for (int64_t i = (d + VL - 1) / VL * VL; i < dp; i++) o[i] = 0;
  }
}
/* [n, d] -> [d, BQ], columns past n zero, times scale */
static void transpose_head(float *out, const float *in, int64_t dp, int64_t n, int64_t d, float scale) {
  for (int64_t i = 0; i < d; i++) {
    float *o = out + i * BQ;
    for (int64_t r = 0; r < n; r++) o[r] = in[r * dp + i] * scale;
    for (int64_t r = n; r < BQ; r++) o[r] = 0;
  }
}
static void store_head(const esp_tensor *x, int64_t t, int64_t col, const float *row, int64_t d) {
  bool b = esp_is_b(x);
  char *dst = (char *)esp_row(x, t) + (size_t)col * (b ? 2 : 4);
  VEC_LOOP(i, d) stt(dst, i, b, ldt(row, i, false, left), left);
}

INLINE vi lane_index(void) {
  vi v;
  for (int i = 0; i < VL; i++) v[i] = i;
  return v;
}
/* Masks S[nk, BQ] where key k0+row is hidden from query q0+lane: `hidden` replaces it. */
static void mask_block(const esp_attn_args *a, float *s, int64_t q0, int64_t nq, int64_t k0, int64_t nk, float hidden) {
  bool causal = a->causal && k0 + nk - 1 > q0;
  bool window = a->window > 0 && k0 <= q0 + nq - 1 - a->window;
  if (!causal && !window) return;
  vi lanes = lane_index(), hid = (vi)vset(hidden);
  for (int64_t k = 0; k < nk; k++) {
    int32_t j = (int32_t)(k0 + k);
    for (int64_t g = 0; g < BQ; g += VL) {
      vi i = lanes + (int32_t)(q0 + g);
      vi see = lanes >= 0;
      if (causal) see &= i >= j;
      if (window) see &= i - a->window < j;
      st(s + k * BQ + g, (vf)((see & (vi)ld(s + k * BQ + g)) | (~see & hid)));
    }
  }
}
INLINE int64_t first_key(const esp_attn_args *a, int64_t q0) {
  int64_t k = a->window > 0 ? q0 - a->window + 1 : 0;
  return k > 0 ? k / BK * BK : 0;
}

static void k_attn(const esp_attn_part *p) {
  const esp_attn_args *a = p->a;
  const int64_t d = a->head_dim, dp = esp_attn_dp(a->head_dim);
  const int kvh = p->head / (a->heads / a->kv_heads);
  const int64_t nq = p->len - p->q0 < BQ ? p->len - p->q0 : BQ;
  float *qt = p->scratch, *ot = qt + dp * BQ, *kb = ot + dp * BQ, *vb = kb + BK * dp, *s = vb + BK * dp;
  float m[BQ], l[BQ], c[BQ];
  load_head(kb, dp, &a->q, p->t0 + p->q0, nq, p->head * d, d);
  transpose_head(qt, kb, dp, nq, d, a->scale);
  memset(ot, 0, (size_t)(d * BQ) * 4);
  for (int i = 0; i < BQ; i++) m[i] = -1e30f, l[i] = 0; /* finite: a fully hidden block leaves no NaN */
  int64_t end = a->causal ? p->q0 + nq : p->len;
  for (int64_t k0 = first_key(a, p->q0); k0 < end; k0 += BK) {
    int64_t nk = end - k0 < BK ? end - k0 : BK;
    load_head(kb, dp, &a->k, p->t0 + k0, nk, kvh * d, d);
    load_head(vb, dp, &a->v, p->t0 + k0, nk, kvh * d, d);
    mm_set(nk, BQ, d, kb, dp, 1, qt, BQ, s, BQ);
    if (a->softcap > 0)
      for (int64_t i = 0; i < nk * BQ; i += VL) st(s + i, capped(ld(s + i), a->softcap));
    mask_block(a, s, p->q0, nq, k0, nk, -INFINITY);
    for (int g = 0; g < BQ; g += VL) {
      vf old = ld(m + g), top = old;
      for (int64_t k = 0; k < nk; k++) top = vmax(top, ld(s + k * BQ + g));
      vf sum = vset(0);
      for (int64_t k = 0; k < nk; k++) {
        vf e = vexp(ld(s + k * BQ + g) - top);
        sum += e;
        st(s + k * BQ + g, e);
      }
      vf corr = vexp(old - top);
      st(m + g, top);
      st(l + g, vfma(ld(l + g), corr, sum));
      st(c + g, corr);
    }
    for (int64_t i = 0; i < d; i++)
      for (int g = 0; g < BQ; g += VL) st(ot + i * BQ + g, ld(ot + i * BQ + g) * ld(c + g));
    mm_add(d, BQ, nk, vb, 1, dp, s, BQ, ot, BQ);
  }
  for (int64_t r = 0; r < nq; r++) {
    float inv = 1.0f / l[r], *row = kb;
    for (int64_t i = 0; i < d; i++) row[i] = ot[i * BQ + r] * inv;
    int64_t t = p->t0 + p->q0 + r;
    store_head(&a->o, t, p->head * d, row, d);
    if (a->lse) a->lse[(int64_t)p->head * esp_tensor_rows(&a->q) + t] = m[r] + logf(l[r]);
  }
}

/* dS = P (dP - delta) scale, delta = rowsum(dO O); dV = P^T dO, dK = dS^T Q, dQ = dS K; P from the saved lse. */
static void k_attn_bwd(const esp_attn_part *p) {
  const esp_attn_args *a = p->a;
  const int64_t d = a->head_dim, dp = esp_attn_dp(a->head_dim), len = p->len, blocks = (len + BQ - 1) / BQ;
  const int kvh = p->head / (a->heads / a->kv_heads);
  const float *lse = a->lse + (int64_t)p->head * esp_tensor_rows(&a->q) + p->t0;
  float *q = p->scratch, *go = q + BQ * dp, *qt = go + BQ * dp, *gt = qt + dp * BQ, *kb = gt + dp * BQ;
  float *vb = kb + BK * dp, *dk = vb + BK * dp, *dv = dk + BK * dp, *s = dv + BK * dp, *ds = s + BK * BQ;
  float *dqt = ds + BK * BQ, *delta = dqt + blocks * dp * BQ;
  memset(dqt, 0, (size_t)(blocks * dp * BQ) * 4);
  for (int64_t b = 0; b < blocks; b++) {
    int64_t q0 = b * BQ, nq = len - q0 < BQ ? len - q0 : BQ;
    load_head(q, dp, &a->o, p->t0 + q0, nq, p->head * d, d);
    load_head(go, dp, &a->d_o, p->t0 + q0, nq, p->head * d, d);
    for (int64_t r = 0; r < BQ; r++) {
      vf sum = vset(0);
      if (r < nq)
        for (int64_t i = 0; i < dp; i += VL) sum = vfma(ld(q + r * dp + i), ld(go + r * dp + i), sum);
      delta[q0 + r] = vhsum(sum);
    }
  }
  for (int64_t k0 = 0; k0 < len; k0 += BK) {
    int64_t nk = len - k0 < BK ? len - k0 : BK;
    load_head(kb, dp, &a->k, p->t0 + k0, nk, kvh * d, d);
    load_head(vb, dp, &a->v, p->t0 + k0, nk, kvh * d, d);
    memset(dk, 0, (size_t)(2 * BK * dp) * 4);
    int64_t stop = len;
    if (a->window > 0 && k0 + nk - 1 + a->window < len) stop = k0 + nk - 1 + a->window;
    for (int64_t q0 = a->causal ? k0 : 0; q0 < stop; q0 += BQ) {
      int64_t nq = len - q0 < BQ ? len - q0 : BQ;
      load_head(q, dp, &a->q, p->t0 + q0, nq, p->head * d, d);
      load_head(go, dp, &a->d_o, p->t0 + q0, nq, p->head * d, d);
      transpose_head(qt, q, dp, nq, d, a->scale);
      transpose_head(gt, go, dp, nq, d, 1.0f);
      mm_set(nk, BQ, d, kb, dp, 1, qt, BQ, s, BQ);
      mm_set(nk, BQ, d, vb, dp, 1, gt, BQ, ds, BQ);
      float row_lse[BQ], row_delta[BQ];
      for (int64_t r = 0; r < BQ; r++) row_lse[r] = r < nq ? lse[q0 + r] : 0, row_delta[r] = delta[q0 + r];
      float *slope = NULL;
      if (a->softcap > 0) { /* d capped/d s = 1 - (capped/cap)^2, applied to dP - delta */
        for (int64_t i = 0; i < nk * BQ; i += VL) st(s + i, capped(ld(s + i), a->softcap));
        slope = s;
      }
      for (int64_t k = 0; k < nk; k++)
        for (int g = 0; g < BQ; g += VL) {
          vf x = (ld(ds + k * BQ + g) - ld(row_delta + g)) * vset(a->scale);
          if (slope) {
            vf t = ld(slope + k * BQ + g) / vset(a->softcap);
            x = x * (vset(1.0f) - t * t);
          }
          st(ds + k * BQ + g, x);
        }
      mask_block(a, s, q0, nq, k0, nk, -INFINITY);
      for (int64_t k = 0; k < nk; k++)
        for (int g = 0; g < BQ; g += VL) {
          vf e = vexp(ld(s + k * BQ + g) - ld(row_lse + g));
          st(s + k * BQ + g, e);
          st(ds + k * BQ + g, e * ld(ds + k * BQ + g));
        }
      mm_add(nk, dp, nq, s, BQ, 1, go, dp, dv, dp);
      mm_add(nk, dp, nq, ds, BQ, 1, q, dp, dk, dp);
      mm_add(d, BQ, nk, kb, 1, dp, ds, BQ, dqt + q0 / BQ * dp * BQ, BQ);
    }
    for (int64_t k = 0; k < nk; k++) {
      memcpy(p->dk + (k0 + k) * d, dk + k * dp, (size_t)d * 4);
      memcpy(p->dv + (k0 + k) * d, dv + k * dp, (size_t)d * 4);
    }
  }
  for (int64_t t = 0; t < len; t++) {
    const float *src = dqt + t / BQ * dp * BQ + t % BQ;
    for (int64_t i = 0; i < d; i++) q[i] = src[i * BQ];
    store_head(&a->d_q, p->t0 + t, p->head * d, q, d);
  }
}

static void k_attn_decode(const esp_decode_args *a, int64_t b, int head, float *scores) {
  const int64_t d = a->head_dim, len = a->positions[b] + 1;
  const int kvh = head / (a->heads / a->kv_heads);
  const bool qb = esp_is_b(&a->q), kb = esp_is_b(&a->k_cache), vb = esp_is_b(&a->v_cache), ob = esp_is_b(&a->o);
  const char *q = (const char *)esp_row(&a->q, b) + (size_t)(head * d) * (qb ? 2 : 4);
  int64_t lo = a->window > 0 && len > a->window ? len - a->window : 0;
  float top = -INFINITY;
  for (int64_t j = lo; j < len; j++) {
    const char *k = (const char *)esp_row(&a->k_cache, b * a->max_len + j) + (size_t)(kvh * d) * (kb ? 2 : 4);
    vf s = vset(0);
    VEC_LOOP(i, d) s = vfma(ldt(q, i, qb, left), ldt(k, i, kb, left), s);
    float x = vhsum(s) * a->scale;
    if (a->softcap > 0) x = a->softcap * tanhf(x / a->softcap);
    scores[j] = x;
    if (x > top) top = x;
  }
  vf sum = vset(0);
  VEC_LOOP(i, len - lo) {
    vf e = vexp(ldt(scores + lo, i, false, left) - vset(top));
    if (left < VL) {
      float t[VL];
      st(t, e);
      for (int z = (int)left; z < VL; z++) t[z] = 0;
      e = ld(t);
    }
    sum += e;
    stt(scores + lo, i, false, e, left);
  }
  vf inv = vset(1.0f / vhsum(sum));
  char *o = (char *)esp_row(&a->o, b) + (size_t)(head * d) * (ob ? 2 : 4);
  VEC_LOOP(i, d) {
    vf acc = vset(0);
    for (int64_t j = lo; j < len; j++) {
      const char *v = (const char *)esp_row(&a->v_cache, b * a->max_len + j) + (size_t)(kvh * d) * (vb ? 2 : 4);
      acc = vfma(vset(scores[j]), ldt(v, i, vb, left), acc);
    }
    stt(o, i, ob, acc * inv, left);
  }
}
