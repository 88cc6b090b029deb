/* simcuda.h: what the simulated device offers beside the CUDA runtime's own functions. For C and C++; the stand-ins of
 * cublasLt, cudnn and nccl include it after (or without) the toolkit's headers. */
#ifndef SIMCUDA_H
#define SIMCUDA_H

#include <cuda_runtime_api.h>
#include <stddef.h>

/* clang says it in another way than gcc. */
#if defined(__has_feature) && !defined(__SANITIZE_ADDRESS__)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Puts fn(copy of the arg_bytes at arg) on the stream, as a kernel would be: it runs at once, or when the stream is
 * reached (SIMCUDA_DEFER), or is recorded while the stream captures and then runs at every launch of the graph. So fn
 * may run several times, with the same bytes each time, and must own nothing that it frees. Device memory may be
 * touched only inside fn, never by the caller. fn may block on another process. Returns what a launch returns: the
 * sticky error of a lost device, or an error of the stream. */
cudaError_t simcuda_enqueue(cudaStream_t stream, void (*fn)(void *arg), const void *arg, size_t arg_bytes);

/* Do the bytes [ptr, ptr + bytes) lie in one live allocation of cudaMalloc? For stand-ins that check their operands as
 * the real library's kernels would by faulting. bytes == 0 is true for any such pointer. */
int simcuda_is_device(const void *ptr, size_t bytes);
/* The same for page-locked host memory (cudaHostAlloc, cudaMallocHost, cudaHostRegister). */
int simcuda_is_pinned(const void *ptr, size_t bytes);

/* Ends the program after one line "simcuda: <text>", naming the kernel, block and thread where one is running. */
__attribute__((noreturn, format(printf, 1, 2))) void simcuda_die(const char *format, ...);

#ifdef __cplusplus
}
#endif
#endif
