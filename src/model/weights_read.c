/* weights_read.c: stored tensors as numbers: strict binding of the file's tensors to sites, exact reads as fp32, the
 * check for non-finite values, and fresh random weights that are a pure function of (seed, module path). */
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "core/rng.h"
#include "core/strbuf.h"
#include "core/threads.h"
#include "model/internal.h"

#define LIST_MAX 5

/* Buffers and copies that files carry beside the weights: they change nothing that is computed. */
static bool harmless_tensor(const esp_model *m, const char *name) {
  static const char *const ends[] = {".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"};
  for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
    size_t n = strlen(name), k = strlen(ends[i]);
    if (n >= k && !strcmp(name + n - k, ends[i])) return true;
  }
  return m->d.tied && !strcmp(name, "lm_head.weight"); /* compared with the embedding when weights are loaded */
}

static esp_status check_shape(const esp_st_entry *e, int ndim, int64_t a, int64_t b) {
  bool same = e->ndim == ndim && e->shape[0] == a && (ndim == 1 || e->shape[1] == b);
  if (!e->raw_dtype_known ||
      (e->dtype != ESP_F32 && e->dtype != ESP_BF16 && e->dtype != ESP_F16 && e->dtype != ESP_F64))
    return esp_model_refuse("%s: tensor '%s' is not of a floating-point type this engine computes with", e->file,
                            e->name);
  if (same) return ESP_OK;
  char have[96] = "", want[64];
  int at = 0;
  for (int i = 0; i < e->ndim && at < 80; i++)
    at += snprintf(have + at, sizeof have - (size_t)at, "%s%lld", i ? ", " : "", (long long)e->shape[i]);
  if (ndim == 1)
    snprintf(want, sizeof want, "%lld", (long long)a);
  else
    snprintf(want, sizeof want, "%lld, %lld", (long long)a, (long long)b);
  return esp_model_refuse("%s: tensor '%s' has shape [%s], config.json asks for [%s]", e->file, e->name, have, want);
}

typedef struct binder {
  esp_strbuf missing, extra;
  int n_missing, n_extra;
  esp_map *used;
} binder;

static void note(esp_strbuf *b, int *n, const char *name) {
  if (++*n <= LIST_MAX) esp_strbuf_printf(b, "%s%s", *n > 1 ? ", " : "", name);
}

static esp_status bind_one(esp_model *m, binder *b, const char *key, int ndim, int64_t r, int64_t c,
                           const esp_st_entry **out) {
  const esp_st_entry *e = esp_st_find(m->st, key);
  if (!e) {
    if (!esp_map_has(b->used, key, strlen(key))) note(&b->missing, &b->n_missing, key);
  } else {
    ESP_TRY(check_shape(e, ndim, r, c));
  }
  if (!esp_map_put(b->used, key, strlen(key), (void *)m)) return ESP_ERR_MEMORY;
  *out = e;
  return ESP_OK;
}

esp_status esp_weights_bind(esp_model *m) {
  if (!m->st) return ESP_OK;
  esp_status st = ESP_OK;
  binder b = {0};
  esp_strbuf_init(&b.missing);
  esp_strbuf_init(&b.extra);
  b.used = esp_map_create((size_t)m->n_sites * 2);
  if (!b.used) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  for (int i = 0; i < m->n_sites; i++) {
    const esp_site *s = m->sites[i];
    esp_site_state *ss = &m->ss[i];
    int64_t r = s->kind == ESP_SITE_EMBED || s->transposed ? s->in : s->out;
    int64_t c = s->kind == ESP_SITE_EMBED || s->transposed ? s->out : s->in;
    ESP_GOTO(bind_one(m, &b, s->tensor, s->kind == ESP_SITE_NORM ? 1 : 2, r, c, &ss->weight));
    if (s->bias_tensor) ESP_GOTO(bind_one(m, &b, s->bias_tensor, 1, s->out, 1, &ss->bias));
  }
  for (int i = 0; i < esp_st_count(m->st); i++) {
    const char *name = esp_st_at(m->st, i)->name;
    if (!esp_map_has(b.used, name, strlen(name)) && !harmless_tensor(m, name)) note(&b.extra, &b.n_extra, name);
  }
  if (b.n_missing || b.n_extra) {
    if (b.n_missing > LIST_MAX) esp_strbuf_puts(&b.missing, ", ...");
    if (b.n_extra > LIST_MAX) esp_strbuf_puts(&b.extra, ", ...");
    st = esp_model_refuse("%s: the weights do not match config.json (%s): %d missing%s%s%s, %d unexpected%s%s%s",
                          m->dir, m->d.architecture, b.n_missing, b.n_missing ? " (" : "",
                          b.n_missing ? b.missing.data : "", b.n_missing ? ")" : "", b.n_extra, b.n_extra ? " (" : "",
                          b.n_extra ? b.extra.data : "", b.n_extra ? ")" : "");
  }
out:
  esp_map_destroy(b.used);
  esp_strbuf_deinit(&b.missing);
  esp_strbuf_deinit(&b.extra);
  return st;
}

/* ---- reading ---- */

/* n elements from element `at`, as fp32; the mapping may be unaligned. */
static void read_elements(const esp_st_entry *e, int64_t at, int64_t n, float *out) {
  size_t size = esp_dtype_size(e->dtype);
  const char *src = (const char *)e->data + (size_t)at * size;
  if ((uintptr_t)src % size == 0) {
    esp_convert(out, ESP_F32, src, e->dtype, n);
    return;
  }
  double buf[512];
  int64_t step = (int64_t)(sizeof buf / size);
  for (int64_t i = 0; i < n; i += step) {
    int64_t k = n - i < step ? n - i : step;
    memcpy(buf, src + (size_t)i * size, (size_t)k * size);
    esp_convert(out + i, ESP_F32, buf, e->dtype, k);
  }
}

typedef struct finite_ctx {
  const unsigned char *data;
  esp_dtype dtype;
  int64_t n;
  atomic_int found;
} finite_ctx;
#define FINITE_CHUNK (1 << 18)

/* An exponent of all ones is an infinity or a NaN. Written without a branch in the loop, so that it vectorises. */
static bool chunk_has_nonfinite(const unsigned char *p, esp_dtype t, int64_t n) {
  uint32_t any = 0;
  if (t == ESP_F32)
    for (int64_t i = 0; i < n; i++) {
      uint32_t u;
      memcpy(&u, p + 4 * i, 4);
      any |= (u & 0x7f800000u) == 0x7f800000u;
    }
  else if (t == ESP_F64)
    for (int64_t i = 0; i < n; i++) {
      uint64_t u;
      memcpy(&u, p + 8 * i, 8);
      any |= (u & 0x7ff0000000000000u) == 0x7ff0000000000000u;
    }
  else {
    uint16_t mask = t == ESP_BF16 ? 0x7f80u : 0x7c00u, hit = 0;
    for (int64_t i = 0; i < n; i++) {
      uint16_t u;
      memcpy(&u, p + 2 * i, 2);
      hit |= (uint16_t)((u & mask) == mask);
    }
    any = hit;
  }
  return any != 0;
}

static void finite_chunk(void *ctx, int64_t chunk, int thread) {
  finite_ctx *c = ctx;
  int64_t at = chunk * FINITE_CHUNK, n = c->n - at < FINITE_CHUNK ? c->n - at : FINITE_CHUNK;
  if (chunk_has_nonfinite(c->data + (size_t)at * esp_dtype_size(c->dtype), c->dtype, n)) atomic_store(&c->found, 1);
}

esp_status esp_check_finite(const esp_st_entry *e) {
  finite_ctx c = {.data = e->data, .dtype = e->dtype, .n = e->bytes / (int64_t)esp_dtype_size(e->dtype)};
  esp_parallel((c.n + FINITE_CHUNK - 1) / FINITE_CHUNK, finite_chunk, &c);
  if (!atomic_load(&c.found)) return ESP_OK;
  size_t size = esp_dtype_size(e->dtype);
  int64_t at = 0;
  while (at < c.n && !chunk_has_nonfinite(c.data + (size_t)at * size, e->dtype, 1)) at++;
  return esp_model_refuse("%s: tensor '%s' holds a non-finite value (element %lld of %lld)", e->file, e->name,
                          (long long)at, (long long)c.n);
}

/* ---- fresh weights: N(0, 0.02), projections into the residual stream scaled by 1/sqrt(2 layers) (GPT-2) ---- */

typedef struct random_ctx {
  uint64_t seed, stream;
  int64_t at, n;
  float std, *out;
} random_ctx;
#define RANDOM_CHUNK 16384

static void random_chunk(void *ctx, int64_t chunk, int thread) {
  const random_ctx *c = ctx;
  int64_t end = (chunk + 1) * RANDOM_CHUNK < c->n ? (chunk + 1) * RANDOM_CHUNK : c->n;
  for (int64_t i = chunk * RANDOM_CHUNK; i < end; i++)
    c->out[i] = c->std * esp_rng_normal(c->seed, c->stream, (uint64_t)(c->at + i));
}

void esp_random_rows(const esp_model *m, const esp_site *s, int64_t r0, int64_t n, float *out) {
  if (s->kind == ESP_SITE_NORM) {
    for (int64_t i = 0; i < s->out; i++) out[i] = 1.0f - m->d.norm_offset;
    return;
  }
  const esp_site *named = m->d.tied && s->is_head ? m->embed : s;
  int64_t width = s->kind == ESP_SITE_EMBED ? s->out : s->in;
  bool residual =
      s->group && s->layer >= 0 && (s->group == m->blocks[s->layer].o || s->group == m->blocks[s->layer].down);
  random_ctx c = {.seed = m->opt.seed,
                  .stream = esp_rng_stream_name(ESP_RNG_INIT, named->path),
                  .at = r0 * width,
                  .n = n * width,
                  .std = residual ? 0.02f / sqrtf(2.0f * (float)m->d.layers) : 0.02f,
                  .out = out};
  esp_parallel((c.n + RANDOM_CHUNK - 1) / RANDOM_CHUNK, random_chunk, &c);
}

esp_status esp_read_rows(const esp_model *m, const esp_site *s, int64_t r0, int64_t n, float *out) {
  if (!m->st) {
    esp_random_rows(m, s, r0, n, out);
    return ESP_OK;
  }
  const esp_st_entry *e = m->ss[s->index].weight;
  if (!e) return esp_fail(ESP_ERR_INTERNAL, "%s: no stored weight", s->path);
  int64_t width = s->kind == ESP_SITE_EMBED ? s->out : s->in;
  if (s->kind == ESP_SITE_NORM) {
    read_elements(e, 0, s->out, out);
  } else if (!s->transposed) {
    read_elements(e, r0 * width, n * width, out);
  } else {
    float *row = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *row);
    if (!row) return ESP_ERR_MEMORY;
    for (int64_t i = 0; i < s->in; i++) {
      read_elements(e, i * s->out + r0, n, row);
      for (int64_t r = 0; r < n; r++) out[r * s->in + i] = row[r];
    }
    esp_mem_free(row);
  }
  return ESP_OK;
}

esp_status esp_site_read_weight_rows(const esp_model *m, const esp_site *s, int64_t r0, int64_t n, float *out) {
  int64_t rows = s->kind == ESP_SITE_EMBED ? s->in : s->kind == ESP_SITE_NORM ? 1 : s->out;
  if (r0 < 0 || n < 0 || r0 + n > rows) return esp_fail(ESP_ERR_INTERNAL, "%s: rows out of range", s->path);
  return esp_read_rows(m, s, r0, n, out);
}

esp_status esp_site_read_weight(const esp_model *m, const esp_site *s, float *out) {
  return esp_site_read_weight_rows(m, s, 0,
                                   s->kind == ESP_SITE_EMBED  ? s->in
                                   : s->kind == ESP_SITE_NORM ? 1
                                                              : s->out,
                                   out);
}

esp_status esp_site_read_bias(const esp_model *m, const esp_site *s, float *out) {
  if (!s->bias_tensor) return esp_fail(ESP_ERR_INTERNAL, "%s: the module has no bias", s->path);
  if (!m->st)
    memset(out, 0, (size_t)s->out * sizeof *out);
  else
    read_elements(m->ss[s->index].bias, 0, s->out, out);
  return ESP_OK;
}
