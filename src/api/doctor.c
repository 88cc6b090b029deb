/* doctor.c: what this machine offers and what of it is used; with calibrate, its ceilings by measurement, over the same
 * op table that a step uses. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <cblas.h>
#include <jansson.h>
#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>
#include <utf8proc.h>
#include <xxhash.h>
#include <yaml.h>
#ifdef ESP_HAVE_MPI
#include <mpi.h>
#endif

#include "api/api.h"
#include "backend/plugin.h"
#include "core/cpu.h"
#include "core/log.h"
#include "core/threads.h"
#include "io/json.h"

/* Operations per second of y = x W^T at [n, n] x [n, n], the best of a few. */
static esp_status matmul_peak(esp_backend *be, esp_dtype type, int64_t n, double *flops) {
  enum { RUNS = 8 };
  esp_status st = ESP_OK;
  size_t size = esp_dtype_size(type);
  void *w = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(n * n) * size), *packed = NULL;
  void *x = be->ops->alloc(be, ESP_MEM_WORKSPACE, n * n * (int64_t)size);
  void *y = be->ops->alloc(be, ESP_MEM_WORKSPACE, n * n * (int64_t)size);
  *flops = 0;
  if (!w || !x || !y) ESP_GOTO(ESP_ERR_MEMORY);
  esp_tensor weight = esp_tensor_2d(w, type, n, n);
  packed = be->ops->pack(be, &weight, 1, false, type);
  if (!packed) ESP_GOTO(ESP_ERR_MEMORY);
  esp_wview view = {.out = n, .in = n, .packed = packed};
  for (int i = 0; i < RUNS; i++) {
    double t = esp_now();
    be->ops->linear(be, esp_tensor_2d(y, type, n, n), esp_tensor_2d(x, type, n, n), &view, (esp_tensor){0}, NULL, 0, 0);
    ESP_GOTO(esp_backend_sync(be));
    t = esp_now() - t;
    double work = 2.0 * (double)(n * n * n);
    if (t > 0 && work / t > *flops) *flops = work / t;
  }
out:
  if (packed) be->ops->pack_free(be, packed);
  if (x) be->ops->free(be, x);
  if (y) be->ops->free(be, y);
  esp_mem_free(w);
  return st;
}

typedef struct stream {
  float *a, *b;
  int64_t n;
} stream;
static void stream_chunk(void *ctx, int64_t chunk, int thread) {
  stream *s = ctx;
  memcpy(s->a + chunk * s->n, s->b + chunk * s->n, (size_t)s->n * sizeof(float));
}
/* Bytes per second of copying 2 x 128 MiB, read and written. */
static esp_status memory_peak(double *bytes) {
  enum { CHUNKS = 64, RUNS = 4 };
  stream s = {.n = 1 << 19};
  size_t total = (size_t)CHUNKS * (size_t)s.n * sizeof(float);
  esp_status st = ESP_OK;
  *bytes = 0;
  s.a = esp_mem_alloc(ESP_MEM_WORKSPACE, total);
  s.b = esp_mem_alloc(ESP_MEM_WORKSPACE, total);
  if (!s.a || !s.b) ESP_GOTO(ESP_ERR_MEMORY);
  memset(s.b, 1, total); /* untouched pages are all one page of zeros */
  for (int i = 0; i < RUNS; i++) {
    double t = esp_now();
    esp_parallel(CHUNKS, stream_chunk, &s);
    t = esp_now() - t;
    if (t > 0 && 2.0 * (double)total / t > *bytes) *bytes = 2.0 * (double)total / t;
  }
out:
  esp_mem_free(s.a);
  esp_mem_free(s.b);
  return st;
}

static esp_status matmul_into(json_t *j, const char *device, int n, const char *bf16_key, const char *fp32_key) {
  esp_backend *be = NULL;
  double bf16 = 0, fp32 = 0;
  esp_status st = esp_backend_create(device, &be);
  if (st == ESP_OK) st = matmul_peak(be, ESP_BF16, n, &bf16);
  if (st == ESP_OK) st = matmul_peak(be, ESP_F32, n, &fp32);
  esp_backend_destroy(be);
  if (st != ESP_OK) return st;
  json_object_set_new(j, bf16_key, json_real(bf16 / 1e9));
  json_object_set_new(j, fp32_key, json_real(fp32 / 1e9));
  return ESP_OK;
}

static esp_status calibrate_into(json_t *j) {
  double bytes = 0;
  ESP_TRY(matmul_into(j, "cpu", 1024, "matmul_bf16_gflops", "matmul_fp32_gflops"));
  ESP_TRY(memory_peak(&bytes));
  json_object_set_new(j, "memory_gbytes_per_second", json_real(bytes / 1e9));
  if (strcmp(esp_device_auto(NULL, 0), "cpu") == 0) return ESP_OK;
  return matmul_into(j, "cuda", 4096, "device_matmul_bf16_gflops", "device_matmul_fp32_gflops");
}

static void version_into(json_t *j, const char *key, int64_t v, int64_t major, int64_t minor) {
  char text[64] = "not found";
  if (v > 0)
    snprintf(text, sizeof text, "%lld.%lld.%lld", (long long)(v / major), (long long)(v % major / minor),
             (long long)(v % minor));
  json_object_set_new(j, key, json_string(text));
}

/* The CUDA plug-in and what it finds. Asked for in full here, where opening its libraries may take a while. */
static void cuda_into(json_t *j) {
  const esp_plugin *plugin;
  esp_plugin_probe p = {0};
  char text[300];
  if (esp_plugin_load(&plugin) != ESP_OK) {
    const char *m = esp_error_message(); /* "cuda: why" */
    json_object_set_new(j, "cuda", json_string(strncmp(m, "cuda: ", 6) ? m : m + 6));
    esp_error_clear();
    return;
  }
  plugin->probe(&p);
  snprintf(text, sizeof text, "%s%s", p.why_not[0] ? "not used: " : "used where a recipe says auto or cuda", p.why_not);
  json_object_set_new(j, "cuda", json_string(text));
  snprintf(text, sizeof text, "%d.%d", p.driver / 1000, p.driver % 1000 / 10);
  json_object_set_new(j, "cuda_driver", json_string(p.driver ? text : "none"));
  snprintf(text, sizeof text, "%d.%d", p.runtime / 1000, p.runtime % 1000 / 10);
  json_object_set_new(j, "cuda_runtime", json_string(text));
  version_into(j, "cublaslt", p.cublaslt, 10000, 100);
  version_into(j, "cudnn", p.cudnn, 10000, 100);
  version_into(j, "nccl", p.nccl, 10000, 100);
  for (int i = 0; i < p.n_devices; i++) {
    const esp_device_info *d = &p.device[i];
    char key[24];
    snprintf(key, sizeof key, "cuda:%d", i);
    snprintf(text, sizeof text, "%s, compute capability %d.%d, %lld MiB, %lld MiB free", d->name, d->cc / 10,
             d->cc % 10, (long long)(d->memory_bytes >> 20), (long long)(d->free_bytes >> 20));
    json_object_set_new(j, key, json_string(text));
  }
}

/* What is loaded now, not what it was built against. */
static void libraries_into(json_t *j) {
  char text[512] = "";
  json_object_set_new(j, "openblas", json_string(openblas_get_config()));
  if (pcre2_config(PCRE2_CONFIG_VERSION, NULL) < (int)sizeof text) pcre2_config(PCRE2_CONFIG_VERSION, text);
  json_object_set_new(j, "pcre2", json_string(text));
  json_object_set_new(j, "jansson", json_string(jansson_version_str()));
  json_object_set_new(j, "libyaml", json_string(yaml_get_version_string()));
  json_object_set_new(j, "utf8proc", json_string(utf8proc_version()));
  unsigned v = XXH_versionNumber();
  snprintf(text, sizeof text, "%u.%u.%u", v / 10000, v / 100 % 100, v % 100);
  json_object_set_new(j, "xxhash", json_string(text));
#ifdef ESP_HAVE_MPI
  char mpi[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int n = 0;
  MPI_Get_library_version(mpi, &n);
  mpi[strcspn(mpi, ",\n")] = 0;
  json_object_set_new(j, "mpi", json_string(mpi));
#else
  json_object_set_new(j, "mpi", json_string("not built in"));
#endif
}

esp_status esp_doctor(int calibrate, int json, char **text) {
  esp_status st = ESP_OK;
  struct utsname os = {0};
  const char *forced = NULL;
  *text = NULL;
  uname(&os);
  json_t *j = json_object();
  json_object_set_new(j, "espalier", json_string(esp_version()));
  json_object_set_new(j, "system", json_string(os.release));
  json_object_set_new(j, "processor", json_string(esp_cpu_brand()));
  if (esp_cpu_isa_forced_invalid(&forced))
    ESP_GOTO(esp_fail(ESP_ERR_DEVICE, "ESPALIER_ISA=%s is unknown or not offered by this processor (%s is the best)",
                      forced, esp_isa_name(esp_cpu_isa_available())));
  json_object_set_new(j, "instructions_available", json_string(esp_isa_name(esp_cpu_isa_available())));
  json_object_set_new(j, "instructions_used", json_string(esp_isa_name(esp_cpu_isa())));
  json_object_set_new(j, "threads", json_integer(esp_threads_count()));
  json_object_set_new(j, "processors_online", json_integer(sysconf(_SC_NPROCESSORS_ONLN)));
  esp_recipe machine = {0};
  machine.memory.limit_share = 1;
  json_object_set_new(j, "memory_mbytes", json_integer((json_int_t)(esp_memory_limit(&machine) >> 20)));
  libraries_into(j);
  cuda_into(j);
  if (calibrate) ESP_GOTO(calibrate_into(j));
  st = esp_api_facts_text(j, json, text);
out:
  json_decref(j);
  return st;
}
