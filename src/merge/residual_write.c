/* residual_write.c: a difference becomes signs or factors, matrix by matrix; the shares of ranks need a pass of their
 * own over all spectra before. */
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/linalg.h"
#include "io/file.h"
#include "io/json.h"
#include "merge/sources.h"

typedef struct store {
  const esp_residual_spec *spec;
  bool signs;
  esp_sources s;
  esp_out_tensor *list;
  int n;
  float **spectrum; /* [n], lowrank: singular values of each matrix */
  int64_t *rank;    /* [n] */
  esp_st_writer *w;
  esp_residual_stats stats;
} store;

static bool is_matrix(const esp_out_tensor *t) {
  return t->changed && t->ndim == 2;
}

/* The whole difference of a tensor; free with esp_mem_free. */
static esp_status read_whole(store *g, const esp_out_tensor *t, float **out) {
  esp_vectors v = esp_sources_vectors(&g->s, t);
  esp_status st = ESP_OK;
  *out = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(v.rows * v.cols) * 4);
  if (!*out) return ESP_ERR_MEMORY;
  for (int64_t r = 0; st == ESP_OK && r < v.rows; r += v.step)
    st = v.read(v.ctx, 0, r, r + v.step <= v.rows ? v.step : v.rows - r, *out + r * v.cols);
  esp_sources_drop(&g->s, t);
  return st;
}

static esp_status declare(store *g, const char *tensor, const char *what, esp_dtype dtype, int ndim, int64_t a,
                          int64_t b) {
  char name[512];
  int64_t shape[2] = {a, b};
  snprintf(name, sizeof name, "%s.%s", tensor, what);
  g->stats.bytes += a * (ndim > 1 ? b : 1) * (int64_t)esp_dtype_size(dtype);
  return esp_st_writer_declare(g->w, name, dtype, ndim, shape);
}

static esp_status put(store *g, const char *tensor, const char *what, const void *data, int64_t bytes) {
  char name[512];
  snprintf(name, sizeof name, "%s.%s", tensor, what);
  return esp_st_writer_put(g->w, name, data, bytes);
}

static void count(store *g, double total, double lost) {
  double error = total > 0 ? sqrt(lost / total) : 0;
  g->stats.matrices++;
  g->stats.mean_error += error;
  if (error > g->stats.max_error) g->stats.max_error = error;
}

/* ---- 1 bit ---- */

static esp_status write_signs(store *g, const esp_out_tensor *t, const float *d) {
  int64_t rows = t->shape[0], cols = t->shape[1], bytes = (cols + 7) / 8, scales = g->spec->per_matrix ? 1 : rows;
  uint8_t *bits = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(rows * bytes));
  float *scale = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)scales * 4);
  double total = 0, lost = 0;
  esp_status st;
  if (!bits || !scale) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  for (int64_t s = 0; s < scales; s++) {
    int64_t n = rows / scales * cols;
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += fabs((double)d[s * n + i]);
    scale[s] = n > 0 ? (float)(sum / (double)n) : 0;
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < cols; c++) {
      double x = d[r * cols + c], s = scale[scales == 1 ? 0 : r];
      if (x >= 0) bits[r * bytes + c / 8] |= (uint8_t)(1u << (c % 8));
      total += x * x;
      lost += (fabs(x) - s) * (fabs(x) - s);
    }
  count(g, total, lost);
  ESP_GOTO(put(g, t->name, "sign", bits, rows * bytes));
  st = put(g, t->name, "scale", scale, scales * 4);
out:
  esp_mem_free(bits);
  esp_mem_free(scale);
  return st;
}

/* ---- low rank ---- */

typedef struct triple {
  double value; /* squares per parameter */
  double squares;
  int tensor;
} triple;

static int by_value(const void *a, const void *b) {
  const triple *x = a, *y = b;
  if (x->value != y->value) return x->value < y->value ? 1 : -1;
  return x->tensor - y->tensor;
}

static int64_t least(const esp_out_tensor *t) {
  return t->shape[0] < t->shape[1] ? t->shape[0] : t->shape[1];
}

/* u, s, vt of a matrix of difference d (destroyed), in one allocation that *u owns. */
static esp_status decompose(const esp_out_tensor *t, float *d, float **u, float **s, float **vt) {
  int64_t k = least(t);
  *u = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)((t->shape[0] + t->shape[1] + 1) * k) * 4);
  if (!*u) return ESP_ERR_MEMORY;
  *vt = *u + t->shape[0] * k;
  *s = *vt + t->shape[1] * k;
  return esp_linalg_svd(t->shape[0], t->shape[1], d, *u, *s, *vt);
}

static esp_status find_spectra(store *g, int64_t *triples) {
  for (int i = 0; i < g->n; i++) {
    const esp_out_tensor *t = &g->list[i];
    if (!is_matrix(t)) continue;
    float *d = NULL, *u = NULL, *s, *vt;
    int64_t k = least(t);
    g->spectrum[i] = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)k * 4);
    esp_status st = g->spectrum[i] ? read_whole(g, t, &d) : ESP_ERR_MEMORY;
    if (st == ESP_OK) st = decompose(t, d, &u, &s, &vt);
    if (st == ESP_OK) memcpy(g->spectrum[i], s, (size_t)k * 4);
    esp_mem_free(d);
    esp_mem_free(u);
    ESP_TRY(st);
    *triples += k;
  }
  return ESP_OK;
}

static esp_status share_ranks(store *g) {
  int64_t n = 0, at = 0;
  double total = 0, held = 0;
  ESP_TRY(find_spectra(g, &n));
  triple *list = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(n + 1) * sizeof *list);
  if (!list) return ESP_ERR_MEMORY;
  for (int i = 0; i < g->n; i++)
    for (int64_t k = 0; g->spectrum[i] && k < least(&g->list[i]); k++) {
      double squares = (double)g->spectrum[i][k] * g->spectrum[i][k];
      list[at++] = (triple){squares / (double)(g->list[i].shape[0] + g->list[i].shape[1]), squares, i};
      total += squares;
    }
  qsort(list, (size_t)at, sizeof *list, by_value);
  for (int64_t k = 0; k < at && held < g->spec->energy * total * (1 - 1e-12) && list[k].squares > 0; k++) {
    g->rank[list[k].tensor]++; /* within a matrix the values descend: these are its leading triples */
    held += list[k].squares;
  }
  esp_mem_free(list);
  return ESP_OK;
}

/* x [r, n] rounded to what the file holds; afterwards x is what a reader will see. */
static esp_status write_factor(store *g, const char *tensor, const char *what, float *x, int64_t r, int64_t n) {
  esp_status st;
  char scale_name[8];
  void *stored = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(r * n) * 4);
  float *scale = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(r + 1) * 4);
  if (!stored || !scale) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  if (g->spec->bits != 8) {
    esp_dtype dtype = g->spec->bits == 16 ? ESP_BF16 : ESP_F32;
    esp_convert(stored, dtype, x, ESP_F32, r * n);
    esp_convert(x, ESP_F32, stored, dtype, r * n);
    st = put(g, tensor, what, stored, r * n * (int64_t)esp_dtype_size(dtype));
    goto out;
  }
  for (int64_t k = 0; k < r; k++) {
    float most = 0;
    for (int64_t i = 0; i < n; i++) most = fabsf(x[k * n + i]) > most ? fabsf(x[k * n + i]) : most;
    scale[k] = most / 127;
    for (int64_t i = 0; i < n; i++) {
      int8_t q = most > 0 ? (int8_t)lrintf(x[k * n + i] / scale[k]) : 0;
      ((int8_t *)stored)[k * n + i] = q;
      x[k * n + i] = scale[k] * q;
    }
  }
  snprintf(scale_name, sizeof scale_name, "%s.scale", what);
  ESP_GOTO(put(g, tensor, what, stored, r * n));
  st = put(g, tensor, scale_name, scale, r * 4);
out:
  esp_mem_free(stored);
  esp_mem_free(scale);
  return st;
}

static esp_status write_factors(store *g, const esp_out_tensor *t, float *d, int64_t r) {
  esp_status st;
  int64_t rows = t->shape[0], cols = t->shape[1], most = least(t);
  double total = 0, lost = 0;
  float *u = NULL, *s, *vt, *a = NULL, *b = NULL;
  float *copy = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(rows * cols) * 4);
  a = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(r * cols + 1) * 4);
  b = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(r * rows + 1) * 4);
  if (!copy || !a || !b) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  memcpy(copy, d, (size_t)(rows * cols) * 4);
  ESP_GOTO(decompose(t, copy, &u, &s, &vt));
  for (int64_t k = 0; k < r; k++) {
    float root = sqrtf(s[k]);
    for (int64_t j = 0; j < cols; j++) a[k * cols + j] = root * vt[k * cols + j];
    for (int64_t i = 0; i < rows; i++) b[k * rows + i] = root * u[i * most + k];
  }
  if (r > 0) {
    ESP_GOTO(write_factor(g, t->name, "A", a, r, cols));
    ESP_GOTO(write_factor(g, t->name, "B", b, r, rows));
  }
  esp_linalg_gemm(true, false, rows, cols, r, -1.0f, b, rows, a, cols, 0.0f, copy, cols);
  for (int64_t i = 0; i < rows * cols; i++) {
    total += (double)d[i] * d[i];
    lost += ((double)d[i] + copy[i]) * ((double)d[i] + copy[i]);
  }
  count(g, total, lost);
  if (r > g->stats.rank) g->stats.rank = r;
out:
  esp_mem_free(copy);
  esp_mem_free(u);
  esp_mem_free(a);
  esp_mem_free(b);
  return st;
}

/* ---- the file ---- */

static esp_status declare_tensor(store *g, const esp_out_tensor *t, int64_t r) {
  esp_dtype factor = g->spec->bits == 8 ? ESP_I8 : g->spec->bits == 16 ? ESP_BF16 : ESP_F32;
  if (!is_matrix(t)) {
    char name[512];
    snprintf(name, sizeof name, "%s.exact", t->name);
    g->stats.exact++;
    g->stats.bytes += esp_out_rows(t) * esp_out_cols(t) * 4;
    return esp_st_writer_declare(g->w, name, ESP_F32, t->ndim, t->shape);
  }
  if (g->signs) {
    ESP_TRY(declare(g, t->name, "sign", ESP_U8, 2, t->shape[0], (t->shape[1] + 7) / 8));
    return declare(g, t->name, "scale", ESP_F32, 1, g->spec->per_matrix ? 1 : t->shape[0], 0);
  }
  if (r == 0) return ESP_OK;
  ESP_TRY(declare(g, t->name, "A", factor, 2, r, t->shape[1]));
  ESP_TRY(declare(g, t->name, "B", factor, 2, r, t->shape[0]));
  if (factor != ESP_I8) return ESP_OK;
  ESP_TRY(declare(g, t->name, "A.scale", ESP_F32, 1, r, 0));
  return declare(g, t->name, "B.scale", ESP_F32, 1, r, 0);
}

static esp_status write_file(store *g, const char *dir) {
  char path[PATH_MAX];
  ESP_TRY(esp_st_writer_create(esp_path_join(path, sizeof path, dir, "residual.safetensors"), &g->w));
  for (int i = 0; i < g->n; i++) {
    g->stats.full_bytes += g->list[i].stored->bytes;
    if (g->list[i].changed) ESP_TRY(declare_tensor(g, &g->list[i], g->rank[i]));
  }
  for (int i = 0; i < g->n; i++) {
    const esp_out_tensor *t = &g->list[i];
    float *d = NULL;
    if (!t->changed) continue;
    esp_status st = read_whole(g, t, &d);
    if (st == ESP_OK)
      st = !is_matrix(t) ? put(g, t->name, "exact", d, esp_out_rows(t) * esp_out_cols(t) * 4)
           : g->signs    ? write_signs(g, t, d)
                         : write_factors(g, t, d, g->rank[i]);
    esp_mem_free(d);
    ESP_TRY(st);
  }
  esp_status st = esp_st_writer_commit(g->w);
  g->w = NULL;
  return st;
}

static esp_status write_config(const store *g, const char *dir) {
  char path[PATH_MAX];
  json_t *j = json_pack("{s:s,s:s,s:s}", "format", "espalier-residual-1", "form", g->spec->form, "base",
                        esp_model_fingerprint(g->s.in.model));
  if (!j) return esp_fail_oom("residual.json", 0);
  esp_status st = esp_json_save(esp_path_join(path, sizeof path, dir, ESP_RESIDUAL_CONFIG), j, 0);
  json_decref(j);
  return st;
}

static esp_status check(const esp_residual_spec *spec) {
  bool signs = strcmp(spec->form, "1bit") == 0;
  if (!signs && strcmp(spec->form, "lowrank") != 0)
    return esp_fail(ESP_ERR_RECIPE, "extract: '%s' is none of lora, lowrank, 1bit", spec->form);
  if (signs) return ESP_OK;
  if (!(spec->energy > 0 && spec->energy <= 1))
    return esp_fail(ESP_ERR_RECIPE, "extract: energy must be above 0 and at most 1, it is %g", spec->energy);
  if (spec->bits != 8 && spec->bits != 16 && spec->bits != 32)
    return esp_fail(ESP_ERR_RECIPE, "extract: bits must be 8, 16 or 32, not %d", spec->bits);
  return ESP_OK;
}

esp_status esp_residual_write(const esp_residual_spec *spec, esp_residual_stats *stats) {
  esp_status st;
  store g = {.spec = spec};
  char staged[PATH_MAX];
  bool any = false;
  ESP_TRY(check(spec));
  g.signs = strcmp(spec->form, "1bit") == 0;
  ESP_TRY(esp_sources_open(spec->base, &spec->tuned, 1, &g.s));
  ESP_GOTO(esp_sources_list(&g.s, -1, &g.list, &g.n));
  for (int i = 0; i < g.n; i++) any |= g.list[i].changed;
  if (!any) {
    st = esp_fail(ESP_ERR_DATA, "%s: does not differ from the base %s", spec->tuned, spec->base);
    goto out;
  }
  g.spectrum = esp_mem_alloc(ESP_MEM_HOST, (size_t)g.n * sizeof *g.spectrum);
  g.rank = esp_mem_alloc(ESP_MEM_HOST, (size_t)g.n * sizeof *g.rank);
  if (!g.spectrum || !g.rank) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  if (!g.signs) ESP_GOTO(share_ranks(&g));
  ESP_GOTO(esp_dir_stage(spec->out, staged, sizeof staged));
  st = write_file(&g, staged);
  if (st == ESP_OK) st = write_config(&g, staged);
  if (st == ESP_OK) st = esp_dir_commit(staged, spec->out);
  if (st != ESP_OK) {
    esp_st_writer_abort(g.w);
    esp_remove_tree(staged);
  }
  if (g.stats.matrices) g.stats.mean_error /= g.stats.matrices;
  if (stats) *stats = g.stats;
out:
  for (int i = 0; g.spectrum && i < g.n; i++) esp_mem_free(g.spectrum[i]);
  esp_mem_free(g.spectrum);
  esp_mem_free(g.rank);
  esp_mem_free(g.list);
  esp_sources_close(&g.s);
  return st;
}
