/* cuda_runtime.h of the simulated device: stands in front of the toolkit's own, so that unmodified .cu files compile as
 * plain C++17 and their kernels run on the CPU. Types, error codes and prototypes are the toolkit's; only what its
 * compiler would add (the language, the built-in variables and functions, the launch) is written here. */
#ifndef SIMCUDA_CUDA_RUNTIME_H
#define SIMCUDA_CUDA_RUNTIME_H

#ifndef __cplusplus
#include_next <cuda_runtime.h> /* host code in C: nothing is added to the toolkit's */
#else

#ifdef __CUDACC__
#error "the simulated device is for the host's compiler; nvcc has the real thing"
#endif

#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#include "simcuda.h"
#include "simcuda/language.h"
#include "simcuda/launch.h"
#include "simcuda/math.h"
#include "simcuda/memory.h"
#include "simcuda/warp.h"

#endif
#endif
