/* train_modules.c: what is trained beside a kind's own parameters, written once for all kinds: full copies of modules
 * (modules_to_save, `full`), biases of the base (bias: all | lora_only), and replaced rows of the input embedding
 * (trainable tokens). Full copies are computed by the model itself from the store (esp_site.trained); token rows go
 * through the hooks here. A tied head follows its embedding: the change of n rows of the head is a low-rank change,
 * logits += (x D^T) S^T, with D = rows - base rows [n, dim] and S the one-hot columns [vocab, n]. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/internal.h"

/* So that the base's copy is not packed. A site that an active adapter holds is left to it: activation decides. */
static void attach(esp_adapter *a, esp_site *s) {
  if (s->trained && s->trained != a->params) return;
  s->trained = a->params;
  s->trained_weight = a->modules->weight[s->index];
  s->trained_bias = a->modules->bias[s->index];
}

esp_status esp_train_module_add(esp_adapter *a, esp_site *s, const char *inner, bool weight, bool pad) {
  char name[600];
  /* the module's path in the Hugging Face model; the key in the base's file may lack its first component */
  snprintf(name, sizeof name, "%s%s%s.%s", a->kind->whole_base ? "" : ESP_PEFT_PREFIX, s->path, inner,
           weight ? "weight" : "bias");
  int64_t shape[2] = {s->out, s->in};
  int ndim = 1;
  if (weight && s->kind == ESP_SITE_LINEAR) ndim = 2;
  if (weight && s->kind == ESP_SITE_EMBED) {
    ndim = 2;
    shape[0] = s->in;
    shape[1] = s->out;
  }
  int index = esp_params_add(a->params, name, ndim, shape, pad);
  if (index < 0) return ESP_ERR_MEMORY;
  (weight ? a->modules->weight : a->modules->bias)[s->index] = index;
  attach(a, s);
  return weight && s->kind == ESP_SITE_LINEAR && s->transposed ? esp_mark_transposed(a, index) : ESP_OK;
}

esp_status esp_mark_transposed(esp_adapter *a, int index) {
  esp_train_modules *t = a->modules;
  if (index >= t->file_cap) {
    int cap = index + 64;
    bool *p = esp_mem_realloc(ESP_MEM_HOST, t->file_transposed, (size_t)cap * sizeof *p);
    if (!p) return ESP_ERR_MEMORY;
    t->file_transposed = p;
    t->file_cap = cap;
  }
  t->file_transposed[index] = true;
  return ESP_OK;
}

static bool wants_weight(const esp_adapter *a, const esp_site *s) {
  return a->kind->whole_base || (a->kind->trains && a->kind->trains(a, s)) || esp_saved_in_full(&a->cfg, s->path);
}

static bool wants_bias(const esp_adapter *a, const esp_site *s) {
  if (!s->bias_tensor) return false;
  return wants_weight(a, s) || strcmp(a->cfg.bias, "all") == 0 ||
         (strcmp(a->cfg.bias, "lora_only") == 0 && a->targeted[s->index]);
}

/* PEFT keeps the module itself inside its wrapper. */
static const char *inner_name(const esp_adapter *a, const esp_site *s) {
  return a->targeted[s->index] ? ".base_layer" : "";
}

/* `full` trains one storage once: a tied head shares the parameter of the embedding. */
static bool share_tied(esp_adapter *a, esp_site *s, esp_site **sites) {
  if (!a->kind->whole_base) return false;
  for (int i = 0; i < s->index; i++) {
    if (a->modules->weight[i] < 0 || strcmp(sites[i]->tensor, s->tensor)) continue;
    a->modules->weight[s->index] = a->modules->weight[i];
    attach(a, s);
    return true;
  }
  return false;
}

static esp_status declare_site(esp_adapter *a, esp_site *s, esp_site **sites) {
  if (wants_weight(a, s) && !share_tied(a, s, sites)) ESP_TRY(esp_train_module_add(a, s, "", true, true));
  if (wants_bias(a, s)) ESP_TRY(esp_train_module_add(a, s, inner_name(a, s), false, true));
  return ESP_OK;
}

/* Weights of a group back to back, so that the model may take them as one operand. */
static esp_status declare_group(esp_adapter *a, esp_group *g, esp_site **sites) {
  if (g->n_sites == 1) return declare_site(a, g->sites[0], sites);
  bool pad = true;
  for (int i = 0; i < g->n_sites; i++) {
    esp_site *s = g->sites[i];
    if (!wants_weight(a, s)) continue;
    ESP_TRY(esp_train_module_add(a, s, "", true, pad));
    pad = false;
  }
  for (int i = 0; i < g->n_sites; i++) {
    esp_site *s = g->sites[i];
    if (wants_bias(a, s)) ESP_TRY(esp_train_module_add(a, s, inner_name(a, s), false, true));
  }
  return ESP_OK;
}

static int by_token(const void *x, const void *y, void *ctx) {
  const int32_t *tokens = ctx, a = tokens[*(const int32_t *)x], b = tokens[*(const int32_t *)y];
  return (a > b) - (a < b);
}

static esp_status declare_tokens(esp_adapter *a, esp_site **sites, int n) {
  esp_train_modules *t = a->modules;
  const esp_adapter_cfg *cfg = &a->cfg;
  for (int i = n - 1; i >= 0; i--) /* the first embedding in model order is that of the tokens */
    if (sites[i]->kind == ESP_SITE_EMBED && sites[i]->in == esp_model_describe(a->model)->vocab) t->embed = sites[i];
  for (int i = 0; i < n && esp_model_describe(a->model)->tied; i++)
    if (sites[i]->kind == ESP_SITE_LINEAR && sites[i]->is_head) t->head = sites[i];
  if (!t->embed) return esp_fail(ESP_ERR_RECIPE, "adapter.trainable_tokens: the base has no token embedding");
  if (a->targeted[t->embed->index] || t->weight[t->embed->index] >= 0)
    return esp_fail(ESP_ERR_RECIPE, "adapter.trainable_tokens: %s is already targeted or trained in full",
                    t->embed->path);
  if (t->head && (a->targeted[t->head->index] || t->weight[t->head->index] >= 0))
    return esp_fail(ESP_ERR_RECIPE, "adapter.trainable_tokens: the tied %s is already targeted or trained in full",
                    t->head->path);
  t->n_tokens = cfg->n_trainable_tokens;
  t->order = esp_arena_alloc(a->arena, (size_t)t->n_tokens * sizeof *t->order);
  if (!t->order) return ESP_ERR_MEMORY;
  for (int i = 0; i < t->n_tokens; i++) {
    t->order[i] = i;
    if (cfg->trainable_tokens[i] < 0 || cfg->trainable_tokens[i] >= t->embed->in)
      return esp_fail(ESP_ERR_RECIPE, "adapter.trainable_tokens: %d is not in the vocabulary of %lld",
                      cfg->trainable_tokens[i], (long long)t->embed->in);
  }
  qsort_r(t->order, (size_t)t->n_tokens, sizeof *t->order, by_token, (void *)(uintptr_t)cfg->trainable_tokens);
  for (int i = 1; i < t->n_tokens; i++)
    if (cfg->trainable_tokens[t->order[i]] == cfg->trainable_tokens[t->order[i - 1]])
      return esp_fail(ESP_ERR_RECIPE, "adapter.trainable_tokens: %d is named twice",
                      cfg->trainable_tokens[t->order[i]]);
  char name[600];
  snprintf(name, sizeof name, ESP_PEFT_PREFIX "%s.token_adapter.trainable_tokens_delta", t->embed->path);
  t->tokens = esp_params_add(a->params, name, 2, (int64_t[]){t->n_tokens, t->embed->out}, true);
  return t->tokens < 0 ? ESP_ERR_MEMORY : ESP_OK;
}

esp_status esp_train_modules_create(esp_adapter *a) {
  esp_site **sites;
  size_t n = (size_t)esp_model_sites(a->model, &sites);
  esp_train_modules *t = a->modules = esp_arena_alloc(a->arena, sizeof *t);
  if (!t) return ESP_ERR_MEMORY;
  t->tokens = -1;
  t->weight = esp_arena_alloc(a->arena, (n + 1) * sizeof *t->weight);
  t->bias = esp_arena_alloc(a->arena, (n + 1) * sizeof *t->bias);
  if (!t->weight || !t->bias) return ESP_ERR_MEMORY;
  for (size_t i = 0; i < n; i++) t->weight[i] = t->bias[i] = -1;
  return ESP_OK;
}

esp_status esp_train_modules_declare(esp_adapter *a) {
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites);
  for (int k = 0; k < a->cfg.n_modules_to_save; k++) {
    bool found = false;
    esp_adapter_cfg one = {.modules_to_save = &a->cfg.modules_to_save[k], .n_modules_to_save = 1};
    for (int i = 0; i < n && !found; i++) found = esp_saved_in_full(&one, sites[i]->path);
    if (!found)
      return esp_fail(ESP_ERR_RECIPE, "adapter.modules_to_save: '%s' matches no module of the base",
                      a->cfg.modules_to_save[k]);
  }
  for (int i = 0; i < n; i++) {
    if (a->targeted[i] && wants_weight(a, sites[i]))
      return esp_fail(ESP_ERR_RECIPE, "adapter.target: %s is also in modules_to_save", sites[i]->path);
    if (sites[i]->kind != ESP_SITE_LINEAR)
      ESP_TRY(declare_site(a, sites[i], sites));
    else if (sites[i]->group->sites[0] == sites[i])
      ESP_TRY(declare_group(a, sites[i]->group, sites));
  }
  return a->cfg.n_trainable_tokens ? declare_tokens(a, sites, n) : ESP_OK;
}

static esp_status init_tokens(esp_adapter *a, bool loading) {
  esp_train_modules *t = a->modules;
  esp_backend *be = a->params->be;
  int64_t dim = t->embed->out, vocab = t->embed->in, n = t->n_tokens;
  size_t unit = esp_dtype_size(a->params->shadow_dtype);
  float *rows = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n * dim) * sizeof *rows);
  char *select = NULL;
  esp_status st = rows ? ESP_OK : ESP_ERR_MEMORY;
  if (st) goto out;
  for (int64_t i = 0; i < n && !esp_backend_counts(be); i++)
    ESP_GOTO(esp_site_read_weight_rows(a->model, t->embed, a->cfg.trainable_tokens[i], 1, rows + i * dim));
  if (!loading) esp_params_set(a->params, t->tokens, rows);
  if (t->head) {
    t->base_rows = be->ops->alloc(be, ESP_MEM_PARAMS, n * dim * (int64_t)sizeof(float));
    t->select = be->ops->alloc(be, ESP_MEM_PARAMS, vocab * n * (int64_t)unit);
    select = esp_mem_alloc(ESP_MEM_HOST, (size_t)(vocab * n) * unit);
    st = t->base_rows && t->select && select ? ESP_OK : ESP_ERR_MEMORY;
    if (st) goto out;
    /* what the frozen head holds for these rows is the weight rounded to the compute type */
    if (a->params->shadow_dtype == ESP_BF16)
      for (int64_t i = 0; i < n * dim; i++) rows[i] = esp_bf16_to_f32(esp_f32_to_bf16(rows[i]));
    be->ops->upload(be, t->base_rows, rows, n * dim * (int64_t)sizeof(float));
    for (int64_t i = 0; i < n; i++) {
      int64_t at = (int64_t)a->cfg.trainable_tokens[i] * n + i;
      float one = 1.0f;
      esp_convert(select + (size_t)at * unit, a->params->shadow_dtype, &one, ESP_F32, 1);
    }
    be->ops->upload(be, t->select, select, vocab * n * (int64_t)unit);
  }
out:
  esp_mem_free(rows);
  esp_mem_free(select);
  return st;
}

esp_status esp_train_modules_init(esp_adapter *a, bool loading) {
  esp_train_modules *t = a->modules;
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites);
  bool read = !loading && !esp_backend_counts(a->params->be);
  for (int i = 0; i < n && read; i++) {
    for (int which = 0; which < 2; which++) {
      int index = which ? t->bias[i] : t->weight[i];
      if (index < 0) continue;
      float *w = esp_mem_alloc(ESP_MEM_HOST, (size_t)a->params->list[index].numel * sizeof *w);
      if (!w) return ESP_ERR_MEMORY;
      esp_status st = which ? esp_site_read_bias(a->model, sites[i], w) : esp_site_read_weight(a->model, sites[i], w);
      if (st == ESP_OK) esp_params_set(a->params, index, w);
      esp_mem_free(w);
      if (st) return st;
    }
  }
  return t->tokens >= 0 ? init_tokens(a, loading) : ESP_OK;
}

void esp_train_modules_destroy(esp_adapter *a) {
  esp_train_modules *t = a->modules;
  if (!t) return;
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites);
  for (int i = 0; i < n; i++) {
    if (!a->params || sites[i]->trained != a->params) continue;
    sites[i]->trained = NULL;
    sites[i]->trained_weight = sites[i]->trained_bias = -1;
  }
  if (t->base_rows) a->params->be->ops->free(a->params->be, t->base_rows);
  if (t->select) a->params->be->ops->free(a->params->be, t->select);
  esp_mem_free(t->file_transposed);
}

/* ---- token rows in the step ---- */

static int token_slot(const esp_adapter *a, int32_t id) {
  const esp_train_modules *t = a->modules;
  int lo = 0, hi = t->n_tokens - 1;
  while (lo <= hi) {
    int mid = (lo + hi) / 2;
    int32_t v = a->cfg.trainable_tokens[t->order[mid]];
    if (v == id) return t->order[mid];
    if (v < id)
      lo = mid + 1;
    else
      hi = mid - 1;
  }
  return -1;
}

typedef struct token_rows { /* which rows of the batch are replaced, by which trained row; backend memory */
  int32_t *row, *slot;
  int64_t n;
  esp_tensor values; /* [n, dim] */
} token_rows;

/* The buffers have the size of the batch whatever it holds, so that the plan is exact. */
static bool find_rows(esp_adapter *a, esp_run *run, esp_site *s, const int32_t *ids, int64_t tokens, token_rows *out) {
  if (a->modules->tokens < 0 || s != a->modules->embed) return false;
  const esp_backend_ops *ops = run->be->ops;
  int64_t bytes = tokens * (int64_t)sizeof(int32_t);
  out->row = esp_stack_push(run->stack, bytes);
  out->slot = esp_stack_push(run->stack, bytes);
  esp_tensor values = esp_stack_tensor(run->stack, run->compute, tokens, s->out);
  int32_t *host = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(3 * bytes));
  if (!host) {
    run->be->sticky = ESP_ERR_MEMORY;
    return false;
  }
  if (ids == run->d_ids)
    memcpy(host, run->batch->ids, (size_t)bytes);
  else
    ops->download(run->be, host, ids, bytes);
  out->n = 0;
  for (int64_t i = 0; i < tokens; i++) {
    int slot = token_slot(a, host[i]);
    if (slot < 0) continue;
    host[tokens + out->n] = (int32_t)i;
    host[2 * tokens + out->n++] = slot;
  }
  ops->upload(run->be, out->row, host + tokens, out->n * (int64_t)sizeof(int32_t));
  ops->upload(run->be, out->slot, host + 2 * tokens, out->n * (int64_t)sizeof(int32_t));
  esp_mem_free(host);
  out->values = esp_tensor_rows_view(&values, 0, out->n);
  return out->n > 0;
}

void esp_train_modules_embed(esp_adapter *a, esp_run *run, esp_site *s, const int32_t *ids, esp_tensor y) {
  int64_t mark = esp_stack_mark(run->stack);
  token_rows t;
  if (find_rows(a, run, s, ids, esp_tensor_rows(&y), &t)) {
    const esp_backend_ops *ops = run->be->ops;
    float scale = esp_model_describe(a->model)->embed_scale;
    ops->gather_rows(run->be, t.values, esp_param_shadow(a->params, a->modules->tokens), t.slot);
    if (scale != 1.0f) ops->axpby(run->be, t.values, scale, t.values, 0.0f);
    ops->scatter_rows(run->be, y, t.values, t.row);
  }
  esp_stack_release(run->stack, mark);
}

void esp_train_modules_embed_bwd(esp_adapter *a, esp_run *run, esp_site *s, const int32_t *ids, esp_tensor dy) {
  if (!a->trainable) return;
  int64_t mark = esp_stack_mark(run->stack);
  token_rows t;
  if (find_rows(a, run, s, ids, esp_tensor_rows(&dy), &t)) {
    run->be->ops->gather_rows(run->be, t.values, dy, t.row);
    run->be->ops->embed_bwd(run->be, esp_param_grad(a->params, a->modules->tokens).data, t.values, t.slot,
                            esp_model_describe(a->model)->embed_scale);
  }
  esp_stack_release(run->stack, mark);
}

/* D = rows - base rows, subtracted in fp32 and rounded once; stays on the stack. */
static esp_tensor head_change(esp_adapter *a, esp_run *run) {
  const esp_train_modules *t = a->modules;
  const esp_backend_ops *ops = run->be->ops;
  esp_tensor d = esp_stack_tensor(run->stack, run->compute, t->n_tokens, t->embed->out);
  int64_t mark = esp_stack_mark(run->stack);
  esp_tensor wide = esp_stack_tensor(run->stack, ESP_F32, t->n_tokens, t->embed->out);
  ops->axpby(run->be, wide, 1.0f, esp_param_master(a->params, t->tokens), 0.0f);
  ops->axpby(run->be, wide, -1.0f, esp_tensor_2d(t->base_rows, ESP_F32, t->n_tokens, t->embed->out), 1.0f);
  ops->axpby(run->be, d, 1.0f, wide, 0.0f);
  esp_stack_release(run->stack, mark);
  return d;
}

static bool is_tied_head(const esp_adapter *a, const esp_group *g) {
  const esp_train_modules *t = a->modules;
  return t->tokens >= 0 && t->head && t->head->group == g;
}

static bool no_room(esp_run *run, int max) {
  if (max >= 1) return false;
  if (run->be->sticky == ESP_OK)
    run->be->sticky = esp_fail(ESP_ERR_RECIPE, "too many active adapters with trainable tokens on a tied head");
  return true;
}

int esp_train_modules_tails(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tail *tails, int max) {
  if (!is_tied_head(a, g) || no_room(run, max)) return 0;
  esp_train_modules *t = a->modules;
  esp_tensor rows = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), t->n_tokens);
  int64_t mark = esp_stack_mark(run->stack);
  run->be->ops->matmul(run->be, rows, x, false, head_change(a, run), true, 1.0f, 0.0f);
  esp_stack_release(run->stack, mark);
  tails[0] = (esp_tail){t->head->col0, rows, esp_tensor_2d(t->select, run->compute, t->embed->in, t->n_tokens)};
  return 1;
}

int esp_train_modules_tails_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy,
                                esp_tail *tails, int max) {
  if (!is_tied_head(a, g) || no_room(run, max)) return 0;
  esp_train_modules *t = a->modules;
  const esp_backend_ops *ops = run->be->ops;
  esp_tensor d_rows = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&x), t->n_tokens);
  esp_tensor select = esp_tensor_2d(t->select, run->compute, t->embed->in, t->n_tokens);
  ops->matmul(run->be, d_rows, esp_tensor_cols_view(&dy, t->head->col0, t->head->out), false, select, false, 1.0f,
              0.0f);
  if (a->trainable) ops->matmul(run->be, esp_param_grad(a->params, t->tokens), d_rows, true, x, false, 1.0f, 1.0f);
  tails[0] = (esp_tail){0, d_rows, head_change(a, run)};
  return 1;
}
