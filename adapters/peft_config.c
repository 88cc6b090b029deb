/* peft_config.c: adapter_config.json into esp_adapter_cfg. Older files lack keys, newer ones have more: absent keys
 * take LoraConfig's defaults and unknown ones are ignored, but a known key that changes the computation in a way this
 * engine does not do is an error, never a silent difference. */
#include <stdio.h>
#include <string.h>

#include "adapters/internal.h"
#include "core/strbuf.h"
#include "io/file.h"
#include "io/json.h"

static esp_status string_list(const json_t *v, const char *key, const char *path, esp_arena *arena,
                              const char *const **list, int *n) {
  const char **out = esp_arena_alloc(arena, (json_array_size(v) + 1) * sizeof *out);
  if (!out) return ESP_ERR_MEMORY;
  for (size_t i = 0; i < json_array_size(v); i++) {
    const char *s = json_string_value(json_array_get(v, i));
    if (!s) return esp_fail(ESP_ERR_DATA, "%s: key '%s' must hold strings", path, key);
    if (!(out[i] = esp_arena_strdup(arena, s))) return ESP_ERR_MEMORY;
  }
  *list = out;
  *n = (int)json_array_size(v);
  return ESP_OK;
}

esp_status esp_json_read_names(const json_t *j, const char *key, const char *path, esp_arena *arena,
                               const char *const **list, int *n, const char **regex) {
  const json_t *v = json_object_get(j, key);
  if (!v || json_is_null(v)) return ESP_OK;
  if (json_is_array(v)) return string_list(v, key, path, arena, list, n);
  if (!json_is_string(v)) return esp_fail(ESP_ERR_DATA, "%s: key '%s' must be a string or a list", path, key);
  *regex = esp_arena_strdup(arena, json_string_value(v));
  return *regex ? ESP_OK : ESP_ERR_MEMORY;
}

esp_status esp_json_read_patterns(const json_t *j, const char *key, const char *path, esp_arena *arena,
                                  const esp_pattern **list, int *n) {
  json_t *v = json_object_get(j, key);
  if (!v || json_is_null(v)) return ESP_OK;
  if (!json_is_object(v)) return esp_fail(ESP_ERR_DATA, "%s: key '%s' must be an object", path, key);
  esp_pattern *out = esp_arena_alloc(arena, (json_object_size(v) + 1) * sizeof *out);
  if (!out) return ESP_ERR_MEMORY;
  const char *name;
  json_t *x;
  int count = 0;
  json_object_foreach(v, name, x) {
    if (!json_is_number(x)) return esp_fail(ESP_ERR_DATA, "%s: key '%s': '%s' must be a number", path, key, name);
    out[count].key = esp_arena_strdup(arena, name);
    out[count].value = json_number_value(x);
    if (!out[count++].key) return ESP_ERR_MEMORY;
  }
  *list = out;
  *n = count;
  return ESP_OK;
}

static esp_status integers(const json_t *v, const char *key, const char *path, esp_arena *arena, int32_t **list,
                           int *n) {
  bool one = json_is_integer(v);
  size_t count = one ? 1 : json_array_size(v);
  if (!one && !json_is_array(v)) return esp_fail(ESP_ERR_DATA, "%s: key '%s' must hold integers", path, key);
  int32_t *out = esp_arena_alloc(arena, (count + 1) * sizeof *out);
  if (!out) return ESP_ERR_MEMORY;
  for (size_t i = 0; i < count; i++) {
    const json_t *x = one ? v : json_array_get(v, i);
    if (!json_is_integer(x)) return esp_fail(ESP_ERR_DATA, "%s: key '%s' must hold integers", path, key);
    out[i] = (int32_t)json_integer_value(x);
  }
  *list = out;
  *n = (int)count;
  return ESP_OK;
}

static esp_status layers(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  const json_t *v = json_object_get(j, "layers_to_transform");
  if (v && !json_is_null(v)) {
    int32_t *list;
    ESP_TRY(integers(v, "layers_to_transform", path, arena, &list, &c->n_layers));
    c->layers = list;
  }
  v = json_object_get(j, "layers_pattern");
  if (json_is_string(v)) {
    c->layers_pattern = esp_arena_strdup(arena, json_string_value(v));
  } else if (json_array_size(v)) { /* tried in order by PEFT; as alternatives here */
    esp_strbuf b;
    esp_strbuf_init(&b);
    for (size_t i = 0; i < json_array_size(v); i++) {
      const char *s = json_string_value(json_array_get(v, i));
      esp_strbuf_printf(&b, "%s%s", i ? "|" : "", s ? s : "");
    }
    c->layers_pattern = b.failed ? NULL : esp_arena_strdup(arena, b.data);
    esp_strbuf_deinit(&b);
    if (!c->layers_pattern) return ESP_ERR_MEMORY;
  }
  if (c->n_layers == 0) c->layers_pattern = NULL; /* has no effect in PEFT either */
  return ESP_OK;
}

/* A list of rows, or {"embed_tokens": rows}: only the input embedding is supported, checked when the base is known. */
static esp_status tokens(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  json_t *v = json_object_get(j, "trainable_token_indices");
  if (!v || json_is_null(v)) return ESP_OK;
  if (json_is_object(v)) {
    const char *name;
    json_t *x, *only = NULL;
    json_object_foreach(v, name, x) {
      const char *dot = strrchr(name, '.'), *leaf = dot ? dot + 1 : name;
      if (strcmp(leaf, "embed_tokens") && strcmp(leaf, "wte") && strcmp(leaf, "word_embeddings"))
        return esp_fail(ESP_ERR_DATA, "%s: trainable_token_indices of '%s' is not supported (input embedding only)",
                        path, name);
      only = x;
    }
    if (!only) return ESP_OK;
    v = only;
  }
  int32_t *list;
  ESP_TRY(integers(v, "trainable_token_indices", path, arena, &list, &c->n_trainable_tokens));
  c->trainable_tokens = list;
  return ESP_OK;
}

/* What every kind with targets may have. */
static esp_status parse_common(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  const char *bias = "none";
  const json_t *b = json_object_get(j, "bias");
  if (json_is_string(b)) bias = json_string_value(b);
  c->bias = esp_arena_strdup(arena, bias);
  if (!c->bias) return ESP_ERR_MEMORY;
  ESP_TRY(esp_json_read_names(j, "target_modules", path, arena, &c->target, &c->n_target, &c->target_regex));
  ESP_TRY(esp_json_read_names(j, "exclude_modules", path, arena, &c->exclude, &c->n_exclude, &c->exclude_regex));
  ESP_TRY(layers(j, path, arena, c));
  const json_t *v = json_object_get(j, "modules_to_save");
  if (json_is_array(v))
    ESP_TRY(string_list(v, "modules_to_save", path, arena, &c->modules_to_save, &c->n_modules_to_save));
  return tokens(j, path, arena, c);
}

esp_status esp_adapter_cfg_load(const char *dir, esp_arena *arena, esp_adapter_cfg *out) {
  char path[4200];
  json_t *j = NULL;
  const char *type = NULL;
  esp_status st = ESP_OK;
  *out = (esp_adapter_cfg){.init = "default", .bias = "none"};
  ESP_GOTO(esp_json_load(esp_path_join(path, sizeof path, dir, "adapter_config.json"), &j));
  ESP_GOTO(esp_json_str(j, "peft_type", path, 1, &type));
  int n;
  const char *const *names = esp_adapter_names(&n);
  for (int i = 0; i < n; i++) {
    const esp_adapter_kind *k = esp_adapter_find(names[i]);
    if (strcmp(k->peft_type, type) != 0) continue;
    bool claimed = k->config_is && k->config_is(j);
    if (claimed || (!out->type && !k->config_is)) out->type = names[i];
    if (claimed) break;
  }
  if (!out->type) {
    st = esp_fail(ESP_ERR_DATA, "%s: peft_type '%s' is not supported", path, type);
    goto out;
  }
  const esp_adapter_kind *kind = esp_adapter_find(out->type);
  if (kind->targets || kind->trains) ESP_GOTO(parse_common(j, path, arena, out));
  if (kind->config_read) ESP_GOTO(kind->config_read(j, path, arena, out));
out:
  json_decref(j);
  return st;
}
