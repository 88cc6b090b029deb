/* triplets_rank.c: importances of ranks, and ranks that come and go.
 *
 * Importance (AdaLoRA, Zhang et al. 2023, arXiv:2303.10512, section 3.2, as PEFT computes it): each element w of Q, e
 * and P has a smoothed sensitivity |w dL/dw| and its smoothed uncertainty (esp_rule_sensitivity), its score is their
 * product, and the score of rank i of a module is s(e_i) + mean_j s(q_ij) + mean_j s(p_ji). The statistics are updated
 * on the backend in each step; only scores, three numbers per rank, come to the host, at the steps that decide. */
#include <math.h>
#include <string.h>

#include "adapters/triplets.h"
#include "backend/optim_rules.h"
#include "core/rng.h"
#include "io/json.h"

static const float SPREAD = 0.02f; /* of new q and p */

int64_t esp_triplets_steps(double x, int64_t total) {
  return x > 0 && x < 1 ? (int64_t)ceil(x * (double)total) : (int64_t)x;
}

static esp_triplet_site *site_of(const esp_adapter *a, int i) {
  const esp_triplets *all = a->impl;
  return a->site_state[all->sites[i]->index];
}

/* Backend memory of at least n elements; kept for the next time. */
static esp_status room(esp_adapter *a, float **at, int64_t *cap, int64_t n) {
  esp_backend *be = a->params->be;
  if (*at && *cap >= n) return ESP_OK;
  if (*at) be->ops->free(be, *at);
  *at = be->ops->alloc(be, ESP_MEM_WORKSPACE, n * (int64_t)sizeof(float));
  *cap = *at ? n : 0;
  return *at ? ESP_OK : esp_backend_why_null(be);
}

void esp_triplets_sense(esp_adapter *a) {
  const esp_params *ps = a->params;
  esp_update_args u = {.rule = ESP_RULE_SENSITIVITY,
                       .n = ps->total,
                       .master = ps->master,
                       .grad = ps->grad,
                       .state = {a->state[0], a->state[1]},
                       .grad_scale = a->grad_scale};
  u.hyper[ESP_SENS_B1] = (float)a->cfg.beta1;
  u.hyper[ESP_SENS_1MB1] = (float)(1 - a->cfg.beta1);
  u.hyper[ESP_SENS_B2] = (float)a->cfg.beta2;
  u.hyper[ESP_SENS_1MB2] = (float)(1 - a->cfg.beta2);
  ps->be->ops->update(ps->be, &u);
}

/* A statistic of one parameter as [rows, cols]. */
static esp_tensor stat_of(const esp_adapter *a, int which, int param) {
  const esp_param *p = &a->params->list[param];
  return esp_tensor_2d(a->state[which] + p->offset, ESP_F32, p->shape[0], p->shape[1]);
}

esp_status esp_triplets_scores(esp_adapter *a, float *out) {
  esp_triplets *all = a->impl;
  esp_backend *be = a->params->be;
  int64_t n = all->ranks, at = 0;
  if (n == 0) return ESP_OK;
  ESP_TRY(room(a, &all->scores, &all->cap_scores, 3 * n));
  float *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)(3 * n) * sizeof *host);
  if (!host) return ESP_ERR_MEMORY;
  be->ops->zero(be, all->scores, 3 * n * (int64_t)sizeof *host);
  for (int i = 0; i < all->n_sites; i++) {
    const esp_triplet_site *t = site_of(a, i);
    if (t->l.r == 0) continue;
    be->ops->row_dot(be, all->scores + at, stat_of(a, 0, t->l.a), stat_of(a, 1, t->l.a), 0.0f);
    be->ops->col_dot(be, all->scores + n + at, stat_of(a, 0, t->l.b), stat_of(a, 1, t->l.b));
    be->ops->row_dot(be, all->scores + 2 * n + at, stat_of(a, 0, t->e), stat_of(a, 1, t->e), 0.0f);
    at += t->l.r;
  }
  be->ops->download(be, host, all->scores, 3 * n * (int64_t)sizeof *host);
  esp_status st = esp_backend_sync(be);
  at = 0;
  for (int i = 0; i < all->n_sites; i++) {
    const esp_triplet_site *t = site_of(a, i);
    for (int64_t k = 0; k < t->l.r; k++, at++)
      out[at] = host[2 * n + at] + (host[at] / (float)all->sites[i]->in + host[n + at] / (float)all->sites[i]->out);
  }
  esp_mem_free(host);
  return st;
}

esp_status esp_triplets_get_e(esp_adapter *a, float *out) {
  const esp_triplets *all = a->impl;
  for (int i = 0; i < all->n_sites; i++) {
    const esp_triplet_site *t = site_of(a, i);
    if (t->l.r) esp_params_get(a->params, t->e, out);
    out += t->l.r;
  }
  return esp_backend_sync(a->params->be);
}

void esp_triplets_set_e(esp_adapter *a, const float *e) {
  const esp_triplets *all = a->impl;
  for (int i = 0; i < all->n_sites; i++) {
    const esp_triplet_site *t = site_of(a, i);
    if (t->l.r) esp_params_set(a->params, t->e, e);
    e += t->l.r;
  }
}

esp_status esp_triplets_mask(esp_adapter *a, const float *mask) {
  esp_triplets *all = a->impl;
  esp_backend *be = a->params->be;
  int64_t at = 0;
  if (all->ranks == 0) return ESP_OK;
  ESP_TRY(room(a, &all->scores, &all->cap_scores, 3 * all->ranks));
  be->ops->upload(be, all->scores, mask, all->ranks * (int64_t)sizeof *mask);
  for (int i = 0; i < all->n_sites; i++) {
    const esp_triplet_site *t = site_of(a, i);
    if (t->l.r == 0) continue;
    esp_tensor e = esp_param_master(a->params, t->e);
    be->ops->mul(be, e, e, esp_tensor_2d(all->scores + at, ESP_F32, t->l.r, 1), 0.0f);
    if (a->params->shadow != (void *)a->params->master)
      be->ops->axpby(be, esp_param_shadow(a->params, t->e), 1.0f, e, 0.0f);
    at += t->l.r;
  }
  return esp_backend_sync(be);
}

/* ---- ranks that leave and ranks that come ---- */

/* The new rows of Q and columns of P: q, p ~ N(0, 0.02^2), numbered by how many ranks the module has ever had, so that
 * a resumed run draws what an uninterrupted one does. */
static esp_status fill_new(esp_adapter *a, int i, int64_t old, float e0) {
  const esp_triplets *all = a->impl;
  esp_triplet_site *t = site_of(a, i);
  const esp_site *s = all->sites[i];
  uint64_t seed = a->cfg.seed, qs = esp_rng_stream_name(ESP_RNG_INIT, a->params->list[t->l.a].name),
           ps = esp_rng_stream_name(ESP_RNG_INIT, a->params->list[t->l.b].name);
  float *A = esp_param_host(a, t->l.a), *B = esp_param_host(a, t->l.b), *e = esp_param_host(a, t->e);
  esp_status st = A && B && e ? ESP_OK : ESP_ERR_MEMORY;
  for (int64_t k = old; st == ESP_OK && k < t->l.r; k++, t->serial++) {
    for (int64_t c = 0; c < s->in; c++)
      A[k * s->in + c] = SPREAD * esp_rng_normal(seed, qs, (uint64_t)(t->serial * s->in + c));
    for (int64_t o = 0; o < s->out; o++)
      B[o * t->l.r + k] = SPREAD * esp_rng_normal(seed, ps, (uint64_t)(t->serial * s->out + o));
    e[k] = e0;
  }
  if (st == ESP_OK) {
    esp_params_set(a->params, t->l.a, A);
    esp_params_set(a->params, t->l.b, B);
    esp_params_set(a->params, t->e, e);
  }
  esp_mem_free(A);
  esp_mem_free(B);
  esp_mem_free(e);
  return st;
}

/* Which of the ranks it started with are left. Only where none was ever added: else there is no such list. */
static esp_status note_kept(esp_adapter *a, esp_triplet_site *t, const uint8_t *keep) {
  if (!t->keep) {
    t->keep = esp_arena_alloc(a->arena, (size_t)t->start + 1);
    if (!t->keep) return ESP_ERR_MEMORY;
    memset(t->keep, 1, (size_t)t->start);
  }
  int64_t at = 0;
  for (int64_t k = 0; k < t->start; k++)
    if (t->keep[k]) t->keep[k] = keep[at++] != 0;
  return ESP_OK;
}

esp_status esp_triplets_move(esp_adapter *a, const uint8_t *keep, const int64_t *more, float e0) {
  esp_triplets *all = a->impl;
  esp_status st = ESP_OK;
  size_t n_sites = (size_t)all->n_sites;
  int64_t added = 0, at = 0, n = 0;
  for (int i = 0; i < all->n_sites; i++) added += more ? more[i] : 0;
  esp_resize *list = esp_mem_alloc(ESP_MEM_HOST, (3 * n_sites + 1) * sizeof *list);
  int32_t *from = esp_mem_alloc(ESP_MEM_HOST, (size_t)(all->ranks + added + 1) * sizeof *from), *next = from;
  int64_t *left = esp_mem_alloc(ESP_MEM_HOST, (n_sites + 1) * sizeof *left);
  if (!list || !from || !left) ESP_GOTO(ESP_ERR_MEMORY);
  for (int i = 0; i < all->n_sites; i++) {
    esp_triplet_site *t = site_of(a, i);
    int32_t *mine = next;
    for (int64_t k = 0; k < t->l.r; k++)
      if (keep[at + k]) *next++ = (int32_t)k;
    left[i] = next - mine;
    for (int64_t k = 0; more && k < more[i]; k++) *next++ = -1;
    int64_t now = next - mine;
    if (left[i] < t->l.r && !all->grows) ESP_GOTO(note_kept(a, t, keep + at));
    at += t->l.r;
    if (now == t->l.r && left[i] == now) continue;
    list[n++] = (esp_resize){t->l.a, 0, now, mine};
    list[n++] = (esp_resize){t->e, 0, now, mine};
    list[n++] = (esp_resize){t->l.b, 1, now, mine};
  }
  if (n > 0) ESP_GOTO(esp_adapter_resize(a, list, (int)n));
  for (int i = 0; more && i < all->n_sites; i++)
    if (more[i] > 0) ESP_GOTO(fill_new(a, i, left[i], e0));
out:
  esp_mem_free(list);
  esp_mem_free(from);
  esp_mem_free(left);
  return st;
}

/* ---- orthogonality ---- */

/* Identities for all matrices in one buffer, so that M = Q Q^T - I is a copy and a product. */
static esp_status make_eyes(esp_adapter *a) {
  esp_triplets *all = a->impl;
  esp_backend *be = a->params->be;
  int64_t n = 0, matrices = 2 * all->n_sites;
  if (all->built == a->revision + 1) return ESP_OK;
  for (int i = 0; i < all->n_sites; i++) n += 2 * site_of(a, i)->l.r * site_of(a, i)->l.r;
  if (esp_backend_counts(be)) n += 2 * all->spare * (all->spare + 2 * all->ranks / (all->n_sites + 1));
  int64_t had = all->cap_grams;
  ESP_TRY(room(a, &all->grams, &all->cap_grams, n + 1));
  if (all->cap_grams != had || !all->eyes) {
    if (all->eyes) be->ops->free(be, all->eyes);
    all->eyes = be->ops->alloc(be, ESP_MEM_WORKSPACE, all->cap_grams * (int64_t)sizeof(float));
  }
  if (!all->norms) all->norms = be->ops->alloc(be, ESP_MEM_WORKSPACE, (matrices + 1) * (int64_t)sizeof(float));
  float *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n + 1) * sizeof *host), *at = host;
  if (!all->eyes || !all->norms || !host) {
    esp_mem_free(host);
    return esp_backend_why_null(be);
  }
  for (int i = 0; i < all->n_sites; i++) {
    int64_t r = site_of(a, i)->l.r;
    for (int which = 0; which < 2; which++, at += r * r)
      for (int64_t k = 0; k < r; k++) at[k * r + k] = 1.0f;
  }
  be->ops->upload(be, all->eyes, host, n * (int64_t)sizeof *host);
  esp_mem_free(host);
  all->built = a->revision + 1;
  return esp_backend_sync(be);
}

/* d ||M||_F = 2 M Q / ||M||_F for M = Q Q^T - I, and 2 P M / ||M||_F for M = P^T P - I. The norms of all matrices come
 * to the host together, once in a step. */
static esp_status orthogonal(esp_adapter *a, double weight, double *value) {
  esp_triplets *all = a->impl;
  const esp_params *ps = a->params;
  esp_backend *be = ps->be;
  int n = 2 * all->n_sites, live = 0;
  int64_t at = 0;
  ESP_TRY(make_eyes(a));
  float *f = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n + 1) * sizeof *f);
  if (!f) return ESP_ERR_MEMORY;
  for (int i = 0; i < all->n_sites; i++) at += 2 * site_of(a, i)->l.r * site_of(a, i)->l.r;
  if (at)
    be->ops->axpby(be, esp_tensor_1d(all->grams, ESP_F32, at), -1.0f, esp_tensor_1d(all->eyes, ESP_F32, at), 0.0f);
  at = 0;
  for (int i = 0; i < n; i++) {
    const esp_triplet_site *t = site_of(a, i / 2);
    int64_t r = t->l.r;
    if (r == 0) continue;
    live++;
    esp_tensor m = esp_tensor_2d(all->grams + at, ESP_F32, r, r), w = esp_param_master(ps, i % 2 ? t->l.b : t->l.a);
    be->ops->matmul(be, m, w, i % 2 == 1, w, i % 2 == 0, 1.0f, 1.0f);
    esp_tensor flat = esp_tensor_2d(all->grams + at, ESP_F32, 1, r * r);
    be->ops->row_dot(be, all->norms + i, flat, flat, 0.0f);
    at += r * r;
  }
  be->ops->download(be, f, all->norms, n * (int64_t)sizeof *f);
  esp_status st = esp_backend_sync(be);
  at = 0;
  for (int i = 0; st == ESP_OK && i < n; i++) {
    const esp_triplet_site *t = site_of(a, i / 2);
    int64_t r = t->l.r;
    if (r == 0) continue;
    double norm = sqrt((double)f[i]);
    esp_tensor m = esp_tensor_2d(all->grams + at, ESP_F32, r, r);
    int p = i % 2 ? t->l.b : t->l.a;
    float alpha = norm > 0 ? (float)(2 * weight / (live * norm)) : 0.0f;
    if (i % 2)
      be->ops->matmul(be, esp_param_grad(ps, p), esp_param_master(ps, p), false, m, false, alpha, 1.0f);
    else
      be->ops->matmul(be, esp_param_grad(ps, p), m, false, esp_param_master(ps, p), false, alpha, 1.0f);
    *value += weight * norm / live;
    at += r * r;
  }
  esp_mem_free(f);
  return st;
}

double esp_triplets_orthogonal(esp_adapter *a, double weight) {
  double value = 0;
  if (!(weight > 0)) return 0;
  esp_status st = orthogonal(a, weight, &value);
  if (st != ESP_OK && a->params->be->sticky == ESP_OK) a->params->be->sticky = st;
  return value;
}

/* ---- start, checkpoint ---- */

void esp_triplets_no_decay(esp_adapter *a) {
  const esp_triplets *all = a->impl;
  for (int i = 0; i < all->n_sites; i++) a->params->list[site_of(a, i)->e].decay = false;
}

/* q, p ~ N(0, 0.02^2), e = 0: the identity. */
esp_status esp_triplets_init_normal(esp_adapter *a, esp_site *s) {
  esp_triplet_site *t = a->site_state[s->index];
  const int list[2] = {t->l.a, t->l.b};
  for (int i = 0; i < 2; i++) {
    const esp_param *p = &a->params->list[list[i]];
    uint64_t stream = esp_rng_stream_name(ESP_RNG_INIT, p->name);
    int64_t r = t->l.r;
    float *x = esp_mem_alloc(ESP_MEM_HOST, (size_t)p->numel * sizeof *x);
    if (!x) return ESP_ERR_MEMORY;
    for (int64_t k = 0; k < p->numel; k++) {
      int64_t draw = i == 0 ? k : k % r * s->out + k / r; /* by rank, as for ranks that come later */
      x[k] = SPREAD * esp_rng_normal(a->cfg.seed, stream, (uint64_t)draw);
    }
    esp_params_set(a->params, list[i], x);
    esp_mem_free(x);
  }
  t->serial = t->l.r;
  return ESP_OK;
}

void esp_triplets_state_write(const esp_adapter *a, json_t *j) {
  const esp_triplets *all = a->impl;
  json_t *sites = json_array();
  for (int i = 0; i < all->n_sites; i++) {
    const esp_triplet_site *t = site_of(a, i);
    json_t *keep = t->keep ? json_array() : json_null();
    for (int64_t k = 0; t->keep && k < t->start; k++) json_array_append_new(keep, json_boolean(t->keep[k]));
    json_array_append_new(sites, json_pack("{s:I,s:o}", "serial", (json_int_t)t->serial, "keep", keep));
  }
  json_object_set_new(j, "sites", sites);
  json_object_set_new(j, "total", json_integer((json_int_t)all->total));
  json_object_set_new(j, "done", json_boolean(all->done));
  json_object_set_new(j, "ranks", json_integer((json_int_t)a->ranks));
  json_object_set_new(j, "budget", json_integer((json_int_t)a->budget));
}

esp_status esp_triplets_state_read(esp_adapter *a, const json_t *j, const char *path) {
  esp_triplets *all = a->impl;
  const json_t *sites = json_object_get(j, "sites");
  int done = 0;
  if ((int)json_array_size(sites) != all->n_sites)
    return esp_fail(ESP_ERR_DATA, "%s: has ranks of %d modules, this run has %d", path, (int)json_array_size(sites),
                    all->n_sites);
  ESP_TRY(esp_json_i64(j, "total", path, 1, &all->total));
  ESP_TRY(esp_json_bool(j, "done", path, 1, &done));
  ESP_TRY(esp_json_i64(j, "ranks", path, 1, &a->ranks));
  ESP_TRY(esp_json_i64(j, "budget", path, 1, &a->budget));
  all->done = done != 0;
  for (int i = 0; i < all->n_sites; i++) {
    esp_triplet_site *t = site_of(a, i);
    const json_t *one = json_array_get(sites, (size_t)i), *keep = json_object_get(one, "keep");
    ESP_TRY(esp_json_i64(one, "serial", path, 1, &t->serial));
    if (!json_is_array(keep)) continue;
    if ((int64_t)json_array_size(keep) != t->start)
      return esp_fail(ESP_ERR_DATA, "%s: %s started with other ranks", path, all->sites[i]->path);
    if (!t->keep && !(t->keep = esp_arena_alloc(a->arena, (size_t)t->start + 1))) return ESP_ERR_MEMORY;
    for (int64_t k = 0; k < t->start; k++) t->keep[k] = json_is_true(json_array_get(keep, (size_t)k));
  }
  return ESP_OK;
}
