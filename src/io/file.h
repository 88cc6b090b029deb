/* file.h: whole files, atomic replacement, directories, hashes. Errors are ESP_ERR_DATA with the path and strerror. */
#ifndef ESP_IO_FILE_H
#define ESP_IO_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/error.h"

/* Reads all of a file, zero-terminated; free with esp_mem_free. */
esp_status esp_file_read(const char *path, char **data, size_t *n);
/* Temporary file beside it, fsync, rename, fsync of the directory: the path holds the old or the new bytes, never less.
 */
esp_status esp_file_write_atomic(const char *path, const void *data, size_t n);
typedef struct esp_map_file {
  const char *data;
  size_t size;
} esp_map_file;
esp_status esp_file_map(const char *path, esp_map_file *out);
void esp_file_unmap(esp_map_file *m);
bool esp_file_exists(const char *path);
bool esp_dir_exists(const char *path);
esp_status esp_mkdirs(const char *path); /* with parents */
esp_status esp_remove_tree(const char *path);
esp_status esp_copy_file(const char *src, const char *dst); /* atomic */
esp_status esp_fsync_dir(const char *path);
/* Makes `dir` from a temporary sibling: build into esp_dir_stage's path, then commit renames it into place (an existing
 * dir is replaced: renamed away first, removed after). */
esp_status esp_dir_stage(const char *dir, char *staged, size_t n);
esp_status esp_dir_commit(const char *staged, const char *dir);
int64_t esp_disk_free(const char *path);                     /* bytes, -1 unknown */
void esp_hash_hex(const void *data, size_t n, char out[33]); /* xxh3-128 */
esp_status esp_file_hash(const char *path, char out[33]);
/* "a/b" joined with exactly one slash. Returns out. */
char *esp_path_join(char *out, size_t n, const char *a, const char *b);

#endif
