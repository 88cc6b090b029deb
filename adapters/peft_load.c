/* peft_load.c: an adapter directory onto a base, strictly: every tensor of the file is consumed once, every parameter
 * is filled once, else an error that lists both sets. Copies of base tensors that PEFT adds on its own (embedding
 * layers) must equal the base's. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "adapters/internal.h"
#include "core/map.h"
#include "core/strbuf.h"
#include "io/file.h"
#include "io/safetensors.h"

enum { SHOWN = 5 };

static esp_status entry_values(const esp_st_entry *e, float *out) {
  if (!e->raw_dtype_known ||
      (e->dtype != ESP_F32 && e->dtype != ESP_BF16 && e->dtype != ESP_F16 && e->dtype != ESP_F64))
    return esp_fail(ESP_ERR_DATA, "%s: tensor '%s' is not a float", e->file, e->name);
  void *aligned = esp_mem_alloc(ESP_MEM_HOST, (size_t)e->bytes);
  if (!aligned) return ESP_ERR_MEMORY;
  memcpy(aligned, e->data, (size_t)e->bytes); /* the mapping may be unaligned */
  int64_t n = e->bytes / (int64_t)esp_dtype_size(e->dtype);
  esp_convert(out, ESP_F32, aligned, e->dtype, n);
  esp_mem_free(aligned);
  for (int64_t i = 0; i < n; i++)
    if (!isfinite(out[i])) return esp_fail(ESP_ERR_DATA, "%s: tensor '%s' holds a non-finite value", e->file, e->name);
  return ESP_OK;
}

static void shape_text(int ndim, const int64_t *shape, char *out, size_t size) {
  size_t at = (size_t)snprintf(out, size, "[");
  for (int i = 0; i < ndim && at < size; i++)
    at += (size_t)snprintf(out + at, size - at, "%s%lld", i ? ", " : "", (long long)shape[i]);
  if (at < size) snprintf(out + at, size - at, "]");
}

static esp_status fill_one(esp_adapter *a, int index, const esp_st_entry *e) {
  int ndim;
  int64_t shape[ESP_MAX_DIMS];
  esp_param_file_shape(a, index, &ndim, shape);
  bool same = ndim == e->ndim;
  for (int i = 0; same && i < ndim; i++) same = shape[i] == e->shape[i];
  if (!same) {
    char have[96], want[96];
    shape_text(e->ndim, e->shape, have, sizeof have);
    shape_text(ndim, shape, want, sizeof want);
    return esp_fail(ESP_ERR_DATA, "%s: tensor '%s' has shape %s, this base and configuration need %s", e->file, e->name,
                    have, want);
  }
  const esp_param *p = &a->params->list[index];
  float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * p->numel) * sizeof *x);
  if (!x) return ESP_ERR_MEMORY;
  esp_status st = entry_values(e, x);
  float *y = x;
  if (st == ESP_OK && index < a->modules->file_cap && a->modules->file_transposed[index]) {
    y = x + p->numel;
    for (int64_t i = 0; i < p->shape[0]; i++)
      for (int64_t k = 0; k < p->shape[1]; k++) y[i * p->shape[1] + k] = x[k * p->shape[0] + i];
  }
  if (st == ESP_OK) esp_params_set(a->params, index, y);
  esp_mem_free(x);
  return st;
}

/* "…embed_tokens.base_layer.weight" or "…lm_head.weight": the base's own tensor, kept by PEFT beside the adapter. */
static esp_site *copied_site(const esp_adapter *a, const char *name) {
  size_t skip = strlen(ESP_PEFT_PREFIX), n = strlen(name);
  if (strncmp(name, ESP_PEFT_PREFIX, skip) != 0) return NULL;
  char path[512];
  if (n - skip >= sizeof path) return NULL;
  snprintf(path, sizeof path, "%s", name + skip);
  static const char *const ends[] = {".base_layer.weight", ".token_adapter.base_layer.weight", ".weight"};
  for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++) {
    size_t k = strlen(ends[i]), len = strlen(path);
    if (len <= k || strcmp(path + len - k, ends[i])) continue;
    char module[512];
    snprintf(module, sizeof module, "%.*s", (int)(len - k), path);
    esp_site *s = esp_model_find_site(a->model, module);
    if (s && (s->kind == ESP_SITE_EMBED || s->is_head) && a->modules->weight[s->index] < 0) return s;
  }
  return NULL;
}

static esp_status check_copy(const esp_adapter *a, const esp_st_entry *e, const esp_site *s) {
  int64_t rows = s->kind == ESP_SITE_EMBED ? s->in : s->out, cols = s->kind == ESP_SITE_EMBED ? s->out : s->in;
  if (e->ndim != 2 || e->shape[0] != rows || e->shape[1] != cols)
    return esp_fail(ESP_ERR_DATA, "%s: '%s' is a resized copy of the base's %s: resize the base first", e->file,
                    e->name, s->path);
  float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)(rows * cols) * sizeof *x);
  float *w = esp_mem_alloc(ESP_MEM_HOST, (size_t)(rows * cols) * sizeof *w);
  esp_status st = x && w ? ESP_OK : ESP_ERR_MEMORY;
  if (st == ESP_OK) st = entry_values(e, x);
  if (st == ESP_OK) st = esp_site_read_weight(a->model, s, w);
  if (st == ESP_OK && memcmp(x, w, (size_t)(rows * cols) * sizeof *x) != 0)
    st = esp_fail(ESP_ERR_DATA, "%s: '%s' differs from the base's %s: the adapter was made on another base", e->file,
                  e->name, s->path);
  esp_mem_free(x);
  esp_mem_free(w);
  return st;
}

typedef struct account {
  esp_strbuf missing, extra;
  int n_missing, n_extra;
} account;

static void note(esp_strbuf *b, int *n, const char *name) {
  if ((*n)++ < SHOWN) esp_strbuf_printf(b, "%s%s", *n > 1 ? ", " : "", name);
}

static esp_status fill(esp_adapter *a, esp_st *f, const char *path, account *acc) {
  esp_map *used = esp_map_create((size_t)a->params->count);
  esp_status st = used ? ESP_OK : ESP_ERR_MEMORY;
  for (int i = 0; i < a->params->count && st == ESP_OK; i++) {
    const char *name = a->params->list[i].name;
    if (a->params->list[i].local) continue;
    if (!esp_map_put(used, name, strlen(name), a)) st = ESP_ERR_MEMORY;
    if (!esp_st_find(f, name)) note(&acc->missing, &acc->n_missing, name);
  }
  for (int i = 0; i < esp_st_count(f) && st == ESP_OK; i++) {
    const esp_st_entry *e = esp_st_at(f, i);
    if (!esp_map_has(used, e->name, strlen(e->name)) && !esp_ints_own(a, e->name) && !copied_site(a, e->name))
      note(&acc->extra, &acc->n_extra, e->name);
  }
  if (st == ESP_OK && (acc->n_missing || acc->n_extra))
    st = esp_fail(ESP_ERR_DATA,
                  "%s: the tensors do not fit this base and configuration: %d missing (%s%s), %d unexpected (%s%s)",
                  path, acc->n_missing, acc->n_missing ? acc->missing.data : "", acc->n_missing > SHOWN ? ", ..." : "",
                  acc->n_extra, acc->n_extra ? acc->extra.data : "", acc->n_extra > SHOWN ? ", ..." : "");
  for (int i = 0; i < a->params->count && st == ESP_OK; i++)
    if (!a->params->list[i].local) st = fill_one(a, i, esp_st_find(f, a->params->list[i].name));
  if (st == ESP_OK) st = esp_ints_fill(a, f, path);
  for (int i = 0; i < esp_st_count(f) && st == ESP_OK; i++) {
    const esp_st_entry *e = esp_st_at(f, i);
    if (!esp_map_has(used, e->name, strlen(e->name)) && !esp_ints_own(a, e->name))
      st = check_copy(a, e, copied_site(a, e->name));
  }
  esp_map_destroy(used);
  return st;
}

esp_status esp_adapter_load(esp_model *m, const char *dir, const char *name, bool trainable, esp_adapter **out) {
  esp_status st = ESP_OK;
  esp_adapter *a = NULL;
  esp_st *f = NULL;
  esp_adapter_cfg cfg;
  account acc = {0};
  char path[4200];
  *out = NULL;
  esp_strbuf_init(&acc.missing);
  esp_strbuf_init(&acc.extra);
  esp_arena *arena = esp_arena_create(ESP_MEM_HOST);
  if (!arena) return ESP_ERR_MEMORY;
  ESP_GOTO(esp_adapter_cfg_load(dir, arena, &cfg));
  bool whole = esp_adapter_find(cfg.type)->whole_base;
  esp_path_join(path, sizeof path, dir, whole ? "model.safetensors" : "adapter_model.safetensors");
  if (!esp_file_exists(path)) {
    st = esp_fail(ESP_ERR_DATA, "%s: not found (adapters in adapter_model.bin must be saved again as safetensors)",
                  path);
    goto out;
  }
  ESP_GOTO(esp_st_open(path, &f));
  const char *base = esp_st_metadata(f, "espalier_base");
  /* before anything else: on another base every later message would only be a consequence; a full copy brings every
   * weight itself */
  if (base && !whole && strcmp(base, esp_model_fingerprint(m)) != 0) {
    st = esp_fail(ESP_ERR_DATA, "%s: made on another base (fingerprint %s, %s has %s)", path, base, esp_model_dir(m),
                  esp_model_fingerprint(m));
    goto out;
  }
  st = esp_adapter_build(m, &cfg, name, trainable, true, &a);
  if (st) {
    /* from here the configuration is a file's, not the recipe's */
    if (st == ESP_ERR_RECIPE) st = ESP_ERR_DATA;
    st = esp_fail_context(st, "%s", dir);
    goto out;
  }
  ESP_GOTO(fill(a, f, path, &acc));
  if (a->kind->loaded) ESP_GOTO(a->kind->loaded(a));
  *out = a;
  a = NULL;
out:
  esp_adapter_destroy(a);
  esp_st_close(f);
  esp_arena_destroy(arena);
  esp_strbuf_deinit(&acc.missing);
  esp_strbuf_deinit(&acc.extra);
  return st;
}
