#include "merge/residual.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "core/mem.h"
#include "io/file.h"
#include "io/json.h"

struct esp_residual {
  esp_st *file;
};

static const esp_st_entry *part(const esp_residual *r, const char *tensor, const char *what) {
  char name[512];
  snprintf(name, sizeof name, "%s.%s", tensor, what);
  return esp_st_find(r->file, name);
}

static bool shaped(const esp_st_entry *e, bool type, int ndim, int64_t a, int64_t b) {
  return e && e->raw_dtype_known && type && e->ndim == ndim && e->shape[0] == a && (ndim < 2 || e->shape[1] == b);
}

/* One factor: [r, n], with a scale per row where it is of 8 bits. */
static bool is_factor(const esp_residual *r, const char *tensor, const char *what, int64_t rank, int64_t n) {
  char scale[8];
  snprintf(scale, sizeof scale, "%s.scale", what);
  const esp_st_entry *e = part(r, tensor, what), *s = part(r, tensor, scale);
  if (!e || !shaped(e, e->dtype == ESP_F32 || e->dtype == ESP_BF16 || e->dtype == ESP_I8, 2, rank, n)) return false;
  return e->dtype != ESP_I8 || (s && shaped(s, s->dtype == ESP_F32, 1, rank, 0));
}

/* How many stored tensors say what became of e; -1: they do not fit it. */
static int fits(const esp_residual *r, const esp_st_entry *e) {
  const esp_st_entry *exact = part(r, e->name, "exact"), *sign = part(r, e->name, "sign"),
                     *scale = part(r, e->name, "scale"), *a = part(r, e->name, "A");
  if (exact) {
    bool same = exact->ndim == e->ndim && memcmp(exact->shape, e->shape, (size_t)e->ndim * sizeof *e->shape) == 0;
    return same && exact->raw_dtype_known && exact->dtype == ESP_F32 ? 1 : -1;
  }
  if (sign) {
    bool one = scale && scale->ndim == 1 && scale->shape[0] == 1;
    bool fit = e->ndim == 2 && shaped(sign, sign->dtype == ESP_U8, 2, e->shape[0], (e->shape[1] + 7) / 8) && scale &&
               shaped(scale, scale->dtype == ESP_F32, 1, one ? 1 : e->shape[0], 0);
    return fit ? 2 : -1;
  }
  if (a) {
    bool fit = e->ndim == 2 && a->ndim == 2 && is_factor(r, e->name, "A", a->shape[0], e->shape[1]) &&
               is_factor(r, e->name, "B", a->shape[0], e->shape[0]);
    return !fit ? -1 : 2 + (part(r, e->name, "A.scale") != NULL) + (part(r, e->name, "B.scale") != NULL);
  }
  return 0;
}

static esp_status check(const esp_residual *r, const char *dir, const esp_model *model, const esp_st *base) {
  char path[PATH_MAX];
  const char *format = NULL, *print = NULL;
  json_t *j = NULL;
  int known = 0;
  esp_status st;
  ESP_GOTO(esp_json_load(esp_path_join(path, sizeof path, dir, ESP_RESIDUAL_CONFIG), &j));
  ESP_GOTO(esp_json_str(j, "format", path, 1, &format));
  ESP_GOTO(esp_json_str(j, "base", path, 1, &print));
  if (strcmp(format, "espalier-residual-1") != 0) {
    st = esp_fail(ESP_ERR_DATA, "%s: format '%s' is not espalier-residual-1", path, format);
    goto out;
  }
  if (strcmp(print, esp_model_fingerprint(model)) != 0) {
    st = esp_fail(ESP_ERR_DATA, "%s: made on another base (fingerprint %s, %s has %s)", path, print,
                  esp_model_dir(model), esp_model_fingerprint(model));
    goto out;
  }
  for (int i = 0; i < esp_st_count(base); i++) {
    const esp_st_entry *e = esp_st_at(base, i);
    int n = fits(r, e);
    if (n < 0) {
      st = esp_fail(ESP_ERR_DATA, "%s: what is stored for '%s' does not fit the base", dir, e->name);
      goto out;
    }
    known += n;
  }
  if (known != esp_st_count(r->file))
    st = esp_fail(ESP_ERR_DATA, "%s: holds %d tensors that belong to none of the base", dir,
                  esp_st_count(r->file) - known);
out:
  json_decref(j);
  return st;
}

esp_status esp_residual_open(const char *dir, const esp_model *model, const esp_st *base, esp_residual **out) {
  esp_status st;
  char path[PATH_MAX];
  esp_residual *r = esp_mem_alloc(ESP_MEM_HOST, sizeof *r);
  if (!r) return ESP_ERR_MEMORY;
  ESP_GOTO(esp_st_open(esp_path_join(path, sizeof path, dir, "residual.safetensors"), &r->file));
  ESP_GOTO(check(r, dir, model, base));
  *out = r;
  return ESP_OK;
out:
  esp_residual_close(r);
  return st;
}

void esp_residual_close(esp_residual *r) {
  if (!r) return;
  esp_st_close(r->file);
  esp_mem_free(r);
}

bool esp_residual_holds(const esp_residual *r, const char *tensor) {
  return part(r, tensor, "exact") || part(r, tensor, "sign") || part(r, tensor, "A");
}

static float f32_at(const esp_st_entry *e, int64_t i) { /* the data may be unaligned */
  float x;
  memcpy(&x, (const char *)e->data + i * 4, 4);
  return x;
}

static void factor_row(const esp_st_entry *e, const esp_st_entry *scale, int64_t row, int64_t from, int64_t n,
                       float *out) {
  int64_t at = row * e->shape[1] + from;
  if (e->dtype != ESP_I8) {
    esp_convert(out, ESP_F32, (const char *)e->data + at * (int64_t)esp_dtype_size(e->dtype), e->dtype, n);
    return;
  }
  float s = f32_at(scale, row);
  for (int64_t i = 0; i < n; i++) out[i] = s * ((const int8_t *)e->data)[at + i];
}

static void signs(const esp_st_entry *sign, const esp_st_entry *scale, int64_t r0, int64_t n, int64_t cols,
                  float *out) {
  for (int64_t r = 0; r < n; r++) {
    const uint8_t *bits = (const uint8_t *)sign->data + (r0 + r) * sign->shape[1];
    float s = f32_at(scale, scale->shape[0] == 1 ? 0 : r0 + r);
    for (int64_t c = 0; c < cols; c++) out[r * cols + c] = bits[c / 8] >> (c % 8) & 1 ? s : -s;
  }
}

void esp_residual_rows(const esp_residual *r, const char *tensor, int64_t r0, int64_t n, int64_t cols, float *out) {
  enum { SOME = 512 };
  float left[SOME], right[SOME];
  const esp_st_entry *exact = part(r, tensor, "exact"), *sign = part(r, tensor, "sign"), *a = part(r, tensor, "A");
  memset(out, 0, (size_t)(n * cols) * 4);
  if (exact) esp_convert(out, ESP_F32, (const char *)exact->data + r0 * cols * 4, ESP_F32, n * cols);
  if (sign) signs(sign, part(r, tensor, "scale"), r0, n, cols, out);
  if (exact || sign || !a) return;
  const esp_st_entry *b = part(r, tensor, "B"), *as = part(r, tensor, "A.scale"), *bs = part(r, tensor, "B.scale");
  for (int64_t k = 0; k < a->shape[0]; k++)
    for (int64_t i = 0; i < n; i += SOME) {
      int64_t rows = n - i < SOME ? n - i : SOME;
      factor_row(b, bs, k, r0 + i, rows, left);
      for (int64_t j = 0; j < cols; j += SOME) {
        int64_t some = cols - j < SOME ? cols - j : SOME;
        factor_row(a, as, k, j, some, right);
        for (int64_t x = 0; x < rows; x++)
          for (int64_t y = 0; y < some; y++) out[(i + x) * cols + j + y] += left[x] * right[y];
      }
    }
}
