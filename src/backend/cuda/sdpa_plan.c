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

static esp_status refused(const esp_cudnn *dnn, const char *what, char *why, size_t room) {
  char text[160] = "";
  dnn->last_error(text, sizeof text);
  for (char *p = text; *p; p++)
    if (*p == '\n') *p = ' ';
  snprintf(why, room, "plan: %s: %s", what, text[0] ? text : "no reason given");
  return ESP_ERR_DEVICE;
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
  esp_status built = esp_sdpa_build(dnn, s, handle, &out->graph);
  if (built != ESP_OK) return built;
  cudnnBackendDescriptor_t configs[MAX_CONFIGS];
  int64_t n = s->backward && !s->atomic && cc >= 100
                  ? deterministic_blackwell(dnn, device, !handle, cc, out->graph.opgraph, configs)
                  : offered(dnn, device, !handle, out->graph.opgraph, configs);
  for (int64_t i = 0; i < n && !out->plan; i++) out->plan = plan_of(dnn, handle, device, configs[i]);
  char why[sizeof out->graph.why] = "";
  esp_status st = ESP_OK; /* the reason is that of the last attempt */
  if (!out->plan) st = refused(dnn, n ? "no engine takes the shape" : "no engine is offered", why, sizeof why);
  for (int64_t i = 0; i < n; i++) dnn->unmake(configs[i]);
  if (st == ESP_OK && !workspace_of(dnn, out->plan, &out->workspace))
    st = refused(dnn, "size of the workspace", why, sizeof why);
  if (st == ESP_OK) return ESP_OK;
  esp_sdpa_plan_free(dnn, out);
  memcpy(out->graph.why, why, sizeof why);
  return st;
}

void esp_sdpa_plan_free(const esp_cudnn *dnn, esp_sdpa_plan *p) {
  if (p->plan) dnn->unmake(p->plan);
  esp_sdpa_graph_free(dnn, &p->graph);
  *p = (esp_sdpa_plan){0};
}

/* ---- plans on disk ---- */

/* A saved plan is one line that names the shape, the length and a hash of the rest, then cuDNN's own text (its compiled
 * kernels among it). Reading one takes a millisecond where compiling takes a second. A line that does not fit in every
 * letter (another shape, a file cut short, another format) is a file that is not there, and is replaced. */

static uint64_t fnv1a(const void *data, size_t n) {
  const unsigned char *p = data;
  uint64_t h = 0xcbf29ce484222325u;
  for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * 0x100000001b3u;
  return h;
}

enum { HEADER_BYTES = 512, MAX_PLAN_BYTES = 16 << 20 };

static int header_of(char *out, size_t room, const esp_sdpa_shape *s, const char *body, size_t n) {
  int64_t fields[sizeof *s / sizeof(int64_t)];
  memcpy(fields, s, sizeof fields);
  int used = snprintf(out, room, "espalier-sdpa 1 shape");
  for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
    used += snprintf(out + used, room - (size_t)used, " %" PRId64, fields[i]);
  used += snprintf(out + used, room - (size_t)used, " bytes %zu hash %016" PRIx64 "\n", n, fnv1a(body, n));
  return used;
}

struct esp_sdpa_plans {
  const esp_cudnn *dnn;
  bool tried; /* to open the library */
  cudnnHandle_t handle;
  cudaStream_t stream;
  int cc;
  char gpu[96];
  char folder[PATH_MAX]; /* of saved plans; "": none */
  struct entry {
    esp_sdpa_shape shape;
    uint64_t hash;
    bool refused;
    esp_sdpa_plan plan;
  } * *entries;
  int n, cap;
  esp_sdpa_facts facts;
};

/* The folder must be ours to make; without one plans are compiled in every run. */
static void find_folder(esp_sdpa_plans *p) {
  const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
  char gpu[sizeof p->gpu];
  size_t i = 0;
  for (; p->gpu[i] && i + 1 < sizeof gpu; i++) {
    char c = p->gpu[i];
    bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    gpu[i] = plain ? c : '-';
  }
  gpu[i] = 0;
  int n = 0;
  if (cache && cache[0] == '/')
    n = snprintf(p->folder, sizeof p->folder, "%s/espalier/sdpa-%s-%" PRId64, cache, gpu, p->facts.version);
  else if (home && home[0] == '/')
    n = snprintf(p->folder, sizeof p->folder, "%s/.cache/espalier/sdpa-%s-%" PRId64, home, gpu, p->facts.version);
  if (n <= 0 || n >= (int)sizeof p->folder - 64) {
    p->folder[0] = 0;
    return;
  }
  for (char *at = p->folder + 1;; at++) {
    if (*at != '/' && *at) continue;
    char kept = *at;
    *at = 0;
    bool made = mkdir(p->folder, 0777) == 0 || errno == EEXIST;
    *at = kept;
    if (!made) p->folder[0] = 0;
    if (!made || !kept) return;
  }
}

static bool path_of(const esp_sdpa_plans *p, uint64_t hash, char *out, size_t room) {
  int n = p->folder[0] ? snprintf(out, room, "%s/%016" PRIx64 ".json", p->folder, hash) : 0;
  return n > 0 && (size_t)n < room;
}

static char *read_all(const char *path, size_t *size) {
  FILE *f = fopen(path, "rbe");
  if (!f) return NULL;
  char *text = NULL;
  long n = fseek(f, 0, SEEK_END) == 0 ? ftell(f) : -1;
  if (n > 0 && n <= MAX_PLAN_BYTES && fseek(f, 0, SEEK_SET) == 0 && (text = malloc((size_t)n + 1))) {
    if (fread(text, 1, (size_t)n, f) == (size_t)n) {
      text[n] = 0;
    } else {
      free(text);
      text = NULL;
    }
  }
  fclose(f);
  *size = (size_t)n;
  return text;
}

/* True with a plan when a good file is there. */
static bool load_plan(esp_sdpa_plans *p, struct entry *e) {
  char path[PATH_MAX], expected[HEADER_BYTES];
  size_t size = 0;
  char *text = path_of(p, e->hash, path, sizeof path) ? read_all(path, &size) : NULL;
  char *line_end = text ? memchr(text, '\n', size) : NULL;
  bool ok = false;
  if (line_end) {
    char *body = line_end + 1;
    size_t n = size - (size_t)(body - text);
    int header = header_of(expected, sizeof expected, &e->shape, body, n);
    cudnnBackendDescriptor_t plan = NULL;
    ok = header == (int)(body - text) && memcmp(text, expected, (size_t)header) == 0 &&
         (plan = new_desc(p->dnn, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)) &&
         set_one(p->dnn, plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, &p->handle) &&
         p->dnn->set(plan, CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, (int64_t)n, body) ==
             CUDNN_STATUS_SUCCESS &&
         p->dnn->finalize(plan) == CUDNN_STATUS_SUCCESS && workspace_of(p->dnn, plan, &e->plan.workspace);
    if (ok)
      e->plan.plan = plan;
    else if (plan)
      p->dnn->unmake(plan);
  }
  free(text);
  return ok;
}

/* Through a temporary file, so that another process never reads half a plan. What fails here costs a second in the
 * next run and nothing else. */
static void save_plan(const esp_sdpa_plans *p, const struct entry *e) {
  char path[PATH_MAX], temporary[PATH_MAX + 32], header[HEADER_BYTES];
  int64_t n = 0, got = 0;
  if (!path_of(p, e->hash, path, sizeof path) ||
      p->dnn->get(e->plan.plan, CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, 0, &n, NULL) !=
          CUDNN_STATUS_SUCCESS ||
      n <= 0 || n > MAX_PLAN_BYTES)
    return;
  char *text = calloc(1, (size_t)n + 1);
  if (!text) return;
  snprintf(temporary, sizeof temporary, "%s.%ld", path, (long)getpid());
  FILE *f = NULL;
  if (p->dnn->get(e->plan.plan, CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, n, &got, text) ==
          CUDNN_STATUS_SUCCESS &&
      got > 0 && got <= n && (f = fopen(temporary, "wbe"))) {
    int header_bytes = header_of(header, sizeof header, &e->shape, text, (size_t)got);
    bool ok = fwrite(header, 1, (size_t)header_bytes, f) == (size_t)header_bytes &&
              fwrite(text, 1, (size_t)got, f) == (size_t)got;
    ok = fclose(f) == 0 && ok;
    if (!ok || rename(temporary, path) != 0) unlink(temporary);
  }
  free(text);
}

/* ---- plans in memory ---- */

esp_status esp_sdpa_plans_open(cudaStream_t stream, const char *gpu, int cc, esp_sdpa_plans **out) {
  *out = calloc(1, sizeof **out);
  if (!*out) return esp_fail(ESP_ERR_MEMORY, "cuda: out of host memory");
  (*out)->stream = stream;
  (*out)->cc = cc;
  snprintf((*out)->gpu, sizeof(*out)->gpu, "%s", gpu);
  return ESP_OK;
}

void esp_sdpa_plans_close(esp_sdpa_plans *p) {
  if (!p) return;
  for (int i = 0; i < p->n; i++) {
    esp_sdpa_plan_free(p->dnn, &p->entries[i]->plan);
    free(p->entries[i]);
  }
  free(p->entries);
  if (p->handle) p->dnn->destroy(p->handle);
  free(p);
}

/* Versions before 9.11 have faults in packed attention (their release notes; 9.10.0 and 9.10.1 are the worst). */
enum { OLDEST = 91100 };

static void open_once(esp_sdpa_plans *p) {
  if (p->tried) return;
  p->tried = true;
  p->dnn = esp_cudnn_open(p->facts.why, sizeof p->facts.why);
  if (!p->dnn) return;
  p->facts.version = (int64_t)p->dnn->version();
  cudnnStatus_t st = CUDNN_STATUS_SUCCESS;
  if (p->facts.version < OLDEST || p->facts.version / 10000 != CUDNN_MAJOR)
    snprintf(p->facts.why, sizeof p->facts.why, "cuDNN %" PRId64 " is not used: 9.11 or a later 9 is needed",
             p->facts.version);
  else if ((st = p->dnn->create(&p->handle)) != CUDNN_STATUS_SUCCESS ||
           (st = p->dnn->set_stream(p->handle, p->stream)) != CUDNN_STATUS_SUCCESS)
    snprintf(p->facts.why, sizeof p->facts.why, "cuDNN cannot be started: %s", p->dnn->status_text(st));
  if (p->facts.why[0] && p->handle) {
    p->dnn->destroy(p->handle);
    p->handle = NULL;
  }
  if (p->handle) find_folder(p);
}

bool esp_sdpa_plans_usable(esp_sdpa_plans *p, bool backward) {
  open_once(p);
  if (!p->handle) return false;
  /* The deterministic backward of packed sequences exists for Hopper, and since 9.18 for Blackwell of data centres. */
  if (backward) return p->cc / 10 == 9 || (p->cc >= 100 && p->cc < 120 && p->facts.version >= 91800);
  return true;
}

static struct entry *entry_of(esp_sdpa_plans *p, const esp_sdpa_shape *s, bool *is_new) {
  uint64_t hash = fnv1a(s, sizeof *s);
  *is_new = false;
  for (int i = 0; i < p->n; i++)
    if (p->entries[i]->hash == hash && memcmp(&p->entries[i]->shape, s, sizeof *s) == 0) return p->entries[i];
  if (p->n == p->cap) {
    int cap = p->cap ? 2 * p->cap : 64;
    struct entry **list = realloc(p->entries, (size_t)cap * sizeof *list);
    if (!list) return NULL;
    p->entries = list;
    p->cap = cap;
  }
  struct entry *e = calloc(1, sizeof *e);
  if (!e) return NULL;
  e->shape = *s;
  e->hash = hash;
  *is_new = true;
  return p->entries[p->n++] = e;
}

const esp_sdpa_plan *esp_sdpa_plans_get(esp_sdpa_plans *p, const esp_sdpa_shape *s, int64_t max_workspace) {
  bool is_new;
  open_once(p);
  struct entry *e = p->handle ? entry_of(p, s, &is_new) : NULL;
  if (!e) return NULL;
  if (is_new) {
    if (load_plan(p, e)) {
      p->facts.loaded++;
    } else if (esp_sdpa_plan_make(p->dnn, p->handle, NULL, p->cc, s, &e->plan) == ESP_OK) {
      p->facts.made++;
      save_plan(p, e);
    } else {
      e->refused = true;
      p->facts.refused++;
      memcpy(p->facts.why, e->plan.graph.why, sizeof p->facts.why);
    }
  }
  return e->refused || e->plan.workspace > max_workspace ? NULL : &e->plan;
}

void esp_sdpa_plans_facts(const esp_sdpa_plans *p, esp_sdpa_facts *out) {
  *out = p->facts;
}

/* ---- execution ---- */

esp_status esp_sdpa_run(esp_sdpa_plans *p, const esp_sdpa_plan *plan, const esp_sdpa_binding *binding,
                        void *workspace) {
  cudnnBackendDescriptor_t variants = new_desc(p->dnn, CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
  if (!variants) return esp_fail(ESP_ERR_DEVICE, "cuda: cuDNN: attention: variant pack");
  cudnnStatus_t st =
      p->dnn->set(variants, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, binding->n, binding->uid);
  if (st == CUDNN_STATUS_SUCCESS)
    st =
        p->dnn->set(variants, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, binding->n, binding->pointer);
  if (st == CUDNN_STATUS_SUCCESS)
    st = p->dnn->set(variants, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
  if (st == CUDNN_STATUS_SUCCESS) st = p->dnn->finalize(variants);
  if (st == CUDNN_STATUS_SUCCESS) st = p->dnn->execute(p->handle, plan->plan, variants);
  char text[256] = "";
  if (st != CUDNN_STATUS_SUCCESS) p->dnn->last_error(text, sizeof text);
  p->dnn->unmake(variants);
  if (st == CUDNN_STATUS_SUCCESS) return ESP_OK;
  return esp_fail(ESP_ERR_DEVICE, "cuda: cuDNN: attention: %s: %s", p->dnn->status_text(st), text);
}
