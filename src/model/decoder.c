/* decoder.c: the block loop, forward and backward. What a block keeps lies on the activation stack between its mark and
 * the next block's; with full checkpointing a block keeps its input only and its forward runs again before its
 * backward. Backward stops at the lowest block in which something is trained. */
#include <string.h>
#include <xxhash.h>

#include "model/internal.h"

esp_status esp_batch_check(const esp_model *m, const esp_batch *b, bool labels) {
  const esp_model_desc *d = &m->d;
  if (b->tokens <= 0 || b->n_seqs <= 0) return esp_fail(ESP_ERR_DATA, "%s: an empty batch", m->dir);
  if (b->cu_seqlens[0] != 0 || b->cu_seqlens[b->n_seqs] != b->tokens)
    return esp_fail(ESP_ERR_INTERNAL, "%s: cu_seqlens does not cover the batch", m->dir);
  for (int64_t t = 0; t < b->tokens; t++) {
    if (b->ids[t] < 0 || b->ids[t] >= d->vocab)
      return esp_fail(ESP_ERR_DATA, "%s: token id %d is outside the vocabulary of %lld", m->dir, b->ids[t],
                      (long long)d->vocab);
    if (b->positions[t] < 0 || (d->pos == ESP_POS_LEARNED && b->positions[t] >= d->max_positions))
      return esp_fail(ESP_ERR_DATA, "%s: position %d is outside the model's %lld learned positions", m->dir,
                      b->positions[t], (long long)d->max_positions);
    if (labels && b->weights[t] != 0.0f && (b->targets[t] < 0 || b->targets[t] >= d->vocab))
      return esp_fail(ESP_ERR_DATA, "%s: target id %d is outside the vocabulary of %lld", m->dir, b->targets[t],
                      (long long)d->vocab);
  }
  return ESP_OK;
}

/* Everything that the operations of a pass depend on beside the contents of memory. A batch whose weights are streamed
 * or whose adapters work on the host is issued each time. */
uint64_t esp_pass_piece(const esp_pass *p, int part, int variant) {
  const esp_run *run = &p->run;
  const esp_model *m = run->model;
  const esp_adapter_hooks *h = m->hooks;
  uint64_t version = h ? (h->version ? h->version(h->ctx) : 0) : 1;
  if (!run->be->ops->piece_begin || version == 0 || esp_model_streams(m)) return 0;
  uint64_t facts[19] = {(uint64_t)part,
                        (uint64_t)variant,
                        (uint64_t)p->tokens,
                        p->seqs,
                        (uint64_t)run->n_virtual,
                        version,
                        (uint64_t)(uintptr_t)h,
                        (uint64_t)run->train,
                        run->seed,
                        (uint64_t)(uintptr_t)run->stack->base,
                        (uint64_t)run->stack->top,
                        p->kv ? (uint64_t)(uintptr_t)p->kv->k : 0,
                        p->kv ? (uint64_t)(uintptr_t)p->kv->v : 0,
                        p->kv ? (uint64_t)p->kv->batch : 0,
                        p->kv ? (uint64_t)p->kv->max_len : 0,
                        (uint64_t)p->decode,
                        (uint64_t)(uintptr_t)m->cos_t,
                        m->work.revision,
                        m->loads};
  uint64_t key = XXH3_64bits(facts, sizeof facts);
  return key ? key : 1;
}

esp_status esp_pass_begin(esp_pass *p, esp_model *m, esp_stack *stack, const esp_virtual *v, int64_t head_rows,
                          bool train) {
  const esp_batch *b = &v->batch;
  ESP_TRY(esp_model_load_weights(m)); /* loads what an adapter switched off since the last pass leaves to the base */
  ESP_TRY(esp_work_ensure(m, b->tokens, head_rows, v->n, train));
  int64_t last = 0;
  for (int64_t t = 0; t < b->tokens; t++) last = b->positions[t] > last ? b->positions[t] : last;
  ESP_TRY(esp_rope_ensure(m, last + 1));
  int32_t *d_ids = esp_work_ints(m, ESP_INTS_IDS), *d_pos = esp_work_ints(m, ESP_INTS_POS);
  m->be->ops->upload(m->be, d_ids, b->ids, b->tokens * 4);
  m->be->ops->upload(m->be, d_pos, b->positions, b->tokens * 4);
  int32_t *d_virtual = m->work.buf[ESP_W_VIRTUAL], *d_which = v->n ? d_virtual + v->n : NULL;
  if (v->n) {
    m->be->ops->upload(m->be, d_virtual, v->rows, v->n * 4);
    m->be->ops->upload(m->be, d_which, v->which, v->n * 4);
  }
  *p = (esp_pass){.run = {.be = m->be,
                          .stack = stack,
                          .model = m,
                          .batch = b,
                          .d_ids = d_ids,
                          .d_positions = d_pos,
                          .n_virtual = v->n,
                          .d_virtual = d_virtual,
                          .d_which = d_which,
                          .draw = (const uint64_t *)((char *)m->work.buf[ESP_W_TOTAL] + ESP_TOTAL_DRAW),
                          .compute = m->opt.compute,
                          .train = train},
                  .tokens = b->tokens,
                  .seqs = m->be->ops->attn_begin(m->be, b->cu_seqlens, b->n_seqs)};
  if (m->hooks && m->hooks->begin) return m->hooks->begin(m->hooks->ctx, &p->run);
  if (b->shares) return esp_fail(ESP_ERR_RECIPE, "adapters are weighted per sequence, none is active");
  for (int i = 0; b->adapters && i < b->n_seqs; i++)
    if (b->adapters[i] != -1)
      return esp_fail(ESP_ERR_RECIPE, "sequence %d chooses adapter %d, none is active", i + 1, b->adapters[i]);
  return ESP_OK;
}

static void forward(esp_pass *p, esp_ckpt_mode ckpt) {
  esp_run *run = &p->run;
  esp_model *m = run->model;
  int64_t t = p->tokens, hidden = m->d.hidden;
  esp_tensor none = {0}, y = esp_work_tensor(m, ESP_W_Y, t, hidden);
  /* All block inputs live at the end of forward whatever is done, so they are pushed first; without a backward one
   * buffer is updated in place. */
  for (int l = 0; l < m->d.layers; l++)
    m->saved[l].r0 = run->train || l == 0 ? esp_stack_tensor(run->stack, run->compute, t, hidden) : m->saved[0].r0;
  esp_embed_forward(run, m->saved[0].r0);
  for (int l = 0; l < m->d.layers; l++) {
    esp_saved *s = &m->saved[l];
    s->mark = esp_stack_mark(run->stack);
    esp_attention_forward(p, l, l ? y : none, l ? m->saved[l - 1].r1 : none, s);
    esp_mlp_forward(p, l, s, false);
    if (!run->train || ckpt == ESP_CKPT_FULL) esp_stack_release(run->stack, s->mark);
  }
  run->be->ops->axpby(run->be, y, 1.0f, m->saved[m->d.layers - 1].r1, 1.0f);
}

void esp_decoder_forward(esp_pass *p, esp_ckpt_mode ckpt, uint64_t piece, uint64_t pair) {
  if (!esp_backend_piece_begin(p->run.be, piece, pair)) forward(p, ckpt);
  esp_backend_piece_end(p->run.be, piece);
}

static void backward(esp_pass *p, esp_ckpt_mode ckpt, int lowest) {
  esp_run *run = &p->run;
  esp_model *m = run->model;
  esp_tensor none = {0};
  for (int l = m->d.layers - 1; l >= 0 && l >= lowest; l--) {
    esp_saved *s = &m->saved[l];
    if (ckpt == ESP_CKPT_FULL) {
      s->mark = esp_stack_mark(run->stack);
      esp_attention_forward(p, l, none, none, s);
      esp_mlp_forward(p, l, s, true);
    }
    esp_mlp_backward(p, l, s);
    esp_attention_backward(p, l, s, l > lowest);
    esp_stack_release(run->stack, s->mark);
  }
  if (lowest < 0) esp_embed_backward(run, esp_work_tensor(m, ESP_W_DR, p->tokens, m->d.hidden));
}

/* The lowest block that backward has to reach; -1: the embeddings; layers: only the final norm or the head; layers + 1:
 * the head alone. */
static int lowest_trained(const esp_model *m) {
  int low = m->d.layers + 1;
  for (int i = 0; i < m->n_sites; i++) {
    const esp_site *s = m->sites[i];
    if (!esp_site_trained(s)) continue;
    int at = s->kind == ESP_SITE_EMBED ? -1
             : s == m->final_norm      ? m->d.layers
             : s->is_head              ? m->d.layers + 1
                                       : s->layer;
    if (at < low) low = at;
  }
  if (m->hooks) {
    int at = m->hooks->lowest_layer ? m->hooks->lowest_layer(m->hooks->ctx) : -1;
    if (at >= m->d.layers) at = m->d.layers + 1;
    if (at < low) low = at;
  }
  return low;
}

static esp_status step(esp_model *m, esp_stack *stack, const esp_virtual *v, esp_ckpt_mode ckpt, bool train,
                       float scale, uint64_t seed, int64_t draw, esp_loss_out *out, float *logprob) {
  const esp_batch *b = &v->batch;
  esp_pass p;
  int64_t labelled = 0;
  for (int64_t t = 0; t < b->tokens; t++) labelled += b->weights[t] != 0.0f;
  ESP_TRY(esp_pass_begin(&p, m, stack, v, labelled ? labelled : 1, train));
  p.run.seed = seed;
  uint64_t number = (uint64_t)draw;
  m->be->ops->upload(m->be, (void *)p.run.draw, &number, sizeof number);
  if (out) ESP_TRY(esp_model_sums_reset(m));
  int64_t mark = esp_stack_mark(stack);
  int lowest = train ? lowest_trained(m) : m->d.layers + 1;
  /* Forward and backward are recorded and replayed together or not at all. */
  bool back = train && labelled > 0;
  int variant = lowest * 2 + (ckpt == ESP_CKPT_FULL);
  uint64_t first = back ? esp_pass_piece(&p, ESP_PIECE_FORWARD, variant) : 0;
  uint64_t second = first ? esp_pass_piece(&p, ESP_PIECE_BACKWARD, variant) : 0;
  esp_decoder_forward(&p, ckpt, first, second);
  double weight_sum;
  esp_status st = esp_head_loss(&p, scale, train, lowest <= m->d.layers, &weight_sum, logprob);
  if (st == ESP_OK && back) {
    if (!esp_backend_piece_begin(m->be, second, 0)) backward(&p, ckpt, lowest);
    esp_backend_piece_end(m->be, second);
    if (m->hooks && m->hooks->stepped) m->hooks->stepped(m->hooks->ctx);
  }
  esp_stack_release(stack, mark);
  if (st == ESP_OK && out) st = esp_model_sums(m, out);
  if (out) out->weight_sum = weight_sum;
  return st == ESP_OK ? m->be->sticky : st;
}

esp_status esp_model_step(esp_model *m, esp_stack *stack, const esp_batch *b, esp_ckpt_mode ckpt, bool train,
                          float scale, uint64_t seed, int64_t draw, esp_loss_out *out, float *logprob) {
  esp_status st = ESP_OK;
  esp_virtual v;
  float *all = logprob;
  ESP_TRY(esp_batch_check(m, b, true));
  ESP_TRY(esp_virtual_begin(&v, m, b, true));
  if (logprob && v.n && !(all = esp_mem_alloc(ESP_MEM_HOST, (size_t)v.batch.tokens * sizeof *all)))
    ESP_GOTO(ESP_ERR_MEMORY);
  ESP_GOTO(step(m, stack, &v, ckpt, train, scale, seed, draw, out, all));
  for (int64_t t = 0; all != logprob && t < b->tokens; t++)
    if (b->weights[t] != 0.0f) logprob[t] = all[v.row_of[t]];
out:
  if (all != logprob) esp_mem_free(all);
  esp_virtual_end(&v);
  return st;
}

esp_status esp_model_features(esp_model *m, esp_stack *stack, const esp_batch *b, esp_tensor out) {
  esp_status st = ESP_OK;
  esp_virtual v;
  esp_pass p;
  ESP_TRY(esp_batch_check(m, b, true));
  ESP_TRY(esp_virtual_begin(&v, m, b, true));
  ESP_GOTO(esp_pass_begin(&p, m, stack, &v, 1, false));
  int64_t mark = esp_stack_mark(stack);
  esp_decoder_forward(&p, ESP_CKPT_OFF, 0, 0);
  st = esp_head_features(&p, out);
  esp_stack_release(stack, mark);
  if (st == ESP_OK) st = m->be->sticky;
out:
  esp_virtual_end(&v);
  return st;
}

esp_status esp_model_sums_reset(esp_model *m) {
  ESP_TRY(esp_work_ensure(m, 0, 0, 0, false));
  m->be->ops->zero(m->be, (char *)m->work.buf[ESP_W_TOTAL] + ESP_TOTAL_SUMS, 16);
  return m->be->sticky;
}

esp_status esp_model_sums(esp_model *m, esp_loss_out *out) {
  double sums[2] = {0, 0};
  *out = (esp_loss_out){0};
  m->be->ops->download(m->be, sums, (char *)m->work.buf[ESP_W_TOTAL] + ESP_TOTAL_SUMS, sizeof sums);
  out->loss_sum = sums[0];
  out->correct = (int64_t)sums[1];
  return esp_backend_sync(m->be);
}

esp_status esp_model_logits(esp_model *m, esp_stack *stack, const esp_batch *b, const int32_t *rows, int n_rows,
                            float *logits) {
  esp_status st = ESP_OK;
  esp_pass p;
  esp_virtual v;
  int32_t *at = NULL;
  ESP_TRY(esp_batch_check(m, b, false));
  for (int i = 0; i < n_rows; i++)
    if (rows[i] < 0 || rows[i] >= b->tokens)
      return esp_fail(ESP_ERR_INTERNAL, "logits: row %d of a batch of %lld", rows[i], (long long)b->tokens);
  if (n_rows <= 0) return ESP_OK;
  ESP_TRY(esp_virtual_begin(&v, m, b, false));
  if (v.n && !(at = esp_mem_alloc(ESP_MEM_HOST, (size_t)n_rows * sizeof *at))) ESP_GOTO(ESP_ERR_MEMORY);
  for (int i = 0; at && i < n_rows; i++) at[i] = v.row_of[rows[i]];
  ESP_GOTO(esp_pass_begin(&p, m, stack, &v, n_rows, false));
  int64_t mark = esp_stack_mark(stack);
  esp_decoder_forward(&p, ESP_CKPT_OFF, 0, 0);
  st = esp_head_logits(&p, at ? at : rows, n_rows, logits);
  esp_stack_release(stack, mark);
  if (st == ESP_OK) st = esp_backend_sync(m->be);
out:
  esp_mem_free(at);
  esp_virtual_end(&v);
  return st;
}

esp_status esp_model_sequence_logits(esp_model *m, esp_stack *stack, const int32_t *ids, int64_t n, float *logits) {
  int32_t cu[2] = {0, (int32_t)n}, *rows = esp_mem_alloc(ESP_MEM_HOST, (size_t)(n + 1) * sizeof *rows);
  if (!rows) return ESP_ERR_MEMORY;
  for (int32_t i = 0; i < n; i++) rows[i] = i;
  esp_batch b = {.tokens = n, .ids = ids, .positions = rows, .cu_seqlens = cu, .n_seqs = 1};
  esp_status st = esp_model_logits(m, stack, &b, rows, (int)n, logits);
  esp_mem_free(rows);
  return st;
}
