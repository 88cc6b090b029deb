/* runtime_launch.cpp: checks a launch as the driver would, runs it in the chosen schedule, or in three of them with
 * their results compared. */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <map>
#include <mutex>

#include "fibres.h"
#include "include/simcuda/launch.h"
#include "runtime.h"

namespace simcuda {
namespace {

/* Limits of compute capability 9.0. */
constexpr unsigned max_block_threads = 1024, max_block_z = 64, max_grid_yz = 65535;
constexpr size_t smem_default = 48 * 1024, smem_optin = 227 * 1024;

std::mutex machine; /* one grid at a time */
std::mutex attributes_lock;
std::map<const void *, size_t> allowed_smem;

size_t static_smem(const void *kernel) {
  size_t bytes = 0;
  for (const Variable &v : shared_variables(kernel)) bytes += v.bytes;
  return bytes;
}

cudaError_t check(const Launch &launch) {
  const dim3 &g = launch.grid, &b = launch.block;
  uint64_t threads = static_cast<uint64_t>(b.x) * b.y * b.z;
  if (threads == 0 || threads > max_block_threads || b.z > max_block_z) return cudaErrorInvalidConfiguration;
  if (g.x == 0 || g.y == 0 || g.z == 0) return cudaErrorInvalidConfiguration;
  if (g.x > INT32_MAX || g.y > max_grid_yz || g.z > max_grid_yz) return cudaErrorInvalidConfiguration;
  std::lock_guard<std::mutex> hold(attributes_lock);
  auto allowed = allowed_smem.find(launch.kernel);
  size_t limit = allowed == allowed_smem.end() ? smem_default : allowed->second;
  return launch.smem > limit ? cudaErrorInvalidValue : cudaSuccess;
}

#ifndef __SANITIZE_ADDRESS__ /* which has a better report of its own */
/* Memory that is not there, or not for the host: says who touched it, then ends as it would have. */
void on_fault(int signal, siginfo_t *info, void *) {
  std::string at = where();
  if (!at.empty()) {
    const char *what = is_stack_guard(info->si_addr) ? "stack of a thread is too small" : "invalid address";
    fprintf(stderr, "simcuda: %s %p: %s\n", what, info->si_addr, at.c_str());
  } else if (simcuda_is_device(info->si_addr, 0)) {
    fprintf(stderr, "simcuda: host code touches device memory at %p\n", info->si_addr);
  }
  ::signal(signal, SIG_DFL);
  raise(signal);
}
#else
/* Called by the sanitizer before its report. */
extern "C" __attribute__((visibility("default"))) void __asan_on_error() {
  std::string at = where();
  if (!at.empty()) fprintf(stderr, "simcuda: %s\n", at.c_str());
}
#endif

typedef std::vector<std::vector<char>> Snapshot;

/* The allocations that words of these bytes point into. */
void add_pointed(const char *bytes, size_t n, const std::vector<Block> &all, std::vector<bool> *chosen) {
  for (size_t at = 0; at + sizeof(uintptr_t) <= n; at += sizeof(uintptr_t)) {
    uintptr_t word = 0;
    memcpy(&word, bytes + at, sizeof word);
    for (size_t i = 0; i < all.size(); i++) {
      if (word >= all[i].start && word < all[i].start + all[i].bytes) (*chosen)[i] = true;
    }
  }
}

/* What the kernel can reach: through its arguments, and through tables of pointers that those point to. */
std::vector<Block> reachable(const Launch &launch) {
  constexpr size_t table_bytes = 64 * 1024;
  std::vector<Block> all = live_blocks(), blocks;
  std::vector<bool> chosen(all.size(), false);
  add_pointed(launch.arguments.data(), launch.arguments.size(), all, &chosen);
  std::vector<bool> direct = chosen;
  for (size_t i = 0; i < all.size(); i++) {
    if (!direct[i] || all[i].bytes > table_bytes) continue;
    add_pointed(reinterpret_cast<const char *>(all[i].start), all[i].bytes, all, &chosen);
  }
  for (size_t i = 0; i < all.size(); i++) {
    if (chosen[i]) blocks.push_back(all[i]);
  }
  return blocks;
}

Snapshot snapshot(const std::vector<Block> &blocks) {
  Snapshot copy;
  for (const Block &b : blocks) {
    const char *start = reinterpret_cast<const char *>(b.start);
    copy.emplace_back(start, start + b.bytes);
  }
  return copy;
}

void restore(const std::vector<Block> &blocks, const Snapshot &from) {
  for (size_t i = 0; i < blocks.size(); i++)
    memcpy(reinterpret_cast<void *>(blocks[i].start), from[i].data(), from[i].size());
}

void compare(const Launch &launch, const std::vector<Block> &blocks, const Snapshot &expected, const char *schedule) {
  for (size_t i = 0; i < blocks.size(); i++) {
    const char *now = reinterpret_cast<const char *>(blocks[i].start);
    if (memcmp(now, expected[i].data(), blocks[i].bytes) == 0) continue;
    size_t byte = 0;
    while (now[byte] == expected[i][byte]) byte++;
    simcuda_die(
        "result depends on the order of threads or blocks: kernel %s, byte %zu of the %zu at %p, %s against forward",
        kernel_name(launch.kernel).c_str(), byte, blocks[i].bytes, reinterpret_cast<const void *>(now), schedule);
  }
}

/* A kernel is deterministic if all memory has the same bits after any order of its threads and blocks. That also finds
 * blocks that write to the same place, and barriers that are missing, without knowing the right result. */
void run_in_all_orders(const Launch &launch, const std::vector<Variable> &shared) {
  std::vector<Block> blocks = reachable(launch);
  Snapshot before = snapshot(blocks);
  run_grid(launch, {Order::Forward, 1}, shared);
  Snapshot after = snapshot(blocks);
  restore(blocks, before);
  run_grid(launch, {Order::Reverse, 1}, shared);
  compare(launch, blocks, after, "reverse");
  restore(blocks, before);
  run_grid(launch, {Order::Shuffle, settings().seed}, shared);
  compare(launch, blocks, after, "shuffle");
}

} // namespace

void watch_faults() {
#ifndef __SANITIZE_ADDRESS__
  static bool watching = false;
  static char stack[64 * 1024]; /* the fault may be that a stack has no room left */
  if (watching) return;
  watching = true;
  stack_t alternative = {};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof stack;
  sigaltstack(&alternative, nullptr);
  for (int signal : {SIGSEGV, SIGBUS, SIGFPE}) {
    struct sigaction now = {};
    sigaction(signal, nullptr, &now);
    if (now.sa_handler != SIG_DFL) continue; /* the program has its own */
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(signal, &action, nullptr);
  }
#endif
}

bool compares_schedules() {
  return settings().crosscheck;
}

void run_launch(const Launch &launch) {
  std::lock_guard<std::mutex> hold(machine);
  watch_faults();
  std::vector<Variable> shared = shared_variables(launch.kernel);
  if (settings().crosscheck) {
    run_in_all_orders(launch, shared);
  } else {
    run_grid(launch, {settings().order, settings().seed}, shared);
  }
}

cudaError_t enqueue_launch(Launch launch, cudaStream_t stream) {
  cudaError_t e = usable();
  if (e == cudaSuccess) e = count_launch();
  if (e == cudaSuccess) e = check(launch);
  if (e != cudaSuccess) return fail(e);
  Op op = {Op::Work, "", nullptr, nullptr};
  op.what = "kernel " + kernel_name(launch.kernel);
  op.work = [launch = std::move(launch)] { run_launch(launch); };
  return submit(stream, std::move(op));
}

} // namespace simcuda

using namespace simcuda;

extern "C" {

cudaError_t cudaFuncSetAttribute(const void *func, cudaFuncAttribute attr, int value) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  if (func == nullptr) return fail(cudaErrorInvalidDeviceFunction);
  if (attr == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attr != cudaFuncAttributeMaxDynamicSharedMemorySize) return fail(cudaErrorInvalidValue);
  if (value < 0 || static_cast<size_t>(value) + static_smem(func) > smem_optin) return fail(cudaErrorInvalidValue);
  std::lock_guard<std::mutex> hold(attributes_lock);
  allowed_smem[func] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attr, const void *func) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  if (attr == nullptr || func == nullptr) return fail(cudaErrorInvalidDeviceFunction);
  memset(attr, 0, sizeof *attr);
  attr->sharedSizeBytes = static_smem(func);
  attr->maxThreadsPerBlock = max_block_threads;
  attr->numRegs = 64;
  attr->ptxVersion = 90;
  attr->binaryVersion = 90;
  std::lock_guard<std::mutex> hold(attributes_lock);
  auto allowed = allowed_smem.find(func);
  attr->maxDynamicSharedSizeBytes = static_cast<int>(allowed == allowed_smem.end() ? smem_default : allowed->second);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *func, int threads, size_t smem) {
  constexpr int sm_threads = 2048, sm_blocks = 32;
  constexpr size_t sm_smem = 228 * 1024, reserved = 1024;
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  if (blocks == nullptr || func == nullptr || threads <= 0) return fail(cudaErrorInvalidValue);
  size_t each = smem + static_smem(func) + reserved;
  int by_threads = sm_threads / threads;
  int by_smem = static_cast<int>(sm_smem / each);
  *blocks = by_threads < by_smem ? by_threads : by_smem;
  if (*blocks > sm_blocks) *blocks = sm_blocks;
  return cudaSuccess;
}

} // extern "C"
