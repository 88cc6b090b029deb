/* config.json: values of every family, both spellings of the rotary keys, the classification of keys, bad input, and
 * writing one that reads back the same.
 * Mutation seen to fail: classifying an unknown key as harmless (desc.c, check_keys) accepts the first bad case. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/mem.h"
#include "io/file.h"
#include "model/desc.h"

static esp_model_desc parse_ok(const char *json) {
  esp_model_desc d;
  if (esp_model_desc_parse(json, strlen(json), "config.json", &d) != ESP_OK) fail_msg("%s", esp_error_message());
  return d;
}

#define BASE                                                                                                           \
  "\"hidden_size\":64,\"intermediate_size\":96,\"num_hidden_layers\":3,\"num_attention_heads\":4,\"vocab_size\":100"

static void test_llama(void **state) {
  esp_model_desc d = parse_ok("{\"model_type\":\"llama\"," BASE "}");
  assert_string_equal(d.architecture, "LlamaForCausalLM");
  assert_int_equal(d.kv_heads, 4);
  assert_int_equal(d.head_dim, 16);
  assert_true(d.norm == ESP_NORM_RMS && d.norm_eps == 1e-6f && d.gated && d.act == ESP_ACT_SILU);
  assert_true(!d.tied && !d.qkv_bias && !d.o_bias && !d.mlp_bias && d.rope_theta == 10000.0f);
  assert_true(fabsf(d.attn_scale - 0.25f) < 1e-7f);
  assert_int_equal(d.n_eos, 1);
  assert_int_equal(d.eos[0], 2);
  d = parse_ok(
      "{\"model_type\":\"llama\"," BASE ",\"head_dim\":24,\"num_key_value_heads\":2,\"attention_bias\":true,"
      "\"eos_token_id\":[5,6],\"torch_dtype\":\"bfloat16\",\"rope_theta\":500000.0,\"rope_scaling\":{\"factor\""
      ":8.0,\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,\"original_max_position_embeddings\":8192,"
      "\"rope_type\":\"llama3\"}}");
  assert_true(d.qkv_bias && d.o_bias && d.head_dim == 24 && d.kv_heads == 2 && d.n_eos == 2 && d.eos[1] == 6);
  assert_true(d.stored == ESP_BF16 && d.rope_theta == 500000.0f && d.rope_scaling == ESP_ROPE_LLAMA3);
  assert_true(d.rope_factor == 8.0f && d.rope_original_positions == 8192);
  esp_model_desc n = parse_ok(
      "{\"model_type\":\"llama\"," BASE ",\"head_dim\":24,\"num_key_value_heads\":2,\"attention_bias\":true,"
      "\"eos_token_id\":[5,6],\"dtype\":\"bfloat16\",\"rope_parameters\":{\"rope_theta\":500000.0,\"factor\":8.0,"
      "\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,\"original_max_position_embeddings\":8192,\"rope_type\":"
      "\"llama3\"}}");
  assert_memory_equal(&d, &n, sizeof d);
}

static void test_windows(void **state) {
  esp_model_desc d = parse_ok("{\"model_type\":\"mistral\"," BASE ",\"num_key_value_heads\":2,\"sliding_window\":7}");
  for (int i = 0; i < 3; i++) assert_int_equal(d.window[i], 7);
  d = parse_ok("{\"model_type\":\"mistral\"," BASE ",\"num_key_value_heads\":2}");
  assert_int_equal(d.window[0], 4096); /* the default of the configuration class */
  d = parse_ok("{\"model_type\":\"mistral\"," BASE ",\"num_key_value_heads\":2,\"sliding_window\":null}");
  assert_int_equal(d.window[0], 0);
  d = parse_ok("{\"model_type\":\"qwen2\"," BASE ",\"num_key_value_heads\":2,\"sliding_window\":7}");
  assert_int_equal(d.window[2], 0); /* use_sliding_window is false */
  d = parse_ok("{\"model_type\":\"qwen2\"," BASE ",\"num_key_value_heads\":2,\"sliding_window\":7,"
               "\"use_sliding_window\":true,\"max_window_layers\":2}");
  assert_true(d.window[0] == 0 && d.window[1] == 0 && d.window[2] == 7 && d.qkv_bias && !d.o_bias);
  d = parse_ok("{\"model_type\":\"qwen3\"," BASE ",\"num_key_value_heads\":2,\"sliding_window\":7,"
               "\"use_sliding_window\":true,\"layer_types\":[\"sliding_attention\",\"full_attention\","
               "\"full_attention\"]}");
  assert_true(d.window[0] == 7 && d.window[1] == 0 && d.window[2] == 0);
  assert_true(d.qk_norm == ESP_QKNORM_HEAD && d.head_dim == 128 && !d.qkv_bias);
}

static void test_gpt2(void **state) {
  esp_model_desc d = parse_ok("{\"model_type\":\"gpt2\",\"n_embd\":48,\"n_head\":3,\"n_layer\":2,\"n_positions\":11,"
                              "\"vocab_size\":3,\"n_inner\":null,\"resid_pdrop\":0.1}");
  assert_true(d.ffn == 192 && d.head_dim == 16 && d.kv_heads == 3 && d.tied && d.transposed && d.fused_qkv);
  assert_true(d.norm == ESP_NORM_LAYER && d.norm_bias && d.act == ESP_ACT_GELU_TANH && d.pos == ESP_POS_LEARNED);
  assert_int_equal(d.n_eos, 0); /* 50256 is not a token of this vocabulary */
  d = parse_ok("{\"model_type\":\"gpt2\",\"scale_attn_weights\":false,\"scale_attn_by_inverse_layer_idx\":true}");
  assert_true(d.attn_scale == 1.0f && d.attn_scale_by_layer && d.hidden == 768 && d.layers == 12 && d.vocab == 50257);
}

static void test_bad_input(void **state) {
  static const struct {
    const char *json, *names;
  } cases[] = {
      {"{\"model_type\":\"llama\"," BASE ",\"logit_scale\":2.0}", "'logit_scale'"},
      {"{\"model_type\":\"llama\"," BASE ",\"quantization_config\":{\"bits\":4}}", "'quantization_config'"},
      {"{\"model_type\":\"llama\"," BASE ",\"auto_map\":{}}", "'auto_map'"},
      {"{\"model_type\":\"mistral\"," BASE ",\"attention_bias\":true}", "'attention_bias'"},
      {"{\"model_type\":\"llama\"," BASE ",\"partial_rotary_factor\":0.5}", "'partial_rotary_factor'"},
      {"{\"model_type\":\"llama\"," BASE ",\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4}}", "'yarn'"},
      {"{\"model_type\":\"llama\"," BASE ",\"rope_scaling\":{\"type\":\"linear\",\"factor\":4,\"beta\":1}}",
       "'rope_scaling.beta'"},
      {"{\"model_type\":\"llama\"," BASE ",\"rope_scaling\":{\"type\":\"linear\"}}", "'factor'"},
      {"{\"model_type\":\"llama\"," BASE ",\"hidden_act\":\"mish\"}", "'mish'"},
      {"{\"model_type\":\"llama\"," BASE ",\"num_key_value_heads\":3}", "num_key_value_heads"},
      {"{\"model_type\":\"llama\"," BASE ",\"head_dim\":7}", "head_dim"},
      {"{\"model_type\":\"llama\"," BASE ",\"tie_word_embeddings\":\"yes\"}", "'tie_word_embeddings'"},
      {"{\"model_type\":\"llama\"," BASE ",\"torch_dtype\":\"int8\"}", "'int8'"},
      {"{\"model_type\":\"llama\"," BASE ",\"eos_token_id\":[1,100]}", "'eos_token_id'"},
      {"{\"model_type\":\"llama\"," BASE ",\"architectures\":[\"LlamaForSequenceClassification\"]}",
       "'LlamaForSequenceClassification'"},
      {"{\"model_type\":\"qwen2\"," BASE ",\"num_key_value_heads\":2,\"layer_types\":[\"full_attention\"]}",
       "'layer_types'"},
      {"{\"model_type\":\"qwen2\"," BASE ",\"num_key_value_heads\":2,\"layer_types\":[\"sliding_attention\","
       "\"full_attention\",\"full_attention\"]}",
       "'layer_types'"},
      {"{\"model_type\":\"bert\"}", "'bert'"},
      {"{}", "'model_type'"},
      {"[]", "object"},
      {"{\"model_type\":\"llama\",\"hidden_size\":64}", "'vocab_size'"},
      {"{\"model_type\":\"llama\",\"vocab_size\":100,\"hidden_size\":0,\"intermediate_size\":1}", "'hidden_size'"},
      {"{\"model_type\":\"llama\",\"vocab_size\":1e9}", "'vocab_size'"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    esp_model_desc d;
    esp_status st = esp_model_desc_parse(cases[i].json, strlen(cases[i].json), "m/config.json", &d);
    if (st != ESP_ERR_DATA || !strstr(esp_error_message(), cases[i].names) || !strstr(esp_error_message(), "m/config"))
      fail_msg("case %zu: status %d, message '%s'", i, st, st ? esp_error_message() : "");
  }
}

static void test_written_reads_back(void **state) {
  static const char *const dirs[] = {"llama", "llama_bias", "mistral", "qwen2", "qwen3", "gpt2"};
  char dir[256] = "model-desc-XXXXXX", path[512];
  assert_non_null(mkdtemp(dir));
  for (size_t i = 0; i < sizeof dirs / sizeof *dirs; i++) {
    esp_model_desc a, b;
    snprintf(path, sizeof path, "%s/tests/golden/models/%s", ESP_SOURCE_DIR, dirs[i]);
    if (esp_model_desc_load(path, &a) != ESP_OK) fail_msg("%s", esp_error_message());
    snprintf(path, sizeof path, "%s/config.json", dir);
    if (esp_model_desc_write(&a, path) != ESP_OK) fail_msg("%s", esp_error_message());
    if (esp_model_desc_load(dir, &b) != ESP_OK) fail_msg("%s", esp_error_message());
    assert_memory_equal(&a, &b, sizeof a);
  }
  assert_int_equal(esp_remove_tree(dir), ESP_OK);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_llama),
      cmocka_unit_test(test_windows),
      cmocka_unit_test(test_gpt2),
      cmocka_unit_test(test_bad_input),
      cmocka_unit_test(test_written_reads_back),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
