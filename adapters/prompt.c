/* prompt.c: prompt tuning (Lester et al. 2021, arXiv:2104.08691): n trained rows of the width of an embedding stand in
 * front of every sequence, y = base([P; E[ids]]). The base is read only; nothing is trained but P. The model puts the
 * rows there (src/model/virtual.c), here they are written in the place of what its embedding says and their gradient is
 * gathered: P[i] gets that of row i of every sequence. Tokens of the text move up by n positions, as in PEFT.
 * Kinds of virtual tokens share what is about them here: number, refusals, keys of PEFT's configuration. */
#include <string.h>

#include "adapters/internal.h"
#include "core/rng.h"
#include "io/json.h"

int64_t esp_virtual_count(const esp_adapter *a) {
  return a->cfg.virtual_tokens > 0 ? a->cfg.virtual_tokens : 20;
}

esp_status esp_virtual_check(const esp_adapter_cfg *c) {
  ESP_TRY(esp_config_refuse(c, c->type, ESP_CFG_BIAS | ESP_CFG_TOKENS | ESP_CFG_DROPOUT));
  if (c->n_modules_to_save)
    return esp_fail(ESP_ERR_RECIPE, "adapter.modules_to_save: %s trains nothing of the base", c->type);
  if (c->virtual_tokens < 0 || c->virtual_tokens > 65536)
    return esp_fail(ESP_ERR_RECIPE, "adapter.virtual_tokens: must be in 1 to 65536, is %lld",
                    (long long)c->virtual_tokens);
  return ESP_OK;
}

esp_status esp_virtual_params(esp_adapter *a, int64_t width) {
  int64_t n = esp_virtual_count(a), most = esp_model_describe(a->model)->max_positions;
  if (n >= most)
    return esp_fail(ESP_ERR_RECIPE, "adapter.virtual_tokens: %lld leave no room in the base's %lld positions",
                    (long long)n, (long long)most);
  return esp_params_add(a->params, "prompt_embeddings", 2, (const int64_t[]){n, width}, true) < 0 ? ESP_ERR_MEMORY
                                                                                                  : ESP_OK;
}

void esp_virtual_config_write(const esp_adapter *a, json_t *j, int heads, int64_t width) {
  json_object_set_new(j, "modules_to_save", json_null());
  json_object_set_new(j, "num_attention_heads", json_integer(heads));
  json_object_set_new(j, "num_layers", json_integer(esp_model_describe(a->model)->layers));
  json_object_set_new(j, "num_transformer_submodules", json_integer(1));
  json_object_set_new(j, "num_virtual_tokens", json_integer((json_int_t)esp_virtual_count(a)));
  json_object_set_new(j, "token_dim", json_integer((json_int_t)width));
}

esp_status esp_virtual_config_read(const json_t *j, const char *path, esp_adapter_cfg *c) {
  int64_t modules = 1;
  if (json_array_size(json_object_get(j, "modules_to_save")))
    return esp_fail(ESP_ERR_DATA, "%s: key 'modules_to_save' is not supported beside virtual tokens", path);
  ESP_TRY(esp_json_i64(j, "num_transformer_submodules", path, 0, &modules));
  if (modules != 1)
    return esp_fail(ESP_ERR_DATA, "%s: key 'num_transformer_submodules' is %lld: only decoders, 1", path,
                    (long long)modules);
  ESP_TRY(esp_json_i64(j, "num_virtual_tokens", path, 1, &c->virtual_tokens));
  if (c->virtual_tokens < 1) return esp_fail(ESP_ERR_DATA, "%s: key 'num_virtual_tokens' must be at least 1", path);
  return ESP_OK;
}

/* ---- the kind ---- */

static const char *const inits[][2] = {{"vocab", "SAMPLE_VOCAB"}, {"text", "TEXT"}, {"random", "RANDOM"}};
enum { N_INITS = sizeof inits / sizeof inits[0] };

static int which_init(const esp_adapter_cfg *c) {
  for (int i = 0; i < N_INITS; i++)
    if (c->prompt_init && strcmp(c->prompt_init, inits[i][0]) == 0) return i;
  return c->prompt_init && strcmp(c->prompt_init, "default") ? -1 : c->prompt_text ? 1 : 0;
}

static esp_status prompt_check(const esp_adapter_cfg *c) {
  ESP_TRY(esp_virtual_check(c));
  int i = which_init(c);
  if (i < 0)
    return esp_fail(ESP_ERR_RECIPE, "adapter.prompt_init: '%s' is not one of vocab, text, random", c->prompt_init);
  if ((i == 1) != (c->prompt_text && c->prompt_text[0]))
    return esp_fail(ESP_ERR_RECIPE, "adapter.prompt_text: %s",
                    i == 1 ? "prompt_init text needs one" : "is read with prompt_init text only");
  return ESP_OK;
}

static esp_status prompt_open(esp_adapter *a) {
  a->targeted[esp_model_embedding(a->model)->index] = true;
  return esp_virtual_params(a, esp_model_describe(a->model)->hidden);
}

static esp_status prompt_init(esp_adapter *a, esp_site *s) {
  int64_t n = esp_virtual_count(a), width = s->out;
  esp_status st = ESP_OK;
  int how = which_init(&a->cfg);
  uint64_t stream = esp_rng_stream_name(ESP_RNG_INIT, a->params->list[0].name);
  if (how == 1 && a->cfg.n_prompt_ids < 1)
    return esp_fail(ESP_ERR_RECIPE, "adapter.prompt_text: has no token of the base's tokenizer");
  float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n * width) * sizeof *x);
  if (!x) return ESP_ERR_MEMORY;
  for (int64_t i = 0; i < n && how < 2; i++) { /* a text that is too short is repeated, as in PEFT */
    int64_t id = how ? a->cfg.prompt_ids[i % a->cfg.n_prompt_ids]
                     : (int64_t)esp_rng_below(a->cfg.seed, stream, (uint64_t)i, (uint64_t)s->in);
    if (id < 0 || id >= s->in)
      ESP_GOTO(esp_fail(ESP_ERR_RECIPE, "adapter.prompt_text: token %lld is not in the vocabulary of %lld",
                        (long long)id, (long long)s->in));
    ESP_GOTO(esp_site_read_weight_rows(a->model, s, id, 1, x + i * width));
  }
  for (int64_t i = 0; i < n * width && how == 2; i++) x[i] = esp_rng_normal(a->cfg.seed, stream, (uint64_t)i);
  esp_params_set(a->params, 0, x);
out:
  esp_mem_free(x);
  return st;
}

static void prompt_embed(esp_adapter *a, esp_run *run, esp_site *s, const int32_t *ids, esp_tensor y, void **slot) {
  if (!a->targeted[s->index] || !run->n_virtual) return;
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor rows = esp_stack_tensor(run->stack, run->compute, run->n_virtual, s->out);
  run->be->ops->gather_rows(run->be, rows, esp_param_shadow(a->params, 0), run->d_which);
  run->be->ops->scatter_rows(run->be, y, rows, run->d_virtual);
  esp_stack_release(run->stack, mark);
}

static void prompt_embed_bwd(esp_adapter *a, esp_run *run, esp_site *s, const int32_t *ids, esp_tensor dy,
                             void **slot) {
  if (!a->targeted[s->index] || !run->n_virtual || !a->trainable) return;
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor rows = esp_stack_tensor(run->stack, run->compute, run->n_virtual, s->out);
  run->be->ops->gather_rows(run->be, rows, dy, run->d_virtual);
  run->be->ops->embed_bwd(run->be, esp_param_grad(a->params, 0).data, rows, run->d_which, 1.0f);
  esp_stack_release(run->stack, mark);
}

static void prompt_config_write(const esp_adapter *a, json_t *j) {
  const esp_model_desc *d = esp_model_describe(a->model);
  int i = which_init(&a->cfg);
  esp_virtual_config_write(a, j, d->heads, d->hidden);
  json_object_set_new(j, "prompt_tuning_init", json_string(inits[i][1]));
  json_object_set_new(j, "prompt_tuning_init_text", i == 1 ? json_string(a->cfg.prompt_text) : json_null());
  json_object_set_new(j, "tokenizer_kwargs", json_null());
  json_object_set_new(j, "tokenizer_name_or_path", i == 1 ? json_string(esp_model_dir(a->model)) : json_null());
}

static esp_status prompt_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  const char *init = "RANDOM", *text = NULL;
  ESP_TRY(esp_virtual_config_read(j, path, c));
  ESP_TRY(esp_json_str(j, "prompt_tuning_init", path, 0, &init));
  ESP_TRY(esp_json_str(j, "prompt_tuning_init_text", path, 0, &text));
  for (int i = 0; i < N_INITS; i++)
    if (strcmp(init, inits[i][1]) == 0) c->prompt_init = inits[i][0];
  if (!c->prompt_init) return esp_fail(ESP_ERR_DATA, "%s: prompt_tuning_init '%s' is not known", path, init);
  if (text && strcmp(c->prompt_init, "text") == 0 && !(c->prompt_text = esp_arena_strdup(arena, text)))
    return ESP_ERR_MEMORY;
  return ESP_OK;
}

const esp_adapter_kind esp_kind_prompt = {
    .name = "prompt",
    .peft_type = "PROMPT_TUNING",
    .summary = "trained embeddings in front of every sequence (Lester et al. 2021, arXiv:2104.08691)",
    .site_kinds = 1u << ESP_SITE_EMBED,
    .alone = true,
    .virtual_tokens = esp_virtual_count,
    .open = prompt_open,
    .init = prompt_init,
    .embed = prompt_embed,
    .embed_bwd = prompt_embed_bwd,
    .config_write = prompt_config_write,
    .config_read = prompt_config_read,
    .config_check = prompt_check,
};
