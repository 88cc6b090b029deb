#include "merge/parts.h"

#include <math.h>
#include <string.h>

#include "core/mem.h"
#include "core/rng.h"

enum { HIGH = 1 << 16, LOW = 1 << 15 }; /* the 31 bits of a magnitude */

static uint32_t magnitude(float x) { /* ordered as |x| is */
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u & 0x7fffffffu;
}

int64_t esp_share_of(double share, int64_t n) {
  int64_t k = (int64_t)(share * (double)n);
  return k < 0 ? 0 : k > n ? n : k;
}

esp_status esp_cutter_init(esp_cutter *c, esp_cut *const *cuts, int n) {
  *c = (esp_cutter){.n = n};
  c->high = esp_mem_alloc(ESP_MEM_WORKSPACE, HIGH * sizeof *c->high);
  bool ok = c->high != NULL;
  for (int i = 0; i < n; i++) {
    c->cut[i] = cuts[i];
    c->low[i] = esp_mem_alloc(ESP_MEM_WORKSPACE, LOW * sizeof **c->low);
    ok &= c->low[i] != NULL;
  }
  if (ok) return ESP_OK;
  esp_cutter_end(c);
  return ESP_ERR_MEMORY;
}

void esp_cutter_feed(esp_cutter *c, const float *x, int64_t n) {
  if (!c->second) {
    c->total += n;
    for (int64_t i = 0; i < n; i++) c->high[magnitude(x[i]) >> 15]++;
    return;
  }
  for (int64_t i = 0; i < n; i++) {
    uint32_t u = magnitude(x[i]);
    for (int k = 0; k < c->n; k++)
      if (u >> 15 == c->bin[k]) c->low[k][u & (LOW - 1)]++;
  }
}

void esp_cutter_turn(esp_cutter *c) {
  for (int k = 0; k < c->n; k++) {
    int64_t above = 0, want = c->cut[k]->k;
    uint32_t bin = HIGH - 1;
    while (bin > 0 && above + c->high[bin] < want) above += c->high[bin--];
    c->bin[k] = bin;
    c->above[k] = above;
  }
  c->second = true;
}

void esp_cutter_end(esp_cutter *c) {
  for (int k = 0; k < c->n && c->second; k++) {
    esp_cut *cut = c->cut[k];
    int64_t above = c->above[k];
    uint32_t low = LOW - 1;
    while (low > 0 && above + c->low[k][low] < cut->k) above += c->low[k][low--];
    uint32_t u = c->bin[k] << 15 | low;
    memcpy(&cut->limit, &u, sizeof u);
    cut->equal = cut->k - above;
    cut->passed = 0;
  }
  esp_mem_free(c->high);
  for (int k = 0; k < c->n; k++) esp_mem_free(c->low[k]);
  *c = (esp_cutter){0};
}

bool esp_cut_inside(esp_cut *c, float x) {
  float a = fabsf(x);
  if (c->k <= 0 || a < c->limit) return false;
  return a > c->limit || c->passed++ < c->equal;
}

esp_status esp_keep_largest(float *x, int64_t n, double density) {
  esp_cut cut = {.k = esp_share_of(density, n)};
  esp_cut *cuts[] = {&cut};
  esp_cutter c;
  if (cut.k >= n) return ESP_OK;
  ESP_TRY(esp_cutter_init(&c, cuts, 1));
  esp_cutter_feed(&c, x, n);
  esp_cutter_turn(&c);
  esp_cutter_feed(&c, x, n);
  esp_cutter_end(&c);
  for (int64_t i = 0; i < n; i++)
    if (!esp_cut_inside(&cut, x[i])) x[i] = 0;
  return ESP_OK;
}

esp_draw esp_draw_of(uint64_t seed, int vector, int part, const char *name, double density) {
  uint64_t stream =
      esp_rng_stream(ESP_RNG_DATA, (uint64_t)vector, (uint64_t)part, esp_rng_stream_name(ESP_RNG_DATA, name));
  return (esp_draw){seed, stream, density};
}

void esp_draw_keep(const esp_draw *d, float *x, int64_t at, int64_t n, double scale) {
  uint32_t word[4];
  for (int64_t i = 0; i < n; i++) { /* esp_rng_uniform, four at a time */
    int64_t e = at + i;
    if (i == 0 || (e & 3) == 0) esp_rng_block(d->seed, d->stream, (uint64_t)e >> 2, word);
    float u = (float)(word[e & 3] >> 8) * 0x1p-24f;
    x[i] = u < (float)d->density ? (float)(x[i] * scale) : 0;
  }
}

void esp_elect(const esp_election *e, const float *const *x, const double *w, int n, int64_t len, float *out) {
  for (int64_t k = 0; k < len; k++) {
    double votes = 0, sum = 0, divisor = 0;
    for (int i = 0; i < n; i++) {
      double y = e->weighted ? w[i] * x[i][k] : x[i][k];
      votes += !e->frequency ? y : y > 0 ? 1 : y < 0 ? -1 : 0;
    }
    for (int i = 0; i < n; i++) {
      double y = e->weighted ? w[i] * x[i][k] : x[i][k];
      if (votes >= 0 ? !(y > 0) : !(y < 0)) continue; /* a zero agrees with nobody */
      sum += w[i] * x[i][k];
      divisor += e->weighted ? w[i] : 1;
    }
    out[k] = (float)(e->normalize && fabs(divisor) > 1e-8 ? sum / divisor : sum);
  }
}
