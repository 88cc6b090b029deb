#include "core/cpu.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

static pthread_once_t once = PTHREAD_ONCE_INIT;
static esp_isa available, chosen_at_start;
static _Atomic int in_use = -1;
static char brand[64] = "unknown";
static const char *forced_value;
static bool forced_invalid;

static const char *const isa_names[] = {"plain", "avx2", "avx512", "amx"};

const char *esp_isa_name(esp_isa isa) {
  return (unsigned)isa <= ESP_ISA_AMX ? isa_names[isa] : "unknown";
}

#if defined(__x86_64__)
static uint64_t xgetbv0(void) {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (uint64_t)hi << 32 | lo;
}

static bool bit(uint32_t word, int n) {
  return word >> n & 1u;
}

static esp_isa probe(void) {
  uint32_t a, b, c, d, b7, c7, d7, a71 = 0, ignore;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return ESP_ISA_PLAIN;
  /* OSXSAVE, AVX, FMA, F16C, and the system saves ymm (XCR0 bits 1, 2) */
  if (!(bit(c, 27) && bit(c, 28) && bit(c, 12) && bit(c, 29))) return ESP_ISA_PLAIN;
  uint64_t xcr0 = xgetbv0();
  if ((xcr0 & 0x6) != 0x6) return ESP_ISA_PLAIN;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return ESP_ISA_PLAIN;
  if (!bit(b7, 5)) return ESP_ISA_PLAIN; /* AVX2 */
  if (a >= 1) __get_cpuid_count(7, 1, &a71, &ignore, &ignore, &ignore);
  /* AVX512 F, DQ, BW, VL; opmask and zmm saved (XCR0 bits 5..7) */
  if (!(bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31)) || (xcr0 & 0xe0) != 0xe0) return ESP_ISA_AVX2;
  /* AMX-BF16 (22), AMX-TILE (24), AVX512-BF16; tile state enabled (XCR0 bits 17, 18) */
  if (!(bit(d7, 22) && bit(d7, 24) && bit(a71, 5)) || (xcr0 & 0x60000) != 0x60000) return ESP_ISA_AVX512;
  /* Linux gives a process its 8 KiB of tile data only when asked; threads made later inherit the permission. */
  if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0) return ESP_ISA_AVX512;
  return ESP_ISA_AMX;
}

static void read_brand(void) {
  uint32_t r[12];
  for (unsigned i = 0; i < 3; i++)
    if (!__get_cpuid(0x80000002u + i, &r[4 * i], &r[4 * i + 1], &r[4 * i + 2], &r[4 * i + 3])) return;
  char text[49];
  memcpy(text, r, 48);
  text[48] = 0;
  const char *s = text;
  while (*s == ' ') s++;
  strncpy(brand, s, sizeof brand - 1);
  for (size_t n = strlen(brand); n > 0 && brand[n - 1] == ' '; n--) brand[n - 1] = 0;
}
#else
static esp_isa probe(void) {
  return ESP_ISA_PLAIN;
}
static void read_brand(void) {
}
#endif

static void init(void) {
  available = probe();
  read_brand();
  chosen_at_start = available;
  forced_value = getenv("ESPALIER_ISA");
  if (forced_value && *forced_value) {
    int want = -1;
    for (int i = 0; i <= ESP_ISA_AMX; i++)
      if (strcmp(forced_value, isa_names[i]) == 0) want = i;
    if (want >= 0 && want <= (int)available)
      chosen_at_start = (esp_isa)want;
    else
      forced_invalid = true;
  }
  atomic_store(&in_use, (int)chosen_at_start);
}

esp_isa esp_cpu_isa(void) {
  int isa = atomic_load_explicit(&in_use, memory_order_acquire);
  if (isa >= 0) return (esp_isa)isa;
  pthread_once(&once, init);
  return (esp_isa)atomic_load(&in_use);
}

esp_isa esp_cpu_isa_available(void) {
  pthread_once(&once, init);
  return available;
}

const char *esp_cpu_brand(void) {
  pthread_once(&once, init);
  return brand;
}

bool esp_cpu_isa_forced_invalid(const char **value) {
  pthread_once(&once, init);
  if (value) *value = forced_value;
  return forced_invalid;
}

void esp_cpu_isa_set(esp_isa isa) {
  pthread_once(&once, init);
  atomic_store(&in_use, (int)(isa <= available ? isa : available));
}
