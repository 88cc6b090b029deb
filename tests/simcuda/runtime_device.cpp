/* runtime_device.cpp: the environment's wishes, errors, and what the device says of itself. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "runtime.h"

namespace simcuda {
namespace {

constexpr size_t gib = size_t(1) << 30;
constexpr size_t h200_bytes = 140 * gib;
constexpr int runtime_version = CUDART_VERSION;

const char *text_of(const char *name, const char *otherwise) {
  const char *value = getenv(name);
  return value && *value ? value : otherwise;
}

/* A setting that is not understood must not pass for one that was followed. */
[[noreturn]] void refuse(const char *name, const char *value) {
  simcuda_die("%s=%s is not a value of that setting", name, value);
}

long long number_of(const char *name, long long otherwise) {
  const char *value = text_of(name, nullptr);
  if (value == nullptr) return otherwise;
  char *end = nullptr;
  long long number = strtoll(value, &end, 10);
  if (*end != '\0' || number < 0) refuse(name, value);
  return number;
}

Settings read_settings() {
  Settings s;
  std::string order = text_of("SIMCUDA_ORDER", "forward");
  if (order == "reverse") {
    s.order = Order::Reverse;
  } else if (order.compare(0, 7, "shuffle") == 0 && (order.size() == 7 || order[7] == ':')) {
    s.order = Order::Shuffle;
    if (order.size() > 8) s.seed = strtoull(order.c_str() + 8, nullptr, 10);
  } else if (order != "forward") {
    refuse("SIMCUDA_ORDER", order.c_str());
  }
  std::string defer = text_of("SIMCUDA_DEFER", "0");
  if (defer == "1" || defer == "lazy") {
    s.defer = Defer::Lazy;
  } else if (defer == "2" || defer == "hasty") {
    s.defer = Defer::Hasty;
  } else if (defer != "0") {
    refuse("SIMCUDA_DEFER", defer.c_str());
  }
  s.crosscheck = number_of("SIMCUDA_CROSSCHECK", 0) != 0;
  s.protect = number_of("SIMCUDA_PROTECT", 0) != 0;
  s.poison = number_of("SIMCUDA_POISON", 1) != 0;
  s.devices = static_cast<int>(number_of("SIMCUDA_DEVICES", 1));
  s.memory = static_cast<size_t>(number_of("SIMCUDA_MEMORY", h200_bytes));
  s.occupied = static_cast<size_t>(number_of("SIMCUDA_OCCUPIED", 0));
  if (s.occupied > s.memory) s.occupied = s.memory;
  if (s.devices > max_devices) refuse("SIMCUDA_DEVICES", getenv("SIMCUDA_DEVICES"));
  s.driver = strcmp(text_of("SIMCUDA_DRIVER", ""), "none") == 0
                 ? 0
                 : static_cast<int>(number_of("SIMCUDA_DRIVER", runtime_version));
  s.fail_after = static_cast<long>(number_of("SIMCUDA_FAIL_AFTER", 0));
  s.fail_with = static_cast<cudaError_t>(number_of("SIMCUDA_FAIL_WITH", cudaErrorLaunchFailure));
  return s;
}

thread_local cudaError_t last_error = cudaSuccess;
thread_local int device = 0;
std::atomic<long> launches{0};
std::atomic<bool> lost{false};

struct Error_text {
  cudaError_t code;
  const char *name, *text;
};
const Error_text error_texts[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidMemcpyDirection, "cudaErrorInvalidMemcpyDirection", "invalid copy direction for memcpy"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorDevicesUnavailable, "cudaErrorDevicesUnavailable", "CUDA-capable device(s) is/are busy or unavailable"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorECCUncorrectable, "cudaErrorECCUncorrectable", "uncorrectable ECC error encountered"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorHostMemoryAlreadyRegistered, "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {cudaErrorHostMemoryNotRegistered, "cudaErrorHostMemoryNotRegistered",
     "pointer does not correspond to a registered memory region"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureUnmatched, "cudaErrorStreamCaptureUnmatched",
     "capture was not ended in the same stream as it began"},
    {cudaErrorStreamCaptureUnjoined, "cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing stream"},
    {cudaErrorStreamCaptureWrongThread, "cudaErrorStreamCaptureWrongThread",
     "attempt to terminate a thread-local capture sequence from another thread"},
};

const Error_text *find_error(cudaError_t e) {
  for (const Error_text &t : error_texts) {
    if (t.code == e) return &t;
  }
  return nullptr;
}

cudaError_t no_usable_driver() {
  return settings().driver < runtime_version / 1000 * 1000 ? cudaErrorInsufficientDriver
         : settings().devices == 0                         ? cudaErrorNoDevice
                                                           : cudaSuccess;
}

} // namespace

const Settings &settings() {
  static const Settings s = read_settings();
  return s;
}

int current_device() {
  return device;
}

cudaError_t fail(cudaError_t e) {
  if (e != cudaSuccess) last_error = e;
  return e;
}

cudaError_t usable() {
  cudaError_t e = no_usable_driver();
  if (e != cudaSuccess) return e;
  return lost ? settings().fail_with : cudaSuccess;
}

cudaError_t count_launch() {
  if (settings().fail_after > 0 && ++launches >= settings().fail_after) lost = true;
  return usable();
}

} // namespace simcuda

using namespace simcuda;

extern "C" {

cudaError_t cudaGetLastError(void) {
  if (lost) return settings().fail_with; /* stays */
  cudaError_t e = last_error;
  last_error = cudaSuccess;
  return e;
}

cudaError_t cudaPeekAtLastError(void) {
  return lost ? settings().fail_with : last_error;
}

const char *cudaGetErrorName(cudaError_t error) {
  const Error_text *t = find_error(error);
  return t ? t->name : "unrecognized error code";
}

const char *cudaGetErrorString(cudaError_t error) {
  const Error_text *t = find_error(error);
  return t ? t->text : "unrecognized error code";
}

cudaError_t cudaDriverGetVersion(int *version) {
  if (version == nullptr) return fail(cudaErrorInvalidValue);
  *version = settings().driver;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
  if (version == nullptr) return fail(cudaErrorInvalidValue);
  *version = runtime_version;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) {
  if (count == nullptr) return fail(cudaErrorInvalidValue);
  *count = 0;
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  *count = settings().devices;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int ordinal) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  if (ordinal < 0 || ordinal >= settings().devices) return fail(cudaErrorInvalidDevice);
  device = ordinal;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int *ordinal) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  *ordinal = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int ordinal) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  if (p == nullptr || ordinal < 0 || ordinal >= settings().devices) return fail(cudaErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "Simulated H200");
  p->uuid.bytes[15] = static_cast<char>(ordinal + 1);
  p->totalGlobalMem = settings().memory;
  p->sharedMemPerBlock = 48 * 1024;
  p->sharedMemPerBlockOptin = 227 * 1024;
  p->sharedMemPerMultiprocessor = 228 * 1024;
  p->reservedSharedMemPerBlock = 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = INT32_MAX;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->memPitch = INT32_MAX;
  p->totalConstMem = 65536;
  p->major = 9;
  p->minor = 0;
  p->multiProcessorCount = 132;
  p->l2CacheSize = 60 << 20;
  p->persistingL2CacheMaxSize = 37 << 20;
  p->memoryBusWidth = 6144;
  p->asyncEngineCount = 3;
  p->concurrentKernels = 1;
  p->ECCEnabled = 1;
  p->unifiedAddressing = 1;
  p->canMapHostMemory = 1;
  p->streamPrioritiesSupported = 1;
  p->hostRegisterSupported = 1;
  p->clusterLaunch = 1;
  p->cooperativeLaunch = 1;
  p->textureAlignment = 512;
  p->pciBusID = 0x10 + ordinal;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attr, int ordinal) {
  cudaDeviceProp p;
  if (value == nullptr) return fail(cudaErrorInvalidValue);
  cudaError_t e = cudaGetDeviceProperties(&p, ordinal);
  if (e != cudaSuccess) return e;
  switch (attr) {
  case cudaDevAttrMaxThreadsPerBlock:
    *value = p.maxThreadsPerBlock;
    break;
  case cudaDevAttrMaxBlockDimX:
    *value = p.maxThreadsDim[0];
    break;
  case cudaDevAttrMaxGridDimX:
    *value = p.maxGridSize[0];
    break;
  case cudaDevAttrMaxGridDimY:
    *value = p.maxGridSize[1];
    break;
  case cudaDevAttrMaxSharedMemoryPerBlock:
    *value = static_cast<int>(p.sharedMemPerBlock);
    break;
  case cudaDevAttrMaxSharedMemoryPerBlockOptin:
    *value = static_cast<int>(p.sharedMemPerBlockOptin);
    break;
  case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
    *value = static_cast<int>(p.sharedMemPerMultiprocessor);
    break;
  case cudaDevAttrReservedSharedMemoryPerBlock:
    *value = static_cast<int>(p.reservedSharedMemPerBlock);
    break;
  case cudaDevAttrWarpSize:
    *value = p.warpSize;
    break;
  case cudaDevAttrMaxRegistersPerBlock:
    *value = p.regsPerBlock;
    break;
  case cudaDevAttrMaxRegistersPerMultiprocessor:
    *value = p.regsPerMultiprocessor;
    break;
  case cudaDevAttrClockRate:
    *value = 1980000;
    break;
  case cudaDevAttrMemoryClockRate:
    *value = 3201000;
    break;
  case cudaDevAttrGlobalMemoryBusWidth:
    *value = p.memoryBusWidth;
    break;
  case cudaDevAttrMultiProcessorCount:
    *value = p.multiProcessorCount;
    break;
  case cudaDevAttrL2CacheSize:
    *value = p.l2CacheSize;
    break;
  case cudaDevAttrMaxThreadsPerMultiProcessor:
    *value = p.maxThreadsPerMultiProcessor;
    break;
  case cudaDevAttrMaxBlocksPerMultiprocessor:
    *value = p.maxBlocksPerMultiProcessor;
    break;
  case cudaDevAttrComputeCapabilityMajor:
    *value = p.major;
    break;
  case cudaDevAttrComputeCapabilityMinor:
    *value = p.minor;
    break;
  case cudaDevAttrPciBusId:
    *value = p.pciBusID;
    break;
  case cudaDevAttrPciDeviceId:
    *value = p.pciDeviceID;
    break;
  case cudaDevAttrPciDomainId:
    *value = p.pciDomainID;
    break;
  case cudaDevAttrAsyncEngineCount:
    *value = p.asyncEngineCount;
    break;
  case cudaDevAttrConcurrentKernels:
    *value = p.concurrentKernels;
    break;
  case cudaDevAttrUnifiedAddressing:
    *value = p.unifiedAddressing;
    break;
  case cudaDevAttrComputeMode:
    *value = cudaComputeModeDefault;
    break;
  case cudaDevAttrIntegrated:
    *value = p.integrated;
    break;
  case cudaDevAttrCooperativeLaunch:
    *value = p.cooperativeLaunch;
    break;
  case cudaDevAttrMemoryPoolsSupported:
    *value = p.memoryPoolsSupported;
    break;
  case cudaDevAttrHostRegisterSupported:
    *value = p.hostRegisterSupported;
    break;
  default:
    return fail(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int bytes, int ordinal) {
  cudaDeviceProp p;
  if (text == nullptr || bytes < 13) return fail(cudaErrorInvalidValue);
  cudaError_t e = cudaGetDeviceProperties(&p, ordinal);
  if (e != cudaSuccess) return e;
  snprintf(text, static_cast<size_t>(bytes), "%04x:%02x:%02x.0", p.pciDomainID, p.pciBusID, p.pciDeviceID);
  return cudaSuccess;
}

} // extern "C"
