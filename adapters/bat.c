/* bat.c: BAT, block affine transformation (the "Bone" of arXiv:2409.15371's first form, "weight guide"; PEFT's MISS
 * with init_weights "bat"): W is cut into blocks of r x r, and each row of blocks i has one trained matrix M_i [r, r],
 * zero at the start: W'_ij = W_ij (I + M_i) + M_i. r must divide both sides. The same parameters as MiSS, but the
 * change is of full rank.
 *
 * W' is a function of W, so that the kind makes the product itself, over dense rows of the frozen weight: CHUNK rows of
 * W' at a time (never all of it) as (W + [I I ...]) M + W, one thin product per row of blocks, at r/T of the cost of
 * the base product over T tokens. Backward, per chunk: dx += dy W'; dW' = dy^T x, the one product that LoRA does not
 * have; dM_i += sum_j (W_ij + I)^T dW'_ij. In bf16, W' is rounded like any weight.
 */
#include <stdio.h>
#include <string.h>

#include "adapters/internal.h"
#include "io/json.h"

enum { CHUNK = 256 };

typedef struct bat_site {
  int m;
} bat_site;

typedef struct bat_impl {
  esp_tensor eye[8]; /* [I_r I_r ...], [r, in], by width of the input */
  int n;
} bat_impl;

static esp_tensor eye_of(const esp_adapter *a, int64_t in) {
  const bat_impl *im = a->impl;
  for (int i = 0; im && i < im->n; i++)
    if (esp_tensor_cols(&im->eye[i]) == in) return im->eye[i];
  return (esp_tensor){0};
}

static esp_status make_eye(esp_adapter *a, int64_t in) {
  esp_backend *be = esp_model_backend(a->model);
  bat_impl *im = a->impl;
  int64_t r = a->cfg.r, n = r * in;
  if (eye_of(a, in).data) return ESP_OK;
  if (im->n == (int)(sizeof im->eye / sizeof im->eye[0]))
    return esp_fail(ESP_ERR_RECIPE, "adapter.type: bat on modules of more than %d input widths", im->n);
  float *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *host);
  if (!host) return ESP_ERR_MEMORY;
  for (int64_t c = 0; c < in; c++) host[c % r * in + c] = 1.0f;
  void *data = be->ops->alloc(be, ESP_MEM_PARAMS, n * (int64_t)sizeof *host);
  if (data) {
    be->ops->upload(be, data, host, n * (int64_t)sizeof *host);
    im->eye[im->n++] = esp_tensor_2d(data, ESP_F32, r, in);
  }
  esp_mem_free(host);
  return data ? ESP_OK : esp_backend_why_null(be);
}

static esp_status bat_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  int64_t r = a->cfg.r;
  if (!a->impl && !(a->impl = esp_arena_alloc(a->arena, sizeof(bat_impl)))) return ESP_ERR_MEMORY;
  for (int i = 0; i < g->n_sites; i++) {
    esp_site *s = g->sites[i];
    if (!hit[i]) continue;
    if (s->in % r || s->out % r)
      return esp_fail(ESP_ERR_RECIPE, "adapter.r: %s is [%lld, %lld], which blocks of %lld do not divide", s->path,
                      (long long)s->out, (long long)s->in, (long long)r);
    bat_site *bs = esp_arena_alloc(a->arena, sizeof *bs);
    char name[512];
    if (!bs) return ESP_ERR_MEMORY;
    snprintf(name, sizeof name, ESP_PEFT_PREFIX "%s.miss_block", s->path);
    bs->m = esp_params_add(a->params, name, 3, (int64_t[]){s->out / r, r, r}, true);
    if (bs->m < 0) return ESP_ERR_MEMORY;
    a->site_state[s->index] = bs;
  }
  return make_eye(a, g->in);
}

static void bat_destroy(esp_adapter *a) {
  esp_backend *be = esp_model_backend(a->model);
  bat_impl *im = a->impl;
  for (int i = 0; im && i < im->n; i++) be->ops->free(be, im->eye[i].data);
}

/* [out, r]: the blocks stacked; which as in esp_params_stacked. */
static esp_tensor blocks_of(const esp_adapter *a, const esp_site *s, int which) {
  const bat_site *bs = a->site_state[s->index];
  esp_tensor t = which == 2 ? esp_param_grad(a->params, bs->m) : esp_param_shadow(a->params, bs->m);
  return esp_tensor_2d(t.data, t.dtype, s->out, a->cfg.r);
}

/* A chunk of W + [I I ...], fp32 [n, in], in whole rows of blocks. */
static void chunk_guide(esp_adapter *a, esp_run *run, esp_tensor base, esp_tensor guide) {
  const esp_backend_ops *ops = run->be->ops;
  esp_tensor eye = eye_of(a, esp_tensor_cols(&base));
  ops->axpby(run->be, guide, 1.0f, base, 0.0f);
  for (int64_t i = 0; i < esp_tensor_rows(&base); i += a->cfg.r)
    ops->axpby(run->be, esp_tensor_rows_view(&guide, i, a->cfg.r), 1.0f, eye, 1.0f);
}

/* Row of blocks i of a contiguous chunk, its blocks one under the other by rows: [in, r] as a list of vectors that one
 * M_i takes from the right. */
static esp_tensor block_row(const esp_adapter *a, esp_tensor t, int64_t i) {
  esp_tensor v = esp_tensor_rows_view(&t, i, a->cfg.r);
  return esp_tensor_2d(v.data, v.dtype, esp_tensor_cols(&t), a->cfg.r);
}

/* The same chunk of W' in the compute type. */
static void chunk_weight(esp_adapter *a, esp_run *run, esp_tensor base, esp_tensor guide, esp_tensor m,
                         esp_tensor out) {
  const esp_backend_ops *ops = run->be->ops;
  ops->axpby(run->be, out, 1.0f, base, 0.0f);
  for (int64_t i = 0; i < esp_tensor_rows(&base); i += a->cfg.r)
    ops->matmul(run->be, block_row(a, out, i), block_row(a, guide, i), false, esp_tensor_rows_view(&m, i, a->cfg.r),
                false, 1.0f, 1.0f);
}

static int64_t chunk_rows(const esp_adapter *a, const esp_site *s) {
  int64_t n = a->cfg.r * (CHUNK / a->cfg.r > 0 ? CHUNK / a->cfg.r : 1);
  return n < s->out ? n : s->out;
}

typedef struct scratch { /* of one chunk */
  int64_t step;
  esp_tensor w, guide, dw;
} scratch;

static scratch take(const esp_adapter *a, esp_run *run, const esp_site *s, bool backward) {
  int64_t n = chunk_rows(a, s);
  scratch c = {.step = n};
  c.w = esp_stack_tensor(run->stack, run->compute, n, s->in);
  c.guide = esp_stack_tensor(run->stack, ESP_F32, n, s->in);
  if (backward) c.dw = esp_stack_tensor(run->stack, ESP_F32, n, s->in);
  return c;
}

static void bat_forward(esp_adapter *a, esp_run *run, esp_site *s, const esp_wview *w, esp_tensor bias, esp_tensor x,
                        esp_tensor y) {
  int64_t mark = esp_stack_mark(run->stack);
  scratch c = take(a, run, s, false);
  esp_tensor all = blocks_of(a, s, 0);
  for (int64_t r0 = 0; r0 < s->out; r0 += c.step) {
    int64_t n = s->out - r0 < c.step ? s->out - r0 : c.step;
    esp_tensor base = esp_tensor_rows_view(&w->dense, r0, n), guide = esp_tensor_rows_view(&c.guide, 0, n), b = bias;
    esp_wview v = {.out = n, .in = s->in, .dense = esp_tensor_rows_view(&c.w, 0, n)};
    chunk_guide(a, run, base, guide);
    chunk_weight(a, run, base, guide, esp_tensor_rows_view(&all, r0, n), v.dense);
    if (b.data) b = esp_tensor_1d((char *)b.data + (size_t)r0 * esp_dtype_size(b.dtype), b.dtype, n);
    run->be->ops->linear(run->be, esp_tensor_cols_view(&y, r0, n), x, &v, b, NULL, 0, 0.0f);
  }
  esp_stack_release(run->stack, mark);
}

static void bat_backward(esp_adapter *a, esp_run *run, esp_site *s, const esp_wview *w, esp_tensor x, esp_tensor dy,
                         esp_tensor dx, float beta) {
  const esp_backend_ops *ops = run->be->ops;
  int64_t mark = esp_stack_mark(run->stack);
  scratch c = take(a, run, s, true);
  esp_tensor all = blocks_of(a, s, 0), grad = a->trainable ? blocks_of(a, s, 2) : all;
  for (int64_t r0 = 0; r0 < s->out; r0 += c.step) {
    int64_t n = s->out - r0 < c.step ? s->out - r0 : c.step;
    esp_tensor base = esp_tensor_rows_view(&w->dense, r0, n), guide = esp_tensor_rows_view(&c.guide, 0, n);
    esp_tensor dyc = esp_tensor_cols_view(&dy, r0, n), dw = esp_tensor_rows_view(&c.dw, 0, n);
    esp_wview v = {.out = n, .in = s->in, .dense = esp_tensor_rows_view(&c.w, 0, n)};
    chunk_guide(a, run, base, guide);
    if (dx.data) {
      chunk_weight(a, run, base, guide, esp_tensor_rows_view(&all, r0, n), v.dense);
      ops->linear_dx(run->be, dx, dyc, &v, NULL, 0, r0 > 0 ? 1.0f : beta);
    }
    if (!a->trainable) continue;
    ops->matmul(run->be, dw, dyc, true, x, false, 1.0f, 0.0f);
    for (int64_t i = 0; i < n; i += a->cfg.r)
      ops->matmul(run->be, esp_tensor_rows_view(&grad, r0 + i, a->cfg.r), block_row(a, guide, i), true,
                  block_row(a, dw, i), false, 1.0f, 1.0f);
  }
  esp_stack_release(run->stack, mark);
}

static esp_status bat_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  const bat_site *bs = a->site_state[s->index];
  int64_t r = a->cfg.r, numel = a->params->list[bs->m].numel;
  float *m = esp_mem_alloc(ESP_MEM_HOST, (size_t)(numel + s->in) * sizeof *m), *row = m + numel;
  if (!m) return ESP_ERR_MEMORY;
  esp_params_get(a->params, bs->m, m);
  for (int64_t i = 0; i < n; i++) {
    const float *block = m + (r0 + i) / r * r * r, *own = block + (r0 + i) % r * r;
    float *wi = w + i * s->in;
    for (int64_t c = 0; c < s->in; c++) {
      float sum = own[c % r];
      for (int64_t k = 0; k < r; k++) sum += wi[c - c % r + k] * block[k * r + c % r];
      row[c] = wi[c] + sum;
    }
    for (int64_t c = 0; c < s->in; c++) wi[c] = row[c];
  }
  esp_mem_free(m);
  return ESP_OK;
}

static bool bat_config_is(const json_t *j) {
  const char *s = json_string_value(json_object_get(j, "init_weights"));
  return s && strcmp(s, "bat") == 0;
}

static esp_status bat_config_check(const esp_adapter_cfg *c) {
  ESP_TRY(esp_config_refuse(c, "bat", ESP_CFG_DROPOUT));
  return esp_plain_config_check(c);
}

const esp_adapter_kind esp_kind_bat = {
    .name = "bat",
    .peft_type = "MISS",
    .summary = "block affine transformation, W' = W (I + M) + M by rows of blocks (arXiv:2409.15371)",
    .site_kinds = 1u << ESP_SITE_LINEAR,
    .mergeable = true,
    .targets = true,
    .alone = true,
    .product = ESP_PRODUCT_OWN_DENSE,
    .declare = bat_declare,
    .site_forward = bat_forward,
    .site_backward = bat_backward,
    .destroy = bat_destroy,
    .config_write = esp_miss_config_write,
    .config_read = esp_miss_config_read,
    .config_check = bat_config_check,
    .config_is = bat_config_is,
    .materialise = bat_materialise,
};
