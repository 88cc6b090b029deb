#include "merge/write.h"

#include <dirent.h>
#include <limits.h>
#include <math.h>
#include <string.h>

#include "io/file.h"
#include "io/json.h"

typedef struct writer {
  const esp_out_model *m;
  char staged[PATH_MAX];
  json_t *weight_map;
  int64_t total_bytes, moved, lost;
  esp_merge_stats stats;
} writer;

static bool is_float(esp_dtype t) {
  return t == ESP_F32 || t == ESP_BF16 || t == ESP_F16 || t == ESP_F64;
}

esp_status esp_out_dtype(const char *name, int *dtype) {
  *dtype = name ? esp_dtype_parse(name) : -1;
  if (name && (*dtype < 0 || !is_float((esp_dtype)*dtype)))
    return esp_fail(ESP_ERR_RECIPE, "merge: dtype '%s' is none of fp32, bf16, fp16", name);
  return ESP_OK;
}

esp_dtype esp_out_dtype_of(int dtype, esp_dtype stored) {
  return dtype >= 0 && is_float(stored) ? (esp_dtype)dtype : stored;
}

int64_t esp_out_rows(const esp_out_tensor *t) {
  return t->ndim > 1 ? t->shape[0] : 1;
}

int64_t esp_out_cols(const esp_out_tensor *t) {
  int64_t n = 1;
  for (int k = t->ndim > 1; k < t->ndim; k++) n *= t->shape[k];
  return n;
}

int64_t esp_out_step(const esp_out_tensor *t) {
  int64_t rows = esp_out_rows(t), cols = esp_out_cols(t);
  int64_t step = t->whole || cols == 0 ? rows : ESP_MERGE_BLOCK / cols;
  return step < 1 ? 1 : step > rows ? rows : step;
}

void esp_stored_rows(const esp_st_entry *e, int64_t r0, int64_t n, int64_t cols, float *out) {
  int64_t size = (int64_t)esp_dtype_size(e->dtype);
  esp_convert(out, ESP_F32, (const char *)e->data + r0 * cols * size, e->dtype, n * cols);
}

void esp_stored_drop(const esp_st_entry *e, int64_t r0, int64_t n, int64_t cols) {
  int64_t size = (int64_t)esp_dtype_size(e->dtype) * cols;
  esp_st_entry part = {.data = (const char *)e->data + r0 * size, .bytes = n * size};
  esp_st_drop(&part);
}

esp_status esp_out_list(const esp_st *file, int dtype, int room, esp_out_tensor **list, int *n) {
  const char *const *shards;
  int n_shards = esp_st_shards(file, &shards);
  *n = 0;
  *list = esp_mem_alloc(ESP_MEM_HOST, (size_t)(esp_st_count(file) + room + 1) * sizeof **list);
  if (!*list) return ESP_ERR_MEMORY;
  for (int s = 0; s < n_shards; s++)
    for (int i = 0; i < esp_st_count(file); i++) {
      const esp_st_entry *e = esp_st_at(file, i);
      if (strcmp(e->file, shards[s]) != 0) continue;
      if (!e->raw_dtype_known)
        return esp_fail(ESP_ERR_DATA, "%s: tensor '%s' has a type that cannot be written again", e->file, e->name);
      esp_out_tensor *t = &(*list)[(*n)++];
      *t = (esp_out_tensor){.name = e->name,
                            .shard = strrchr(shards[s], '/') ? strrchr(shards[s], '/') + 1 : shards[s],
                            .dtype = esp_out_dtype_of(dtype, e->dtype),
                            .ndim = e->ndim,
                            .stored = e};
      memcpy(t->shape, e->shape, sizeof t->shape);
    }
  return ESP_OK;
}

/* How much of the change survives the one rounding. */
static void account_rounding(writer *g, const float *base, const float *made, esp_dtype dtype, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    float d = fabsf(made[i] - base[i]);
    if (d == 0) continue;
    g->moved++;
    if (d > g->stats.max_delta) g->stats.max_delta = d;
    if (dtype == ESP_BF16)
      g->lost += esp_f32_to_bf16(made[i]) == esp_f32_to_bf16(base[i]);
    else if (dtype == ESP_F16)
      g->lost += esp_f32_to_f16(made[i]) == esp_f32_to_f16(base[i]);
  }
}

static esp_status write_changed(writer *g, esp_st_writer *w, const esp_out_tensor *t) {
  esp_status st = ESP_OK;
  int64_t rows = esp_out_rows(t), cols = esp_out_cols(t), step = esp_out_step(t);
  int64_t size = (int64_t)esp_dtype_size(t->dtype);
  float *base = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(step * cols) * 4);
  float *made = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(step * cols) * 4);
  void *rounded = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(step * cols * size));
  if (!base || !made || !rounded) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  if (g->m->begin) ESP_GOTO(g->m->begin(g->m->ctx, t));
  for (int64_t r = 0; r < rows; r += step) {
    int64_t n = r + step <= rows ? step : rows - r;
    ESP_GOTO(g->m->rows(g->m->ctx, t, r, n, base, made));
    for (int64_t i = 0; i < n * cols; i++)
      if (!isfinite(made[i])) {
        st = esp_fail(ESP_ERR_DATA, "%s: the merged weight has a value that is not finite in row %lld", t->name,
                      (long long)(r + i / cols));
        goto out;
      }
    account_rounding(g, base, made, t->dtype, n * cols);
    esp_convert(rounded, t->dtype, made, ESP_F32, n * cols);
    ESP_GOTO(esp_st_writer_put_at(w, t->name, r * cols * size, rounded, n * cols * size));
  }
  g->stats.changed++;
out:
  if (g->m->end) g->m->end(g->m->ctx, t);
  esp_mem_free(base);
  esp_mem_free(made);
  esp_mem_free(rounded);
  esp_mem_trim(); /* blocks of another size do not fit the holes that these leave */
  return st;
}

static esp_status write_unchanged(esp_st_writer *w, const esp_out_tensor *t) {
  const esp_st_entry *e = t->stored;
  if (t->dtype == e->dtype) return esp_st_writer_put(w, e->name, e->data, e->bytes);
  int64_t from = (int64_t)esp_dtype_size(e->dtype), to = (int64_t)esp_dtype_size(t->dtype), n = e->bytes / from;
  void *block = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)ESP_MERGE_BLOCK * 8);
  if (!block) return ESP_ERR_MEMORY;
  esp_status st = ESP_OK;
  for (int64_t i = 0; i < n && st == ESP_OK; i += ESP_MERGE_BLOCK) {
    int64_t k = n - i < ESP_MERGE_BLOCK ? n - i : ESP_MERGE_BLOCK;
    esp_convert(block, t->dtype, (const char *)e->data + i * from, e->dtype, k);
    st = esp_st_writer_put_at(w, e->name, i * to, block, k * to);
  }
  esp_mem_free(block);
  return st;
}

/* Tensors from..to make one shard. */
static esp_status write_shard(writer *g, int from, int to) {
  esp_status st = ESP_OK;
  esp_st_writer *w = NULL;
  char path[PATH_MAX];
  const esp_out_tensor *list = g->m->list;
  ESP_GOTO(esp_st_writer_create(esp_path_join(path, sizeof path, g->staged, list[from].shard), &w));
  ESP_GOTO(esp_st_writer_metadata(w, "format", "pt"));
  for (int i = from; i < to; i++)
    ESP_GOTO(esp_st_writer_declare(w, list[i].name, list[i].dtype, list[i].ndim, list[i].shape));
  for (int i = from; i < to; i++) {
    const esp_out_tensor *t = &list[i];
    ESP_GOTO(t->changed ? write_changed(g, w, t) : write_unchanged(w, t));
    if (t->stored) esp_st_drop(t->stored);
    json_object_set_new(g->weight_map, t->name, json_string(t->shard));
    g->total_bytes += esp_out_rows(t) * esp_out_cols(t) * (int64_t)esp_dtype_size(t->dtype);
    g->stats.tensors++;
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
static esp_status copy_companions(const writer *g) {
  esp_status st = ESP_OK;
  DIR *d = opendir(g->m->base);
  if (!d) return esp_fail(ESP_ERR_DATA, "%s: cannot be listed", g->m->base);
  for (struct dirent *e; (e = readdir(d));) {
    const char *n = e->d_name;
    char src[PATH_MAX], dst[PATH_MAX];
    if (!(ends_with(n, ".json") || ends_with(n, ".txt") || ends_with(n, ".model") || ends_with(n, ".jinja"))) continue;
    if (strcmp(n, "config.json") == 0 || ends_with(n, ".index.json")) continue;
    esp_path_join(src, sizeof src, g->m->base, n);
    if (!esp_file_exists(src)) continue;
    ESP_GOTO(esp_copy_file(src, esp_path_join(dst, sizeof dst, g->staged, n)));
  }
out:
  closedir(d);
  return st;
}

static esp_status write_config(const writer *g) {
  esp_status st;
  json_t *j = NULL;
  char path[PATH_MAX];
  ESP_GOTO(esp_json_load(esp_path_join(path, sizeof path, g->m->base, "config.json"), &j));
  if (g->m->dtype >= 0) {
    const char *name = g->m->dtype == ESP_BF16 ? "bfloat16" : g->m->dtype == ESP_F16 ? "float16" : "float32";
    json_object_set_new(j, json_object_get(j, "dtype") ? "dtype" : "torch_dtype", json_string(name));
  }
  if (g->m->untied) json_object_set_new(j, "tie_word_embeddings", json_false());
  st = esp_json_save(esp_path_join(path, sizeof path, g->staged, "config.json"), j, 0);
out:
  json_decref(j);
  return st;
}

static esp_status write_index(const writer *g) {
  char path[PATH_MAX];
  json_t *j =
      json_pack("{s:{s:I},s:O}", "metadata", "total_size", (json_int_t)g->total_bytes, "weight_map", g->weight_map);
  if (!j) return esp_fail_oom("weight index", 0);
  esp_status st = esp_json_save(esp_path_join(path, sizeof path, g->staged, "model.safetensors.index.json"), j, 1);
  json_decref(j);
  return st;
}

static esp_status write_model(writer *g) {
  int from = 0, shards = 0;
  for (int i = 1; i <= g->m->n; i++) {
    if (i < g->m->n && strcmp(g->m->list[i].shard, g->m->list[from].shard) == 0) continue;
    ESP_TRY(write_shard(g, from, i));
    from = i;
    shards++;
  }
  if (shards > 1) ESP_TRY(write_index(g));
  ESP_TRY(copy_companions(g));
  return write_config(g);
}

esp_status esp_out_write(const esp_out_model *m, esp_merge_stats *stats) {
  esp_status st;
  writer g = {.m = m, .weight_map = json_object()};
  if (!g.weight_map) return ESP_ERR_MEMORY;
  ESP_GOTO(esp_dir_stage(m->out, g.staged, sizeof g.staged));
  st = write_model(&g);
  if (st == ESP_OK) st = esp_dir_commit(g.staged, m->out);
  if (st != ESP_OK) esp_remove_tree(g.staged);
  g.stats.lost_share = g.moved ? (double)g.lost / (double)g.moved : 0;
  if (stats) *stats = g.stats;
out:
  json_decref(g.weight_map);
  return st;
}
