/* reglora.c: the entries of W that earlier tasks changed most are to be changed little. At a task's end the `share`
 * largest entries of |B A| of each matrix join its set of indices I_l, and a later task's loss gets
 *   weight * 1/L sum_l 1/|I_l| sum_{(o, i) in I_l} |(B A)_oi|
 * over the L matrices that have a set. RegLoRA of SEFE (Chen et al. 2025, "SEFE: Superficial and Essential Forgetting
 * Eliminator for Multimodal Continual Instruction Tuning"), whose code takes the top 2% and weight 2.5e3, and B A
 * without the factor alpha / r. B A is what the task itself changes, so each task wants factors of its own.
 *
 * The sets are sparse matrices: their values are (B A)_oi = sum_k B_ok A_ki, which is the product that sparse_grad
 * makes of B^T and A, and with D = dloss/d(BA) there, dA = B^T D and dB^T = A D^T are sparse_matmul. B A is never made
 * in a step. |x| has the slope 0 at 0, so that a fresh adapter (B = 0) is not pushed anywhere. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/linalg.h"
#include "tasks/internal.h"
#include "tasks/projection.h"

static esp_status check(const esp_strategy_cfg *c, int n_tasks) {
  if (n_tasks < 2) return esp_fail(ESP_ERR_RECIPE, "continual.strategy: reglora has nothing to do with one task");
  return ESP_OK;
}

static esp_status open(esp_strategy *s, const esp_sequence *q) {
  return esp_trained_own(s, q, false);
}

/* ---- sets ---- */

/* A set is one array, int32: start [out+1], index [n] by rows, start [in+1], index [n], order [n] by columns. */
static int64_t size_of(const esp_site *s, int64_t n) {
  return s->out + s->in + 2 + 3 * n;
}

static int32_t *set_of(const esp_strategy *s, const esp_site *site, int64_t *n) {
  int64_t size;
  int32_t *set = esp_strategy_get(s, site->path, &size);
  *n = set ? (size - size_of(site, 0)) / 3 : 0;
  return set;
}

/* The bits of a magnitude are ordered as magnitudes are. */
static uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffffu;
}

enum { HALVES = 65536 };

/* Marks the k largest magnitudes, of equal ones the first: the k-th by counting its upper, then its lower half.
 * count [HALVES]: room to work in. */
static void mark_largest(const float *x, int64_t n, int64_t k, int64_t *count, uint8_t *mark) {
  int64_t left = k;
  uint32_t least = 0;
  for (int shift = 16; shift >= 0; shift -= 16) {
    memset(count, 0, HALVES * sizeof *count);
    for (int64_t i = 0; i < n; i++) {
      uint32_t bits = bits_of(x[i]);
      if (shift == 16 || bits >> 16 == least >> 16) count[bits >> shift & 0xffffu]++;
    }
    uint32_t half = 0xffffu;
    while (count[half] < left) left -= count[half--];
    least |= half << shift;
  }
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = bits_of(x[i]);
    if (bits > least || (bits == least && left-- > 0)) mark[i] = 1;
  }
}

static void build(const esp_site *s, const uint8_t *mark, int64_t n, int32_t *set) {
  int32_t *start = set, *index = start + s->out + 1, *t_start = index + n, *t_index = t_start + s->in + 1;
  int32_t *order = t_index + n, at = 0;
  for (int64_t o = 0; o < s->out; o++) {
    start[o] = at;
    for (int64_t i = 0; i < s->in; i++)
      if (mark[o * s->in + i]) index[at++] = (int32_t)i, t_start[i + 1]++;
  }
  start[s->out] = at;
  for (int64_t i = 0; i < s->in; i++) t_start[i + 1] += t_start[i];
  for (int64_t o = 0; o < s->out; o++)
    for (int32_t e = start[o]; e < start[o + 1]; e++) {
      int32_t to = t_start[index[e]]++; /* becomes the column's end, which is the next one's start */
      t_index[to] = (int32_t)o, order[to] = e;
    }
  memmove(t_start + 1, t_start, (size_t)s->in * sizeof *t_start);
  t_start[0] = 0;
}

/* The set of one matrix with what the present task adds. */
static esp_status join(esp_strategy *s, const esp_sequence *q, const esp_trained *t) {
  const esp_params *ps = q->adapter->params;
  const esp_site *site = t->site;
  esp_status st = ESP_OK;
  int64_t out = site->out, in = site->in, all = out * in, r = ps->list[t->a].shape[0], old, n = 0;
  int64_t add = (int64_t)floor(s->cfg->reglora.share * (double)all + 1e-9);
  const int32_t *had = set_of(s, site, &old);
  if (add < 1) add = 1;
  float *change = esp_mem_alloc(ESP_MEM_HOST, (size_t)(all + r * (in + out)) * sizeof *change);
  uint8_t *mark = esp_mem_alloc(ESP_MEM_HOST, (size_t)all);
  int64_t *count = esp_mem_alloc(ESP_MEM_HOST, HALVES * sizeof *count);
  int32_t *set = esp_mem_alloc(ESP_MEM_HOST, (size_t)size_of(site, old + add) * sizeof *set);
  if (!change || !mark || !count || !set) ESP_GOTO(ESP_ERR_MEMORY);
  if (esp_backend_counts(q->be)) { /* the most there can be */
    n = old + add < all ? old + add : all;
  } else {
    float *a = change + all, *b = a + r * in;
    esp_params_get(ps, t->a, a);
    esp_params_get(ps, t->b, b);
    esp_linalg_gemm(false, false, out, in, r, 1.0f, b, r, a, in, 0.0f, change, in);
    mark_largest(change, all, add, count, mark);
    if (had) {
      q->be->ops->download(q->be, set, had, size_of(site, old) * (int64_t)sizeof *set);
      ESP_GOTO(esp_backend_sync(q->be));
      for (int64_t o = 0; o < out; o++)
        for (int32_t e = set[o]; e < set[o + 1]; e++) mark[o * in + set[out + 1 + e]] = 1;
      memset(set, 0, (size_t)size_of(site, old) * sizeof *set);
    }
    for (int64_t i = 0; i < all; i++) n += mark[i];
    build(site, mark, n, set);
  }
  int32_t *to = esp_strategy_array(s, site->path, ESP_I32, size_of(site, n), false);
  if (!to) ESP_GOTO(ESP_ERR_MEMORY);
  q->be->ops->upload(q->be, to, set, size_of(site, n) * (int64_t)sizeof *set);
  ESP_GOTO(esp_backend_sync(q->be));
out:
  esp_mem_free(change);
  esp_mem_free(mark);
  esp_mem_free(count);
  esp_mem_free(set);
  return st;
}

static esp_status hand_over(esp_strategy *s, const esp_sequence *q) {
  esp_trained *list;
  int n;
  esp_status st = ESP_OK;
  ESP_TRY(esp_trained_list(s, q, &list, &n));
  for (int i = 0; st == ESP_OK && i < n; i++) st = join(s, q, &list[i]);
  esp_mem_free(list);
  return st;
}

/* ---- the loss ---- */

/* Adds factor * mean |(BA)[set]| to sums and its gradient to those of A and B. */
static void pull(const esp_sequence *q, const esp_trained *t, const int32_t *set, int64_t n, const float *one,
                 double factor, double *sums) {
  const esp_backend_ops *op = q->be->ops;
  const esp_params *ps = q->adapter->params;
  int64_t out = t->site->out, in = t->site->in, mark = esp_stack_mark(q->stack);
  esp_tensor a = esp_param_master(ps, t->a), b = esp_param_master(ps, t->b), da = esp_param_grad(ps, t->a);
  int64_t r = esp_tensor_rows(&a);
  esp_tensor value = esp_stack_tensor(q->stack, ESP_F32, 1, n), zero = esp_stack_tensor(q->stack, ESP_F32, 1, n);
  esp_tensor d = esp_stack_tensor(q->stack, ESP_F32, 1, n);
  esp_tensor bt = esp_stack_tensor(q->stack, ESP_F32, r, out), dbt = esp_stack_tensor(q->stack, ESP_F32, r, out);
  esp_csr rows = {out, n, set, set + out + 1, NULL, d.data};
  const int32_t *cols = set + out + 1 + n;
  esp_csr columns = {in, n, cols, cols + in + 1, cols + in + 1 + n, d.data};
  op->zero(q->be, value.data, esp_tensor_bytes(&value));
  op->zero(q->be, zero.data, esp_tensor_bytes(&zero));
  op->zero(q->be, d.data, esp_tensor_bytes(&d));
  op->zero(q->be, dbt.data, esp_tensor_bytes(&dbt));
  op->transpose_rows(q->be, esp_flat(bt.data, r * out), esp_flat(b.data, r * out), out, r);
  op->sparse_grad(q->be, value.data, bt, a, &rows);
  op->hidden_loss(q->be, &(esp_hidden_args){.kind = ESP_HIDDEN_L1,
                                            .x = value,
                                            .teacher = zero,
                                            .d = d,
                                            .weights = one,
                                            .factor = (float)factor,
                                            .scale = 1.0f,
                                            .sums = sums});
  op->sparse_matmul(q->be, da, bt, &columns);
  op->sparse_matmul(q->be, dbt, a, &rows);
  op->transpose_rows(q->be, esp_flat(bt.data, r * out), esp_flat(dbt.data, r * out), r, out);
  op->axpby(q->be, esp_flat(esp_param_grad(ps, t->b).data, r * out), 1.0f, esp_flat(bt.data, r * out), 1.0f);
  esp_stack_release(q->stack, mark);
}

static double penalty(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  const esp_backend_ops *op = q->be->ops;
  esp_trained *list;
  int n, with = 0;
  int64_t entries, mark = esp_stack_mark(q->stack);
  double value[2] = {0};
  if (s->n_values == 0) return 0;
  esp_status st = esp_trained_list(s, q, &list, &n);
  if (st != ESP_OK) {
    q->be->sticky = st;
    return 0;
  }
  for (int i = 0; i < n; i++) with += set_of(s, list[i].site, &entries) != NULL;
  double *sums = esp_stack_push(q->stack, sizeof value);
  esp_tensor one = esp_stack_tensor(q->stack, ESP_F32, 1, 1);
  static const float weight = 1.0f;
  op->upload(q->be, one.data, &weight, sizeof weight);
  op->zero(q->be, sums, sizeof value);
  for (int i = 0; i < n; i++) {
    const int32_t *set = set_of(s, list[i].site, &entries);
    if (set) pull(q, &list[i], set, entries, one.data, s->cfg->reglora.weight / with, sums);
  }
  op->download(q->be, value, sums, sizeof value);
  (void)esp_backend_sync(q->be); /* an error stays and is the step's */
  esp_stack_release(q->stack, mark);
  esp_mem_free(list);
  return value[0];
}

const esp_strategy_kind esp_strategy_reglora = {
    .name = "reglora",
    .summary = "entries of W that earlier tasks changed most are changed little: weight mean |(BA)[idx]| (SEFE)",
    .check = check,
    .open = open,
    .hand_over = hand_over,
    .penalty = penalty,
};
