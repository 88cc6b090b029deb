/* ia3.c: (IA)^3 (Liu et al. 2022, arXiv:2205.05638) as PEFT's IA3Config has it: a learned vector l, ones at the start,
 * multiplies what a linear module gives, y = l * (W x + b), or, for the modules of `feedforward`, what it gets,
 * y = W (l * x) + b.
 *
 * Output form: the unscaled output is kept for backward, dl_j = sum_t dy_tj y_tj, because dividing the scaled one by l
 * fails where l is 0. Input form: dl_j = sum_t dx'_tj x_tj with dx' = dy W, the gradient before it is scaled itself; x
 * is the group's own input, so a module that shares it with others (q, k, v; gate, up) cannot have this form.
 */
#include <stdio.h>
#include <string.h>

#include "adapters/internal.h"
#include "io/json.h"

typedef struct ia3_site {
  int l;
  bool input;
  esp_tensor before; /* output form: [T, out], on the stack of the step */
} ia3_site;
typedef struct ia3_group {
  esp_site *input; /* the site of the input form, NULL: none */
  esp_tensor x;    /* what backward was given, for input_bwd */
} ia3_group;

/* PEFT: a regular expression on the whole path, or names that the path ends with, with or without a dot before. */
static bool is_input(const esp_adapter_cfg *c, const char *path) {
  if (c->feedforward_regex) return esp_regex_full(c->feedforward_regex, path);
  size_t n = strlen(path);
  for (int i = 0; i < c->n_feedforward; i++) {
    size_t k = strlen(c->feedforward[i]);
    if (k <= n && strcmp(path + n - k, c->feedforward[i]) == 0) return true;
  }
  return false;
}

static esp_status ia3_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  ia3_group *ig = esp_arena_alloc(a->arena, sizeof *ig);
  if (!ig) return ESP_ERR_MEMORY;
  for (int i = 0; i < g->n_sites; i++) {
    if (!hit[i]) continue;
    esp_site *s = g->sites[i];
    ia3_site *is = esp_arena_alloc(a->arena, sizeof *is);
    if (!is) return ESP_ERR_MEMORY;
    is->input = is_input(&a->cfg, s->path);
    if (is->input && g->n_sites > 1)
      return esp_fail(ESP_ERR_RECIPE, "adapter.feedforward: %s shares its input with %s; leave it out", s->path,
                      g->sites[i ? 0 : 1]->leaf);
    char name[512];
    snprintf(name, sizeof name, ESP_PEFT_PREFIX "%s.ia3_l", s->path);
    is->l = esp_params_add(a->params, name, 2, is->input ? (int64_t[]){1, s->in} : (int64_t[]){s->out, 1}, true);
    if (is->l < 0) return ESP_ERR_MEMORY;
    if (is->input) ig->input = s;
    a->site_state[s->index] = is;
  }
  a->group_state[g->index] = ig;
  return ESP_OK;
}

static esp_status ia3_init(esp_adapter *a, esp_site *s) {
  const ia3_site *is = a->site_state[s->index];
  int64_t n = a->params->list[is->l].numel;
  float *l = esp_mem_alloc(ESP_MEM_HOST, (size_t)n * sizeof *l);
  if (!l) return ESP_ERR_MEMORY;
  for (int64_t i = 0; i < n; i++) l[i] = 1.0f;
  esp_params_set(a->params, is->l, l);
  esp_mem_free(l);
  return ESP_OK;
}

static bool ia3_needs_dx(const esp_adapter *a, const esp_site *s) {
  return ((const ia3_site *)a->site_state[s->index])->input;
}

/* ---- the step ---- */

static esp_tensor vector(const esp_adapter *a, const ia3_site *is) { /* fp32 master: it is small, and 1 + 2^-9 counts */
  return esp_tensor_1d(esp_param_master(a->params, is->l).data, ESP_F32, a->params->list[is->l].numel);
}

static ia3_site *output_site(esp_adapter *a, const esp_group *g, int i) {
  const esp_site *s = g->sites[i];
  ia3_site *is = a->targeted[s->index] ? a->site_state[s->index] : NULL;
  return is && !is->input ? is : NULL;
}

static void ia3_input(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor *x, void **slot) {
  (void)slot;
  const ia3_group *ig = a->group_state[g->index];
  if (!ig || !ig->input) return;
  esp_tensor scaled = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(x), esp_tensor_cols(x));
  run->be->ops->mul_cols(run->be, scaled, *x, vector(a, a->site_state[ig->input->index]));
  *x = scaled;
}

static void ia3_output(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, void **slot) {
  (void)x;
  (void)slot;
  if (!a->group_state[g->index]) return;
  const esp_backend_ops *ops = run->be->ops;
  for (int i = 0; i < g->n_sites; i++) {
    ia3_site *is = output_site(a, g, i);
    if (!is) continue;
    esp_tensor yi = esp_tensor_cols_view(&y, g->sites[i]->col0, g->sites[i]->out);
    if (run->train && a->trainable) {
      is->before = esp_stack_tensor(run->stack, run->compute, esp_tensor_rows(&y), g->sites[i]->out);
      ops->axpby(run->be, is->before, 1.0f, yi, 0.0f);
    }
    ops->mul_cols(run->be, yi, yi, vector(a, is));
  }
}

static void ia3_output_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, void **slot) {
  (void)slot;
  ia3_group *ig = a->group_state[g->index];
  if (!ig) return;
  const esp_backend_ops *ops = run->be->ops;
  ig->x = x;
  for (int i = 0; i < g->n_sites; i++) {
    const ia3_site *is = output_site(a, g, i);
    if (!is) continue;
    esp_tensor dyi = esp_tensor_cols_view(&dy, g->sites[i]->col0, g->sites[i]->out);
    if (a->trainable) ops->col_dot(run->be, esp_param_grad(a->params, is->l).data, dyi, is->before);
    ops->mul_cols(run->be, dyi, dyi, vector(a, is));
  }
}

static void ia3_input_bwd(esp_adapter *a, esp_run *run, esp_group *g, esp_tensor dx, void **slot) {
  (void)slot;
  const ia3_group *ig = a->group_state[g->index];
  if (!ig || !ig->input || !dx.data) return;
  const ia3_site *is = a->site_state[ig->input->index];
  if (a->trainable) run->be->ops->col_dot(run->be, esp_param_grad(a->params, is->l).data, dx, ig->x);
  run->be->ops->mul_cols(run->be, dx, dx, vector(a, is));
}

/* ---- merge and export ---- */

static float *host_vector(esp_adapter *a, const esp_site *s) {
  const ia3_site *is = a->site_state[s->index];
  float *l = esp_mem_alloc(ESP_MEM_HOST, (size_t)a->params->list[is->l].numel * sizeof *l);
  if (l) esp_params_get(a->params, is->l, l);
  return l;
}

static esp_status ia3_materialise(esp_adapter *a, esp_site *s, int64_t r0, int64_t n, float *w) {
  bool input = ((const ia3_site *)a->site_state[s->index])->input;
  float *l = host_vector(a, s);
  if (!l) return ESP_ERR_MEMORY;
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < s->in; j++) w[i * s->in + j] *= input ? l[j] : l[r0 + i];
  esp_mem_free(l);
  return ESP_OK;
}

static esp_status ia3_materialise_bias(esp_adapter *a, esp_site *s, float *bias) {
  if (((const ia3_site *)a->site_state[s->index])->input) return ESP_OK;
  float *l = host_vector(a, s);
  if (!l) return ESP_ERR_MEMORY;
  for (int64_t i = 0; i < s->out; i++) bias[i] *= l[i];
  esp_mem_free(l);
  return ESP_OK;
}

/* ---- configuration ---- */

static esp_status ia3_check(const esp_adapter_cfg *c) {
  if (c->feedforward_regex) ESP_TRY(esp_regex_check("adapter.feedforward", c->feedforward_regex));
  return esp_config_refuse(c, "ia3", ESP_CFG_BIAS | ESP_CFG_TOKENS | ESP_CFG_DROPOUT);
}

/* PEFT wants feedforward_modules among target_modules when both are lists: where a name is not there, both are written
 * as exact paths. */
static void ia3_config_write(const esp_adapter *a, json_t *j) {
  const esp_adapter_cfg *c = &a->cfg;
  json_object_del(j, "bias");
  json_object_del(j, "trainable_token_indices");
  esp_config_exact_targets(a, j, ESP_CFG_LAYERS);
  json_object_set_new(j, "fan_in_fan_out", json_boolean(esp_model_describe(a->model)->transposed));
  json_object_set_new(j, "init_ia3_weights", json_true());
  if (c->feedforward_regex) {
    json_object_set_new(j, "feedforward_modules", json_string(c->feedforward_regex));
    return;
  }
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites);
  const json_t *targets = json_object_get(j, "target_modules");
  json_t *list = json_array();
  bool among = true;
  for (int i = 0; i < c->n_feedforward; i++) {
    bool found = json_is_string(targets), used = false;
    for (size_t k = 0; k < json_array_size(targets) && !found; k++)
      found = strcmp(json_string_value(json_array_get(targets, k)), c->feedforward[i]) == 0;
    esp_adapter_cfg one = {.feedforward = &c->feedforward[i], .n_feedforward = 1};
    for (int k = 0; k < n && !used; k++) used = a->targeted[k] && is_input(&one, sites[k]->path);
    if (!used) continue; /* a default that this base has no module for */
    among &= found;
    json_array_append_new(list, json_string(c->feedforward[i]));
  }
  if (!among) {
    esp_config_exact_targets(a, j, ESP_CFG_ALWAYS);
    json_array_clear(list);
    for (int i = 0; i < n; i++)
      if (a->targeted[i] && is_input(c, sites[i]->path)) json_array_append_new(list, json_string(sites[i]->path));
  }
  json_object_set_new(j, "feedforward_modules", list);
}

static esp_status ia3_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  c->r = 1;
  c->alpha = 1;
  return esp_json_read_names(j, "feedforward_modules", path, arena, &c->feedforward, &c->n_feedforward,
                             &c->feedforward_regex);
}

const esp_adapter_kind esp_kind_ia3 = {
    .name = "ia3",
    .peft_type = "IA3",
    .summary = "a learned vector scales each module's output, or its input (Liu et al. 2022, arXiv:2205.05638)",
    .site_kinds = 1u << ESP_SITE_LINEAR,
    .mergeable = true,
    .targets = true,
    .alone = true,
    .needs_dx = ia3_needs_dx,
    .declare = ia3_declare,
    .init = ia3_init,
    .input = ia3_input,
    .output = ia3_output,
    .output_bwd = ia3_output_bwd,
    .input_bwd = ia3_input_bwd,
    .config_write = ia3_config_write,
    .config_read = ia3_config_read,
    .config_check = ia3_check,
    .materialise = ia3_materialise,
    .materialise_bias = ia3_materialise_bias,
};
