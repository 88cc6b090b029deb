/* comm.c: the registry of communicators and what is written once over them. */
#include "dist/comm.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define MAX_RANKS_ON_STACK 64

/* Were we started by mpirun, srun or another PMI launcher? Open MPI, MPICH and PMIx name the process this way. */
static int launched(void) {
  return getenv("OMPI_COMM_WORLD_SIZE") || getenv("PMI_SIZE") || getenv("PMIX_RANK");
}

esp_status esp_comm_create(const char *name, esp_comm **out) {
  *out = NULL;
  bool any = !name || !strcmp(name, "auto");
  if (any ? !launched() : !strcmp(name, "self")) return esp_comm_self_create(out);
#ifdef ESP_HAVE_MPI
  if (any || !strcmp(name, "mpi")) return esp_comm_mpi_create(out);
#else
  if (any)
    return esp_fail(ESP_ERR_DEVICE, "started by an MPI launcher, but this build has no MPI (parallel.comm: self runs "
                                    "every rank on its own)");
  if (!strcmp(name, "mpi")) return esp_fail(ESP_ERR_DEVICE, "parallel.comm is mpi, but this build has no MPI");
#endif
  return esp_fail(ESP_ERR_RECIPE, "parallel.comm: unknown communicator '%s' (auto, self or mpi)", name);
}

int64_t esp_comm_workspace(int size, int64_t n) {
  int64_t segment = (n + size - 1) / size;
  if (segment > ESP_COMM_SEGMENT) segment = ESP_COMM_SEGMENT;
  return 2 * segment * size * (int64_t)sizeof(float);
}

void esp_comm_destroy(esp_comm *c) {
  if (c) c->ops->destroy(c);
}

esp_status esp_comm_agree(esp_comm *c, esp_status mine) {
  if (c->size == 1) return mine;
  int32_t here = (int32_t)mine, few[MAX_RANKS_ON_STACK], *all = few;
  if (c->size > MAX_RANKS_ON_STACK) {
    all = malloc((size_t)c->size * sizeof *all);
    if (!all) c->ops->abort(c, ESP_ERR_MEMORY); /* the others wait in the collective: there is no other way out */
  }
  esp_status st = c->ops->all_gather(c, &here, all, sizeof here);
  int worst = 0;
  for (int r = 0; st == ESP_OK && r < c->size; r++)
    if (all[r] != ESP_OK && (all[worst] == ESP_OK)) worst = r; /* the first that failed: the same on all ranks */
  if (st == ESP_OK) {
    st = (esp_status)all[worst];
    if (st != ESP_OK && mine == ESP_OK) esp_fail(st, "rank %d of %d failed", worst, c->size);
  }
  if (all != few) free(all);
  return st;
}

esp_status esp_comm_reduce(esp_comm *c, esp_backend *be, float *buf, int64_t n) {
  if (c->size == 1) return ESP_OK;
  if (be->on_host) return c->ops->all_reduce_f32(c, buf, n);
  if (c->ops->all_reduce_device) return c->ops->all_reduce_device(c, buf, n);
  float *host = be->ops->host_alloc(be, n * (int64_t)sizeof *host);
  if (!host) return ESP_ERR_MEMORY;
  be->ops->download(be, host, buf, n * (int64_t)sizeof *host);
  esp_status st = c->ops->all_reduce_f32(c, host, n);
  if (st == ESP_OK) be->ops->upload(be, buf, host, n * (int64_t)sizeof *host);
  be->ops->host_free(be, host);
  return st;
}
