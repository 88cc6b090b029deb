/* pmss.c: PMSS, pretrained matrices skeleton selection: delta W = s C U R with C = W[:, J] [out, r] and R = W[I, :] [r,
 * in] frozen pieces of the weight itself and only U [r, r] trained from zero: a change of rank r for r^2 parameters, in
 * the column and row space of W. The CUR form is confirmed, the rule that picks I and J is not: `pivot` (default) takes
 * the column, then row, that is farthest from the span of those taken (pivoted Gram-Schmidt, which bounds the volume of
 * the skeleton), `norm` the longest, `uniform` random ones. The indices go into adapter_config.json, so that a file
 * keeps its meaning whatever a rule does later; C and R are read from the base again. The scale s = alpha / r is this
 * engine's. The step is in tucker.c. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/factors.h"
#include "adapters/tucker.h"
#include "core/linalg.h"
#include "core/rng.h"
#include "io/json.h"

typedef struct pmss_site {
  esp_tucker_site t; /* first: the step sees it */
  int32_t *rows, *cols;
} pmss_site;

typedef struct pmss_group {
  esp_tucker_group t;
  void *mem; /* R of all sites, then each C; backend memory, compute type */
} pmss_group;

static esp_status pmss_declare(esp_adapter *a, esp_group *g, const bool *hit) {
  esp_backend *be = esp_model_backend(a->model);
  esp_dtype type = esp_model_compute(a->model);
  int64_t unit = (int64_t)esp_dtype_size(type), bytes = 0;
  pmss_group *pg = esp_arena_alloc(a->arena, sizeof *pg);
  if (!pg) return ESP_ERR_MEMORY;
  esp_tucker_group *tg = &pg->t;
  for (int i = 0; i < g->n_sites; i++) {
    if (!hit[i]) continue;
    esp_site *s = g->sites[i];
    int64_t r = esp_factor_rank(a, s), most = s->out < s->in ? s->out : s->in;
    if (r > most)
      return esp_fail(ESP_ERR_RECIPE, "adapter.r: pmss takes at most %lld rows and columns of %s, %lld were asked for",
                      (long long)most, s->path, (long long)r);
    pmss_site *ps = esp_arena_alloc(a->arena, sizeof *ps);
    if (!ps) return ESP_ERR_MEMORY;
    ps->t = (esp_tucker_site){.r = r, .s = (float)esp_factor_scale(a, s, r), .a = -1, .b = -1, .t0 = tg->width};
    ps->rows = esp_arena_alloc(a->arena, (size_t)r * sizeof *ps->rows);
    ps->cols = esp_arena_alloc(a->arena, (size_t)r * sizeof *ps->cols);
    ps->t.core = esp_factor_add(a, s, "pmss_U", r, r);
    a->site_state[s->index] = ps; /* from here destroy frees what it holds */
    ps->t.host_a = esp_mem_alloc(ESP_MEM_PARAMS, (size_t)(r * s->in) * sizeof(float));
    ps->t.host_b = esp_mem_alloc(ESP_MEM_PARAMS, (size_t)(r * s->out) * sizeof(float));
    if (!ps->rows || !ps->cols || !ps->t.host_a || !ps->t.host_b || ps->t.core < 0) return ESP_ERR_MEMORY;
    tg->sites[tg->n++] = s;
    tg->width += r;
    bytes += esp_factor_round(s->out * r * unit);
  }
  tg->first_a = -1;
  a->group_state[g->index] = pg;
  int64_t at = esp_factor_round(tg->width * g->in * unit);
  pg->mem = be->ops->alloc(be, ESP_MEM_PARAMS, at + bytes);
  if (!pg->mem) return esp_backend_why_null(be);
  tg->frozen = esp_tensor_2d(pg->mem, type, tg->width, g->in);
  for (int i = 0; i < tg->n; i++) {
    esp_site *s = tg->sites[i];
    esp_tucker_site *ts = a->site_state[s->index];
    ts->frozen_a = esp_tensor_rows_view(&tg->frozen, ts->t0, ts->r);
    ts->frozen_b = esp_tensor_2d((char *)pg->mem + at, type, s->out, ts->r);
    at += esp_factor_round(s->out * ts->r * unit);
  }
  return ESP_OK;
}

/* ---- selection ---- */

static int by_index(const void *x, const void *y) {
  int32_t a = *(const int32_t *)x, b = *(const int32_t *)y;
  return (a > b) - (a < b);
}

/* r columns (or rows) of w [m, n], each the one farthest from the span of those before; project false: the longest. */
static esp_status farthest(const float *w, int64_t m, int64_t n, int64_t r, bool columns, bool project, int32_t *out) {
  int64_t count = columns ? n : m, len = columns ? m : n;
  double *left = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)count * sizeof *left); /* squared distance; taken: -1 */
  float *q = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(r * len) * sizeof *q);
  float *dots = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)count * sizeof *dots);
  esp_status st = left && q && dots ? ESP_OK : ESP_ERR_MEMORY;
  for (int64_t i = 0; i < m && st == ESP_OK; i++)
    for (int64_t j = 0; j < n; j++) left[columns ? j : i] += (double)w[i * n + j] * w[i * n + j];
  for (int64_t k = 0; k < r && st == ESP_OK; k++) {
    int64_t best = -1;
    for (int64_t c = 0; c < count; c++)
      if (left[c] >= 0 && (best < 0 || left[c] > left[best])) best = c;
    out[k] = (int32_t)best;
    left[best] = -1;
    if (!project) continue;
    float *v = q + k * len;
    double norm = 0;
    for (int64_t i = 0; i < len; i++) v[i] = columns ? w[i * n + best] : w[best * n + i];
    for (int64_t p = 0; p < k; p++) {
      double d = 0;
      for (int64_t i = 0; i < len; i++) d += (double)q[p * len + i] * v[i];
      for (int64_t i = 0; i < len; i++) v[i] -= (float)d * q[p * len + i];
    }
    for (int64_t i = 0; i < len; i++) norm += (double)v[i] * v[i];
    if (!(norm > 0)) continue; /* the span is full: the rest is equally far */
    for (int64_t i = 0; i < len; i++) v[i] = (float)(v[i] / sqrt(norm));
    esp_linalg_gemm(columns, false, count, 1, len, 1.0f, w, n, v, 1, 0.0f, dots, 1);
    for (int64_t c = 0; c < count; c++) {
      if (left[c] < 0) continue;
      left[c] -= (double)dots[c] * dots[c];
      if (left[c] < 0) left[c] = 0;
    }
  }
  esp_mem_free(left);
  esp_mem_free(q);
  esp_mem_free(dots);
  return st;
}

static esp_status choose(esp_adapter *a, const esp_site *s, const float *w, bool columns, int64_t r, int32_t *out) {
  const char *rule = a->cfg.pmss_select ? a->cfg.pmss_select : "pivot";
  if (strcmp(rule, "uniform") == 0) {
    int64_t count = columns ? s->in : s->out;
    int64_t *perm = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)count * sizeof *perm);
    if (!perm) return ESP_ERR_MEMORY;
    esp_rng_permutation(a->cfg.seed, esp_rng_stream_name(ESP_RNG_INIT, s->path) + columns, count, perm);
    for (int64_t k = 0; k < r; k++) out[k] = (int32_t)perm[k];
    esp_mem_free(perm);
  } else
    ESP_TRY(farthest(w, s->out, s->in, r, columns, strcmp(rule, "pivot") == 0, out));
  qsort(out, (size_t)r, sizeof *out, by_index);
  return ESP_OK;
}

static const esp_skeleton *stored(const esp_adapter_cfg *c, const char *path) {
  for (int i = 0; i < c->n_skeleton; i++)
    if (strcmp(c->skeleton[i].path, path) == 0) return &c->skeleton[i];
  return NULL;
}

static esp_status take_stored(const esp_skeleton *k, const esp_site *s, pmss_site *ps) {
  if (k->n != ps->t.r)
    return esp_fail(ESP_ERR_RECIPE, "skeleton of %s: %d rows and columns where the rank is %lld", s->path, k->n,
                    (long long)ps->t.r);
  for (int i = 0; i < k->n; i++) {
    if (k->rows[i] < 0 || k->rows[i] >= s->out || k->cols[i] < 0 || k->cols[i] >= s->in)
      return esp_fail(ESP_ERR_RECIPE, "skeleton of %s: row %d or column %d is outside [%lld, %lld]", s->path,
                      k->rows[i], k->cols[i], (long long)s->out, (long long)s->in);
    ps->rows[i] = k->rows[i];
    ps->cols[i] = k->cols[i];
  }
  return ESP_OK;
}

static esp_status put(esp_adapter *a, esp_tensor dst, const float *x) {
  esp_backend *be = a->params->be;
  void *staged = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)esp_tensor_bytes(&dst));
  if (!staged) return ESP_ERR_MEMORY;
  esp_convert(staged, dst.dtype, x, ESP_F32, esp_tensor_numel(&dst));
  be->ops->upload(be, dst.data, staged, esp_tensor_bytes(&dst));
  esp_mem_free(staged);
  return ESP_OK;
}

/* Runs for a loaded adapter too: U is then replaced by the file's. */
static esp_status pmss_init(esp_adapter *a, esp_site *s) {
  pmss_site *ps = a->site_state[s->index];
  int64_t r = ps->t.r;
  esp_status st = ESP_OK;
  float *w = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)(s->out * s->in) * sizeof *w);
  const esp_skeleton *k = stored(&a->cfg, s->path);
  if (!w) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  ESP_GOTO(esp_site_read_weight(a->model, s, w));
  if (k)
    ESP_GOTO(take_stored(k, s, ps));
  else {
    ESP_GOTO(choose(a, s, w, false, r, ps->rows));
    ESP_GOTO(choose(a, s, w, true, r, ps->cols));
  }
  for (int64_t i = 0; i < r; i++) memcpy(ps->t.host_a + i * s->in, w + ps->rows[i] * s->in, (size_t)s->in * sizeof *w);
  for (int64_t o = 0; o < s->out; o++)
    for (int64_t i = 0; i < r; i++) ps->t.host_b[o * r + i] = w[o * s->in + ps->cols[i]];
  ESP_GOTO(put(a, ps->t.frozen_a, ps->t.host_a));
  ESP_GOTO(put(a, ps->t.frozen_b, ps->t.host_b));
  st = esp_factor_constant(a, ps->t.core, 0.0f);
out:
  esp_mem_free(w);
  return st;
}

static void pmss_destroy(esp_adapter *a) {
  esp_backend *be = esp_model_backend(a->model);
  esp_site **sites;
  esp_group **groups;
  int n_sites = esp_model_sites(a->model, &sites), n_groups = esp_model_groups(a->model, &groups);
  for (int i = 0; i < n_sites; i++) {
    pmss_site *ps = a->site_state[i];
    if (ps) esp_mem_free(ps->t.host_a);
    if (ps) esp_mem_free(ps->t.host_b);
  }
  for (int i = 0; i < n_groups && a->group_state; i++) {
    pmss_group *pg = a->group_state[i];
    if (pg && pg->mem) be->ops->free(be, pg->mem);
  }
}

/* ---- configuration ---- */

static json_t *indices(const int32_t *list, int64_t n) {
  json_t *j = json_array();
  for (int64_t i = 0; i < n; i++) json_array_append_new(j, json_integer(list[i]));
  return j;
}

static void pmss_config_write(const esp_adapter *a, json_t *j) {
  esp_factor_config_write(a, j);
  json_object_set_new(j, "select", json_string(a->cfg.pmss_select ? a->cfg.pmss_select : "pivot"));
  json_t *all = json_object();
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites);
  for (int i = 0; i < n; i++) {
    const pmss_site *ps = a->targeted[i] ? a->site_state[i] : NULL;
    if (!ps) continue;
    json_t *one = json_object();
    json_object_set_new(one, "rows", indices(ps->rows, ps->t.r));
    json_object_set_new(one, "columns", indices(ps->cols, ps->t.r));
    json_object_set_new(all, sites[i]->path, one);
  }
  json_object_set_new(j, "skeleton", all);
}

static esp_status read_indices(const json_t *j, const char *path, const char *site, int n, int32_t *out) {
  for (int i = 0; i < n; i++) {
    const json_t *v = json_array_get(j, (size_t)i);
    if (!json_is_integer(v)) return esp_fail(ESP_ERR_DATA, "%s: skeleton of '%s' must hold integers", path, site);
    out[i] = (int32_t)json_integer_value(v);
  }
  return ESP_OK;
}

static esp_status pmss_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  const char *rule = "pivot", *site;
  json_t *all = json_object_get(j, "skeleton"), *one;
  ESP_TRY(esp_factor_config_read(j, path, arena, c));
  ESP_TRY(esp_json_str(j, "select", path, 0, &rule));
  c->pmss_select = esp_arena_strdup(arena, rule);
  if (!json_is_object(all)) return esp_fail(ESP_ERR_DATA, "%s: key 'skeleton' must be an object", path);
  esp_skeleton *list = esp_arena_alloc(arena, (json_object_size(all) + 1) * sizeof *list);
  if (!list || !c->pmss_select) return ESP_ERR_MEMORY;
  json_object_foreach(all, site, one) {
    const json_t *rows = json_object_get(one, "rows"), *cols = json_object_get(one, "columns");
    int n = (int)json_array_size(rows);
    if (n != (int)json_array_size(cols))
      return esp_fail(ESP_ERR_DATA, "%s: skeleton of '%s' needs as many rows as columns", path, site);
    int32_t *x = esp_arena_alloc(arena, (size_t)(2 * n + 1) * sizeof *x);
    const char *name = esp_arena_strdup(arena, site);
    if (!x || !name) return ESP_ERR_MEMORY;
    ESP_TRY(read_indices(rows, path, site, n, x));
    ESP_TRY(read_indices(cols, path, site, n, x + n));
    list[c->n_skeleton++] = (esp_skeleton){name, n, x, x + n};
  }
  c->skeleton = list;
  return ESP_OK;
}

static esp_status pmss_config_check(const esp_adapter_cfg *c) {
  const char *rule = c->pmss_select ? c->pmss_select : "pivot";
  if (strcmp(rule, "pivot") && strcmp(rule, "norm") && strcmp(rule, "uniform"))
    return esp_fail(ESP_ERR_RECIPE, "adapter.pmss_select: '%s' is not one of pivot, norm, uniform", rule);
  return esp_factor_check(c);
}

const esp_adapter_kind esp_kind_pmss = {
    .name = "pmss",
    .peft_type = "PMSS",
    .summary = "s C U R: rows and columns of the weight itself, frozen, and a small trained core between them",
    .site_kinds = 1u << ESP_SITE_LINEAR,
    .mergeable = true,
    .targets = true,
    .reads_base = true,
    .declare = pmss_declare,
    .init = pmss_init,
    .tails = esp_tucker_tails,
    .output = esp_tucker_output,
    .tails_bwd = esp_tucker_tails_bwd,
    .input_bwd = esp_tucker_input_bwd,
    .wants_output = esp_tucker_wants_output,
    .destroy = pmss_destroy,
    .config_write = pmss_config_write,
    .config_read = pmss_config_read,
    .config_check = pmss_config_check,
    .materialise = esp_tucker_materialise,
    .low_rank = esp_tucker_low_rank,
};
