/* hut.c: HUT, a Hadamard updated transformation (Zhang et al. 2024, arXiv:2409.13501): the new weight is a
 * transformation of the old one, W' = U1 o W + U2, with U1 and U2 of low rank. The abstract gives no more, so the form
 * here is chosen: W' = (u v^T) o W + s B A,  b' = u o b,  s = alpha / r, U1 of rank one, because (u v^T) o W = diag(u)
 * W diag(v) costs one base product and two elementwise passes, where a U1 of rank k costs k base products; U2 is
 * LoRA's, of rank r. u = v = 1 and B = 0 at the start: W' = W. What holds by this form: without U2, W'/W is of rank
 * one, zeros of W stay zeros, and (c u, v / c) is the same weight for any c.
 *
 * Forward z = W (v o x) + b, y = u o z + T B^T, T = s x A^T. Backward du = sum_t dy z, dx' = W^T (u o dy), dv = sum_t x
 * dx', dx = v o dx' + dT A. u and v multiply from their fp32 masters: in bf16 a step of theirs would round to nothing.
 */
#include <string.h>

#include "adapters/factors.h"
#include "io/json.h"

typedef struct hut_site {
  int64_t r;
  float s;
  int u, v, a, b;
  int64_t t0;
  esp_tensor z; /* W (v o x) + b, [T, out], kept for du */
} hut_site;

typedef struct hut_group {
  int n;
  esp_site *sites[3];
  int first_a;
  int64_t width;
  esp_tensor t, dt;
  bool late; /* no room for the tail */
} hut_group;

static esp_status hut_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  hut_group *hg = esp_arena_alloc(a->arena, sizeof *hg);
  if (!hg) return ESP_ERR_MEMORY;
  for (int i = 0; i < g->n_sites; i++) {
    if (!hit[i]) continue;
    esp_site *s = g->sites[i];
    hut_site *hs = esp_arena_alloc(a->arena, sizeof *hs);
    if (!hs) return ESP_ERR_MEMORY;
    int64_t r = esp_factor_rank(a, s);
    *hs = (hut_site){.r = r, .s = (float)esp_factor_scale(a, s, r), .t0 = hg->width};
    hs->a = esp_factor_stack(a, s, "hut_A", r, s->in, hg->n == 0);
    if (hs->a < 0) return ESP_ERR_MEMORY;
    if (hg->n == 0) hg->first_a = hs->a;
    hg->sites[hg->n++] = s;
    hg->width += r;
    a->site_state[s->index] = hs;
  }
  for (int i = 0; i < hg->n; i++) {
    esp_site *s = hg->sites[i];
    hut_site *hs = a->site_state[s->index];
    hs->b = esp_factor_add(a, s, "hut_B", s->out, hs->r);
    hs->u = esp_factor_vector(a, s, "hut_u", s->out); /* one dimension: weight decay would pull towards W' = 0 */
    hs->v = esp_factor_vector(a, s, "hut_v", s->in);
    if (hs->b < 0 || hs->u < 0 || hs->v < 0) return ESP_ERR_MEMORY;
  }
  a->group_state[g->index] = hg;
  return ESP_OK;
}

static esp_status hut_init(esp_adapter *a, esp_site *s) {
  const hut_site *hs = a->site_state[s->index];
  ESP_TRY(esp_factor_constant(a, hs->u, 1.0f));
  ESP_TRY(esp_factor_constant(a, hs->v, 1.0f));
  ESP_TRY(esp_factor_uniform(a, hs->a, s->in));
  return esp_factor_constant(a, hs->b, 0.0f);
}

static int hut_tails(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max, void **slot) {
  hut_group *hg = a->group_state[g->index];
  if (!hg) return 0;
  const esp_backend_ops *ops = run->be->ops;
  hg->t = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), hg->width);
  ops->matmul(run->be, hg->t, x, false, esp_params_stacked(a->params, hg->first_a, hg->n, 0), true, 1.0f, 0.0f);
  for (int i = 0; i < hg->n; i++) {
    const hut_site *hs = a->site_state[hg->sites[i]->index];
    esp_tensor t = esp_tensor_cols_view(&hg->t, hs->t0, hs->r);
    ops->axpby(run->be, t, hs->s, t, 0.0f);
  }
  return 0; /* U2 is added behind the multiplication with u */
}

static void hut_forward(esp_adapter *a, esp_run *run, esp_site *s, const esp_wview *w, esp_tensor bias, esp_tensor x,
                        esp_tensor y) {
  hut_site *hs = a->site_state[s->index];
  const esp_backend_ops *ops = run->be->ops;
  hs->z = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), s->out);
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor xv = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), s->in);
  ops->mul_cols(run->be, xv, x, esp_param_master(a->params, hs->v));
  ops->linear(run->be, hs->z, xv, w, bias, NULL, 0, 0.0f);
  esp_stack_release(run->stack, mark);
  ops->mul_cols(run->be, y, hs->z, esp_param_master(a->params, hs->u));
}

static void hut_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  hut_group *hg = a->group_state[g->index];
  if (!hg) return;
  for (int i = 0; i < hg->n; i++) {
    const hut_site *hs = a->site_state[hg->sites[i]->index];
    run->be->ops->matmul(run->be, esp_tensor_cols_view(&y, hg->sites[i]->col0, hg->sites[i]->out),
                         esp_tensor_cols_view(&hg->t, hs->t0, hs->r), false, esp_param_shadow(a->params, hs->b), true,
                         1.0f, 1.0f);
  }
}

static int hut_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                         int max, void **slot) {
  hut_group *hg = a->group_state[g->index];
  if (!hg) return 0;
  const esp_backend_ops *ops = run->be->ops;
  esp_params *ps = a->params;
  hg->dt = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), hg->width);
  for (int i = 0; i < hg->n; i++) {
    esp_site *s = hg->sites[i];
    const hut_site *hs = a->site_state[s->index];
    esp_tensor dyi = esp_tensor_cols_view(&dy, s->col0, s->out);
    ops->matmul(run->be, esp_tensor_cols_view(&hg->dt, hs->t0, hs->r), dyi, false, esp_param_shadow(ps, hs->b), false,
                hs->s, 0.0f);
    if (a->trainable)
      ops->matmul(run->be, esp_param_grad(ps, hs->b), dyi, true, esp_tensor_cols_view(&hg->t, hs->t0, hs->r), false,
                  1.0f, 1.0f);
  }
  if (a->trainable)
    ops->matmul(run->be, esp_params_stacked(ps, hg->first_a, hg->n, 2), hg->dt, true, x, false, 1.0f, 1.0f);
  hg->late = max < 1;
  if (hg->late) return 0;
  tails[0] = (esp_tail){0, hg->dt, esp_params_stacked(ps, hg->first_a, hg->n, 0)};
  return 1;
}

static void hut_backward(esp_adapter *a, esp_run *run, esp_site *s, const esp_wview *w, esp_tensor x, esp_tensor dy,
                         esp_tensor dx, float beta) {
  const hut_site *hs = a->site_state[s->index];
  const esp_backend_ops *ops = run->be->ops;
  esp_params *ps = a->params;
  if (!a->trainable && !dx.data) return;
  int64_t mark = esp_stack_mark(run->stack), rows = esp_tensor_rows(&x);
  esp_tensor dz = esp_stack_tensor(run->stack, run->compute, rows, s->out);
  esp_tensor dxv = esp_stack_tensor(run->stack, run->compute, rows, s->in);
  ops->mul_cols(run->be, dz, dy, esp_param_master(ps, hs->u));
  ops->linear_dx(run->be, dxv, dz, w, NULL, 0, 0.0f);
  if (a->trainable) {
    ops->col_dot(run->be, esp_param_grad(ps, hs->u).data, dy, hs->z);
    ops->col_dot(run->be, esp_param_grad(ps, hs->v).data, x, dxv);
  }
  if (dx.data) {
    ops->mul_cols(run->be, dxv, dxv, esp_param_master(ps, hs->v));
    ops->axpby(run->be, dx, 1.0f, dxv, beta);
  }
  esp_stack_release(run->stack, mark);
}

static void hut_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  hut_group *hg = a->group_state[g->index];
  if (!hg || !hg->late || !dx.data) return;
  run->be->ops->matmul(run->be, dx, hg->dt, false, esp_params_stacked(a->params, hg->first_a, hg->n, 0), false, 1.0f,
                       1.0f);
}

/* ---- merge and export ---- */

static esp_status hut_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  const hut_site *hs = a->site_state[s->index];
  float *u = esp_param_host(a, hs->u), *v = esp_param_host(a, hs->v);
  float *A = esp_param_host(a, hs->a), *B = esp_param_host(a, hs->b);
  bool ok = u && v && A && B;
  for (int64_t o = 0; ok && o < n; o++)
    for (int64_t i = 0; i < s->in; i++) w[o * s->in + i] *= u[r0 + o] * v[i];
  if (ok) esp_lowrank_add(w, n, s->in, A, B + r0 * hs->r, hs->r, hs->s);
  esp_mem_free(u);
  esp_mem_free(v);
  esp_mem_free(A);
  esp_mem_free(B);
  return ok ? ESP_OK : ESP_ERR_MEMORY;
}

static esp_status hut_materialise_bias(esp_adapter *a, esp_site *s, float *bias) {
  const hut_site *hs = a->site_state[s->index];
  float *u = esp_param_host(a, hs->u);
  if (!u) return ESP_ERR_MEMORY;
  for (int64_t o = 0; o < s->out; o++) bias[o] *= u[o];
  esp_mem_free(u);
  return ESP_OK;
}

static esp_status hut_config_check(const esp_adapter_cfg *c) {
  if (strcmp(c->bias, "none") != 0) return esp_fail(ESP_ERR_RECIPE, "adapter.bias: type hut scales biases already");
  return esp_factor_check(c);
}

const esp_adapter_kind esp_kind_hut = {
    .name = "hut",
    .peft_type = "HUT",
    .summary = "W' = (u v^T) o W + s B A: the weight itself is transformed (Zhang et al. 2024, arXiv:2409.13501)",
    .site_kinds = 1u << ESP_SITE_LINEAR,
    .mergeable = true,
    .targets = true,
    .alone = true,
    .product = ESP_PRODUCT_OWN,
    .declare = hut_declare,
    .init = hut_init,
    .tails = hut_tails,
    .output = hut_output,
    .tails_bwd = hut_tails_bwd,
    .input_bwd = hut_input_bwd,
    .site_forward = hut_forward,
    .site_backward = hut_backward,
    .config_write = esp_factor_config_write,
    .config_read = esp_factor_config_read,
    .config_check = hut_config_check,
    .materialise = hut_materialise,
    .materialise_bias = hut_materialise_bias,
};
