/* target.c: which modules an adapter attaches to: PEFT's rules (tuners_utils.check_target_module_exists,
 * get_pattern_key). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "adapters/internal.h"
#include "core/map.h"
#include "core/strbuf.h"

static bool suffix_match(const char *path, const char *name) {
  size_t n = strlen(path), k = strlen(name);
  return n > k && path[n - k - 1] == '.' && strcmp(path + n - k, name) == 0;
}

bool esp_target_is_all_linear(const esp_adapter_cfg *cfg) {
  if (cfg->target_regex) return strcasecmp(cfg->target_regex, "all-linear") == 0;
  return cfg->n_target == 1 && strcasecmp(cfg->target[0], "all-linear") == 0;
}

/* re.match(rf"(^|.*\.){m}($|\..*)", path): the module itself or anything inside it. */
bool esp_in_modules_to_save(const esp_adapter_cfg *cfg, const char *path) {
  for (int i = 0; i < cfg->n_modules_to_save; i++) {
    char pattern[512];
    snprintf(pattern, sizeof pattern, "(?:^|.*\\.)%s(?:$|\\..*)", cfg->modules_to_save[i]);
    if (esp_regex_match(pattern, path, NULL, 0)) return true;
  }
  return false;
}

/* The modules that are copied: every one, leaf or container, whose path ends with the name, with or without a dot
 * before it ("norm" is also "input_layernorm"); other._set_trainable. */
bool esp_saved_in_full(const esp_adapter_cfg *cfg, const char *path) {
  for (int i = 0; i < cfg->n_modules_to_save; i++) {
    const char *m = cfg->modules_to_save[i];
    size_t k = strlen(m);
    for (const char *end = path;; end++) {
      if (*end && *end != '.') continue;
      if ((size_t)(end - path) >= k && memcmp(end - k, m, k) == 0) return true;
      if (!*end) break;
    }
  }
  return false;
}

static bool excluded(const esp_adapter_cfg *cfg, const char *path) {
  if (cfg->exclude_regex && esp_regex_full(cfg->exclude_regex, path)) return true;
  for (int i = 0; i < cfg->n_exclude; i++)
    if (strcmp(path, cfg->exclude[i]) == 0 || suffix_match(path, cfg->exclude[i])) return true;
  return false;
}

/* layers_to_transform: the first number behind "<anything>.<name>." (or behind layers_pattern). */
static bool layer_allowed(const esp_adapter_cfg *cfg, const char *path) {
  if (cfg->n_layers == 0) return true;
  char pattern[512], number[32] = "";
  if (cfg->layers_pattern && cfg->layers_pattern[0])
    snprintf(pattern, sizeof pattern, "(?:^|.*?\\.)(?:%s)\\.(?P<idx>\\d+)\\.", cfg->layers_pattern);
  else
    snprintf(pattern, sizeof pattern, ".*?\\.[^.]*\\.(?P<idx>\\d+)\\.");
  if (!esp_regex_match(pattern, path, number, sizeof number)) return false;
  int layer = atoi(number);
  for (int i = 0; i < cfg->n_layers; i++)
    if (cfg->layers[i] == layer) return true;
  return false;
}

/* all-linear; for the kinds that attach to norms the default is every norm (ln_tuning), or every norm too (bitfit). */
static bool all_of_kind(const esp_adapter_cfg *cfg, const esp_site *s) {
  const esp_adapter_kind *kind = cfg->type ? esp_adapter_find(cfg->type) : NULL;
  if (kind && kind->site_kinds & 1u << ESP_SITE_NORM) return kind->site_kinds >> s->kind & 1;
  return s->kind == ESP_SITE_LINEAR;
}

bool esp_adapter_matches(const esp_adapter_cfg *cfg, const esp_site *s) {
  if (excluded(cfg, s->path) || esp_in_modules_to_save(cfg, s->path)) return false;
  if (esp_target_is_all_linear(cfg)) return all_of_kind(cfg, s) && !s->is_head && layer_allowed(cfg, s->path);
  if (cfg->target_regex) return esp_regex_full(cfg->target_regex, s->path);
  for (int i = 0; i < cfg->n_target; i++)
    if (strcmp(s->path, cfg->target[i]) == 0) return true; /* an exact name is not filtered by layer */
  for (int i = 0; i < cfg->n_target; i++)
    if (suffix_match(s->path, cfg->target[i])) return layer_allowed(cfg, s->path);
  return false;
}

double esp_pattern_value(const esp_pattern *list, int n, const char *path, double fallback) {
  for (int i = 0; i < n; i++) {
    char pattern[512];
    snprintf(pattern, sizeof pattern, "(.*\\.)?(?:%s)$", list[i].key);
    if (esp_regex_match(pattern, path, NULL, 0)) return list[i].value;
  }
  return fallback;
}

esp_status esp_target_check(const esp_adapter_cfg *cfg) {
  if (!cfg->target_regex && cfg->n_target == 0) return esp_fail(ESP_ERR_RECIPE, "adapter.target: names no module");
  if (cfg->target_regex && cfg->n_target)
    return esp_fail(ESP_ERR_RECIPE, "adapter.target: a list and a regular expression were both given");
  bool regex = cfg->target_regex && !esp_target_is_all_linear(cfg);
  if (regex) ESP_TRY(esp_regex_check("adapter.target", cfg->target_regex));
  if (regex && cfg->n_layers)
    return esp_fail(ESP_ERR_RECIPE, "adapter.layers: cannot be used where target is a regular expression");
  if (cfg->exclude_regex) ESP_TRY(esp_regex_check("adapter.exclude", cfg->exclude_regex));
  if (cfg->layers_pattern) {
    ESP_TRY(esp_regex_check("adapter.layers_pattern", cfg->layers_pattern));
    if (cfg->layers_pattern[0] && cfg->n_layers == 0)
      return esp_fail(ESP_ERR_RECIPE, "adapter.layers_pattern: has no meaning without layers");
  }
  for (int i = 0; i < cfg->n_rank_pattern; i++)
    ESP_TRY(esp_regex_check("adapter.rank_pattern", cfg->rank_pattern[i].key));
  for (int i = 0; i < cfg->n_alpha_pattern; i++)
    ESP_TRY(esp_regex_check("adapter.alpha_pattern", cfg->alpha_pattern[i].key));
  return ESP_OK;
}

static const char *kind_name(esp_site_kind k) {
  return k == ESP_SITE_LINEAR ? "linear" : k == ESP_SITE_EMBED ? "embedding" : "norm";
}

static esp_status no_match(const char *word, esp_site **sites, int n) {
  const char **leaves = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n + 1) * sizeof *leaves);
  if (!leaves) return ESP_ERR_MEMORY;
  for (int i = 0; i < n; i++) leaves[i] = sites[i]->leaf;
  const char *near = esp_closest(word, leaves, n);
  esp_status st = near ? esp_fail(ESP_ERR_RECIPE,
                                  "adapter.target: '%s' matches no module of the base (did you mean '%s'?)", word, near)
                       : esp_fail(ESP_ERR_RECIPE, "adapter.target: '%s' matches no module of the base", word);
  esp_mem_free(leaves);
  return st;
}

/* A listed name that matches nothing is a misspelling; so is a pattern key that reaches no targeted module. */
static esp_status check_names(esp_adapter *a, esp_site **sites, int n) {
  const esp_adapter_cfg *cfg = &a->cfg;
  if (!esp_target_is_all_linear(cfg)) {
    for (int t = 0; t < cfg->n_target; t++) {
      bool found = false;
      for (int i = 0; i < n && !found; i++) {
        found = strcmp(sites[i]->path, cfg->target[t]) == 0 || suffix_match(sites[i]->path, cfg->target[t]);
        if (found && esp_in_modules_to_save(cfg, sites[i]->path))
          return esp_fail(ESP_ERR_RECIPE, "adapter.target: '%s' is also in modules_to_save", sites[i]->path);
      }
      if (!found) return no_match(cfg->target[t], sites, n);
    }
  }
  for (int which = 0; which < 2; which++) {
    const esp_pattern *list = which ? cfg->alpha_pattern : cfg->rank_pattern;
    int n_list = which ? cfg->n_alpha_pattern : cfg->n_rank_pattern;
    for (int p = 0; p < n_list; p++) {
      bool found = false;
      for (int i = 0; i < n && !found; i++)
        found = a->targeted[i] && esp_pattern_value(&list[p], 1, sites[i]->path, -1.0) == list[p].value;
      if (!found)
        return esp_fail(ESP_ERR_RECIPE, "adapter.%s: '%s' matches no targeted module",
                        which ? "alpha_pattern" : "rank_pattern", list[p].key);
    }
  }
  return ESP_OK;
}

esp_status esp_target_resolve(esp_adapter *a, bool strict) {
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites), hits = 0;
  for (int i = 0; i < n; i++) {
    a->targeted[i] = esp_adapter_matches(&a->cfg, sites[i]);
    if (!a->targeted[i]) continue;
    hits++;
    if (!(a->kind->site_kinds & 1u << sites[i]->kind))
      return esp_fail(ESP_ERR_RECIPE, "adapter.target: %s is a %s, which %s cannot attach to", sites[i]->path,
                      kind_name(sites[i]->kind), a->kind->name);
  }
  if (strict) ESP_TRY(check_names(a, sites, n));
  if (hits == 0) {
    const char *what = a->cfg.target_regex ? a->cfg.target_regex : a->cfg.target[0];
    return esp_fail(ESP_ERR_RECIPE, "adapter.target: '%s' (exclude and layers applied) matches no module of the base",
                    what);
  }
  return ESP_OK;
}
