/* ptx.cuh: the only inline PTX, each instruction behind one function with a twin for the simulated device. All are from
 * compute capability 8.0. A twin does what the manual says of the instruction (PTX ISA 8.x, "Matrix fragments for
 * mma.m16n8k16", "ldmatrix", "cp.async") for the whole warp at once, and copies of cp.async arrive no sooner than the
 * wait for them, so that a wrong fragment, a lane that stays away and a missing wait all show. */
#ifndef ESP_BACKEND_CUDA_PTX_CUH
#define ESP_BACKEND_CUDA_PTX_CUH

#include <stdint.h>
#include <string.h>

#include "backend/cuda/device.cuh"

/* Two values as one register, the first in the low half, each rounded to nearest. */
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t x;
  memcpy(&x, &pair, sizeof x);
  return x;
}

#ifndef ESP_SIMCUDA

/* 2^x to 2 units in the last place, tiny results as 0, in one instruction. */
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/* d [16, 8] += a [16, 16] b [16, 8]; d in fp32. Lane l holds of a the rows l/4 and l/4 + 8, of b the column l/4. */
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
               "{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/* Four matrices [8, 8] of 16-bit elements from shared memory: lane l gives the address of row l%8 of matrix l/8 and
 * gets of every matrix the elements 2 (l%4), 2 (l%4) + 1 of row l/4. */
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void *row) {
  uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
/* The same of each matrix transposed. */
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void *row) {
  uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

/* 16 bytes from global to shared memory without passing through registers; zeros, and no read, when not `valid`. */
__device__ __forceinline__ void copy_async16(void *shared, const void *global, bool valid) {
  uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async4(void *shared, const void *global, bool valid) {
  uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at), "l"(global), "r"(bytes) : "memory");
}
/* Ends a group of this thread's copies; a group may be empty. */
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/* Until at most the N latest groups are under way. Other threads see the rest after a barrier. */
template <int N> __device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#else

#include <vector>

inline float fast_exp2(float x) {
  return exp2f(x);
}

/* What every lane of every warp gives to an instruction. Two sets in turn: a lane can be at the next instruction while
 * another still reads, but not two ahead. */
template <class T> struct ptx_exchange {
  T given[2][32][32];
  unsigned turn[32][32];
};
template <class T> inline const T *ptx_give(const T &mine) {
  static ptx_exchange<T> x; /* one grid runs at a time */
  unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, turn = x.turn[warp][lane]++ % 2;
  x.given[turn][warp][lane] = mine;
  __syncwarp();
  return x.given[turn][warp];
}
inline float ptx_bf16(const uint32_t *words, int i) {
  uint32_t bits = (words[i / 2] >> (16 * (i % 2)) & 0xffff) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

struct ptx_operands {
  uint32_t a[4], b[2];
};
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ptx_operands mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const ptx_operands *lanes = ptx_give(mine);
  int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      int at = k % 8 / 2; /* of the four lanes of a row or column */
      const ptx_operands &ra = lanes[row % 8 * 4 + at], &rb = lanes[col * 4 + at];
      sum += ptx_bf16(ra.a, k % 2 + row / 8 * 2 + k / 8 * 4) * ptx_bf16(rb.b, k % 2 + k / 8 * 2);
    }
    d[i] += sum;
  }
}

struct ptx_row {
  const void *data;
};
inline void load_matrices(uint32_t (&r)[4], const void *row) {
  ptx_row mine = {row};
  const ptx_row *lanes = ptx_give(mine);
  int lane = threadIdx.x % 32;
  for (int m = 0; m < 4; m++) memcpy(&r[m], static_cast<const char *>(lanes[m * 8 + lane / 4].data) + lane % 4 * 4, 4);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void *row) {
  ptx_row mine = {row};
  const ptx_row *lanes = ptx_give(mine);
  int lane = threadIdx.x % 32;
  for (int m = 0; m < 4; m++) {
    uint16_t pair[2];
    for (int i = 0; i < 2; i++)
      memcpy(&pair[i], static_cast<const char *>(lanes[m * 8 + lane % 4 * 2 + i].data) + lane / 4 * 2, 2);
    r[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

struct ptx_copy {
  void *shared;
  const void *global;
  int bytes;
  bool valid;
  unsigned group;
};
struct ptx_copies { /* of one thread */
  std::vector<ptx_copy> pending;
  unsigned group;
};
inline ptx_copies &ptx_mine() {
  static std::vector<ptx_copies> all(1024);
  return all[threadIdx.x];
}
inline void copy_async16(void *shared, const void *global, bool valid) {
  ptx_mine().pending.push_back({shared, global, 16, valid, ptx_mine().group});
}
inline void copy_async4(void *shared, const void *global, bool valid) {
  ptx_mine().pending.push_back({shared, global, 4, valid, ptx_mine().group});
}
inline void copy_async_commit() {
  ptx_mine().group++;
}
template <int N> inline void copy_async_wait() {
  ptx_copies &mine = ptx_mine();
  size_t left = 0;
  for (const ptx_copy &c : mine.pending) {
    if (static_cast<int>(mine.group - c.group) <= N)
      mine.pending[left++] = c;
    else if (c.valid)
      memcpy(c.shared, c.global, static_cast<size_t>(c.bytes));
    else
      memset(c.shared, 0, static_cast<size_t>(c.bytes));
  }
  mine.pending.resize(left);
}

#endif
#endif
