/* k_glu.h: activations, plain and gated, forward beside backward (kernel bodies). */

/* act(x) and act'(x) */
INLINE vf act_value(vf x, const esp_act act) {
  switch (act) {
  case ESP_ACT_SILU:
    return x * vsigmoid(x);
  case ESP_ACT_GELU_TANH: /* 0.5 (1 + tanh z) == sigmoid(2 z) */
    return x * vsigmoid(vset(1.5957691216057308f) * vfma(x * x * x, vset(0.044715f), x));
  case ESP_ACT_GELU_ERF:
    return x * vphi(x);
  case ESP_ACT_TANH:
    return vtanh(x);
  default:
    return vmax(vset(0.0f), x);
  }
}
INLINE vf act_slope(vf x, const esp_act act, vf *value) {
  switch (act) {
  case ESP_ACT_SILU: {
    vf s = vsigmoid(x);
    *value = x * s;
    return s * (vset(1.0f) + x * (vset(1.0f) - s));
  }
  case ESP_ACT_GELU_TANH: {
    vf s = vsigmoid(vset(1.5957691216057308f) * vfma(x * x * x, vset(0.044715f), x));
    *value = x * s;
    vf dz = vset(1.5957691216057308f) * vfma(x * x, vset(3 * 0.044715f), vset(1.0f));
    return s + x * s * (vset(1.0f) - s) * dz;
  }
  case ESP_ACT_GELU_ERF: {
    vf c = vphi(x);
    *value = x * c;
    return c + x * vset(0.3989422804014327f) * vexp(vset(-0.5f) * x * x);
  }
  case ESP_ACT_TANH:
    *value = vtanh(x);
    return vset(4.0f) * vsigmoid(x + x) * vsigmoid(-x - x); /* 1 - tanh^2 without cancellation */
  default:
    *value = vmax(vset(0.0f), x);
    return vsel_lt(vset(0.0f), x, vset(1.0f), vset(0.0f));
  }
}

#define BY_ACT(BODY, act)                                                                                              \
  do {                                                                                                                 \
    switch (act) {                                                                                                     \
    case ESP_ACT_SILU:                                                                                                 \
      BODY(ESP_ACT_SILU);                                                                                              \
      break;                                                                                                           \
    case ESP_ACT_GELU_TANH:                                                                                            \
      BODY(ESP_ACT_GELU_TANH);                                                                                         \
      break;                                                                                                           \
    case ESP_ACT_GELU_ERF:                                                                                             \
      BODY(ESP_ACT_GELU_ERF);                                                                                          \
      break;                                                                                                           \
    case ESP_ACT_TANH:                                                                                                 \
      BODY(ESP_ACT_TANH);                                                                                              \
      break;                                                                                                           \
    default:                                                                                                           \
      BODY(ESP_ACT_RELU);                                                                                              \
      break;                                                                                                           \
    }                                                                                                                  \
  } while (0)

INLINE void act_row(void *y, bool yb, const void *x, bool xb, int64_t n, const esp_act act) {
  VEC_LOOP(i, n) stt(y, i, yb, act_value(ldt(x, i, xb, left), act), left);
}
static void k_act(esp_tensor y, esp_tensor x, esp_act act, int64_t r0, int64_t r1) {
  int64_t n = esp_tensor_cols(&y);
  bool yb = esp_is_b(&y), xb = esp_is_b(&x);
  for (int64_t r = r0; r < r1; r++) {
    void *yr = esp_row(&y, r), *xr = esp_row(&x, r);
#define BODY(A) act_row(yr, yb, xr, xb, n, A)
    BY_ACT(BODY, act);
#undef BODY
  }
}
INLINE void act_bwd_row(void *dx, bool dxb, const void *dy, bool dyb, const void *x, bool xb, int64_t n,
                        const esp_act act) {
  VEC_LOOP(i, n) {
    vf value, slope = act_slope(ldt(x, i, xb, left), act, &value);
    stt(dx, i, dxb, slope * ldt(dy, i, dyb, left), left);
  }
}
static void k_act_bwd(esp_tensor dx, esp_tensor dy, esp_tensor x, esp_act act, int64_t r0, int64_t r1) {
  int64_t n = esp_tensor_cols(&x);
  bool b0 = esp_is_b(&dx), b1 = esp_is_b(&dy), b2 = esp_is_b(&x);
  for (int64_t r = r0; r < r1; r++) {
    void *dxr = esp_row(&dx, r), *dyr = esp_row(&dy, r), *xr = esp_row(&x, r);
#define BODY(A) act_bwd_row(dxr, b0, dyr, b1, xr, b2, n, A)
    BY_ACT(BODY, act);
#undef BODY
  }
}

/* h = act(g) * u with gu = [g | u] */
INLINE void glu_row(void *h, bool hb, const void *gu, bool gb, int64_t n, const esp_act act) {
  VEC_LOOP(i, n) stt(h, i, hb, act_value(ldt(gu, i, gb, left), act) * ldt(gu, n + i, gb, left), left);
}
static void k_glu(esp_tensor h, esp_tensor gu, esp_act act, int64_t r0, int64_t r1) {
  int64_t n = esp_tensor_cols(&h);
  bool hb = esp_is_b(&h), gb = esp_is_b(&gu);
  for (int64_t r = r0; r < r1; r++) {
    void *hr = esp_row(&h, r), *gr = esp_row(&gu, r);
#define BODY(A)                                                                                                        \
  if (hb && gb)                                                                                                        \
    glu_row(hr, true, gr, true, n, A);                                                                                 \
  else                                                                                                                 \
    glu_row(hr, hb, gr, gb, n, A)
    BY_ACT(BODY, act);
#undef BODY
  }
}
INLINE void glu_bwd_row(void *dgu, bool db, const void *dh, bool hb, const void *gu, bool gb, int64_t n,
                        const esp_act act) {
  VEC_LOOP(i, n) {
    vf g = ldt(gu, i, gb, left), u = ldt(gu, n + i, gb, left), d = ldt(dh, i, hb, left);
    vf value, slope = act_slope(g, act, &value);
    stt(dgu, i, db, d * u * slope, left);
    stt(dgu, n + i, db, d * value, left);
  }
}
static void k_glu_bwd(esp_tensor dgu, esp_tensor dh, esp_tensor gu, esp_act act, int64_t r0, int64_t r1) {
  int64_t n = esp_tensor_cols(&dh);
  bool db = esp_is_b(&dgu), hb = esp_is_b(&dh), gb = esp_is_b(&gu);
  for (int64_t r = r0; r < r1; r++) {
    void *dr = esp_row(&dgu, r), *hr = esp_row(&dh, r), *gr = esp_row(&gu, r);
#define BODY(A)                                                                                                        \
  if (db && hb && gb)                                                                                                  \
    glu_bwd_row(dr, true, hr, true, gr, true, n, A);                                                                   \
  else                                                                                                                 \
    glu_bwd_row(dr, db, hr, hb, gr, gb, n, A)
    BY_ACT(BODY, act);
#undef BODY
  }
}
