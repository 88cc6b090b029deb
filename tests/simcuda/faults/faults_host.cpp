/* faults_host.cpp: the cases about streams, graphs, memory and errors. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "tests/simcuda/faults/faults.h"
#include "tests/simcuda/include/simcuda.h"

enum { n = 512 };
enum Host_fault {
  NO_WAIT = 100,   /* consumer does not wait for its producer */
  NO_WAIT_BACK,    /* producer does not wait for the consumer of the round before */
  REUSED_EARLY,    /* host buffer written again before it was copied */
  READ_EARLY,      /* host buffer read before the copy into it is done */
  HOST_TOUCHES,    /* the host reads device memory */
  PLANTED_SETTING, /* only the setting of the environment differs */
};

static float *device_floats() {
  void *p = nullptr;
  OK(cudaMalloc(&p, n * sizeof(float)));
  return static_cast<float *>(p);
}

static float *pinned_floats(float value) {
  void *p = nullptr;
  OK(cudaHostAlloc(&p, n * sizeof(float), cudaHostAllocDefault));
  std::fill_n(static_cast<float *>(p), n, value);
  return static_cast<float *>(p);
}

static cudaStream_t new_stream() {
  cudaStream_t s = nullptr;
  OK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  return s;
}

static cudaEvent_t new_event() {
  cudaEvent_t e = nullptr;
  OK(cudaEventCreateWithFlags(&e, cudaEventDisableTiming));
  return e;
}

static bool all_are(const float *values, float expected) {
  return std::all_of(values, values + n, [expected](float v) { return v == expected; });
}

/* Stream a makes x, stream b reads it. */
static bool producer(int fault) {
  cudaStream_t a = new_stream(), b = new_stream();
  float *x = device_floats(), *y = device_floats(), *in = pinned_floats(1), *out = pinned_floats(0);
  cudaEvent_t made = new_event();
  OK(cudaMemcpyAsync(x, in, n * sizeof(float), cudaMemcpyHostToDevice, a));
  OK(cudaEventRecord(made, a));
  if (fault != NO_WAIT) OK(cudaStreamWaitEvent(b, made, 0));
  OK(launch_add(CONTROL, y, x, 2, n, b));
  OK(cudaMemcpyAsync(out, y, n * sizeof(float), cudaMemcpyDeviceToHost, b));
  OK(cudaStreamSynchronize(b));
  return all_are(out, 3);
}

/* Two rounds through one device buffer: stream a fills it, stream b uses it. */
static bool consumer(int fault) {
  cudaStream_t a = new_stream(), b = new_stream();
  float *x = device_floats(), *y[2] = {device_floats(), device_floats()};
  float *in[2] = {pinned_floats(1), pinned_floats(10)}, *out = pinned_floats(0);
  cudaEvent_t made = new_event(), used = new_event();
  for (int k = 0; k < 2; k++) {
    if (fault != NO_WAIT_BACK) OK(cudaStreamWaitEvent(a, used, 0));
    OK(cudaMemcpyAsync(x, in[k], n * sizeof(float), cudaMemcpyHostToDevice, a));
    OK(cudaEventRecord(made, a));
    OK(cudaStreamWaitEvent(b, made, 0));
    OK(launch_add(CONTROL, y[k], x, 2, n, b));
    OK(cudaEventRecord(used, b));
  }
  bool right = true;
  for (int k = 0; k < 2; k++) {
    OK(cudaMemcpyAsync(out, y[k], n * sizeof(float), cudaMemcpyDeviceToHost, b));
    OK(cudaStreamSynchronize(b));
    right = right && all_are(out, k == 0 ? 3 : 12);
  }
  return right;
}

static bool host_buffer(int fault) {
  cudaStream_t s = new_stream();
  float *x = device_floats(), *y = device_floats(), *in = pinned_floats(1), *out = pinned_floats(0);
  cudaEvent_t copied = new_event();
  OK(cudaMemcpyAsync(x, in, n * sizeof(float), cudaMemcpyHostToDevice, s));
  OK(cudaEventRecord(copied, s));
  if (fault != REUSED_EARLY) OK(cudaEventSynchronize(copied));
  std::fill_n(in, n, 50.0f);
  OK(launch_add(CONTROL, y, x, 2, n, s));
  OK(cudaMemcpyAsync(out, y, n * sizeof(float), cudaMemcpyDeviceToHost, s));
  if (fault != READ_EARLY) OK(cudaStreamSynchronize(s));
  return all_are(out, 3);
}

/* Pageable memory is taken over before the call returns, and filled before it returns. */
static bool pageable(int) {
  cudaStream_t s = new_stream();
  float *x = device_floats(), *y = device_floats();
  std::vector<float> in(n, 1.0f), out(n, 0.0f);
  OK(cudaMemcpyAsync(x, in.data(), n * sizeof(float), cudaMemcpyHostToDevice, s));
  std::fill(in.begin(), in.end(), 50.0f);
  OK(launch_add(CONTROL, y, x, 2, n, s));
  OK(cudaMemcpyAsync(out.data(), y, n * sizeof(float), cudaMemcpyDeviceToHost, s));
  return all_are(out.data(), 3);
}

static bool polling(int) {
  cudaStream_t s = new_stream();
  float *x = device_floats(), *out = pinned_floats(0);
  cudaEvent_t done = new_event(), begin = nullptr, end = nullptr;
  float ms = -1;
  OK(cudaEventCreateWithFlags(&begin, cudaEventDefault));
  OK(cudaEventCreateWithFlags(&end, cudaEventDefault));
  OK(cudaEventRecord(begin, s));
  OK(cudaMemsetAsync(x, 0, n * sizeof(float), s));
  OK(launch_add(CONTROL, x, x, 2, n, s));
  OK(cudaMemcpyAsync(out, x, n * sizeof(float), cudaMemcpyDeviceToHost, s));
  OK(cudaEventRecord(end, s));
  OK(cudaEventRecord(done, s));
  while (cudaEventQuery(done) == cudaErrorNotReady) continue;
  OK(cudaStreamQuery(s));
  OK(cudaEventElapsedTime(&ms, begin, end));
  EXPECT(cudaEventElapsedTime(&ms, begin, done), cudaErrorInvalidResourceHandle);
  return ms >= 0 && all_are(out, 2);
}

struct Scale {
  float *x;
  float by;
};
static void scale(void *arg) {
  Scale *s = static_cast<Scale *>(arg);
  for (int i = 0; i < n; i++) s->x[i] *= s->by;
  s->by = 0; /* its own copy */
}

/* Kernels, copies, a library's work and a second stream, recorded once and run three times. */
static bool graph(int) {
  cudaStream_t s = new_stream(), side = new_stream();
  float *x = device_floats(), *y = device_floats(), *in = pinned_floats(1), *out = pinned_floats(0);
  cudaEvent_t fork = new_event(), join = new_event();
  cudaGraph_t recorded = nullptr;
  cudaGraphExec_t exec = nullptr;
  cudaStreamCaptureStatus status;
  Scale by_three = {y, 3};
  OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
  OK(cudaMemcpyAsync(x, in, n * sizeof(float), cudaMemcpyHostToDevice, s));
  OK(launch_add(CONTROL, y, x, 1, n, s));
  OK(cudaEventRecord(fork, s));
  OK(cudaStreamWaitEvent(side, fork, 0));
  OK(simcuda_enqueue(side, scale, &by_three, sizeof by_three));
  OK(cudaEventRecord(join, side));
  OK(cudaStreamIsCapturing(side, &status));
  if (status != cudaStreamCaptureStatusActive) return false;
  OK(cudaStreamWaitEvent(s, join, 0));
  OK(cudaMemcpyAsync(out, y, n * sizeof(float), cudaMemcpyDeviceToHost, s));
  OK(cudaStreamEndCapture(s, &recorded));
  OK(cudaGraphInstantiate(&exec, recorded, 0));
  OK(cudaGraphDestroy(recorded));
  by_three.by = 100;
  OK(cudaDeviceSynchronize());
  if (!all_are(out, 0)) return false; /* nothing has run yet */
  for (int k = 1; k <= 3; k++) {
    std::fill_n(in, n, static_cast<float>(k));
    OK(cudaGraphLaunch(exec, s));
    OK(cudaStreamSynchronize(s));
    if (!all_are(out, static_cast<float>(3 * (k + 1)))) return false;
  }
  OK(cudaGraphExecDestroy(exec));
  return true;
}

static bool illegal_in_capture(int) {
  cudaStream_t s = new_stream(), other = new_stream();
  cudaGraph_t recorded = nullptr;
  void *p = nullptr;
  cudaEvent_t e = new_event();
  OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
  EXPECT(cudaMalloc(&p, 16), cudaErrorStreamCaptureUnsupported);
  EXPECT(cudaStreamEndCapture(s, &recorded), cudaErrorStreamCaptureInvalidated);
  OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeRelaxed));
  OK(cudaMalloc(&p, 16));
  EXPECT(cudaStreamSynchronize(s), cudaErrorStreamCaptureUnsupported);
  EXPECT(cudaMemsetAsync(p, 0, 16, s), cudaErrorStreamCaptureInvalidated);
  EXPECT(cudaStreamEndCapture(s, &recorded), cudaErrorStreamCaptureInvalidated);
  OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeRelaxed));
  OK(cudaEventRecord(e, s));
  EXPECT(cudaEventSynchronize(e), cudaErrorCapturedEvent);
  OK(cudaStreamWaitEvent(other, e, 0));
  OK(cudaMemsetAsync(p, 0, 16, other));
  EXPECT(cudaStreamEndCapture(other, &recorded), cudaErrorStreamCaptureUnmatched);
  EXPECT(cudaStreamEndCapture(s, &recorded), cudaErrorStreamCaptureUnjoined);
  return recorded == nullptr;
}

static bool bad_arguments(int) {
  float *x = device_floats();
  std::vector<float> host(2 * n, 1.0f);
  EXPECT(cudaMemcpy(x, host.data(), 2 * n * sizeof(float), cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT(cudaMemcpy(host.data(), x, n * sizeof(float), cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT(cudaMemset(x, 0, n * sizeof(float) + 1), cudaErrorInvalidValue);
  EXPECT(launch_row_sum(CONTROL, x, x, 0, 1, nullptr), cudaErrorInvalidConfiguration);
  EXPECT(cudaPeekAtLastError(), cudaErrorInvalidConfiguration);
  EXPECT(cudaGetLastError(), cudaErrorInvalidConfiguration);
  EXPECT(cudaGetLastError(), cudaSuccess);
  EXPECT(cudaFree(x + 1), cudaErrorInvalidValue);
  OK(cudaFree(x));
  EXPECT(cudaFree(x), cudaErrorInvalidValue);
  return true;
}

static bool host_touches(int fault) {
  float *x = device_floats();
  OK(cudaMemset(x, 0, n * sizeof(float)));
  if (fault == HOST_TOUCHES) return x[3] == 0.0f;
  return from_device(x, n)[3] == 0.0f;
}

static bool memory(int fault) {
  size_t free_before = 0, free_then = 0, total = 0;
  void *p = nullptr, *q = nullptr;
  OK(cudaMemGetInfo(&free_before, &total));
  OK(cudaMalloc(&p, 1000000));
  OK(cudaMemGetInfo(&free_then, &total));
  if (free_before - free_then != 1000000) return false;
  EXPECT(cudaMalloc(&q, 1500000), fault == CONTROL ? cudaSuccess : cudaErrorMemoryAllocation);
  OK(cudaFree(p));
  OK(cudaMalloc(&p, 1500000));
  return fault == CONTROL;
}

static bool device_lost(int fault) {
  float *x = device_floats();
  OK(cudaMemset(x, 0, n * sizeof(float)));
  OK(launch_add(CONTROL, x, x, 1, n, nullptr));
  cudaError_t e = launch_add(CONTROL, x, x, 1, n, nullptr);
  if (fault == CONTROL) return e == cudaSuccess;
  EXPECT(e, cudaErrorLaunchFailure);
  EXPECT(cudaDeviceSynchronize(), cudaErrorLaunchFailure);
  EXPECT(cudaGetLastError(), cudaErrorLaunchFailure);
  EXPECT(cudaFree(x), cudaErrorLaunchFailure);
  return false;
}

static bool driver(int fault) {
  int count = -1, version = -1;
  cudaError_t e = cudaGetDeviceCount(&count);
  OK(cudaDriverGetVersion(&version));
  if (fault == CONTROL) return e == cudaSuccess && count == 1 && version >= 13000;
  return e != cudaErrorInsufficientDriver || version >= 13000;
}

static bool devices(int fault) {
  int count = -1;
  cudaError_t e = cudaGetDeviceCount(&count);
  if (fault != CONTROL) return e != cudaErrorNoDevice;
  cudaDeviceProp p;
  char bus[32];
  int sms = 0;
  OK(cudaGetDeviceProperties(&p, 0));
  OK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  OK(cudaDeviceGetPCIBusId(bus, sizeof bus, 0));
  EXPECT(cudaSetDevice(1), cudaErrorInvalidDevice);
  return count == 1 && p.major == 9 && p.sharedMemPerBlockOptin == 232448 && sms == p.multiProcessorCount &&
         strlen(bus) == 12;
}

const std::vector<Case> &host_cases() {
  static const std::vector<Case> cases = {
      {"missing wait for a producer", producer, NO_WAIT, "wrong result", nullptr, nullptr, nullptr},
      {"missing wait for a consumer", consumer, NO_WAIT_BACK, "wrong result", nullptr, nullptr, nullptr},
      {"host buffer reused before the copy", host_buffer, REUSED_EARLY, "wrong result", nullptr, nullptr, nullptr},
      {"host buffer read before the copy", host_buffer, READ_EARLY, "wrong result", nullptr, nullptr, nullptr},
      {"copies of pageable memory", pageable, CONTROL, "", nullptr, nullptr, nullptr},
      {"polling and times", polling, CONTROL, "", nullptr, nullptr, nullptr},
      {"graph of two streams", graph, CONTROL, "", nullptr, nullptr, nullptr},
      {"calls that a capture forbids", illegal_in_capture, CONTROL, "", nullptr, nullptr, nullptr},
      {"wrong arguments", bad_arguments, CONTROL, "", nullptr, nullptr, nullptr},
#ifdef __SANITIZE_ADDRESS__ /* pages are not protected under a sanitizer */
      {"host reads device memory", host_touches, CONTROL, "", nullptr, nullptr, nullptr},
#else
      {"host reads device memory", host_touches, HOST_TOUCHES, "host code touches device memory", nullptr, nullptr,
       nullptr},
#endif
      {"device memory exhausted", memory, PLANTED_SETTING, "wrong result", nullptr, "SIMCUDA_MEMORY", "2000000"},
      {"device lost at the second launch", device_lost, PLANTED_SETTING, "wrong result", nullptr, "SIMCUDA_FAIL_AFTER",
       "2"},
      {"no driver", driver, PLANTED_SETTING, "wrong result", nullptr, "SIMCUDA_DRIVER", "none"},
      {"driver too old", driver, PLANTED_SETTING, "wrong result", nullptr, "SIMCUDA_DRIVER", "12020"},
      {"no device", devices, PLANTED_SETTING, "wrong result", nullptr, "SIMCUDA_DEVICES", "0"},
  };
  return cases;
}
