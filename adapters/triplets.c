/* triplets.c: y += c P diag(e) Q drop(x) in the step, and for merge and export. The Q matrices and the e vectors of a
 * group (q,k,v or gate,up) lie back to back, so that the way down is one product for the group:
 *   T = x Q^T [T, sum of ranks], kept;  U = T diag(c e), kept;  each site's P is a tail of the base product on its own
 *   columns.
 * Backward: dV_i = dy_i P_i;  dP_i += dy_i^T U_i;  de += c colsum(dV * T);  dT = dV diag(c e);  dQ += dT^T x; one tail
 * (dT, Q) for dx. e is read as fp32 from the masters. Dropout is drawn once per group and regenerated, never stored. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "adapters/triplets.h"

static esp_triplet_site *site_of(const esp_adapter *a, const esp_site *s) {
  return a->site_state[s->index];
}
static float scale_of(const esp_adapter *a, const esp_triplet_site *t) {
  return (float)(t->l.s * a->weight);
}

esp_status esp_triplets_open(esp_adapter *a) {
  esp_site **sites;
  esp_triplets *t = esp_arena_alloc(a->arena, sizeof *t);
  if (!t) return ESP_ERR_MEMORY;
  t->sites = esp_arena_alloc(a->arena, (size_t)(esp_model_sites(a->model, &sites) + 1) * sizeof(esp_site *));
  a->impl = t;
  return t->sites ? ESP_OK : ESP_ERR_MEMORY;
}

static const esp_kept *kept_of(const esp_adapter_cfg *cfg, const esp_site *s) {
  for (int i = 0; i < cfg->n_kept; i++)
    if (strcmp(cfg->kept[i].path, s->path) == 0) return &cfg->kept[i];
  return NULL;
}

static int add_param(esp_adapter *a, const esp_site *s, const char *suffix, int64_t d0, int64_t d1, bool pad) {
  char name[512];
  snprintf(name, sizeof name, ESP_PEFT_PREFIX "%s.%s", s->path, suffix);
  return esp_params_add(a->params, name, 2, (int64_t[]){d0, d1}, pad);
}

/* A file may hold fewer ranks than it started with: its scale stays that of the start. */
static esp_triplet_site *new_site(esp_adapter *a, esp_site *s) {
  esp_triplet_site *t = esp_arena_alloc(a->arena, sizeof *t);
  if (!t) return NULL;
  const esp_kept *kept = kept_of(&a->cfg, s);
  t->start = t->l.r = (int64_t)esp_pattern_value(a->cfg.rank_pattern, a->cfg.n_rank_pattern, s->path, (double)a->cfg.r);
  if (kept) {
    t->start = kept->n;
    t->l.r = 0;
    t->keep = esp_arena_alloc(a->arena, (size_t)kept->n + 1);
    if (!t->keep) return NULL;
    memcpy(t->keep, kept->keep, (size_t)kept->n);
    for (int i = 0; i < kept->n; i++) t->l.r += t->keep[i] != 0;
  }
  const esp_triplets *all = a->impl;
  int64_t full = all->grows ? a->cfg.target_r : a->cfg.r;
  t->l.s = (float)(a->cfg.alpha / ((double)full + 1e-5)); /* PEFT's guard against ranknum == 0 */
  t->l.bias = -1;
  a->site_state[s->index] = t;
  return t;
}

/* All ranks that may come could come to the widest module; each parameter may also begin at another alignment. */
static void make_room(esp_adapter *a) {
  esp_triplets *all = a->impl;
  int64_t widest = 0;
  for (int i = 0; i < all->n_sites; i++) {
    int64_t width = all->sites[i]->in + all->sites[i]->out + 1;
    if (width > widest) widest = width;
  }
  int64_t most = (a->cfg.target_r + all->extra) * all->n_sites;
  if (most < all->ranks) most = all->ranks;
  all->spare = all->trades ? all->ranks : most - all->ranks;
  a->params->reserve = most * widest - a->params->total + 64 * all->n_sites;
  if (a->params->reserve < 0) a->params->reserve = 0;
}

esp_status esp_triplets_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  esp_triplets *all = a->impl;
  esp_triplet_group *tg = esp_arena_alloc(a->arena, sizeof *tg);
  if (!tg) return ESP_ERR_MEMORY;
  for (int i = 0; i < g->n_sites; i++) {
    if (!hit[i]) continue;
    esp_site *s = g->sites[i];
    esp_triplet_site *t = new_site(a, s);
    if (!t) return ESP_ERR_MEMORY;
    t->l.a = add_param(a, s, "lora_A", t->l.r, s->in, tg->n == 0);
    if (t->l.a < 0) return ESP_ERR_MEMORY;
    if (tg->n == 0) tg->first_a = t->l.a;
    t->l.t0 = tg->width;
    tg->width += t->l.r;
    tg->sites[tg->n++] = s;
    all->sites[all->n_sites++] = s;
    all->ranks += t->l.r;
  }
  for (int i = 0; i < tg->n; i++) {
    esp_triplet_site *t = site_of(a, tg->sites[i]);
    t->e = add_param(a, tg->sites[i], "lora_E", t->l.r, 1, i == 0);
    if (t->e < 0) return ESP_ERR_MEMORY;
    if (i == 0) tg->first_e = t->e;
  }
  for (int i = 0; i < tg->n; i++) {
    esp_triplet_site *t = site_of(a, tg->sites[i]);
    t->l.b = add_param(a, tg->sites[i], "lora_B", tg->sites[i]->out, t->l.r, true);
    if (t->l.b < 0) return ESP_ERR_MEMORY;
  }
  a->group_state[g->index] = tg;
  if (all->grows) make_room(a);
  return ESP_OK;
}

/* The records follow the shapes. */
void esp_triplets_resized(esp_adapter *a) {
  esp_triplets *all = a->impl;
  esp_group **groups;
  int n = esp_model_groups(a->model, &groups);
  int64_t before = all->ranks;
  all->ranks = 0;
  for (int i = 0; i < n; i++) {
    esp_triplet_group *tg = a->group_state[i];
    if (!tg) continue;
    tg->width = 0;
    for (int k = 0; k < tg->n; k++) {
      esp_triplet_site *t = site_of(a, tg->sites[k]);
      t->l.r = a->params->list[t->l.a].shape[0];
      t->l.t0 = tg->width;
      tg->width += t->l.r;
    }
    all->ranks += tg->width;
  }
  all->spare -= all->ranks - before;
}

/* ---- the step ---- */

/* Ranks that are added during a run widen T and U by as many columns in all, wherever they go. A plan has that room
 * at the first group, whose T lives longest, and outside of blocks, where a recomputed block does not lie beside it. */
static int64_t room_for(const esp_adapter *a, const esp_run *run, const esp_group *g, bool forward) {
  const esp_triplets *all = a->impl;
  if (!esp_backend_counts(run->be) || all->spare <= 0) return 0;
  bool here = !forward || g == all->sites[0]->group || g->sites[0]->layer < 0;
  return here ? all->spare : 0;
}

static esp_tensor vector(esp_tensor column) { /* [n, 1] as [n] */
  return esp_tensor_1d(column.data, ESP_F32, column.shape[0]);
}

int esp_triplets_tails(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max,
                       void **slot) {
  esp_triplet_group *tg = a->group_state[g->index];
  if (!tg || tg->width == 0) return 0;
  const esp_backend_ops *ops = run->be->ops;
  int64_t rows = esp_tensor_rows(&x), room = room_for(a, run, g, true);
  if (room) { /* and the vectors of every group may begin at another alignment */
    esp_group **groups;
    esp_stack_tensor(run->stack, run->compute, rows, 2 * room);
    esp_stack_push(run->stack, 128 * (int64_t)esp_model_groups(a->model, &groups));
  }
  tg->ec = esp_stack_tensor(run->stack, ESP_F32, 1, tg->width);
  tg->t = esp_stack_tensor(run->stack, run->compute, rows, tg->width);
  tg->u = esp_stack_tensor(run->stack, run->compute, rows, tg->width);
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor xd = esp_dropped(a, run, g, x);
  ops->matmul(run->be, tg->t, xd, false, esp_params_stacked(a->params, tg->first_a, tg->n, 0), true, 1.0f, 0.0f);
  esp_stack_release(run->stack, mark);
  esp_tensor e = vector(esp_params_stacked(a->params, tg->first_e, tg->n, 1));
  for (int i = 0; i < tg->n; i++) {
    const esp_triplet_site *t = site_of(a, tg->sites[i]);
    if (t->l.r == 0) continue;
    ops->axpby(run->be, esp_tensor_1d((float *)tg->ec.data + t->l.t0, ESP_F32, t->l.r), scale_of(a, t),
               esp_tensor_1d((float *)e.data + t->l.t0, ESP_F32, t->l.r), 0.0f);
  }
  tg->ec = esp_tensor_1d(tg->ec.data, ESP_F32, tg->width);
  ops->mul_cols(run->be, tg->u, tg->t, tg->ec);
  int n = 0;
  tg->late_fwd = max < tg->n;
  for (int i = 0; i < tg->n && !tg->late_fwd; i++) {
    const esp_triplet_site *t = site_of(a, tg->sites[i]);
    if (t->l.r == 0) continue;
    tails[n++] = (esp_tail){tg->sites[i]->col0, esp_tensor_cols_view(&tg->u, t->l.t0, t->l.r),
                            esp_param_shadow(a->params, t->l.b)};
  }
  return n;
}

void esp_triplets_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  esp_triplet_group *tg = a->group_state[g->index];
  if (!tg || tg->width == 0 || !tg->late_fwd) return;
  for (int i = 0; i < tg->n; i++) {
    const esp_triplet_site *t = site_of(a, tg->sites[i]);
    if (t->l.r == 0) continue;
    run->be->ops->matmul(run->be, esp_tensor_cols_view(&y, tg->sites[i]->col0, tg->sites[i]->out),
                         esp_tensor_cols_view(&tg->u, t->l.t0, t->l.r), false, esp_param_shadow(a->params, t->l.b),
                         true, 1.0f, 1.0f);
  }
}

bool esp_triplets_wants_output(const esp_adapter *a) {
  return false;
}

/* de += c colsum(dV * T), through a scratch that carries each site's c. */
static void grad_e(esp_adapter *a, esp_run *run, esp_triplet_group *tg, esp_tensor dv) {
  const esp_backend_ops *ops = run->be->ops;
  int64_t mark = esp_stack_mark(run->stack);
  float *sum = esp_stack_push(run->stack, tg->width * (int64_t)sizeof *sum);
  ops->zero(run->be, sum, tg->width * (int64_t)sizeof *sum);
  ops->col_dot(run->be, sum, dv, tg->t);
  for (int i = 0; i < tg->n; i++) {
    const esp_triplet_site *t = site_of(a, tg->sites[i]);
    if (t->l.r)
      ops->axpby(run->be, vector(esp_param_grad(a->params, t->e)), scale_of(a, t),
                 esp_tensor_1d(sum + t->l.t0, ESP_F32, t->l.r), 1.0f);
  }
  esp_stack_release(run->stack, mark);
}

int esp_triplets_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                           int max, void **slot) {
  esp_triplet_group *tg = a->group_state[g->index];
  if (!tg || tg->width == 0) return 0;
  const esp_backend_ops *ops = run->be->ops;
  int64_t room = room_for(a, run, g, false);
  if (room) esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), room);
  tg->dt = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), tg->width);
  for (int i = 0; i < tg->n; i++) {
    const esp_triplet_site *t = site_of(a, tg->sites[i]);
    if (t->l.r == 0) continue;
    esp_tensor dyi = esp_tensor_cols_view(&dy, tg->sites[i]->col0, tg->sites[i]->out);
    ops->matmul(run->be, esp_tensor_cols_view(&tg->dt, t->l.t0, t->l.r), dyi, false,
                esp_param_shadow(a->params, t->l.b), false, 1.0f, 0.0f);
    if (a->trainable)
      ops->matmul(run->be, esp_param_grad(a->params, t->l.b), dyi, true, esp_tensor_cols_view(&tg->u, t->l.t0, t->l.r),
                  false, 1.0f, 1.0f);
  }
  if (a->trainable) grad_e(a, run, tg, tg->dt);
  ops->mul_cols(run->be, tg->dt, tg->dt, tg->ec);
  if (a->trainable) {
    int64_t mark = esp_stack_mark(run->stack);
    esp_tensor xd = esp_dropped(a, run, g, x);
    ops->matmul(run->be, esp_params_stacked(a->params, tg->first_a, tg->n, 2), tg->dt, true, xd, false, 1.0f, 1.0f);
    esp_stack_release(run->stack, mark);
  }
  tg->late_bwd = max < 1 || esp_drops(a, run);
  if (tg->late_bwd) return 0;
  tails[0] = (esp_tail){0, tg->dt, esp_params_stacked(a->params, tg->first_a, tg->n, 0)};
  return 1;
}

void esp_triplets_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  esp_triplet_group *tg = a->group_state[g->index];
  if (!tg || tg->width == 0 || !tg->late_bwd || !dx.data) return;
  const esp_backend_ops *ops = run->be->ops;
  esp_tensor stacked = esp_params_stacked(a->params, tg->first_a, tg->n, 0);
  if (!esp_drops(a, run)) {
    ops->matmul(run->be, dx, tg->dt, false, stacked, false, 1.0f, 1.0f);
    return;
  }
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor d = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&dx), esp_tensor_cols(&dx));
  ops->matmul(run->be, d, tg->dt, false, stacked, false, 1.0f, 0.0f);
  esp_dropout(a, run, g, dx, d, 1.0f);
  esp_stack_release(run->stack, mark);
}

/* ---- merge, export ---- */

/* Q with c e in its rows, and P; host. */
static esp_status factors(const esp_adapter *a, const esp_triplet_site *t, float **A, float **B) {
  float *e = esp_param_host(a, t->e);
  *A = esp_param_host(a, t->l.a);
  *B = esp_param_host(a, t->l.b);
  esp_status st = e && *A && *B ? ESP_OK : ESP_ERR_MEMORY;
  int64_t in = a->params->list[t->l.a].shape[1];
  for (int64_t k = 0; st == ESP_OK && k < t->l.r; k++)
    for (int64_t c = 0; c < in; c++) (*A)[k * in + c] *= scale_of(a, t) * e[k];
  esp_mem_free(e);
  return st;
}

esp_status esp_triplets_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  const esp_triplet_site *t = site_of(a, s);
  float *A, *B;
  if (t->l.r == 0) return ESP_OK;
  esp_status st = factors(a, t, &A, &B);
  if (st == ESP_OK) esp_lowrank_add(w, n, s->in, A, B + r0 * t->l.r, t->l.r, 1.0f);
  esp_mem_free(A);
  esp_mem_free(B);
  return st;
}

int64_t esp_triplets_low_rank(esp_adapter *a, esp_site *s, float *A, float *B) {
  const esp_triplet_site *t = site_of(a, s);
  if ((!A && !B) || t->l.r == 0) return t->l.r;
  float *ha, *hb;
  bool ok = factors(a, t, &ha, &hb) == ESP_OK;
  if (ok && A) memcpy(A, ha, (size_t)(t->l.r * s->in) * sizeof *A);
  if (ok && B) memcpy(B, hb, (size_t)(t->l.r * s->out) * sizeof *B);
  esp_mem_free(ha);
  esp_mem_free(hb);
  return ok ? t->l.r : -1;
}

void esp_triplets_destroy(esp_adapter *a) {
  esp_triplets *t = a->impl;
  if (!t || !a->params) return;
  float *const list[] = {t->scores, t->grams, t->eyes, t->norms};
  for (size_t i = 0; i < sizeof list / sizeof *list; i++)
    if (list[i]) a->params->be->ops->free(a->params->be, list[i]);
}
