/* rows.c: vectors over the rows of a batch, one pair per active adapter: its share in each row, and one minus that.
 * Products with 0 and 1 are exact (x * 1 + 0), so a row is computed as if its adapter were the only one that is active.
 */
#include "adapters/rows.h"

#include "adapters/internal.h"

/* What has an effect on rows that it is not given, or has no rows of the batch at all. */
static esp_status check(const esp_adapter *a) {
  esp_site **sites;
  int n = esp_model_sites(a->model, &sites);
  for (int i = 0; i < n; i++) {
    const esp_site *s = sites[i];
    if (a->modules->weight[i] >= 0 || a->modules->bias[i] >= 0)
      return esp_fail(ESP_ERR_RECIPE, "adapter '%s' (%s) trains %s in full: it cannot be chosen per row", a->name,
                      a->kind->name, s->path);
    /* the head sees the rows that are predicted, not those of the batch */
    if (a->targeted[i] && s->is_head)
      return esp_fail(ESP_ERR_RECIPE, "adapter '%s' (%s) is on %s: it cannot be chosen per row", a->name, a->kind->name,
                      s->path);
  }
  if (a->modules->tokens >= 0)
    return esp_fail(ESP_ERR_RECIPE, "adapter '%s' trains token rows: it cannot be chosen per row", a->name);
  if (a->kind->product != ESP_PRODUCT_BASE)
    return esp_fail(ESP_ERR_RECIPE, "adapter '%s': %s replaces the product of the base: it cannot be chosen per row",
                    a->name, a->kind->name);
  return ESP_OK;
}

static esp_status reserve(esp_rows *r, esp_backend *be, int64_t elements) {
  if (elements <= r->cap) return ESP_OK;
  esp_rows_leave(r);
  r->be = be;
  r->mask = be->ops->alloc(be, ESP_MEM_WORKSPACE, elements * (int64_t)sizeof *r->mask);
  if (!r->mask) return esp_backend_why_null(be);
  r->cap = elements;
  return ESP_OK;
}

static esp_status check_choice(const esp_batch *b, esp_adapter *const *list, int n) {
  for (int i = 0; b->adapters && !b->shares && i < b->n_seqs; i++)
    if (b->adapters[i] < -1 || b->adapters[i] >= n)
      return esp_fail(ESP_ERR_RECIPE, "sequence %d chooses adapter %d of %d active ones", i + 1, b->adapters[i], n);
  if (b->shares && b->n_shares != n)
    return esp_fail(ESP_ERR_RECIPE, "%d weights per sequence for %d active adapters", b->n_shares, n);
  for (int k = 0; k < n; k++) {
    ESP_TRY(check(list[k]));
    if (b->shares && list[k]->kind->virtual_tokens)
      return esp_fail(ESP_ERR_RECIPE, "adapter '%s': the rows that %s puts in front of a sequence have no weight",
                      list[k]->name, list[k]->kind->name);
    for (int i = 0; b->shares && list[k]->kind->alone && i < b->n_seqs; i++)
      if (b->shares[i * n + k] != 0 && b->shares[i * n + k] != 1)
        return esp_fail(ESP_ERR_RECIPE, "adapter '%s': the change of %s is no sum: it cannot be weighted per row",
                        list[k]->name, list[k]->kind->name);
  }
  return ESP_OK;
}

esp_status esp_rows_begin(esp_rows *r, esp_run *run, esp_adapter *const *list, int n) {
  const esp_batch *b = run->batch;
  r->on = b->adapters || b->shares;
  r->tokens = b->tokens;
  if (!r->on) return ESP_OK;
  ESP_TRY(check_choice(b, list, n));
  int64_t elements = 2 * (int64_t)n * b->tokens;
  ESP_TRY(reserve(r, run->be, elements));
  float *host = esp_mem_alloc(ESP_MEM_HOST, (size_t)elements * sizeof *host);
  if (!host) return ESP_ERR_MEMORY;
  for (int k = 0; k < n; k++)
    for (int i = 0; i < b->n_seqs; i++) {
      float share = b->shares ? b->shares[i * n + k] : b->adapters[i] == k ? 1.0f : 0.0f;
      for (int64_t t = b->cu_seqlens[i]; t < b->cu_seqlens[i + 1]; t++) {
        host[2 * k * b->tokens + t] = share;
        host[(2 * k + 1) * b->tokens + t] = 1.0f - share;
      }
    }
  run->be->ops->upload(run->be, r->mask, host, elements * (int64_t)sizeof *host);
  esp_mem_free(host);
  return run->be->sticky;
}

void esp_rows_leave(esp_rows *r) {
  if (r->mask) r->be->ops->free(r->be, r->mask);
  r->mask = NULL;
  r->cap = 0;
}

static esp_tensor mask(const esp_rows *r, int k, bool others) {
  return esp_tensor_1d(r->mask + (2 * k + others) * r->tokens, ESP_F32, r->tokens);
}

esp_tensor esp_rows_copy(esp_run *run, esp_tensor x) {
  esp_tensor y = esp_stack_tensor(run->stack, x.dtype, esp_tensor_rows(&x), esp_tensor_cols(&x));
  run->be->ops->axpby(run->be, y, 1.0f, x, 0.0f);
  return y;
}

esp_tensor esp_rows_only(const esp_rows *r, esp_run *run, int k, esp_tensor x) {
  esp_tensor y = esp_stack_tensor(run->stack, x.dtype, esp_tensor_rows(&x), esp_tensor_cols(&x));
  run->be->ops->mul_rows(run->be, y, x, mask(r, k, false), 0.0f);
  return y;
}

void esp_rows_join(const esp_rows *r, esp_run *run, int k, esp_tensor y, esp_tensor before) {
  run->be->ops->mul_rows(run->be, y, y, mask(r, k, false), 0.0f);
  run->be->ops->mul_rows(run->be, y, before, mask(r, k, true), 1.0f);
}

void esp_rows_put(const esp_rows *r, esp_run *run, int k, esp_tensor y, esp_tensor mine) {
  run->be->ops->mul_rows(run->be, y, y, mask(r, k, true), 0.0f);
  run->be->ops->axpby(run->be, y, 1.0f, mine, 1.0f);
}
