/* adapter_fixture.h: tiny bases for the adapter tests, made by the engine itself: a fresh random model whose every
 * parameter is then shaken (so that norms and biases matter) and saved through the kind `full`. Everything runs on the
 * backend that backend_env.h names. */
#ifndef TESTS_ADAPTER_FIXTURE_H
#define TESTS_ADAPTER_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "adapters/adapter.h"
#include "backend_env.h"
#include "core/rng.h"
#include "io/file.h"
#include "io/safetensors.h"

#define OK(expr)                                                                                                       \
  do {                                                                                                                 \
    esp_status ok_ = (expr);                                                                                           \
    if (ok_ != ESP_OK) fail_msg("%s: status %d: %s", #expr, (int)ok_, esp_error_message());                            \
  } while (0)

static const char *const fx_qwen =
    "{\"model_type\":\"qwen2\",\"architectures\":[\"Qwen2ForCausalLM\"],\"hidden_size\":32,\"intermediate_size\":48,"
    "\"num_hidden_layers\":2,\"num_attention_heads\":4,\"num_key_value_heads\":2,\"vocab_size\":48,"
    "\"max_position_embeddings\":64,\"rms_norm_eps\":1e-05,\"rope_theta\":10000.0,\"hidden_act\":\"silu\","
    "\"tie_word_embeddings\":false,\"torch_dtype\":\"float32\"}";
static const char *const fx_llama_tied =
    "{\"model_type\":\"llama\",\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":32,\"intermediate_size\":48,"
    "\"num_hidden_layers\":2,\"num_attention_heads\":4,\"num_key_value_heads\":2,\"vocab_size\":48,"
    "\"max_position_embeddings\":64,\"rms_norm_eps\":1e-05,\"rope_theta\":10000.0,\"hidden_act\":\"silu\","
    "\"tie_word_embeddings\":true,\"torch_dtype\":\"float32\"}";
static const char *const fx_gpt2 =
    "{\"model_type\":\"gpt2\",\"architectures\":[\"GPT2LMHeadModel\"],\"n_embd\":32,\"n_inner\":64,\"n_layer\":2,"
    "\"n_head\":4,\"vocab_size\":48,\"n_positions\":64,\"n_ctx\":64,\"layer_norm_epsilon\":1e-05,"
    "\"activation_function\":\"gelu_new\",\"tie_word_embeddings\":true,\"torch_dtype\":\"float32\"}";

enum { FX_VOCAB = 48, FX_T = 23 };

typedef struct fx_run { /* an opened base with its stack */
  esp_backend *be;
  esp_model *m;
  esp_stack stack;
} fx_run;

static char fx_root[64];

static inline const char *fx_path(const char *name) {
  static char path[4][256];
  static int at;
  at = (at + 1) % 4;
  snprintf(path[at], sizeof path[at], "%s/%s", fx_root, name);
  return path[at];
}

static inline void fx_open(fx_run *r, const char *dir, esp_dtype compute, bool random) {
  esp_model_options opt = {.compute = compute, .random_init = random, .seed = 7};
  OK(esp_backend_create(test_backend_name(), &r->be));
  OK(esp_model_open(dir, r->be, &opt, &r->m));
  OK(esp_stack_init(&r->stack, r->be, 16 << 20));
}

static inline void fx_close(fx_run *r) {
  esp_stack_deinit(&r->stack);
  esp_model_close(r->m);
  esp_backend_destroy(r->be);
}

/* Adds sd * N(0,1) to every parameter, but not to those that a file cannot hold. */
static inline void fx_shake(esp_adapter *a, float sd, uint64_t seed) {
  for (int i = 0; i < a->params->count; i++) {
    int64_t n = a->params->list[i].numel;
    if (a->params->list[i].local) continue;
    float *x = malloc((size_t)n * sizeof *x);
    esp_params_get(a->params, i, x);
    for (int64_t k = 0; k < n; k++) x[k] += sd * esp_rng_normal(seed, (uint64_t)i, (uint64_t)k);
    esp_params_set(a->params, i, x);
    free(x);
  }
}

/* All gradients, and all masters, as host memory; free() it. */
static inline float *fx_grads(const esp_adapter *a) {
  return test_read(a->params->be, a->params->grad, a->params->total * (int64_t)sizeof(float));
}
static inline float *fx_masters(const esp_adapter *a) {
  return test_read(a->params->be, a->params->master, a->params->total * (int64_t)sizeof(float));
}

static inline void fx_make_base(const char *name, const char *config) {
  char dir[256];
  snprintf(dir, sizeof dir, "%s", fx_path("fresh"));
  OK(esp_mkdirs(dir));
  OK(esp_file_write_atomic(fx_path("fresh/config.json"), config, strlen(config)));
  fx_run r;
  fx_open(&r, dir, ESP_F32, true);
  esp_adapter *full;
  OK(esp_adapter_create(r.m, &(esp_adapter_cfg){.type = "full"}, "default", false, &full));
  fx_shake(full, 0.08f, 3);
  OK(esp_adapter_save(full, fx_path(name)));
  esp_adapter_destroy(full);
  fx_close(&r);
}

static inline void fx_setup(void) {
  test_backend_or_exit();
  snprintf(fx_root, sizeof fx_root, "/tmp/esp-adapters-XXXXXX");
  if (!mkdtemp(fx_root)) abort();
  fx_make_base("qwen", fx_qwen);
  fx_make_base("llama", fx_llama_tied);
  fx_make_base("gpt2", fx_gpt2);
}

static inline void fx_teardown(void) {
  if (esp_remove_tree(fx_root) != ESP_OK) fprintf(stderr, "%s\n", esp_error_message());
}

/* Two packed sequences; ids repeat so that embedding gradients meet. */
typedef struct fx_batch {
  int32_t ids[FX_T], targets[FX_T], positions[FX_T], cu[3];
  float weights[FX_T];
  esp_batch b;
} fx_batch;

static inline void fx_fill(fx_batch *f) {
  for (int i = 0; i < FX_T; i++) {
    int start = i < 9 ? 0 : 9;
    f->ids[i] = (int32_t)((i * 7 + 3) % 17 + (i % 5 == 0 ? 20 : 0));
    f->targets[i] = (int32_t)((i * 11 + 5) % FX_VOCAB);
    f->positions[i] = i - start;
    f->weights[i] = i % 3 == 1 ? 0.0f : 1.0f;
  }
  f->cu[0] = 0;
  f->cu[1] = 9;
  f->cu[2] = FX_T;
  f->b = (esp_batch){.tokens = FX_T,
                     .ids = f->ids,
                     .targets = f->targets,
                     .positions = f->positions,
                     .weights = f->weights,
                     .cu_seqlens = f->cu,
                     .n_seqs = 2};
}

static inline void fx_logits(fx_run *r, const esp_batch *b, float *out) {
  int32_t rows[FX_T];
  for (int i = 0; i < FX_T; i++) rows[i] = i;
  OK(esp_model_load_weights(r->m));
  OK(esp_model_logits(r->m, &r->stack, b, rows, (int)b->tokens, out));
}

static inline double fx_max_abs(const float *x, int64_t n) {
  double m = 0;
  for (int64_t i = 0; i < n; i++) m = x[i] > m ? x[i] : -x[i] > m ? -x[i] : m;
  return m;
}

/* max |a - b| / max |b| */
static inline double fx_rel(const float *a, const float *b, int64_t n) {
  double d = 0;
  for (int64_t i = 0; i < n; i++) {
    double e = (double)a[i] - (double)b[i];
    d = e > d ? e : -e > d ? -e : d;
  }
  return d / fx_max_abs(b, n);
}

static inline double fx_loss(fx_run *r, const esp_batch *b, bool train, esp_ckpt_mode ckpt, int64_t draw) {
  esp_loss_out out;
  OK(esp_model_load_weights(r->m));
  OK(esp_model_step(r->m, &r->stack, b, ckpt, train, 1.0f, 11, draw, &out, NULL));
  return out.loss_sum;
}

#endif
