/* tiny.h: a Llama shape of about 60 k random weights, a tokenizer of bytes, and a little data, made on the spot: enough
 * to run everything end to end without files from elsewhere. Everything written is a function of nothing but this
 * text. */
#ifndef ESP_TESTS_TINY_H
#define ESP_TESTS_TINY_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/dtype.h"
#include "core/rng.h"
#include "core/strbuf.h"
#include "io/file.h"
#include "io/safetensors.h"

enum { TINY_LAYERS = 2, TINY_HIDDEN = 48, TINY_FFN = 96, TINY_VOCAB = 257, TINY_HEADS = 4, TINY_KV = 2 };

static inline esp_status tiny_write(const char *dir, const char *name, const char *text) {
  char path[4096];
  return esp_file_write_atomic(esp_path_join(path, sizeof path, dir, name), text, strlen(text));
}

/* GPT-2's map from bytes to printable code points. */
static inline int tiny_codepoint(int byte) {
  if ((byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174) return byte;
  int n = 0;
  for (int b = 0; b < byte; b++) n += !((b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174);
  return 256 + n;
}

static inline esp_status tiny_tokenizer(const char *dir) {
  esp_strbuf b;
  esp_strbuf_init(&b);
  esp_strbuf_puts(&b, "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"added_tokens\":[{\"id\":256,"
                      "\"content\":\"<|end|>\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,"
                      "\"normalized\":false,\"special\":true}],\"normalizer\":null,\"pre_tokenizer\":{\"type\":"
                      "\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":true},"
                      "\"post_processor\":null,\"decoder\":{\"type\":\"ByteLevel\",\"add_prefix_space\":true,"
                      "\"trim_offsets\":true,\"use_regex\":true},\"model\":{\"type\":\"BPE\",\"dropout\":null,"
                      "\"unk_token\":null,\"continuing_subword_prefix\":null,\"end_of_word_suffix\":null,"
                      "\"fuse_unk\":false,\"byte_fallback\":false,\"vocab\":{");
  for (int i = 0; i < 256; i++) esp_strbuf_printf(&b, "%s\"\\u%04x\":%d", i ? "," : "", tiny_codepoint(i), i);
  esp_strbuf_puts(&b, "},\"merges\":[]}}\n");
  esp_status st = b.failed ? ESP_ERR_MEMORY : tiny_write(dir, "tokenizer.json", b.data);
  esp_strbuf_deinit(&b);
  if (st != ESP_OK) return st;
  return tiny_write(dir, "tokenizer_config.json",
                    "{\"tokenizer_class\": \"PreTrainedTokenizerFast\", \"eos_token\": \"<|end|>\"}\n");
}

static inline esp_status tiny_config(const char *dir) {
  return tiny_write(dir, "config.json",
                    "{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", \"vocab_size\": 257,\n"
                    " \"hidden_size\": 48, \"intermediate_size\": 96, \"num_hidden_layers\": 2,\n"
                    " \"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"max_position_embeddings\": 512,\n"
                    " \"rms_norm_eps\": 1e-05, \"rope_theta\": 10000.0, \"hidden_act\": \"silu\",\n"
                    " \"tie_word_embeddings\": true, \"torch_dtype\": \"bfloat16\", \"eos_token_id\": 256}\n");
}

typedef struct tiny_tensor {
  char name[96];
  int64_t rows, cols; /* cols 0: a norm */
} tiny_tensor;

static inline int tiny_list(tiny_tensor *t) {
  int n = 0;
  const int64_t H = TINY_HIDDEN, F = TINY_FFN, K = TINY_HIDDEN / TINY_HEADS * TINY_KV;
  const struct {
    const char *leaf;
    int64_t rows, cols;
  } leaves[] = {{"input_layernorm", H, 0},  {"self_attn.q_proj", H, H}, {"self_attn.k_proj", K, H},
                {"self_attn.v_proj", K, H}, {"self_attn.o_proj", H, H}, {"post_attention_layernorm", H, 0},
                {"mlp.gate_proj", F, H},    {"mlp.up_proj", F, H},      {"mlp.down_proj", H, F}};
  snprintf(t[n].name, sizeof t[n].name, "model.embed_tokens.weight");
  t[n].rows = TINY_VOCAB, t[n++].cols = H;
  for (int l = 0; l < TINY_LAYERS; l++)
    for (size_t i = 0; i < sizeof leaves / sizeof *leaves; i++) {
      snprintf(t[n].name, sizeof t[n].name, "model.layers.%d.%s.weight", l, leaves[i].leaf);
      t[n].rows = leaves[i].rows, t[n++].cols = leaves[i].cols;
    }
  snprintf(t[n].name, sizeof t[n].name, "model.norm.weight");
  t[n].rows = H, t[n++].cols = 0;
  return n;
}

static inline esp_status tiny_weights(const char *dir) {
  char path[4096];
  tiny_tensor list[64];
  int n = tiny_list(list);
  esp_st_writer *w = NULL;
  ESP_TRY(esp_st_writer_create(esp_path_join(path, sizeof path, dir, "model.safetensors"), &w));
  for (int pass = 0; pass < 2; pass++)
    for (int i = 0; i < n; i++) {
      int64_t shape[2] = {list[i].rows, list[i].cols}, numel = list[i].rows * (list[i].cols ? list[i].cols : 1);
      if (pass == 0) {
        ESP_TRY(esp_st_writer_declare(w, list[i].name, ESP_BF16, list[i].cols ? 2 : 1, shape));
        continue;
      }
      uint16_t *v = malloc((size_t)numel * 2);
      uint64_t stream = esp_rng_stream_name(ESP_RNG_DATA, list[i].name);
      for (int64_t k = 0; k < numel; k++)
        v[k] = esp_f32_to_bf16(list[i].cols ? 0.08f * esp_rng_normal(7, stream, (uint64_t)k) : 1.0f);
      esp_status st = esp_st_writer_put(w, list[i].name, v, numel * 2);
      free(v);
      ESP_TRY(st);
    }
  return esp_st_writer_commit(w);
}

/* Rows of {"prompt": "...", "completion": "..."}: two tasks that answer the same prompts differently. */
static inline esp_status tiny_data(const char *dir, const char *name, int task, int from, int rows) {
  esp_strbuf b;
  static const char *const answers[2][4] = {{"red", "green", "blue", "black"}, {"one", "two", "three", "four"}};
  esp_strbuf_init(&b);
  for (int i = from; i < from + rows; i++)
    esp_strbuf_printf(&b, "{\"prompt\": \"item %d is \", \"completion\": \"%s\"}\n", i * 7919 % 1000,
                      answers[task][i % 4]);
  esp_status st = b.failed ? ESP_ERR_MEMORY : tiny_write(dir, name, b.data);
  esp_strbuf_deinit(&b);
  return st;
}

/* dir/model, dir/a.jsonl, dir/b.jsonl, dir/a.test.jsonl, dir/b.test.jsonl */
static inline esp_status tiny_make(const char *dir) {
  char model[4096];
  esp_path_join(model, sizeof model, dir, "model");
  ESP_TRY(esp_mkdirs(model));
  ESP_TRY(tiny_config(model));
  ESP_TRY(tiny_tokenizer(model));
  ESP_TRY(tiny_weights(model));
  ESP_TRY(tiny_data(dir, "a.jsonl", 0, 0, 60));
  ESP_TRY(tiny_data(dir, "b.jsonl", 1, 0, 45));
  ESP_TRY(tiny_data(dir, "a.test.jsonl", 0, 100, 12));
  return tiny_data(dir, "b.test.jsonl", 1, 100, 12);
}

#endif
