/* prefix.h: between prefix.c and prefix_fold.c, the network that a prefix may be trained through. */
#ifndef ESP_ADAPTERS_PREFIX_H
#define ESP_ADAPTERS_PREFIX_H

#include "adapters/adapter.h"

/* Behind "prompt_embeddings", the adapter's first parameter, those of the network; d: width of keys. */
esp_status esp_prefix_fold_open(esp_adapter *a, int64_t d);
void esp_prefix_fold_destroy(esp_adapter *a);
esp_status esp_prefix_fold_start(esp_adapter *a, bool zero);
/* scratch: backend memory, fp32, of three times (fold: twice) so many elements. fold: the first parameter, master and
 * shadow, from the network. bwd: the network's gradient from that of the first parameter, which is zero then. */
int64_t esp_prefix_fold_scratch(const esp_adapter *a);
void esp_prefix_fold(const esp_adapter *a, float *scratch);
void esp_prefix_fold_bwd(esp_adapter *a, float *scratch);

#endif
