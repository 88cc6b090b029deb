/* k_distill.h: one row of the losses against a teacher (kernel bodies): KL of two rows of logits, distances of hidden
 * states. */

/* Element i of a row of logits, capped, times 1/T; what lies past the end is `fill`. */
INLINE vf tempered(const float *x, int64_t i, int64_t left, const float cap, float inv, float fill) {
  vf z = capped(ldt(x, i, false, left), cap) * vset(inv);
  if (left >= VL) return z;
  float t[VL];
  st(t, z);
  for (int64_t k = left; k < VL; k++) t[k] = fill;
  return ld(t);
}

/* Both rows go through the same operations, so that equal rows have equal sums. */
INLINE double tempered_lse(const float *x, int64_t n, const float cap, float inv) {
  enum { BLOCK = 1024 };
  vf top = vset(-INFINITY);
  VEC_LOOP(i, n) top = vmax(top, tempered(x, i, left, cap, inv, -INFINITY));
  float best = vhmax(top);
  double sum = 0;
  for (int64_t b = 0; b < n; b += BLOCK) {
    vf s = vset(0);
    VEC_LOOP(i, n - b < BLOCK ? n - b : BLOCK) s += vexp(tempered(x + b, i, left, cap, inv, -INFINITY) - vset(best));
    sum += (double)vhsum(s);
  }
  return (double)best + log(sum);
}

/* KL = sum p (t - s) - (lse_t - lse_s), with t and s divided by T: what is lost by rounding p is multiplied with the
 * difference of the rows and not with their size. */
INLINE double distill_row(const esp_distill_args *a, int64_t r, const float cap) {
  enum { BLOCK = 1024 };
  const float *s = esp_row(&a->student, r), *t = esp_row(&a->teacher, r);
  float *d = a->d.data ? esp_row(&a->d, r) : NULL, inv = 1.0f / a->temperature;
  int64_t n = esp_tensor_cols(&a->student);
  double ls = tempered_lse(s, n, cap, inv), lt = tempered_lse(t, n, cap, inv), sum = 0;
  vf k = vset(a->scale * a->factor * a->weights[r] * inv), vls = vset((float)ls), vlt = vset((float)lt);
  for (int64_t b = 0; b < n; b += BLOCK) {
    vf part = vset(0);
    VEC_LOOP(i, n - b < BLOCK ? n - b : BLOCK) {
      vf zs = tempered(s + b, i, left, cap, inv, 0), zt = tempered(t + b, i, left, cap, inv, 0);
      vf p = vexp(zt - vlt), g = k * (vexp(zs - vls) - p);
      part = vfma(p, zt - zs, part);
      if (!d) continue;
      if (cap > 0) {
        vf y = zs * vset(a->temperature / cap);
        g = g * (vset(1.0f) - y * y);
      }
      stt(d + b, i, false, g, left);
    }
    sum += (double)vhsum(part);
  }
  return (double)a->weights[r] * (double)a->factor * (sum - (lt - ls));
}
static double k_distill(const esp_distill_args *a, int64_t r) {
  return a->softcap > 0 ? distill_row(a, r, a->softcap) : distill_row(a, r, 0.0f);
}

/* e = x - h: the losses of a register's elements before they are divided, and their slopes. */
INLINE vf hidden_plain(const esp_hidden_loss kind, vf e, vf *slope) {
  if (kind == ESP_HIDDEN_L1) {
    *slope = vsel_lt(vset(0), e, vset(1), vsel_lt(e, vset(0), vset(-1), vset(0)));
    return vabs(e);
  }
  vf u = kind == ESP_HIDDEN_BELOW ? vmin(vset(0), e) : e;
  *slope = u + u;
  return u * u;
}
INLINE double hidden_plain_row(const esp_hidden_args *a, int64_t r, const esp_hidden_loss kind) {
  enum { BLOCK = 1024 };
  const void *x = esp_row(&a->x, r), *h = esp_row(&a->teacher, r);
  void *d = a->d.data ? esp_row(&a->d, r) : NULL;
  bool xb = esp_is_b(&a->x), hb = esp_is_b(&a->teacher), db = d && esp_is_b(&a->d);
  int64_t n = esp_tensor_cols(&a->x);
  vf k = vset(a->scale * a->factor * a->weights[r] / (float)n), slope;
  double sum = 0;
  for (int64_t b = 0; b < n; b += BLOCK) {
    vf part = vset(0);
    VEC_LOOP(i, n - b < BLOCK ? n - b : BLOCK) {
      part += hidden_plain(kind, ldt(x, b + i, xb, left) - ldt(h, b + i, hb, left), &slope);
      if (d) stt(d, b + i, db, vfma(k, slope, ldt(d, b + i, db, left)), left);
    }
    sum += (double)vhsum(part);
  }
  return (double)a->weights[r] * (double)a->factor * sum / (double)n;
}

/* The margin's loss of one element before it is divided, and its slope. */
INLINE float margin_element(float x, float h, float low, float high, float *slope) {
  float over = x - high, under = low - x;
  if (h < low) { /* under < 0 is a violation */
    *slope = under < 0 ? 1.0f : 0.0f;
    return under < 0 ? -under : under > 0 ? 0.0f : under;
  }
  if (h > high) {
    *slope = over < 0 ? -1.0f : 0.0f;
    return over < 0 ? -over : over > 0 ? 0.0f : over;
  }
  *slope = over > 0 ? 1.0f : under > 0 ? -1.0f : 0.0f;
  return over > 0 ? over : under > 0 ? under : 0.0f;
}
INLINE double margin_row(const esp_hidden_args *a, int64_t r) {
  const void *x = esp_row(&a->x, r), *h = esp_row(&a->teacher, r);
  void *d = a->d.data ? esp_row(&a->d, r) : NULL;
  bool xb = esp_is_b(&a->x), hb = esp_is_b(&a->teacher), db = d && esp_is_b(&a->d);
  int64_t n = esp_tensor_cols(&a->x), violated = 0;
  double sum = 0;
  float slope;
  for (int64_t j = 0; j < n; j++) {
    sum += (double)margin_element(at_t(x, j, xb), at_t(h, j, hb), a->low[j], a->high[j], &slope);
    violated += slope != 0;
  }
  if (violated == 0) return (double)a->weights[r] * sum; /* 0, or what is not a number */
  float k = a->scale * a->factor * a->weights[r] / (float)violated;
  for (int64_t j = 0; d && j < n; j++) {
    margin_element(at_t(x, j, xb), at_t(h, j, hb), a->low[j], a->high[j], &slope);
    float y = at_t(d, j, db) + k * slope;
    if (db)
      ((uint16_t *)d)[j] = esp_f32_to_bf16(y);
    else
      ((float *)d)[j] = y;
  }
  return (double)a->weights[r] * (double)a->factor * sum / (double)violated;
}
static double k_hidden_loss(const esp_hidden_args *a, int64_t r) {
  if (a->kind == ESP_HIDDEN_L2) return hidden_plain_row(a, r, ESP_HIDDEN_L2);
  if (a->kind == ESP_HIDDEN_L1) return hidden_plain_row(a, r, ESP_HIDDEN_L1);
  if (a->kind == ESP_HIDDEN_BELOW) return hidden_plain_row(a, r, ESP_HIDDEN_BELOW);
  return margin_row(a, r);
}
