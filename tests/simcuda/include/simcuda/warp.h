/* warp.h: what the lanes of a warp do together. Each function waits until every lane named in the mask has called the
 * same function, at the same line, with the same mask; anything else ends the program. */
#ifndef SIMCUDA_WARP_H
#define SIMCUDA_WARP_H

#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "language.h"

namespace simcuda {

enum class Collective { Sync, Shuffle, Ballot, Add, Min, Max, And, Or, Xor };

/* Hands in `value` and takes what the collective gives this lane: for a shuffle the value of lane `source`, for a
 * ballot the bits of lanes whose value is not zero, for a reduction that of all values. */
SIMCUDA_HIDDEN uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, int source, const char *file,
                                        int line);
SIMCUDA_HIDDEN int lane_id();

template <class T> uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable<T>::value, "a type that can be shuffled");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T> T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T> T shuffle(unsigned mask, T value, int source, const char *file, int line) {
  return from_bits<T>(warp_collective(Collective::Shuffle, mask, to_bits(value), source, file, line));
}

/* `width` splits a warp into parts that each shuffle among themselves; a source outside the part is the lane itself. */
static inline int source_index(int source, int width) {
  return (lane_id() & ~(width - 1)) | (source & (width - 1));
}
static inline int source_up(unsigned delta, int width) {
  int lane = lane_id();
  int from = lane - static_cast<int>(delta);
  return from < (lane & ~(width - 1)) ? lane : from;
}
static inline int source_down(unsigned delta, int width) {
  int lane = lane_id();
  int from = lane + static_cast<int>(delta);
  return from > (lane | (width - 1)) ? lane : from;
}
static inline int source_xor(int bits, int width) {
  int lane = lane_id();
  int from = lane ^ bits;
  return from > (lane | (width - 1)) ? lane : from;
}

} // namespace simcuda

#define SIMCUDA_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

static inline void __syncwarp(unsigned mask = 0xffffffffu, SIMCUDA_WHERE) {
  simcuda::warp_collective(simcuda::Collective::Sync, mask, 0, 0, file, line);
}
template <class T> inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMCUDA_WHERE) {
  return simcuda::shuffle(mask, value, simcuda::source_index(source, width), file, line);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMCUDA_WHERE) {
  return simcuda::shuffle(mask, value, simcuda::source_up(delta, width), file, line);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMCUDA_WHERE) {
  return simcuda::shuffle(mask, value, simcuda::source_down(delta, width), file, line);
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SIMCUDA_WHERE) {
  return simcuda::shuffle(mask, value, simcuda::source_xor(bits, width), file, line);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate, SIMCUDA_WHERE) {
  uint64_t vote = predicate != 0;
  return static_cast<unsigned>(simcuda::warp_collective(simcuda::Collective::Ballot, mask, vote, 0, file, line));
}
static inline int __any_sync(unsigned mask, int predicate, SIMCUDA_WHERE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
static inline int __all_sync(unsigned mask, int predicate, SIMCUDA_WHERE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

namespace simcuda {
/* Reductions exist for 32-bit integers only; min and max of signed ones compare with the sign bit turned over. */
static inline uint32_t reduce(Collective kind, unsigned mask, uint32_t value, const char *file, int line) {
  return static_cast<uint32_t>(warp_collective(kind, mask, value, 0, file, line));
}
constexpr uint32_t sign_bit = 0x80000000u;
} // namespace simcuda

static inline unsigned __reduce_add_sync(unsigned mask, unsigned value, SIMCUDA_WHERE) {
  return simcuda::reduce(simcuda::Collective::Add, mask, value, file, line);
}
static inline int __reduce_add_sync(unsigned mask, int value, SIMCUDA_WHERE) {
  return static_cast<int>(simcuda::reduce(simcuda::Collective::Add, mask, static_cast<uint32_t>(value), file, line));
}
static inline unsigned __reduce_max_sync(unsigned mask, unsigned value, SIMCUDA_WHERE) {
  return simcuda::reduce(simcuda::Collective::Max, mask, value, file, line);
}
static inline int __reduce_max_sync(unsigned mask, int value, SIMCUDA_WHERE) {
  uint32_t flipped = static_cast<uint32_t>(value) ^ simcuda::sign_bit;
  return static_cast<int>(simcuda::reduce(simcuda::Collective::Max, mask, flipped, file, line) ^ simcuda::sign_bit);
}
static inline unsigned __reduce_min_sync(unsigned mask, unsigned value, SIMCUDA_WHERE) {
  return simcuda::reduce(simcuda::Collective::Min, mask, value, file, line);
}
static inline int __reduce_min_sync(unsigned mask, int value, SIMCUDA_WHERE) {
  uint32_t flipped = static_cast<uint32_t>(value) ^ simcuda::sign_bit;
  return static_cast<int>(simcuda::reduce(simcuda::Collective::Min, mask, flipped, file, line) ^ simcuda::sign_bit);
}
static inline unsigned __reduce_and_sync(unsigned mask, unsigned value, SIMCUDA_WHERE) {
  return simcuda::reduce(simcuda::Collective::And, mask, value, file, line);
}
static inline unsigned __reduce_or_sync(unsigned mask, unsigned value, SIMCUDA_WHERE) {
  return simcuda::reduce(simcuda::Collective::Or, mask, value, file, line);
}
static inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, SIMCUDA_WHERE) {
  return simcuda::reduce(simcuda::Collective::Xor, mask, value, file, line);
}

#endif
