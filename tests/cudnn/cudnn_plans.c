/* cudnn_plans.c: the real cuDNN takes every attention graph that the engine can emit, and compiles it, for a device
 * that is described by a file and need not be here; no plan wants more workspace than need.h counts.
 *
 *   cudnn_plans <directory of the fake driver> <device.json> [every]
 *
 * The program starts itself again with the fake driver in front of LD_LIBRARY_PATH. Exit 77, with the reason, where the
 * machine has a driver (then the suites with label gpu say more than this) or no cuDNN. `every`: only each n-th graph.
 *
 * Seen to catch: the deterministic workspace counted with 1 byte per number of dS, a softmax without its exponential,
 * the maximum taken before the masks. cuDNN recognises a pattern and does not look at everything in it: it takes a mask
 * over the wrong axis, or keys without their ragged offset. Those show in values, on the simulated device. */
#include <dlfcn.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "backend/cuda/need_attn.h"
#include "backend/cuda/sdpa_graph.h"

enum { SKIP = 77, MAX_SHAPES = 512 };

static int skip(const char *why) {
  printf("skipped: %s\n", why);
  return SKIP;
}

/* Only for a process that has not loaded the fake one. */
static bool real_driver(void) {
  return dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL) != NULL;
}

static int start_again(char **argv) {
  const char *old = getenv("LD_LIBRARY_PATH");
  char *path = NULL;
  if (asprintf(&path, "%s%s%s", argv[1], old && *old ? ":" : "", old ? old : "") < 0) return 2;
  setenv("LD_LIBRARY_PATH", path, 1);
  setenv("CUDNN_PLANS_FAKE", "1", 1);
  free(path);
  execv("/proc/self/exe", argv);
  perror("cudnn_plans");
  return 2;
}

static char *text_of(const char *path) {
  FILE *f = fopen(path, "rb");
  char *text = calloc(1, 8192);
  if (!f || !text || !fread(text, 1, 8191, f)) {
    perror(path);
    exit(2);
  }
  fclose(f);
  return text;
}

/* A finalised CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR; *cc as 90. */
static cudnnBackendDescriptor_t device_of(const esp_cudnn *dnn, const char *path, int *cc) {
  char *text = text_of(path), *ver = strstr(text, "\"deviceVer\":"), why[256] = "";
  cudnnBackendDescriptor_t d = NULL;
  *cc = ver ? atoi(ver + strlen("\"deviceVer\":")) / 10 : 0;
  if (!*cc || dnn->make(CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR, &d) ||
      dnn->set(d, CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, (int64_t)strlen(text) + 1, text) ||
      dnn->finalize(d)) {
    dnn->last_error(why, sizeof why);
    fprintf(stderr, "cudnn_plans: %s describes no device: %s\n", path, why);
    exit(2);
  }
  free(text);
  return d;
}

/* cuDNN's kernels for Ampere have no backward of wide heads, and none of packed sequences that is deterministic: there
 * the engine's own kernels take over. */
static bool may_be_refused(const esp_sdpa_shape *s, int cc) {
  return cc < 90 && s->backward && (!s->atomic || s->head_dim > 128);
}

static int64_t counted(const esp_sdpa_shape *s) {
  int64_t ds = s->backward && !s->atomic ? 2 * s->b * s->heads * s->s * s->s : 0;
  return ds + ESP_ATTN_EXTRA_BYTES(s->b);
}

static void say(const esp_sdpa_shape *s, const char *verdict) {
  printf("%-8s %s%s b%-3" PRId64 " s%-5" PRId64 " heads %" PRId64 "/%" PRId64 " x %" PRId64 "%s%s ld %" PRId64
         " %" PRId64 " %" PRId64,
         verdict, s->backward ? "backward" : "forward", s->atomic ? " atomic" : "", s->b, s->s, s->heads, s->kv_heads,
         s->head_dim, s->causal ? " causal" : "", s->window ? " window" : "", s->ld_q, s->ld_k, s->ld_v);
}

int main(int argc, char **argv) {
  static esp_sdpa_shape shapes[MAX_SHAPES];
  char why[256] = "";
  int cc, made = 0, refused = 0, wrong = 0, every = argc > 3 ? atoi(argv[3]) : 1;
  if (argc < 3 || every < 1) {
    fprintf(stderr, "usage: cudnn_plans <directory of the fake driver> <device.json> [every]\n");
    return 2;
  }
  if (!getenv("CUDNN_PLANS_FAKE")) return real_driver() ? skip("this machine has a CUDA driver") : start_again(argv);
  const esp_cudnn *dnn = esp_cudnn_open(why, sizeof why);
  if (!dnn) return skip(why);
  cudnnBackendDescriptor_t device = device_of(dnn, argv[2], &cc);
  int n = esp_sdpa_enumerate(shapes, MAX_SHAPES);
  if (n > MAX_SHAPES) {
    fprintf(stderr, "cudnn_plans: %d shapes, room for %d\n", n, MAX_SHAPES);
    return 2;
  }
  for (int i = 0; i < n; i += every) {
    const esp_sdpa_shape *s = shapes + i;
    esp_sdpa_plan plan;
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    esp_status st = esp_sdpa_plan_make(dnn, NULL, device, cc, s, &plan);
    clock_gettime(CLOCK_MONOTONIC, &to);
    if (st != ESP_OK) {
      bool expected = may_be_refused(s, cc);
      say(s, expected ? "none" : "REFUSED");
      printf(": %s\n", plan.graph.why);
      expected ? refused++ : wrong++;
      continue;
    }
    bool fits = plan.workspace <= counted(s);
    say(s, fits ? "ok" : "TOO MUCH");
    printf(": %d operations, %" PRId64 " bytes of workspace, %" PRId64 " counted, %.0f ms\n", plan.graph.n_ops,
           plan.workspace, counted(s),
           (double)(to.tv_sec - from.tv_sec) * 1e3 + (double)(to.tv_nsec - from.tv_nsec) * 1e-6);
    esp_sdpa_plan_free(dnn, &plan);
    made++;
    wrong += !fits;
  }
  dnn->unmake(device);
  printf("cuDNN %zu, sm_%d: %d plans, %d left to the own kernels, %d wrong\n", dnn->version(), cc, made, refused,
         wrong);
  return wrong || !made ? 1 : 0;
}
