/* k_gate.h: ranks that gate themselves (mora_rank), a row at a time in fp32 (kernel bodies). See esp_gate in backend.h.
 */

typedef struct gate_row { /* each with a register of padding: t, s, w, u are 0 there */
  float t[ESP_GATE_MOST + VL], s[ESP_GATE_MOST + VL], w[ESP_GATE_MOST + VL], u[ESP_GATE_MOST + VL];
  uint8_t keep[ESP_GATE_MOST];
  float inv; /* 1 / |t| */
} gate_row;

INLINE void gate_read(float *to, const esp_tensor *x, int64_t r, int64_t n) {
  widen(to, x, r, 0, n);
  st(to + n, vset(0));
}
INLINE void gate_write(const float *from, const esp_tensor *y, int64_t r, int64_t n) {
  void *row = esp_row(y, r);
  bool b = esp_is_b(y);
  VEC_LOOP(i, n) stt(row, i, b, ldt(from, i, false, left), left);
}

INLINE void gate_keep(gate_row *o, const esp_gate *g, int64_t n) {
  bool all = g->top <= 0 || g->top >= n;
  for (int64_t i = 0; i < n; i++) o->keep[i] = all;
  for (int64_t k = 0; !all && k < g->top; k++) {
    int64_t best = 0;
    for (int64_t i = 0; i < n; i++)
      if (!o->keep[i] && (o->keep[best] || o->s[i] > o->s[best])) best = i;
    o->keep[best] = 1;
  }
  for (int64_t i = 0; g->threshold > 0 && i < n; i++) o->keep[i] &= o->s[i] >= g->threshold;
}

/* t, s, w and what is kept */
INLINE void gate_of(gate_row *o, const esp_tensor *x, int64_t r, int64_t n, const esp_gate *g) {
  gate_read(o->t, x, r, n);
  float square = dot_row(o->t, false, o->t, false, n);
  vf sum = vset(0), k = vset(1.0f / g->tau), inv = vset(o->inv = square > 1e-30f ? 1.0f / sqrtf(square) : 0.0f);
  VEC_LOOP(i, n) st(o->s + i, inv * ld(o->t + i));
  float m = o->s[0];
  for (int64_t i = 1; i < n; i++) m = o->s[i] > m ? o->s[i] : m;
  VEC_LOOP(i, n) st(o->w + i, vexp(k * (ld(o->s + i) - vset(m))));
  for (int64_t i = n; i % VL; i++) o->w[i] = 0;
  VEC_LOOP(i, n) sum += ld(o->w + i);
  sum = vset(1.0f / vhsum(sum));
  VEC_LOOP(i, n) st(o->w + i, sum * ld(o->w + i));
  gate_keep(o, g, n);
}

static void k_rank_gate(esp_tensor y, esp_tensor x, const esp_gate *g, int64_t r0, int64_t r1) {
  gate_row o;
  int64_t n = esp_tensor_cols(&x);
  for (int64_t r = r0; r < r1; r++) {
    gate_of(&o, &x, r, n, g);
    for (int64_t i = 0; i < n; i++) o.u[i] = o.keep[i] ? g->scale * o.w[i] * o.t[i] : 0.0f;
    gate_write(o.u, &y, r, n);
  }
}

/* u = scale dy where kept;  dw = u t;  ds = w / tau (dw - sum w dw);  dt = u w + (ds - s sum s ds) / |t| */
static void k_rank_gate_bwd(esp_tensor dx, esp_tensor dy, esp_tensor x, const esp_gate *g, int64_t r0, int64_t r1) {
  gate_row o;
  int64_t n = esp_tensor_cols(&x);
  vf k = vset(1.0f / g->tau);
  for (int64_t r = r0; r < r1; r++) {
    gate_of(&o, &x, r, n, g);
    gate_read(o.u, &dy, r, n);
    for (int64_t i = 0; i < n; i++) o.u[i] = o.keep[i] ? g->scale * o.u[i] : 0.0f;
    vf a = vset(0), b = vset(0), inv = vset(o.inv);
    VEC_LOOP(i, n) a = vfma(ld(o.w + i), ld(o.u + i) * ld(o.t + i), a);
    a = vset(vhsum(a));
    VEC_LOOP(i, n) {
      vf ds = k * ld(o.w + i) * (ld(o.u + i) * ld(o.t + i) - a);
      b = vfma(ld(o.s + i), ds, b);
      st(o.u + i, ld(o.u + i) * ld(o.w + i) + inv * ds);
    }
    b = vset(vhsum(b) * o.inv);
    VEC_LOOP(i, n) st(o.u + i, ld(o.u + i) - b * ld(o.s + i));
    gate_write(o.u, &dx, r, n);
  }
}
