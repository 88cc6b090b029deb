/* backend.c: the registry of backends. A new one is one line in the table. */
#include "backend/backend.h"

#include <string.h>

#include "backend/plugin.h"

static esp_status count_cpu(const char *name, esp_backend **out) {
  (void)name;
  return esp_count_backend_create(false, out);
}
static esp_status count_cuda(const char *name, esp_backend **out) {
  (void)name;
  return esp_count_backend_create(true, out);
}
static esp_status cpu(const char *name, esp_backend **out) {
  (void)name;
  return esp_cpu_backend_create(out);
}

static const struct {
  const char *name;
  bool numbered; /* name:N names one of several */
  esp_status (*create)(const char *name, esp_backend **out);
} backends[] = {
    {"cpu", false, cpu},
    {"count", false, count_cpu},
    {"count:cuda", true, count_cuda},
    {"cuda", true, esp_plugin_backend},
};

esp_status esp_backend_create(const char *name, esp_backend **out) {
  *out = NULL;
  for (size_t i = 0; i < sizeof backends / sizeof *backends; i++) {
    size_t n = strlen(backends[i].name);
    if (strncmp(name, backends[i].name, n)) continue;
    if (!name[n] || (backends[i].numbered && name[n] == ':')) return backends[i].create(name, out);
  }
  return esp_fail(ESP_ERR_DEVICE, "unknown device '%s' (cpu, cuda, cuda:N, auto)", name);
}

void esp_backend_destroy(esp_backend *be) {
  if (be) be->ops->destroy(be);
}
