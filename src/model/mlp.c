/* mlp.c: norm, gate|up (or c_fc), activation, down; forward beside backward. Kept for backward: the residual input r1
 * with its rstd and the fused gate|up; the normed input and the gated product are made again in backward. */
#include "model/internal.h"

static void activate(esp_run *run, esp_tensor h, esp_tensor gu) {
  const esp_model_desc *d = &run->model->d;
  if (d->gated)
    run->be->ops->glu(run->be, h, gu, d->act);
  else
    run->be->ops->act(run->be, h, gu, d->act);
}

/* r1 = ESP_W_Y + r0, then y = down(act(up(norm(r1)))) into ESP_W_Y. keep_only: recomputation, y is not needed. */
void esp_mlp_forward(esp_pass *p, int layer, esp_saved *s, bool keep_only) {
  esp_run *run = &p->run;
  esp_model *m = run->model;
  const esp_block *b = &m->blocks[layer];
  int64_t t = p->tokens, f = m->d.ffn;
  esp_tensor y = esp_work_tensor(m, ESP_W_Y, t, m->d.hidden);
  esp_tensor normed = esp_work_tensor(m, ESP_W_NORMED, t, m->d.hidden);
  esp_tensor h = esp_work_tensor(m, ESP_W_WIDE, t, f);
  /* without a backward the stream is updated in place */
  s->r1 = run->train ? esp_stack_tensor(run->stack, run->compute, t, m->d.hidden) : s->r0;
  s->rstd2 = run->train ? esp_stack_push(run->stack, t * 4) : NULL;
  s->mean2 = run->train && m->d.norm == ESP_NORM_LAYER ? esp_stack_push(run->stack, t * 4) : NULL;
  s->gu = esp_stack_tensor(run->stack, run->compute, t, b->up->out);
  esp_norm_forward(run, b->norm2, y, s->r0, s->r1, normed, s->rstd2, s->mean2);
  esp_group_forward(run, b->up, normed, s->gu, false);
  if (keep_only && !m->hooks) return;
  activate(run, h, s->gu);
  esp_group_forward(run, b->down, h, y, keep_only);
}

/* In: gradient of the block's output stream in ESP_W_DR. Out: of r1, in the same place. */
void esp_mlp_backward(esp_pass *p, int layer, esp_saved *s) {
  esp_run *run = &p->run;
  esp_model *m = run->model;
  esp_backend *be = run->be;
  const esp_block *b = &m->blocks[layer];
  int64_t t = p->tokens, f = m->d.ffn;
  esp_tensor none = {0};
  esp_tensor dr = esp_work_tensor(m, ESP_W_DR, t, m->d.hidden), y = esp_work_tensor(m, ESP_W_Y, t, m->d.hidden);
  esp_tensor normed = esp_work_tensor(m, ESP_W_NORMED, t, m->d.hidden);
  esp_tensor h = esp_work_tensor(m, ESP_W_WIDE, t, f), dh = esp_work_tensor(m, ESP_W_DWIDE, t, f);

  if (esp_group_uses_input(m, b->down)) activate(run, h, s->gu);
  esp_group_backward(run, b->down, h, esp_group_dy(run, dr, y), dh);
  esp_tensor dgu;
  if (m->d.gated) {
    dgu = s->gu; /* its last reader: overwritten by its own gradient */
    be->ops->glu_bwd(be, dgu, dh, s->gu, m->d.act);
  } else {
    dgu = dh;
    be->ops->act_bwd(be, dgu, dh, s->gu, m->d.act);
  }
  if (esp_group_uses_input(m, b->up)) esp_norm_forward(run, b->norm2, s->r1, none, none, normed, NULL, NULL);
  esp_group_backward(run, b->up, normed, dgu, y);
  esp_norm_backward(run, b->norm2, s->r1, y, dr, s->rstd2, s->mean2, true);
}
