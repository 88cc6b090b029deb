/* olora_cl.c: O-LoRA, orthogonal subspaces for continual learning (Wang et al. 2023, arXiv:2310.14152). Not the OLoRA
 * init of lora. Each task trains a LoRA of its own beside the frozen ones of the tasks before it,
 *   y = W x + b + s sum_{t <= now} B_t A_t drop(x),
 * and a penalty keeps the rows of its A out of the space that theirs span:
 *   l1          lambda sum_sites sum_ij |O_ij|       O = A_old A_now^T, [earlier tasks * r, r]
 *   frobenius   lambda sum_sites sum_ij O_ij^2
 * l1 with lambda 0.5 is what the authors' code and TRACE's (model/Regular/O_LoRA.py) do; their second penalty, on the
 * norms of the new pair, is zero by default there and is left to weight_decay here. The gradient goes to A_now alone:
 * lambda sign(O)^T A_old, or 2 lambda O^T A_old; with sign(0) = 0.
 *
 * The factors are those that forward reads, in the compute type: one product of A of a group, of all sites and tasks so
 * far, with A_now of it gives O of all its sites; the blocks between different sites, and of the present task with
 * itself, are set to zero. All O are read together, once in a step.
 */
#include <math.h>
#include <string.h>

#include "adapters/task_ranks.h"
#include "io/json.h"

static bool squared(const esp_adapter_cfg *c) {
  return c->orthogonal && strcmp(c->orthogonal, "frobenius") == 0;
}

static esp_status make_room(esp_adapter *a, int64_t size) {
  esp_task_ranks *tr = a->impl;
  esp_backend *be = a->params->be;
  if (tr->overlap_size >= size) return ESP_OK;
  if (tr->overlap) be->ops->free(be, tr->overlap);
  esp_mem_free(tr->overlap_host);
  tr->overlap_size = 0;
  tr->overlap = be->ops->alloc(be, ESP_MEM_WORKSPACE, size * 4);
  tr->overlap_host = esp_mem_alloc(ESP_MEM_HOST, 2 * (size_t)size * 4);
  if (!tr->overlap || !tr->overlap_host) return esp_backend_why_null(be);
  tr->overlap_size = size;
  return ESP_OK;
}

/* The penalty on the overlaps of a group, which become its derivative. */
static double penalty_of(const esp_adapter *a, const esp_task_group *tg, float *o) {
  double sum = 0;
  bool square = squared(&a->cfg);
  for (int i = 0; i < tg->n; i++) {
    const esp_task_site *ts = a->site_state[tg->sites[i]->index];
    for (int64_t p = 0; p < ts->rank; p++, o += tg->width) {
      bool old = p < ts->rank - ts->r;
      for (int64_t q = 0; q < tg->width; q++) {
        float x = old && q >= ts->t0 && q < ts->t0 + ts->r ? o[q] : 0.0f;
        sum += square ? (double)x * x : fabs((double)x);
        o[q] = square ? 2.0f * x : (float)((x > 0) - (x < 0));
      }
    }
  }
  return sum;
}

/* O of each group, or (back) what its derivative, in the compute type by then, adds to the gradient of A_now. */
static void products(const esp_adapter *a, bool back) {
  const esp_task_ranks *tr = a->impl;
  const esp_params *ps = a->params;
  const esp_backend_ops *ops = ps->be->ops;
  esp_group **groups;
  int n = esp_model_groups(a->model, &groups), current = tr->current;
  esp_dtype type = back ? ps->shadow_dtype : ESP_F32;
  char *at = (char *)tr->overlap;
  for (int i = 0; i < n; i++) {
    const esp_task_group *tg = a->group_state[i];
    if (!tg) continue;
    esp_tensor all = esp_task_ranks_all_a(a, tg, current + 1);
    esp_tensor o = esp_tensor_2d(at, type, esp_tensor_rows(&all), tg->width);
    esp_tensor now = esp_params_stacked(ps, tg->first_a[current], tg->n, back ? 2 : 0);
    if (back)
      ops->matmul(ps->be, now, o, true, all, false, (float)a->cfg.orthogonal_lambda, 1.0f);
    else
      ops->matmul(ps->be, o, all, false, now, true, 1.0f, 0.0f);
    at += esp_tensor_bytes(&o);
  }
}

static double olora_before_step(esp_adapter *a, int64_t step, int64_t total) {
  esp_task_ranks *tr = a->impl;
  esp_backend *be = a->params->be;
  esp_dtype type = a->params->shadow_dtype;
  esp_group **groups;
  int n = esp_model_groups(a->model, &groups);
  int64_t size = 0;
  double sum = 0;
  if (tr->current == 0 || a->cfg.orthogonal_lambda == 0) return 0;
  for (int i = 0; i < n; i++) {
    const esp_task_group *tg = a->group_state[i];
    if (tg) size += (tr->current + 1) * tg->width * tg->width;
  }
  esp_status st = make_room(a, size);
  if (st == ESP_OK) st = esp_task_ranks_pass(a);
  if (st != ESP_OK) {
    if (be->sticky == ESP_OK) be->sticky = st;
    return 0;
  }
  float *o = tr->overlap_host, *typed = o + size;
  products(a, false);
  be->ops->download(be, o, tr->overlap, size * 4);
  for (int i = 0; i < n; i++) {
    const esp_task_group *tg = a->group_state[i];
    if (!tg) continue;
    sum += penalty_of(a, tg, o);
    o += (tr->current + 1) * tg->width * tg->width;
  }
  esp_convert(typed, type, tr->overlap_host, ESP_F32, size);
  be->ops->upload(be, tr->overlap, typed, size * (int64_t)esp_dtype_size(type));
  products(a, true);
  return (double)(float)a->cfg.orthogonal_lambda * sum;
}

static bool olora_factors(const esp_adapter *a, const esp_site *s, int *A, int *B) {
  const esp_task_site *ts = a->targeted[s->index] ? a->site_state[s->index] : NULL;
  if (!ts) return false;
  *A = ts->a[esp_task_ranks_of(a)->current];
  *B = ts->b[esp_task_ranks_of(a)->current];
  return true;
}

static void olora_destroy(esp_adapter *a) {
  esp_task_ranks *tr = a->impl;
  if (!tr) return;
  esp_task_ranks_destroy(a);
  if (tr->overlap) a->params->be->ops->free(a->params->be, tr->overlap);
  esp_mem_free(tr->overlap_host);
}

static void olora_config_write(const esp_adapter *a, json_t *j) {
  esp_task_ranks_config_write(a, j);
  json_object_set_new(j, "orthogonal", json_string(squared(&a->cfg) ? "frobenius" : "l1"));
  json_object_set_new(j, "orthogonal_lambda", esp_json_number(a->cfg.orthogonal_lambda));
}

static esp_status olora_config_read(const json_t *j, const char *path, esp_arena *arena, esp_adapter_cfg *c) {
  const char *form = "l1";
  ESP_TRY(esp_task_ranks_config_read(j, path, arena, c));
  ESP_TRY(esp_json_str(j, "orthogonal", path, 0, &form));
  ESP_TRY(esp_json_f64(j, "orthogonal_lambda", path, 0, &c->orthogonal_lambda));
  if (strcmp(form, "l1") && strcmp(form, "frobenius"))
    return esp_fail(ESP_ERR_DATA, "%s: key 'orthogonal' must be l1 or frobenius", path);
  c->orthogonal = strcmp(form, "l1") ? "frobenius" : "l1";
  return ESP_OK;
}

static esp_status olora_config_check(const esp_adapter_cfg *c) {
  if (c->orthogonal && strcmp(c->orthogonal, "l1") && strcmp(c->orthogonal, "frobenius"))
    return esp_fail(ESP_ERR_RECIPE, "adapter.orthogonal: '%s' is not one of l1, frobenius", c->orthogonal);
  return esp_task_ranks_config_check(c);
}

const esp_adapter_kind esp_kind_olora_cl = {
    .name = "olora_cl",
    .peft_type = "OLORA_CL",
    .summary = "O-LoRA: a LoRA per task, its A kept orthogonal to the frozen ones of earlier tasks (arXiv:2310.14152)",
    .site_kinds = 1u << ESP_SITE_LINEAR,
    .mergeable = true,
    .targets = true,
    .open = esp_task_ranks_open,
    .declare = esp_task_ranks_declare,
    .declare_last = esp_task_ranks_declare_last,
    .init = esp_task_ranks_init,
    .pass = esp_task_ranks_pass,
    .tails = esp_task_ranks_tails,
    .output = esp_task_ranks_output,
    .tails_bwd = esp_task_ranks_tails_bwd,
    .input_bwd = esp_task_ranks_input_bwd,
    .wants_output = esp_task_ranks_wants_output,
    .destroy = olora_destroy,
    .before_step = olora_before_step,
    .task_begin = esp_task_ranks_begin,
    .in_file = esp_task_ranks_in_file,
    .materialise = esp_task_ranks_materialise,
    .factors = olora_factors,
    .low_rank = esp_task_ranks_low_rank,
    .config_write = olora_config_write,
    .config_read = olora_config_read,
    .config_check = olora_config_check,
};
