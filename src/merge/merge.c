#include "merge/merge.h"

#include <dirent.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/map.h"
#include "io/file.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "merge/open.h"

enum { BLOCK_ELEMENTS = 1 << 22 }; /* 16 MiB of fp32 at a time */

typedef struct merger {
  const esp_merge_spec *spec;
  esp_merge_inputs in;
  esp_st *file;                     /* NULL: the base has no weights yet (trained from its config alone) */
  esp_map *weight_site, *bias_site; /* tensor name -> site */
  esp_site *untied_head;            /* a head that no longer equals the embedding */
  int out_dtype;                    /* -1: as stored */
  char staged[PATH_MAX];
  json_t *weight_map;
  int64_t total_bytes, moved, lost;
  esp_merge_stats stats;
} merger;

static bool changes_weight(const merger *g, const esp_site *s) {
  for (int i = 0; i < g->spec->n_adapters; i++)
    if (esp_adapter_changes(g->in.adapters[i], s)) return true;
  return false;
}

static bool changes_bias(const merger *g, const esp_site *s) {
  for (int i = 0; i < g->spec->n_adapters; i++)
    if (esp_adapter_changes_bias(g->in.adapters[i], s)) return true;
  return false;
}

/* Rows of the effective weight as the product sees it (adapter.h). */
static int64_t rows_of(const esp_site *s) {
  return s->kind == ESP_SITE_LINEAR ? s->out : s->kind == ESP_SITE_EMBED ? s->in : 1;
}
static int64_t cols_of(const esp_site *s) {
  return s->kind == ESP_SITE_LINEAR ? s->in : s->out;
}

/* How much of the change survives the one rounding. */
static void account_rounding(merger *g, const float *base, const float *merged, esp_dtype dtype, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    float d = fabsf(merged[i] - base[i]);
    if (d == 0) continue;
    g->moved++;
    if (d > g->stats.max_delta) g->stats.max_delta = d;
    if (dtype == ESP_BF16)
      g->lost += esp_f32_to_bf16(merged[i]) == esp_f32_to_bf16(base[i]);
    else if (dtype == ESP_F16)
      g->lost += esp_f32_to_f16(merged[i]) == esp_f32_to_f16(base[i]);
  }
}

/* Block by block: base rows, effective rows, one rounding, into place. A Conv1D weight is stored [in, out]: whole. */
static esp_status write_weight(merger *g, esp_st_writer *w, const char *name, esp_site *s, esp_dtype dtype) {
  esp_status st = ESP_OK;
  int64_t rows = rows_of(s), cols = cols_of(s), step = s->transposed ? rows : BLOCK_ELEMENTS / cols;
  if (step < 1) step = 1;
  if (step > rows) step = rows;
  size_t elements = (size_t)(step * cols), size = esp_dtype_size(dtype);
  float *base = esp_mem_alloc(ESP_MEM_WORKSPACE, elements * 4),
        *merged = esp_mem_alloc(ESP_MEM_WORKSPACE, elements * 4);
  void *rounded = esp_mem_alloc(ESP_MEM_WORKSPACE, elements * 8);
  if (!base || !merged || !rounded) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  for (int64_t r = 0; r < rows; r += step) {
    int64_t n = r + step <= rows ? step : rows - r;
    ESP_GOTO(esp_site_read_weight_rows(g->in.model, s, r, n, base));
    memcpy(merged, base, (size_t)(n * cols) * 4);
    ESP_GOTO(esp_adapters_effective_rows(g->in.adapters, g->spec->n_adapters, s, r, n, merged));
    for (int64_t i = 0; i < n * cols; i++)
      if (!isfinite(merged[i])) {
        st = esp_fail(ESP_ERR_DATA, "%s: the merged weight has a value that is not finite in row %lld", name,
                      (long long)(r + i / cols));
        goto out;
      }
    account_rounding(g, base, merged, dtype, n * cols);
    if (s->transposed) { /* base is free again: the stored orientation */
      for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) base[j * rows + i] = merged[i * cols + j];
      esp_convert(rounded, dtype, base, ESP_F32, rows * cols);
    } else {
      esp_convert(rounded, dtype, merged, ESP_F32, n * cols);
    }
    ESP_GOTO(esp_st_writer_put_at(w, name, r * cols * (int64_t)size, rounded, n * cols * (int64_t)size));
  }
  g->stats.changed++;
out:
  esp_mem_free(base);
  esp_mem_free(merged);
  esp_mem_free(rounded);
  return st;
}

static esp_status write_bias(merger *g, esp_st_writer *w, const char *name, esp_site *s, esp_dtype dtype) {
  esp_status st = ESP_OK;
  float *bias = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)s->out * 4);
  void *rounded = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)s->out * 8);
  if (!bias || !rounded) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  ESP_GOTO(esp_site_read_bias(g->in.model, s, bias));
  ESP_GOTO(esp_adapters_effective_bias(g->in.adapters, g->spec->n_adapters, s, bias));
  esp_convert(rounded, dtype, bias, ESP_F32, s->out);
  ESP_GOTO(esp_st_writer_put(w, name, rounded, s->out * (int64_t)esp_dtype_size(dtype)));
  g->stats.changed++;
out:
  esp_mem_free(bias);
  esp_mem_free(rounded);
  return st;
}

static esp_status write_unchanged(esp_st_writer *w, const esp_st_entry *e, esp_dtype dtype) {
  if (!e->raw_dtype_known || dtype == e->dtype) return esp_st_writer_put(w, e->name, e->data, e->bytes);
  int64_t n = e->bytes / (int64_t)esp_dtype_size(e->dtype), size = (int64_t)esp_dtype_size(dtype);
  void *block = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)BLOCK_ELEMENTS * 8);
  if (!block) return ESP_ERR_MEMORY;
  esp_status st = ESP_OK;
  for (int64_t i = 0; i < n && st == ESP_OK; i += BLOCK_ELEMENTS) {
    int64_t k = n - i < BLOCK_ELEMENTS ? n - i : BLOCK_ELEMENTS;
    esp_convert(block, dtype, (const char *)e->data + i * (int64_t)esp_dtype_size(e->dtype), e->dtype, k);
    st = esp_st_writer_put_at(w, e->name, i * size, block, k * size);
  }
  esp_mem_free(block);
  return st;
}

static bool is_float(esp_dtype t) {
  return t == ESP_F32 || t == ESP_BF16 || t == ESP_F16 || t == ESP_F64;
}

static esp_dtype dtype_of(const merger *g, esp_dtype stored) {
  return g->out_dtype >= 0 && is_float(stored) ? (esp_dtype)g->out_dtype : stored;
}

static void note_written(merger *g, const char *name, const char *shard, int64_t bytes) {
  json_object_set_new(g->weight_map, name, json_string(shard));
  g->total_bytes += bytes;
  g->stats.tensors++;
}

/* One shard of the base becomes one shard of the output. */
static esp_status write_shard(merger *g, const char *path, bool with_head) {
  esp_status st = ESP_OK;
  esp_st_writer *w = NULL;
  const char *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
  char out[PATH_MAX];
  ESP_GOTO(esp_st_writer_create(esp_path_join(out, sizeof out, g->staged, name), &w));
  ESP_GOTO(esp_st_writer_metadata(w, "format", "pt"));
  for (int i = 0; i < esp_st_count(g->file); i++) {
    const esp_st_entry *e = esp_st_at(g->file, i);
    if (strcmp(e->file, path) != 0) continue;
    if (!e->raw_dtype_known) {
      st = esp_fail(ESP_ERR_DATA, "%s: tensor '%s' has a type that cannot be written again", path, e->name);
      goto out;
    }
    ESP_GOTO(esp_st_writer_declare(w, e->name, dtype_of(g, e->dtype), e->ndim, e->shape));
  }
  if (with_head) {
    int64_t shape[2] = {g->untied_head->out, g->untied_head->in};
    ESP_GOTO(
        esp_st_writer_declare(w, "lm_head.weight", dtype_of(g, esp_model_describe(g->in.model)->stored), 2, shape));
  }
  for (int i = 0; i < esp_st_count(g->file); i++) {
    const esp_st_entry *e = esp_st_at(g->file, i);
    if (strcmp(e->file, path) != 0) continue;
    esp_dtype dtype = dtype_of(g, e->dtype);
    esp_site *s = esp_map_get(g->weight_site, e->name, strlen(e->name));
    esp_site *b = esp_map_get(g->bias_site, e->name, strlen(e->name));
    if (s && changes_weight(g, s))
      ESP_GOTO(write_weight(g, w, e->name, s, dtype));
    else if (b && changes_bias(g, b))
      ESP_GOTO(write_bias(g, w, e->name, b, dtype));
    else
      ESP_GOTO(write_unchanged(w, e, dtype));
    int64_t n = 1;
    for (int k = 0; k < e->ndim; k++) n *= e->shape[k];
    note_written(g, e->name, name, n * (int64_t)esp_dtype_size(dtype));
    esp_st_drop(e);
  }
  if (with_head) {
    esp_dtype dtype = dtype_of(g, esp_model_describe(g->in.model)->stored);
    ESP_GOTO(write_weight(g, w, "lm_head.weight", g->untied_head, dtype));
    note_written(g, "lm_head.weight", name, g->untied_head->out * g->untied_head->in * (int64_t)esp_dtype_size(dtype));
  }
  st = esp_st_writer_commit(w);
  w = NULL;
out:
  esp_st_writer_abort(w);
  return st;
}

/* A base that never had weights: everything comes from its sites. */
static esp_status write_from_sites(merger *g) {
  esp_status st = ESP_OK;
  esp_st_writer *w = NULL;
  esp_site **sites;
  char out[PATH_MAX];
  int n = esp_model_sites(g->in.model, &sites);
  esp_dtype dtype = dtype_of(g, esp_model_describe(g->in.model)->stored);
  bool tied = esp_model_describe(g->in.model)->tied;
  ESP_GOTO(esp_st_writer_create(esp_path_join(out, sizeof out, g->staged, "model.safetensors"), &w));
  ESP_GOTO(esp_st_writer_metadata(w, "format", "pt"));
  for (int pass = 0; pass < 2; pass++)
    for (int i = 0; i < n; i++) {
      esp_site *s = sites[i];
      if (s->is_head && tied) continue;
      int ndim = s->kind == ESP_SITE_NORM ? 1 : 2;
      int64_t shape[2] = {s->kind == ESP_SITE_NORM ? s->out : rows_of(s), cols_of(s)};
      if (s->transposed) {
        shape[0] = s->in;
        shape[1] = s->out;
      }
      if (pass == 0) {
        ESP_GOTO(esp_st_writer_declare(w, s->tensor, dtype, ndim, shape));
        if (s->bias_tensor) ESP_GOTO(esp_st_writer_declare(w, s->bias_tensor, dtype, 1, &s->out));
        continue;
      }
      ESP_GOTO(write_weight(g, w, s->tensor, s, dtype));
      note_written(g, s->tensor, "model.safetensors", rows_of(s) * cols_of(s) * (int64_t)esp_dtype_size(dtype));
      if (s->bias_tensor) {
        ESP_GOTO(write_bias(g, w, s->bias_tensor, s, dtype));
        note_written(g, s->bias_tensor, "model.safetensors", s->out * (int64_t)esp_dtype_size(dtype));
      }
    }
  st = esp_st_writer_commit(w);
  w = NULL;
out:
  esp_st_writer_abort(w);
  return st;
}

static bool ends_with(const char *s, const char *end) {
  size_t n = strlen(s), k = strlen(end);
  return n >= k && strcmp(s + n - k, end) == 0;
}

/* Tokenizer, generation settings, templates: every other file of the base. */
static esp_status copy_companions(const merger *g) {
  esp_status st = ESP_OK;
  DIR *d = opendir(g->spec->base);
  if (!d) return esp_fail(ESP_ERR_DATA, "%s: cannot be listed", g->spec->base);
  for (struct dirent *e; (e = readdir(d));) {
    const char *n = e->d_name;
    char src[PATH_MAX], dst[PATH_MAX];
    if (!(ends_with(n, ".json") || ends_with(n, ".txt") || ends_with(n, ".model") || ends_with(n, ".jinja"))) continue;
    if (strcmp(n, "config.json") == 0 || ends_with(n, ".index.json")) continue;
    esp_path_join(src, sizeof src, g->spec->base, n);
    if (!esp_file_exists(src)) continue;
    ESP_GOTO(esp_copy_file(src, esp_path_join(dst, sizeof dst, g->staged, n)));
  }
out:
  closedir(d);
  return st;
}

static esp_status write_config(const merger *g) {
  esp_status st;
  json_t *j = NULL;
  char path[PATH_MAX];
  ESP_GOTO(esp_json_load(esp_path_join(path, sizeof path, g->spec->base, "config.json"), &j));
  if (g->out_dtype >= 0) {
    const char *name = g->out_dtype == ESP_BF16 ? "bfloat16" : g->out_dtype == ESP_F16 ? "float16" : "float32";
    json_object_set_new(j, json_object_get(j, "dtype") ? "dtype" : "torch_dtype", json_string(name));
  }
  if (g->untied_head) json_object_set_new(j, "tie_word_embeddings", json_false());
  st = esp_json_save(esp_path_join(path, sizeof path, g->staged, "config.json"), j, 0);
out:
  json_decref(j);
  return st;
}

static esp_status write_index(const merger *g) {
  char path[PATH_MAX];
  json_t *j =
      json_pack("{s:{s:I},s:O}", "metadata", "total_size", (json_int_t)g->total_bytes, "weight_map", g->weight_map);
  if (!j) return esp_fail_oom("weight index", 0);
  esp_status st = esp_json_save(esp_path_join(path, sizeof path, g->staged, "model.safetensors.index.json"), j, 1);
  json_decref(j);
  return st;
}

static esp_status index_sites(merger *g) {
  esp_site **sites;
  int n = esp_model_sites(g->in.model, &sites);
  g->weight_site = esp_map_create((size_t)n);
  g->bias_site = esp_map_create((size_t)n);
  g->weight_map = json_object();
  if (!g->weight_site || !g->bias_site || !g->weight_map) return ESP_ERR_MEMORY;
  esp_site *embed = NULL, *head = NULL;
  for (int i = 0; i < n; i++) {
    esp_site *s = sites[i];
    if (s->kind == ESP_SITE_EMBED && !embed) embed = s; /* the token table is the first embedding */
    if (s->is_head) head = s;
    bool tied_head = s->is_head && esp_model_describe(g->in.model)->tied;
    if (!tied_head && !esp_map_put(g->weight_site, s->tensor, strlen(s->tensor), s)) return ESP_ERR_MEMORY;
    if (s->bias_tensor && !esp_map_put(g->bias_site, s->bias_tensor, strlen(s->bias_tensor), s)) return ESP_ERR_MEMORY;
  }
  /* A tied head that an adapter changes on its own (not through the shared rows) has to be written apart. */
  if (head && esp_model_describe(g->in.model)->tied && changes_weight(g, head)) {
    bool through_embedding = embed && changes_weight(g, embed);
    bool own = false;
    for (int i = 0; i < g->spec->n_adapters; i++) own |= g->in.adapters[i]->targeted[head->index];
    if (own || !through_embedding) g->untied_head = head;
  }
  return ESP_OK;
}

static esp_status write_model(merger *g) {
  if (!g->file) return write_from_sites(g);
  const char *const *shards;
  int n = esp_st_shards(g->file, &shards);
  for (int i = 0; i < n; i++) ESP_TRY(write_shard(g, shards[i], g->untied_head && i + 1 == n));
  return n > 1 ? write_index(g) : ESP_OK;
}

esp_status esp_merge_write(const esp_merge_spec *spec, esp_merge_stats *out) {
  esp_status st;
  merger g = {.spec = spec, .out_dtype = -1};
  if (spec->dtype) {
    g.out_dtype = esp_dtype_parse(spec->dtype);
    if (g.out_dtype < 0 || !is_float((esp_dtype)g.out_dtype))
      return esp_fail(ESP_ERR_RECIPE, "merge: dtype '%s' is none of fp32, bf16, fp16", spec->dtype);
  }
  ESP_GOTO(esp_merge_open(spec, ESP_F32, false, &g.in));
  for (int i = 0; i < spec->n_adapters; i++)
    if (!g.in.adapters[i]->kind->mergeable) {
      const esp_adapter_kind *kind = g.in.adapters[i]->kind;
      st = esp_fail(ESP_ERR_RECIPE, "%s: an adapter of type %s cannot be merged%s", spec->adapters[i], kind->name,
                    kind->near_low_rank ? ": what it adds depends on the input; `export --as lora` writes the nearest "
                                          "plain LoRA and its error"
                                        : "");
      goto out;
    }
  ESP_GOTO(esp_adapters_check(g.in.model, g.in.adapters, spec->n_adapters));
  if (g.in.has_weights) ESP_GOTO(esp_st_open(spec->base, &g.file));
  ESP_GOTO(index_sites(&g));
  ESP_GOTO(esp_dir_stage(spec->out, g.staged, sizeof g.staged));
  st = write_model(&g);
  if (st == ESP_OK) st = copy_companions(&g);
  if (st == ESP_OK) st = write_config(&g);
  if (st == ESP_OK) st = esp_dir_commit(g.staged, spec->out);
  if (st != ESP_OK) esp_remove_tree(g.staged);
  g.stats.lost_share = g.moved ? (double)g.lost / (double)g.moved : 0;
  if (out) *out = g.stats;
out:
  esp_st_close(g.file);
  esp_map_destroy(g.weight_site);
  esp_map_destroy(g.bias_site);
  json_decref(g.weight_map);
  esp_merge_close(&g.in);
  return st;
}
