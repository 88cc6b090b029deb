/* state.c: what strategies remember, into the two files of a checkpoint and back. */
#include <stdio.h>
#include <string.h>

#include "io/json.h"
#include "io/safetensors.h"
#include "tasks/internal.h"

static void full_name(const esp_strategy *s, const esp_strategy_value *v, char out[192]) {
  snprintf(out, 192, "%s.%s", s->kind->name, v->name);
}

static esp_status put(const esp_strategy *s, const esp_strategy_value *v, esp_st_writer *w) {
  char name[192];
  full_name(s, v, name);
  int64_t bytes = v->n * (int64_t)esp_dtype_size(v->dtype);
  if (v->host || esp_backend_on_host(s->be)) return esp_st_writer_put(w, name, v->data, bytes);
  void *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)bytes);
  if (!host) return ESP_ERR_MEMORY;
  s->be->ops->download(s->be, host, v->data, bytes);
  esp_status st = esp_backend_sync(s->be);
  if (st == ESP_OK) st = esp_st_writer_put(w, name, host, bytes);
  esp_mem_free(host);
  return st;
}

static esp_status save_tensors(const esp_strategies *set, const char *path) {
  esp_st_writer *w = NULL;
  char name[192];
  esp_status st = esp_st_writer_create(path, &w);
  for (int i = 0; st == ESP_OK && i < set->n; i++)
    for (int k = 0; st == ESP_OK && k < set->list[i].n_values; k++) {
      const esp_strategy_value *v = &set->list[i].values[k];
      full_name(&set->list[i], v, name);
      st = esp_st_writer_declare(w, name, v->dtype, 1, &v->n);
    }
  for (int i = 0; st == ESP_OK && i < set->n; i++)
    for (int k = 0; st == ESP_OK && k < set->list[i].n_values; k++) st = put(&set->list[i], &set->list[i].values[k], w);
  if (st == ESP_OK) return esp_st_writer_commit(w);
  esp_st_writer_abort(w);
  return st;
}

esp_status esp_strategies_save(const esp_strategies *set, const char *tensors, const char *json) {
  if (set->n == 0) return ESP_OK;
  ESP_TRY(save_tensors(set, tensors));
  json_t *j = json_object();
  for (int i = 0; j && i < set->n; i++) {
    const esp_strategy *s = &set->list[i];
    json_t *own = json_object(), *arrays = json_array();
    if (s->kind->state_write) s->kind->state_write(s, own);
    for (int k = 0; k < s->n_values; k++)
      json_array_append_new(arrays, json_pack("{s:s,s:b}", "name", s->values[k].name, "host", s->values[k].host));
    json_object_set_new(j, s->kind->name, json_pack("{s:o,s:o}", "state", own, "arrays", arrays));
  }
  if (!j) return esp_fail_oom("the state of strategies", 1024);
  esp_status st = esp_json_save(json, j, 0);
  json_decref(j);
  return st;
}

static esp_status load_array(esp_strategy *s, const esp_st *f, const json_t *entry, const char *path) {
  const char *name = NULL;
  char full[192];
  int host = 0;
  ESP_TRY(esp_json_str(entry, "name", path, 1, &name));
  ESP_TRY(esp_json_bool(entry, "host", path, 1, &host));
  snprintf(full, sizeof full, "%s.%s", s->kind->name, name);
  const esp_st_entry *e = esp_st_find(f, full);
  if (!e || e->ndim != 1) return esp_fail(ESP_ERR_DATA, "%s: '%s' is not in the checkpoint", path, full);
  void *data = esp_strategy_array(s, name, e->dtype, e->shape[0], host);
  if (!data) return ESP_ERR_MEMORY;
  if (!host) {
    s->be->ops->upload(s->be, data, e->data, e->bytes);
    return esp_backend_sync(s->be);
  }
  memcpy(data, e->data, (size_t)e->bytes);
  return ESP_OK;
}

static esp_status load_one(esp_strategy *s, const esp_st *f, const json_t *all, const char *path) {
  const json_t *j = json_object_get(all, s->kind->name), *own = json_object_get(j, "state");
  const json_t *arrays = json_object_get(j, "arrays");
  if (!json_is_object(own) || !json_is_array(arrays))
    return esp_fail(ESP_ERR_DATA, "%s: holds nothing of '%s'", path, s->kind->name);
  while (s->n_values > 0) esp_strategy_drop(s, s->values[0].name);
  for (size_t i = 0; i < json_array_size(arrays); i++) ESP_TRY(load_array(s, f, json_array_get(arrays, i), path));
  return s->kind->state_read ? s->kind->state_read(s, own, path) : ESP_OK;
}

esp_status esp_strategies_load(esp_strategies *set, const char *tensors, size_t n_tensors, const char *json,
                               size_t n_json, const char *path) {
  esp_status st = ESP_OK;
  esp_st *f = NULL;
  json_t *j = NULL;
  if (set->n == 0) return ESP_OK;
  ESP_GOTO(esp_st_parse(tensors, n_tensors, path, &f));
  ESP_GOTO(esp_json_parse(json, n_json, path, &j));
  for (int i = 0; i < set->n; i++) ESP_GOTO(load_one(&set->list[i], f, j, path));
out:
  esp_st_close(f);
  json_decref(j);
  return st;
}
