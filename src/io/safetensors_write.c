/* safetensors_write.c: the writer. Tensors are laid out by element size, widest first, then by name (as the format's
 * own writer does), so that every tensor is aligned to its element; the header is padded with spaces to 8 bytes. */
#include <stdlib.h>
#include <string.h>

#include "core/arena.h"
#include "core/map.h"
#include "core/mem.h"
#include "core/strbuf.h"
#include "io/atomic.h"
#include "io/safetensors.h"

#define MOST_DIMS 8

typedef struct w_range {
  int64_t from, to;
} w_range;

typedef struct w_tensor {
  struct w_tensor *next; /* order of declaration */
  const char *name;
  esp_dtype dtype;
  int ndim;
  int64_t shape[MOST_DIMS];
  int64_t bytes, begin;
  w_range *done; /* sorted, apart from each other */
  int n_done, cap_done;
} w_tensor;

typedef struct w_meta {
  struct w_meta *next;
  const char *key, *value;
} w_meta;

struct esp_st_writer {
  esp_arena *arena;
  esp_map *by_name;
  w_tensor *tensors, **tail;
  w_meta *meta, **meta_tail;
  int count;
  bool laid_out;
  int64_t data_at; /* file offset of the first data byte */
  const char *path;
  esp_atomic_file file;
};

static void destroy(esp_st_writer *w) {
  for (w_tensor *t = w->tensors; t; t = t->next) esp_mem_free(t->done);
  esp_map_destroy(w->by_name);
  esp_arena_destroy(w->arena);
  esp_mem_free(w);
}

void esp_st_writer_abort(esp_st_writer *w) {
  if (!w) return;
  esp_atomic_abort(&w->file);
  destroy(w);
}

esp_status esp_st_writer_create(const char *path, esp_st_writer **out) {
  *out = NULL;
  esp_status st = ESP_OK;
  esp_st_writer *w = esp_mem_alloc(ESP_MEM_HOST, sizeof *w);
  if (!w) return ESP_ERR_MEMORY;
  w->file.fd = -1;
  w->tail = &w->tensors;
  w->meta_tail = &w->meta;
  w->arena = esp_arena_create(ESP_MEM_HOST);
  w->by_name = esp_map_create(64);
  w->path = w->arena ? esp_arena_strdup(w->arena, path) : NULL;
  if (!w->by_name || !w->path) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  ESP_GOTO(esp_atomic_open(&w->file, path));
  *out = w;
  return ESP_OK;
out:
  destroy(w);
  return st;
}

/* Strict UTF-8 without zero bytes (RFC 3629): anything else would make a header that no reader takes. */
static bool valid_utf8(const char *text) {
  const unsigned char *s = (const unsigned char *)text;
  while (*s) {
    int more = *s < 0x80                 ? 0
               : *s >= 0xc2 && *s < 0xe0 ? 1
               : *s >= 0xe0 && *s < 0xf0 ? 2
               : *s >= 0xf0 && *s < 0xf5 ? 3
                                         : -1;
    if (more < 0) return false;
    if ((*s == 0xe0 && s[1] < 0xa0) || (*s == 0xed && s[1] > 0x9f) || (*s == 0xf0 && s[1] < 0x90) ||
        (*s == 0xf4 && s[1] > 0x8f))
      return false;
    for (s++; more > 0; more--, s++)
      if ((*s & 0xc0) != 0x80) return false;
  }
  return true;
}

esp_status esp_st_writer_declare(esp_st_writer *w, const char *name, esp_dtype dtype, int ndim, const int64_t *shape) {
  if (w->laid_out) return esp_fail(ESP_ERR_INTERNAL, "%s: tensor '%s' declared after writing began", w->path, name);
  if (!valid_utf8(name) || strcmp(name, "__metadata__") == 0)
    return esp_fail(ESP_ERR_DATA, "%s: '%s' cannot be the name of a tensor", w->path, name);
  if (esp_map_has(w->by_name, name, strlen(name)))
    return esp_fail(ESP_ERR_INTERNAL, "%s: tensor '%s' declared twice", w->path, name);
  if (esp_dtype_size(dtype) == 0 || ndim < 0 || ndim > MOST_DIMS)
    return esp_fail(ESP_ERR_INTERNAL, "%s: tensor '%s': dtype or dimensions", w->path, name);
  w_tensor *t = esp_arena_alloc(w->arena, sizeof *t);
  if (!t) return ESP_ERR_MEMORY;
  t->name = esp_arena_strdup(w->arena, name);
  if (!t->name) return ESP_ERR_MEMORY;
  t->dtype = dtype;
  t->ndim = ndim;
  t->bytes = (int64_t)esp_dtype_size(dtype);
  for (int i = 0; i < ndim; i++) {
    if (shape[i] < 0 || __builtin_mul_overflow(t->bytes, shape[i], &t->bytes))
      return esp_fail(ESP_ERR_INTERNAL, "%s: tensor '%s': dimension %d", w->path, name, i);
    t->shape[i] = shape[i];
  }
  if (!esp_map_put(w->by_name, t->name, strlen(t->name), t)) return ESP_ERR_MEMORY;
  *w->tail = t;
  w->tail = &t->next;
  w->count++;
  return ESP_OK;
}

esp_status esp_st_writer_metadata(esp_st_writer *w, const char *key, const char *value) {
  if (w->laid_out) return esp_fail(ESP_ERR_INTERNAL, "%s: metadata '%s' set after writing began", w->path, key);
  if (!valid_utf8(key) || !valid_utf8(value))
    return esp_fail(ESP_ERR_DATA, "%s: metadata '%s' is not UTF-8", w->path, key);
  for (w_meta *m = w->meta; m; m = m->next)
    if (strcmp(m->key, key) == 0) return esp_fail(ESP_ERR_INTERNAL, "%s: metadata '%s' set twice", w->path, key);
  w_meta *m = esp_arena_alloc(w->arena, sizeof *m);
  if (!m) return ESP_ERR_MEMORY;
  m->key = esp_arena_strdup(w->arena, key);
  m->value = esp_arena_strdup(w->arena, value);
  if (!m->key || !m->value) return ESP_ERR_MEMORY;
  *w->meta_tail = m;
  w->meta_tail = &m->next;
  return ESP_OK;
}

static int by_width(const void *pa, const void *pb) {
  const w_tensor *a = *(w_tensor *const *)pa, *b = *(w_tensor *const *)pb;
  size_t sa = esp_dtype_size(a->dtype), sb = esp_dtype_size(b->dtype);
  if (sa != sb) return sa > sb ? -1 : 1;
  return strcmp(a->name, b->name);
}

static void put_header(esp_st_writer *w, esp_strbuf *b, w_tensor *const *order) {
  const char *sep = "";
  esp_strbuf_putc(b, '{');
  if (w->meta) {
    esp_strbuf_puts(b, "\"__metadata__\":{");
    for (w_meta *m = w->meta; m; m = m->next) {
      esp_strbuf_json(b, m->key, strlen(m->key));
      esp_strbuf_putc(b, ':');
      esp_strbuf_json(b, m->value, strlen(m->value));
      if (m->next) esp_strbuf_putc(b, ',');
    }
    esp_strbuf_putc(b, '}');
    sep = ",";
  }
  for (int i = 0; i < w->count; i++) {
    const w_tensor *t = order[i];
    esp_strbuf_puts(b, sep);
    esp_strbuf_json(b, t->name, strlen(t->name));
    esp_strbuf_printf(b, ":{\"dtype\":\"%s\",\"shape\":[", esp_dtype_st_name(t->dtype));
    for (int d = 0; d < t->ndim; d++) esp_strbuf_printf(b, "%s%lld", d ? "," : "", (long long)t->shape[d]);
    esp_strbuf_printf(b, "],\"data_offsets\":[%lld,%lld]}", (long long)t->begin, (long long)(t->begin + t->bytes));
    sep = ",";
  }
  esp_strbuf_putc(b, '}');
  while (b->len % 8 != 0 && !b->failed) esp_strbuf_putc(b, ' ');
}

/* Fixes the places of all tensors, reserves the space and writes the header. */
static esp_status lay_out(esp_st_writer *w) {
  if (w->laid_out) return ESP_OK;
  esp_status st = ESP_OK;
  esp_strbuf header;
  esp_strbuf_init(&header);
  w_tensor **order = esp_mem_alloc(ESP_MEM_HOST, ((size_t)w->count + 1) * sizeof *order);
  if (!order) return ESP_ERR_MEMORY;
  int n = 0;
  int64_t at = 0;
  for (w_tensor *t = w->tensors; t; t = t->next) order[n++] = t;
  qsort(order, (size_t)n, sizeof *order, by_width);
  for (int i = 0; i < n; i++) {
    order[i]->begin = at;
    if (__builtin_add_overflow(at, order[i]->bytes, &at)) {
      st = esp_fail(ESP_ERR_INTERNAL, "%s: too large", w->path);
      goto out;
    }
  }
  put_header(w, &header, order);
  if (header.failed) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  unsigned char len[8];
  for (int i = 0; i < 8; i++) len[i] = (unsigned char)((uint64_t)header.len >> (8 * i));
  w->data_at = 8 + (int64_t)header.len;
  ESP_GOTO(esp_atomic_reserve(&w->file, w->data_at + at));
  ESP_GOTO(esp_atomic_write(&w->file, len, 8, 0));
  ESP_GOTO(esp_atomic_write(&w->file, header.data, header.len, 8));
  w->laid_out = true;
out:
  esp_strbuf_deinit(&header);
  esp_mem_free(order);
  return st;
}

/* Notes [from, to) as written; a byte written twice is a mistake of the caller. */
static esp_status note_range(const esp_st_writer *w, w_tensor *t, int64_t from, int64_t to) {
  if (from == to) return ESP_OK;
  int i = 0;
  while (i < t->n_done && t->done[i].to < from) i++;
  bool touches_left = i < t->n_done && t->done[i].to == from;
  int right = touches_left ? i + 1 : i;
  if (right < t->n_done && t->done[right].from < to)
    return esp_fail(ESP_ERR_INTERNAL, "%s: tensor '%s': bytes from %lld written twice", w->path, t->name,
                    (long long)from);
  bool touches_right = right < t->n_done && t->done[right].from == to;
  if (touches_left && touches_right) {
    t->done[i].to = t->done[right].to;
    memmove(&t->done[right], &t->done[right + 1], (size_t)(t->n_done - right - 1) * sizeof *t->done);
    t->n_done--;
  } else if (touches_left) {
    t->done[i].to = to;
  } else if (touches_right) {
    t->done[right].from = from;
  } else {
    if (t->n_done == t->cap_done) {
      int cap = t->cap_done ? t->cap_done * 2 : 4;
      w_range *grown = esp_mem_realloc(ESP_MEM_HOST, t->done, (size_t)cap * sizeof *grown);
      if (!grown) return ESP_ERR_MEMORY;
      t->done = grown;
      t->cap_done = cap;
    }
    memmove(&t->done[i + 1], &t->done[i], (size_t)(t->n_done - i) * sizeof *t->done);
    t->done[i] = (w_range){from, to};
    t->n_done++;
  }
  return ESP_OK;
}

esp_status esp_st_writer_put_at(esp_st_writer *w, const char *name, int64_t offset, const void *data, int64_t bytes) {
  ESP_TRY(lay_out(w));
  w_tensor *t = esp_map_get(w->by_name, name, strlen(name));
  if (!t) return esp_fail(ESP_ERR_INTERNAL, "%s: tensor '%s' was not declared", w->path, name);
  if (offset < 0 || bytes < 0 || offset > t->bytes || bytes > t->bytes - offset)
    return esp_fail(ESP_ERR_INTERNAL, "%s: tensor '%s': %lld bytes at %lld do not fit in %lld", w->path, name,
                    (long long)bytes, (long long)offset, (long long)t->bytes);
  ESP_TRY(note_range(w, t, offset, offset + bytes));
  return esp_atomic_write(&w->file, data, (size_t)bytes, w->data_at + t->begin + offset);
}

esp_status esp_st_writer_put(esp_st_writer *w, const char *name, const void *data, int64_t bytes) {
  const w_tensor *t = esp_map_get(w->by_name, name, strlen(name));
  if (t && t->bytes != bytes)
    return esp_fail(ESP_ERR_INTERNAL, "%s: tensor '%s' has %lld bytes, not %lld", w->path, name, (long long)t->bytes,
                    (long long)bytes);
  return esp_st_writer_put_at(w, name, 0, data, bytes);
}

esp_status esp_st_writer_commit(esp_st_writer *w) {
  esp_status st = lay_out(w); /* a file without tensors is legal */
  for (const w_tensor *t = w->tensors; t && st == ESP_OK; t = t->next)
    if (t->bytes > 0 && !(t->n_done == 1 && t->done[0].from == 0 && t->done[0].to == t->bytes))
      st = esp_fail(ESP_ERR_INTERNAL, "%s: tensor '%s' was not written completely", w->path, t->name);
  if (st != ESP_OK) {
    esp_st_writer_abort(w);
    return st;
  }
  st = esp_atomic_commit(&w->file);
  destroy(w);
  return st;
}
