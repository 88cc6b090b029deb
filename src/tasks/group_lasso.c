/* group_lasso.c: whole layers of the adapter are drawn to zero: weight * sum_layers |theta_layer|, so that a task uses
 * the layers it needs and leaves the others to the next. After GS-LoRA (Zhao et al. 2025, "Practical Continual
 * Forgetting for Pre-trained Vision Models"), whose groups are the LoRA matrices of one block's feed-forward part; here
 * all that the adapter has in one block. Parameters outside the blocks are one more group.
 *
 * Of a block whose values are all zero the norm has no gradient; the usual choice is the zero of its subdifferential.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "tasks/internal.h"

/* The block that a parameter belongs to, from its name; -1: none. */
static int layer_of(const esp_param *p) {
  static const char *const lists[] = {".layers.", ".h."};
  for (int i = 0; i < 2; i++) {
    const char *at = strstr(p->name, lists[i]);
    int layer;
    if (at && sscanf(at + strlen(lists[i]), "%d.", &layer) == 1) return layer;
  }
  return -1;
}

/* The gradient of one stretch of neighbours in one group. */
static double shrink(const esp_sequence *q, int64_t from, int64_t to, double squares, double weight) {
  if (!(squares > 0)) return 0;
  const esp_params *ps = q->adapter->params;
  q->be->ops->axpby(q->be, esp_flat(ps->grad + from, to - from), (float)(weight / sqrt(squares)),
                    esp_flat(ps->master + from, to - from), 1.0f);
  return weight * sqrt(squares);
}

static double penalty(esp_strategy *s, const esp_sequence *q, const esp_strategy_step *t) {
  const esp_params *ps = q->adapter->params;
  double value = 0;
  for (int i = 0, end; i < ps->count; i = end) { /* parameters of a block are neighbours */
    int layer = layer_of(&ps->list[i]);
    bool frozen = ps->list[i].frozen; /* what earlier tasks keep has no gradient */
    for (end = i + 1; end < ps->count && layer_of(&ps->list[end]) == layer && ps->list[end].frozen == frozen;) end++;
    if (frozen) continue;
    int64_t from = ps->list[i].offset, to = ps->list[end - 1].offset + ps->list[end - 1].numel;
    esp_tensor x = esp_flat(ps->master + from, to - from);
    value += shrink(q, from, to, esp_sequence_dot(q, x, x), s->cfg->group_lasso.weight);
  }
  return value;
}

const esp_strategy_kind esp_strategy_group_lasso = {
    .name = "group_lasso",
    .summary = "whole layers of the adapter are drawn to zero: weight sum_layers |theta_layer|",
    .penalty = penalty,
};
