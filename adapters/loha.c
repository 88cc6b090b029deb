/* loha.c: LoHa, a low-rank Hadamard product (Hyeon-Woo et al. 2021, arXiv:2108.06098; LyCORIS, arXiv:2309.14859):
 *   delta W = s (w1_a w1_b) o (w2_a w2_b),  s = alpha / r,  w*_a [out, r], w*_b [r, in].
 * The elementwise product of two matrices of rank r has the factors
 *   delta W = s K_a K_b,  K_a[o, p r + q] = w1_a[o, p] w2_a[o, q],  K_b[p r + q, i] = w1_b[p, i] w2_b[q, i],
 * the row-wise Khatri-Rao products, so the step is that of LoRA with rank r^2 and nothing is [out, in]:
 *   T = s x K_b^T;  y += T K_a^T;  dT = s dy K_a;  dK_a = dy^T T;  dK_b^T = x^T dT;  dx += dT K_b.
 * K_a and K_b are made anew in each pass, in one block that all groups use in turn; dK_a and dK_b go through the
 * product rule of the Khatri-Rao product into the four factors. w*_b are stored turned, [in, r], so that rows meet
 * rows.
 */
#include <string.h>

#include "adapters/factors.h"
#include "io/json.h"

typedef struct loha_site {
  int64_t r; /* rank of the change: q^2 */
  int64_t q; /* adapter.r */
  float s;
  int w1_a, w1_b, w2_a, w2_b;
  int64_t t0; /* first column in the group's T and K_b^T */
  int64_t ka; /* offset of K_a in the block */
} loha_site;

typedef struct loha_group {
  int n;
  esp_site *sites[3];
  int64_t width;          /* sum of q^2 */
  int64_t kb, d_kb, d_ka; /* offsets in the block */
  bool uniform;           /* one s for all */
  bool late;              /* the base product had no room for the tails */
  esp_tensor t, dt;
} loha_group;

static float scale_of(const esp_adapter *a, const loha_site *ls) {
  return (float)(ls->s * a->weight);
}

static esp_status loha_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  loha_group *lg = esp_arena_alloc(a->arena, sizeof *lg);
  if (!a->impl) a->impl = esp_arena_alloc(a->arena, sizeof(esp_factor_scratch));
  if (!lg || !a->impl) return ESP_ERR_MEMORY;
  int64_t unit = (int64_t)esp_dtype_size(esp_model_compute(a->model)), at = 0, widest = 0;
  lg->uniform = true;
  for (int i = 0; i < g->n_sites; i++) {
    if (!hit[i]) continue;
    esp_site *s = g->sites[i];
    loha_site *ls = esp_arena_alloc(a->arena, sizeof *ls);
    if (!ls) return ESP_ERR_MEMORY;
    int64_t q = esp_factor_rank(a, s);
    *ls = (loha_site){.r = q * q, .q = q, .s = (float)esp_factor_scale(a, s, q), .t0 = lg->width, .ka = at};
    ls->w1_a = esp_factor_add(a, s, "hada_w1_a", s->out, q);
    ls->w1_b = esp_factor_add(a, s, "hada_w1_b", s->in, q);
    ls->w2_a = esp_factor_add(a, s, "hada_w2_a", s->out, q);
    ls->w2_b = esp_factor_add(a, s, "hada_w2_b", s->in, q);
    if (ls->w1_a < 0 || ls->w1_b < 0 || ls->w2_a < 0 || ls->w2_b < 0) return ESP_ERR_MEMORY;
    ESP_TRY(esp_mark_transposed(a, ls->w1_b));
    ESP_TRY(esp_mark_transposed(a, ls->w2_b));
    a->site_state[s->index] = ls;
    lg->sites[lg->n++] = s;
    lg->width += ls->r;
    at += esp_factor_round(s->out * ls->r * unit);
    if (s->out * ls->r > widest) widest = s->out * ls->r;
    lg->uniform &= ls->s == ((loha_site *)a->site_state[lg->sites[0]->index])->s;
  }
  lg->kb = at;
  at += esp_factor_round(g->in * lg->width * unit);
  lg->d_ka = at;
  lg->d_kb = at + esp_factor_round(widest * (int64_t)sizeof(float));
  if (a->trainable) at = lg->d_kb + g->in * lg->width * (int64_t)sizeof(float);
  a->group_state[g->index] = lg;
  return esp_factor_reserve(a, a->impl, at);
}

static esp_status loha_init(esp_adapter *a, esp_site *s) {
  const loha_site *ls = a->site_state[s->index];
  ESP_TRY(esp_factor_uniform(a, ls->w1_a, ls->q));
  ESP_TRY(esp_factor_uniform(a, ls->w1_b, s->in));
  ESP_TRY(esp_factor_uniform(a, ls->w2_a, ls->q));
  return esp_factor_constant(a, ls->w2_b, 0.0f);
}

static esp_tensor block(const esp_adapter *a, int64_t offset, esp_dtype t, int64_t rows, int64_t cols) {
  return esp_tensor_2d((char *)((esp_factor_scratch *)a->impl)->data + offset, t, rows, cols);
}

static esp_tensor make_ka(esp_adapter *a, esp_run *run, const esp_site *s) {
  const loha_site *ls = a->site_state[s->index];
  esp_tensor ka = block(a, ls->ka, run->compute, s->out, ls->r);
  run->be->ops->khatri_rao(run->be, ka, esp_param_shadow(a->params, ls->w1_a), esp_param_shadow(a->params, ls->w2_a));
  return ka;
}

/* K_b^T of all sites side by side, [in, width]. */
static esp_tensor make_kb(esp_adapter *a, esp_run *run, const esp_group *g, const loha_group *lg) {
  esp_tensor kb = block(a, lg->kb, run->compute, g->in, lg->width);
  for (int i = 0; i < lg->n; i++) {
    const loha_site *ls = a->site_state[lg->sites[i]->index];
    run->be->ops->khatri_rao(run->be, esp_tensor_cols_view(&kb, ls->t0, ls->r), esp_param_shadow(a->params, ls->w1_b),
                             esp_param_shadow(a->params, ls->w2_b));
  }
  return kb;
}

static int loha_tails(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max, void **slot) {
  loha_group *lg = a->group_state[g->index];
  if (!lg) return 0;
  const esp_backend_ops *ops = run->be->ops;
  lg->t = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), lg->width);
  const loha_site *first = a->site_state[lg->sites[0]->index];
  ops->matmul(run->be, lg->t, x, false, make_kb(a, run, g, lg), false, lg->uniform ? scale_of(a, first) : 1.0f, 0.0f);
  lg->late = max < lg->n;
  for (int i = 0; i < lg->n; i++) {
    const loha_site *ls = a->site_state[lg->sites[i]->index];
    esp_tensor ti = esp_tensor_cols_view(&lg->t, ls->t0, ls->r);
    if (!lg->uniform) ops->axpby(run->be, ti, scale_of(a, ls), ti, 0.0f);
    if (!lg->late) tails[i] = (esp_tail){lg->sites[i]->col0, ti, make_ka(a, run, lg->sites[i])};
  }
  return lg->late ? 0 : lg->n;
}

static void loha_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  loha_group *lg = a->group_state[g->index];
  if (!lg || !lg->late) return;
  for (int i = 0; i < lg->n; i++) {
    const loha_site *ls = a->site_state[lg->sites[i]->index];
    esp_tensor yi = esp_tensor_cols_view(&y, lg->sites[i]->col0, lg->sites[i]->out);
    run->be->ops->matmul(run->be, yi, esp_tensor_cols_view(&lg->t, ls->t0, ls->r), false, make_ka(a, run, lg->sites[i]),
                         true, 1.0f, 1.0f);
  }
}

static int loha_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                          int max, void **slot) {
  loha_group *lg = a->group_state[g->index];
  if (!lg) return 0;
  const esp_backend_ops *ops = run->be->ops;
  esp_params *ps = a->params;
  lg->dt = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), lg->width);
  for (int i = 0; i < lg->n; i++) {
    esp_site *s = lg->sites[i];
    const loha_site *ls = a->site_state[s->index];
    esp_tensor dyi = esp_tensor_cols_view(&dy, s->col0, s->out), ka = make_ka(a, run, s);
    ops->matmul(run->be, esp_tensor_cols_view(&lg->dt, ls->t0, ls->r), dyi, false, ka, false, scale_of(a, ls), 0.0f);
    if (!a->trainable) continue;
    esp_tensor d_ka = block(a, lg->d_ka, ESP_F32, s->out, ls->r);
    ops->matmul(run->be, d_ka, dyi, true, esp_tensor_cols_view(&lg->t, ls->t0, ls->r), false, 1.0f, 0.0f);
    ops->khatri_rao_bwd(run->be, esp_param_grad(ps, ls->w1_a), esp_param_grad(ps, ls->w2_a), d_ka,
                        esp_param_shadow(ps, ls->w1_a), esp_param_shadow(ps, ls->w2_a));
  }
  if (!a->trainable) return 0;
  esp_tensor d_kb = block(a, lg->d_kb, ESP_F32, g->in, lg->width);
  ops->matmul(run->be, d_kb, x, true, lg->dt, false, 1.0f, 0.0f);
  for (int i = 0; i < lg->n; i++) {
    const loha_site *ls = a->site_state[lg->sites[i]->index];
    ops->khatri_rao_bwd(run->be, esp_param_grad(ps, ls->w1_b), esp_param_grad(ps, ls->w2_b),
                        esp_tensor_cols_view(&d_kb, ls->t0, ls->r), esp_param_shadow(ps, ls->w1_b),
                        esp_param_shadow(ps, ls->w2_b));
  }
  return 0;
}

/* K_b lies turned, which a tail of the base product cannot take. */
static void loha_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  loha_group *lg = a->group_state[g->index];
  if (!lg || !dx.data) return;
  run->be->ops->matmul(run->be, dx, lg->dt, false, make_kb(a, run, g, lg), true, 1.0f, 1.0f);
}

static bool loha_wants_output(const esp_adapter *a) {
  return false; /* only where tails do not fit */
}

static void loha_destroy(esp_adapter *a) {
  if (a->impl) esp_factor_release(a, a->impl);
}

/* ---- merge, export and extraction ---- */

static int64_t loha_low_rank(esp_adapter *a, esp_site *s, float *A, float *B) {
  const loha_site *ls = a->site_state[s->index];
  int64_t q = ls->q, r = ls->r;
  if (!A && !B) return r;
  float *w1a = esp_param_host(a, ls->w1_a), *w1b = esp_param_host(a, ls->w1_b);
  float *w2a = esp_param_host(a, ls->w2_a), *w2b = esp_param_host(a, ls->w2_b);
  if (w1a && w1b && w2a && w2b) {
    for (int64_t k = 0; A && k < r; k++)
      for (int64_t i = 0; i < s->in; i++) A[k * s->in + i] = w1b[k / q * s->in + i] * w2b[k % q * s->in + i];
    for (int64_t o = 0; B && o < s->out; o++)
      for (int64_t k = 0; k < r; k++) B[o * r + k] = scale_of(a, ls) * (w1a[o * q + k / q] * w2a[o * q + k % q]);
  } else
    r = -1;
  esp_mem_free(w1a);
  esp_mem_free(w1b);
  esp_mem_free(w2a);
  esp_mem_free(w2b);
  return r;
}

static esp_status loha_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  const loha_site *ls = a->site_state[s->index];
  float *A = esp_mem_alloc(ESP_MEM_HOST, (size_t)(ls->r * s->in) * sizeof *A);
  float *B = esp_mem_alloc(ESP_MEM_HOST, (size_t)(ls->r * s->out) * sizeof *B);
  bool ok = A && B && loha_low_rank(a, s, A, B) >= 0;
  if (ok) esp_lowrank_add(w, n, s->in, A, B + r0 * ls->r, ls->r, 1.0f);
  esp_mem_free(A);
  esp_mem_free(B);
  return ok ? ESP_OK : ESP_ERR_MEMORY;
}

const esp_adapter_kind esp_kind_loha = {
    .name = "loha",
    .peft_type = "LOHA",
    .summary = "Hadamard product of two low-rank updates, rank up to r^2 (Hyeon-Woo et al. 2021, arXiv:2108.06098)",
    .site_kinds = 1u << ESP_SITE_LINEAR,
    .mergeable = true,
    .targets = true,
    .declare = loha_declare,
    .init = loha_init,
    .tails = loha_tails,
    .output = loha_output,
    .tails_bwd = loha_tails_bwd,
    .input_bwd = loha_input_bwd,
    .wants_output = loha_wants_output,
    .destroy = loha_destroy,
    .config_write = esp_lycoris_config_write,
    .config_read = esp_lycoris_config_read,
    .config_check = esp_factor_check,
    .materialise = loha_materialise,
    .low_rank = loha_low_rank,
};
