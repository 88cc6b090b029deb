/* pack.c: frozen weights become operands once, in parallel, straight from mapped files (no alignment assumed).
 * With tiles: bf16 panels of 32 outputs, each a run of 32 x 32 blocks of two VNNI tiles along `in`, so that a product
 * streams a panel and its transpose can be re-made block by block. Without: the dense matrix in the compute type. */
#include <assert.h>
#include <string.h>

#include "backend/cpu/gemm.h"
#include "backend/cpu/gemm_impl.h"
#include "core/cpu.h"
#include "core/threads.h"

int64_t esp_cpu_pack_bytes(int64_t out, int64_t in, esp_dtype compute) {
  if (compute == ESP_BF16 && esp_cpu_isa() == ESP_ISA_AMX)
    return esp_ceil_div(out, 32) * esp_ceil_div(in, 32) * ESP_GEMM_BLOCK;
  return out * in * (int64_t)esp_dtype_size(compute);
}

typedef struct pack_job {
  const esp_tensor *w;
  int n;
  bool transposed;
  esp_packed *p;
  char *tmp; /* per thread: 32 rows in the source's order and type, then 32 rows of `in` in the packed type */
  size_t tmp_bytes, src_bytes;
} pack_job;

/* n elements from unaligned src to dst; `tmp` (n elements of the source type) makes them aligned first. */
static void convert_row(void *dst, esp_dtype dt, const char *src, esp_dtype st, int64_t n, char *tmp) {
  size_t bytes = (size_t)n * esp_dtype_size(st);
  if (dt == st) {
    memcpy(dst, src, bytes);
    return;
  }
  memcpy(tmp, src, bytes);
  esp_convert(dst, dt, tmp, st, n);
}

/* Rows [r0, r0+rows) of source tensor w as rows of `in` elements of the packed type at dst. */
static void fetch_rows(const pack_job *j, const esp_tensor *w, int64_t r0, int64_t rows, char *dst, char *tmp) {
  esp_dtype dt = j->p->dtype;
  size_t es = esp_dtype_size(w->dtype), ed = esp_dtype_size(dt);
  int64_t in = j->p->in;
  if (!j->transposed) {
    for (int64_t r = 0; r < rows; r++)
      convert_row(dst + (size_t)(r * in) * ed, dt, (const char *)w->data + (size_t)((r0 + r) * w->ld) * es, w->dtype,
                  in, tmp);
    return;
  }
  for (int64_t k = 0; k < in; k++) { /* stored [in, out]: one short run per input, scattered to the rows */
    union {
      uint16_t h[32];
      float f[32];
    } run;
    convert_row(&run, dt, (const char *)w->data + (size_t)(k * w->ld + r0) * es, w->dtype, rows, tmp);
    if (ed == 2)
      for (int64_t r = 0; r < rows; r++) ((uint16_t *)dst)[r * in + k] = run.h[r];
    else
      for (int64_t r = 0; r < rows; r++) ((float *)dst)[r * in + k] = run.f[r];
  }
}

static void pack_fn(void *ctx, int64_t chunk, int thread) {
  const pack_job *j = ctx;
  esp_packed *p = j->p;
  size_t ed = esp_dtype_size(p->dtype);
  char *tmp = j->tmp + (size_t)thread * j->tmp_bytes, *rows = tmp + j->src_bytes;
  int64_t o0 = chunk * 32, n = esp_min64(32, p->out - o0);
  if (!p->vnni) rows = (char *)p->data + (size_t)(o0 * p->in) * ed;
  int64_t start = 0;
  for (int i = 0; i < j->n; i++) { /* the sources that these 32 outputs meet */
    int64_t outs = j->transposed ? j->w[i].shape[1] : j->w[i].shape[0];
    int64_t a = esp_max64(o0, start), b = esp_min64(o0 + n, start + outs);
    if (a < b) fetch_rows(j, &j->w[i], a - start, b - a, rows + (size_t)((a - o0) * p->in) * ed, tmp);
    start += outs;
  }
  if (!p->vnni) return;
  uint16_t *d = (uint16_t *)p->data + chunk * p->blocks * (ESP_GEMM_BLOCK / 2);
  for (int64_t kb = 0; kb < p->blocks; kb++)
    esp_amx_block_from_rows(d + kb * (ESP_GEMM_BLOCK / 2), (const uint16_t *)rows + kb * 32, p->in, n,
                            esp_min64(32, p->in - kb * 32));
}

void *esp_cpu_pack(esp_backend *be, const esp_tensor *w, int n, bool transposed, esp_dtype compute) {
  if (be->sticky != ESP_OK) return NULL;
  assert(n > 0 && (compute == ESP_BF16 || compute == ESP_F32));
  esp_packed *p = NULL;
  char *tmp = NULL;
  int64_t out = 0, in = transposed ? w[0].shape[0] : w[0].shape[1];
  for (int i = 0; i < n; i++) {
    assert(w[i].ndim == 2 && (transposed ? w[i].shape[0] : w[i].shape[1]) == in);
    out += transposed ? w[i].shape[1] : w[i].shape[0];
  }
  p = esp_mem_alloc(ESP_MEM_WEIGHTS, sizeof *p);
  if (!p) goto fail;
  p->out = out;
  p->in = in;
  p->dtype = compute;
  p->vnni = compute == ESP_BF16 && esp_cpu_isa() == ESP_ISA_AMX;
  p->blocks = esp_ceil_div(in, 32);
  p->data = esp_mem_alloc(ESP_MEM_WEIGHTS, (size_t)esp_cpu_pack_bytes(out, in, compute));
  if (!p->data) goto fail;
  pack_job j = {w, n, transposed, p, NULL, 0, 0};
  j.src_bytes = ((size_t)esp_max64(in, 32) * 4 + 63) & ~(size_t)63;
  j.tmp_bytes = j.src_bytes + (p->vnni ? (((size_t)in * 64 + 63) & ~(size_t)63) : 0);
  tmp = esp_mem_alloc(ESP_MEM_WORKSPACE, j.tmp_bytes * (size_t)esp_threads_count());
  if (!tmp) goto fail;
  j.tmp = tmp;
  esp_parallel(esp_ceil_div(out, 32), pack_fn, &j);
  esp_mem_free(tmp);
  return p;
fail:
  be->sticky = ESP_ERR_MEMORY;
  esp_mem_free(tmp);
  if (p) esp_mem_free(p->data);
  esp_mem_free(p);
  return NULL;
}

void esp_cpu_pack_free(esp_backend *be, void *packed) {
  (void)be;
  esp_packed *p = packed;
  if (!p) return;
  esp_mem_free(p->data);
  esp_mem_free(p);
}
