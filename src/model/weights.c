/* weights.c: the frozen weights in memory: packed operands behind borrow and return, norms in fp32, embedding tables
 * in place in the mapped file where the backend reads host memory. Each thing is loaded when it is first needed frozen,
 * so that an adapter which brings its own copy of a module never costs the original as well. */
#include <string.h>

#include "model/internal.h"

/* ---- the resident provider: packed once, borrowed for nothing ---- */

static esp_status resident_borrow(esp_weight *w, esp_backend *be, esp_wview *out) {
  *out = (esp_wview){.out = w->out, .in = w->in, .packed = w->impl};
  return ESP_OK;
}
static void resident_give_back(esp_weight *w, esp_backend *be, esp_wview *view) {
  view->packed = NULL;
}
static void resident_destroy(esp_weight *w, esp_backend *be) {
  be->ops->pack_free(be, w->impl);
  w->impl = NULL;
  w->ops = NULL;
}
static const esp_weight_ops resident_ops = {resident_borrow, resident_give_back, resident_destroy};

/* The tensor that `pack` reads: the file's own bytes when they can be used as they are, else an fp32 copy in *temp
 * (fresh weights, a rewritten base, fp64 or unaligned storage). */
static esp_status operand(const esp_model *m, const esp_site *s, bool as_fp32, esp_tensor *out, float **temp) {
  const esp_site_state *ss = &m->ss[s->index];
  const esp_st_entry *e = ss->weight;
  bool transposed = s->transposed && !as_fp32;
  esp_dtype stored = e ? e->dtype : m->d.stored;
  *out = esp_tensor_2d(NULL, as_fp32 ? ESP_F32 : stored, transposed ? s->in : s->out, transposed ? s->out : s->in);
  bool counts = esp_backend_counts(m->be);
  if (!as_fp32) {
    if (counts) return ESP_OK;
    ESP_TRY(esp_check_finite(e));
    out->data = (void *)e->data;
    return ESP_OK;
  }
  if (e && !counts) ESP_TRY(esp_check_finite(e));
  size_t n = (size_t)(s->out * s->in);
  *temp = esp_mem_alloc(ESP_MEM_HOST, n * sizeof(float));
  if (!*temp) return ESP_ERR_MEMORY;
  if (counts) return ESP_OK;
  ESP_TRY(esp_read_rows(m, s, 0, s->out, *temp));
  if (ss->delta)
    for (size_t i = 0; i < n; i++) (*temp)[i] += ss->delta[i];
  out->data = *temp;
  return ESP_OK;
}

static bool needs_fp32(const esp_model *m, const esp_site *s) {
  const esp_site_state *ss = &m->ss[s->index];
  const esp_st_entry *e = ss->weight;
  if (ss->delta || !m->st || !e) return true;
  return e->dtype == ESP_F64 || (uintptr_t)e->data % esp_dtype_size(e->dtype) != 0;
}

bool esp_model_streams(const esp_model *m) {
  return m->stream != NULL;
}

/* The operand on the backend, or in host memory behind the stream. */
static esp_status place(esp_model *m, const esp_tensor *t, int n, bool transposed, esp_weight *w) {
  esp_backend *be = m->be;
  if (!m->opt.offload_base) {
    w->impl = be->ops->pack(be, t, n, transposed, m->opt.compute);
    if (!w->impl) return esp_backend_why_null(be);
    w->ops = &resident_ops;
    return ESP_OK;
  }
  if (!be->ops->pack_host)
    return esp_fail(ESP_ERR_RECIPE, "memory.offload_base: needs a GPU; the cpu computes in host memory already");
  if (!m->stream) ESP_TRY(esp_stream_create(&m->stream));
  void *host = be->ops->pack_host(be, t, n, transposed, m->opt.compute);
  if (!host) return esp_backend_why_null(be);
  esp_status st = esp_stream_add(m->stream, be, host, w, m->opt.compute);
  if (st != ESP_OK) be->ops->host_free(be, host);
  return st;
}

/* ---- the same rows unpacked: an adapter that makes its own weight from blocks of the frozen one ---- */

static esp_status dense_borrow(esp_weight *w, esp_backend *be, esp_wview *out) {
  *out = (esp_wview){.out = w->out, .in = w->in, .dense = *(const esp_tensor *)w->impl};
  return ESP_OK;
}
static void dense_give_back(esp_weight *w, esp_backend *be, esp_wview *view) {
  view->dense.data = NULL;
}
static void dense_destroy(esp_weight *w, esp_backend *be) {
  be->ops->free(be, ((esp_tensor *)w->impl)->data);
  esp_mem_free(w->impl);
  w->impl = NULL;
  w->ops = NULL;
}
static const esp_weight_ops dense_ops = {dense_borrow, dense_give_back, dense_destroy};

static esp_status dense_site(esp_model *m, const esp_site *s, esp_weight *w) {
  esp_status st = ESP_OK;
  const esp_site_state *ss = &m->ss[s->index];
  esp_backend *be = m->be;
  bool counting = esp_backend_counts(be);
  const int64_t step = 256; /* rows at a time */
  int64_t width = s->in * (int64_t)esp_dtype_size(m->opt.compute);
  float *rows = NULL;
  void *conv = NULL, *data = NULL;
  esp_tensor *t = NULL;
  if (m->opt.offload_base)
    return esp_fail(ESP_ERR_RECIPE, "memory.offload_base: the adapter on %s reads the base's weight in its steps",
                    s->path);
  t = esp_mem_alloc(ESP_MEM_HOST, sizeof *t);
  rows = esp_mem_alloc(ESP_MEM_HOST, (size_t)(step * s->in) * sizeof *rows);
  conv = esp_mem_alloc(ESP_MEM_HOST, (size_t)(step * width));
  st = t && rows && conv ? ESP_OK : ESP_ERR_MEMORY;
  if (st) goto out;
  data = be->ops->alloc(be, ESP_MEM_WEIGHTS, s->out * width);
  st = data ? ESP_OK : esp_backend_why_null(be);
  if (st) goto out;
  if (ss->weight && !counting) ESP_GOTO(esp_check_finite(ss->weight));
  for (int64_t r = 0; r < s->out && !counting; r += step) {
    int64_t k = s->out - r < step ? s->out - r : step;
    ESP_GOTO(esp_read_rows(m, s, r, k, rows));
    for (int64_t i = 0; ss->delta && i < k * s->in; i++) rows[i] += ss->delta[r * s->in + i];
    esp_convert(conv, m->opt.compute, rows, ESP_F32, k * s->in);
    be->ops->upload(be, (char *)data + r * width, conv, k * width);
  }
  if (ss->weight && !counting) esp_st_drop(ss->weight);
  *t = esp_tensor_2d(data, m->opt.compute, s->out, s->in);
  *w = (esp_weight){.ops = &dense_ops, .impl = t, .out = s->out, .in = s->in};
  m->loads++;
  data = t = NULL;
out:
  if (data) be->ops->free(be, data);
  esp_mem_free(t);
  esp_mem_free(rows);
  esp_mem_free(conv);
  return st;
}

static esp_status pack_sites(esp_model *m, esp_site **sites, int n, esp_weight *w) {
  esp_status st = ESP_OK;
  esp_tensor t[3];
  float *temp[3] = {NULL, NULL, NULL};
  bool as_fp32 = false;
  w->out = 0;
  for (int i = 0; i < n; i++) {
    w->out += sites[i]->out;
    w->in = sites[i]->in;
    as_fp32 = as_fp32 || needs_fp32(m, sites[i]);
  }
  for (int i = 0; i < n; i++) ESP_GOTO(operand(m, sites[i], as_fp32, &t[i], &temp[i]));
  ESP_GOTO(place(m, t, n, sites[0]->transposed && !as_fp32, w));
  m->loads++;
  for (int i = 0; i < n; i++) {
    esp_site_state *ss = &m->ss[sites[i]->index];
    esp_mem_free(ss->delta); /* it is in the operand now */
    ss->delta = NULL;
    if (ss->weight && !esp_backend_counts(m->be)) esp_st_drop(ss->weight);
  }
out:
  for (int i = 0; i < n; i++) esp_mem_free(temp[i]);
  return st;
}

static bool trained_weight(const esp_site *s) {
  return s->trained && s->trained_weight >= 0;
}
static bool trained_bias(const esp_site *s) {
  return s->trained && s->trained_bias >= 0;
}

static esp_status load_bias(esp_model *m, esp_group *g) {
  bool any = false;
  for (int i = 0; i < g->n_sites; i++) any = any || g->sites[i]->bias_tensor || trained_bias(g->sites[i]);
  if (!any || g->bias.data) return ESP_OK;
  float *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)g->out * sizeof *host);
  if (!host) return ESP_ERR_MEMORY;
  esp_status st = ESP_OK;
  for (int i = 0; i < g->n_sites && !esp_backend_counts(m->be); i++) {
    const esp_site *s = g->sites[i];
    if (!s->bias_tensor) continue;
    if (m->ss[s->index].bias) ESP_GOTO(esp_check_finite(m->ss[s->index].bias));
    ESP_GOTO(esp_site_read_bias(m, s, host + s->col0));
  }
  void *data = m->be->ops->alloc(m->be, ESP_MEM_WEIGHTS, g->out * 4);
  if (!data) {
    st = esp_backend_why_null(m->be);
    goto out;
  }
  m->be->ops->upload(m->be, data, host, g->out * 4);
  m->loads++;
  g->bias = esp_tensor_1d(data, ESP_F32, g->out);
out:
  esp_mem_free(host);
  return st;
}

/* Trained side by side in one store: the gap-free run of the stacked view. */
static bool can_stack(const esp_group *g) {
  const esp_params *ps = g->sites[0]->trained;
  int first = g->sites[0]->trained_weight;
  int64_t end = ps->list[first].offset;
  for (int i = 0; i < g->n_sites; i++) {
    const esp_site *s = g->sites[i];
    if (s->trained != ps || s->trained_weight != first + i || ps->list[first + i].offset != end) return false;
    end += ps->list[first + i].numel;
  }
  return true;
}

/* Who is trained may change between passes (adapters are switched on and off): the mode is settled before each pass,
 * and what is missing is loaded then. */
static esp_status settle_group(esp_model *m, esp_group *g) {
  esp_group_state *gs = &m->gs[g->index];
  int trained = 0;
  unsigned bias = 0;
  bool own = false;
  gs->trains = false;
  for (int i = 0; i < g->n_sites; i++) {
    const esp_site *s = g->sites[i];
    trained += trained_weight(s);
    own = own || s->product != ESP_PRODUCT_BASE;
    bias |= (unsigned)trained_bias(s) << i;
    gs->trains |= esp_site_trained(s);
  }
  unsigned left = gs->bias_trained & ~bias;
  gs->bias_trained = bias;
  if (left && g->bias.data) { /* the stacked copy holds values that were trained: back to the stored ones */
    m->be->ops->free(m->be, g->bias.data);
    g->bias = (esp_tensor){0};
  }
  ESP_TRY(load_bias(m, g));
  if (trained == 0 && !own) {
    gs->mode = ESP_GROUP_PACKED;
    if (!g->weight.ops) ESP_TRY(pack_sites(m, g->sites, g->n_sites, &g->weight));
  } else if (trained == g->n_sites && !own && can_stack(g)) {
    gs->mode = ESP_GROUP_STACKED;
  } else {
    gs->mode = ESP_GROUP_SPLIT;
    for (int i = 0; i < g->n_sites; i++) {
      esp_site *s = g->sites[i];
      bool dense = s->product == ESP_PRODUCT_OWN_DENSE;
      if (dense && !gs->site_dense[i].ops) ESP_TRY(dense_site(m, s, &gs->site_dense[i]));
      if (!dense && !trained_weight(s) && !gs->site_weight[i].ops)
        ESP_TRY(pack_sites(m, &g->sites[i], 1, &gs->site_weight[i]));
    }
  }
  return ESP_OK;
}

static esp_status upload_fp32(esp_model *m, const float *host, int64_t n, esp_tensor *out) {
  void *data = m->be->ops->alloc(m->be, ESP_MEM_WEIGHTS, n * 4);
  if (!data) return esp_backend_why_null(m->be);
  m->be->ops->upload(m->be, data, host, n * 4);
  m->loads++;
  *out = esp_tensor_1d(data, ESP_F32, n);
  return ESP_OK;
}

static esp_status load_norm(esp_model *m, esp_site *s) {
  esp_status st = ESP_OK;
  esp_site_state *ss = &m->ss[s->index];
  float *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)s->out * sizeof *host);
  if (!host) return ESP_ERR_MEMORY;
  bool read = !esp_backend_counts(m->be);
  if (read && ss->weight) ESP_GOTO(esp_check_finite(ss->weight));
  if (read) ESP_GOTO(esp_site_read_weight(m, s, host));
  ESP_GOTO(upload_fp32(m, host, s->out, &ss->w));
  if (s->bias_tensor) {
    if (read && ss->bias) ESP_GOTO(esp_check_finite(ss->bias));
    if (read) ESP_GOTO(esp_site_read_bias(m, s, host));
    ESP_GOTO(upload_fp32(m, host, s->out, &ss->b));
  }
  ss->loaded = true;
out:
  esp_mem_free(host);
  return st;
}

static esp_status load_table(esp_model *m, esp_site *s) {
  esp_site_state *ss = &m->ss[s->index];
  const esp_st_entry *e = ss->weight;
  bool counting = esp_backend_counts(m->be);
  bool in_place = e && esp_backend_on_host(m->be) && e->dtype != ESP_F64 &&
                  (counting || (uintptr_t)e->data % esp_dtype_size(e->dtype) == 0);
  if (in_place) {
    if (!counting) {
      ESP_TRY(esp_check_finite(e));
      esp_st_drop(e); /* the check has read all of it; from here only used rows come back */
    }
    ss->w = esp_tensor_2d(counting ? NULL : (void *)e->data, e->dtype, s->in, s->out);
    ss->loaded = true;
    return ESP_OK;
  }
  /* Held in the compute type: fresh tables and storage that cannot be read in place. */
  esp_dtype t = e && e->dtype == ESP_F16 ? ESP_F16 : m->opt.compute;
  int64_t n = s->in * s->out;
  if (e && !counting) ESP_TRY(esp_check_finite(e));
  void *data = m->be->ops->alloc(m->be, ESP_MEM_WEIGHTS, n * (int64_t)esp_dtype_size(t));
  if (!data) return esp_backend_why_null(m->be);
  ss->w = esp_tensor_2d(data, t, s->in, s->out);
  ss->w_owned = ss->loaded = true;
  m->loads++;
  if (counting) return ESP_OK;
  esp_status st = ESP_OK;
  const int64_t step = 1024; /* rows at a time */
  float *rows = esp_mem_alloc(ESP_MEM_HOST, (size_t)(step * s->out) * sizeof *rows);
  void *conv = esp_mem_alloc(ESP_MEM_HOST, (size_t)(step * s->out) * esp_dtype_size(t));
  if (!rows || !conv) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  for (int64_t r = 0; r < s->in; r += step) {
    int64_t k = s->in - r < step ? s->in - r : step;
    ESP_GOTO(esp_read_rows(m, s, r, k, rows));
    esp_convert(conv, t, rows, ESP_F32, k * s->out);
    int64_t row_bytes = s->out * (int64_t)esp_dtype_size(t);
    m->be->ops->upload(m->be, (char *)data + r * row_bytes, conv, k * row_bytes);
  }
out:
  esp_mem_free(rows);
  esp_mem_free(conv);
  return st;
}

/* A tied model whose file holds both names must hold one tensor under both. */
static esp_status check_tied(const esp_model *m) {
  if (!m->d.tied || !m->st || esp_backend_counts(m->be)) return ESP_OK;
  const esp_st_entry *a = m->ss[m->embed->index].weight, *b = esp_st_find(m->st, "lm_head.weight");
  if (!b || a == b) return ESP_OK;
  if (a->dtype != b->dtype || a->bytes != b->bytes || memcmp(a->data, b->data, (size_t)a->bytes) != 0)
    return esp_model_refuse("%s: config.json says tie_word_embeddings, but 'lm_head.weight' differs from '%s'", b->file,
                            a->name);
  esp_st_drop(b);
  return ESP_OK;
}

esp_status esp_model_load_weights(esp_model *m) {
  uint64_t before = m->loads;
  if (!m->loaded) ESP_TRY(check_tied(m));
  for (int i = 0; i < m->n_sites; i++) {
    esp_site *s = m->sites[i];
    if (m->ss[i].loaded || s->kind == ESP_SITE_LINEAR) continue;
    if (s->kind == ESP_SITE_EMBED && !trained_weight(s)) ESP_TRY(load_table(m, s));
    bool norm_needed = !trained_weight(s) || (s->bias_tensor && !trained_bias(s));
    if (s->kind == ESP_SITE_NORM && norm_needed) ESP_TRY(load_norm(m, s));
  }
  for (int i = 0; i < m->n_groups; i++) ESP_TRY(settle_group(m, m->groups[i]));
  m->loaded = true;
  return m->loads == before ? ESP_OK : esp_backend_sync(m->be);
}

void esp_weights_release(esp_model *m) {
  for (int i = 0; i < m->n_groups; i++) {
    esp_group *g = m->groups[i];
    if (g->weight.ops) g->weight.ops->destroy(&g->weight, m->be);
    for (int k = 0; m->gs && k < 3; k++) {
      esp_weight *packed = &m->gs[i].site_weight[k], *dense = &m->gs[i].site_dense[k];
      if (packed->ops) packed->ops->destroy(packed, m->be);
      if (dense->ops) dense->ops->destroy(dense, m->be);
    }
    if (g->bias.data) m->be->ops->free(m->be, g->bias.data);
  }
  esp_stream_destroy(m->stream, m->be);
  m->stream = NULL;
  for (int i = 0; m->ss && i < m->n_sites; i++) {
    esp_site_state *ss = &m->ss[i];
    bool norm = m->sites[i]->kind == ESP_SITE_NORM;
    if ((norm || ss->w_owned) && ss->w.data) m->be->ops->free(m->be, ss->w.data);
    if (ss->b.data) m->be->ops->free(m->be, ss->b.data);
    esp_mem_free(ss->delta);
  }
}

esp_status esp_site_add_delta(esp_model *m, esp_site *s, const float *delta) {
  if (s->kind != ESP_SITE_LINEAR)
    return esp_fail(ESP_ERR_INTERNAL, "%s: only a linear's base can be rewritten", s->path);
  if (m->loaded) return esp_fail(ESP_ERR_INTERNAL, "%s: the base is already packed", s->path);
  esp_site_state *ss = &m->ss[s->index];
  size_t n = (size_t)(s->out * s->in);
  if (!ss->delta) {
    ss->delta = esp_mem_alloc(ESP_MEM_HOST, n * sizeof(float));
    if (!ss->delta) return ESP_ERR_MEMORY;
  }
  for (size_t i = 0; i < n && !esp_backend_counts(m->be); i++) ss->delta[i] += delta[i];
  return ESP_OK;
}
