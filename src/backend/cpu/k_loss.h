/* k_loss.h: softmax cross-entropy of one row of fp32 logits (kernel body). The row is read once from memory for the
 * maximum and the sum (online softmax over blocks that stay in L1, Milakov and Gimelshein, arXiv 1805.02867) and once
 * more, from L2, for the gradient. */

INLINE vf capped(vf x, float cap) {
  return cap > 0 ? vset(cap) * vtanh(x / vset(cap)) : x;
}

INLINE double ce_row(const esp_ce_args *a, int64_t r, const float cap, double *hit) {
  enum { BLOCK = 1024 };
  const float *x = esp_row(&a->logits, r);
  int64_t n = esp_tensor_cols(&a->logits);
  float best = -INFINITY; /* of the capped logits */
  double sum = 0;
  int64_t best_block = 0;
  for (int64_t b = 0; b < n; b += BLOCK) {
    int64_t m = n - b < BLOCK ? n - b : BLOCK, whole = m / VL * VL;
    float tail[VL];
    for (int i = 0; i < VL; i++) tail[i] = i < m - whole ? x[b + whole + i] : -INFINITY;
    vf top = capped(ld(tail), cap);
    for (int64_t i = 0; i < whole; i += VL) top = vmax(top, capped(ld(x + b + i), cap));
    float t = vhmax(top);
    if (t > best) {
      sum *= exp((double)best - (double)t); /* 0 at first */
      best = t;
      best_block = b;
    }
    vf k = vset(best), s = m > whole ? vexp(capped(ld(tail), cap) - k) : vset(0);
    if (m > whole) { /* a capped -inf is -cap: lanes past the end must not count */
      float e[VL];
      st(e, s);
      for (int i = (int)(m - whole); i < VL; i++) e[i] = 0;
      s = ld(e);
    }
    for (int64_t i = 0; i < whole; i += VL) s += vexp(capped(ld(x + b + i), cap) - k);
    sum += (double)vhsum(s);
  }
  float xt = x[a->targets[r]];
  if (cap > 0) xt = cap * tanhf(xt / cap);
  double lse = (double)best + log(sum), nll = lse - (double)xt;
  if (a->logprob) a->logprob[r] = (float)-nll;
  /* the first maximum lies in the first block that reached it; a cap makes ties of what it saturates: read all */
  int64_t i0 = cap > 0 ? 0 : best_block, end = cap > 0 || i0 + BLOCK > n ? n : i0 + BLOCK, at = i0;
  for (int64_t j = i0 + 1; j < end; j++)
    if (x[j] > x[at]) at = j;
  *hit = at == a->targets[r];
  if (a->d.data) {
    void *d = esp_row(&a->d, r);
    bool db = esp_is_b(&a->d);
    float w = a->scale * a->weights[r];
    vf l = vset((float)lse), vw = vset(w);
    VEC_LOOP(i, n) {
      vf raw = ldt(x, i, false, left), z = capped(raw, cap);
      vf g = vw * vexp(z - l);
      if (cap > 0) {
        vf t = z / vset(cap);
        g = g * (vset(1.0f) - t * t);
      }
      stt(d, i, db, g, left);
    }
    /* the one-hot term, from the probability again so that the difference is rounded once */
    double p = exp((double)xt - lse), slope = 1;
    if (cap > 0) slope = 1 - ((double)xt / cap) * ((double)xt / cap);
    float g = (float)((double)w * (p - 1) * slope);
    if (db)
      ((uint16_t *)d)[a->targets[r]] = esp_f32_to_bf16(g);
    else
      ((float *)d)[a->targets[r]] = g;
  }
  return (double)a->weights[r] * nll;
}
static double k_cross_entropy(const esp_ce_args *a, int64_t r, double *hit) {
  return a->softcap > 0 ? ce_row(a, r, a->softcap, hit) : ce_row(a, r, 0.0f, hit);
}
