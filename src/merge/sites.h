/* sites.h: tensors of a file and the modules they belong to; what adapters make of rows as they are stored. */
#ifndef ESP_MERGE_SITES_H
#define ESP_MERGE_SITES_H

#include "core/map.h"
#include "merge/open.h"

typedef struct esp_site_map {
  esp_map *weight, *bias; /* tensor name -> site; a tied head has no tensor of its own */
} esp_site_map;
esp_status esp_site_map_init(esp_site_map *m, const esp_model *model);
void esp_site_map_deinit(esp_site_map *m);
esp_site *esp_site_map_weight(const esp_site_map *m, const char *tensor); /* NULL: of no module */
esp_site *esp_site_map_bias(const esp_site_map *m, const char *tensor);

/* Rows as the file holds them: a transposed weight is [in, out], and then only all of them. A bias is one row. */
esp_status esp_site_read_stored(const esp_model *m, const esp_site *s, bool bias, int64_t r0, int64_t n, float *w);
/* w: the base's rows in, the effective ones out. */
esp_status esp_adapters_stored_rows(esp_adapter *const *list, int n_list, esp_site *s, bool bias, int64_t r0, int64_t n,
                                    float *w);

#endif
