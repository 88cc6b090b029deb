/* desc.h: what a config.json says, as a table of switches. One decoder (and later one encoder) is driven by it; a
 * family is a row that fills the switches, not another model. Anything in config.json that changes the computation and
 * is not understood is an error. Values and sources per family: docs/models.md. */
#ifndef ESP_MODEL_DESC_H
#define ESP_MODEL_DESC_H

#include <stdbool.h>
#include <stdint.h>

#include "backend/backend.h"

#define ESP_MAX_LAYERS 256

typedef enum esp_norm_place { ESP_PLACE_PRE, ESP_PLACE_POST, ESP_PLACE_SANDWICH, ESP_PLACE_POST_ONLY } esp_norm_place;
typedef enum esp_qk_norm { ESP_QKNORM_NONE, ESP_QKNORM_HEAD, ESP_QKNORM_FULL } esp_qk_norm;
typedef enum esp_pos_kind { ESP_POS_ROPE, ESP_POS_LEARNED } esp_pos_kind;
typedef enum esp_rope_scaling { ESP_ROPE_NONE, ESP_ROPE_LINEAR, ESP_ROPE_LLAMA3 } esp_rope_scaling;

typedef struct esp_model_desc {
  char family[32];       /* model_type of config.json: "llama", "mistral", "qwen2", "qwen3", "gpt2" */
  char architecture[64]; /* "LlamaForCausalLM" */
  int layers;
  int64_t hidden, ffn, vocab, max_positions;
  int heads, kv_heads, head_dim;

  esp_norm_kind norm;
  float norm_eps, norm_offset; /* 1 for (1 + w) */
  bool norm_bias;
  esp_norm_place norm_place;
  esp_qk_norm qk_norm;

  bool qkv_bias, o_bias, mlp_bias, head_bias;
  bool fused_qkv; /* one tensor on disk and one site (GPT-2 c_attn, Phi-3 qkv_proj) */
  bool fused_gate_up;
  bool transposed; /* Conv1D: stored [in, out]; adapters set fan_in_fan_out */
  float attn_scale, attn_softcap, final_softcap;
  bool attn_scale_by_layer; /* GPT-2's scale_attn_by_inverse_layer_idx: attn_scale / (layer + 1) */
  bool causal;
  int window[ESP_MAX_LAYERS]; /* 0: full */

  esp_pos_kind pos;
  float rope_theta;
  float rope_fraction; /* share of head_dim that is rotated */
  esp_rope_scaling rope_scaling;
  float rope_factor, rope_low_freq, rope_high_freq;
  int64_t rope_original_positions;

  esp_act act;
  bool gated;
  bool tied;                /* one storage for embedding and head */
  float embed_scale;        /* 1, or sqrt(hidden) */
  esp_dtype stored;         /* torch_dtype of the file */
  int32_t bos, eos[8], pad; /* -1: none */
  int n_eos;
} esp_model_desc;

/* Reads <dir>/config.json. Errors: ESP_ERR_DATA naming file and key. */
esp_status esp_model_desc_load(const char *dir, esp_model_desc *out);
/* The same from a parsed text (fuzzing, tests). `path` is for messages. */
esp_status esp_model_desc_parse(const char *json, size_t len, const char *path, esp_model_desc *out);
/* Writes a config.json that transformers loads (used when this engine makes a new base). */
esp_status esp_model_desc_write(const esp_model_desc *d, const char *path);
const char *const *esp_model_families(int *n);

#endif
