/* increlora.c: IncreLoRA (Zhang et al. 2023, arXiv:2308.12043): the opposite of AdaLoRA. Every module starts with r
 * ranks of y += c P diag(e) Q x, and the most important modules get more until there are target_r per module on
 * average; no module is capped by its start. Ranks grow evenly over the steps between tinit and the last tfinal.
 *
 * Importance of a module: the paper takes sum |dW * G| / sqrt(out in), G the gradient of dW, which is [out, in]. Here
 * it is summed over the ranks: rank i of dW and G have the inner product <e_i p_i q_i^T, G> = e_i dL/de_i exactly, so
 * sum_i |e_i dL/de_i| needs no matrix. (The square root is left out: a sum of n terms of changing sign is that much
 * smaller than the sum of their sizes.) It is smoothed as in AdaLoRA: sensitivity times uncertainty of each e_i.
 *
 * Advance learning: one more rank per module is trained ahead of its turn, with e fixed at 1e-5, so that p and q point
 * somewhere when its e is let go. Those whose turn never comes are taken out at the end. c = alpha / (target_r + 1e-5):
 * the scale of the full budget from the start. */
#include <string.h>

#include "adapters/triplets.h"
#include "io/json.h"

static const float AHEAD = 1e-5f; /* e of the rank that is trained ahead */

typedef struct increlora {
  esp_triplets all; /* first: what the operator reads */
  bool ahead;       /* the last rank of every module is the one that is trained ahead */
  int64_t first;    /* ranks at the start */
} increlora;

static esp_status open(esp_adapter *a) {
  ESP_TRY(esp_triplets_open(a));
  increlora *x = esp_arena_alloc(a->arena, sizeof *x);
  if (!x) return ESP_ERR_MEMORY;
  x->all = *(esp_triplets *)a->impl;
  x->all.grows = true;
  x->all.extra = 1;
  a->impl = x;
  return ESP_OK;
}

static esp_status check(const esp_adapter_cfg *c) {
  if (c->target_r < c->r)
    return esp_fail(ESP_ERR_RECIPE, "adapter.target_r: %lld is below the starting rank, adapter.r %lld",
                    (long long)c->target_r, (long long)c->r);
  return esp_triplets_check(c);
}

static double before_step(esp_adapter *a, int64_t step, int64_t total) {
  const increlora *x = a->impl;
  const esp_params *ps = a->params;
  esp_triplets_no_decay(a);
  for (int i = 0; x->ahead && i < x->all.n_sites; i++) {
    const esp_triplet_site *t = a->site_state[x->all.sites[i]->index];
    ps->be->ops->zero(ps->be, ps->grad + ps->list[t->e].offset + t->l.r - 1, (int64_t)sizeof(float));
  }
  return esp_triplets_orthogonal(a, a->cfg.orth_weight);
}

/* Importance of every module from the statistics of e alone. */
static esp_status modules(esp_adapter *a, double *out) {
  const increlora *x = a->impl;
  esp_backend *be = a->params->be;
  int64_t n = 0;
  for (int i = 0; i < x->all.n_sites; i++) {
    const esp_triplet_site *t = a->site_state[x->all.sites[i]->index];
    if (t->l.r > n) n = t->l.r;
  }
  float *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * n + 1) * sizeof *host);
  if (!host) return ESP_ERR_MEMORY;
  for (int i = 0; i < x->all.n_sites; i++) {
    const esp_triplet_site *t = a->site_state[x->all.sites[i]->index];
    int64_t bytes = t->l.r * (int64_t)sizeof *host, offset = a->params->list[t->e].offset;
    be->ops->download(be, host, a->state[0] + offset, bytes);
    be->ops->download(be, host + n, a->state[1] + offset, bytes);
    out[i] = 0;
    for (int64_t k = 0; k < t->l.r; k++) out[i] += (double)host[k] * host[n + k];
  }
  esp_mem_free(host);
  return esp_backend_sync(be);
}

/* `need` ranks, one by one, to the modules in order of importance; the order is gone through again when it ends. */
static void hand_out(double *score, int n, int64_t need, int64_t *more) {
  for (int64_t round = 0; need > 0; round++)
    for (int taken = 0; taken < n && need > 0; taken++, need--) {
      int best = -1;
      for (int i = 0; i < n; i++)
        if (more[i] == round && (best < 0 || score[i] > score[best])) best = i;
      more[best]++;
    }
}

/* e of the ranks that are let go leaves 1e-5 by training; new ones come behind them. last: none is trained ahead any
 * more, and those that still are leave. */
static esp_status grow(esp_adapter *a, int64_t need, bool last) {
  increlora *x = a->impl;
  int n = x->all.n_sites;
  esp_status st = ESP_OK;
  double *score = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n + 1) * sizeof *score);
  int64_t *more = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n + 1) * sizeof *more);
  uint8_t *keep = esp_mem_alloc(ESP_MEM_HOST, (size_t)x->all.ranks + 1);
  if (!score || !more || !keep) ESP_GOTO(ESP_ERR_MEMORY);
  memset(keep, 1, (size_t)x->all.ranks);
  ESP_GOTO(modules(a, score));
  hand_out(score, n, need, more);
  int64_t at = 0;
  for (int i = 0; i < n; i++) {
    const esp_triplet_site *t = a->site_state[x->all.sites[i]->index];
    at += t->l.r;
    if (!last) continue; /* as many come behind as are let go */
    if (more[i] == 0)
      keep[at - 1] = 0;
    else
      more[i]--;
  }
  ESP_GOTO(esp_triplets_move(a, keep, more, AHEAD));
  if (last) x->ahead = false;
out:
  esp_mem_free(score);
  esp_mem_free(more);
  esp_mem_free(keep);
  return st;
}

static esp_status begin_ahead(esp_adapter *a) {
  increlora *x = a->impl;
  int n = x->all.n_sites;
  x->first = x->all.ranks;
  int64_t *more = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n + 1) * sizeof *more);
  uint8_t *keep = esp_mem_alloc(ESP_MEM_HOST, (size_t)x->all.ranks + 1);
  esp_status st = more && keep ? ESP_OK : ESP_ERR_MEMORY;
  if (st == ESP_OK) {
    memset(keep, 1, (size_t)x->all.ranks);
    for (int i = 0; i < n; i++) more[i] = 1;
    st = esp_triplets_move(a, keep, more, AHEAD);
    x->ahead = st == ESP_OK;
  }
  esp_mem_free(more);
  esp_mem_free(keep);
  return st;
}

static esp_status after_step(esp_adapter *a, int64_t step, int64_t total) {
  increlora *x = a->impl;
  int64_t begin, end, target = a->cfg.target_r * x->all.n_sites;
  ESP_TRY(esp_triplets_span(a, total, &begin, &end));
  int64_t now = x->all.ranks - (x->ahead ? x->all.n_sites : 0);
  if (!x->all.done && now >= target && !x->ahead) x->all.done = true;
  if (!x->all.done) {
    esp_triplets_sense(a);
    if (!x->ahead) ESP_TRY(begin_ahead(a));
    bool last = step >= end;
    int64_t want = now;
    if (step > begin && (last || (step - begin) % a->cfg.interval == 0))
      want = last ? target : x->first + (target - x->first) * (step - begin) / (end - begin);
    if (want > now || last) ESP_TRY(grow(a, want - now, last));
    x->all.done = last;
  }
  a->ranks = x->all.ranks - (x->ahead ? x->all.n_sites : 0);
  a->budget = target;
  return ESP_OK;
}

static void state_write(const esp_adapter *a, json_t *j) {
  const increlora *x = a->impl;
  esp_triplets_state_write(a, j);
  json_object_set_new(j, "ahead", json_boolean(x->ahead));
  json_object_set_new(j, "first", json_integer((json_int_t)x->first));
}

static esp_status state_read(esp_adapter *a, const json_t *j, const char *path) {
  increlora *x = a->impl;
  int ahead = 0;
  ESP_TRY(esp_triplets_state_read(a, j, path));
  ESP_TRY(esp_json_bool(j, "ahead", path, 1, &ahead));
  x->ahead = ahead != 0;
  return esp_json_i64(j, "first", path, 1, &x->first);
}

static void config_write(const esp_adapter *a, json_t *j) {
  esp_triplets_config_write(a, j);
  json_object_set_new(j, "target_r", json_integer((json_int_t)a->cfg.target_r));
  json_object_set_new(j, "rank_pattern", esp_triplets_ranks_write(a));
}

static esp_status config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  ESP_TRY(esp_triplets_config_read(j, path, c));
  return esp_json_read_patterns(j, "rank_pattern", path, arena, &c->rank_pattern, &c->n_rank_pattern);
}

const esp_adapter_kind esp_kind_increlora = {
    .name = "increlora",
    .peft_type = "INCRELORA",
    .summary = "y = W x + c P diag(e) Q x, ranks are added where they matter (Zhang et al. 2023, arXiv:2308.12043)",
    ESP_TRIPLETS,
    .state_write = state_write,
    .state_read = state_read,
    .open = open,
    .init = esp_triplets_init_normal,
    .before_step = before_step,
    .after_step = after_step,
    ESP_TRIPLETS_STATISTICS,
    .config_write = config_write,
    .config_read = config_read,
    .config_check = check,
};
