/* k_norm.h: RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450), the residual addition fused into the forward
 * pass (kernel bodies). The row stays in L1 between the passes over it. */

INLINE void norm_row(const esp_norm_args *a, int64_t r, int64_t n, const bool xb, const bool sb, const bool rb,
                     const bool yb) {
  const void *x = esp_row(&a->x, r);
  bool in_b = xb;
  vf s0 = vset(0), s1 = vset(0);
  if (a->residual.data) {
    const void *res = esp_row(&a->residual, r);
    void *out = esp_row(&a->r_out, r);
    VEC_LOOP(i, n) {
      /* statistics of the rounded sum: what backward will read */
      vf v = vrounded(ldt(x, i, xb, left) + ldt(res, i, sb, left), rb);
      stt(out, i, rb, v, left);
      s0 += v;
      s1 = vfma(v, v, s1);
    }
    x = out;
    in_b = rb;
  } else {
    VEC_LOOP(i, n) {
      vf v = ldt(x, i, xb, left);
      s0 += v;
      s1 = vfma(v, v, s1);
    }
  }
  float mean = 0, var;
  if (a->kind == ESP_NORM_LAYER) {
    mean = vhsum(s0) / (float)n;
    vf m = vset(mean), q = vset(0);
    int64_t whole = n / VL * VL;
    VEC_LOOP(i, whole) {
      vf v = ldt(x, i, in_b, VL) - m;
      q = vfma(v, v, q);
    }
    var = vhsum(q);
    for (int64_t i = whole; i < n; i++) {
      float v = (in_b ? esp_bf16_to_f32(((const uint16_t *)x)[i]) : ((const float *)x)[i]) - mean;
      var += v * v;
    }
    var /= (float)n;
  } else {
    var = vhsum(s1) / (float)n;
  }
  float rstd = 1.0f / sqrtf(var + a->eps);
  if (a->rstd) a->rstd[r] = rstd;
  if (a->mean) a->mean[r] = mean;
  void *y = esp_row(&a->y, r);
  const bool wb = esp_is_b(&a->w), bb = esp_is_b(&a->b);
  vf m = vset(mean), k = vset(rstd), off = vset(a->offset);
  VEC_LOOP(i, n) {
    vf v = (ldt(x, i, in_b, left) - m) * k * (ldt(a->w.data, i, wb, left) + off);
    if (a->b.data) v += ldt(a->b.data, i, bb, left);
    stt(y, i, yb, v, left);
  }
}
static void k_norm(const esp_norm_args *a, int64_t r0, int64_t r1) {
  int64_t n = esp_tensor_cols(&a->x);
  bool res = a->residual.data != NULL;
  bool xb = esp_is_b(&a->x), sb = res ? esp_is_b(&a->residual) : xb, rb = res ? esp_is_b(&a->r_out) : xb;
  bool yb = esp_is_b(&a->y);
  if (xb && sb && rb && yb)
    for (int64_t r = r0; r < r1; r++) norm_row(a, r, n, true, true, true, true);
  else if (!xb && !sb && !rb && !yb)
    for (int64_t r = r0; r < r1; r++) norm_row(a, r, n, false, false, false, false);
  else
    for (int64_t r = r0; r < r1; r++) norm_row(a, r, n, xb, sb, rb, yb);
}

/* With g = dy (w + offset) and z = (r - mean) rstd:  dx = rstd (g - mean(g) [LAYER] - z mean(g z)). */
INLINE void norm_bwd_row(const esp_norm_bwd_args *a, int64_t r, int64_t n, const bool rb, const bool gb,
                         const bool xb) {
  const void *x = esp_row(&a->r, r), *dy = esp_row(&a->dy, r);
  void *dx = esp_row(&a->dx, r);
  const bool wb = esp_is_b(&a->w);
  float rstd = a->rstd[r], mean = a->kind == ESP_NORM_LAYER ? a->mean[r] : 0;
  vf m = vset(mean), k = vset(rstd), off = vset(a->offset), s0 = vset(0), s1 = vset(0);
  VEC_LOOP(i, n) { /* lanes past the end add nothing: dy reads as 0 there */
    vf g = ldt(dy, i, gb, left) * (ldt(a->w.data, i, wb, left) + off);
    s0 += g;
    s1 = vfma(g, (ldt(x, i, rb, left) - m) * k, s1);
  }
  vf c0 = vset(a->kind == ESP_NORM_LAYER ? vhsum(s0) / (float)n : 0), c1 = vset(vhsum(s1) / (float)n);
  VEC_LOOP(i, n) {
    vf g = ldt(dy, i, gb, left) * (ldt(a->w.data, i, wb, left) + off);
    vf z = (ldt(x, i, rb, left) - m) * k;
    vf d = k * (g - c0 - z * c1);
    if (a->accumulate) d += ldt(dx, i, xb, left);
    stt(dx, i, xb, d, left);
  }
}
static void k_norm_bwd(const esp_norm_bwd_args *a, int64_t r0, int64_t r1) {
  int64_t n = esp_tensor_cols(&a->r);
  bool rb = esp_is_b(&a->r), gb = esp_is_b(&a->dy), xb = esp_is_b(&a->dx);
  if (rb && gb && xb)
    for (int64_t r = r0; r < r1; r++) norm_bwd_row(a, r, n, true, true, true);
  else
    for (int64_t r = r0; r < r1; r++) norm_bwd_row(a, r, n, rb, gb, xb);
}
static void k_norm_bwd_cols(const esp_norm_bwd_args *a, int64_t c0, int64_t c1) {
  int64_t rows = esp_tensor_rows(&a->r);
  bool rb = esp_is_b(&a->r), gb = esp_is_b(&a->dy);
  for (int64_t c = c0; c < c1; c += VL) {
    int64_t left = c1 - c;
    vf dw = vset(0), db = vset(0);
    for (int64_t r = 0; r < rows; r++) {
      vf g = ldt(esp_row(&a->dy, r), c, gb, left);
      vf z = ldt(esp_row(&a->r, r), c, rb, left);
      if (a->kind == ESP_NORM_LAYER) z = z - vset(a->mean[r]);
      dw = vfma(g, z * vset(a->rstd[r]), dw);
      db += g;
    }
    if (a->dw) stt(a->dw, c, false, dw + ldt(a->dw, c, false, left), left);
    if (a->db) stt(a->db, c, false, db + ldt(a->db, c, false, left), left);
  }
}
