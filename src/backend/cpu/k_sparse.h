/* k_sparse.h: products with a sparse matrix on a block of ESP_SPARSE_BLOCK tokens (kernel bodies). Within a block
 * activations lie by column, xt [cols, block], zero behind the last token, so that an entry is one product of vectors
 * over tokens. */

/* Sixteen tokens at a time: a line of xt is filled while it is at hand. */
INLINE void sixteen_by_column(float *xt, const void *const *row, const bool b, int64_t c0, int64_t c1) {
  for (int64_t c = c0; c < c1; c++)
    for (int i = 0; i < 16; i++) xt[c * ESP_SPARSE_BLOCK + i] = at_t(row[i], c, b);
}

static void k_by_column(float *xt, esp_tensor x, int64_t c0, int64_t c1) {
  int64_t n = esp_tensor_rows(&x);
  bool b = esp_is_b(&x);
  for (int64_t t = 0; t < ESP_SPARSE_BLOCK; t += 16) {
    const void *row[16];
    for (int i = 0; i < 16; i++) row[i] = esp_row(&x, t + i < n ? t + i : n - 1);
    if (b)
      sixteen_by_column(xt + t, row, true, c0, c1);
    else
      sixteen_by_column(xt + t, row, false, c0, c1);
    for (int64_t i = t < n ? n - t : 0; i < 16; i++)
      for (int64_t c = c0; c < c1; c++) xt[c * ESP_SPARSE_BLOCK + t + i] = 0;
  }
}

/* Rows [r0, r1) of the matrix: those columns of y. */
static void k_sparse_rows(esp_tensor y, const float *xt, const esp_csr *s, int64_t r0, int64_t r1) {
  int64_t n = esp_tensor_rows(&y);
  bool b = esp_is_b(&y);
  for (int64_t r = r0; r < r1; r++) {
    if (s->start[r] == s->start[r + 1]) continue;
    vf sum[ESP_SPARSE_BLOCK / VL];
    float out[ESP_SPARSE_BLOCK];
    for (int i = 0; i < ESP_SPARSE_BLOCK / VL; i++) sum[i] = vset(0);
    for (int32_t e = s->start[r]; e < s->start[r + 1]; e++) {
      vf v = vset(s->values[s->order ? s->order[e] : e]);
      const float *x = xt + (int64_t)s->index[e] * ESP_SPARSE_BLOCK;
      for (int i = 0; i < ESP_SPARSE_BLOCK / VL; i++) sum[i] = vfma(v, ld(x + i * VL), sum[i]);
    }
    for (int i = 0; i < ESP_SPARSE_BLOCK / VL; i++) stt(out, i * VL, false, sum[i], VL);
    for (int64_t t = 0; t < n; t++) {
      if (b) {
        uint16_t *at = (uint16_t *)esp_row(&y, t) + r;
        *at = esp_f32_to_bf16(esp_bf16_to_f32(*at) + out[t]);
      } else {
        ((float *)esp_row(&y, t))[r] += out[t];
      }
    }
  }
}

static void k_sparse_dots(float *dvalues, esp_tensor dy, const float *xt, const esp_csr *s, int64_t r0, int64_t r1) {
  int64_t n = esp_tensor_rows(&dy);
  bool b = esp_is_b(&dy);
  for (int64_t r = r0; r < r1; r++) {
    if (s->start[r] == s->start[r + 1]) continue;
    float g[ESP_SPARSE_BLOCK] = {0};
    for (int64_t t = 0; t < n; t++)
      g[t] = b ? esp_bf16_to_f32(((const uint16_t *)esp_row(&dy, t))[r]) : ((const float *)esp_row(&dy, t))[r];
    for (int32_t e = s->start[r]; e < s->start[r + 1]; e++) {
      const float *x = xt + (int64_t)s->index[e] * ESP_SPARSE_BLOCK;
      vf s0 = vset(0), s1 = s0;
      for (int i = 0; i < ESP_SPARSE_BLOCK; i += 2 * VL) {
        s0 = vfma(ld(g + i), ld(x + i), s0);
        s1 = vfma(ld(g + i + VL), ld(x + i + VL), s1);
      }
      dvalues[s->order ? s->order[e] : e] += vhsum(s0 + s1);
    }
  }
}
