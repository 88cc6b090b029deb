/* dora.c: DoRA (Liu et al. 2024, arXiv:2402.09353): LoRA's change with the length of every row of the weight learned
 * apart from its direction, W' = m/n (W + s B A), n_j = ||w_j + s B_j A||, m = n at the start; y = g u + b with
 * u = W x + s B A x and g = m/n. As in PEFT the norm is a constant for the gradient and the base's bias is not scaled.
 *
 * PEFT builds W + s B A in every pass. Here, with the squared lengths of the base's rows kept from the start,
 *   n_j^2 = ||w_j||^2 + 2 s (W A^T)_j . B_j + s^2 B_j (A A^T) B_j^T
 *         = ||w_j||^2 + 2 s [A W^T + s/2 (A A^T) B^T]_{:,j} . B^T_{:,j}
 * in fp32: one product of the group's weight with the ranks' rows A in the place of tokens, and an r x r matrix.
 * Backward: dm_j = (sum_t dy_tj u_tj) / n_j, du = g dy, and from du on as LoRA. u is kept. Dropout is on x before A
 * only, as everywhere here; PEFT's DoRA drops the base product's x too while it trains.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "adapters/internal.h"
#include "backend/optim_rules.h"
#include "io/json.h"

typedef struct dora_site {
  esp_lora_site lora; /* first: esp_lora_init fills A and B through it */
  int m;
  float *rows2;     /* ||w_j||^2, backend memory [out] */
  esp_tensor g, n2; /* of this pass, on the stack: [out] fp32 */
  esp_tensor u;     /* [T, out] */
} dora_site;

typedef struct dora_group {
  int n;
  esp_site *sites[3];
  int first_a;
  int64_t width; /* sum of ranks */
  esp_tensor t, dt;
  bool late_fwd, late_bwd; /* the base product had no room for the tails: added beside it */
} dora_group;

typedef struct dora_impl {
  float *ones; /* backend memory, as long as the widest module with a bias */
  int64_t n_ones;
} dora_impl;

static dora_site *site_of(const esp_adapter *a, const esp_site *s) {
  return a->site_state[s->index];
}

static int add_param(esp_adapter *a, const esp_site *s, const char *suffix, int ndim, int64_t d0, int64_t d1,
                     bool pad) {
  char name[512];
  snprintf(name, sizeof name, ESP_PEFT_PREFIX "%s.%s", s->path, suffix);
  return esp_params_add(a->params, name, ndim, (int64_t[]){d0, d1}, pad);
}

static esp_status new_site(esp_adapter *a, esp_site *s, bool first) {
  const esp_adapter_cfg *cfg = &a->cfg;
  dora_site *ds = esp_arena_alloc(a->arena, sizeof *ds);
  if (!ds) return ESP_ERR_MEMORY;
  int64_t r = (int64_t)esp_pattern_value(cfg->rank_pattern, cfg->n_rank_pattern, s->path, (double)cfg->r);
  double alpha = esp_pattern_value(cfg->alpha_pattern, cfg->n_alpha_pattern, s->path, cfg->alpha);
  ds->lora.r = r;
  ds->lora.s = (float)(alpha / (cfg->rslora ? sqrt((double)r) : (double)r));
  ds->lora.b = ds->lora.bias = ds->m = -1;
  a->site_state[s->index] = ds;
  ds->lora.a = add_param(a, s, "lora_A.weight", 2, r, s->in, first);
  return ds->lora.a < 0 ? ESP_ERR_MEMORY : ESP_OK;
}

static esp_status device_vectors(esp_adapter *a, const esp_site *s, dora_site *ds) {
  esp_backend *be = a->params->be;
  dora_impl *impl = a->impl;
  ds->rows2 = be->ops->alloc(be, ESP_MEM_WEIGHTS, s->out * (int64_t)sizeof(float));
  if (!ds->rows2) return esp_backend_why_null(be);
  if (!s->bias_tensor || impl->n_ones >= s->out) return ESP_OK;
  int64_t bytes = s->out * (int64_t)sizeof(float);
  float *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)bytes);
  if (!host) return ESP_ERR_MEMORY;
  for (int64_t i = 0; i < s->out; i++) host[i] = 1.0f;
  if (impl->ones) be->ops->free(be, impl->ones);
  impl->ones = be->ops->alloc(be, ESP_MEM_WEIGHTS, bytes);
  impl->n_ones = impl->ones ? s->out : 0;
  if (impl->ones) be->ops->upload(be, impl->ones, host, bytes);
  esp_mem_free(host);
  return impl->ones ? ESP_OK : esp_backend_why_null(be);
}

static esp_status dora_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  dora_group *dg = esp_arena_alloc(a->arena, sizeof *dg);
  if (!a->impl) a->impl = esp_arena_alloc(a->arena, sizeof(dora_impl));
  if (!dg || !a->impl) return ESP_ERR_MEMORY;
  for (int i = 0; i < g->n_sites; i++) { /* the A of a group back to back: one product for all */
    if (!hit[i]) continue;
    esp_site *s = g->sites[i];
    ESP_TRY(new_site(a, s, dg->n == 0));
    dora_site *ds = site_of(a, s);
    if (dg->n == 0) dg->first_a = ds->lora.a;
    ds->lora.t0 = dg->width;
    dg->width += ds->lora.r;
    dg->sites[dg->n++] = s;
  }
  for (int i = 0; i < dg->n; i++) {
    esp_site *s = dg->sites[i];
    dora_site *ds = site_of(a, s);
    ds->lora.b = add_param(a, s, "lora_B.weight", 2, s->out, ds->lora.r, true);
    ds->m = add_param(a, s, "lora_magnitude_vector", 1, s->out, 1, true);
    if (ds->lora.b < 0 || ds->m < 0) return ESP_ERR_MEMORY;
    ESP_TRY(device_vectors(a, s, ds));
  }
  a->group_state[g->index] = dg;
  return ESP_OK;
}

/* Also when a file's values follow: the lengths of the base's rows are in no file. */
static esp_status dora_init(esp_adapter *a, esp_site *s) {
  enum { ROWS = 256 };
  dora_site *ds = site_of(a, s);
  esp_status st = ESP_OK;
  float *w = esp_mem_alloc(ESP_MEM_HOST, (size_t)(ROWS * s->in) * sizeof *w);
  float *n2 = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * s->out) * sizeof *n2), *m = n2 + s->out;
  st = w && n2 ? ESP_OK : ESP_ERR_MEMORY;
  if (st) goto out;
  ESP_GOTO(esp_lora_init(a, s));
  for (int64_t r0 = 0; r0 < s->out; r0 += ROWS) {
    int64_t k = s->out - r0 < ROWS ? s->out - r0 : ROWS;
    ESP_GOTO(esp_site_read_weight_rows(a->model, s, r0, k, w));
    for (int64_t i = 0; i < k; i++) {
      double sum = 0;
      for (int64_t j = 0; j < s->in; j++) sum += (double)w[i * s->in + j] * (double)w[i * s->in + j];
      n2[r0 + i] = (float)sum;
      m[r0 + i] = sqrtf(n2[r0 + i]); /* the same root as in a step: m/n is 1 exactly */
    }
  }
  a->params->be->ops->upload(a->params->be, ds->rows2, n2, s->out * (int64_t)sizeof *n2);
  esp_params_set(a->params, ds->m, m);
out:
  esp_mem_free(w);
  esp_mem_free(n2);
  return st;
}

/* ---- the norm ---- */

static esp_tensor vector(void *data, int64_t n) {
  return esp_tensor_1d(data, ESP_F32, n);
}

static esp_tensor push_vector(esp_run *run, int64_t n, bool zero) {
  int64_t bytes = n * (int64_t)sizeof(float);
  void *p = esp_stack_push(run->stack, bytes);
  if (zero) run->be->ops->zero(run->be, p, bytes);
  return vector(p, n);
}

/* out = keep * out + x / sqrt(v). The operation with a root and a quotient per element is AdamW's: without decay of its
 * averages (b1 = 0, b2 = 1) and with a rate of -1 its step is this. */
static void add_over_root(esp_run *run, esp_tensor out, float keep, const void *x, esp_tensor v) {
  int64_t n = esp_tensor_cols(&out), mark = esp_stack_mark(run->stack);
  esp_update_args u = {.rule = ESP_RULE_ADAMW,
                       .n = n,
                       .master = out.data,
                       .grad = x,
                       .state = {push_vector(run, n, true).data, v.data},
                       .grad_scale = 1.0f};
  u.hyper[ESP_ADAMW_KEEP] = keep;
  u.hyper[ESP_ADAMW_1MB1] = u.hyper[ESP_ADAMW_B2] = u.hyper[ESP_ADAMW_RSQRT_BC2] = 1.0f;
  u.hyper[ESP_ADAMW_STEP] = -1.0f;
  run->be->ops->update(run->be, &u);
  esp_stack_release(run->stack, mark);
}

/* n^2 and g = m/n of every adapted site of the group. */
static void norms(esp_adapter *a, esp_run *run, esp_group *g, dora_group *dg) {
  const esp_backend_ops *ops = run->be->ops;
  for (int i = 0; i < dg->n; i++) { /* pushed before what is released below */
    dora_site *ds = site_of(a, dg->sites[i]);
    ds->n2 = push_vector(run, dg->sites[i]->out, false);
    ds->g = push_vector(run, dg->sites[i]->out, true);
  }
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor aw = esp_stack_tensor(run->stack, ESP_F32, dg->width, g->out); /* A W^T */
  esp_group_apply(run, g, esp_params_stacked(a->params, dg->first_a, dg->n, 0), aw);
  for (int i = 0; i < dg->n; i++) {
    const esp_site *s = dg->sites[i];
    dora_site *ds = site_of(a, s);
    int64_t r = ds->lora.r, inner = esp_stack_mark(run->stack);
    float scale = ds->lora.s;
    esp_tensor A = esp_param_shadow(a->params, ds->lora.a), B = esp_param_shadow(a->params, ds->lora.b);
    esp_tensor rows = esp_tensor_rows_view(&aw, ds->lora.t0, r), p = esp_tensor_cols_view(&rows, s->col0, s->out);
    esp_tensor gram = esp_stack_tensor(run->stack, ESP_F32, r, r);
    esp_tensor bt = esp_stack_tensor(run->stack, ESP_F32, r, s->out), sum = push_vector(run, s->out, true);
    ops->matmul(run->be, gram, A, false, A, true, 1.0f, 0.0f);
    ops->matmul(run->be, p, gram, false, B, true, 0.5f * scale, 1.0f);
    ops->transpose_rows(run->be, esp_tensor_2d(bt.data, ESP_F32, 1, r * s->out),
                        esp_tensor_2d(B.data, B.dtype, 1, r * s->out), s->out, r);
    ops->col_dot(run->be, sum.data, p, bt);
    ops->axpby(run->be, ds->n2, 1.0f, vector(ds->rows2, s->out), 0.0f);
    ops->axpby(run->be, ds->n2, 2.0f * scale, sum, 1.0f);
    add_over_root(run, ds->g, 0.0f, esp_param_master(a->params, ds->m).data, ds->n2);
    esp_stack_release(run->stack, inner);
  }
  esp_stack_release(run->stack, mark);
}

/* ---- forward ---- */

static int dora_tails(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max, void **slot) {
  dora_group *dg = a->group_state[g->index];
  if (!dg) return 0;
  const esp_backend_ops *ops = run->be->ops;
  norms(a, run, g, dg);
  dg->t = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), dg->width);
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor xd = esp_dropped(a, run, g, x);
  ops->matmul(run->be, dg->t, xd, false, esp_params_stacked(a->params, dg->first_a, dg->n, 0), true, 1.0f, 0.0f);
  esp_stack_release(run->stack, mark);
  dg->late_fwd = max < dg->n;
  for (int i = 0; i < dg->n; i++) {
    const dora_site *ds = site_of(a, dg->sites[i]);
    esp_tensor ti = esp_tensor_cols_view(&dg->t, ds->lora.t0, ds->lora.r);
    ops->axpby(run->be, ti, ds->lora.s, ti, 0.0f);
    if (!dg->late_fwd) tails[i] = (esp_tail){dg->sites[i]->col0, ti, esp_param_shadow(a->params, ds->lora.b)};
  }
  return dg->late_fwd ? 0 : dg->n;
}

/* The bias of the site in every row: row 0 gathered T times. */
static void fill_bias(esp_run *run, const esp_group *g, const esp_site *s, esp_tensor y) {
  int64_t bytes = esp_tensor_rows(&y) * (int64_t)sizeof(int32_t), mark = esp_stack_mark(run->stack);
  int32_t *zeros = esp_stack_push(run->stack, bytes);
  run->be->ops->zero(run->be, zeros, bytes);
  run->be->ops->gather_rows(run->be, y, esp_tensor_2d((float *)g->bias.data + s->col0, ESP_F32, 1, s->out), zeros);
  esp_stack_release(run->stack, mark);
}

static void dora_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  dora_group *dg = a->group_state[g->index];
  if (!dg) return;
  const esp_backend_ops *ops = run->be->ops;
  bool keep = run->train && a->trainable;
  for (int i = 0; i < dg->n; i++) {
    const esp_site *s = dg->sites[i];
    dora_site *ds = site_of(a, s);
    esp_tensor yi = esp_tensor_cols_view(&y, s->col0, s->out);
    if (dg->late_fwd)
      ops->matmul(run->be, yi, esp_tensor_cols_view(&dg->t, ds->lora.t0, ds->lora.r), false,
                  esp_param_shadow(a->params, ds->lora.b), true, 1.0f, 1.0f);
    int64_t mark = esp_stack_mark(run->stack);
    bool biased = s->bias_tensor && g->bias.data;
    if (keep || biased) ds->u = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&y), s->out);
    if (keep) mark = esp_stack_mark(run->stack);
    if (!biased) {
      if (keep) ops->axpby(run->be, ds->u, 1.0f, yi, 0.0f);
      ops->mul_cols(run->be, yi, yi, ds->g);
    } else { /* y += (g - 1) u: at the start nothing, exactly */
      fill_bias(run, g, s, ds->u);
      ops->axpby(run->be, ds->u, 1.0f, yi, -1.0f);
      esp_tensor h = push_vector(run, s->out, false);
      esp_tensor d = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&y), s->out);
      ops->axpby(run->be, h, 1.0f, ds->g, 0.0f);
      ops->axpby(run->be, h, -1.0f, vector(((dora_impl *)a->impl)->ones, s->out), 1.0f);
      ops->mul_cols(run->be, d, ds->u, h);
      ops->axpby(run->be, yi, 1.0f, d, 1.0f);
    }
    esp_stack_release(run->stack, mark);
  }
}

/* ---- backward ---- */

/* A trained bias of the base is not scaled, but its gradient is summed after this hook, from du: the difference of the
 * two sums is added here. */
static void add_col_sum(esp_run *run, esp_tensor grad, float sign, esp_tensor dy) {
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor sum = push_vector(run, esp_tensor_cols(&dy), true);
  run->be->ops->col_sum(run->be, sum.data, dy);
  run->be->ops->axpby(run->be, vector(grad.data, esp_tensor_cols(&dy)), sign, sum, 1.0f);
  esp_stack_release(run->stack, mark);
}

static void dora_output_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, void **slot) {
  dora_group *dg = a->group_state[g->index];
  if (!dg) return;
  const esp_backend_ops *ops = run->be->ops;
  for (int i = 0; i < dg->n; i++) {
    const esp_site *s = dg->sites[i];
    dora_site *ds = site_of(a, s);
    esp_tensor dyi = esp_tensor_cols_view(&dy, s->col0, s->out);
    int bias = a->trainable ? a->modules->bias[s->index] : -1;
    if (a->trainable) {
      int64_t mark = esp_stack_mark(run->stack);
      esp_tensor sum = push_vector(run, s->out, true);
      ops->col_dot(run->be, sum.data, dyi, ds->u);
      add_over_root(run, vector(esp_param_grad(a->params, ds->m).data, s->out), 1.0f, sum.data, ds->n2);
      esp_stack_release(run->stack, mark);
    }
    if (bias >= 0) add_col_sum(run, esp_param_grad(a->params, bias), 1.0f, dyi);
    ops->mul_cols(run->be, dyi, dyi, ds->g);
    if (bias >= 0) add_col_sum(run, esp_param_grad(a->params, bias), -1.0f, dyi);
  }
}

static int dora_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                          int max, void **slot) {
  dora_group *dg = a->group_state[g->index];
  if (!dg) return 0;
  const esp_backend_ops *ops = run->be->ops;
  dg->dt = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), dg->width);
  for (int i = 0; i < dg->n; i++) {
    const dora_site *ds = site_of(a, dg->sites[i]);
    esp_tensor dyi = esp_tensor_cols_view(&dy, dg->sites[i]->col0, dg->sites[i]->out);
    ops->matmul(run->be, esp_tensor_cols_view(&dg->dt, ds->lora.t0, ds->lora.r), dyi, false,
                esp_param_shadow(a->params, ds->lora.b), false, ds->lora.s, 0.0f);
    if (a->trainable)
      ops->matmul(run->be, esp_param_grad(a->params, ds->lora.b), dyi, true,
                  esp_tensor_cols_view(&dg->t, ds->lora.t0, ds->lora.r), false, 1.0f, 1.0f);
  }
  if (a->trainable) {
    int64_t mark = esp_stack_mark(run->stack);
    esp_tensor xd = esp_dropped(a, run, g, x);
    ops->matmul(run->be, esp_params_stacked(a->params, dg->first_a, dg->n, 2), dg->dt, true, xd, false, 1.0f, 1.0f);
    esp_stack_release(run->stack, mark);
  }
  dg->late_bwd = max < 1 || esp_drops(a, run); /* the mask stands between dT A and dx */
  if (dg->late_bwd) return 0;
  tails[0] = (esp_tail){0, dg->dt, esp_params_stacked(a->params, dg->first_a, dg->n, 0)};
  return 1;
}

static void dora_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  dora_group *dg = a->group_state[g->index];
  if (!dg || !dg->late_bwd || !dx.data) return;
  const esp_backend_ops *ops = run->be->ops;
  esp_tensor stacked = esp_params_stacked(a->params, dg->first_a, dg->n, 0);
  int64_t mark = esp_stack_mark(run->stack);
  if (!esp_drops(a, run))
    ops->matmul(run->be, dx, dg->dt, false, stacked, false, 1.0f, 1.0f);
  else {
    esp_tensor d = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&dx), esp_tensor_cols(&dx));
    ops->matmul(run->be, d, dg->dt, false, stacked, false, 1.0f, 0.0f);
    esp_dropout(a, run, g, dx, d, 1.0f);
  }
  esp_stack_release(run->stack, mark);
}

/* ---- merge and export ---- */

static esp_status dora_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  const dora_site *ds = site_of(a, s);
  float *A = esp_param_host(a, ds->lora.a), *B = esp_param_host(a, ds->lora.b), *m = esp_param_host(a, ds->m);
  bool ok = A && B && m;
  if (ok) esp_lowrank_add(w, n, s->in, A, B + r0 * ds->lora.r, ds->lora.r, ds->lora.s);
  for (int64_t i = 0; ok && i < n; i++) {
    float *row = w + i * s->in;
    double sum = 0;
    for (int64_t j = 0; j < s->in; j++) sum += (double)row[j] * (double)row[j];
    double g = (double)m[r0 + i] / sqrt(sum);
    for (int64_t j = 0; j < s->in; j++) row[j] = (float)(g * (double)row[j]);
  }
  esp_mem_free(A);
  esp_mem_free(B);
  esp_mem_free(m);
  return ok ? ESP_OK : ESP_ERR_MEMORY;
}

static void dora_destroy(esp_adapter *a) {
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites);
  const esp_backend_ops *ops = a->params->be->ops;
  for (int i = 0; i < n; i++) {
    dora_site *ds = a->site_state[i];
    if (ds && ds->rows2) ops->free(a->params->be, ds->rows2);
  }
  dora_impl *impl = a->impl;
  if (impl && impl->ones) ops->free(a->params->be, impl->ones);
}

/* ---- configuration: LoraConfig with use_dora ---- */

static bool dora_config_is(const json_t *j) {
  return json_is_true(json_object_get(j, "use_dora"));
}

static void dora_config_write(const esp_adapter *a, json_t *j) {
  esp_lora_config_write(a, j);
  json_object_set_new(j, "use_dora", json_true());
}

static esp_status dora_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  json_t *lora = json_copy((json_t *)(uintptr_t)j);
  if (!lora) return ESP_ERR_MEMORY;
  json_object_del(lora, "use_dora");
  esp_status st = esp_lora_config_read(lora, path, arena, c);
  json_decref(lora);
  return st;
}

static esp_status dora_check(const esp_adapter_cfg *c) {
  if (c->lora_bias) return esp_fail(ESP_ERR_RECIPE, "adapter.lora_bias: dora does not have it");
  if (esp_lora_init_from_data(c->init))
    return esp_fail(ESP_ERR_RECIPE, "adapter.init: '%s' is for lora, not for dora", c->init);
  if (esp_lora_rewrites_base(c->init))
    return esp_fail(ESP_ERR_RECIPE, "adapter.init: '%s' rewrites the base, whose lengths dora keeps; use default",
                    c->init);
  return ESP_OK;
}

const esp_adapter_kind esp_kind_dora = {
    .name = "dora",
    .peft_type = "LORA",
    .summary = "low-rank update with learned row lengths, W' = m (W + s B A) / ||.|| (Liu et al. 2024, "
               "arXiv:2402.09353)",
    .site_kinds = 1u << ESP_SITE_LINEAR,
    .mergeable = true,
    .targets = true,
    .alone = true,
    .reads_base = true,
    .declare = dora_declare,
    .init = dora_init,
    .tails = dora_tails,
    .output = dora_output,
    .output_bwd = dora_output_bwd,
    .tails_bwd = dora_tails_bwd,
    .input_bwd = dora_input_bwd,
    .destroy = dora_destroy,
    .config_is = dora_config_is,
    .config_write = dora_config_write,
    .config_read = dora_config_read,
    .config_check = dora_check,
    .materialise = dora_materialise,
};
