/* runtime.h: shared by the parts of the simulated runtime; not for its users. */
#ifndef SIMCUDA_RUNTIME_H
#define SIMCUDA_RUNTIME_H

#include <cuda_runtime_api.h>
#include <stdint.h>

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "include/simcuda.h"

namespace simcuda {

struct Launch; /* include/simcuda/launch.h */

constexpr int max_devices = 64;

/* ---- runtime_device.cpp: what the environment asks for, and errors ---- */
enum class Order { Forward, Reverse, Shuffle };
enum class Defer { Never, Lazy, Hasty };
struct Settings {
  Order order = Order::Forward; /* SIMCUDA_ORDER=forward|reverse|shuffle[:seed] */
  uint64_t seed = 1;
  Defer defer = Defer::Never;                     /* SIMCUDA_DEFER=0|1|lazy|2|hasty */
  bool crosscheck = false;                        /* SIMCUDA_CROSSCHECK=1 */
  bool protect = false;                           /* SIMCUDA_PROTECT=1 */
  bool poison = true;                             /* SIMCUDA_POISON=0 */
  int devices = 1;                                /* SIMCUDA_DEVICES */
  size_t memory = 0;                              /* SIMCUDA_MEMORY, of each device */
  size_t occupied = 0;                            /* SIMCUDA_OCCUPIED, held by another process */
  int driver = 13000;                             /* SIMCUDA_DRIVER=<version>|none */
  long fail_after = 0;                            /* SIMCUDA_FAIL_AFTER=n: the n-th launch loses the device */
  cudaError_t fail_with = cudaErrorLaunchFailure; /* SIMCUDA_FAIL_WITH=<code> */
};
const Settings &settings();
int current_device();
/* Remembers e for cudaGetLastError and returns it. */
cudaError_t fail(cudaError_t e);
/* First thing in every call: no usable driver, or a lost device; else cudaSuccess. */
cudaError_t usable();
/* Counts a launch; from the n-th on, and for every later call, the device is lost. */
cudaError_t count_launch();

/* ---- fibres.cpp: runs a grid on the calling thread; one grid at a time ---- */
struct Variable {
  void *address;
  size_t bytes;
};
struct Schedule {
  Order order;
  uint64_t seed;
};
void run_grid(const Launch &launch, const Schedule &schedule, const std::vector<Variable> &shared);
/* "kernel f, block (0,0,0) thread (5,0,0)" of the thread that runs; empty outside a kernel. */
std::string where();

/* ---- runtime_symbols.cpp ---- */
/* Readable name of the kernel at this address. */
const std::string &kernel_name(const void *kernel);
/* The static __shared__ variables of the kernel, for the calling thread. */
std::vector<Variable> shared_variables(const void *kernel);

/* ---- runtime_memory.cpp ---- */
enum class Place { Device, Pinned, Registered };
struct Block { /* one allocation */
  uintptr_t start;
  size_t bytes;
  Place place;
  int device;
};
/* The allocation that holds [ptr, ptr + bytes), if there is one. */
bool find_block(const void *ptr, size_t bytes, Block *block);
/* Does ptr point into any allocation, or one past it by less than the guard? Then bytes beyond its end are a mistake.
 */
bool touches_block(const void *ptr, Place *place);
std::vector<Block> live_blocks();
/* Ends the program if the bytes after an allocation were written; `what` names what ran last. */
void check_guards(const char *what);
/* Work on the device may touch its memory only between these (SIMCUDA_PROTECT). */
void device_work_begins();
void device_work_ends();

/* ---- runtime_stream.cpp: queues and their order ---- */
/* What a recorded event stands for: the point that a stream has to reach. */
struct Moment {
  CUstream_st *stream = nullptr;
  bool done = false;
  double at_ms = 0;
  CUgraph_st *graph = nullptr; /* recorded in a stream that captured: a point of that graph */
};
struct Op {
  enum Kind { Work, Record, Wait } kind;
  std::string what;           /* for messages: the kernel's name, "copy" ... */
  std::function<void()> work; /* may run several times */
  std::shared_ptr<Moment> moment;
};
/* Puts the operation on the stream, or into the graph that the stream records. */
cudaError_t submit(cudaStream_t stream, Op op);
/* Runs everything that was put on any stream so far. */
void drain_device();
/* Runs a launch at once, in every order if the settings ask for that. */
void run_launch(const Launch &launch);

/* Reports invalid addresses of kernels, and of the host where device memory is protected. */
void watch_faults();

/* ---- runtime_graph.cpp: recording; the lock of the streams is held ---- */
/* Adds to the graph; false if the capture was spoilt. */
bool record_op(CUstream_st *stream, const Op &op);
/* The stream waits for a point of a graph: it records into that graph from now on. */
cudaError_t capture_wait(CUstream_st *stream, const Moment &moment);
/* Takes a lock: for calls that are not allowed while any stream captures. Spoils the capture and gives its error. */
cudaError_t unsafe_while_capturing();
/* The same for a call on this stream, with the lock held. */
cudaError_t spoil_if_capturing(CUstream_st *stream);

} // namespace simcuda

struct CUstream_st {
  unsigned flags = 0;
  int priority = 0;
  int device = 0;
  bool busy = false; /* an operation of it runs, without the lock */
  std::deque<simcuda::Op> queue;
  CUgraph_st *recording = nullptr;
  bool origin = false; /* of the recording */
  bool joined = true;  /* nothing recorded since another stream waited for this one */
};

struct CUevent_st {
  unsigned flags = 0;
  std::shared_ptr<simcuda::Moment> moment; /* of the last record */
};

struct CUgraph_st {
  std::vector<simcuda::Op> ops; /* in the order of issue, which respects every dependency */
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::thread::id thread;
  bool spoilt = false;
  bool open = false; /* still being recorded */
};

struct CUgraphExec_st {
  std::vector<simcuda::Op> ops;
};

namespace simcuda {
extern std::mutex streams_lock;
/* Every live stream, the default one first. */
std::vector<CUstream_st *> &streams();
/* Null for a handle that is none. */
CUstream_st *stream_of(cudaStream_t handle);
} // namespace simcuda

#endif
