/* lora.c: LoRA (Hu et al. 2021, arXiv:2106.09685) with the options of PEFT's LoraConfig for linear and embedding
 * layers: y = W x + b + s B A drop(x), s = alpha/r, or alpha/sqrt(r) (rslora, arXiv:2312.03732).
 *
 * The A matrices of a group (q,k,v or gate,up) lie back to back in the store, so that the down-projection of the group
 * is one product T = s x A^T, [T, sum of ranks], which is kept for backward; each site's B is a tail of the base
 * product on its own columns. Backward: dT_i = s dy_i B_i, dB_i += dy_i^T T_i (T carries s), dA += dT^T x in one
 * product, and one tail (dT, A) for dx. Dropout is drawn once per group and regenerated, never stored.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "adapters/internal.h"
#include "core/threads.h"

typedef struct lora_group {
  int n;
  esp_site *sites[3];
  int first_a;
  int64_t width; /* sum of ranks */
  int64_t slack; /* under the counting backend: what it may still grow by before training (eva) */
  bool uniform;  /* one s for all */
  esp_tensor t, dt;
  bool late_fwd, late_bwd; /* the base product had no room for the tails: added after it */
  int ones_cap;
  void *ones; /* backend memory [ones_cap, 1], compute type: lora_bias only */
} lora_group;

static float site_scale(const esp_adapter *a, const esp_lora_site *ls) {
  return (float)(ls->s * a->weight);
}

static esp_lora_site *new_site(esp_adapter *a, esp_site *s) {
  const esp_adapter_cfg *cfg = &a->cfg;
  esp_lora_site *ls = esp_arena_alloc(a->arena, sizeof *ls);
  if (!ls) return NULL;
  ls->r = (int64_t)esp_pattern_value(cfg->rank_pattern, cfg->n_rank_pattern, s->path, (double)cfg->r);
  double alpha = esp_pattern_value(cfg->alpha_pattern, cfg->n_alpha_pattern, s->path, cfg->alpha);
  ls->s = (float)(alpha / (cfg->rslora ? sqrt((double)ls->r) : (double)ls->r));
  ls->a = ls->b = ls->bias = -1;
  a->site_state[s->index] = ls;
  return ls;
}

static int add_param(esp_adapter *a, const esp_site *s, const char *suffix, int ndim, int64_t d0, int64_t d1,
                     bool pad) {
  char name[512];
  snprintf(name, sizeof name, ESP_PEFT_PREFIX "%s.%s", s->path, suffix);
  return esp_params_add(a->params, name, ndim, (int64_t[]){d0, d1}, pad);
}

static esp_status lora_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  lora_group *lg = esp_arena_alloc(a->arena, sizeof *lg);
  if (!lg) return ESP_ERR_MEMORY;
  for (int i = 0; i < g->n_sites; i++) {
    if (!hit[i]) continue;
    esp_site *s = g->sites[i];
    esp_lora_site *ls = new_site(a, s);
    if (!ls) return ESP_ERR_MEMORY;
    ESP_TRY(esp_lora_data_check(a, s, ls->r));
    if (a->cfg.lora_bias && !s->bias_tensor)
      return esp_fail(ESP_ERR_RECIPE, "adapter.lora_bias: %s has no bias to merge into", s->path);
    ls->a = add_param(a, s, "lora_A.weight", 2, ls->r, s->in, lg->n == 0);
    if (ls->a < 0) return ESP_ERR_MEMORY;
    if (lg->n == 0) lg->first_a = ls->a;
    a->params->list[ls->a].frozen = a->cfg.lora_fa;
    ls->t0 = lg->width;
    lg->width += ls->r;
    if (esp_backend_counts(a->params->be)) lg->slack += esp_lora_rank_most(a, s, ls->r) - ls->r;
    lg->sites[lg->n++] = s;
  }
  lg->uniform = true;
  for (int i = 0; i < lg->n; i++) {
    esp_site *s = lg->sites[i];
    esp_lora_site *ls = a->site_state[s->index];
    ls->b = add_param(a, s, "lora_B.weight", 2, s->out, ls->r, true);
    if (ls->b < 0) return ESP_ERR_MEMORY;
    lg->uniform &= ls->s == ((esp_lora_site *)a->site_state[lg->sites[0]->index])->s;
  }
  for (int i = 0; i < lg->n && a->cfg.lora_bias; i++) {
    esp_lora_site *ls = a->site_state[lg->sites[i]->index];
    ls->bias = add_param(a, lg->sites[i], "lora_B.bias", 1, lg->sites[i]->out, 1, true);
    if (ls->bias < 0) return ESP_ERR_MEMORY;
  }
  a->group_state[g->index] = lg;
  return ESP_OK;
}

/* The store holds A of an embedding as [vocab, r]: the columns of PEFT's [r, vocab] that a step needs are then rows. */
static esp_status lora_declare_embed(esp_adapter *a, esp_site *s) {
  if (esp_lora_rewrites_base(a->cfg.init) || strcmp(a->cfg.init, "orthogonal") == 0)
    return esp_fail(ESP_ERR_RECIPE, "adapter.init: '%s' is for linear modules, %s is an embedding", a->cfg.init,
                    s->path);
  if (a->cfg.lora_fa)
    return esp_fail(ESP_ERR_RECIPE,
                    "adapter.lora_fa: is for linear modules, %s is an embedding, whose A starts at zero", s->path);
  esp_lora_site *ls = new_site(a, s);
  if (!ls) return ESP_ERR_MEMORY;
  ls->s *= esp_model_describe(a->model)->embed_scale;
  ls->a = add_param(a, s, "lora_embedding_A", 2, s->in, ls->r, true);
  ls->b = add_param(a, s, "lora_embedding_B", 2, s->out, ls->r, true);
  return ls->a < 0 || ls->b < 0 ? ESP_ERR_MEMORY : esp_mark_transposed(a, ls->a);
}

/* ---- linear ---- */

static int lora_tails(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max, void **slot) {
  lora_group *lg = a->group_state[g->index];
  if (!lg) return 0;
  const esp_backend_ops *ops = run->be->ops;
  lg->t = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), lg->width);
  if (lg->slack) esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), lg->slack);
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor xd = esp_dropped(a, run, g, x);
  esp_tensor stacked = esp_params_stacked(a->params, lg->first_a, lg->n, 0);
  const esp_lora_site *first = a->site_state[lg->sites[0]->index];
  ops->matmul(run->be, lg->t, xd, false, stacked, true, lg->uniform ? site_scale(a, first) : 1.0f, 0.0f);
  esp_stack_release(run->stack, mark);
  lg->late_fwd = max < lg->n;
  for (int i = 0; i < lg->n; i++) {
    const esp_lora_site *ls = a->site_state[lg->sites[i]->index];
    esp_tensor ti = esp_tensor_cols_view(&lg->t, ls->t0, ls->r);
    if (!lg->uniform) ops->axpby(run->be, ti, site_scale(a, ls), ti, 0.0f);
    if (!lg->late_fwd) tails[i] = (esp_tail){lg->sites[i]->col0, ti, esp_param_shadow(a->params, ls->b)};
  }
  return lg->late_fwd ? 0 : lg->n;
}

/* A column of ones: a row vector is added to all rows as the outer product ones x bias. */
static esp_tensor ones_column(esp_run *run, lora_group *lg, int64_t rows) {
  const esp_backend_ops *ops = run->be->ops;
  if (lg->ones_cap < rows) {
    if (lg->ones) ops->free(run->be, lg->ones);
    lg->ones_cap = 0;
    int64_t bytes = rows * (int64_t)esp_dtype_size(run->compute);
    lg->ones = ops->alloc(run->be, ESP_MEM_WORKSPACE, bytes);
    char *host = lg->ones ? esp_mem_alloc(ESP_MEM_HOST, (size_t)bytes) : NULL;
    if (!host) {
      run->be->sticky = esp_backend_why_null(run->be);
      return esp_tensor_2d(lg->ones, run->compute, 0, 1);
    }
    for (int64_t i = 0; i < rows; i++) {
      if (run->compute == ESP_F32)
        ((float *)(void *)host)[i] = 1.0f;
      else
        ((uint16_t *)(void *)host)[i] = esp_f32_to_bf16(1.0f);
    }
    ops->upload(run->be, lg->ones, host, bytes);
    esp_mem_free(host);
    lg->ones_cap = (int)rows;
  }
  return esp_tensor_2d(lg->ones, run->compute, rows, 1);
}

static void lora_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  lora_group *lg = a->group_state[g->index];
  if (!lg || !(lg->late_fwd || a->cfg.lora_bias)) return;
  for (int i = 0; i < lg->n; i++) {
    const esp_lora_site *ls = a->site_state[lg->sites[i]->index];
    esp_tensor yi = esp_tensor_cols_view(&y, lg->sites[i]->col0, lg->sites[i]->out);
    if (lg->late_fwd)
      run->be->ops->matmul(run->be, yi, esp_tensor_cols_view(&lg->t, ls->t0, ls->r), false,
                           esp_param_shadow(a->params, ls->b), true, 1.0f, 1.0f);
    if (a->cfg.lora_bias)
      run->be->ops->matmul(run->be, yi, ones_column(run, lg, esp_tensor_rows(&y)), false,
                           esp_param_shadow(a->params, ls->bias), false, site_scale(a, ls), 1.0f);
  }
}

static int lora_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                          int max, void **slot) {
  lora_group *lg = a->group_state[g->index];
  if (!lg) return 0;
  const esp_backend_ops *ops = run->be->ops;
  int64_t rows = esp_tensor_rows(&x);
  lg->dt = esp_stack_tensor(run->stack, run->compute, rows, lg->width);
  if (lg->slack) esp_stack_tensor(run->stack, run->compute, rows, lg->slack);
  for (int i = 0; i < lg->n; i++) {
    const esp_lora_site *ls = a->site_state[lg->sites[i]->index];
    esp_tensor dyi = esp_tensor_cols_view(&dy, lg->sites[i]->col0, lg->sites[i]->out);
    ops->matmul(run->be, esp_tensor_cols_view(&lg->dt, ls->t0, ls->r), dyi, false, esp_param_shadow(a->params, ls->b),
                false, site_scale(a, ls), 0.0f);
    if (!a->trainable) continue;
    ops->matmul(run->be, esp_param_grad(a->params, ls->b), dyi, true, esp_tensor_cols_view(&lg->t, ls->t0, ls->r),
                false, 1.0f, 1.0f);
    if (a->cfg.lora_bias)
      ops->matmul(run->be, esp_param_grad(a->params, ls->bias), ones_column(run, lg, rows), true, dyi, false,
                  site_scale(a, ls), 1.0f);
  }
  if (a->trainable && !a->cfg.lora_fa) {
    int64_t mark = esp_stack_mark(run->stack);
    esp_tensor xd = esp_dropped(a, run, g, x);
    ops->matmul(run->be, esp_params_stacked(a->params, lg->first_a, lg->n, 2), lg->dt, true, xd, false, 1.0f, 1.0f);
    esp_stack_release(run->stack, mark);
  }
  /* With dropout the mask stands between dT A and dx: that product is made apart, in input_bwd. */
  lg->late_bwd = max < 1 || esp_drops(a, run);
  if (lg->late_bwd) return 0;
  tails[0] = (esp_tail){0, lg->dt, esp_params_stacked(a->params, lg->first_a, lg->n, 0)};
  return 1;
}

static void lora_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  lora_group *lg = a->group_state[g->index];
  if (!lg || !lg->late_bwd || !dx.data) return;
  const esp_backend_ops *ops = run->be->ops;
  esp_tensor stacked = esp_params_stacked(a->params, lg->first_a, lg->n, 0);
  if (!esp_drops(a, run)) {
    ops->matmul(run->be, dx, lg->dt, false, stacked, false, 1.0f, 1.0f);
    return;
  }
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor d = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&dx), esp_tensor_cols(&dx));
  ops->matmul(run->be, d, lg->dt, false, stacked, false, 1.0f, 0.0f);
  esp_dropout(a, run, g, dx, d, 1.0f);
  esp_stack_release(run->stack, mark);
}

/* ---- embedding: y += s A^T[ids] B^T ---- */

static void lora_embed(esp_adapter *a, esp_run *run, esp_site *s, const int32_t *ids, esp_tensor y, void **slot) {
  esp_lora_site *ls = a->targeted[s->index] ? a->site_state[s->index] : NULL;
  if (!ls) return;
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor u = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&y), ls->r);
  run->be->ops->gather_rows(run->be, u, esp_param_shadow(a->params, ls->a), ids);
  run->be->ops->matmul(run->be, y, u, false, esp_param_shadow(a->params, ls->b), true, site_scale(a, ls), 1.0f);
  esp_stack_release(run->stack, mark);
}

static void lora_embed_bwd(esp_adapter *a, esp_run *run, esp_site *s, const int32_t *ids, esp_tensor dy, void **slot) {
  esp_lora_site *ls = a->targeted[s->index] ? a->site_state[s->index] : NULL;
  if (!ls || !a->trainable) return;
  const esp_backend_ops *ops = run->be->ops;
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor u = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&dy), ls->r);
  ops->gather_rows(run->be, u, esp_param_shadow(a->params, ls->a), ids);
  ops->matmul(run->be, esp_param_grad(a->params, ls->b), dy, true, u, false, site_scale(a, ls), 1.0f);
  ops->matmul(run->be, u, dy, false, esp_param_shadow(a->params, ls->b), false, site_scale(a, ls), 0.0f);
  ops->embed_bwd(run->be, esp_param_grad(a->params, ls->a).data, u, ids, 1.0f);
  esp_stack_release(run->stack, mark);
}

/* ---- materialise: merge, export and extraction only ---- */

typedef struct lowrank_job {
  float *w;
  const float *A, *B;
  int64_t in, r;
  float scale;
} lowrank_job;

static void lowrank_row(void *ctx, int64_t i, int thread) {
  const lowrank_job *j = ctx;
  float *w = j->w + i * j->in;
  const float *b = j->B + i * j->r;
  enum { BLOCK = 256 };
  /* The change is summed first and added once: the merged weight is the base plus one rounded number. */
  for (int64_t c0 = 0; c0 < j->in; c0 += BLOCK) {
    float sum[BLOCK] = {0};
    int64_t n = j->in - c0 < BLOCK ? j->in - c0 : BLOCK;
    for (int64_t k = 0; k < j->r; k++) {
      const float *arow = j->A + k * j->in + c0;
      for (int64_t c = 0; c < n; c++) sum[c] += b[k] * arow[c];
    }
    for (int64_t c = 0; c < n; c++) w[c0 + c] += j->scale * sum[c];
  }
}

void esp_lowrank_add(float *w, int64_t n, int64_t in, const float *A, const float *B, int64_t r, float scale) {
  lowrank_job job = {w, A, B, in, r, scale};
  esp_parallel(n, lowrank_row, &job);
}

static esp_status lora_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  const esp_lora_site *ls = a->site_state[s->index];
  const esp_param *pa = &a->params->list[ls->a], *pb = &a->params->list[ls->b];
  float *A = esp_mem_alloc(ESP_MEM_HOST, (size_t)pa->numel * sizeof *A);
  float *B = esp_mem_alloc(ESP_MEM_HOST, (size_t)pb->numel * sizeof *B);
  esp_status st = A && B ? ESP_OK : ESP_ERR_MEMORY;
  if (st == ESP_OK) {
    esp_params_get(a->params, ls->a, A);
    esp_params_get(a->params, ls->b, B);
    if (s->kind == ESP_SITE_EMBED) { /* rows are tokens: w[v, :] += s A_t[v, :] B^T, without the model's embed_scale */
      float scale = (float)(site_scale(a, ls) / esp_model_describe(a->model)->embed_scale);
      float *bt = esp_mem_alloc(ESP_MEM_HOST, (size_t)pb->numel * sizeof *bt);
      st = bt ? ESP_OK : ESP_ERR_MEMORY;
      for (int64_t d = 0; bt && d < s->out; d++)
        for (int64_t k = 0; k < ls->r; k++) bt[k * s->out + d] = B[d * ls->r + k];
      if (bt) esp_lowrank_add(w, n, s->out, bt, A + r0 * ls->r, ls->r, scale);
      esp_mem_free(bt);
    } else {
      if (ls->quantised)
        st = esp_loftq_add(a, s, ls, r0, n, w);
      else if (ls->A0)
        esp_lowrank_add(w, n, s->in, ls->A0, ls->B0 + r0 * ls->r, ls->r, -ls->s);
      esp_lowrank_add(w, n, s->in, A, B + r0 * ls->r, ls->r, site_scale(a, ls));
    }
  }
  esp_mem_free(A);
  esp_mem_free(B);
  return st;
}

static esp_status lora_materialise_bias(esp_adapter *a, esp_site *s, float *bias) {
  const esp_lora_site *ls = a->site_state[s->index];
  if (ls->bias < 0) return ESP_OK;
  float *b = esp_mem_alloc(ESP_MEM_HOST, (size_t)s->out * sizeof *b);
  if (!b) return ESP_ERR_MEMORY;
  esp_params_get(a->params, ls->bias, b);
  for (int64_t i = 0; i < s->out; i++) bias[i] += site_scale(a, ls) * b[i];
  esp_mem_free(b);
  return ESP_OK;
}

/* Embeddings in the file's orientation: A [r, vocab], B [dim, r]. */
static int64_t lora_low_rank(esp_adapter *a, esp_site *s, float *A, float *B) {
  const esp_lora_site *ls = a->site_state[s->index];
  int64_t r = ls->r, total = ls->quantised ? 0 : ls->A0 ? 2 * r : r; /* 0: the base itself is another */
  if ((!A && !B) || total == 0) return total;
  float *ha = esp_param_host(a, ls->a), *hb = esp_param_host(a, ls->b);
  float scale = site_scale(a, ls);
  if (s->kind == ESP_SITE_EMBED) scale /= esp_model_describe(a->model)->embed_scale;
  if (ha && hb) {
    if (A) memcpy(A, ha, (size_t)(r * s->in) * sizeof *A);
    if (A && ls->A0) memcpy(A + r * s->in, ls->A0, (size_t)(r * s->in) * sizeof *A);
    for (int64_t i = 0; B && i < s->out; i++)
      for (int64_t k = 0; k < r; k++) {
        B[i * total + k] = scale * hb[i * r + k];
        if (ls->A0) B[i * total + r + k] = -ls->s * ls->B0[i * r + k];
      }
  } else
    total = -1;
  esp_mem_free(ha);
  esp_mem_free(hb);
  return total;
}

static bool lora_factors(const esp_adapter *a, const esp_site *s, int *A, int *B) {
  const esp_lora_site *ls = a->targeted[s->index] && s->kind == ESP_SITE_LINEAR ? a->site_state[s->index] : NULL;
  if (!ls) return false;
  *A = ls->a;
  *B = ls->b;
  return true;
}

/* The scale is shared by both factors, which stay of equal size. */
static esp_status lora_start_from(esp_adapter *a, esp_site *s, int64_t r, const float *A, const float *B) {
  const esp_lora_site *ls = a->site_state[s->index];
  if (r > ls->r || !(ls->s > 0))
    return esp_fail(ESP_ERR_RECIPE, "%s: a change of rank %lld does not fit rank %lld and scale %g", s->path,
                    (long long)r, (long long)ls->r, (double)ls->s);
  float root = sqrtf(ls->s), *ha = esp_param_host(a, ls->a);
  float *hb = esp_mem_alloc(ESP_MEM_HOST, (size_t)(s->out * ls->r) * sizeof *hb);
  esp_status st = ha && hb ? ESP_OK : ESP_ERR_MEMORY;
  for (int64_t k = 0; st == ESP_OK && k < r; k++) {
    bool any = false;
    for (int64_t o = 0; o < s->out; o++) any |= (hb[o * ls->r + k] = B[o * r + k] / root) != 0;
    for (int64_t i = 0; any && i < s->in; i++) ha[k * s->in + i] = A[k * s->in + i] / root;
  }
  if (st == ESP_OK) {
    esp_params_set(a->params, ls->a, ha);
    esp_params_set(a->params, ls->b, hb);
  }
  esp_mem_free(ha);
  esp_mem_free(hb);
  return st;
}

static bool lora_wants_output(const esp_adapter *a) {
  return a->cfg.lora_bias;
}

static void lora_destroy(esp_adapter *a) {
  esp_site **sites;
  esp_group **groups;
  int n_sites = esp_model_sites(a->model, &sites), n_groups = esp_model_groups(a->model, &groups);
  for (int i = 0; i < n_sites; i++) {
    esp_lora_site *ls = a->site_state[i];
    if (!ls) continue;
    esp_mem_free(ls->A0);
    esp_mem_free(ls->B0);
    if (ls->inverse) a->params->be->ops->free(a->params->be, ls->inverse);
  }
  esp_lora_data_free(a);
  for (int i = 0; i < n_groups; i++) {
    lora_group *lg = a->group_state[i];
    if (lg && lg->ones) a->params->be->ops->free(a->params->be, lg->ones);
  }
}

const esp_adapter_kind esp_kind_lora = {
    .config_write = esp_lora_config_write,
    .config_read = esp_lora_config_read,
    .name = "lora",
    .peft_type = "LORA",
    .summary = "low-rank update, y = W x + s B A x (Hu et al. 2021, arXiv:2106.09685)",
    .site_kinds = 1u << ESP_SITE_LINEAR | 1u << ESP_SITE_EMBED,
    .mergeable = true,
    .targets = true,
    .declare = lora_declare,
    .declare_site = lora_declare_embed,
    .init = esp_lora_init,
    .tails = lora_tails,
    .output = lora_output,
    .tails_bwd = lora_tails_bwd,
    .input_bwd = lora_input_bwd,
    .embed = lora_embed,
    .embed_bwd = lora_embed_bwd,
    .wants_output = lora_wants_output,
    .before_step = esp_lora_fa_before_step,
    .wants_data = esp_lora_wants_data,
    .see = esp_lora_see,
    .restart = esp_lora_restart,
    .savable = esp_lora_savable,
    .config_check = esp_lora_config_check,
    .destroy = lora_destroy,
    .materialise = lora_materialise,
    .materialise_bias = lora_materialise_bias,
    .factors = lora_factors,
    .low_rank = lora_low_rank,
    .start_from = lora_start_from,
};
