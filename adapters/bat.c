/* bat.c: BAT, block affine transformation (the "Bone" of arXiv:2409.15371's first form, "weight guide"; PEFT's MISS
 * with init_weights "bat"): W is cut into blocks of r x r, and each row of blocks i has one trained matrix M_i [r, r],
 * zero at the start: W'_ij = W_ij (I + M_i) + M_i. r must divide both sides. The same parameters as MiSS, but the
 * change is of full rank.
 *
 * W (I + M) is a function of W, so that the kind makes the product itself, over dense rows of the frozen weight: CHUNK
 * rows at a time, one product of blocks, at r/T of the cost of the base product over T tokens. What M does alone is a
 * MiSS: y += (sum of shards) M^T, a tail. Backward, per chunk: dx += dy W (I + M); dW' = dy^T x, the one product that
 * LoRA does not have; dM_i += sum_j W_ij^T dW'_ij. W (I + M) and dW' are rounded to the compute type.
 */
#include <stdio.h>
#include <string.h>

#include "adapters/internal.h"
#include "io/json.h"

enum { CHUNK = 768 }; /* rows; smaller matrices are taken whole, larger ones never */

typedef struct bat_site {
  int m;
  int64_t chunk; /* rows of blocks at a time */
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
  esp_dtype t = esp_model_compute(a->model);
  int64_t bytes = n * (int64_t)esp_dtype_size(t);
  float *ones = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *ones);
  void *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)bytes), *data = NULL;
  esp_status st = ones && host ? ESP_OK : ESP_ERR_MEMORY;
  if (st == ESP_OK) {
    for (int64_t c = 0; c < in; c++) ones[c % r * in + c] = 1.0f;
    esp_convert(host, t, ones, ESP_F32, n);
    data = be->ops->alloc(be, ESP_MEM_PARAMS, bytes);
    if (!data) st = esp_backend_why_null(be);
  }
  if (st == ESP_OK) {
    be->ops->upload(be, data, host, bytes);
    im->eye[im->n++] = esp_tensor_2d(data, t, r, in);
  }
  esp_mem_free(ones);
  esp_mem_free(host);
  return st;
}

/* Chunks are of one size: the most rows of blocks within CHUNK rows that divide the site. */
static int64_t chunk_blocks(int64_t blocks, int64_t r) {
  int64_t m = CHUNK / r > 0 ? CHUNK / r : 1;
  if (m > blocks) m = blocks;
  while (blocks % m) m--;
  return m;
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
    bs->chunk = chunk_blocks(s->out / r, r);
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

/* Rows of W, m rows of blocks: all vectors of r in the first of them, then in the second, ... Each row of blocks is a
 * group of one product of blocks. */
static esp_tensor vectors(const esp_adapter *a, esp_tensor w, int64_t m) {
  int64_t r = a->cfg.r;
  return (esp_tensor){w.data, w.dtype, 3, {m, esp_tensor_numel(&w) / (m * r), r, 1}, r};
}

/* out = W (I + M) of a chunk */
static void chunk_weight(esp_adapter *a, esp_run *run, esp_tensor out, esp_tensor w, esp_tensor m, int64_t n) {
  run->be->ops->axpby(run->be, out, 1.0f, w, 0.0f);
  run->be->ops->block_matmul(run->be, vectors(a, out, n), vectors(a, w, n), m, (int)n, false, false, 1.0f, 1.0f);
}

/* The sum of the input's shards, [T, r]: what M alone is applied to. */
static esp_tensor shard_sum(esp_adapter *a, esp_run *run, esp_tensor x) {
  esp_tensor t = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), a->cfg.r);
  run->be->ops->matmul(run->be, t, x, false, eye_of(a, esp_tensor_cols(&x)), true, 1.0f, 0.0f);
  return t;
}

static void bat_forward(esp_adapter *a, esp_run *run, esp_site *s, const esp_wview *w, esp_tensor bias, esp_tensor x,
                        esp_tensor y) {
  int64_t mark = esp_stack_mark(run->stack), n = ((bat_site *)a->site_state[s->index])->chunk, rows = n * a->cfg.r;
  esp_tensor c = esp_stack_tensor(run->stack, run->compute, rows, s->in);
  esp_tensor m = blocks_of(a, s, 0), t = shard_sum(a, run, x);
  for (int64_t r0 = 0; r0 < s->out; r0 += rows) {
    esp_tensor mc = esp_tensor_rows_view(&m, r0, rows), b = bias;
    esp_wview v = {.out = rows, .in = s->in, .dense = c};
    chunk_weight(a, run, c, esp_tensor_rows_view(&w->dense, r0, rows), mc, n);
    if (b.data) b = esp_tensor_1d((char *)b.data + (size_t)r0 * esp_dtype_size(b.dtype), b.dtype, rows);
    run->be->ops->linear(run->be, esp_tensor_cols_view(&y, r0, rows), x, &v, b, &(esp_tail){0, t, mc}, 1, 0.0f);
  }
  esp_stack_release(run->stack, mark);
}

static void bat_backward(esp_adapter *a, esp_run *run, esp_site *s, const esp_wview *w, esp_tensor x, esp_tensor dy,
                         esp_tensor dx, float beta) {
  const esp_backend_ops *ops = run->be->ops;
  int64_t mark = esp_stack_mark(run->stack), n = ((bat_site *)a->site_state[s->index])->chunk, rows = n * a->cfg.r;
  esp_tensor c = esp_stack_tensor(run->stack, run->compute, rows, s->in);
  esp_tensor m = blocks_of(a, s, 0), t = shard_sum(a, run, x), grad = m;
  if (a->trainable) {
    grad = blocks_of(a, s, 2);
    ops->matmul(run->be, grad, dy, true, t, false, 1.0f, 1.0f);
  }
  if (dx.data) ops->matmul(run->be, t, dy, false, m, false, 1.0f, 0.0f); /* from here on t is its gradient */
  for (int64_t r0 = 0; r0 < s->out; r0 += rows) {
    esp_tensor dyc = esp_tensor_cols_view(&dy, r0, rows), wc = esp_tensor_rows_view(&w->dense, r0, rows);
    esp_wview v = {.out = rows, .in = s->in, .dense = c};
    if (dx.data) {
      chunk_weight(a, run, c, wc, esp_tensor_rows_view(&m, r0, rows), n);
      ops->linear_dx(run->be, dx, dyc, &v, &(esp_tail){0, t, eye_of(a, s->in)}, r0 == 0, r0 > 0 ? 1.0f : beta);
    }
    if (!a->trainable) continue;
    ops->matmul(run->be, c, dyc, true, x, false, 1.0f, 0.0f); /* dW' takes the place of W' */
    ops->block_grad(run->be, esp_tensor_rows_view(&grad, r0, rows), vectors(a, wc, n), vectors(a, c, n), (int)n, false,
                    1.0f);
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
