/* s2ft.c: structured sparse fine-tuning, select sparsely and compute densely (S2FT, Yang et al. 2024,
 * arXiv:2412.06289): in each block a few attention heads and a few channels of the MLP are chosen, and the slab of each
 * targeted matrix that belongs to them is trained, densely:
 *   q, k, v: the rows of the chosen heads (of the key/value heads that those read);   gate, up: the chosen rows
 *   o: the columns of the chosen heads;   down: the chosen columns
 * The paper permutes the coupled matrices of a block so that what is chosen lies together. Heads and channels have no
 * order of their own, so a run of neighbours is as good a random choice as any subset and needs no permutation: a
 * block's runs begin at places drawn from (seed, block). The slab is the change of the weight and starts at zero.
 *
 * The step. Columns: y += x_sel S^T is a tail of the base product on a column view of x. Rows: y_sel += x S^T is a
 * product into a column view of y. Backward needs the chosen part only (partial back-propagation): dS += dy^T x_sel or
 * dy_sel^T x, and for dx the product dy S into the columns of x, or a tail (dy_sel, S). */
#include <stdio.h>
#include <string.h>

#include "adapters/internal.h"
#include "core/rng.h"
#include "io/json.h"

typedef struct piece { /* rows r0.. of the slab stand for rows y0.. of the module */
  int64_t y0, n, r0;
} piece;

typedef struct s2ft_site {
  int64_t r; /* rows or columns of the slab */
  bool columns;
  int64_t x0; /* columns: the first */
  int n_pieces;
  piece pieces[3]; /* rows: three where q, k and v are one module */
  int param;
  esp_tensor dx; /* columns: what backward adds to that part of dx */
  bool late_fwd, late_bwd;
} s2ft_site;

typedef struct s2ft_group {
  int n;
  esp_site *sites[3];
  esp_tensor dy; /* of the pass in progress, where tails found no room */
} s2ft_group;

/* The place of a group in its block: 0 q|k|v, 1 o, 2 gate|up, 3 down; 4: outside the blocks. */
static int role_of(const esp_adapter *a, const esp_group *g) {
  esp_group **groups;
  int n = esp_model_groups(a->model, &groups), at = 0;
  if (g->layer < 0) return 4;
  for (int i = 0; i < n && groups[i] != g; i++) at += groups[i]->layer == g->layer;
  return at;
}

/* Runs of channels begin at multiples of this, so that views of 16-bit rows stay aligned. */
enum { ALIGN = 16 };

static int64_t draw(const esp_adapter *a, int layer, int which, int64_t places) {
  uint64_t stream = esp_rng_stream(ESP_RNG_INIT, (uint64_t)layer, (uint64_t)which, 0x53324654u);
  return (int64_t)(((uint64_t)esp_rng_u32(a->cfg.seed, stream, 0) * (uint64_t)places) >> 32);
}

static void add_piece(s2ft_site *ss, int64_t y0, int64_t n) {
  ss->pieces[ss->n_pieces++] = (piece){y0, n, ss->r};
  ss->r += n;
}

static void choose_heads(const esp_adapter *a, const esp_group *g, const esp_site *s, int role, s2ft_site *ss) {
  const esp_model_desc *d = esp_model_describe(a->model);
  int64_t n = a->cfg.s2ft_heads, h0 = draw(a, g->layer, 0, d->heads - n + 1), size = d->head_dim;
  int64_t share = d->heads / d->kv_heads, k0 = h0 / share, k1 = (h0 + n - 1) / share + 1;
  int64_t q = d->heads * size, kv = d->kv_heads * size;
  if (role == 1) {
    ss->columns = true;
    ss->x0 = h0 * size;
    ss->r = n * size;
  } else if (g->n_sites == 1) {
    add_piece(ss, h0 * size, n * size);
    add_piece(ss, q + k0 * size, (k1 - k0) * size);
    add_piece(ss, q + kv + k0 * size, (k1 - k0) * size);
  } else if (s == g->sites[0]) {
    add_piece(ss, h0 * size, n * size);
  } else {
    add_piece(ss, k0 * size, (k1 - k0) * size);
  }
}

static void choose_channels(const esp_adapter *a, const esp_group *g, int role, s2ft_site *ss) {
  int64_t n = a->cfg.s2ft_channels, places = (esp_model_describe(a->model)->ffn - n) / ALIGN + 1;
  int64_t at = draw(a, g->layer, 1, places) * ALIGN;
  if (role == 3) {
    ss->columns = true;
    ss->x0 = at;
    ss->r = n;
  } else {
    add_piece(ss, at, n);
  }
}

static esp_status s2ft_check(const esp_adapter_cfg *c) {
  if (c->dropout > 0) return esp_fail(ESP_ERR_RECIPE, "adapter.dropout: s2ft has none");
  if (strcmp(c->init, "default"))
    return esp_fail(ESP_ERR_RECIPE, "adapter.init: '%s' is not for s2ft, whose slabs start at zero", c->init);
  return ESP_OK;
}

static esp_status s2ft_open(esp_adapter *a) {
  const esp_model_desc *d = esp_model_describe(a->model);
  const esp_adapter_cfg *c = &a->cfg;
  if (c->s2ft_heads < 1 || c->s2ft_heads > d->heads)
    return esp_fail(ESP_ERR_RECIPE, "adapter.s2ft_heads: must be in 1 to %d, the heads of the base, is %lld", d->heads,
                    (long long)c->s2ft_heads);
  if (c->s2ft_channels < 1 || c->s2ft_channels > d->ffn)
    return esp_fail(ESP_ERR_RECIPE, "adapter.s2ft_channels: must be in 1 to %lld, the channels of the base, is %lld",
                    (long long)d->ffn, (long long)c->s2ft_channels);
  return ESP_OK;
}

static esp_status s2ft_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  s2ft_group *sg = esp_arena_alloc(a->arena, sizeof *sg);
  if (!sg) return ESP_ERR_MEMORY;
  int role = role_of(a, g);
  for (int i = 0; i < g->n_sites; i++) {
    if (!hit[i]) continue;
    esp_site *s = g->sites[i];
    if (role > 3) return esp_fail(ESP_ERR_RECIPE, "adapter.target: %s has neither heads nor channels", s->path);
    s2ft_site *ss = esp_arena_alloc(a->arena, sizeof *ss);
    if (!ss) return ESP_ERR_MEMORY;
    if (role < 2)
      choose_heads(a, g, s, role, ss);
    else
      choose_channels(a, g, role, ss);
    char name[512];
    snprintf(name, sizeof name, ESP_PEFT_PREFIX "%s.s2ft_slab.weight", s->path);
    ss->param = esp_params_add(a->params, name, 2,
                               (int64_t[]){ss->columns ? s->out : ss->r, ss->columns ? ss->r : s->in}, true);
    if (ss->param < 0) return ESP_ERR_MEMORY;
    a->site_state[s->index] = ss;
    sg->sites[sg->n++] = s;
  }
  a->group_state[g->index] = sg;
  return ESP_OK;
}

/* x times the adapter's weight; x itself where that is 1. */
static esp_tensor weighted(const esp_adapter *a, esp_run *run, esp_tensor x) {
  if (a->weight == 1.0) return x;
  esp_tensor y = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), esp_tensor_cols(&x));
  run->be->ops->axpby(run->be, y, (float)a->weight, x, 0.0f);
  return y;
}

static int s2ft_tails(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max, void **slot) {
  s2ft_group *sg = a->group_state[g->index];
  int n = 0;
  for (int i = 0; sg && i < sg->n; i++) {
    s2ft_site *ss = a->site_state[sg->sites[i]->index];
    if (!ss->columns) continue;
    ss->late_fwd = n >= max;
    if (ss->late_fwd) continue;
    tails[n++] = (esp_tail){sg->sites[i]->col0, weighted(a, run, esp_tensor_cols_view(&x, ss->x0, ss->r)),
                            esp_param_shadow(a->params, ss->param)};
  }
  return n;
}

static void s2ft_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  s2ft_group *sg = a->group_state[g->index];
  for (int i = 0; sg && i < sg->n; i++) {
    const s2ft_site *ss = a->site_state[sg->sites[i]->index];
    esp_tensor slab = esp_param_shadow(a->params, ss->param);
    if (ss->columns && ss->late_fwd)
      run->be->ops->matmul(run->be, esp_tensor_cols_view(&y, sg->sites[i]->col0, sg->sites[i]->out),
                           esp_tensor_cols_view(&x, ss->x0, ss->r), false, slab, true, (float)a->weight, 1.0f);
    for (int k = 0; k < ss->n_pieces; k++) {
      const piece *p = &ss->pieces[k];
      run->be->ops->matmul(run->be, esp_tensor_cols_view(&y, sg->sites[i]->col0 + p->y0, p->n), x, false,
                           esp_tensor_rows_view(&slab, p->r0, p->n), true, (float)a->weight, 1.0f);
    }
  }
}

static int s2ft_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails,
                          int max, void **slot) {
  s2ft_group *sg = a->group_state[g->index];
  const esp_backend_ops *ops = run->be->ops;
  float scale = (float)a->weight;
  int n = 0;
  if (sg) sg->dy = dy;
  for (int i = 0; sg && i < sg->n; i++) {
    const esp_site *s = sg->sites[i];
    s2ft_site *ss = a->site_state[s->index];
    esp_tensor slab = esp_param_shadow(a->params, ss->param), dyi = esp_tensor_cols_view(&dy, s->col0, s->out);
    esp_tensor grad = a->trainable ? esp_param_grad(a->params, ss->param) : (esp_tensor){0};
    if (ss->columns) {
      if (a->trainable)
        ops->matmul(run->be, grad, dyi, true, esp_tensor_cols_view(&x, ss->x0, ss->r), false, scale, 1.0f);
      ss->dx = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), ss->r);
      ops->matmul(run->be, ss->dx, dyi, false, slab, false, scale, 0.0f);
      continue;
    }
    ss->late_bwd = n + ss->n_pieces > max;
    for (int k = 0; k < ss->n_pieces; k++) {
      const piece *p = &ss->pieces[k];
      esp_tensor dyp = esp_tensor_cols_view(&dyi, p->y0, p->n);
      if (a->trainable)
        ops->matmul(run->be, esp_tensor_rows_view(&grad, p->r0, p->n), dyp, true, x, false, scale, 1.0f);
      if (!ss->late_bwd) tails[n++] = (esp_tail){0, weighted(a, run, dyp), esp_tensor_rows_view(&slab, p->r0, p->n)};
    }
  }
  return n;
}

static void s2ft_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  s2ft_group *sg = a->group_state[g->index];
  for (int i = 0; sg && dx.data && i < sg->n; i++) {
    const s2ft_site *ss = a->site_state[sg->sites[i]->index];
    if (ss->columns) run->be->ops->axpby(run->be, esp_tensor_cols_view(&dx, ss->x0, ss->r), 1.0f, ss->dx, 1.0f);
    esp_tensor slab = esp_param_shadow(a->params, ss->param);
    for (int k = 0; ss->late_bwd && k < ss->n_pieces; k++) {
      const piece *p = &ss->pieces[k];
      run->be->ops->matmul(run->be, dx, esp_tensor_cols_view(&sg->dy, sg->sites[i]->col0 + p->y0, p->n), false,
                           esp_tensor_rows_view(&slab, p->r0, p->n), false, (float)a->weight, 1.0f);
    }
  }
}

/* Rows are added in `output`; the columns of o and down only where tails found no room. */
static bool s2ft_wants_output(const esp_adapter *a) {
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites);
  for (int i = 0; i < n; i++)
    if (a->targeted[i] && !((const s2ft_site *)a->site_state[i])->columns) return true;
  return false;
}

static esp_status s2ft_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  const s2ft_site *ss = a->site_state[s->index];
  float *slab = esp_param_host(a, ss->param), scale = (float)a->weight;
  if (!slab) return ESP_ERR_MEMORY;
  for (int64_t i = 0; ss->columns && i < n; i++)
    for (int64_t k = 0; k < ss->r; k++) w[i * s->in + ss->x0 + k] += scale * slab[(r0 + i) * ss->r + k];
  for (int p = 0; p < ss->n_pieces; p++)
    for (int64_t k = 0; k < ss->pieces[p].n; k++) {
      int64_t row = ss->pieces[p].y0 + k - r0;
      const float *from = slab + (ss->pieces[p].r0 + k) * s->in;
      for (int64_t c = 0; row >= 0 && row < n && c < s->in; c++) w[row * s->in + c] += scale * from[c];
    }
  esp_mem_free(slab);
  return ESP_OK;
}

/* The slab times a selection of rows or columns. */
static int64_t s2ft_low_rank(esp_adapter *a, esp_site *s, float *A, float *B) {
  const s2ft_site *ss = a->site_state[s->index];
  if (!A && !B) return ss->r;
  float *slab = esp_param_host(a, ss->param), scale = (float)a->weight;
  if (!slab) return -1;
  if (A) memset(A, 0, (size_t)(ss->r * s->in) * sizeof *A);
  if (B) memset(B, 0, (size_t)(s->out * ss->r) * sizeof *B);
  for (int64_t k = 0; ss->columns && A && k < ss->r; k++) A[k * s->in + ss->x0 + k] = 1.0f;
  for (int64_t i = 0; ss->columns && B && i < s->out * ss->r; i++) B[i] = scale * slab[i];
  for (int64_t i = 0; !ss->columns && A && i < ss->r * s->in; i++) A[i] = scale * slab[i];
  for (int p = 0; B && p < ss->n_pieces; p++)
    for (int64_t k = 0; k < ss->pieces[p].n; k++) B[(ss->pieces[p].y0 + k) * ss->r + ss->pieces[p].r0 + k] = 1.0f;
  esp_mem_free(slab);
  return ss->r;
}

static void s2ft_config_write(const esp_adapter *a, json_t *j) {
  json_object_set_new(j, "s2ft_heads", json_integer(a->cfg.s2ft_heads));
  json_object_set_new(j, "s2ft_channels", json_integer(a->cfg.s2ft_channels));
  json_object_set_new(j, "seed", json_integer((json_int_t)a->cfg.seed)); /* of the choice */
}

static esp_status s2ft_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  (void)arena;
  int64_t seed = 0;
  c->r = 1; /* has no meaning here */
  ESP_TRY(esp_json_i64(j, "s2ft_heads", path, 1, &c->s2ft_heads));
  ESP_TRY(esp_json_i64(j, "s2ft_channels", path, 1, &c->s2ft_channels));
  ESP_TRY(esp_json_i64(j, "seed", path, 1, &seed));
  c->seed = (uint64_t)seed;
  return ESP_OK;
}

const esp_adapter_kind esp_kind_s2ft = {
    .name = "s2ft",
    .peft_type = "S2FT",
    .summary = "dense slabs of a few heads and channels per block (S2FT, Yang et al. 2024, arXiv:2412.06289)",
    .site_kinds = 1u << ESP_SITE_LINEAR,
    .mergeable = true,
    .targets = true,
    .open = s2ft_open,
    .declare = s2ft_declare,
    .tails = s2ft_tails,
    .output = s2ft_output,
    .tails_bwd = s2ft_tails_bwd,
    .input_bwd = s2ft_input_bwd,
    .wants_output = s2ft_wants_output,
    .materialise = s2ft_materialise,
    .low_rank = s2ft_low_rank,
    .config_check = s2ft_check,
    .config_write = s2ft_config_write,
    .config_read = s2ft_config_read,
};
