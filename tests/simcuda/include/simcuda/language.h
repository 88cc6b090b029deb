/* language.h: the built-in variables, shared memory and barriers. */
#ifndef SIMCUDA_LANGUAGE_H
#define SIMCUDA_LANGUAGE_H

#include <assert.h>
#include <stdint.h>
#include <stdio.h>

#include <vector_types.h>

#include "../simcuda.h"

/* The toolkit's headers define __global__, __device__ and the like as nothing for a host's compiler. Shared memory has
 * to be one object for all threads of a block: a static variable, since all of them run on one thread of the host. It
 * is a thread-local one only so that it can be told from other statics in the symbol table (runtime_symbols.cpp), and
 * be poisoned before each block. With AddressSanitizer it is a plain static, because only those get red zones. */
#undef __shared__
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static
#else
#define __shared__ static __thread
#endif

/* The toolkit knows this one with its own compiler only. */
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif

#define SIMCUDA_HIDDEN __attribute__((visibility("hidden")))

/* Set by the scheduler whenever another thread of the grid goes on. */
extern SIMCUDA_HIDDEN uint3 threadIdx;
extern SIMCUDA_HIDDEN uint3 blockIdx;
extern SIMCUDA_HIDDEN dim3 blockDim;
extern SIMCUDA_HIDDEN dim3 gridDim;
constexpr int warpSize = 32;

namespace simcuda {

/* Dynamic shared memory of the running block: exactly as many bytes as the launch asked for. */
SIMCUDA_HIDDEN void *dynamic_smem();

enum class Vote { None, Or, And, Count };
/* Waits for every thread of the block; gives the vote over their predicates. */
SIMCUDA_HIDDEN int sync_block(Vote vote, int predicate, const char *file, int line);

} // namespace simcuda

/* __builtin_FILE as a default argument names the caller, so that no macro is needed to report where a thread waits. */
static inline void __syncthreads(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
  simcuda::sync_block(simcuda::Vote::None, 0, file, line);
}
static inline int __syncthreads_or(int p, const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
  return simcuda::sync_block(simcuda::Vote::Or, p, file, line);
}
static inline int __syncthreads_and(int p, const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
  return simcuda::sync_block(simcuda::Vote::And, p, file, line);
}
static inline int __syncthreads_count(int p, const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
  return simcuda::sync_block(simcuda::Vote::Count, p, file, line);
}
[[noreturn]] static inline void __trap(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
  simcuda_die("__trap at %s:%d", file, line);
}
static inline void __threadfence() {
}
static inline void __threadfence_block() {
}
static inline void __threadfence_system() {
}
static inline void __nanosleep(unsigned) {
}

#endif
