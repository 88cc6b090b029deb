/* backend.c: the registry of backends. A new one is one line in the table. */
#include "backend/backend.h"

#include <string.h>

static const struct {
  const char *name;
  esp_status (*create)(esp_backend **out);
} backends[] = {
    {"cpu", esp_cpu_backend_create},
    {"count", esp_count_backend_create},
};

esp_status esp_backend_create(const char *name, esp_backend **out) {
  *out = NULL;
  for (size_t i = 0; i < sizeof backends / sizeof *backends; i++)
    if (!strcmp(name, backends[i].name)) return backends[i].create(out);
  return esp_fail(ESP_ERR_DEVICE, "unknown backend '%s' (this build has: cpu, count)", name);
}

void esp_backend_destroy(esp_backend *be) {
  if (be) be->ops->destroy(be);
}
