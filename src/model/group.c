/* group.c: the linear sites that read one input. The base product is one matmul over the stacked operand wherever the
 * sites are all frozen or all trained side by side; hooks of the adapters are called around it in a fixed order and in
 * the mirrored order on the way back. */
#include <string.h>

#include "model/internal.h"

static bool weight_trained(const esp_site *s) {
  return s->trained && s->trained_weight >= 0;
}
static bool bias_trained(const esp_site *s) {
  return s->trained && s->trained_bias >= 0;
}

/* The trained weights of all sites as one [out, in] tensor. which: 0 shadow, 2 gradient. */
static esp_tensor stacked(const esp_group *g, int which) {
  const esp_site *s = g->sites[0];
  if (g->n_sites == 1)
    return which == 0 ? esp_param_shadow(s->trained, s->trained_weight) : esp_param_grad(s->trained, s->trained_weight);
  return esp_params_stacked(s->trained, s->trained_weight, g->n_sites, which);
}

/* Biases that are trained live in the store; the stacked copy that the product reads is refreshed before use. */
static void refresh_bias(esp_run *run, esp_group *g) {
  for (int i = 0; i < g->n_sites; i++) {
    const esp_site *s = g->sites[i];
    if (!bias_trained(s)) continue;
    esp_tensor dst = esp_tensor_2d((float *)g->bias.data + s->col0, ESP_F32, 1, s->out);
    esp_tensor src = esp_tensor_2d(esp_param_master(s->trained, s->trained_bias).data, ESP_F32, 1, s->out);
    run->be->ops->axpby(run->be, dst, 1.0f, src, 0.0f);
  }
}

static esp_tensor site_bias(const esp_group *g, const esp_site *s) {
  esp_tensor none = {0};
  if (!g->bias.data) return none;
  return esp_tensor_1d((float *)g->bias.data + s->col0, ESP_F32, s->out);
}

static bool borrow(esp_run *run, esp_weight *w, esp_wview *v) {
  esp_status st = w->ops->borrow(w, run->be, v);
  if (st != ESP_OK && run->be->sticky == ESP_OK) run->be->sticky = st;
  return st == ESP_OK;
}

static esp_weight *site_weight(esp_group_state *gs, const esp_site *s, int i) {
  return s->product == ESP_PRODUCT_OWN_DENSE ? &gs->site_dense[i] : &gs->site_weight[i];
}

static esp_wview dense_view(esp_tensor w, int64_t out, int64_t in) {
  esp_wview v = {.out = out, .in = in, .dense = w};
  v.dense.ndim = 2;
  v.dense.shape[0] = out;
  v.dense.shape[1] = in;
  v.dense.ld = in;
  return v;
}

/* What the adapters have added to the weight itself; x: the product's input, or dy. */
static void add_to(esp_run *run, esp_group *g, esp_tensor x, esp_wview *v, esp_added *list) {
  const esp_adapter_hooks *h = run->model->hooks;
  if (!h || !h->added || !run->be->ops->linear_adds) return;
  v->n_added = h->added(h->ctx, run, g, x, v, list, ESP_MAX_ADDED);
  v->added = list;
}

/* plain: without bias and without the sites' own products. */
static void product(esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, const esp_tail *tails, int n, bool plain) {
  const esp_adapter_hooks *h = run->model->hooks;
  esp_tensor none = {0}, all = plain ? none : g->bias;
  esp_backend *be = run->be;
  esp_group_state *gs = &run->model->gs[g->index];
  esp_added added[ESP_MAX_ADDED];
  esp_wview v;
  if (gs->bias_trained && !plain) refresh_bias(run, g);
  switch (gs->mode) {
  case ESP_GROUP_PACKED:
    if (!borrow(run, &g->weight, &v)) return;
    if (!plain) add_to(run, g, x, &v, added);
    be->ops->linear(be, y, x, &v, all, tails, n, 0.0f);
    g->weight.ops->give_back(&g->weight, be, &v);
    break;
  case ESP_GROUP_STACKED:
    v = dense_view(stacked(g, 0), g->out, g->in);
    be->ops->linear(be, y, x, &v, all, tails, n, 0.0f);
    break;
  case ESP_GROUP_SPLIT:
    for (int i = 0; i < g->n_sites; i++) {
      esp_site *s = g->sites[i];
      esp_tensor ys = esp_tensor_cols_view(&y, s->col0, s->out), bias = plain ? none : site_bias(g, s);
      esp_weight *w = site_weight(gs, s, i);
      if (weight_trained(s)) {
        v = dense_view(esp_param_shadow(s->trained, s->trained_weight), s->out, s->in);
        be->ops->linear(be, ys, x, &v, bias, NULL, 0, 0.0f);
      } else {
        if (!borrow(run, w, &v)) return;
        if (s->product != ESP_PRODUCT_BASE && !plain)
          h->site_forward(h->ctx, run, s, &v, bias, x, ys);
        else
          be->ops->linear(be, ys, x, &v, bias, NULL, 0, 0.0f);
        w->ops->give_back(w, be, &v);
      }
    }
    /* a tail's columns may span several products here, so tails are added on their own */
    for (int i = 0; i < n; i++) {
      esp_tensor yt = esp_tensor_cols_view(&y, tails[i].col0, esp_tensor_rows(&tails[i].w));
      be->ops->matmul(be, yt, tails[i].x, false, tails[i].w, true, 1.0f, 1.0f);
    }
    break;
  }
}

/* The sites that make their own product, on the way back; dx.data NULL: gradients only. */
static bool own_backward(esp_run *run, esp_group *g, int i, esp_tensor x, esp_tensor dys, esp_tensor dx) {
  const esp_adapter_hooks *h = run->model->hooks;
  esp_site *s = g->sites[i];
  esp_weight *w = site_weight(&run->model->gs[g->index], s, i);
  esp_wview v;
  if (!borrow(run, w, &v)) return false;
  h->site_backward(h->ctx, run, s, &v, x, dys, dx, i == 0 ? 0.0f : 1.0f);
  w->ops->give_back(w, run->be, &v);
  return true;
}

/* x.data NULL: the plain product. */
static void product_dx(esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tensor dx, const esp_tail *tails,
                       int n) {
  esp_backend *be = run->be;
  esp_group_state *gs = &run->model->gs[g->index];
  esp_added added[ESP_MAX_ADDED];
  esp_wview v;
  switch (gs->mode) {
  case ESP_GROUP_PACKED:
    if (!borrow(run, &g->weight, &v)) return;
    if (x.data) add_to(run, g, dy, &v, added);
    be->ops->linear_dx(be, dx, dy, &v, tails, n, 0.0f);
    g->weight.ops->give_back(&g->weight, be, &v);
    break;
  case ESP_GROUP_STACKED:
    v = dense_view(stacked(g, 0), g->out, g->in);
    be->ops->linear_dx(be, dx, dy, &v, tails, n, 0.0f);
    break;
  case ESP_GROUP_SPLIT:
    for (int i = 0; i < g->n_sites; i++) {
      esp_site *s = g->sites[i];
      esp_tensor dys = esp_tensor_cols_view(&dy, s->col0, s->out);
      const esp_tail *t = i == 0 ? tails : NULL; /* they add to dx, whichever product carries them */
      int nt = i == 0 ? n : 0;
      esp_weight *w = site_weight(gs, s, i);
      if (s->product != ESP_PRODUCT_BASE && x.data) {
        if (!own_backward(run, g, i, x, dys, dx)) return;
        for (int k = 0; k < nt; k++) be->ops->matmul(be, dx, t[k].x, false, t[k].w, false, 1.0f, 1.0f);
      } else if (weight_trained(s)) {
        v = dense_view(esp_param_shadow(s->trained, s->trained_weight), s->out, s->in);
        be->ops->linear_dx(be, dx, dys, &v, t, nt, i == 0 ? 0.0f : 1.0f);
      } else {
        if (!borrow(run, w, &v)) return;
        be->ops->linear_dx(be, dx, dys, &v, t, nt, i == 0 ? 0.0f : 1.0f);
        w->ops->give_back(w, be, &v);
      }
    }
    break;
  }
}

void esp_group_forward(esp_run *run, esp_group *g, esp_tensor x, esp_tensor y, bool keep_only) {
  const esp_adapter_hooks *h = run->model->hooks;
  void **slot = &run->model->slots[g->index];
  esp_tail tails[ESP_MAX_TAILS];
  int n = 0;
  *slot = NULL;
  if (h && h->input) h->input(h->ctx, run, g, &x, slot);
  if (h && h->tails) n = h->tails(h->ctx, run, g, x, tails, ESP_MAX_TAILS, slot);
  if (keep_only && !(h && h->output)) return;
  product(run, g, x, y, tails, n, false);
  if (h && h->output) h->output(h->ctx, run, g, x, y, slot);
  if (run->model->look && !run->train) run->model->look(run->model->look_ctx, run, g, x, y);
}

/* dW += dy^T x and db += column sums of dy, in fp32, for the sites that are trained in full. */
static void trained_grads(esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy) {
  esp_backend *be = run->be;
  esp_group_state *gs = &run->model->gs[g->index];
  if (!gs->trains) return;
  if (gs->mode == ESP_GROUP_STACKED && esp_site_trained(g->sites[0]))
    be->ops->matmul(be, stacked(g, 2), dy, true, x, false, 1.0f, 1.0f);
  for (int i = 0; i < g->n_sites; i++) {
    esp_site *s = g->sites[i];
    if (!esp_site_trained(s)) continue;
    esp_tensor dys = esp_tensor_cols_view(&dy, s->col0, s->out);
    if (gs->mode == ESP_GROUP_SPLIT && weight_trained(s))
      be->ops->matmul(be, esp_param_grad(s->trained, s->trained_weight), dys, true, x, false, 1.0f, 1.0f);
    if (bias_trained(s)) be->ops->col_sum(be, esp_param_grad(s->trained, s->trained_bias).data, dys);
  }
}

void esp_group_backward(esp_run *run, esp_group *g, esp_tensor x, esp_tensor dy, esp_tensor dx) {
  const esp_adapter_hooks *h = run->model->hooks;
  void **slot = &run->model->slots[g->index];
  esp_tail tails[ESP_MAX_TAILS];
  int n = 0;
  if (h && h->output_bwd) h->output_bwd(h->ctx, run, g, x, dy, slot);
  trained_grads(run, g, x, dy);
  if (h && h->tails_bwd) n = h->tails_bwd(h->ctx, run, g, x, dy, tails, ESP_MAX_TAILS, slot);
  if (!dx.data) { /* the lowest trained block: products that are the adapter's own still have gradients */
    for (int i = 0; i < g->n_sites; i++) {
      esp_site *s = g->sites[i];
      if (s->product == ESP_PRODUCT_BASE) continue;
      if (!own_backward(run, g, i, x, esp_tensor_cols_view(&dy, s->col0, s->out), dx)) return;
    }
    return;
  }
  product_dx(run, g, x, dy, dx, tails, n);
  if (h && h->input_bwd) h->input_bwd(h->ctx, run, g, dx, slot);
}

void esp_group_apply(esp_run *run, esp_group *g, esp_tensor x, esp_tensor y) {
  product(run, g, x, y, NULL, 0, true);
}

void esp_group_apply_dx(esp_run *run, esp_group *g, esp_tensor dy, esp_tensor dx) {
  product_dx(run, g, (esp_tensor){0}, dy, dx, NULL, 0);
}

bool esp_group_uses_input(const esp_model *m, const esp_group *g) {
  return m->hooks || m->gs[g->index].trains;
}

esp_tensor esp_group_dy(esp_run *run, esp_tensor dy, esp_tensor copy) {
  const esp_adapter_hooks *h = run->model->hooks;
  if (!h || !h->output_bwd) return dy;
  run->be->ops->axpby(run->be, copy, 1.0f, dy, 0.0f);
  return copy;
}
