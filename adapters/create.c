/* create.c: an adapter from its configuration: deep copy, checks, targets, declared parameters, starting values. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "adapters/internal.h"

#define COPY_STR(field)                                                                                                \
  do {                                                                                                                 \
    if (in->field && !(out->field = esp_arena_strdup(arena, in->field))) return ESP_ERR_MEMORY;                        \
  } while (0)

static esp_status copy_list(esp_arena *arena, const char *const *in, int n, const char *const **out) {
  const char **list = esp_arena_alloc(arena, (size_t)(n ? n : 1) * sizeof *list);
  if (!list) return ESP_ERR_MEMORY;
  for (int i = 0; i < n; i++)
    if (!(list[i] = esp_arena_strdup(arena, in[i]))) return ESP_ERR_MEMORY;
  *out = list;
  return ESP_OK;
}

static esp_status copy_patterns(esp_arena *arena, const esp_pattern *in, int n, const esp_pattern **out) {
  esp_pattern *list = esp_arena_alloc(arena, (size_t)(n ? n : 1) * sizeof *list);
  if (!list) return ESP_ERR_MEMORY;
  for (int i = 0; i < n; i++) {
    list[i] = in[i];
    if (!(list[i].key = esp_arena_strdup(arena, in[i].key))) return ESP_ERR_MEMORY;
  }
  *out = list;
  return ESP_OK;
}

static esp_status copy_bytes(esp_arena *arena, const void *in, size_t bytes, void *out_ptr) {
  void *p = esp_arena_alloc(arena, bytes ? bytes : 1);
  if (!p) return ESP_ERR_MEMORY;
  if (bytes) memcpy(p, in, bytes);
  memcpy(out_ptr, &p, sizeof p);
  return ESP_OK;
}

static esp_status copy_kept(esp_arena *arena, const esp_kept *in, int n, const esp_kept **out) {
  esp_kept *list = esp_arena_alloc(arena, (size_t)(n ? n : 1) * sizeof *list);
  if (!list) return ESP_ERR_MEMORY;
  for (int i = 0; i < n; i++) {
    list[i] = in[i];
    if (!(list[i].path = esp_arena_strdup(arena, in[i].path))) return ESP_ERR_MEMORY;
    ESP_TRY(copy_bytes(arena, in[i].keep, (size_t)in[i].n, &list[i].keep));
  }
  *out = list;
  return ESP_OK;
}

static esp_status copy_start(esp_arena *arena, const esp_lora_start *in, int n, const esp_lora_start **out) {
  esp_lora_start *list = esp_arena_alloc(arena, (size_t)(n ? n : 1) * sizeof *list);
  if (!list) return ESP_ERR_MEMORY;
  for (int i = 0; i < n; i++) {
    list[i] = in[i];
    if (!(list[i].path = esp_arena_strdup(arena, in[i].path))) return ESP_ERR_MEMORY;
    ESP_TRY(copy_bytes(arena, in[i].A, (size_t)(in[i].r * in[i].in) * sizeof *in[i].A, &list[i].A));
    ESP_TRY(copy_bytes(arena, in[i].B, (size_t)(in[i].out * in[i].r) * sizeof *in[i].B, &list[i].B));
  }
  *out = list;
  return ESP_OK;
}

static esp_status copy_skeleton(esp_arena *arena, const esp_skeleton *in, int n, const esp_skeleton **out) {
  esp_skeleton *list = esp_arena_alloc(arena, (size_t)(n ? n : 1) * sizeof *list);
  if (!list) return ESP_ERR_MEMORY;
  for (int i = 0; i < n; i++) {
    list[i].n = in[i].n;
    if (!(list[i].path = esp_arena_strdup(arena, in[i].path))) return ESP_ERR_MEMORY;
    ESP_TRY(copy_bytes(arena, in[i].rows, (size_t)in[i].n * sizeof *in[i].rows, &list[i].rows));
    ESP_TRY(copy_bytes(arena, in[i].cols, (size_t)in[i].n * sizeof *in[i].cols, &list[i].cols));
  }
  *out = list;
  return ESP_OK;
}

static esp_status copy_mean_gates(esp_arena *arena, const esp_mean_gates *in, int n, const esp_mean_gates **out) {
  esp_mean_gates *list = esp_arena_alloc(arena, (size_t)(n ? n : 1) * sizeof *list);
  if (!list) return ESP_ERR_MEMORY;
  for (int i = 0; i < n; i++) {
    list[i] = in[i];
    if (!(list[i].path = esp_arena_strdup(arena, in[i].path))) return ESP_ERR_MEMORY;
    ESP_TRY(copy_bytes(arena, in[i].values, (size_t)in[i].n * sizeof *in[i].values, &list[i].values));
  }
  *out = list;
  return ESP_OK;
}

esp_status esp_cfg_copy(esp_arena *arena, const esp_adapter_cfg *in, esp_adapter_cfg *out) {
  *out = *in;
  COPY_STR(type);
  COPY_STR(init);
  COPY_STR(bias);
  COPY_STR(corda_method);
  COPY_STR(ga_direction);
  COPY_STR(ga_scale);
  COPY_STR(sparse_mask);
  COPY_STR(mora_type);
  COPY_STR(pmss_select);
  COPY_STR(orthogonal);
  COPY_STR(miss_type);
  COPY_STR(prompt_init);
  COPY_STR(prompt_text);
  COPY_STR(target_regex);
  COPY_STR(exclude_regex);
  COPY_STR(layers_pattern);
  COPY_STR(feedforward_regex);
  ESP_TRY(copy_list(arena, in->feedforward, in->n_feedforward, &out->feedforward));
  ESP_TRY(copy_list(arena, in->target, in->n_target, &out->target));
  ESP_TRY(copy_list(arena, in->exclude, in->n_exclude, &out->exclude));
  ESP_TRY(copy_list(arena, in->modules_to_save, in->n_modules_to_save, &out->modules_to_save));
  ESP_TRY(copy_patterns(arena, in->rank_pattern, in->n_rank_pattern, &out->rank_pattern));
  ESP_TRY(copy_patterns(arena, in->alpha_pattern, in->n_alpha_pattern, &out->alpha_pattern));
  ESP_TRY(copy_start(arena, in->start, in->n_start, &out->start));
  ESP_TRY(copy_skeleton(arena, in->skeleton, in->n_skeleton, &out->skeleton));
  ESP_TRY(copy_mean_gates(arena, in->mean_gates, in->n_mean_gates, &out->mean_gates));
  ESP_TRY(copy_kept(arena, in->kept, in->n_kept, &out->kept));
  ESP_TRY(copy_bytes(arena, in->layers, (size_t)in->n_layers * sizeof *in->layers, &out->layers));
  ESP_TRY(copy_bytes(arena, in->prompt_ids, (size_t)in->n_prompt_ids * sizeof *in->prompt_ids, &out->prompt_ids));
  ESP_TRY(copy_bytes(arena, in->trainable_tokens, (size_t)in->n_trainable_tokens * sizeof(int32_t),
                     &out->trainable_tokens));
  return ESP_OK;
}

bool esp_adapter_trains_nothing(const esp_adapter_cfg *c) {
  return c->type && esp_adapter_find(c->type) == &esp_kind_none && c->n_modules_to_save == 0 &&
         c->n_trainable_tokens == 0 && (!c->bias || !strcmp(c->bias, "none"));
}

static esp_status check_cfg(const esp_adapter_kind *kind, esp_adapter_cfg *cfg) {
  if (!cfg->init) cfg->init = "default";
  if (!cfg->bias) cfg->bias = "none";
  if (strcmp(cfg->bias, "none") && strcmp(cfg->bias, "all") && strcmp(cfg->bias, "lora_only"))
    return esp_fail(ESP_ERR_RECIPE, "adapter.bias: '%s' is not one of none, all, lora_only", cfg->bias);
  for (int i = 0; i < cfg->n_modules_to_save; i++)
    ESP_TRY(esp_regex_check("adapter.modules_to_save", cfg->modules_to_save[i]));
  if (!kind->targets) return kind->config_check ? kind->config_check(cfg) : ESP_OK;
  if (cfg->r < 1) return esp_fail(ESP_ERR_RECIPE, "adapter.rank: must be at least 1, is %lld", (long long)cfg->r);
  if (!(cfg->dropout >= 0 && cfg->dropout < 1))
    return esp_fail(ESP_ERR_RECIPE, "adapter.dropout: must be in [0, 1), is %g", cfg->dropout);
  if (!isfinite(cfg->alpha)) return esp_fail(ESP_ERR_RECIPE, "adapter.alpha: must be finite");
  if (!esp_lora_init_known(cfg->init))
    return esp_fail(ESP_ERR_RECIPE,
                    "adapter.init: '%s' is not one of default, gaussian, orthogonal, pissa, pissa_niter_<k>, olora, "
                    "eva, corda, lora_ga, loftq",
                    cfg->init);
  for (int i = 0; i < cfg->n_rank_pattern; i++)
    if (cfg->rank_pattern[i].value < 1 || cfg->rank_pattern[i].value != floor(cfg->rank_pattern[i].value))
      return esp_fail(ESP_ERR_RECIPE, "adapter.rank_pattern: '%s' must be a whole number of at least 1",
                      cfg->rank_pattern[i].key);
  if (kind->config_check) ESP_TRY(kind->config_check(cfg));
  return esp_target_check(cfg);
}

static esp_status declare_all(esp_adapter *a) {
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites);
  for (int i = 0; i < n; i++) {
    esp_site *s = sites[i];
    if (s->kind != ESP_SITE_LINEAR) {
      if (a->targeted[i]) ESP_TRY(a->kind->declare_site(a, s));
      continue;
    }
    if (s->group->sites[0] != s) continue; /* a group is declared once, at its first site */
    bool hit[3] = {false, false, false}, any = false;
    for (int k = 0; k < s->group->n_sites; k++) any |= hit[k] = a->targeted[s->group->sites[k]->index];
    if (any) ESP_TRY(a->kind->declare(a, s->group, hit));
  }
  return a->kind->declare_last ? a->kind->declare_last(a) : ESP_OK;
}

/* Biases and norms are not decayed; B matrices form learning-rate group 1 (LoRA+). */
static void mark_params(esp_adapter *a) {
  for (int i = 0; i < a->params->count; i++) {
    esp_param *p = &a->params->list[i];
    p->decay = p->ndim > 1;
    p->group = strstr(p->name, ".lora_B.") || strstr(p->name, ".lora_embedding_B") ? 1 : 0;
  }
}

esp_status esp_adapter_build(esp_model *m, const esp_adapter_cfg *cfg, const char *name, bool trainable, bool loading,
                             esp_adapter **out) {
  esp_status st = ESP_OK;
  esp_adapter *a = NULL;
  *out = NULL;
  const esp_adapter_kind *kind = esp_adapter_find(cfg->type ? cfg->type : "lora");
  if (!kind) return esp_fail(ESP_ERR_RECIPE, "adapter.type: unknown kind '%s'", cfg->type);
  if (!name || !name[0]) name = "default";
  if (strchr(name, '.') || strchr(name, '/') || strlen(name) >= sizeof a->name)
    return esp_fail(ESP_ERR_RECIPE, "adapter name '%s': dots, slashes and more than 63 characters are not allowed",
                    name);
  esp_arena *arena = esp_arena_create(ESP_MEM_HOST);
  if (!arena) return ESP_ERR_MEMORY;
  if (!(a = esp_arena_alloc(arena, sizeof *a))) {
    esp_arena_destroy(arena);
    return ESP_ERR_MEMORY;
  }
  a->kind = kind;
  a->arena = arena;
  a->model = m;
  a->trainable = trainable;
  a->weight = 1.0;
  a->grad_scale = 1.0f;
  snprintf(a->name, sizeof a->name, "%s", name);
  esp_site **sites;
  esp_group **groups;
  size_t n = (size_t)esp_model_sites(m, &sites), n_groups = (size_t)esp_model_groups(m, &groups);
  ESP_GOTO(esp_cfg_copy(arena, cfg, &a->cfg));
  ESP_GOTO(check_cfg(kind, &a->cfg));
  a->targeted = esp_arena_alloc(arena, (n + 1) * sizeof *a->targeted);
  a->site_state = esp_arena_alloc(arena, (n + 1) * sizeof *a->site_state);
  a->group_state = esp_arena_alloc(arena, (n_groups + 1) * sizeof *a->group_state);
  st = a->targeted && a->site_state && a->group_state ? ESP_OK : ESP_ERR_MEMORY;
  if (st) goto out;
  ESP_GOTO(esp_params_create(esp_model_backend(m), &a->params));
  ESP_GOTO(esp_train_modules_create(a));
  if (kind->open) ESP_GOTO(kind->open(a));
  if (kind->targets) {
    ESP_GOTO(esp_target_resolve(a, !loading));
    ESP_GOTO(declare_all(a));
  }
  ESP_GOTO(esp_train_modules_declare(a));
  ESP_GOTO(esp_params_finalize(a->params, esp_model_compute(m), trainable));
  for (int i = 0; i < kind->n_states && trainable; i++)
    ESP_GOTO(esp_params_follow(a->params, &a->state[i], ESP_MEM_OPTIM));
  mark_params(a);
  bool counts = esp_backend_counts(a->params->be); /* what a rewritten base takes is counted */
  if (kind->init && (!counts || esp_lora_rewrites_base(a->cfg.init)))
    for (size_t i = 0; i < n; i++)
      if (a->targeted[i] && (!loading || kind->reads_base || esp_lora_rewrites_base(a->cfg.init)))
        ESP_GOTO(kind->init(a, sites[i]));
  if (kind->start && !loading && !esp_backend_counts(a->params->be)) ESP_GOTO(kind->start(a));
  ESP_GOTO(esp_train_modules_init(a, loading));
out:
  if (st) {
    esp_adapter_destroy(a);
    return st;
  }
  *out = a;
  return ESP_OK;
}

esp_status esp_adapter_create(esp_model *m, const esp_adapter_cfg *cfg, const char *name, bool trainable,
                              esp_adapter **out) {
  return esp_adapter_build(m, cfg, name, trainable, false, out);
}
