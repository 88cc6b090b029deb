/* model.c: opening and closing a model, and the accessors of the rooms above. */
#include <string.h>

#include "io/file.h"
#include "model/internal.h"

static esp_status fingerprint(esp_model *m) {
  char path[4096], *text = NULL;
  size_t n = 0;
  ESP_TRY(esp_file_read(esp_path_join(path, sizeof path, m->dir, "config.json"), &text, &n));
  char both[66];
  esp_hash_hex(text, n, both);
  esp_mem_free(text);
  if (m->st)
    esp_st_header_hash(m->st, both + 32);
  else
    esp_hash_hex(&m->opt.seed, sizeof m->opt.seed, both + 32);
  esp_hash_hex(both, 64, m->fingerprint);
  return ESP_OK;
}

esp_status esp_model_open(const char *dir, esp_backend *be, const esp_model_options *opt, esp_model **out) {
  esp_status st = ESP_OK;
  *out = NULL;
  esp_model *m = esp_mem_alloc(ESP_MEM_HOST, sizeof *m);
  if (!m) return ESP_ERR_MEMORY;
  m->be = be;
  m->opt = *opt;
  m->arena = esp_arena_create(ESP_MEM_HOST);
  m->dir = m->arena ? esp_arena_strdup(m->arena, dir) : NULL;
  if (!m->dir) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  if (opt->compute != ESP_F32 && opt->compute != ESP_BF16) {
    st = esp_fail(ESP_ERR_RECIPE, "%s: the compute type must be bf16 or fp32", dir);
    goto out;
  }
  ESP_GOTO(esp_model_desc_load(dir, &m->d));
  if (!opt->random_init) ESP_GOTO(esp_st_open(dir, &m->st));
  ESP_GOTO(esp_sites_build(m));
  ESP_GOTO(esp_weights_bind(m));
  ESP_GOTO(fingerprint(m));
  *out = m;
out:
  if (st != ESP_OK) esp_model_close(m);
  return st;
}

void esp_model_close(esp_model *m) {
  if (!m) return;
  esp_weights_release(m);
  esp_work_release(m);
  if (m->cos_t) m->be->ops->free(m->be, m->cos_t);
  if (m->sin_t) m->be->ops->free(m->be, m->sin_t);
  esp_map_destroy(m->by_path);
  esp_st_close(m->st);
  esp_arena_destroy(m->arena);
  esp_mem_free(m);
}

const esp_model_desc *esp_model_describe(const esp_model *m) {
  return &m->d;
}
esp_backend *esp_model_backend(const esp_model *m) {
  return m->be;
}
esp_dtype esp_model_compute(const esp_model *m) {
  return m->opt.compute;
}
int esp_model_sites(const esp_model *m, esp_site ***sites) {
  *sites = m->sites;
  return m->n_sites;
}
int esp_model_groups(const esp_model *m, esp_group ***groups) {
  *groups = m->groups;
  return m->n_groups;
}
esp_site *esp_model_find_site(const esp_model *m, const char *path) {
  return esp_map_get(m->by_path, path, strlen(path));
}
esp_site *esp_model_embedding(const esp_model *m) {
  return m->embed;
}
const char *esp_model_dir(const esp_model *m) {
  return m->dir;
}
const char *esp_model_fingerprint(const esp_model *m) {
  return m->fingerprint;
}
void esp_model_set_hooks(esp_model *m, const esp_adapter_hooks *hooks) {
  m->hooks = hooks;
}
void esp_model_set_look(esp_model *m, esp_model_look look, void *ctx) {
  m->look = look;
  m->look_ctx = ctx;
}
const esp_adapter_hooks *esp_model_hooks(const esp_model *m) {
  return m->hooks;
}
