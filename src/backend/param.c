/* param.c: the store of trained parameters, see param.h. */
#include "backend/param.h"

#include <string.h>

#define PAD 16

esp_status esp_params_create(esp_backend *be, esp_params **out) {
  *out = NULL;
  esp_params *ps = esp_mem_alloc(ESP_MEM_HOST, sizeof *ps);
  if (!ps) return ESP_ERR_MEMORY;
  ps->be = be;
  ps->arena = esp_arena_create(ESP_MEM_HOST);
  if (!ps->arena) {
    esp_mem_free(ps);
    return ESP_ERR_MEMORY;
  }
  *out = ps;
  return ESP_OK;
}

void esp_params_destroy(esp_params *ps) {
  if (!ps) return;
  esp_backend *be = ps->be;
  if (ps->shadow && ps->shadow != (void *)ps->master) be->ops->free(be, ps->shadow);
  if (ps->grad) be->ops->free(be, ps->grad);
  if (ps->master) be->ops->free(be, ps->master);
  esp_mem_free(ps->list);
  esp_arena_destroy(ps->arena);
  esp_mem_free(ps);
}

int esp_params_add(esp_params *ps, const char *name, int ndim, const int64_t *shape, bool pad) {
  if (ps->master) {
    esp_fail(ESP_ERR_INTERNAL, "parameter '%s' added to a finished store", name);
    return -1;
  }
  if (ps->count == ps->cap) {
    int cap = ps->cap ? 2 * ps->cap : 64;
    esp_param *list = esp_mem_realloc(ESP_MEM_HOST, ps->list, (size_t)cap * sizeof *list);
    if (!list) return -1;
    ps->list = list;
    ps->cap = cap;
  }
  esp_param *p = &ps->list[ps->count];
  *p = (esp_param){.ndim = ndim, .numel = 1, .decay = true, .pad = pad};
  for (int i = 0; i < ESP_MAX_DIMS; i++) p->shape[i] = i < ndim ? shape[i] : 1;
  for (int i = 0; i < ndim; i++) p->numel *= shape[i];
  p->name = esp_arena_strdup(ps->arena, name);
  if (!p->name) return -1;
  p->offset = pad ? (ps->total + PAD - 1) / PAD * PAD : ps->total;
  ps->total = p->offset + p->numel;
  return ps->count++;
}

esp_status esp_params_finalize(esp_params *ps, esp_dtype shadow, bool with_grad) {
  esp_backend *be = ps->be;
  if (esp_backend_counts(be)) ps->total += ps->reserve;
  ps->total = (ps->total + PAD - 1) / PAD * PAD;
  ps->shadow_dtype = shadow;
  ps->master = be->ops->alloc(be, ESP_MEM_PARAMS, ps->total * 4);
  if (!ps->master) return esp_backend_why_null(be);
  if (with_grad) {
    ps->grad = be->ops->alloc(be, ESP_MEM_PARAMS, ps->total * 4);
    if (!ps->grad) return esp_backend_why_null(be);
  }
  if (shadow == ESP_F32) {
    ps->shadow = ps->master;
    return ESP_OK;
  }
  ps->shadow = be->ops->alloc(be, ESP_MEM_PARAMS, ps->total * (int64_t)esp_dtype_size(shadow));
  return ps->shadow ? ESP_OK : esp_backend_why_null(be);
}

static void *shadow_at(const esp_params *ps, int64_t offset) {
  return (char *)ps->shadow + (size_t)offset * esp_dtype_size(ps->shadow_dtype);
}

static void refresh(esp_params *ps, int64_t offset, int64_t n) {
  if (ps->shadow == (void *)ps->master || n == 0) return;
  ps->be->ops->axpby(ps->be, esp_tensor_1d(shadow_at(ps, offset), ps->shadow_dtype, n), 1.0f,
                     esp_tensor_1d(ps->master + offset, ESP_F32, n), 0.0f);
}

void esp_params_set(esp_params *ps, int index, const float *host) {
  const esp_param *p = &ps->list[index];
  ps->writes++;
  ps->be->ops->upload(ps->be, ps->master + p->offset, host, p->numel * 4);
  refresh(ps, p->offset, p->numel);
}

void esp_params_get(const esp_params *ps, int index, float *host) {
  const esp_param *p = &ps->list[index];
  ps->be->ops->download(ps->be, host, ps->master + p->offset, p->numel * 4);
}

void esp_params_refresh_shadow(esp_params *ps) {
  ps->writes++;
  refresh(ps, 0, ps->total);
}

void esp_params_span(const esp_params *ps, int64_t *from, int64_t *to) {
  *from = ps->total;
  *to = 0;
  for (int i = 0; i < ps->count; i++) {
    const esp_param *p = &ps->list[i];
    if (p->frozen) continue;
    if (p->offset < *from) *from = p->offset / PAD * PAD;
    if (p->offset + p->numel > *to) *to = p->offset + p->numel;
  }
  if (*from > *to) *from = *to;
}

void esp_params_zero_grad(esp_params *ps) {
  int64_t from, to;
  if (!ps->grad) return;
  esp_params_span(ps, &from, &to);
  bool same = from == ps->cleared_from && to == ps->cleared_to;
  ps->be->ops->zero(ps->be, same ? ps->grad + from : ps->grad, (same ? to - from : ps->total) * 4);
  ps->cleared_from = from;
  ps->cleared_to = to;
}

esp_status esp_params_follow(esp_params *ps, float **at, esp_mem_kind kind) {
  if (ps->n_follow == (int)(sizeof ps->follow / sizeof ps->follow[0]))
    return esp_fail(ESP_ERR_INTERNAL, "too many buffers follow the parameters");
  *at = ps->be->ops->alloc(ps->be, kind, ps->total * 4);
  if (!*at) return esp_backend_why_null(ps->be);
  ps->follow[ps->n_follow] = at;
  ps->follow_kind[ps->n_follow++] = kind;
  return ESP_OK;
}

void esp_params_leave(esp_params *ps, float **at) {
  if (*at) ps->be->ops->free(ps->be, *at);
  *at = NULL;
  for (int i = 0; i < ps->n_follow; i++) {
    if (ps->follow[i] != at) continue;
    ps->n_follow--;
    memmove(&ps->follow[i], &ps->follow[i + 1], (size_t)(ps->n_follow - i) * sizeof ps->follow[0]);
    memmove(&ps->follow_kind[i], &ps->follow_kind[i + 1], (size_t)(ps->n_follow - i) * sizeof ps->follow_kind[0]);
    return;
  }
}

int esp_params_find(const esp_params *ps, const char *name) {
  for (int i = 0; i < ps->count; i++)
    if (!strcmp(ps->list[i].name, name)) return i;
  return -1;
}

static esp_tensor view(const esp_params *ps, int64_t offset, int64_t rows, int64_t cols, int which) {
  if (which == 0) return esp_tensor_2d(shadow_at(ps, offset), ps->shadow_dtype, rows, cols);
  return esp_tensor_2d((which == 1 ? ps->master : ps->grad) + offset, ESP_F32, rows, cols);
}

static esp_tensor view_one(const esp_params *ps, int index, int which) {
  const esp_param *p = &ps->list[index];
  int64_t cols = p->ndim ? p->shape[p->ndim - 1] : 1;
  return view(ps, p->offset, cols ? p->numel / cols : 0, cols, which);
}

esp_tensor esp_param_shadow(const esp_params *ps, int index) {
  return view_one(ps, index, 0);
}
esp_tensor esp_param_master(const esp_params *ps, int index) {
  return view_one(ps, index, 1);
}
esp_tensor esp_param_grad(const esp_params *ps, int index) {
  return view_one(ps, index, 2);
}

esp_tensor esp_params_stacked(const esp_params *ps, int first, int n, int which) {
  const esp_param *p = &ps->list[first], *last = &ps->list[first + n - 1];
  int64_t cols = p->shape[p->ndim - 1], end = last->offset + last->numel;
  return view(ps, p->offset, (end - p->offset) / cols, cols, which);
}
