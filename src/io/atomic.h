/* atomic.h: a file that appears whole or not at all. Private to the io room.
 *
 * The bytes go into an unnamed file where the file system can do that (O_TMPFILE), so that even SIGKILL leaves nothing
 * behind; elsewhere into a hidden sibling. Commit: fsync, name, rename over the target, fsync of the directory. */
#ifndef ESP_IO_ATOMIC_H
#define ESP_IO_ATOMIC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/error.h"

typedef struct esp_atomic_file {
  int fd; /* -1: not open */
  bool named;
  char *path, *temp; /* esp_mem */
} esp_atomic_file;

esp_status esp_atomic_open(esp_atomic_file *f, const char *path);
/* All n bytes at the offset, or an error that names the file. */
esp_status esp_atomic_write(esp_atomic_file *f, const void *data, size_t n, int64_t offset);
/* Asks for the space now where the file system can, so that a full disk is known before the work is done. */
esp_status esp_atomic_reserve(esp_atomic_file *f, int64_t bytes);
/* Closes in every case; on failure the target is untouched and the temporary file is gone. */
esp_status esp_atomic_commit(esp_atomic_file *f);
void esp_atomic_abort(esp_atomic_file *f);

/* ".name.<tag>-<pid>-<n>" beside `path`, which must not end in a slash; owned by the caller (esp_mem_free). */
char *esp_sibling(const char *path, const char *tag);
/* The directory part of a path, "." where there is none; owned by the caller. */
char *esp_parent_dir(const char *path);

#endif
