/* map.h: string -> pointer hash map (open addressing, xxh3). Keys are borrowed: they must outlive the map. */
#ifndef ESP_CORE_MAP_H
#define ESP_CORE_MAP_H

#include <stdbool.h>
#include <stddef.h>

typedef struct esp_map esp_map;
esp_map *esp_map_create(size_t expected); /* NULL on failure, error set */
void esp_map_destroy(esp_map *m);
bool esp_map_put(esp_map *m, const char *key, size_t key_len, void *value); /* false on failure; replaces */
void *esp_map_get(const esp_map *m, const char *key, size_t key_len);       /* NULL when absent */
bool esp_map_has(const esp_map *m, const char *key, size_t key_len);
size_t esp_map_count(const esp_map *m);
/* Edit distance, for "did you mean". */
int esp_edit_distance(const char *a, const char *b);
/* The closest of n names within distance 3 and a third of the length; NULL if none. */
const char *esp_closest(const char *word, const char *const *names, int n);

#endif
