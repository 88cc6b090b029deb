/* fake_driver.c: as much of libcuda.so.1 as cuDNN wants while it makes a plan: loading a compiled kernel succeeds, and
 * everything that would touch a device says that it is not supported. Built for one test, which finds it through
 * LD_LIBRARY_PATH; never installed. */
#include <cuda.h>

#define EXPORT __attribute__((visibility("default")))

/* ---- what succeeds: a kernel is loaded, and asked for ---- */
EXPORT CUresult cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *jit, void **jit_values,
                                  unsigned int n_jit, CUlibraryOption *options, void **values, unsigned int n) {
  *library = (CUlibrary)16;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLibraryUnload(CUlibrary library) {
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name) {
  *kernel = (CUkernel)32;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLibraryGetModule(CUmodule *module, CUlibrary library) {
  *module = (CUmodule)48;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLibraryGetGlobal(CUdeviceptr *at, size_t *bytes, CUlibrary library, const char *name) {
  *at = 64;
  if (bytes) *bytes = 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuKernelGetFunction(CUfunction *function, CUkernel kernel) {
  *function = (CUfunction)80;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuKernelSetAttribute(CUfunction_attribute name, int value, CUkernel kernel, CUdevice device) {
  return CUDA_SUCCESS;
}
EXPORT CUresult cuKernelGetAttribute(int *value, CUfunction_attribute name, CUkernel kernel, CUdevice device) {
  *value = 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute name, int value) {
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute name, CUfunction function) {
  *value = 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)48;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)80;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleUnload(CUmodule module) {
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDriverGetVersion(int *version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorName(CUresult result, const char **text) {
  *text = "fake driver";
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorString(CUresult result, const char **text) {
  *text = "a driver without a device";
  return CUDA_SUCCESS;
}

/* ---- what has to be there, since the library looks for it when it is loaded ---- */
#define ABSENT(X)                                                                                                      \
  X(cuCtxGetCurrent)                                                                                                   \
  X(cuCtxGetDevice)                                                                                                    \
  X(cuCtxGetLimit)                                                                                                     \
  X(cuCtxPopCurrent)                                                                                                   \
  X(cuCtxPopCurrent_v2)                                                                                                \
  X(cuCtxPushCurrent)                                                                                                  \
  X(cuCtxPushCurrent_v2)                                                                                               \
  X(cuCtxSetCurrent)                                                                                                   \
  X(cuCtxSynchronize)                                                                                                  \
  X(cuDeviceGet)                                                                                                       \
  X(cuDeviceGetAttribute)                                                                                              \
  X(cuDeviceGetCount)                                                                                                  \
  X(cuDevicePrimaryCtxRetain)                                                                                          \
  X(cuGraphAddChildGraphNode)                                                                                          \
  X(cuGraphAddKernelNode)                                                                                              \
  X(cuGraphAddKernelNode_v2)                                                                                           \
  X(cuGraphAddMemsetNode)                                                                                              \
  X(cuGraphCreate)                                                                                                     \
  X(cuGraphKernelNodeSetParams)                                                                                        \
  X(cuGraphKernelNodeSetParams_v2)                                                                                     \
  X(cuLaunchCooperativeKernel)                                                                                         \
  X(cuLaunchKernel)                                                                                                    \
  X(cuLaunchKernelEx)                                                                                                  \
  X(cuLibraryLoadFromFile)                                                                                             \
  X(cuLinkAddData)                                                                                                     \
  X(cuLinkAddData_v2)                                                                                                  \
  X(cuLinkAddFile_v2)                                                                                                  \
  X(cuLinkComplete)                                                                                                    \
  X(cuLinkCreate)                                                                                                      \
  X(cuLinkCreate_v2)                                                                                                   \
  X(cuLinkDestroy)                                                                                                     \
  X(cuMemcpyDtoDAsync)                                                                                                 \
  X(cuMemcpyDtoDAsync_v2)                                                                                              \
  X(cuMemcpyDtoHAsync_v2)                                                                                              \
  X(cuMemcpyHtoDAsync)                                                                                                 \
  X(cuMemcpyHtoDAsync_v2)                                                                                              \
  X(cuMemsetD16Async)                                                                                                  \
  X(cuMemsetD2D8Async)                                                                                                 \
  X(cuMemsetD32Async)                                                                                                  \
  X(cuMemsetD8Async)                                                                                                   \
  X(cuModuleLoadDataEx)                                                                                                \
  X(cuOccupancyMaxActiveBlocksPerMultiprocessor)                                                                       \
  X(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags)                                                              \
  X(cuOccupancyMaxActiveClusters)                                                                                      \
  X(cuOccupancyMaxPotentialClusterSize)                                                                                \
  X(cuStreamGetCtx)                                                                                                    \
  X(cuStreamSynchronize)                                                                                               \
  X(cuTensorMapEncodeIm2col)                                                                                           \
  X(cuTensorMapEncodeTiled)                                                                                            \
  X(cuTensorMapReplaceAddress)

/* Their parameters do not matter to an answer in a register; cuda.h's declarations are stepped around by the label. */
#define SAY_NO(name)                                                                                                   \
  EXPORT CUresult fake_##name(void) __asm__(#name);                                                                    \
  CUresult fake_##name(void) {                                                                                         \
    return CUDA_ERROR_NOT_SUPPORTED;                                                                                   \
  }
ABSENT(SAY_NO)
