/* sources.h: what can be merged against a base, read as task vectors tensor by tensor: a model directory, an adapter
 * directory, or a stored difference (residual.h). Everything stays in its file until a block of rows is asked for. */
#ifndef ESP_MERGE_SOURCES_H
#define ESP_MERGE_SOURCES_H

#include "merge/blend.h"
#include "merge/residual.h"
#include "merge/sites.h"
#include "merge/write.h"

typedef struct esp_source {
  const char *path;
  esp_st *file;           /* a model */
  esp_adapter *adapter;   /* borrowed from the inputs */
  esp_residual *residual; /* a stored difference */
} esp_source;

typedef struct esp_sources {
  const char *base_dir;
  esp_merge_inputs in;
  esp_st *base;
  esp_site_map sites;
  esp_source list[ESP_MERGE_MOST];
  int n;
  const esp_out_tensor *reading; /* the tensor that vectors are read of */
  float *scratch;                /* of an adapter's read: the base's rows, grown as needed */
  int64_t scratch_size;
} esp_sources;

/* Every source is held to the base: the same family, the same tensors, the same shapes. */
esp_status esp_sources_open(const char *base, const char *const *paths, int n, esp_sources *s);
void esp_sources_close(esp_sources *s);
/* The base's tensors; `changed` and `whole` are set. */
esp_status esp_sources_list(esp_sources *s, int dtype, esp_out_tensor **list, int *n);
/* Vectors of t, valid until the next call; reading borrows s. */
esp_vectors esp_sources_vectors(esp_sources *s, const esp_out_tensor *t);
/* Pages of t that were read from the sources are not needed any more. */
void esp_sources_drop(const esp_sources *s, const esp_out_tensor *t);

#endif
