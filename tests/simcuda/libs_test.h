/* libs_test.h: memory on the simulated device and random numbers, for the tests of the stand-in libraries. */
#ifndef SIMCUDA_LIBS_TEST_H
#define SIMCUDA_LIBS_TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <cuda_runtime_api.h>
#include <library_types.h>
#include <stdlib.h>

#include "num.h"

#define CUDA_OK(call) assert_int_equal((int)(call), cudaSuccess)

static inline float libs_uniform(uint64_t *state) { /* in [-1, 1) */
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return (float)(int32_t)(*state >> 32) * 0x1p-31f;
}

static inline size_t libs_bytes(cudaDataType_t type) {
  return type == CUDA_R_32F || type == CUDA_R_32I ? 4 : 2;
}

/* The value as the device would store it. */
static inline float libs_rounded(float v, cudaDataType_t type) {
  if (type == CUDA_R_16BF) return simcuda_bf16_f32(simcuda_f32_bf16(v));
  if (type == CUDA_R_16F) return simcuda_f16_f32(simcuda_f32_f16(v));
  return v;
}

static inline void *libs_device(size_t bytes) {
  void *p = NULL;
  CUDA_OK(cudaMalloc(&p, bytes));
  return p;
}

static inline void libs_put(void *device, const float *v, size_t n, cudaDataType_t type) {
  uint16_t *h = malloc(n * sizeof *h + 1);
  assert_non_null(h);
  for (size_t i = 0; i < n; i++) h[i] = type == CUDA_R_16BF ? simcuda_f32_bf16(v[i]) : simcuda_f32_f16(v[i]);
  CUDA_OK(cudaMemcpy(device, type == CUDA_R_32F ? (const void *)v : h, n * libs_bytes(type), cudaMemcpyHostToDevice));
  free(h);
}

static inline void libs_get(float *v, const void *device, size_t n, cudaDataType_t type) {
  uint16_t *h = malloc(n * sizeof *h + 1);
  assert_non_null(h);
  CUDA_OK(cudaMemcpy(type == CUDA_R_32F ? (void *)v : h, device, n * libs_bytes(type), cudaMemcpyDeviceToHost));
  if (type != CUDA_R_32F)
    for (size_t i = 0; i < n; i++) v[i] = type == CUDA_R_16BF ? simcuda_bf16_f32(h[i]) : simcuda_f16_f32(h[i]);
  free(h);
}

#endif
