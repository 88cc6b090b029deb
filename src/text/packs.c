/* packs.c: which samples share a row. Best-fit-decreasing over the whole epoch (the sample goes into the fullest row
 * that still has room), then the rows are shuffled. Everything is a function of (samples, seed, task, epoch). */
#include <math.h>
#include <string.h>

#include "core/rng.h"
#include "text/data_priv.h"

struct esp_packs {
  const esp_dataset *data;
  int64_t n_rows, n_items, tokens, slots;
  int64_t *start; /* items of row r: start[r] .. start[r+1] */
  int64_t *item;  /* sample indices */
};

enum { BY_SHARE = 1, BY_ROW = 2 }; /* last word of the shuffle streams; 0 is the order of the samples */

/* The epoch's samples: floor(share) times each of a source, and a random part of it for the rest. */
static esp_status choose(const esp_dataset *d, const esp_data_cfg *cfg, uint64_t seed, int64_t task, int64_t epoch,
                         int64_t **out, int64_t *count) {
  int64_t total = 0, k = 0;
  for (int s = 0; s < d->n_shards; s++) {
    int64_t n = d->shards[s].n_samples;
    total += (int64_t)floor(d->share[s]) * n + n;
  }
  int64_t *list = esp_mem_alloc(ESP_MEM_DATA, (size_t)total * sizeof *list);
  int64_t *perm = esp_mem_alloc(ESP_MEM_DATA, (size_t)total * sizeof *perm);
  int64_t *order = NULL;
  esp_status st = ESP_OK;
  if (!list || !perm) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  for (int s = 0; s < d->n_shards; s++) {
    int64_t n = d->shards[s].n_samples, whole = (int64_t)floor(d->share[s]);
    int64_t part = (int64_t)floor((d->share[s] - (double)whole) * (double)n + 0.5);
    for (int64_t r = 0; r < whole; r++)
      for (int64_t i = 0; i < n; i++) list[k++] = d->first[s] + i;
    if (!part) continue;
    uint64_t stream = esp_rng_stream(ESP_RNG_SHUFFLE, (uint64_t)epoch, (uint64_t)task, BY_SHARE + 16u * (uint64_t)s);
    esp_rng_permutation(seed, stream, n, perm);
    for (int64_t i = 0; i < part; i++) list[k++] = d->first[s] + perm[i];
  }
  *count = k;
  if (cfg->shuffle) {
    order = esp_mem_alloc(ESP_MEM_DATA, (size_t)k * sizeof *order);
    if (!order) {
      st = ESP_ERR_MEMORY;
      goto out;
    }
    esp_rng_permutation(seed, esp_rng_stream(ESP_RNG_SHUFFLE, (uint64_t)epoch, (uint64_t)task, 0), k, perm);
    for (int64_t i = 0; i < k; i++) order[i] = list[perm[i]];
    *out = order;
    order = NULL;
  } else {
    *out = list;
    list = NULL;
  }
out:
  esp_mem_free(list);
  esp_mem_free(perm);
  esp_mem_free(order);
  return st;
}

static int64_t length(const esp_dataset *d, int64_t i) {
  const esp_shard *h;
  return esp_dataset_at(d, i, &h)->n;
}

/* ---- best fit: rows by room left, and the smallest room >= n found through a tree of "some row has this room" ---- */
typedef struct rooms {
  int64_t size;  /* power of two > sequence_len */
  uint8_t *tree; /* [2 * size]: leaf size + room */
  int64_t *head; /* room -> row, -1 */
  int64_t *next; /* row -> next row with equal room (last in, first out) */
} rooms;

static void room_mark(rooms *r, int64_t room, bool on) {
  int64_t i = r->size + room;
  r->tree[i] = on;
  for (i /= 2; i; i /= 2) r->tree[i] = r->tree[2 * i] | r->tree[2 * i + 1];
}

static void room_push(rooms *r, int64_t room, int64_t row) {
  if (r->head[room] < 0) room_mark(r, room, true);
  r->next[row] = r->head[room];
  r->head[room] = row;
}

/* Smallest room >= want, -1. */
static int64_t room_find(const rooms *r, int64_t want) {
  int64_t i = r->size + want;
  if (r->tree[i]) return want;
  while (i > 1 && ((i & 1) || !r->tree[i + 1])) i /= 2; /* up until there is something to the right */
  if (i <= 1) return -1;
  i++;
  while (i < r->size) i = r->tree[2 * i] ? 2 * i : 2 * i + 1;
  return i - r->size;
}

/* row_of[i] for each item; items longer than `limit` (no limit was set when they were made) get a row of their own. */
static esp_status best_fit(const int64_t *len, int64_t n, int64_t limit, int64_t *row_of, int64_t *n_rows) {
  esp_status st = ESP_OK;
  rooms r = {1, NULL, NULL, NULL};
  while (r.size <= limit) r.size *= 2;
  int64_t *count = esp_mem_alloc(ESP_MEM_DATA, (size_t)(limit + 3) * sizeof *count);
  int64_t *sorted = esp_mem_alloc(ESP_MEM_DATA, (size_t)n * sizeof *sorted);
  r.tree = esp_mem_alloc(ESP_MEM_DATA, (size_t)(2 * r.size));
  r.head = esp_mem_alloc(ESP_MEM_DATA, (size_t)r.size * sizeof *r.head);
  r.next = esp_mem_alloc(ESP_MEM_DATA, (size_t)n * sizeof *r.next);
  if (!count || !sorted || !r.tree || !r.head || !r.next) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  memset(r.head, 0xFF, (size_t)r.size * sizeof *r.head);
  /* Counting sort, longest first, stable. */
#define KEY(i) (len[i] > limit ? 0 : limit - len[i] + 1)
  for (int64_t i = 0; i < n; i++) count[KEY(i) + 1]++;
  for (int64_t i = 1; i < limit + 3; i++) count[i] += count[i - 1];
  for (int64_t i = 0; i < n; i++) sorted[count[KEY(i)]++] = i;
#undef KEY
  *n_rows = 0;
  for (int64_t k = 0; k < n; k++) {
    int64_t i = sorted[k], room = len[i] > limit ? -1 : room_find(&r, len[i]), row;
    if (room < 0) {
      row = (*n_rows)++;
      room = limit;
    } else {
      row = r.head[room];
      r.head[room] = r.next[row];
      if (r.head[room] < 0) room_mark(&r, room, false);
    }
    row_of[i] = row;
    if (len[i] < room) room_push(&r, room - len[i], row);
  }
out:
  esp_mem_free(count);
  esp_mem_free(sorted);
  esp_mem_free(r.tree);
  esp_mem_free(r.head);
  esp_mem_free(r.next);
  return st;
}

esp_status esp_packs_create(const esp_dataset *d, const esp_data_cfg *cfg, uint64_t seed, int64_t task, int64_t epoch,
                            esp_packs **out) {
  esp_status st = ESP_OK;
  int64_t *list = NULL, *len = NULL, *row_of = NULL, *place = NULL, *perm = NULL, *fill = NULL, n = 0, rows = 0;
  esp_packs *p = esp_mem_alloc(ESP_MEM_DATA, sizeof *p);
  if (!p) return ESP_ERR_MEMORY;
  p->data = d;
  ESP_GOTO(choose(d, cfg, seed, task, epoch, &list, &n));
  len = esp_mem_alloc(ESP_MEM_DATA, (size_t)n * sizeof *len);
  row_of = esp_mem_alloc(ESP_MEM_DATA, (size_t)n * sizeof *row_of);
  if (!len || !row_of) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  int64_t longest = 0;
  for (int64_t i = 0; i < n; i++) {
    len[i] = length(d, list[i]);
    p->tokens += len[i];
    longest = len[i] > longest ? len[i] : longest;
  }
  int64_t limit = cfg->sequence_len > 0 ? cfg->sequence_len : longest;
  if (cfg->packing == ESP_PACK_BFD) {
    ESP_GOTO(best_fit(len, n, limit, row_of, &rows));
  } else {
    for (int64_t i = 0; i < n; i++) row_of[i] = i;
    rows = n;
  }
  /* Rows in a random order, or by their first sample when the order is to be kept. */
  place = esp_mem_alloc(ESP_MEM_DATA, (size_t)rows * sizeof *place);
  perm = esp_mem_alloc(ESP_MEM_DATA, (size_t)rows * sizeof *perm);
  fill = esp_mem_alloc(ESP_MEM_DATA, (size_t)rows * sizeof *fill);
  p->start = esp_mem_alloc(ESP_MEM_DATA, (size_t)(rows + 1) * sizeof *p->start);
  p->item = esp_mem_alloc(ESP_MEM_DATA, (size_t)n * sizeof *p->item);
  if (!place || !perm || !fill || !p->start || !p->item) {
    st = ESP_ERR_MEMORY;
    goto out;
  }
  memset(place, 0xFF, (size_t)rows * sizeof *place);
  int64_t seen = 0;
  if (cfg->shuffle && cfg->packing == ESP_PACK_BFD) {
    esp_rng_permutation(seed, esp_rng_stream(ESP_RNG_SHUFFLE, (uint64_t)epoch, (uint64_t)task, BY_ROW), rows, perm);
    for (int64_t i = 0; i < rows; i++) place[perm[i]] = i;
  } else {
    for (int64_t i = 0; i < n; i++)
      if (place[row_of[i]] < 0) place[row_of[i]] = seen++;
  }
  for (int64_t i = 0; i < n; i++) p->start[place[row_of[i]] + 1]++;
  for (int64_t i = 0; i < rows; i++) p->start[i + 1] += p->start[i];
  for (int64_t i = 0; i < n; i++) {
    int64_t row = place[row_of[i]];
    p->item[p->start[row] + fill[row]++] = list[i];
  }
  p->n_rows = rows;
  p->n_items = n;
  p->slots = rows * limit;
  *out = p;
  p = NULL;
out:
  esp_packs_destroy(p);
  esp_mem_free(list);
  esp_mem_free(len);
  esp_mem_free(row_of);
  esp_mem_free(place);
  esp_mem_free(perm);
  esp_mem_free(fill);
  return st;
}

void esp_packs_destroy(esp_packs *p) {
  if (!p) return;
  esp_mem_free(p->start);
  esp_mem_free(p->item);
  esp_mem_free(p);
}

int64_t esp_packs_count(const esp_packs *p) {
  return p->n_rows;
}

double esp_packs_fill(const esp_packs *p) {
  return p->slots ? (double)p->tokens / (double)p->slots : 0;
}

double esp_packs_row_weight(const esp_packs *p, int64_t i) {
  double sum = 0;
  if (i < 0 || i >= p->n_rows) return 0;
  for (int64_t k = p->start[i]; k < p->start[i + 1]; k++) {
    const int32_t *ids;
    const float *w;
    int64_t n;
    esp_dataset_sample(p->data, p->item[k], &ids, &w, &n);
    for (int64_t t = 1; t < n; t++) sum += w[t];
  }
  return sum;
}

/* ---- micro-batches ---- */
static esp_status grow(void *slot, int64_t count, size_t size) {
  void **p = slot, *q = esp_mem_realloc(ESP_MEM_DATA, *p, (size_t)count * size);
  if (!q) return ESP_ERR_MEMORY;
  *p = q;
  return ESP_OK;
}

static esp_status reserve(esp_rows *r, int64_t tokens, int64_t seqs) {
  if (tokens > r->cap_tokens) {
    int64_t cap = tokens + tokens / 4;
    ESP_TRY(grow(&r->ids, cap, sizeof *r->ids));
    ESP_TRY(grow(&r->targets, cap, sizeof *r->targets));
    ESP_TRY(grow(&r->positions, cap, sizeof *r->positions));
    ESP_TRY(grow(&r->weights, cap, sizeof *r->weights));
    r->cap_tokens = cap;
  }
  if (seqs + 1 > r->cap_seqs) {
    int64_t cap = seqs + 1 + seqs / 4;
    ESP_TRY(grow(&r->cu_seqlens, cap, sizeof *r->cu_seqlens));
    r->cap_seqs = cap;
  }
  return ESP_OK;
}

void esp_rows_clear(esp_rows *r) {
  r->tokens = 0;
  r->n_seqs = 0;
  r->weight_sum = 0;
}

esp_status esp_rows_add(esp_rows *out, const int32_t *ids, const float *w, int64_t n) {
  int64_t at = out->tokens;
  if (at + n > INT32_MAX) return esp_fail(ESP_ERR_DATA, "a micro-batch of %lld tokens", (long long)(at + n));
  ESP_TRY(reserve(out, at + n, out->n_seqs + 1));
  for (int64_t t = 0; t < n; t++) {
    out->ids[at + t] = ids[t];
    out->targets[at + t] = t + 1 < n ? ids[t + 1] : 0;
    out->weights[at + t] = t + 1 < n ? w[t + 1] : 0;
    out->positions[at + t] = (int32_t)t;
    out->weight_sum += out->weights[at + t];
  }
  out->tokens += n;
  out->cu_seqlens[0] = 0;
  out->cu_seqlens[++out->n_seqs] = (int32_t)out->tokens;
  return ESP_OK;
}

esp_status esp_rows_pad(esp_rows *r, int64_t tokens) {
  static const int32_t zero_id = 0;
  static const float zero_weight = 0;
  int64_t pad = tokens > r->tokens ? tokens - r->tokens : 0;
  ESP_TRY(reserve(r, r->tokens + pad, r->n_seqs + pad));
  while (pad-- > 0) ESP_TRY(esp_rows_add(r, &zero_id, &zero_weight, 1));
  return ESP_OK;
}

esp_status esp_packs_fetch(const esp_packs *p, int64_t first, int64_t n, int64_t pad_to, esp_rows *out) {
  int64_t beyond = 0;
  esp_rows_clear(out);
  for (int64_t r = first; r < first + n; r++) {
    if (r >= p->n_rows) beyond++; /* beyond the end: one token that nobody is trained on */
    for (int64_t k = r < p->n_rows ? p->start[r] : 0; r < p->n_rows && k < p->start[r + 1]; k++) {
      const int32_t *ids;
      const float *w;
      int64_t m;
      esp_dataset_sample(p->data, p->item[k], &ids, &w, &m);
      ESP_TRY(esp_rows_add(out, ids, w, m));
    }
  }
  int64_t least = out->tokens + beyond;
  return esp_rows_pad(out, pad_to > least ? pad_to : least);
}

void esp_rows_deinit(esp_rows *r) {
  esp_mem_free(r->ids);
  esp_mem_free(r->targets);
  esp_mem_free(r->positions);
  esp_mem_free(r->weights);
  esp_mem_free(r->cu_seqlens);
  memset(r, 0, sizeof *r);
}
