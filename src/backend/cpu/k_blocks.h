/* k_blocks.h: parts of adapter kinds: products with small blocks, their gradients, inverses (kernel bodies, see
 * kernels.inc.h). */

/* n elements of a row, from column c on, as fp32. */
INLINE void widen_row(float *out, const void *row, const bool b, int64_t c, int64_t n) {
  VEC_LOOP(i, n) stt(out, i, false, ldt(row, c + i, b, left), left);
}
INLINE void widen(float *out, const esp_tensor *x, int64_t r, int64_t c, int64_t n) {
  if (esp_is_b(x))
    widen_row(out, esp_row(x, r), true, c, n);
  else
    widen_row(out, esp_row(x, r), false, c, n);
}

/* NT tokens by NV registers of columns: eight sums in flight, x broadcast. */
INLINE void block_columns(const esp_block_part *o, const float (*x)[ESP_BLOCK_MERGED], const float *m, int64_t r,
                          int nt, int64_t pn, int64_t c, int64_t n, const int NT, const int NV) {
  vf s[8], alpha = vset(o->alpha), beta = vset(o->beta);
  bool yb = esp_is_b(&o->y);
  for (int k = 0; k < NT * NV; k++) s[k] = vset(0);
  for (int64_t i = 0; i < pn; i++) {
    vf w0 = ld(m + i * o->ld), w1 = NV == 2 ? ld(m + i * o->ld + VL) : w0;
    for (int t = 0; t < NT; t++) {
      vf v = vset(x[t][i]);
      s[t * NV] = vfma(v, w0, s[t * NV]);
      if (NV == 2) s[t * NV + 1] = vfma(v, w1, s[t * NV + 1]);
    }
  }
  for (int t = 0; t < nt; t++)
    for (int h = 0; h < NV && h * VL < n; h++) {
      void *y = esp_row(&o->y, r + t);
      int64_t left = n - h * VL;
      vf v = alpha * s[t * NV + h];
      if (o->beta != 0) v += beta * ldt(y, c + h * VL, yb, left);
      stt(y, c + h * VL, yb, v, left);
    }
}

/* Columns of group g: the last merged block may be short. */
INLINE int64_t group_cols(const esp_tensor *x, int64_t g, int64_t p) {
  int64_t left = x->ndim == 3 ? p : esp_tensor_cols(x) - g * p;
  return left < p ? left : p;
}

static void k_block_matmul(const esp_block_part *o, int64_t r0, int64_t r1, int64_t g0, int64_t g1) {
  float x[8][ESP_BLOCK_MERGED];
  for (int64_t g = g0; g < g1; g++) {
    int64_t pn = group_cols(&o->x, g, o->p), qn = group_cols(&o->y, g, o->q);
    const float *m = o->m + g * o->to_next;
    for (int64_t r = r0; r < r1; r += 8) {
      int n = (int)(r1 - r < 8 ? r1 - r : 8);
      for (int t = 0; t < 8; t++) widen(x[t], &o->x, t < n ? r + t : r, g * o->x_step, pn);
      int64_t j = 0;
      for (; qn - j > VL; j += 2 * VL) {
        block_columns(o, x, m + j, r, n < 4 ? n : 4, pn, g * o->y_step + j, qn - j, 4, 2);
        if (n > 4) block_columns(o, x + 4, m + j, r + 4, n - 4, pn, g * o->y_step + j, qn - j, 4, 2);
      }
      if (j < qn) block_columns(o, x, m + j, r, n, pn, g * o->y_step + j, qn - j, 8, 1);
    }
  }
}

/* A tile of tokens by at most 64 columns of x and of dy: whole groups, and room for what is read past the last one,
 * which goes to sums that are not stored. */
enum { GRAD_TOKENS = 64, GRAD_LD = ESP_BLOCK_SMALL + 2 * VL };

/* sum[i .. i+4, j ..] += x^T dy over n tokens */
INLINE void grad_columns(float (*sum)[GRAD_LD], const float (*x)[GRAD_LD], const float (*dy)[GRAD_LD], int64_t n,
                         int64_t xc, int64_t dc, int64_t j, const int NV) {
  vf s[8];
  for (int k = 0; k < 4; k++)
    for (int h = 0; h < NV; h++) s[k * NV + h] = ld(&sum[k][j + h * VL]);
  for (int64_t t = 0; t < n; t++) {
    vf d0 = ld(&dy[t][dc + j]), d1 = NV == 2 ? ld(&dy[t][dc + j + VL]) : d0;
    for (int k = 0; k < 4; k++) {
      vf v = vset(x[t][xc + k]);
      s[k * NV] = vfma(v, d0, s[k * NV]);
      if (NV == 2) s[k * NV + 1] = vfma(v, d1, s[k * NV + 1]);
    }
  }
  for (int k = 0; k < 4; k++)
    for (int h = 0; h < NV; h++) st(&sum[k][j + h * VL], s[k * NV + h]);
}

/* dm_g += alpha x_g^T dy_g over all tokens in order, for groups [g0, g1) of at most 64 columns. */
static void grad_groups(const esp_block_part *o, int64_t g0, int64_t g1) {
  float x[GRAD_TOKENS][GRAD_LD] __attribute__((aligned(64))), dy[GRAD_TOKENS][GRAD_LD] __attribute__((aligned(64)));
  float sum[ESP_BLOCK_SMALL][GRAD_LD] __attribute__((aligned(64)));
  int64_t p = o->p, q = o->q, rows = esp_block_tokens(&o->x), p4 = (p + 3) & ~(int64_t)3;
  memset(x, 0, sizeof x);
  memset(dy, 0, sizeof dy);
  memset(sum, 0, sizeof sum);
  for (int64_t r = 0; r < rows; r += GRAD_TOKENS) {
    int64_t n = rows - r < GRAD_TOKENS ? rows - r : GRAD_TOKENS;
    for (int64_t t = 0; t < n; t++) {
      if (o->x_step == p && o->y_step == q) {
        widen(x[t], &o->x, r + t, g0 * p, (g1 - g0) * p);
        widen(dy[t], &o->y, r + t, g0 * q, (g1 - g0) * q);
      } else {
        for (int64_t g = g0; g < g1; g++) {
          widen(x[t] + (g - g0) * p, &o->x, r + t, g * o->x_step, p);
          widen(dy[t] + (g - g0) * q, &o->y, r + t, g * o->y_step, q);
        }
      }
    }
    for (int64_t g = 0; g < g1 - g0; g++)
      for (int64_t i = 0; i < p; i += 4) {
        int64_t j = 0;
        for (; q - j > VL; j += 2 * VL) grad_columns(sum + g * p4 + i, x, dy, n, g * p + i, g * q, j, 2);
        if (j < q) grad_columns(sum + g * p4 + i, x, dy, n, g * p + i, g * q, j, 1);
      }
  }
  vf alpha = vset(o->alpha);
  for (int64_t g = g0; g < g1; g++)
    for (int64_t i = 0; i < p; i++) {
      float *d = esp_row(&o->dm, g * p + i);
      const float *from = sum[(g - g0) * p4 + i];
      VEC_LOOP(j, q) stt(d, j, false, ldt(d, j, false, left) + alpha * ldt(from, j, false, left), left);
    }
}
static void k_block_grad(const esp_block_part *o, int64_t g0, int64_t g1) {
  int64_t p4 = (o->p + 3) & ~(int64_t)3, step = ESP_BLOCK_SMALL / (p4 > o->q ? p4 : o->q);
  for (int64_t g = g0; g < g1; g += step) grad_groups(o, g, g + step < g1 ? g + step : g1);
}

/* Gauss-Jordan in place: after step k the first k columns are those of the inverse. */
static void k_invert(float *a, int64_t ld_, int64_t n) {
  for (int64_t k = 0; k < n; k++) {
    float *rk = a + k * ld_;
    vf pivot = vset(1.0f / rk[k]);
    rk[k] = 1.0f;
    VEC_LOOP(j, n) stt(rk, j, false, pivot * ldt(rk, j, false, left), left);
    for (int64_t i = 0; i < n; i++) {
      if (i == k) continue;
      float *ri = a + i * ld_;
      vf f = vset(ri[k]);
      ri[k] = 0;
      VEC_LOOP(j, n) stt(ri, j, false, ldt(ri, j, false, left) - f * ldt(rk, j, false, left), left);
    }
  }
}
