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

static json_t *json_number(double x) {
  return x == floor(x) && fabs(x) < 1e15 ? json_integer((json_int_t)x) : json_real(x);
}

static json_t *json_list(const char *const *list, int n) {
  json_t *j = json_array();
  for (int i = 0; i < n; i++) json_array_append_new(j, json_string(list[i]));
  return j;
}

static int by_key(const void *x, const void *y) {
  return strcmp(((const esp_pattern *)x)->key, ((const esp_pattern *)y)->key);
}

/* The file's keys are sorted, and the first that matches counts: where sorting would change a value, the exact paths
 * are written in the place of the patterns. */
static json_t *json_patterns(const esp_adapter *a, const esp_pattern *list, int n, double fallback, double factor) {
  json_t *j = json_object();
  esp_site **sites;
  int n_sites = esp_model_sites(a->model, &sites);
  esp_pattern *sorted = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n + 1) * sizeof *sorted);
  bool same = true;
  if (sorted) {
    if (n) memcpy(sorted, list, (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, by_key);
    for (int i = 0; i < n_sites && same; i++)
      same = !a->targeted[i] || esp_pattern_value(list, n, sites[i]->path, fallback) ==
                                    esp_pattern_value(sorted, n, sites[i]->path, fallback);
  }
  esp_mem_free(sorted);
  for (int i = 0; i < n && same; i++) json_object_set_new(j, list[i].key, json_number(list[i].value * factor));
  for (int i = 0; i < n_sites && !same; i++) {
    double value = esp_pattern_value(list, n, sites[i]->path, fallback);
    if (a->targeted[i] && value != fallback) json_object_set_new(j, sites[i]->path, json_number(value * factor));
  }
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

static json_t *lora_config(const esp_adapter *a, bool converted) {
  const esp_adapter_cfg *c = &a->cfg;
  double rank_factor = converted ? 2 : 1, alpha_factor = converted ? (c->rslora ? sqrt(2.0) : 2) : 1;
  json_t *j = json_object();
  static const char *const nulls[] = {"alora_invocation_tokens",
                                      "arrow_config",
                                      "auto_mapping",
                                      "corda_config",
                                      "eva_config",
                                      "kasa_config",
                                      "layer_replication",
                                      "lora_ga_config",
                                      "megatron_config",
                                      "monteclora_config",
                                      "revision",
                                      "target_parameters",
                                      "use_bdlora",
                                      "velora_config"};
  for (size_t i = 0; i < sizeof nulls / sizeof nulls[0]; i++) json_object_set_new(j, nulls[i], json_null());
  json_object_set_new(j, "alpha_pattern",
                      json_patterns(a, c->alpha_pattern, c->n_alpha_pattern, c->alpha, alpha_factor));
  json_object_set_new(j, "base_model_name_or_path", json_string(esp_model_dir(a->model)));
  json_object_set_new(j, "bias", json_string(c->bias));
  json_object_set_new(j, "ensure_weight_tying", json_false());
  json_object_set_new(j, "exclude_modules",
                      c->exclude_regex ? json_string(c->exclude_regex)
                                       : (c->n_exclude ? json_list(c->exclude, c->n_exclude) : json_null()));
  json_object_set_new(j, "fan_in_fan_out", json_boolean(esp_model_describe(a->model)->transposed));
  json_object_set_new(j, "inference_mode", json_true());
  bool named = !converted && strcmp(c->init, "default") != 0;
  json_object_set_new(j, "init_lora_weights", named ? json_string(c->init) : json_true());
  json_t *layers = c->n_layers ? json_array() : json_null();
  for (int i = 0; i < c->n_layers; i++) json_array_append_new(layers, json_integer(c->layers[i]));
  json_object_set_new(j, "layers_to_transform", layers);
  json_object_set_new(j, "layers_pattern",
                      c->layers_pattern && c->layers_pattern[0] ? json_string(c->layers_pattern) : json_null());
  json_object_set_new(j, "loftq_config", json_object());
  json_object_set_new(j, "lora_alpha", json_number(c->alpha * alpha_factor));
  json_object_set_new(j, "lora_bias", json_boolean(c->lora_bias));
  json_object_set_new(j, "lora_dropout", json_real(c->dropout));
  json_object_set_new(j, "megatron_core", json_string("megatron.core"));
  json_object_set_new(j, "modules_to_save",
                      c->n_modules_to_save ? json_list(c->modules_to_save, c->n_modules_to_save) : json_null());
  json_object_set_new(j, "qalora_group_size", json_integer(16));
  json_object_set_new(j, "r", json_integer((json_int_t)(c->r * (int64_t)rank_factor)));
  json_object_set_new(j, "rank_pattern",
                      json_patterns(a, c->rank_pattern, c->n_rank_pattern, (double)c->r, rank_factor));
  json_object_set_new(j, "target_modules", json_targets(a));
  json_object_set_new(j, "task_type", json_string("CAUSAL_LM"));
  json_t *tokens = c->n_trainable_tokens ? json_array() : json_null();
  for (int i = 0; i < c->n_trainable_tokens; i++) json_array_append_new(tokens, json_integer(c->trainable_tokens[i]));
  json_object_set_new(j, "trainable_token_indices", tokens);
  json_object_set_new(j, "use_dora", json_false());
  json_object_set_new(j, "use_qalora", json_false());
  json_object_set_new(j, "use_rslora", json_boolean(c->rslora));
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
    if (ls && ls->A0 && (ls->a == index || ls->b == index)) return (rewritten){ls, ls->a == index};
  }
  return out;
}

static void saved_shape(const esp_adapter *a, int index, int *ndim, int64_t shape[ESP_MAX_DIMS]) {
  rewritten rw = find_rewritten(a, index);
  esp_param_file_shape(a, index, ndim, shape);
  if (rw.ls) shape[rw.is_a ? 0 : 1] *= 2;
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

static esp_status put_all(const esp_adapter *a, esp_st_writer *w) {
  bool any_up = false, moved = false;
  for (int i = 0; i < a->params->count; i++) {
    int64_t n;
    const char *name = a->params->list[i].name;
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
    int ndim;
    int64_t shape[ESP_MAX_DIMS];
    saved_shape(a, i, &ndim, shape);
    ESP_GOTO(esp_st_writer_declare(w, a->params->list[i].name, ESP_F32, ndim, shape));
  }
  ESP_GOTO(put_all(a, w));
  st = esp_st_writer_commit(w);
  w = NULL;
out:
  esp_st_writer_abort(w);
  return st;
}

esp_status esp_adapter_save(const esp_adapter *a, const char *dir) {
  char staged[4096], path[4200];
  esp_status st = ESP_OK;
  bool converted = a->kind == &esp_kind_lora && esp_lora_rewrites_base(a->cfg.init);
  json_t *j = a->kind == &esp_kind_lora ? lora_config(a, converted) : json_object();
  json_object_set_new(j, "peft_type", json_string(a->kind->peft_type));
  json_object_set_new(j, "peft_version", json_string(PEFT_VERSION));
  if (a->kind != &esp_kind_lora) {
    json_object_set_new(j, "base_model_name_or_path", json_string(esp_model_dir(a->model)));
    json_object_set_new(j, "inference_mode", json_true());
    json_object_set_new(j, "task_type", json_string("CAUSAL_LM"));
  }
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
