/* launch.h: launching a kernel, and those entries of the runtime that its C++ header wraps in templates. */
#ifndef SIMCUDA_LAUNCH_H
#define SIMCUDA_LAUNCH_H

#include <functional>
#include <tuple>
#include <vector>

#include "language.h"

namespace simcuda {

/* One launch, with its arguments: it can wait in a stream's queue or be part of a graph. */
struct Launch {
  const void *kernel;
  dim3 grid, block;
  size_t smem;
  std::function<void()> thread; /* what one thread runs */
  std::vector<char> arguments;  /* their bytes, if schedules are compared: the memory that the kernel may reach */
};
SIMCUDA_HIDDEN bool compares_schedules();

SIMCUDA_HIDDEN cudaError_t enqueue_launch(Launch launch, cudaStream_t stream);

/* kernel<<<grid, block, smem, stream>>>(args...): the arguments are converted to the kernel's parameters and copied. */
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream, A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "a kernel takes exactly its parameters");
  std::tuple<P...> parameters(static_cast<P>(args)...);
  Launch one = {reinterpret_cast<const void *>(kernel),
                grid,
                block,
                smem,
                [kernel, parameters] { std::apply(kernel, parameters); },
                {}};
  if (compares_schedules()) {
    const char *bytes = reinterpret_cast<const char *>(&parameters);
    one.arguments.assign(bytes, bytes + sizeof parameters);
  }
  return enqueue_launch(std::move(one), stream);
}

} // namespace simcuda

template <class T> static inline cudaError_t cudaMalloc(T **ptr, size_t bytes) {
  return ::cudaMalloc(reinterpret_cast<void **>(ptr), bytes);
}
template <class T> static inline cudaError_t cudaMallocHost(T **ptr, size_t bytes, unsigned flags = 0) {
  return ::cudaHostAlloc(reinterpret_cast<void **>(ptr), bytes, flags);
}
template <class T> static inline cudaError_t cudaHostAlloc(T **ptr, size_t bytes, unsigned flags) {
  return ::cudaHostAlloc(reinterpret_cast<void **>(ptr), bytes, flags);
}
template <class... P>
static inline cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  return ::cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), attribute, value);
}
template <class... P>
static inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, void (*kernel)(P...)) {
  return ::cudaFuncGetAttributes(attributes, reinterpret_cast<const void *>(kernel));
}
template <class... P>
static inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void (*kernel)(P...), int threads,
                                                                        size_t smem) {
  return ::cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, reinterpret_cast<const void *>(kernel), threads, smem);
}

#endif
