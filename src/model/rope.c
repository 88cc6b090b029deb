/* rope.c: tables of cosines and sines. Frequencies are computed in fp32 step by step as transformers does
 * (modeling_rope_utils.py), because at a few thousand positions the rounding of the product is visible in logits. */
#include <math.h>

#include "model/internal.h"

void esp_rope_inv_freq(const esp_model_desc *d, float *inv) {
  int rot = (int)((float)d->head_dim * d->rope_fraction);
  for (int i = 0; i < rot / 2; i++) {
    float e = (float)(2 * i) / (float)rot;
    inv[i] = 1.0f / (float)pow((double)d->rope_theta, (double)e);
  }
  if (d->rope_scaling == ESP_ROPE_LINEAR)
    for (int i = 0; i < rot / 2; i++) inv[i] /= d->rope_factor;
  if (d->rope_scaling == ESP_ROPE_LLAMA3) {
    /* Low frequencies are divided by the factor, high ones kept, those between blended. */
    float original = (float)d->rope_original_positions;
    float low_wavelen = original / d->rope_low_freq, high_wavelen = original / d->rope_high_freq;
    for (int i = 0; i < rot / 2; i++) {
      float wavelen = 2.0f * (float)M_PI / inv[i], f = inv[i];
      float scaled = wavelen > low_wavelen ? f / d->rope_factor : f;
      float smooth = (original / wavelen - d->rope_low_freq) / (d->rope_high_freq - d->rope_low_freq);
      bool medium = !(wavelen < high_wavelen) && !(wavelen > low_wavelen);
      inv[i] = medium ? (1.0f - smooth) * scaled / d->rope_factor + smooth * scaled : scaled;
    }
  }
}

/* Tables for positions [0, n), grown by doubling from 256. */
esp_status esp_rope_ensure(esp_model *m, int64_t n) {
  const esp_model_desc *d = &m->d;
  if (d->pos != ESP_POS_ROPE || n <= m->rope_rows) return ESP_OK;
  int64_t rows = 256;
  while (rows < n) rows *= 2;
  int half = (int)((float)d->head_dim * d->rope_fraction) / 2;
  esp_backend *be = m->be;
  if (m->cos_t) be->ops->free(be, m->cos_t);
  if (m->sin_t) be->ops->free(be, m->sin_t);
  m->rope_rows = 0;
  int64_t bytes = rows * half * 4;
  m->cos_t = be->ops->alloc(be, ESP_MEM_WEIGHTS, bytes);
  m->sin_t = be->ops->alloc(be, ESP_MEM_WEIGHTS, bytes);
  if (!m->cos_t || !m->sin_t) return esp_backend_why_null(be);
  m->rope_rows = rows;
  if (esp_backend_counts(be)) return ESP_OK;
  float *c = esp_mem_alloc(ESP_MEM_HOST, (size_t)bytes), *s = esp_mem_alloc(ESP_MEM_HOST, (size_t)bytes);
  float *inv = esp_mem_alloc(ESP_MEM_HOST, (size_t)half * sizeof *inv);
  if (c && s && inv) {
    esp_rope_inv_freq(d, inv);
    for (int64_t p = 0; p < rows; p++)
      for (int i = 0; i < half; i++) {
        float angle = (float)p * inv[i];
        c[p * half + i] = (float)cos((double)angle);
        s[p * half + i] = (float)sin((double)angle);
      }
    be->ops->upload(be, m->cos_t, c, bytes);
    be->ops->upload(be, m->sin_t, s, bytes);
  }
  bool ok = c && s && inv;
  esp_mem_free(c);
  esp_mem_free(s);
  esp_mem_free(inv);
  return ok ? ESP_OK : ESP_ERR_MEMORY;
}
