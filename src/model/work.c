/* work.c: the work buffers of a pass. They grow to the largest pass seen and are never on the activation stack (see
 * internal.h). Sizes are a function of the description, the token count and whether there is a backward: the counting
 * backend asks for the same bytes. */
#include "model/internal.h"

/* Rows of fp32 logits that exist at a time: the head's weight is read once per chunk, forward and back. About 50 MB on
 * a host, where more leaves the caches; 512 MB on a device, where fewer rows leave its multipliers waiting for the
 * weight. */
int64_t esp_head_chunk(const esp_model *m, int64_t rows) {
  bool host = esp_backend_on_host(m->be);
  int64_t c = (INT64_C(1) << 20) * (host ? 12 : 128) / m->d.vocab / 32 * 32, most = host ? 1024 : 4096;
  if (c < 64) c = 64;
  if (c > most) c = most;
  return rows < c ? rows : c;
}

int64_t esp_logits_stride(const esp_model *m) {
  return (m->d.vocab + 31) / 16 * 16;
}

static int64_t max3(int64_t a, int64_t b, int64_t c) {
  int64_t ab = a > b ? a : b;
  return ab > c ? ab : c;
}

static esp_status grow(esp_model *m, int id, int64_t bytes) {
  if (bytes <= m->work.bytes[id]) return ESP_OK;
  if (m->work.buf[id]) m->be->ops->free(m->be, m->work.buf[id]);
  m->work.bytes[id] = 0;
  m->work.buf[id] = m->be->ops->alloc(m->be, ESP_MEM_WORKSPACE, bytes);
  if (!m->work.buf[id]) return esp_backend_why_null(m->be);
  m->work.bytes[id] = bytes;
  m->work.revision++;
  return ESP_OK;
}

esp_status esp_work_teach(esp_model *m, int64_t head_rows) {
  return grow(m, ESP_W_TEACH, esp_head_chunk(m, head_rows) * esp_logits_stride(m) * 4);
}

esp_status esp_work_ensure(esp_model *m, int64_t tokens, int64_t head_rows, int64_t n_virtual, bool train) {
  const esp_model_desc *d = &m->d;
  int64_t size = (int64_t)esp_dtype_size(m->opt.compute);
  int64_t q = (int64_t)d->heads * d->head_dim, kv = (int64_t)d->kv_heads * d->head_dim;
  int64_t chunk = esp_head_chunk(m, head_rows < tokens ? head_rows : tokens);
  bool qk = d->qk_norm != ESP_QKNORM_NONE;
  int64_t want[ESP_W_COUNT] = {
      [ESP_W_NORMED] = tokens * d->hidden * size,
      [ESP_W_Y] = tokens * d->hidden * size,
      [ESP_W_WIDE] = tokens * max3(d->ffn, d->hidden, train ? q + 2 * kv : 0) * size,
      [ESP_W_DWIDE] = train ? tokens * max3(d->ffn, d->hidden, q) * size : 0,
      [ESP_W_DR] = train ? tokens * d->hidden * size : 0,
      [ESP_W_QK0] = qk ? tokens * (q + kv) * size : 0,
      [ESP_W_QK1] = qk ? tokens * (q + kv) * size : 0,
      [ESP_W_QK2] = qk && train ? tokens * (q + kv) * size : 0,
      [ESP_W_LOGITS] = chunk * esp_logits_stride(m) * 4,
      [ESP_W_STAT] = 2 * tokens * 4,
      [ESP_W_IDS] = ESP_INTS_COUNT * tokens * 4,
      [ESP_W_VIRTUAL] = 2 * n_virtual * 4,
      [ESP_W_TOTAL] = ESP_TOTAL_BYTES,
  };
  for (int i = 0; i < ESP_W_COUNT; i++) ESP_TRY(grow(m, i, want[i]));
  return ESP_OK;
}

void esp_work_release(esp_model *m) {
  for (int i = 0; i < ESP_W_COUNT; i++) {
    if (m->work.buf[i]) m->be->ops->free(m->be, m->work.buf[i]);
    m->work.buf[i] = NULL;
    m->work.bytes[i] = 0;
  }
}

esp_tensor esp_work_tensor(const esp_model *m, esp_work_id id, int64_t rows, int64_t cols) {
  return esp_tensor_2d(m->work.buf[id], id == ESP_W_LOGITS || id == ESP_W_TEACH ? ESP_F32 : m->opt.compute, rows, cols);
}

int32_t *esp_work_ints(const esp_model *m, int which) {
  int64_t stride = m->work.bytes[ESP_W_IDS] / (ESP_INTS_COUNT * 4);
  return (int32_t *)m->work.buf[ESP_W_IDS] + which * stride;
}
