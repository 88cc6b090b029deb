/* rng.h: counter-based random numbers, Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
 * SC 2011). A draw is a pure function of (seed, stream, index): results do not depend on thread count, order or
 * device, and a recomputed forward draws the same. `stream` names the use (esp_rng_stream of a few integers). */
#ifndef ESP_CORE_RNG_H
#define ESP_CORE_RNG_H

#include <stdint.h>

#ifdef __CUDACC__ /* kernels draw the same numbers */
#define ESP_RNG_FN static __host__ __device__ inline
#else
#define ESP_RNG_FN static inline
#endif

ESP_RNG_FN void esp_philox4x32_10(const uint32_t ctr[4], const uint32_t key[2], uint32_t out[4]) {
  uint32_t c0 = ctr[0], c1 = ctr[1], c2 = ctr[2], c3 = ctr[3], k0 = key[0], k1 = key[1];
  for (int i = 0; i < 10; i++) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

/* Four words for block `index` of (seed, stream). */
ESP_RNG_FN void esp_rng_block(uint64_t seed, uint64_t stream, uint64_t index, uint32_t out[4]) {
  uint32_t ctr[4] = {(uint32_t)index, (uint32_t)(index >> 32), (uint32_t)stream, (uint32_t)(stream >> 32)};
  uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
  esp_philox4x32_10(ctr, key, out);
}
/* The seed of draw number `draw`: the same uses of two draws are independent. */
ESP_RNG_FN uint64_t esp_draw_seed(uint64_t seed, uint64_t draw) {
  return seed + draw * 0x9E3779B97F4A7C15ull;
}
/* Word `index` of the stream: word index%4 of block index/4. */
ESP_RNG_FN uint32_t esp_rng_u32(uint64_t seed, uint64_t stream, uint64_t index) {
  uint32_t w[4];
  esp_rng_block(seed, stream, index >> 2, w);
  return w[index & 3];
}
/* [0, 1), 24 bits. */
ESP_RNG_FN float esp_rng_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
  return (float)(esp_rng_u32(seed, stream, index) >> 8) * 0x1p-24f;
}
/* N(0,1), Box-Muller on words 2*index and 2*index+1. */
float esp_rng_normal(uint64_t seed, uint64_t stream, uint64_t index);
/* Unbiased integer in [0, n), n > 0; draw number `index` of the stream. */
uint64_t esp_rng_below(uint64_t seed, uint64_t stream, uint64_t index, uint64_t n);
/* A stream number from a purpose and up to three integers (mixed, not concatenated). */
uint64_t esp_rng_stream(uint32_t purpose, uint64_t a, uint64_t b, uint64_t c);
/* Stream from a name (a parameter's name, say): xxh3 of the bytes mixed with purpose. */
uint64_t esp_rng_stream_name(uint32_t purpose, const char *name);
/* perm[0..n) becomes a Fisher-Yates permutation, a function of (seed, stream) alone. */
void esp_rng_permutation(uint64_t seed, uint64_t stream, int64_t n, int64_t *perm);

enum {                      /* purposes */
       ESP_RNG_INIT = 1,    /* parameter initialisation */
       ESP_RNG_DROPOUT = 2, /* a = step*micro+i, b = site */
       ESP_RNG_SHUFFLE = 3, /* a = epoch, b = task */
       ESP_RNG_SAMPLE = 4,  /* generation */
       ESP_RNG_DATA = 5     /* data mixing and generators */
};

#endif
