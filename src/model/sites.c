/* sites.c: the modules of a model, with the paths that Hugging Face gives them, and the groups of linears that read
 * one input. One naming table per layout; the description says which modules exist. */
#include <stdio.h>
#include <string.h>

#include "model/internal.h"

/* Module names inside a block; NULL where a layout has none. */
typedef struct layout {
  const char *base; /* prefix of a causal LM; files saved from the bare model lack it */
  const char *embed, *positions, *blocks, *final_norm, *head;
  const char *norm1, *q, *k, *v, *qkv, *q_norm, *k_norm, *o, *norm2, *gate, *up, *down;
} layout;

static const layout llama_layout = {
    .base = "model.",
    .embed = "embed_tokens",
    .blocks = "layers",
    .final_norm = "norm",
    .head = "lm_head",
    .norm1 = "input_layernorm",
    .q = "self_attn.q_proj",
    .k = "self_attn.k_proj",
    .v = "self_attn.v_proj",
    .q_norm = "self_attn.q_norm",
    .k_norm = "self_attn.k_norm",
    .o = "self_attn.o_proj",
    .norm2 = "post_attention_layernorm",
    .gate = "mlp.gate_proj",
    .up = "mlp.up_proj",
    .down = "mlp.down_proj",
};
static const layout gpt2_layout = {
    .base = "transformer.",
    .embed = "wte",
    .positions = "wpe",
    .blocks = "h",
    .final_norm = "ln_f",
    .head = "lm_head",
    .norm1 = "ln_1",
    .qkv = "attn.c_attn",
    .o = "attn.c_proj",
    .norm2 = "ln_2",
    .up = "mlp.c_fc",
    .down = "mlp.c_proj",
};

typedef struct builder {
  esp_model *m;
  const layout *l;
  bool stripped; /* keys of the file lack the base prefix */
  esp_status st;
} builder;

/* "<path>.<suffix>" as the file has it. */
static const char *tensor_key(builder *b, const char *path, const char *suffix) {
  size_t n = strlen(b->l->base);
  if (b->stripped && !strncmp(path, b->l->base, n)) path += n;
  return esp_arena_printf(b->m->arena, "%s.%s", path, suffix);
}

static esp_site *add_site(builder *b, esp_site_kind kind, int layer, const char *name, int64_t out, int64_t in,
                          bool bias) {
  esp_model *m = b->m;
  esp_site *s = esp_arena_alloc(m->arena, sizeof *s);
  if (!s) {
    b->st = ESP_ERR_MEMORY;
    return NULL;
  }
  if (layer >= 0)
    s->path = esp_arena_printf(m->arena, "%s%s.%d.%s", b->l->base, b->l->blocks, layer, name);
  else
    s->path = esp_arena_printf(m->arena, "%s%s", name == b->l->head ? "" : b->l->base, name);
  if (!s->path) {
    b->st = ESP_ERR_MEMORY;
    return NULL;
  }
  const char *dot = strrchr(s->path, '.');
  s->leaf = dot ? dot + 1 : s->path;
  s->kind = kind;
  s->layer = layer;
  s->out = out;
  s->in = in;
  s->trained_weight = s->trained_bias = -1;
  s->tensor = tensor_key(b, s->path, "weight");
  s->bias_tensor = bias ? tensor_key(b, s->path, "bias") : NULL;
  if (!s->tensor || (bias && !s->bias_tensor)) {
    b->st = ESP_ERR_MEMORY;
    return NULL;
  }
  s->index = m->n_sites;
  m->sites[m->n_sites++] = s;
  if (!esp_map_put(m->by_path, s->path, strlen(s->path), s)) b->st = ESP_ERR_MEMORY;
  return s;
}

static esp_site *add_linear(builder *b, esp_group *g, int layer, const char *name, int64_t out, int64_t in, bool bias) {
  esp_site *s = add_site(b, ESP_SITE_LINEAR, layer, name, out, in, bias);
  if (!s || !g) return s;
  s->transposed = b->m->d.transposed && layer >= 0;
  s->group = g;
  s->col0 = g->out;
  g->sites[g->n_sites++] = s;
  g->out += out;
  g->in = in;
  return s;
}

static esp_group *add_group(builder *b, int layer) {
  esp_model *m = b->m;
  esp_group *g = esp_arena_alloc(m->arena, sizeof *g);
  if (!g) {
    b->st = ESP_ERR_MEMORY;
    return NULL;
  }
  g->layer = layer;
  g->index = m->n_groups;
  m->groups[m->n_groups++] = g;
  return g;
}

static void add_block(builder *b, int layer) {
  esp_model *m = b->m;
  const esp_model_desc *d = &m->d;
  const layout *l = b->l;
  esp_block *k = &m->blocks[layer];
  int64_t q = (int64_t)d->heads * d->head_dim, kv = (int64_t)d->kv_heads * d->head_dim;
  k->norm1 = add_site(b, ESP_SITE_NORM, layer, l->norm1, d->hidden, 1, d->norm_bias);
  k->qkv = add_group(b, layer);
  if (d->fused_qkv) {
    add_linear(b, k->qkv, layer, l->qkv, q + 2 * kv, d->hidden, d->qkv_bias);
  } else {
    add_linear(b, k->qkv, layer, l->q, q, d->hidden, d->qkv_bias);
    add_linear(b, k->qkv, layer, l->k, kv, d->hidden, d->qkv_bias);
    add_linear(b, k->qkv, layer, l->v, kv, d->hidden, d->qkv_bias);
  }
  if (d->qk_norm == ESP_QKNORM_HEAD) {
    k->q_norm = add_site(b, ESP_SITE_NORM, layer, l->q_norm, d->head_dim, 1, false);
    k->k_norm = add_site(b, ESP_SITE_NORM, layer, l->k_norm, d->head_dim, 1, false);
  }
  k->o = add_group(b, layer);
  add_linear(b, k->o, layer, l->o, d->hidden, q, d->o_bias);
  k->norm2 = add_site(b, ESP_SITE_NORM, layer, l->norm2, d->hidden, 1, d->norm_bias);
  k->up = add_group(b, layer);
  if (d->gated) add_linear(b, k->up, layer, l->gate, d->ffn, d->hidden, d->mlp_bias);
  add_linear(b, k->up, layer, l->up, d->ffn, d->hidden, d->mlp_bias);
  k->down = add_group(b, layer);
  add_linear(b, k->down, layer, l->down, d->hidden, d->ffn, d->mlp_bias);
}

esp_status esp_sites_build(esp_model *m) {
  const esp_model_desc *d = &m->d;
  builder b = {.m = m, .l = !strcmp(d->family, "gpt2") ? &gpt2_layout : &llama_layout};
  size_t max_sites = (size_t)d->layers * 11 + 4, max_groups = (size_t)d->layers * 4 + 1;
  m->sites = esp_arena_alloc(m->arena, max_sites * sizeof *m->sites);
  m->groups = esp_arena_alloc(m->arena, max_groups * sizeof *m->groups);
  m->blocks = esp_arena_alloc(m->arena, (size_t)d->layers * sizeof *m->blocks);
  m->saved = esp_arena_alloc(m->arena, (size_t)d->layers * sizeof *m->saved);
  m->by_path = esp_map_create(max_sites);
  if (!m->sites || !m->groups || !m->blocks || !m->saved || !m->by_path) return ESP_ERR_MEMORY;
  if (m->st) {
    char full[128];
    snprintf(full, sizeof full, "%s%s.weight", b.l->base, b.l->final_norm);
    b.stripped = !esp_st_find(m->st, full) && esp_st_find(m->st, full + strlen(b.l->base));
  }

  m->embed = add_site(&b, ESP_SITE_EMBED, -1, b.l->embed, d->hidden, d->vocab, false);
  if (d->pos == ESP_POS_LEARNED)
    m->positions = add_site(&b, ESP_SITE_EMBED, -1, b.l->positions, d->hidden, d->max_positions, false);
  for (int i = 0; i < d->layers && b.st == ESP_OK; i++) add_block(&b, i);
  m->final_norm = add_site(&b, ESP_SITE_NORM, -1, b.l->final_norm, d->hidden, 1, d->norm_bias);
  m->head = add_group(&b, -1);
  esp_site *head = add_linear(&b, m->head, -1, b.l->head, d->vocab, d->hidden, d->head_bias);
  if (b.st != ESP_OK) return b.st;
  head->is_head = true;
  if (d->tied) {
    /* One stored tensor; which of the two names it has depends on who wrote the file. */
    if (m->st && !esp_st_find(m->st, m->embed->tensor) && esp_st_find(m->st, head->tensor))
      m->embed->tensor = head->tensor;
    else
      head->tensor = m->embed->tensor;
  }
  m->ss = esp_arena_alloc(m->arena, (size_t)m->n_sites * sizeof *m->ss);
  m->gs = esp_arena_alloc(m->arena, (size_t)m->n_groups * sizeof *m->gs);
  m->slots = esp_arena_alloc(m->arena, (size_t)(m->n_groups + m->n_sites) * sizeof *m->slots);
  return m->ss && m->gs && m->slots ? ESP_OK : ESP_ERR_MEMORY;
}
