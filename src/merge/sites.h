/* sites.h: tensors of a file and the modules they belong to; what adapters make of rows as they are stored. */
#ifndef ESP_MERGE_SITES_H
#define ESP_MERGE_SITES_H

#include "core/map.h"
#include "io/safetensors.h"
#include "merge/open.h"

typedef struct esp_site_map {
  esp_map *weight, *bias; /* tensor name -> site; a tied head is the embedding's tensor */
  const char *tied;       /* the tensor that embedding and head share; NULL: they do not */
} esp_site_map;
esp_status esp_site_map_init(esp_site_map *m, const esp_model *model);
void esp_site_map_deinit(esp_site_map *m);
esp_site *esp_site_map_weight(const esp_site_map *m, const char *tensor); /* NULL: of no module */
/* The tensor of a file, where a shared one may be stored under either of its names. NULL: it is not there. */
const esp_st_entry *esp_site_map_find(const esp_site_map *m, const esp_st *file, const char *tensor);
esp_site *esp_site_map_bias(const esp_site_map *m, const char *tensor);

/* Do these adapters make a head of a tied model other than the embedding: changed alone, or left when that is changed?
 */
bool esp_adapters_untie(esp_adapter *const *list, int n_list, const esp_site *head, const esp_model *model);

/* Rows as the file holds them: a transposed weight is [in, out], and then only all of them. A bias is one row. */
esp_status esp_site_read_stored(const esp_model *m, const esp_site *s, bool bias, int64_t r0, int64_t n, float *w);
/* w: the base's rows in, the effective ones out. */
esp_status esp_adapters_stored_rows(esp_adapter *const *list, int n_list, esp_site *s, bool bias, int64_t r0, int64_t n,
                                    float *w);

#endif
