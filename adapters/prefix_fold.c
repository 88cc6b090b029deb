/* prefix_fold.c: prefix tuning through a small network (`prefix_projection`; PEFT's PrefixEncoder, after Li and Liang
 * section 4.3, who found the rows themselves hard to train): P = W2 tanh(W1 E + b1) + b2 with E [n, d], W1 [H, d] and
 * W2 [layers * 2 * d, H], d = kv_heads * head_dim. The network is folded into P at the start of each pass, and its
 * gradient is made from that of P when the lowest layer's is there; P itself is a parameter that is not updated, so
 * that the rest of the kind sees no difference. In fp32 whatever the compute type: n rows cost nothing next to a batch.
 * The file holds P alone, a prefix without a network. */
#include <math.h>

#include "adapters/internal.h"
#include "adapters/prefix.h"
#include "core/rng.h"

enum { P, E, W1, B1, W2, B2, N_PARAMS };

typedef struct fold {
  int64_t n, d, hidden, width;
  int32_t *zeros; /* backend memory [n]: a bias stands in row 0 of itself */
} fold;

static esp_status add(esp_adapter *a, const char *name, int ndim, int64_t rows, int64_t cols) {
  int i = esp_params_add(a->params, name, ndim, (const int64_t[]){rows, cols}, true);
  if (i < 0) return ESP_ERR_MEMORY;
  a->params->list[i].local = true;
  return ESP_OK;
}

esp_status esp_prefix_fold_open(esp_adapter *a, int64_t d) {
  esp_backend *be = esp_model_backend(a->model);
  fold *f = a->impl = esp_arena_alloc(a->arena, sizeof *f);
  if (!f) return ESP_ERR_MEMORY;
  *f = (fold){.n = esp_virtual_count(a), .d = d, .hidden = a->cfg.encoder_hidden ? a->cfg.encoder_hidden : d};
  f->width = a->params->list[P].shape[1];
  a->params->list[P].frozen = true;
  f->zeros = be->ops->alloc(be, ESP_MEM_PARAMS, f->n * (int64_t)sizeof *f->zeros);
  if (!f->zeros) return esp_backend_why_null(be);
  ESP_TRY(add(a, "prompt_encoder.embedding.weight", 2, f->n, d));
  ESP_TRY(add(a, "prompt_encoder.transform.0.weight", 2, f->hidden, d));
  ESP_TRY(add(a, "prompt_encoder.transform.0.bias", 1, f->hidden, 0));
  ESP_TRY(add(a, "prompt_encoder.transform.2.weight", 2, f->width, f->hidden));
  return add(a, "prompt_encoder.transform.2.bias", 1, f->width, 0);
}

void esp_prefix_fold_destroy(esp_adapter *a) {
  fold *f = a->impl;
  esp_backend *be = esp_model_backend(a->model);
  if (f && f->zeros) be->ops->free(be, f->zeros);
}

/* As torch makes an embedding and two linears. zero: the last is, so that P is. */
esp_status esp_prefix_fold_start(esp_adapter *a, bool zero) {
  const fold *f = a->impl;
  for (int i = E; i < N_PARAMS; i++) {
    const esp_param *p = &a->params->list[i];
    uint64_t stream = esp_rng_stream_name(ESP_RNG_INIT, p->name);
    float bound = 1.0f / sqrtf((float)(i < W2 ? f->d : f->hidden));
    float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)p->numel * sizeof *x);
    if (!x) return ESP_ERR_MEMORY;
    for (int64_t k = 0; k < p->numel && !(zero && i >= W2); k++)
      x[k] = i == E ? esp_rng_normal(a->cfg.seed, stream, (uint64_t)k)
                    : bound * (2.0f * esp_rng_uniform(a->cfg.seed, stream, (uint64_t)k) - 1.0f);
    esp_params_set(a->params, i, x);
    esp_mem_free(x);
  }
  return ESP_OK;
}

int64_t esp_prefix_fold_scratch(const esp_adapter *a) {
  const fold *f = a->impl;
  return f->n * f->hidden;
}

static esp_tensor row(esp_tensor bias) {
  return esp_tensor_2d(bias.data, bias.dtype, 1, esp_tensor_numel(&bias));
}

/* h0 = E W1^T + b1 and h = tanh(h0), [n, H] each. */
static void hidden(const esp_adapter *a, esp_tensor h0, esp_tensor h) {
  const fold *f = a->impl;
  esp_backend *be = a->params->be;
  be->ops->gather_rows(be, h0, row(esp_param_master(a->params, B1)), f->zeros);
  be->ops->matmul(be, h0, esp_param_master(a->params, E), false, esp_param_master(a->params, W1), true, 1.0f, 1.0f);
  be->ops->act(be, h, h0, ESP_ACT_TANH);
}

void esp_prefix_fold(const esp_adapter *a, float *scratch) {
  const fold *f = a->impl;
  const esp_params *ps = a->params;
  esp_backend *be = ps->be;
  esp_tensor h0 = esp_tensor_2d(scratch, ESP_F32, f->n, f->hidden), h = h0, p = esp_param_master(ps, P);
  h.data = scratch + f->n * f->hidden;
  hidden(a, h0, h);
  be->ops->gather_rows(be, p, row(esp_param_master(ps, B2)), f->zeros);
  be->ops->matmul(be, p, h, false, esp_param_master(ps, W2), true, 1.0f, 1.0f);
  if (ps->shadow_dtype != ESP_F32) be->ops->axpby(be, esp_param_shadow(ps, P), 1.0f, p, 0.0f);
}

void esp_prefix_fold_bwd(esp_adapter *a, float *scratch) {
  const fold *f = a->impl;
  const esp_params *ps = a->params;
  esp_backend *be = ps->be;
  esp_tensor h0 = esp_tensor_2d(scratch, ESP_F32, f->n, f->hidden), h = h0, dh = h0, dp = esp_param_grad(ps, P);
  h.data = scratch + f->n * f->hidden;
  dh.data = scratch + 2 * f->n * f->hidden;
  hidden(a, h0, h);
  be->ops->col_sum(be, esp_param_grad(ps, B2).data, dp);
  be->ops->matmul(be, esp_param_grad(ps, W2), dp, true, h, false, 1.0f, 1.0f);
  be->ops->matmul(be, dh, dp, false, esp_param_master(ps, W2), false, 1.0f, 0.0f);
  be->ops->act_bwd(be, dh, dh, h0, ESP_ACT_TANH);
  be->ops->col_sum(be, esp_param_grad(ps, B1).data, dh);
  be->ops->matmul(be, esp_param_grad(ps, W1), dh, true, esp_param_master(ps, E), false, 1.0f, 1.0f);
  be->ops->matmul(be, esp_param_grad(ps, E), dh, false, esp_param_master(ps, W1), false, 1.0f, 1.0f);
  be->ops->zero(be, dp.data, f->n * f->width * (int64_t)sizeof(float)); /* used: it is no parameter's gradient */
}
