/* safetensors.h: reading (mmap) and writing (atomic) safetensors files and sharded sets.
 * Format: 8-byte little-endian header length, JSON header, data. Every rule is checked: header size <= 100 MB and
 * inside the file, starts with '{' (white space may precede it), no duplicate keys, known dtypes, offsets in bounds, no
 * overlap, no holes, begin<=end, shape x dtype == extent (overflow-safe), __metadata__ is string -> string. */
#ifndef ESP_IO_SAFETENSORS_H
#define ESP_IO_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/error.h"
#include "core/tensor.h"

typedef struct esp_st_entry {
  const char *name;
  esp_dtype dtype;
  int raw_dtype_known; /* 1: dtype above is valid; 0: a legal dtype we cannot compute with (F8_E4M3, ...): bytes only */
  int ndim;
  int64_t shape[8];
  const void *data; /* into the mapping; file order, may be unaligned */
  int64_t bytes;
  const char *file; /* path, for messages */
} esp_st_entry;

typedef struct esp_st esp_st;
/* A file, or a Hugging Face directory (model.safetensors, or model.safetensors.index.json with its shards). */
esp_status esp_st_open(const char *path, esp_st **out);
void esp_st_close(esp_st *s);
int esp_st_count(const esp_st *s);
const esp_st_entry *esp_st_at(const esp_st *s, int i);
/* NULL when absent. A name that __metadata__ maps to a stored tensor (a tied weight saved once) finds that tensor. */
const esp_st_entry *esp_st_find(const esp_st *s, const char *name);
const char *esp_st_metadata(const esp_st *s, const char *key); /* NULL */
int esp_st_shards(const esp_st *s, const char *const **paths);
/* Parses a header held in memory (fuzzing): data_bytes is what follows it. */
esp_status esp_st_parse(const void *bytes, size_t n, const char *path, esp_st **out);
/* Tells the kernel that the pages of this entry are no longer needed. */
void esp_st_drop(const esp_st_entry *e);
/* xxh3-128 (hex, 33 bytes) over all headers. */
void esp_st_header_hash(const esp_st *s, char out[33]);

/* Writer: declare all tensors, then write each once in any order, then commit (fsync, rename) or abort. */
typedef struct esp_st_writer esp_st_writer;
esp_status esp_st_writer_create(const char *path, esp_st_writer **out);
esp_status esp_st_writer_declare(esp_st_writer *w, const char *name, esp_dtype dtype, int ndim, const int64_t *shape);
esp_status esp_st_writer_metadata(esp_st_writer *w, const char *key, const char *value);
esp_status esp_st_writer_put(esp_st_writer *w, const char *name, const void *data, int64_t bytes);
/* A part of a tensor: bytes at an offset inside it (streaming merges). */
esp_status esp_st_writer_put_at(esp_st_writer *w, const char *name, int64_t offset, const void *data, int64_t bytes);
esp_status esp_st_writer_commit(esp_st_writer *w); /* destroys w; every declared tensor must be complete */
void esp_st_writer_abort(esp_st_writer *w);        /* removes the temporary file; destroys w; NULL allowed */

#endif
