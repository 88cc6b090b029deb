/* desc_write.c: a description as the config.json that transformers reads (old spelling of the rotary keys, which every
 * version understands). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/json.h"
#include "model/internal.h"

static void put(json_t *o, const char *key, json_t *v) {
  json_object_set_new(o, key, v);
}

static json_t *token(int32_t id) {
  return id < 0 ? json_null() : json_integer(id);
}

static const char *act_name(esp_act a) {
  switch (a) {
  case ESP_ACT_SILU:
    return "silu";
  case ESP_ACT_GELU_TANH:
    return "gelu_new";
  case ESP_ACT_GELU_ERF:
    return "gelu";
  case ESP_ACT_TANH:
    return "tanh";
  case ESP_ACT_RELU:
    return "relu";
  }
  return "silu";
}

/* The shortest decimal that is the same float: 1e-05 rather than 9.99999974e-06. */
static json_t *number(float f) {
  char text[32];
  for (int digits = 1; digits <= 9; digits++) {
    snprintf(text, sizeof text, "%.*g", digits, (double)f);
    if (strtof(text, NULL) == f) break;
  }
  return json_real(strtod(text, NULL));
}

static void write_rotary(const esp_model_desc *d, json_t *o) {
  put(o, "hidden_size", json_integer(d->hidden));
  put(o, "intermediate_size", json_integer(d->ffn));
  put(o, "num_hidden_layers", json_integer(d->layers));
  put(o, "num_attention_heads", json_integer(d->heads));
  put(o, "num_key_value_heads", json_integer(d->kv_heads));
  put(o, "head_dim", json_integer(d->head_dim));
  put(o, "hidden_act", json_string(act_name(d->act)));
  put(o, "max_position_embeddings", json_integer(d->max_positions));
  put(o, "rms_norm_eps", number(d->norm_eps));
  put(o, "rope_theta", number(d->rope_theta));
  json_t *scaling = json_null();
  if (d->rope_scaling != ESP_ROPE_NONE) {
    scaling = json_object();
    put(scaling, "rope_type", json_string(d->rope_scaling == ESP_ROPE_LINEAR ? "linear" : "llama3"));
    put(scaling, "factor", number(d->rope_factor));
    if (d->rope_scaling == ESP_ROPE_LLAMA3) {
      put(scaling, "low_freq_factor", number(d->rope_low_freq));
      put(scaling, "high_freq_factor", number(d->rope_high_freq));
      put(scaling, "original_max_position_embeddings", json_integer(d->rope_original_positions));
    }
  }
  put(o, "rope_scaling", scaling);
  bool llama = !strcmp(d->family, "llama"), qwen = !strncmp(d->family, "qwen", 4);
  if (llama || !strcmp(d->family, "qwen3")) put(o, "attention_bias", json_boolean(d->qkv_bias));
  if (llama) put(o, "mlp_bias", json_boolean(d->mlp_bias));
  int window = 0;
  for (int i = 0; i < d->layers; i++) window = d->window[i] > window ? d->window[i] : window;
  if (!llama) put(o, "sliding_window", window ? json_integer(window) : json_null());
  if (qwen) {
    json_t *types = json_array();
    for (int i = 0; i < d->layers; i++)
      json_array_append_new(types, json_string(d->window[i] ? "sliding_attention" : "full_attention"));
    put(o, "use_sliding_window", json_boolean(window > 0));
    put(o, "layer_types", types);
  }
}

static void write_gpt2(const esp_model_desc *d, json_t *o) {
  put(o, "n_embd", json_integer(d->hidden));
  put(o, "n_layer", json_integer(d->layers));
  put(o, "n_head", json_integer(d->heads));
  put(o, "n_inner", json_integer(d->ffn));
  put(o, "n_positions", json_integer(d->max_positions));
  put(o, "activation_function", json_string(act_name(d->act)));
  put(o, "layer_norm_epsilon", number(d->norm_eps));
  put(o, "scale_attn_weights", json_boolean(d->attn_scale != 1.0f));
  put(o, "scale_attn_by_inverse_layer_idx", json_boolean(d->attn_scale_by_layer));
}

esp_status esp_model_desc_write(const esp_model_desc *d, const char *path) {
  json_t *o = json_object();
  if (!o) return esp_fail_oom("config.json", 0);
  json_t *arch = json_array();
  json_array_append_new(arch, json_string(d->architecture));
  put(o, "architectures", arch);
  put(o, "model_type", json_string(d->family));
  put(o, "vocab_size", json_integer(d->vocab));
  put(o, "tie_word_embeddings", json_boolean(d->tied));
  put(o, "torch_dtype", json_string(d->stored == ESP_BF16 ? "bfloat16" : d->stored == ESP_F16 ? "float16" : "float32"));
  put(o, "bos_token_id", token(d->bos));
  put(o, "pad_token_id", token(d->pad));
  if (d->n_eos > 1) {
    json_t *eos = json_array();
    for (int i = 0; i < d->n_eos; i++) json_array_append_new(eos, json_integer(d->eos[i]));
    put(o, "eos_token_id", eos);
  } else {
    put(o, "eos_token_id", token(d->n_eos ? d->eos[0] : -1));
  }
  if (d->pos == ESP_POS_LEARNED)
    write_gpt2(d, o);
  else
    write_rotary(d, o);
  esp_status st = esp_json_save(path, o, 0);
  json_decref(o);
  return st;
}
