/* matmul_pack.c: frozen weights become operands: the dense matrix [out, in] in the compute type, several weights
 * stacked along out, straight from mapped files (no alignment assumed). What has to be converted or transposed passes
 * through a buffer of a few megabytes; what is stored as it is used goes to the page-locked ring directly. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cuda/cuda.h"
#include "backend/cuda/need_matmul.h"

enum { PART_BYTES = ESP_CUDA_RING_BYTES, TILE = 64 };

/* Rows [r0, r0 + rows) of a weight stored [out, in], in the compute type. */
static void convert_rows(void *dst, esp_dtype dt, const esp_tensor *w, int64_t r0, int64_t rows) {
  int64_t in = w->shape[1];
  size_t es = esp_dtype_size(w->dtype), ed = esp_dtype_size(dt);
  for (int64_t r = 0; r < rows; r++)
    esp_convert((char *)dst + (size_t)(r * in) * ed, dt, (const char *)w->data + (size_t)((r0 + r) * w->ld) * es,
                w->dtype, in);
}

/* The same of a weight stored [in, out] (GPT-2's Conv1D): tiles of TILE outputs by TILE inputs, so that both the runs
 * read and the runs written stay in the first cache. */
static void convert_columns(void *dst, esp_dtype dt, const esp_tensor *w, int64_t r0, int64_t rows) {
  int64_t in = w->shape[0];
  size_t es = esp_dtype_size(w->dtype), ed = esp_dtype_size(dt);
  union {
    uint16_t h[TILE];
    float f[TILE];
  } run;
  for (int64_t r = 0; r < rows; r += TILE) {
    int64_t n = rows - r < TILE ? rows - r : TILE;
    for (int64_t k0 = 0; k0 < in; k0 += TILE)
      for (int64_t k = k0; k < in && k < k0 + TILE; k++) {
        esp_convert(&run, dt, (const char *)w->data + (size_t)(k * w->ld + r0 + r) * es, w->dtype, n);
        for (int64_t i = 0; i < n; i++) {
          size_t at = (size_t)((r + i) * in + k);
          if (ed == 2)
            ((uint16_t *)dst)[at] = run.h[i];
          else
            ((float *)dst)[at] = run.f[i];
        }
      }
  }
}

static void convert(void *dst, esp_dtype dt, const esp_tensor *w, bool transposed, int64_t r0, int64_t rows) {
  if (transposed)
    convert_columns(dst, dt, w, r0, rows);
  else
    convert_rows(dst, dt, w, r0, rows);
}

static int64_t outs_of(const esp_tensor *w, bool transposed) {
  return w->shape[transposed ? 1 : 0];
}
static int64_t ins_of(const esp_tensor *w, bool transposed) {
  return w->shape[transposed ? 0 : 1];
}

static int64_t packed_bytes(const esp_tensor *w, int n, bool transposed, esp_dtype compute) {
  int64_t out = 0;
  for (int i = 0; i < n; i++) {
    assert(w[i].ndim == 2 && ins_of(&w[i], transposed) == ins_of(&w[0], transposed));
    out += outs_of(&w[i], transposed);
  }
  return esp_cuda_pack_bytes(out, ins_of(&w[0], transposed), compute);
}

/* Uploads one weight to dst, part by part through `part`. */
static void upload_converted(esp_backend *be, char *dst, const esp_tensor *w, bool transposed, esp_dtype compute,
                             void *part, int64_t part_rows) {
  int64_t out = outs_of(w, transposed), row = ins_of(w, transposed) * (int64_t)esp_dtype_size(compute);
  for (int64_t r = 0; r < out && be->sticky == ESP_OK; r += part_rows) {
    int64_t rows = out - r < part_rows ? out - r : part_rows;
    convert(part, compute, w, transposed, r, rows);
    esp_cuda_upload(be, dst + r * row, part, rows * row); /* `part` is free when this returns */
  }
}

void *esp_cuda_pack(esp_backend *be, const esp_tensor *w, int n, bool transposed, esp_dtype compute) {
  assert(n > 0 && (compute == ESP_BF16 || compute == ESP_F32));
  if (be->sticky != ESP_OK) return NULL;
  void *part = NULL;
  int64_t row = ins_of(&w[0], transposed) * (int64_t)esp_dtype_size(compute), part_rows = row ? PART_BYTES / row : 1;
  if (part_rows < 1) part_rows = 1;
  if (part_rows > TILE) part_rows -= part_rows % TILE; /* whole tiles */
  char *packed = esp_cuda_alloc(be, ESP_MEM_WEIGHTS, packed_bytes(w, n, transposed, compute)), *at = packed;
  for (int i = 0; i < n && packed && be->sticky == ESP_OK; i++) {
    int64_t bytes = outs_of(&w[i], transposed) * row;
    if (!transposed && w[i].dtype == compute && w[i].ld == w[i].shape[1]) {
      esp_cuda_upload(be, at, w[i].data, bytes);
    } else {
      if (!part) part = malloc((size_t)(part_rows * row) + 1);
      if (part)
        upload_converted(be, at, &w[i], transposed, compute, part, part_rows);
      else
        be->sticky = esp_fail(ESP_ERR_MEMORY, "cuda: out of host memory");
    }
    at += bytes;
  }
  free(part);
  if (be->sticky == ESP_OK) return packed;
  esp_cuda_free(be, packed);
  return NULL;
}

void *esp_cuda_pack_host(esp_backend *be, const esp_tensor *w, int n, bool transposed, esp_dtype compute) {
  assert(n > 0 && (compute == ESP_BF16 || compute == ESP_F32));
  if (be->sticky != ESP_OK) return NULL;
  char *packed = esp_cuda_host_alloc(be, packed_bytes(w, n, transposed, compute)), *at = packed;
  for (int i = 0; i < n && packed; i++) {
    int64_t out = outs_of(&w[i], transposed);
    convert(at, compute, &w[i], transposed, 0, out);
    at += esp_cuda_pack_bytes(out, ins_of(&w[i], transposed), compute);
  }
  return packed;
}

void esp_cuda_pack_free(esp_backend *be, void *packed) {
  esp_cuda_free(be, packed);
}
