/* plugin.c: opens the CUDA plug-in at run time. One copy per process, opened when a device is first asked for and never
 * closed: libraries of a driver do not survive that. */
#include "backend/plugin.h"

#include <ctype.h>
#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FILE_NAME "libespalier-cuda.so"

static void host_account(esp_mem_kind kind, int64_t delta, bool device) {
  if (device)
    esp_mem_account_device(kind, delta);
  else
    esp_mem_account(kind, delta);
}
static esp_status host_vfail(esp_status status, const char *fmt, va_list args) {
  char text[1024];
  vsnprintf(text, sizeof text, fmt, args);
  return esp_fail(status, "%s", text);
}
static const esp_plugin_host host = {ESP_PLUGIN_ABI, host_vfail, host_account, esp_mem_kind_name};

static pthread_once_t once = PTHREAD_ONCE_INIT;
static const esp_plugin *plugin;
static char why[512]; /* it cannot be used */

static void *try_open(const char *path) {
  void *so = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!so) {
    const char *text = dlerror();
    snprintf(why, sizeof why, "%.500s", text ? text : path);
  }
  return so;
}

/* Beside the program (a build tree), in ../lib/espalier (an installation), else where the loader looks. */
static void *find(void) {
  const char *named = getenv("ESPALIER_CUDA_PLUGIN");
  if (named && *named) return try_open(named);
  char exe[PATH_MAX], path[PATH_MAX + 64];
  ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
  if (n > 0) {
    static const char *const beside[] = {"/", "/../lib/", "/../lib/espalier/", "/../"};
    exe[n] = '\0';
    *strrchr(exe, '/') = '\0';
    for (size_t i = 0; i < sizeof beside / sizeof *beside; i++) {
      snprintf(path, sizeof path, "%s%s" FILE_NAME, exe, beside[i]);
      if (access(path, R_OK) == 0) return try_open(path); /* its own error is the one to report */
    }
  }
  void *so = try_open(FILE_NAME);
  if (!so && strstr(why, FILE_NAME) && strstr(why, "No such file"))
    snprintf(why, sizeof why, "this installation has no " FILE_NAME " (built without CUDA)");
  return so;
}

static void load(void) {
  void *so = find();
  if (!so) return;
  esp_plugin_open_fn open_fn;
  void *symbol = dlsym(so, ESP_PLUGIN_SYMBOL);
  memcpy(&open_fn, &symbol, sizeof open_fn);
  if (symbol) plugin = open_fn(&host);
  if (!symbol || !plugin || plugin->abi != ESP_PLUGIN_ABI) {
    plugin = NULL;
    snprintf(why, sizeof why, FILE_NAME " belongs to another version of espalier");
  }
}

esp_status esp_plugin_load(const esp_plugin **out) {
  pthread_once(&once, load);
  *out = plugin;
  return plugin ? ESP_OK : esp_fail(ESP_ERR_DEVICE, "cuda: %s", why);
}

/* The rank's number on its machine, as mpirun and srun tell it. */
static int local_rank(void) {
  static const char *const names[] = {"OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    const char *v = getenv(names[i]);
    if (v && isdigit((unsigned char)*v)) return atoi(v);
  }
  return 0;
}

esp_status esp_plugin_backend(const char *name, esp_backend **out) {
  const esp_plugin *p;
  esp_plugin_probe probe = {0};
  int device;
  *out = NULL;
  ESP_TRY(esp_plugin_load(&p));
  p->probe(&probe);
  if (probe.why_not[0]) return esp_fail(ESP_ERR_DEVICE, "cuda: %s", probe.why_not);
  if (strlen(name) > 5) {
    char *end;
    long n = strtol(name + 5, &end, 10);
    if (end == name + 5 || *end) return esp_fail(ESP_ERR_DEVICE, "device '%s': cuda:N with N a number", name);
    if (n < 0 || n >= probe.n_devices)
      return esp_fail(ESP_ERR_DEVICE, "device '%s': this machine has %d (cuda:0%s)", name, probe.n_devices,
                      probe.n_devices > 1 ? " and on" : "");
    device = (int)n;
  } else {
    device = local_rank() % probe.n_devices;
  }
  return p->create(device, out);
}

/* Half a gigabyte of libraries is not opened to learn that there is no driver. */
static bool driver_here(void) {
  const char *named = getenv("ESPALIER_CUDA_PLUGIN");
  void *so = named && *named ? NULL : dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  return so || (named && *named);
}

const char *esp_device_auto(char *text, size_t size) {
  esp_plugin_probe probe = {0};
  if (!driver_here()) {
    if (text) snprintf(text, size, "no NVIDIA driver on this machine");
    return "cpu";
  }
  pthread_once(&once, load);
  if (plugin) plugin->probe(&probe);
  if (text) snprintf(text, size, "%s", plugin ? probe.why_not : why);
  return plugin && !probe.why_not[0] ? "cuda" : "cpu";
}
