/* lotr.c: LoTR, low tensor rank adaptation (Bershatsky et al. 2024, arXiv:2402.01376): the changes of one kind of
 * module (all q_proj, say) over the layers are one tensor of low Tucker-2 rank, delta W_layer = s B G_layer A,  s =
 * alpha / r, with A [r, in] and B [out, r] shared by the layers and a core G [r, r] of each layer: (in + out) r + L r^2
 * parameters where LoRA has L (in + out) r. The paper leaves the start to be zero; here A is uniform as LoRA's, B = 0
 * and every G = I, so that the first step is that of a LoRA whose factors are shared. Modules share when their paths
 * differ in the number of the block only and their shapes are equal. The step is in tucker.c. */
#include <stdio.h>
#include <string.h>

#include "adapters/factors.h"
#include "adapters/tucker.h"
#include "io/json.h"

typedef struct shared { /* one kind of module */
  struct shared *next;
  const char *path; /* with "shared" in the place of the block's number */
  const esp_site *first;
  int64_t r;
  int a, b;
} shared;

/* "model.layers.3.self_attn.q_proj" as "model.layers.shared.self_attn.q_proj"; modules outside the blocks as they are.
 */
static void shared_path(const esp_site *s, char *out, size_t size) {
  char number[32];
  snprintf(number, sizeof number, ".%d.", s->layer);
  const char *at = s->layer < 0 ? NULL : strstr(s->path, number);
  if (at)
    snprintf(out, size, "%.*s.shared.%s", (int)(at - s->path), s->path, at + strlen(number));
  else
    snprintf(out, size, "%s", s->path);
}

static shared *find(const esp_adapter *a, const esp_site *s) {
  char path[512];
  shared_path(s, path, sizeof path);
  for (shared *h = a->impl; h; h = h->next)
    if (strcmp(h->path, path) == 0 && h->first->out == s->out && h->first->in == s->in) return h;
  return NULL;
}

static esp_status new_shared(esp_adapter *a, const esp_site *s, bool pad, shared **out) {
  char path[512], name[600];
  shared_path(s, path, sizeof path);
  for (const shared *h = a->impl; h; h = h->next) /* another shape under this name: factors of its own */
    if (strcmp(h->path, path) == 0) snprintf(path, sizeof path, "%s", s->path);
  shared *h = *out = esp_arena_alloc(a->arena, sizeof *h);
  if (!h || !(h->path = esp_arena_strdup(a->arena, path))) return ESP_ERR_MEMORY;
  h->first = s;
  h->r = esp_factor_rank(a, s);
  h->b = -1;
  snprintf(name, sizeof name, ESP_PEFT_PREFIX "%s.lotr_A", path);
  h->a = esp_params_add(a->params, name, 2, (int64_t[]){h->r, s->in}, pad);
  h->next = a->impl;
  a->impl = h;
  return h->a < 0 ? ESP_ERR_MEMORY : ESP_OK;
}

static esp_status lotr_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  esp_tucker_group *tg = esp_arena_alloc(a->arena, sizeof *tg);
  shared *of[3] = {NULL, NULL, NULL};
  bool fresh = false, joint = true;
  if (!tg) return ESP_ERR_MEMORY;
  for (int i = 0; i < g->n_sites; i++) {
    if (!hit[i]) continue;
    esp_site *s = g->sites[i];
    esp_tucker_site *ts = esp_arena_alloc(a->arena, sizeof *ts);
    if (!ts) return ESP_ERR_MEMORY;
    shared *h = find(a, s);
    if (!h) {
      ESP_TRY(new_shared(a, s, !fresh, &h));
      fresh = true;
    }
    *ts = (esp_tucker_site){
        .r = h->r, .s = (float)esp_factor_scale(a, s, h->r), .core = -1, .a = h->a, .b = -1, .t0 = tg->width};
    if (esp_factor_rank(a, s) != h->r)
      return esp_fail(ESP_ERR_RECIPE, "adapter.rank_pattern: %s shares its factors with %s and needs the same rank",
                      s->path, h->first->path);
    joint &= tg->n == 0 || h->a == of[tg->n - 1]->a + 1;
    of[tg->n] = h;
    tg->sites[tg->n++] = s;
    tg->width += h->r;
    a->site_state[s->index] = ts;
  }
  tg->first_a = joint ? of[0]->a : -1;
  for (int i = 0; i < tg->n; i++) {
    esp_site *s = tg->sites[i];
    esp_tucker_site *ts = a->site_state[s->index];
    char name[600];
    snprintf(name, sizeof name, ESP_PEFT_PREFIX "%s.lotr_B", of[i]->path);
    if (of[i]->b < 0) of[i]->b = esp_params_add(a->params, name, 2, (int64_t[]){s->out, ts->r}, true);
    ts->b = of[i]->b;
    ts->core = esp_factor_add(a, s, "lotr_G", ts->r, ts->r);
    if (ts->b < 0 || ts->core < 0) return ESP_ERR_MEMORY;
  }
  a->group_state[g->index] = tg;
  return ESP_OK;
}

static esp_status lotr_init(esp_adapter *a, esp_site *s) {
  const esp_tucker_site *ts = a->site_state[s->index];
  shared *h = find(a, s);
  if (h && h->first == s) {
    ESP_TRY(esp_factor_uniform(a, ts->a, s->in));
    ESP_TRY(esp_factor_constant(a, ts->b, 0.0f));
  }
  float *core = esp_mem_alloc(ESP_MEM_HOST, (size_t)(ts->r * ts->r) * sizeof *core); /* zeroed */
  if (!core) return ESP_ERR_MEMORY;
  for (int64_t k = 0; k < ts->r; k++) core[k * ts->r + k] = 1.0f;
  esp_params_set(a->params, ts->core, core);
  esp_mem_free(core);
  return ESP_OK;
}

const esp_adapter_kind esp_kind_lotr = {
    .name = "lotr",
    .peft_type = "LOTR",
    .summary = "s B G A with A and B shared by the layers, a core G in each (Bershatsky et al. 2024, arXiv:2402.01376)",
    .site_kinds = 1u << ESP_SITE_LINEAR,
    .mergeable = true,
    .targets = true,
    .declare = lotr_declare,
    .init = lotr_init,
    .tails = esp_tucker_tails,
    .output = esp_tucker_output,
    .tails_bwd = esp_tucker_tails_bwd,
    .input_bwd = esp_tucker_input_bwd,
    .wants_output = esp_tucker_wants_output,
    .config_write = esp_factor_config_write,
    .config_read = esp_factor_config_read,
    .config_check = esp_factor_check,
    .materialise = esp_tucker_materialise,
    .low_rank = esp_tucker_low_rank,
};
