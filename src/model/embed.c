/* embed.c: token embedding (and learned positions), forward beside backward. The table of a frozen base is the mapped
 * file itself on a backend that reads host memory: only the touched rows ever become resident, and
 * the pages around them, which the system maps along, are let go before the activations grow. */
#include "model/internal.h"

static esp_tensor table(const esp_model *m, const esp_site *s) {
  if (s->trained && s->trained_weight >= 0) {
    esp_tensor t = esp_param_shadow(s->trained, s->trained_weight);
    return t;
  }
  return m->ss[s->index].w;
}

static void one(esp_run *run, esp_site *s, const int32_t *ids, esp_tensor y, float scale) {
  esp_model *m = run->model;
  void **slot = &m->slots[m->n_groups + s->index];
  *slot = NULL;
  esp_tensor w = table(m, s);
  run->be->ops->embed(run->be, y, w, ids, scale);
  const esp_st_entry *e = m->ss[s->index].weight;
  if (run->train && e && w.data == e->data && !esp_backend_counts(run->be)) esp_st_drop(e);
  if (m->hooks && m->hooks->embed) m->hooks->embed(m->hooks->ctx, run, s, ids, y, slot);
}

static void one_bwd(esp_run *run, esp_site *s, const int32_t *ids, esp_tensor dy, float scale) {
  esp_model *m = run->model;
  if (m->hooks && m->hooks->embed_bwd)
    m->hooks->embed_bwd(m->hooks->ctx, run, s, ids, dy, &m->slots[m->n_groups + s->index]);
  if (esp_site_trained(s) && s->trained_weight >= 0)
    run->be->ops->embed_bwd(run->be, esp_param_grad(s->trained, s->trained_weight).data, dy, ids, scale);
}

/* y [T, hidden]; uses ESP_W_Y for the position rows. */
void esp_embed_forward(esp_run *run, esp_tensor y) {
  esp_model *m = run->model;
  one(run, m->embed, run->d_ids, y, m->d.embed_scale);
  if (m->positions) {
    esp_tensor p = esp_work_tensor(m, ESP_W_Y, y.shape[0], y.shape[1]);
    one(run, m->positions, run->d_positions, p, 1.0f);
    run->be->ops->axpby(run->be, y, 1.0f, p, 1.0f);
  }
}

void esp_embed_backward(esp_run *run, esp_tensor dy) {
  esp_model *m = run->model;
  if (m->positions) one_bwd(run, m->positions, run->d_positions, dy, 1.0f);
  one_bwd(run, m->embed, run->d_ids, dy, m->d.embed_scale);
}
