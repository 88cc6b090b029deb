#include "eval/report_norms.h"

#include <dirent.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/adapter.h"
#include "io/file.h"
#include "io/safetensors.h"
#include "tasks/matrix.h"

enum { MAX_ADAPTERS = 64, MAX_LAYERS = 512 };

/* tr((B^T B)(A A^T)) = ||B A||_F^2, without forming B A. */
static double product_norm2(const float *a, const float *b, int64_t r, int64_t in, int64_t out) {
  double sum = 0;
  for (int64_t i = 0; i < r; i++)
    for (int64_t j = 0; j < r; j++) {
      double aa = 0, bb = 0;
      for (int64_t k = 0; k < in; k++) aa += (double)a[i * in + k] * a[j * in + k];
      for (int64_t k = 0; k < out; k++) bb += (double)b[k * r + i] * b[k * r + j];
      sum += aa * bb;
    }
  return sum;
}

static float *as_floats(const esp_st_entry *e) {
  int64_t n = e->bytes / (int64_t)esp_dtype_size(e->dtype);
  float *v = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)n * 4);
  if (v) esp_convert(v, ESP_F32, e->data, e->dtype, n);
  return v;
}

static int layer_of(const char *key) {
  for (const char *p = key; (p = strchr(p, '.')); p++)
    if (p[1] >= '0' && p[1] <= '9') return atoi(p + 1);
  return -1;
}

static esp_status read_adapter(const char *dir, double *value, int *layers) {
  esp_status st;
  esp_st *file = NULL;
  char path[PATH_MAX];
  esp_arena *arena = esp_arena_create(ESP_MEM_HOST);
  esp_adapter_cfg cfg;
  if (!arena) return ESP_ERR_MEMORY;
  ESP_GOTO(esp_adapter_cfg_load(dir, arena, &cfg));
  ESP_GOTO(esp_st_open(esp_path_join(path, sizeof path, dir, "adapter_model.safetensors"), &file));
  for (int i = 0; i < esp_st_count(file); i++) {
    const esp_st_entry *ea = esp_st_at(file, i);
    const char *hit = strstr(ea->name, ".lora_A.weight");
    int layer = layer_of(ea->name);
    if (!hit || layer < 0 || layer >= MAX_LAYERS || ea->ndim != 2) continue;
    char key[1024];
    snprintf(key, sizeof key, "%.*s.lora_B.weight", (int)(hit - ea->name), ea->name);
    const esp_st_entry *eb = esp_st_find(file, key);
    if (!eb || eb->ndim != 2 || eb->shape[1] != ea->shape[0]) continue;
    float *a = as_floats(ea), *b = as_floats(eb);
    double r = (double)ea->shape[0], s = cfg.alpha / (cfg.rslora ? sqrt(r) : r);
    if (a && b) value[layer] += s * s * product_norm2(a, b, ea->shape[0], ea->shape[1], eb->shape[0]);
    esp_mem_free(a);
    esp_mem_free(b);
    if (layer + 1 > *layers) *layers = layer + 1;
  }
out:
  esp_st_close(file);
  esp_arena_destroy(arena);
  return st;
}

static int by_name(const void *a, const void *b) {
  return strcmp(a, b);
}

/* The tasks' order where the run has a matrix, else by name. */
static int adapter_names(const char *run_dir, char names[MAX_ADAPTERS][64]) {
  char path[PATH_MAX], dir[PATH_MAX];
  int n = 0;
  esp_matrix *m = NULL;
  esp_path_join(dir, sizeof dir, run_dir, "adapters");
  if (esp_file_exists(esp_path_join(path, sizeof path, run_dir, "matrix.json")) && esp_matrix_load(path, &m) == ESP_OK)
    for (int t = 0; t < m->tasks && n < MAX_ADAPTERS; t++)
      if (esp_dir_exists(esp_path_join(path, sizeof path, dir, m->task_name[t])))
        snprintf(names[n++], 64, "%s", m->task_name[t]);
  esp_matrix_destroy(m);
  if (n > 0) return n;
  DIR *d = opendir(dir);
  if (!d) return 0;
  for (struct dirent *e; (e = readdir(d)) && n < MAX_ADAPTERS;)
    if (e->d_name[0] != '.' && strlen(e->d_name) < 64) strcpy(names[n++], e->d_name);
  closedir(d);
  qsort(names, (size_t)n, sizeof names[0], by_name);
  return n;
}

esp_status esp_layer_norms_read(const char *run_dir, esp_layer_norms *out) {
  char names[MAX_ADAPTERS][64];
  *out = (esp_layer_norms){0};
  int n = adapter_names(run_dir, names);
  double *all = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n + 1) * MAX_LAYERS * sizeof *all);
  if (!all) return ESP_ERR_MEMORY;
  for (int i = 0; i < n; i++) {
    char dir[PATH_MAX], path[PATH_MAX];
    esp_path_join(dir, sizeof dir, run_dir, "adapters");
    if (read_adapter(esp_path_join(path, sizeof path, dir, names[i]), all + i * MAX_LAYERS, &out->layers) == ESP_OK)
      out->adapters = i + 1;
  }
  if (out->adapters == 0 || out->layers == 0) {
    esp_mem_free(all);
    *out = (esp_layer_norms){0};
    return esp_fail(ESP_ERR_DATA, "%s: no low-rank adapter to measure", run_dir);
  }
  out->name = esp_mem_alloc(ESP_MEM_HOST, (size_t)out->adapters * 64);
  out->value = esp_mem_alloc(ESP_MEM_HOST, (size_t)(out->adapters * out->layers) * sizeof *out->value);
  if (!out->name || !out->value) {
    esp_mem_free(all);
    esp_layer_norms_deinit(out);
    return ESP_ERR_MEMORY;
  }
  for (int a = 0; a < out->adapters; a++) {
    strcpy(out->name[a], names[a]);
    for (int l = 0; l < out->layers; l++) out->value[a * out->layers + l] = sqrt(all[a * MAX_LAYERS + l]);
  }
  esp_mem_free(all);
  return ESP_OK;
}

void esp_layer_norms_deinit(esp_layer_norms *n) {
  esp_mem_free(n->name);
  esp_mem_free(n->value);
  *n = (esp_layer_norms){0};
}
