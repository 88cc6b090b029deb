#include "merge/merge.h"

#include <string.h>

#include "merge/sites.h"
#include "merge/write.h"

typedef struct merger {
  const esp_merge_spec *spec;
  esp_merge_inputs in;
  esp_st *file; /* NULL: the base has no weights yet (trained from its config alone) */
  esp_site_map sites;
  esp_site *untied_head; /* a head that no longer equals the embedding */
  esp_out_model out;
} merger;

static bool changes(const merger *g, const esp_site *s, bool bias) {
  for (int i = 0; i < g->spec->n_adapters; i++)
    if (bias ? esp_adapter_changes_bias(g->in.adapters[i], s) : esp_adapter_changes(g->in.adapters[i], s)) return true;
  return false;
}

static esp_status rows(void *ctx, const esp_out_tensor *t, int64_t r0, int64_t n, float *base, float *made) {
  merger *g = ctx;
  esp_site *s = t->site;
  bool bias = s->bias_tensor && strcmp(t->name, s->bias_tensor) == 0;
  int64_t cols = esp_out_cols(t);
  if (t->stored && !bias)
    esp_stored_rows(t->stored, r0, n, cols, base);
  else
    ESP_TRY(esp_site_read_stored(g->in.model, s, bias, r0, n, base));
  memcpy(made, base, (size_t)(n * cols) * 4);
  return esp_adapters_stored_rows(g->in.adapters, g->spec->n_adapters, s, bias, r0, n, made);
}

/* A tied head that an adapter changes on its own, or leaves as it is where it changes the embedding, has to be written
 * apart. */
static void find_untied_head(merger *g) {
  esp_site **list;
  int n = esp_model_sites(g->in.model, &list);
  if (!esp_model_describe(g->in.model)->tied) return;
  for (int i = 0; i < n; i++)
    if (list[i]->is_head && esp_adapters_untie(g->in.adapters, g->spec->n_adapters, list[i], g->in.model))
      g->untied_head = list[i];
}

static void add(esp_out_model *m, esp_site *s, const char *name, bool bias, esp_dtype dtype, const char *shard) {
  esp_out_tensor *t = &m->list[m->n++];
  *t = (esp_out_tensor){.name = name, .shard = shard, .dtype = dtype, .changed = true, .site = s};
  t->ndim = bias || s->kind == ESP_SITE_NORM ? 1 : 2;
  t->shape[0] = t->ndim == 1 ? s->out : s->kind == ESP_SITE_EMBED ? s->in : s->out;
  t->shape[1] = s->kind == ESP_SITE_EMBED ? s->out : s->in;
  if (t->ndim == 2 && s->transposed) {
    t->shape[0] = s->in;
    t->shape[1] = s->out;
    t->whole = true;
  }
}

/* The head gets a tensor of its own. A file that holds the shared one under the head's name keeps it under the other.
 */
static void untie(merger *g, esp_dtype stored) {
  esp_out_model *m = &g->out;
  esp_out_tensor *head = NULL, *embed = NULL;
  for (int i = 0; i < m->n; i++) {
    if (strcmp(m->list[i].name, "lm_head.weight") == 0) head = &m->list[i];
    if (strcmp(m->list[i].name, g->sites.tied) == 0) embed = &m->list[i];
  }
  if (head && embed) {
    head->site = g->untied_head;
    head->changed = true;
    return;
  }
  if (head) head->name = g->sites.tied;
  add(m, g->untied_head, "lm_head.weight", false, stored, m->list[m->n - 1].shard);
}

/* What becomes of every tensor. A base that never had weights: everything comes from its sites. */
static esp_status plan(merger *g) {
  esp_out_model *m = &g->out;
  esp_dtype stored = esp_out_dtype_of(m->dtype, esp_model_describe(g->in.model)->stored);
  ESP_TRY(esp_site_map_init(&g->sites, g->in.model));
  find_untied_head(g);
  m->untied = g->untied_head != NULL;
  if (!g->file) {
    esp_site **list;
    int n = esp_model_sites(g->in.model, &list);
    m->list = esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * n + 1) * sizeof *m->list);
    if (!m->list) return ESP_ERR_MEMORY;
    for (int i = 0; i < n; i++) {
      if (list[i]->is_head && esp_model_describe(g->in.model)->tied && list[i] != g->untied_head) continue;
      const char *name = list[i] == g->untied_head ? "lm_head.weight" : list[i]->tensor;
      add(m, list[i], name, false, stored, "model.safetensors");
      if (list[i]->bias_tensor) add(m, list[i], list[i]->bias_tensor, true, stored, "model.safetensors");
    }
    return ESP_OK;
  }
  ESP_TRY(esp_out_list(g->file, m->dtype, 1, &m->list, &m->n));
  for (int i = 0; i < m->n; i++) {
    esp_out_tensor *t = &m->list[i];
    esp_site *s = esp_site_map_weight(&g->sites, t->name), *b = esp_site_map_bias(&g->sites, t->name);
    t->site = s ? s : b;
    t->changed = (s && changes(g, s, false)) || (b && changes(g, b, true));
    t->whole = s && s->transposed;
  }
  if (g->untied_head) untie(g, stored);
  return ESP_OK;
}

esp_status esp_merge_write(const esp_merge_spec *spec, esp_merge_stats *out) {
  esp_status st;
  merger g = {.spec = spec, .out = {.base = spec->base, .out = spec->out, .rows = rows}};
  g.out.ctx = &g;
  ESP_TRY(esp_out_dtype(spec->dtype, &g.out.dtype));
  ESP_GOTO(esp_merge_open(spec, ESP_F32, false, &g.in));
  for (int i = 0; i < spec->n_adapters; i++)
    if (!g.in.adapters[i]->kind->mergeable) {
      const esp_adapter_kind *kind = g.in.adapters[i]->kind;
      st = esp_fail(ESP_ERR_RECIPE, "%s: an adapter of type %s cannot be merged%s", spec->adapters[i], kind->name,
                    kind->near_low_rank ? ": what it adds depends on the input; `export --as lora` writes the nearest "
                                          "plain LoRA and its error"
                                        : "");
      goto out;
    }
  ESP_GOTO(esp_adapters_check(g.in.model, g.in.adapters, spec->n_adapters));
  if (g.in.has_weights) ESP_GOTO(esp_st_open(spec->base, &g.file));
  ESP_GOTO(plan(&g));
  st = esp_out_write(&g.out, out);
out:
  esp_mem_free(g.out.list);
  esp_st_close(g.file);
  esp_site_map_deinit(&g.sites);
  esp_merge_close(&g.in);
  return st;
}
