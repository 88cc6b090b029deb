#include "train/background.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

struct esp_background {
  esp_backend *be;
  float *values; /* page-locked: the masters, then each state, as the store lays them out */
  int64_t bytes;
  const esp_engine *engine;
  esp_run_state state;
  const esp_task_steps *tasks;
  esp_matrix *matrix; /* a copy of its own */
  pthread_t thread;
  bool running;
  atomic_bool done;
  esp_status st;
  char path[ESP_PATH], why[1024]; /* the thread's message: messages belong to threads */
};

int64_t esp_background_bytes(const esp_engine *e) {
  /* A kind that changes its parameters between steps changes the list that the thread walks. */
  if (e->be->on_host || !e->optim || e->adapter->kind->after_step || e->adapter->kind->n_states || e->strategies.n > 0)
    return 0;
  return e->adapter->params->total * (1 + e->optim->kind->n_states) * (int64_t)sizeof(float);
}

static void *write_it(void *ctx) {
  esp_background *b = ctx;
  b->st = esp_checkpoint_write(b->engine, &b->state, b->tasks, b->matrix, b->values, b->path);
  snprintf(b->why, sizeof b->why, "%s", b->st == ESP_OK ? "" : esp_error_message());
  atomic_store(&b->done, true);
  return NULL;
}

static esp_status copy_matrix(esp_background *b, const esp_matrix *m) {
  esp_matrix_destroy(b->matrix);
  b->matrix = NULL;
  if (!m) return ESP_OK;
  ESP_TRY(esp_matrix_like(m, &b->matrix));
  esp_matrix_copy_cells(b->matrix, m);
  return ESP_OK;
}

esp_status esp_background_start(esp_background **at, const esp_engine *e, const esp_run_state *s,
                                const esp_task_steps *tasks, const esp_matrix *matrix) {
  esp_background *b = *at;
  esp_backend *be = e->be;
  const esp_params *ps = e->adapter->params;
  int64_t bytes = esp_background_bytes(e), each = ps->total * (int64_t)sizeof(float);
  if (!b) {
    *at = b = esp_mem_alloc(ESP_MEM_HOST, sizeof *b);
    if (!b) return ESP_ERR_MEMORY;
    b->be = be;
  }
  if (b->bytes < bytes) {
    if (b->values) be->ops->host_free(be, b->values);
    b->bytes = 0;
    b->values = be->ops->host_alloc(be, bytes);
    if (!b->values) return be->sticky ? be->sticky : ESP_ERR_MEMORY;
    b->bytes = bytes;
  }
  be->ops->download_later(be, b->values, ps->master, each);
  for (int i = 0; i < e->optim->kind->n_states; i++)
    be->ops->download_later(be, b->values + (1 + i) * ps->total, e->optim->state[i], each);
  ESP_TRY(esp_backend_sync(be));
  ESP_TRY(copy_matrix(b, matrix));
  b->engine = e;
  b->state = *s;
  b->tasks = tasks;
  atomic_store(&b->done, false);
  if (pthread_create(&b->thread, NULL, write_it, b) != 0)
    return esp_fail(ESP_ERR_MEMORY, "no thread for writing a checkpoint");
  b->running = true;
  return ESP_OK;
}

bool esp_background_done(const esp_background *b) {
  return b && b->running && atomic_load(&b->done);
}

esp_status esp_background_join(esp_background *b, char path[ESP_PATH]) {
  path[0] = '\0';
  if (!b || !b->running) return ESP_OK;
  pthread_join(b->thread, NULL);
  b->running = false;
  if (b->st != ESP_OK) return esp_fail(b->st, "%s", b->why);
  memcpy(path, b->path, ESP_PATH);
  return ESP_OK;
}

void esp_background_destroy(esp_background *b) {
  char path[ESP_PATH];
  if (!b) return;
  (void)esp_background_join(b, path);
  if (b->values) b->be->ops->host_free(b->be, b->values);
  esp_matrix_destroy(b->matrix);
  esp_mem_free(b);
}
