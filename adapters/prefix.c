/* prefix.c: prefix tuning (Li and Liang 2021, arXiv:2101.00190): in every layer n trained keys and values stand in
 * front of every sequence, o = attention(q, [P_k; k], [P_v; v]). As in PEFT they are what a cache would hold: keys are
 * not rotated and pass no norm, and tokens of the text begin at position n. Here the n rows run through the model like
 * any others (src/model/virtual.c); what a layer made of them is replaced by the trained rows before attention reads
 * it, and in backward their gradient is taken out there, so that nothing of those rows flows on. One parameter [n,
 * layers * 2 * kv_heads * head_dim], keys before values in each layer. */
#include <string.h>

#include "adapters/internal.h"
#include "adapters/prefix.h"
#include "core/rng.h"
#include "io/json.h"

static int64_t kv_width(const esp_adapter *a) {
  const esp_model_desc *d = esp_model_describe(a->model);
  return (int64_t)d->kv_heads * d->head_dim;
}

static bool from_zero(const esp_adapter_cfg *c) {
  return c->prompt_init && strcmp(c->prompt_init, "zero") == 0;
}

static esp_status prefix_check(const esp_adapter_cfg *c) {
  ESP_TRY(esp_virtual_check(c));
  if (c->prompt_init && strcmp(c->prompt_init, "default") && strcmp(c->prompt_init, "random") && !from_zero(c))
    return esp_fail(ESP_ERR_RECIPE, "adapter.prompt_init: '%s' is not for prefix, which has random and zero",
                    c->prompt_init);
  return ESP_OK;
}

static esp_status prefix_open(esp_adapter *a) {
  ESP_TRY(esp_virtual_params(a, esp_model_describe(a->model)->layers * 2 * kv_width(a)));
  return a->cfg.prefix_projection ? esp_prefix_fold_open(a, kv_width(a)) : ESP_OK;
}

static void prefix_destroy(esp_adapter *a) {
  if (a->cfg.prefix_projection) esp_prefix_fold_destroy(a);
}

static esp_status prefix_start(esp_adapter *a) {
  const esp_param *p = &a->params->list[0];
  uint64_t stream = esp_rng_stream_name(ESP_RNG_INIT, p->name);
  if (a->cfg.prefix_projection) return esp_prefix_fold_start(a, from_zero(&a->cfg));
  if (from_zero(&a->cfg)) return ESP_OK;
  float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)p->numel * sizeof *x);
  if (!x) return ESP_ERR_MEMORY;
  for (int64_t i = 0; i < p->numel; i++) x[i] = esp_rng_normal(a->cfg.seed, stream, (uint64_t)i);
  esp_params_set(a->params, 0, x);
  esp_mem_free(x);
  return ESP_OK;
}

/* The rows of a layer in a tensor [n, layers * 2 * width] of all: keys, values. */
static esp_tensor part(esp_adapter *a, esp_tensor all, int layer, bool values) {
  int64_t width = kv_width(a);
  return esp_tensor_cols_view(&all, (2 * layer + values) * width, width);
}

static void put(esp_run *run, esp_tensor rows, esp_tensor x) {
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor each = esp_stack_tensor(run->stack, run->compute, run->n_virtual, rows.shape[1]);
  run->be->ops->gather_rows(run->be, each, rows, run->d_which);
  run->be->ops->scatter_rows(run->be, x, each, run->d_virtual);
  esp_stack_release(run->stack, mark);
}

/* The rows of the file from those of the network, which the last step has changed. */
static esp_status prefix_savable(const esp_adapter *a) {
  esp_backend *be = a->params->be;
  if (!a->cfg.prefix_projection) return ESP_OK;
  float *scratch = be->ops->alloc(be, ESP_MEM_WORKSPACE, 2 * esp_prefix_fold_scratch(a) * (int64_t)sizeof *scratch);
  if (!scratch) return esp_backend_why_null(be);
  esp_prefix_fold(a, scratch);
  esp_status st = esp_backend_sync(be);
  be->ops->free(be, scratch);
  return st;
}

static void prefix_kv(esp_adapter *a, esp_run *run, int layer, esp_tensor k, esp_tensor v) {
  if (a->cfg.prefix_projection && layer == 0) {
    int64_t mark = esp_stack_mark(run->stack);
    esp_prefix_fold(a, esp_stack_push(run->stack, 2 * esp_prefix_fold_scratch(a) * (int64_t)sizeof(float)));
    esp_stack_release(run->stack, mark);
  }
  esp_tensor all = esp_param_shadow(a->params, 0);
  put(run, part(a, all, layer, false), k);
  put(run, part(a, all, layer, true), v);
}

/* Rows of one sequence lie together, so the sum over sequences is one over the columns of [sequences, n * width]. */
static void take(esp_adapter *a, esp_run *run, esp_tensor grad, esp_tensor dx) {
  esp_backend *be = run->be;
  int64_t mark = esp_stack_mark(run->stack), n = esp_virtual_count(a), width = kv_width(a);
  esp_tensor each = esp_stack_tensor(run->stack, run->compute, run->n_virtual, width);
  if (a->trainable) {
    esp_tensor sum = esp_stack_tensor(run->stack, ESP_F32, n, width);
    be->ops->gather_rows(be, each, dx, run->d_virtual);
    be->ops->zero(be, sum.data, esp_tensor_bytes(&sum));
    be->ops->col_sum(be, sum.data, esp_tensor_2d(each.data, each.dtype, run->n_virtual / n, n * width));
    be->ops->axpby(be, grad, 1.0f, sum, 1.0f);
  }
  be->ops->zero(be, each.data, esp_tensor_bytes(&each));
  be->ops->scatter_rows(be, dx, each, run->d_virtual);
  esp_stack_release(run->stack, mark);
}

static void prefix_kv_bwd(esp_adapter *a, esp_run *run, int layer, esp_tensor dk, esp_tensor dv) {
  esp_tensor all = a->trainable ? esp_param_grad(a->params, 0) : esp_param_shadow(a->params, 0);
  take(a, run, part(a, all, layer, false), dk);
  take(a, run, part(a, all, layer, true), dv);
  if (!a->cfg.prefix_projection || layer > 0 || !a->trainable) return;
  int64_t mark = esp_stack_mark(run->stack);
  esp_prefix_fold_bwd(a, esp_stack_push(run->stack, 3 * esp_prefix_fold_scratch(a) * (int64_t)sizeof(float)));
  esp_stack_release(run->stack, mark);
}

static void prefix_config_write(const esp_adapter *a, json_t *j) {
  int64_t width = kv_width(a);
  esp_virtual_config_write(a, j, esp_model_describe(a->model)->kv_heads, width);
  json_object_set_new(j, "encoder_hidden_size",
                      json_integer((json_int_t)(a->cfg.encoder_hidden ? a->cfg.encoder_hidden : width)));
  json_object_set_new(j, "init_weights", from_zero(&a->cfg) ? json_string("zero") : json_null());
  json_object_set_new(j, "prefix_projection", json_false()); /* the file holds what the network gives */
}

static esp_status prefix_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  const char *init = NULL;
  ESP_TRY(esp_virtual_config_read(j, path, c));
  ESP_TRY(esp_json_str(j, "init_weights", path, 0, &init));
  if (init && strcmp(init, "zero")) return esp_fail(ESP_ERR_DATA, "%s: init_weights '%s' is not known", path, init);
  if (init) c->prompt_init = "zero";
  ESP_TRY(esp_json_i64(j, "encoder_hidden_size", path, 0, &c->encoder_hidden)); /* of a network that is gone */
  return ESP_OK;
}

const esp_adapter_kind esp_kind_prefix = {
    .name = "prefix",
    .peft_type = "PREFIX_TUNING",
    .summary = "trained keys and values in front of every sequence, per layer (Li and Liang 2021, arXiv:2101.00190)",
    .alone = true,
    .virtual_tokens = esp_virtual_count,
    .open = prefix_open,
    .start = prefix_start,
    .destroy = prefix_destroy,
    .savable = prefix_savable,
    .kv = prefix_kv,
    .kv_bwd = prefix_kv_bwd,
    .config_write = prefix_config_write,
    .config_read = prefix_config_read,
    .config_check = prefix_check,
};
