/* desc.c: config.json into the switches of a description. One row per family; every key of the file is understood,
 * known to change nothing, or an error that names it. Defaults for absent keys are those of the configuration classes
 * of transformers 5.23 (models/<family>/configuration_<family>.py), read there on 2026-11. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "io/file.h"
#include "io/json.h"
#include "model/internal.h"

enum { LLAMA = 1, MISTRAL = 2, QWEN2 = 4, QWEN3 = 8, GPT2 = 16, ROTARY = 15, ALL = 31 };

typedef struct family_row {
  const char *name, *architecture, *bare; /* bare: the class without a head */
  unsigned bit;
  int64_t kv_heads; /* when the key is absent; 0: as many as heads */
  int64_t head_dim; /* 0: hidden / heads */
  int64_t max_positions, window;
  double norm_eps;
  int32_t bos, eos;
} family_row;

static const family_row families[] = {
    {"llama", "LlamaForCausalLM", "LlamaModel", LLAMA, 0, 0, 2048, 0, 1e-6, 1, 2},
    {"mistral", "MistralForCausalLM", "MistralModel", MISTRAL, 8, 0, 131072, 4096, 1e-6, 1, 2},
    {"qwen2", "Qwen2ForCausalLM", "Qwen2Model", QWEN2, 32, 0, 32768, 4096, 1e-6, -1, -1},
    {"qwen3", "Qwen3ForCausalLM", "Qwen3Model", QWEN3, 32, 128, 32768, 4096, 1e-6, -1, -1},
    {"gpt2", "GPT2LMHeadModel", "GPT2Model", GPT2, 0, 0, 1024, 0, 1e-5, 50256, 50256},
};
#define N_FAMILIES ((int)(sizeof families / sizeof *families))

const char *const *esp_model_families(int *n) {
  static const char *names[N_FAMILIES];
  for (int i = 0; i < N_FAMILIES; i++) names[i] = families[i].name;
  *n = N_FAMILIES;
  return names;
}

/* ---- the classification of keys ---- */

typedef enum key_class {
  K_READ,     /* read below */
  K_HARMLESS, /* bookkeeping, generation defaults, classification heads: nothing that is computed here */
  K_FALSE,    /* must be false, 0, null, [] or {}: anything else changes the computation */
  K_ONE       /* must be 1, true or null */
} key_class;
typedef struct key_row {
  const char *key;
  unsigned families;
  key_class class;
} key_row;

static const key_row keys[] = {
    {"architectures", ALL, K_READ},
    {"model_type", ALL, K_READ},
    {"vocab_size", ALL, K_READ},
    {"bos_token_id", ALL, K_READ},
    {"eos_token_id", ALL, K_READ},
    {"pad_token_id", ALL, K_READ},
    {"tie_word_embeddings", ALL, K_READ},
    {"torch_dtype", ALL, K_READ},
    {"dtype", ALL, K_READ},
    {"hidden_size", ROTARY, K_READ},
    {"intermediate_size", ROTARY, K_READ},
    {"num_hidden_layers", ROTARY, K_READ},
    {"num_attention_heads", ROTARY, K_READ},
    {"num_key_value_heads", ROTARY, K_READ},
    {"head_dim", ROTARY, K_READ},
    {"hidden_act", ROTARY, K_READ},
    {"max_position_embeddings", ROTARY, K_READ},
    {"rms_norm_eps", ROTARY, K_READ},
    {"rope_theta", ROTARY, K_READ},
    {"rope_scaling", ROTARY, K_READ},
    {"rope_parameters", ROTARY, K_READ},
    {"attention_bias", LLAMA | QWEN3, K_READ},
    {"attention_bias", QWEN2, K_HARMLESS}, /* transformers has the QKV bias always and ignores the key */
    {"attention_bias", MISTRAL, K_FALSE},
    {"mlp_bias", LLAMA, K_READ},
    {"mlp_bias", MISTRAL | QWEN2 | QWEN3, K_FALSE},
    {"sliding_window", MISTRAL | QWEN2 | QWEN3, K_READ},
    {"sliding_window", LLAMA, K_FALSE},
    {"use_sliding_window", QWEN2 | QWEN3, K_READ},
    {"use_sliding_window", LLAMA | MISTRAL, K_FALSE},
    {"max_window_layers", QWEN2 | QWEN3, K_READ},
    {"layer_types", ROTARY, K_READ},
    {"partial_rotary_factor", ROTARY, K_ONE},
    {"rope_interleaved", ROTARY, K_FALSE},
    {"use_mrope", ROTARY, K_FALSE},
    {"n_embd", GPT2, K_READ},
    {"n_layer", GPT2, K_READ},
    {"n_head", GPT2, K_READ},
    {"n_inner", GPT2, K_READ},
    {"n_positions", GPT2, K_READ},
    {"activation_function", GPT2, K_READ},
    {"layer_norm_epsilon", GPT2, K_READ},
    {"scale_attn_weights", GPT2, K_READ},
    {"scale_attn_by_inverse_layer_idx", GPT2, K_READ},
    {"reorder_and_upcast_attn", GPT2, K_HARMLESS}, /* precision of an intermediate, which is fp32 here anyway */
    {"n_ctx", GPT2, K_HARMLESS},
    {"add_cross_attention", ALL, K_FALSE},
    {"is_encoder_decoder", ALL, K_FALSE},
    {"tie_encoder_decoder", ALL, K_FALSE},
    {"pruned_heads", ALL, K_FALSE},
    {"quantization_config", ALL, K_FALSE},
    /* Dropout inside the frozen base: it is never applied here (docs/models.md), as in inference. */
    {"attention_dropout", ROTARY, K_HARMLESS},
    {"attn_pdrop", GPT2, K_HARMLESS},
    {"embd_pdrop", GPT2, K_HARMLESS},
    {"resid_pdrop", GPT2, K_HARMLESS},
    {"classifier_dropout", ALL, K_HARMLESS},
    {"pretraining_tp", ALL, K_HARMLESS}, /* slices a product without changing it */
    {"use_cache", ALL, K_HARMLESS},
    {"initializer_range", ALL, K_HARMLESS},
    {"initializer_factor", ALL, K_HARMLESS},
    {"_name_or_path", ALL, K_HARMLESS},
    {"name_or_path", ALL, K_HARMLESS},
    {"_commit_hash", ALL, K_HARMLESS},
    {"transformers_version", ALL, K_HARMLESS},
    {"transformers.js_config", ALL, K_HARMLESS},
    {"is_llama_config", ALL, K_HARMLESS},
    {"unsloth_version", ALL, K_HARMLESS},
    {"unsloth_fixed", ALL, K_HARMLESS},
    {"_attn_implementation", ALL, K_HARMLESS},
    {"_attn_implementation_autoset", ALL, K_HARMLESS},
    {"attn_implementation", ALL, K_HARMLESS},
    {"_experts_implementation", ALL, K_HARMLESS},
    {"is_decoder", ALL, K_HARMLESS},
    {"output_attentions", ALL, K_HARMLESS},
    {"output_hidden_states", ALL, K_HARMLESS},
    {"return_dict", ALL, K_HARMLESS},
    {"return_dict_in_generate", ALL, K_HARMLESS},
    {"output_scores", ALL, K_HARMLESS},
    {"torchscript", ALL, K_HARMLESS},
    {"use_bfloat16", ALL, K_HARMLESS},
    {"tf_legacy_loss", ALL, K_HARMLESS},
    {"task_specific_params", ALL, K_HARMLESS},
    {"problem_type", ALL, K_HARMLESS},
    {"id2label", ALL, K_HARMLESS},
    {"label2id", ALL, K_HARMLESS},
    {"num_labels", ALL, K_HARMLESS},
    {"finetuning_task", ALL, K_HARMLESS},
    {"tokenizer_class", ALL, K_HARMLESS},
    {"prefix", ALL, K_HARMLESS},
    {"sep_token_id", ALL, K_HARMLESS},
    {"decoder_start_token_id", ALL, K_HARMLESS},
    {"cross_attention_hidden_size", ALL, K_HARMLESS},
    {"chunk_size_feed_forward", ALL, K_HARMLESS},
    {"summary_activation", ALL, K_HARMLESS},
    {"summary_first_dropout", ALL, K_HARMLESS},
    {"summary_proj_to_labels", ALL, K_HARMLESS},
    {"summary_type", ALL, K_HARMLESS},
    {"summary_use_proj", ALL, K_HARMLESS},
    {"max_length", ALL, K_HARMLESS},
    {"min_length", ALL, K_HARMLESS},
    {"do_sample", ALL, K_HARMLESS},
    {"early_stopping", ALL, K_HARMLESS},
    {"num_beams", ALL, K_HARMLESS},
    {"num_beam_groups", ALL, K_HARMLESS},
    {"diversity_penalty", ALL, K_HARMLESS},
    {"temperature", ALL, K_HARMLESS},
    {"top_k", ALL, K_HARMLESS},
    {"top_p", ALL, K_HARMLESS},
    {"typical_p", ALL, K_HARMLESS},
    {"repetition_penalty", ALL, K_HARMLESS},
    {"length_penalty", ALL, K_HARMLESS},
    {"no_repeat_ngram_size", ALL, K_HARMLESS},
    {"encoder_no_repeat_ngram_size", ALL, K_HARMLESS},
    {"bad_words_ids", ALL, K_HARMLESS},
    {"begin_suppress_tokens", ALL, K_HARMLESS},
    {"suppress_tokens", ALL, K_HARMLESS},
    {"forced_bos_token_id", ALL, K_HARMLESS},
    {"forced_eos_token_id", ALL, K_HARMLESS},
    {"num_return_sequences", ALL, K_HARMLESS},
    {"exponential_decay_length_penalty", ALL, K_HARMLESS},
    {"remove_invalid_values", ALL, K_HARMLESS},
};

esp_status esp_model_refuse(const char *fmt, ...) {
  char line[2048];
  va_list args;
  va_start(args, fmt);
  vsnprintf(line, sizeof line, fmt, args);
  va_end(args);
  for (char *c = line; *c; c++)
    if ((unsigned char)*c < 0x20 || *c == 0x7f) *c = '?';
  return esp_fail(ESP_ERR_DATA, "%s", line);
}

static bool is_nothing(const json_t *v) {
  return json_is_null(v) || json_is_false(v) || (json_is_number(v) && json_number_value(v) == 0.0) ||
         (json_is_array(v) && json_array_size(v) == 0) || (json_is_object(v) && json_object_size(v) == 0);
}

static esp_status check_keys(json_t *root, const family_row *f, const char *path) {
  const char *key;
  json_t *value;
  json_object_foreach(root, key, value) {
    const key_row *row = NULL;
    for (size_t i = 0; i < sizeof keys / sizeof *keys && !row; i++)
      if ((keys[i].families & f->bit) && !strcmp(keys[i].key, key)) row = &keys[i];
    if (!row)
      return esp_model_refuse("%s: key '%s' is not understood for model_type '%s': it may change the computation", path,
                              key, f->name);
    bool one = json_is_null(value) || json_is_true(value) || (json_is_number(value) && json_number_value(value) == 1.0);
    if ((row->class == K_FALSE && !is_nothing(value)) || (row->class == K_ONE && !one))
      return esp_model_refuse("%s: this value of key '%s' is not supported for model_type '%s'", path, key, f->name);
  }
  return ESP_OK;
}

/* ---- reading ---- */

static bool present(const json_t *o, const char *key) {
  const json_t *v = json_object_get(o, key);
  return v && !json_is_null(v);
}

static esp_status read_size(const json_t *o, const char *key, const char *path, int required, int64_t max,
                            int64_t *out) {
  int64_t v = *out;
  ESP_TRY(esp_json_i64(o, key, path, required, &v));
  if (present(o, key) && (v < 1 || v > max))
    return esp_model_refuse("%s: key '%s' is %lld, outside 1 to %lld", path, key, (long long)v, (long long)max);
  *out = v;
  return ESP_OK;
}

/* A finite number in [min, max]. */
static esp_status read_number(const json_t *o, const char *key, const char *path, int required, double min, double max,
                              float *out) {
  double v = *out;
  ESP_TRY(esp_json_f64(o, key, path, required, &v));
  if (present(o, key) && !(v >= min && v <= max))
    return esp_model_refuse("%s: key '%s' is %g, outside %g to %g", path, key, v, min, max);
  *out = (float)v;
  return ESP_OK;
}

static esp_status read_bool(const json_t *o, const char *key, const char *path, bool *out) {
  int v = *out;
  ESP_TRY(esp_json_bool(o, key, path, 0, &v));
  *out = v != 0;
  return ESP_OK;
}

static esp_status read_act(const json_t *o, const char *key, const char *path, const char *fallback, esp_act *out) {
  static const struct {
    const char *name;
    esp_act act;
  } acts[] = {{"silu", ESP_ACT_SILU},
              {"swish", ESP_ACT_SILU},
              {"gelu", ESP_ACT_GELU_ERF},
              {"gelu_new", ESP_ACT_GELU_TANH},
              {"gelu_pytorch_tanh", ESP_ACT_GELU_TANH},
              {"gelu_fast", ESP_ACT_GELU_TANH},
              {"tanh", ESP_ACT_TANH},
              {"relu", ESP_ACT_RELU}};
  const char *name = fallback;
  ESP_TRY(esp_json_str(o, key, path, 0, &name));
  for (size_t i = 0; i < sizeof acts / sizeof *acts; i++)
    if (!strcmp(acts[i].name, name)) {
      *out = acts[i].act;
      return ESP_OK;
    }
  return esp_model_refuse("%s: key '%s': activation '%s' is not supported", path, key, name);
}

static esp_status read_rope(const json_t *root, const char *path, esp_model_desc *d) {
  static const char *const known[] = {"rope_theta",
                                      "rope_type",
                                      "type",
                                      "factor",
                                      "low_freq_factor",
                                      "high_freq_factor",
                                      "original_max_position_embeddings",
                                      "partial_rotary_factor"};
  d->rope_theta = 10000.0f;
  d->rope_fraction = 1.0f;
  ESP_TRY(read_number(root, "rope_theta", path, 0, 1.0, 1e15, &d->rope_theta));
  /* transformers 5 writes rope_parameters (theta inside); before that rope_scaling, or null */
  const char *where = present(root, "rope_parameters") ? "rope_parameters" : "rope_scaling";
  const json_t *o = json_object_get(root, where);
  if (!o || json_is_null(o)) return ESP_OK;
  if (!json_is_object(o)) return esp_model_refuse("%s: key '%s' must be an object", path, where);
  const char *key;
  json_t *value;
  json_object_foreach((json_t *)o, key, value) {
    bool ok = false;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) ok = ok || !strcmp(known[i], key);
    if (!ok) return esp_model_refuse("%s: key '%s.%s' is not understood", path, where, key);
  }
  ESP_TRY(read_number(o, "rope_theta", path, 0, 1.0, 1e15, &d->rope_theta));
  ESP_TRY(read_number(o, "partial_rotary_factor", path, 0, 0.0, 1.0, &d->rope_fraction));
  if (d->rope_fraction != 1.0f)
    return esp_model_refuse("%s: this value of key '%s.partial_rotary_factor' is not supported", path, where);
  const char *type = "default";
  ESP_TRY(esp_json_str(o, "type", path, 0, &type));
  ESP_TRY(esp_json_str(o, "rope_type", path, 0, &type));
  if (!strcmp(type, "default")) return ESP_OK;
  if (strcmp(type, "linear") && strcmp(type, "llama3"))
    return esp_model_refuse("%s: rope type '%s' in '%s' is not supported (default, linear, llama3 are)", path, type,
                            where);
  ESP_TRY(read_number(o, "factor", path, 1, 1e-3, 1e6, &d->rope_factor));
  d->rope_scaling = ESP_ROPE_LINEAR;
  if (!strcmp(type, "linear")) return ESP_OK;
  d->rope_scaling = ESP_ROPE_LLAMA3;
  ESP_TRY(read_number(o, "low_freq_factor", path, 1, 1e-3, 1e6, &d->rope_low_freq));
  ESP_TRY(read_number(o, "high_freq_factor", path, 1, 1e-3, 1e6, &d->rope_high_freq));
  if (d->rope_high_freq <= d->rope_low_freq)
    return esp_model_refuse("%s: '%s.high_freq_factor' must be above low_freq_factor", path, where);
  return read_size(o, "original_max_position_embeddings", path, 1, INT64_C(1) << 40, &d->rope_original_positions);
}

/* Which layers see a sliding window: mistral all of them; qwen those from max_window_layers on, or layer_types. */
static esp_status read_windows(const json_t *root, const char *path, const family_row *f, esp_model_desc *d) {
  int64_t window = f->window, from = f->bit & (QWEN2 | QWEN3) ? 28 : 0;
  bool use = f->bit == MISTRAL;
  const json_t *w = json_object_get(root, "sliding_window");
  if (f->bit == LLAMA || (w && json_is_null(w))) window = 0;
  if (f->bit != LLAMA) ESP_TRY(read_size(root, "sliding_window", path, 0, INT32_MAX, &window));
  if (f->bit & (QWEN2 | QWEN3)) {
    ESP_TRY(read_bool(root, "use_sliding_window", path, &use));
    ESP_TRY(esp_json_i64(root, "max_window_layers", path, 0, &from)); /* 0: all layers */
  }
  if (!use) window = 0;
  for (int i = 0; i < d->layers; i++) d->window[i] = i >= from ? (int)window : 0;
  if (!present(root, "layer_types")) return ESP_OK;
  const json_t *types = json_object_get(root, "layer_types");
  if (!json_is_array(types) || json_array_size(types) != (size_t)d->layers)
    return esp_model_refuse("%s: key 'layer_types' must be a list of %d names", path, d->layers);
  for (int i = 0; i < d->layers; i++) {
    const char *t = json_string_value(json_array_get(types, (size_t)i));
    bool full = t && !strcmp(t, "full_attention"), sliding = t && !strcmp(t, "sliding_attention");
    if (!full && !sliding)
      return esp_model_refuse("%s: key 'layer_types': entry %d (%s) is not supported", path, i, t ? t : "?");
    bool fixed = !(f->bit & (QWEN2 | QWEN3)); /* these families have no choice per layer */
    if ((sliding && window == 0) || (fixed && sliding != (d->window[i] > 0)))
      return esp_model_refuse("%s: key 'layer_types': entry %d contradicts sliding_window", path, i);
    d->window[i] = sliding ? (int)window : 0;
  }
  return ESP_OK;
}

static esp_status read_rotary(const json_t *root, const char *path, const family_row *f, esp_model_desc *d) {
  int64_t layers = 0, heads = 0, kv = f->kv_heads, head_dim = f->head_dim;
  ESP_TRY(read_size(root, "hidden_size", path, 1, 1 << 20, &d->hidden));
  ESP_TRY(read_size(root, "intermediate_size", path, 1, 1 << 22, &d->ffn));
  ESP_TRY(read_size(root, "num_hidden_layers", path, 1, ESP_MAX_LAYERS, &layers));
  ESP_TRY(read_size(root, "num_attention_heads", path, 1, 4096, &heads));
  const json_t *k = json_object_get(root, "num_key_value_heads");
  if (kv == 0 || (k && json_is_null(k))) kv = heads;
  ESP_TRY(read_size(root, "num_key_value_heads", path, 0, 4096, &kv));
  ESP_TRY(read_size(root, "head_dim", path, 0, 4096, &head_dim));
  if (head_dim == 0 || (f->head_dim == 0 && !present(root, "head_dim"))) {
    if (d->hidden % heads)
      return esp_model_refuse("%s: hidden_size %lld is not a multiple of num_attention_heads %lld", path,
                              (long long)d->hidden, (long long)heads);
    head_dim = d->hidden / heads;
  }
  if (heads % kv)
    return esp_model_refuse("%s: num_attention_heads %lld is not a multiple of num_key_value_heads %lld", path,
                            (long long)heads, (long long)kv);
  if (head_dim % 2) return esp_model_refuse("%s: head_dim %lld must be even", path, (long long)head_dim);
  d->layers = (int)layers;
  d->heads = (int)heads;
  d->kv_heads = (int)kv;
  d->head_dim = (int)head_dim;
  d->max_positions = f->max_positions;
  ESP_TRY(read_size(root, "max_position_embeddings", path, 0, INT64_C(1) << 40, &d->max_positions));
  d->norm = ESP_NORM_RMS;
  d->norm_eps = (float)f->norm_eps;
  ESP_TRY(read_number(root, "rms_norm_eps", path, 0, 0.0, 1.0, &d->norm_eps));
  d->gated = true;
  ESP_TRY(read_act(root, "hidden_act", path, "silu", &d->act));
  d->attn_scale = (float)(1.0 / sqrt((double)head_dim));
  d->pos = ESP_POS_ROPE;
  ESP_TRY(read_rope(root, path, d));
  ESP_TRY(read_windows(root, path, f, d));
  if (f->bit & (LLAMA | QWEN3)) {
    ESP_TRY(read_bool(root, "attention_bias", path, &d->qkv_bias));
    d->o_bias = d->qkv_bias;
  }
  if (f->bit == QWEN2) d->qkv_bias = true;
  if (f->bit == LLAMA) ESP_TRY(read_bool(root, "mlp_bias", path, &d->mlp_bias));
  if (f->bit == QWEN3) d->qk_norm = ESP_QKNORM_HEAD;
  return ESP_OK;
}

static esp_status read_gpt2(const json_t *root, const char *path, const family_row *f, esp_model_desc *d) {
  int64_t layers = 12, heads = 12;
  bool scale = true;
  d->hidden = 768;
  d->max_positions = f->max_positions;
  ESP_TRY(read_size(root, "n_embd", path, 0, 1 << 20, &d->hidden));
  ESP_TRY(read_size(root, "n_layer", path, 0, ESP_MAX_LAYERS, &layers));
  ESP_TRY(read_size(root, "n_head", path, 0, 4096, &heads));
  ESP_TRY(read_size(root, "n_positions", path, 0, 1 << 24, &d->max_positions));
  d->ffn = 4 * d->hidden;
  ESP_TRY(read_size(root, "n_inner", path, 0, 1 << 22, &d->ffn));
  if (d->hidden % heads)
    return esp_model_refuse("%s: n_embd %lld is not a multiple of n_head %lld", path, (long long)d->hidden,
                            (long long)heads);
  d->layers = (int)layers;
  d->heads = d->kv_heads = (int)heads;
  d->head_dim = (int)(d->hidden / heads);
  d->norm = ESP_NORM_LAYER;
  d->norm_bias = true;
  d->norm_eps = (float)f->norm_eps;
  ESP_TRY(read_number(root, "layer_norm_epsilon", path, 0, 0.0, 1.0, &d->norm_eps));
  ESP_TRY(read_act(root, "activation_function", path, "gelu_new", &d->act));
  ESP_TRY(read_bool(root, "scale_attn_weights", path, &scale));
  d->attn_scale = scale ? (float)(1.0 / sqrt((double)d->head_dim)) : 1.0f;
  ESP_TRY(read_bool(root, "scale_attn_by_inverse_layer_idx", path, &d->attn_scale_by_layer));
  d->pos = ESP_POS_LEARNED;
  d->qkv_bias = d->o_bias = d->mlp_bias = true;
  d->fused_qkv = d->transposed = true;
  return ESP_OK;
}

static esp_status read_token(const json_t *root, const char *key, const char *path, int64_t vocab, int32_t *out) {
  int64_t v = *out;
  ESP_TRY(esp_json_i64(root, key, path, 0, &v));
  const json_t *j = json_object_get(root, key);
  if (j && json_is_null(j)) v = -1;
  if (v < -1 || v > INT32_MAX) return esp_model_refuse("%s: key '%s' is not a token id", path, key);
  *out = v < vocab ? (int32_t)v : -1; /* GPT-2's defaults lie outside the vocabulary of small models */
  return ESP_OK;
}

static esp_status read_tokens(const json_t *root, const char *path, const family_row *f, esp_model_desc *d) {
  d->bos = f->bos;
  d->pad = -1;
  ESP_TRY(read_token(root, "bos_token_id", path, d->vocab, &d->bos));
  ESP_TRY(read_token(root, "pad_token_id", path, d->vocab, &d->pad));
  const json_t *eos = json_object_get(root, "eos_token_id");
  if (!json_is_array(eos)) {
    int32_t one = f->eos;
    ESP_TRY(read_token(root, "eos_token_id", path, d->vocab, &one));
    if (one >= 0) d->eos[d->n_eos++] = one;
    return ESP_OK;
  }
  if (json_array_size(eos) > sizeof d->eos / sizeof *d->eos)
    return esp_model_refuse("%s: key 'eos_token_id' lists more than 8 tokens", path);
  for (size_t i = 0; i < json_array_size(eos); i++) {
    const json_t *v = json_array_get(eos, i);
    if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) >= d->vocab)
      return esp_model_refuse("%s: key 'eos_token_id' must list token ids below vocab_size", path);
    d->eos[d->n_eos++] = (int32_t)json_integer_value(v);
  }
  return ESP_OK;
}

static esp_status find_family(const json_t *root, const char *path, const family_row **out) {
  const char *type = NULL;
  ESP_TRY(esp_json_str(root, "model_type", path, 1, &type));
  *out = NULL;
  for (int i = 0; i < N_FAMILIES; i++)
    if (!strcmp(families[i].name, type)) *out = &families[i];
  if (!*out)
    return esp_model_refuse("%s: model_type '%s' is not supported (llama, mistral, qwen2, qwen3, gpt2 are)", path,
                            type);
  const json_t *a = json_object_get(root, "architectures");
  if (!a || json_is_null(a)) return ESP_OK;
  const char *name = json_is_array(a) && json_array_size(a) == 1 ? json_string_value(json_array_get(a, 0)) : NULL;
  if (!name || (strcmp(name, (*out)->architecture) && strcmp(name, (*out)->bare)))
    return esp_model_refuse("%s: architecture '%s' is not supported for model_type '%s' (%s is)", path,
                            name ? name : "?", type, (*out)->architecture);
  return ESP_OK;
}

static esp_status parse(const json_t *root, const char *path, esp_model_desc *d) {
  const family_row *f;
  if (!json_is_object(root)) return esp_model_refuse("%s: must hold an object", path);
  ESP_TRY(find_family(root, path, &f));
  ESP_TRY(check_keys((json_t *)root, f, path));
  snprintf(d->family, sizeof d->family, "%s", f->name);
  snprintf(d->architecture, sizeof d->architecture, "%s", f->architecture);
  d->causal = true;
  d->embed_scale = 1.0f;
  d->norm_place = ESP_PLACE_PRE;
  if (f->bit == GPT2) d->vocab = 50257;
  ESP_TRY(read_size(root, "vocab_size", path, f->bit != GPT2, 1 << 24, &d->vocab));
  ESP_TRY(f->bit == GPT2 ? read_gpt2(root, path, f, d) : read_rotary(root, path, f, d));
  d->tied = f->bit == GPT2;
  ESP_TRY(read_bool(root, "tie_word_embeddings", path, &d->tied));
  const char *dtype = "float32";
  const char *key = present(root, "dtype") ? "dtype" : "torch_dtype";
  ESP_TRY(esp_json_str(root, key, path, 0, &dtype));
  d->stored = !strcmp(dtype, "bfloat16") ? ESP_BF16 : !strcmp(dtype, "float16") ? ESP_F16 : ESP_F32;
  if (d->stored == ESP_F32 && strcmp(dtype, "float32") && strcmp(dtype, "float64"))
    return esp_model_refuse("%s: key '%s': type '%s' is not supported", path, key, dtype);
  return read_tokens(root, path, f, d);
}

esp_status esp_model_desc_parse(const char *json, size_t len, const char *path, esp_model_desc *out) {
  json_t *root = NULL;
  memset(out, 0, sizeof *out); /* padding too: descriptions are compared as bytes */
  ESP_TRY(esp_json_parse(json, len, path, &root));
  esp_status st = parse(root, path, out);
  json_decref(root);
  return st;
}

esp_status esp_model_desc_load(const char *dir, esp_model_desc *out) {
  char path[4096], *text = NULL;
  size_t n = 0;
  ESP_TRY(esp_file_read(esp_path_join(path, sizeof path, dir, "config.json"), &text, &n));
  esp_status st = esp_model_desc_parse(text, n, path, out);
  esp_mem_free(text);
  return st;
}
