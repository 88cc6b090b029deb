/* sparse_mask.c: which entries a sparse update has. The k largest scores are found exactly without holding the scores
 * of more than one matrix on the host: scores are not negative, so their bit patterns are ordered as they are; a
 * histogram of the upper halves finds the bin of the k-th, one of the lower halves within that bin its value, and equal
 * scores are taken in the order of the list. The choice is therefore the same on any number of threads or ranks. */
#include <math.h>
#include <string.h>

#include "adapters/sparse.h"

int64_t esp_sparse_counts(const esp_adapter *a, sparse_mask *m) {
  double share = a->cfg.sparse_density;
  int64_t sum = 0;
  for (int i = 0; i < m->n_sites; i++) {
    sparse_site *ss = a->site_state[m->sites[i]->index];
    ss->n = (int64_t)floor(share * (double)(m->sites[i]->out * m->sites[i]->in));
    if (ss->n < 1) ss->n = 1;
    ss->k0 = sum;
    sum += ss->n;
  }
  return sum;
}

typedef struct ranking { /* of sites first .. last-1 */
  esp_adapter *a;
  sparse_mask *m;
  sparse_score score;
  float *host;
  int64_t *bins; /* [65536] */
  int first, last;
} ranking;

static uint32_t bits_of(float x) {
  uint32_t u;
  if (!(x > 0)) return 0; /* also what is not a number */
  memcpy(&u, &x, sizeof u);
  return u;
}

static esp_status histogram(const ranking *r, bool lower, uint32_t upper_half) {
  memset(r->bins, 0, 65536 * sizeof *r->bins);
  for (int i = r->first; i < r->last; i++) {
    esp_site *s = r->m->sites[i];
    ESP_TRY(r->score(r->a, s, r->host));
    for (int64_t k = 0; k < s->out * s->in; k++) {
      uint32_t u = bits_of(r->host[k]);
      if (!lower)
        r->bins[u >> 16]++;
      else if (u >> 16 == upper_half)
        r->bins[u & 0xFFFF]++;
    }
  }
  return ESP_OK;
}

/* The bin that holds the k-th from above; *k becomes its place within the bin. */
static uint32_t bin_of(const int64_t *bins, int64_t *k) {
  uint32_t b = 65535;
  while (b > 0 && bins[b] < *k) *k -= bins[b--];
  return b;
}

/* The `count` largest of the range, in the order of the list, from entry `at` on. */
static esp_status take(const ranking *r, int64_t count, int64_t at) {
  int64_t equal = count;
  ESP_TRY(histogram(r, false, 0));
  uint32_t upper = bin_of(r->bins, &equal);
  ESP_TRY(histogram(r, true, upper));
  uint32_t limit = upper << 16 | bin_of(r->bins, &equal);
  for (int i = r->first; i < r->last; i++) {
    esp_site *s = r->m->sites[i];
    sparse_site *ss = r->a->site_state[s->index];
    ESP_TRY(r->score(r->a, s, r->host));
    for (int64_t o = 0; o < s->out; o++) {
      int64_t before = at;
      for (int64_t c = 0; c < s->in; c++) {
        uint32_t u = bits_of(r->host[o * s->in + c]);
        if (u < limit || (u == limit && equal-- <= 0)) continue;
        r->m->column[at++] = (int32_t)c;
      }
      r->m->row_count[ss->row0 + o] = (int32_t)(at - before);
    }
  }
  return ESP_OK;
}

esp_status esp_sparse_choose(esp_adapter *a, sparse_mask *m, sparse_score score) {
  int64_t largest = 0;
  for (int i = 0; i < m->n_sites; i++)
    largest = m->sites[i]->out * m->sites[i]->in > largest ? m->sites[i]->out * m->sites[i]->in : largest;
  ranking r = {.a = a, .m = m, .score = score, .last = m->n_sites};
  r.host = esp_mem_alloc(ESP_MEM_WORKSPACE, (size_t)largest * sizeof *r.host);
  r.bins = esp_mem_alloc(ESP_MEM_WORKSPACE, 65536 * sizeof *r.bins);
  esp_status st = r.host && r.bins ? ESP_OK : ESP_ERR_MEMORY;
  bool counts = esp_backend_counts(a->params->be); /* nothing to rank: the books have what ranking holds */
  if (st == ESP_OK && !counts && a->kind == &esp_kind_spu) {
    esp_sparse_counts(a, m);
    for (int i = 0; i < m->n_sites && st == ESP_OK; i++) {
      const sparse_site *ss = a->site_state[m->sites[i]->index];
      r.first = i;
      r.last = i + 1;
      st = take(&r, ss->n, ss->k0);
    }
  } else if (st == ESP_OK && !counts) {
    st = take(&r, m->total, 0);
  }
  esp_mem_free(r.host);
  esp_mem_free(r.bins);
  return st == ESP_OK && !counts ? esp_sparse_build(a, m) : st;
}

/* One site's rows turned into columns: counting sort by column, stable in the row. */
static void transpose(const esp_site *s, const int32_t *start, const int32_t *column, int32_t *t_start,
                      int32_t *t_index, int32_t *t_order) {
  for (int32_t k = 0; k < start[s->out]; k++) t_start[column[k] + 1]++;
  for (int64_t c = 0; c < s->in; c++) t_start[c + 1] += t_start[c];
  for (int64_t o = 0; o < s->out; o++)
    for (int32_t k = start[o]; k < start[o + 1]; k++) {
      int32_t at = t_start[column[k]]++;
      t_index[at] = (int32_t)o;
      t_order[at] = k;
    }
  memmove(t_start + 1, t_start, (size_t)s->in * sizeof *t_start); /* each is now the start of the next */
  t_start[0] = 0;
}

esp_status esp_sparse_build(esp_adapter *a, sparse_mask *m) {
  const esp_backend_ops *ops = a->params->be->ops;
  int64_t starts = m->rows + m->n_sites, t_starts = m->cols + m->n_sites, at = 0;
  int32_t *start = esp_mem_alloc(ESP_MEM_HOST, (size_t)(starts + t_starts + 2 * m->total) * sizeof *start);
  if (!start) return ESP_ERR_MEMORY;
  int32_t *t_start = start + starts, *t_index = t_start + t_starts, *t_order = t_index + m->total;
  for (int i = 0; i < m->n_sites; i++) {
    const esp_site *s = m->sites[i];
    sparse_site *ss = a->site_state[s->index];
    int32_t *from = start + ss->row0 + i;
    for (int64_t o = 0; o < s->out; o++) from[o + 1] = from[o] + m->row_count[ss->row0 + o];
    ss->k0 = at;
    ss->n = from[s->out];
    transpose(s, from, m->column + at, t_start + ss->col0 + i, t_index + at, t_order + at);
    at += ss->n;
  }
  ops->upload(a->params->be, m->start, start, starts * (int64_t)sizeof *start);
  ops->upload(a->params->be, m->t_start, t_start, t_starts * (int64_t)sizeof *start);
  ops->upload(a->params->be, m->index, m->column, m->total * (int64_t)sizeof *start);
  ops->upload(a->params->be, m->t_index, t_index, m->total * (int64_t)sizeof *start);
  ops->upload(a->params->be, m->t_order, t_order, m->total * (int64_t)sizeof *start);
  esp_mem_free(start);
  m->chosen = true;
  a->revision++;
  return a->params->be->sticky;
}
