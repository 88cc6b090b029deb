/* gemm.c: speed of the cpu backend's matrix products at the shapes of a 135M Llama (hidden 576, ffn 1536, vocabulary
 * 49152), beside the tile unit's own limit measured with registers only.
 *
 *   bench_gemm [tokens [threads [rank]]]        ESPALIER_ISA=... selects the level
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cpu/gemm.h"
#include "core/cpu.h"
#include "core/log.h"
#include "core/rng.h"
#include "core/threads.h"

enum { REPEATS = 15 };

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

typedef void (*bench_fn)(void *ctx);

static double fastest; /* of the latest median() */

/* Median seconds of one call, each sample at least 3 ms long. On a shared machine the fastest tells more. */
static double median(bench_fn fn, void *ctx) {
  double t[REPEATS];
  fn(ctx);
  double t0 = esp_now();
  fn(ctx);
  int n = (int)(0.003 / (esp_now() - t0 + 1e-9)) + 1;
  for (int i = 0; i < REPEATS; i++) {
    t0 = esp_now();
    for (int r = 0; r < n; r++) fn(ctx);
    t[i] = (esp_now() - t0) / n;
  }
  qsort(t, REPEATS, sizeof *t, by_value);
  fastest = t[0];
  return t[REPEATS / 2];
}

/* Four independent sums, registers only: 16 * 16 * 32 * 2 operations per TDPBF16PS. */
enum { PEAK_ROUNDS = 20000 };
static void peak_chunk(void *ctx, int64_t chunk, int thread) {
  (void)ctx;
  (void)chunk;
  (void)thread;
#if defined(__x86_64__)
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t colsb[16];
    uint8_t rows[16];
  } c;
  memset(&c, 0, sizeof c);
  c.palette = 1;
  for (int i = 0; i < 8; i++) {
    c.colsb[i] = 64;
    c.rows[i] = 16;
  }
  __asm__ volatile("ldtilecfg %0\n tilezero %%tmm4\n tilezero %%tmm5\n tilezero %%tmm6\n tilezero %%tmm7" ::"m"(c));
  for (int i = 0; i < PEAK_ROUNDS; i++)
    __asm__ volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n"
                     "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::);
  __asm__ volatile("tilerelease" ::);
#endif
}
static void peak(void *ctx) {
  esp_parallel(*(int *)ctx, peak_chunk, NULL);
}

static void *random_bf16(int64_t n) {
  uint16_t *p = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * 2);
  if (!p) exit(4);
  for (int64_t i = 0; i < n; i++) p[i] = esp_f32_to_bf16((esp_rng_uniform(1, 2, (uint64_t)i) - 0.5f) * 0.1f);
  return p;
}

typedef struct job {
  esp_backend be;
  bool dx;
  esp_tensor y, x, a, b;
  esp_wview w;
  esp_tail tail;
  int n_tails;
  bool trans_a, trans_b;
  float beta;
} job;

static void linear(void *ctx) {
  job *j = ctx;
  esp_tensor none = {0};
  if (j->dx)
    esp_cpu_linear_dx(&j->be, j->y, j->x, &j->w, &j->tail, j->n_tails, 0);
  else
    esp_cpu_linear(&j->be, j->y, j->x, &j->w, none, &j->tail, j->n_tails, 0);
}
static void matmul(void *ctx) {
  job *j = ctx;
  esp_cpu_matmul(&j->be, j->y, j->a, j->trans_a, j->b, j->trans_b, 1, j->beta);
}

static double limit;

static void report(const char *name, double flops, double bytes, double s) {
  printf("%-34s %8.3f ms %6.0f GFLOP/s, fastest %8.3f ms %6.0f", name, s * 1e3, flops / s / 1e9, fastest * 1e3,
         flops / fastest / 1e9);
  if (limit > 0) printf(" (%4.1f%%)", 100 * flops / fastest / 1e9 / limit);
  printf(" %6.1f GB/s\n", bytes / fastest / 1e9);
  fflush(stdout);
}

static void bench_linear(const char *name, int64_t t, int64_t out, int64_t in, int64_t rank, bool y_f32) {
  for (int dx = 0; dx < 2; dx++)
    for (int tails = 0; tails < (rank > 0 ? 2 : 1); tails++) {
      job j = {.dx = dx};
      void *w = random_bf16(out * in), *x = random_bf16(t * (dx ? out : in));
      int64_t n = dx ? in : out;
      esp_tensor wt = esp_tensor_2d(w, ESP_BF16, out, in);
      j.w = (esp_wview){.out = out, .in = in, .packed = esp_cpu_pack(&j.be, &wt, 1, false, ESP_BF16)};
      esp_mem_free(w);
      j.x = esp_tensor_2d(x, ESP_BF16, t, dx ? out : in);
      void *y = esp_mem_alloc(ESP_MEM_HOST, (size_t)(t * n) * 4);
      if (!y || !j.w.packed) exit(4);
      j.y = esp_tensor_2d(y, y_f32 && !dx ? ESP_F32 : ESP_BF16, t, n);
      void *tx = random_bf16(t * (rank > 0 ? rank : 1)), *tw = random_bf16(n * (rank > 0 ? rank : 1));
      j.tail = (esp_tail){0, esp_tensor_2d(tx, ESP_BF16, t, rank),
                          dx ? esp_tensor_2d(tw, ESP_BF16, rank, n) : esp_tensor_2d(tw, ESP_BF16, n, rank)};
      j.n_tails = tails;
      char label[96];
      snprintf(label, sizeof label, "%s %lldx%lldx%lld%s%s", name, (long long)t, (long long)out, (long long)in,
               dx ? " dx" : "", tails ? " +rank" : "");
      double s = median(linear, &j);
      report(label, 2.0 * t * out * in + (tails ? 2.0 * t * n * rank : 0),
             2.0 * (t * (in + out) + out * in) + (y_f32 && !dx ? 2.0 * t * n : 0), s);
      esp_cpu_pack_free(&j.be, (void *)j.w.packed);
      esp_mem_free(x);
      esp_mem_free(y);
      esp_mem_free(tx);
      esp_mem_free(tw);
    }
}

static void bench_matmul(const char *name, int64_t m, int64_t n, int64_t k, bool ta, bool tb, bool f32) {
  job j = {.trans_a = ta, .trans_b = tb, .beta = f32 ? 1 : 0};
  void *a = random_bf16(m * k), *b = random_bf16(n * k), *c = esp_mem_alloc(ESP_MEM_HOST, (size_t)(m * n) * 4);
  if (!c) exit(4);
  j.a = ta ? esp_tensor_2d(a, ESP_BF16, k, m) : esp_tensor_2d(a, ESP_BF16, m, k);
  j.b = tb ? esp_tensor_2d(b, ESP_BF16, n, k) : esp_tensor_2d(b, ESP_BF16, k, n);
  j.y = esp_tensor_2d(c, f32 ? ESP_F32 : ESP_BF16, m, n);
  double s = median(matmul, &j);
  char label[96];
  snprintf(label, sizeof label, "%s %lldx%lldx%lld", name, (long long)m, (long long)n, (long long)k);
  report(label, 2.0 * m * n * k, 2.0 * (m * k + n * k) + (f32 ? 8.0 : 2.0) * m * n, s);
  esp_mem_free(a);
  esp_mem_free(b);
  esp_mem_free(c);
}

int main(int argc, char **argv) {
  int64_t t = argc > 1 ? atoll(argv[1]) : 2048, r = argc > 3 ? atoll(argv[3]) : 16;
  if (esp_threads_init(argc > 2 ? atoi(argv[2]) : 0) != ESP_OK) return 1;
  int threads = esp_threads_count();
  printf("%s, level %s, %d threads, %lld tokens, rank %lld; bf16\n", esp_cpu_brand(), esp_isa_name(esp_cpu_isa()),
         threads, (long long)t, (long long)r);
  if (esp_cpu_isa() == ESP_ISA_AMX) {
    median(peak, &threads);
    limit = threads * (double)PEAK_ROUNDS * 4 * 16 * 16 * 32 * 2 / fastest / 1e9;
    printf("tile unit, registers only: %.0f GFLOP/s\n", limit);
  }
  bench_linear("qkv", t, 960, 576, r, false);
  bench_linear("o", t, 576, 576, r, false);
  bench_linear("gate, up", t, 3072, 576, r, false);
  bench_linear("down", t, 576, 1536, r, false);
  bench_linear("logits", 512, 49152, 576, 0, true);
  bench_matmul("T = x A^T", t, r, 576, false, true, false);
  bench_matmul("T = h A^T", t, r, 1536, false, true, false);
  bench_matmul("dT = dy B", t, r, 1536, false, false, false);
  bench_matmul("dB += dy^T T", 576, r, t, true, false, true);
  bench_matmul("dB += dy^T T", 1536, r, t, true, false, true);
  bench_matmul("dA += dT^T x", r, 576, t, true, false, true);
  bench_matmul("dA += dT^T h", r, 1536, t, true, false, true);
  bench_matmul("dW += dy^T x", 1536, 576, t, true, false, true);
  bench_matmul("dW += dy^T h", 576, 1536, t, true, false, true);
  bench_matmul("x W^T, unpacked", t, 1536, 576, false, true, false);
  bench_matmul("dy W, unpacked", t, 576, 1536, false, false, false);
  esp_cpu_gemm_shutdown();
  esp_threads_shutdown();
  return 0;
}
