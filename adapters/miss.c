/* miss.c: MiSS, matrix shard sharing (Kang et al., arXiv:2409.15371; PEFT's MISS, once Bone): the input is cut into
 * shards of r columns (zeros behind the last) which share one matrix: y = W x + b + D^T sum_g drop(x)_g with D [r, out]
 * and no scale. Exactly a LoRA with the frozen A = [I_r I_r ...] and B = D^T: A is a constant on the backend, so that
 * the sum of shards is one thin product, and one sum serves all sites that read the same input. Neighbouring sites lie
 * back to back in the store: one tail forward, one product for their gradient and one for the way back, for less than
 * LoRA's work. `miss_type: mini` has D [r, mini_r] repeated over the outputs, which saves parameters and nothing else.
 *
 * The store holds D^T, [out, r]: the layout of a tail. The file holds PEFT's [r, out].
 */
#include <stdio.h>
#include <string.h>

#include "adapters/internal.h"
#include "io/json.h"

typedef struct miss_site {
  int64_t r; /* first: esp_adapter_rank reads it */
  int b;
} miss_site;

typedef struct miss_span { /* sites whose D lie back to back */
  int64_t col0, out;
  int first, n;
} miss_span;

typedef struct miss_group {
  int n;
  miss_span spans[3];
  esp_tensor a;     /* [r, in], constant */
  esp_tensor t, dt; /* [T, r] */
  esp_tensor w[3];  /* what stands in for D^T, [out, r] */
  bool late_fwd, late_bwd;
} miss_group;

typedef struct miss_impl {
  esp_tensor a[8]; /* by width of the input */
  int n;
  int32_t *zeros; /* [most repetitions] for mini */
} miss_impl;

static bool is_mini(const esp_adapter_cfg *c) {
  return c->miss_type && strcmp(c->miss_type, "mini") == 0;
}

static esp_status shards(esp_adapter *a, int64_t in, esp_tensor *out) {
  miss_impl *im = a->impl;
  esp_backend *be = esp_model_backend(a->model);
  esp_dtype t = esp_model_compute(a->model);
  int64_t r = a->cfg.r, n = r * in, bytes = n * (int64_t)esp_dtype_size(t);
  for (int i = 0; i < im->n; i++)
    if (esp_tensor_cols(&im->a[i]) == in) {
      *out = im->a[i];
      return ESP_OK;
    }
  if (im->n == (int)(sizeof im->a / sizeof im->a[0]))
    return esp_fail(ESP_ERR_RECIPE, "adapter.type: miss on modules of more than %d input widths", im->n);
  float *ones = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *ones);
  void *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)bytes), *data = NULL;
  esp_status st = ones && host ? ESP_OK : ESP_ERR_MEMORY;
  if (st == ESP_OK) {
    for (int64_t i = 0; i < in; i++) ones[(i % r) * in + i] = 1.0f;
    esp_convert(host, t, ones, ESP_F32, n);
    data = be->ops->alloc(be, ESP_MEM_PARAMS, bytes);
    if (!data) st = esp_backend_why_null(be);
  }
  if (st == ESP_OK) {
    be->ops->upload(be, data, host, bytes);
    *out = im->a[im->n++] = esp_tensor_2d(data, t, r, in);
  }
  esp_mem_free(ones);
  esp_mem_free(host);
  return st;
}

static esp_status miss_open(esp_adapter *a) {
  esp_backend *be = esp_model_backend(a->model);
  miss_impl *im = a->impl = esp_arena_alloc(a->arena, sizeof *im);
  if (!im) return ESP_ERR_MEMORY;
  if (!is_mini(&a->cfg)) return ESP_OK;
  esp_site **sites;
  int64_t most = 1, n = esp_model_sites(a->model, &sites);
  for (int64_t i = 0; i < n; i++)
    if (a->targeted[i] && sites[i]->out / a->cfg.mini_r > most) most = sites[i]->out / a->cfg.mini_r;
  im->zeros = be->ops->alloc(be, ESP_MEM_PARAMS, most * (int64_t)sizeof *im->zeros);
  return im->zeros ? ESP_OK : esp_backend_why_null(be);
}

static esp_status miss_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  miss_group *mg = esp_arena_alloc(a->arena, sizeof *mg);
  bool mini = is_mini(&a->cfg);
  int64_t r = a->cfg.r;
  if (!mg) return ESP_ERR_MEMORY;
  if (!a->impl) ESP_TRY(miss_open(a));
  if (r > g->in)
    return esp_fail(ESP_ERR_RECIPE, "adapter.r: %lld is more than the %lld inputs of %s", (long long)r,
                    (long long)g->in, g->sites[0]->path);
  for (int i = 0; i < g->n_sites; i++) {
    esp_site *s = g->sites[i];
    if (!hit[i]) continue;
    if (mini && s->out % a->cfg.mini_r)
      return esp_fail(ESP_ERR_RECIPE, "adapter.mini_r: %lld does not divide the %lld outputs of %s",
                      (long long)a->cfg.mini_r, (long long)s->out, s->path);
    bool joins = !mini && mg->n > 0 && mg->spans[mg->n - 1].col0 + mg->spans[mg->n - 1].out == s->col0;
    miss_site *ms = esp_arena_alloc(a->arena, sizeof *ms);
    char name[512];
    if (!ms) return ESP_ERR_MEMORY;
    snprintf(name, sizeof name, ESP_PEFT_PREFIX "%s.miss_block", s->path);
    ms->r = r;
    ms->b = esp_params_add(a->params, name, 2, (int64_t[]){mini ? a->cfg.mini_r : s->out, r}, !joins);
    if (ms->b < 0) return ESP_ERR_MEMORY;
    ESP_TRY(esp_mark_transposed(a, ms->b));
    a->site_state[s->index] = ms;
    if (!joins) mg->spans[mg->n++] = (miss_span){s->col0, 0, ms->b, 0};
    mg->spans[mg->n - 1].out += s->out;
    mg->spans[mg->n - 1].n++;
  }
  ESP_TRY(shards(a, g->in, &mg->a));
  a->group_state[g->index] = mg;
  return ESP_OK;
}

/* ---- the step ---- */

/* D^T of a span, [out, r]. */
static esp_tensor weight_of(esp_adapter *a, esp_run *run, const miss_span *sp) {
  const miss_impl *im = a->impl;
  if (!is_mini(&a->cfg)) return esp_params_stacked(a->params, sp->first, sp->n, 0);
  int64_t one = a->cfg.mini_r * a->cfg.r;
  esp_tensor small = esp_param_shadow(a->params, sp->first);
  esp_tensor w = esp_stack_tensor(run->stack, run->compute, sp->out, a->cfg.r);
  run->be->ops->gather_rows(run->be, esp_tensor_2d(w.data, run->compute, sp->out / a->cfg.mini_r, one),
                            esp_tensor_2d(small.data, small.dtype, 1, one), im->zeros);
  return w;
}

static int miss_tails(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max, void **slot) {
  miss_group *mg = a->group_state[g->index];
  if (!mg) return 0;
  const esp_backend_ops *ops = run->be->ops;
  mg->t = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), a->cfg.r);
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor xd = esp_dropped(a, run, g, x);
  ops->matmul(run->be, mg->t, xd, false, mg->a, true, (float)a->weight, 0.0f);
  esp_stack_release(run->stack, mark);
  mg->late_fwd = max < mg->n;
  for (int i = 0; i < mg->n; i++) {
    mg->w[i] = weight_of(a, run, &mg->spans[i]);
    if (!mg->late_fwd) tails[i] = (esp_tail){mg->spans[i].col0, mg->t, mg->w[i]};
  }
  return mg->late_fwd ? 0 : mg->n;
}

static void miss_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  miss_group *mg = a->group_state[g->index];
  for (int i = 0; mg && mg->late_fwd && i < mg->n; i++)
    run->be->ops->matmul(run->be, esp_tensor_cols_view(&y, mg->spans[i].col0, mg->spans[i].out), mg->t, false, mg->w[i],
                         true, 1.0f, 1.0f);
}

static bool miss_wants_output(const esp_adapter *a) {
  return false; /* unless tails have no room, which the caller knows */
}

static void span_grad(esp_adapter *a, esp_run *run, const miss_span *sp, esp_tensor dy, esp_tensor t) {
  const esp_backend_ops *ops = run->be->ops;
  if (!is_mini(&a->cfg)) {
    ops->matmul(run->be, esp_params_stacked(a->params, sp->first, sp->n, 2), dy, true, t, false, 1.0f, 1.0f);
    return;
  }
  int64_t mark = esp_stack_mark(run->stack), one = a->cfg.mini_r * a->cfg.r;
  esp_tensor all = esp_stack_tensor(run->stack, ESP_F32, sp->out, a->cfg.r);
  ops->matmul(run->be, all, dy, true, t, false, 1.0f, 0.0f);
  ops->col_sum(run->be, esp_param_grad(a->params, sp->first).data,
               esp_tensor_2d(all.data, ESP_F32, sp->out / a->cfg.mini_r, one));
  esp_stack_release(run->stack, mark);
}

static int miss_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                          int max, void **slot) {
  miss_group *mg = a->group_state[g->index];
  if (!mg) return 0;
  mg->dt = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), a->cfg.r);
  int64_t mark = esp_stack_mark(run->stack);
  /* several spans add up in fp32 and are rounded once */
  esp_tensor sum = mg->n > 1 ? esp_stack_tensor(run->stack, ESP_F32, esp_tensor_rows(&x), a->cfg.r) : mg->dt;
  for (int i = 0; i < mg->n; i++) {
    esp_tensor dyi = esp_tensor_cols_view(&dy, mg->spans[i].col0, mg->spans[i].out);
    run->be->ops->matmul(run->be, sum, dyi, false, mg->w[i], false, (float)a->weight, i > 0);
    if (a->trainable) span_grad(a, run, &mg->spans[i], dyi, mg->t);
  }
  if (mg->n > 1) run->be->ops->axpby(run->be, mg->dt, 1.0f, sum, 0.0f);
  esp_stack_release(run->stack, mark);
  mg->late_bwd = max < 1 || esp_drops(a, run); /* the mask stands between dt A and dx */
  if (mg->late_bwd) return 0;
  tails[0] = (esp_tail){0, mg->dt, mg->a};
  return 1;
}

static void miss_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  miss_group *mg = a->group_state[g->index];
  if (!mg || !mg->late_bwd || !dx.data) return;
  const esp_backend_ops *ops = run->be->ops;
  if (!esp_drops(a, run)) {
    ops->matmul(run->be, dx, mg->dt, false, mg->a, false, 1.0f, 1.0f);
    return;
  }
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor d = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&dx), esp_tensor_cols(&dx));
  ops->matmul(run->be, d, mg->dt, false, mg->a, false, 1.0f, 0.0f);
  esp_dropout(a, run, g, dx, d, 1.0f);
  esp_stack_release(run->stack, mark);
}

static void miss_destroy(esp_adapter *a) {
  esp_backend *be = esp_model_backend(a->model);
  miss_impl *im = a->impl;
  for (int i = 0; im && i < im->n; i++) be->ops->free(be, im->a[i].data);
  if (im && im->zeros) be->ops->free(be, im->zeros);
}

/* ---- merge, export, file ---- */

static esp_status miss_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  const miss_site *ms = a->site_state[s->index];
  const esp_param *p = &a->params->list[ms->b];
  float *d = esp_mem_alloc(ESP_MEM_HOST, (size_t)p->numel * sizeof *d);
  if (!d) return ESP_ERR_MEMORY;
  esp_params_get(a->params, ms->b, d);
  for (int64_t i = 0; i < n; i++)
    for (int64_t c = 0; c < s->in; c++)
      w[i * s->in + c] += (float)a->weight * d[(r0 + i) % p->shape[0] * ms->r + c % ms->r];
  esp_mem_free(d);
  return ESP_OK;
}

static int64_t miss_low_rank(esp_adapter *a, esp_site *s, float *A, float *B) {
  const miss_site *ms = a->site_state[s->index];
  const esp_param *p = &a->params->list[ms->b];
  if (!A && !B) return ms->r;
  float *d = esp_mem_alloc(ESP_MEM_HOST, (size_t)p->numel * sizeof *d);
  if (!d) return -1;
  esp_params_get(a->params, ms->b, d);
  for (int64_t k = 0; A && k < ms->r; k++)
    for (int64_t c = 0; c < s->in; c++) A[k * s->in + c] = c % ms->r == k;
  for (int64_t i = 0; B && i < s->out; i++)
    for (int64_t k = 0; k < ms->r; k++) B[i * ms->r + k] = (float)a->weight * d[i % p->shape[0] * ms->r + k];
  esp_mem_free(d);
  return ms->r;
}

esp_status esp_plain_config_check(const esp_adapter_cfg *c) {
  if (strcmp(c->bias, "lora_only") == 0)
    return esp_fail(ESP_ERR_RECIPE, "adapter.bias: lora_only is for lora, not for %s", c->type);
  if (c->n_rank_pattern || c->n_alpha_pattern)
    return esp_fail(ESP_ERR_RECIPE, "adapter.%s: %s is the same for every module",
                    c->n_rank_pattern ? "rank_pattern" : "alpha_pattern", c->type);
  if (strcmp(c->init, "default") != 0)
    return esp_fail(ESP_ERR_RECIPE, "adapter.init: %s has no '%s', only default", c->type, c->init);
  if (c->rslora || c->lora_bias)
    return esp_fail(ESP_ERR_RECIPE, "adapter.%s: is for lora, not for %s", c->rslora ? "rslora" : "lora_bias", c->type);
  return esp_config_refuse(c, c->type, ESP_CFG_TOKENS);
}

static esp_status miss_config_check(const esp_adapter_cfg *c) {
  ESP_TRY(esp_plain_config_check(c));
  if (c->miss_type && strcmp(c->miss_type, "default") && !is_mini(c))
    return esp_fail(ESP_ERR_RECIPE, "adapter.miss_type: '%s' is not one of default, mini", c->miss_type);
  if (is_mini(c) && c->mini_r < 1)
    return esp_fail(ESP_ERR_RECIPE, "adapter.mini_r: must be at least 1, is %lld", (long long)c->mini_r);
  return ESP_OK;
}

void esp_miss_config_write(const esp_adapter *a, json_t *j) {
  const esp_adapter_cfg *c = &a->cfg;
  bool bat = strcmp(c->type, "bat") == 0;
  json_object_del(j, "trainable_token_indices"); /* PEFT has it for LoRA only */
  json_object_set_new(j, "init_weights", bat ? json_string("bat") : is_mini(c) ? json_string("mini") : json_true());
  json_object_set_new(j, "mini_r", json_integer(is_mini(c) ? (json_int_t)c->mini_r : 1));
  json_object_set_new(j, "miss_dropout", json_real(c->dropout));
  json_object_set_new(j, "r", json_integer((json_int_t)c->r));
}

esp_status esp_miss_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  (void)arena;
  const json_t *v = json_object_get(j, "init_weights");
  c->r = 64;
  c->mini_r = 1;
  ESP_TRY(esp_json_i64(j, "r", path, 0, &c->r));
  ESP_TRY(esp_json_i64(j, "mini_r", path, 0, &c->mini_r));
  ESP_TRY(esp_json_f64(j, "miss_dropout", path, 0, &c->dropout));
  const char *s = json_is_string(v) ? json_string_value(v) : "default";
  if (strcmp(s, "mini") == 0)
    c->miss_type = "mini";
  else if (strcmp(s, "default") && strcmp(s, "bat"))
    return esp_fail(ESP_ERR_DATA, "%s: init_weights '%s' is not one of true, bat, mini", path, s);
  return ESP_OK;
}

const esp_adapter_kind esp_kind_miss = {
    .name = "miss",
    .peft_type = "MISS",
    .summary = "matrix shard sharing, y = W x + D^T sum of the input's shards (arXiv:2409.15371)",
    .site_kinds = 1u << ESP_SITE_LINEAR,
    .mergeable = true,
    .targets = true,
    .declare = miss_declare,
    .tails = miss_tails,
    .output = miss_output,
    .tails_bwd = miss_tails_bwd,
    .input_bwd = miss_input_bwd,
    .wants_output = miss_wants_output,
    .destroy = miss_destroy,
    .config_write = esp_miss_config_write,
    .config_read = esp_miss_config_read,
    .config_check = miss_config_check,
    .materialise = miss_materialise,
    .low_rank = miss_low_rank,
};
