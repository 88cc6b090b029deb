/* norm.c: RMSNorm and LayerNorm with the residual addition fused in, forward beside backward. */
#include "model/internal.h"

/* One whose store is there for inference has no gradients. */
bool esp_site_trained(const esp_site *s) {
  return s->trained && s->trained->grad && (s->trained_weight >= 0 || s->trained_bias >= 0);
}

static esp_tensor norm_weight(const esp_model *m, const esp_site *s) {
  if (s->trained && s->trained_weight >= 0)
    return esp_tensor_1d(esp_param_master(s->trained, s->trained_weight).data, ESP_F32, s->out);
  return m->ss[s->index].w;
}
static esp_tensor norm_bias(const esp_model *m, const esp_site *s) {
  if (s->trained && s->trained_bias >= 0)
    return esp_tensor_1d(esp_param_master(s->trained, s->trained_bias).data, ESP_F32, s->out);
  return m->ss[s->index].b;
}

void esp_norm_forward(esp_run *run, esp_site *s, esp_tensor x, esp_tensor residual, esp_tensor r_out, esp_tensor y,
                      float *rstd, float *mean) {
  const esp_model *m = run->model;
  esp_norm_args a = {.kind = m->d.norm,
                     .x = x,
                     .residual = residual,
                     .r_out = r_out,
                     .y = y,
                     .w = norm_weight(m, s),
                     .b = norm_bias(m, s),
                     .eps = m->d.norm_eps,
                     .offset = m->d.norm_offset,
                     .rstd = rstd,
                     .mean = m->d.norm == ESP_NORM_LAYER ? mean : NULL};
  run->be->ops->norm(run->be, &a);
}

void esp_norm_backward(esp_run *run, esp_site *s, esp_tensor r, esp_tensor dy, esp_tensor dx, const float *rstd,
                       const float *mean, bool accumulate) {
  const esp_model *m = run->model;
  esp_norm_bwd_args a = {.kind = m->d.norm,
                         .r = r,
                         .dy = dy,
                         .dx = dx,
                         .w = norm_weight(m, s),
                         .offset = m->d.norm_offset,
                         .rstd = rstd,
                         .mean = m->d.norm == ESP_NORM_LAYER ? mean : NULL,
                         .accumulate = accumulate};
  bool trained = esp_site_trained(s);
  if (trained && s->trained_weight >= 0) a.dw = esp_param_grad(s->trained, s->trained_weight).data;
  if (trained && s->trained_bias >= 0) a.db = esp_param_grad(s->trained, s->trained_bias).data;
  run->be->ops->norm_bwd(run->be, &a);
}
