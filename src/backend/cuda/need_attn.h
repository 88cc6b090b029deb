/* need_attn.h: see need.h. Memory of attention on a device, and the buckets of shapes it is issued in. */
#ifndef ESP_BACKEND_CUDA_NEED_ATTN_H
#define ESP_BACKEND_CUDA_NEED_ATTN_H

#include "backend/backend.h"
#include "backend/cuda/need_flash.h"

/* The deterministic backward of cuDNN on Hopper writes dS = [sequences, heads, longest, longest] in bf16. This bounds
 * it: the operation takes as many heads at a time as fit. 512 MiB holds 8 of the 32 query heads of two sequences of
 * 4096. */
#define ESP_ATTN_DS_BYTES ((int64_t)512 << 20)
/* What an execution may want besides: semaphores, a few numbers per sequence. (Measured: 17 KiB + 132 bytes each.) */
#define ESP_ATTN_EXTRA_BYTES(n) (((int64_t)1 << 16) + (int64_t)(n)*512)

enum { ESP_ATTN_SHORTEST = 128 }; /* smallest bucket of lengths: a tile of cuDNN's */

static inline int64_t esp_attn_round(int64_t bytes) {
  return (bytes + 255) / 256 * 256;
}
/* Counts of sequences come in powers of two, lengths in powers of two and, from 4096 up, halfway between. Every bucket
 * is a plan to compile and a piece to record; an empty sequence and an empty tile cost next to nothing. */
static inline int64_t esp_attn_count_bucket(int64_t n) {
  int64_t b = 1;
  while (b < n) b *= 2;
  return b;
}
static inline int64_t esp_attn_length_bucket(int64_t longest) {
  int64_t b = ESP_ATTN_SHORTEST;
  while (b < longest) b *= 2;
  return b >= 8192 && b / 4 * 3 >= longest ? b / 4 * 3 : b;
}

/* A pass's description of `n_seqs` sequences, held for each bucket of counts that occurs: first rows, tiles, lengths,
 * and the offsets of ragged tensors for each distinct stride. Sequences appear once all together and once in a group of
 * similar length; a group is never empty and ends with one entry more, on a multiple of four. */
enum { ESP_ATTN_MAX_GROUPS = 24, ESP_ATTN_MAX_STRIDES = 16 };
static inline int64_t esp_attn_entries(int64_t bucket) {
  int64_t groups = bucket < ESP_ATTN_MAX_GROUPS ? bucket : ESP_ATTN_MAX_GROUPS;
  return (2 * bucket + 4 * (groups + 1) + 3) / 4 * 4;
}
static inline int64_t esp_cuda_need_attn_begin(int64_t n_seqs) {
  int64_t n = esp_attn_count_bucket(n_seqs), entries = esp_attn_entries(n);
  return 2 * esp_attn_round((n + 1) * 4) + esp_attn_round(entries * 4) + ESP_ATTN_MAX_STRIDES * entries * 8;
}

/* Shapes that cuDNN may take; the own kernels take the rest. (Its packed backward is faulty where the head size is no
 * multiple of 16.) */
static inline bool esp_attn_cudnn_shape(const esp_attn_args *a, bool backward) {
  return a->q.dtype == ESP_BF16 && a->softcap == 0 && a->head_dim <= 256 && a->head_dim % (backward ? 16 : 8) == 0 &&
         a->heads % a->kv_heads == 0;
}

/* Buffers of cuDNN's backward, at these offsets of the scratch memory. Gradients of keys and values come per query head
 * first where several share one, [T, heads*head_dim]; NVIDIA's frontend reserves 4 bytes for each of their bf16 values,
 * and so does this. */
typedef struct esp_cuda_attn_scratch {
  int64_t sum;              /* [T, heads] fp32 */
  int64_t dk_full, dv_full; /* grouped heads only */
  int64_t dk, dv;           /* grouped heads only: [T, kv_heads*head_dim] */
  int64_t workspace, workspace_bytes;
  int64_t bytes;
} esp_cuda_attn_scratch;
static inline esp_cuda_attn_scratch esp_cuda_attn_scratch_of(const esp_attn_args *a) {
  int64_t t = esp_tensor_rows(&a->q), width = (int64_t)a->heads * a->head_dim;
  int64_t kv_width = (int64_t)a->kv_heads * a->head_dim, at = esp_attn_round(t * a->heads * 4);
  esp_cuda_attn_scratch s = {0};
  if (a->heads != a->kv_heads) {
    s.dk_full = at;
    s.dv_full = s.dk_full + esp_attn_round(t * width * 4);
    s.dk = s.dv_full + esp_attn_round(t * width * 4);
    s.dv = s.dk + esp_attn_round(t * kv_width * 2);
    at = s.dv + esp_attn_round(t * kv_width * 2);
  }
  /* Sequences are taken in groups of similar length (attention.c), whose sizes times bounds are at most 2*T. */
  int64_t longest = esp_attn_length_bucket(t), sides = 2 * t > longest ? 2 * t : longest;
  int64_t ds = 2 * (int64_t)a->heads * sides * longest;
  s.workspace = at;
  s.workspace_bytes = (ds < ESP_ATTN_DS_BYTES ? ds : ESP_ATTN_DS_BYTES) + ESP_ATTN_EXTRA_BYTES(t);
  s.bytes = s.workspace + s.workspace_bytes;
  return s;
}

/* cuDNN's forward: its workspace, then statistics that nobody asked for, [T, heads] fp32. */
static inline int64_t esp_attn_fwd_workspace(const esp_attn_args *a) {
  return esp_attn_round(ESP_ATTN_EXTRA_BYTES(esp_attn_count_bucket(esp_tensor_rows(&a->q))));
}
static inline int64_t esp_cuda_need_attn(const esp_attn_args *a) {
  if (!esp_attn_cudnn_shape(a, false)) return 0;
  return esp_attn_fwd_workspace(a) + (a->lse ? 0 : esp_tensor_rows(&a->q) * a->heads * 4);
}
static inline int64_t esp_cuda_need_attn_bwd(const esp_attn_args *a) {
  int64_t own = esp_cuda_need_flash_bwd(a);
  int64_t cudnn = esp_attn_cudnn_shape(a, true) ? esp_cuda_attn_scratch_of(a).bytes : 0;
  return own > cudnn ? own : cudnn;
}

#endif
