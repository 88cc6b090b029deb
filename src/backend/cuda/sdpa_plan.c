/* sdpa_plan.c: see sdpa.h and sdpa_graph.h. */
#include "backend/cuda/sdpa.h"

#include <dlfcn.h>
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/mem.h"

/* ---- the library ---- */

static esp_cudnn library;
static char library_why[256];
static bool library_found;
static pthread_once_t library_once = PTHREAD_ONCE_INIT;

#ifdef ESP_SIMCUDA
static void open_library(void) {
  library = (esp_cudnn){.version = cudnnGetVersion,
                        .create = cudnnCreate,
                        .destroy = cudnnDestroy,
                        .set_stream = cudnnSetStream,
                        .make = cudnnBackendCreateDescriptor,
                        .unmake = cudnnBackendDestroyDescriptor,
                        .set = cudnnBackendSetAttribute,
                        .get = cudnnBackendGetAttribute,
                        .finalize = cudnnBackendFinalize,
                        .execute = cudnnBackendExecute,
                        .status_text = cudnnGetErrorString,
                        .last_error = cudnnGetLastErrorString};
  library_found = true;
}
#else
static void open_library(void) {
  void *so = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
  if (!so) {
    snprintf(library_why, sizeof library_why, "%s", dlerror());
    return;
  }
  /* POSIX lets dlsym's answer be a function; ISO C wants it stored through a pointer to the member. */
  const struct {
    const char *name;
    void *slot;
  } wanted[] = {
      {"cudnnGetVersion", &library.version},
      {"cudnnCreate", &library.create},
      {"cudnnDestroy", &library.destroy},
      {"cudnnSetStream", &library.set_stream},
      {"cudnnBackendCreateDescriptor", &library.make},
      {"cudnnBackendDestroyDescriptor", &library.unmake},
      {"cudnnBackendSetAttribute", &library.set},
      {"cudnnBackendGetAttribute", &library.get},
      {"cudnnBackendFinalize", &library.finalize},
      {"cudnnBackendExecute", &library.execute},
      {"cudnnGetErrorString", &library.status_text},
      {"cudnnGetLastErrorString", &library.last_error},
  };
  for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
    void *f = dlsym(so, wanted[i].name);
    if (!f) {
      snprintf(library_why, sizeof library_why, "libcudnn.so.9 has no %s", wanted[i].name);
      return;
    }
    memcpy(wanted[i].slot, &f, sizeof f);
  }
  library_found = true;
}
#endif

const esp_cudnn *esp_cudnn_open(char *why, size_t room) {
  pthread_once(&library_once, open_library);
  if (!library_found && why && room) snprintf(why, room, "%s", library_why);
  return library_found ? &library : NULL;
}

/* ---- one plan ---- */

enum { MAX_CONFIGS = 16 };

static cudnnBackendDescriptor_t new_desc(const esp_cudnn *dnn, cudnnBackendDescriptorType_t type) {
  cudnnBackendDescriptor_t d = NULL;
  return dnn->make(type, &d) == CUDNN_STATUS_SUCCESS ? d : NULL;
}
static bool set_one(const esp_cudnn *dnn, cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name,
                    cudnnBackendAttributeType_t type, const void *value) {
  return dnn->set(d, name, type, 1, value) == CUDNN_STATUS_SUCCESS;
}

static esp_status refused(const esp_cudnn *dnn, const char *what) {
  char text[512] = "";
  dnn->last_error(text, sizeof text);
  return esp_fail(ESP_ERR_DEVICE, "cuDNN: attention plan: %s: %s", what, text[0] ? text : "no reason given");
}

/* A plan of one engine configuration; NULL when it cannot be made. */
static cudnnBackendDescriptor_t plan_of(const esp_cudnn *dnn, cudnnHandle_t handle, cudnnBackendDescriptor_t device,
                                        cudnnBackendDescriptor_t config) {
  cudnnBackendDescriptor_t plan = new_desc(dnn, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
  if (!plan) return NULL;
  bool ok =
      set_one(dnn, plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, CUDNN_TYPE_BACKEND_DESCRIPTOR, &config) &&
      (handle ? set_one(dnn, plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, &handle)
              : set_one(dnn, plan, CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, CUDNN_TYPE_BACKEND_DESCRIPTOR, &device)) &&
      dnn->finalize(plan) == CUDNN_STATUS_SUCCESS;
  if (!ok) dnn->unmake(plan);
  return ok ? plan : NULL;
}

/* The configurations that mode A of the heuristics offers, best first. Returns how many; the caller destroys them. */
static int64_t offered(const esp_cudnn *dnn, cudnnBackendDescriptor_t device, bool described,
                       cudnnBackendDescriptor_t graph, cudnnBackendDescriptor_t configs[MAX_CONFIGS]) {
  cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
  cudnnBackendDescriptor_t heuristics = new_desc(dnn, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
  int64_t got = 0;
  if (!heuristics) return 0;
  bool ok = set_one(dnn, heuristics, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, CUDNN_TYPE_BACKEND_DESCRIPTOR, &graph) &&
            set_one(dnn, heuristics, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, &mode) &&
            (!described ||
             set_one(dnn, heuristics, CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, CUDNN_TYPE_BACKEND_DESCRIPTOR, &device)) &&
            dnn->finalize(heuristics) == CUDNN_STATUS_SUCCESS;
  int made = 0;
  while (ok && made < MAX_CONFIGS && (configs[made] = new_desc(dnn, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR))) made++;
  if (ok && dnn->get(heuristics, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, made, &got, configs) !=
                CUDNN_STATUS_SUCCESS)
    got = 0;
  if (got > made) got = made;
  for (int i = (int)got; i < made; i++) dnn->unmake(configs[i]);
  dnn->unmake(heuristics);
  return got;
}

/* On Blackwell the heuristics do not offer the deterministic backward: it is one engine with two knobs, as NVIDIA's
 * frontend names them for cuDNN 9.18 to 9.22. Returns 1 with the configuration, or 0. */
static int64_t deterministic_blackwell(const esp_cudnn *dnn, cudnnBackendDescriptor_t device, bool described, int cc,
                                       cudnnBackendDescriptor_t graph, cudnnBackendDescriptor_t *config) {
  static const struct {
    cudnnBackendKnobType_t type;
    int64_t value;
  } knobs[] = {{CUDNN_KNOB_TYPE_KERNEL_CFG, 31}, {CUDNN_KNOB_TYPE_STAGES, 2}};
  enum { KNOBS = sizeof knobs / sizeof *knobs };
  cudnnBackendDescriptor_t choices[KNOBS] = {NULL};
  int64_t index = cc > 103 ? 17 : 5;
  bool ok = true;
  cudnnBackendDescriptor_t engine = new_desc(dnn, CUDNN_BACKEND_ENGINE_DESCRIPTOR);
  *config = new_desc(dnn, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
  ok = engine && *config &&
       set_one(dnn, engine, CUDNN_ATTR_ENGINE_OPERATION_GRAPH, CUDNN_TYPE_BACKEND_DESCRIPTOR, &graph) &&
       set_one(dnn, engine, CUDNN_ATTR_ENGINE_GLOBAL_INDEX, CUDNN_TYPE_INT64, &index) &&
       (!described || set_one(dnn, engine, CUDNN_ATTR_ENGINE_DEVICEPROP, CUDNN_TYPE_BACKEND_DESCRIPTOR, &device)) &&
       dnn->finalize(engine) == CUDNN_STATUS_SUCCESS &&
       set_one(dnn, *config, CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, &engine);
  for (int i = 0; ok && i < KNOBS; i++) {
    choices[i] = new_desc(dnn, CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR);
    ok = choices[i] &&
         set_one(dnn, choices[i], CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE, CUDNN_TYPE_KNOB_TYPE, &knobs[i].type) &&
         set_one(dnn, choices[i], CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE, CUDNN_TYPE_INT64, &knobs[i].value) &&
         dnn->finalize(choices[i]) == CUDNN_STATUS_SUCCESS;
  }
  ok = ok &&
       dnn->set(*config, CUDNN_ATTR_ENGINECFG_KNOB_CHOICES, CUDNN_TYPE_BACKEND_DESCRIPTOR, KNOBS, choices) ==
           CUDNN_STATUS_SUCCESS &&
       dnn->finalize(*config) == CUDNN_STATUS_SUCCESS;
  for (int i = 0; i < KNOBS; i++)
    if (choices[i]) dnn->unmake(choices[i]);
  if (engine) dnn->unmake(engine);
  if (!ok && *config) dnn->unmake(*config);
  return ok ? 1 : 0;
}

static bool workspace_of(const esp_cudnn *dnn, cudnnBackendDescriptor_t plan, int64_t *bytes) {
  int64_t n = 0;
  return dnn->get(plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &n, bytes) ==
             CUDNN_STATUS_SUCCESS &&
         n == 1 && *bytes >= 0;
}

esp_status esp_sdpa_plan_make(const esp_cudnn *dnn, cudnnHandle_t handle, cudnnBackendDescriptor_t device, int cc,
                              const esp_sdpa_shape *s, esp_sdpa_plan *out) {
  *out = (esp_sdpa_plan){0};
  ESP_TRY(esp_sdpa_build(dnn, s, handle, &out->graph));
  cudnnBackendDescriptor_t configs[MAX_CONFIGS];
  int64_t n = s->backward && !s->atomic && cc >= 100
                  ? deterministic_blackwell(dnn, device, !handle, cc, out->graph.opgraph, configs)
                  : offered(dnn, device, !handle, out->graph.opgraph, configs);
  for (int64_t i = 0; i < n && !out->plan; i++) out->plan = plan_of(dnn, handle, device, configs[i]);
  /* The message is that of the last attempt. */
  esp_status st = out->plan ? ESP_OK : refused(dnn, n ? "no engine takes the shape" : "no engine is offered");
  for (int64_t i = 0; i < n; i++) dnn->unmake(configs[i]);
  if (st == ESP_OK && !workspace_of(dnn, out->plan, &out->workspace)) st = refused(dnn, "workspace");
  if (st != ESP_OK) esp_sdpa_plan_free(dnn, out);
  return st;
}

void esp_sdpa_plan_free(const esp_cudnn *dnn, esp_sdpa_plan *p) {
  if (p->plan) dnn->unmake(p->plan);
  esp_sdpa_graph_free(dnn, &p->graph);
  *p = (esp_sdpa_plan){0};
}
