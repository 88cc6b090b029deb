/* k_kinds.h: parts of adapter kinds: products by element and by row, their sums, Khatri-Rao products (kernel bodies).
 */

/* Element i of a row of either type. */
INLINE float at_t(const void *p, int64_t i, bool b) {
  return b ? esp_bf16_to_f32(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

/* Calls BODY(b0, b1, b2) with constant types where all three are the same, else with what they are. */
#define BY_TYPES3(BODY, t0, t1, t2)                                                                                    \
  do {                                                                                                                 \
    bool b0_ = esp_is_b(&(t0)), b1_ = esp_is_b(&(t1)), b2_ = esp_is_b(&(t2));                                          \
    if (b0_ && b1_ && b2_)                                                                                             \
      BODY(true, true, true);                                                                                          \
    else if (!b0_ && !b1_ && !b2_)                                                                                     \
      BODY(false, false, false);                                                                                       \
    else                                                                                                               \
      BODY(b0_, b1_, b2_);                                                                                             \
  } while (0)

INLINE void mul_elements(void *y, const bool yb, const void *a, const bool ab, const void *b, const bool bb, float beta,
                         int64_t n) {
  if (beta == 0) {
    VEC_LOOP(i, n) stt(y, i, yb, ldt(a, i, ab, left) * ldt(b, i, bb, left), left);
  } else {
    vf k = vset(beta);
    VEC_LOOP(i, n) stt(y, i, yb, vfma(ldt(a, i, ab, left), ldt(b, i, bb, left), k * ldt(y, i, yb, left)), left);
  }
}
static void k_mul(esp_tensor y, esp_tensor a, esp_tensor b, float beta, int64_t r0, int64_t r1) {
  int64_t n = esp_tensor_cols(&y);
#define BODY(yb, ab, bb)                                                                                               \
  for (int64_t r = r0; r < r1; r++) mul_elements(esp_row(&y, r), yb, esp_row(&a, r), ab, esp_row(&b, r), bb, beta, n)
  BY_TYPES3(BODY, y, a, b);
#undef BODY
}

/* v: one value per row, `step` elements apart. */
static void k_mul_rows(esp_tensor y, esp_tensor x, esp_tensor v, float beta, int64_t r0, int64_t r1) {
  int64_t n = esp_tensor_cols(&y), step = v.ndim == 2 ? v.ld : 1;
  bool vb = esp_is_b(&v);
#define BODY(yb, xb)                                                                                                   \
  for (int64_t r = r0; r < r1; r++)                                                                                    \
  axpby_row(esp_row(&y, r), yb, at_t(v.data, r *step, vb), esp_row(&x, r), xb, beta, n)
  BY_TYPES2(BODY, y, x);
#undef BODY
}

INLINE void col_dot_cols(float *out, const esp_tensor *a, const bool ab, const esp_tensor *b, const bool bb, int64_t c0,
                         int64_t c1) {
  int64_t rows = esp_tensor_rows(a);
  for (int64_t c = c0; c < c1; c += VL) {
    int64_t left = c1 - c;
    vf s = vset(0);
    for (int64_t r = 0; r < rows; r++) s = vfma(ldt(esp_row(a, r), c, ab, left), ldt(esp_row(b, r), c, bb, left), s);
    stt(out, c, false, s + ldt(out, c, false, left), left);
  }
}
static void k_col_dot(float *out, esp_tensor a, esp_tensor b, int64_t c0, int64_t c1) {
#define BODY(ab, bb) col_dot_cols(out, &a, ab, &b, bb, c0, c1)
  BY_TYPES2(BODY, a, b);
#undef BODY
}

/* Four sums in flight, added in order. */
INLINE float dot_row(const void *a, const bool ab, const void *b, const bool bb, int64_t n) {
  vf s0 = vset(0), s1 = s0, s2 = s0, s3 = s0;
  int64_t i = 0;
  for (; i + 4 * VL <= n; i += 4 * VL) {
    s0 = vfma(ldt(a, i, ab, VL), ldt(b, i, bb, VL), s0);
    s1 = vfma(ldt(a, i + VL, ab, VL), ldt(b, i + VL, bb, VL), s1);
    s2 = vfma(ldt(a, i + 2 * VL, ab, VL), ldt(b, i + 2 * VL, bb, VL), s2);
    s3 = vfma(ldt(a, i + 3 * VL, ab, VL), ldt(b, i + 3 * VL, bb, VL), s3);
  }
  for (; i < n; i += VL) s0 = vfma(ldt(a, i, ab, n - i), ldt(b, i, bb, n - i), s0);
  return vhsum((s0 + s1) + (s2 + s3));
}
static void k_row_dot(float *out, esp_tensor a, esp_tensor b, float beta, int64_t r0, int64_t r1) {
  int64_t n = esp_tensor_cols(&a);
  for (int64_t r = r0; r < r1; r++) {
    float s;
#define BODY(ab, bb) s = dot_row(esp_row(&a, r), ab, esp_row(&b, r), bb, n)
    BY_TYPES2(BODY, a, b);
#undef BODY
    out[r] = beta == 0 ? s : s + beta * out[r];
  }
}

/* Row i of y is the outer product of row i of x and row i of z (a Khatri-Rao product by rows). */
INLINE void outer_row(char *y, const bool yb, const void *x, bool xb, const void *z, const bool zb, int64_t P,
                      int64_t Q) {
  for (int64_t p = 0; p < P; p++, y += (size_t)Q * (yb ? 2 : 4)) axpby_row(y, yb, at_t(x, p, xb), z, zb, 0.0f, Q);
}
/* The same where Q is a small constant: a register holds several p. */
INLINE void outer_row_small(char *y, const bool yb, const void *x, bool xb, const void *z, bool zb, int64_t P,
                            const int Q) {
  float right[VL], left[VL];
  for (int q = 0; q < VL; q++) right[q] = at_t(z, q % Q, zb);
  vf zr = ld(right);
  for (int64_t p = 0, n = P * Q; n > 0; p += VL / Q, n -= VL) {
    for (int k = 0; k < VL; k++) left[k] = at_t(x, p + k / Q < P ? p + k / Q : P - 1, xb);
    stt(y, p * Q, yb, ld(left) * zr, n);
  }
}

static void k_khatri_rao(esp_tensor y, esp_tensor x, esp_tensor z, int64_t r0, int64_t r1) {
  int64_t P = esp_tensor_cols(&x), Q = esp_tensor_cols(&z);
  bool xb = esp_is_b(&x);
#define SMALL(Q_)                                                                                                      \
  for (int64_t r = r0; r < r1; r++)                                                                                    \
    if (esp_is_b(&y))                                                                                                  \
      outer_row_small(esp_row(&y, r), true, esp_row(&x, r), xb, esp_row(&z, r), esp_is_b(&z), P, Q_);                  \
    else                                                                                                               \
      outer_row_small(esp_row(&y, r), false, esp_row(&x, r), xb, esp_row(&z, r), esp_is_b(&z), P, Q_)
  if (Q == 4) {
    SMALL(4);
    return;
  }
  if (Q == 2) {
    SMALL(2);
    return;
  }
#undef SMALL
#define BODY(yb, zb)                                                                                                   \
  for (int64_t r = r0; r < r1; r++) outer_row(esp_row(&y, r), yb, esp_row(&x, r), xb, esp_row(&z, r), zb, P, Q)
  BY_TYPES2(BODY, y, z);
#undef BODY
}
INLINE void outer_row_bwd(float *dx, float *dz, const char *dy, const bool yb, const void *x, bool xb, const void *z,
                          const bool zb, int64_t P, int64_t Q) {
  for (int64_t p = 0; p < P; p++, dy += (size_t)Q * (yb ? 2 : 4)) {
    if (dx) dx[p] += dot_row(dy, yb, z, zb, Q);
    if (dz) axpby_row(dz, false, at_t(x, p, xb), dy, yb, 1.0f, Q);
  }
}
INLINE void outer_row_bwd_small(float *dx, float *dz, const float *dy, const void *x, bool xb, const void *z, bool zb,
                                int64_t P, const int Q) {
  float left, right[8], sum[8] = {0};
  for (int q = 0; q < Q; q++) right[q] = at_t(z, q, zb);
  for (int64_t p = 0; p < P; p++, dy += Q) {
    float s = 0;
    for (int q = 0; q < Q; q++) s += dy[q] * right[q];
    if (dx) dx[p] += s;
    left = at_t(x, p, xb);
    for (int q = 0; q < Q; q++) sum[q] += left * dy[q];
  }
  for (int q = 0; dz && q < Q; q++) dz[q] += sum[q];
}
static void k_khatri_rao_bwd(esp_tensor dx, esp_tensor dz, esp_tensor dy, esp_tensor x, esp_tensor z, int64_t r0,
                             int64_t r1) {
  int64_t P = esp_tensor_cols(&x), Q = esp_tensor_cols(&z);
  bool xb = esp_is_b(&x);
  for (int64_t r = r0; r < r1; r++) {
    float *dxr = dx.data ? esp_row(&dx, r) : NULL, *dzr = dz.data ? esp_row(&dz, r) : NULL;
    if ((Q == 4 || Q == 8) && !esp_is_b(&dy)) {
      bool zb = esp_is_b(&z);
      if (Q == 4)
        outer_row_bwd_small(dxr, dzr, esp_row(&dy, r), esp_row(&x, r), xb, esp_row(&z, r), zb, P, 4);
      else
        outer_row_bwd_small(dxr, dzr, esp_row(&dy, r), esp_row(&x, r), xb, esp_row(&z, r), zb, P, 8);
      continue;
    }
#define BODY(yb, zb) outer_row_bwd(dxr, dzr, esp_row(&dy, r), yb, esp_row(&x, r), xb, esp_row(&z, r), zb, P, Q)
    BY_TYPES2(BODY, dy, z);
#undef BODY
  }
}
