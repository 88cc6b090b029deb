/* attention.c: norm, fused q|k|v projection, QK-norm, rotary positions, attention over packed sequences, output
 * projection; forward beside backward. Kept for backward: the residual input r0 and its rstd, the fused qkv (after the
 * rotation, or raw when there is a QK-norm, whose output is cheaper to make again than to keep), o and lse. */
#include "model/internal.h"

typedef struct dims {
  int64_t t, q, kv, width; /* columns of q, of k, of all */
} dims;

static dims dims_of(const esp_pass *p) {
  const esp_model_desc *d = &p->run.model->d;
  dims n = {p->tokens, (int64_t)d->heads * d->head_dim, (int64_t)d->kv_heads * d->head_dim, 0};
  n.width = n.q + 2 * n.kv;
  return n;
}

static void rope(esp_pass *p, esp_tensor x, int heads, bool inverse) {
  const esp_model *m = p->run.model;
  if (m->d.pos != ESP_POS_ROPE) return;
  esp_rope_args a = {.x = x,
                     .cos_t = m->cos_t,
                     .sin_t = m->sin_t,
                     .positions = p->run.d_positions,
                     .heads = heads,
                     .head_dim = m->d.head_dim,
                     .rot = (int)((float)m->d.head_dim * m->d.rope_fraction),
                     .inverse = inverse};
  p->run.be->ops->rope(p->run.be, &a);
}

/* q and k as contiguous tensors in one work buffer. */
static esp_tensor qk_part(const esp_pass *p, esp_work_id id, bool k) {
  dims n = dims_of(p);
  esp_tensor all = esp_work_tensor(p->run.model, id, 1, n.t * (n.q + n.kv));
  char *base = all.data;
  if (k) base += (size_t)(n.t * n.q) * esp_dtype_size(p->run.compute);
  return esp_tensor_2d(base, p->run.compute, n.t, k ? n.kv : n.q);
}
static esp_tensor as_heads(esp_tensor x, int head_dim) {
  return esp_tensor_2d(x.data, x.dtype, esp_tensor_numel(&x) / head_dim, head_dim);
}

/* Raw q, k of the fused tensor -> contiguous copies in QK1 -> normalised and rotated in QK0. */
static void qk_norm_forward(esp_pass *p, const esp_block *b, esp_tensor qkv, esp_saved *s, esp_tensor *q,
                            esp_tensor *k) {
  esp_run *run = &p->run;
  const esp_model_desc *d = &run->model->d;
  dims n = dims_of(p);
  esp_tensor none = {0};
  esp_tensor rq = qk_part(p, ESP_W_QK1, false), rk = qk_part(p, ESP_W_QK1, true);
  *q = qk_part(p, ESP_W_QK0, false);
  *k = qk_part(p, ESP_W_QK0, true);
  run->be->ops->axpby(run->be, rq, 1.0f, esp_tensor_cols_view(&qkv, 0, n.q), 0.0f);
  run->be->ops->axpby(run->be, rk, 1.0f, esp_tensor_cols_view(&qkv, n.q, n.kv), 0.0f);
  esp_norm_forward(run, b->q_norm, as_heads(rq, d->head_dim), none, none, as_heads(*q, d->head_dim), s->rstd_q, NULL);
  esp_norm_forward(run, b->k_norm, as_heads(rk, d->head_dim), none, none, as_heads(*k, d->head_dim), s->rstd_k, NULL);
  rope(p, *q, d->heads, false);
  rope(p, *k, d->kv_heads, false);
}

/* What an adapter has in the place of keys and values, after the rotation: as if they had come from a cache. */
static void kv_replaced(esp_pass *p, int layer, esp_tensor k, esp_tensor v) {
  const esp_adapter_hooks *h = p->run.model->hooks;
  if (p->run.n_virtual && h && h->kv) h->kv(h->ctx, &p->run, layer, k, v);
}

static esp_attn_args attn_args(const esp_pass *p, int layer, esp_tensor q, esp_tensor k, esp_tensor v, esp_tensor o,
                               float *lse) {
  const esp_model_desc *d = &p->run.model->d;
  esp_attn_args a = {.q = q,
                     .k = k,
                     .v = v,
                     .o = o,
                     .lse = lse,
                     .cu_seqlens = p->run.batch->cu_seqlens,
                     .n_seqs = p->run.batch->n_seqs,
                     .heads = d->heads,
                     .kv_heads = d->kv_heads,
                     .head_dim = d->head_dim,
                     .scale = d->attn_scale_by_layer ? d->attn_scale / (float)(layer + 1) : d->attn_scale,
                     .softcap = d->attn_softcap,
                     .window = d->window[layer],
                     .causal = d->causal};
  return a;
}

/* Writes the new keys and values into the cache; decoding then reads nothing else. */
static void through_cache(esp_pass *p, int layer, const esp_attn_args *a) {
  esp_backend *be = p->run.be;
  const esp_kv *kv = p->kv;
  dims n = dims_of(p);
  size_t layer_bytes = (size_t)(kv->batch * kv->max_len * n.kv) * esp_dtype_size(p->run.compute);
  esp_tensor kc =
      esp_tensor_2d((char *)kv->k + layer_bytes * (size_t)layer, p->run.compute, kv->batch * kv->max_len, n.kv);
  esp_tensor vc =
      esp_tensor_2d((char *)kv->v + layer_bytes * (size_t)layer, p->run.compute, kv->batch * kv->max_len, n.kv);
  be->ops->scatter_rows(be, kc, a->k, p->d_rows);
  be->ops->scatter_rows(be, vc, a->v, p->d_rows);
  if (!p->decode) {
    be->ops->attn(be, a);
    return;
  }
  esp_decode_args da = {.q = a->q,
                        .o = a->o,
                        .k_cache = kc,
                        .v_cache = vc,
                        .positions = p->run.d_positions,
                        .max_len = kv->max_len,
                        .heads = a->heads,
                        .kv_heads = a->kv_heads,
                        .head_dim = a->head_dim,
                        .scale = a->scale,
                        .softcap = a->softcap,
                        .window = a->window};
  be->ops->attn_decode(be, &da);
}

/* r0 = x + residual (or given), then y = o_proj(attention(norm(r0))) into ESP_W_Y. */
void esp_attention_forward(esp_pass *p, int layer, esp_tensor x, esp_tensor residual, esp_saved *s) {
  esp_run *run = &p->run;
  esp_model *m = run->model;
  const esp_block *b = &m->blocks[layer];
  dims n = dims_of(p);
  esp_tensor none = {0};
  esp_tensor normed = esp_work_tensor(m, ESP_W_NORMED, n.t, m->d.hidden);
  bool stats = run->train;
  s->rstd1 = stats ? esp_stack_push(run->stack, n.t * 4) : NULL;
  s->mean1 = stats && m->d.norm == ESP_NORM_LAYER ? esp_stack_push(run->stack, n.t * 4) : NULL;
  /* The residual of a checkpointed predecessor lies in stack memory that is already released: nothing larger than the
   * statistics above may be pushed before this norm has read it. It lies behind that block's qkv. */
  if (x.data)
    esp_norm_forward(run, b->norm1, x, residual, s->r0, normed, s->rstd1, s->mean1);
  else
    esp_norm_forward(run, b->norm1, s->r0, none, none, normed, s->rstd1, s->mean1);

  s->qkv = esp_stack_tensor(run->stack, run->compute, n.t, n.width);
  s->o = esp_stack_tensor(run->stack, run->compute, n.t, n.q);
  s->lse = stats ? esp_stack_push(run->stack, n.t * m->d.heads * 4) : NULL;
  s->rstd_q = s->rstd_k = NULL;
  if (stats && b->q_norm) {
    s->rstd_q = esp_stack_push(run->stack, n.t * m->d.heads * 4);
    s->rstd_k = esp_stack_push(run->stack, n.t * m->d.kv_heads * 4);
  }
  esp_group_forward(run, b->qkv, normed, s->qkv, false);

  esp_tensor q = esp_tensor_cols_view(&s->qkv, 0, n.q), k = esp_tensor_cols_view(&s->qkv, n.q, n.kv);
  esp_tensor v = esp_tensor_cols_view(&s->qkv, n.q + n.kv, n.kv);
  if (b->q_norm)
    qk_norm_forward(p, b, s->qkv, s, &q, &k);
  else
    rope(p, esp_tensor_cols_view(&s->qkv, 0, n.q + n.kv), m->d.heads + m->d.kv_heads, false);
  kv_replaced(p, layer, k, v);
  esp_attn_args a = attn_args(p, layer, q, k, v, s->o, s->lse);
  if (p->kv)
    through_cache(p, layer, &a);
  else
    run->be->ops->attn(run->be, &a);
  esp_group_forward(run, b->o, s->o, esp_work_tensor(m, ESP_W_Y, n.t, m->d.hidden), false);
}

/* In: gradient of the stream after this part in ESP_W_DR. Out: of r0, in the same place. */
void esp_attention_backward(esp_pass *p, int layer, esp_saved *s, bool need_dx) {
  esp_run *run = &p->run;
  esp_model *m = run->model;
  esp_backend *be = run->be;
  const esp_block *b = &m->blocks[layer];
  dims n = dims_of(p);
  esp_tensor none = {0};
  esp_tensor dr = esp_work_tensor(m, ESP_W_DR, n.t, m->d.hidden), y = esp_work_tensor(m, ESP_W_Y, n.t, m->d.hidden);
  esp_tensor d_o = esp_work_tensor(m, ESP_W_DWIDE, n.t, n.q), dqkv = esp_work_tensor(m, ESP_W_WIDE, n.t, n.width);
  esp_tensor normed = esp_work_tensor(m, ESP_W_NORMED, n.t, m->d.hidden);

  esp_group_backward(run, b->o, s->o, esp_group_dy(run, dr, y), d_o);

  esp_tensor q = esp_tensor_cols_view(&s->qkv, 0, n.q), k = esp_tensor_cols_view(&s->qkv, n.q, n.kv);
  esp_tensor v = esp_tensor_cols_view(&s->qkv, n.q + n.kv, n.kv);
  if (b->q_norm) {
    esp_saved again = *s; /* statistics are the same bits: do not write them twice */
    again.rstd_q = again.rstd_k = NULL;
    qk_norm_forward(p, b, s->qkv, &again, &q, &k);
    kv_replaced(p, layer, k, v);
  }
  esp_attn_args a = attn_args(p, layer, q, k, v, s->o, s->lse);
  a.d_o = d_o;
  a.d_q = b->q_norm ? qk_part(p, ESP_W_QK2, false) : esp_tensor_cols_view(&dqkv, 0, n.q);
  a.d_k = b->q_norm ? qk_part(p, ESP_W_QK2, true) : esp_tensor_cols_view(&dqkv, n.q, n.kv);
  a.d_v = esp_tensor_cols_view(&dqkv, n.q + n.kv, n.kv);
  be->ops->attn_bwd(be, &a);
  const esp_adapter_hooks *h = m->hooks;
  if (run->n_virtual && h && h->kv_bwd) h->kv_bwd(h->ctx, run, layer, a.d_k, a.d_v);
  if (b->q_norm) {
    int hd = m->d.head_dim;
    rope(p, a.d_q, m->d.heads, true);
    rope(p, a.d_k, m->d.kv_heads, true);
    /* q and k in QK0 are no longer needed: their gradients before the norm go there */
    esp_norm_backward(run, b->q_norm, as_heads(qk_part(p, ESP_W_QK1, false), hd), as_heads(a.d_q, hd), as_heads(q, hd),
                      s->rstd_q, NULL, false);
    esp_norm_backward(run, b->k_norm, as_heads(qk_part(p, ESP_W_QK1, true), hd), as_heads(a.d_k, hd), as_heads(k, hd),
                      s->rstd_k, NULL, false);
    be->ops->axpby(be, esp_tensor_cols_view(&dqkv, 0, n.q), 1.0f, q, 0.0f);
    be->ops->axpby(be, esp_tensor_cols_view(&dqkv, n.q, n.kv), 1.0f, k, 0.0f);
  } else {
    rope(p, esp_tensor_cols_view(&dqkv, 0, n.q + n.kv), m->d.heads + m->d.kv_heads, true);
  }

  if (esp_group_uses_input(m, b->qkv)) esp_norm_forward(run, b->norm1, s->r0, none, none, normed, NULL, NULL);
  need_dx = need_dx || esp_site_trained(b->norm1);
  esp_group_backward(run, b->qkv, normed, dqkv, need_dx ? y : none);
  if (need_dx) esp_norm_backward(run, b->norm1, s->r0, y, dr, s->rstd1, s->mean1, true);
}
