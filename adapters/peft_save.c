/* peft_save.c: an adapter directory as PEFT writes it: adapter_config.json with every key of LoraConfig (sorted, indent
 * 2) and adapter_model.safetensors (fp32). An init that rewrote the base is saved as the plain LoRA of twice the rank
 * that gives the same model on the untouched base: A' = [A; A0], B' = [B, -B0] (PEFT's
 * path_initial_model_for_weight_conversion). The kind `full` writes a model directory: config.json and
 * model.safetensors under the base's names, with the small adapter_config.json that lets it be loaded here again. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/internal.h"
#include "io/file.h"
#include "io/json.h"
#include "io/safetensors.h"

#define PEFT_VERSION "0.21.2"

static bool transposed(const esp_adapter *a, int index) {
  return index < a->modules->file_cap && a->modules->file_transposed[index];
}

void esp_param_file_shape(const esp_adapter *a, int index, int *ndim, int64_t shape[ESP_MAX_DIMS]) {
  const esp_param *p = &a->params->list[index];
  *ndim = p->ndim;
  memcpy(shape, p->shape, sizeof p->shape);
  if (transposed(a, index)) {
    shape[0] = p->shape[1];
    shape[1] = p->shape[0];
  }
}

float *esp_param_host(const esp_adapter *a, int index) {
  const esp_param *p = &a->params->list[index];
  float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)p->numel * sizeof *x);
  if (!x) return NULL;
  esp_params_get(a->params, index, x);
  if (!transposed(a, index)) return x;
  float *y = esp_mem_alloc(ESP_MEM_HOST, (size_t)p->numel * sizeof *y);
  for (int64_t i = 0; y && i < p->shape[0]; i++)
    for (int64_t j = 0; j < p->shape[1]; j++) y[j * p->shape[0] + i] = x[i * p->shape[1] + j];
  esp_mem_free(x);
  return y;
}

static json_t *json_list(const char *const *list, int n) {
  json_t *j = json_array();
  for (int i = 0; i < n; i++) json_array_append_new(j, json_string(list[i]));
  return j;
}

/* "all-linear" is written as the names it stands for: by last component where that means the same modules. */
static json_t *json_targets(const esp_adapter *a) {
  if (!esp_target_is_all_linear(&a->cfg))
    return a->cfg.target_regex ? json_string(a->cfg.target_regex) : json_list(a->cfg.target, a->cfg.n_target);
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites);
  bool by_leaf = true;
  for (int i = 0; i < n && by_leaf; i++)
    for (int k = 0; k < n && by_leaf; k++)
      by_leaf = !(a->targeted[i] && !a->targeted[k] && strcmp(sites[i]->leaf, sites[k]->leaf) == 0);
  json_t *j = json_array();
  for (int i = 0; i < n; i++) {
    if (!a->targeted[i]) continue;
    const char *name = by_leaf ? sites[i]->leaf : sites[i]->path;
    size_t at;
    json_t *have;
    bool seen = false;
    json_array_foreach(j, at, have) seen |= strcmp(json_string_value(have), name) == 0;
    if (!seen) json_array_append_new(j, json_string(name));
  }
  return j;
}

/* What the file of every kind with targets holds. */
static json_t *common_config(const esp_adapter *a) {
  const esp_adapter_cfg *c = &a->cfg;
  json_t *j = json_object();
  json_object_set_new(j, "auto_mapping", json_null());
  json_object_set_new(j, "base_model_name_or_path", json_string(esp_model_dir(a->model)));
  json_object_set_new(j, "inference_mode", json_true());
  json_object_set_new(j, "peft_type", json_string(a->kind->peft_type));
  json_object_set_new(j, "peft_version", json_string(PEFT_VERSION));
  json_object_set_new(j, "revision", json_null());
  json_object_set_new(j, "task_type", json_string("CAUSAL_LM"));
  if (!a->kind->targets && !a->kind->trains) return j;
  json_object_set_new(j, "bias", json_string(c->bias));
  json_object_set_new(j, "exclude_modules",
                      c->exclude_regex ? json_string(c->exclude_regex)
                                       : (c->n_exclude ? json_list(c->exclude, c->n_exclude) : json_null()));
  json_t *layers = c->n_layers ? json_array() : json_null();
  for (int i = 0; i < c->n_layers; i++) json_array_append_new(layers, json_integer(c->layers[i]));
  json_object_set_new(j, "layers_to_transform", layers);
  json_object_set_new(j, "layers_pattern",
                      c->layers_pattern && c->layers_pattern[0] ? json_string(c->layers_pattern) : json_null());
  json_object_set_new(j, "modules_to_save",
                      c->n_modules_to_save ? json_list(c->modules_to_save, c->n_modules_to_save) : json_null());
  json_object_set_new(j, "target_modules", json_targets(a));
  json_t *tokens = c->n_trainable_tokens ? json_array() : json_null();
  for (int i = 0; i < c->n_trainable_tokens; i++) json_array_append_new(tokens, json_integer(c->trainable_tokens[i]));
  json_object_set_new(j, "trainable_token_indices", tokens);
  return j;
}

/* ---- tensors ---- */

typedef struct rewritten { /* the site whose A or B this parameter is, where the base was rewritten */
  const esp_lora_site *ls;
  bool is_a;
} rewritten;

static rewritten find_rewritten(const esp_adapter *a, int index) {
  rewritten out = {NULL, false};
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites);
  for (int i = 0; i < n && a->kind == &esp_kind_lora; i++) {
    const esp_lora_site *ls = a->targeted[i] ? a->site_state[i] : NULL;
    if (ls && ls->A0 && !ls->quantised && (ls->a == index || ls->b == index)) return (rewritten){ls, ls->a == index};
  }
  return out;
}

static void saved_shape(const esp_adapter *a, int index, int *ndim, int64_t shape[ESP_MAX_DIMS]) {
  rewritten rw = find_rewritten(a, index);
  esp_param_file_shape(a, index, ndim, shape);
  if (rw.ls) shape[rw.is_a ? 0 : 1] *= 2;
}

int64_t esp_adapter_save_bytes(const esp_adapter *a) {
  int64_t most = 0;
  for (int i = 0; i < a->params->count; i++) {
    int copies = find_rewritten(a, i).ls ? 3 : transposed(a, i) ? 2 : 1;
    int64_t bytes = copies * a->params->list[i].numel * (int64_t)sizeof(float);
    if (bytes > most) most = bytes;
  }
  return most;
}

/* The values as the file holds them; *n elements. */
static float *saved_values(const esp_adapter *a, int index, int64_t *n) {
  rewritten rw = find_rewritten(a, index);
  const esp_param *p = &a->params->list[index];
  float *x = esp_param_host(a, index);
  *n = p->numel;
  if (!rw.ls || !x) return x;
  float *y = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * p->numel) * sizeof *y);
  if (y && rw.is_a) {
    memcpy(y, x, (size_t)p->numel * sizeof *y);
    memcpy(y + p->numel, rw.ls->A0, (size_t)p->numel * sizeof *y);
  } else if (y) {
    int64_t r = rw.ls->r;
    for (int64_t i = 0; i < p->shape[0]; i++)
      for (int64_t k = 0; k < r; k++) {
        y[i * 2 * r + k] = x[i * r + k];
        y[i * 2 * r + r + k] = -rw.ls->B0[i * r + k];
      }
  }
  *n = 2 * p->numel;
  esp_mem_free(x);
  return y;
}

static bool is_up(const char *name) { /* the matrices that start at zero */
  size_t n = strlen(name);
  const char *b = ".lora_B.weight", *e = ".lora_embedding_A";
  return (n > strlen(b) && !strcmp(name + n - strlen(b), b)) || (n > strlen(e) && !strcmp(name + n - strlen(e), e));
}

static bool in_file(const esp_adapter *a, int index) {
  return !a->kind->in_file || a->kind->in_file(a, index);
}

static esp_status put_all(const esp_adapter *a, esp_st_writer *w) {
  bool any_up = false, moved = false;
  for (int i = 0; i < a->params->count; i++) {
    if (!in_file(a, i)) continue;
    int64_t n;
    const char *name = a->params->list[i].name;
    if (a->params->list[i].local) continue;
    float *x = saved_values(a, i, &n);
    if (!x) return ESP_ERR_MEMORY;
    bool finite = true, zero = true;
    for (int64_t k = 0; k < n; k++) {
      finite &= isfinite(x[k]) != 0;
      zero &= x[k] == 0.0f;
    }
    esp_status st = finite ? esp_st_writer_put(w, name, x, n * (int64_t)sizeof *x)
                           : esp_fail(ESP_ERR_DIVERGED, "'%s' holds a non-finite value: not saved", name);
    esp_mem_free(x);
    if (st) return st;
    if (is_up(name)) {
      any_up = true;
      moved |= !zero;
    }
  }
  if (a->kind->targets && any_up && !moved && a->backwards > 0)
    return esp_fail(ESP_ERR_DIVERGED, "adapter '%s': every B is still zero after %lld backward passes: not saved",
                    a->name, (long long)a->backwards);
  return ESP_OK;
}

static esp_status write_tensors(const esp_adapter *a, const char *path) {
  esp_st_writer *w = NULL;
  esp_status st = ESP_OK;
  ESP_GOTO(esp_st_writer_create(path, &w));
  ESP_GOTO(esp_st_writer_metadata(w, "format", "pt"));
  ESP_GOTO(esp_st_writer_metadata(w, "espalier_base", esp_model_fingerprint(a->model)));
  for (int i = 0; i < a->params->count; i++) {
    if (!in_file(a, i)) continue;
    int ndim;
    int64_t shape[ESP_MAX_DIMS];
    if (a->params->list[i].local) continue;
    saved_shape(a, i, &ndim, shape);
    ESP_GOTO(esp_st_writer_declare(w, a->params->list[i].name, ESP_F32, ndim, shape));
  }
  ESP_GOTO(esp_ints_declare(a, w));
  ESP_GOTO(put_all(a, w));
  ESP_GOTO(esp_ints_put(a, w));
  st = esp_st_writer_commit(w);
  w = NULL;
out:
  esp_st_writer_abort(w);
  return st;
}

esp_status esp_adapter_save(const esp_adapter *a, const char *dir) {
  char staged[4096], path[4200];
  esp_status st = ESP_OK;
  if (a->kind->savable) ESP_TRY(a->kind->savable(a));
  json_t *j = common_config(a);
  if (a->kind->config_write) a->kind->config_write(a, j);
  staged[0] = 0;
  ESP_GOTO(esp_dir_stage(dir, staged, sizeof staged));
  ESP_GOTO(write_tensors(a, esp_path_join(path, sizeof path, staged,
                                          a->kind->whole_base ? "model.safetensors" : "adapter_model.safetensors")));
  ESP_GOTO(esp_json_save(esp_path_join(path, sizeof path, staged, "adapter_config.json"), j, 1));
  if (a->kind->whole_base)
    ESP_GOTO(
        esp_model_desc_write(esp_model_describe(a->model), esp_path_join(path, sizeof path, staged, "config.json")));
  st = esp_dir_commit(staged, dir);
  staged[0] = 0;
out:
  if (st) esp_fail_context(st, "%s", dir);
  if (st && staged[0]) {
    char message[1024];
    snprintf(message, sizeof message, "%s", esp_error_message());
    if (esp_remove_tree(staged) != ESP_OK) esp_fail(st, "%s", message); /* the first failure is the one to tell */
  }
  json_decref(j);
  return st;
}
