/* inspect.c: what a path holds: a model, an adapter, a checkpoint, a run, a safetensors file. */
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "api/api.h"
#include "io/file.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "train/checkpoint.h"

static bool has(const char *dir, const char *name) {
  char path[ESP_PATH];
  return esp_file_exists(esp_path_join(path, sizeof path, dir, name));
}

static json_t *tensors(const esp_st *f, int64_t *values, int64_t *bytes) {
  json_t *list = json_array();
  *values = *bytes = 0;
  for (int i = 0; i < esp_st_count(f); i++) {
    const esp_st_entry *t = esp_st_at(f, i);
    json_t *shape = json_array();
    int64_t n = 1;
    for (int k = 0; k < t->ndim; k++) {
      json_array_append_new(shape, json_integer((json_int_t)t->shape[k]));
      n *= t->shape[k];
    }
    *values += n;
    *bytes += t->bytes;
    json_array_append_new(list, json_pack("{s:s,s:s,s:o}", "name", t->name, "dtype",
                                          t->raw_dtype_known ? esp_dtype_st_name(t->dtype) : "other", "shape", shape));
  }
  return list;
}

static esp_status add_tensors(json_t *j, const char *path) {
  esp_st *f = NULL;
  int64_t values, bytes;
  ESP_TRY(esp_st_open(path, &f));
  json_t *list = tensors(f, &values, &bytes);
  json_object_set_new(j, "tensors", json_integer(esp_st_count(f)));
  json_object_set_new(j, "values", json_integer((json_int_t)values));
  json_object_set_new(j, "bytes", json_integer((json_int_t)bytes));
  json_object_set_new(j, "list", list);
  esp_st_close(f);
  return ESP_OK;
}

static esp_status about_model(json_t *j, const char *dir) {
  esp_model_desc d;
  ESP_TRY(esp_model_desc_load(dir, &d));
  json_object_set_new(j, "kind", json_string("model"));
  json_object_set_new(j, "family", json_string(d.family));
  json_object_set_new(j, "architecture", json_string(d.architecture));
  struct {
    const char *key;
    int64_t value;
  } fields[] = {{"layers", d.layers},     {"hidden", d.hidden},     {"ffn", d.ffn},     {"heads", d.heads},
                {"kv_heads", d.kv_heads}, {"head_dim", d.head_dim}, {"vocab", d.vocab}, {"positions", d.max_positions}};
  for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
    json_object_set_new(j, fields[i].key, json_integer((json_int_t)fields[i].value));
  json_object_set_new(j, "tied", json_boolean(d.tied));
  json_object_set_new(j, "stored", json_string(esp_dtype_name(d.stored)));
  if (!has(dir, "model.safetensors") && !has(dir, "model.safetensors.index.json")) return ESP_OK;
  return add_tensors(j, dir);
}

static esp_status about_adapter(json_t *j, const char *dir) {
  char path[ESP_PATH];
  json_t *config = NULL;
  ESP_TRY(esp_json_load(esp_path_join(path, sizeof path, dir, "adapter_config.json"), &config));
  json_object_set_new(j, "kind", json_string("adapter"));
  json_object_set_new(j, "config", config);
  return add_tensors(j, esp_path_join(path, sizeof path, dir, "adapter_model.safetensors"));
}

static esp_status about_checkpoint(json_t *j, const char *dir) {
  char path[ESP_PATH];
  json_t *state = NULL;
  ESP_TRY(esp_checkpoint_verify(dir)); /* only what is complete is described */
  ESP_TRY(esp_json_load(esp_path_join(path, sizeof path, dir, "state.json"), &state));
  json_object_set_new(j, "kind", json_string("checkpoint"));
  json_object_set_new(j, "state", state);
  return add_tensors(j, esp_path_join(path, sizeof path, dir, "params.safetensors"));
}

static esp_status about_run(json_t *j, const char *dir) {
  esp_job *job = NULL;
  ESP_TRY(esp_job_open_run(dir, NULL, &job));
  const esp_recipe *r = job->recipe;
  json_t *tasks = json_array();
  for (int i = 0; i < r->n_tasks; i++) {
    char rel[256], path[ESP_PATH];
    snprintf(rel, sizeof rel, "adapters/%s", r->tasks[i].name);
    json_array_append_new(tasks, json_pack("{s:s,s:b}", "name", r->tasks[i].name, "finished",
                                           esp_dir_exists(esp_path_join(path, sizeof path, dir, rel))));
  }
  json_object_set_new(j, "kind", json_string("run"));
  json_object_set_new(j, "name", json_string(r->name));
  json_object_set_new(j, "base_model", json_string(r->model.base_model));
  json_object_set_new(j, "adapter", json_string(r->adapter.type));
  json_object_set_new(j, "tasks", tasks);
  esp_job_close(job);
  return ESP_OK;
}

esp_status esp_inspect(const char *path, int json, char **text) {
  esp_status st = ESP_OK;
  *text = NULL;
  json_t *j = json_object();
  json_object_set_new(j, "path", json_string(path));
  if (!esp_dir_exists(path)) {
    if (!esp_file_exists(path)) ESP_GOTO(esp_fail(ESP_ERR_DATA, "%s: no such file or directory", path));
    json_object_set_new(j, "kind", json_string("safetensors"));
    ESP_GOTO(add_tensors(j, path));
  } else if (has(path, "manifest.json")) {
    ESP_GOTO(about_checkpoint(j, path));
  } else if (has(path, "adapter_config.json")) {
    ESP_GOTO(about_adapter(j, path));
  } else if (has(path, "recipe.yaml")) {
    ESP_GOTO(about_run(j, path));
  } else if (has(path, "config.json")) {
    ESP_GOTO(about_model(j, path));
  } else {
    ESP_GOTO(esp_fail(ESP_ERR_DATA, "%s: is neither a model, an adapter, a checkpoint nor a run", path));
  }
  st = esp_api_facts_text(j, json, text);
out:
  json_decref(j);
  return st;
}
