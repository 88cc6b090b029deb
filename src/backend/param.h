/* param.h: trained parameters. A store is a list of named parameters laid out back to back in flat buffers: fp32
 * master, fp32 gradient, and a shadow in the compute type that forward and backward read. Clipping, all-reduce,
 * optimizers and checkpoints work on the flat buffers; neighbours in declaration order are neighbours in memory, which
 * is what lets q, k and v share one stacked down-projection. */
#ifndef ESP_BACKEND_PARAM_H
#define ESP_BACKEND_PARAM_H

#include "backend/backend.h"
#include "core/arena.h"

typedef struct esp_param {
  const char
      *name; /* the full key of the PEFT file, e.g. base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight */
  int ndim;
  int64_t shape[ESP_MAX_DIMS];
  int64_t numel, offset; /* elements; offset into the flat buffers */
  bool decay;            /* weight decay applies */
  bool frozen;           /* kept in the store but not updated */
  bool local;            /* made again from the configuration: not in the adapter's file */
  bool pad;              /* begins at an aligned offset */
  int group;             /* learning-rate group, 0 by default */
} esp_param;

typedef struct esp_params {
  esp_backend *be;
  esp_arena *arena;
  esp_param *list; /* valid after finalize; indices are stable */
  int count, cap;
  int64_t total; /* elements of the flat buffers, each parameter padded to 16 elements */
  esp_dtype shadow_dtype;
  float *master, *grad;
  void *shadow; /* == master when shadow_dtype is ESP_F32 */
  /* Elements that parameters may grow by in the course of a run (ranks that are added): the counting backend holds them
   * from the start, so that a plan has the largest sizes. Set before finalize. */
  int64_t reserve;
  /* Flat buffers beside the master that belong to its elements, see esp_params_follow. */
  float **follow[8];
  esp_mem_kind follow_kind[8];
  int n_follow;
  /* Count what may have changed the shadow: esp_params_set and a refresh; steps of the optimizer, which leave what is
   * frozen as it is. */
  uint64_t writes, steps;
  int64_t cleared_from, cleared_to; /* what esp_params_zero_grad cleared last; outside of it all was zero before */
} esp_params;

esp_status esp_params_create(esp_backend *be, esp_params **out);
void esp_params_destroy(esp_params *ps);
/* Before finalize. Returns the index, or -1 (error set). pad == false puts it right behind its predecessor without
 * alignment padding, so that two matrices of equal width stack. */
int esp_params_add(esp_params *ps, const char *name, int ndim, const int64_t *shape, bool pad);
/* Allocates the buffers. with_grad false: inference only. */
esp_status esp_params_finalize(esp_params *ps, esp_dtype shadow, bool with_grad);
/* Host values in, host values out (fp32, numel elements). Setting refreshes the shadow. */
void esp_params_set(esp_params *ps, int index, const float *host);
void esp_params_get(const esp_params *ps, int index, float *host);
void esp_params_refresh_shadow(esp_params *ps);
/* The stretch of the flat buffers that everything which is not frozen lies in: gradients are cleared, added over ranks
 * and measured there. Outside of it they are zero: what is frozen gets none. */
void esp_params_span(const esp_params *ps, int64_t *from, int64_t *to);
void esp_params_zero_grad(esp_params *ps);
int esp_params_find(const esp_params *ps, const char *name); /* -1 when absent */
/* Allocates a flat fp32 buffer of `total` elements at *at (optimizer state, running statistics): it moves with its
 * parameters when these change their shapes. leave frees it. */
esp_status esp_params_follow(esp_params *ps, float **at, esp_mem_kind kind);
void esp_params_leave(esp_params *ps, float **at);

/* Views for forward and backward; rows/cols as declared (1-D: [1, n]). */
esp_tensor esp_param_shadow(const esp_params *ps, int index);
esp_tensor esp_param_master(const esp_params *ps, int index);
esp_tensor esp_param_grad(const esp_params *ps, int index);
/* A 2-D view over `n` parameters declared one behind the other with equal width: [sum of rows, width]. */
esp_tensor esp_params_stacked(const esp_params *ps, int first, int n, int which /* 0 shadow, 1 master, 2 grad */);

#endif
