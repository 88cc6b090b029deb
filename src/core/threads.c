/* threads.c: the pool.
 *
 * One 64-bit word carries a job's life: the high half is its number, the low half counts the workers inside it and has
 * a bit "closed". The caller publishes a job by a new number with the low half zero, takes chunks itself, closes the
 * job when no chunk is left, and waits only for workers that joined: one that the system has not scheduled yet costs
 * nothing (this matters where cores are shared). A worker joins by compare-and-swap, so it can never enter a closed
 * job, and the job's fields are stable while anyone is inside. */
#include "core/threads.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SPINS 200
#define CLOSED 0x80000000ull
#define LOW 0xffffffffull
#define MOST_THREADS 1024

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the halves of the state word are addressed for futex");

static struct {
  pthread_mutex_t calls; /* one job at a time */
  pthread_t *workers;
  int count; /* threads with the caller; 0: not started */
  _Atomic uint64_t state;
  _Atomic uint32_t sleepers;
  _Atomic bool stop;
  /* the job */
  esp_parallel_fn fn;
  void *ctx;
  int64_t n_chunks;
  _Alignas(64) _Atomic int64_t next;
} pool = {.calls = PTHREAD_MUTEX_INITIALIZER, .state = CLOSED};

static _Atomic int started_count;     /* pool.count, readable without the mutex */
static _Thread_local int inside = -1; /* this thread's number while it is in a job */

static inline void pause_cpu(void) {
#if defined(__x86_64__)
  _mm_pause();
#else
  atomic_signal_fence(memory_order_seq_cst);
#endif
}

static void futex_wait(_Atomic uint64_t *word, int half, uint32_t seen) {
  syscall(SYS_futex, (uint32_t *)word + half, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint64_t *word, int half, int n) {
  syscall(SYS_futex, (uint32_t *)word + half, FUTEX_WAKE_PRIVATE, n, NULL, NULL, 0);
}

#if defined(__x86_64__)
#define FLUSH_BITS 0x8040u /* FTZ, DAZ */
static unsigned flush_get(void) {
  return _mm_getcsr();
}
static void flush_put(unsigned mode) {
  _mm_setcsr(mode);
}
#elif defined(__aarch64__)
#define FLUSH_BITS (1u << 24) /* FPCR.FZ */
static unsigned flush_get(void) {
  uint64_t v;
  __asm__ volatile("mrs %0, fpcr" : "=r"(v));
  return (unsigned)v;
}
static void flush_put(unsigned mode) {
  __asm__ volatile("msr fpcr, %0" ::"r"((uint64_t)mode));
}
#else
#define FLUSH_BITS 0u
static unsigned flush_get(void) {
  return 0;
}
static void flush_put(unsigned mode) {
  (void)mode;
}
#endif

void esp_threads_ftz(void) {
  flush_put(flush_get() | FLUSH_BITS);
}

static void run_chunks(esp_parallel_fn fn, void *ctx, int64_t n, int thread) {
  inside = thread;
  for (int64_t c; (c = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed)) < n;) fn(ctx, c, thread);
  inside = -1;
}

/* Waits for a job with another number than `last`; returns the state seen. */
static uint64_t wait_job(uint32_t last) {
  for (int i = 0; i < SPINS; i++) {
    uint64_t s = atomic_load_explicit(&pool.state, memory_order_acquire);
    if ((uint32_t)(s >> 32) != last) return s;
    pause_cpu();
  }
  for (;;) {
    /* Announce the sleep, then let the kernel compare the number again: a publisher either sees the sleeper or has
     * already changed the number. */
    atomic_fetch_add(&pool.sleepers, 1);
    futex_wait(&pool.state, 1, last);
    atomic_fetch_sub(&pool.sleepers, 1);
    uint64_t s = atomic_load(&pool.state);
    if ((uint32_t)(s >> 32) != last) return s;
  }
}

static void *worker_main(void *arg) {
  int thread = (int)(intptr_t)arg;
  char name[16];
  snprintf(name, sizeof name, "espalier-%d", thread);
  pthread_setname_np(pthread_self(), name);
  esp_threads_ftz();
  uint32_t last = (uint32_t)(atomic_load(&pool.state) >> 32) - 1;
  for (;;) {
    uint64_t s = wait_job(last);
    last = (uint32_t)(s >> 32);
    if (atomic_load(&pool.stop)) return NULL;
    while (!(s & CLOSED) && (uint32_t)(s >> 32) == last) {
      if (!atomic_compare_exchange_weak(&pool.state, &s, s + 1)) continue;
      run_chunks(pool.fn, pool.ctx, pool.n_chunks, thread);
      uint64_t left = atomic_fetch_sub(&pool.state, 1) - 1;
      if ((left & LOW) == CLOSED) futex_wake(&pool.state, 0, 1); /* the last one out of a closed job */
      break;
    }
  }
}

static int default_count(void) {
  const char *env = getenv("ESPALIER_THREADS");
  if (env && *env) {
    char *end;
    long n = strtol(env, &end, 10);
    if (!*end && n >= 1 && n <= MOST_THREADS) return (int)n;
  }
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
  long n = sysconf(_SC_NPROCESSORS_ONLN);
  return n > 0 ? (int)n : 1;
}

/* With the mutex held. */
static void stop_locked(void) {
  if (pool.count > 1) {
    atomic_store(&pool.stop, true);
    uint64_t s = atomic_load(&pool.state);
    atomic_store(&pool.state, ((s >> 32) + 1) << 32 | CLOSED);
    futex_wake(&pool.state, 1, MOST_THREADS);
    for (int i = 1; i < pool.count; i++) pthread_join(pool.workers[i], NULL);
    atomic_store(&pool.stop, false);
  }
  free(pool.workers);
  pool.workers = NULL;
  pool.count = 0;
  atomic_store(&started_count, 0);
}

/* Only the forking thread lives on in the child: forget the workers, start anew at first use. */
static void after_fork(void) {
  pthread_mutex_init(&pool.calls, NULL);
  pool.workers = NULL; /* a few bytes stay behind: the child may not free what the parent's threads used */
  pool.count = 0;
  atomic_store(&started_count, 0);
  atomic_store(&pool.sleepers, 0);
  atomic_store(&pool.state, CLOSED);
}

static void register_fork(void) {
  pthread_atfork(NULL, NULL, after_fork);
}

static esp_status start_locked(int n) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, register_fork);
  if (n <= 0) n = default_count();
  if (n > MOST_THREADS) return esp_fail(ESP_ERR_RECIPE, "%d threads: at most %d", n, MOST_THREADS);
  if (pool.count == n) return ESP_OK;
  stop_locked();
  pool.workers = calloc((size_t)n, sizeof *pool.workers);
  if (!pool.workers) return esp_fail_oom("threads", (size_t)n * sizeof *pool.workers);
  pool.count = 1;
  for (int i = 1; i < n; i++) {
    int e = pthread_create(&pool.workers[i], NULL, worker_main, (void *)(intptr_t)i);
    if (e) {
      stop_locked();
      return esp_fail(ESP_ERR_INTERNAL, "cannot start thread %d of %d: %s", i, n, strerror(e));
    }
    pool.count = i + 1;
  }
  atomic_store(&started_count, n);
  return ESP_OK;
}

esp_status esp_threads_init(int n) {
  pthread_mutex_lock(&pool.calls);
  esp_status st = start_locked(n);
  pthread_mutex_unlock(&pool.calls);
  return st;
}

int esp_threads_count(void) {
  int n = atomic_load_explicit(&started_count, memory_order_acquire);
  if (n > 0) return n;
  if (esp_threads_init(0) != ESP_OK) return 1;
  return atomic_load(&started_count);
}

void esp_threads_shutdown(void) {
  pthread_mutex_lock(&pool.calls);
  stop_locked();
  pthread_mutex_unlock(&pool.calls);
}

static void run_job(int64_t n_chunks, esp_parallel_fn fn, void *ctx) {
  pool.fn = fn;
  pool.ctx = ctx;
  pool.n_chunks = n_chunks;
  atomic_store_explicit(&pool.next, 0, memory_order_relaxed);
  uint64_t number = (atomic_load(&pool.state) >> 32) + 1;
  atomic_store(&pool.state, number << 32);
  uint32_t sleepers = atomic_load(&pool.sleepers);
  if (sleepers) futex_wake(&pool.state, 1, n_chunks - 1 < (int64_t)sleepers ? (int)(n_chunks - 1) : (int)sleepers);
  run_chunks(fn, ctx, n_chunks, 0);
  uint64_t s = atomic_fetch_or(&pool.state, CLOSED) | CLOSED;
  for (int i = 0; (s & LOW) != CLOSED && i < SPINS; i++) {
    pause_cpu();
    s = atomic_load(&pool.state);
  }
  while ((s & LOW) != CLOSED) {
    futex_wait(&pool.state, 0, (uint32_t)s);
    s = atomic_load(&pool.state);
  }
}

void esp_parallel(int64_t n_chunks, esp_parallel_fn fn, void *ctx) {
  if (n_chunks <= 0) return;
  if (inside >= 0) { /* nested: serial, on this thread's number */
    for (int64_t c = 0; c < n_chunks; c++) fn(ctx, c, inside);
    return;
  }
  unsigned mode = flush_get();
  if ((mode & FLUSH_BITS) != FLUSH_BITS) flush_put(mode | FLUSH_BITS);
  pthread_mutex_lock(&pool.calls);
  if (pool.count == 0 && start_locked(0) != ESP_OK && pool.count == 0) {
    /* No thread could be started: the work is still done, by this one. */
    atomic_store_explicit(&pool.next, 0, memory_order_relaxed);
    run_chunks(fn, ctx, n_chunks, 0);
  } else if (pool.count == 1 || n_chunks == 1) {
    inside = 0;
    for (int64_t c = 0; c < n_chunks; c++) fn(ctx, c, 0);
    inside = -1;
  } else {
    run_job(n_chunks, fn, ctx);
  }
  pthread_mutex_unlock(&pool.calls);
  if ((mode & FLUSH_BITS) != FLUSH_BITS) flush_put((flush_get() & ~FLUSH_BITS) | (mode & FLUSH_BITS));
}
