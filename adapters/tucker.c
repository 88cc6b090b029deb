/* tucker.c: see tucker.h. Forward T1 = x A^T, T2 = s T1 G^T, y += T2 B^T (a tail of the base product). Backward dT2 = s
 * dy B, dG += dT2^T T1, dT1 = dT2 G, dx += dT1 A (a tail), and where the factors are trained dB += dy^T T2, dA += dT1^T
 * x: a factor that several layers share collects the gradients of all of them in its one place. */
#include "adapters/tucker.h"

#include <string.h>

static float scale_of(const esp_adapter *a, const esp_tucker_site *ts) {
  return (float)(ts->s * a->weight);
}

static esp_tensor factor_a(const esp_adapter *a, const esp_tucker_site *ts) {
  return ts->a >= 0 ? esp_param_shadow(a->params, ts->a) : ts->frozen_a;
}

static esp_tensor factor_b(const esp_adapter *a, const esp_tucker_site *ts) {
  return ts->b >= 0 ? esp_param_shadow(a->params, ts->b) : ts->frozen_b;
}

/* The A of all sites as one [width, in]; which: 0 shadow, 2 gradient. */
static bool stacked(const esp_adapter *a, const esp_tucker_group *tg, int which, esp_tensor *out) {
  if (tg->first_a >= 0)
    *out = esp_params_stacked(a->params, tg->first_a, tg->n, which);
  else
    *out = tg->frozen;
  return out->data != NULL;
}

int esp_tucker_tails(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max, void **slot) {
  esp_tucker_group *tg = a->group_state[g->index];
  if (!tg) return 0;
  const esp_backend_ops *ops = run->be->ops;
  int64_t rows = esp_tensor_rows(&x);
  esp_tensor all;
  tg->t1 = esp_stack_tensor(run->stack, run->compute, rows, tg->width);
  tg->t2 = esp_stack_tensor(run->stack, run->compute, rows, tg->width);
  bool joint = stacked(a, tg, 0, &all);
  if (joint) ops->matmul(run->be, tg->t1, x, false, all, true, 1.0f, 0.0f);
  tg->late_fwd = max < tg->n;
  for (int i = 0; i < tg->n; i++) {
    const esp_tucker_site *ts = a->site_state[tg->sites[i]->index];
    esp_tensor t1 = esp_tensor_cols_view(&tg->t1, ts->t0, ts->r), t2 = esp_tensor_cols_view(&tg->t2, ts->t0, ts->r);
    if (!joint) ops->matmul(run->be, t1, x, false, factor_a(a, ts), true, 1.0f, 0.0f);
    ops->matmul(run->be, t2, t1, false, esp_param_shadow(a->params, ts->core), true, scale_of(a, ts), 0.0f);
    if (!tg->late_fwd) tails[i] = (esp_tail){tg->sites[i]->col0, t2, factor_b(a, ts)};
  }
  return tg->late_fwd ? 0 : tg->n;
}

void esp_tucker_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  esp_tucker_group *tg = a->group_state[g->index];
  if (!tg || !tg->late_fwd) return;
  for (int i = 0; i < tg->n; i++) {
    const esp_tucker_site *ts = a->site_state[tg->sites[i]->index];
    run->be->ops->matmul(run->be, esp_tensor_cols_view(&y, tg->sites[i]->col0, tg->sites[i]->out),
                         esp_tensor_cols_view(&tg->t2, ts->t0, ts->r), false, factor_b(a, ts), true, 1.0f, 1.0f);
  }
}

int esp_tucker_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                         int max, void **slot) {
  esp_tucker_group *tg = a->group_state[g->index];
  if (!tg) return 0;
  const esp_backend_ops *ops = run->be->ops;
  esp_params *ps = a->params;
  esp_tensor all, d_all;
  bool joint = stacked(a, tg, 0, &all);
  tg->dt1 = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), tg->width);
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor dt2_all = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), tg->width);
  for (int i = 0; i < tg->n; i++) {
    const esp_tucker_site *ts = a->site_state[tg->sites[i]->index];
    esp_tensor dyi = esp_tensor_cols_view(&dy, tg->sites[i]->col0, tg->sites[i]->out);
    esp_tensor dt1 = esp_tensor_cols_view(&tg->dt1, ts->t0, ts->r), dt2 = esp_tensor_cols_view(&dt2_all, ts->t0, ts->r);
    ops->matmul(run->be, dt2, dyi, false, factor_b(a, ts), false, scale_of(a, ts), 0.0f);
    ops->matmul(run->be, dt1, dt2, false, esp_param_shadow(ps, ts->core), false, 1.0f, 0.0f);
    if (!a->trainable) continue;
    ops->matmul(run->be, esp_param_grad(ps, ts->core), dt2, true, esp_tensor_cols_view(&tg->t1, ts->t0, ts->r), false,
                1.0f, 1.0f);
    if (ts->b >= 0)
      ops->matmul(run->be, esp_param_grad(ps, ts->b), dyi, true, esp_tensor_cols_view(&tg->t2, ts->t0, ts->r), false,
                  1.0f, 1.0f);
    if (ts->a >= 0 && !joint) ops->matmul(run->be, esp_param_grad(ps, ts->a), dt1, true, x, false, 1.0f, 1.0f);
  }
  if (a->trainable && tg->first_a >= 0 && stacked(a, tg, 2, &d_all))
    ops->matmul(run->be, d_all, tg->dt1, true, x, false, 1.0f, 1.0f);
  esp_stack_release(run->stack, mark);
  tg->late_bwd = max < (joint ? 1 : tg->n);
  if (tg->late_bwd) return 0;
  if (joint) {
    tails[0] = (esp_tail){0, tg->dt1, all};
    return 1;
  }
  for (int i = 0; i < tg->n; i++) {
    const esp_tucker_site *ts = a->site_state[tg->sites[i]->index];
    tails[i] = (esp_tail){0, esp_tensor_cols_view(&tg->dt1, ts->t0, ts->r), factor_a(a, ts)};
  }
  return tg->n;
}

void esp_tucker_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  esp_tucker_group *tg = a->group_state[g->index];
  if (!tg || !tg->late_bwd || !dx.data) return;
  for (int i = 0; i < tg->n; i++) {
    const esp_tucker_site *ts = a->site_state[tg->sites[i]->index];
    run->be->ops->matmul(run->be, dx, esp_tensor_cols_view(&tg->dt1, ts->t0, ts->r), false, factor_a(a, ts), false,
                         1.0f, 1.0f);
  }
}

bool esp_tucker_wants_output(const esp_adapter *a) {
  return false; /* only where tails do not fit */
}

int64_t esp_tucker_low_rank(esp_adapter *a, esp_site *s, float *A, float *B) {
  const esp_tucker_site *ts = a->site_state[s->index];
  int64_t r = ts->r;
  if (!A && !B) return r;
  float *own_a = ts->a >= 0 ? esp_param_host(a, ts->a) : NULL, *own_b = ts->b >= 0 ? esp_param_host(a, ts->b) : NULL;
  float *core = esp_param_host(a, ts->core);
  const float *fa = ts->a >= 0 ? own_a : ts->host_a, *fb = ts->b >= 0 ? own_b : ts->host_b;
  if (fa && fb && core) {
    if (A) memcpy(A, fa, (size_t)(r * s->in) * sizeof *A);
    for (int64_t o = 0; B && o < s->out; o++)
      for (int64_t k = 0; k < r; k++) {
        float sum = 0;
        for (int64_t p = 0; p < r; p++) sum += fb[o * r + p] * core[p * r + k];
        B[o * r + k] = scale_of(a, ts) * sum;
      }
  } else
    r = -1;
  esp_mem_free(own_a);
  esp_mem_free(own_b);
  esp_mem_free(core);
  return r;
}

esp_status esp_tucker_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  const esp_tucker_site *ts = a->site_state[s->index];
  float *A = esp_mem_alloc(ESP_MEM_HOST, (size_t)(ts->r * s->in) * sizeof *A);
  float *B = esp_mem_alloc(ESP_MEM_HOST, (size_t)(ts->r * s->out) * sizeof *B);
  bool ok = A && B && esp_tucker_low_rank(a, s, A, B) >= 0;
  if (ok) esp_lowrank_add(w, n, s->in, A, B + r0 * ts->r, ts->r, 1.0f);
  esp_mem_free(A);
  esp_mem_free(B);
  return ok ? ESP_OK : ESP_ERR_MEMORY;
}
