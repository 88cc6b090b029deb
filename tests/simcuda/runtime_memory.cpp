/* runtime_memory.cpp: device and page-locked memory. Each allocation has exactly the size asked for, so that a
 * sanitizer sees the first byte behind it; without one, bytes behind it are checked after every piece of work. New
 * memory is NaN in every type. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "fibres.h"
#include "runtime.h"

namespace simcuda {
namespace {

constexpr size_t alignment = 256, page = 4096;
/* NaN in every type as well, and another one than poison, so that a read behind the end shows in the result too. */
constexpr unsigned char guard_byte = 0xfd;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t guard_bytes = 0;
#else
constexpr size_t guard_bytes = 64;
#endif
/* Beyond this, memory is only taken from the host when it is touched: 100 GB of arena must be possible. */
constexpr size_t poison_limit = size_t(1) << 30;

std::mutex lock;
std::map<uintptr_t, Block> blocks; /* by start */
size_t used[64];                   /* per device */
int workers = 0;                   /* pieces of device work that run now */

bool mapped(const Block &b) {
  return b.place == Place::Device && (settings().protect || b.bytes > poison_limit) && guard_bytes > 0;
}

size_t mapped_bytes(size_t bytes) {
  return (bytes + guard_bytes + page - 1) / page * page;
}

/* Under the lock. */
const Block *holder(uintptr_t at) {
  auto after = blocks.upper_bound(at);
  if (after == blocks.begin()) return nullptr;
  const Block &b = std::prev(after)->second;
  return at <= b.start + b.bytes ? &b : nullptr;
}

void *obtain(size_t bytes, Place place) {
  Block b = {0, bytes, place, current_device()};
  void *memory = nullptr;
  if (mapped(b)) {
    memory =
        mmap(nullptr, mapped_bytes(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
  } else if (posix_memalign(&memory, alignment, bytes + guard_bytes) != 0) {
    return nullptr;
  }
  b.start = reinterpret_cast<uintptr_t>(memory);
  if (settings().poison && bytes <= poison_limit) memset(memory, poison_byte, bytes);
  memset(static_cast<char *>(memory) + bytes, guard_byte, guard_bytes);
  if (settings().protect) watch_faults();
  std::lock_guard<std::mutex> hold(lock);
  blocks[b.start] = b;
  if (place == Place::Device) used[b.device] += bytes;
  if (mapped(b) && settings().protect && workers == 0) mprotect(memory, mapped_bytes(bytes), PROT_NONE);
  return memory;
}

/* False if it is not the start of an allocation in that place. */
bool give_back(void *ptr, Place place) {
  Block b;
  {
    std::lock_guard<std::mutex> hold(lock);
    auto found = blocks.find(reinterpret_cast<uintptr_t>(ptr));
    if (found == blocks.end() || found->second.place != place) return false;
    b = found->second;
    blocks.erase(found);
    if (place == Place::Device) used[b.device] -= b.bytes;
  }
  if (place == Place::Registered) return true;
  if (mapped(b)) {
    munmap(ptr, mapped_bytes(b.bytes));
  } else {
    /* Who still uses it finds NaN, until the host's allocator hands it out again. */
    if (settings().poison && b.bytes <= poison_limit) memset(ptr, poison_byte, b.bytes);
    free(ptr);
  }
  return true;
}

void protect_all(int protection) {
  for (const auto &entry : blocks) {
    if (mapped(entry.second)) {
      mprotect(reinterpret_cast<void *>(entry.first), mapped_bytes(entry.second.bytes), protection);
    }
  }
}

} // namespace

bool find_block(const void *ptr, size_t bytes, Block *block) {
  std::lock_guard<std::mutex> hold(lock);
  uintptr_t at = reinterpret_cast<uintptr_t>(ptr);
  const Block *b = holder(at);
  if (b == nullptr || bytes > b->start + b->bytes - at) return false;
  if (block) *block = *b;
  return true;
}

bool touches_block(const void *ptr, Place *place) {
  std::lock_guard<std::mutex> hold(lock);
  const Block *b = holder(reinterpret_cast<uintptr_t>(ptr));
  if (b == nullptr) return false;
  *place = b->place;
  return true;
}

std::vector<Block> live_blocks() {
  std::lock_guard<std::mutex> hold(lock);
  std::vector<Block> all;
  for (const auto &entry : blocks) all.push_back(entry.second);
  return all;
}

void check_guards(const char *what) {
  if (guard_bytes == 0) return;
  static const std::vector<unsigned char> intact(guard_bytes, guard_byte);
  std::lock_guard<std::mutex> hold(lock);
  for (const auto &entry : blocks) {
    const Block &b = entry.second;
    const unsigned char *end = reinterpret_cast<const unsigned char *>(b.start + b.bytes);
    if (b.place == Place::Registered || memcmp(end, intact.data(), guard_bytes) == 0) continue;
    size_t byte = 0;
    while (end[byte] == guard_byte) byte++;
    simcuda_die("%s wrote past an allocation of %zu bytes, at byte %zu", what, b.bytes, b.bytes + byte);
  }
}

void device_work_begins() {
  if (!settings().protect) return;
  std::lock_guard<std::mutex> hold(lock);
  if (workers++ == 0) protect_all(PROT_READ | PROT_WRITE);
}

void device_work_ends() {
  if (!settings().protect) return;
  std::lock_guard<std::mutex> hold(lock);
  if (--workers == 0) protect_all(PROT_NONE);
}

} // namespace simcuda

using namespace simcuda;

extern "C" {

int simcuda_is_device(const void *ptr, size_t bytes) {
  Block b;
  return find_block(ptr, bytes, &b) && b.place == Place::Device;
}

int simcuda_is_pinned(const void *ptr, size_t bytes) {
  Block b;
  return find_block(ptr, bytes, &b) && b.place != Place::Device;
}

cudaError_t cudaMalloc(void **ptr, size_t bytes) {
  cudaError_t e = usable();
  if (e == cudaSuccess) e = unsafe_while_capturing();
  if (e != cudaSuccess) return fail(e);
  if (ptr == nullptr) return fail(cudaErrorInvalidValue);
  *ptr = nullptr;
  if (bytes == 0) return cudaSuccess;
  {
    std::lock_guard<std::mutex> hold(lock);
    size_t taken = used[current_device()] + settings().occupied;
    if (taken > settings().memory || bytes > settings().memory - taken) return fail(cudaErrorMemoryAllocation);
  }
  *ptr = obtain(bytes, Place::Device);
  return *ptr ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}

cudaError_t cudaFree(void *ptr) {
  cudaError_t e = usable();
  if (e == cudaSuccess) e = unsafe_while_capturing();
  if (e != cudaSuccess) return fail(e);
  if (ptr == nullptr) return cudaSuccess;
  drain_device();
  return give_back(ptr, Place::Device) ? cudaSuccess : fail(cudaErrorInvalidValue);
}

cudaError_t cudaHostAlloc(void **ptr, size_t bytes, unsigned) {
  cudaError_t e = usable();
  if (e == cudaSuccess) e = unsafe_while_capturing();
  if (e != cudaSuccess) return fail(e);
  if (ptr == nullptr) return fail(cudaErrorInvalidValue);
  *ptr = bytes ? obtain(bytes, Place::Pinned) : nullptr;
  return *ptr || bytes == 0 ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}

cudaError_t cudaMallocHost(void **ptr, size_t bytes) {
  return cudaHostAlloc(ptr, bytes, cudaHostAllocDefault);
}

cudaError_t cudaFreeHost(void *ptr) {
  cudaError_t e = usable();
  if (e == cudaSuccess) e = unsafe_while_capturing();
  if (e != cudaSuccess) return fail(e);
  if (ptr == nullptr) return cudaSuccess;
  drain_device();
  return give_back(ptr, Place::Pinned) ? cudaSuccess : fail(cudaErrorInvalidValue);
}

cudaError_t cudaHostRegister(void *ptr, size_t bytes, unsigned) {
  cudaError_t e = usable();
  if (e == cudaSuccess) e = unsafe_while_capturing();
  if (e != cudaSuccess) return fail(e);
  if (ptr == nullptr || bytes == 0) return fail(cudaErrorInvalidValue);
  std::lock_guard<std::mutex> hold(lock);
  uintptr_t start = reinterpret_cast<uintptr_t>(ptr);
  auto next = blocks.lower_bound(start + bytes);
  if (next != blocks.begin()) {
    const Block &before = std::prev(next)->second;
    if (before.start + before.bytes > start) return fail(cudaErrorHostMemoryAlreadyRegistered);
  }
  blocks[start] = {start, bytes, Place::Registered, current_device()};
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *ptr) {
  cudaError_t e = usable();
  if (e == cudaSuccess) e = unsafe_while_capturing();
  if (e != cudaSuccess) return fail(e);
  drain_device();
  return give_back(ptr, Place::Registered) ? cudaSuccess : fail(cudaErrorHostMemoryNotRegistered);
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  std::lock_guard<std::mutex> hold(lock);
  size_t taken = used[current_device()] + settings().occupied;
  if (free_bytes) *free_bytes = taken < settings().memory ? settings().memory - taken : 0;
  if (total) *total = settings().memory;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *ptr) {
  cudaError_t e = usable();
  if (e != cudaSuccess) return fail(e);
  if (attributes == nullptr) return fail(cudaErrorInvalidValue);
  memset(attributes, 0, sizeof *attributes);
  Block b;
  if (!find_block(ptr, 1, &b)) {
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->hostPointer = const_cast<void *>(ptr);
    return cudaSuccess;
  }
  attributes->type = b.place == Place::Device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  attributes->device = b.device;
  attributes->devicePointer = const_cast<void *>(ptr);
  attributes->hostPointer = b.place == Place::Device ? nullptr : const_cast<void *>(ptr);
  return cudaSuccess;
}

} // extern "C"
