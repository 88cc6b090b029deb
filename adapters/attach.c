/* attach.c: the model's hooks over the ordered list of active adapters. Forward runs them in order, backward in
 * reverse; linear changes add up, so several adapters are the weighted sum of each. Where each sequence of a batch
 * chooses its adapter, every hook here limits what the kind did to the rows that are its own (rows.h). Also the life
 * and the effective weights of an adapter: everything that is the same for every kind. */
#include <limits.h>
#include <string.h>

#include "adapters/internal.h"
#include "adapters/rows.h"
#include "core/rng.h"

/* A product takes at most ROOM tails. Above MANY active adapters they may not fit: a kind then adds the rest in
 * `output` and `input_bwd`. Token rows come first, because they have no other way. */
enum { MANY = 4, ROOM = 16 };

/* One per model with active adapters, found again through its hooks. Slots are per adapter: one forward and backward
 * is in flight at a time, and a recomputed block writes them anew. */
typedef struct active_set {
  esp_adapter_hooks hooks;
  int n;
  uint64_t number;                  /* of the installation */
  void **group_slots, **site_slots; /* [index * n + k] */
  esp_rows rows;
  esp_adapter *list[];
} active_set;

static void **gslot(active_set *c, const esp_group *g, int k) {
  return &c->group_slots[g->index * c->n + k];
}

static void **sslot(active_set *c, const esp_site *s, int k) {
  return &c->site_slots[s->index * c->n + k];
}

static bool touches(const esp_adapter *a, const esp_group *g) {
  for (int i = 0; i < g->n_sites; i++)
    if (a->targeted[g->sites[i]->index]) return true;
  return false;
}

static void on_input(void *ctx, esp_run *run, esp_group *g, esp_tensor *x, void **slot) {
  active_set *c = ctx;
  for (int k = 0; k < c->n; k++) {
    esp_adapter *a = c->list[k];
    esp_tensor before = *x;
    if (!a->kind->input) continue;
    a->kind->input(a, run, g, x, gslot(c, g, k));
    if (!c->rows.on || x->data == before.data) continue;
    esp_tensor mixed = esp_rows_copy(run, *x); /* the kind's own may be what its backward reads */
    esp_rows_join(&c->rows, run, k, mixed, before);
    *x = mixed;
  }
}

static int on_tails(void *ctx, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max, void **slot) {
  active_set *c = ctx;
  int n = 0;
  if (max > ROOM) max = ROOM;
  for (int k = 0; k < c->n; k++) n += esp_train_modules_tails(c->list[k], run, g, x, tails + n, max - n);
  for (int k = 0; k < c->n; k++) {
    esp_adapter *a = c->list[k];
    int first = n;
    if (a->kind->tails) n += a->kind->tails(a, run, g, x, tails + n, max - n, gslot(c, g, k));
    for (int i = first; c->rows.on && i < n; i++) tails[i].x = esp_rows_only(&c->rows, run, k, tails[i].x);
  }
  return n;
}

/* Where sequences choose, a kind has to do with its own rows only: nothing is added to the weight of all. */
static int on_added(void *ctx, esp_run *run, esp_group *g, esp_tensor x, const esp_wview *w, esp_added *list, int max) {
  active_set *c = ctx;
  int n = 0;
  for (int k = 0; k < c->n && !c->rows.on; k++)
    if (c->list[k]->kind->added) n += c->list[k]->kind->added(c->list[k], run, g, x, w, list + n, max - n);
  return n;
}

static void on_output(void *ctx, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  active_set *c = ctx;
  for (int k = 0; k < c->n; k++) {
    esp_adapter *a = c->list[k];
    bool mixed = c->rows.on && touches(a, g);
    if (!a->kind->output) continue;
    esp_tensor before = mixed ? esp_rows_copy(run, y) : y;
    a->kind->output(a, run, g, x, y, gslot(c, g, k));
    if (mixed) esp_rows_join(&c->rows, run, k, y, before);
  }
}

/* In backward a kind is given the gradient of its own rows: then its parameters get nothing from others. */
static void on_output_bwd(void *ctx, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, void **slot) {
  active_set *c = ctx;
  for (int k = c->n - 1; k >= 0; k--) {
    esp_adapter *a = c->list[k];
    bool mixed = c->rows.on && touches(a, g);
    if (!a->kind->output_bwd) continue;
    esp_tensor mine = mixed ? esp_rows_only(&c->rows, run, k, dy) : dy;
    a->kind->output_bwd(a, run, g, x, mine, gslot(c, g, k));
    if (mixed) esp_rows_put(&c->rows, run, k, dy, mine);
  }
}

static int on_tails_bwd(void *ctx, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tail *tails, int max,
                        void **slot) {
  active_set *c = ctx;
  int n = 0;
  if (max > ROOM) max = ROOM;
  for (int k = c->n - 1; k >= 0; k--) n += esp_train_modules_tails_bwd(c->list[k], run, g, x, dy, tails + n, max - n);
  for (int k = c->n - 1; k >= 0; k--) {
    esp_adapter *a = c->list[k];
    if (!a->kind->tails_bwd) continue;
    esp_tensor mine = c->rows.on && touches(a, g) ? esp_rows_only(&c->rows, run, k, dy) : dy;
    n += a->kind->tails_bwd(a, run, g, x, mine, tails + n, max - n, gslot(c, g, k));
  }
  return n;
}

static void on_input_bwd(void *ctx, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  active_set *c = ctx;
  for (int k = c->n - 1; k >= 0; k--) {
    esp_adapter *a = c->list[k];
    bool mixed = c->rows.on && dx.data && touches(a, g);
    if (!a->kind->input_bwd) continue;
    int64_t mark = esp_stack_mark(run->stack);
    esp_tensor mine = mixed ? esp_rows_only(&c->rows, run, k, dx) : dx;
    a->kind->input_bwd(a, run, g, mine, gslot(c, g, k));
    if (!mixed) continue;
    esp_rows_put(&c->rows, run, k, dx, mine);
    esp_stack_release(run->stack, mark);
  }
}

static esp_adapter *owner(const active_set *c, const esp_site *s) {
  for (int k = 0; k < c->n; k++)
    if (c->list[k]->kind->product != ESP_PRODUCT_BASE && c->list[k]->targeted[s->index]) return c->list[k];
  return NULL;
}

static void on_site_forward(void *ctx, esp_run *run, esp_site *s, const esp_wview *w, esp_tensor bias, esp_tensor x,
                            esp_tensor y) {
  esp_adapter *a = owner(ctx, s);
  a->kind->site_forward(a, run, s, w, bias, x, y);
}

static void on_site_backward(void *ctx, esp_run *run, esp_site *s, const esp_wview *w, esp_tensor x, esp_tensor dy,
                             esp_tensor dx, float beta) {
  esp_adapter *a = owner(ctx, s);
  a->kind->site_backward(a, run, s, w, x, dy, dx, beta);
}

static void on_embed(void *ctx, esp_run *run, esp_site *s, const int32_t *ids, esp_tensor y, void **slot) {
  active_set *c = ctx;
  for (int k = 0; k < c->n; k++) {
    esp_adapter *a = c->list[k];
    bool mixed = c->rows.on && a->targeted[s->index];
    esp_train_modules_embed(a, run, s, ids, y);
    if (!a->kind->embed) continue;
    esp_tensor before = mixed ? esp_rows_copy(run, y) : y;
    a->kind->embed(a, run, s, ids, y, sslot(c, s, k));
    if (mixed) esp_rows_join(&c->rows, run, k, y, before);
  }
}

static void on_embed_bwd(void *ctx, esp_run *run, esp_site *s, const int32_t *ids, esp_tensor dy, void **slot) {
  active_set *c = ctx;
  for (int k = c->n - 1; k >= 0; k--) {
    esp_adapter *a = c->list[k];
    bool mixed = c->rows.on && a->targeted[s->index];
    if (a->kind->embed_bwd)
      a->kind->embed_bwd(a, run, s, ids, mixed ? esp_rows_only(&c->rows, run, k, dy) : dy, sslot(c, s, k));
    esp_train_modules_embed_bwd(a, run, s, ids, dy);
  }
}

static int64_t on_virtual_tokens(void *ctx, int adapter) {
  const active_set *c = ctx;
  int64_t n = 0;
  for (int k = 0; k < c->n; k++)
    if (c->list[k]->kind->virtual_tokens && (adapter == ESP_EVERY_ADAPTER || adapter == k))
      n += c->list[k]->kind->virtual_tokens(c->list[k]);
  return n;
}

static void on_kv(void *ctx, esp_run *run, int layer, esp_tensor k, esp_tensor v) {
  active_set *c = ctx;
  for (int i = 0; i < c->n; i++)
    if (c->list[i]->kind->kv) c->list[i]->kind->kv(c->list[i], run, layer, k, v);
}

static void on_kv_bwd(void *ctx, esp_run *run, int layer, esp_tensor dk, esp_tensor dv) {
  active_set *c = ctx;
  for (int i = 0; i < c->n; i++)
    if (c->list[i]->kind->kv_bwd) c->list[i]->kind->kv_bwd(c->list[i], run, layer, dk, dv);
}

static esp_status on_begin(void *ctx, esp_run *run) {
  active_set *c = ctx;
  for (int k = 0; k < c->n; k++)
    if (c->list[k]->kind->pass) ESP_TRY(c->list[k]->kind->pass(c->list[k]));
  return esp_rows_begin(&c->rows, run, c->list, c->n);
}

/* A counter of installations tells sets apart whose addresses are reused; what kinds bake into operations beside
 * shapes and addresses is the weight of each adapter and its revision. */
static uint64_t on_version(void *ctx) {
  const active_set *c = ctx;
  uint64_t v = c->rows.on ? esp_rng_stream(1, c->number, (uint64_t)(uintptr_t)c->rows.mask, 0) : c->number;
  for (int k = 0; k < c->n; k++) {
    const esp_adapter *a = c->list[k];
    if (a->kind->on_host || a->modules->tokens >= 0) return 0;
    uint64_t bits;
    memcpy(&bits, &a->weight, sizeof bits);
    v = esp_rng_stream(0, v, bits, a->revision * 2 + a->trainable);
  }
  return v ? v : 1;
}

static void on_stepped(void *ctx) {
  active_set *c = ctx;
  for (int k = 0; k < c->n; k++) c->list[k]->backwards += c->list[k]->trainable;
}

static active_set *current(esp_model *m) {
  const esp_adapter_hooks *h = esp_model_hooks(m);
  return h && h->tails == on_tails ? h->ctx : NULL;
}

static void drop(active_set *c) {
  if (!c) return;
  esp_rows_leave(&c->rows);
  esp_mem_free(c->group_slots);
  esp_mem_free(c->site_slots);
  esp_mem_free(c);
}

static int on_lowest_layer(void *ctx) {
  const active_set *c = ctx;
  int low = INT_MAX;
  for (int k = 0; k < c->n; k++) {
    const esp_adapter *a = c->list[k];
    esp_site **sites;
    int n = esp_model_sites(a->model, &sites), layers = esp_model_describe(a->model)->layers;
    if (!a->trainable) continue;
    if (a->modules->tokens >= 0) return -1;
    if (a->kind->kv_bwd) low = 0;
    for (int i = 0; i < n; i++) {
      if (!a->targeted[i]) continue;
      int at = sites[i]->kind == ESP_SITE_EMBED ? -1 : sites[i]->layer < 0 ? layers : sites[i]->layer;
      /* the gradient of the lowest site's input is that of what lies below */
      at -= at >= 0 && a->kind->needs_dx && a->kind->needs_dx(a, sites[i]);
      if (at < low) low = at;
    }
  }
  return low;
}

/* Only the hooks that some active adapter needs: the model saves work where one is absent. */
static esp_adapter_hooks hooks_of(active_set *c) {
  esp_adapter_hooks h = {.ctx = c,
                         .tails = on_tails,
                         .tails_bwd = on_tails_bwd,
                         .site_forward = on_site_forward,
                         .site_backward = on_site_backward,
                         .embed = on_embed,
                         .embed_bwd = on_embed_bwd,
                         .lowest_layer = on_lowest_layer,
                         .version = on_version,
                         .begin = on_begin,
                         .stepped = on_stepped};
  for (int k = 0; k < c->n; k++) {
    const esp_adapter_kind *kind = c->list[k]->kind;
    if (kind->input) h.input = on_input;
    if (kind->added) h.added = on_added;
    if (kind->output && (c->n > MANY || !kind->wants_output || kind->wants_output(c->list[k]))) h.output = on_output;
    if (kind->output_bwd) h.output_bwd = on_output_bwd;
    if (kind->input_bwd) h.input_bwd = on_input_bwd;
    if (kind->virtual_tokens) h.virtual_tokens = on_virtual_tokens;
    if (kind->kv) h.kv = on_kv;
    if (kind->kv_bwd) h.kv_bwd = on_kv_bwd;
  }
  return h;
}

static esp_status install(esp_model *m, esp_adapter **list, int n) {
  active_set *old = current(m), *c = NULL;
  if (n > 0) {
    esp_group **groups;
    esp_site **sites;
    int n_groups = esp_model_groups(m, &groups), n_sites = esp_model_sites(m, &sites);
    c = esp_mem_alloc(ESP_MEM_HOST, sizeof *c + (size_t)n * sizeof *list);
    if (!c) return ESP_ERR_MEMORY;
    static _Atomic uint64_t installations;
    c->n = n;
    c->number = ++installations;
    c->group_slots = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n_groups * n + 1) * sizeof(void *));
    c->site_slots = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n_sites * n + 1) * sizeof(void *));
    if (!c->group_slots || !c->site_slots) {
      drop(c);
      return ESP_ERR_MEMORY;
    }
    memcpy(c->list, list, (size_t)n * sizeof *list);
    c->hooks = hooks_of(c);
  }
  esp_model_set_hooks(m, c ? &c->hooks : NULL);
  drop(old);
  return ESP_OK;
}

/* Modules that are trained in full are computed from the stores of the active adapters, and from the base where none of
 * them has a copy. */
static esp_status attach_modules(esp_model *m, esp_adapter **list, int n) {
  esp_site **sites;
  int n_sites = esp_model_sites(m, &sites);
  for (int i = 0; i < n_sites; i++) {
    esp_site *s = sites[i];
    s->trained = NULL;
    s->trained_weight = s->trained_bias = -1;
    s->product = ESP_PRODUCT_BASE;
    for (int k = 0; k < n; k++)
      if (list[k]->targeted[i] && list[k]->kind->product != ESP_PRODUCT_BASE) s->product = list[k]->kind->product;
    for (int k = 0; k < n; k++) {
      const esp_train_modules *t = list[k]->modules;
      if (t->weight[i] >= 0 && s->product != ESP_PRODUCT_BASE)
        return esp_fail(ESP_ERR_RECIPE, "%s is trained in full by '%s' and adapted by another active adapter", s->path,
                        list[k]->name);
      if (t->weight[i] < 0 && t->bias[i] < 0) continue;
      if (s->trained)
        return esp_fail(ESP_ERR_RECIPE, "%s is trained in full by two active adapters ('%s' and another)", s->path,
                        list[k]->name);
      s->trained = list[k]->params;
      s->trained_weight = t->weight[i];
      s->trained_bias = t->bias[i];
    }
  }
  return ESP_OK;
}

/* A change that multiplies the weight depends on what else is there: sums are for kinds that add. */
static esp_status check_alone(const esp_adapter *a, const esp_adapter *b) {
  if (!a->kind->alone && !b->kind->alone) return ESP_OK;
  if (a->kind->alone && b->kind->alone && (a->kind->virtual_tokens || b->kind->virtual_tokens))
    return esp_fail(ESP_ERR_RECIPE, "adapters '%s' (%s) and '%s' (%s) cannot both be active", a->name, a->kind->name,
                    b->name, b->kind->name);
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites);
  for (int i = 0; i < n; i++)
    if (esp_adapter_changes(a, sites[i]) && esp_adapter_changes(b, sites[i]))
      return esp_fail(ESP_ERR_RECIPE, "adapters '%s' (%s) and '%s' (%s) cannot both be active on %s", a->name,
                      a->kind->name, b->name, b->kind->name, sites[i]->path);
  return ESP_OK;
}

esp_status esp_adapters_check(esp_model *m, esp_adapter *const *list, int n) {
  for (int i = 0; i < n; i++) {
    if (list[i]->model != m) return esp_fail(ESP_ERR_INTERNAL, "adapter '%s' belongs to another model", list[i]->name);
    for (int k = 0; k < i; k++)
      if (list[k] == list[i]) return esp_fail(ESP_ERR_RECIPE, "adapter '%s' is named twice", list[i]->name);
    for (int k = 0; k < i; k++) ESP_TRY(check_alone(list[k], list[i]));
    if (list[i]->kind->alone && list[i]->weight != 1.0)
      return esp_fail(ESP_ERR_RECIPE, "adapter '%s': %s has no weight other than 1", list[i]->name,
                      list[i]->kind->name);
  }
  return ESP_OK;
}

esp_status esp_adapters_activate(esp_model *m, esp_adapter **list, int n) {
  ESP_TRY(esp_adapters_check(m, list, n));
  ESP_TRY(install(m, list, n));
  return attach_modules(m, list, n);
}

/* The others stay active; modules that it trained or computed itself are the base's again. */
static void leave(esp_adapter *a, active_set *c) {
  int n = 0, before = c->n;
  for (int k = 0; k < c->n; k++)
    if (c->list[k] != a) c->list[n++] = c->list[k];
  if (n == before) return;
  esp_status st = attach_modules(a->model, c->list, n);
  if (st == ESP_OK && n > 0) st = install(a->model, c->list, n);
  if (st == ESP_OK && n > 0) return;
  install(a->model, NULL, 0);
  attach_modules(a->model, NULL, 0);
}

void esp_adapter_destroy(esp_adapter *a) {
  if (!a) return;
  active_set *c = a->model ? current(a->model) : NULL;
  if (c) leave(a, c);
  esp_train_modules_destroy(a);
  if (a->kind->destroy && a->site_state) a->kind->destroy(a);
  for (int i = 0; i < a->kind->n_states; i++)
    if (a->state[i]) esp_params_leave(a->params, &a->state[i]);
  esp_params_destroy(a->params);
  esp_arena_destroy(a->arena);
}

/* ---- effective weights ---- */

static bool token_site(const esp_adapter *a, const esp_site *s) {
  return a->modules && a->modules->tokens >= 0 && (s == a->modules->embed || s == a->modules->head);
}

bool esp_adapter_changes(const esp_adapter *a, const esp_site *s) {
  /* a module whose ranks have all been taken out stays as it is */
  bool emptied = a->kind->resized && esp_adapter_rank(a, s) == 0;
  return (a->targeted[s->index] && !emptied) || a->modules->weight[s->index] >= 0 || token_site(a, s);
}

esp_status esp_adapter_effective_rows(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  int64_t width = s->kind == ESP_SITE_LINEAR ? s->in : s->out;
  int copy = a->modules->weight[s->index];
  if (copy >= 0)
    a->params->be->ops->download(a->params->be, w, a->params->master + a->params->list[copy].offset + r0 * width,
                                 n * width * (int64_t)sizeof *w);
  if (token_site(a, s)) {
    float *rows = esp_mem_alloc(ESP_MEM_HOST, (size_t)(a->modules->n_tokens * width) * sizeof *rows);
    if (!rows) return ESP_ERR_MEMORY;
    esp_params_get(a->params, a->modules->tokens, rows);
    for (int i = 0; i < a->modules->n_tokens; i++) {
      int64_t row = a->cfg.trainable_tokens[i] - r0;
      if (row >= 0 && row < n) memcpy(w + row * width, rows + i * width, (size_t)width * sizeof *w);
    }
    esp_mem_free(rows);
  }
  return a->targeted[s->index] ? a->kind->materialise(a, s, r0, n, w) : ESP_OK;
}

bool esp_adapter_changes_bias(const esp_adapter *a, const esp_site *s) {
  bool kind = a->kind->materialise_bias && a->targeted[s->index] && s->bias_tensor;
  return a->modules->bias[s->index] >= 0 || (kind && (a->kind != &esp_kind_lora || a->cfg.lora_bias));
}

esp_status esp_adapter_effective_bias(esp_adapter *a, esp_site *s, float *bias) {
  if (a->modules->bias[s->index] >= 0) esp_params_get(a->params, a->modules->bias[s->index], bias);
  if (a->kind->materialise_bias && a->targeted[s->index]) return a->kind->materialise_bias(a, s, bias);
  return ESP_OK;
}

esp_status esp_adapters_effective_rows(esp_adapter *const *list, int n, esp_site *s, int64_t r0, int64_t rows,
                                       float *w) {
  for (int pass = 0; pass < 2; pass++)
    for (int i = 0; i < n; i++)
      if (esp_adapter_changes(list[i], s) && (list[i]->modules->weight[s->index] >= 0) == (pass == 0))
        ESP_TRY(esp_adapter_effective_rows(list[i], s, r0, rows, w));
  return ESP_OK;
}

esp_status esp_adapters_effective_bias(esp_adapter *const *list, int n, esp_site *s, float *bias) {
  for (int pass = 0; pass < 2; pass++)
    for (int i = 0; i < n; i++)
      if (esp_adapter_changes_bias(list[i], s) && (list[i]->modules->bias[s->index] >= 0) == (pass == 0))
        ESP_TRY(esp_adapter_effective_bias(list[i], s, bias));
  return ESP_OK;
}

int64_t esp_adapter_rank(const esp_adapter *a, const esp_site *s) {
  if (!a->kind->low_rank || !a->targeted[s->index]) return 0;
  return ((const esp_lora_site *)a->site_state[s->index])->r;
}
