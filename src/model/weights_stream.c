/* weights_stream.c: frozen weights that stay in host memory. Two buffers on the device, each with a copy channel of its
 * own: while one operand is computed with, its neighbour in the order of the pass is brought into the other. Forward
 * walks the operands up, backward down, so the neighbour is guessed from the last step; a wrong guess costs the wait
 * for one copy. Read-only weights are never written back. */
#include <string.h>

#include "model/internal.h"

typedef struct operand {
  esp_stream *stream;
  int index;
  void *host; /* host_alloc memory; NULL on the counting backend */
  int64_t bytes;
} operand;

struct esp_stream {
  operand **list;
  int count, cap;
  void *buffer[2];
  int holds[2];   /* operand in the buffer, -1: none */
  int64_t bytes;  /* of one buffer */
  int last, used; /* operand and buffer of the last borrow */
};

static void bring(esp_stream *s, esp_backend *be, int index, int buffer) {
  const operand *o = s->list[index];
  be->ops->stage(be, buffer, s->buffer[buffer], o->host, o->bytes);
  s->holds[buffer] = index;
}

static esp_status stream_borrow(esp_weight *w, esp_backend *be, esp_wview *out) {
  const operand *o = w->impl;
  esp_stream *s = o->stream;
  int at = s->holds[0] == o->index ? 0 : s->holds[1] == o->index ? 1 : -1;
  if (at < 0) {
    at = 1 - s->used; /* the other one may still be read by what was issued last */
    bring(s, be, o->index, at);
  }
  be->ops->stage_wait(be, at);
  int next = o->index + (o->index < s->last ? -1 : 1);
  if (next >= 0 && next < s->count && s->holds[1 - at] != next) bring(s, be, next, 1 - at);
  s->last = o->index;
  s->used = at;
  *out = (esp_wview){.out = w->out, .in = w->in, .packed = s->buffer[at]};
  return be->sticky;
}
static void stream_give_back(esp_weight *w, esp_backend *be, esp_wview *view) {
  (void)w, (void)be;
  view->packed = NULL;
}
static void stream_destroy(esp_weight *w, esp_backend *be) {
  operand *o = w->impl;
  esp_stream *s = o->stream;
  esp_backend_sync(be); /* a copy out of it may be under way */
  for (int i = 0; i < 2; i++)
    if (s->holds[i] == o->index) s->holds[i] = -1;
  if (o->host) be->ops->host_free(be, o->host);
  s->list[o->index] = s->list[--s->count];
  s->list[o->index]->index = o->index;
  esp_mem_free(o);
  w->impl = NULL;
  w->ops = NULL;
}
static const esp_weight_ops stream_ops = {stream_borrow, stream_give_back, stream_destroy};

static esp_status grow(esp_stream *s, esp_backend *be, int64_t bytes) {
  if (bytes <= s->bytes) return ESP_OK;
  ESP_TRY(esp_backend_sync(be));
  for (int i = 0; i < 2; i++) {
    if (s->buffer[i]) be->ops->free(be, s->buffer[i]);
    s->holds[i] = -1;
    s->buffer[i] = be->ops->alloc(be, ESP_MEM_WEIGHTS, bytes);
    if (!s->buffer[i]) return esp_backend_why_null(be);
  }
  s->bytes = bytes;
  return ESP_OK;
}

esp_status esp_stream_add(esp_stream *s, esp_backend *be, void *host, esp_weight *w, esp_dtype compute) {
  int64_t bytes = be->ops->pack_bytes(be, w->out, w->in, compute);
  operand *o = esp_mem_alloc(ESP_MEM_HOST, sizeof *o);
  if (!o) return ESP_ERR_MEMORY;
  if (s->count == s->cap) {
    int cap = s->cap ? 2 * s->cap : 64;
    operand **list = esp_mem_realloc(ESP_MEM_HOST, s->list, (size_t)cap * sizeof *list);
    if (!list) {
      esp_mem_free(o);
      return ESP_ERR_MEMORY;
    }
    s->list = list;
    s->cap = cap;
  }
  esp_status st = grow(s, be, bytes);
  if (st != ESP_OK) {
    esp_mem_free(o);
    return st;
  }
  *o = (operand){s, s->count, host, bytes};
  s->list[s->count++] = o;
  w->impl = o;
  w->ops = &stream_ops;
  return ESP_OK;
}

esp_status esp_stream_create(esp_stream **out) {
  esp_stream *s = esp_mem_alloc(ESP_MEM_HOST, sizeof *s);
  if (!s) return ESP_ERR_MEMORY;
  s->holds[0] = s->holds[1] = s->last = -1;
  *out = s;
  return ESP_OK;
}

void esp_stream_destroy(esp_stream *s, esp_backend *be) {
  if (!s) return;
  for (int i = 0; i < 2; i++)
    if (s->buffer[i]) be->ops->free(be, s->buffer[i]);
  esp_mem_free(s->list);
  esp_mem_free(s);
}
