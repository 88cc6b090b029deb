/* attention.c: chooses who does attention, and describes a pass's packed sequences to either.
 *
 * cuDNN's plans and recorded pieces want fixed shapes, so sequences come in buckets: their count is padded with empty
 * ones, the longest length is rounded up. The true lengths and offsets lie in device memory, written by attn_begin at
 * the same addresses whenever the buckets are the same.
 *
 * The deterministic backward of cuDNN costs sequences * longest^2 of memory, which for many short documents beside one
 * long one is far more than the work. Since at most T/(s+1) sequences are longer than s, the sequences ranked by length
 * are cut into groups whose sizes and bounds depend on T alone: the T/(s/2+1) longest with bound s, the next with
 * bound s/2, and so on. Each group's workspace is then at most 2*T*s per head, its shapes recur from pass to pass, and
 * no sequence is padded to more than its rank allows. Within a group sequences keep the order of their tokens.
 *
 * Which implementation is used is decided by shapes alone: the same in a pass that is issued, recorded or planned. */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <nvtx3/nvToolsExt.h>

#include "backend/cuda/cuda.h"
#include "backend/cuda/need.h"
#include "backend/cuda/sdpa.h"

enum { MAX_SLOTS = 32, MAX_GROUPS = ESP_ATTN_MAX_GROUPS, MAX_STRIDES = ESP_ATTN_MAX_STRIDES };
enum mode { AUTO, CUDNN, FLASH, ATOMIC };

/* Sequences that one execution takes: `b` of them, the surplus empty, none longer than `s`. */
typedef struct group {
  int64_t b, s;
  int64_t at; /* its first entry in the slot's arrays; it has b + 1, the last one T */
} group;

/* Device memory for passes of one bucket of counts. `entries` are those of all groups. */
typedef struct slot {
  int64_t n;       /* the bucket; 0: unused */
  int64_t entries; /* room */
  char *device, *host;
  int64_t cu, tiles, lens, ragged, bytes; /* offsets; ragged: MAX_STRIDES arrays of `entries` int64 */
} slot;

struct esp_cuda_attn {
  enum mode mode;
  esp_sdpa_plans *plans;
  slot slots[MAX_SLOTS];
  int64_t strides[MAX_STRIDES]; /* of all ragged tensors seen so far: every pass writes their offsets */
  int n_strides;
  /* the pass */
  slot *now;
  int64_t tokens, longest;
  int n_seqs;
  int32_t *cu; /* copy of the host's, [n_seqs+1] */
  int cap_cu;
  int32_t *first, *len; /* host, [entries]: first row and length of each entry */
  int64_t cap_first;
  group whole, groups[MAX_GROUPS]; /* all sequences at once; ranked by length */
  int n_groups;
};

/* ---- the pass ---- */

/* Where the groups of a pass lie. A function of the buckets and T. */
static void lay_groups(esp_cuda_attn *at, int64_t n, int64_t longest, int64_t tokens) {
  at->whole = (group){.b = n, .s = longest};
  at->n_groups = 0;
  /* Sequences of about one length: padding them all costs at most twice their tokens. */
  if (n * longest <= 2 * tokens || longest <= ESP_ATTN_SHORTEST) {
    at->groups[at->n_groups++] = at->whole;
    return;
  }
  int64_t rank = 0, entry = (n + 1 + 3) / 4 * 4;
  for (int64_t s = longest; rank < n;) {
    int64_t shorter = ESP_ATTN_SHORTEST;
    while (shorter * 2 < s) shorter *= 2;
    int64_t longer = s <= ESP_ATTN_SHORTEST ? n : tokens / (shorter + 1); /* can be longer than the next bound */
    int64_t b = (longer < n ? longer : n) - rank;
    if (b > 0) {
      assert(at->n_groups < MAX_GROUPS);
      at->groups[at->n_groups++] = (group){.b = b, .s = s, .at = entry};
      entry += (b + 1 + 3) / 4 * 4;
      rank += b;
    }
    s = shorter;
  }
}

/* Addresses depend on the bucket of counts alone. */
static slot *slot_of(esp_backend *be, int64_t n) {
  esp_cuda_attn *at = esp_cuda_of(be)->attn;
  slot *s = at->slots;
  while (s < at->slots + MAX_SLOTS && s->n && s->n != n) s++;
  if (s == at->slots + MAX_SLOTS) {
    be->sticky = esp_fail(ESP_ERR_INTERNAL, "cuda: attention: more buckets of sequences than there are");
    return NULL;
  }
  if (s->n) return s;
  slot made = {.n = n, .entries = esp_attn_entries(n)};
  made.tiles = made.cu + esp_attn_round((n + 1) * 4);
  made.lens = made.tiles + esp_attn_round((n + 1) * 4);
  made.ragged = made.lens + esp_attn_round(made.entries * 4);
  made.bytes = esp_cuda_need_attn_begin(n);
  made.host = malloc((size_t)made.bytes);
  made.device = made.host ? esp_cuda_alloc(be, ESP_MEM_WORKSPACE, made.bytes) : NULL;
  if (!made.device) {
    if (!made.host) be->sticky = esp_fail(ESP_ERR_MEMORY, "cuda: out of host memory");
    free(made.host);
    return NULL;
  }
  memset(made.host, 0, (size_t)made.bytes);
  *s = made;
  return s;
}

typedef struct ranked {
  int32_t len, index;
} ranked;
static int by_length(const void *x, const void *y) {
  const ranked *a = x, *b = y;
  if (a->len != b->len) return a->len < b->len ? 1 : -1;
  return a->index < b->index ? -1 : a->index > b->index;
}

/* Entries of one group: its sequences in the order of their tokens, then empty ones at the end of the tokens. */
static void fill_group(esp_cuda_attn *at, const group *g, const uint8_t *group_of, int which) {
  int64_t e = g->at;
  for (int i = 0; i < at->n_seqs; i++) {
    if (group_of && group_of[i] != which) continue;
    assert(e < g->at + g->b && at->cu[i + 1] - at->cu[i] <= g->s);
    at->first[e] = at->cu[i];
    at->len[e++] = at->cu[i + 1] - at->cu[i];
  }
  for (; e <= g->at + g->b; e++) {
    at->first[e] = (int32_t)at->tokens;
    at->len[e] = 0;
  }
}

static bool fill_entries(esp_cuda_attn *at) {
  fill_group(at, &at->whole, NULL, 0);
  if (at->groups[0].at == 0) return true;
  ranked *order = malloc((size_t)at->n_seqs * sizeof *order);
  uint8_t *group_of = malloc((size_t)at->n_seqs);
  bool ok = order && group_of;
  if (ok) {
    for (int i = 0; i < at->n_seqs; i++) order[i] = (ranked){at->cu[i + 1] - at->cu[i], i};
    qsort(order, (size_t)at->n_seqs, sizeof *order, by_length);
    int64_t rank = 0;
    for (int g = 0; g < at->n_groups; g++)
      for (int64_t k = 0; k < at->groups[g].b && rank < at->n_seqs; k++) group_of[order[rank++].index] = (uint8_t)g;
    for (int g = 0; g < at->n_groups; g++) fill_group(at, &at->groups[g], group_of, g);
  }
  free(order);
  free(group_of);
  return ok;
}

static void fill_ragged(const esp_cuda_attn *at, int i) {
  int64_t *out = (int64_t *)(at->now->host + at->now->ragged) + i * at->now->entries;
  for (int64_t e = 0; e < at->now->entries; e++) out[e] = at->first[e] * at->strides[i];
}

/* Room for `n` more in a list of the host's. */
static bool grow(void **list, int64_t n, size_t size) {
  void *p = realloc(*list, (size_t)n * size);
  if (p) *list = p;
  return p != NULL;
}

static bool remember(esp_cuda_attn *at, const slot *s, const int32_t *cu, int n_seqs) {
  if (n_seqs + 1 > at->cap_cu) {
    if (!grow((void **)&at->cu, n_seqs + 1, sizeof *at->cu)) return false;
    at->cap_cu = n_seqs + 1;
  }
  if (s->entries > at->cap_first) {
    if (!grow((void **)&at->first, s->entries, sizeof *at->first) ||
        !grow((void **)&at->len, s->entries, sizeof *at->len))
      return false;
    at->cap_first = s->entries;
  }
  memcpy(at->cu, cu, (size_t)(n_seqs + 1) * sizeof *cu);
  memset(at->first, 0, (size_t)s->entries * sizeof *at->first);
  memset(at->len, 0, (size_t)s->entries * sizeof *at->len);
  return true;
}

uint64_t esp_cuda_attn_begin(esp_backend *be, const int32_t *cu_seqlens, int n_seqs) {
  esp_cuda_attn *at = esp_cuda_of(be)->attn;
  if (be->sticky != ESP_OK || n_seqs <= 0) return 0;
  int64_t n = esp_attn_count_bucket(n_seqs), longest = 1;
  for (int i = 0; i < n_seqs; i++)
    if (cu_seqlens[i + 1] - cu_seqlens[i] > longest) longest = cu_seqlens[i + 1] - cu_seqlens[i];
  slot *s = slot_of(be, n);
  if (!s) return 0;
  at->now = NULL;
  if (!remember(at, s, cu_seqlens, n_seqs)) {
    be->sticky = esp_fail(ESP_ERR_MEMORY, "cuda: out of host memory");
    return 0;
  }
  at->n_seqs = n_seqs;
  at->tokens = cu_seqlens[n_seqs];
  at->longest = esp_attn_length_bucket(longest);
  lay_groups(at, n, at->longest, at->tokens);
  if (!fill_entries(at)) {
    be->sticky = esp_fail(ESP_ERR_MEMORY, "cuda: out of host memory");
    return 0;
  }
  at->now = s;
  int32_t *cu = (int32_t *)(s->host + s->cu), *tiles = (int32_t *)(s->host + s->tiles);
  for (int64_t i = 0; i <= n; i++) cu[i] = i < n ? at->first[i] : (int32_t)at->tokens;
  tiles[0] = 0;
  for (int64_t i = 0; i < n; i++) tiles[i + 1] = tiles[i] + (at->len[i] + ESP_FLASH_TILE - 1) / ESP_FLASH_TILE;
  memcpy(s->host + s->lens, at->len, (size_t)s->entries * sizeof *at->len);
  for (int i = 0; i < at->n_strides; i++) fill_ragged(at, i);
  esp_cuda_upload(be, s->device, s->host, s->ragged + at->n_strides * s->entries * 8);

  uint64_t key = 0x9e3779b97f4a7c15u;
  const int64_t parts[] = {n, at->longest, at->tokens};
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
    key = (key ^ (uint64_t)parts[i]) * 0xff51afd7ed558ccdu;
    key ^= key >> 32;
  }
  return key ? key : 1;
}

/* Offsets of ragged tensors with this stride, on the device. They are added to those of every later pass. NULL: no room
 * (then the own kernels do it). */
static const int64_t *ragged_offsets(esp_backend *be, int64_t stride) {
  esp_cuda_attn *at = esp_cuda_of(be)->attn;
  int i = 0;
  while (i < at->n_strides && at->strides[i] != stride) i++;
  if (i == MAX_STRIDES) return NULL;
  int64_t offset = at->now->ragged + i * at->now->entries * 8;
  if (i == at->n_strides) {
    if (esp_cuda_of(be)->capturing) {
      be->sticky = esp_fail(ESP_ERR_INTERNAL, "cuda: attention: a layout that appears first inside a recorded piece");
      return NULL;
    }
    at->strides[at->n_strides++] = stride;
    fill_ragged(at, i);
    esp_cuda_upload(be, at->now->device + offset, at->now->host + offset, at->now->entries * 8);
  }
  return (const int64_t *)(at->now->device + offset);
}

static esp_cuda_seqs seqs_of(const esp_cuda_attn *at) {
  const slot *s = at->now;
  return (esp_cuda_seqs){.cu = (const int32_t *)(s->device + s->cu),
                         .tiles = (const int32_t *)(s->device + s->tiles),
                         .n = (int)s->n,
                         .longest = (int)at->longest,
                         .n_tiles = (int)(at->tokens / ESP_FLASH_TILE + s->n)};
}

/* The sequences that an operation names are those of the pass; a caller that did not announce them does so now. */
static bool in_pass(esp_backend *be, const esp_attn_args *a) {
  const esp_cuda_attn *at = esp_cuda_of(be)->attn;
  if (be->sticky != ESP_OK || esp_tensor_rows(&a->q) == 0) return false;
  if (at->now && at->n_seqs == a->n_seqs &&
      memcmp(at->cu, a->cu_seqlens, (size_t)(a->n_seqs + 1) * sizeof *at->cu) == 0)
    return true;
  if (esp_cuda_of(be)->capturing) {
    be->sticky = esp_fail(ESP_ERR_INTERNAL, "cuda: attention: sequences that were not announced");
    return false;
  }
  esp_cuda_attn_begin(be, a->cu_seqlens, a->n_seqs);
  return be->sticky == ESP_OK;
}

/* ---- cuDNN ---- */

static int64_t ld(const esp_tensor *t) {
  return t->ndim > 1 ? t->ld : esp_tensor_cols(t);
}
static bool aligned(const esp_tensor *t) {
  return t->dtype == ESP_BF16 && (uintptr_t)t->data % 16 == 0 && ld(t) % 8 == 0;
}

static bool cudnn_takes(const esp_cuda_attn *at, const esp_attn_args *a, bool backward) {
  if (at->mode == FLASH || !esp_attn_cudnn_shape(a, backward)) return false;
  bool ok = aligned(&a->q) && aligned(&a->k) && aligned(&a->v) && aligned(&a->o) && (uintptr_t)a->lse % 16 == 0;
  if (backward) ok = ok && aligned(&a->d_o) && aligned(&a->d_q) && aligned(&a->d_k) && aligned(&a->d_v);
  return ok && esp_sdpa_plans_usable(at->plans, backward);
}

static esp_sdpa_shape shape_of(const esp_attn_args *a, const group *g) {
  esp_sdpa_shape s = {.b = g->b, .s = g->s, .heads = a->heads, .kv_heads = a->kv_heads, .head_dim = a->head_dim};
  s.ld_q = ld(&a->q);
  s.ld_k = ld(&a->k);
  s.ld_v = ld(&a->v);
  s.ld_o = ld(&a->o);
  s.ld_stats = a->heads;
  s.causal = a->causal;
  s.window = a->window > 0 && a->window < g->s ? a->window : 0; /* as wide as the sequences: none */
  return s;
}

static const float minus_infinity = -__builtin_inff(), one = 1;

/* Lengths and offsets of a group, and the scalars that the graph of `s` has. False: no room for another layout. */
static bool bind_common(esp_backend *be, const esp_sdpa_shape *s, const group *g, const float *scale,
                        const float *window, esp_sdpa_binding *b) {
  const esp_cuda_attn *at = esp_cuda_of(be)->attn;
  const int32_t *lens = (const int32_t *)(at->now->device + at->now->lens) + g->at;
  int64_t strides[ESP_SDPA_MAX_STRIDES];
  int n = esp_sdpa_strides(s, strides);
  for (int i = 0; i < n; i++) {
    const int64_t *offsets = ragged_offsets(be, strides[i]);
    if (!offsets) return false;
    esp_sdpa_bind(b, ESP_SDPA_RAGGED + i, offsets + g->at);
  }
  esp_sdpa_bind(b, ESP_SDPA_LENS, lens);
  esp_sdpa_bind(b, ESP_SDPA_LENS_KV, lens);
  esp_sdpa_bind(b, ESP_SDPA_SCALE, scale);
  esp_sdpa_bind(b, ESP_SDPA_NINF_PADDING, &minus_infinity);
  if (s->causal) esp_sdpa_bind(b, ESP_SDPA_NINF_CAUSAL, &minus_infinity);
  if (s->window) {
    esp_sdpa_bind(b, ESP_SDPA_NINF_WINDOW, &minus_infinity);
    esp_sdpa_bind(b, ESP_SDPA_WINDOW, window);
  }
  return true;
}

static void run(esp_backend *be, const char *name, const esp_sdpa_plan *plan, const esp_sdpa_binding *b,
                void *workspace) {
  if (be->sticky != ESP_OK) return;
  nvtxRangePushA(name);
  be->sticky = esp_sdpa_run(esp_cuda_of(be)->attn->plans, plan, b, workspace);
  nvtxRangePop();
}

/* False, with nothing done: cuDNN does not take it. */
static bool cudnn_forward(esp_backend *be, const esp_attn_args *a) {
  esp_cuda_attn *at = esp_cuda_of(be)->attn;
  if (!cudnn_takes(at, a, false)) return false;
  esp_sdpa_shape s = shape_of(a, &at->whole);
  int64_t workspace = esp_attn_fwd_workspace(a);
  const esp_sdpa_plan *plan = esp_sdpa_plans_get(at->plans, &s, workspace);
  if (!plan) return false;
  float window = (float)s.window;
  esp_sdpa_binding b = {.n = 0};
  if (!bind_common(be, &s, &at->whole, &a->scale, &window, &b)) return false;
  char *scratch = esp_cuda_scratch(be, esp_cuda_need_attn(a));
  if (!scratch) return true; /* the failure is set */
  esp_sdpa_bind(&b, ESP_SDPA_Q, a->q.data);
  esp_sdpa_bind(&b, ESP_SDPA_K, a->k.data);
  esp_sdpa_bind(&b, ESP_SDPA_V, a->v.data);
  esp_sdpa_bind(&b, ESP_SDPA_O, a->o.data);
  /* One plan for training and evaluation, where nobody reads the statistics. */
  esp_sdpa_bind(&b, ESP_SDPA_STATS, a->lse ? (char *)a->lse : scratch + workspace);
  run(be, "attention (cuDNN)", plan, &b, scratch);
  return true;
}

/* Heads of keys that a group's execution takes: the most that divide them and whose dS fits. 0: not even one.
 * Statistics of some heads must begin at a multiple of 16 bytes. */
static int64_t heads_at_a_time(const esp_attn_args *a, const group *g, int64_t workspace_bytes) {
  int64_t of_group = a->heads / a->kv_heads, room = workspace_bytes - ESP_ATTN_EXTRA_BYTES(g->b);
  for (int64_t c = a->kv_heads; c > 0; c--)
    if (a->kv_heads % c == 0 && g->b * c * of_group * g->s * g->s * 2 <= room) return c;
  return 0;
}

typedef struct backward {
  const esp_attn_args *a;
  esp_cuda_attn_scratch need;
  esp_tensor dk, dv; /* where cuDNN writes them */
  bool grouped;
  char *scratch;
  float *dq_sum; /* atomic mode */
} backward;

static esp_sdpa_shape backward_shape(const backward *w, const group *g, int64_t kv_heads, bool atomic) {
  const esp_attn_args *a = w->a;
  esp_sdpa_shape s = shape_of(a, g);
  s.backward = 1;
  s.atomic = atomic;
  s.heads = kv_heads * (a->heads / a->kv_heads);
  s.kv_heads = kv_heads;
  s.ld_do = ld(&a->d_o);
  s.ld_dq = ld(&a->d_q);
  s.ld_dk = ld(&w->dk);
  s.ld_dv = ld(&w->dv);
  return s;
}

static char *column(const esp_tensor *t, int64_t col) {
  return (char *)t->data + col * (int64_t)esp_dtype_size(t->dtype);
}

/* One group, heads of keys [first, first + s->kv_heads). */
static bool backward_part(esp_backend *be, const backward *w, const group *g, const esp_sdpa_shape *s,
                          const esp_sdpa_plan *plan, int64_t first) {
  const esp_attn_args *a = w->a;
  int64_t head = first * (a->heads / a->kv_heads), col = head * a->head_dim, kv_col = first * a->head_dim;
  float window = (float)s->window;
  esp_sdpa_binding b = {.n = 0};
  if (!bind_common(be, s, g, &a->scale, &window, &b)) return false;
  esp_sdpa_bind(&b, ESP_SDPA_ONE, &one);
  esp_sdpa_bind(&b, ESP_SDPA_Q, column(&a->q, col));
  esp_sdpa_bind(&b, ESP_SDPA_K, column(&a->k, kv_col));
  esp_sdpa_bind(&b, ESP_SDPA_V, column(&a->v, kv_col));
  esp_sdpa_bind(&b, ESP_SDPA_O, column(&a->o, col));
  esp_sdpa_bind(&b, ESP_SDPA_DO, column(&a->d_o, col));
  esp_sdpa_bind(&b, ESP_SDPA_DQ, column(&a->d_q, col));
  esp_sdpa_bind(&b, ESP_SDPA_DK, column(&w->dk, kv_col));
  esp_sdpa_bind(&b, ESP_SDPA_DV, column(&w->dv, kv_col));
  esp_sdpa_bind(&b, ESP_SDPA_STATS, a->lse + head);
  esp_sdpa_bind(&b, ESP_SDPA_SUM, (float *)(w->scratch + w->need.sum) + head);
  if (w->grouped) {
    esp_sdpa_bind(&b, ESP_SDPA_DK_FULL, w->scratch + w->need.dk_full + col * 2);
    esp_sdpa_bind(&b, ESP_SDPA_DV_FULL, w->scratch + w->need.dv_full + col * 2);
  }
  if (s->atomic) esp_sdpa_bind(&b, ESP_SDPA_DQ_SUM, w->dq_sum);
  run(be, "attention backward (cuDNN)", plan, &b, w->scratch + w->need.workspace);
  return true;
}

static void copy_out(esp_backend *be, const esp_tensor *to, const esp_tensor *from) {
  if (to->data != from->data) esp_cuda_axpby(be, *to, 1.0f, *from, 0.0f);
}

/* False, with nothing done: cuDNN does not take it. */
static bool cudnn_backward(esp_backend *be, const esp_attn_args *a) {
  esp_cuda_attn *at = esp_cuda_of(be)->attn;
  if (!cudnn_takes(at, a, true)) return false;
  bool atomic = at->mode == ATOMIC;
  backward w = {.a = a, .need = esp_cuda_attn_scratch_of(a), .dk = a->d_k, .dv = a->d_v};
  w.grouped = a->heads != a->kv_heads;
  int64_t kv_width = (int64_t)a->kv_heads * a->head_dim, tokens = esp_tensor_rows(&a->q);
  /* cuDNN ties the stride of the gradients per query head to that of dK: narrow rows keep both small. */
  bool apart = w.grouped && (ld(&a->d_k) != kv_width || ld(&a->d_v) != kv_width);
  if (apart) w.dk.ld = w.dv.ld = kv_width;

  const group *groups = atomic ? &at->whole : at->groups;
  int n_groups = atomic ? 1 : at->n_groups;
  esp_sdpa_shape shapes[MAX_GROUPS];
  const esp_sdpa_plan *plans[MAX_GROUPS];
  for (int g = 0; g < n_groups; g++) {
    int64_t heads = atomic ? a->kv_heads : heads_at_a_time(a, &groups[g], w.need.workspace_bytes);
    if (heads == 0) return false;
    shapes[g] = backward_shape(&w, &groups[g], heads, atomic);
    plans[g] = esp_sdpa_plans_get(at->plans, &shapes[g], w.need.workspace_bytes);
    int64_t strides[ESP_SDPA_MAX_STRIDES];
    int n = esp_sdpa_strides(&shapes[g], strides);
    for (int i = 0; i < n; i++)
      if (!ragged_offsets(be, strides[i])) return be->sticky != ESP_OK;
    if (!plans[g]) return false;
  }
  /* The sums of atomic mode are not in the plan: it is for comparison. */
  int64_t dq_bytes = atomic ? tokens * ld(&a->d_q) * 4 : 0, bytes = esp_cuda_need_attn_bwd(a);
  w.scratch = esp_cuda_scratch(be, esp_attn_round(bytes) + dq_bytes);
  if (!w.scratch) return true; /* the failure is set */
  w.dq_sum = (float *)(w.scratch + esp_attn_round(bytes));
  if (apart) {
    w.dk.data = w.scratch + w.need.dk;
    w.dv.data = w.scratch + w.need.dv;
  }
  for (int g = 0; g < n_groups; g++)
    for (int64_t first = 0; first < a->kv_heads; first += shapes[g].kv_heads)
      if (!backward_part(be, &w, &groups[g], &shapes[g], plans[g], first)) return be->sticky != ESP_OK;
  copy_out(be, &a->d_k, &w.dk);
  copy_out(be, &a->d_v, &w.dv);
  return true;
}

/* ---- the operations ---- */

/* With ESPALIER_CUDA_ATTENTION=cudnn (or atomic) nothing else is tried. */
static bool must_be_cudnn(esp_backend *be) {
  const esp_cuda_attn *at = esp_cuda_of(be)->attn;
  if (at->mode != CUDNN && at->mode != ATOMIC) return false;
  esp_sdpa_facts facts;
  esp_sdpa_plans_facts(at->plans, &facts);
  esp_cuda_fail(be, "cuDNN", "attention of this shape is not taken, and ESPALIER_CUDA_ATTENTION asks for it",
                facts.why[0] ? facts.why : "type, head size, alignment or soft cap");
  return true;
}

void esp_cuda_attn_op(esp_backend *be, const esp_attn_args *a) {
  if (!in_pass(be, a) || cudnn_forward(be, a) || must_be_cudnn(be)) return;
  esp_cuda_seqs seqs = seqs_of(esp_cuda_of(be)->attn);
  esp_cuda_flash(be, a, &seqs);
}

void esp_cuda_attn_bwd_op(esp_backend *be, const esp_attn_args *a) {
  if (!in_pass(be, a) || cudnn_backward(be, a) || must_be_cudnn(be)) return;
  esp_cuda_seqs seqs = seqs_of(esp_cuda_of(be)->attn);
  esp_cuda_flash_bwd(be, a, &seqs);
}

static esp_status mode_of(const char *name, enum mode *out) {
  static const char *const names[] = {[AUTO] = "auto", [CUDNN] = "cudnn", [FLASH] = "flash", [ATOMIC] = "atomic"};
  *out = AUTO;
  if (!name || !name[0]) return ESP_OK;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    if (strcmp(name, names[i]) != 0) continue;
    *out = (enum mode)i;
    return ESP_OK;
  }
  return esp_fail(ESP_ERR_RECIPE, "ESPALIER_CUDA_ATTENTION=%s: auto, cudnn, flash or atomic", name);
}

esp_status esp_cuda_attn_create(esp_backend *be) {
  esp_cuda *c = esp_cuda_of(be);
  struct cudaDeviceProp p;
  esp_cuda_attn *at = c->attn = calloc(1, sizeof *at);
  if (!at) return esp_fail(ESP_ERR_MEMORY, "cuda: out of host memory");
  ESP_TRY(mode_of(getenv("ESPALIER_CUDA_ATTENTION"), &at->mode));
  if (!esp_cuda_ok(be, cudaGetDeviceProperties(&p, c->device), "properties of the device")) return be->sticky;
  return esp_sdpa_plans_open(c->stream, p.name, c->cc, &at->plans);
}

void esp_cuda_attn_destroy(esp_backend *be) {
  esp_cuda_attn *at = esp_cuda_of(be)->attn;
  if (!at) return;
  esp_sdpa_plans_close(at->plans);
  for (int i = 0; i < MAX_SLOTS; i++) {
    esp_cuda_free(be, at->slots[i].device);
    free(at->slots[i].host);
  }
  free(at->cu);
  free(at->first);
  free(at->len);
  free(at);
  esp_cuda_of(be)->attn = NULL;
}
