/* memory.h: atomics, and loads and stores with cache hints. One thread of the host runs the whole grid and changes to
 * another thread of it only at barriers and collectives, so plain reads and writes are atomic. Atomics on floating
 * point are left out on purpose: their result depends on the order of threads. */
#ifndef SIMCUDA_MEMORY_H
#define SIMCUDA_MEMORY_H

#include <type_traits>

namespace simcuda {
template <class T> using same = typename std::common_type<T>::type; /* not deduced from this argument */
template <class T, class F> T read_modify_write(T *p, F f) {
  static_assert(std::is_integral<T>::value, "atomics on integers only: others depend on the order of threads");
  T old = *p;
  *p = f(old);
  return old;
}
} // namespace simcuda

template <class T> inline T atomicAdd(T *p, simcuda::same<T> v) {
  return simcuda::read_modify_write(p, [v](T old) { return static_cast<T>(old + v); });
}
template <class T> inline T atomicSub(T *p, simcuda::same<T> v) {
  return simcuda::read_modify_write(p, [v](T old) { return static_cast<T>(old - v); });
}
template <class T> inline T atomicMax(T *p, simcuda::same<T> v) {
  return simcuda::read_modify_write(p, [v](T old) { return old > v ? old : v; });
}
template <class T> inline T atomicMin(T *p, simcuda::same<T> v) {
  return simcuda::read_modify_write(p, [v](T old) { return old < v ? old : v; });
}
template <class T> inline T atomicAnd(T *p, simcuda::same<T> v) {
  return simcuda::read_modify_write(p, [v](T old) { return static_cast<T>(old & v); });
}
template <class T> inline T atomicOr(T *p, simcuda::same<T> v) {
  return simcuda::read_modify_write(p, [v](T old) { return static_cast<T>(old | v); });
}
template <class T> inline T atomicXor(T *p, simcuda::same<T> v) {
  return simcuda::read_modify_write(p, [v](T old) { return static_cast<T>(old ^ v); });
}
template <class T> inline T atomicExch(T *p, simcuda::same<T> v) {
  return simcuda::read_modify_write(p, [v](T) { return v; });
}
template <class T> inline T atomicCAS(T *p, simcuda::same<T> expected, simcuda::same<T> v) {
  return simcuda::read_modify_write(p, [expected, v](T old) { return old == expected ? v : old; });
}
static inline unsigned atomicInc(unsigned *p, unsigned last) {
  return simcuda::read_modify_write(p, [last](unsigned old) { return old >= last ? 0u : old + 1; });
}
static inline unsigned atomicDec(unsigned *p, unsigned last) {
  return simcuda::read_modify_write(p, [last](unsigned old) { return old == 0 || old > last ? last : old - 1; });
}

template <class T> inline T __ldg(const T *p) {
  return *p;
}
template <class T> inline T __ldca(const T *p) {
  return *p;
}
template <class T> inline T __ldcg(const T *p) {
  return *p;
}
template <class T> inline T __ldcs(const T *p) {
  return *p;
}
template <class T> inline T __ldlu(const T *p) {
  return *p;
}
template <class T> inline T __ldcv(const T *p) {
  return *p;
}
template <class T> inline void __stwb(T *p, simcuda::same<T> v) {
  *p = v;
}
template <class T> inline void __stcg(T *p, simcuda::same<T> v) {
  *p = v;
}
template <class T> inline void __stcs(T *p, simcuda::same<T> v) {
  *p = v;
}
template <class T> inline void __stwt(T *p, simcuda::same<T> v) {
  *p = v;
}

#endif
