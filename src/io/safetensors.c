/* safetensors.c: the reader. The rules are those of the format's own implementation (huggingface/safetensors,
 * safetensors/src/tensor.rs), whose test files are among the tests, plus: no duplicate keys, and string-only metadata.
 * White space before the '{' is accepted, as there. */
#include "io/safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xxhash.h>

#include "core/arena.h"
#include "core/map.h"
#include "core/mem.h"
#include "io/file.h"
#include "io/json.h"

#define HEADER_LIMIT 100000000ull
#define MOST_DIMS 8

typedef struct st_meta {
  struct st_meta *next;
  const char *key, *value;
} st_meta;

struct esp_st {
  esp_arena *arena;
  esp_map_file *maps; /* one per shard */
  const char **paths;
  int n_files;
  esp_st_entry *entries;
  int count, cap;
  esp_map *by_name; /* -> index + 1; entries may still move while reading */
  st_meta *meta;
  XXH3_state_t *hash;
};

static const struct {
  const char *name;
  int bits;
} legal[] = {{"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6},     {"F6_E3M2", 6},    {"U8", 8},   {"I8", 8},
             {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8},     {"I16", 16},       {"U16", 16}, {"F16", 16},
             {"BF16", 16},   {"I32", 32},    {"U32", 32},        {"F32", 32},       {"C64", 64}, {"F64", 64},
             {"I64", 64},    {"U64", 64},    {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}};

static int legal_bits(const char *name) {
  for (size_t i = 0; i < sizeof legal / sizeof *legal; i++)
    if (strcmp(name, legal[i].name) == 0) return legal[i].bits;
  return 0;
}

static esp_st *st_new(void) {
  esp_st *s = esp_mem_alloc(ESP_MEM_HOST, sizeof *s);
  if (!s) return NULL;
  s->arena = esp_arena_create(ESP_MEM_HOST);
  s->by_name = esp_map_create(64);
  s->hash = XXH3_createState();
  if (s->arena && s->by_name && s->hash) {
    XXH3_128bits_reset(s->hash);
    return s;
  }
  esp_st_close(s);
  return NULL;
}

void esp_st_close(esp_st *s) {
  if (!s) return;
  for (int i = 0; i < s->n_files && s->maps; i++) esp_file_unmap(&s->maps[i]);
  esp_mem_free(s->maps);
  esp_mem_free(s->entries);
  esp_map_destroy(s->by_name);
  esp_arena_destroy(s->arena);
  XXH3_freeState(s->hash);
  esp_mem_free(s);
}

static esp_status read_metadata(esp_st *s, const json_t *meta, const char *path) {
  if (json_is_null(meta)) return ESP_OK;
  if (!json_is_object(meta)) return esp_fail(ESP_ERR_DATA, "%s: __metadata__ must be an object", path);
  const char *key;
  json_t *value;
  json_object_foreach((json_t *)meta, key, value) {
    if (!json_is_string(value)) return esp_fail(ESP_ERR_DATA, "%s: __metadata__ '%s' must be a string", path, key);
    if (strlen(json_string_value(value)) != json_string_length(value))
      return esp_fail(ESP_ERR_DATA, "%s: __metadata__ '%s' holds a zero byte", path, key);
    st_meta *m = esp_arena_alloc(s->arena, sizeof *m);
    if (!m) return ESP_ERR_MEMORY;
    m->key = esp_arena_strdup(s->arena, key);
    m->value = esp_arena_strdup(s->arena, json_string_value(value));
    if (!m->key || !m->value) return ESP_ERR_MEMORY;
    m->next = s->meta;
    s->meta = m;
  }
  return ESP_OK;
}

/* A non-negative integer; false on anything else. */
static bool get_u64(const json_t *j, uint64_t *out) {
  if (!json_is_integer(j) || json_integer_value(j) < 0) return false;
  *out = (uint64_t)json_integer_value(j);
  return true;
}

/* One tensor of a header; begin and end count from the first data byte. */
static esp_status read_tensor(esp_st *s, const char *name, const json_t *info, const char *path, uint64_t *begin,
                              uint64_t *end, esp_st_entry *e) {
  if (!json_is_object(info)) return esp_fail(ESP_ERR_DATA, "%s: tensor '%s': must be an object", path, name);
  const json_t *dtype = json_object_get(info, "dtype"), *shape = json_object_get(info, "shape");
  const json_t *offsets = json_object_get(info, "data_offsets");
  if (!json_is_string(dtype)) return esp_fail(ESP_ERR_DATA, "%s: tensor '%s': no dtype", path, name);
  bool zero = strlen(json_string_value(dtype)) != json_string_length(dtype);
  int bits = zero ? 0 : legal_bits(json_string_value(dtype));
  if (!bits) return esp_fail(ESP_ERR_DATA, "%s: tensor '%s': unknown dtype '%s'", path, name, json_string_value(dtype));
  if (!json_is_array(shape)) return esp_fail(ESP_ERR_DATA, "%s: tensor '%s': no shape", path, name);
  if (json_array_size(shape) > MOST_DIMS)
    return esp_fail(ESP_ERR_DATA, "%s: tensor '%s': more than %d dimensions", path, name, MOST_DIMS);
  if (!json_is_array(offsets) || json_array_size(offsets) != 2 || !get_u64(json_array_get(offsets, 0), begin) ||
      !get_u64(json_array_get(offsets, 1), end) || *begin > *end)
    return esp_fail(ESP_ERR_DATA, "%s: tensor '%s': data_offsets must be [begin, end] with begin <= end", path, name);
  memset(e, 0, sizeof *e);
  e->ndim = (int)json_array_size(shape);
  uint64_t total = (uint64_t)bits;
  for (int i = 0; i < e->ndim; i++) {
    uint64_t d;
    if (!get_u64(json_array_get(shape, (size_t)i), &d))
      return esp_fail(ESP_ERR_DATA, "%s: tensor '%s': dimension %d is not a size", path, name, i);
    if (__builtin_mul_overflow(total, d, &total))
      return esp_fail(ESP_ERR_DATA, "%s: tensor '%s': the shape overflows", path, name);
    e->shape[i] = (int64_t)d;
  }
  if (total % 8 != 0 || total / 8 != *end - *begin)
    return esp_fail(ESP_ERR_DATA, "%s: tensor '%s': shape and dtype need %llu bytes, data_offsets give %llu", path,
                    name, (unsigned long long)(total / 8), (unsigned long long)(*end - *begin));
  int known = esp_dtype_parse(json_string_value(dtype));
  e->raw_dtype_known = known >= 0;
  e->dtype = known >= 0 ? (esp_dtype)known : ESP_U8;
  e->bytes = (int64_t)(*end - *begin);
  e->name = esp_arena_strdup(s->arena, name);
  e->file = path;
  return e->name ? ESP_OK : ESP_ERR_MEMORY;
}

static esp_status add_entry(esp_st *s, const esp_st_entry *e) {
  size_t len = strlen(e->name);
  void *seen = esp_map_get(s->by_name, e->name, len);
  if (seen)
    return esp_fail(ESP_ERR_DATA, "%s: tensor '%s' is also in %s", e->file, e->name,
                    s->entries[(intptr_t)seen - 1].file);
  if (s->count == s->cap) {
    int cap = s->cap ? s->cap * 2 : 64;
    esp_st_entry *grown = esp_mem_realloc(ESP_MEM_HOST, s->entries, (size_t)cap * sizeof *grown);
    if (!grown) return ESP_ERR_MEMORY;
    s->entries = grown;
    s->cap = cap;
  }
  s->entries[s->count++] = *e;
  return esp_map_put(s->by_name, e->name, len, (void *)(intptr_t)s->count) ? ESP_OK : ESP_ERR_MEMORY;
}

typedef struct st_span {
  uint64_t begin, end;
  esp_st_entry entry;
} st_span;

/* Ties (empty tensors) by name, so that the order is a function of the file. */
static int by_offset(const void *pa, const void *pb) {
  const st_span *a = pa, *b = pb;
  if (a->begin != b->begin) return a->begin < b->begin ? -1 : 1;
  if (a->end != b->end) return a->end < b->end ? -1 : 1;
  return strcmp(a->entry.name, b->entry.name);
}

/* Adds one file's tensors. `path` and `bytes` must live as long as s. */
static esp_status read_file(esp_st *s, const char *bytes, size_t n, const char *path) {
  esp_status st = ESP_OK;
  json_t *header = NULL;
  st_span *spans = NULL;
  size_t count = 0;
  uint64_t len = 0;
  if (n < 8) return esp_fail(ESP_ERR_DATA, "%s: not a safetensors file: %zu bytes, shorter than its header", path, n);
  for (int i = 7; i >= 0; i--) len = len << 8 | (unsigned char)bytes[i];
  if (len > HEADER_LIMIT)
    return esp_fail(ESP_ERR_DATA, "%s: not a safetensors file: a header of %llu bytes (at most 100 MB)", path,
                    (unsigned long long)len);
  if (len > n - 8)
    return esp_fail(ESP_ERR_DATA, "%s: truncated: the header has %llu bytes, the file %zu", path,
                    (unsigned long long)len, n);
  const char *text = bytes + 8, *data = text + len, *first = text;
  while (first < data && (*first == ' ' || *first == '\t' || *first == '\n' || *first == '\r')) first++;
  if (first == data || *first != '{')
    return esp_fail(ESP_ERR_DATA, "%s: not a safetensors file: the header does not start with '{'", path);
  ESP_GOTO(esp_json_parse(text, (size_t)len, path, &header));
  if (!json_is_object(header)) {
    st = esp_fail(ESP_ERR_DATA, "%s: the header is not an object", path);
    goto out;
  }
  spans = esp_mem_alloc(ESP_MEM_HOST, json_object_size(header) * sizeof *spans);
  if (!spans) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  const char *name;
  json_t *info;
  json_object_foreach(header, name, info) {
    if (strcmp(name, "__metadata__") == 0) {
      ESP_GOTO(read_metadata(s, info, path));
      continue;
    }
    st_span *p = &spans[count];
    ESP_GOTO(read_tensor(s, name, info, path, &p->begin, &p->end, &p->entry));
    count++;
  }
  qsort(spans, count, sizeof *spans, by_offset);
  const uint64_t available = n - 8 - len;
  uint64_t at = 0;
  for (size_t i = 0; i < count; i++) {
    st_span *p = &spans[i];
    if (p->begin != at) {
      st = esp_fail(ESP_ERR_DATA, "%s: tensor '%s': starts at %llu, %s", path, p->entry.name,
                    (unsigned long long)p->begin, p->begin < at ? "inside another tensor" : "after a hole");
      goto out;
    }
    at = p->end;
    if (at > available) {
      st = esp_fail(ESP_ERR_DATA, "%s: truncated: tensor '%s' ends at byte %llu of %llu", path, p->entry.name,
                    (unsigned long long)at, (unsigned long long)available);
      goto out;
    }
    p->entry.data = data + p->begin;
    ESP_GOTO(add_entry(s, &p->entry));
  }
  if (at != available)
    st = esp_fail(ESP_ERR_DATA, "%s: %llu bytes after the last tensor", path, (unsigned long long)(available - at));
  else
    XXH3_128bits_update(s->hash, bytes, 8 + (size_t)len);
out:
  json_decref(header);
  esp_mem_free(spans);
  return st;
}

esp_status esp_st_parse(const void *bytes, size_t n, const char *path, esp_st **out) {
  *out = NULL;
  esp_st *s = st_new();
  if (!s) return ESP_ERR_MEMORY;
  const char *name = esp_arena_strdup(s->arena, path);
  esp_status st = name ? read_file(s, bytes, n, name) : ESP_ERR_MEMORY;
  if (st == ESP_OK)
    *out = s;
  else
    esp_st_close(s);
  return st;
}

/* Maps and reads one more file. */
static esp_status add_file(esp_st *s, const char *path) {
  const char *kept = esp_arena_strdup(s->arena, path);
  if (!kept) return ESP_ERR_MEMORY;
  ESP_TRY(esp_file_map(kept, &s->maps[s->n_files]));
  s->paths[s->n_files++] = kept;
  return read_file(s, s->maps[s->n_files - 1].data, s->maps[s->n_files - 1].size, kept);
}

static esp_status room_for_files(esp_st *s, size_t n) {
  s->maps = esp_mem_alloc(ESP_MEM_HOST, n * sizeof *s->maps);
  s->paths = esp_arena_alloc(s->arena, n * sizeof *s->paths);
  return s->maps && s->paths ? ESP_OK : ESP_ERR_MEMORY;
}

static int by_text(const void *a, const void *b) {
  return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* The shards of an index: sorted, each once; then every tensor of the index must be where it says. */
static esp_status read_index(esp_st *s, const char *dir, const char *index_path) {
  esp_status st = ESP_OK;
  json_t *index = NULL;
  const char **shards = NULL, *name;
  json_t *file;
  size_t n = 0;
  char path[4096];
  ESP_GOTO(esp_json_load(index_path, &index));
  json_t *map = json_object_get(index, "weight_map");
  if (!json_is_object(map) || json_object_size(map) == 0) {
    st = esp_fail(ESP_ERR_DATA, "%s: no weight_map", index_path);
    goto out;
  }
  shards = esp_mem_alloc(ESP_MEM_HOST, json_object_size(map) * sizeof *shards);
  if (!shards) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  json_object_foreach(map, name, file) {
    const char *f = json_string_value(file);
    if (!f || !*f || strlen(f) != json_string_length(file) || strchr(f, '/') || strcmp(f, "..") == 0 ||
        strcmp(f, ".") == 0) {
      st = esp_fail(ESP_ERR_DATA, "%s: tensor '%s': the shard must be the name of a file in the same directory",
                    index_path, name);
      goto out;
    }
    shards[n++] = f;
  }
  qsort(shards, n, sizeof *shards, by_text);
  size_t unique = 0;
  for (size_t i = 0; i < n; i++)
    if (i == 0 || strcmp(shards[i], shards[unique - 1]) != 0) shards[unique++] = shards[i];
  ESP_GOTO(room_for_files(s, unique));
  for (size_t i = 0; i < unique; i++) ESP_GOTO(add_file(s, esp_path_join(path, sizeof path, dir, shards[i])));
  json_object_foreach(map, name, file) {
    void *at = esp_map_get(s->by_name, name, strlen(name));
    const char *in = at ? s->entries[(intptr_t)at - 1].file : NULL, *slash = in ? strrchr(in, '/') : NULL;
    if (!in || strcmp(slash ? slash + 1 : in, json_string_value(file)) != 0) {
      st = esp_fail(ESP_ERR_DATA, "%s: tensor '%s' is not in %s", index_path, name, json_string_value(file));
      goto out;
    }
  }
out:
  json_decref(index);
  esp_mem_free(shards);
  return st;
}

static bool ends_with(const char *s, const char *tail) {
  size_t n = strlen(s), m = strlen(tail);
  return n >= m && strcmp(s + n - m, tail) == 0;
}

esp_status esp_st_open(const char *path, esp_st **out) {
  *out = NULL;
  esp_status st = ESP_OK;
  char file[4096];
  esp_st *s = st_new();
  if (!s) return ESP_ERR_MEMORY;
  if (esp_dir_exists(path)) {
    if (esp_file_exists(esp_path_join(file, sizeof file, path, "model.safetensors"))) {
      ESP_GOTO(room_for_files(s, 1));
      ESP_GOTO(add_file(s, file));
    } else if (esp_file_exists(esp_path_join(file, sizeof file, path, "model.safetensors.index.json"))) {
      ESP_GOTO(read_index(s, path, file));
    } else {
      bool pickled = esp_file_exists(esp_path_join(file, sizeof file, path, "pytorch_model.bin"));
      st = esp_fail(ESP_ERR_DATA, "%s: no model.safetensors and no model.safetensors.index.json%s", path,
                    pickled ? " (pytorch_model.bin must be converted to safetensors first)" : "");
    }
  } else if (ends_with(path, ".index.json")) {
    const char *slash = strrchr(path, '/');
    snprintf(file, sizeof file, "%.*s", slash ? (int)(slash - path) + 1 : 1, slash ? path : ".");
    ESP_GOTO(read_index(s, file, path));
  } else {
    ESP_GOTO(room_for_files(s, 1));
    ESP_GOTO(add_file(s, path));
  }
out:
  if (st == ESP_OK)
    *out = s;
  else
    esp_st_close(s);
  return st;
}

int esp_st_count(const esp_st *s) {
  return s->count;
}

const esp_st_entry *esp_st_at(const esp_st *s, int i) {
  return i >= 0 && i < s->count ? &s->entries[i] : NULL;
}

const esp_st_entry *esp_st_find(const esp_st *s, const char *name) {
  void *at = esp_map_get(s->by_name, name, strlen(name));
  if (!at) {
    /* save_model of the Python package stores a shared tensor once and leaves "dropped name": "kept name". */
    const char *kept = esp_st_metadata(s, name);
    if (kept) at = esp_map_get(s->by_name, kept, strlen(kept));
  }
  return at ? &s->entries[(intptr_t)at - 1] : NULL;
}

const char *esp_st_metadata(const esp_st *s, const char *key) {
  for (const st_meta *m = s->meta; m; m = m->next)
    if (strcmp(m->key, key) == 0) return m->value;
  return NULL;
}

int esp_st_shards(const esp_st *s, const char *const **paths) {
  if (paths) *paths = s->paths;
  return s->n_files;
}

void esp_st_drop(const esp_st_entry *e) {
  /* Whole pages inside the entry: the edges may belong to neighbours still in use. */
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), from = (uintptr_t)e->data, to = from + (uintptr_t)e->bytes;
  from = (from + page - 1) & ~(page - 1);
  to &= ~(page - 1);
  if (from < to) madvise((void *)from, to - from, MADV_DONTNEED);
}

void esp_st_header_hash(const esp_st *s, char out[33]) {
  XXH128_hash_t h = XXH3_128bits_digest(s->hash);
  snprintf(out, 33, "%016llx%016llx", (unsigned long long)h.high64, (unsigned long long)h.low64);
}
