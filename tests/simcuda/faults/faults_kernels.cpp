/* faults_kernels.cpp: the cases about kernels. */
#include <stdio.h>
#include <stdlib.h>

#include "tests/simcuda/faults/faults.h"

void expect(cudaError_t e, cudaError_t expected, int line) {
  if (e == expected) return;
  fprintf(stderr, "line %d: %s instead of %s\n", line, cudaGetErrorName(e), cudaGetErrorName(expected));
  abort();
}

float *on_device(const std::vector<float> &values) {
  void *p = nullptr;
  OK(cudaMalloc(&p, values.size() * sizeof(float)));
  OK(cudaMemcpy(p, values.data(), values.size() * sizeof(float), cudaMemcpyHostToDevice));
  return static_cast<float *>(p);
}

std::vector<float> from_device(const float *values, size_t n) {
  std::vector<float> host(n);
  OK(cudaMemcpy(host.data(), values, n * sizeof(float), cudaMemcpyDeviceToHost));
  return host;
}

static std::vector<float> counting(size_t n) {
  std::vector<float> v(n);
  for (size_t i = 0; i < n; i++) v[i] = static_cast<float>(i % 97);
  return v;
}

static float *uninitialised(size_t n) {
  void *p = nullptr;
  OK(cudaMalloc(&p, n * sizeof(float)));
  return static_cast<float *>(p);
}

static bool row_sum(int fault) {
  constexpr int rows = 5, width = 700;
  std::vector<float> in = counting(rows * width);
  float *out = uninitialised(rows), *x = on_device(in);
  if (fault == UNINITIALISED_DEVICE) OK(cudaFree(x)), x = uninitialised(rows * width);
  OK(launch_row_sum(fault, out, x, rows, width, nullptr));
  std::vector<float> got = from_device(out, rows);
  for (int r = 0; r < rows; r++) {
    float sum = 0; /* whole numbers: exact in any order */
    for (int i = 0; i < width; i++) sum += in[static_cast<size_t>(r * width + i)];
    if (got[static_cast<size_t>(r)] != sum) return false;
  }
  return true;
}

static bool add(int fault) {
  constexpr int n = 1000;
  std::vector<float> in = counting(n);
  float *out = uninitialised(n);
  OK(launch_add(fault, out, on_device(in), 0.5f, n, nullptr));
  std::vector<float> got = from_device(out, n);
  for (size_t i = 0; i < n; i++) {
    if (got[i] != in[i] + 0.5f) return false;
  }
  return true;
}

static bool rounds(int fault) {
  float *out = uninitialised(4 * 64);
  OK(launch_rounds(fault, out, nullptr));
  std::vector<float> got = from_device(out, 4 * 64);
  for (size_t i = 0; i < got.size(); i++) {
    if (got[i] != static_cast<float>(i / 64)) return false;
  }
  return true;
}

static bool reversed(int fault, int dynamic) {
  std::vector<float> in = counting(64);
  float *out = uninitialised(64);
  OK(launch_reversed(fault, out, on_device(in), dynamic, nullptr));
  std::vector<float> got = from_device(out, 64);
  for (size_t i = 0; i < 64; i++) {
    if (got[i] != in[63 - i]) return false;
  }
  return true;
}
static bool reversed_static(int fault) {
  return reversed(fault, 0);
}
static bool reversed_dynamic(int fault) {
  return reversed(fault, 1);
}

static bool half_sums(int fault) {
  std::vector<float> in = counting(32);
  float *out = uninitialised(32);
  OK(launch_half_sums(fault, out, on_device(in), nullptr));
  std::vector<float> got = from_device(out, 32);
  for (size_t i = 0; i < 32; i++) {
    if (got[i] != (i < 16 ? 120.0f : 376.0f)) return false;
  }
  return true;
}

static bool count(int fault) {
  void *p = nullptr;
  int total = -1;
  OK(cudaMalloc(&p, sizeof total));
  OK(cudaMemset(p, 0, sizeof total));
  OK(launch_count(fault, static_cast<int *>(p), nullptr));
  OK(cudaMemcpy(&total, p, sizeof total, cudaMemcpyDeviceToHost));
  return fault == CROSS_BLOCK_RACE ? total == 32 || total == 33 : total == 64 * 32;
}

static bool swap(int fault) {
  std::vector<float> in = counting(64);
  float *out = uninitialised(64);
  OK(launch_swap(fault, out, on_device(in), nullptr));
  std::vector<float> got = from_device(out, 64);
  for (size_t i = 0; i < 64; i++) {
    if (got[i] != in[i ^ 1]) return false;
  }
  return true;
}

static bool plane(int) {
  float *out = uninitialised(240);
  OK(launch_plane(out, nullptr));
  std::vector<float> got = from_device(out, 240);
  for (size_t i = 0; i < 240; i++) {
    if (got[i] != static_cast<float>(i % 24 + 100 * (i / 24))) return false;
  }
  return true;
}

static bool votes(int) {
  unsigned *out = reinterpret_cast<unsigned *>(uninitialised(6)), got[6];
  OK(launch_votes(out, nullptr));
  OK(cudaMemcpy(got, out, sizeof got, cudaMemcpyDeviceToHost));
  return got[0] == 0x55555555u && got[1] == 1 && got[2] == 0 && got[3] == 496 && got[4] == 1415 && got[5] == 36;
}

const std::vector<Case> &kernel_cases() {
  static const std::vector<Case> cases = {
      {"grid and block in two dimensions", plane, CONTROL, "", nullptr, nullptr, nullptr},
      {"votes and reductions", votes, CONTROL, "", nullptr, nullptr, nullptr},
      {"removed barrier", row_sum, REMOVED_BARRIER, "wrong result", nullptr, nullptr, nullptr},
      {"removed barrier (orders compared)", row_sum, REMOVED_BARRIER,
       "depends on the order of threads or blocks: kernel row_sum", nullptr, nullptr, nullptr},
      {"removed barrier at a loop's end", rounds, REMOVED_BARRIER_LOOP, "wrong result", nullptr, nullptr, nullptr},
      {"removed barrier of a warp", swap, REMOVED_SYNCWARP, "wrong result", nullptr, nullptr, nullptr},
      {"divergent barrier", reversed_static, DIVERGENT_BARRIER, "wait at different barriers", nullptr, nullptr,
       nullptr},
      {"barrier after a thread returned", reversed_static, BARRIER_AFTER_RETURN, "left the kernel without reaching",
       nullptr, nullptr, nullptr},
      {"off-by-one store", add, OFF_BY_ONE_STORE, "kernel add wrote past an allocation of 4000 bytes, at byte 4000",
       "heap-buffer-overflow", nullptr, nullptr},
      {"off-by-one read", add, OFF_BY_ONE_READ, "wrong result", "heap-buffer-overflow", nullptr, nullptr},
      {"off-by-one in dynamic shared memory", reversed_dynamic, OFF_BY_ONE_DYNAMIC, "past its dynamic shared memory",
       "heap-buffer-overflow", nullptr, nullptr},
      {"wrong mask", half_sums, WRONG_MASK, "left the kernel", nullptr, nullptr, nullptr},
      {"masks that differ", half_sums, MASKS_DIFFER, "it waits with another mask", nullptr, nullptr, nullptr},
      {"shuffle from outside the mask", half_sums, SHUFFLE_OUTSIDE, "reads from a lane outside its mask", nullptr,
       nullptr, nullptr},
      {"uninitialised dynamic shared memory", reversed_dynamic, UNINITIALISED_DYNAMIC, "wrong result", nullptr, nullptr,
       nullptr},
      {"uninitialised device memory", row_sum, UNINITIALISED_DEVICE, "wrong result", nullptr, nullptr, nullptr},
      {"race between blocks (orders compared)", count, CROSS_BLOCK_RACE, "kernel count", nullptr, nullptr, nullptr},
#ifdef __SANITIZE_ADDRESS__
      {"off-by-one in static shared memory", reversed_static, OFF_BY_ONE_SHARED, "", "index 64 out of bounds", nullptr,
       nullptr},
#else
      {"uninitialised static shared memory", reversed_static, UNINITIALISED_STATIC, "wrong result", nullptr, nullptr,
       nullptr},
#endif
  };
  return cases;
}
