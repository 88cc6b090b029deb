#include "merge/sources.h"

#include <limits.h>
#include <math.h>
#include <string.h>

#include "io/file.h"
#include "io/json.h"

static bool has(const char *dir, const char *name) {
  char path[PATH_MAX];
  return esp_file_exists(esp_path_join(path, sizeof path, dir, name));
}

static bool holds_model(const char *dir) {
  return has(dir, "config.json") && (has(dir, "model.safetensors") || has(dir, "model.safetensors.index.json"));
}

static bool is_float(const esp_st_entry *e) {
  return e->raw_dtype_known &&
         (e->dtype == ESP_F32 || e->dtype == ESP_BF16 || e->dtype == ESP_F16 || e->dtype == ESP_F64);
}

static esp_status check_family(const esp_sources *s, const char *dir) {
  esp_status st;
  json_t *a = NULL, *b = NULL;
  char base[PATH_MAX], path[PATH_MAX];
  const char *x = NULL, *y = NULL;
  ESP_GOTO(esp_json_load(esp_path_join(base, sizeof base, s->base_dir, "config.json"), &a));
  ESP_GOTO(esp_json_load(esp_path_join(path, sizeof path, dir, "config.json"), &b));
  ESP_GOTO(esp_json_str(a, "model_type", base, 0, &x));
  ESP_GOTO(esp_json_str(b, "model_type", path, 0, &y));
  if (x && y && strcmp(x, y) != 0)
    st = esp_fail(ESP_ERR_DATA, "%s: is a %s model, the base %s a %s model", dir, y, s->base_dir, x);
out:
  json_decref(a);
  json_decref(b);
  return st;
}

static void show_shape(const esp_st_entry *e, char *buf, size_t n) {
  size_t at = 0;
  buf[0] = 0;
  for (int k = 0; k < e->ndim && at < n; k++)
    at += (size_t)snprintf(buf + at, n - at, "%s%lld", k ? ", " : "", (long long)e->shape[k]);
}

static esp_status check_model(const esp_sources *s, const esp_source *m) {
  ESP_TRY(check_family(s, m->path));
  for (int i = 0; i < esp_st_count(s->base); i++) {
    const esp_st_entry *e = esp_st_at(s->base, i), *f = esp_site_map_find(&s->sites, m->file, e->name);
    char want[96], got[96];
    if (!f) return esp_fail(ESP_ERR_DATA, "%s: lacks the tensor '%s' of the base %s", m->path, e->name, s->base_dir);
    show_shape(e, want, sizeof want);
    show_shape(f, got, sizeof got);
    if (e->ndim != f->ndim || memcmp(e->shape, f->shape, (size_t)e->ndim * sizeof *e->shape) != 0)
      return esp_fail(ESP_ERR_DATA, "%s: tensor '%s' is [%s], in the base %s it is [%s]", m->path, e->name, got,
                      s->base_dir, want);
    if (is_float(e) != is_float(f))
      return esp_fail(ESP_ERR_DATA, "%s: tensor '%s' has another type than in the base %s", m->path, e->name,
                      s->base_dir);
  }
  for (int i = 0; i < esp_st_count(m->file); i++) {
    const char *name = esp_st_at(m->file, i)->name;
    if (!esp_site_map_find(&s->sites, s->base, name))
      return esp_fail(ESP_ERR_DATA, "%s: tensor '%s' is not in the base %s", m->path, name, s->base_dir);
  }
  return ESP_OK;
}

/* A tied head that is no longer the embedding has no tensor that it could go to. */
static esp_status check_adapter(const esp_sources *s, const esp_source *m) {
  esp_site **list;
  int n = esp_model_sites(s->in.model, &list);
  if (!m->adapter->kind->mergeable)
    return esp_fail(ESP_ERR_RECIPE, "%s: an adapter of type %s cannot be merged", m->path, m->adapter->kind->name);
  for (int i = 0; i < n; i++)
    if (list[i]->is_head && s->sites.tied && esp_adapters_untie(&m->adapter, 1, list[i], s->in.model))
      return esp_fail(ESP_ERR_RECIPE,
                      "%s: makes '%s' differ from the embedding, with which it shares its weight: no method takes that",
                      m->path, list[i]->path);
  return ESP_OK;
}

esp_status esp_sources_open(const char *base, const char *const *paths, int n, esp_sources *s) {
  esp_status st;
  const char *adapters[ESP_MERGE_MOST];
  int n_adapters = 0, next = 0;
  *s = (esp_sources){.base_dir = base, .n = n};
  for (int i = 0; i < n; i++) {
    s->list[i].path = paths[i];
    if (holds_model(paths[i]) || has(paths[i], ESP_RESIDUAL_CONFIG)) continue;
    if (!has(paths[i], "adapter_config.json"))
      return esp_fail(ESP_ERR_DATA, "%s: holds neither a model nor an adapter nor a stored difference", paths[i]);
    adapters[n_adapters++] = paths[i];
  }
  esp_merge_spec open = {.base = base, .adapters = adapters, .n_adapters = n_adapters};
  ESP_GOTO(esp_merge_open(&open, ESP_F32, false, &s->in));
  if (!s->in.has_weights) {
    st = esp_fail(ESP_ERR_DATA, "%s: has no weights, a method needs a base that has", base);
    goto out;
  }
  ESP_GOTO(esp_st_open(base, &s->base));
  ESP_GOTO(esp_site_map_init(&s->sites, s->in.model));
  for (int i = 0; i < n; i++) {
    esp_source *m = &s->list[i];
    if (next < n_adapters && adapters[next] == paths[i]) {
      m->adapter = s->in.adapters[next++];
      ESP_GOTO(check_adapter(s, m));
    } else if (holds_model(paths[i])) {
      ESP_GOTO(esp_st_open(paths[i], &m->file));
      ESP_GOTO(check_model(s, m));
    } else {
      ESP_GOTO(esp_residual_open(paths[i], s->in.model, s->base, &m->residual));
    }
  }
  return ESP_OK;
out:
  esp_sources_close(s);
  return st;
}

void esp_sources_close(esp_sources *s) {
  for (int i = 0; i < s->n; i++) {
    esp_st_close(s->list[i].file);
    esp_residual_close(s->list[i].residual);
  }
  esp_st_close(s->base);
  esp_site_map_deinit(&s->sites);
  esp_merge_close(&s->in);
  esp_mem_free(s->scratch);
  *s = (esp_sources){0};
}

static bool changes(const esp_sources *s, const esp_source *m, const esp_st_entry *e) {
  const esp_site *w = esp_site_map_weight(&s->sites, e->name), *b = esp_site_map_bias(&s->sites, e->name);
  if (m->residual) return esp_residual_holds(m->residual, e->name);
  if (m->adapter) return (w && esp_adapter_changes(m->adapter, w)) || (b && esp_adapter_changes_bias(m->adapter, b));
  const esp_st_entry *f = esp_site_map_find(&s->sites, m->file, e->name);
  bool same = f->dtype == e->dtype && f->bytes == e->bytes && memcmp(f->data, e->data, (size_t)e->bytes) == 0;
  esp_st_drop(f);
  esp_st_drop(e);
  return !same;
}

esp_status esp_sources_list(esp_sources *s, int dtype, esp_out_tensor **list, int *n) {
  ESP_TRY(esp_out_list(s->base, dtype, 0, list, n));
  for (int i = 0; i < *n; i++) {
    esp_out_tensor *t = &(*list)[i];
    esp_site *w = esp_site_map_weight(&s->sites, t->name);
    t->site = w ? w : esp_site_map_bias(&s->sites, t->name);
    if (!is_float(t->stored)) continue;
    for (int k = 0; k < s->n; k++) {
      t->changed |= changes(s, &s->list[k], t->stored);
      t->whole |= s->list[k].adapter && w && w->transposed;
    }
  }
  return ESP_OK;
}

static esp_status read_adapter(esp_sources *s, esp_adapter *a, int64_t r0, int64_t n, int64_t cols, float *out) {
  const esp_out_tensor *t = s->reading;
  esp_site *site = t->site;
  bool bias = site && site->bias_tensor && strcmp(site->bias_tensor, t->name) == 0;
  int64_t len = n * cols;
  if (!site || !(bias ? esp_adapter_changes_bias(a, site) : esp_adapter_changes(a, site))) {
    memset(out, 0, (size_t)len * 4);
    return ESP_OK;
  }
  if (len > s->scratch_size) {
    esp_mem_free(s->scratch);
    s->scratch_size = 0;
    s->scratch = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)len * 4);
    if (!s->scratch) return ESP_ERR_MEMORY;
    s->scratch_size = len;
  }
  esp_stored_rows(t->stored, r0, n, cols, s->scratch);
  memcpy(out, s->scratch, (size_t)len * 4);
  ESP_TRY(esp_adapters_stored_rows(&a, 1, site, bias, r0, n, out));
  for (int64_t i = 0; i < len; i++) out[i] -= s->scratch[i];
  return ESP_OK;
}

static esp_status read_rows(void *ctx, int i, int64_t r0, int64_t n, float *out) {
  esp_sources *s = ctx;
  const esp_out_tensor *t = s->reading;
  int64_t cols = esp_out_cols(t), len = n * cols;
  if (i == s->n) {
    esp_stored_rows(t->stored, r0, n, cols, out);
    esp_stored_drop(t->stored, r0, n, cols);
    return ESP_OK;
  }
  const esp_source *m = &s->list[i];
  if (m->residual) {
    esp_residual_rows(m->residual, t->name, r0, n, cols, out);
  } else if (m->adapter) {
    ESP_TRY(read_adapter(s, m->adapter, r0, n, cols, out));
  } else {
    enum { SOME = 4096 };
    float base[SOME];
    int64_t size = (int64_t)esp_dtype_size(t->stored->dtype);
    const esp_st_entry *e = esp_site_map_find(&s->sites, m->file, t->name);
    esp_stored_rows(e, r0, n, cols, out);
    esp_stored_drop(e, r0, n, cols);
    for (int64_t k = 0; k < len; k += SOME) {
      int64_t some = len - k < SOME ? len - k : SOME;
      esp_convert(base, ESP_F32, (const char *)t->stored->data + (r0 * cols + k) * size, t->stored->dtype, some);
      for (int64_t j = 0; j < some; j++) out[k + j] -= base[j];
    }
    esp_stored_drop(t->stored, r0, n, cols);
  }
  for (int64_t k = 0; k < len; k++)
    if (!isfinite(out[k]))
      return esp_fail(ESP_ERR_DATA, "%s: tensor '%s' has a value that is not finite in row %lld", m->path, t->name,
                      (long long)(r0 + k / cols));
  return ESP_OK;
}

esp_vectors esp_sources_vectors(esp_sources *s, const esp_out_tensor *t) {
  const esp_site *site = t->site;
  s->reading = t;
  bool weight = site && esp_site_map_weight(&s->sites, t->name) == site;
  return (esp_vectors){.name = t->name,
                       .part = 2,
                       .rows = esp_out_rows(t),
                       .cols = esp_out_cols(t),
                       .step = esp_out_step(t),
                       .layer = site ? site->layer : -1,
                       .linear = weight && site->kind == ESP_SITE_LINEAR && !site->is_head,
                       .read = read_rows,
                       .ctx = s,
                       .has_base = true};
}

void esp_sources_drop(const esp_sources *s, const esp_out_tensor *t) {
  for (int i = 0; i < s->n; i++)
    if (s->list[i].file) esp_st_drop(esp_site_map_find(&s->sites, s->list[i].file, t->name));
}
