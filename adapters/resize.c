/* resize.c: ranks that change in the middle of a run. Every flat buffer that belongs to the parameters (masters, the
 * optimizer's state, a kind's statistics) is laid out anew by one declared mapping of rows or columns.
 *
 * The optimizer is not known here: its state follows the parameters through the store (esp_params_follow), as a kind's
 * own statistics do. Buffers are replaced one after the other, gradients first, which hold nothing between two steps:
 * so no moment needs more memory than the larger of the two layouts, and what ranks leave is given back. */
#include <string.h>

#include "adapters/internal.h"
#include "io/json.h"

enum { ALIGN = 16 }; /* elements, as the store pads */

typedef struct layout { /* where parameters lie after the change */
  esp_param *list;
  const esp_resize **change; /* per parameter; NULL: stays as it is */
  int64_t total, largest;    /* elements; of one parameter, before or after */
} layout;

static void layout_deinit(layout *l) {
  esp_mem_free(l->list);
  esp_mem_free(l->change);
}

static esp_status layout_init(const esp_params *ps, const esp_resize *list, int n, layout *l) {
  *l = (layout){.largest = 1};
  l->list = esp_mem_alloc(ESP_MEM_HOST, (size_t)(ps->count + 1) * sizeof *l->list);
  l->change = esp_mem_alloc(ESP_MEM_HOST, (size_t)(ps->count + 1) * sizeof *l->change);
  if (!l->list || !l->change) return ESP_ERR_MEMORY;
  for (int i = 0; i < n; i++) {
    const esp_param *p = &ps->list[list[i].param];
    if (l->change[list[i].param] || p->ndim != 2 || list[i].axis < 0 || list[i].axis > 1 || list[i].n < 0)
      return esp_fail(ESP_ERR_INTERNAL, "'%s' cannot be resized like that", p->name);
    for (int64_t k = 0; list[i].from && k < list[i].n; k++)
      if (list[i].from[k] >= p->shape[list[i].axis])
        return esp_fail(ESP_ERR_INTERNAL, "'%s': the mapping leaves the parameter", p->name);
    l->change[list[i].param] = &list[i];
  }
  for (int i = 0; i < ps->count; i++) {
    esp_param *p = &l->list[i];
    *p = ps->list[i];
    if (p->numel > l->largest) l->largest = p->numel;
    if (l->change[i]) p->shape[l->change[i]->axis] = l->change[i]->n;
    p->numel = 1;
    for (int d = 0; d < p->ndim; d++) p->numel *= p->shape[d];
    p->offset = p->pad ? (l->total + ALIGN - 1) / ALIGN * ALIGN : l->total;
    l->total = p->offset + p->numel;
    if (p->numel > l->largest) l->largest = p->numel;
  }
  l->total = (l->total + ALIGN - 1) / ALIGN * ALIGN;
  return ESP_OK;
}

/* new[.., i, ..] = old[.., from[i], ..] */
static void remap(const esp_param *p, const esp_param *q, const esp_resize *c, const float *x, float *y) {
  memset(y, 0, (size_t)q->numel * sizeof *y);
  if (!c->from) return;
  int64_t old_cols = p->shape[1], cols = q->shape[1];
  if (c->axis == 0) {
    for (int64_t i = 0; i < c->n; i++)
      if (c->from[i] >= 0) memcpy(y + i * cols, x + c->from[i] * cols, (size_t)cols * sizeof *y);
    return;
  }
  for (int64_t r = 0; r < q->shape[0]; r++)
    for (int64_t i = 0; i < c->n; i++)
      if (c->from[i] >= 0) y[r * cols + i] = x[r * old_cols + c->from[i]];
}

static esp_status move(esp_params *ps, const layout *l, float **at, esp_mem_kind kind, float *host) {
  const esp_backend_ops *ops = ps->be->ops;
  float *to = ops->alloc(ps->be, kind, l->total * 4), *was = *at;
  if (!to) return esp_backend_why_null(ps->be);
  for (int i = 0; i < ps->count; i++) {
    const esp_param *p = &ps->list[i], *q = &l->list[i];
    if (!l->change[i]) {
      if (p->numel)
        ops->axpby(ps->be, esp_tensor_1d(to + q->offset, ESP_F32, p->numel), 1.0f,
                   esp_tensor_1d(was + p->offset, ESP_F32, p->numel), 0.0f);
      continue;
    }
    if (p->numel) ops->download(ps->be, host, was + p->offset, p->numel * 4);
    remap(p, q, l->change[i], host, host + l->largest);
    if (q->numel) ops->upload(ps->be, to + q->offset, host + l->largest, q->numel * 4);
  }
  *at = to;
  esp_status st = esp_backend_sync(ps->be);
  ops->free(ps->be, was);
  return st;
}

esp_status esp_adapter_resize(esp_adapter *a, const esp_resize *list, int n) {
  esp_params *ps = a->params;
  const esp_backend_ops *ops = ps->be->ops;
  bool own_shadow = ps->shadow != (void *)ps->master, with_grad = ps->grad != NULL;
  layout l;
  esp_status st = layout_init(ps, list, n, &l);
  float *host = st == ESP_OK ? esp_mem_alloc(ESP_MEM_HOST, (size_t)(2 * l.largest) * sizeof *host) : NULL;
  if (st == ESP_OK && !host) st = ESP_ERR_MEMORY;
  if (st) goto out;
  ESP_GOTO(esp_backend_sync(ps->be));
  if (with_grad) ops->free(ps->be, ps->grad);
  ps->grad = NULL;
  if (own_shadow) ops->free(ps->be, ps->shadow);
  ps->shadow = NULL;
  ESP_GOTO(move(ps, &l, &ps->master, ESP_MEM_PARAMS, host));
  for (int i = 0; i < ps->n_follow; i++) ESP_GOTO(move(ps, &l, ps->follow[i], ps->follow_kind[i], host));
  if (with_grad) {
    ps->grad = ops->alloc(ps->be, ESP_MEM_PARAMS, l.total * 4);
    if (!ps->grad) ESP_GOTO(esp_backend_why_null(ps->be));
  }
  memcpy(ps->list, l.list, (size_t)ps->count * sizeof *ps->list);
  ps->total = l.total;
  ps->cleared_to = 0; /* the new gradients are not cleared */
  ps->shadow = ps->master;
  if (own_shadow) {
    ps->shadow = ops->alloc(ps->be, ESP_MEM_PARAMS, l.total * (int64_t)esp_dtype_size(ps->shadow_dtype));
    if (!ps->shadow) ESP_GOTO(esp_backend_why_null(ps->be));
    esp_params_refresh_shadow(ps);
  }
  a->revision++;
  if (a->kind->resized) a->kind->resized(a);
  st = esp_backend_sync(ps->be);
out:
  esp_mem_free(host);
  layout_deinit(&l);
  return st;
}

/* ---- what a checkpoint holds of it ---- */

bool esp_adapter_has_state(const esp_adapter *a) {
  return a->kind->resized || a->kind->state_write;
}

struct json_t *esp_adapter_state_json(const esp_adapter *a) {
  json_t *shapes = json_array(), *own = json_object();
  for (int i = 0; i < a->params->count; i++) {
    json_t *shape = json_array();
    for (int d = 0; d < a->params->list[i].ndim; d++)
      json_array_append_new(shape, json_integer((json_int_t)a->params->list[i].shape[d]));
    json_array_append_new(shapes, shape);
  }
  if (own && a->kind->state_write) a->kind->state_write(a, own);
  return json_pack("{s:o,s:o}", "shapes", shapes, "kind", own);
}

esp_status esp_adapter_state_restore(esp_adapter *a, const struct json_t *j, const char *path) {
  const json_t *shapes = json_object_get(j, "shapes");
  const esp_params *ps = a->params;
  esp_status st = ESP_OK;
  if ((int)json_array_size(shapes) != ps->count)
    return esp_fail(ESP_ERR_DATA, "%s: %d parameters, this run has %d", path, (int)json_array_size(shapes), ps->count);
  esp_resize *list = esp_mem_alloc(ESP_MEM_HOST, (size_t)(ps->count + 1) * sizeof *list);
  if (!list) return ESP_ERR_MEMORY;
  int n = 0;
  for (int i = 0; i < ps->count; i++) {
    const json_t *shape = json_array_get(shapes, (size_t)i);
    const esp_param *p = &ps->list[i];
    int other = 0;
    for (int d = 0; d < p->ndim; d++) {
      int64_t size = json_integer_value(json_array_get(shape, (size_t)d));
      if (size == p->shape[d]) continue;
      list[n] = (esp_resize){i, d, size, NULL};
      other++;
    }
    if ((int)json_array_size(shape) != p->ndim || other > 1 || (other && !a->kind->resized))
      ESP_GOTO(esp_fail(ESP_ERR_DATA, "%s: the shape of '%s' does not fit this run", path, p->name));
    n += other;
  }
  if (n) ESP_GOTO(esp_adapter_resize(a, list, n));
  if (a->kind->state_read) st = a->kind->state_read(a, json_object_get(j, "kind"), path);
out:
  esp_mem_free(list);
  return st;
}
