/* model_fixture.h: opening the golden models, their batches, and a store that trains every tensor of a model;
 * on the backend that backend_env.h names. */
#ifndef ESP_TESTS_MODEL_FIXTURE_H
#define ESP_TESTS_MODEL_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend_env.h"
#include "io/file.h"
#include "io/safetensors.h"
#include "model/model.h"

#define FX_DIR ESP_SOURCE_DIR "/tests/golden/models/"
static const char *const fx_families[] = {"llama", "llama_bias", "mistral", "qwen2", "qwen3", "gpt2"};
#define FX_FAMILIES ((int)(sizeof fx_families / sizeof *fx_families))

typedef struct fx {
  esp_backend *be;
  esp_model *m;
  esp_stack stack;
  esp_params *ps; /* fx_train_all */
  esp_st *expect;
  esp_batch b;
} fx;

#define FX_OK(expr)                                                                                                    \
  do {                                                                                                                 \
    if ((expr) != ESP_OK) fail_msg("%s: %s", #expr, esp_error_message());                                              \
  } while (0)

static inline const void *fx_data(const fx *f, const char *name) {
  const esp_st_entry *e = esp_st_find(f->expect, name);
  if (!e) fail_msg("fixture lacks %s", name);
  return e->data;
}

/* Every stored tensor becomes a parameter; a tied head shares the embedding's. */
static inline void fx_train_all(fx *f) {
  esp_site **sites;
  int n = esp_model_sites(f->m, &sites);
  bool tied = esp_model_describe(f->m)->tied;
  FX_OK(esp_params_create(f->be, &f->ps));
  for (int i = 0; i < n; i++) {
    esp_site *s = sites[i];
    if (s->is_head && tied) {
      esp_site *e = sites[0];
      s->trained = e->trained;
      s->trained_weight = e->trained_weight;
      continue;
    }
    char name[256];
    int64_t shape[2] = {s->kind == ESP_SITE_EMBED ? s->in : s->out, s->kind == ESP_SITE_EMBED ? s->out : s->in};
    s->trained = f->ps;
    snprintf(name, sizeof name, "%s.weight", s->path);
    s->trained_weight = esp_params_add(f->ps, name, s->kind == ESP_SITE_NORM ? 1 : 2, shape, false);
    assert_true(s->trained_weight >= 0);
  }
  for (int i = 0; i < n; i++) { /* after the weights, so that q, k and v stay neighbours */
    esp_site *s = sites[i];
    if (!s->bias_tensor) continue;
    char name[256];
    snprintf(name, sizeof name, "%s.bias", s->path);
    s->trained_bias = esp_params_add(f->ps, name, 1, &s->out, true);
  }
  FX_OK(esp_params_finalize(f->ps, esp_model_compute(f->m), true));
  for (int i = 0; i < n; i++) {
    esp_site *s = sites[i];
    int64_t numel = f->ps->list[s->trained_weight].numel;
    float *w = calloc((size_t)numel, sizeof *w);
    FX_OK(esp_site_read_weight(f->m, s, w));
    esp_params_set(f->ps, s->trained_weight, w);
    if (s->bias_tensor) {
      FX_OK(esp_site_read_bias(f->m, s, w));
      esp_params_set(f->ps, s->trained_bias, w);
    }
    free(w);
  }
}

static inline void fx_batch(fx *f, const char *dir) {
  char path[1024];
  snprintf(path, sizeof path, "%s/expect.safetensors", dir);
  FX_OK(esp_st_open(path, &f->expect));
  static int32_t positions[256];
  const esp_st_entry *ids = esp_st_find(f->expect, "ids"), *cu = esp_st_find(f->expect, "cu");
  f->b = (esp_batch){.tokens = ids->shape[0],
                     .ids = ids->data,
                     .targets = fx_data(f, "targets"),
                     .weights = fx_data(f, "weights"),
                     .positions = positions,
                     .cu_seqlens = cu->data,
                     .n_seqs = (int)cu->shape[0] - 1};
  for (int s = 0; s < f->b.n_seqs; s++)
    for (int32_t t = f->b.cu_seqlens[s]; t < f->b.cu_seqlens[s + 1]; t++) positions[t] = t - f->b.cu_seqlens[s];
}

static inline void fx_open_dir(fx *f, const char *dir, const char *backend, esp_dtype compute) {
  *f = (fx){0};
  FX_OK(esp_backend_create(backend, &f->be));
  esp_model_options opt = {.compute = compute};
  FX_OK(esp_model_open(dir, f->be, &opt, &f->m));
  FX_OK(esp_stack_init(&f->stack, f->be, esp_backend_counts(f->be) ? 0 : 16 << 20));
}

static inline void fx_open(fx *f, const char *family, const char *backend, esp_dtype compute) {
  char dir[512];
  snprintf(dir, sizeof dir, "%s%s", FX_DIR, family);
  fx_open_dir(f, dir, backend, compute);
  fx_batch(f, dir);
}

/* Gradients as host memory (of one parameter, of all); free() it. */
static inline float *fx_grad(const fx *f, int param) {
  return test_read(f->be, esp_param_grad(f->ps, param).data, f->ps->list[param].numel * (int64_t)sizeof(float));
}
static inline float *fx_grads(const fx *f) {
  return test_read(f->be, f->ps->grad, f->ps->total * (int64_t)sizeof(float));
}

static inline void fx_close(fx *f) {
  esp_st_close(f->expect);
  esp_model_close(f->m);
  esp_params_destroy(f->ps);
  esp_stack_deinit(&f->stack);
  esp_backend_destroy(f->be);
}

static inline double fx_weight_sum(const fx *f) {
  double s = 0;
  for (int64_t t = 0; t < f->b.tokens; t++) s += (double)f->b.weights[t];
  return s;
}

/* ||a - b|| / ||b|| */
static inline double fx_rel(const float *a, const float *b, int64_t n) {
  double d = 0, s = 0;
  for (int64_t i = 0; i < n; i++) {
    d += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    s += (double)b[i] * (double)b[i];
  }
  return sqrt(d) / (s > 0 ? sqrt(s) : 1.0);
}

#endif
