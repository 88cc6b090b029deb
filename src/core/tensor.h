/* tensor.h: a view of memory with dtype and shape. It owns nothing. The data may live on a device: only the backend
 * that made it may follow the pointer. Contiguous, except that a 2-D view may have a row stride (`ld`) above its
 * width. By convention activations are [tokens, width] and linear weights are [out, in]. */
#ifndef ESP_CORE_TENSOR_H
#define ESP_CORE_TENSOR_H

#include <stdbool.h>
#include <stdint.h>

#include "core/dtype.h"

#define ESP_MAX_DIMS 4

typedef struct esp_tensor {
  void *data;
  esp_dtype dtype;
  int ndim;
  int64_t shape[ESP_MAX_DIMS];
  int64_t ld; /* elements from one row of the last dimension to the next; == shape[ndim-1] when contiguous */
} esp_tensor;

static inline esp_tensor esp_tensor_1d(void *data, esp_dtype t, int64_t n) {
  esp_tensor x = {data, t, 1, {n, 1, 1, 1}, n};
  return x;
}
static inline esp_tensor esp_tensor_2d(void *data, esp_dtype t, int64_t rows, int64_t cols) {
  esp_tensor x = {data, t, 2, {rows, cols, 1, 1}, cols};
  return x;
}
static inline int64_t esp_tensor_numel(const esp_tensor *x) {
  int64_t n = 1;
  for (int i = 0; i < x->ndim; i++) n *= x->shape[i];
  return n;
}
static inline int64_t esp_tensor_bytes(const esp_tensor *x) {
  return esp_tensor_numel(x) * (int64_t)esp_dtype_size(x->dtype);
}
static inline int64_t esp_tensor_rows(const esp_tensor *x) {
  return x->ndim == 2 ? x->shape[0] : 1;
}
static inline int64_t esp_tensor_cols(const esp_tensor *x) {
  return x->shape[x->ndim - 1];
}
/* Columns [c0, c0+n) and rows [r0, r0+n) of a 2-D tensor. */
static inline esp_tensor esp_tensor_cols_view(const esp_tensor *x, int64_t c0, int64_t n) {
  esp_tensor v = *x;
  v.data = (char *)x->data + (size_t)c0 * esp_dtype_size(x->dtype);
  v.shape[1] = n;
  return v;
}
static inline esp_tensor esp_tensor_rows_view(const esp_tensor *x, int64_t r0, int64_t n) {
  esp_tensor v = *x;
  v.data = (char *)x->data + (size_t)(r0 * x->ld) * esp_dtype_size(x->dtype);
  v.shape[0] = n;
  return v;
}

#endif
