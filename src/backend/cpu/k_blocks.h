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

/* Four tokens by two registers of columns at a time: eight sums in flight, x broadcast. */
enum { BLOCK_TOKENS = 4 };

static void k_block_matmul(const esp_block_part *o, int64_t r0, int64_t r1, int64_t g0, int64_t g1) {
  float x[BLOCK_TOKENS][ESP_BLOCK_MERGED];
  int64_t in = esp_tensor_cols(&o->x), out = esp_tensor_cols(&o->y);
  bool yb = esp_is_b(&o->y);
  vf alpha = vset(o->alpha), beta = vset(o->beta);
  for (int64_t g = g0; g < g1; g++) {
    int64_t pn = in - g * o->p < o->p ? in - g * o->p : o->p, qn = out - g * o->q < o->q ? out - g * o->q : o->q;
    const float *m = o->m + g * o->to_next;
    for (int64_t r = r0; r < r1; r += BLOCK_TOKENS) {
      int n = (int)(r1 - r < BLOCK_TOKENS ? r1 - r : BLOCK_TOKENS);
      for (int t = 0; t < BLOCK_TOKENS; t++) widen(x[t], &o->x, t < n ? r + t : r, g * o->p, pn);
      for (int64_t j = 0; j < qn; j += 2 * VL) {
        vf s[BLOCK_TOKENS][2];
        for (int t = 0; t < BLOCK_TOKENS; t++) s[t][0] = s[t][1] = vset(0);
        for (int64_t i = 0; i < pn; i++) {
          vf w0 = ld(m + i * o->ld + j), w1 = ld(m + i * o->ld + j + VL);
          for (int t = 0; t < BLOCK_TOKENS; t++) {
            vf v = vset(x[t][i]);
            s[t][0] = vfma(v, w0, s[t][0]);
            s[t][1] = vfma(v, w1, s[t][1]);
          }
        }
        for (int t = 0; t < n; t++)
          for (int h = 0; h < 2 && j + h * VL < qn; h++) {
            void *y = esp_row(&o->y, r + t);
            int64_t c = g * o->q + j + h * VL, left = qn - j - h * VL;
            vf v = alpha * s[t][h];
            if (o->beta != 0) v += beta * ldt(y, c, yb, left);
            stt(y, c, yb, v, left);
          }
      }
    }
  }
}

/* dm_g += alpha x_g^T dy_g over all tokens in order, for groups [g0, g1). */
static void k_block_grad(const esp_block_part *o, int64_t g0, int64_t g1) {
  enum { TILE = 64, LD = ESP_BLOCK_SMALL };
  float x[TILE][LD] __attribute__((aligned(64))), dy[TILE][LD] __attribute__((aligned(64)));
  float sum[LD][LD] __attribute__((aligned(64)));
  int64_t p = o->p, q = o->q, rows = esp_tensor_rows(&o->x);
  for (int64_t g = g0; g < g1; g++) {
    memset(x, 0, sizeof x); /* what is past the edge of a block is read and not stored */
    memset(dy, 0, sizeof dy);
    memset(sum, 0, sizeof sum);
    for (int64_t r = 0; r < rows; r += TILE) {
      int64_t n = rows - r < TILE ? rows - r : TILE;
      for (int64_t t = 0; t < n; t++) {
        widen(x[t], &o->x, r + t, g * p, p);
        widen(dy[t], &o->y, r + t, g * q, q);
      }
      for (int64_t i = 0; i < p; i += 4)
        for (int64_t j = 0; j < q; j += 2 * VL) {
          vf s[4][2];
          for (int k = 0; k < 4; k++) s[k][0] = ld(&sum[i + k][j]), s[k][1] = ld(&sum[i + k][j + VL]);
          for (int64_t t = 0; t < n; t++) {
            vf d0 = ld(&dy[t][j]), d1 = ld(&dy[t][j + VL]);
            for (int k = 0; k < 4; k++) {
              vf v = vset(x[t][i + k]);
              s[k][0] = vfma(v, d0, s[k][0]);
              s[k][1] = vfma(v, d1, s[k][1]);
            }
          }
          for (int k = 0; k < 4; k++) st(&sum[i + k][j], s[k][0]), st(&sum[i + k][j + VL], s[k][1]);
        }
    }
    vf alpha = vset(o->alpha);
    for (int64_t i = 0; i < p; i++) {
      float *d = esp_row(&o->dm, g * p + i);
      VEC_LOOP(j, q) stt(d, j, false, ldt(d, j, false, left) + alpha * ldt(sum[i], j, false, left), left);
    }
  }
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
